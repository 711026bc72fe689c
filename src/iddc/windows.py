"""From an image to the probabilities, or the cluster, of every pixel, in bounded memory.

Nothing here holds K values for every pixel of a large image. Sliding windows add up on a canvas of
one window's height; rows that no further window covers leave it as a strip, are resized as a strip
and become cluster ids as a strip. With 27 clusters and windows of 224 the canvas of an image W
pixels wide takes `27 * 224 * W * 4` bytes, 194 MB at W = 8000; all of 8000 x 6000 would take 5 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor
from torch.nn import functional

from iddc.config import PredictionConfig

STRIP_VALUES = 2**23
"""A resized strip holds about this many values, 32 MB."""


@runtime_checkable
class Predictor(Protocol):
    """Anything that segments: IDDC's network, a baseline, a Segmenter."""

    @property
    def num_clusters(self) -> int:
        """K, the channels of the probabilities."""

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The probabilities of K clusters on a feature grid of any size."""


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


def probability_rows(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    out_size: tuple[int, int],
    *,
    device: torch.device,
    batch_size: int = 16,
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """The probabilities of every pixel, as strips of rows from top to bottom.

    Each window's grid of probabilities is averaged with that of its mirror image (`config.flip`),
    brought to the window's size bilinearly, and averaged where windows overlap; the result is
    brought to `out_size` bilinearly. Without windows the grid is brought to `out_size` at once.
    All resizing is that of pixel centres (`align_corners=False`), without antialiasing.

    Args:
        predictor: What segments; it must be on `device`.
        image: The image at working size, on any device.
        config: Window, overlap and flip.
        out_size: Height and width of the result.
        device: Where the work is done, and where the strips are.
        batch_size: Windows in one forward pass; their mirror images come on top.
    """
    height, width = image.shape[1:]
    if config.window:
        strips = _canvas_rows(predictor, image, config, batch_size, device)
    else:
        (grid,) = _grids(predictor, [image], config.flip, 1, device)
        height, width = grid.shape[1:]
        # Split, so that the strips resized at once stay small.
        strips = (grid[:, row : row + 1] for row in range(height))
    return resize_rows(strips, (height, width), out_size)


def predict_probs(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    out_size: tuple[int, int],
    *,
    device: torch.device,
    batch_size: int = 16,
    refine: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Float[Tensor, "k H2 W2"]:
    """The strips of `probability_rows` as one tensor: `k * H2 * W2 * 4` bytes.

    `refine` gets them first; see `refine.py`.
    """
    strips = probability_rows(
        predictor, image, config, out_size, device=device, batch_size=batch_size
    )
    return torch.cat(list(refine(strips)), dim=1)


def cluster_map(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    out_size: tuple[int, int],
    *,
    device: torch.device,
    batch_size: int = 16,
    refine: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Integer[np.ndarray, "H2 W2"]:
    """The most probable cluster of every pixel: uint8 up to 256 clusters, uint16 above.

    `refine` gets the strips of `probability_rows` first; see `refine.py`.
    """
    clusters = np.empty(out_size, id_type(predictor.num_clusters))
    row = 0
    strips = probability_rows(
        predictor, image, config, out_size, device=device, batch_size=batch_size
    )
    for strip in refine(strips):
        clusters[row : row + strip.shape[1]] = most_probable(strip)
        row += strip.shape[1]
    return clusters


def most_probable(probs: Float[Tensor, "k H W"]) -> Integer[np.ndarray, "H W"]:
    """The cluster of every pixel, of the type `id_type` says."""
    # On a CPU, max along the first axis is three times as fast as argmax.
    ids: np.ndarray = probs.max(dim=0).indices.cpu().numpy()
    return ids.astype(id_type(len(probs)))


def id_type(num_clusters: int) -> type[np.unsignedinteger[Any]]:
    """The type of cluster ids: uint8 up to 256 clusters, uint16 above."""
    return np.uint8 if num_clusters <= 256 else np.uint16


def resize_rows(
    strips: Iterable[Float[Tensor, "k _ W"]], in_size: tuple[int, int], out_size: tuple[int, int]
) -> Iterator[Float[Tensor, "k _ W2"]]:
    """Resize an image that comes in strips of rows.

    The result is that of `functional.interpolate` on the whole: bilinear, `align_corners=False`,
    no antialiasing. At most the rows of a strip and one more are held.

    Args:
        strips: Rows from top to bottom.
        in_size: Height and width of all strips together.
        out_size: Height and width of the result.
    """
    if in_size == out_size:
        yield from strips
        return
    (in_height, _), (out_height, out_width) = in_size, out_size
    # In float64: at row 6000 a weight in float32 would be off by up to 0.0005.
    position = (torch.arange(out_height, dtype=torch.float64) + 0.5) * in_height / out_height - 0.5
    position = position.clamp(0, in_height - 1)
    above = position.floor().long()
    below = (above + 1).clamp(max=in_height - 1)
    weight = (position - above).float()
    held: Tensor | None = None  # input rows from `first` on
    first = row = 0
    for strip in strips:
        held = strip if held is None else torch.cat([held, strip], dim=1)
        ready = int(torch.searchsorted(below, first + held.shape[1]))
        rows_at_once = max(1, STRIP_VALUES // (held.shape[0] * max(held.shape[2], out_width)))
        while row < ready:
            part = slice(row, min(row + rows_at_once, ready))
            upper = held[:, (above[part] - first).to(held.device)]
            lower = held[:, (below[part] - first).to(held.device)]
            mixed = torch.lerp(upper, lower, weight[part, None].to(held.device))
            yield functional.interpolate(mixed, size=out_width, mode="linear", align_corners=False)
            row = part.stop
        if row < out_height:
            done = min(int(above[row]) - first, held.shape[1])
            held, first = held[:, done:], first + done


def _canvas_rows(
    predictor: Predictor,
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    batch_size: int,
    device: torch.device,
) -> Iterator[Float[Tensor, "k _ W"]]:
    """The averaged probabilities of sliding windows at the image's size, strip by strip."""
    height, width = image.shape[1:]
    tops = window_starts(height, config.window, config.overlap)
    lefts = window_starts(width, config.window, config.overlap)
    tall, wide = min(config.window, height), min(config.window, width)
    crops = [image[:, y : y + tall, x : x + wide] for y in tops for x in lefts]
    grids = _grids(predictor, crops, config.flip, batch_size, device)
    # Windows stand on a grid, so a pixel's count is that of its row times that of its column.
    across = _coverage(lefts, wide, width).to(device)
    down = _coverage(tops, tall, height).to(device)
    canvas = torch.zeros(predictor.num_clusters, tall, width, device=device)
    for y, next_y in zip(tops, [*tops[1:], height], strict=True):
        for x in lefts:
            canvas[:, :, x : x + wide] += functional.interpolate(
                next(grids)[None], size=(tall, wide), mode="bilinear", align_corners=False
            )[0]
        done = next_y - y
        yield canvas[:, :done] / (down[y:next_y, None] * across)
        canvas[:, : tall - done] = canvas[:, done:].clone()
        canvas[:, tall - done :] = 0


def _grids(
    predictor: Predictor,
    crops: list[UInt8[Tensor, "3 h w"]],
    flip: bool,
    batch_size: int,
    device: torch.device,
) -> Iterator[Float[Tensor, "k gh gw"]]:
    """The predictor's grid for each crop, in order, averaged with that of its mirror image.

    The average is taken on the grid: mirroring and bilinear resizing commute.
    """
    for start in range(0, len(crops), batch_size):
        images = torch.stack(crops[start : start + batch_size]).to(device)
        with torch.inference_mode():
            grids = predictor.probs(torch.cat([images, images.flip(-1)]) if flip else images)
            if flip:
                plain, mirrored = grids.float().chunk(2)
                grids = (plain + mirrored.flip(-1)) / 2
        yield from grids.float()


def _coverage(starts: list[int], window: int, size: int) -> Float[Tensor, " size"]:
    """How many windows cover each pixel of an axis."""
    count = torch.zeros(size)
    for start in starts:
        count[start : start + window] += 1
    return count
