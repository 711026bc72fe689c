"""Methods side by side: the same images, backbone, protocol and seeds, and one table of them all.

Every run is a folder like any other, so an interrupted comparison goes on where it stopped, and
what is there is not done again. A method that fails has its reason in the table, and the others
finish. Labels are opened after all training is done.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.special import xlogy

from iddc.config import Experiment, MethodName, Runtime
from iddc.datasets import LabelledImages
from iddc.errors import ConfigError, IddcError, Interrupted, SetupError
from iddc.evaluation import EvalProtocol, Evaluation, evaluate
from iddc.images import ImageFile
from iddc.learning import trained_run
from iddc.learning.embeddings import Embeddings
from iddc.progress import SILENT, Progress
from iddc.runs import Run, disk_errors, read_text, write_atomic
from iddc.runs.files import TEMPORARY
from iddc.segmenter import Segmenter

RECORD = "comparison.json"
"""In the folder of a comparison: all numbers, from which the tables are made."""
LEGEND = (
    "Mean ± standard deviation over seeds. The differences are seed by seed. Sizes: the entropy of "
    "the clusters' shares over log K, 1 for equal ones."
)
"""What stands below the table."""
CLOCK = ".seconds"
"""The end of the file beside a run's folder that says how long its training took."""


@dataclass(frozen=True)
class Entry:
    """One run and its scores."""

    method: str
    """The name of the method."""
    seed: int
    values: Mapping[str, float | None]
    """accuracy, miou, size_entropy and seconds, which are none where a run was interrupted."""
    iou: Mapping[str, float | None]
    """The IoU of each class."""


@dataclass(frozen=True)
class Comparison:
    """The runs of all methods, and why some are missing."""

    title: str
    """The backbone, the number of clusters and the data."""
    entries: tuple[Entry, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a row has no scores, by its name."""

    @property
    def exit_code(self) -> int:
        """0 if every method has its scores, 5 otherwise."""
        return 5 if self.failures else 0

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The rows that have scores, in the order they were asked for."""
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    def values(self, method: str, name: str) -> dict[int, float]:
        """A number of each seed of a method, where it is known."""
        rows = (entry for entry in self.entries if entry.method == method)
        found = {entry.seed: entry.values.get(name) for entry in rows}
        return {seed: value for seed, value in found.items() if value is not None}

    def difference(self, method: str, name: str) -> list[float]:
        """A number less that of the first method, for every seed that both have."""
        first, own = self.values(self.methods[0], name), self.values(method, name)
        return [own[seed] - first[seed] for seed in own if seed in first]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows as they are printed, in percent, with standard deviations."""
        header = [
            "method",
            "seeds",
            "accuracy (%)",
            "mIoU (%)",
            "mIoU - first",
            "sizes",
            "time (s)",
        ]
        rows = []
        for method in self.methods:
            seeds = len(self.values(method, "miou"))
            differences = self.difference(method, "miou") if method != self.methods[0] else []
            rows.append(
                [
                    method,
                    str(seeds),
                    spread(self.values(method, "accuracy").values(), 100),
                    spread(self.values(method, "miou").values(), 100),
                    spread(differences, 100, sign=True),
                    spread(self.values(method, "size_entropy").values(), 1, digits=2),
                    spread(self.values(method, "seconds").values(), 1, digits=0),
                ]
            )
        rows += [[name, "0", "-", "-", "-", "-", "-"] for name in self.failures]
        return header, rows

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for the record."""
        entries = [
            {"method": e.method, "seed": e.seed, **e.values, "iou": dict(e.iou)}
            for e in self.entries
        ]
        return {"title": self.title, "runs": entries, "failures": dict(self.failures)}

    def write(self, out: Path) -> None:
        """Write the record, and the table as Markdown, CSV and LaTeX."""
        header, rows = self.table()
        notes = [f"{name}: {reason}" for name, reason in self.failures.items()]
        lines = [f"# {self.title}", "", _markdown(header), _markdown(["---"] * len(header))]
        lines += [_markdown(row) for row in rows]
        lines += ["", LEGEND, "", *(f"- {note}" for note in notes)]
        write_atomic(out / "comparison.md", "\n".join(lines) + "\n")
        sheet = io.StringIO()
        csv.writer(sheet, lineterminator="\n").writerows([header, *rows])
        write_atomic(out / "comparison.csv", sheet.getvalue())
        write_atomic(out / "comparison.tex", _latex(header, rows))
        write_atomic(out / RECORD, json.dumps(self.as_dict(), indent=2) + "\n")


def compare(
    files: Sequence[ImageFile],
    experiment: Experiment,
    methods: Sequence[MethodName],
    seeds: int,
    dataset: LabelledImages,
    protocol: EvalProtocol,
    out: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    source: str,
    progress: Progress = SILENT,
) -> Comparison:
    """Train every method with every seed on the same images, and score all of them alike.

    Args:
        files: The images to train on.
        experiment: What all methods have in common; `seed` is the first one.
        methods: Each once; the first is what the others are compared with.
        seeds: Runs of each method.
        dataset: What they are scored on.
        protocol: How.
        out: The folder to write; runs are in `out/runs`.
        runtime: How this machine works.
        source: Where the images come from, as the user gave it.
        progress: Shows how far the work is.

    Raises:
        ConfigError: A method is named twice, a run in the folder has other options, or the folder
            holds something else.
        SetupError: The folder cannot be written; the same call goes on when it can.
        Interrupted: SIGINT or SIGTERM came; the same call goes on.
    """
    if len({*methods}) < len(methods):
        raise ConfigError(f"--methods: expected each method once, found {' '.join(methods)}.")
    trained: dict[tuple[str, int], float | None] = {}
    failures: dict[str, str] = {}
    _refuse_foreign(out)

    def folder(name: str, seed: int) -> Path:
        return out / "runs" / f"{name}-{seed}"

    # All training first: labels are not opened before the last run is done.
    for seed in range(experiment.seed, experiment.seed + seeds):
        shared: Embeddings = {}  # views of one seed, which several methods may see
        for name in methods:
            if name in failures:
                continue
            progress.note(f"{name}, seed {seed}")
            own = experiment.model_copy(update={"method": name, "seed": seed, "options": {}})
            try:
                seconds = _train(files, own, folder(name, seed), runtime, source, shared, progress)
            except (ConfigError, SetupError, Interrupted):
                raise  # the machine's failure, such as a full disk, is not the method's
            except IddcError as error:
                failures[name] = str(error)
            else:
                trained[name, seed] = seconds
    entries = []
    for name in methods:
        for (method, seed), seconds in trained.items():
            if method == name and name not in failures:
                progress.note(f"scoring {name}, seed {seed}")
                segmenter = Segmenter.load(folder(name, seed), runtime.device)
                found = evaluate(segmenter, dataset, protocol, progress=progress)
                entries.append(_entry(name, seed, found, seconds))
    title = f"{experiment.backbone}, {experiment.num_clusters} clusters, {dataset.name}"
    comparison = Comparison(title, tuple(entries), failures)
    comparison.write(out)
    return comparison


def _train(
    files: Sequence[ImageFile],
    experiment: Experiment,
    folder: Path,
    runtime: Runtime,
    source: str,
    shared: Embeddings,
    progress: Progress,
) -> float | None:
    """Train one run unless it is there; the seconds it took, if all of it was done now.

    They are kept beside the run, so that a comparison that goes on knows them.
    """
    clock, started = folder.with_name(folder.name + CLOCK), time.monotonic()
    fresh = not Run(folder).has_config
    trained_run(files, experiment, folder, runtime, source=source, shared=shared, progress=progress)
    if fresh:
        write_atomic(clock, f"{round(time.monotonic() - started, 1)}\n")
    return _seconds(clock)


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds something else, whose files of the same names would be lost.

    Raises:
        ConfigError: It does, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the comparison.")
    with disk_errors(out):
        names = [path.name for path in out.iterdir()] if out.exists() else []
    names = [name for name in names if not Path(name).match(TEMPORARY)]
    if names and "runs" not in names:
        raise ConfigError(
            f"{out} holds something else than a comparison; nothing was changed. Choose a new or "
            "empty folder."
        )


def _seconds(clock: Path) -> float | None:
    """How long a training took; None where nobody knows."""
    try:
        seconds = float(read_text(clock))
    except (OSError, ValueError):
        return None
    return seconds if math.isfinite(seconds) else None


def _entry(method: str, seed: int, found: Evaluation, seconds: float | None) -> Entry:
    values = {
        "accuracy": found.scores.accuracy,
        "miou": found.scores.miou,
        "size_entropy": size_entropy(found.confusion.counts.sum(1)),
        "seconds": seconds,
    }
    return Entry(method, seed, values, found.scores.as_dict(found.class_names)["iou"])


def size_entropy(pixels: np.ndarray) -> float:
    """The entropy of the clusters' shares over log K: 1 if all are equal, 0 if there is one."""
    shares = pixels / pixels.sum()
    return float(-xlogy(shares, shares).sum() / np.log(len(shares)))


def spread(values: Iterable[float], scale: int, *, digits: int = 1, sign: bool = False) -> str:
    """The mean and, of several values, the standard deviation, as a table shows them."""
    numbers = [scale * value for value in values]
    if not numbers:
        return "-"
    mean = f"{fmean(numbers):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[_escaped(cell) for cell in row] for row in (header, *rows)]
    lines = [f"{' & '.join(row)} \\\\" for row in escaped]
    return "\n".join(
        [
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            "\\toprule",
            lines[0],
            "\\midrule",
            *lines[1:],
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def _escaped(cell: str) -> str:
    for plain, written in (("%", "\\%"), ("_", "\\_"), ("±", "$\\pm$")):
        cell = cell.replace(plain, written)
    return cell
