"""Find the images that a user has: in a folder, a zip or a list; no image is opened."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from iddc.errors import DataError, one_line
from iddc.images import parquet, tar
from iddc.images.files import SUFFIXES, ImageFile, meant
from iddc.images.listing import Listing, Texts
from iddc.images.masklike import sort_out
from iddc.images.parquet import cells_of
from iddc.images.remote import RemoteImage, address_of, list_below
from iddc.images.tar import members_of
from iddc.images.walk import is_hidden, walk

_MAX_LIST = 500_000_000
"""The largest list of paths, in bytes."""
_MAX_NAME = 230
"""The longest part of a name, in bytes, to which a result adds its suffix: systems allow 255."""
_UNSAFE = re.compile(r"[\\:]|^/|//|(^|/)\.\.?(/|$)|^$")
"""What a path has at least that is no name of a result as it is."""
_LISTED = 5
"""How many names an error or a note lists before it says how many more there are."""


@dataclass(frozen=True)
class FoundImages:
    """The images of a source, in order, and one-line remarks on what was not read."""

    files: Sequence[ImageFile]
    notes: tuple[str, ...] = ()
    watched: Mapping[str, int] = field(default_factory=dict)
    """The folders, the zip or the list that were read, and when each was changed last before, in
    nanoseconds: while these times stay, there are no more images and no fewer."""


def find_images(
    source: Path, *, limit: int | None = None, include_masks: bool = False
) -> FoundImages:
    """List the images of a folder, a zip, tars, Parquet files, a list of paths, or take one image.

    A folder is read with all its subfolders, through links too, sorted by name. If it holds
    `images/`, only that is read, and masks and labels are not (`masklike.sort_out`, which opens a
    few files where names do not decide). A zip is read like a folder, its members in place. A text
    file has one path per line, absolute or relative to its own folder, and keeps its order; all
    that it names is read. A tar, or a folder with no image but tars, such as the shards of
    WebDataset, is read in place, tar by tar; so are Parquet files. Hidden files are ignored.
    What lies below an address, such as s3://bucket/photos, is read like a folder.

    Args:
        source: The folder, zip, text file or image.
        limit: Keep this many images, the first ones. It changes no name.
        include_masks: Read masks and labels like photos.

    Raises:
        DataError: The source is missing, unreadable or holds no image.
        SetupError: A server refuses or does not answer, or an extra is missing.
    """
    suffix = source.suffix.lower()
    watched: dict[str, int] = {}
    try:
        if url := address_of(source):
            found = _find_at(url, include_masks)
        elif source.is_dir():
            found = _find_in_folder(source, include_masks, watched)
        elif not source.exists():
            raise DataError(
                f"No such file or folder: {source}. Expected a folder of images, a zip, a tar, a "
                "Parquet file, a text file of paths, or one image."
            )
        elif not source.is_file():
            raise DataError(f"{source} is neither a folder nor a regular file.")
        elif suffix in (".tar", ".parquet"):
            found = _find_packed(source.parent, [source.name], source, include_masks, watched)
        elif suffix == ".zip":
            watched[os.path.abspath(source)] = source.stat().st_mtime_ns
            found = _find_in_zip(source, include_masks)
        elif suffix in SUFFIXES:
            found = FoundImages((ImageFile(source, _fitting(PurePosixPath(source.name))),))
        else:
            watched[os.path.abspath(source)] = source.stat().st_mtime_ns
            found = _find_in_list(source)
    except OSError as error:
        raise DataError(f"Cannot read {source}: {error.strerror or error}.") from error
    return FoundImages(found.files[:limit], tuple(map(one_line, found.notes)), watched)


def _find_in_folder(folder: Path, include_masks: bool, watched: dict[str, int]) -> FoundImages:
    watched[os.path.abspath(folder)] = os.stat(folder).st_mtime_ns
    # What lies in images/ is all that is read, if anything does.
    for base in (folder / "images", folder):
        if base != folder and not base.is_dir():
            continue
        notes: list[str] = []
        others: Counter[str] = Counter()
        paths = Texts.of(_of_images(walk(base, notes, watched), others))
        if base == folder or len(paths) or others:
            break
    for kind in (".tar", ".parquet"):
        if not len(paths) and others[kind]:
            found = [name for name in walk(base, [], watched) if name.lower().endswith(kind)]
            return _find_packed(base, found, folder, include_masks, watched)
    if base != folder:
        notes.append(f"reads only images/ of {folder}")
    return _select(Listing(base, paths), folder, notes, others, include_masks)


def _of_images(names: Iterable[str], others: Counter[str]) -> Iterator[str]:
    """Those of the names that end as images do; the suffixes of the others are counted."""
    for name in names:
        suffix = name[name.rfind(".") :].lower()
        if suffix in SUFFIXES:
            yield name
        else:
            others[PurePosixPath(name).suffix.lower() or "without suffix"] += 1


def _find_packed(
    base: Path, packs: Sequence[str], source: Path, include_masks: bool, watched: dict[str, int]
) -> FoundImages:
    """What is in tars or Parquet files below a folder, in order; of several, named by them too."""
    notes: list[str] = []
    others: Counter[str] = Counter()
    names: list[str] = []
    parquets = packs[0].lower().endswith(".parquet")

    def texts() -> Iterator[str]:
        for pack in packs:
            watched[os.path.abspath(base / pack)] = (base / pack).stat().st_mtime_ns
            inside = cells_of(base / pack) if parquets else members_of(base / pack, notes)
            for member, *place in inside:
                path = _safe_name(PurePosixPath(member))
                if any(map(is_hidden, path.parts)):
                    continue
                if not parquets and not [*_of_images([str(path)], others)]:
                    continue
                name = str(_fitting(path))
                names.append(f"{os.path.splitext(pack)[0]}/{name}" if len(packs) > 1 else name)
                yield (parquet.text_of if parquets else tar.text_of)(pack, *place)

    paths = Texts.of(texts())
    listing = Listing(base, paths, Texts.of(names), packed="parquet" if parquets else "tar")
    return _select(listing, source, notes, others, include_masks)


def _find_at(url: str, include_masks: bool) -> FoundImages:
    """What is below an address; like a folder."""
    notes: list[str] = []
    below = sorted(list_below(url), key=lambda path: path.split("/"))
    if not below:
        name = PurePosixPath(url.rpartition("/")[2])
        return FoundImages((RemoteImage(Path(name), _fitting(name), url=url),))
    url = url.rstrip("/")
    if any(path.startswith("images/") for path in below):
        notes.append(f"reads only images/ of {url}")
        below = [path[7:] for path in below if path.startswith("images/")]
        url = f"{url}/images"
    shown = (path for path in below if not any(map(is_hidden, path.split("/"))))
    others: Counter[str] = Counter()
    paths = Texts.of(_of_images(shown, others))
    names = Texts.of(map(_safe_text, paths))
    listing = Listing(Path(url.rpartition("/")[2]), paths, names, url=url)
    return _select(listing, Path(url), notes, others, include_masks)


def _find_in_zip(path: Path, include_masks: bool) -> FoundImages:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
    except OSError:
        raise
    except Exception as error:  # damaged zips make Python raise almost anything
        raise DataError(f"{path} is not a zip that can be read: {error}.") from error
    found = {
        name: member
        for member in members
        if (name := _safe_name(PurePosixPath(meant(member).replace("\\", "/")))).parts
    }
    notes: list[str] = []
    if any(name.parts[0] == "images" and len(name.parts) > 1 for name in found):
        notes.append(f"reads only images/ of {path}")
        found = {
            name.relative_to("images"): member
            for name, member in found.items()
            if name.parts[0] == "images" and len(name.parts) > 1
        }
    shown = [name for name in found if not any(map(is_hidden, name.parts))]
    others: Counter[str] = Counter()
    names = [*_of_images(map(str, sorted(shown, key=lambda name: name.parts)), others)]
    paths = Texts.of(found[PurePosixPath(name)] for name in names)
    listing = Listing(path, paths, Texts.of(names), packed="zip")
    return _select(listing, path, notes, others, include_masks)


def _select(
    files: Listing, source: Path, notes: list[str], others: Counter[str], include_masks: bool
) -> FoundImages:
    """Keep what is a photo by its name and its look."""
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


def _without_masks(files: Listing, notes: list[str]) -> Listing:
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
    return files.without(found.left_out)


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
    given = {os.path.normpath(os.path.join(base, line)): line for line in lines if line}
    if not given:
        raise DataError(f"{path} lists no path. Expected one image path per line.")
    if not any(Path(path.parent, line).exists() for line in given.values()):
        raise DataError(
            f"None of the {len(given)} paths in {path} exists; the first was looked for at "
            f"{next(iter(given))}. Paths are absolute or relative to the folder of the list."
        )
    repeated = sum(bool(line) for line in lines) - len(given)
    notes = [f"{path} repeats paths ({repeated})"] if repeated else []
    inside = os.path.join(base, "")
    if not all(file.startswith(inside) for file in given):
        inside = os.path.join(os.path.commonpath({os.path.dirname(file) for file in given}), "")
    names = Texts.of(_safe_text(file[len(inside) :].replace(os.sep, "/")) for file in given)
    files = Listing(path.parent, Texts.of(given.values()), names)
    if masks := sort_out(files).masks:
        notes.append(
            f"looks like masks or labels ({masks.total():,}): {_counts(masks)}; they are read, as "
            f"{path} names them"
        )
    return FoundImages(_distinct(files, notes), tuple(notes))


def _distinct(files: Listing, notes: list[str]) -> Listing:
    """Rename a.jpg and a.png to a_jpg.jpg and a_png.png, whose results would share a name.

    Names to which no suffix can be added are cut before; a folder in a list may have none.
    """
    long = {
        index: cut
        for index, name in enumerate(files.names())
        if len(name) > _MAX_NAME // 4 and (cut := str(_fitting(PurePosixPath(name)))) != name
    }
    files = files.rename(long)
    if files.names_are_paths and len({os.path.splitext(name)[1] for name in files.names()}) == 1:
        return files  # paths differ, so what is before the one suffix does
    stems = [os.path.splitext(name)[0] for name in files.names()]
    counts = Counter(stems)
    taken = {stem for stem, count in counts.items() if count == 1}
    if len(taken) == len(files):
        return files
    pairs = zip(files.names(), stems, strict=True)
    shared = [name for name, stem in pairs if counts[stem] > 1]
    notes.append(f"results named after stem and suffix, to tell apart: {listed(shared)}")
    renamed: dict[int, str] = {}
    for index, (name, old) in enumerate(zip(files.names(), stems, strict=True)):
        if counts[old] > 1:
            suffix = PurePosixPath(name).suffix
            stem = f"{old}_{suffix[1:]}"
            while stem in taken:
                stem += "_"
            taken.add(stem)
            renamed[index] = stem + suffix
    return files.rename(renamed)


def _safe_text(path: str) -> str:
    """A relative path as the name of a result."""
    if not _UNSAFE.search(path):
        return path
    return str(_fitting(_safe_name(PurePosixPath(path))))


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
