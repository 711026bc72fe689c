"""The folder of a pretraining: a run whose result is a backbone, with its model card."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import ValidationError

from iddc import __version__
from iddc.backbones import Architecture, licence_of
from iddc.config import PretrainConfig
from iddc.errors import ConfigError, DataError
from iddc.runs import Run, disk_errors, explain, write_atomic
from iddc.runs.configfile import read_record
from iddc.runs.files import locked

CARD = "README.md"
_RESULT = "backbone.json"
OWNED_FILES = (_RESULT, "backbone.safetensors", CARD, "cache")
_SCORES = "## Scores\n"


class WeightsFolder(Run):
    """A weights folder in the making: a RUN folder with a backbone for its result.

    cache/ holds the decoded images until the backbone is complete.
    """

    MARKER = "network"

    @classmethod
    def begin(
        cls, path: Path, config: PretrainConfig, *, sources: Sequence[str], overwrite: bool = False
    ) -> WeightsFolder:
        """Lock a folder: a new one, or that of an interrupted pretraining with the same options.

        Args:
            path: The folder; made with its parents if missing.
            config: Every choice of the pretraining.
            sources: Where the images come from, as the user gave it.
            overwrite: Replace an earlier run, finished or not. Never replaces anything else.

        Raises:
            ConfigError: The folder holds a finished run, a run with other options, or something
                else, or another process works in it.
            SetupError: The folder cannot be written.
        """
        folder = cls(path)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
            return folder
        asked = {"images": {"sources": [*sources]}, **config.model_dump()}
        folder._refuse(asked, overwrite=overwrite)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(path / ".lock"))
            folder._refuse(asked, overwrite=overwrite)  # it may have changed before the lock
            if overwrite:
                folder._remove(*OWNED_FILES)
            folder._prepare(asked, overwrite=overwrite)
            folder._held = stack.pop_all()
        return folder

    def __enter__(self) -> WeightsFolder:
        return self

    @property
    def finished(self) -> bool:
        """Whether the backbone is complete."""
        return (self.path / _RESULT).is_file() and not self.checkpoint.exists()

    @property
    def cache(self) -> Path:
        """The folder of the decoded images."""
        return self.path / "cache"

    @property
    def experiment(self) -> PretrainConfig:  # type: ignore[override]
        """Every choice of the pretraining, from its config.yaml."""
        record, names = read_record(self._config), PretrainConfig.model_fields
        try:
            return PretrainConfig(**{key: record[key] for key in names if key in record})
        except ValidationError as error:
            raise ConfigError(f"{self._config}: {explain(error)}") from None

    def finish(self) -> None:
        """Drop the decoded images and the training state."""
        self._remove("cache")
        super().finish()

    def logged(self, name: str) -> float:
        """The sum of a number over all steps, from log.jsonl."""
        lines = (self.path / "log.jsonl").read_text("utf-8").splitlines()
        return float(sum(json.loads(line)[name] for line in lines))

    def _remove(self, *names: str) -> None:
        with disk_errors(self.path):
            for name in names:
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def write_card(
    folder: WeightsFolder,
    architecture: Architecture,
    *,
    num_images: int,
    hardware: str,
) -> None:
    """Write the model card: what the weights are, where from, and what is not known of them."""
    config, record = folder.experiment, read_record(folder.path / "config.yaml")
    sources = [f"- `{source}`" for source in record["images"]["sources"]]
    steps = len((folder.path / "log.jsonl").read_text("utf-8").splitlines())
    seen, minutes = folder.logged("images"), folder.logged("seconds") / 60
    start, terms = "random weights", ""
    if config.init:
        start = f"`{config.init}`"
        terms = (
            f"It began with the weights of {start}, licence: {licence_of(config.init)}; their "
            "card may say more. Their terms hold for this folder too. "
        )
    stages = f", stages {' '.join(map(str, architecture.stages))}" if architecture.stages else ""
    text = f"""# A self-supervised backbone

Written by `iddc pretrain` (iddc {__version__}). No label was read. Use it with
`iddc train IMAGES --backbone {folder.path}`.

- Network: timm's `{architecture.timm_name}`{stages}; {architecture.embed_dim} channels in steps of
  {architecture.patch_size} pixels; half precision on disk.
- Method: `{config.method}`, every number is in `config.yaml`; seed {config.seed}.
- Start: {start}.
- Length: {steps:,} steps, {seen:,.0f} images seen, {minutes:.1f} minutes on {hardware}.

## Data

{num_images:,} unlabelled images of

{chr(10).join(sources)}

## Licence

Not stated. {terms}The terms of the images may extend to weights that were trained on them, and
iddc does not know these terms: state both before you pass this folder on.

{_SCORES}
not measured
"""
    write_atomic(folder.path / CARD, text)


def write_scores(folder: Path, text: str) -> None:
    """Replace the scores in the model card of a weights folder; they are its last section.

    Raises:
        DataError: There is no such card.
    """
    path = folder / CARD
    card = path.read_text("utf-8") if path.is_file() else ""
    before, heading, _ = card.partition(_SCORES)
    if not heading:
        raise DataError(f"No model card of `iddc pretrain` in {folder}.")
    write_atomic(path, f"{before}{heading}\n{text.strip()}\n")


def hardware(device: torch.device, processes: int) -> str:
    """The device in words, and how many processes had one."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"a CPU ({_processor()}), threads: {torch.get_num_threads()}"
    return name if processes == 1 else f"{processes} processes, each on {name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
