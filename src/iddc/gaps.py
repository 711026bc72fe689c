"""Gaps: pixels without data, and the patches that lie in them.

A patch counts if at least half of its pixels hold data. In training, one that does not is replaced
by another patch of its crop, the one that lies opposite, beyond the border of the data. So what a
gap shows enters no loss of any method, and a crop has as many patches as any other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

NO_DATA = "no pixel holds data"
"""Why an image is left out."""
LEAST = 0.5
"""The share of its pixels that must hold data for a patch to count."""


def data_patches(valid: Bool[Tensor, "... H W"], grid: tuple[int, int]) -> Bool[Tensor, "... h w"]:
    """Find the patches that count: those half of whose pixels hold data.

    Where no patch has so many, those with the most count, so that there is always one.
    """
    share = adaptive_avg_pool2d(valid.float().reshape(-1, 1, *valid.shape[-2:]), grid)
    share = share.reshape(*valid.shape[:-2], *grid)
    return share >= share.amax(dim=(-2, -1), keepdim=True).clamp(max=LEAST)


def stand_ins(valid: Bool[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    """For each position, numbered row by row, the one that stands for it: itself where it counts.

    Else it is the mirror image of the position in the nearest one that counts, if that counts too,
    or else the nearest one. At least one must count.
    """
    from scipy import ndimage

    find: Any = ndimage.distance_transform_edt  # type: ignore[attr-defined]  # no stubs
    _, nearest = find(~valid, return_indices=True)
    mirrored = 2 * nearest - np.indices(valid.shape)
    bound = np.array(valid.shape)[:, None, None] - 1
    inside = ((mirrored >= 0) & (mirrored <= bound)).all(axis=0)
    clipped = mirrored.clip(0, bound)
    good = inside & valid[clipped[0], clipped[1]]
    rows, columns = np.where(good, clipped, nearest)
    numbers: np.ndarray = (rows * valid.shape[1] + columns).astype(np.int64)
    return numbers


def filled(
    maps: Float[Tensor, "b d h w"], valid: Bool[Tensor, "b H W"] | None
) -> Float[Tensor, "b d h w"]:
    """Put the patches that stand for them in the place of those in gaps.

    Args:
        maps: The embeddings of some crops.
        valid: Which of the crops' pixels hold data; None: all.
    """
    if valid is None or not len(maps):
        return maps
    counts = data_patches(valid.cpu(), (maps.shape[2], maps.shape[3]))
    if counts.all():
        return maps
    numbers = np.stack([stand_ins(row) for row in counts.numpy()]).reshape(len(maps), 1, -1)
    chosen = torch.from_numpy(numbers).to(maps.device).expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, chosen).view_as(maps)


def fill_pixels(
    pixels: UInt8[np.ndarray, "H W 3"], valid: Bool[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Cut an image to the part that holds data, and mirror the data into what gaps are left."""
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    pixels, valid = pixels[part], valid[part]
    flat: np.ndarray = pixels.reshape(-1, 3)[stand_ins(valid)]
    return flat


def resized_mask(
    valid: Bool[np.ndarray, "H W"],
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> Bool[np.ndarray, "h w"]:
    """Resize a mask, or a box of it, to (width, height) as the image is, antialiased."""
    image = Image.fromarray(valid.astype(np.uint8) * np.uint8(255))
    resized = image.resize(size, Image.Resampling.BILINEAR, box)
    mask: np.ndarray = np.asarray(resized) > 127
    return mask


def part_of(valid: Shaped[Tensor, "b ..."] | None, rows: slice) -> Shaped[Tensor, "n ..."] | None:
    """Some rows of what is None where there are no gaps."""
    return None if valid is None else valid[rows]
