"""What is known of a run: its files, its images, and what it does on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from iddc.config import Experiment
from iddc.datasets.samples import recorded_source
from iddc.masks import Labels, palette
from iddc.metrics import UNMATCHED, Confusion
from iddc.report.look import RunStatistics
from iddc.runs import Run, read_text
from iddc.segmenter import Segmenter

_METHODS = {"iddc": "IDDC", "kmeans": "k-means", "stego": "STEGO"}
"""How methods are called in prose; others by their name on the command line."""
_POINTS = 120
_HUGE = 1e300
_NO_CURVES = frozenset(
    {"step", "epoch", "images", "seconds", "learning_rate", "gradient_norm", "agreement"}
)
"""What a line of the log says beside the numbers that are drawn."""


@dataclass(frozen=True)
class ReportedRun:
    """A run, as a report shows it."""

    name: str
    experiment: Experiment
    labels: Labels
    look: RunStatistics | None
    log: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    versions: Mapping[str, Any]
    source: str
    """The name of what it was trained on."""
    skipped: int
    """How many images were left out."""
    colours: UInt8[np.ndarray, "k 3"]
    """The colour of each cluster."""

    @property
    def method(self) -> str:
        """What was trained."""
        return _METHODS.get(self.experiment.method, self.experiment.method)

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """t+ and t- of cosines; where they were `auto`, as the log says. None if unknown."""
        found = []
        for name in ("positive_threshold", "negative_threshold"):
            logged = [line[name] for line in self.log if isinstance(line.get(name), float)]
            found.append(logged[0] if logged else getattr(self.experiment.objective, name))
        positive, negative = found
        cosines = self.experiment.objective.affinity == "cosine"
        known = self.method == "IDDC" and cosines and "auto" not in found
        return (positive, negative) if known else None

    @property
    def agreement(self) -> float | None:
        """The share of patches on which what was learned several times agrees, if the log has it.

        They are heads of one training, or groupings of one consensus.
        """
        found = [line["agreement"] for line in self.log if isinstance(line.get("agreement"), float)]
        return found[-1] if found else None

    def title(self, cluster: int) -> str:
        """What a person called a cluster, with its number; or the number alone."""
        name, number = self.labels.names[cluster], f"cluster {cluster}"
        return number if name == number else f"{name} ({number})"

    def colour(self, cluster: int) -> str:
        """The colour of a cluster as CSS has it."""
        return f"#{bytes(self.colours[cluster].tolist()).hex()}"

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """The steps of the training, from 1 on; a method that is fitted at once has none."""
        kinds = {"loss": float, "step": int}
        return [
            line
            for line in self.log
            if all(isinstance(line.get(name), kind) for name, kind in kinds.items())
            and line["step"] > 0  # what is fitted before the first step may say its loss, too
        ]

    @cached_property
    def curves(self) -> list[str]:
        """The names of the numbers that the log has for each step."""
        names = dict.fromkeys(name for line in self.steps for name in line)
        numbers = {name for line in self.steps for name in line if isinstance(line[name], float)}
        return [n for n in names if n in numbers - _NO_CURVES and not n.endswith("_threshold")]

    @cached_property
    def points(self) -> list[tuple[float, dict[str, float]]]:
        """The log in at most 120 points, each the last step and the means of some steps."""
        parts = np.array_split(np.array(self.steps, object), min(_POINTS, len(self.steps)) or 1)
        return [
            (
                float(part[-1]["step"]),
                {
                    name: sum(values) / len(values)
                    for name in self.curves
                    if (
                        values := [step[name] for step in part if isinstance(step.get(name), float)]
                    )
                },
            )
            for part in parts
            if len(part)
        ]


def open_side(
    run: Run,
    name: str,
    segmenter: Segmenter,
    look: RunStatistics | None,
    colours: UInt8[np.ndarray, "k 3"],
) -> ReportedRun:
    """Read what a run says of itself. Files that are missing or damaged say nothing."""
    try:
        versions = json.loads(_text(run.path / "versions.json"))
    except ValueError:
        versions = None
    source, limit = recorded_source(run)
    # Reports are shown to others: of a path, its last part is enough.
    backbone = re.sub("[^=]*/", "", segmenter.experiment.backbone)
    origin = Path(source).name or "images that are not recorded"
    if limit:
        origin += f", the first {limit:,}"
    return ReportedRun(
        name=name,
        experiment=segmenter.experiment.model_copy(update={"backbone": backbone}),
        labels=segmenter.labels,
        look=look,
        log=list(_log(_text(run.path / "log.jsonl"))),
        scores=run.scores(),
        versions=versions if isinstance(versions, dict) else {},
        source=origin,
        skipped=max(0, len(_text(run.path / "skipped.csv").splitlines()) - 1),
        colours=colours,
    )


def _text(path: Path) -> str:
    """A file of the run; nothing if it is missing or no text."""
    try:
        return read_text(path)
    except (OSError, ValueError):
        return ""


def _log(text: str) -> Iterator[dict[str, Any]]:
    """The numbers in each line of log.jsonl, but for a line that a crash cut short, and for NaN."""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield {
                key: value
                for key, value in record.items()
                if isinstance(value, int | float) and abs(value) < _HUGE
            }


@dataclass(frozen=True)
class Match:
    """Which clusters of a second run are those of a first."""

    partner: Int64[np.ndarray, " k"]
    """For each cluster of the second, one of the first, or UNMATCHED; one to one."""
    agreement: float
    """The share of patches that lie in matched clusters."""


def match(first: RunStatistics, second: RunStatistics) -> Match:
    """Match the clusters of two runs that looked at the same images, so that most patches agree."""
    shape = len(second.counts), len(first.counts)
    confusion = Confusion.zeros(*shape)
    for one, other in zip(first.seen, second.seen, strict=True):
        grid = Image.fromarray(other.clusters.astype(np.int32))
        near = np.asarray(grid.resize(one.clusters.shape[::-1], Image.Resampling.NEAREST))
        held = (near != UNMATCHED) & (one.clusters != UNMATCHED)
        confusion += Confusion.count(near[held], one.clusters[held], *shape, ignore=UNMATCHED)
    partner = confusion.match()
    return Match(partner, confusion.scores(partner).accuracy)


def colours_of_partners(
    first: UInt8[np.ndarray, "k1 3"], partner: Int64[np.ndarray, " k2"]
) -> UInt8[np.ndarray, "k2 3"]:
    """Each cluster's partner's colour; for those without one, colours that no other has."""
    fresh = palette(len(first) + len(partner))[len(first) :]
    colours: np.ndarray = np.where((partner != UNMATCHED)[:, None], first[partner], fresh)
    return colours
