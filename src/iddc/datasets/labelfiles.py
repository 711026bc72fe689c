"""One picture of labels: from its pixels to the ids of classes, or the reason why not.

Ids are what the pixels store (grey values, palette indices) or what their colours mean, if a list
of classes names colours. Nothing is guessed: what could be read in two ways is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from iddc.config import ReadingConfig
from iddc.datasets.classlist import ClassList
from iddc.errors import DataError, UnreadableImage
from iddc.images import AS_STORED, ImageFile, listed, open_picture, quiet_pillow
from iddc.metrics import IGNORE

FORMATS = ("PNG", "TIFF", "BMP")
"""Pillow's names of the formats of labels: they lose nothing. JPEG would invent ids."""
BINARY = (255, 65535)
"""What masks that are no lists of ids have in the place of 1, with 8 and with 16 bits."""
_PHOTOMETRIC, _SAMPLE_FORMAT, _BITS, _NODATA = 262, 339, 258, 42113
"""Tags of TIFF."""


def read_pair(
    image: ImageFile,
    label: ImageFile,
    classes: ClassList | None = None,
    reading: ReadingConfig = AS_STORED,
) -> tuple[Image.Image, UInt16[np.ndarray, "H W"]]:
    """Read an image and the ids of its pixels; those that hold no data are ignored.

    Raises:
        DataError: One cannot be read, or they differ in size.
    """
    picture, ids = open_picture(image, reading=reading), read_ids(label, classes)
    refuse_other_size(str(label), (ids.shape[1], ids.shape[0]), image, picture.image)
    if picture.valid is not None:
        ids[~picture.valid] = IGNORE
    return picture.image, ids


def refuse_other_size(
    label: str, size: tuple[int, int], file: ImageFile, image: Image.Image
) -> None:
    """Refuse a label of another size than its image.

    Raises:
        DataError: It says both sizes.
    """
    if size != image.size:
        raise DataError(
            f"{label} is {size[0]} x {size[1]} pixels, but its image {file} is "
            f"{image.width} x {image.height}. A label has the size of its image."
        )


def read_ids(file: ImageFile | Path, classes: ClassList | None = None) -> UInt16[np.ndarray, "H W"]:
    """Read the ids of a picture of labels.

    Grey values of any bit depth and palette indices are ids; so are the equal channels of a grey
    RGB picture. An alpha channel must be opaque. Where `classes` has colours, RGB pictures and
    palettes are read by their colours, and grey ones too if all its colours are grey. Pixels with
    the no-data value that a GeoTIFF states are ignored.

    Raises:
        DataError: The file is damaged, is transparent, or its colours are those of no class.
    """
    if isinstance(file, Path):
        file = ImageFile(file, PurePosixPath(file.name))
    try:
        pixels, nodata = _decoded(file, classes)
    except UnreadableImage as error:
        raise DataError(str(error)) from error
    except DataError:  # it says itself what was expected
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise DataError(
            f"{file} is not a PNG that can be read ({error}), nor a TIFF or BMP. Labels are "
            "pictures that lose nothing; JPEG changes ids."
        ) from error
    # By colours where the classes have any; else the values are the ids.
    grey = pixels if pixels.ndim == 2 else None
    if classes and classes.colours and (grey is None or (classes.all_grey and grey.max() <= 255)):
        rgb = np.repeat(grey[..., None], 3, axis=2) if grey is not None else pixels
        try:
            return classes.ids_of(rgb.astype(np.uint8))
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
    if grey is None:
        grey = pixels[..., 0]
        if (pixels != grey[..., None]).any():
            colours = len(np.unique(pixels.reshape(-1, 3), axis=0))
            raise DataError(
                f"{file} has 3 channels (RGB) with {colours:,} colours. Labels are single-channel "
                f"pictures of class ids, {IGNORE} for ignored pixels; or name the colour of each "
                "class in classes.txt: NAME R G B."
            )
    if grey.dtype.kind not in "bu" and ((grey < 0) | (grey > 65535)).any():
        raise DataError(
            f"{file} holds values from {grey.min()} to {grey.max()}. Labels are class ids from 0 "
            f"on, {IGNORE} for ignored pixels."
        )
    ids: np.ndarray = grey.astype(np.uint16)
    if nodata is not None:
        ids[ids == nodata] = IGNORE
    return ids


def binary_ids(ids: UInt16[np.ndarray, "H W"], file: object) -> UInt16[np.ndarray, "H W"]:
    """Class 1 where a mask is 255 (65535 with 16 bits), class 0 where it is 0.

    Raises:
        DataError: It has other values.
    """
    values = present(ids)
    if not values <= {0, *BINARY} or len(values) > 2:
        raise DataError(
            f"{file} is read as a mask of 0 and 255 (--binary), but it holds the values "
            f"{_listed(values)}."
        )
    return (ids > 0).astype(np.uint16)


def present(ids: UInt16[np.ndarray, "H W"]) -> set[int]:
    """The values that occur."""
    return set(np.flatnonzero(np.bincount(ids.ravel(), minlength=1)).tolist())


def refuse_grey_levels(values: set[int], folder: Path, *, named: bool) -> None:
    """Refuse values of labels that are grey levels, not ids: of 0 and 255 only 0 would be scored.

    Args:
        values: All that occur in the labels.
        folder: Where they lie.
        named: Whether a list of classes names at most two.

    Raises:
        DataError: It says what to do.
    """
    what = (
        "If one of them is a class, give its colour in classes.txt (lines such as `background "
        "#000000` and `cell #ffffff`)"
    )
    for white in BINARY:
        if values == {0, white}:
            raise DataError(
                f"The labels in {folder} hold only 0 and {white}, and {IGNORE} means ignored: one "
                f"class would be left. {what}, or read them as two classes with --binary."
            )
    known = values - {IGNORE}
    # Ids are counted from 0: of 0 and 128, or 0, 85 and 170, nobody numbers classes so.
    if not named and known and max(known) >= 32 and 8 * len(known) <= max(known):
        raise DataError(
            f"The labels in {folder} hold only the values {_listed(values)}, which look like grey "
            f"levels, not like ids of {max(known) + 1} classes. {what}; if they are ids, name all "
            "classes in classes.txt."
        )


def _decoded(file: ImageFile, classes: ClassList | None) -> tuple[np.ndarray, float | None]:
    """The pixels as stored, "H W" or "H W 3", and the no-data value of a TIFF."""
    encoded = BytesIO(file.read_bytes())
    with quiet_pillow, Image.open(encoded, formats=FORMATS) as image:
        mode, nodata = image.mode, None
        args = str(image.tile[0].args) if image.tile else ""
        if getattr(image, "n_frames", 1) > 1:
            raise DataError(f"{file} has {image.n_frames} pages. A label has one.")  # type: ignore[attr-defined]
        if image.format == "TIFF":
            nodata = _tiff_rules(file, image)
        # Pillow stretches grey of 2 and 4 bits to 0..255, which would change the ids.
        stretch = {"L;2": 85, "L;4": 17}.get(args, 1)
        if mode not in ("1", "L", "P", "I", "LA", "RGB", "RGBA") and not mode.startswith("I;16"):
            raise DataError(
                f"{file} has pixels of the kind {mode}. Labels are whole numbers, one a pixel, or "
                "RGB colours that classes.txt names."
            )
        if "16" in args and mode in ("LA", "RGB", "RGBA"):
            raise DataError(f"{file} has {len(mode)} channels of 16 bits. Labels in colour have 8.")
        pixels = np.asarray(image)
        if mode == "P" and classes and classes.colours:
            pixels = _through_palette(image, pixels)
    if mode in ("LA", "RGBA"):
        if (pixels[..., -1] != 255).any():
            raise DataError(
                f"{file} has {len(mode)} channels ({mode}) and is transparent in places. A label's "
                "alpha channel must be opaque, as nothing says what transparent pixels are: give "
                f"them the value or the colour of a class, or {IGNORE}."
            )
        pixels = pixels[..., 0] if mode == "LA" else pixels[..., :3]
    return pixels // stretch if stretch > 1 else pixels, nodata


def _through_palette(
    image: Image.Image, indices: UInt8[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W 3"]:
    palette = np.array(image.getpalette("RGB") or [0, 0, 0], np.uint8).reshape(-1, 3)
    if int(indices.max(initial=0)) >= len(palette):
        raise ValueError("its pixels name colours that its palette lacks")
    coloured: np.ndarray = palette[indices]
    return coloured


def _tiff_rules(file: ImageFile, image: Image.Image) -> float | None:
    """Refuse TIFFs whose numbers Pillow changes; give the value of pixels without data."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = {*tags.get(_BITS, (1,))} if isinstance(tags.get(_BITS, 1), tuple) else {tags[_BITS]}
    if tags.get(_PHOTOMETRIC) == 0 and bits != {1}:
        raise DataError(f"{file} is a TIFF in which 0 is white. Save it with 0 as black.")
    kinds = tags.get(_SAMPLE_FORMAT, (1,))
    if bits & {2, 4} or (2 in kinds and 8 in bits):
        raise DataError(
            f"{file} is a TIFF of {min(bits)}-bit {'signed ' if 2 in kinds else ''}numbers. Save "
            "it with 8 or 16 bits without sign."
        )
    text = str(tags.get(_NODATA, "")).strip("\0 ")
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _listed(values: Iterable[int]) -> str:
    return listed(map(str, sorted(values)))
