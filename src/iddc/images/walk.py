"""The files below a folder, in an order that does not depend on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def walk(folder: Path, notes: list[str], watched: dict[str, int]) -> Iterator[str]:
    """The paths of all files below a folder, sorted by their parts; hidden ones are left out.

    Args:
        folder: Where to begin. Links are followed, each folder once.
        notes: Gets a remark on each folder that is left out.
        watched: Gets the time of each folder that is read, see `FoundImages.watched`.

    Raises:
        OSError: A folder is gone.
    """
    seen: set[tuple[int, int]] = set()

    def look_into(prefix: str) -> tuple[list[str], set[str]]:
        """The names of what is in a folder, sorted, and which of them are folders."""
        here = os.path.join(folder, prefix[:-1]) if prefix else str(folder)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            notes.append(f"{here} leads to a folder that is read already")
            return [], set()
        seen.add((status.st_dev, status.st_ino))
        watched[os.path.abspath(here)] = status.st_mtime_ns
        names, folders = [], set()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    names.append(entry.name)
                    if _is_folder(entry):
                        folders.add(entry.name)
        except OSError as error:
            notes.append(f"cannot read the folder {here}: {error.strerror}")
        names.sort()  # which of two links to one folder is followed must not depend on the disk
        return names, folders

    names, folders = look_into("")
    stack = [("", iter(names), folders)]
    while stack:
        prefix, rest, folders = stack[-1]
        for name in rest:
            if name in folders:
                inner = f"{prefix}{name}/"
                names, deeper = look_into(inner)
                stack.append((inner, iter(names), deeper))
                break
            yield prefix + name
        else:
            stack.pop()


def is_hidden(part: str) -> bool:
    """Whether a file or a folder of this name is not read."""
    return part.startswith(".") or part == "__MACOSX"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
