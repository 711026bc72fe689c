"""From an image to the probabilities, or the cluster, of every pixel, in bounded memory.

Everything between a window's grid of probabilities and the pixels of the result is linear, and the
same along both axes: bilinear resizing, the average where windows overlap, and resizing again. So
one small matrix for each window of an axis does all of it, and no canvas is needed. Nothing here
holds K values for every pixel: the result comes as strips of a few rows, each of which becomes
cluster ids before the next is made.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

from iddc.config import PredictionConfig
from iddc.device import in_memory

STRIP_VALUES = {"cpu": 2**20, "cuda": 2**25}
"""A strip holds about this many values, by the type of the device: 4 MB stay in a CPU's cache."""
WINDOWS_AT_ONCE = {"cpu": 16, "cuda": 128}
"""Windows in one forward pass, of one or several images; their mirror images come on top."""


@runtime_checkable
class Predictor(Protocol):
    """Anything that segments: IDDC's network, a baseline, a Segmenter."""

    @property
    def num_clusters(self) -> int:
        """K, the channels of the probabilities."""

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The probabilities of K clusters on a feature grid of any size."""


@dataclass(frozen=True, eq=False)
class Request:
    """An image to segment."""

    image: UInt8[Tensor, "3 H W"]
    """At working size, on any device."""
    out_size: tuple[int, int]
    """Height and width of the result."""
    refine: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
    """Gets the strips of probabilities before they become clusters; see `refine.py`."""


def window_starts(size: int, window: int, overlap: int) -> list[int]:
    """Where windows start along an axis of `size` pixels, so that every pixel is covered.

    The stride is `window - overlap`; the last window is shifted back to end at the border, and an
    axis no longer than a window has one that is as long as the axis.
    """
    last = max(size - window, 0)
    return [*range(0, last, window - overlap), last]


def size_for_windows(size: tuple[int, int], window: int) -> tuple[int, int]:
    """Enlarge (width, height) so that a window fits: the network knows no smaller images.

    The shorter side becomes `window` and the longer keeps the ratio, except that a strip of a few
    pixels is not drawn out beyond 16 windows.
    """
    scale = max(1.0, window / min(size))
    width, height = (max(side, min(round(side * scale), 16 * window)) for side in size)
    return width, height


def probability_strips(
    predictor: Predictor,
    requests: Iterable[Request],
    config: PredictionConfig,
    *,
    device: torch.device,
    batch_size: int = 0,
    note: Callable[[str], object] = warnings.warn,
) -> Iterator[tuple[Request, Iterable[Float[Tensor, "k _ W2"]]]]:
    """The probabilities of every pixel of each image, as strips of rows from top to bottom.

    Each window's grid of probabilities is averaged with that of its mirror image (`config.flip`),
    brought to the window's size bilinearly, and averaged where windows overlap; the result is
    brought to the request's size bilinearly. Without windows the grid is brought there at once.
    All resizing is that of pixel centres (`align_corners=False`), without antialiasing.

    Windows of several images go through the predictor together, so requests are taken ahead of
    time. The strips of an image must be used up before the next image is asked for.

    Args:
        predictor: What segments; it must be on `device`.
        requests: The images.
        config: Window, overlap and flip.
        device: Where the work is done, and where the strips are.
        batch_size: Windows in one forward pass, fewer where memory is short; 0: `WINDOWS_AT_ONCE`.
        note: Told in one line when memory is short.
    """
    taken: deque[Request] = deque()

    def crops() -> Iterator[UInt8[Tensor, "3 h w"]]:
        for request in requests:
            taken.append(request)
            yield from _windows(request.image, config)

    batch_size = batch_size or WINDOWS_AT_ONCE.get(device.type, 16)
    grids = _grids(predictor, crops(), config.flip, batch_size, device, note)
    for grid in grids:
        request = taken.popleft()
        yield request, _strips(request, grid, grids, config)


def probability_rows(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    out_size: tuple[int, int],
    *,
    device: torch.device,
    batch_size: int = 0,
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """The `probability_strips` of one image."""
    request = Request(image, out_size)
    for _, strips in probability_strips(
        predictor, [request], config, device=device, batch_size=batch_size
    ):
        yield from strips


def predict_probs(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    out_size: tuple[int, int],
    *,
    device: torch.device,
    batch_size: int = 0,
    refine: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Float[Tensor, "k H2 W2"]:
    """The strips of `probability_rows` as one tensor: `k * H2 * W2 * 4` bytes.

    `refine` gets them first; see `refine.py`.
    """
    strips = probability_rows(
        predictor, image, config, out_size, device=device, batch_size=batch_size
    )
    return torch.cat(list(refine(strips)), dim=1)


def cluster_ids(
    predictor: Predictor,
    requests: Iterable[Request],
    config: PredictionConfig,
    *,
    device: torch.device,
    batch_size: int = 0,
    note: Callable[[str], object] = warnings.warn,
) -> Iterator[Integer[Tensor, "_ _"]]:
    """The most probable cluster of every pixel of each image, on the device; see `winners`."""
    for request, strips in probability_strips(
        predictor, requests, config, device=device, batch_size=batch_size, note=note
    ):
        ids = torch.empty(request.out_size, dtype=_kind(predictor.num_clusters), device=device)
        row = 0
        for strip in request.refine(strips):
            ids[row : row + strip.shape[1]] = winners(strip)
            row += strip.shape[1]
        yield ids


def cluster_map(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    out_size: tuple[int, int],
    *,
    device: torch.device,
    batch_size: int = 0,
    refine: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Integer[np.ndarray, "H2 W2"]:
    """The `cluster_ids` of one image, as `as_array` gives them."""
    request = Request(image, out_size, refine)
    (ids,) = cluster_ids(predictor, [request], config, device=device, batch_size=batch_size)
    return as_array(ids, predictor.num_clusters)


def most_probable(probs: Float[Tensor, "k H W"]) -> Integer[np.ndarray, "H W"]:
    """The cluster of every pixel, of the type `id_type` says."""
    return as_array(winners(probs), len(probs))


def winners(probs: Float[Tensor, "k H W"]) -> Integer[Tensor, "H W"]:
    """The most probable cluster of every pixel, the first of several: uint8, or int32 above 256.

    On a CPU PyTorch finds the largest value many times faster than where it is, so the place is
    read off small numbers that count down.
    """
    number = len(probs)
    if probs.device.type != "cpu":
        return probs.argmax(dim=0).to(_kind(number))
    largest = (probs.amax(dim=0) == probs).view(torch.uint8)
    small = torch.uint8 if number < 256 else torch.int32
    countdown = torch.arange(number, 0, -1, dtype=small)[:, None, None]
    # Nothing equals NaN: such pixels go to the last cluster.
    return (number - (largest * countdown).amax(dim=0).clamp(min=1)).to(_kind(number))


def as_array(ids: Integer[Tensor, "H W"], num_clusters: int) -> Integer[np.ndarray, "H W"]:
    """Cluster ids of the type `id_type` says."""
    array: np.ndarray = ids.cpu().numpy()
    return array.astype(id_type(num_clusters), copy=False)


def id_type(num_clusters: int) -> type[np.unsignedinteger[Any]]:
    """The type of cluster ids: uint8 up to 256 clusters, uint16 above."""
    return np.uint8 if num_clusters <= 256 else np.uint16


def _kind(num_clusters: int) -> torch.dtype:
    return torch.uint8 if num_clusters <= 256 else torch.int32


def _windows(
    image: UInt8[Tensor, "3 H W"], config: PredictionConfig
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    height, width = image.shape[1:]
    window = config.window or max(height, width)
    for y in window_starts(height, window, config.overlap if config.window else 0):
        for x in window_starts(width, window, config.overlap if config.window else 0):
            yield image[:, y : y + window, x : x + window]


def _grids(
    predictor: Predictor,
    crops: Iterable[UInt8[Tensor, "3 h w"]],
    flip: bool,
    batch_size: int,
    device: torch.device,
    note: Callable[[str], object],
) -> Iterator[Float[Tensor, "k gh gw"]]:
    """The predictor's grid for each crop, in order, averaged with that of its mirror image.

    The average is taken on the grid: mirroring and bilinear resizing commute.
    """
    waiting: list[Tensor] = []

    def computed() -> Iterator[Float[Tensor, "k gh gw"]]:
        nonlocal batch_size
        images = torch.stack(waiting)
        waiting.clear()

        def compute(at_once: int) -> Float[Tensor, "b k gh gw"]:
            parts = torch.split(images, at_once)
            return torch.cat([_averaged(predictor, part.to(device), flip) for part in parts])

        with torch.inference_mode():
            grids, batch_size = in_memory(compute, batch_size, len(images), note)
        yield from grids

    for crop in crops:
        if waiting and crop.shape != waiting[0].shape:
            yield from computed()
        waiting.append(crop)
        if len(waiting) >= batch_size:
            yield from computed()
    if waiting:
        yield from computed()


def _averaged(
    predictor: Predictor, images: UInt8[Tensor, "b 3 h w"], flip: bool
) -> Float[Tensor, "b k gh gw"]:
    # Convolutions take a quarter to a third less time when the channels of a pixel lie together.
    both = torch.cat([images, images.flip(-1)]) if flip else images
    grids = predictor.probs(both.contiguous(memory_format=torch.channels_last)).float()
    if not flip:
        return grids
    plain, mirrored = grids.chunk(2)
    return (plain + mirrored.flip(-1)) / 2


@dataclass(frozen=True, eq=False)
class _Band:
    """What the grid of one window gives to an axis of the result."""

    first: int
    """The first of the pixels that it reaches."""
    weights: Float[Tensor, "n g"]
    """Of each of these pixels, how much each cell of the grid counts in it; on the CPU."""

    @property
    def end(self) -> int:
        """The pixel after the last one."""
        return self.first + len(self.weights)


def _strips(
    request: Request,
    grid: Float[Tensor, "k gh gw"],
    others: Iterator[Float[Tensor, "k gh gw"]],
    config: PredictionConfig,
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """Put the grids of an image's windows together; they come row by row after the first one."""
    clusters, device = len(grid), grid.device
    (height, width), (out_height, out_width) = request.image.shape[1:], request.out_size
    down = _bands(height, grid.shape[1], out_height, config.window, config.overlap)
    across = _bands(width, grid.shape[2], out_width, config.window, config.overlap)
    columns = [(band.first, band.end, band.weights.T.to(device)) for band in across]
    at_once = max(1, STRIP_VALUES.get(device.type, 2**20) // (clusters * out_width))
    # Rows of windows, as wide as the result and as high as a grid, that rows to come need.
    held: list[tuple[_Band, Float[Tensor, "gh k W2"]]] = []
    grids, row = chain([grid], others), 0
    for band, ready in zip(down, [*(band.first for band in down[1:]), out_height], strict=True):
        wide = torch.zeros(grid.shape[1], clusters, out_width, device=device)
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
        start, end = (max(0, place - band.first) for place in (row, stop))
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


@lru_cache(maxsize=16)
def _bands(size: int, grid: int, out: int, window: int, overlap: int) -> list[_Band]:
    """From grids to an axis of `out` pixels: for each window, a band of a matrix.

    It resizes the grid to the window, divides by how many windows cover a pixel, and resizes the
    axis of `size` pixels to `out`. Without windows it resizes the one grid to `out`. In float64: at
    pixel 6000 a weight in float32 would be off by up to 0.0005.
    """
    if not window:
        size, window, overlap = grid, grid, 0
    starts, window = window_starts(size, window, overlap), min(window, size)
    cover = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        cover[start : start + window] += 1
    cells = torch.zeros(window, grid, dtype=torch.float64)
    for place, share in _neighbours(grid, window):
        cells[torch.arange(window), place] += share
    (near, _), (far, _) = sources = _neighbours(size, out)
    bands = []
    for start in starts:
        first = int(torch.searchsorted(far, start))
        end = int(torch.searchsorted(near, start + window))
        weights = torch.zeros(end - first, grid, dtype=torch.float64)
        for place, share in sources:
            here = place[first:end]
            inside = (here >= start) & (here < start + window)
            part = share[first:end] * inside / cover[here]
            weights += part[:, None] * cells[(here - start).clamp(0, window - 1)]
        bands.append(_Band(first, weights.float()))
    return bands


def _neighbours(size: int, out: int) -> list[tuple[Int64[Tensor, " out"], Float64[Tensor, " out"]]]:
    """Bilinear resizing of an axis: two of its pixels for each new one, and their shares."""
    position = (torch.arange(out, dtype=torch.float64) + 0.5) * size / out - 0.5
    position = position.clamp(0, size - 1)
    near = position.floor().long()
    share = position - near
    return [(near, 1 - share), ((near + 1).clamp(max=size - 1), share)]
