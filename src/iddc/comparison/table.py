"""The table of a comparison: means, deviations and differences, in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from iddc.metrics import EDGE_WIDTH
from iddc.runs import write_atomic

RECORD = "comparison.json"
"""In the folder of a comparison: all numbers, from which the tables are made."""
LEGEND = (
    "Mean ± standard deviation over the seeds. mIoU - first: the difference to the first method, "
    "seed by seed. Over images: where 95 % of the mIoUs would lie if other images had been scored "
    f"(bootstrap). Trimap: the mIoU of pixels at most {EDGE_WIDTH} away from an edge in the "
    "labels. Sizes: the entropy of the cluster shares over log K; 1 means equal sizes. Memory: the "
    "most that the training held at once."
)
"""What stands below the table."""


@dataclass(frozen=True)
class Entry:
    """One run and its scores."""

    method: str
    """The name of the method."""
    seed: int
    values: Mapping[str, float | None]
    """accuracy, miou, size_entropy, trimap, and of the training seconds and memory in bytes, which
    are none where a run was interrupted or made elsewhere."""
    iou: Mapping[str, float | None]
    """The IoU of each class."""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The ends between which 95 % of other draws of the images have accuracy and miou."""


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
        rows = []
        for method in self.methods:
            differences = self.difference(method, "miou") if method != self.methods[0] else []
            cells = {
                "method": method,
                "seeds": str(len(self.values(method, "miou"))),
                "accuracy (%)": spread(self.values(method, "accuracy").values(), 100),
                "mIoU (%)": spread(self.values(method, "miou").values(), 100),
                "mIoU - first": spread(differences, 100, sign=True),
                "over images": self._interval(method),
                "trimap (%)": spread(self.values(method, "trimap").values(), 100),
                "sizes": spread(self.values(method, "size_entropy").values(), 1, digits=2),
                "time (s)": spread(self.values(method, "seconds").values(), 1, digits=0),
                "memory (GB)": spread((b / 1e9 for b in self.values(method, "memory").values()), 1),
            }
            rows.append(cells)
        header = list(rows[0]) if rows else ["method", "seeds", "accuracy (%)", "mIoU (%)"]
        failed = [[name, "0", *["-"] * (len(header) - 2)] for name in self.failures]
        return header, [[*row.values()] for row in rows] + failed

    def _interval(self, method: str) -> str:
        """The mean ends of the intervals of a method's mIoU."""
        rows = [e.intervals["miou"] for e in self.entries if e.method == method and e.intervals]
        ends = [f"{100 * fmean(row[end] for row in rows):.1f}" for end in (0, 1)] if rows else []
        return " to ".join(ends) or "-"

    def classes(self) -> tuple[list[str], list[list[str]]]:
        """The IoU of each class, in percent: a row for each class, a column for each method."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.iou)
        rows = []
        for name in names:
            cells = [name]
            for method in self.methods:
                found = (e.iou.get(name) for e in self.entries if e.method == method)
                cells.append(spread((value for value in found if value is not None), 100))
            rows.append(cells)
        return ["class", *self.methods], rows

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for the record."""
        entries = [
            {
                **{"method": e.method, "seed": e.seed, **e.values, "iou": dict(e.iou)},
                "intervals": {name: list(ends) for name, ends in e.intervals.items()},
            }
            for e in self.entries
        ]
        return {"title": self.title, "runs": entries, "failures": dict(self.failures)}

    def write(self, out: Path) -> None:
        """Write the record, and both tables as Markdown, CSV and LaTeX."""
        both = {"comparison": self.table(), "classes": self.classes()}
        notes = [f"- {name}: {reason}" for name, reason in self.failures.items()]
        text = [f"# {self.title}", "", *_markdown(*both["comparison"]), "", LEGEND, "", *notes]
        text += ["", "## IoU of each class (%)", "", *_markdown(*both["classes"])]
        write_atomic(out / "comparison.md", "\n".join(text) + "\n")
        for name, (header, rows) in both.items():
            sheet = io.StringIO()
            csv.writer(sheet, lineterminator="\n").writerows([header, *rows])
            write_atomic(out / f"{name}.csv", sheet.getvalue())
            write_atomic(out / f"{name}.tex", _latex(header, rows))
        write_atomic(out / RECORD, json.dumps(self.as_dict(), indent=2) + "\n")


def spread(values: Iterable[float], scale: int, *, digits: int = 1, sign: bool = False) -> str:
    """The mean and, of several values, the standard deviation, as a table shows them."""
    numbers = [scale * value for value in values]
    if not numbers:
        return "-"
    mean = f"{fmean(numbers):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


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
    for plain, written in (("%", "\\%"), ("_", "\\_"), ("&", "\\&"), ("±", "$\\pm$")):
        cell = cell.replace(plain, written)
    return cell
