"""YOLO's segmentation labels: a text file for each image, a line for each connected region."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import yaml
from jaxtyping import Integer

from iddc.masks.ids import write_file
from iddc.masks.labels import Classes
from iddc.masks.polygons import trace


def describe_image(ids: Integer[np.ndarray, "H W"], num_classes: int) -> bytes:
    """The id of a class, then x and y of each corner as shares of width and height.

    Args:
        ids: The class of each pixel; those of `num_classes` and more are ignored.
        num_classes: How many classes there are.
    """
    size = np.array(ids.shape[::-1])
    lines = []
    for index in np.unique(ids[ids < num_classes]).tolist():
        for polygon in trace(ids == index):
            numbers = " ".join(f"{value:.8g}" for value in (polygon / size).ravel())
            lines.append(f"{index} {numbers}\n")
    return "".join(lines).encode()


def assemble(path: Path, parts: Path, names: Sequence[PurePosixPath], classes: Classes) -> None:
    """Write data.yaml, which names the classes. A person adds where the images are.

    Args:
        path: The file.
        parts: Not read: each image has its final file already.
        names: Not read either.
        classes: The names, in the order of their ids.

    Raises:
        SetupError: It cannot be written.
    """
    del parts, names
    record = {"train": "images", "val": "images", "names": dict(enumerate(classes.names))}
    note = "# Put the images into the folder `images` beside `labels`, with the same subfolders.\n"
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    write_file(path, (note + text).encode())
