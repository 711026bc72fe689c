"""Potsdam-3: aerial tiles of 200 x 200, six classes merged to three, as IIC prepared them.

A tile is a Matlab file: `imgs/ID.mat` holds img (200, 200, 4), red, green, blue and infrared, of
which the first three are read; `gt/ID.mat` holds gt (200, 200), ids 0 to 5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase, BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from iddc.datasets.published import Files, Published
from iddc.errors import DataError, UnreadableImage
from iddc.images import ImageFile
from iddc.metrics import IGNORE

LISTS = {"train": "labelled_train.txt", "val": "labelled_test.txt"}
"""The field's choice since STEGO. IIC trains on the 3,150 of unlabelled_train.txt and val too."""

_INTEGERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 12: "i8", 13: "u8"}
_NUMBERS = _INTEGERS | {7: "f4", 9: "f8"}
_MATRIX, _PACKED = 14, 15
"""The kinds of elements of a Matlab file that we read; all others are left out."""
_MAX_UNPACKED = 100_000_000


@dataclass(frozen=True)
class MatFile(ImageFile):
    """A variable of a Matlab file, which opens as a PNG: `open_image` and `read_ids` take it."""

    variable: str = "img"

    def open(self) -> BufferedIOBase:
        """Encode the variable: (H, W) as grey, the first three channels of (H, W, C) as RGB.

        Raises:
            UnreadableImage: The file is no Matlab file, or has no such variable.
        """
        try:
            with super().open() as stream:
                array = read_matlab(stream.read(), self.variable)
            image = Image.fromarray(array[..., :3] if array.ndim == 3 else array.astype(np.uint16))
        except Exception as error:  # a damaged file fails in many ways
            raise UnreadableImage(
                self, f"expected a Matlab file with the array {self.variable} ({error!r})"
            ) from error
        encoded = BytesIO()
        image.save(encoded, "PNG", compress_level=0)
        encoded.seek(0)
        return encoded


def read_matlab(data: bytes, name: str) -> np.ndarray:
    """Read a real array from a Matlab file of version 5 to 7.2, as MathWorks describes the format.

    SciPy's reader believes what a file says of itself: two damaged bytes are a segmentation fault.

    Raises:
        KeyError: There is no array of that name.
        Exception: The file is damaged, or of another kind.
    """
    order = {b"IM": "<", b"MI": ">"}[data[126:128]]
    for kind, content in _elements(data[128:], order):
        if kind == _PACKED:
            unpacked = zlib.decompressobj().decompress(content, _MAX_UNPACKED)
            kind, content = next(_elements(unpacked, order))  # noqa: PLW2901
        if kind == _MATRIX:
            _, (_, shape), (_, found), *parts = _elements(content, order)
            if found == name.encode():
                ((stored_as, values),) = parts
                array = np.frombuffer(values, order + _NUMBERS[stored_as])
                return array.reshape(np.frombuffer(shape, f"{order}i4"), order="F")
    raise KeyError(name)


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The kind and the content of each element. A short one has its content within its tag."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start, end = at + 8, at + 8 + size
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            start, end = at + 4, at + 8
        yield kind, data[start : start + size]
        at = end if kind == _PACKED else end + -end % 8  # elements begin at multiples of 8


def read_list(root: Path, split: str) -> list[str]:
    """The tiles of a split, by the list that comes with them.

    Raises:
        DataError: The list is missing.
    """
    path = root / LISTS[split]
    try:
        return path.read_text("utf-8").split()
    except OSError as error:
        raise DataError(
            f"Cannot read {path}, the list of Potsdam-3, {split}: {error.strerror}. It comes with "
            "imgs and gt: unpack or download it again."
        ) from error


POTSDAM3 = Published(
    name="potsdam3",
    title="Potsdam-3",
    class_names=("roads and cars", "buildings and clutter", "vegetation"),
    classes={0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2, IGNORE: IGNORE},
    counts={"train": 4_545, "val": 855},
    images=Files(("imgs",), ".mat", MatFile),
    labels=Files(("gt",), ".mat", partial(MatFile, variable="gt")),
    stems=read_list,
)
