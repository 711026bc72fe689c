"""From the rows of a table to runs: which experiment each is, and in which folder it is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from iddc.config import DatasetName, Experiment, ProtocolName, RefineName
from iddc.errors import ConfigError
from iddc.methods import completed, find_method
from iddc.recipes import FIGURES, RECIPES, TABLES, Figure, Row, Table
from iddc.recipes.ablations import Edit, from_scratch, identity

Target = Table | Figure


@dataclass(frozen=True)
class Settings:
    """What to rerun, and what is other than in the paper."""

    data: Path | None = None
    """The folder of the data set."""
    seeds: int = 5
    """Runs of each row: seeds 0, 1, ..."""
    rows: tuple[str, ...] = ()
    """Names or patterns of names; none: all rows."""
    dataset: DatasetName | None = None
    """Another data set than the paper's. Rows then edit `base`."""
    base: Experiment | None = None
    """What rows edit instead of the paper's recipes; the recipe `folder` for another data set."""
    backbones: tuple[str, ...] = ()
    """One instead of every row's; for Table 7, its rows."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Files of published weights, by the names of `iddc models`."""
    num_clusters: int | None = None
    """K. If not given, that of the recipe, or of `base`, or the classes of another data set."""
    refine: RefineName = "crf"
    """What stands in for the CRF of +CRF rows."""
    last: Edit = identity
    """Applied to every experiment at last."""
    options: Mapping[str, int] = field(default_factory=dict)
    """What is other in the numbers of baselines, where they have these names."""
    smoke: bool = False
    """Draw the data and shrink every experiment, to see that everything works."""


@dataclass(frozen=True)
class Job:
    """What a row needs: a run for each seed, and its score."""

    row: Row
    experiment: Experiment
    """With seed 0."""
    dataset: DatasetName
    data: Path
    protocol: ProtocolName
    refine: RefineName

    @property
    def digest(self) -> str:
        """A short text that differs if the run does, apart from its seed.

        Fields at their defaults do not count, so that a new field of `config.py` leaves it as is;
        nor does it matter where a published data set or a file of weights lies.
        """
        experiment = self.experiment.model_dump(
            mode="json", exclude={"seed", "method", "options"}, exclude_defaults=True
        )
        name, _, file = self.experiment.backbone.partition("=")
        if Path(file).is_file():  # a folder of weights may have a = in its path
            stat = Path(file).stat()
            experiment["backbone"] = [name, _content(file, stat.st_size, stat.st_mtime_ns)]
        what = [
            self.row.method,
            self.row.snapshots,
            str(self.data.resolve()) if self.dataset == "folder" else self.dataset,
            experiment,
            self._options(),
        ]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]

    def _options(self) -> dict[str, object] | None:
        """The numbers of a baseline that are not the usual ones; None for IDDC and k-means."""
        if self.row.method in {"iddc", "kmeans"}:
            return None
        usual = find_method(self.row.method).Config().model_dump()
        return {k: v for k, v in self.experiment.options.items() if v != usual[k]}

    def folder(self, runs: Path, target: str, seed: int) -> Path:
        """Where the run of a seed is, or will be. Rows that are the same experiment share it."""
        there = sorted(runs.glob(f"*-{self.digest}-seed{seed}"))
        return there[0] if there else runs / f"{target}-{self.row.name}-{self.digest}-seed{seed}"


@cache
def _content(file: str, _size: int, _changed: int) -> str:
    """What tells the bytes of a file from others; read once, as long as it does not change."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def choose(name: str, settings: Settings) -> Target:
    """A table or a figure, after a look at what is asked of it.

    Raises:
        ConfigError: There is no such table, figure or row, or a backbone too many.
    """
    known: dict[str, Target] = {**TABLES, **FIGURES}
    if name not in known:
        raise ConfigError(f"Unknown table {name!r}. Known: {', '.join(known)}.")
    target = known[name]
    if name == "table7" and settings.backbones and isinstance(target, Table):
        target = replace(target, rows=tuple(map(_of_backbone, settings.backbones)))
    elif len(settings.backbones) > 1:
        raise ConfigError(f"Only Table 7 compares backbones. Give one --backbone for {name}.")
    names = [row.name for row in target.rows if row.name]
    for pattern in settings.rows:
        if not any(fnmatch(row, pattern) for row in names):
            raise ConfigError(f"No row {pattern!r} in {name}. Known: {', '.join(names) or 'none'}.")

    return target


def is_asked(row: Row, settings: Settings) -> bool:
    """Whether a row is among those to rerun."""
    return not settings.rows or any(fnmatch(row.name, pattern) for pattern in settings.rows)


def _of_backbone(name: str) -> Row:
    """A row of Table 7 for a backbone that the paper does not have."""

    def edit(experiment: Experiment) -> Experiment:
        return experiment.model_copy(update={"backbone": name})

    label = name.partition("=")[0]
    slug = "".join(letter if letter.isalnum() else "-" for letter in Path(label).name)
    return Row((label, "", "", ""), None, slug, "cityscapes-linear-ibot-vits16", edits=(edit,))


def is_other(target: Target, settings: Settings) -> bool:
    """Whether rows edit another experiment than the paper's."""
    return settings.base is not None or settings.dataset not in {None, target.dataset}


def takes_classes(target: Target, settings: Settings) -> bool:
    """Whether rows have as many clusters as the data set has classes."""
    return is_other(target, settings) and settings.base is None and settings.num_clusters is None


def job_of(row: Row, target: Target, settings: Settings, num_classes: int) -> Job | None:
    """What a row needs; nothing if it is of a method that is not ours to run."""
    if row.recipe is None or settings.data is None:
        return None
    recipe = RECIPES[row.recipe]
    experiment = recipe.experiment()
    if is_other(target, settings):
        base = from_scratch(RECIPES["folder"].experiment())
        changes = {"num_clusters": num_classes, "backbone": experiment.backbone}
        experiment = recipe.edit(settings.base or base.model_copy(update=changes))
    if settings.num_clusters:
        experiment = experiment.model_copy(update={"num_clusters": settings.num_clusters})
    if settings.backbones:
        experiment = experiment.model_copy(update={"backbone": settings.backbones[0]})
    for edit in (*row.edits, settings.last):
        experiment = edit(experiment)
    file = settings.weights.get(experiment.backbone)
    if file:
        word = f"{experiment.backbone}={file}"
        experiment = experiment.model_copy(update={"backbone": word})
    numbers = find_method(row.method).Config.model_fields
    options = {name: value for name, value in settings.options.items() if name in numbers}
    experiment = completed(experiment.model_copy(update={"method": row.method, "options": options}))
    dataset = settings.dataset or target.dataset
    refine = settings.refine if row.refine == "crf" else row.refine
    return Job(row, experiment, dataset, settings.data, target.protocol, refine)
