"""Our numbers beside the published ones: as a table to print, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from iddc.config import DatasetName
from iddc.errors import SetupError
from iddc.recipes import Figure, Panel, Row
from iddc.reproduce.plan import Job, Settings, Target, is_other
from iddc.reproduce.smoke import LABEL
from iddc.runs import write_atomic

FOUND_SHARE = 1e-4
"""A cluster is found if it has at least this share of the labelled pixels: our choice."""
SYMBOLS = {
    "negative_weight": "lambda_1",
    "regularizer_weight": "lambda_2",
    "positive_threshold": "t+",
    "epoch": "epoch",
    "rank": "rank",
    "image": "image",
}
"""What a figure has along its x-axis."""
ELSEWHERE = "not run: another method"


@dataclass
class Outcome:
    """What came of a row."""

    row: Row
    job: Job | None
    reason: str = ""
    """Why it cannot be run here."""
    failures: dict[int, str] = field(default_factory=dict)
    """What went wrong with a seed."""
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The scores of each seed, as in scores.json."""
    runs: dict[int, Path] = field(default_factory=dict)
    kept: bool = False
    """It is not asked for: an earlier command has run it."""

    def values(self, measure: str) -> list[float]:
        """One number for each seed: accuracy, mIoU, or how many clusters are found."""
        if measure == "live":
            return [float(sum(share >= FOUND_SHARE for share in s)) for s in self.sizes()]
        return [entry[measure] for entry in self.entries.values()]

    def sizes(self, pixels: str = "cluster_pixels") -> list[list[float]]:
        """The shares of the clusters, or of the classes, of each seed; the largest first."""
        return [
            [count / sum(entry[pixels]) for count in sorted(entry[pixels], reverse=True)]
            for entry in self.entries.values()
        ]

    @property
    def cells(self) -> tuple[str, ...]:
        """The row's own cells, with its numbers filled in."""
        if self.job is None:
            return self.row.cells
        numbers = self.job.experiment.objective.model_dump()
        return tuple(cell.format(**numbers) for cell in self.row.cells)

    def x(self, panel: Panel) -> float | None:
        """Where it stands on the axis of a figure; nowhere if that is known only to the run."""
        assert self.job is not None
        found = getattr(self.job.experiment.objective, panel.x)
        return None if found == "auto" else float(found)


@dataclass
class Report:
    """A table or a figure as far as it has come."""

    name: str
    target: Target
    settings: Settings
    out: Path
    """Where it is written."""
    facts: dict[str, Any]
    """What computed it, and when."""
    outcomes: list[Outcome] = field(default_factory=list)
    """One for each row."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """The lines of a figure without runs, by name, over `x`."""
    failure: int = 0
    """The exit code of the first thing that went wrong; 0: nothing did."""

    @property
    def exit_code(self) -> int:
        """0 if all that can be run on this machine was, and something can."""
        asked = [o for o in self.outcomes if o.job is not None and not o.kept]
        if self.failure or not asked or any(o.entries for o in asked):
            return self.failure
        return SetupError.exit_code

    @property
    def dataset(self) -> DatasetName:
        """Whose images these are."""
        return self.settings.dataset or self.target.dataset

    @property
    def label(self) -> str:
        """Stands over everything that is written; nothing if it is a result."""
        return LABEL if self.settings.smoke else ""

    def runnable(self) -> Iterator[tuple[Outcome, Job]]:
        """The rows that are asked for and can be run, and what they need."""
        for outcome in self.outcomes:
            if outcome.job is not None and not outcome.reason and not outcome.kept:
                yield outcome, outcome.job

    def of(self, panel: Panel) -> list[Outcome]:
        """The points of a panel."""
        return [outcome for outcome in self.outcomes if outcome.row in panel.rows]

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Title, header and rows: one table, or one for each panel of a figure."""
        if isinstance(self.target, Figure):
            for panel in filter(self.of, self.target.panels):
                shown = panel.x in {"negative_weight", "regularizer_weight", "positive_threshold"}
                axis = (SYMBOLS[panel.x],) if shown else ()
                header = ("curve", *axis, "Acc %", "mIoU %", "clusters found", "seeds")
                yield panel.title, header, [_point(o, panel, shown) for o in self.of(panel)]
        else:
            paper = "paper" if self.dataset == self.target.dataset else "paper (other data)"
            header = (*self.target.columns, "Acc %", paper, "mIoU %", paper, "seeds")
            yield "", header, [_row(outcome) for outcome in self.outcomes]

    def notes(self) -> list[str]:
        """Everything that must be said of the numbers."""
        lines = [*self._remarks(), *self.target.notes]
        rows: dict[str, list[str]] = {}  # by what is to be said of them
        own = not is_other(self.target, self.settings)
        for outcome in self.outcomes:
            said = [
                outcome.row.note if own else "",
                f"not run: {outcome.reason}" if outcome.reason else "",
            ]
            said += [f"not run with seed {s}: {text}" for s, text in outcome.failures.items()]
            for text in filter(None, said):
                rows.setdefault(text, []).append(outcome.row.name)
        return [*lines, *(f"{', '.join(names)}: {text}" for text, names in rows.items())]

    def _remarks(self) -> Iterator[str]:
        """What is true of all rows."""
        settings, target = self.settings, self.target
        if target.rows:
            yield (
                f"ours: {self.dataset} in {settings.data}, val, protocol {target.protocol}, last "
                "step; mean ± standard deviation over the seeds"
            )
        if is_other(target, settings):
            what = "recipe folder" if settings.base is None else "given configuration"
            yield (
                f"other data or settings than the paper's ({target.dataset}): each row edits the "
                f"{what}"
            )
        if settings.backbones:
            yield f"backbone {', '.join(settings.backbones)} in place of the paper's"
        if settings.num_clusters:
            yield f"{settings.num_clusters} clusters"
        if settings.refine != "crf" and any(row.refine == "crf" for row in target.rows):
            yield f"refinement {settings.refine} in place of the CRF"
        yield ", ".join(f"{name} {value}" for name, value in self.facts.items())

    def markdown(self) -> str:
        """All of it as a page."""
        parts = [f"# {self.target.title}"]
        if self.label:
            parts.append(f"**{self.label}**")
        if self.curves or (
            isinstance(self.target, Figure) and any(o.entries for o in self.outcomes)
        ):
            parts.append(f"![{self.target.title}]({self.name}.png)")
        for title, header, rows in self.tables():
            if title:
                parts.append(f"## {title}")
            lines = [header, ("---",) * len(header), *rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if self.notes():
            parts.append("\n".join(f"- {note}" for note in self.notes()))
        return "\n\n".join(parts) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "name": self.name,
            "title": self.target.title,
            "label": self.label,
            **self.facts,
            "notes": self.notes(),
            "rows": [_record(outcome) for outcome in self.outcomes],
            "curves": self.curves,
        }

    @property
    def path(self) -> Path:
        """The page; NAME.json is beside it."""
        return self.out / f"{self.name}.md"

    def write(self) -> None:
        """Write NAME.md and NAME.json."""
        write_atomic(self.path, self.markdown())
        record = json.dumps(self.as_dict(), indent=2)
        write_atomic(self.path.with_suffix(".json"), record + "\n")


def spread(values: Sequence[float], scale: float = 100.0) -> str:
    """The mean, and with several values the standard deviation of a sample (n - 1)."""
    if not values:
        return "–"
    deviation = f" ± {scale * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * fmean(values):.1f}{deviation}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _row(outcome: Outcome) -> tuple[str, ...]:
    """A line of a table: ours, then what the paper has."""
    accuracy, miou = outcome.row.published or (None, None)
    state = str(len(outcome.entries)) if outcome.entries else "not run"
    if outcome.job is None:
        state = ELSEWHERE
    return (
        *outcome.cells,
        spread(outcome.values("accuracy")),
        _percent(accuracy),
        spread(outcome.values("miou")),
        _percent(miou),
        state,
    )


def _point(outcome: Outcome, panel: Panel, shown: bool) -> tuple[str, ...]:
    """A line of a figure's table."""
    x = outcome.x(panel) if shown else None
    return (
        *outcome.cells,
        *(("auto" if x is None else f"{x:g}",) if shown else ()),
        spread(outcome.values("accuracy")),
        spread(outcome.values("miou")),
        spread(outcome.values("live"), 1.0),
        str(len(outcome.entries)) if outcome.entries else "not run",
    )


def _record(outcome: Outcome) -> dict[str, Any]:
    """A row as plain values, with every number behind it."""
    row, job = outcome.row, outcome.job
    record: dict[str, Any] = {"name": row.name, "cells": outcome.cells, "published": None}
    if row.published:
        record["published"] = dict(zip(("accuracy", "miou"), row.published, strict=True))
    if job is None:
        return record | {"not_run": ELSEWHERE}
    record |= {"method": row.method, "refinement": job.refine, "not_run": outcome.reason or None}
    record["failures"] = {str(seed): text for seed, text in outcome.failures.items()}
    for measure in ("accuracy", "miou", "live"):
        values = outcome.values(measure)
        record[measure] = {
            "values": values,
            "mean": fmean(values) if values else None,
            "deviation": stdev(values) if len(values) > 1 else None,
        }
    kept = ("cluster_pixels", "class_pixels", "epochs")
    return record | {
        "seeds": {
            str(seed): {
                "run": outcome.runs[seed].name,
                **{key: entry[key] for key in kept if key in entry},
            }
            for seed, entry in outcome.entries.items()
        },
        "experiment": job.experiment.model_dump(mode="json"),
    }
