"""The command that helps to choose K: sweep."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from iddc.cli.options import (
    Flat,
    ImagesPath,
    Informing,
    ReadsPhotos,
    readable_for,
    refuse_inside,
    say,
)
from iddc.cli.printing import percent, print_json, print_table
from iddc.config import Experiment, Runtime
from iddc.errors import ConfigError
from iddc.runs.files import TEMPORARY

CLUSTERS = (6, 9, 12, 18, 27)
"""The values of K that are tried if none are given."""
OWNED = {"embeddings.safetensors", "sweep.html", "sweep.json"}
"""The files that a sweep writes."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Informing, ReadsPhotos):
    """Show the clusters of several K side by side, and suggest one.

    Up to 64 images are embedded once; each K then takes seconds. DIR/sweep.html works offline. Give
    the command again with other values of K, and nothing is embedded again.
    """

    images: ImagesPath
    clusters: Annotated[tuple[int, ...], arg(name="num-clusters", aliases=["-k"], metavar="K")] = (
        CLUSTERS
    )
    """The numbers of clusters to try."""
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write."""
    seeds: Annotated[int, arg(metavar="N")] = 3
    """How many seeds are compared at each K."""
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"backbone", "seed", "views", "reading", "device", "workers", "max_unreadable"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clusters or min(self.clusters) < 2 or max(self.clusters) > 1000:
            found = " ".join(map(str, self.clusters)) or "none"
            raise ConfigError(f"--num-clusters: expected numbers from 2 to 1000, found {found}.")
        if self.seeds < 1:
            raise ConfigError(f"--seeds: expected at least 1, found {self.seeds}.")

    def __call__(self) -> int:
        """Sweep."""
        refuse_inside(self.out, self.images)
        _refuse_foreign(self.out)
        photos, experiment = readable_for(
            self.experiment, self.images, self.limit, self.runtime, self.include_masks
        )

        from iddc.progress import Progress
        from iddc.report.sweep import write_sweep
        from iddc.runs import write_atomic
        from iddc.sweep import sweep

        found = sweep(
            photos.files,
            experiment,
            self.clusters,
            self.runtime,
            seeds=self.seeds,
            keep=self.out,
            progress=Progress(),
        )
        # What to do next is a command that can be pasted.
        words = ["iddc", "train", str(self.images), "-k", str(found.suggested)]
        words += ["--backbone", experiment.backbone, "--out", "RUN"]
        page = write_sweep(found, self.out, shlex.join(words), seeds=self.seeds)
        write_atomic(self.out / "sweep.json", json.dumps(found.as_dict(), indent=2) + "\n")
        if self.json:
            print_json(found.as_dict())
            return 0
        rows = [
            (
                str(level.num_clusters),
                str(level.live),
                percent(level.largest),
                percent(level.agreement),
                percent(level.follows),
            )
            for level in found.levels
        ]
        print_table(("K", "in use", "largest (%)", "seeds agree (%)", "follow colours (%)"), rows)
        say(f"suggested: {found.suggested} clusters. Look at the masks before you take it.")
        say(f"{page}    next: {shlex.join(words)}")
        return 0


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder of something else, whose files of the same names would be lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the sweep.")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    if any(name not in OWNED and not Path(name).match(TEMPORARY) for name in names):
        raise ConfigError(
            f"{out} holds something else than a sweep; nothing was changed. Choose a new or empty "
            "folder."
        )
