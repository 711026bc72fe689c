"""Colours that are easy to tell apart, and how they are laid over an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

OKABE_ITO = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""The palette of Okabe and Ito (2008), in their order. Their eighth colour is black, which here
stands for ignored pixels."""
VISIONS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
"""What each kind of colour vision makes of linear RGB: Machado, Oliveira and Fernandes (2009),
severity 1.0."""


def palette(num: int) -> UInt8[np.ndarray, "num 3"]:
    """RGB colours that are easy to tell apart, for people with any kind of colour vision.

    The first seven are Okabe and Ito's. Each further one is the candidate that is farthest in OKLab
    from all before it and from black, white and grey, where the distance of two colours is the
    smallest that any of four `VISIONS` sees. So the first ones differ most, and a longer palette
    begins with the shorter ones. Colours repeat after some thousand.
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
    lightness, a, b = _oklab(grid, np.eye(3)).T
    calm: np.ndarray = grid[(lightness > 0.35) & (lightness < 0.9) & (np.hypot(a, b) < 0.22)]
    return calm


@lru_cache(maxsize=4)
def _distinct(num: int) -> UInt8[np.ndarray, "num 3"]:
    """Walk to the farthest candidate until there are `num` colours."""
    first = np.array([[*bytes.fromhex(colour[1:])] for colour in OKABE_ITO], np.uint8)
    candidates = np.concatenate([first, _candidates()])
    seen = _seen(candidates)
    # Ignored pixels are black and unmatched ones grey.
    taken = _seen(np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128]], np.uint8))
    distance = np.linalg.norm(seen[:, :, None] - taken[:, None], axis=3).min((0, 2)) ** 2
    squares = (seen**2).sum(2)
    chosen: list[int] = []
    for index in range(num):
        chosen.append(index if index < len(first) else int(distance.argmax()))
        # |a - b|^2 = |a|^2 + |b|^2 - 2ab: a product of matrices is the fastest way to thousands.
        product = (seen @ seen[:, chosen[-1], :, None])[..., 0]
        step = squares + squares[:, chosen[-1:]] - 2 * product
        distance = np.minimum(distance, step.min(0))
    return candidates[chosen]


def _seen(rgb: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "v n 3"]:
    """The colours in OKLab as each of the `VISIONS` sees them."""
    return np.stack([_oklab(rgb, np.array(vision)) for vision in VISIONS.values()])


def _oklab(
    rgb: UInt8[np.ndarray, "n 3"], vision: Float[np.ndarray, "3 3"] | Integer[np.ndarray, "3 3"]
) -> Float[np.ndarray, "n 3"]:
    """Lightness, a and b in OKLab (Ottosson, 2020), where distances are those the eye sees."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = (linear @ vision.T).clip(0, 1) @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lab: np.ndarray = np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return lab
