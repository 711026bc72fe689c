"""COCO's JSON of annotations: regions as run lengths or polygons, one category each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt16

from iddc.datasets.annotated import Annotated, Annotations
from iddc.datasets.regions import Region, from_coco_rle, from_polygons
from iddc.errors import DataError
from iddc.images import listed
from iddc.metrics import IGNORE


def read_coco(record: dict[str, Any], source: Path, background: str | None) -> Annotations:
    """Read a COCO JSON; classes are its categories in the order of their ids.

    Where regions overlap, the last one counts: tools list what lies on top last.

    Raises:
        DataError: It is damaged, or has boxes alone.
    """
    # Everything is read before anything is used: a wrong type may stand anywhere.
    try:
        categories = sorted((int(c["id"]), str(c["name"])) for c in record["categories"])
        images = [
            (i["id"], str(i["file_name"]), int(i["width"]), int(i["height"]))
            for i in record["images"]
        ]
        regions: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
        boxes = 0
        for annotation in record["annotations"]:
            if "segments_info" in annotation:
                raise DataError(f"{source} is COCO's panoptic format. Export instances or masks.")
            if not annotation.get("segmentation"):
                boxes += 1
                continue
            category = int(annotation["category_id"])
            regions[annotation["image_id"]].append((category, annotation["segmentation"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{source} is no COCO JSON that can be read ({error!r}).") from None
    _refuse_strange(source, categories, {image[0] for image in images}, regions)
    if boxes and not regions:
        raise DataError(
            f"{source} has boxes only ({boxes:,}). Scores need regions: masks, polygons."
        )
    # Ids may have gaps, classes have none.
    first = 0 if background is None else 1
    index = {number: first + position for position, (number, _) in enumerate(categories)}
    names = tuple(name for _, name in categories)
    return Annotations(
        names if background is None else (background, *names),
        tuple(
            Annotated(
                PurePosixPath(name.replace("\\", "/")),
                (width, height),
                _painter([(index[c], s) for c, s in regions[number]], background),
            )
            for number, name, width, height in images
        ),
        notes=(f"{source}: {boxes:,} annotations are boxes without a region, and left out",)
        if boxes
        else (),
    )


def _refuse_strange(
    source: Path,
    categories: list[tuple[int, str]],
    images: set[Any],
    regions: dict[Any, list[tuple[int, Any]]],
) -> None:
    ids, names = [i for i, _ in categories], [name for _, name in categories]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or len({*ids}) < len(ids):
        raise DataError(f"{source} has several categories of one name or id: {listed(twice)}.")
    unknown = {c for found in regions.values() for c, _ in found} - {*ids}
    if unknown or regions.keys() - images:
        raise DataError(
            f"{source} annotates images or categories that it does not list: "
            f"{listed(sorted(map(str, unknown | (regions.keys() - images))))}."
        )


def _painter(
    regions: list[tuple[int, Any]], background: str | None
) -> Callable[[int, int], UInt16[np.ndarray, "H W"]]:
    def paint(height: int, width: int) -> UInt16[np.ndarray, "H W"]:
        ids = np.full((height, width), IGNORE if background is None else 0, np.uint16)
        for index, segmentation in regions:
            ids[_region(segmentation, height, width)] = index
        return ids

    return paint


def _region(segmentation: Any, height: int, width: int) -> Region:
    if isinstance(segmentation, list):
        return from_polygons(segmentation, height, width)
    return from_coco_rle(segmentation, height, width)
