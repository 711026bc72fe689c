"""Images in Parquet files, as data sets of Hugging Face have them: read a row group at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from iddc.errors import DataError, UnreadableImage, needs_extra
from iddc.images.files import MAX_BYTES, ImageFile

_LOCKS: dict[int, Lock] = {}
"""One for each process, so that two of its threads do not read the same row group at once."""


@dataclass(frozen=True)
class ParquetImage(ImageFile):
    """An image in a cell of a Parquet file.

    Attributes:
        group: The row group that has it.
        row: Its row in the group.
    """

    group: int = 0
    row: int = 0

    def open(self) -> BufferedIOBase:
        """Read the encoded image, and its row group, which stays in memory until the next but one.

        Raises:
            UnreadableImage: The cell is empty, the group too large, or the file another by now.
        """
        try:
            with _LOCKS.setdefault(os.getpid(), Lock()):
                cells = _cells(self.path, self.path.stat().st_mtime_ns, self.group, os.getpid())
            data = cells[self.row].as_py()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # pyarrow has many
            raise UnreadableImage(self, f"its row group cannot be read: {error}") from error
        if data is None:
            raise UnreadableImage(self, "its cell holds no bytes")
        return BytesIO(data)

    def size(self) -> int:
        """The bytes of the encoded image."""
        return len(self.read_bytes())


def cells_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """The name, the row group and the row in it of each image of a Parquet file, in order.

    An image is called by its `path` if all have one and all of these differ, else by the number of
    its row. Bytes are not read.

    Args:
        path: The file. One of its columns holds encoded images: binary, or a struct with a field
            `bytes`.

    Raises:
        DataError: It cannot be read, or no column or several may be that of the images.
        SetupError: The extra `parquet` is missing.
    """
    with _opened(path) as file:
        column = _column(file.schema_arrow, path)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        named = column.endswith(".bytes") and f"{column[:-6]}.path" in _leaves(file)
        names: list[str | None] = []
        for group in range(len(counts) if named else 0):
            names += _values(file, group, f"{column[:-6]}.path").to_pylist()
    if not all(names) or len({*names}) < sum(counts):
        names = [f"{row:09}" for row in range(sum(counts))]
    places = ((group, row) for group, count in enumerate(counts) for row in range(count))
    for name, (group, row) in zip(names, places, strict=True):
        yield str(name), group, row


def text_of(file: str, group: int, row: int) -> str:
    """Where an image is, as `image_at` reads it."""
    return f"{group}:{row}:{file}"


def image_at(base: Path, text: str, name: PurePosixPath) -> ParquetImage:
    """The image of a Parquet file below `base`."""
    group, row, path = text.split(":", 2)
    return ParquetImage(Path(base, path), name, str(name), group=int(group), row=int(row))


@lru_cache(maxsize=2)
def _cells(path: Path, modified: int, group: int, process: int) -> Any:  # noqa: ARG001
    """The encoded images of a row group; see `files._open_zip`."""
    with _opened(path) as file:
        column = _column(file.schema_arrow, path)
        index = _leaves(file).index(column)
        size = file.metadata.row_group(group).column(index).total_uncompressed_size
        if size > MAX_BYTES:
            raise DataError(
                f"it has {size / 1e9:.3g} GB, at most {MAX_BYTES / 1e9:.3g} GB can be read. Write "
                "the file with fewer rows in a group"
            )
        return _values(file, group, column)


def _values(file: Any, group: int, leaf: str) -> Any:
    """A column, or a field of a column of structs, of a row group."""
    compute: Any = import_module("pyarrow.compute")
    values = file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
    for name in leaf.split(".")[1:]:
        values = compute.struct_field(values, name)
    return values


def _leaves(file: Any) -> list[str]:
    """The columns as they are stored, with the names of the fields around them."""
    return [file.schema.column(index).path for index in range(len(file.schema))]


def _column(schema: Any, path: Path) -> str:
    """Which column has the images: the only one that can, or the one that is called so."""
    pyarrow: Any = import_module("pyarrow")
    is_binary = {pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()}.__contains__
    found: dict[str, str] = {}
    for field in schema:
        kind = field.type
        if is_binary(kind):
            found[field.name] = field.name
        elif pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found[field.name] = f"{field.name}.bytes"
    chosen = [name for name in ("image", "img") if name in found] if len(found) > 1 else [*found]
    if not chosen:
        what = f"several: {', '.join(found)}" if found else f"columns {', '.join(schema.names)}"
        raise DataError(
            f"{path} has no column of images that can be told. Expected one column of bytes, or of "
            f"structs with a field `bytes`, or among several one called image; found {what}."
        )
    return found[chosen[0]]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A Parquet file, open.

    Raises:
        DataError: It is none, it is cut short, or it is damaged.
        SetupError: The extra `parquet` is missing.
    """
    with needs_extra("parquet", f"{path} needs pyarrow"):
        parquet: Any = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            yield file
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {' '.join(str(error).split())}. Copy it again."
        ) from error
