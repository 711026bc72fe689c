"""Find the images that a user has: in a folder, a zip or a list; no image is opened."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from iddc.errors import DataError, one_line
from iddc.images.files import SUFFIXES, ImageFile, meant
from iddc.images.masklike import sort_out

_MAX_LIST = 500_000_000
"""The largest list of paths, in bytes."""
_MAX_NAME = 230
"""The longest part of a name, in bytes, to which a result adds its suffix: systems allow 255."""
_LISTED = 5
"""How many names an error or a note lists before it says how many more there are."""


@dataclass(frozen=True)
class FoundImages:
    """The images of a source, in order, and one-line remarks on what was not read."""

    files: tuple[ImageFile, ...]
    notes: tuple[str, ...] = ()


def find_images(
    source: Path, *, limit: int | None = None, include_masks: bool = False
) -> FoundImages:
    """List the images of a folder, a zip, a text file of paths, or take one image.

    A folder is read with all its subfolders, through links too, sorted by name. If it holds
    `images/`, only that is read, and masks and labels are not (`masklike.sort_out`, which opens a
    few files where names do not decide). A zip is read like a folder, its members in place. A text
    file has one path per line, absolute or relative to its own folder, and keeps its order; all
    that it names is read. Hidden files are ignored.

    Args:
        source: The folder, zip, text file or image.
        limit: Keep this many images, the first ones. It changes no name.
        include_masks: Read masks and labels like photos.

    Raises:
        DataError: The source is missing, unreadable or holds no image.
    """
    suffix = source.suffix.lower()
    try:
        if source.is_dir():
            found = _find_in_folder(source, include_masks)
        elif not source.exists():
            raise DataError(
                f"No such file or folder: {source}. Expected a folder of images, a zip, a text "
                "file of paths, or one image."
            )
        elif not source.is_file():
            raise DataError(f"{source} is neither a folder nor a regular file.")
        elif suffix == ".zip":
            found = _find_in_zip(source, include_masks)
        elif suffix in SUFFIXES:
            found = FoundImages((ImageFile(source, _fitting(PurePosixPath(source.name))),))
        else:
            found = _find_in_list(source)
    except OSError as error:
        raise DataError(f"Cannot read {source}: {error.strerror or error}.") from error
    return FoundImages(found.files[:limit], tuple(map(one_line, found.notes)))


def _find_in_folder(folder: Path, include_masks: bool) -> FoundImages:
    notes: list[str] = []
    seen: set[tuple[int, int]] = set()
    found: dict[PurePosixPath, ImageFile] = {}

    def unreadable(error: OSError) -> None:
        notes.append(f"cannot read the folder {error.filename}: {error.strerror}")

    for here, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            notes.append(f"{here} leads to a folder that is read already")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # which of two links to one folder is followed must not depend on the disk
        for file in (Path(here, name) for name in names):
            name = PurePosixPath(file.relative_to(folder).as_posix())
            found[name] = ImageFile(file, name)
    return _select(found, folder, notes, include_masks)


def _find_in_zip(path: Path, include_masks: bool) -> FoundImages:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
    except OSError:
        raise
    except Exception as error:  # damaged zips make Python raise almost anything
        raise DataError(f"{path} is not a zip that can be read: {error}.") from error
    paths = {member: PurePosixPath(meant(member).replace("\\", "/")) for member in members}
    names = {_safe_name(path): member for member, path in paths.items()}
    found = {name: ImageFile(path, name, member) for name, member in names.items() if name.parts}
    return _select(found, path, [], include_masks)


def _select(
    found: dict[PurePosixPath, ImageFile], source: Path, notes: list[str], include_masks: bool
) -> FoundImages:
    """Keep what is a photo by its name and its look, sorted by name."""
    if any(name.parts[0] == "images" and len(name.parts) > 1 for name in found):
        notes.append(f"reads only images/ of {source}")
        found = {
            (inner := name.relative_to("images")): replace(file, name=inner)
            for name, file in found.items()
            if name.parts[0] == "images" and len(name.parts) > 1
        }
    others: Counter[str] = Counter()
    files = []
    for name in sorted(found, key=lambda name: name.parts):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
            continue
        if name.suffix.lower() in SUFFIXES:
            files.append(found[name])
        else:
            others[name.suffix.lower() or "without suffix"] += 1
    if not include_masks:
        files = _without_masks(files, notes)
    if others:
        notes.append(f"files of other kinds: {_counts(others)}")
    if not files:
        raise DataError(
            f"No image in {source}. Expected files ending in {', '.join(SUFFIXES)}; "
            f"found {'; '.join(notes) or 'no file'}."
        )
    return FoundImages(_distinct(files, notes), tuple(notes))


def _without_masks(files: list[ImageFile], notes: list[str]) -> list[ImageFile]:
    """Leave masks and labels out, and say which and how many."""
    found = sort_out(files)
    if found.masks:
        notes.append(
            f"masks and labels not read as photos ({found.masks.total():,}): "
            f"{_counts(found.masks)}; --include-masks reads them too"
        )
    if found.kept:
        notes.append(
            f"named like masks, but read as photos by their look ({found.kept.total():,}): "
            f"{_counts(found.kept)}"
        )
    return found.photos


def _find_in_list(path: Path) -> FoundImages:
    large = path.stat().st_size > _MAX_LIST
    text = "\0" if large else path.read_bytes().decode("utf-8-sig", errors="replace")
    if "\0" in text or "\ufffd" in text:
        raise DataError(
            f"{path} is neither a folder, a zip, a text file of paths in UTF-8 nor an image "
            f"({', '.join(SUFFIXES)})."
        )
    lines = [line.strip() for line in text.splitlines()]
    base = path.absolute().parent
    # Files are the same if their tidy paths are. They are opened by the path as given, because
    # `a/../b` is not `b` where `a` is a link.
    given = {Path(os.path.normpath(base / line)): path.parent / line for line in lines if line}
    if not given:
        raise DataError(f"{path} lists no path. Expected one image path per line.")
    if not any(file.exists() for file in given.values()):
        raise DataError(
            f"None of the {len(given)} paths in {path} exists; the first was looked for at "
            f"{next(iter(given))}. Paths are absolute or relative to the folder of the list."
        )
    repeated = sum(bool(line) for line in lines) - len(given)
    notes = [f"{path} repeats paths ({repeated})"] if repeated else []
    inside = all(file.is_relative_to(base) for file in given)
    root = base if inside else Path(os.path.commonpath([file.parent for file in given]))
    files = [
        ImageFile(file, _safe_name(PurePosixPath(tidy.relative_to(root).as_posix())))
        for tidy, file in given.items()
    ]
    if masks := sort_out(files).masks:
        notes.append(
            f"looks like masks or labels ({masks.total():,}): {_counts(masks)}; they are read, as "
            f"{path} names them"
        )
    return FoundImages(_distinct(files, notes), tuple(notes))


def _distinct(files: list[ImageFile], notes: list[str]) -> tuple[ImageFile, ...]:
    """Rename a.jpg and a.png to a_jpg.jpg and a_png.png, whose results would share a name.

    Names to which no suffix can be added are cut before; a folder in a list may have none.
    """
    files = [replace(file, name=_fitting(file.name)) for file in files]
    stems = [os.path.splitext(file.name)[0] for file in files]
    counts = Counter(stems)
    taken = {stem for stem, count in counts.items() if count == 1}
    if len(taken) == len(files):
        return tuple(files)
    shared = [str(file.name) for file, stem in zip(files, stems, strict=True) if counts[stem] > 1]
    notes.append(f"results named after stem and suffix, to tell apart: {listed(shared)}")
    result = []
    for file, old in zip(files, stems, strict=True):
        stem, suffix = old, file.name.suffix
        if counts[old] > 1:
            stem = f"{old}_{suffix[1:]}"
            while stem in taken:
                stem += "_"
            taken.add(stem)
        result.append(replace(file, name=PurePosixPath(stem + suffix)))
    return tuple(result)


def _safe_name(path: PurePosixPath) -> PurePosixPath:
    """Drop what could lead out of a folder: roots, drives and `..`."""
    return PurePosixPath(
        *(part for part in path.parts if part.strip("/\\") not in {"", ".."} and part[-1] != ":")
    )


def _fitting(name: PurePosixPath) -> PurePosixPath:
    """Shorten the parts of a name that are too long; they keep their suffixes."""

    def cut(part: str) -> str:
        data = os.fsencode(part)
        if len(data) <= _MAX_NAME:
            return part
        start = data[: _MAX_NAME // 2].decode(errors="ignore")
        return f"{start}~{hashlib.sha256(data).hexdigest()[:16]}{Path(part).suffix[-9:]}"

    return PurePosixPath(*map(cut, name.parts or ("_",)))


def _counts(items: Counter[str]) -> str:
    return listed(f"{name} ({count})" for name, count in items.most_common())


def listed(items: Iterable[str]) -> str:
    """Join the first few items and say how many more there are."""
    every = list(items)
    more = [f"and {len(every) - _LISTED} more"] if len(every) > _LISTED else []
    return ", ".join(every[:_LISTED] + more)
