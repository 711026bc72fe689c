"""CVAT's "Segmentation mask 1.1": pictures in the colours of labelmap.txt, in a zip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt16

from iddc.datasets.annotated import Annotated, Annotations
from iddc.datasets.classlist import CVAT_LIST, ClassList, read_class_list
from iddc.datasets.labelfiles import read_ids
from iddc.errors import DataError
from iddc.images import SUFFIXES, ImageFile

MASKS, IMAGES = "SegmentationClass/", "JPEGImages/"


def read_cvat(
    source: Path, members: Sequence[str], listing: str, background: str | None
) -> Annotations:
    """Read the zip; its images are in it only if they were exported too.

    Args:
        source: The zip.
        members: The names in it.
        listing: Where labelmap.txt is among them.
        background: See `open_annotations`.

    Raises:
        DataError: It has no mask, or no class.
    """
    root = listing.removesuffix(CVAT_LIST)
    text = ImageFile(source, PurePosixPath(listing), listing).read_bytes()
    classes = read_class_list(text, source / listing, background)
    if not classes.colours:
        raise DataError(f"{source}: {listing} names no colours. Export it again.")
    masks = [name for name in members if name.startswith(root + MASKS) and name.endswith(".png")]
    images = tuple(
        ImageFile(source, PurePosixPath(name.removeprefix(root + IMAGES)), name)
        for name in members
        if name.startswith(root + IMAGES) and PurePosixPath(name).suffix.lower() in SUFFIXES
    )
    items = tuple(
        Annotated(
            PurePosixPath(name.removeprefix(root + MASKS).removesuffix(".png")),
            None,
            _painter(ImageFile(source, PurePosixPath(name), name), classes),
            stem=True,
        )
        for name in sorted(masks)
    )
    return Annotations(classes.names, items, images)


def _painter(
    file: ImageFile, classes: ClassList
) -> Callable[[int, int], UInt16[np.ndarray, "H W"]]:
    return lambda _height, _width: read_ids(file, classes)
