"""Potsdam-3: aerial tiles of 200 x 200, six classes merged to three, as IIC prepared them.

A tile is a Matlab file: `imgs/ID.mat` holds img (200, 200, 4), red, green, blue and infrared, of
which the first three are read; `gt/ID.mat` holds gt (200, 200), ids 0 to 5.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class MatFile(ImageFile):
    """A variable of a Matlab file, which opens as a PNG: `open_image` and `read_ids` take it."""

    variable: str = "img"

    def open(self) -> BufferedIOBase:
        """Encode the variable: (H, W) as grey, the first three channels of (H, W, C) as RGB.

        Raises:
            UnreadableImage: The file is no Matlab file, or has no such variable.
        """
        from scipy.io import loadmat  # type: ignore[attr-defined]  # no stubs

        try:
            with super().open() as stream:
                array = loadmat(stream)[self.variable]
            image = Image.fromarray(array[..., :3] if array.ndim == 3 else array.astype(np.uint16))
        except Exception as error:  # damaged files make scipy raise almost anything
            raise UnreadableImage(
                f"expected a Matlab file with the array {self.variable} ({error!r})"
            ) from error
        encoded = BytesIO()
        image.save(encoded, "PNG", compress_level=0)
        encoded.seek(0)
        return encoded


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
