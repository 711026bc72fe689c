"""Colours that are easy to tell apart, and how they are laid over an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image


def palette(num: int) -> UInt8[np.ndarray, "num 3"]:
    """RGB colours that are easy to tell apart, and from black, white and grey.

    Each is the candidate farthest from all before it in OKLab, so the first ones differ most, and a
    longer palette begins with the shorter ones. They repeat after some thousand.
    """
    distinct = _distinct(min(num, _candidates().shape[0]))
    return distinct[np.arange(num) % len(distinct)]


def overlay(
    image: Image.Image,
    ids: Integer[np.ndarray, "H W"],
    colours: UInt8[np.ndarray, "k 3"],
    opacity: float = 0.5,
) -> Image.Image:
    """Lay the colours of the ids over the RGB image they belong to, of the same size.

    Pixels whose id has no colour are ignored ones and stay as they are.
    """
    coloured = (ids < len(colours))[..., None]
    painted = np.where(coloured, colours[np.minimum(ids, len(colours) - 1)], np.asarray(image))
    return Image.blend(image, Image.fromarray(painted), opacity)


def legend(names: Sequence[str], colours: UInt8[np.ndarray, "k 3"]) -> str:
    """What the colours of ids mean, as SVG: a browser has letters for every name."""
    line, width = 22, 60 + 10 * max(len(f"{index}  {name}") for index, name in enumerate(names))
    rows = [
        f'<rect x="4" y="{index * line + 3}" width="24" height="{line - 6}" '
        f'fill="#{bytes(colour).hex()}"/>'
        f'<text x="36" y="{index * line + 16}">{index} · {escape(name)}</text>'
        for index, (name, colour) in enumerate(zip(names, colours, strict=True))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{line * len(rows)}" '
            'font-family="sans-serif" font-size="14">',
            '<rect width="100%" height="100%" fill="white"/>',
            *rows,
            "</svg>\n",
        ]
    )


@lru_cache(maxsize=1)
def _candidates() -> UInt8[np.ndarray, "n 3"]:
    """A grid of sRGB colours, without the very dark, the very light and the glaring."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, a, b = _oklab(grid).T
    calm: np.ndarray = grid[(lightness > 0.35) & (lightness < 0.9) & (np.hypot(a, b) < 0.22)]
    return calm


@lru_cache(maxsize=4)
def _distinct(num: int) -> UInt8[np.ndarray, "num 3"]:
    """Walk to the farthest candidate, `num` times."""
    candidates = _candidates()
    places = _oklab(candidates)
    # Ignored pixels are black and unmatched ones grey.
    taken = _oklab(np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128]], np.uint8))
    distance = np.linalg.norm(places[:, None] - taken, axis=2).min(1)
    chosen = []
    for _ in range(num):
        chosen.append(distance.argmax())
        step = np.linalg.norm(places - places[chosen[-1]], axis=1)
        distance = np.minimum(distance, step)
    return candidates[chosen]


def _oklab(rgb: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Lightness, a and b in OKLab (Ottosson, 2020), where distances are those the eye sees."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    places: np.ndarray = np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return places
