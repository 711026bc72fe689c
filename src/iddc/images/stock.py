"""What a source holds, before anything is trained: counts, ranges, copies, what cannot be read."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from iddc.config import ReadingConfig
from iddc.errors import UnreadableImage
from iddc.images.check import Skipped, expand_pages, survey
from iddc.images.decode import open_image
from iddc.images.files import ImageFile
from iddc.images.measure import settle

_THREADS = 8
_TIMED = 3
"""How many images are decoded to see how long one takes."""


@dataclass(frozen=True)
class Stock:
    """What was found in a source.

    Attributes:
        files: The images that can be read, one for each page that is wanted.
        skipped: The others.
        counts: For each property, how many images have which value of it.
        copies: Groups of files of the same bytes.
        reading: How the images would be shown.
        notes: Remarks on ranges, bands and pages, a line each.
        seconds: How long it takes to decode one image here.
    """

    files: list[ImageFile]
    skipped: list[Skipped]
    counts: dict[str, Counter[str]]
    copies: list[list[ImageFile]]
    reading: ReadingConfig
    notes: tuple[str, ...]
    seconds: float


def take_stock(files: Sequence[ImageFile], reading: ReadingConfig) -> Stock:
    """Look at every header, at all bytes where two files are equally long, and at some pixels.

    Args:
        files: What was found.
        reading: What the user says of ranges, bands and pages.
    """
    found = survey(expand_pages(files, reading), reading)
    settled, notes = settle(found.files, found.layouts, reading)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, layout in zip(found.formats, found.layouts, strict=True):
        counts["format"][kind] += 1
        counts["size"][f"{layout.size[0]} x {layout.size[1]}"] += 1
        counts["values"][layout.kind] += 1
        counts["bands"][str(layout.count)] += 1
        counts["pages"][str(layout.pages)] += 1
    return Stock(
        found.files,
        found.skipped,
        dict(counts),
        find_copies(files),
        settled,
        (*found.notes, *notes),
        decoding_seconds(found.files, settled),
    )


def find_copies(files: Sequence[ImageFile]) -> list[list[ImageFile]]:
    """Group the files that have the same bytes, in order; files that are alone are left out."""
    sizes: dict[int, list[ImageFile]] = defaultdict(list)
    for file in files:
        try:
            sizes[file.size()].append(file)
        except (OSError, KeyError, UnreadableImage):
            continue  # `survey` names it

    def fingerprint(file: ImageFile) -> bytes:
        try:
            return hashlib.sha256(file.read_bytes()).digest()
        except Exception:  # a damaged member of a zip
            return repr(file).encode()

    alike = [file for group in sizes.values() if len(group) > 1 for file in group]
    groups: dict[bytes, list[ImageFile]] = defaultdict(list)
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, digest in zip(alike, pool.map(fingerprint, alike), strict=True):
            groups[digest].append(file)
    return [group for group in groups.values() if len(group) > 1]


def decoding_seconds(files: Sequence[ImageFile], reading: ReadingConfig) -> float:
    """The time that one image takes, of a few that are evenly spread."""
    chosen = files[:: max(1, len(files) // _TIMED)][:_TIMED]
    started, decoded = time.perf_counter(), 0
    for file in chosen:
        try:
            open_image(file, 0, reading)
        except UnreadableImage:
            continue
        decoded += 1
    return (time.perf_counter() - started) / max(1, decoded)
