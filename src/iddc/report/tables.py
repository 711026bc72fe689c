"""What a report says in tables: every number of it can be copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from iddc.backbones import licence_of
from iddc.report.look import RunStatistics
from iddc.report.sides import ReportedRun
from iddc.runs.folder import SCORE_KEY

NEAREST = 3
"""With how many other clusters a cluster is said to be confused."""


@dataclass(frozen=True)
class Table:
    """Rows that are named by their first cell."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int
    """The first column of numbers, which are aligned to the right."""
    bars: bool = False
    """Whether numbers are shares and have a bar."""
    note: str = ""


def percent(share: object) -> str:
    """A share in [0, 1] as text; what is none, such as a score in a damaged file, is a dash."""
    return f"{100 * share:.1f} %" if isinstance(share, int | float) else "–"


def number(value: object) -> str:
    """A number of the log or an option as text."""
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def summary(sides: Sequence[ReportedRun]) -> Table:
    """What was trained on what, a column for each run."""
    columns = [_about(side) for side in sides]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table("What was trained, and where", ("", *(side.name for side in sides)), rows, 9)


def _about(side: ReportedRun) -> dict[str, str]:
    packages = ("iddc", "torch", "timm", "python", "platform")
    return {
        "images": side.source,
        "left out": f"{side.skipped:,}",
        "method": side.method,
        "clusters, K": f"{side.experiment.num_clusters:,}",
        "backbone": side.experiment.backbone,
        "licence of the backbone": licence_of(side.experiment.backbone),
        "recipe": side.experiment.recipe,
        "seed": str(side.experiment.seed),
        "steps": f"{side.steps[-1]['step']:,}" if side.steps else "–",
        "time in steps": _duration(side),
        "t+, t−": ", ".join(f"{value:.2f}" for value in side.thresholds or ()) or "–",
        **{name: str(side.versions.get(name, "–")) for name in packages},
    }


def _duration(side: ReportedRun) -> str:
    if not side.steps:
        return "–"
    minutes, seconds = divmod(round(sum(step.get("seconds", 0) for step in side.steps)), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes > 59
        else f"{minutes}:{seconds:02} min"
    )


def facts(side: ReportedRun) -> list[tuple[str, str]]:
    """The few numbers that say whether a run is worth a look, each with what it is."""
    found = [(f"{side.experiment.num_clusters:,}", "clusters")]
    if side.look:
        shares = side.look.shares[side.look.counts > 0]
        sure = float((side.look.mean_probs.diagonal() * side.look.shares).sum())
        found += [
            (f"{len(shares):,}", "used in these images"),
            (f"{np.exp(-(shares * np.log(shares)).sum()):.1f}", "effective clusters"),
            (percent(sure), "mean confidence"),
        ]
    return [*found, *((percent(entry.get("miou")), "mIoU") for entry in side.scores[-1:])]


def curve_table(sides: Sequence[ReportedRun]) -> Table:
    """The log in as many rows as the curves have points."""
    names = list(dict.fromkeys(chain.from_iterable(side.curves for side in sides)))
    rows = [
        (side.name, f"{step:g}", *(number(point.get(name, "–")) for name in names))
        for side in sides
        for step, point in side.points
    ]
    title = "The curves in numbers: each row is the mean of the steps since the row before"
    return Table(title, ("run", "step", *(name.replace("_", " ") for name in names)), rows, 1)


def cluster_table(side: ReportedRun, look: RunStatistics) -> Table:
    """Every cluster in numbers, the largest first."""
    rows = []
    for c in np.argsort(-look.counts, kind="stable").tolist():
        near = ", ".join(f"{side.title(other)} {percent(p)}" for other, p in nearest(look, c))
        sure = percent(float(look.mean_probs[c, c]) if look.counts[c] else None)
        sizes = (percent(look.shares[c]), percent(look.frequencies[c]), str(look.images[c]))
        rows.append((str(c), side.labels.names[c], *sizes, sure, near or "–"))
    header = ("cluster", "name", "share", "p_c", "images", "confidence", "confused with")
    return Table(f"All {len(rows):,} clusters of {side.name} in numbers", header, rows, 9)


def nearest(look: RunStatistics, cluster: int) -> list[tuple[int, float]]:
    """The clusters that get most of the probability where this one wins."""
    row = look.mean_probs[[cluster]].tocoo()
    found = sorted(zip((-row.data).tolist(), row.col.tolist(), strict=True))
    return [(other, -less) for less, other in found if other != cluster and less < 0][:NEAREST]


def scores(sides: Sequence[ReportedRun]) -> Iterator[Table]:
    """A table for each data set, split, protocol and refinement, with a column for each run."""
    by_key: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for side in sides:
        for entry in side.scores:
            columns = by_key.setdefault(tuple(str(entry.get(key, "–")) for key in SCORE_KEY), {})
            columns[side.name] = entry
            if isinstance(entry.get("by_name"), dict):
                columns[f"{side.name}, by name"] = entry["by_name"]
    for (data, dataset, split, protocol, refinement), columns in by_key.items():
        entries = list(columns.values())
        found = [entry.get("iou") for entry in entries]
        ious = [iou if isinstance(iou, dict) else {} for iou in found]
        rows = [
            (title, *(percent(entry.get(key)) for entry in entries))
            for title, key in (("mIoU", "miou"), ("accuracy", "accuracy"))
        ]
        names = dict.fromkeys(chain.from_iterable(ious))
        rows += [(f"IoU {name}", *(percent(iou.get(name)) for iou in ious)) for name in names]
        parts = [Path(data).name, dataset, split, f"protocol {protocol}"]
        parts += [f"{entries[0].get('images', '–')} images"]
        parts += [f"refined: {refinement}"] * (refinement != "none")
        notes = dict.fromkeys(str(entry["note"]) for entry in entries if "note" in entry)
        yield Table(" · ".join(parts), ("", *columns), rows, 1, bars=True, note=" ".join(notes))


def choices(sides: Sequence[ReportedRun]) -> Table:
    """Every option of the runs, those that differ first."""
    flat = [dict(_flat(side.experiment.model_dump())) for side in sides]
    rows = [(name, *(number(options[name]) for options in flat)) for name in flat[0]]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    title = "Every option" + (", those that differ first" if len(sides) > 1 else "")
    return Table(title, ("option", *(side.name for side in sides)), rows, 9)


def _flat(record: Mapping[str, Any], *place: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, *place, key)
        else:
            yield ".".join((*place, key)).replace("_", "-"), value
