"""What the published data sets share: files where the download put them, in pairs, and a table.

A data set is a `Published` value: where images and labels lie (a folder, or a folder inside a zip
that is read in place), which of them a split has, and which class each id of a label means.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from iddc.config import DatasetName, ReadingConfig
from iddc.datasets.folder import Sample
from iddc.datasets.labelfiles import read_pair
from iddc.errors import ConfigError, DataError
from iddc.images import AS_STORED, ImageFile, listed

FAKE = "FAKE.txt"
"""A folder with this file is a fake copy (`datasets/fake.py`): any number of images will do."""
_UNKNOWN = 254
"""In a table: no id of the data set. No data set has so many classes."""


@dataclass(frozen=True)
class Files:
    """Where the files of one kind lie below a root."""

    locations: tuple[str, ...]
    """Folders, the first that holds any is read. "a.zip!b" is b in a.zip; {split} is filled in."""
    suffix: str
    """How their names end; what comes before, with the folders, is the stem that makes pairs."""
    opened_as: Callable[[Path, PurePosixPath, str | None], ImageFile] = ImageFile

    def find(self, root: Path, split: str) -> tuple[str, dict[str, ImageFile]]:
        """The place that was read, and its files by stem; ("", {}) if there is none."""
        for location in self.locations:
            where = location.format(split=split)
            files = {
                name.removesuffix(self.suffix): self.opened_as(path, PurePosixPath(name), member)
                for path, name, member in _walk(root, where)
                if name.endswith(self.suffix) and not name.rpartition("/")[2].startswith(".")
            }
            if files:
                return where, files
        return "", {}


@dataclass(frozen=True)
class Published:
    """A published data set. `DATASETS["cityscapes"](root, "val")` opens a split of it."""

    name: DatasetName
    title: str
    """The name in sentences."""
    class_names: tuple[str, ...]
    classes: Mapping[int, int]
    """The class of each id that a label may hold, `IGNORE` for pixels that are not scored."""
    counts: Mapping[str, int]
    """The splits, and how many images each has."""
    images: Files
    labels: Files
    stems: Callable[[Path, str], Sequence[str]] | None = None
    """Which images a split has, by root and split; None: all that are found."""

    def __call__(self, root: Path, split: str) -> PairedImages:
        """Open a split.

        Raises:
            ConfigError: It has no such split.
            DataError: `root` does not hold it, or holds it in part.
        """
        images = self.images_of(root, split)
        where, labels = self.labels.find(root, split)
        if not labels:
            raise self._not_found(self.labels, "labels", root, split)
        if missing := [stem for stem in images if stem not in labels]:
            raise DataError(
                f"{len(missing):,} of {len(images):,} images of {self.title} ({split}) have no "
                f"label: expected {root / where / missing[0]}{self.labels.suffix}. "
                "Unpack or download the labels again."
            )
        table = np.full(2**16, _UNKNOWN, np.uint8)
        for index, class_id in self.classes.items():
            table[index] = class_id
        pairs = tuple((file, labels[stem]) for stem, file in images.items())
        return PairedImages(self.name, self.title, self.class_names, table, pairs)

    def train_images(self, root: Path) -> tuple[ImageFile, ...]:
        """The images of the split `train`. No label is looked for.

        Raises:
            DataError: `root` does not hold them, or holds them in part.
        """
        return tuple(self.images_of(root, "train").values())

    def images_of(self, root: Path, split: str) -> dict[str, ImageFile]:
        """The images of a split by stem, sorted or in the order of its list."""
        if split not in self.counts:
            raise ConfigError(
                f"{self.title} has no split {split!r}. Known: {', '.join(self.counts)}."
            )
        where, found = self.images.find(root, split)
        if not found:
            raise self._not_found(self.images, "images", root, split)
        stems = self.stems(root, split) if self.stems else sorted(found)
        fake = (root / FAKE).is_file()
        missing = [stem for stem in stems if stem not in found]
        if missing and not fake:
            raise DataError(
                f"{len(missing):,} of the {len(stems):,} images in the list of {self.title} "
                f"({split}) are missing: expected "
                f"{root / where / missing[0]}{self.images.suffix}. Unpack or download them again."
            )
        images = {stem: found[stem] for stem in stems if stem in found}
        if len(images) != self.counts[split] and not fake:
            raise DataError(
                f"{root / where} has {len(images):,} images; {self.title} ({split}) has "
                f"{self.counts[split]:,}. Unpack or download it again."
            )
        return images

    def _not_found(self, files: Files, kind: str, root: Path, split: str) -> DataError:
        locations = ", ".join(location.format(split=split) for location in files.locations)
        _, folders, names = next(os.walk(root), ("", [], []))
        return DataError(
            f"No {kind} of {self.title} ({split}) in {root}: looked for *{files.suffix} in "
            f"{locations}; found {listed(sorted(folders + names)) or 'nothing'}. Give the folder "
            "that holds the download (docs/protocols.md, Data sets)."
        )


@dataclass(frozen=True, eq=False)
class PairedImages:
    """One split of a published data set; satisfies `LabelledImages`."""

    name: str
    title: str
    class_names: tuple[str, ...]
    table: UInt8[np.ndarray, "65536"]
    """The class of each id."""
    pairs: tuple[tuple[ImageFile, ImageFile], ...]
    """Image and label."""
    reading: ReadingConfig = AS_STORED
    """How the numbers of an image become colours."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not they occur."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        file, label = self.pairs[index]
        image, ids = read_pair(file, label, reading=self.reading)
        classes = self.table[ids]
        strange = np.unique(ids[classes == _UNKNOWN])
        if len(strange):
            known = ranges(np.flatnonzero(self.table != _UNKNOWN).tolist())
            raise DataError(
                f"{label}: the ids of {self.title} are {known}; found "
                f"{listed(map(str, strange))}. Download the labels again."
            )
        return Sample(image, classes, str(file.name))


def ranges(ids: Collection[int]) -> str:
    """Write sorted ids shortly: 0-10, 12, 255."""
    pieces: list[list[int]] = []
    for index in ids:
        if pieces and pieces[-1][-1] == index - 1:
            pieces[-1][1:] = [index]
        else:
            pieces.append([index])
    return ", ".join("-".join(map(str, piece)) for piece in pieces)


def _walk(root: Path, location: str) -> Iterator[tuple[Path, str, str | None]]:
    """Each file of a location: where it is, its name below the location, its member in a zip."""
    archive, _, folder = location.rpartition("!")
    if not archive:
        for here, _, names in os.walk(root / folder, followlinks=True):
            below = Path(here).relative_to(root / folder).as_posix()
            for name in names:
                yield Path(here, name), name if below == "." else f"{below}/{name}", None
    elif (path := root / archive).exists():
        try:
            with zipfile.ZipFile(path) as opened:
                members = opened.namelist()
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(
                f"{path} is not a zip that can be read ({error}). Download it again."
            ) from error
        for member in members:
            if member.startswith(f"{folder}/"):
                yield path, member.removeprefix(f"{folder}/"), member
