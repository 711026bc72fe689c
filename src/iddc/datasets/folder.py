"""A labelled data set of one's own: `DIR/{SPLIT/}images/` and `DIR/{SPLIT/}labels/`, same stems.

Labels are single-channel PNGs of class ids, 255 ignored. `classes.txt`, in `DIR/SPLIT` or `DIR`,
names the classes, one per line; without it there are as many as the highest id in the labels says.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from iddc.errors import DataError, UnreadableImage
from iddc.images import ImageFile, find_images, listed, open_image, quiet_pillow
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

    Raises:
        DataError: Images or labels are missing, do not pair up or, when a sample is read, do not
            fit each other or the classes.
    """

    name = "folder"

    def __init__(self, root: Path, split: str) -> None:
        folder = _find(root, split)
        images, labels = _by_stem(folder / "images"), _by_stem(folder / "labels")
        _refuse_unpaired(images.keys() - labels.keys(), "image", "label", folder)
        _refuse_unpaired(labels.keys() - images.keys(), "label", "image", folder)
        self._pairs = [(images[stem], labels[stem]) for stem in sorted(images)]
        self.class_names = _class_names(folder, root) or self._scan_classes()
        self.num_classes = len(self.class_names)
        if self.num_classes > IGNORE:
            raise DataError(
                f"{self.num_classes} classes in {folder}, but at most {IGNORE} can be told from "
                f"the ignored label {IGNORE}. Merge classes."
            )

    @staticmethod
    def train_images(root: Path) -> tuple[ImageFile, ...]:
        """The images of `DIR/train`, or of DIR where there is none; labels need not be there."""
        train = root / "train"
        return find_images(train if train.is_dir() else root).files

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        file, label = self._pairs[index]
        image, ids = read_pair(file, label)
        strange = np.unique(ids[(ids >= self.num_classes) & (ids != IGNORE)])
        if len(strange):
            raise DataError(
                f"{label}: class ids are 0 to {self.num_classes - 1}, or {IGNORE} for ignored "
                f"pixels; found {listed(map(str, strange))}. Correct the label or classes.txt."
            )
        return Sample(image, ids.astype(np.uint8), str(file.name))

    def _scan_classes(self) -> tuple[str, ...]:
        highest = -1
        for _, label in self._pairs:
            ids = read_ids(label)
            known = ids[ids != IGNORE]
            highest = max(highest, int(known.max()) if known.size else -1)
        if highest < 0:
            raise DataError(f"Every label pixel below {self._pairs[0][1].path.parent} is {IGNORE}.")
        return tuple(f"class {index}" for index in range(highest + 1))


def read_pair(image: ImageFile, label: ImageFile) -> tuple[Image.Image, UInt16[np.ndarray, "H W"]]:
    """Read an image and the ids of its pixels.

    Raises:
        DataError: One cannot be read, or they differ in size.
    """
    opened, ids = open_image(image), read_ids(label)
    if ids.shape != (opened.height, opened.width):
        raise DataError(
            f"{label} is {ids.shape[1]} x {ids.shape[0]} pixels, but its image {image} is "
            f"{opened.width} x {opened.height}. A label has the size of its image."
        )
    return opened, ids


def read_ids(file: ImageFile | Path) -> UInt16[np.ndarray, "H W"]:
    """Read the ids that a single-channel PNG stores: palette indices, or grey of any bit depth.

    Raises:
        DataError: The file is damaged, or has colour or transparency instead of ids.
    """
    if isinstance(file, Path):
        file = ImageFile(file, PurePosixPath(file.name))
    try:
        encoded = BytesIO(file.read_bytes())
        with quiet_pillow, Image.open(encoded, formats=["PNG"]) as image:
            mode = image.mode
            # Pillow stretches grey of 2 and 4 bits to 0..255, which would change the ids.
            stretch = {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1)
            pixels = np.asarray(image)
    except UnreadableImage as error:  # it says itself what was expected
        raise DataError(f"{file}: {error}") from error
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise DataError(f"{file} is not a PNG that can be read ({error}).") from error
    if pixels.ndim != 2:
        raise DataError(
            f"{file} has {pixels.shape[2]} channels ({mode}). Labels are single-channel PNGs of "
            f"class ids, {IGNORE} for ignored pixels."
        )
    return pixels.astype(np.uint16) // stretch


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
    for file in find_images(folder).files:
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


def _class_names(folder: Path, root: Path) -> tuple[str, ...]:
    for path in (folder / "classes.txt", root / "classes.txt"):
        if path.is_file():
            try:
                text = path.read_text("utf-8-sig")
                names = [name.strip() for name in text.strip().splitlines()]
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text.") from error
            if not names:
                raise DataError(f"{path} is empty. Expected one class name per line, or no file.")
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f"{path} names {listed(twice)} twice. Give each class its own.")
            return tuple(names)
    return ()
