"""Images as Python programs have them: paths, arrays, Pillow images, bytes, data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from iddc.config import ReadingConfig
from iddc.errors import DataError
from iddc.images.decode import AS_STORED, open_picture, picture_of
from iddc.images.files import ImageFile
from iddc.images.meaning import Picture
from iddc.images.pillow import turned

ImageLike = str | Path | Image.Image | np.ndarray | bytes | bytearray | IO[bytes]
"""One image: a file, a Pillow image of any mode, an array "H W 3" of uint8, or an encoded image. A
tensor "3 H W" of uint8 is one too."""
EXPECTED = (
    "an image: a path, a Pillow image, an array (height, width, 3) or a tensor (3, height, width) "
    "of uint8, or the bytes of an image file"
)


@dataclass(frozen=True)
class MemoryImage(ImageFile):
    """An encoded image that is in memory."""

    data: bytes = b""

    def __str__(self) -> str:
        return str(self.name)

    def open(self) -> BufferedIOBase:
        """Open the encoded image."""
        return BytesIO(self.data)


def as_picture(image: Any, reading: ReadingConfig = AS_STORED) -> Picture:
    """One image as RGB, upright, and which of its pixels hold data.

    Args:
        image: An `ImageLike`, a tensor, or a `Picture`, which is given back.
        reading: What files leave open: ranges, bands.

    Raises:
        UnreadableImage: A file or bytes cannot be decoded.
        DataError: It is no image.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, str | Path):
        return open_picture(Path(image), reading=reading)
    if isinstance(image, Image.Image):
        return picture_of(image, reading)
    encoded = _bytes_of(image)
    if encoded is not None:
        name = "the image that was given as bytes"
        return open_picture(MemoryImage(Path(name), PurePosixPath(name), data=encoded), 0, reading)
    return Picture(Image.fromarray(_array_of(image)))


def as_files(images: Any) -> tuple[ImageFile, ...]:
    """Several images as files, in order; what is no file is kept in memory, encoded as PNG.

    Args:
        images: Any iterable of images, such as a list, a generator, an array "n H W 3" or a data
            set of torch. Of an item (image, label), of a `Sample` and of a dictionary with an
            `image` the image alone counts.

    Raises:
        DataError: It is no iterable of images.
    """
    return tuple(_as_file(item, index) for index, item in enumerate(items_of(images)))


def items_of(images: Any) -> Iterator[Any]:
    """Go through several images without their labels.

    Raises:
        DataError: It is one image, or nothing that has images.
    """
    single = isinstance(images, str | Path | Image.Image) or _bytes_of(images) is not None
    if single or getattr(images, "ndim", 4) not in (1, 4) or isinstance(images, dict):
        raise DataError(
            f"Expected several images, found one {type(images).__name__}. Give a list of them."
        )
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        found: Iterable[Any] = (images[index] for index in range(len(images)))
    elif isinstance(images, Iterable):
        found = images
    else:
        raise DataError(f"Expected several images, found {_named(images)}.")
    for item in found:
        if isinstance(item, Picture):
            yield item
        elif isinstance(item, tuple | list) and item:
            yield item[0]
        elif isinstance(item, dict) and "image" in item:
            yield item["image"]
        else:
            picture = getattr(item, "image", None)
            yield picture if isinstance(picture, Image.Image) else item


def _as_file(image: Any, index: int) -> ImageFile:
    if isinstance(image, ImageFile):
        return image
    if isinstance(image, str | Path):
        return ImageFile(Path(image), PurePosixPath(image))
    encoded = _bytes_of(image)
    if encoded is None:
        try:
            encoded = _encoded(image)
        except DataError as error:
            raise DataError(f"Image {index}: {error}") from None
    name = f"image_{index:06}.png"
    return MemoryImage(Path(name), PurePosixPath(name), data=encoded)


def _encoded(image: Any) -> bytes:
    """An image without loss: its numbers as they are where a format holds them."""
    if isinstance(image, Image.Image):
        picture = turned(image)
        whole = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
        if not whole and picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            picture, whole = as_picture(image).image, False
    else:
        picture, whole = Image.fromarray(_array_of(image)), False
    buffer = BytesIO()
    if whole:
        picture.save(buffer, "TIFF")
    else:
        picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _bytes_of(image: Any) -> bytes | None:
    """The encoded image in bytes or in an open file; None: it is neither."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, BytesIO):
        return image.getvalue()
    if hasattr(image, "read") and not isinstance(image, Image.Image):
        data = image.read()
        if not isinstance(data, bytes):
            raise DataError("Expected a file that was opened in binary mode ('rb'), found text.")
        return data
    return None


def _array_of(image: Any) -> np.ndarray:
    """An array "H W 3" of uint8, from one or from a tensor "3 H W"."""
    found = _named(image)
    if not isinstance(image, np.ndarray):
        if not all(hasattr(image, name) for name in ("movedim", "detach", "cpu", "ndim")):
            raise DataError(f"Expected {EXPECTED}, found {found}.")
        image = image.detach().cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(
            "Expected an image as an array (height, width, 3) or a tensor (3, height, width) of "
            f"uint8, found {found}."
        )
    return np.ascontiguousarray(image)


def _named(value: Any) -> str:
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"
