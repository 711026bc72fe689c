"""What the samples of a file mean: the one place that turns them into red, green and blue.

A reader (Pillow, tifffile, rasterio) gives numbers and a `Layout`, which is what the file says
about them. Everything that is decided from there on is decided here, pixel by pixel, so that a
photo, a crop, a tile of a raster and an array show the same colours for the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image

from iddc.config import ReadingConfig

Colour = Literal["grey", "rgb", "palette", "cmyk", "bands"]
"""What the samples of a pixel are; bands: the file does not say."""
PERCENTILES = (0.1, 99.9)
"""The share of the values, in percent, below what becomes 0 and above what becomes 255."""
SAMPLED = 512
"""The longest side of the regular sample of a file on which ranges are measured, in pixels."""
HUGE = 1e30
"""Floats beyond this are no measurements but marks of missing data that the file does not name."""
MARKS = (-999.0, -9999.0, -99999.0, -32767.0, -32768.0, -2147483648.0)
"""Numbers that by custom mark pixels without data, also where the file does not say so."""
_MARKED = 0.01
"""The share of pixels that must have another number exactly for it to be such a mark."""
_VARIED = 16
"""So many different numbers must be left for it to be one."""
_MOST_MIDDLE = 0.5
"""The share of pixels between 0 and the top above which an alpha channel is none."""
_NEAR = 0.9
"""A range that fills this share of a round one (0..4095, 0..1) becomes the round one."""
_ROWS = 2**22
"""Values that are scaled at once, so that a large image needs no second copy in float."""


class Refused(Exception):
    """An image that is read by nobody or is no photo, and why, in plain words."""


Span = tuple[float, float]
"""The values that become 0 and 255."""


@dataclass(frozen=True, eq=False)
class Layout:
    """What a file says about its samples.

    Attributes:
        size: Width and height as stored, before the orientation is applied.
        kind: The numbers: `uint8`, `uint12`, `int16`, `float32`.
        count: Samples of a pixel.
        colour: What they are.
        top: The largest number that the file says is possible.
        inverted: Whether 0 is white.
        alpha: The sample that says how opaque a pixel is.
        premultiplied: Whether colours are multiplied by it already.
        nodata: The number that marks a pixel without data.
        rgb: The samples that the file calls red, green and blue.
        names: What the file calls its samples; empty if it does not.
        palette: The colours of a palette.
        orientation: The EXIF orientation, 1 to 8.
        pages: How many images the file holds.
        masked: Whether one more sample follows, which is 0 where there is no data.
        notes: Remarks on how it is read.
    """

    size: tuple[int, int]
    kind: str
    count: int
    colour: Colour
    top: float | None = None
    inverted: bool = False
    alpha: int | None = None
    premultiplied: bool = False
    nodata: float | None = None
    rgb: tuple[int, int, int] | None = None
    names: tuple[str, ...] = ()
    palette: UInt8[np.ndarray, "n 3"] | None = field(default=None, repr=False)
    orientation: int = 1
    pages: int = 1
    masked: bool = False
    notes: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """What it holds, in two words: `uint8 rgb`, `uint16 grey`, `float32 5 bands`."""
        shown = self.count - (self.alpha is not None)
        if self.colour in ("rgb", "palette", "cmyk") or self.rgb is not None:
            return f"{self.kind} rgb"
        return f"{self.kind} grey" if shown == 1 else f"{self.kind} {shown} bands"

    @property
    def exact(self) -> Span | None:
        """The range that needs no look at any value: that of at most 15 bits, or as stated."""
        if self.colour == "palette":
            return 0.0, 255.0
        bits = int(self.kind.removeprefix("uint")) if self.kind.startswith("uint") else 16
        if bits < 16:
            return 0.0, self.top if self.top and bits > 8 else float(2**bits - 1)
        return None


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as the method sees it, and which of its pixels hold data; None: all of them."""

    image: Image.Image
    valid: Bool[np.ndarray, "H W"] | None = None


@dataclass(frozen=True)
class Rule:
    """How the samples of one file become red, green and blue; the same for all its pixels.

    Attributes:
        bands: One sample for grey, or three.
        span: What becomes 0 and 255.
        alpha: The sample that masks pixels, if one does.
        opaque: Its largest value.
        marks: Numbers that mark pixels without data, beside the one that the file names.
    """

    bands: tuple[int, ...]
    span: Span
    alpha: int | None = None
    opaque: float = 255.0
    marks: tuple[float, ...] = ()


def chosen_bands(layout: Layout, reading: ReadingConfig) -> tuple[int, ...]:
    """The samples that are shown, counted from 0: one for grey or three.

    Raises:
        Refused: The file does not say which are red, green and blue, nor does `reading`, or
            it has no such band.
    """
    have = f"{layout.count} {'band' if layout.count == 1 else 'bands'} of {layout.kind}"
    if layout.names:
        have += f" ({', '.join(layout.names[:20])})"
    if reading.bands:
        if layout.colour == "palette":
            raise Refused("--bands: its pixels are colours of a palette, not bands")
        wanted = reading.bands
        if reading.band_names and layout.names and reading.band_names != layout.names:
            # Another order of the same bands is no other picture.
            missing = [name for name in _named(reading) if name not in layout.names]
            if missing:
                raise Refused(
                    f"it has {have}; the model was trained on {', '.join(_named(reading))}"
                )
            wanted = tuple(layout.names.index(name) + 1 for name in _named(reading))
        if max(wanted) > layout.count:
            raise Refused(f"--bands asks for band {max(wanted)}, and it has {have}")
        return tuple(band - 1 for band in wanted)
    if layout.rgb is not None:
        return layout.rgb
    if layout.colour in ("grey", "palette"):
        return (0,)
    if layout.colour == "cmyk":
        return (0, 1, 2, 3)
    if layout.colour == "rgb" or layout.count - (layout.alpha is not None) == 3:
        return tuple(band for band in range(layout.count) if band != layout.alpha)[:3]
    raise Refused(
        f"it has {have}, and does not say which are red, green and blue: choose them with --bands, "
        "such as --bands 3 2 1, or one of them for grey"
    )


def _named(reading: ReadingConfig) -> list[str]:
    return [reading.band_names[band - 1] for band in reading.bands]


def make_rule(
    layout: Layout, reading: ReadingConfig, sample: Shaped[np.ndarray, "h w c"]
) -> tuple[Rule, tuple[str, ...]]:
    """Decide how a file is shown, from what it says and from a regular sample of its pixels.

    Args:
        layout: What the file says.
        reading: What the user or the model says.
        sample: As `every_nth` gives it; it is looked at only where file and model leave it open.

    Returns:
        The rule, and remarks on it.

    Raises:
        Refused: See `chosen_bands`.
    """
    bands = chosen_bands(layout, reading)
    notes: list[str] = []
    alpha, opaque = layout.alpha, 255.0
    if alpha is not None and (alpha in bands or reading.alpha == "ignore"):
        alpha = None
    elif alpha is not None:
        values = sample[..., alpha]
        opaque = _opaque(layout, values)
        reason = no_mask(values, opaque)
        if reason:
            notes.append(
                f"its alpha channel is no mask ({reason}); the colours are taken as they are"
            )
            alpha = None
    marks = reading.marks.get(layout.kind, ()) if reading.nodata == "auto" else ()
    if isinstance(reading.nodata, float) and layout.colour != "palette":
        marks = (reading.nodata,)
    if may_hide_marks(layout, reading):
        found = undeclared_marks(valid_values(sample, layout, bands, alpha, marks))
        marks = (*marks, *(mark for mark in found if mark not in marks))
    span = known_span(layout, reading)
    if span is None:
        values = valid_values(sample, layout, bands, alpha, marks)
        span = measured_span(values, layout.kind, layout.top)
    return Rule(bands, span, alpha, opaque, marks), tuple(notes)


def may_hide_marks(layout: Layout, reading: ReadingConfig) -> bool:
    """Whether numbers must be looked at to know which of them mark missing data."""
    signed = not layout.kind.startswith("uint") and layout.colour != "palette"
    return signed and reading.nodata == "auto"


def undeclared_marks(values: Shaped[np.ndarray, " n"]) -> tuple[float, ...]:
    """Find the numbers that mark missing data though no file says so.

    It is the smallest or the largest number, if it is far from all others: one of `MARKS`, at
    least as far as half of the others' range; another number but 0, twice as far as their range
    and in a hundredth of the pixels at least.

    Args:
        values: A sample of those that are not known to be marks.
    """
    found: list[float] = []
    numbers, counts = np.unique(values, return_counts=True)
    for end in (0, -1):
        if len(numbers) < 3:
            break
        mark, count = float(numbers[end]), int(counts[end])
        others, weights = (x[1:] if end == 0 else x[:-1] for x in (numbers, counts))
        # The range of the others, without a few that lie apart.
        place = np.searchsorted(weights.cumsum(), weights.sum() * np.array([0.001, 0.999]))
        low, high = others[place.clip(0, len(others) - 1)].astype(np.float64)
        gap = float(others[0]) - mark if end == 0 else mark - float(others[-1])
        usual = mark in MARKS and gap >= (high - low) / 2
        rare = mark == 0 or len(others) < _VARIED or count < _MARKED * len(values)
        if gap > 0 and (usual or (not rare and gap >= 2 * (high - low))):
            found.append(mark)
            numbers, counts = others, weights
    return tuple(found)


def known_span(layout: Layout, reading: ReadingConfig) -> Span | None:
    """The range of a file where no value has to be looked at, else None.

    Files of at most 8 bits have all their 2^n values, whatever is chosen for others.
    """
    exact = layout.exact
    if exact is not None and (exact[1] <= 255 or reading.range == "auto"):
        return exact
    if isinstance(reading.range, tuple):
        return reading.range
    return reading.measured.get(layout.kind) if reading.range == "auto" else None


def every_nth(size: tuple[int, int]) -> int:
    """The step of the regular sample of a file of this width and height."""
    return max(1, math.ceil(max(size) / SAMPLED))


def valid_values(
    values: Shaped[np.ndarray, "h w c"],
    layout: Layout,
    bands: tuple[int, ...],
    alpha: int | None,
    marks: tuple[float, ...] = (),
) -> Shaped[np.ndarray, " n"]:
    """The values of some bands, of the pixels that hold data."""
    valid = _holds_data(values, layout, bands, marks)
    if alpha is not None:
        opaque = values[..., alpha] != 0
        valid = opaque if valid is None else valid & opaque
    picked = values[..., bands]
    return (picked if valid is None else picked[valid]).ravel()


def measured_span(values: Shaped[np.ndarray, " n"], kind: str, top: float | None = None) -> Span:
    """The range of some values: two percentiles, or the round range that they nearly fill.

    Args:
        values: Finite, in any order; none: 0 to 1.
        kind: See `Layout`.
        top: The largest value that the file says is possible.
    """
    if not values.size:
        return 0.0, 1.0
    numbers = values.astype(np.float64)
    low = float(np.percentile(numbers, PERCENTILES[0], method="lower"))
    high = float(np.percentile(numbers, PERCENTILES[1], method="higher"))
    if top is not None and low >= 0 and high <= top:
        return 0.0, top
    rounds = [1.0] if kind.startswith("float") else []
    rounds += [float(2**bits - 1) for bits in (*range(8, 17), 32)]
    for end in rounds:
        if 0 <= low <= (1 - _NEAR) * end and _NEAR * end <= high <= end * (1 + 1e-6):
            return 0.0, end
    return low, high


def no_mask(alpha: Shaped[np.ndarray, "h w"], opaque: float) -> str | None:
    """Why an alpha channel cannot be a mask; None if it can."""
    if not alpha.any():
        return "it is 0 everywhere"
    middle = float(((alpha > 0) & (alpha < opaque)).mean())
    if middle > _MOST_MIDDLE:
        return f"{middle:.0%} of it lies between transparent and opaque"
    return None


def _opaque(layout: Layout, alpha: Shaped[np.ndarray, "h w"]) -> float:
    """The value of an opaque pixel. GDAL writes 255 whatever the type."""
    if layout.kind.startswith("uint") and (layout.exact or (0, 0))[1] <= 255 and layout.exact:
        return layout.exact[1]
    most = float(np.nan_to_num(alpha).max()) if alpha.size else 0.0
    tops = [1.0, 255.0, 65535.0] if layout.kind.startswith("float") else [255.0, 4095.0, 65535.0]
    if layout.exact:
        tops = [layout.exact[1]]
    return next((top for top in tops if most <= top), most)


def _holds_data(
    values: Shaped[np.ndarray, "h w c"],
    layout: Layout,
    bands: tuple[int, ...],
    marks: tuple[float, ...] = (),
) -> Bool[np.ndarray, "h w"] | None:
    """Which pixels hold data as far as their colours say; None: all of them.

    Of unsigned integers any value may be a colour, so all bands must have the value that marks no
    data; otherwise one is enough, as no colour can be made of the rest.
    """
    picked = values[..., bands]
    valid: np.ndarray | None = None
    if layout.masked:
        valid = values[..., -1] != 0
    if picked.dtype.kind == "f":
        real = np.isfinite(picked)
        if picked.dtype.itemsize > 2:  # 16 bits end at 65504
            real &= np.abs(picked) < HUGE
        finite = real.all(axis=-1)
        valid = finite if valid is None else valid & finite
    declared = () if layout.nodata is None else (layout.nodata,)
    for mark in (*declared, *marks):
        if not math.isfinite(mark):
            continue
        marked = picked == _as_stored(mark, picked.dtype)
        missing = marked.all(axis=-1) if picked.dtype.kind in "ub" else marked.any(axis=-1)
        valid = ~missing if valid is None else valid & ~missing
    return valid


def _as_stored(nodata: float, kind: np.dtype) -> float:
    """A number as a file of this type can hold it: -3.4e38 is another one in 32 bits."""
    with np.errstate(over="ignore"):
        return float(np.float64(kind.type(nodata))) if kind.kind == "f" else nodata


def show(values: Shaped[np.ndarray, "H W c"], layout: Layout, rule: Rule) -> Picture:
    """Show samples as RGB, 8 bit: scaled to the range, laid over white where there is no data.

    The orientation of the file is not applied here.
    """
    valid = _holds_data(values, layout, rule.bands, rule.marks)
    if layout.colour == "palette":
        assert layout.palette is not None
        rgb = layout.palette[np.minimum(values[..., 0], len(layout.palette) - 1)]
    else:
        shown = scaled(values[..., rule.bands], rule.span)
        if layout.inverted:
            shown = 255 - shown
        if layout.colour == "cmyk" and len(rule.bands) == 4:
            shown = np.asarray(Image.fromarray(shown, "CMYK").convert("RGB"))
        rgb = np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown
    if rule.alpha is not None:
        alpha = values[..., rule.alpha]
        opaque = alpha != 0
        valid = opaque if valid is None else valid & opaque
        rgb = _over_white(rgb, alpha, rule.opaque, layout.premultiplied)
    if valid is not None and not valid.all():
        rgb = np.where(valid[..., None], rgb, np.uint8(255))
    elif valid is not None:
        valid = None
    return Picture(Image.fromarray(np.ascontiguousarray(rgb, dtype=np.uint8)), valid)


def scaled(values: Shaped[np.ndarray, "H W c"], span: Span) -> UInt8[np.ndarray, "H W c"]:
    """Scale and clip values so that a range becomes 0..255, rounded to the nearest."""
    low, high = span
    if values.dtype == np.uint8 and span == (0.0, 255.0):
        return values
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)

    def scale(part: np.ndarray) -> np.ndarray:
        # Halves, which are exact: the span of all its numbers is more than a float can hold.
        halves = np.nan_to_num(part).astype(np.float64) / 2  # marks of no number first: they warn
        width = high / 2 - low / 2
        width = width if width > 0 else 0.5
        shares = (halves.clip(low / 2, low / 2 + width) - low / 2) / width
        return np.asarray(np.rint(shares * 255).astype(np.uint8))

    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        table = scale(np.arange(2 ** (8 * values.dtype.itemsize)))
        return np.asarray(table[values], np.uint8)
    result = np.empty(values.shape, np.uint8)
    step = max(1, _ROWS // max(1, values[:1].size))
    for first in range(0, len(values), step):
        result[first : first + step] = scale(values[first : first + step])
    return result


def _over_white(
    rgb: UInt8[np.ndarray, "H W 3"], alpha: np.ndarray, opaque: float, premultiplied: bool
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay colours over white: what lies under a transparent pixel is arbitrary."""
    share = scaled(alpha[..., None], (0.0, opaque))
    if (share == 255).all():
        return rgb
    weight = share.astype(np.uint16)
    colour = rgb.astype(np.uint16) * (255 if premultiplied else weight)
    return ((colour + (255 - weight) * 255 + 127) // 255).clip(0, 255).astype(np.uint8)


def upright(picture: Picture, orientation: int) -> Picture:
    """Turn a picture as its EXIF orientation says (CIPA DC-008)."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    if turn is None:
        return picture
    valid = picture.valid
    if valid is not None:
        mask = Image.fromarray(valid.astype(np.uint8)).transpose(turn)
        valid = np.asarray(mask) != 0
    return Picture(picture.image.transpose(turn), valid)
