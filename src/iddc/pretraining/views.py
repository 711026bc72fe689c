"""What a step sees: crops, their colours, points that match, patches that are masked.

All of it follows from the seed and the step. Every process draws the numbers of the whole batch and
cuts the crops of its own images. No blur and no solarisation: small crops are enlarged, which
blurs them, and colours change by one affine map of RGB, which a GPU applies in one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from iddc.config import PretrainConfig
from iddc.errors import ConfigError
from iddc.pretraining.cache import ImageCache
from iddc.processes import Processes
from iddc.views import epoch_batches

_MIN_BOX = 8
"""The shortest side that is cut from an image, in pixels."""
_STRETCH = math.log(4 / 3) / 2
"""Aspect ratios lie between 3/4 and 4/3."""
_TRIES = 12
"""How many second boxes are drawn to find one that overlaps the first."""
_LUMA = (0.299, 0.587, 0.114)
_YIQ = (_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
"""Brightness and two axes of colour of NTSC; hue is an angle between the two."""


# Geometry: a box is (left, top, width, height) in pixels of the image -----------------------------


def draw_boxes(
    rng: np.random.Generator, sizes: Float64[np.ndarray, "n 2"], sides: Float64[np.ndarray, "n t"]
) -> Float64[np.ndarray, "n t 4"]:
    """Place t boxes, about as large as squares of these sides, in images of height and width."""
    height, width = sizes[:, :1], sizes[:, 1:]
    stretch = np.exp(rng.uniform(-_STRETCH, _STRETCH, sides.shape))
    wide = np.clip(np.round(sides * stretch), _MIN_BOX, width)
    tall = np.clip(np.round(sides / stretch), _MIN_BOX, height)
    left = np.floor(rng.random(sides.shape) * (width - wide + 1))
    top = np.floor(rng.random(sides.shape) * (height - tall + 1))
    return np.stack([left, top, wide, tall], axis=-1)


def draw_pairs(
    rng: np.random.Generator,
    sizes: Float64[np.ndarray, "n 2"],
    min_side: int,
    min_overlap: float,
) -> Float64[np.ndarray, "n 2 4"]:
    """Draw two boxes of each image that overlap.

    Sides are log-uniform from `min_side` to the image's shorter side. Of some second boxes, the
    first is taken that shares `min_overlap` of the smaller area with the first box, or else the
    one that shares most.
    """
    shorter = sizes.min(1, keepdims=True)
    lowest = np.log(np.minimum(min_side, shorter))

    def boxes() -> Float64[np.ndarray, "n t 4"]:
        sides = np.exp(rng.uniform(lowest, np.log(shorter), (len(sizes), _TRIES)))
        return draw_boxes(rng, sizes, sides)

    first, others = boxes()[:, :1], boxes()
    shared = overlap(first, others)[..., 2:].clip(0).prod(-1)
    smaller = np.minimum(first[..., 2:].prod(-1), others[..., 2:].prod(-1))
    enough = shared >= min_overlap * smaller
    chosen = np.where(enough.any(1), enough.argmax(1), shared.argmax(1))
    return np.stack([first[:, 0], others[np.arange(len(sizes)), chosen]], axis=1)


def overlap(
    first: Float64[np.ndarray, "... 4"], second: Float64[np.ndarray, "... 4"]
) -> Float64[np.ndarray, "... 4"]:
    """The box that two boxes share; of negative width or height where they share none."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    return np.concatenate([low, high - low], axis=-1)


def draw_points(
    rng: np.random.Generator,
    boxes: Float64[np.ndarray, "n 2 4"],
    flips: Bool[np.ndarray, "n 2"],
    grid: int,
) -> Float[Tensor, "n 2 p 2"]:
    """Draw a point in each cell of a grid over what two boxes share, as both crops see it.

    Returns:
        x and y from -1 to 1, edge to edge, as `grid_sample` takes them without align_corners.
    """
    cells = np.stack(np.meshgrid(np.arange(grid), np.arange(grid)), axis=-1).reshape(1, -1, 2)
    points = (cells + rng.random((len(boxes), grid**2, 2))) / grid
    shared = overlap(boxes[:, 0], boxes[:, 1])[:, None]
    pixels = (shared[..., :2] + points * shared[..., 2:])[:, None]
    seen = 2 * (pixels - boxes[:, :, None, :2]) / boxes[:, :, None, 2:] - 1
    seen[..., 0] *= np.where(flips, -1, 1)[..., None]
    return torch.from_numpy(seen.astype(np.float32))


def draw_mask(rng: np.random.Generator, side: int, share: float) -> Bool[np.ndarray, "h w"]:
    """Mask about this share of the patches of a square crop, in rectangles, as BEiT and iBOT do."""
    mask = np.zeros((side, side), bool)
    target = max(1, round(share * side**2))
    for _ in range(100):
        missing = target - int(mask.sum())
        if not missing:
            break
        area, stretch = rng.uniform(min(4, missing), missing), np.exp(rng.uniform(-0.6, 0.6))
        tall, wide = (
            min(side, max(1, round(length)))
            for length in (area**0.5 * stretch, area**0.5 / stretch)
        )
        top, left = rng.integers(side - tall + 1), rng.integers(side - wide + 1)
        block = mask[top : top + tall, left : left + wide]
        if (~block).sum() <= missing:
            block[:] = True
    return mask


# Crops --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crops:
    """Crops of some images, and how their colours change.

    A colour x becomes `matrix` x + `offset` times the mean brightness of its crop.
    """

    pixels: UInt8[Tensor, "b v 3 S S"]
    matrix: Float[Tensor, "b v 3 3"]
    offset: Float[Tensor, "b v"]

    def recoloured(self, device: torch.device) -> Float[Tensor, "_ 3 S S"]:
        """Change the colours, on the device: values in [0, 1], the crops of an image in a row."""
        pixels = self.pixels.to(device).flatten(0, 1).float() / 255
        matrix, offset = self.matrix.to(device).flatten(0, 1), self.offset.to(device).flatten()
        brightness = pixels.mean((2, 3)) @ torch.tensor(_LUMA, device=device)
        shift = (offset * brightness)[:, None, None]
        return torch.baddbmm(shift, matrix, pixels.flatten(2)).view_as(pixels).clamp(0, 1)


def cut(
    photos: ImageCache | Sequence[UInt8[Tensor, "_ _ 3"]],
    ids: Sequence[int],
    boxes: Float64[np.ndarray, "b v 4"],
    flips: Bool[np.ndarray, "b v"],
    size: int,
) -> UInt8[Tensor, "b v 3 S S"]:
    """Cut the boxes out of their images, resize them (antialiased), mirror some."""
    crops = torch.empty(*flips.shape, 3, size, size, dtype=torch.uint8)
    for row, index in enumerate(ids):
        photo = photos[index].permute(2, 0, 1)[None]
        for view, (left, top, wide, tall) in enumerate(boxes[row].astype(int)):
            piece = photo[..., top : top + tall, left : left + wide]
            crop = functional.interpolate(piece, (size, size), mode="bilinear", antialias=True)[0]
            crops[row, view] = crop.flip(2) if flips[row, view] else crop
    return crops


def draw_colours(
    rng: np.random.Generator, shape: tuple[int, int], jitter: float, gray: float
) -> tuple[Float[Tensor, "b v 3 3"], Float[Tensor, "b v"]]:
    """Draw saturation, grey, hue, contrast and brightness: matrix and offset of `Crops`.

    Args:
        rng: Where the numbers come from.
        shape: Images and crops.
        jitter: The strength; 0 changes nothing.
        gray: The chance of no colour.
    """

    def uniform(reach: float) -> Float[Tensor, "b v"]:
        return torch.from_numpy(rng.uniform(-reach, reach, shape).astype(np.float32))

    saturation = 1 + uniform(0.6 * jitter)
    saturation[torch.from_numpy(rng.random(shape) < gray)] = 0
    hue = uniform(0.3 * jitter)
    contrast, brightness = 1 + uniform(0.8 * jitter), 1 + uniform(0.8 * jitter)
    turned = torch.zeros(*shape, 3, 3)
    turned[..., 0, 0] = 1
    turned[..., 1, 1] = turned[..., 2, 2] = saturation * hue.cos()
    turned[..., 2, 1] = saturation * hue.sin()
    turned[..., 1, 2] = -turned[..., 2, 1]
    yiq = torch.tensor(_YIQ)
    matrix = torch.linalg.inv(yiq) @ turned @ yiq * (contrast * brightness)[..., None, None]
    return matrix, (1 - contrast) * brightness


# Batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Two crops of each of some images, and points that both show."""

    failures: ClassVar[tuple[()]] = ()
    """All images were read when they were decoded."""
    ids: list[int]
    crops: Crops
    points: Float[Tensor, "b 2 p 2"]
    large: bool


@dataclass(frozen=True)
class _Kind:
    """What small or large batches are made of."""

    size: int
    grid: int
    min_side: int
    wanted: int
    """Images in a batch."""
    count: int
    """The same, or fewer where a source has not enough for its share."""
    pools: list[Int64[np.ndarray, "_"]]
    """The images that may be drawn, by source."""
    shares: Float64[np.ndarray, "_"]
    """How often each pool is drawn from: never an empty one."""


class PairViews:
    """The batches of `contrast`: `views[step]` is this process's part of one."""

    def __init__(self, photos: ImageCache, config: PretrainConfig, processes: Processes) -> None:
        self.photos = photos
        self.seed = config.seed
        self.config = contrast = config.contrast
        self.processes = processes
        sides, count = photos.sizes.min(1), min(config.batch_size, len(photos))

        def kind(size: int, grid: int, min_side: int, given: tuple[float, ...]) -> _Kind:
            fits = sides >= min_side
            pools = [np.flatnonzero(fits & (photos.sources == i)) for i in range(len(given))]
            pools = pools or [np.flatnonzero(fits)]
            there = np.array([len(pool) for pool in pools])
            shares = np.where(there > 0, given or (1.0,), 0.0)
            # The scarcest source says how many images there can be in these shares.
            most = (there * shares.sum())[shares > 0] // shares[shares > 0]
            equal_pixels = max(2, round(count * (contrast.small_size / size) ** 2))
            count_here = min(equal_pixels, int(min(most, default=0)))
            return _Kind(size, grid, min_side, equal_pixels, count_here, pools, shares)

        self._small = kind(
            contrast.small_size, contrast.small_grid, config.min_side, contrast.small_shares
        )
        self._large = large = kind(
            contrast.large_size, contrast.large_grid, contrast.large_min_side, contrast.large_shares
        )
        # Without images enough for large crops, all crops are small.
        full = large.count == large.wanted or bool(contrast.large_shares)
        enough = full and large.count >= 2 * processes.size
        self.large_every = contrast.large_every if enough else 0
        """Which batches have large crops; 0: none."""
        if self._small.count < 2 * processes.size:
            raise ConfigError(
                "--contrast.small-shares: the sources that have a share have too few usable "
                "images. Change the shares, or leave the option out."
            )

    @property
    def images_per_step(self) -> float:
        """On average, over all processes."""
        large = 1 / self.large_every if self.large_every else 0.0
        return large * self._large.count + (1 - large) * self._small.count

    def __getitem__(self, step: int) -> Pairs:
        every, contrast = self.large_every, self.config
        large = every > 0 and step % every == every - 1
        kind = self._large if large else self._small
        rng = np.random.default_rng((self.seed, step))
        ids = _drawn(rng, kind, kind.count)
        boxes = draw_pairs(rng, self.photos.sizes[ids], kind.min_side, contrast.min_overlap)
        flips = rng.random((len(ids), 2)) < 0.5
        matrix, offset = draw_colours(rng, flips.shape, contrast.jitter, contrast.gray)
        points = draw_points(rng, boxes, flips, kind.grid)
        rows = [*self.processes.split(range(len(ids)))]
        own = ids[rows].tolist()
        pixels = cut(self.photos, own, boxes[rows], flips[rows], kind.size)
        return Pairs(own, Crops(pixels, matrix[rows], offset[rows]), points[rows], large)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Up to `count` different images, in the shares of large crops where there are any."""
        kind = self._large if self.large_every else self._small
        drawn: list[int] = _drawn(rng, kind, count).tolist()
        return drawn


def _drawn(rng: np.random.Generator, kind: _Kind, count: int) -> Int64[np.ndarray, " n"]:
    shares = np.cumsum(kind.shares) / sum(kind.shares)
    counts = np.diff(np.round(shares * count), prepend=0).astype(int)
    return np.concatenate(
        [
            rng.choice(pool, min(number, len(pool)), replace=False)
            for pool, number in zip(kind.pools, counts, strict=True)
        ]
    )


@dataclass(frozen=True)
class MultiCrops:
    """Global and local crops of each of some images, and what the student does not see."""

    failures: ClassVar[tuple[()]] = ()
    """All images were read when they were decoded."""
    ids: list[int]
    large: Crops
    small: Crops
    masks: Bool[Tensor, "b 2 h w"]
    num_masked: int
    """Global crops with masked patches, over all processes."""


class MultiCropViews:
    """The batches of `dino`: `views[step]` is this process's part of one."""

    def __init__(
        self, photos: ImageCache, config: PretrainConfig, processes: Processes, patch_size: int
    ) -> None:
        self.photos = photos
        self.seed, self.batch_size = config.seed, config.batch_size
        self.config = config.dino
        self.processes = processes
        self.side = config.dino.global_size // patch_size
        self.images_per_step = config.batch_size
        """But for the last step of an epoch, which has what is left."""

    def __getitem__(self, step: int) -> MultiCrops:
        config = self.config
        epoch, number = divmod(step, math.ceil(len(self.photos) / self.batch_size))
        ids = epoch_batches(len(self.photos), self.batch_size, self.seed, epoch)[number]
        rng = np.random.default_rng((self.seed, step))
        rows = [*self.processes.split(range(len(ids)))]
        own = [ids[row] for row in rows]
        sizes = self.photos.sizes[ids]

        def crops(number: int, size: int, least: float, most: float) -> Crops:
            areas = sizes.prod(1)[:, None] * rng.uniform(least, most, (len(ids), number))
            boxes = draw_boxes(rng, sizes, np.sqrt(areas))
            flips = rng.random(areas.shape) < 0.5
            matrix, offset = draw_colours(rng, flips.shape, config.jitter, config.gray)
            pixels = cut(self.photos, own, boxes[rows], flips[rows], size)
            return Crops(pixels, matrix[rows], offset[rows])

        masks = np.zeros((2 * len(ids), self.side, self.side), bool)
        hidden = rng.permutation(len(masks))[: max(1, round(config.mask_share * len(masks)))]
        for crop in hidden:
            share = rng.uniform(config.min_masked, config.max_masked)
            masks[crop] = draw_mask(rng, self.side, share)
        return MultiCrops(
            own,
            crops(2, config.global_size, config.global_scale, 1.0),
            crops(config.local_crops, config.local_size, config.local_scale, config.global_scale),
            torch.from_numpy(masks.reshape(-1, 2, self.side, self.side)[rows]),
            len(hidden),
        )
