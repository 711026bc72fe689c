"""How commands print tables, scores and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iddc.evaluation import Evaluation


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_scores(evaluations: Mapping[str, Evaluation]) -> None:
    """Print the IoU of each class, the mean and the accuracy, one column per method, in percent."""
    scores = [evaluation.scores for evaluation in evaluations.values()]
    class_names = next(iter(evaluations.values())).class_names
    rows = [
        (name, *(percent(found.iou[index]) for found in scores))
        for index, name in enumerate(class_names)
    ]
    rows += [
        ("mIoU", *(percent(found.miou) for found in scores)),
        ("accuracy", *(percent(found.accuracy) for found in scores)),
    ]
    for title, key in (("mIoU", "miou"), ("accuracy", "accuracy")):
        ends = [evaluation.intervals.get(key) for evaluation in evaluations.values()]
        if any(ends):
            cells = [" to ".join(percent(end).strip() for end in found or ()) for found in ends]
            rows.append((f"{title}, other images", *cells))
    print_table(("IoU (%)", *evaluations), rows)


def percent(share: float | None) -> str:
    """A share in [0, 1] as a table shows it."""
    return "-" if share is None else f"{100 * share:5.1f}"


def print_json(record: Mapping[Any, object]) -> None:
    """Print one JSON object."""
    print(json.dumps(record, indent=2))
