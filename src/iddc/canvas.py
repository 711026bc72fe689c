"""From the grids of an image's windows to the pixels of the result, a few rows at a time.

With `softmax="patches"`, everything between a window's grid of probabilities and the pixels is
linear, and the same along both axes: bilinear resizing, the average where windows overlap, and
resizing again. So one small matrix for each window of an axis does all of it, and no canvas is
needed. With `softmax="pixels"` the softmax stands between the two resizings, and a few rows of the
canvas are made at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import pad

from iddc.config import PredictionConfig

STRIP_VALUES = {"cpu": 2**20, "cuda": 2**25}
"""A strip holds about this many values, by the type of the device: 4 MB stay in a CPU's cache."""


def working_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Reduce (width, height) so that the shorter is `short_side`; smaller images and 0: as is."""
    if not 0 < short_side < min(size):
        return size
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def window_starts(size: int, window: int, overlap: int) -> list[int]:
    """Where windows start along an axis of `size` pixels, so that every pixel is covered.

    The stride is `window - overlap`; the last window is shifted back to end at the border, and an
    axis no longer than a window has one that is as long as the axis.
    """
    last = max(size - window, 0)
    return [*range(0, last, window - overlap), last]


def windows_of(size: int, config: PredictionConfig) -> tuple[list[int], int]:
    """Where the windows of an axis of `size` pixels start, and how long each is.

    Fitted windows are as few as cover the axis, none shorter than `config.window` unless the axis
    is, each a multiple of 16 pixels long where that fits, and evenly spaced.
    """
    if not config.window:
        return [0], size
    if not config.fit:
        starts = window_starts(size, config.window, config.overlap)
        return starts, min(config.window, size)
    count = max(1, (size - config.overlap) // (config.window - config.overlap))
    length = -(-(size + (count - 1) * config.overlap) // count)
    length = min(size, -(-length // 16) * 16)
    # Rounded up, fewer may do.
    last = size - length
    count = 1 + -(-last // (length - config.overlap)) if last else 1
    return [round(index * last / max(count - 1, 1)) for index in range(count)], length


def linear_strips(
    grid: Float[Tensor, "k gh gw"],
    others: Iterator[Float[Tensor, "k gh gw"]],
    size: tuple[int, int],
    out_size: tuple[int, int],
    config: PredictionConfig,
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """Put grids of probabilities together, as strips of rows from top to bottom.

    Args:
        grid: That of the image's first window.
        others: Those of its other windows, row by row, and then of other images.
        size: Height and width of the image.
        out_size: Height and width of the result.
        config: The windows and how they are averaged.
    """
    clusters, device = len(grid), grid.device
    down = _bands(size[0], grid.shape[1], out_size[0], config)
    across = _bands(size[1], grid.shape[2], out_size[1], config)
    columns = [(band.first, band.end, band.weights.T.to(device)) for band in across]
    at_once = max(1, STRIP_VALUES.get(device.type, 2**20) // (clusters * out_size[1]))
    # Rows of windows, as wide as the result and as high as a grid, that rows to come need.
    held: list[tuple[_Band, Float[Tensor, "gh k W2"]]] = []
    grids, row = chain([grid], others), 0
    for band, ready in zip(down, [*(band.first for band in down[1:]), out_size[0]], strict=True):
        wide = torch.zeros(grid.shape[1], clusters, out_size[1], device=device)
        # Not strict: that would take the first grid of the next row.
        for (first, end, weights), cells in zip(columns, grids, strict=False):
            wide[:, :, first:end] += cells.transpose(0, 1) @ weights
        held.append((band, wide))
        while row < ready:
            stop = min(row + at_once, ready)
            yield _mixed(held, row, stop)
            row = stop
        held = [(band, wide) for band, wide in held if band.end > row]


def _mixed(
    held: list[tuple[_Band, Float[Tensor, "gh k W2"]]], row: int, stop: int
) -> Float[Tensor, "k _ W2"]:
    """The rows of the result from `row` to `stop`: one product of matrices."""
    weights, cells = [], []
    for band, wide in held:
        start, end = (max(0, edge - band.first) for edge in (row, stop))
        part = band.weights[start:end]
        (used,) = part.any(dim=0).nonzero(as_tuple=True)
        if len(used):
            chosen = slice(int(used[0]), int(used[-1]) + 1)
            above = band.first + start - row
            weights.append(pad(part[:, chosen], (0, 0, above, stop - row - above - len(part))))
            cells.append(wide[chosen])
    maps = torch.cat(cells).flatten(1)
    mixed = torch.cat(weights, dim=1).to(maps.device) @ maps
    return mixed.view(stop - row, *cells[0].shape[1:]).transpose(0, 1)


def pixel_strips(
    grid: Float[Tensor, "c gh gw"],
    others: Iterator[Float[Tensor, "c gh gw"]],
    size: tuple[int, int],
    out_size: tuple[int, int],
    config: PredictionConfig,
    probs_of: Callable[[Float[Tensor, "c ..."]], Float[Tensor, "k ..."]],
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """Bring scores to the pixels of windows, take probabilities there, and average the windows.

    Without windows the scores are brought to the pixels of the result.

    Args:
        grid: See `linear_strips`; of logits or codes.
        others: See `linear_strips`.
        size: See `linear_strips`.
        out_size: See `linear_strips`.
        config: See `linear_strips`.
        probs_of: The probabilities of enlarged scores.
    """
    canvas = size if config.window else out_size
    rows = _canvas_rows(grid, others, canvas, config, probs_of)
    return rows if canvas == out_size else _resized(rows, canvas, out_size)


def _canvas_rows(
    grid: Float[Tensor, "c gh gw"],
    others: Iterator[Float[Tensor, "c gh gw"]],
    size: tuple[int, int],
    config: PredictionConfig,
    probs_of: Callable[[Tensor], Tensor],
) -> Iterator[Float[Tensor, "k _ W"]]:
    """The canvas from top to bottom; grids come row by row after the first one."""
    device = grid.device
    down = _windows_of_axis(size[0], grid.shape[1], config)
    across = _windows_of_axis(size[1], grid.shape[2], config)
    columns = [
        (w.start, w.end, w.cells.float().T.to(device), w.share.float().to(device)) for w in across
    ]
    at_once = max(1, STRIP_VALUES.get(device.type, 2**20) // (len(grid) * size[1]))
    # Rows of windows that rows of the canvas to come need.
    held: list[tuple[_AxisWindow, list[Float[Tensor, "c gh gw"]]]] = []
    grids, row = chain([grid], others), 0
    for window, ready in zip(down, [*(w.start for w in down[1:]), size[0]], strict=True):
        # Not strict: that would take the first grid of the next row.
        held.append((window, [cells for _, cells in zip(columns, grids, strict=False)]))
        while row < ready:
            stop = min(row + at_once, ready)
            yield _canvas(held, columns, row, stop, size[1], probs_of)
            row = stop
        held = [(window, cells) for window, cells in held if window.end > row]


def _canvas(
    held: list[tuple[_AxisWindow, list[Float[Tensor, "c gh gw"]]]],
    columns: list[tuple[int, int, Float[Tensor, "gw w"], Float[Tensor, " w"]]],
    row: int,
    stop: int,
    width: int,
    probs_of: Callable[[Tensor], Tensor],
) -> Float[Tensor, "k _ W"]:
    """The rows of the canvas from `row` to `stop`."""
    canvas: Tensor | None = None
    for window, grids in held:
        first, last = max(row, window.start), min(stop, window.end)
        if first >= last:
            continue
        part = window.cells[first - window.start : last - window.start]
        (used,) = part.any(dim=0).nonzero(as_tuple=True)
        chosen = slice(int(used[0]), int(used[-1]) + 1)
        down = part[:, chosen].to(grids[0])
        share = window.share[first - window.start : last - window.start, None].to(down)
        for (left, right, across, weight), cells in zip(columns, grids, strict=True):
            probs = probs_of(down @ cells[:, chosen] @ across).float()
            if canvas is None:
                canvas = probs.new_zeros(len(probs), stop - row, width)
            canvas[:, first - row : last - row, left:right].addcmul_(probs, share * weight)
    assert canvas is not None  # windows cover every row
    return canvas


def _resized(
    strips: Iterable[Float[Tensor, "k _ W"]], size: tuple[int, int], out_size: tuple[int, int]
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """Resize bilinearly what comes in strips; held are the rows that rows to come need."""
    down, across = _neighbours(size[0], out_size[0]), _neighbours(size[1], out_size[1])
    held: Tensor | None = None  # rows from `first` on
    first = row = 0
    for strip in strips:
        held = strip if held is None else torch.cat([held, strip], dim=1)
        clusters, device = len(held), held.device
        at_once = STRIP_VALUES.get(device.type, 2**20) // (clusters * max(size[1], out_size[1]))
        # The first row of the result that needs a row that is not here yet.
        ready = int(torch.searchsorted(down[1][0], first + held.shape[1]))
        while row < ready:
            stop = min(row + max(1, at_once), ready)
            rows = _mixed_pairs(held, 1, [(p[row:stop] - first, s[row:stop]) for p, s in down])
            yield _mixed_pairs(rows, 2, across)
            row = stop
        if row < out_size[0]:  # rows to come may be needed no more than those that are here
            keep = min(int(down[0][0][row]), first + held.shape[1])
            held, first = held[:, max(keep - first, 0) :], max(keep, first)


def _mixed_pairs(
    values: Tensor, axis: int, pairs: Sequence[tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]]
) -> Tensor:
    """Mix two lines of an axis for each new one."""
    shape = [1, 1, 1]
    shape[axis] = -1
    return sum(  # type: ignore[return-value]  # two tensors: not the int 0
        values.index_select(axis, index.to(values.device)) * share.to(values).view(shape)
        for index, share in pairs
    )


@dataclass(frozen=True, eq=False)
class _AxisWindow:
    """A window along an axis of the canvas."""

    start: int
    """The first of its pixels."""
    cells: Float64[Tensor, "w g"]
    """How much each cell of the window's grid counts in each of its pixels; on the CPU."""
    share: Float64[Tensor, " w"]
    """How much the window counts in each of its pixels; the windows of a pixel sum to 1."""

    @property
    def end(self) -> int:
        """The pixel after the last one."""
        return self.start + len(self.cells)


@lru_cache(maxsize=16)
def _windows_of_axis(size: int, grid: int, config: PredictionConfig) -> list[_AxisWindow]:
    """The windows of an axis of `size` pixels, whose grids have `grid` cells; without any, one."""
    starts, window = windows_of(size, config)
    weight, total = _blending(window, config), torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    cells = torch.zeros(window, grid, dtype=torch.float64)
    for position, share in _neighbours(grid, window, align_corners=config.align_corners):
        cells[torch.arange(window), position] += share
    return [_AxisWindow(start, cells, weight / total[start : start + window]) for start in starts]


def _blending(window: int, config: PredictionConfig) -> Float64[Tensor, " w"]:
    """The weight of each pixel of a window along an axis, before windows are divided by the sum."""
    if config.blend == "mean":
        return torch.ones(window, dtype=torch.float64)
    inside = torch.arange(window, dtype=torch.float64)
    return torch.minimum(inside, window - 1 - inside) + 1


@dataclass(frozen=True, eq=False)
class _Band:
    """What the grid of one window gives to an axis of the result."""

    first: int
    """The first of the pixels that it reaches."""
    weights: Float[Tensor, "n g"]
    """How much each cell of the grid counts in each of these pixels; on the CPU."""

    @property
    def end(self) -> int:
        """The pixel after the last one."""
        return self.first + len(self.weights)


@lru_cache(maxsize=16)
def _bands(size: int, grid: int, out: int, config: PredictionConfig) -> list[_Band]:
    """From grids to an axis of `out` pixels: for each window, a band of a matrix.

    It resizes the grid to the window, divides by how much windows count in a pixel, and resizes the
    axis of `size` pixels to `out`. Without windows it resizes the one grid to `out`. In float64: at
    pixel 6000 a weight in float32 would be off by up to 0.0005.
    """
    if not config.window:
        (whole,) = _windows_of_axis(out, grid, config)
        return [_Band(0, whole.cells.float())]
    (near, _), (far, _) = sources = _neighbours(size, out)
    bands = []
    for window in _windows_of_axis(size, grid, config):
        first = int(torch.searchsorted(far, window.start))
        end = int(torch.searchsorted(near, window.end))
        weights = torch.zeros(end - first, grid, dtype=torch.float64)
        for position, share in sources:
            index = position[first:end] - window.start
            inside = (index >= 0) & (index < len(window.cells))
            index = index.clamp(0, len(window.cells) - 1)
            part = share[first:end] * inside * window.share[index]
            weights += part[:, None] * window.cells[index]
        bands.append(_Band(first, weights.float()))
    return bands


def _neighbours(
    size: int, out: int, *, align_corners: bool = False
) -> list[tuple[Int64[Tensor, " out"], Float64[Tensor, " out"]]]:
    """Bilinear resizing of an axis: two of its pixels for each new one, and their shares."""
    pixels = torch.arange(out, dtype=torch.float64)
    if align_corners:
        position = pixels * ((size - 1) / max(out - 1, 1))
    else:
        position = (pixels + 0.5) * size / out - 0.5
    position = position.clamp(0, size - 1)
    near = position.floor().long()
    share = position - near
    return [(near, 1 - share), ((near + 1).clamp(max=size - 1), share)]
