"""Two overlapping crops of an image, and which images are negatives of which (Sec. 4.2.2).

Every random number follows from (seed, epoch, index) or (seed, step) alone, never from the order in
which things are drawn. So a run is the same whatever the number of workers and processes, and a
resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from iddc.canvas import working_size
from iddc.config import ReadingConfig, ViewsConfig
from iddc.errors import UnreadableImage
from iddc.gaps import NO_DATA, resized_mask
from iddc.images import AS_STORED, ImageFile, open_picture

_CROPS, _ORDER, _ROLLS, _PATCHES = range(4)
"""The independent streams of random numbers, so that no two draws share a key."""
_DRAWS = 16
"""How often crops are drawn of an image with pixels without data, to find some that hold data."""


@dataclass(frozen=True)
class Crops:
    """What was drawn for one image.

    Attributes:
        size: Width and height to which the image is scaled, in pixels.
        corners: Left and top of each crop in the scaled image, in pixels.
        flip: Whether both crops are mirrored.
    """

    size: tuple[int, int]
    corners: tuple[tuple[int, int], tuple[int, int]]
    flip: bool

    def boxes(self, crop_size: int) -> Float32[Tensor, "2 4"]:
        """Left, top, right, bottom of each crop, as parts of the image; mirrored: left > right."""
        corners = np.array(self.corners, np.float32)
        boxes = np.concatenate([corners, corners + crop_size], 1) / np.tile(self.size, 2)
        order = [2, 1, 0, 3] if self.flip else [0, 1, 2, 3]
        return torch.from_numpy(boxes[:, order].astype(np.float32))


@dataclass(frozen=True)
class View:
    """The two crops of image `index`, or the reason why there are none."""

    index: int
    crops: UInt8[Tensor, "2 3 S S"] | None
    reason: str | None = None
    boxes: Float32[Tensor, "2 4"] | None = None
    valid: Bool[Tensor, "2 S S"] | None = None
    """Which pixels of the crops hold data; None: all."""


@dataclass(frozen=True)
class ViewBatch:
    """The views of a batch: those that could be read, and those that could not.

    Attributes:
        indices: The images of `crops`, in the order asked for.
        crops: Their two crops. With b = 0, S is 0 too.
        failures: Index and reason of each image that could not be read.
        boxes: Where the crops lie, see `Crops.boxes`.
        valid: Which pixels of the crops hold data; None: all of them.
    """

    indices: list[int]
    crops: UInt8[Tensor, "b 2 3 S S"]
    failures: list[tuple[int, str]]
    boxes: Float32[Tensor, "b 2 4"]
    valid: Bool[Tensor, "b 2 S S"] | None = None


def draw_crops(size: tuple[int, int], config: ViewsConfig, rng: np.random.Generator) -> Crops:
    """Draw the scale, the flip and the two corners for an image of width and height `size`.

    Width and height of the working size are scaled independently. Where the result is smaller than
    a crop, both are enlarged by one more common factor, so that it just fits and the image is not
    distorted further. The first crop is uniform in the scaled image. The second is uniform among
    the places within `max_offset` of the first on each axis, so that the two share at least
    (1 - max_offset)^2 of their area.
    """
    crop = config.crop_size
    factors = rng.uniform(config.min_scale, config.max_scale, size=2)
    width, height = np.asarray(working_size(size, config.short_side)) * factors
    enlarge = max(1.0, crop / width, crop / height)
    scaled = (max(crop, round(width * enlarge)), max(crop, round(height * enlarge)))
    flip = bool(rng.random() < config.flip_probability)
    reach = math.floor(config.max_offset * crop)
    axes = []
    for side in scaled:
        first = int(rng.integers(0, side - crop, endpoint=True))
        lowest, highest = max(0, first - reach), min(side - crop, first + reach)
        axes.append((first, int(rng.integers(lowest, highest, endpoint=True))))
    (left, other_left), (top, other_top) = axes
    return Crops(scaled, ((left, top), (other_left, other_top)), flip)


def cut(image: Image.Image, crops: Crops, crop_size: int) -> UInt8[Tensor, "2 3 S S"]:
    """Cut the two crops out of the original RGB image, scaled and mirrored as drawn.

    Each crop is one antialiased resize of its box, which gives the pixels of scaling the whole
    image and cropping, as Pillow's filter reads beyond the box. The scaled image is never made: a
    photo of 48 megapixels costs one pass over what is seen, and a strip of 3 x 4000 pixels, whose
    scaled image would be gigantic, costs as little as any other.
    """
    across, down = image.width / crops.size[0], image.height / crops.size[1]
    pixels = np.empty((2, 3, crop_size, crop_size), np.uint8)
    for crop, (left, top) in zip(pixels, crops.corners, strict=True):
        right, bottom = left + crop_size, top + crop_size
        box = (left * across, top * down, right * across, bottom * down)
        cutout = image.resize((crop_size, crop_size), Image.Resampling.BILINEAR, box)
        crop[:] = np.asarray(cutout).transpose(2, 0, 1)
    return torch.from_numpy(pixels[..., ::-1].copy() if crops.flip else pixels)


def cut_mask(
    valid: Bool[np.ndarray, "H W"], crops: Crops, crop_size: int
) -> Bool[Tensor, "2 S S"] | None:
    """Cut the two crops out of a mask as `cut` does out of its image; None if no gap is in them."""
    height, width = valid.shape
    across, down = width / crops.size[0], height / crops.size[1]
    masks = np.stack(
        [
            resized_mask(
                valid,
                (crop_size, crop_size),
                (
                    left * across,
                    top * down,
                    (left + crop_size) * across,
                    (top + crop_size) * down,
                ),
            )
            for left, top in crops.corners
        ]
    )
    if masks.all():
        return None
    return torch.from_numpy(masks[..., ::-1].copy() if crops.flip else masks)


def most_data(
    drawn: Sequence[Crops],
    valid: Bool[np.ndarray, "H W"],
    crop_size: int,
    rng: np.random.Generator,
) -> Crops:
    """Choose the first draw whose emptier crop holds the most data.

    Where one of its crops holds none, both are put around a pixel with data.
    """
    height, width = valid.shape

    def share(crops: Crops) -> float:
        across, down = width / crops.size[0], height / crops.size[1]
        return min(
            float(
                valid[
                    int(top * down) : math.ceil((top + crop_size) * down),
                    int(left * across) : math.ceil((left + crop_size) * across),
                ].mean()
            )
            for left, top in crops.corners
        )

    best = max(drawn, key=share)
    if share(best) > 0:
        return best
    pixels = np.flatnonzero(valid)
    row, column = divmod(int(pixels[rng.integers(len(pixels))]), width)
    corner = [
        min(max(0, round((pixel + 0.5) * scaled / side) - crop_size // 2), scaled - crop_size)
        for pixel, side, scaled in zip((column, row), (width, height), best.size, strict=True)
    ]
    left, top = corner
    return Crops(best.size, ((left, top), (left, top)), best.flip)


class ViewDataset(Dataset[View]):
    """The views of a list of images: `dataset[epoch, index]` is the same whoever asks, and when.

    An image that cannot be read gives a `View` with a reason instead of an error, so that one
    damaged file among a million does not end a run. Use it with a batch sampler that yields lists
    of (epoch, index), and with `collate_views`.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        config: ViewsConfig,
        seed: int,
        reading: ReadingConfig = AS_STORED,
    ) -> None:
        self.files = files
        self.reading = reading
        self.config = config
        self.seed = seed
        self._min_side = math.ceil(config.short_side * max(1.0, config.max_scale))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> View:
        epoch, index = key
        file = self.files[index]
        try:
            picture = open_picture(file, self._min_side, self.reading, settled=True)
        except UnreadableImage as error:
            return View(index, None, error.reason)
        image, valid, side = picture.image, picture.valid, self.config.crop_size
        if valid is not None and not valid.any():
            return View(index, None, NO_DATA)
        rng = _generator(_CROPS, self.seed, epoch, index)
        crops = draw_crops(image.size, self.config, rng)
        mask = None
        if valid is not None:
            others = [draw_crops(image.size, self.config, rng) for _ in range(_DRAWS - 1)]
            crops = most_data([crops, *others], valid, side, rng)
            mask = cut_mask(valid, crops, side)
        return View(index, cut(image, crops, side), boxes=crops.boxes(side), valid=mask)


def collate_views(views: Sequence[View]) -> ViewBatch:
    """Stack the views that could be read, and list those that could not."""
    read = [view for view in views if view.crops is not None]
    failures = [(view.index, view.reason or "") for view in views if view.crops is None]
    crops = [view.crops for view in read if view.crops is not None]
    boxes = [view.boxes for view in read if view.boxes is not None]
    masks = [view.valid for view in read]
    return ViewBatch(
        [view.index for view in read],
        torch.stack(crops) if crops else torch.empty(0, 2, 3, 0, 0, dtype=torch.uint8),
        failures,
        torch.stack(boxes) if boxes else torch.empty(0, 2, 4),
        stacked_masks(masks, crops[0].shape[-1]) if crops else None,
    )


def stacked_masks(
    masks: Sequence[Bool[Tensor, "2 S S"] | None], side: int
) -> Bool[Tensor, "b 2 S S"] | None:
    """The masks of several images together; None if none has a gap."""
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(2, side, side, dtype=torch.bool)
    return torch.stack([whole if mask is None else mask for mask in masks])


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Cut a random order of all images into the fewest batches of at most `batch_size`.

    Sizes differ by at most one: no image is dropped, and no batch is left with a few images.
    """
    return [batch.tolist() for batch in epoch_arrays(num_images, batch_size, seed, epoch)]


def epoch_arrays(
    num_images: int, batch_size: int, seed: int, epoch: int
) -> list[Int64[np.ndarray, " b"]]:
    """The `epoch_batches` as arrays, which take a quarter of the memory of lists."""
    order = _generator(_ORDER, seed, epoch).permutation(num_images)
    return np.array_split(order, math.ceil(num_images / batch_size))


def draw_rolls(batch: int, count: int, seed: int, step: int) -> list[int]:
    """Draw by how much the batch is rolled to pair each image with its negatives.

    Returns:
        `count` distinct rolls in 1..batch-1, fewer where there are not so many. None is 0, so no
        image is its own negative.
    """
    rolls = _generator(_ROLLS, seed, step).permutation(batch - 1)[:count] + 1
    return [int(roll) for roll in rolls]


def draw_patches(num_patches: int, count: int, seed: int, step: int) -> Int64[Tensor, "2 m"]:
    """Draw the patches of the first and of the second crop that a step compares.

    Returns:
        `count` distinct patches, numbered row by row, in order; all of them if `count` is 0 or
        there are not so many.
    """
    rng = _generator(_PATCHES, seed, step)
    size = min(count or num_patches, num_patches)
    drawn = [np.sort(rng.permutation(num_patches)[:size]) for _ in range(2)]
    return torch.from_numpy(np.stack(drawn))


def _generator(stream: int, seed: int, first: int, second: int = 0) -> np.random.Generator:
    """Make the generator of one draw. Keys all have four parts: numpy pads shorter ones with 0."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence((stream, seed, first, second)))
    )
