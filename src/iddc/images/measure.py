"""One range for all images: found once before training, in a regular sample of files and pixels.

Only files that leave something open are decoded for it: not photos of 8 bits without transparency.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iddc.config import ReadingConfig
from iddc.errors import UnreadableImage, counted
from iddc.images.check import SURVEYED, Skipped, expand_pages, refuse_many, sample, survey
from iddc.images.decode import read_samples
from iddc.images.files import ImageFile
from iddc.images.find import FoundImages
from iddc.images.listing import without
from iddc.images.lookahead import ahead
from iddc.images.meaning import (
    Layout,
    Rule,
    Span,
    every_nth,
    known_span,
    make_rule,
    may_hide_marks,
    measured_span,
    valid_values,
)

FILES = 64
"""The most files of each kind that are looked at, evenly spread over all."""
_FITTED = 16
"""The most files of each kind whose values are compared with the range of a model."""
_OUTSIDE, _NARROW = 0.25, 0.1
"""The share of values outside of a model's range, and the share of it that they take, beyond which
images do not fit it."""
_BLACK = 0.05
"""The share of pixels that are 0 in all bands, from which on the user is asked about them."""
_VALUES = 2**16
"""The most values that one file adds, so that a large one counts no more than a small one."""


@dataclass(frozen=True)
class Collected:
    """Images that can be read, and how.

    Attributes:
        files: The readable images; of files with several pages, those that are wanted. Of more
            than `check.SURVEYED`, some may turn out to be unreadable when they are used.
        skipped: The others.
        reading: How all of them are shown.
        notes: One-line remarks for the user.
        listed: Where the images come from, if a folder, a zip or a list of paths was listed.
    """

    files: Sequence[ImageFile]
    skipped: list[Skipped]
    reading: ReadingConfig
    notes: tuple[str, ...]
    listed: FoundImages | None = None


def collect(
    files: Sequence[ImageFile], reading: ReadingConfig, *, max_unreadable: float
) -> Collected:
    """Read headers, take the pages that are wanted, and find one range for all images.

    Of more images than `check.SURVEYED`, an even sample is read, unless pages are asked for, which
    only the header of each file can number. The others are read when they are used: those that
    cannot be read, and those of a kind of values that no image of the sample has, are left out
    then, and listed.

    Args:
        files: What was found. Order is kept.
        reading: What the user says.
        max_unreadable: The share of unreadable files that is accepted, in [0, 1].

    Raises:
        DataError: More files cannot be read.
    """
    if len(files) > SURVEYED and reading.pages == "first":
        return _collect_sampled(files, reading, max_unreadable)
    pages = expand_pages(files, reading)
    found = survey(pages, reading)
    reasons = {str(item.file): item.reason for item in found.skipped}
    refuse_many(reasons, len(pages), max_unreadable)
    settled, notes = settle(found.files, found.layouts, reading)
    return Collected(found.files, found.skipped, settled, (*found.notes, *notes))


def _collect_sampled(
    files: Sequence[ImageFile], reading: ReadingConfig, max_unreadable: float
) -> Collected:
    chosen = sample(files)
    found = survey([files[index] for index in chosen], reading)
    unreadable = {item.file: item.reason for item in found.skipped}
    reasons = {str(file): reason for file, reason in unreadable.items()}
    refuse_many(reasons, len(chosen), max_unreadable, "sampled images", sampled=True)
    settled, notes = settle(found.files, found.layouts, reading)
    note = (
        f"the headers of {len(chosen):,} of {len(files):,} images were read, evenly spread; the "
        "others are read when they are used"
    )
    left_out = [index for index in chosen if files[index] in unreadable] if unreadable else []
    readable = without(files, left_out)
    return Collected(readable, found.skipped, settled, (note, *found.notes, *notes))


def settle(
    files: Sequence[ImageFile], layouts: Sequence[Layout], reading: ReadingConfig
) -> tuple[ReadingConfig, tuple[str, ...]]:
    """Find what files leave open, for all of them together.

    Args:
        files: The images, as they will be read.
        layouts: What each says of its samples.
        reading: What the user says; what it says already is kept.

    Returns:
        The same with the ranges and the names of bands that were found, and one line for each.
    """
    # What headers say is enough for most files. Samples of the others are looked at.
    names = _band_names(layouts, reading)
    kinds_seen = reading.kinds or tuple(sorted({layout.described for layout in layouts}))
    reading = reading.model_copy(update={"band_names": names, "kinds": kinds_seen})
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, layout in enumerate(layouts):
        masked = (
            layout.alpha is not None
            and reading.alpha == "auto"
            and not _shows_alpha(layout, reading)
        )
        if leaves_open(layout, reading) or masked:
            kinds[layout.kind].append(index)
    todo = [index for every in kinds.values() for index in _spread(every)]
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    tops: dict[str, float] = {}
    notes: list[str] = []
    no_masks: list[str] = []
    marked: dict[tuple[str, float], list[str]] = defaultdict(list)
    black: list[str] = []

    def look(index: int) -> tuple[Layout, np.ndarray, Rule, tuple[str, ...], float] | None:
        try:
            samples, layout = read_samples(files[index])
            step = every_nth(layout.size)
            sample = samples[::step, ::step]
            rule, remarks = make_rule(layout, reading, sample)
            numbers = valid_values(sample, layout, rule.bands, rule.alpha, rule.marks)
            zeros = float((sample[..., rule.bands] == 0).all(-1).mean()) if sample.size else 0.0
            return layout, numbers, rule, remarks, zeros
        except UnreadableImage:
            return None  # damage is counted where images are used

    # Each sample may show marks of missing data, black borders, useless masks, and values.
    for index, found in ahead(look, todo):
        if found is None:
            continue
        layout, numbers, rule, remarks, zeros = found
        for mark in rule.marks:
            if reading.nodata == "auto":
                marked[layout.kind, mark].append(str(files[index].name))
        if layout.kind.startswith("uint") and layout.nodata is None and zeros >= _BLACK:
            black += [str(files[index].name)] if _lacks_range(layout, reading) else []
        no_masks += [f"{files[index].name}: {remark}" for remark in remarks]
        if _lacks_range(layout, reading):
            values[layout.kind].append(numbers[:: max(1, -(-len(numbers) // _VALUES))])
            tops[layout.kind] = max(tops.get(layout.kind, 0.0), layout.top or 0.0)
    # Marks come before ranges, which are measured without them.
    measured, marks = dict(reading.measured), dict(reading.marks)
    for kind, mark in marked:
        marks[kind] = tuple(sorted({*marks.get(kind, ()), mark}))
    for kind, parts in values.items():
        if sum(map(len, parts)):
            every = np.concatenate(parts)
            every = every[~np.isin(every, marks.get(kind, ()))]
            measured[kind] = measured_span(every, kind, tops[kind] or None)
    # Whatever was decided without the user is said.
    notes += [described(kind, span) for kind, span in _shown(layouts, reading, measured).items()]
    for (_, mark), named in marked.items():
        notes.append(
            f"{mark:.10g} is far from all other numbers and marks pixels without data "
            f"({_first(named)}); --nodata file takes it for a number"
        )
    if black and reading.nodata == "auto":
        notes.append(
            f"a twentieth of the pixels and more is 0 in all bands ({_first(black)}): it is shown "
            "black; if there is no data, give --nodata 0"
        )
    changes: dict[str, object] = {"measured": measured, "marks": marks}
    if no_masks:
        changes["alpha"] = "ignore"
        more = f" (and {len(no_masks) - 1} more)" if len(no_masks) > 1 else ""
        notes.append(f"{no_masks[0]}{more}: alpha channels mask no pixel of these images")
    return reading.model_copy(update=changes), tuple(notes)


def fit_to_model(
    files: Sequence[ImageFile], reading: ReadingConfig
) -> tuple[ReadingConfig, tuple[str, ...]]:
    """How a model sees new images, and in what they differ from those that it was trained on.

    Args:
        files: The new images; those that cannot be read are passed over.
        reading: How the model reads images.

    Returns:
        The same with ranges for kinds of values that the model does not know, and one line for
        each difference.
    """
    some = files
    if len(files) > SURVEYED:
        some = [files[index] for index in sample(files)]
    found = survey(some, reading)
    return fit_layouts(found.files, found.layouts, reading)


def fit_layouts(
    files: Sequence[ImageFile], layouts: Sequence[Layout], reading: ReadingConfig
) -> tuple[ReadingConfig, tuple[str, ...]]:
    """`fit_to_model` where the headers were read already."""
    notes: list[str] = []
    # Kinds of values that no image of the training had.
    strange: dict[str, list[str]] = defaultdict(list)
    for file, layout in zip(files, layouts, strict=True):
        if reading.kinds and layout.described not in reading.kinds:
            strange[layout.described].append(str(file.name))
    for kind, named in strange.items():
        notes.append(
            f"{counted(len(named), 'image')} {'is' if len(named) == 1 else 'are'} {kind} "
            f"({_first(named)}); the model was trained on "
            f"{', '.join(reading.kinds)}"
        )
    # Kinds that the model does not know get a range of their own.
    known = {
        kind: span
        for kind, span in reading.measured.items()
        if reading.range == "auto" and any(layout.kind == kind for layout in layouts)
    }
    open_ones = any(leaves_open(layout, reading) for layout in layouts)
    settled, remarks = settle(files, layouts, reading) if open_ones else (reading, ())
    notes += [line for line in remarks if line not in {*map(described, known, known.values())}]
    # Kinds that it knows keep theirs, so a sample says whether the images still fit.
    for kind, (low, high) in known.items():
        chosen = [
            index
            for index, layout in enumerate(layouts)
            if layout.kind == kind and not layout.exact
        ]
        parts = []
        for index in _spread(chosen)[:: max(1, FILES // _FITTED)]:
            try:
                samples, layout = read_samples(files[index])
            except UnreadableImage:
                continue
            step = every_nth(layout.size)
            sample = samples[::step, ::step]
            rule, _ = make_rule(layout, settled, sample)
            parts.append(valid_values(sample, layout, rule.bands, rule.alpha, rule.marks))
        values = np.concatenate(parts) if parts else np.zeros(0)
        if not values.size:
            continue
        first, last = measured_span(values, kind)
        outside = float(((values < low) | (values > high)).mean())
        if outside > _OUTSIDE or last - first < _NARROW * (high - low):
            notes.append(
                f"the model shows {low:.6g}..{high:.6g} of {kind} as 0..255, and these images have "
                f"{first:.6g}..{last:.6g}, so they look unlike those of the training; --range auto "
                "measures them anew"
            )
    return settled, tuple(notes)


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def described(kind: str, span: Span) -> str:
    """Say how a kind of values is shown: `16-bit images: 0..4095 is shown as 0..255`."""
    bits = kind.lstrip("uintfloa")
    name = {"u": f"{bits}-bit", "i": f"signed {bits}-bit", "f": f"{bits}-bit float"}[kind[0]]
    return f"{name} images: {span[0]:.6g}..{span[1]:.6g} is shown as 0..255"


def leaves_open(layout: Layout, reading: ReadingConfig) -> bool:
    """Whether all files of a set must be looked at to know how this one is shown.

    Its range is not known, or it may hold marks of missing data of which no tag speaks.
    """
    return _lacks_range(layout, reading) or may_hide_marks(layout, reading)


def _lacks_range(layout: Layout, reading: ReadingConfig) -> bool:
    """Whether a file says no range, and neither does `reading`."""
    return reading.range == "auto" and known_span(layout, reading) is None


def _shows_alpha(layout: Layout, reading: ReadingConfig) -> bool:
    return layout.alpha is not None and layout.alpha + 1 in reading.bands


def _spread(indices: list[int]) -> list[int]:
    every = np.linspace(0, len(indices) - 1, min(FILES, len(indices)))
    return [indices[round(position)] for position in every]


def _shown(
    layouts: Sequence[Layout], reading: ReadingConfig, measured: dict[str, Span]
) -> dict[str, Span]:
    """The range of each kind of values of more than 8 bits."""
    if reading.range == "file":
        return {}
    spans: dict[str, Span] = {}
    settled = reading.model_copy(update={"measured": measured})
    for layout in layouts:
        span = known_span(layout, settled)
        if span is not None and layout.kind not in spans and span != _eight_bits(layout):
            spans[layout.kind] = span
    return spans


def _eight_bits(layout: Layout) -> Span | None:
    """The range of a file of at most 8 bits, which nobody needs to be told."""
    return layout.exact if layout.exact and layout.exact[1] <= 255 else None


def _band_names(layouts: Sequence[Layout], reading: ReadingConfig) -> tuple[str, ...]:
    """The names of the bands, if bands are chosen and all files that name theirs agree."""
    if reading.band_names or not reading.bands:
        return reading.band_names
    every = {layout.names for layout in layouts if layout.names}
    first = next((layout.names for layout in layouts if layout.names), ())
    return first if len(every) == 1 and len(first) >= max(reading.bands) else ()
