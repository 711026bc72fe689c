"""The command that renames what is in masks: relabel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from iddc.cli.label import read_num_clusters
from iddc.cli.options import Command, say
from iddc.errors import ConfigError, counted
from iddc.runs import Run


@dataclass(frozen=True, kw_only=True)
class Relabel(Command):
    """Give a folder of masks the names and colours that its model has now, in seconds.

    The folder keeps the cluster of every pixel, so the network is not needed. Every format in the
    folder is written again.
    """

    masks: Annotated[Positional[Path], arg(metavar="DIR", help="The --out of `iddc predict`.")]
    run: Annotated[
        Path | None, arg(metavar="RUN", help_behavior_hint="(default: the one that made them)")
    ] = None
    """The run whose names are taken, if it was moved."""
    images: Annotated[
        Path | None, arg(metavar="IMAGES", help_behavior_hint="(default: where they were)")
    ] = None
    """The images, if they were moved. Overlays need them."""

    def __call__(self) -> int:
        """Relabel."""
        from iddc.masks import read_labels
        from iddc.modelfile import digest_of
        from iddc.progress import Progress
        from iddc.relabel import no_clusters, read_claim, relabel

        record = read_claim(self.masks)
        if "run" not in record:
            raise no_clusters(self.masks)
        path = self.run or Path(str(record["run"]))
        if not path.is_dir():
            raise ConfigError(
                f"The run that made {self.masks} is not in {path}. Say where it is with --run."
            )
        run = Run.open(path)
        if digest_of(run.path) != record.get("model"):
            raise ConfigError(
                f"{run.path} holds another model than the one that made {self.masks}. Give that "
                "one with --run, or predict into a new folder."
            )
        labels = read_labels(run.path, read_num_clusters(run.path / "model.json"))
        done = relabel(self.masks, labels, images=self.images, progress=Progress())
        say(f"{counted(done.images, 'image')} renamed in {self.masks}: {', '.join(done.formats)}")
        return 0
