"""Commands that make a run: train, baseline."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from iddc.cli.options import (
    ConfigFile,
    Flat,
    ImagesPath,
    NewRun,
    ReadsPhotos,
    TrainedOn,
    baseline_config,
    find_readable,
    ready,
    refuse_inside,
    say,
)
from iddc.config import BaselineConfig, DatasetName, Experiment, HeadName, Runtime
from iddc.errors import ConfigError, DataError
from iddc.runs import Run
from iddc.runs.configfile import differences
from iddc.schedules import Plan

if TYPE_CHECKING:
    from iddc.images import ImageFile, Skipped


@dataclass(frozen=True, kw_only=True)
class Train(ReadsPhotos):
    """Learn a segmenter from unlabelled images. Labels are never read.

    --recipe or --config sets every number, and single options override it. An interrupted run goes
    on when the same command is given again.
    """

    images: ImagesPath
    dataset: TrainedOn = "folder"
    out: NewRun
    config: ConfigFile = None
    overwrite: bool = False
    """Replace an earlier run in RUN."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]

    def __call__(self) -> int:
        """Train."""
        refuse_inside(self.out, self.images)
        files, skipped = find_readable(
            self.images,
            self.limit,
            self.runtime,
            self.dataset,
            include_masks=self.include_masks,
        )
        if len(files) < 2:
            raise DataError(
                f"Found {len(files)} readable image in {self.images}; training compares images "
                "with each other and needs at least 2."
            )
        steps = f"{Plan.of(self.experiment, len(files)).steps:,} steps"
        if self.dry_run:
            import yaml

            print(yaml.safe_dump(self.experiment.model_dump(), sort_keys=False))
            say(describe(files, skipped, self.experiment), steps)
            say(f"Nothing is written. Without --dry-run the result would be in {self.out}.")
            return 0
        if self.experiment.head in ("centroids", "codes", "smooth-codes"):
            raise ConfigError(
                f"The head {self.experiment.head} is for `iddc baseline`. Choose --head conv or "
                "linear."
            )
        experiment = ready(self.experiment, self.runtime)
        with start(self, experiment) as run:
            say(describe(files, skipped, experiment, self.out), steps)
            from iddc.progress import Progress
            from iddc.training import fit

            fit(files, experiment, run, self.runtime, skipped=skipped, progress=Progress())
        say_next(self.out, self.images, self.dataset)
        return 0


@dataclass(frozen=True, kw_only=True)
class Baseline(ReadsPhotos):
    """Fit a baseline on the same embeddings; the result is a run like any other.

    Give it the recipe, or the --config, of the run it is compared with: working size, windows and
    centring of the embeddings come from there.
    """

    method: Annotated[Positional[Literal["kmeans", "stego"]], arg(metavar="kmeans|stego")]
    """Spherical k-means (Table 6), or STEGO (Tables 1, 3 and 4), which --stego.* options change."""
    images: ImagesPath
    dataset: TrainedOn = "folder"
    out: NewRun
    config: ConfigFile = None
    overwrite: bool = False
    """Replace an earlier run in RUN."""
    options: Annotated[BaselineConfig, Flat]
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"recipe", "num_clusters", "backbone", "seed"}
        | {"device", "workers", "micro_batch_size", "max_unreadable"}
    )

    def __call__(self) -> int:
        """Fit."""
        refuse_inside(self.out, self.images)
        usual = baseline_config(self.experiment)
        if self.method == "kmeans" and self.options != usual:
            changes = differences(usual.model_dump(), self.options.model_dump())
            raise ConfigError(
                f"Only the baseline stego has the option --{changes[0].split(':')[0]}."
            )
        files, skipped = find_readable(
            self.images,
            self.limit,
            self.runtime,
            self.dataset,
            include_masks=self.include_masks,
        )
        head: HeadName = "centroids" if self.method == "kmeans" else "codes"
        experiment = ready(self.experiment.model_copy(update={"head": head}), self.runtime)
        with start(self, experiment) as run:
            work = {"kmeans": "k-means", "stego": f"STEGO · {self.options.stego.steps:,} steps"}
            say(describe(files, skipped, experiment, self.out), work[self.method])
            from iddc.baselines.kmeans import fit_kmeans
            from iddc.baselines.stego import fit_stego
            from iddc.progress import Progress

            todo = (files, experiment, run, self.runtime)
            if self.method == "kmeans":
                fit_kmeans(*todo, skipped=skipped, progress=Progress())
            else:
                fit_stego(*todo, self.options.stego, skipped=skipped, progress=Progress())
        say_next(self.out, self.images, self.dataset)
        return 0


def start(command: Train | Baseline, experiment: Experiment) -> Run:
    """Lock the folder of a run, or go on with an interrupted one."""
    return Run.start(
        command.out,
        experiment,
        source=named(command.images, command.dataset),
        limit=command.limit,
        overwrite=command.overwrite,
    )


def named(images: Path, dataset: DatasetName) -> str:
    """What a run was trained on, for its record."""
    path = str(images.resolve())
    return path if dataset == "folder" else f"{dataset}:{path}"


def describe(
    files: Sequence[ImageFile],
    skipped: Sequence[Skipped],
    experiment: Experiment,
    run: Path | None = None,
) -> str:
    """The first line of a command: how many images, which backbone, how many clusters."""
    where = f", see {run / 'skipped.csv'}" if run else ""
    left_out = f" ({len(skipped):,} skipped{where})" if skipped else ""
    default = Experiment.model_fields["num_clusters"].default
    chosen = experiment.recipe != "folder" or experiment.num_clusters != default
    hint = "" if chosen else " (default: choose with --num-clusters)"
    return (
        f"{len(files):,} images{left_out} · {experiment.backbone} · "
        f"{experiment.num_clusters} clusters{hint}"
    )


def say_next(run: Path, images: Path, dataset: DatasetName = "folder") -> None:
    """Say where the model is and what to do next."""
    if dataset == "folder":
        words = ["report", run]
    else:
        words = ["evaluate", run, "--data", images, "--dataset", dataset]
    say(f"{run / 'model.safetensors'}    next: {shlex.join(['iddc', *map(str, words)])}")
