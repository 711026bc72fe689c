"""Data sets by name. Labels are for evaluation only: training takes images, and opens no label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from iddc.config import DatasetName, ReadingConfig
from iddc.datasets.annotations import AnnotatedImages, open_annotations
from iddc.datasets.cityscapes import CITYSCAPES
from iddc.datasets.cocostuff import COCOSTUFF27, COCOSTUFF171
from iddc.datasets.folder import FolderDataset, LabelledImages, Sample
from iddc.datasets.potsdam import POTSDAM3
from iddc.datasets.published import PairedImages
from iddc.errors import ConfigError
from iddc.images import AS_STORED, ImageFile, fit_to_model

__all__ = [
    "DATASETS",
    "Dataset",
    "FolderDataset",
    "LabelledImages",
    "Sample",
    "fit_dataset",
    "open_dataset",
    "outline",
    "train_images",
]


@runtime_checkable
class Dataset(Protocol):
    """What DATASETS holds: a class or a value that opens a split, and knows what to train on."""

    def __call__(self, root: Path, split: str) -> LabelledImages:
        """Open a split of the labelled data set in `root`."""

    def train_images(self, root: Path) -> Sequence[ImageFile]:
        """The images of `root` to train on."""


DATASETS: dict[DatasetName, Dataset] = {
    "folder": FolderDataset,
    "cityscapes": CITYSCAPES,
    "cocostuff27": COCOSTUFF27,
    "cocostuff171": COCOSTUFF171,
    "potsdam3": POTSDAM3,
}


def open_dataset(
    name: str,
    root: Path,
    split: str,
    *,
    binary: bool = False,
    images: Path | None = None,
    background: str | None = None,
    reading: ReadingConfig = AS_STORED,
) -> LabelledImages:
    """Open one split of a labelled data set.

    Args:
        name: One of `DATASETS`.
        root: The folder that holds it; for `folder` also a file of annotations
            (`open_annotations`).
        split: The part of it.
        reading: How the numbers of images become colours: as in the model that is scored.
        binary: Labels of a `folder` are masks of 0 and 255, and both are classes.
        images: Where the images of a file of annotations are.
        background: The name of a class for pixels that a file of annotations leaves out.

    Raises:
        ConfigError: There is no data set of this name, or no such split of it.
        DataError: `root` does not hold it, or holds it in part.
    """
    dataset = _known(name)
    if name == "folder" and root.is_file():
        if binary:
            raise ConfigError(f"--binary is for a folder of masks, and {root} is a file.")
        annotated = open_annotations(root, split, images=images, background=background)
        annotated.reading = reading
        return annotated
    if images or background is not None:
        option = "--images" if images else "--background"
        raise ConfigError(
            f"{option} is for a file of annotations (CVAT, COCO, Label Studio), and {root} is none."
        )
    if name == "folder":
        return FolderDataset(root, split, binary=binary, reading=reading)
    if not binary:
        opened = dataset(root, split)
        return replace(opened, reading=reading) if isinstance(opened, PairedImages) else opened
    raise ConfigError(f"--binary is for the data set folder: {name} says what its ids mean.")


def fit_dataset(dataset: LabelledImages) -> tuple[str, ...]:
    """Show the images of a folder or a file of annotations as `iddc predict` would show them.

    Returns:
        One line for each difference from the images that the model was trained on.
    """
    if not isinstance(dataset, FolderDataset | AnnotatedImages):
        return ()  # their images are known to be photos of 8 bits
    dataset.reading, notes = fit_to_model(dataset.files, dataset.reading)
    return notes


def train_images(name: str, root: Path) -> Sequence[ImageFile]:
    """The images on which a data set's rows are trained, found without any label.

    Raises:
        ConfigError: There is no data set of this name.
        DataError: `root` does not hold it, or holds it in part.
    """
    return _known(name).train_images(root)


def outline(name: str, root: Path, split: str) -> tuple[int, int | None]:
    """The number of images of a split, and of its classes, without opening a label.

    The number of classes is None where only the labels say it.

    Raises:
        ConfigError: There is no data set of this name, or no such split of it.
        DataError: `root` does not hold it, or holds it in part.
    """
    if name == "folder":
        return FolderDataset.outline(root, split)
    dataset = _known(name)(root, split)
    return len(dataset), dataset.num_classes


def _known(name: str) -> Dataset:
    if name not in DATASETS:
        raise ConfigError(f"Unknown data set {name!r}. Known: {', '.join(sorted(DATASETS))}.")
    return DATASETS[name]
