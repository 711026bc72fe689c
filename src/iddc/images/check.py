"""Sort out the files that are no images, from their headers alone, and say what the others are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from iddc.config import ReadingConfig
from iddc.errors import DataError, UnreadableImage
from iddc.images.decode import AS_STORED, quiet_pillow, read_layout
from iddc.images.files import ImageFile
from iddc.images.find import listed
from iddc.images.meaning import Layout, Refused, chosen_bands

SURVEYED = 2000
"""How many headers are read before images are used. Of more images these are evenly spread, and
the others are read when they are used."""
_CHECK_THREADS = 8


@dataclass(frozen=True)
class Skipped:
    """An image that is left out, and why, in plain words."""

    file: ImageFile
    reason: str


@dataclass(frozen=True)
class Survey:
    """What the headers of some files say.

    Attributes:
        files: The readable ones, in order.
        layouts: What each of them says of its samples.
        formats: The format of each of them.
        skipped: The others.
        notes: Remarks for the user.
    """

    files: list[ImageFile]
    layouts: list[Layout]
    formats: list[str]
    skipped: list[Skipped]
    notes: tuple[str, ...] = ()


def survey(files: Sequence[ImageFile], reading: ReadingConfig = AS_STORED) -> Survey:
    """Read every header, without decoding pixels; damage after the header shows only later.

    Args:
        files: What to look at. Order is kept.
        reading: Which bands are needed.
    """

    def look(file: ImageFile) -> tuple[str, Layout] | str:
        try:
            found = read_layout(file)
            chosen_bands(found[1], reading)
        except UnreadableImage as error:
            return error.reason
        except Refused as error:
            return str(error)
        return found

    # Threads hide the latency of network file systems; parsing itself holds the interpreter lock.
    with quiet_pillow, ThreadPoolExecutor(_CHECK_THREADS) as pool:
        found = list(pool.map(look, files))
    pairs = list(zip(files, found, strict=True))
    read = [(file, *item) for file, item in pairs if not isinstance(item, str)]
    layouts = [layout for _, _, layout in read]
    return Survey(
        [file for file, _, _ in read],
        layouts,
        [kind for _, kind, _ in read],
        [Skipped(file, item) for file, item in pairs if isinstance(item, str)],
        _remarks(layouts, reading),
    )


def _remarks(layouts: Sequence[Layout], reading: ReadingConfig) -> tuple[str, ...]:
    """What is left out of the files, or taken for what they do not say, in one line each."""
    notes = []
    several = [layout.pages for layout in layouts if layout.pages > 1]
    if several and reading.pages == "first":
        counts = f"{min(several)} to {max(several)}" if min(several) < max(several) else several[0]
        notes.append(
            f"{len(several):,} files have {counts} pages, of which the first is read; --pages all "
            "reads each as an image"
        )
    notes += _counted(note for layout in layouts for note in layout.notes)
    if not reading.bands:
        more = Counter(
            (layout.count - (layout.alpha is not None), layout.colour)
            for layout in layouts
            if layout.rgb is None and layout.colour in ("rgb", "bands")
        )
        for (count, colour), files in more.items():
            if count > 3:
                notes.append(f"{files:,} files have {count} bands, of which 1 2 3 are read as RGB")
            elif colour == "bands":
                notes.append(f"{files:,} files have 3 bands without colours, read as RGB")
    return tuple(notes)


def _counted(notes: Iterable[str]) -> list[str]:
    return [f"{note} ({count:,} files)" for note, count in Counter(notes).items()]


def expand_pages(files: Sequence[ImageFile], reading: ReadingConfig) -> Sequence[ImageFile]:
    """Make every wanted page of a file an image of its own, named `name#0003` by its number.

    Files of one page keep their name, as do those that cannot be read or have no wanted page:
    `survey` says why they are left out.
    """
    if reading.pages == "first":
        return files

    def pages(file: ImageFile) -> list[ImageFile]:
        try:
            _, layout = read_layout(file)
        except UnreadableImage:
            return [file]
        wanted = range(1, layout.pages + 1) if isinstance(reading.pages, str) else reading.pages
        there = [page for page in wanted if page <= layout.pages]
        if layout.pages == 1 and there:
            return [file]
        if not there:
            return [replace(file, page=min(wanted) - 1)]
        name = file.name
        return [
            replace(file, page=page - 1, name=name.with_name(f"{name.stem}#{page:04}{name.suffix}"))
            for page in there
        ]

    with quiet_pillow, ThreadPoolExecutor(_CHECK_THREADS) as pool:
        return tuple(page for found in pool.map(pages, files) for page in found)


def check_images(
    files: Sequence[ImageFile], *, max_unreadable: float
) -> tuple[list[ImageFile], list[Skipped]]:
    """Sort out the files that are no images by their headers.

    Args:
        files: What to check. Order is kept.
        max_unreadable: The share of unreadable files that is accepted, in [0, 1].

    Raises:
        DataError: The share of unreadable files exceeds `max_unreadable`.
    """
    found = survey(files)
    reasons = {str(item.file): item.reason for item in found.skipped}
    refuse_many(reasons, len(files), max_unreadable)
    return found.files, found.skipped


def sample(files: Sequence[ImageFile]) -> list[int]:
    """The indices of the images whose headers are read before they are used, in order."""
    count = min(SURVEYED, len(files))
    return [index * len(files) // count for index in range(count)]


def refuse_many(
    reasons: Mapping[str, str],
    total: int,
    max_unreadable: float,
    kind: str = "images",
    *,
    sampled: bool = False,
) -> None:
    """Raise if too many images cannot be read: then the user should know before the result is used.

    Args:
        reasons: The name of each unreadable image, and why it is.
        total: The number of all images, unreadable ones too.
        max_unreadable: The share of unreadable ones that is accepted, in [0, 1].
        kind: What the images are called in the message.
        sampled: Whether the images stand for more. Then the share must be larger by four standard
            errors, so that chance refuses nothing.

    Raises:
        DataError: There are more.
    """
    variance = max_unreadable * (1 - max_unreadable) * total if sampled else 0.0
    if len(reasons) > max_unreadable * total + 4 * math.sqrt(variance):
        raise DataError(
            f"{len(reasons)} of {total} {kind} cannot be read, more than the "
            f"{100 * max_unreadable:g}% allowed by --max-unreadable: "
            f"{listed(f'{name} ({reason})' for name, reason in reasons.items())}. "
            "Repair or remove them, or allow a larger share."
        )
