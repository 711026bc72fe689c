"""Labels that are one file of all images, as annotation tools export them, as a data set.

CVAT's "Segmentation mask 1.1", COCO and Label Studio are read; `open_annotations` tells which it
is. A file says where its images were when they were annotated, so they are looked for by the ends
of their paths.
"""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
from jaxtyping import UInt8

from iddc.config import ReadingConfig
from iddc.datasets.annotated import Annotated, Annotations
from iddc.datasets.classlist import CVAT_LIST
from iddc.datasets.cocojson import read_coco
from iddc.datasets.cvatzip import read_cvat
from iddc.datasets.folder import Sample
from iddc.datasets.labelfiles import refuse_other_size
from iddc.datasets.labelstudiojson import read_tasks
from iddc.errors import DataError
from iddc.images import AS_STORED, SUFFIXES, ImageFile, find_images, listed, open_picture
from iddc.metrics import IGNORE

CLAIM = "predictions.json"
"""Marks a folder of masks that iddc wrote; it says which images they are of."""
_LARGEST = 2_000_000_000
"""The largest file of annotations, in bytes."""


class AnnotatedImages:
    """The images of a file of annotations with their labels.

    Args:
        source: The file.
        annotations: What it holds.
        images: The photos among which its images are.

    Raises:
        DataError: There is no annotation, images are missing or cannot be told apart or, when a
            sample is read, they do not fit the annotations.
    """

    name = "folder"
    reading: ReadingConfig = AS_STORED
    """How the numbers of an image become colours."""

    def __init__(
        self, source: Path, annotations: Annotations, images: Sequence[ImageFile], where: str
    ) -> None:
        self.source = source
        self.class_names = annotations.class_names
        self.num_classes = len(self.class_names)
        if not annotations.items:
            raise DataError(f"{source} annotates no image.")
        if not 0 < self.num_classes <= IGNORE:
            raise DataError(
                f"{source} has {self.num_classes} classes, expected 1 to {IGNORE}. "
                "Merge classes, or export those that are used."
            )
        finder = _Finder(images)
        pairs = [(finder.find(item), item) for item in annotations.items]
        missing = [str(item.path) for file, item in pairs if file is None]
        if missing:
            raise DataError(
                f"{len(missing):,} of {len(pairs):,} images of {source} are not in {where}: "
                f"{listed(missing)}. Give the folder, zip or list that holds them with --images."
            )
        self._pairs = [(file, item) for file, item in pairs if file]
        twice = len(self._pairs) - len({file for file, _ in self._pairs})
        if twice:
            raise DataError(f"{source} annotates {twice:,} images twice. Export each once.")
        left = len(images) - len(self._pairs)
        self.notes = annotations.notes + (
            (f"{left:,} images of {where} are not in {source}: they are not scored",)
            if left
            else ()
        )

    @property
    def files(self) -> list[ImageFile]:
        """The images."""
        return [file for file, _ in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        file, item = self._pairs[index]
        picture = open_picture(file, reading=self.reading)
        image = picture.image
        what = f"{item.path} in {self.source}"
        if item.size:
            refuse_other_size(what, item.size, file, image)
        try:
            ids: UInt8[np.ndarray, "H W"] = item.paint(image.height, image.width).astype(np.uint8)
        except DataError as error:
            raise DataError(f"{what}: {error}") from None
        refuse_other_size(what, (ids.shape[1], ids.shape[0]), file, image)
        if picture.valid is not None:
            ids[~picture.valid] = IGNORE
        return Sample(image, ids, str(file.name))


def open_annotations(
    source: Path, split: str, *, images: Path | None = None, background: str | None = None
) -> AnnotatedImages:
    """Open a file of annotations as a data set.

    Args:
        source: A zip of CVAT ("Segmentation mask 1.1" or COCO), a COCO JSON, or a Label Studio
            JSON.
        split: Which JSON of a zip with several is read.
        images: Where the images are; without it, in the zip or in the folder of the file.
        background: The name of a class for pixels without an annotation; else these are ignored.

    Raises:
        DataError: It is of another kind, damaged, or its images are not found.
    """
    if source.stat().st_size > _LARGEST:
        raise DataError(f"{source} is larger than {_LARGEST // 10**9} GB.")
    inside: Sequence[ImageFile] = ()
    if source.suffix.lower() == ".zip":
        members = _members(source)
        lists = [name for name in members if PurePosixPath(name).name == CVAT_LIST]
        jsons = [name for name in members if name.lower().endswith(".json")]
        if lists:
            found = read_cvat(source, members, lists[0], background)
        elif jsons:
            member = _of_split(jsons, split, source)
            found = _of_json(
                _parsed(_read(source, member), f"{source}!{member}"), source, background
            )
            inside = find_images(source).files if _holds_images(members) else ()
        else:
            raise DataError(
                f'{source} is neither CVAT\'s "Segmentation mask 1.1" ({CVAT_LIST}) nor a zip with '
                f"a COCO JSON; it holds {listed(sorted(members)) or 'nothing'}. Export one of them."
            )
    else:
        found = _of_json(_parsed(source.read_bytes(), str(source)), source, background)
    inside = inside or found.images
    if images:
        return AnnotatedImages(
            source, found, find_images(images, include_masks=True).files, str(images)
        )
    if inside:
        return AnnotatedImages(source, found, inside, str(source))
    folder = _default_folder(source)
    return AnnotatedImages(source, found, find_images(folder).files, str(folder))


def _default_folder(source: Path) -> Path:
    """The folder of the images where nobody says which: that of the file, or of our masks."""
    claim = source.parent / CLAIM
    if claim.is_file():
        try:
            images = json.loads(claim.read_bytes())["images"]
        except (ValueError, KeyError, TypeError, RecursionError):
            images = ""
        if isinstance(images, str) and Path(images).exists():
            return Path(images)
        raise DataError(
            f"{source} lies among masks, whose images are no longer at {images!r}. Give the "
            "folder, zip or list that holds them with --images."
        )
    return source.parent


def _of_json(record: Any, source: Path, background: str | None) -> Annotations:

    if isinstance(record, list):
        return read_tasks(record, source, background)
    if isinstance(record, dict) and {"images", "annotations", "categories"} <= record.keys():
        return read_coco(record, source, background)
    if isinstance(record, dict) and {"shapes", "imagePath"} <= record.keys():
        raise DataError(
            f"{source} is LabelMe's JSON of one image. Convert the folder to COCO, or to PNGs."
        )
    raise DataError(
        f"{source} is neither COCO (images, annotations and categories) nor Label Studio's list of "
        "tasks. Export one of these."
    )


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON that can be read ({error}).") from None


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(f"{path} is not a zip that can be read: {error}.") from error


def _read(path: Path, member: str) -> bytes:
    return ImageFile(path, PurePosixPath(member), member).read_bytes()


def _of_split(jsons: list[str], split: str, source: Path) -> str:
    if len(jsons) == 1:
        return jsons[0]
    fitting = [name for name in jsons if split in PurePosixPath(name).stem]
    fitting = [name for name in fitting if "instances" in name] or fitting
    if len(fitting) != 1:
        raise DataError(
            f"{source} holds {len(jsons)} JSON files: {listed(sorted(jsons))}. Give the split that "
            "is in the name of one, such as --split default, or unpack the one you mean."
        )
    return fitting[0]


def _holds_images(members: Sequence[str]) -> bool:

    return any(PurePosixPath(name).suffix.lower() in SUFFIXES for name in members)


class _Finder:
    """Finds images by the ends of their paths."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        self._by_name: dict[str, list[tuple[tuple[str, ...], ImageFile]]] = defaultdict(list)
        self._by_stem: dict[str, list[tuple[tuple[str, ...], ImageFile]]] = defaultdict(list)
        for file in files:
            # The name may have been changed to be unique; the path is what others see.
            path = PurePosixPath(
                (file.inside if file.member else str(file.path.absolute())).replace("\\", "/")
            )
            self._by_name[path.name].append((path.parts, file))
            self._by_stem[path.stem].append((path.parts, file))
        self._common = len(
            _common([parts for found in self._by_name.values() for parts, _ in found])
        )

    def find(self, item: Annotated) -> ImageFile | None:
        """The image whose path ends as the annotation says, or the other way round.

        Raises:
            DataError: There are several.
        """
        paths = [item.path, PurePosixPath(unquote(str(item.path), errors="surrogateescape"))]
        for path in dict.fromkeys(paths):
            found = self._matches(path, stem=item.stem)
            if len(found) > 1:
                raise DataError(
                    f"Several images may be {path}: {listed(str(file) for file in found)}. Give "
                    "the folder that holds one of them with --images."
                )
            if found:
                return found[0]
        return None

    def _matches(self, path: PurePosixPath, *, stem: bool) -> list[ImageFile]:
        index = self._by_stem if stem else self._by_name
        wanted = [part for part in path.parts if part not in ("/", "..")]
        found: list[tuple[tuple[str, ...], ImageFile]] = []
        for parts, file in index.get(path.name, []):
            folders = parts[:-1]
            mine, theirs = folders[self._common :], tuple(wanted[:-1])
            if _ends(folders, theirs) or _ends(theirs, mine):
                found.append((mine, file))
        exact = [file for mine, file in found if mine == tuple(wanted[:-1])]
        return exact if len(exact) == 1 else [file for _, file in found]


def _ends(parts: tuple[str, ...], end: tuple[str, ...]) -> bool:
    return not end or parts[-len(end) :] == end


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all paths begin with."""
    if not paths:
        return ()
    first, last = min(paths)[:-1], max(paths)[:-1]
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:same]
