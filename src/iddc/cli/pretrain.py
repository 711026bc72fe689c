"""The command that makes a backbone: pretrain."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import ValidationError
from tyro.conf import Positional, arg

from iddc.cli.options import Command, Flat, find_readable, refuse_inside, say
from iddc.config import PretrainConfig, ReadingConfig, Runtime
from iddc.errors import ConfigError, counted
from iddc.runs import explain

if TYPE_CHECKING:
    from iddc.images import ImageFile, Skipped


@dataclass(frozen=True, kw_only=True)
class Pretrain(Command):
    """Learn a backbone of your own from unlabelled images, for `train --backbone DIR`.

    Method contrast is for networks with stages, such as ResNets; dino for ViTs. Give the same
    command again to resume an interrupted pretraining.
    """

    images: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="IMAGES...", help_behavior_hint="(required)"),
    ]
    """Sources: folders with their subfolders, zips, text files of paths."""
    out: Annotated[Path, arg(metavar="DIR")]
    """The weights folder to write."""
    overwrite: bool = False
    """Replace an earlier run in DIR."""
    config: Annotated[PretrainConfig, Flat] = field(default_factory=PretrainConfig)
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"device", "workers", "checkpoint_every", "max_unreadable"}
    )

    def __post_init__(self) -> None:
        try:  # the parser gives the options as they are, unchecked
            config = PretrainConfig.model_validate(self.config)
        except ValidationError as error:
            raise ConfigError(f"--{explain(error)}") from None
        object.__setattr__(self, "config", config)

    def __call__(self) -> int:
        """Pretrain."""
        if not self.images:
            raise ConfigError("Give at least one IMAGES: a folder, a zip, or a list of paths.")
        for source in self.images:
            refuse_inside(self.out, source)
        config = self.config
        sources, skipped, reading = _find(self.images, self.runtime, config.reading)

        from iddc.backbones import resolve
        from iddc.pretraining import pretrain
        from iddc.progress import Progress

        config = config.model_copy(update={"reading": reading, "init": resolve(config.init)})
        left_out = f" ({len(skipped):,} skipped, see {self.out / 'skipped.csv'})"
        say(
            counted(sum(map(len, sources.values())), "image") + (left_out if skipped else ""),
            config.method,
            f"{config.network} from {config.init}" if config.init else config.network,
            f"{config.epochs:,} epochs" if config.epochs else f"{config.steps:,} steps",
        )
        pretrain(
            sources,
            config,
            self.out,
            self.runtime,
            overwrite=self.overwrite,
            skipped=skipped,
            progress=Progress(),
        )
        run = self.out.with_name(f"{self.out.name}-run")
        words = ("iddc", "train", self.images[0], "--backbone", self.out, "--out", run)
        say(f"{self.out / 'backbone.safetensors'}    next: {shlex.join(map(str, words))}")
        return 0


def _find(
    paths: tuple[Path, ...], runtime: Runtime, reading: ReadingConfig
) -> tuple[dict[str, Sequence[ImageFile]], list[Skipped], ReadingConfig]:
    """The images of each source, and how they are shown; of several, names begin with the source's.

    A kind of values has the range that it has in the first source that holds it.
    """
    sources: dict[str, Sequence[ImageFile]] = {}
    left_out: list[Skipped] = []
    for path in dict.fromkeys(paths):
        found = find_readable(path, None, runtime, reading=reading)
        files, skipped, reading = found.files, found.skipped, found.reading
        if len(paths) > 1:
            root = PurePosixPath(*(part for part in path.parts if part not in {path.anchor, ".."}))
            files = [replace(file, name=root / file.name) for file in files]
            skipped = [
                replace(item, file=replace(item.file, name=root / item.file.name))
                for item in skipped
            ]
        sources[str(path)] = files
        left_out += skipped
    return sources, left_out, reading
