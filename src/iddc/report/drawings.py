"""The charts of a report: sizes, affinities, curves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from markupsafe import Markup

from iddc.losses import REGULARIZERS
from iddc.report.charts import Axes, Bar, Line, curves, densities, ranked, span
from iddc.report.look import RunStatistics
from iddc.report.sides import ReportedRun
from iddc.report.tables import number, percent
from iddc.thresholds import BINS

BARS = 1000
"""How many clusters have a bar: the largest. A thousand bars are a third of a pixel wide each."""
_TITLES = {
    "loss": "Loss",
    "positive": "Positive term, L+",
    "negative": "Negative term, L−",
    "regularizer": "Regulariser",
    "live_clusters": "Live clusters",
    "head": "The head of the lowest loss",
}


def training(sides: Sequence[ReportedRun]) -> list[tuple[str, Markup]]:
    """A chart for each number of the log, with a line for each run."""
    charts = []
    for name in dict.fromkeys(chain.from_iterable(side.curves for side in sides)):
        lines = [
            Line(side.name, f"run{place}", points)
            for place, side in enumerate(sides)
            if (points := [(step, point[name]) for step, point in side.points if name in point])
        ]
        steps, values = zip(*chain.from_iterable(line.points for line in lines), strict=True)
        title = _TITLES.get(name, name.replace("_", " "))
        x = (min(steps), max(*steps, min(steps) + 1))
        axes = Axes(title, x, span(values, zero=name == "live_clusters"), "step")
        charts.append((title, curves(axes, lines)))
    return charts


def sizes(side: ReportedRun, look: RunStatistics) -> tuple[Markup, str]:
    """Ranked sizes, and what the regulariser makes of them."""
    k = len(look.counts)
    bars = [
        Bar(
            f"{side.title(c)}: {percent(look.shares[c])}, p_c {percent(look.frequencies[c])}",
            float(look.shares[c]),
            float(look.frequencies[c]),
            side.colour(c),
        )
        for c in np.argsort(-look.shares, kind="stable")[:BARS].tolist()
    ]
    most = max(max(bar.value, bar.mark) for bar in bars)
    title = f"Sizes of the clusters of {side.name}, ranked"
    which = "clusters, the largest first" if k <= BARS else f"the {BARS:,} largest clusters"
    axes = Axes(title, (0.0, float(len(bars))), (0.0, most * 1.05), which, percent=True)
    text = f"Dashed: 1/K = {percent(1 / k)}, equal sizes."
    config = side.experiment.objective
    if side.method == "IDDC" and config.regularizer != "none" and config.regularizer_weight:
        regularizer = REGULARIZERS[config.regularizer]
        found = regularizer(torch.from_numpy(look.frequencies).float(), config)
        even = regularizer(torch.full((k,), 1 / k), config)
        text += (
            f" The regulariser ({config.regularizer}, weight {config.regularizer_weight:g}) is "
            f"lowest there, {number(float(even))}; at the mean probabilities found it is "
            f"{number(float(found))}."
        )
    return ranked(axes, bars, 1 / k), text


def affinities(side: ReportedRun, look: RunStatistics) -> tuple[Markup, str]:
    """How alike patches of one and of two clusters are, and where the thresholds lie."""
    pairs, thresholds = look.affinities, side.thresholds
    edges = np.linspace(-1, 1, BINS + 1)
    there = np.flatnonzero(pairs.same + pairs.different)
    if not len(there):
        return Markup(""), f"{side.name}: there is no pair of patches to compare."
    bins = slice(max(0, there[0] - 2), there[-1] + 3)
    centres = ((edges[:-1] + edges[1:]) / 2)[bins].tolist()
    lines = [
        Line(name, style, list(zip(centres, values[bins].tolist(), strict=True)))
        for name, style, values in (
            ("of two clusters", "other", pairs.different),
            ("of one cluster", "same", pairs.same),
        )
    ]
    x = span([*centres, *(thresholds or ())])
    y = span([y for line in lines for _, y in line.points], zero=True)
    axes = Axes(f"Affinities of pairs of patches, {side.name}", x, y, "affinity")
    if not thresholds:
        return densities(axes, lines, []), ""
    positive, negative = thresholds
    width = 2 / BINS
    above = pairs.same[edges[:-1] > positive - width / 2].sum() * width
    below = pairs.different[edges[1:] < negative + width / 2].sum() * width
    text = (
        f"t+ = {positive:.2f}: {percent(above)} of the pairs of one cluster lie above it. "
        f"t− = {negative:.2f}: {percent(below)} of the pairs of two lie below it."
    )
    marks = {"t+": positive, "t−": negative} if positive != negative else {"t+ = t−": positive}
    return densities(axes, lines, sorted(marks.items(), key=lambda mark: mark[1])), text
