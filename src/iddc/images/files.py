"""An image on disk or inside a zip: what is opened, and the name that its results get."""

from __future__ import annotations

import os
import stat
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import cast

from iddc.errors import UnreadableImage

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
MAX_PIXELS = 500_000_000
"""The largest image we open, 1.5 GB as RGB. A file that claims more is an attack or damaged."""
MAX_BYTES = 2_000_000_000
"""The largest file we open; the next two are for members of a zip."""
_MAX_PACKED, _MAX_RATIO = 100_000_000, 100


@dataclass(frozen=True)
class ImageFile:
    """An image on disk or inside a zip, and the name its results get.

    Attributes:
        path: The image file, or the zip that holds it.
        name: A relative path without `..`. In one `FoundImages` no two names are equal, not even
            without their suffixes, so `name.with_suffix(".png")` is safe to write.
        member: The name inside the zip.
        page: Which image of the file it is, counted from 0.
        stamp: Its size in bytes and its time in nanoseconds when it was listed, if they are kept.
    """

    path: Path
    name: PurePosixPath
    member: str | None = None
    page: int = 0
    stamp: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        file = str(self.path) if self.member is None else f"{self.path}!{self.inside}"
        return f"{file}#{self.page + 1}" if self.page else file

    @property
    def inside(self) -> str:
        """The path that other programs see: on disk, or in the zip as it was meant."""
        return str(self.path) if self.member is None else meant(self.member)

    def open(self) -> BufferedIOBase:
        """Open the encoded image, read-only.

        Raises:
            UnreadableImage: It is a pipe or a device, too large, or not what was listed.
        """
        status = self.path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise UnreadableImage(self, "no regular file")
        if self.stamp is not None and self.stamp != (status.st_size, status.st_mtime_ns):
            raise UnreadableImage(self, "changed since the collection was listed")
        if self.member is None:
            if status.st_size > MAX_BYTES:
                raise UnreadableImage(self, f"larger than {MAX_BYTES // 10**9} GB")
            return self.path.open("rb")
        archive = _open_zip(self.path, status.st_mtime_ns, os.getpid())
        info = archive.getinfo(self.member)
        most = min(MAX_BYTES, max(_MAX_PACKED, _MAX_RATIO * info.compress_size))
        if info.file_size > most:
            raise UnreadableImage(self, f"claims {info.file_size / 1e9:.3g} GB in the zip")
        return cast("BufferedIOBase", archive.open(info))

    def size(self) -> int:
        """The bytes of the encoded image."""
        status = self.path.stat()
        if self.member is None:
            return status.st_size
        return _open_zip(self.path, status.st_mtime_ns, os.getpid()).getinfo(self.member).file_size

    def read_bytes(self) -> bytes:
        """Read the encoded image."""
        with self.open() as stream:
            return stream.read()


def meant(member: str) -> str:
    """The name of a member of a zip, also where it is UTF-8 and the zip does not say so.

    Such names come as CP437, the older rule, in which letters beyond ASCII are never UTF-8 by
    chance in practice.
    """
    if member.isascii():
        return member
    try:
        return member.encode("cp437").decode()
    except UnicodeError:
        return member


@lru_cache(maxsize=4)
def _open_zip(path: Path, modified: int, process: int) -> zipfile.ZipFile:  # noqa: ARG001
    """Keep a zip open, as reading its directory of 100,000 members takes half a second.

    A forked process must open its own, as it would share the file position with its parent; a zip
    that was written anew must be opened anew.
    """
    return zipfile.ZipFile(path)
