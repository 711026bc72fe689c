"""Figures as pictures. matplotlib (extra `plots`) is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from iddc.config import ObjectiveConfig, Regularizer
from iddc.datasets import LabelledImages
from iddc.errors import needs_extra
from iddc.evaluation import PROTOCOLS
from iddc.figures import compare
from iddc.losses import REGULARIZERS
from iddc.recipes import Figure, Panel
from iddc.reproduce.report import SYMBOLS, Outcome, Report
from iddc.runs import write_atomic
from iddc.segmenter import Segmenter

SHOWN = 6
"""Images of Figs. 8 and 9, at equal distances in the data set."""
_INCHES = 4.5
"""The side of a panel."""


def check_matplotlib() -> None:
    """Say before anything is trained that pictures cannot be drawn.

    Raises:
        SetupError: matplotlib is not installed.
    """
    with needs_extra("plots", "Figures need matplotlib"):
        import matplotlib.figure  # noqa: F401


def regularizer_curves() -> dict[str, list[float]]:
    """Fig. 3: the regularisers of two clusters, scaled from 0 at equal sizes to 1 at the ends.

    Returns:
        Each curve over `x`, the size of the rarer cluster over that of the other, 0.001 to 1.
    """
    ratios = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    settings: dict[str, tuple[Regularizer, ObjectiveConfig]] = {
        "entropy": ("entropy", ObjectiveConfig()),
        **{
            f"Weibull as printed, k {k}": ("weibull", ObjectiveConfig(weibull_shape=k))
            for k in (0.1, 0.3, 0.7)
        },
        "Weibull as released, k 0.3, scale 5": ("weibull-released", ObjectiveConfig()),
    }
    curves = {"x": ratios.tolist()}
    for title, (name, config) in settings.items():
        values = torch.stack(
            [REGULARIZERS[name](torch.stack([r, r.new_ones(())]) / (1 + r), config) for r in ratios]
        )
        curves[title] = ((values - values[-1]) / (values[0] - values[-1])).tolist()
    return curves


CURVES: dict[str, Callable[[], dict[str, list[float]]]] = {"fig3": regularizer_curves}
"""Figures without runs: their lines, by name, over `x`."""


def draw_pictures(report: Report, dataset: LabelledImages, path: Path) -> None:
    """Draw what the first runs of all rows make of some images (Figs. 8 and 9).

    Raises:
        SetupError: It cannot be written.
    """
    device = str(report.facts["device"])
    runs = {o.cells[0]: next(iter(o.runs.values())) for o in report.outcomes if o.runs}
    if not runs:
        return
    sheet = compare(
        {title: Segmenter.load(run, device) for title, run in runs.items()},
        dataset,
        PROTOCOLS[report.target.protocol],
        shown=sorted({int(index) for index in np.linspace(0, len(dataset) - 1, SHOWN)}),
    )
    picture = BytesIO()
    sheet.save(picture, format="png")
    write_atomic(path, picture.getvalue())


def draw(report: Report, path: Path) -> None:
    """Draw a figure as a PNG; without any number, do nothing.

    Raises:
        SetupError: It cannot be written.
    """
    from matplotlib.figure import Figure as Canvas

    assert isinstance(report.target, Figure)
    panels = [panel for panel in report.target.panels if _points(report.of(panel))]
    if not panels and not report.curves:
        return
    canvas = Canvas(figsize=(_INCHES * max(1, len(panels)), _INCHES), layout="constrained")
    label = f"\n{report.label}" if report.label else ""
    canvas.suptitle(f"{report.target.title}{label}", fontsize="medium")
    axes = canvas.subplots(1, max(1, len(panels)), squeeze=False)[0]
    if report.curves:
        _draw_curves(axes[0], report.curves)
    for ax, panel in zip(axes, panels, strict=False):
        _DRAWERS.get(panel.x, _draw_sweep)(ax, panel, _points(report.of(panel)))
        ax.set_title(panel.title, fontsize="medium")
        ax.set_xlabel(SYMBOLS[panel.x])
        ax.legend(fontsize="x-small")
        ax.grid(alpha=0.3)
    picture = BytesIO()
    canvas.savefig(picture, format="png", dpi=150)
    write_atomic(path, picture.getvalue())


def _points(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those with numbers."""
    return [outcome for outcome in outcomes if outcome.entries]


def _draw_curves(ax: Any, curves: dict[str, list[float]]) -> None:
    for name, values in curves.items():
        if name != "x":
            ax.plot(curves["x"], values, label=name)
    ax.set_xlabel("size of the rarer cluster / size of the other")
    ax.set_ylabel("regulariser, scaled")
    ax.legend(fontsize="x-small")


def _draw_sweep(ax: Any, panel: Panel, outcomes: Sequence[Outcome]) -> None:
    """A measure over a number, with the standard deviation over seeds."""
    scale = 1 if panel.y == "live" else 100
    for name in dict.fromkeys(outcome.cells for outcome in outcomes):
        curve: dict[float, list[float]] = {}
        for outcome in outcomes:
            values, x = [scale * value for value in outcome.values(panel.y)], outcome.x(panel)
            if outcome.cells == name and x is None:
                ax.axhline(fmean(values), linestyle="--", color="0.5", label=name[0])
            elif outcome.cells == name and x is not None:
                curve[x] = values
        if curve:
            _plot(ax, sorted(curve), [curve[x] for x in sorted(curve)], name[0])
    if panel.x != "positive_threshold":
        ax.set_xscale("log")
    ticks = sorted({x for outcome in outcomes if (x := outcome.x(panel)) is not None})
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_ylabel("clusters found" if panel.y == "live" else "mIoU (%)")


def _draw_epochs(ax: Any, _panel: Panel, outcomes: Sequence[Outcome]) -> None:
    """Accuracy and mIoU after each epoch."""
    for outcome in outcomes:
        runs = [entry["epochs"] for entry in outcome.entries.values()]
        for measure, title in (("accuracy", "accuracy"), ("miou", "mIoU")):
            lists = [
                [100 * score[measure] for score in scores] for scores in zip(*runs, strict=True)
            ]
            _plot(ax, [float(score["epoch"]) for score in runs[0]], lists, title)
    ax.set_ylabel("%")


def _draw_sizes(ax: Any, _panel: Panel, outcomes: Sequence[Outcome]) -> None:
    """Ranked shares of the clusters, the mean over seeds, and those of the classes."""
    truth = outcomes[0].sizes("class_pixels")[0]
    ax.bar(range(1, len(truth) + 1), truth, color="0.8", label="classes")
    for outcome in outcomes:
        shares = np.mean(outcome.sizes(), axis=0)
        ax.plot(range(1, len(shares) + 1), shares, marker="o", label=outcome.cells[0])
    ax.set_yscale("log")
    ax.set_ylabel("share of the labelled pixels")


_DRAWERS: dict[str, Callable[[Any, Panel, Sequence[Outcome]], None]] = {
    "epoch": _draw_epochs,
    "rank": _draw_sizes,
}
"""How a panel is drawn, by its x-axis; all others are sweeps."""


def _plot(ax: Any, x: Sequence[float], lists: Sequence[Sequence[float]], title: str) -> None:
    """The means of lists of values, and a band of their standard deviations."""
    means = np.array([fmean(values) for values in lists])
    deviations = np.array([stdev(values) if len(values) > 1 else 0.0 for values in lists])
    (line,) = ax.plot(x, means, marker="o", label=title)
    band = (means - deviations, means + deviations)
    ax.fill_between(x, *band, color=line.get_color(), alpha=0.12, linewidth=0)
