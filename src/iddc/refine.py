"""Edges that follow the image: the field's fully connected CRF, and a local one in torch.

Both are mean fields of a conditional random field with Potts compatibility (Krähenbühl and Koltun,
*Efficient inference in fully connected CRFs with Gaussian edge potentials*, 2011). Probabilities p
of K clusters become

    Q_i <- softmax(log p_i + sum over kernels of w * mean of Q_j, weighted by k(i, j))

`crf` averages over all pixels j, and takes the whole image at once. `fast` averages over few, far
ones first and near ones last, and takes a tile at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from iddc.config import RefineName
from iddc.errors import ConfigError, needs_extra

MIN_PROB = 1e-5
"""Probabilities count as at least this, so that their logarithm is finite; the field's value."""

CRF_ITERATIONS = 10
"""Updates of every Q. This and the next five: STEGO's, and of all that is compared with it."""
SMOOTHNESS_WEIGHT, SMOOTHNESS_XY = 3, 1
"""A Gaussian of the distance: its weight, and its standard deviation in pixels."""
APPEARANCE_WEIGHT, APPEARANCE_XY, APPEARANCE_RGB = 4, 67, 3
"""A Gaussian of distance and colour: weight, standard deviations in pixels and in grey levels."""
CRF_VALUES = 2**26
"""The most clusters * pixels; a photo takes about 40 bytes for each, 3 GB in all."""

DISTANCES = (32, 16, 8, 4, 2)
"""`fast`: how far each update looks, in pixels. This and the next three are ours, chosen on drawn
scenes with the true probabilities of patches of 8 to 32 pixels, under noise."""
FAST_RGB = 8.0
"""`fast`: the standard deviation of the kernel, in grey levels."""
FAST_SELF = 0.01
"""`fast`: how much a pixel listens to itself, so that one unlike all its neighbours has a mean."""
FAST_WEIGHT = 8.0
"""`fast`: the weight of the kernel. A cluster of probability 1 stays the most probable, as
8 < -log MIN_PROB."""
REACH = sum(DISTANCES)
"""`fast`: a pixel's result depends on none farther away than this, in rows and in columns."""
TILE_VALUES = 2**24
"""`fast`: clusters * pixels refined at once, 64 MB; about five times that is in use. A tile has at
least four times `REACH` pixels on a side, and so with many clusters more values."""

Refiner = Callable[[Iterable[Tensor]], Iterator[Tensor]]
"""From strips of rows "k _ W" of probabilities, top to bottom, to others."""


def refiner(name: RefineName, image: UInt8[Tensor, "3 H W"]) -> Refiner:
    """What refines the probabilities of an image; it is RGB, at their size."""
    return partial(REFINERS[name], image=image)


def keep_rows(
    strips: Iterable[Float[Tensor, "k _ W"]],
    image: UInt8[Tensor, "3 H W"],  # noqa: ARG001
) -> Iterator[Float[Tensor, "k _ W"]]:
    """Leave the probabilities as they are."""
    return iter(strips)


def fast_rows(
    strips: Iterable[Float[Tensor, "k _ W"]], image: UInt8[Tensor, "3 H W"]
) -> Iterator[Float[Tensor, "k _ W"]]:
    """The `mean_field` of the whole image, in bounded memory.

    It is computed in tiles with `REACH` pixels more on every side, on the strips' device. Held
    beside a tile are its rows, `REACH` more above and below.
    """
    height = image.shape[1]
    held: Tensor | None = None  # rows from `first` on
    first = done = 0
    for strip in strips:
        held = strip if held is None else torch.cat([held, strip], dim=1)
        clusters, _, width = held.shape
        rows = _tile_size(clusters * width, height)
        while done < height and first + held.shape[1] >= min(height, done + rows + REACH):
            stop = min(height, done + rows)
            bottom = min(height, stop + REACH)
            guide = image[None, :, first:bottom].to(held.device)
            yield _refined(held[:, : bottom - first], guide)[:, done - first : stop - first]
            done, top = stop, max(0, stop - REACH)
            held, first = held[:, top - first :], top


def _refined(
    probs: Float[Tensor, "k H W"], guide: UInt8[Tensor, "1 3 H W"]
) -> Float[Tensor, "k H W"]:
    """The mean field of some rows, some columns at a time."""
    clusters, height, width = probs.shape
    columns = _tile_size(clusters * height, width)
    tiles = []
    for start in range(0, width, columns):
        stop = min(width, start + columns)
        seen = slice(max(0, start - REACH), min(width, stop + REACH))
        tile = mean_field(probs[None, :, :, seen], guide[..., seen])[0]
        tiles.append(tile[..., start - seen.start : stop - seen.start])
    return torch.cat(tiles, dim=2) if len(tiles) > 1 else tiles[0]


def _tile_size(line: int, length: int) -> int:
    """How many lines of so many values are a tile without its margins; tiles are about equal."""
    if line * length <= TILE_VALUES:
        return length
    most = max(2 * REACH, TILE_VALUES // line - 2 * REACH)
    return math.ceil(length / math.ceil(length / most))


def mean_field(
    probs: Float[Tensor, "b k H W"], images: UInt8[Tensor, "b 3 H W"]
) -> Float[Tensor, "b k H W"]:
    """Let each pixel agree with those that look like it, from far to near.

    One update for each d of `DISTANCES`:

        Q_i <- softmax(log p_i + FAST_WEIGHT * (sum_j k_ij Q_j) / (sum_j k_ij))
        k_ij = exp(-|I_i - I_j|^2 / (2 FAST_RGB^2)),  k_ii = FAST_SELF

    where j runs over i and over the pixels at distances d and d/2 in the eight directions.

    Args:
        probs: Sum to 1 over the clusters.
        images: RGB, at the same size and on the same device.

    Returns:
        Probabilities in float32.
    """
    pixels = images.float()
    unary = probs.float().clamp(min=MIN_PROB).log()
    refined = probs.float()
    for distance in DISTANCES:
        message = FAST_SELF * refined
        total = torch.full_like(pixels[:, :1], FAST_SELF)
        for here, there in _neighbours(distance, *pixels.shape[-2:]):
            difference = (pixels[here] - pixels[there]).square().sum(dim=1, keepdim=True)
            weight = (difference / (-2 * FAST_RGB**2)).exp()
            for one, other in ((here, there), (there, here)):
                total[one] += weight
                message[one].addcmul_(weight, refined[other])
        refined = torch.add(unary, message / total, alpha=FAST_WEIGHT).softmax(dim=1)
    return refined


Place = tuple[slice, slice, slice, slice]


def _neighbours(distance: int, height: int, width: int) -> Iterator[tuple[Place, Place]]:
    """The pairs of neighbouring pixels, one direction each: all of the one and all of the other."""
    for step in (distance, distance // 2):
        for down, right in ((0, step), (step, -step), (step, 0), (step, step)):
            if down < height and abs(right) < width:
                rows, their_rows = _shifted(height, down)
                columns, their_columns = _shifted(width, right)
                every = slice(None)
                yield (every, every, rows, columns), (every, every, their_rows, their_columns)


def _shifted(size: int, step: int) -> tuple[slice, slice]:
    """Where along an axis both i and i + step lie in the image: the places i, and i + step."""
    return slice(max(0, -step), size - max(0, step)), slice(max(0, step), size + min(0, step))


def crf_rows(
    strips: Iterable[Float[Tensor, "k _ W"]], image: UInt8[Tensor, "3 H W"]
) -> Iterator[Float[Tensor, "k _ W"]]:
    """The `dense_crf` of the whole image, as one strip on the device of the given ones.

    Raises:
        ConfigError: Clusters times pixels exceed `CRF_VALUES`.
        SetupError: The extra `crf` is not installed.
    """
    height, width = image.shape[1:]
    held = []
    for strip in strips:
        if len(strip) * height * width > CRF_VALUES:
            raise ConfigError(
                f"The CRF holds all probabilities at once, at most {CRF_VALUES // len(strip):,} "
                f"pixels with {len(strip)} clusters; this image has {width} x {height}. Use "
                "--refine fast, which works in strips."
            )
        held.append(strip)
    yield dense_crf(torch.cat(held, dim=1).cpu(), image.cpu()).to(held[0].device)


def dense_crf(
    probs: Float[Tensor, "k H W"], image: UInt8[Tensor, "3 H W"]
) -> Float[Tensor, "k H W"]:
    """The fully connected CRF with the field's constants, on the CPU.

    Filtering is that of the permutohedral lattice, an approximation.

    Args:
        probs: Sum to 1 over the clusters.
        image: RGB, at the same size.

    Raises:
        SetupError: The extra `crf` is not installed.
    """
    with needs_extra(
        "crf", "The CRF needs pydensecrf2", " (this compiles C++), or use --refine fast"
    ):
        from pydensecrf.densecrf import DenseCRF2D
    clusters, height, width = probs.shape
    field = DenseCRF2D(width, height, clusters)
    field.setUnaryEnergy(-np.log(probs.numpy().reshape(clusters, -1).clip(MIN_PROB)))
    field.addPairwiseGaussian(sxy=SMOOTHNESS_XY, compat=SMOOTHNESS_WEIGHT)
    field.addPairwiseBilateral(
        sxy=APPEARANCE_XY,
        srgb=APPEARANCE_RGB,
        rgbim=image.permute(1, 2, 0).contiguous().numpy(),
        compat=APPEARANCE_WEIGHT,
    )
    refined = np.array(field.inference(CRF_ITERATIONS))
    return torch.from_numpy(refined).view_as(probs)


REFINERS: dict[RefineName, Callable[..., Iterator[Tensor]]] = {
    "none": keep_rows,
    "fast": fast_rows,
    "crf": crf_rows,
}
