"""The layout of a RUN folder.

config.yaml      every choice of the run and which images it saw; with it a folder counts as a run
versions.json    what computed it
log.jsonl        one line per training step
skipped.csv      the images that were left out, and why
checkpoint/      the training state; it goes when the model is complete
model.json       with model.safetensors, the result; a run that has it and no checkpoint is finished
samples/         four images with their clusters, after every tenth of the run
scores.json      one entry per data set, split, protocol and refinement
diagnosis.json   what was seen when the loss or a gradient was not finite any more
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from iddc import __version__
from iddc.config import Experiment
from iddc.errors import ConfigError, DataError
from iddc.runs.configfile import WRITTEN, differences, load_config, read_record, refuse_newer
from iddc.runs.files import TEMPORARY, disk_errors, locked, read_text, write_atomic

SCORE_KEY = ("data", "dataset", "split", "protocol", "refinement")
"""What tells one entry of scores.json from another."""

_LOCK = ".lock"
OWNED_FILES = (
    "model.json",  # first: from here on the run counts as unfinished
    "model.safetensors",
    "checkpoint",
    "log.jsonl",
    "skipped.csv",
    "scores.json",
    "diagnosis.json",
    "manifest.npz",
    "labels.json",
    "engine.onnx",
    "engine-int8.onnx",
    "report.html",
    "samples",
    "versions.json",
    "tensorboard",
    "snapshots",
    "evaluation",
)
"""What `overwrite` removes. Other files that a user keeps in the folder stay."""


class Run:
    """A folder that holds one trained model and all that says how it came about.

    Under torchrun the first process writes; in the others `start` gives the same object, and
    touches nothing. Use it as a context: leaving it gives the lock back.
    """

    MARKER = "num_clusters"
    """The field of config.yaml that tells a run of this kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: ExitStack | None = None

    @classmethod
    def start(
        cls,
        path: Path,
        experiment: Experiment,
        *,
        source: str,
        limit: int | None = None,
        include_masks: bool = False,
        overwrite: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> Run:
        """Lock a folder for a run: a new one, or an interrupted one with the same options.

        Args:
            path: The folder; made with its parents if missing.
            experiment: Every choice of the run.
            source: Where the images come from, as the user gave it.
            limit: How many of them are used, if not all.
            include_masks: Whether masks among them were read like photos.
            overwrite: Replace an earlier run, finished or not. Never replaces anything else.
            record: What of the experiment the run uses, for config.yaml; all of it if not given.

        Raises:
            ConfigError: The folder holds a finished run, a run with other options, or something
                else, or another process works in it.
            SetupError: The folder cannot be written.
        """
        run = cls(path)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
            return run
        asked = {
            "images": {"source": source, "limit": limit, "include_masks": include_masks},
            **(record or experiment.model_dump()),
        }
        run._refuse(asked, overwrite=overwrite)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(path / _LOCK))
            run._refuse(asked, overwrite=overwrite)  # it may have changed before we had the lock
            run._prepare(asked, overwrite=overwrite)
            run._held = stack.pop_all()
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a finished run.

        Raises:
            DataError: There is none.
        """
        run = cls(path)
        if run.finished:
            return run
        if run._config.exists() and run._is_ours(read_record(run._config)):
            raise DataError(
                f"{path} is a run that is not finished. Give its `iddc` command again to resume it."
            )
        raise DataError(f"No run in {path}: expected a folder written by `iddc train`.")

    @property
    def finished(self) -> bool:
        """Whether the model is complete."""
        return (self.path / "model.json").is_file() and not self.checkpoint.exists()

    @property
    def checkpoint(self) -> Path:
        """The file of the training state."""
        return self.path / "checkpoint" / "state.pt"

    @property
    def experiment(self) -> Experiment:
        """Every choice of the run, from its config.yaml."""
        return load_config(self._config)

    @property
    def has_config(self) -> bool:
        """Whether a run was begun here."""
        return self._config.is_file()

    @property
    def _config(self) -> Path:
        return self.path / "config.yaml"

    def _refuse(self, asked: Mapping[str, Any], *, overwrite: bool) -> None:
        """Raise if a run must not start here. Nothing is touched."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; expected a folder for the run.")
        with disk_errors(self.path):
            names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        if all(name == _LOCK or Path(name).match(TEMPORARY) for name in names):
            return
        kept = read_record(self._config) if self._config.exists() else {}
        if not self._is_ours(kept):
            raise ConfigError(
                f"{self.path} holds something else than a run of iddc; nothing was changed. "
                "Choose a new or empty folder."
            )
        if overwrite:
            return
        if self.finished:
            raise ConfigError(
                f"{self.path} holds a finished run, which `iddc report` shows. Choose another "
                "folder, or give --overwrite."
            )
        if not self.checkpoint.exists():
            return  # it stopped before there was anything to keep, as at a misspelt backbone
        images = {"include_masks": False, **(kept.get("images") or {})}
        had = _shared({"images": images, **self.experiment.model_dump()}, asked)
        changes = differences(had, asked)
        if changes:
            raise ConfigError(
                f"{self.path} holds an interrupted run with other options: {'; '.join(changes)}. "
                "Give the same options to resume it, or --overwrite to start anew."
            )

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        """Whether a config.yaml was written by `Run.start`, not by another command or program."""
        return {"format_version", "iddc", self.MARKER} <= record.keys()

    def _prepare(self, asked: Mapping[str, Any], *, overwrite: bool) -> None:
        """Clear what must go, and write what a new run has from its first moment."""
        new = overwrite or not self.checkpoint.exists()
        with disk_errors(self.path):
            for path in self.path.glob(TEMPORARY):
                path.unlink()
            for name in OWNED_FILES if new else ():
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        if new:  # config.yaml first: without it, a folder that holds anything is not ours
            import yaml  # not where options are read: help and errors answer at once

            write_atomic(self._config, yaml.safe_dump({**WRITTEN, **asked}, sort_keys=False))
            self._write_json("versions.json", _versions())
        with disk_errors(self.path):
            self.checkpoint.parent.mkdir(exist_ok=True)
            for path in self.checkpoint.parent.glob(TEMPORARY):
                path.unlink()

    def _write_json(self, name: str, record: Mapping[str, Any]) -> None:
        text = json.dumps({**WRITTEN, **record}, indent=2)
        write_atomic(self.path / name, text + "\n")

    def close(self) -> None:
        """Give the lock back."""
        if self._held:
            self._held.close()
            self._held = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def finish(self) -> None:
        """Drop the training state, as the model is complete."""
        with disk_errors(self.checkpoint):
            (self.path / "diagnosis.json").unlink(missing_ok=True)
            self.checkpoint.unlink(missing_ok=True)
            if self.checkpoint.parent.exists():
                shutil.rmtree(self.checkpoint.parent)

    def log(self, **entry: object) -> None:
        """Append a line to log.jsonl."""
        path = self.path / "log.jsonl"
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def cut_log(self, step: int) -> None:
        """Keep the lines up to a step: a resumed run writes the later ones again."""
        path = self.path / "log.jsonl"
        if path.exists():
            lines = path.read_text("utf-8", "replace").splitlines(keepends=True)
            write_atomic(path, "".join(line for line in lines if _step(line) <= step))

    def write_diagnosis(self, **facts: Any) -> None:
        """Write diagnosis.json: what was seen when the numbers were not finite any more."""
        self._write_json("diagnosis.json", facts)

    def write_skipped(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write skipped.csv: the name of each image left out, and the reason."""
        text = io.StringIO()
        csv.writer(text).writerows([("name", "reason"), *rows])
        write_atomic(self.path / "skipped.csv", text.getvalue())

    @property
    def stamp(self) -> tuple[int, int] | None:
        """What tells the model of this run from a later one; None while there is none."""
        try:
            stat = (self.path / "model.json").stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def refuse_another_model(self, stamp: tuple[int, int] | None, advice: str) -> None:
        """Raise if the run was trained again since it had this stamp.

        Raises:
            DataError: It was, or is being trained.
        """
        if self.stamp != stamp:
            raise DataError(f"{self.path} was trained again. {advice}")

    def add_score(self, *, stamp: tuple[int, int] | None = None, **entry: Any) -> None:
        """Add an entry to scores.json, in place of an older one with the same `SCORE_KEY`.

        Args:
            stamp: Of the model that was scored, where it may have been replaced since.
            entry: The scores, and what was scored how.

        Raises:
            DataError: scores.json cannot be read, or the model is another one by now.
        """
        path = self.path / "scores.json"
        check = partial(
            self.refuse_another_model,
            self.stamp if stamp is None else stamp,
            "These scores are of the model before, and are not kept.",
        )
        check()  # or we would wait for a training that holds the lock
        with nullcontext() if self._held else locked(self.path / _LOCK, wait=True):
            check()
            entries = [
                old
                for old in self.scores()
                if any(old.get(key) != entry.get(key) for key in SCORE_KEY)
            ]
            self._write_json(path.name, {"scores": [*entries, entry]})

    def scores(self) -> list[dict[str, Any]]:
        """The entries of scores.json.

        Raises:
            DataError: It cannot be read.
        """
        path = self.path / "scores.json"
        if not path.exists():
            return []
        try:
            record = json.loads(read_text(path))
            refuse_newer(record, path)
            return [dict(entry) for entry in record["scores"]]
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise DataError(
                f"{path} is not what iddc wrote. Move it away and evaluate again."
            ) from error


def _shared(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that another one has too, group by group."""
    both = {key: value for key, value in record.items() if key in other}
    return {
        key: _shared(value, other[key])
        if isinstance(value, Mapping) and isinstance(other[key], Mapping)
        else value
        for key, value in both.items()
    }


def _step(line: str) -> float:
    """The step of a line of log.jsonl; none for a line cut short by a crash."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _versions() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"

    return {
        "iddc": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm")},
        "platform": platform.platform(),
    }
