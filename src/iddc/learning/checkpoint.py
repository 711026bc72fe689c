"""The training state on disk: written whole or not at all, read without running code from it."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from safetensors.torch import save
from torch import nn

from iddc.errors import DataError, IddcError
from iddc.images import ImageFile, names_of
from iddc.runs import WRITTEN, Run, disk_errors, refuse_newer, write_atomic


class State(TypedDict):
    """All that a run needs to go on as if it had not stopped.

    Random numbers are no part of it: they follow from the seed and the step.
    """

    step: int
    """Steps done."""
    threads: int
    """PyTorch's threads: sums on the CPU are the same, bit by bit, only for the same number."""
    files: str
    """A digest of the names of the images."""
    left_out: dict[str, str]
    """The names of unreadable images, and the reasons."""
    learner: dict[str, Any]
    """What has learned, as its own `state` gave it."""


def save_state(run: Run, state: State) -> None:
    """Replace the checkpoint of a run.

    Raises:
        SetupError: It cannot be written; the one before is still there.
    """
    # Through memory, because torch.save turns a full disk into an error without its cause.
    buffer = io.BytesIO()
    torch.save({**WRITTEN, **state}, buffer)
    write_atomic(run.checkpoint, buffer.getbuffer())


def save_snapshot(run: Run, epoch: int, trained: nn.Module) -> None:
    """Keep what has trained at the end of an epoch, counted from 1.

    Raises:
        SetupError: It cannot be written.
    """
    path = run.path / "snapshots" / f"{epoch:04}.safetensors"
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.state_dict().items()}
    write_atomic(path, save(tensors))


def load_state(run: Run, files: str) -> State | None:
    """Read the checkpoint of a run, if there is one.

    Raises:
        DataError: It cannot be read, or the images are not those it was trained on.
    """
    if not run.checkpoint.exists():
        return None
    try:
        state: State = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
        refuse_newer(state, run.checkpoint)
        state = _of_older(state, run)
        kept = state["files"]
    except IddcError:
        raise
    except Exception as e:  # a damaged archive raises many things
        raise DataError(
            f"{run.checkpoint} cannot be read. Delete it to train from the start."
        ) from e
    if kept != files:
        raise DataError(
            f"The images are not those that {run.path} was trained on until it was interrupted. "
            "Restore them, or start anew with --overwrite."
        )
    return state


def _of_older(state: Any, run: Run) -> State:
    """A state as older versions wrote it, in which only IDDC goes on."""
    if "learner" in state:
        return cast("State", state)
    if "network" not in state:
        raise DataError(
            f"{run.path} was begun by an older iddc, and its training cannot go on. Start it anew "
            "with --overwrite."
        )
    learner = {name: state[name] for name in ("step", "optimizer", "losses", "shares", "best")}
    learner["learning"] = {
        re.sub(r"^0\.(\d+)\.", r"0.\1.head.", name): tensor
        for name, tensor in state["network"].items()
    } | {f"0.{i}._extra_state": state["thresholds"] for i in range(len(state["losses"]))}
    common = {name: state[name] for name in ("step", "threads", "files", "left_out")}
    return cast("State", {**common, "learner": learner})


def digest(files: Sequence[ImageFile]) -> str:
    """A short text that differs if the names of the images, or their order, do."""
    names = "\0".join(names_of(files))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
