"""Open each image as RGB, 8 bit, upright, or say why it cannot be opened."""

from __future__ import annotations

import threading
import warnings
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from iddc.errors import UnreadableImage
from iddc.images.files import FORMATS, ImageFile

MAX_PIXELS = 500_000_000
"""The largest image we open, 1.5 GB as RGB. A file that claims more is an attack or damaged."""


def open_image(file: ImageFile | Path, min_side: int = 0) -> Image.Image:
    """Decode an image to RGB, 8 bit, upright (see `to_rgb`); of an animation, the first frame.

    Args:
        file: Where it is.
        min_side: The shorter side that is needed, in pixels: a much larger JPEG comes at a half, a
            quarter or an eighth, in a fraction of the time. 0: every image as large as it is.

    Raises:
        UnreadableImage: It is missing, empty, damaged, cut short, of an unknown format or larger
            than `MAX_PIXELS`.
    """
    if isinstance(file, Path):
        file = ImageFile(file, PurePosixPath(file.name))
    try:
        with quiet_pillow:
            image = open_header(file, BytesIO(file.read_bytes()))
            if min_side:
                image.draft(None, (min_side, min_side))
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UnreadableImage(file, explain(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB, 8 bit, turned upright as its EXIF orientation says.

    - Transparent images (alpha channel, transparent palette entry or colour) are laid over white:
      the colour stored under a transparent pixel is arbitrary, and white is what a viewer shows.
    - 16-bit grey is divided by 257, so that 0..65535 becomes 0..255; nothing is clipped.
    - Integer grey outside 0..65535 is stretched from its minimum and maximum to 0..255.
    - Float grey is read as 0..1, 0..255 or 0..65535, the first that holds all its values, else
      stretched. NaN and infinities count as 0.

    Raises:
        ValueError: Pillow has no conversion from this mode to RGB (LAB, in older versions).
    """
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_8bit(image)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


class _Quiet:
    """Pillow with our size limit and without its warnings, while any thread is inside.

    Both are settings of the whole process: the first thread in sets them, the last one out puts
    them back. A warning about odd metadata helps nobody who has a million photos.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit = Image.MAX_IMAGE_PIXELS
        self._filters: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = Image.MAX_IMAGE_PIXELS
                Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow raises at twice its limit
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(kind, error, trace)
                Image.MAX_IMAGE_PIXELS = self._limit


quiet_pillow = _Quiet()
"""`with quiet_pillow:` around anything that opens a user's file with Pillow."""


def open_header(file: ImageFile, stream: BufferedIOBase) -> Image.Image:
    """Read the header of an image in one of `FORMATS`; no pixel is decoded."""
    if not stream.read(1):
        raise UnreadableImage(file, "the file is empty")
    stream.seek(0)
    return Image.open(cast("IO[bytes]", stream), formats=tuple(FORMATS))


def explain(error: Exception) -> str:
    """Say in plain words why an image could not be opened."""
    if isinstance(error, UnreadableImage):
        return error.reason
    if isinstance(error, UnidentifiedImageError | KeyError):  # KeyError: a Pillow without AVIF
        return f"not an image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"claims more than {MAX_PIXELS // 10**6} megapixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    if isinstance(error, RuntimeError):  # zip members that are encrypted or oddly compressed
        return str(error)
    return f"damaged or cut short ({error or type(error).__name__})"


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, if there is one that can be read."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata must not cost the photo
        return image


def _grey_8bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or float grey to 8 bit by the rules of `to_rgb`."""
    tops: tuple[float, ...] = (1, 255, 65535) if image.mode == "F" else (65535,)
    values: np.ndarray = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        # Halves, which are exact: the span of all its numbers is more than a float can hold.
        values, top = values / 2 - low / 2, high / 2 - low / 2 or 1
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
