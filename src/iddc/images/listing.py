"""The images of a large source in little memory: an `ImageFile` is made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, overload

import numpy as np
from jaxtyping import Int64

from iddc.images import parquet, tar
from iddc.images.files import ImageFile
from iddc.images.remote import RemoteImage

Packed = Literal["", "zip", "tar", "parquet"]
_PIECE = 2**20
"""About how many bytes of texts are decoded at once."""


class Texts:
    """Many short texts without NUL, packed: each takes its bytes and nine more.

    A list of a million names takes 100 MB as Python has it, and every process that reads images
    would get a copy of its own, as counting references writes to it.
    """

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        """All texts in UTF-8, each ended by NUL."""
        self._ends = np.flatnonzero(np.frombuffer(packed, np.uint8) == 0)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Pack texts; names of files that are not UTF-8 keep their bytes."""
        packed = bytearray()
        piece: list[str] = []
        for text in texts:
            piece.append(text)
            if len(piece) == 2**14:
                packed += _encoded(piece)
                piece.clear()
        packed += _encoded(piece)
        return cls(bytes(packed))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self.packed[start : int(self._ends[index])].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        while start < len(self.packed):
            stop = self.packed.find(b"\0", start + _PIECE) + 1 or len(self.packed)
            piece = self.packed[start:stop].decode("utf-8", "surrogatepass")
            yield from piece.split("\0")[:-1]
            start = stop


def _encoded(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\0" for text in texts).encode("utf-8", "surrogatepass")


class Listing(Sequence[ImageFile]):
    """Images in order, by the texts of their paths and names. Slices share the texts.

    Args:
        base: The folder that paths are relative to, or the zip.
        paths: Where each image is: below `base`, or the name of a member of the zip.
        names: The names of results; None: the paths.
        renamed: Names of results that differ from `names`, by index.
        packed: In what images are: in `base`, which is a zip; or in tars or Parquet files, where
            paths are those of `tar.text_of` and `parquet.text_of`. Empty: each is a file.
        url: The address that paths are below, of images that are at addresses.
        chosen: The indices of the images that are in; None: all.
        stamps: Size and time of each when it was listed, see `ImageFile.stamp`.
    """

    def __init__(
        self,
        base: Path,
        paths: Texts,
        names: Texts | None = None,
        *,
        renamed: Mapping[int, str] | None = None,
        packed: Packed = "",
        url: str = "",
        chosen: range | Int64[np.ndarray, " n"] | None = None,
        stamps: Int64[np.ndarray, "all 2"] | None = None,
    ) -> None:
        self.base = base
        self.stamps = stamps
        self.paths = paths
        self._names = paths if names is None else names
        self._renamed = dict(renamed or {})
        self.packed: Packed = packed
        self.url = url
        self._chosen = range(len(paths)) if chosen is None else chosen

        everything = range(len(paths))
        self._whole = isinstance(self._chosen, range) and self._chosen == everything

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...
    @overload
    def __getitem__(self, index: slice) -> Listing: ...
    def __getitem__(self, index: int | slice) -> ImageFile | Listing:
        if isinstance(index, slice):
            return self._with(self._renamed, self._chosen[index])
        at = int(self._chosen[index])
        return self._file(at, self.paths[at], self.name(index))

    def __iter__(self) -> Iterator[ImageFile]:
        if not self._whole:
            yield from (self[index] for index in range(len(self)))
            return
        for at, (path, name) in enumerate(zip(self.paths, self.names(), strict=True)):
            yield self._file(at, path, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Listing({len(self):,} images of {self.base})"

    @property
    def names_are_paths(self) -> bool:
        """Whether every result is named by its path, so that no two names are equal."""
        return self._names is self.paths and not self._renamed

    def names(self) -> Iterator[str]:
        """The names of all results, in order: faster than by way of the files."""
        if not self._whole:
            for at in map(int, self._chosen):
                yield self._renamed.get(at) or self._names[at]
        elif self._renamed:
            for at, name in enumerate(self._names):
                yield self._renamed.get(at, name)
        else:
            yield from self._names

    def texts(self) -> Iterator[str]:
        """The texts of the paths, in order."""
        yield from self.paths if self._whole else (self.paths[int(at)] for at in self._chosen)

    def name(self, index: int) -> str:
        """The name of one result."""
        at = int(self._chosen[index])
        return self._renamed.get(at) or self._names[at]

    def without(self, left_out: Iterable[int]) -> Listing:
        """The others."""
        drop = [*left_out]
        if not drop:
            return self
        return self._with(self._renamed, np.delete(np.asarray(self._chosen, np.int64), drop))

    def rename(self, names: Mapping[int, str]) -> Listing:
        """The same with other names of some results, by index."""
        return self._with(
            self._renamed | {int(self._chosen[index]): name for index, name in names.items()},
            self._chosen,
        )

    def _with(self, renamed: Mapping[int, str], chosen: range | Int64[np.ndarray, " n"]) -> Listing:
        return Listing(
            self.base,
            self.paths,
            self._names,
            renamed=renamed,
            packed=self.packed,
            url=self.url,
            chosen=chosen,
            stamps=self.stamps,
        )

    def _file(self, at: int, path: str, name: str) -> ImageFile:
        if self.packed == "zip":
            return ImageFile(self.base, PurePosixPath(name), path)
        if self.packed:
            packed_at = tar.image_at if self.packed == "tar" else parquet.image_at
            return packed_at(self.base, path, PurePosixPath(name))
        if self.url:
            return RemoteImage(Path(name), PurePosixPath(name), url=f"{self.url}/{path}")
        stamp: tuple[int, int] | None = None
        if self.stamps is not None:
            size, time = self.stamps[at].tolist()
            stamp = size, time
        return ImageFile(Path(self.base, path), PurePosixPath(name), stamp=stamp)


def names_of(files: Sequence[ImageFile]) -> Iterator[str]:
    """The names of the results of images, in order."""
    if isinstance(files, Listing):
        return files.names()
    return (str(file.name) for file in files)


def without(files: Sequence[ImageFile], left_out: Iterable[int]) -> Sequence[ImageFile]:
    """All images but those of some indices."""
    if isinstance(files, Listing):
        return files.without(left_out)
    drop = {*left_out}
    return [file for index, file in enumerate(files) if index not in drop]


def name_at(files: Sequence[ImageFile], index: int) -> str:
    """The name of the result of one of several images."""
    return files.name(index) if isinstance(files, Listing) else str(files[index].name)
