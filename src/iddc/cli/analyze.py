"""The command that looks at affinities: analyze."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from iddc.cli.options import (
    ConfigFile,
    Flat,
    ImagesPath,
    ReadsPhotos,
    readable_for,
    refuse_inside,
)
from iddc.cli.printing import print_json
from iddc.config import DatasetName, Experiment, Runtime


@dataclass(frozen=True, kw_only=True)
class Analyze(ReadsPhotos):
    """Draw how alike pixels are (Fig. 2), and estimate t+ and t- from the images alone.

    With --data, pairs of annotated classes stand beside those of clusters. They are only drawn:
    the estimate never sees a label.
    """

    images: ImagesPath
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write."""
    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None
    """A labelled data set."""
    dataset: DatasetName = "folder"
    """The kind of data set."""
    split: str = "val"
    """The part of the data set."""
    json: bool = False
    """Print the numbers as one JSON object."""
    config: ConfigFile = None
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"recipe", "num_clusters", "backbone", "seed", "reading", "device", "max_unreadable"}
    )

    def __call__(self) -> int:
        """Analyze."""
        refuse_inside(self.out, self.images)
        photos, experiment = readable_for(
            self.experiment, self.images, self.limit, self.runtime, self.include_masks
        )

        from iddc.analysis import analyze, draw
        from iddc.datasets import open_dataset
        from iddc.progress import Progress

        # Labels are opened for the picture beside the estimate, which knows none.
        labelled = None
        if self.data:
            labelled = open_dataset(self.dataset, self.data, self.split, reading=experiment.reading)
        found = analyze(
            photos.files, experiment, self.out, self.runtime, labelled=labelled, progress=Progress()
        )
        drawn = draw(found, self.out / "affinities.png")
        if self.json:
            print_json(found.as_dict())
            return 0
        print(f"{experiment.backbone}, {experiment.num_clusters} clusters: t+ = t- = ", end="")
        print(f"{found.threshold:.2f}, estimated without labels")
        if found.crossing is not None:
            print(f"pairs of annotated classes cross at {found.crossing:.2f}")
        if not drawn:
            print("no picture: it needs matplotlib, pip install 'iddc[plots]'")
        # The command that trains with what was found.
        words: list[object] = ["iddc", "train", self.images]
        if self.config:
            words += ["--config", self.config]
        elif experiment.recipe != "folder":
            words += ["--recipe", experiment.recipe]
        words += ["--num-clusters", experiment.num_clusters]
        words += ["--backbone", experiment.backbone]
        if experiment.objective.affinity != "cosine":  # what was found are cosines
            words += ["--objective.affinity", "cosine"]
        for sign in ("positive", "negative"):
            words += [f"--objective.{sign}-threshold", found.threshold]
        name = "affinities.png" if drawn else "affinities.json"
        print(f"{self.out / name}    next: {shlex.join(map(str, words))} --out RUN")
        return 0
