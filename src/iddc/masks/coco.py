"""COCO JSON: one annotation for each class of an image, its region as RLE or as polygons."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from iddc.masks.labels import Classes
from iddc.masks.polygons import trace
from iddc.runs.files import open_atomic

Region = Bool[np.ndarray, "H W"]


def as_rle(region: Region) -> dict[str, Any]:
    """COCO's compressed run lengths, column by column."""
    from pycocotools import mask  # type: ignore[import-untyped]  # no stubs

    rle = mask.encode(np.asfortranarray(region, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def as_polygons(region: Region) -> list[list[int]]:
    """Lists of x, y, x, y, ... in pixel corners: no pixel is lost or added."""
    return [polygon.ravel().tolist() for polygon in trace(region)]


def describe_image(
    file_name: str,
    ids: Integer[np.ndarray, "H W"],
    num_classes: int,
    segmentation: Callable[[Region], object],
) -> bytes:
    """One image and its annotations, with class + 1 as category, as JSON.

    Args:
        file_name: The image, relative to its collection.
        ids: The class of each pixel; those of `num_classes` and more are ignored.
        num_classes: How many classes there are.
        segmentation: `as_rle` or `as_polygons`.
    """
    height, width = ids.shape
    annotations = []
    for index in np.unique(ids[ids < num_classes]).tolist():
        region = ids == index
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        annotations.append(
            {
                "category_id": index + 1,
                "segmentation": segmentation(region),
                "area": int(region.sum()),
                "bbox": [int(value) for value in (left, top, right - left, bottom - top)],
                "iscrowd": 0,
            }
        )
    image = {"file_name": file_name, "width": width, "height": height}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def assemble(path: Path, parts: Path, names: Sequence[PurePosixPath], classes: Classes) -> None:
    """Write one JSON of all images. One image at a time is in memory.

    Args:
        path: The file.
        parts: The folder of what `describe_image` gave for each image.
        names: The images, in order. Ids count from 1.
        classes: The categories; all of them are listed, whether or not they occur.

    Raises:
        SetupError: It cannot be written.
    """

    def records(field: str) -> Iterator[tuple[int, Any]]:
        for image_id, name in enumerate(names, start=1):
            part = parts / name.with_suffix(".json")
            yield image_id, json.loads(part.read_bytes())[field]

    categories = (
        {"id": index, "name": name, "supercategory": ""}
        for index, name in enumerate(classes.names, start=1)
    )
    images = ({"id": image_id, **image} for image_id, image in records("image"))
    annotations = (
        {"image_id": image_id, **annotation}
        for image_id, found in records("annotations")
        for annotation in found
    )
    numbered = ({"id": index, **annotation} for index, annotation in enumerate(annotations, 1))
    with open_atomic(path) as file:
        file.write(b'{"info": {"description": "Masks by iddc"}, "licenses": []')
        for field, items in (
            ("categories", categories),
            ("images", images),
            ("annotations", numbered),
        ):
            file.write(f',\n"{field}": ['.encode())
            for number, item in enumerate(items):
                file.write(b",\n" if number else b"\n")
                file.write(json.dumps(item).encode())
            file.write(b"]")
        file.write(b"}\n")
