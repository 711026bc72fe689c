"""How much of each image a class covers, as two CSV tables: by image and by folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer

from iddc.masks.labels import IGNORED, Classes
from iddc.runs.files import open_atomic

BY_FOLDER = "shares-by-folder.csv"
"""The second table, beside the first."""
IMAGE_HEADER = ("image", "class", "pixels", "share", "m2")
FOLDER_HEADER = ("folder", "images", "class", "pixels", "share", "m2")


def count_pixels(ids: Integer[np.ndarray, "H W"], num_classes: int) -> Int64[np.ndarray, " n"]:
    """The number of pixels of each class; the last number counts ignored pixels."""
    return np.bincount(np.minimum(ids, num_classes).ravel(), minlength=num_classes + 1)


def describe_image(
    file_name: str,
    pixels: Int64[np.ndarray, " n"],
    square_metres: Float[np.ndarray, " n"] | None = None,
) -> bytes:
    """One image as JSON, from which the tables are made.

    Args:
        file_name: The image, relative to its collection.
        pixels: As `count_pixels` gives them.
        square_metres: The area of those pixels on the ground, where the image is georeferenced.
    """
    record: dict[str, Any] = {"image": file_name, "pixels": pixels.tolist()}
    if square_metres is not None:
        record["m2"] = square_metres.tolist()
    return json.dumps(record).encode()


def assemble(path: Path, parts: Path, names: Sequence[PurePosixPath], classes: Classes) -> None:
    """Write one table with a row for each image and class, and one with a row for each folder.

    Classes that do not occur in an image have a row too, with 0: without it, the mean over images
    would be too large. Ignored pixels have a row where there are any, so that shares add up to 1.

    Args:
        path: The table by image; the table by folder is `BY_FOLDER` in the same folder.
        parts: The folder of what `describe_image` gave for each image.
        names: The images, in order. One image at a time is in memory.
        classes: The classes, in the order of their ids.

    Raises:
        SetupError: A table cannot be written.
    """
    folders: dict[str, _Sum] = {}

    def rows() -> Iterator[tuple[object, ...]]:
        for name in names:
            record = json.loads((parts / name.with_suffix(".json")).read_bytes())
            counted = _Sum(len(classes.names))
            counted.add(record)
            folder = str(PurePosixPath(record["image"]).parent)
            folders.setdefault(folder, _Sum(len(classes.names))).add(record)
            yield from ((record["image"], *row) for row in counted.rows(classes.names))

    _write(path, IMAGE_HEADER, rows())
    _write(
        path.with_name(BY_FOLDER),
        FOLDER_HEADER,
        (
            (folder, counted.images, *row)
            for folder, counted in sorted(folders.items())
            for row in counted.rows(classes.names)
        ),
    )


class _Sum:
    """The pixels of some images, and their area where it is known for all of them."""

    def __init__(self, num_classes: int) -> None:
        self.images = 0
        self.pixels = np.zeros(num_classes + 1, np.int64)
        self.square_metres: Float[np.ndarray, " n"] | None = np.zeros(num_classes + 1)

    def add(self, record: dict[str, Any]) -> None:
        self.images += 1
        self.pixels += record["pixels"]
        if self.square_metres is None or "m2" not in record:
            self.square_metres = None
        else:
            self.square_metres = self.square_metres + record["m2"]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[object, ...]]:
        """Class, pixels, share and area; ignored pixels last, if there are any."""
        total = max(1, int(self.pixels.sum()))
        for index, name in enumerate((*names, IGNORED)):
            pixels = int(self.pixels[index])
            if name == IGNORED and not pixels:
                continue
            area = "" if self.square_metres is None else f"{self.square_metres[index]:.2f}"
            yield name, pixels, f"{pixels / total:.6f}", area


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open_atomic(path) as file:
        for row in chain([header], rows):
            text = StringIO()
            csv.writer(text).writerow(row)
            # A file name may hold bytes that are no UTF-8; they stay as they are.
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
