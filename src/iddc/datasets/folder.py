"""A labelled data set of one's own: `DIR/{SPLIT/}images/` and `DIR/{SPLIT/}labels/`, same stems.

Labels are pictures of class ids, 255 ignored, or of the colours that a list of classes names
(`labelfiles`, `classlist`). The list, such as `classes.txt`, lies in `DIR/SPLIT` or `DIR`; without
it there are as many classes as the highest id in the labels says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iddc.config import ReadingConfig
from iddc.datasets.classlist import find_class_list
from iddc.datasets.labelfiles import (
    BINARY,
    binary_ids,
    present,
    read_ids,
    read_pair,
    refuse_grey_levels,
)
from iddc.errors import DataError
from iddc.images import AS_STORED, ImageFile, find_images, listed
from iddc.metrics import IGNORE


@dataclass(frozen=True)
class Sample:
    """An image, RGB, and the class id of each of its pixels, `IGNORE` where there is none."""

    image: Image.Image
    label: UInt8[np.ndarray, "H W"]
    name: str


@runtime_checkable
class LabelledImages(Protocol):
    """A data set to evaluate on. Ids are 0..num_classes-1 and `IGNORE`."""

    @property
    def name(self) -> str:
        """The data set, as scores.json calls it."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not they occur."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class FolderDataset:
    """A folder of images with a folder of labels beside it.

    Args:
        root: DIR of the module's docstring.
        split: SPLIT. Where `DIR/SPLIT` does not exist, `DIR/images` and `DIR/labels` are read.
        binary: The labels are masks of 0 and 255, which are two classes; nothing is ignored.

    Raises:
        DataError: Images or labels are missing, do not pair up or, when a sample is read, do not
            fit each other or the classes.
    """

    name = "folder"

    def __init__(
        self, root: Path, split: str, *, binary: bool = False, reading: ReadingConfig = AS_STORED
    ) -> None:
        self.reading = reading
        folder, self._pairs = _find_pairs(root, split)
        self._classes = find_class_list(folder, root)
        self._binary = binary
        named = self._classes.names if self._classes else ()
        if binary and len(named) not in (0, 2):
            raise DataError(
                f"Masks of 0 and 255 (--binary) have two classes, but {folder} names "
                f"{len(named)}: {listed(named)}."
            )
        if binary:
            self.class_names = named or ("background", "foreground")
        elif named:
            self.class_names = named
            if len(named) <= 2 and self._classes and not self._classes.colours:
                refuse_grey_levels(
                    self._values(at_most={0, *BINARY}), folder / "labels", named=True
                )
        else:
            self.class_names = self._scan_classes(folder / "labels")
        self.num_classes = len(self.class_names)
        if self.num_classes > IGNORE:
            raise DataError(
                f"{self.num_classes} classes in {folder}, but at most {IGNORE} can be told from "
                f"the ignored label {IGNORE}. Merge classes."
            )

    @staticmethod
    def outline(root: Path, split: str) -> tuple[int, int | None]:
        """The numbers of images, and of classes where a list of classes says it, by names alone.

        Raises:
            DataError: Images or labels are missing, do not pair up, or the list is wrong.
        """
        folder, pairs = _find_pairs(root, split)
        classes = find_class_list(folder, root)
        return len(pairs), len(classes.names) if classes else None

    @staticmethod
    def train_images(root: Path) -> Sequence[ImageFile]:
        """The images of `DIR/train`, or of DIR where there is none; labels need not be there."""
        train = root / "train"
        return find_images(train if train.is_dir() else root).files

    @property
    def files(self) -> list[ImageFile]:
        """The images."""
        return [file for file, _ in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        file, label = self._pairs[index]
        image, ids = read_pair(file, label, self._classes, self.reading)
        if self._binary:
            ids = binary_ids(ids, label)
        strange = np.unique(ids[(ids >= self.num_classes) & (ids != IGNORE)])
        if len(strange):
            raise DataError(
                f"{label}: class ids are 0 to {self.num_classes - 1}, or {IGNORE} for ignored "
                f"pixels; found {listed(map(str, strange))}. Correct the label or classes.txt."
            )
        return Sample(image, ids.astype(np.uint8), str(file.name))

    def _values(self, *, at_most: Collection[int] | None = None) -> set[int]:
        """The values of all labels; of the first ones, if they have others than `at_most`."""
        values: set[int] = set()
        for _, label in self._pairs:
            values |= present(read_ids(label, self._classes))
            if at_most is not None and not values <= {*at_most}:
                break
        return values

    def _scan_classes(self, folder: Path) -> tuple[str, ...]:
        values = self._values()
        refuse_grey_levels(values, folder, named=False)
        if not values - {IGNORE}:
            raise DataError(f"Every label pixel below {folder} is {IGNORE}.")
        return tuple(f"class {index}" for index in range(max(values - {IGNORE}) + 1))


def _find_pairs(root: Path, split: str) -> tuple[Path, list[tuple[ImageFile, ImageFile]]]:
    """The folder of a split, and its images with their labels, of which none is opened."""
    folder = _find(root, split)
    images, labels = _by_stem(folder / "images"), _by_stem(folder / "labels")
    _refuse_unpaired(images.keys() - labels.keys(), "image", "label", folder)
    _refuse_unpaired(labels.keys() - images.keys(), "label", "image", folder)
    return folder, [(images[stem], labels[stem]) for stem in sorted(images)]


def _find(root: Path, split: str) -> Path:
    for folder in (root / split, root):
        if (folder / "images").is_dir() and (folder / "labels").is_dir():
            return folder
    found = sorted(path.name for path in root.glob("*/"))
    raise DataError(
        f"No labelled images in {root}: looked for the folders images and labels in {root / split} "
        f"and in {root}; found {listed(found) or 'no folder'}. Give the folder that holds them."
    )


def _by_stem(folder: Path) -> dict[PurePosixPath, ImageFile]:
    result: dict[PurePosixPath, ImageFile] = {}
    for file in find_images(folder, include_masks=True).files:
        stem = PurePosixPath(file.path.relative_to(folder).as_posix()).with_suffix("")
        if stem in result:
            raise DataError(f"{result[stem]} and {file} share a stem. Rename or remove one.")
        result[stem] = file
    return result


def _refuse_unpaired(stems: Collection[PurePosixPath], have: str, lack: str, folder: Path) -> None:
    if stems:
        raise DataError(
            f"In {folder}, {have}s with no {lack} of the same stem ({len(stems)}): "
            f"{listed(map(str, sorted(stems)))}. Add or remove files until all are pairs."
        )
