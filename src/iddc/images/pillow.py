"""What Pillow opens: samples of the depth of the file, and what they are.

Pillow reduces colours of 16 bits to 8, and says neither how many bits of a PNG count nor how many a
JPEG 2000 has. These are read here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import ExifTags, Image, ImageOps

from iddc.images.meaning import Layout, Refused

Samples = tuple[Shaped[np.ndarray, "H W c"], Layout]
_HEADER = 2**16
"""Bytes in which a header must lie: the precision of a JPEG 2000, the significant bits of a PNG."""


def is_plain(image: Image.Image) -> bool:
    """Whether an image has 8 bits, colours or grey, and no transparency: most have."""
    plain = image.mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX")
    return plain and not image.has_transparency_data and not _deep(image)


def _deep(image: Any) -> str | None:
    """The format of an image of more than 8 bits that Pillow would reduce to 8."""
    if image.format == "PNG" and image.tile and str(image.tile[0][3]).endswith(";16B"):
        return "PNG"
    if image.format == "PPM" and image.tile and image.tile[0][0] != "ppm_plain":
        arguments = image.tile[0][3]
        if image.mode in ("I", "RGB") and (image.mode == "I" or "16" in str(arguments)):
            return "PPM"
        if image.tile[0][0] == "ppm" and int(arguments[1]) > 255:
            return "PPM"
    if image.format == "JPEG2000" and (_precision(image) or 8) > 8:
        return "JPEG2000"
    return None


def pillow_layout(image: Image.Image) -> Layout:
    """What a Pillow image says of its samples, from its header."""
    deep, mode = _deep(image), image.mode
    tiles: Any = getattr(image, "tile", ())
    clear = image.info.get("transparency") is not None
    count = {"L": 1, "1": 1, "P": 1, "LA": 2, "La": 2, "CMYK": 4}.get(mode, len(image.getbands()))
    kind, top = "uint8", None
    if mode.startswith("I;16") or deep:
        kind, top = "uint16", _significant(image)
        if deep == "PPM":
            top = _ppm_top(image)
            kind = f"uint{int(top).bit_length()}"
            top = None if kind == "uint16" else top
        if deep == "JPEG2000":
            kind, top = f"uint{_precision(image)}", None
    elif mode in ("I", "F"):
        kind = {"I": "int32", "F": "float32"}[mode]
    if deep == "PNG" and str(tiles[0][3]).startswith("LA"):
        count = 2
    elif kind == "uint8" and (mode in ("PA", "RGBa") or (clear and mode not in ("LA", "RGBA"))):
        count = 4
    elif kind == "uint8" and mode not in ("L", "1", "P", "LA", "La", "RGBA", "CMYK"):
        count = 3
    elif kind != "uint8" and clear:
        count += 1
    alpha = count - 1 if count in (2, 4) and mode != "CMYK" else None
    return Layout(
        size=image.size,
        kind=kind,
        count=count,
        colour="cmyk" if mode == "CMYK" else "grey" if count < 3 and mode != "P" else "rgb",
        top=top,
        alpha=alpha,
        pages=getattr(image, "n_frames", 1),
    )


def pillow_samples(image: Image.Image) -> Samples:
    """Decode a Pillow image to samples of the depth of its file."""
    layout, deep = pillow_layout(image), _deep(image)
    clear = image.info.get("transparency")
    if deep == "PNG":
        values = _png_16_bit(image)
    elif deep == "PPM":
        values = _ppm_16_bit(image)
    elif deep == "JPEG2000":
        values = _jpeg2000(image, layout)
    else:
        image.load()
        if layout.kind == "uint8":
            mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[layout.count]
            if image.mode == "P" and layout.count == 1:
                mode = "RGB"
            image = image if image.mode in (mode, "CMYK") else image.convert(mode)
            values = np.asarray(image)
            layout = _with_count(layout, len(image.getbands()))
            return values.reshape(*values.shape[:2], -1), layout
        values = np.asarray(image)
    values = values.reshape(*values.shape[:2], -1)
    if clear is not None and values.shape[2] == layout.count - 1:
        shown = (values != np.asarray(clear)).any(axis=2, keepdims=True)
        values = np.concatenate([values, shown * np.uint16(65535)], axis=2).astype(values.dtype)
    return values, layout


def _with_count(layout: Layout, count: int) -> Layout:
    if count == layout.count:
        return layout
    return replace(layout, count=count, colour="rgb" if count == 3 else layout.colour)


def _png_16_bit(image: Any) -> np.ndarray:
    """Both bytes of each sample, of which Pillow keeps the high one: it is asked for each."""
    (tile,) = image.tile
    mode = str(tile[3])
    if image.info.get("loop") is not None or getattr(image, "n_frames", 1) > 1:
        raise Refused("animated PNGs of 16 bits are not read")
    if mode == "I;16B":
        return np.array(image)
    if mode.startswith("LA"):
        image.tile = [tile._replace(args="RGBA")]
        high, low = (np.array(image)[..., part::2] for part in (0, 1))
        return _joined(high, low)
    high = np.array(_reopened(image))
    other = _reopened(image)
    other.tile = [other.tile[0]._replace(args=mode.replace("16B", "16L"))]
    return _joined(high, np.array(other))


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    joined: np.ndarray = high.astype(np.uint16) * np.uint16(256) + low
    return joined


def _reopened(image: Any) -> Any:
    """The same file from its beginning."""
    image.fp.seek(0)
    return Image.open(BytesIO(image.fp.read()), formats=[image.format])


def _significant(image: Any) -> float | None:
    """The largest value of the significant bits that a PNG states."""
    if image.format != "PNG" or image.fp is None:
        return None
    stream = image.fp
    where = stream.tell()
    stream.seek(0)
    start = stream.read(_HEADER)
    stream.seek(where)
    position = 8
    while position + 8 <= len(start):
        length, name = struct.unpack(">I4s", start[position : position + 8])
        if name == b"sBIT":
            bits = max(start[position + 8 : position + 8 + min(length, 3)], default=16)
            return float(2**bits - 1) if 0 < bits < 16 else None
        if name == b"IDAT":
            return None
        position += length + 12
    return None


def _ppm_top(image: Any) -> float:
    return float(_ppm_header(image)[2])


def _ppm_header(image: Any) -> tuple[int, int, int, int]:
    """Width, height, largest value and where the samples of a PPM start."""
    stream = image.fp
    where = stream.tell()
    stream.seek(0)
    start = stream.read(_HEADER)
    stream.seek(where)
    gap = rb"(?:\s|#[^\n\r]*[\n\r])+"
    found = re.match(rb"P[56]" + gap + rb"(\d+)" + gap + rb"(\d+)" + gap + rb"(\d+)\s", start)
    if found is None:
        raise Refused("damaged or cut short (its header cannot be read)")
    width, height, top = map(int, found.groups())
    return width, height, top, found.end()


def _ppm_16_bit(image: Any) -> Shaped[np.ndarray, "H W c"]:
    width, height, _, start = _ppm_header(image)
    count = 1 if image.mode == "I" else 3
    stream = image.fp
    stream.seek(start)
    data = stream.read(2 * width * height * count)
    if len(data) < 2 * width * height * count:
        raise Refused("damaged or cut short (it ends before its pixels do)")
    return np.frombuffer(data, ">u2").reshape(height, width, count).astype(np.uint16)


def _precision(image: Any) -> int | None:
    """The bits of a sample of a JPEG 2000, from the marker SIZ; signed ones are negative."""
    stream = image.fp
    if stream is None:
        return None
    where = stream.tell()
    stream.seek(0)
    start: bytes = stream.read(_HEADER)
    stream.seek(where)
    found = start.find(b"\xff\x4f\xff\x51")
    if found < 0 or found + 42 >= len(start):
        return None
    depths = {start[found + 42 + 3 * i] for i in range(min(start[found + 41], 4))} or {7}
    return max(int(depth & 127) + 1 for depth in depths)


def _jpeg2000(image: Any, layout: Layout) -> np.ndarray:
    """Samples of more than 8 bits. Pillow shifts grey up to 16 bits, and colours down to 8."""
    bits = _precision(image) or 16
    if image.mode.startswith("I;16") and bits <= 16:
        return np.asarray(image) >> np.uint16(16 - bits)
    try:
        from imagecodecs import jpeg2k_decode
    except ImportError:
        raise Refused(
            f"colours of {bits} bits in JPEG 2000 need imagecodecs: install it with `pip install "
            "'iddc[codecs]'`"
        ) from None
    stream = image.fp
    stream.seek(0)
    values: np.ndarray = jpeg2k_decode(stream.read())
    if values.shape != (*layout.size[::-1], layout.count) or values.dtype != np.uint16:
        raise Refused(f"its samples are {values.dtype} of shape {values.shape}, expected uint16")
    return values


def orientation_of(image: Any) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 where it cannot be read.

    Its file is opened once more where it is still to be decoded, as a PNG is decoded to find it.
    """
    try:
        if _deep(image):
            image = _reopened(image)
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata must not cost the photo
        return 1


def turned(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, if there is one that can be read."""
    try:
        return ImageOps.exif_transpose(image) if orientation_of(image) != 1 else image
    except Exception:  # damaged metadata must not cost the photo
        return image
