"""Images in tars, such as the shards of WebDataset: read in place, nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from iddc.errors import DataError, UnreadableImage
from iddc.images.files import MAX_BYTES, ImageFile

_BLOCK = 512
"""Bytes of a header; empty ones end a tar (POSIX.1-2001, ustar)."""


@dataclass(frozen=True)
class TarImage(ImageFile):
    """An image in a tar.

    Attributes:
        offset: Where its bytes begin in the tar.
        length: How many they are.
    """

    offset: int = 0
    length: int = 0

    def open(self) -> BufferedIOBase:
        """Read the encoded image into memory.

        Raises:
            UnreadableImage: It is too large, or the tar has become shorter.
        """
        if self.length > MAX_BYTES:
            raise UnreadableImage(self, f"larger than {MAX_BYTES // 10**9} GB")
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.length)
        if len(data) < self.length:
            raise UnreadableImage(self, "the tar is shorter than when it was listed")
        return BytesIO(data)

    def size(self) -> int:
        """The bytes of the encoded image."""
        return self.length


def members_of(path: Path, notes: list[str]) -> Iterator[tuple[str, int, int]]:
    """The name, the offset and the length of each file in a tar, in its order.

    Args:
        path: The tar, not compressed.
        notes: Gets a remark if the end of the tar is missing.

    Raises:
        DataError: It is no tar, it is compressed, or it ends in the middle of a file.
    """
    count = 0
    try:
        with tarfile.open(path, "r:") as opened:
            archive: Any = opened
            while (member := archive.next()) is not None:
                archive.members.clear()  # else all of a large tar stay in memory
                count += 1
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            end = archive.offset
        with path.open("rb") as stream:
            stream.seek(end)
            if len(stream.read(_BLOCK)) < _BLOCK:
                notes.append(f"{path} has no mark of its end: it may be cut short")
    except (tarfile.TarError, EOFError, ValueError) as error:
        where = f" after {count} files" if count else ""
        raise DataError(
            f"{path} cannot be read{where}: {error}. Expected a tar that is whole and not "
            "compressed; copy it again, or unpack it."
        ) from error


def text_of(tar: str, offset: int, length: int) -> str:
    """Where an image is, as `image_at` reads it."""
    return f"{offset}:{length}:{tar}"


def image_at(base: Path, text: str, name: PurePosixPath) -> TarImage:
    """The image of a tar below `base`."""
    offset, length, tar = text.split(":", 2)
    return TarImage(Path(base, tar), name, str(name), offset=int(offset), length=int(length))
