"""Find the images a user has, and open each as RGB uint8 or say why it cannot be opened.

Nothing is ever written, and pixels are decoded only by `open_image`: a folder, a zip or a list is
first a tuple of `ImageFile`, each a place to read from and a name to write to.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, TypeVar, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from iddc.errors import DataError, UnreadableImage, one_line

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
}
"""Pillow's name of each format we read, and the suffixes that mark it in a folder or a zip. Pillow
knows more, some of which start other programs (EPS) or are no photos; those stay closed."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
LABEL_FOLDERS = frozenset(
    {"labels", "gtFine", "annotations", "stuffthingmaps", "stuffthingmaps_trainval2017"}
)
"""Folders of the usual data sets that hold labels, not photos."""
MAX_PIXELS = 500_000_000
"""The largest image we open, 1.5 GB as RGB. A file that claims more is an attack or damaged."""

MAX_BYTES = 2_000_000_000
"""The largest file we open; the next two are for members of a zip, and for a list of paths."""
_MAX_PACKED, _MAX_RATIO = 100_000_000, 100
_MAX_LIST = 500_000_000
_MAX_NAME = 230
"""The longest part of a name, in bytes, to which a result adds its suffix: systems allow 255."""
_CHECK_THREADS = 8
_MOST_WORKERS = 8
AHEAD = 2**29
"""Bytes that may wait to be used, decoded or to be written, beyond those in use."""
_LISTED = 5
"""How many names an error or a note lists before it says how many more there are."""


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class ImageFile:
    """An image on disk or inside a zip, and the name its results get.

    Attributes:
        path: The image file, or the zip that holds it.
        name: A relative path without `..`. In one `FoundImages` no two names are equal, not even
            without their suffixes, so `name.with_suffix(".png")` is safe to write.
        member: The name inside the zip.
    """

    path: Path
    name: PurePosixPath
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}!{self.member}"

    def open(self) -> BufferedIOBase:
        """Open the encoded image, read-only.

        Raises:
            UnreadableImage: It is a pipe or a device, or too large.
        """
        status = self.path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise UnreadableImage("no regular file")
        if self.member is None:
            if status.st_size > MAX_BYTES:
                raise UnreadableImage(f"larger than {MAX_BYTES // 10**9} GB")
            return self.path.open("rb")
        archive = _open_zip(self.path, status.st_mtime_ns, os.getpid())
        info = archive.getinfo(self.member)
        most = min(MAX_BYTES, max(_MAX_PACKED, _MAX_RATIO * info.compress_size))
        if info.file_size > most:
            raise UnreadableImage(f"claims {info.file_size / 1e9:.3g} GB in the zip")
        return cast("BufferedIOBase", archive.open(info))

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        with self.open() as stream:
            return stream.read()


@dataclass(frozen=True)
class FoundImages:
    """The images of a source, in order, and one-line remarks on what was not read."""

    files: tuple[ImageFile, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """An image that is left out, and why, in plain words."""

    file: ImageFile
    reason: str


def find_images(source: Path, *, limit: int | None = None) -> FoundImages:
    """List the images of a folder, a zip, a text file of paths, or take one image.

    A folder is read with all its subfolders, through links too, sorted by name. If it holds
    `images/`, only that is read, and folders of labels (`LABEL_FOLDERS`) are not. A zip is read
    like a folder, its members in place. A text file has one path per line, absolute or relative to
    its own folder, and keeps its order. Hidden files are ignored. No image is opened.

    Args:
        source: The folder, zip, text file or image.
        limit: Keep this many images, the first ones. It changes no name.

    Raises:
        DataError: The source is missing, unreadable or holds no image.
    """
    suffix = source.suffix.lower()
    try:
        if source.is_dir():
            found = _find_in_folder(source)
        elif not source.exists():
            raise DataError(
                f"No such file or folder: {source}. Expected a folder of images, a zip, a text "
                "file of paths, or one image."
            )
        elif not source.is_file():
            raise DataError(f"{source} is neither a folder nor a regular file.")
        elif suffix == ".zip":
            found = _find_in_zip(source)
        elif suffix in SUFFIXES:
            found = FoundImages((ImageFile(source, _fitting(PurePosixPath(source.name))),))
        else:
            found = _find_in_list(source)
    except OSError as error:
        raise DataError(f"Cannot read {source}: {error.strerror or error}.") from error
    return FoundImages(found.files[:limit], tuple(map(one_line, found.notes)))


def open_image(file: ImageFile | Path, min_side: int = 0) -> Image.Image:
    """Decode an image to RGB, 8 bit, upright (see `to_rgb`); of an animation, the first frame.

    Args:
        file: Where it is.
        min_side: The shorter side that is needed, in pixels: a much larger JPEG comes at a half, a
            quarter or an eighth, in a fraction of the time. 0: every image as large as it is.

    Raises:
        UnreadableImage: It is missing, empty, damaged, cut short, of an unknown format or larger
            than `MAX_PIXELS`.
    """
    if isinstance(file, Path):
        file = ImageFile(file, PurePosixPath(file.name))
    try:
        with quiet_pillow:
            image = _open_header(BytesIO(file.read_bytes()))
            if min_side:
                image.draft(None, (min_side, min_side))
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UnreadableImage(f"{file}: {_explain(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB, 8 bit, turned upright as its EXIF orientation says.

    - Transparent images (alpha channel, transparent palette entry or colour) are laid over white:
      the colour stored under a transparent pixel is arbitrary, and white is what a viewer shows.
    - 16-bit grey is divided by 257, so that 0..65535 becomes 0..255; nothing is clipped.
    - Integer grey outside 0..65535 is stretched from its minimum and maximum to 0..255.
    - Float grey is read as 0..1, 0..255 or 0..65535, the first that holds all its values, else
      stretched. NaN and infinities count as 0.

    Raises:
        ValueError: Pillow has no conversion from this mode to RGB (LAB, in older versions).
    """
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_8bit(image)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def ahead(
    function: Callable[[T], U],
    items: Iterable[T],
    workers: int = -1,
    *,
    nbytes: Callable[[T, U | None], int] = lambda _item, _result: 0,
) -> Iterator[tuple[T, U]]:
    """Each item and its result, in order, while threads work on the next few.

    Decoding and encoding images let other threads run. Unlike `Executor.map`, results do not pile
    up.

    Args:
        function: Called in a thread for each item.
        items: Taken in the caller's thread, a few ahead of the results.
        workers: Threads; 0: one; -1: one for each core, at most 8.
        nbytes: What an item and its result, once it is there, hold in memory. No further item is
            taken while those that wait hold more than `AHEAD`.
    """
    threads = min(_MOST_WORKERS, os.cpu_count() or 1) if workers < 0 else max(1, workers)
    waiting: deque[tuple[T, Future[U]]] = deque()

    def held() -> int:
        there = [(item, f.done() and not f.exception(), f) for item, f in waiting]
        return sum(nbytes(item, f.result() if done else None) for item, done, f in there)

    def first() -> tuple[T, U]:
        item, future = waiting.popleft()
        return item, future.result()

    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            del item  # else it lives on while the next one is made
            while waiting and (len(waiting) > 2 * threads or held() > AHEAD):
                yield first()
        while waiting:
            yield first()


def check_images(
    files: Sequence[ImageFile], *, max_unreadable: float
) -> tuple[list[ImageFile], list[Skipped]]:
    """Sort out the files that are no images by reading every header, without decoding pixels.

    Damage after the header shows only in `open_image`.

    Args:
        files: What to check. Order is kept.
        max_unreadable: The share of unreadable files that is accepted, in [0, 1].

    Raises:
        DataError: The share of unreadable files exceeds `max_unreadable`.
    """

    def problem(file: ImageFile) -> str | None:
        try:
            with file.open() as stream:
                _open_header(stream)
        except Exception as error:
            return _explain(error)
        return None

    # Threads hide the latency of network file systems; parsing itself holds the interpreter lock.
    with quiet_pillow, ThreadPoolExecutor(_CHECK_THREADS) as pool:
        problems = list(pool.map(problem, files))
    pairs = list(zip(files, problems, strict=True))
    readable = [file for file, reason in pairs if reason is None]
    skipped = [Skipped(file, reason) for file, reason in pairs if reason is not None]
    if len(skipped) > max_unreadable * len(files):
        raise DataError(
            f"{len(skipped)} of {len(files)} images cannot be read, more than the "
            f"{100 * max_unreadable:g} % allowed by --max-unreadable: "
            f"{listed(f'{item.file} ({item.reason})' for item in skipped)}. "
            "Repair or remove them, or allow a larger share."
        )
    return readable, skipped


def _find_in_folder(folder: Path) -> FoundImages:
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
    return _select(found, folder, notes)


def _find_in_zip(path: Path) -> FoundImages:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
    except OSError:
        raise
    except Exception as error:  # damaged zips make Python raise almost anything
        raise DataError(f"{path} is not a zip that can be read: {error}.") from error
    names = {_safe_name(PurePosixPath(member.replace("\\", "/"))): member for member in members}
    found = {name: ImageFile(path, name, member) for name, member in names.items() if name.parts}
    return _select(found, path, [])


def _select(found: dict[PurePosixPath, ImageFile], source: Path, notes: list[str]) -> FoundImages:
    """Keep what is a photo by its folder and its suffix, sorted by name."""
    if any(name.parts[0] == "images" and len(name.parts) > 1 for name in found):
        notes.append(f"reads only images/ of {source}")
        found = {
            (inner := name.relative_to("images")): replace(file, name=inner)
            for name, file in found.items()
            if name.parts[0] == "images" and len(name.parts) > 1
        }
    labels: Counter[str] = Counter()
    others: Counter[str] = Counter()
    files = []
    for name in sorted(found, key=lambda name: name.parts):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
            continue
        if not LABEL_FOLDERS.isdisjoint(name.parts[:-1]):
            first = next(i for i, part in enumerate(name.parts) if part in LABEL_FOLDERS)
            labels["/".join(name.parts[: first + 1])] += 1
        elif name.suffix.lower() in SUFFIXES:
            files.append(found[name])
        else:
            others[name.suffix.lower() or "without suffix"] += 1
    if labels:
        notes.append(f"folders not read as photos: {_counts(labels)}")
    if others:
        notes.append(f"files of other kinds: {_counts(others)}")
    if not files:
        raise DataError(
            f"No image in {source}. Expected files ending in {', '.join(SUFFIXES)}; "
            f"found {'; '.join(notes) or 'no file'}."
        )
    return FoundImages(_distinct(files, notes), tuple(notes))


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


@lru_cache(maxsize=4)
def _open_zip(path: Path, modified: int, process: int) -> zipfile.ZipFile:  # noqa: ARG001
    """Keep a zip open, as reading its directory of 100,000 members takes half a second.

    A forked process must open its own, as it would share the file position with its parent; a zip
    that was written anew must be opened anew.
    """
    return zipfile.ZipFile(path)


class _Quiet:
    """Pillow with our size limit and without its warnings, while any thread is inside.

    Both are settings of the whole process: the first thread in sets them, the last one out puts
    them back. A warning about odd metadata helps nobody who has a million photos.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit = Image.MAX_IMAGE_PIXELS
        self._filters: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = Image.MAX_IMAGE_PIXELS
                Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow raises at twice its limit
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(kind, error, trace)
                Image.MAX_IMAGE_PIXELS = self._limit


quiet_pillow = _Quiet()
"""`with quiet_pillow:` around anything that opens a user's file with Pillow."""


def _open_header(stream: BufferedIOBase) -> Image.Image:
    if not stream.read(1):
        raise UnreadableImage("the file is empty")
    stream.seek(0)
    return Image.open(cast("IO[bytes]", stream), formats=tuple(FORMATS))


def _explain(error: Exception) -> str:
    """Say in plain words why an image could not be opened."""
    if isinstance(error, UnreadableImage):
        return str(error)
    if isinstance(error, UnidentifiedImageError | KeyError):  # KeyError: a Pillow without AVIF
        return f"not an image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"claims more than {MAX_PIXELS // 10**6} megapixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    if isinstance(error, RuntimeError):  # zip members that are encrypted or oddly compressed
        return str(error)
    return f"damaged or cut short ({error or type(error).__name__})"


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, if there is one that can be read."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata must not cost the photo
        return image


def _grey_8bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or float grey to 8 bit by the rules of `to_rgb`."""
    tops: tuple[float, ...] = (1, 255, 65535) if image.mode == "F" else (65535,)
    values: np.ndarray = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        # Halves, which are exact: the span of all its numbers is more than a float can hold.
        values, top = values / 2 - low / 2, high / 2 - low / 2 or 1
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
