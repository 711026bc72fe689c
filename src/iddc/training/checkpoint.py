"""The training state on disk: written whole or not at all, read without running code from it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from safetensors.torch import save
from torch import Tensor, nn

from iddc.errors import DataError, IddcError
from iddc.images import ImageFile
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
    network: dict[str, Tensor]
    """The heads, and the backbone if it trains."""
    optimizer: dict[str, Any]
    losses: Tensor
    """The mean loss of each head in the last steps."""
    shares: Tensor
    """The part of the patches that each cluster of each head won in them."""
    best: int
    """The place of the head of the lowest loss."""
    thresholds: tuple[float | str, float | str]
    """t+ and t-; `auto` before the first step."""
    left_out: dict[str, str]
    """The names of unreadable images, and the reasons."""


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


def digest(files: Sequence[ImageFile]) -> str:
    """A short text that differs if the names of the images, or their order, do."""
    names = "\0".join(str(file.name) for file in files)
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
