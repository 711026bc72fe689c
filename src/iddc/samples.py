"""Embeddings of a collection: a sample of those of patches, the mean of each image, whole maps.

All draws follow from the seed and the image's index, so that it does not matter which process
embeds which image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

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
from iddc.images import ImageFile, ahead, open_image
from iddc.progress import SILENT, Progress
from iddc.windows import to_working_size

_WINDOWS, _PATCHES = range(2)
"""The independent streams of random numbers of an image."""
_WINDOWS_AT_ONCE = 16
"""Windows in one forward pass, if `micro_batch_size` is 0."""
T = TypeVar("T")


class Sampler:
    """Embeds images of a collection with a frozen backbone.

    Args:
        files: The images.
        backbone: What embeds them.
        experiment: Its seed, views, windows and precision count.
        runtime: How this machine works.
        check: Called before each image; what it raises ends the work.
        progress: Shows how far the work is.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        backbone: Backbone,
        experiment: Experiment,
        runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
        *,
        check: Callable[[], None] = lambda: None,
        progress: Progress = SILENT,
    ) -> None:
        self.files = files
        self.backbone = backbone
        self.device = next(backbone.parameters()).device
        self.failures: list[tuple[int, str]] = []
        """The index of each image that could not be read, and the reason."""
        self._experiment = experiment
        self._runtime = runtime
        self._check = check
        self._progress = progress
        self._at_once = runtime.micro_batch_size or _WINDOWS_AT_ONCE

    def patches(self, count: int, indices: range | None = None) -> Float[Tensor, "n d"]:
        """Draw patch embeddings in equal shares from all images, as prediction sees them.

        Of an image's windows at working size (no mirror images), as many are drawn as hold its
        share, and of their patches the share itself. With more images than `count`, those without a
        share are not opened.

        Args:
            count: The most embeddings, of all images together.
            indices: The images that are embedded here; None: all.

        Returns:
            Raw embeddings on the backbone's device: fewer than `count` where images have fewer
            patches than their share.
        """
        shares = np.diff(np.arange(len(self.files) + 1) * count // max(1, len(self.files)))
        among = np.asarray(self._among(indices), np.int64)
        chosen: list[int] = among[shares[among] > 0].tolist()
        experiment, side = self._experiment, self._experiment.views.short_side

        def windows_of(index: int) -> UInt8[Tensor, "m 3 h w"]:
            return draw_windows(
                to_working_size(self._open(index, side), side, experiment.prediction.window),
                experiment.prediction,
                min_pixels=int(shares[index]) * self.backbone.patch_size**2,
                rng=np.random.default_rng((experiment.seed, index, _WINDOWS)),
            )

        total = int(shares[chosen].sum())
        vectors = torch.empty(total, self.backbone.embed_dim, device=self.device)
        filled = 0
        for index, windows in self._each(windows_of, chosen):
            parts = torch.split(windows, self._at_once)
            maps = torch.cat([self._embed(part).movedim(1, -1).flatten(0, 2) for part in parts])
            rng = np.random.default_rng((experiment.seed, index, _PATCHES))
            drawn = rng.permutation(len(maps))[: shares[index]]
            vectors[filled : filled + len(drawn)] = maps[torch.from_numpy(drawn).to(self.device)]
            filled += len(drawn)
        return vectors[:filled]

    def means(self, indices: range | None = None) -> tuple[list[int], Float[Tensor, "n d"]]:
        """The mean embedding of the central square of each image, resized to a crop.

        Args:
            indices: The images that are embedded here; None: all.

        Returns:
            The indices of the images that can be read, and a row for each on the backbone's device.
        """
        side = self._experiment.views.crop_size

        def square(index: int) -> UInt8[Tensor, "3 S S"]:
            cut = ImageOps.fit(self._open(index, side), (side, side), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(cut)).permute(2, 0, 1)

        rows = [torch.empty(0, self.backbone.embed_dim, device=self.device)]
        waiting: list[Tensor] = []
        found: list[int] = []

        def pool() -> None:
            if waiting:
                rows.append(self._embed(torch.stack(waiting)).float().mean(dim=(2, 3)))
                waiting.clear()

        for index, image in self._each(square, self._among(indices)):
            found.append(index)
            waiting.append(image)
            if len(waiting) == self._at_once:
                pool()
        pool()
        return found, torch.cat(rows)

    def maps(self, indices: Iterable[int]) -> Iterator[tuple[int, Float[Tensor, "d h w"]]]:
        """The embeddings of whole images at working size, one after another."""
        for index, image in self._each(self._whole, indices):
            yield index, self._embed(image[None])[0].float()

    def pictures(
        self, indices: Iterable[int]
    ) -> Iterator[tuple[int, Float[Tensor, "2 d h w"], UInt8[Tensor, "3 H W"]]]:
        """The embeddings of whole images and of their mirror images, and their pixels.

        One image after another, at working size; what mirror images give is mirrored back.
        """
        for index, image in self._each(self._whole, indices):
            plain, mirrored = self._embed(torch.stack([image, image.flip(-1)])).float()
            yield index, torch.stack([plain, mirrored.flip(-1)]), image

    def _among(self, indices: range | None) -> range:
        return range(len(self.files)) if indices is None else indices

    def _open(self, index: int, side: int) -> Image.Image:
        return open_image(self.files[index], side, self._experiment.reading, settled=True)

    def _whole(self, index: int) -> UInt8[Tensor, "3 H W"]:
        side = self._experiment.views.short_side
        return to_working_size(self._open(index, side), side, 0)

    def _each(self, make: Callable[[int], T], indices: Iterable[int]) -> Iterator[tuple[int, T]]:
        """What is made of each image that can be read, in order, while threads make the next."""
        todo = list(indices)

        def attempt(index: int) -> T | str:
            try:
                return make(index)
            except UnreadableImage as error:
                return error.reason

        with self._progress.job(len(todo)):
            for done, (index, made) in enumerate(ahead(attempt, todo, self._runtime.workers), 1):
                self._check()
                if isinstance(made, str):
                    self.failures.append((index, made))
                else:
                    yield index, made
                self._progress.update(done, "embedding", f"image {done} of {len(todo)}")

    def _embed(self, images: UInt8[Tensor, "m 3 H W"]) -> Float[Tensor, "m d h w"]:
        with torch.no_grad(), autocast(self.device, self._experiment.training.precision):
            features: Tensor = self.backbone(images.to(self.device))
        return features


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
