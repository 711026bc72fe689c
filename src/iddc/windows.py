"""From an image to the probabilities, or the cluster, of every pixel, in bounded memory.

Nothing here holds K values for every pixel: the result comes as strips of a few rows (`canvas.py`),
each of which becomes cluster ids before the next is made.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from torch import Tensor

from iddc.canvas import linear_strips, pixel_strips, windows_of, working_size
from iddc.config import PredictionConfig
from iddc.device import in_memory

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


@runtime_checkable
class PixelPredictor(Predictor, Protocol):
    """A Predictor that says what of a patch is enlarged before it becomes probabilities."""

    def scores(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """What is averaged over mirror images and enlarged: logits, or codes."""

    def probs_of(self, scores: Float[Tensor, "c ..."]) -> Float[Tensor, "k ..."]:
        """The probabilities of enlarged scores."""


def pixel_scores(
    predictor: Predictor, images: UInt8[Tensor, "b 3 H W"]
) -> Float[Tensor, "b c h w"]:
    """The scores of a PixelPredictor, or else the logarithm of the probabilities.

    These are the logits less a number that all clusters of a patch share, which no softmax sees,
    as far as single precision holds the probability.
    """
    if isinstance(predictor, PixelPredictor):
        return predictor.scores(images)
    probs = predictor.probs(images).float()
    return probs.clamp(min=torch.finfo(torch.float32).tiny).log()


def pixel_probs(predictor: Predictor, scores: Float[Tensor, "c ..."]) -> Float[Tensor, "k ..."]:
    """The probabilities of what `pixel_scores` gave, averaged and enlarged."""
    if isinstance(predictor, PixelPredictor):
        return predictor.probs_of(scores)
    return scores.softmax(dim=0)


@dataclass(frozen=True, eq=False)
class Request:
    """An image to segment."""

    image: UInt8[Tensor, "3 H W"]
    """At working size, on any device."""
    out_size: tuple[int, int]
    """Height and width of the result."""
    refine: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
    """Gets the strips of probabilities before they become clusters; see `refine.py`."""
    key: Any = None
    """What the caller knows the image by; it comes back with the result."""


def size_for_windows(size: tuple[int, int], window: int) -> tuple[int, int]:
    """Enlarge (width, height) so that a window fits: the network knows no smaller images.

    The shorter side becomes `window` and the longer keeps the ratio, except that a strip of a few
    pixels is not drawn out beyond 16 windows.
    """
    scale = max(1.0, window / min(size))
    width, height = (max(side, min(round(side * scale), 16 * window)) for side in size)
    return width, height


def to_working_size(image: Image.Image, short_side: int, window: int) -> UInt8[Tensor, "3 H W"]:
    """Bring an RGB image to the size at which a network sees it.

    A larger image is reduced to `short_side` (0: not), antialiased; one smaller than a window is
    enlarged, bilinearly.
    """
    size = size_for_windows(working_size(image.size, short_side), window)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
    With `softmax="pixels"` the grid holds logits, which become probabilities at the window's size.
    All resizing is without antialiasing, and that of pixel centres unless `align_corners` says
    otherwise of the grid.

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
    if getattr(predictor, "sees_whole_images", False):
        config = config.model_copy(update={"window": 0})

    def crops() -> Iterator[UInt8[Tensor, "3 h w"]]:
        for request in requests:
            taken.append(request)
            yield from window_crops(request.image, config)

    batch_size = batch_size or WINDOWS_AT_ONCE.get(device.type, 16)
    grids = _grids(predictor, crops(), config, batch_size, device, note)
    for grid in grids:
        request = taken.popleft()
        size = request.image.shape[1], request.image.shape[2]
        if config.softmax == "patches":
            yield request, linear_strips(grid, grids, size, request.out_size, config)
        else:
            probs_of = partial(pixel_probs, predictor)
            yield request, pixel_strips(grid, grids, size, request.out_size, config, probs_of)


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
) -> Iterator[tuple[Request, Integer[Tensor, "_ _"]]]:
    """The most probable cluster of every pixel of each image, on the device (`argmax_clusters`)."""
    for request, strips in probability_strips(
        predictor, requests, config, device=device, batch_size=batch_size, note=note
    ):
        ids = torch.empty(request.out_size, dtype=_kind(predictor.num_clusters), device=device)
        row = 0
        for strip in request.refine(strips):
            ids[row : row + strip.shape[1]] = argmax_clusters(strip)
            row += strip.shape[1]
        yield request, ids


def most_probable(probs: Float[Tensor, "k H W"]) -> Integer[np.ndarray, "H W"]:
    """The cluster of every pixel, of the type `id_type` says."""
    return as_array(argmax_clusters(probs), len(probs))


def argmax_clusters(probs: Float[Tensor, "k H W"]) -> Integer[Tensor, "H W"]:
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


def window_crops(
    image: UInt8[Tensor, "3 H W"], config: PredictionConfig
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """What the network sees of an image at working size: its windows, row by row."""
    tops, height = windows_of(image.shape[1], config)
    lefts, width = windows_of(image.shape[2], config)
    for y in tops:
        for x in lefts:
            yield image[:, y : y + height, x : x + width]


def _grids(
    predictor: Predictor,
    crops: Iterable[UInt8[Tensor, "3 h w"]],
    config: PredictionConfig,
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
            return torch.cat([_averaged(predictor, part.to(device), config) for part in parts])

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
    predictor: Predictor, images: UInt8[Tensor, "b 3 h w"], config: PredictionConfig
) -> Float[Tensor, "b k gh gw"]:
    # Convolutions take a quarter to a third less time when the channels of a pixel lie together.
    both = torch.cat([images, images.flip(-1)]) if config.flip else images
    both = both.contiguous(memory_format=torch.channels_last)
    if config.softmax == "patches":
        grids = predictor.probs(both).float()
    else:
        grids = pixel_scores(predictor, both).float()
    if not config.flip:
        return grids
    plain, mirrored = grids.chunk(2)
    return (plain + mirrored.flip(-1)) / 2
