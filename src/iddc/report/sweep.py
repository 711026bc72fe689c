"""The page of a sweep: every K side by side, which cluster splits into which, what to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from iddc import __version__
from iddc.masks import palette
from iddc.masks.ids import write_file
from iddc.report.pictures import mask, photo
from iddc.report.tables import percent
from iddc.sweep import Sweep

PAGE = "sweep.html"
"""The file in DIR."""
SHOWN = 6
"""How many images are shown with every K."""
_COLUMN, _HEIGHT, _BAR, _GAP, _TOP = 150.0, 520.0, 14.0, 3.0, 28.0
"""The drawing of the tree: distance of columns, height, width of a bar, gaps, room for titles."""
_THIN = 0.004
"""Flows of a smaller share of the patches are not drawn."""


@dataclass(frozen=True)
class Row:
    """An image, and its mask with every K."""

    name: str
    photo: str
    size: tuple[int, int]
    masks: Sequence[str]


def write_sweep(found: Sweep, out: Path, command: str, *, seeds: int) -> Path:
    """Write the page of a sweep, one file that needs nothing else.

    Args:
        found: The sweep.
        out: The folder.
        command: What to give next.
        seeds: How many seeds were compared.

    Raises:
        SetupError: The file cannot be written.
    """
    colours = inherited_colours(found)
    environment = Environment(
        loader=PackageLoader("iddc.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: percent(share).replace(" ", "\N{NBSP}")
    text = environment.get_template("sweep.html").render(
        version=__version__,
        sweep=found,
        levels=found.levels,
        rows=_rows(found, colours),
        tree=draw_tree(found, colours),
        command=command,
        seeds=seeds,
    )
    path = out / PAGE
    write_file(path, text.encode("utf-8", "surrogateescape"))
    return path


def inherited_colours(found: Sweep) -> list[UInt8[np.ndarray, "_ 3"]]:
    """The colours of every level: the largest part of a cluster keeps its colour."""
    fresh = palette(sum(level.num_clusters for level in found.levels))
    used = found.levels[0].num_clusters
    colours = [fresh[:used]]
    for index in range(len(found.levels) - 1):
        flow = found.flow(index)
        own = np.zeros((flow.shape[1], 3), np.uint8)
        given = np.zeros(flow.shape[1], bool)
        for parent in range(flow.shape[0]):
            mine = np.flatnonzero((flow.argmax(0) == parent) & (flow[parent] > 0))
            if len(mine):
                child = int(mine[flow[parent, mine].argmax()])
                own[child], given[child] = colours[-1][parent], True
        for child in np.flatnonzero(~given).tolist():
            own[child] = fresh[used]
            used += 1
        colours.append(own)
    return colours


def _rows(found: Sweep, colours: Sequence[UInt8[np.ndarray, "_ 3"]]) -> list[Row]:
    count = min(SHOWN, len(found.images))
    rows = []
    for index in (i * len(found.images) // count for i in range(count)):
        image = found.images[index]
        masks = []
        for level, own in zip(found.levels, colours, strict=True):
            grid = Image.fromarray(level.clusters[index].astype(np.int32))
            ids = np.asarray(grid.resize(image.size, Image.Resampling.NEAREST))
            ignored: Bool[np.ndarray, " k"] = np.zeros(level.num_clusters, bool)
            masks.append(mask(ids, own, ignored))
        rows.append(Row(found.names[index], photo(image), image.size, masks))
    return rows


def draw_tree(found: Sweep, colours: Sequence[UInt8[np.ndarray, "_ 3"]]) -> Markup:
    """Which cluster splits into which: a column of bars for each K, bands between them, as SVG."""
    orders = _orders(found)
    places = [_places(_sizes(found, level), order) for level, order in enumerate(orders)]
    parts = []
    # Bands: patches of a cluster that go to a cluster of the next K. Thin ones would be noise.
    for index in range(len(found.levels) - 1):
        flow = found.flow(index)
        total = flow.sum()
        scale = (_HEIGHT - _GAP * max(map(len, orders))) / total
        left = [top for top, _ in places[index]]
        right = [top for top, _ in places[index + 1]]
        x1, x2 = index * _COLUMN + _BAR, (index + 1) * _COLUMN
        for parent in orders[index]:
            for child in orders[index + 1]:
                size = flow[parent, child] * scale
                if flow[parent, child] >= _THIN * total:
                    parts.append(
                        _band(x1, left[parent], x2, right[child], size, colours[index][parent])
                    )
                left[parent] += size
                right[child] += size
    # Bars, over the ends of the bands.
    for index, level in enumerate(found.levels):
        x = index * _COLUMN
        parts.append(Markup('<text x="{}" y="16">K = {}</text>').format(x, level.num_clusters))
        for cluster in orders[index]:
            top, size = places[index][cluster]
            share = _sizes(found, index)[cluster] / _sizes(found, index).sum()
            parts.append(
                Markup(
                    '<rect x="{}" y="{:.1f}" width="{}" height="{:.1f}" fill="{}">'
                    "<title>{}</title></rect>"
                ).format(
                    x, top, _BAR, max(size, 0.5), _css(colours[index][cluster]),
                    f"K = {level.num_clusters}, cluster {cluster}: {percent(share)}",
                )
            )  # fmt: skip
    width = (len(found.levels) - 1) * _COLUMN + 60
    return Markup(
        '<svg class="tree" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img" '
        'aria-label="{2}">{3}</svg>'
    ).format(width, _HEIGHT + _TOP, "Which cluster splits into which", Markup().join(parts))


def _sizes(found: Sweep, index: int) -> np.ndarray:
    level = found.levels[index]
    sizes: np.ndarray = np.bincount(
        np.concatenate([ids.ravel() for ids in level.clusters]), minlength=level.num_clusters
    )
    return sizes


def _orders(found: Sweep) -> list[list[int]]:
    """The order of the bars of each column: the largest first, children below their parents."""
    orders = [np.argsort(-_sizes(found, 0), kind="stable").tolist()]
    for index in range(len(found.levels) - 1):
        flow = found.flow(index)
        place = {parent: i for i, parent in enumerate(orders[-1])}
        parents = flow.argmax(0)
        children = range(flow.shape[1])
        orders.append(
            sorted(children, key=lambda c: (place[int(parents[c])], -int(flow[:, c].sum())))
        )
    return orders


def _places(sizes: np.ndarray, order: Sequence[int]) -> list[tuple[float, float]]:
    """The top and the height of each bar, by its cluster."""
    scale = (_HEIGHT - _GAP * len(order)) / sizes.sum()
    places, top = [(0.0, 0.0)] * len(order), _TOP
    for cluster in order:
        height = float(sizes[cluster] * scale)
        places[cluster] = (top, height)
        top += height + _GAP
    return places


def _band(
    x1: float, y1: float, x2: float, y2: float, size: float, colour: UInt8[np.ndarray, "3"]
) -> Markup:
    middle = (x1 + x2) / 2
    path = (
        f"M{x1} {y1:.1f}C{middle} {y1:.1f} {middle} {y2:.1f} {x2} {y2:.1f}"
        f"V{y2 + size:.1f}C{middle} {y2 + size:.1f} {middle} {y1 + size:.1f} {x1} {y1 + size:.1f}Z"
    )
    return Markup('<path d="{}" fill="{}" opacity=".4"/>').format(path, _css(colour))


def _css(colour: UInt8[np.ndarray, "3"]) -> str:
    return f"#{bytes(colour.tolist()).hex()}"
