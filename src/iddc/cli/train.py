"""Commands that make a run: train, baseline."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ValidationError
from tyro.conf import Positional, arg

from iddc.cli.check import duration, training_memory, training_minutes
from iddc.cli.options import (
    Command,
    ConfigFile,
    Flat,
    ImagesPath,
    NewRun,
    ReadsPhotos,
    TrainedOn,
    find_readable,
    ready,
    refuse_inside,
    say,
)
from iddc.config import DatasetName, Experiment, MethodName, Runtime
from iddc.errors import ConfigError, DataError, IddcError, counted
from iddc.methods import completed, find_method, new_network, used
from iddc.runs import Run, explain

if TYPE_CHECKING:
    from iddc.images import FoundImages, ImageFile, Skipped


class MakesRun(ReadsPhotos):
    """What both commands do; their fields are their own, in the order of their help."""

    images: Path
    dataset: DatasetName
    out: Path | None
    overwrite: bool
    dry_run: bool = False
    print_config: bool = False
    experiment: Experiment
    runtime: Runtime

    def __call__(self) -> int:
        """Train a method on the images."""
        if self.print_config:
            import yaml

            print(yaml.safe_dump(used(completed(self.chosen())), sort_keys=False), end="")
            return 0
        # The images, and the numbers that follow from them.
        if self.out:
            refuse_inside(self.out, self.images)
        experiment = self.chosen()
        auto = getattr(self, "num_clusters", None) == "auto"
        found = find_readable(
            self.images,
            self.limit,
            self.runtime,
            self.dataset,
            include_masks=self.include_masks,
            reading=experiment.reading,
            run=None if self.overwrite else self.out,
        )
        files, skipped = found.files, found.skipped
        experiment = completed(experiment.model_copy(update={"reading": found.reading}))
        plan = find_method(experiment.method).plan(experiment, len(files))
        if len(files) < 2 and plan.steps:
            raise DataError(
                f"Found {len(files)} readable image in {self.images}; training compares images "
                "with each other and needs at least 2."
            )
        # What will be done, said before it is.
        steps = f"{plan.steps:,} steps" if plan.steps else ""
        method = "" if experiment.method == "iddc" else f"{experiment.method} · "
        work = f"{method}{steps}".strip(" ·")
        from iddc.device import pick_device

        device = pick_device(self.runtime.device)
        where = str(self.out.resolve()) if self.out else ""
        if self.dry_run or not self.out:
            cost = estimate(files, experiment, device.type, memory=True)
            line = filter(None, (work, str(device), cost, where))
            say(describe(files, skipped, experiment), *line)
            if auto:
                say("A sweep of several K on up to 64 images would choose the number of clusters.")
            say("Nothing is written. Leave out --dry-run to train.")
            return 0
        experiment = ready(experiment, self.runtime)
        if auto:
            experiment = self.suggested(self.out, experiment, files)
        # Before the folder is touched: a misspelt name must not cost an earlier model.
        network = new_network(experiment)
        with (
            self.start(self.out, experiment) as run,
            self.kept_manifest(self.out, found.listed),
        ):
            from iddc.learning import fit
            from iddc.progress import Progress

            cost = estimate(files, experiment, device.type)
            line = filter(None, (work, str(device), cost, where))
            say(describe(files, skipped, experiment, self.out), *line)
            fit(
                files,
                experiment,
                run,
                self.runtime,
                network=network,
                skipped=skipped,
                progress=Progress(),
            )
        say_verdict(self.out, files, self.runtime)
        say_next(self.out, self.images, self.dataset)
        return 0

    def chosen(self) -> Experiment:
        """The experiment that the options ask for."""
        return self.experiment

    def kept_manifest(self, out: Path, listed: FoundImages | None) -> AbstractContextManager[None]:
        """Keep what was listed beside the run; of the processes of torchrun the first does."""
        if listed is None or os.environ.get("RANK", "0") != "0":
            return nullcontext()
        from iddc.manifest import kept

        return kept(listed, self.images, out, limit=self.limit, include_masks=self.include_masks)

    def suggested(
        self, out: Path, experiment: Experiment, files: Sequence[ImageFile]
    ) -> Experiment:
        """The experiment with the K that a sweep suggests; a run that goes on has its own."""
        run = Run(out)
        if run.has_config and not run.finished and not self.overwrite:
            return experiment.model_copy(update={"num_clusters": run.experiment.num_clusters})
        from iddc.cli.sweep import CLUSTERS
        from iddc.progress import Progress
        from iddc.sweep import sweep

        found = sweep(files, experiment, CLUSTERS, self.runtime, progress=Progress())
        agreed = ", ".join(f"{x.num_clusters}: {x.agreement:.0%}" for x in found.levels)
        say(f"{found.suggested} clusters, chosen by a sweep. Seeds agree at K = {agreed}")
        return experiment.model_copy(update={"num_clusters": found.suggested})

    def start(self, out: Path, experiment: Experiment) -> Run:
        """Lock the folder of a run, or go on with an interrupted one."""
        return Run.start(
            out,
            experiment,
            source=named(self.images, self.dataset),
            limit=self.limit,
            include_masks=self.include_masks,
            overwrite=self.overwrite,
            record=used(experiment),
        )


@dataclass(frozen=True, kw_only=True)
class Train(MakesRun):
    """Learn a segmenter from unlabelled images. Labels are never read.

    --recipe or --config sets every number, and single options override it. Give the same command
    again to resume an interrupted run.
    """

    images: ImagesPath
    dataset: TrainedOn = "folder"
    out: Annotated[
        Path | None,
        arg(
            metavar="RUN",
            help="The folder of the run to write.",
            help_behavior_hint="(required, except with --dry-run or --print-config)",
        ),
    ] = None
    num_clusters: Annotated[
        int | Literal["auto"] | None,
        arg(aliases=["-k"], metavar="K", help_behavior_hint="(default: the recipe's, such as 27)"),
    ] = None
    """K, how many clusters to find; auto: what a sweep of several K suggests (`iddc sweep`)."""
    config: ConfigFile = None
    overwrite: bool = False
    """Replace an earlier run in RUN."""
    dry_run: bool = False
    """Say what would be done, with time and memory, and write nothing."""
    print_config: bool = False
    """Print every number of the run as YAML, which --config reads, and do nothing else."""
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = Command.choices - {"num_clusters"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen()  # refuses a K out of range
        if not (self.out or self.dry_run or self.print_config):
            raise ConfigError(
                "--out RUN is missing: the folder of the run to write. Only --dry-run and "
                "--print-config work without it."
            )

    def chosen(self) -> Experiment:
        """The experiment with the number of clusters."""
        if not isinstance(self.num_clusters, int):
            return self.experiment
        try:
            Experiment(num_clusters=self.num_clusters)
        except ValidationError as error:
            raise ConfigError(f"--{explain(error)}") from None
        return self.experiment.model_copy(update={"num_clusters": self.num_clusters})


@dataclass(frozen=True, kw_only=True)
class Baseline(MakesRun):
    """Fit a baseline, such as k-means; the result is a run like any other.

    It is another spelling of `iddc train --method METHOD`. Give it the recipe, or the --config, of
    the run it is compared with: working size, windows and centring of the embeddings come from
    there. `iddc baseline METHOD --help` lists the numbers of a method.
    """

    method: Annotated[Positional[MethodName], arg(metavar="METHOD")]
    """How the head learns: kmeans (Table 6), pixels or grey (without a network), or another way."""
    images: ImagesPath
    dataset: TrainedOn = "folder"
    out: NewRun
    config: ConfigFile = None
    overwrite: bool = False
    """Replace an earlier run in RUN."""
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"recipe", "num_clusters", "backbone", "seed", "reading"}
        | {"device", "workers", "micro_batch_size", "max_unreadable"}
    )

    def chosen(self) -> Experiment:
        """The experiment with the method that the first word names."""
        return self.experiment.model_copy(update={"method": self.method})


def estimate(
    files: Sequence[ImageFile], experiment: Experiment, device: str, *, memory: bool = False
) -> str:
    """How long a training takes on a CPU, and how much memory; nothing is known of GPUs."""
    if device != "cpu":
        return ""
    from iddc.images.stock import decoding_seconds

    seconds = decoding_seconds(files, experiment.reading)
    about = f"about {duration(training_minutes(experiment, len(files), seconds))}"
    if memory:
        about += f" and {training_memory(experiment, len(files)) / 1e9:.1f} GB of memory"
    return about


def named(images: Path, dataset: DatasetName) -> str:
    """What a run was trained on, for its record."""
    from iddc.images import address_of

    path = address_of(images) or str(images.resolve())
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
    hint = "" if chosen else " (the default; choose with -k, or -k auto)"
    return (
        f"{counted(len(files), 'image')}{left_out} · {experiment.backbone} · "
        f"{experiment.num_clusters} clusters{hint}"
    )


def say_verdict(out: Path, files: Sequence[ImageFile], runtime: Runtime) -> None:
    """Say in plain words what the run is worth. The run is complete, whatever happens here."""
    if os.environ.get("RANK", "0") != "0":
        return
    from iddc.progress import Progress
    from iddc.report import judge_run

    try:
        verdict = judge_run(Run.open(out), files, device=runtime.device, progress=Progress())
    except (IddcError, MemoryError) as error:
        say(f"There is no verdict: {error}")
        return
    if verdict:
        say("\n".join(verdict.lines()))


def say_next(run: Path, images: Path, dataset: DatasetName = "folder") -> None:
    """Say where the model is and what to do next."""
    if dataset == "folder":
        words = ["report", run]
    else:
        words = ["evaluate", run, "--data", images, "--dataset", dataset]
    say(f"{run / 'model.safetensors'}    next: {shlex.join(['iddc', *map(str, words)])}")
