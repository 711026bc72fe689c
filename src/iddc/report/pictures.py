"""Pictures of bounded size, as data: addresses, so that a report is one file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import Image, ImageOps

from iddc.report.look import Region, RunStatistics

TILES = 6
"""Regions in a mosaic, three in a row."""
_ACROSS = 3
_TILE = 96
"""The side of a tile, in pixels."""
_GAP = 4
_GREY = (160, 160, 160)
_MARGIN = 1.25
"""A tile shows this many times the longer side of its region."""
_LEAST = 6
"""And at least this many patches."""


def photo(image: Image.Image) -> str:
    """A photo, with losses that are hard to see."""
    return _address(image, quality=72, method=4)


def mask(
    clusters: Integer[np.ndarray, "H W"],
    colours: UInt8[np.ndarray, "k 3"],
    ignored: Bool[np.ndarray, " k"],
) -> str:
    """A mask in colours, transparent where a cluster is ignored or there is no data (-1)."""
    table = np.insert(colours, 3, np.where(ignored, 0, 255), axis=1)
    table = np.concatenate([table, np.zeros_like(table[:1])])
    return _address(Image.fromarray(table[clusters]), lossless=True, method=2)


def mosaic(look: RunStatistics, regions: Sequence[Region]) -> str:
    """Regions side by side, each amid its surroundings, which are faded; no region, no mosaic."""
    if not regions:
        return ""
    step = _TILE + _GAP
    sheet = Image.new("RGBA", (_ACROSS * step - _GAP, -(-len(regions) // _ACROSS) * step - _GAP))
    for place, region in enumerate(regions):
        tile = _tile(look.seen[region.image].image, look.patches(region))
        sheet.paste(tile, (place % _ACROSS * step, place // _ACROSS * step))
    return photo(sheet)


def _tile(image: Image.Image, patches: Bool[np.ndarray, "h w"]) -> Image.Image:
    """The square around a region; of one larger than the image's shorter side, its middle."""
    rows, columns = (np.flatnonzero(patches.any(axis)) for axis in (1, 0))
    scale = np.array(image.size) / patches.shape[::-1]
    low = np.array([columns[0], rows[0]]) * scale
    high = np.array([columns[-1] + 1, rows[-1] + 1]) * scale
    side = min(max(_MARGIN * (high - low).max(), _LEAST * scale.max()), *image.size)
    corner = np.clip((low + high - side) / 2, 0, np.array(image.size) - side)

    def cut(picture: Image.Image, unit: np.ndarray) -> Image.Image:
        end = np.minimum((corner + side) / unit, picture.size)  # rounding must not exceed it
        box = (*(corner / unit), *end)
        return picture.resize((_TILE, _TILE), Image.Resampling.BILINEAR, box)

    seen = cut(image, np.ones(2))
    faded = Image.blend(
        ImageOps.grayscale(seen).convert("RGB"), Image.new("RGB", seen.size, _GREY), 0.6
    )
    return Image.composite(seen, faded, cut(Image.fromarray(patches.astype(np.uint8) * 255), scale))


def _address(image: Image.Image, **options: int) -> str:
    data = BytesIO()
    image.save(data, "WEBP", **options)
    return f"data:image/webp;base64,{b64encode(data.getvalue()).decode()}"
