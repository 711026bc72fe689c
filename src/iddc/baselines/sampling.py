"""Embeddings for a baseline: a sample of those of pixels, and the mean of each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from iddc.backbones import Backbone
from iddc.canvas import window_starts
from iddc.config import Experiment, PredictionConfig, Runtime
from iddc.device import autocast
from iddc.errors import UnreadableImage
from iddc.images import ImageFile, Skipped, ahead, open_image
from iddc.progress import SILENT, Progress
from iddc.windows import to_working_size

_WINDOWS, _PATCHES = range(2)
"""The independent streams of random numbers of an image."""
_WINDOWS_AT_ONCE = 16
"""Windows in one forward pass, if `micro_batch_size` is 0."""


def sample_embeddings(
    files: Sequence[ImageFile],
    backbone: Backbone,
    experiment: Experiment,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    max_vectors: int,
    progress: Progress = SILENT,
) -> tuple[Float[Tensor, "n d"], list[Skipped]]:
    """Draw pixel embeddings in equal shares from all images, as prediction sees them.

    Of an image's windows at working size (no mirror images), as many are drawn as hold its share,
    and of their patches the share itself. All draws follow from the seed and the image's place in
    `files`. With more images than `max_vectors`, those without a share are not opened.

    Returns:
        Raw embeddings on the backbone's device, at most `max_vectors`: fewer where images have
        fewer patches than their share. And the images that could not be read.
    """
    device = next(backbone.parameters()).device
    bounds = [i * max_vectors // max(1, len(files)) for i in range(len(files) + 1)]
    shares = {i: stop - start for i, (start, stop) in enumerate(pairwise(bounds)) if stop > start}

    def rng(stream: int, index: int) -> np.random.Generator:
        return np.random.default_rng((experiment.seed, index, stream))

    def windows_of(index: int) -> UInt8[Tensor, "m 3 h w"] | str:
        try:
            image = open_image(files[index], experiment.views.short_side)
        except UnreadableImage as error:
            return error.reason
        return draw_windows(
            to_working_size(image, experiment.views.short_side, experiment.prediction.window),
            experiment.prediction,
            min_pixels=shares[index] * backbone.patch_size**2,
            rng=rng(_WINDOWS, index),
        )

    def embed(windows: UInt8[Tensor, "m 3 h w"]) -> Float[Tensor, "n d"]:
        with torch.no_grad(), autocast(device, experiment.training.precision):
            features: Tensor = backbone(windows.to(device))
        return features.movedim(1, -1).flatten(0, 2)

    vectors = torch.empty(max_vectors, backbone.embed_dim, device=device)
    filled = 0
    unreadable: list[Skipped] = []
    with progress.job(len(shares)):
        decoded = ahead(windows_of, shares, runtime.workers)
        for done, (index, windows) in enumerate(decoded, start=1):
            if isinstance(windows, str):
                unreadable.append(Skipped(files[index], windows))
                continue
            parts = torch.split(windows, runtime.micro_batch_size or _WINDOWS_AT_ONCE)
            patches = torch.cat([embed(part) for part in parts])
            drawn = rng(_PATCHES, index).permutation(len(patches))[: shares[index]]
            vectors[filled : filled + len(drawn)] = patches[torch.from_numpy(drawn).to(device)]
            filled += len(drawn)
            progress.update(done, "embedding", f"{filled:,} embeddings")
    return vectors[:filled], unreadable


def pooled_embeddings(
    files: Sequence[ImageFile],
    backbone: Backbone,
    experiment: Experiment,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    check: Callable[[], None],
    progress: Progress = SILENT,
) -> tuple[list[int], Float[Tensor, "n d"], list[tuple[int, str]]]:
    """The mean embedding of the central square of each image, resized to a crop.

    Args:
        files: The images.
        backbone: What embeds them.
        experiment: Of it count the size of a crop and the precision.
        runtime: How this machine works.
        check: Called before each image; what it raises ends the work.
        progress: Shows how far the work is.

    Returns:
        The places in `files` of the images that can be read, a row for each of them on the
        backbone's device, and the places of the others with the reasons.
    """
    device = next(backbone.parameters()).device
    side = experiment.views.crop_size

    def square(place: int) -> UInt8[Tensor, "3 S S"] | str:
        try:
            image = open_image(files[place], side)
        except UnreadableImage as error:
            return error.reason
        cut = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1)

    def pool(squares: Sequence[Tensor]) -> Float[Tensor, "n d"]:
        with torch.no_grad(), autocast(device, experiment.training.precision):
            features: Tensor = backbone(torch.stack(list(squares)).to(device))
        return features.float().mean(dim=(2, 3))

    at_once = runtime.micro_batch_size or _WINDOWS_AT_ONCE
    rows = [torch.empty(0, backbone.embed_dim, device=device)]
    waiting: list[Tensor] = []
    places: list[int] = []
    unreadable: list[tuple[int, str]] = []
    with progress.job(len(files)):
        for place, found in ahead(square, range(len(files)), runtime.workers):
            check()
            if isinstance(found, str):
                unreadable.append((place, found))
            else:
                places.append(place)
                waiting.append(found)
            if len(waiting) == at_once:
                rows.append(pool(waiting))
                waiting.clear()
            progress.update(place + 1, "embedding", f"image {place + 1} of {len(files)}")
    if waiting:
        rows.append(pool(waiting))
    return places, torch.cat(rows), unreadable


def draw_windows(
    image: UInt8[Tensor, "3 H W"],
    config: PredictionConfig,
    *,
    min_pixels: int,
    rng: np.random.Generator,
) -> UInt8[Tensor, "m 3 h w"]:
    """Draw different windows of an image, in random order, until they hold `min_pixels` pixels.

    The windows are those of prediction. All of them hold less where the image is small.
    """
    height, width = image.shape[1:]
    side = config.window or max(height, width)
    overlap = config.overlap if config.window else 0
    tall, wide = min(side, height), min(side, width)
    corners = [
        (top, left)
        for top in window_starts(height, side, overlap)
        for left in window_starts(width, side, overlap)
    ]
    drawn = rng.permutation(len(corners))[: math.ceil(min_pixels / (tall * wide))]
    chosen = (corners[i] for i in drawn)
    return torch.stack([image[:, top : top + tall, left : left + wide] for top, left in chosen])
