"""Embeddings of a collection: a sample of those of patches, the mean of each image, whole maps.

All draws follow from the seed and the image's index, so that it does not matter which process
embeds which image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from iddc.backbones import Backbone, fingerprint
from iddc.canvas import window_starts
from iddc.config import Experiment, PredictionConfig, Runtime
from iddc.device import autocast
from iddc.errors import UnreadableImage
from iddc.gaps import NO_DATA, data_patches, filled, resized_mask, stand_ins
from iddc.images import ImageFile, Picture, ahead, open_picture
from iddc.progress import SILENT, Progress
from iddc.windows import to_working_size

_WINDOWS, _PATCHES = range(2)
"""The independent streams of random numbers of an image."""
_WINDOWS_AT_ONCE = 16
"""Windows in one forward pass, if `micro_batch_size` is 0."""
T = TypeVar("T")


class Wholes:
    """What a frozen backbone makes of whole images, for further runs on the same images.

    Args:
        room: The most bytes that are kept. What finds no room is made again, and is the same.
    """

    def __init__(self, room: int) -> None:
        self._room = self._free = room
        self._made_by = b""
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def made_by(self, backbone: Backbone, short_side: int, precision: str) -> None:
        """Forget what other weights have made, or the same at another size or precision."""
        found = fingerprint(backbone, short_side, precision)
        if found != self._made_by:
            self._kept, self._free, self._made_by = {}, self._room, found

    def get(self, index: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The embeddings of an image and its mirror image, its pixels, and which hold data."""
        return self._kept.get(index)

    def keep(self, index: int, maps: Tensor, image: Tensor, valid: Tensor | None) -> None:
        """Keep them if there is room."""
        size = maps.nbytes + image.nbytes + (0 if valid is None else valid.nbytes)
        if size <= self._free:
            self._free -= size
            self._kept[index] = maps, image, valid


class Sampler:
    """Embeds images of a collection with a frozen backbone. Gaps without data count in nothing.

    Args:
        files: The images.
        backbone: What embeds them.
        experiment: Its seed, views, windows and precision count.
        runtime: How this machine works.
        check: Called before each image; what it raises ends the work.
        progress: Shows how far the work is.
        wholes: Where `pictures` keeps what the backbone makes; None: nowhere.
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
        wholes: Wholes | None = None,
    ) -> None:
        self.files = files
        self.backbone = backbone
        self.device = backbone.mean.device
        self.failures: list[tuple[int, str]] = []
        """The index of each image that could not be read, and the reason."""
        self._experiment = experiment
        self._runtime = runtime
        self._check = check
        self._progress = progress
        self._wholes = wholes or Wholes(0)
        if wholes:
            precision = experiment.training.precision
            wholes.made_by(backbone, experiment.views.short_side, precision)
        self._at_once = runtime.micro_batch_size or _WINDOWS_AT_ONCE

    def patches(self, count: int, indices: range | None = None) -> Float[Tensor, "n d"]:
        """Draw patch embeddings in equal shares from all images, as prediction sees them.

        Of an image's windows at working size (no mirror images), as many are drawn as hold its
        share, and of their patches with data the share itself. With more images than `count`,
        those without a share are not opened.

        Args:
            count: The most embeddings, of all images together.
            indices: The images that are embedded here; None: all.

        Returns:
            Raw embeddings on the backbone's device: fewer than `count` where images have fewer
            patches than their share.
        """
        # An image's share is known before it is opened; most images of a large set have none.
        shares = np.diff(np.arange(len(self.files) + 1) * count // max(1, len(self.files)))
        among = np.asarray(self._among(indices), np.int64)
        chosen: list[int] = among[shares[among] > 0].tolist()
        experiment, side = self._experiment, self._experiment.views.short_side

        def windows_of(
            index: int,
        ) -> tuple[UInt8[Tensor, "m 3 h w"], Bool[Tensor, "m h w"] | None]:
            picture = self._open(index, side)
            image = to_working_size(picture.image, side, experiment.prediction.window)
            valid = _mask_of(picture, image)
            drawn = draw_windows(
                (image.shape[1], image.shape[2]),
                experiment.prediction,
                min_pixels=int(shares[index]) * self.backbone.patch_size**2,
                rng=np.random.default_rng((experiment.seed, index, _WINDOWS)),
                valid=valid,
            )
            windows = torch.stack([image[:, rows, columns] for rows, columns in drawn])
            if valid is None:
                return windows, None
            return windows, torch.stack([valid[rows, columns] for rows, columns in drawn])

        # Filled in place: the embeddings may take most of the memory.
        total = int(shares[chosen].sum())
        vectors = torch.empty(total, self.backbone.embed_dim, device=self.device)
        filled = 0
        for index, (windows, valid) in self._each(windows_of, chosen):
            parts = [self._embed(part) for part in torch.split(windows, self._at_once)]
            maps = torch.cat([part.movedim(1, -1).flatten(0, 2) for part in parts])
            if valid is not None:
                grid = parts[0].shape[2], parts[0].shape[3]
                maps = maps[data_patches(valid, grid).flatten().to(maps.device)]
            rng = np.random.default_rng((experiment.seed, index, _PATCHES))
            drawn = rng.permutation(len(maps))[: shares[index]]
            vectors[filled : filled + len(drawn)] = maps[torch.from_numpy(drawn).to(self.device)]
            filled += len(drawn)
        return vectors[:filled]

    def means(self, indices: range | None = None) -> tuple[list[int], Float[Tensor, "n d"]]:
        """The mean embedding of the central square of each image, resized to a crop.

        Of an image with gaps it is the square around the middle of its data.

        Args:
            indices: The images that are embedded here; None: all.

        Returns:
            The indices of the images that can be read, and a row for each on the backbone's device.
        """
        side = self._experiment.views.crop_size

        def square(index: int) -> tuple[UInt8[Tensor, "3 S S"], Bool[Tensor, "S S"]]:
            picture, valid = self._open(index, side), None
            middle = (0.5, 0.5)
            if picture.valid is not None:
                valid = Image.fromarray(picture.valid.astype(np.uint8) * np.uint8(255))
                down, across = (np.argwhere(picture.valid).mean(0) / picture.valid.shape).tolist()
                middle = (across, down)
            fit = partial(ImageOps.fit, method=Image.Resampling.BILINEAR, centering=middle)
            cut = torch.from_numpy(np.array(fit(picture.image, (side, side)))).permute(2, 0, 1)
            if valid is None:
                return cut, torch.ones(side, side, dtype=torch.bool)
            return cut, torch.from_numpy(np.array(fit(valid, (side, side))) > 127)

        rows = [torch.empty(0, self.backbone.embed_dim, device=self.device)]
        waiting: list[tuple[Tensor, Tensor]] = []
        found: list[int] = []

        def pool() -> None:
            if not waiting:
                return
            maps = self._embed(torch.stack([image for image, _ in waiting])).float()
            means = maps.mean(dim=(2, 3))
            for row, (_, valid) in enumerate(waiting):
                if not valid.all():
                    counts = data_patches(valid, (maps.shape[2], maps.shape[3])).to(maps.device)
                    means[row] = maps[row][:, counts].mean(1)
            rows.append(means)
            waiting.clear()

        for index, image in self._each(square, self._among(indices)):
            found.append(index)
            waiting.append(image)
            if len(waiting) == self._at_once:
                pool()
        pool()
        return found, torch.cat(rows)

    def maps(self, indices: Iterable[int]) -> Iterator[tuple[int, Float[Tensor, "d h w"]]]:
        """The embeddings of whole images at working size, one after another; gaps are filled."""
        for index, (image, valid) in self._each(self._whole, indices):
            maps = self._embed(image[None]).float()
            yield index, filled(maps, None if valid is None else valid[None])[0]

    def pictures(
        self, indices: Iterable[int]
    ) -> Iterator[tuple[int, Float[Tensor, "2 d h w"], UInt8[Tensor, "3 H W"]]]:
        """The embeddings of whole images and of their mirror images, and their pixels.

        One image after another, at working size; what mirror images give is mirrored back. Gaps
        are filled in the embeddings and, pixel by pixel, in the image.
        """
        for index, (both, image, valid) in self._both(list(indices)):
            plain, mirrored = both.float()
            maps = torch.stack([plain, mirrored.flip(-1)])
            if valid is not None:
                maps = filled(maps, valid.expand(2, -1, -1))
                numbers = torch.from_numpy(stand_ins(valid.numpy()))
                yield index, maps, image.flatten(1)[:, numbers.flatten()].view_as(image)
            else:
                yield index, maps, image

    def _both(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor | None]]]:
        """What the backbone makes of images and their mirror images, from what is kept or anew."""
        made = self._each(self._whole, [i for i in indices if self._wholes.get(i) is None])
        following = next(made, None)
        for index in indices:
            if kept := self._wholes.get(index):
                yield index, kept
            elif following and following[0] == index:  # else it cannot be read
                image, valid = following[1]
                both = self._embed(torch.stack([image, image.flip(-1)]))
                self._wholes.keep(index, both, image, valid)
                yield index, (both, image, valid)
                following = next(made, None)

    def _whole(self, index: int) -> tuple[UInt8[Tensor, "3 H W"], Bool[Tensor, "H W"] | None]:
        """An image at working size, and which of its pixels hold data."""
        side = self._experiment.views.short_side
        picture = self._open(index, side)
        image = to_working_size(picture.image, side, 0)
        return image, _mask_of(picture, image)

    def _among(self, indices: range | None) -> range:
        return range(len(self.files)) if indices is None else indices

    def _open(self, index: int, side: int) -> Picture:
        file = self.files[index]
        picture = open_picture(file, side, self._experiment.reading, settled=True)
        if picture.valid is not None and not picture.valid.any():
            raise UnreadableImage(file, NO_DATA)
        return picture

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


def _mask_of(picture: Picture, image: UInt8[Tensor, "3 H W"]) -> Bool[Tensor, "H W"] | None:
    """Which pixels of an image at another size hold data; None: all of them."""
    if picture.valid is None:
        return None
    mask = resized_mask(picture.valid, (image.shape[2], image.shape[1]))
    return None if mask.all() else torch.from_numpy(mask.copy())


def draw_windows(
    size: tuple[int, int],
    config: PredictionConfig,
    *,
    min_pixels: int,
    rng: np.random.Generator,
    valid: Bool[Tensor, "H W"] | None = None,
) -> list[tuple[slice, slice]]:
    """Draw different windows of an image, in random order, until they hold `min_pixels` pixels.

    The windows are those of prediction. All of them hold less where the image is small.

    Args:
        size: Height and width of the image.
        config: The windows.
        min_pixels: How many pixels with data they hold together.
        rng: Where the order comes from.
        valid: Which pixels hold data; None: all. Windows without any are passed over.

    Returns:
        The rows and the columns of each; at least one.
    """
    height, width = size
    side = config.window or max(height, width)
    overlap = config.overlap if config.window else 0
    tall, wide = min(side, height), min(side, width)
    corners = [
        (top, left)
        for top in window_starts(height, side, overlap)
        for left in window_starts(width, side, overlap)
    ]
    order = [corners[i] for i in rng.permutation(len(corners))]
    windows = [(slice(top, top + tall), slice(left, left + wide)) for top, left in order]
    if valid is None:
        return windows[: math.ceil(min_pixels / (tall * wide))]
    chosen, held = [], 0
    for window in windows:
        pixels = int(valid[window].sum())
        if pixels and held < min_pixels:
            chosen.append(window)
            held += pixels
    return chosen or windows[:1]
