"""Open each image as RGB, 8 bit, upright, or say why it cannot be opened.

A reader of each format gives samples and a `Layout`; what they mean is decided in `meaning`.
"""

from __future__ import annotations

import threading
import warnings
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Shaped
from PIL import Image, UnidentifiedImageError

from iddc.config import ReadingConfig
from iddc.errors import UnreadableImage
from iddc.images.files import FORMATS, MAX_PIXELS, ImageFile
from iddc.images.meaning import (
    Layout,
    Picture,
    Refused,
    every_nth,
    known_span,
    make_rule,
    show,
    upright,
    valid_values,
)
from iddc.images.pillow import (
    Samples,
    is_plain,
    orientation_of,
    pillow_layout,
    pillow_samples,
    turned,
)

AS_STORED = ReadingConfig()
"""What a file says, and where it says nothing, the range of its own values."""
_START = 512
"""Bytes that tell formats apart."""
_FOREIGN = (
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI volume"),
    (344, b"ni1\0", "a NIfTI volume"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"CDF", "a NetCDF file"),
    (4, b"ftyphei", "a HEIC photo"),
    (4, b"ftyphev", "a HEIC photo"),
    (4, b"ftypmif1", "a HEIF photo"),
    (4, b"ftypcrx", "a raw photo of a camera"),
    (0, b"FUJIFILMCCD-RAW", "a raw photo of a camera"),
    (0, b"\xff\x0a", "a JPEG XL photo"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL photo"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%PDF", "a PDF"),
    (0, b"PF\n", "a PFM image of floats"),
    (0, b"Pf\n", "a PFM image of floats"),
    (0, b"P7\n", "a PAM image"),
    (0, b"PK\x03\x04", "a zip"),
    (0, b"\x1f\x8b", "a file packed by gzip"),
)
"""Where a known format has which bytes, and what it is called."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_image(
    file: ImageFile | Path,
    min_side: int = 0,
    reading: ReadingConfig = AS_STORED,
    *,
    settled: bool = False,
) -> Image.Image:
    """Decode an image to RGB, 8 bit, upright; see `open_picture`."""
    return open_picture(file, min_side, reading, settled=settled).image


def open_picture(
    file: ImageFile | Path,
    min_side: int = 0,
    reading: ReadingConfig = AS_STORED,
    *,
    settled: bool = False,
) -> Picture:
    """Decode an image to RGB, 8 bit, upright, and say which of its pixels hold data.

    Args:
        file: Where it is.
        min_side: The shorter side that is needed, in pixels: a much larger JPEG comes at a half, a
            quarter or an eighth, in a fraction of the time. 0: every image as large as it is.
        reading: What files leave open: ranges, bands. That of a model shows all images alike.
        settled: Whether `reading` has the range of every kind of values. An image of another kind
            is refused then, instead of being shown in a range of its own.

    Raises:
        UnreadableImage: It is missing, empty, damaged, cut short, of an unknown format, larger than
            `MAX_PIXELS`, or does not say what its numbers mean.
    """
    file = _as_file(file)
    try:
        with quiet_pillow, _seekable(file) as stream:
            if is_tiff(stream):
                values, layout = _tiff_samples(stream, file.page)
                shown = _shown(values, layout, reading, settled=settled)
                return upright(shown, layout.orientation)
            image = _at_page(open_header(file, stream), file.page)
            if min_side:
                image.draft(None, (min_side, min_side))
            return picture_of(image, reading, settled=settled)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UnreadableImage(file, explain(error)) from error


def read_layout(file: ImageFile | Path) -> tuple[str, Layout]:
    """Read the header of an image: the name of its format, and what it says of its samples.

    Raises:
        UnreadableImage: See `open_picture`; damage after the header does not show.
    """
    file = _as_file(file)
    try:
        with quiet_pillow, file.open() as stream:
            if is_tiff(stream):
                from iddc.images import tiff

                with _seekable(file) as whole, tiff.opened(whole) as opened:
                    return "TIFF", tiff.read_layout(opened, file.page)
            image = _at_page(open_header(file, stream), file.page)
            return image.format or "", pillow_layout(image)
    except Exception as error:
        raise UnreadableImage(file, explain(error)) from error


def read_samples(file: ImageFile | Path) -> Samples:
    """Decode an image to its samples as stored, not turned, and what they mean.

    Raises:
        UnreadableImage: See `open_picture`.
    """
    file = _as_file(file)
    try:
        with quiet_pillow, _seekable(file) as stream:
            if is_tiff(stream):
                return _tiff_samples(stream, file.page)
            return pillow_samples(_at_page(open_header(file, stream), file.page))
    except Exception as error:
        raise UnreadableImage(file, explain(error)) from error


def picture_of(
    image: Image.Image, reading: ReadingConfig = AS_STORED, *, settled: bool = False
) -> Picture:
    """Show a Pillow image of any mode as RGB, 8 bit, turned upright as its EXIF orientation says.

    Raises:
        Refused: It does not say what its numbers mean.
    """
    if is_plain(image) and not reading.bands and not isinstance(reading.nodata, float):
        image.load()
        image = turned(image)
        return Picture(image if image.mode == "RGB" else image.convert("RGB"))
    orientation = orientation_of(image)
    values, layout = pillow_samples(image)
    return upright(_shown(values, layout, reading, settled=settled), orientation)


def to_rgb(image: Image.Image, reading: ReadingConfig = AS_STORED) -> Image.Image:
    """Convert any Pillow image to RGB, 8 bit, upright; see `picture_of`.

    Raises:
        UnreadableImage: It does not say what its numbers mean.
    """
    try:
        return picture_of(image, reading).image
    except Refused as error:
        raise UnreadableImage("the image", str(error)) from None


def _shown(
    values: Shaped[np.ndarray, "H W c"], layout: Layout, reading: ReadingConfig, *, settled: bool
) -> Picture:
    step = every_nth(layout.size)
    rule, _ = make_rule(layout, reading, values[::step, ::step])
    unknown = reading.range == "auto" and known_span(layout, reading) is None
    if (
        settled
        and unknown
        and valid_values(values, layout, rule.bands, rule.alpha, rule.marks).size
    ):
        raise Refused(
            f"its values are {layout.kind}, and no image whose header was read first has such "
            "values; give --range LOW HIGH, or --range file for a range of its own"
        )
    return show(values, layout, rule)


def _as_file(file: ImageFile | Path) -> ImageFile:
    return ImageFile(file, PurePosixPath(file.name)) if isinstance(file, Path) else file


def _seekable(file: ImageFile) -> BytesIO:
    """A file's bytes: libraries seek a lot, which members of a zip and network disks take badly."""
    return BytesIO(file.read_bytes())


def is_tiff(stream: BufferedIOBase) -> bool:
    """Whether a stream begins as a TIFF does; it is at its beginning again afterwards."""
    start = stream.read(4)
    stream.seek(0)
    return start in _TIFF


def _tiff_samples(stream: BytesIO, page: int) -> Samples:
    from iddc.images import tiff

    with tiff.opened(stream) as file:
        return tiff.read_samples(file, stream, page)


def _at_page(image: Image.Image, page: int) -> Image.Image:
    if page:
        frames = getattr(image, "n_frames", 1)
        if page >= frames:
            raise Refused(f"it has no page {page + 1}, only {frames}")
        image.seek(page)
    return image


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
    try:
        return Image.open(cast("IO[bytes]", stream), formats=tuple(FORMATS))
    except UnidentifiedImageError:
        stream.seek(0)
        name = foreign_format(stream.read(_START))
        if name is None:
            raise
        raise Refused(f"it is {name}, which is not read; convert it to PNG or TIFF") from None


def foreign_format(start: bytes) -> str | None:
    """The name of a format that is known but not read, from the first bytes of a file."""
    for offset, mark, name in _FOREIGN:
        if start[offset : offset + len(mark)] == mark:
            return name
    return "an SVG drawing" if b"<svg" in start else None


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
    if isinstance(
        error, RuntimeError | Refused
    ):  # zip members that are encrypted or oddly compressed
        return str(error)
    return f"damaged or cut short ({error or type(error).__name__})"
