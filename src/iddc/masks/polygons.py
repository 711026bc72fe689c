"""The outline of a region as polygons that cover exactly its pixels, holes included."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64


def trace(region: Bool[np.ndarray, "H W"]) -> list[Int64[np.ndarray, "_ 2"]]:
    """Follow the edges of the pixels of a region.

    Args:
        region: Its pixels; pixel (row, column) is the square from (x, y) = (column, row) to
            (column + 1, row + 1).

    Returns:
        The corners (x, y) of one polygon for each connected part, without the first repeated. A
        hole is joined to its outline by a cut that goes there and back, as most formats know no
        holes; filled by the even-odd rule or by the non-zero rule it stays open.
    """
    from contourpy import FillType, contour_generator

    # contourpy puts pixel centres at integers. The frame closes outlines at the image's border.
    framed = np.pad(region, 1).astype(np.float64)
    generator = contour_generator(z=framed, name="serial", fill_type=FillType.OuterOffset)
    filled: Any = generator.filled(0.5, np.inf)  # its type depends on fill_type
    polygons = []
    for points, ends in zip(*filled, strict=True):
        rings = [_corners(points[start : end - 1] - 0.5) for start, end in pairwise(ends)]
        outer, holes = rings[0], rings[1:]
        cuts = [np.concatenate([hole, hole[:1], outer[-1:]]) for hole in holes]
        polygons.append(np.concatenate([outer, *cuts]))
    return polygons


def _corners(midpoints: Float[np.ndarray, "n 2"]) -> Int64[np.ndarray, "_ 2"]:
    """The corners of a ring that contourpy drew through the middle of pixel edges.

    It cuts each corner: where it goes from an upright edge to a level one or back, the corner has
    the x of the upright and the y of the level one.
    """
    following = np.roll(midpoints, -1, axis=0)
    upright = midpoints[:, 0] % 1 == 0
    x = np.where(upright, midpoints[:, 0], following[:, 0])
    y = np.where(upright, following[:, 1], midpoints[:, 1])
    turns = upright != np.roll(upright, -1)
    corners: np.ndarray = np.stack([x, y], axis=1)[turns].astype(np.int64)
    return corners
