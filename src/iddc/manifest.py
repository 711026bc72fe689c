"""What was found of a large collection, kept beside a run, so that going on need not list it again.

The manifest holds the names of all images, the time of every folder that was listed, and size and
time of every image. A folder that has changed since is listed again. An image that has changed is
left out when it is used, with the reason.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iddc.errors import SetupError
from iddc.images import FoundImages, find_images
from iddc.images.listing import Listing, Texts
from iddc.runs import WRITTEN, write_atomic

MANIFEST = "manifest.npz"
"""The name of the manifest in the folder of a run. Without it everything is listed again."""
LARGE = 10_000
"""Smaller collections have none, as they are listed at once."""


def find_listed(
    source: Path, run: Path, *, limit: int | None = None, include_masks: bool = False
) -> FoundImages:
    """Find the images of a source as `find_images` does, in the manifest of a run if it holds them.

    Args:
        source: See `find_images`.
        run: The folder that may have a manifest.
        limit: See `find_images`.
        include_masks: See `find_images`.

    Raises:
        DataError: See `find_images`.
    """
    try:
        with (run / MANIFEST).open("rb") as file, np.load(file, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if about["of"] == _request(source, limit, include_masks) and _unchanged(about):
                listing = Listing(
                    Path(about["base"]),
                    Texts(kept["paths"].tobytes()),
                    Texts(kept["names"].tobytes()),
                    packed=about["packed"],
                    stamps=kept["stamps"] if len(kept["stamps"]) else None,
                )
                return FoundImages(listing, tuple(about["notes"]), about["watched"])
    except Exception:  # none, a damaged one, or another version: all is listed again
        pass
    return find_images(source, limit=limit, include_masks=include_masks)


@contextmanager
def kept(
    found: FoundImages, source: Path, run: Path, *, limit: int | None, include_masks: bool
) -> Iterator[None]:
    """Write the manifest of a large collection into a run, in a thread, while the work goes on.

    Args:
        found: What `find_listed` gave.
        source: See `find_listed`.
        run: The folder to write to.
        limit: See `find_listed`.
        include_masks: See `find_listed`.
    """
    files = found.files
    if (
        not isinstance(files, Listing)
        or len(files) < LARGE
        or files.stamps is not None
        or not found.watched
    ):
        yield
        return
    # What tells this collection from another, and what was remarked on it.
    about = {
        **WRITTEN,
        "of": _request(source, limit, include_masks),
        "base": str(files.base),
        "packed": files.packed,
        "notes": found.notes,
        "watched": found.watched,
    }
    # Size and time of a million files take seconds, during which the training has begun.
    ended = threading.Event()

    def write() -> None:
        stamps = None if files.packed else _stamps(files, ended)
        if ended.is_set():
            return
        data = io.BytesIO()
        arrays: dict[str, Any] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "paths": np.frombuffer(Texts.of(files.texts()).packed, np.uint8),
            "names": np.frombuffer(Texts.of(files.names()).packed, np.uint8),
            "stamps": np.empty((0, 2), np.int64) if stamps is None else stamps,
        }
        np.savez(data, allow_pickle=False, **arrays)
        try:
            write_atomic(run / MANIFEST, data.getbuffer())
        except SetupError:
            return  # a full disk is said by what needs it

    thread = threading.Thread(target=write, name="iddc-manifest", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _request(source: Path, limit: int | None, include_masks: bool) -> list[Any]:
    return [os.path.abspath(source), limit, include_masks]


def _unchanged(about: dict[str, Any]) -> bool:
    """Whether the folders, the zip or the list are as they were."""
    watched: dict[str, int] = about["watched"]
    return all(os.stat(path).st_mtime_ns == time for path, time in watched.items())


def _stamps(files: Listing, ended: threading.Event) -> np.ndarray | None:
    """Size and time of every image, -1 where it is gone; none if a time is after the year 2262."""
    stamps = np.full((len(files), 2), -1, np.int64)
    for index, file in enumerate(files):
        if ended.is_set():
            break
        try:
            status = os.stat(file.path)
        except OSError:
            continue
        try:
            stamps[index] = status.st_size, status.st_mtime_ns
        except OverflowError:
            return None
    return stamps
