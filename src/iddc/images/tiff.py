"""TIFFs: the samples of one page as numbers, and what the tags say about them.

tifffile reads them. Pillow, which reads every other format, knows neither most numbers nor most
tags of a TIFF; it lends its codecs to images of 8 bits where imagecodecs is not installed.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from io import BufferedIOBase
from typing import IO, Any, cast

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from iddc.images.files import MAX_PIXELS
from iddc.images.meaning import Colour, Layout, Refused

_REDUCED, _MASK = 1, 4
"""Bits of NewSubfileType: a reduced copy of another page, a transparency mask of another page."""
_REFUSED = {
    "CFA": "raw values of a camera's sensor, which a raw converter must develop",
    "LINEAR_RAW": "raw values of a camera, which a raw converter must develop",
    "CIELAB": "colours in L*a*b*",
    "ICCLAB": "colours in L*a*b*",
    "ITULAB": "colours in L*a*b*",
    "LOGL": "brightness as logarithms",
    "LOGLUV": "colours as logarithms",
}
_MAX_PAGES = 100_000
"""The most pages of a file; more are an attack or damage."""
_MAX_SAMPLES = 4 * 10**9
"""The most bytes of the samples of a page."""
_MAX_XML = 10_000_000


class NeedsCodec(Exception):
    """Only imagecodecs, or perhaps Pillow, can unpack the samples."""


@dataclass(frozen=True)
class Plane:
    """One image of a TIFF: the pages of a series that are its channels, and its size."""

    series: Any
    numbers: tuple[int, ...]
    size: tuple[int, int]


@contextmanager
def opened(stream: BufferedIOBase) -> Iterator[Any]:
    """Open a TIFF, without the other files that it may name."""
    import tifffile

    # What tifffile logs, it either raises too or has mended.
    log = logging.getLogger("tifffile")
    log.propagate = False
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    with tifffile.TiffFile(cast("IO[bytes]", stream), _multifile=False) as file:
        yield file


def read_layout(file: Any, page: int = 0, *, limited: bool = True) -> Layout:
    """Say what the tags of a page mean, without decoding it.

    Args:
        file: What `opened` gives.
        page: Which of its images, counted from 0.
        limited: Whether an image that does not fit into memory is refused.

    Raises:
        Refused: There is no such page, or its samples have no colours that we know.
    """
    plane, pages, notes = _find(file, page)
    if limited:
        _refuse_huge(plane)
    return _layout(file, plane, pages, notes)


def read_samples(
    file: Any, stream: BufferedIOBase, page: int = 0
) -> tuple[Shaped[np.ndarray, "H W c"], Layout]:
    """Decode a page; the samples as they are stored, and what they mean.

    Args:
        file: What `opened` gives.
        stream: What it was opened from.
        page: Which of its images, counted from 0.

    Raises:
        Refused: See `read_layout`; or its compression needs imagecodecs.
    """
    plane, pages, notes = _find(file, page)
    _refuse_huge(plane)
    layout = _layout(file, plane, pages, notes)
    parts = [_decoded(file, stream, plane, number, layout) for number in plane.numbers]
    mask = _mask_of(file, plane)
    if mask is not None:
        whole = np.asarray(mask.asarray()) != 0
        parts.append(whole.reshape(*whole.shape[:2], 1).astype(parts[0].dtype))
    return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)), layout


def _find(file: Any, page: int) -> tuple[Plane, int, tuple[str, ...]]:
    """The image number `page`, how many there are, and remarks on those that do not count."""
    every = _planes(file)
    if not every:
        raise Refused("it holds no image")
    real = [plane for plane in every if not _flagged(plane)] or every
    # A thumbnail or a level of a pyramid is often not marked as one: it is a copy at half the
    # size or less.
    planes = [plane for plane in real if not any(_is_copy(plane, other) for other in real)]
    if page >= len(planes):
        raise Refused(f"it has no page {page + 1}, only {len(planes)}")
    notes: tuple[str, ...] = ()
    if page == 0 and planes[0] is not every[0]:
        position = every.index(planes[0]) + 1
        notes = (f"page {position} is read, as those before it are reduced copies",)
    return planes[page], len(planes), notes


def _planes(file: Any) -> list[Plane]:
    """All images of a file: of stacks each plane, of channels all together."""
    planes: list[Plane] = []
    for series in file.series:
        frame = series.keyframe
        size = (frame.imagewidth, frame.imagelength)
        axes = series.axes[: len(series.axes) - len(frame.axes)]
        lengths = series.shape[: len(axes)]
        if series.axes[len(axes) :] != frame.axes:
            axes, lengths = "I", (len(series.pages),)
        total = math.prod(lengths)
        if total > _MAX_PAGES:
            raise Refused(f"claims {total:,} pages")
        numbers = np.arange(total).reshape(lengths)
        if "C" in axes:
            numbers = np.moveaxis(numbers, axes.index("C"), -1).reshape(
                -1, lengths[axes.index("C")]
            )
        else:
            numbers = numbers.reshape(-1, 1)
        planes += [Plane(series, tuple(map(int, row)), size) for row in numbers]
    if len(planes) > _MAX_PAGES:
        raise Refused(f"claims {len(planes):,} pages")
    return planes


def _flagged(plane: Plane) -> bool:
    return bool(int(plane.series.keyframe.subfiletype) & (_REDUCED | _MASK))


def _is_copy(plane: Plane, other: Plane) -> bool:
    """Whether a plane has the shape of another one at half its size or less."""
    (width, height), (wider, higher) = plane.size, other.size
    if not width * height:
        return True
    scale = min(wider / width, higher / height)
    return scale >= 2 and abs(wider / scale - width) <= 2 and abs(higher / scale - height) <= 2


def _mask_of(file: Any, plane: Plane) -> Any:
    """The page that masks an image: the next one, if it is marked as a mask of its size."""
    index = plane.series.keyframe.index
    if len(plane.numbers) != 1 or not isinstance(index, int) or index + 1 >= len(file.pages):
        return None
    after = file.pages[index + 1].aspage()
    flags = int(getattr(after, "subfiletype", 0))
    same = (after.imagewidth, after.imagelength) == plane.size
    return after if flags & _MASK and not flags & _REDUCED and same else None


def _layout(file: Any, plane: Plane, pages: int, notes: tuple[str, ...]) -> Layout:
    # What no picture can be made of.
    frame = plane.series.keyframe
    colours = getattr(frame.photometric, "name", str(frame.photometric))
    if colours in _REFUSED:
        raise Refused(f"its pixels are {_REFUSED[colours]}; convert it to RGB")
    kind = _kind(frame)
    if not plane.size[0] * plane.size[1]:
        raise Refused("it has no pixel")
    if frame.imagedepth > 1 or frame.axes not in ("YX", "YXS", "SYX"):
        raise Refused(f"its pages have the axes {frame.axes}, expected YX or YXS")
    known = {"MINISWHITE": 1, "MINISBLACK": 1, "PALETTE": 1, "RGB": 3, "YCBCR": 3, "SEPARATED": 4}
    if colours not in known:
        raise Refused(f"its colours are of the kind {colours}, which is not known")
    count = frame.samplesperpixel * len(plane.numbers)
    if count < known[colours]:
        raise Refused(f"it has {count} samples a pixel, {colours} takes {known[colours]}")
    # Which sample is transparency: what GDAL wrote of bands goes before what TIFF says.
    extra = tuple(map(int, frame.extrasamples or ()))
    first = next((i for i, kind in enumerate(extra) if kind in (1, 2)), None)
    alpha = None if first is None else frame.samplesperpixel - len(extra) + first
    roles, names = _gdal_bands(frame, count)
    if roles:
        alpha = roles.index("alpha") if "alpha" in roles else alpha
        if alpha is not None and roles[alpha] not in ("alpha", ""):
            alpha = None
    # Which samples are colours, and of which kind.
    rgb = None
    if {"red", "green", "blue"} <= set(roles):
        rgb = (roles.index("red"), roles.index("green"), roles.index("blue"))
    colour: Colour = "bands"
    if colours in ("RGB", "YCBCR"):
        colour = "rgb" if len(plane.numbers) == 1 else "bands"
    elif colours == "PALETTE":
        colour = "palette"
    elif colours == "SEPARATED":
        colour = "cmyk"
    elif count - (alpha is not None) == 1:
        colour = "grey"
    palette = None
    if colour == "palette":
        if frame.colormap is None:
            raise Refused("its palette is missing")
        colormap = np.asarray(frame.colormap).T
        # Some programs write 8 bits, though TIFF has 16; libtiff reads them so, too.
        palette = (colormap // (256 if colormap.max() > 255 else 1)).astype(np.uint8)
    orientation = _tag(frame, 274)
    return Layout(
        size=plane.size,
        kind=kind,
        count=count,
        colour=colour,
        top=_stated_top(frame, kind),
        inverted=colours == "MINISWHITE",
        alpha=alpha,
        premultiplied=first is not None and extra[first] == 1,
        nodata=_nodata(frame),
        rgb=rgb,
        names=names,
        palette=palette,
        orientation=orientation if isinstance(orientation, int) else 1,
        pages=pages,
        masked=_mask_of(file, plane) is not None,
        notes=notes,
    )


def _refuse_huge(plane: Plane) -> None:
    frame, pixels = plane.series.keyframe, plane.size[0] * plane.size[1]
    if pixels > MAX_PIXELS:
        raise Refused(f"claims more than {MAX_PIXELS // 10**6} megapixels")
    size = frame.dtype.itemsize if frame.dtype else 1
    nbytes = pixels * frame.samplesperpixel * len(plane.numbers) * size
    if nbytes > _MAX_SAMPLES:
        raise Refused(f"claims {nbytes / 1e9:.3g} GB of samples")


def _tag(frame: Any, code: int) -> Any:
    tag = frame.tags.get(code)
    return None if tag is None else tag.value


def _kind(frame: Any) -> str:
    """The numbers of a page: uint12, int16, float32."""
    if frame.dtype is None or frame.dtype.kind not in "buif":
        raise Refused(f"its samples are no real numbers of one size ({frame.dtype or 'mixed'})")
    name = {"b": "uint", "u": "uint", "i": "int", "f": "float"}[frame.dtype.kind]
    return f"{name}{frame.bitspersample}"


def _stated_top(frame: Any, kind: str) -> float | None:
    """The largest value of so many bits as MaxSampleValue says, which is often a smaller one."""
    if not kind.startswith("uint"):
        return None
    found = [_tag(frame, code) for code in (281, 341)]
    values = [v for f in found if f is not None for v in (f if isinstance(f, tuple) else (f,))]
    numbers = [int(v) for v in values if isinstance(v, int | float) and math.isfinite(v) and v >= 1]
    bits = max(numbers, default=0).bit_length()
    return float(2**bits - 1) if 0 < bits < frame.bitspersample else None


def _nodata(frame: Any) -> float | None:
    text = _tag(frame, 42113)
    try:
        return float(str(text).strip("\0 \n")) if text is not None else None
    except ValueError:
        return None


def _gdal_bands(frame: Any, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The colours and the names of the bands as GDAL writes them; empty where it does not."""
    text = str(_tag(frame, 42112) or "")[:_MAX_XML]
    roles, names = [""] * count, [""] * count
    for attributes, value in re.findall(r"<Item\b([^>]*)>([^<]*)</Item>", text):
        found = dict(re.findall(r'(\w+)="([^"]*)"', attributes))
        sample = found.get("sample", "")
        if not sample.isdecimal() or int(sample) >= count:
            continue
        if found.get("role") == "colorinterp":
            roles[int(sample)] = value.strip().lower()
        elif found.get("role") == "description":
            names[int(sample)] = unescape(value.strip())
    return tuple(roles) if any(roles) else (), tuple(names) if all(names) else ()


def _decoded(
    file: Any, stream: BufferedIOBase, plane: Plane, number: int, layout: Layout
) -> Shaped[np.ndarray, "H W c"]:
    """The samples of one page of a series."""
    series, frame = plane.series, plane.series.keyframe
    width, height = plane.size
    nbytes = width * height * frame.samplesperpixel * frame.dtype.itemsize
    if number >= len(series.pages):
        # A stack whose planes follow each other, with one directory for all of them (ImageJ).
        if series.dataoffset is None:
            raise Refused(f"its page {number + 1} is missing")
        start = series.dataoffset + number * nbytes
        _check_there(file, [start], [nbytes])
        kind = frame.dtype.newbyteorder(file.byteorder)
        values = file.filehandle.read_array(kind, nbytes // kind.itemsize, start)
        values = values.reshape(frame.shape)
    else:
        page = series.pages[number]
        if page is None:
            raise Refused("its description says that this page lies in another file")
        page = page.aspage()
        _check_there(file, page.dataoffsets, page.databytecounts)
        if frame.photometric == 6:
            # libtiff turns YCbCr into RGB as GDAL does, with the same smoothing of colours.
            return _by_pillow(stream, page, layout, NeedsCodec("its colours are YCbCr"))
        try:
            values = page.asarray(maxworkers=1)
        except (ValueError, NotImplementedError, ImportError) as error:
            if "imagecodecs" in str(error) or isinstance(error, NotImplementedError):
                return _by_pillow(stream, page, layout, NeedsCodec(str(error)))
            raise
    values = np.asarray(values)
    if frame.axes == "SYX":
        return np.moveaxis(values, 0, 2)
    return values.reshape(height, width, frame.samplesperpixel)


def _check_there(file: Any, offsets: Sequence[int], counts: Sequence[int]) -> None:
    size = file.filehandle.size
    if any(offset + count > size for offset, count in zip(offsets, counts, strict=False)):
        raise Refused("damaged or cut short (it ends before its pixels do)")


def _by_pillow(
    stream: BufferedIOBase, page: Any, layout: Layout, needed: NeedsCodec
) -> Shaped[np.ndarray, "H W c"]:
    """The samples of a page that libtiff unpacks: images of 8 bits, which Pillow reads right."""
    packed = getattr(page.compression, "name", page.compression)
    lacking = Refused(
        f"{layout.count} samples of {layout.kind} packed by {packed} need imagecodecs: install it "
        "with `pip install 'iddc[codecs]'`"
    )
    if layout.kind not in ("uint8", "uint1") or not isinstance(page.index, int):
        raise lacking from needed
    stream.seek(0)
    image: Any = Image.open(cast("IO[bytes]", stream), formats=["TIFF"])
    image.seek(page.index)
    if image.mode == "YCbCr":
        image = image.convert("RGB")
    values = np.array(image)
    values = values.reshape(*values.shape[:2], -1)
    if values.shape != (*layout.size[::-1], layout.count):
        raise lacking from needed
    if layout.inverted:  # Pillow has turned it already
        values = ~values if values.dtype == np.bool_ else 255 - values
    return values
