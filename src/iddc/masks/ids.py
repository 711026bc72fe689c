"""Masks as images: ids as they are, ids with a palette, and any other picture."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer, UInt8, UInt16
from PIL import Image

from iddc.runs import disk_errors, write_atomic


def write_ids(path: Path, ids: UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"]) -> None:
    """Write a grey PNG whose values are the ids: 8 bit for uint8, 16 bit for uint16."""
    write_image(path, Image.fromarray(ids))


def without_gaps(
    ids: Integer[np.ndarray, "H W"], valid: Bool[np.ndarray, "H W"] | None, number: int
) -> Integer[np.ndarray, "H W"]:
    """Give pixels without data the highest value of a type that has room for it.

    Args:
        ids: Numbers of clusters or classes.
        valid: Which pixels hold data; None: all.
        number: How many clusters or classes there are: of 256, 255 is the last, so that no data
            is 65535.
    """
    if valid is None:
        return ids
    kind = np.promote_types(ids.dtype, np.min_scalar_type(number))
    masked: np.ndarray = np.where(valid, ids, np.iinfo(kind).max).astype(kind)
    return masked


def with_palette(ids: Integer[np.ndarray, "H W"], colours: UInt8[np.ndarray, "k 3"]) -> Image.Image:
    """Ids below 256 as an image with a palette; ids without a colour are black."""
    image = Image.fromarray(ids.astype(np.uint8))
    # A shorter palette would make Pillow write fewer bits than the id of ignored pixels has.
    image.putpalette(colours.tobytes().ljust(3 * 256, b"\0"))
    return image


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image in the format of its suffix, with its folders, completely or not at all.

    Raises:
        SetupError: It cannot be written.
    """
    write_file(path, encode(image, path.suffix))


def encode(image: Image.Image, suffix: str = ".png") -> bytes:
    """The bytes of an image file."""
    data = BytesIO()
    image.save(data, Image.registered_extensions()[suffix])
    return data.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Write a file with its folders, completely or not at all.

    Raises:
        SetupError: It cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
