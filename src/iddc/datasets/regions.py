"""Regions as annotation tools write them, painted as pixels: run lengths, polygons, ellipses.

Numbers in a file may be anything, so they are checked before anything of their size is made.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool

from iddc.errors import DataError

Region = Bool[np.ndarray, "H W"]
_FAR = 4
"""How many times the image's size a corner may lie outside of it."""


def from_coco_rle(rle: Any, height: int, width: int) -> Region:
    """COCO's run lengths, column by column: a list of numbers, or its compressed text.

    Raises:
        DataError: They are no run lengths of an image of this size.
    """
    if not isinstance(rle, dict) or rle.get("size") != [height, width]:
        size = rle.get("size") if isinstance(rle, dict) else rle
        raise DataError(f"a region has the size {size!r}, but its image [{height}, {width}]")
    counts = rle.get("counts")
    runs = _uncompressed(counts) if isinstance(counts, str) else counts
    if not (
        isinstance(runs, list)
        and all(isinstance(run, int) and run >= 0 for run in runs)
        and sum(runs) == height * width
    ):
        raise DataError(f"run lengths do not add up to the {height * width:,} pixels of the image")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _uncompressed(text: str) -> list[int]:
    """Numbers of 5 bits a character, whose sixth bit says that more follow.

    From the fourth on they are differences to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise DataError("run lengths hold characters of another kind")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise DataError("run lengths are cut short")
    return runs


def from_brush_rle(data: Any, height: int, width: int) -> Region:
    """Label Studio's brush: the run lengths of thi.ng/rle-pack of an RGBA picture.

    Pixels whose alpha is at least half belong to the region.

    Raises:
        DataError: They are no run lengths of an image of this size.
    """
    if not (isinstance(data, list) and all(isinstance(b, int) and 0 <= b < 256 for b in data)):
        raise DataError("a brush's run lengths are not a list of bytes")
    text = (np.unpackbits(np.array(data, np.uint8)) + ord("0")).tobytes().decode("ascii")
    position, size = 0, 4 * height * width

    def take(count: int) -> int:
        nonlocal position
        position += count
        if position > len(text):
            raise DataError("a brush's run lengths are cut short")
        return int(text[position - count : position], 2)

    if take(32) != size:
        raise DataError(f"a brush's run lengths are not of the {height * width:,} pixels it states")
    word = take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    values: list[np.ndarray] = []
    found = 0
    while found < size:
        repeated, length = take(1), take(widths[take(2)]) + 1
        if repeated:
            run = np.full(min(length, size - found), take(word), np.uint32)
        else:
            run = np.array([take(word) for _ in range(min(length, size - found))], np.uint32)
        values.append(run)
        found += length
    if found != size:
        raise DataError("a brush's run lengths go beyond the image")
    alpha = np.concatenate(values).reshape(height, width, 4)[..., 3]
    region: Region = alpha >= 2 ** (word - 1)
    return region


def from_polygons(polygons: Any, height: int, width: int) -> Region:
    """The union of polygons of x, y, x, y, ... in pixels, as pycocotools fills them.

    Raises:
        DataError: One has fewer than three corners, or corners far outside of the image.
    """
    from pycocotools import mask  # type: ignore[import-untyped]  # no stubs

    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in polygon
        )
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise DataError("a polygon is no list of three or more corners x, y")
        if not all(
            -_FAR * side <= value <= (_FAR + 1) * side
            for start, side in ((0, width), (1, height))
            for value in polygon[start::2]
        ):
            raise DataError(f"a polygon has corners far outside of {width} x {height} pixels")
    if not polygons:
        return np.zeros((height, width), bool)
    whole = mask.merge(mask.frPyObjects([[float(v) for v in p] for p in polygons], height, width))
    region: Region = mask.decode(whole) == 1
    return region


def from_ellipse(
    centre: tuple[float, float],
    radii: tuple[float, float],
    turned: float,
    height: int,
    width: int,
) -> Region:
    """The pixels whose centres lie in an ellipse.

    Args:
        centre: x and y, in pixels.
        radii: Along x and y before it is turned, in pixels.
        turned: Clockwise, in degrees.
        height: Of the image.
        width: Of the image.
    """
    if not all(math.isfinite(v) for v in (*centre, *radii, turned)) or min(radii) <= 0:
        raise DataError("an ellipse has no centre or no radius")
    rows, columns = np.indices((height, width)) + 0.5
    x, y = columns - centre[0], rows - centre[1]
    cosine, sine = math.cos(math.radians(turned)), math.sin(math.radians(turned))
    region: Region = ((x * cosine + y * sine) / radii[0]) ** 2 + (
        (y * cosine - x * sine) / radii[1]
    ) ** 2 <= 1
    return region
