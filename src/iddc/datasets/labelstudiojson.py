"""Label Studio's JSON of tasks: brush masks, polygons, rectangles and ellipses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from jaxtyping import UInt16

from iddc.datasets.annotated import Annotated, Annotations
from iddc.datasets.regions import Region, from_brush_rle, from_ellipse, from_polygons
from iddc.errors import DataError
from iddc.images import listed
from iddc.metrics import IGNORE

KINDS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")
"""Fields that name the class of a region."""
_UPLOADED = re.compile(r"(?<=/)[0-9a-f]{8}-")
"""What Label Studio puts before the names of uploaded files."""


def read_tasks(tasks: list[Any], source: Path, background: str | None) -> Annotations:
    """Read an export in the format "JSON".

    A task's last annotation that was not cancelled counts; without annotations, its last
    prediction. Where regions overlap, the last one counts. Classes are in the order of
    `classes.txt` beside the file if there is one, else in that of the alphabet.

    Raises:
        DataError: It is damaged, or of the short format "JSON-MIN".
    """
    from iddc.datasets.classlist import find_class_list

    others: Counter[str] = Counter()
    found = []
    try:
        for task in tasks:
            if "data" not in task:
                raise DataError(f"{source} is not in Label Studio's format JSON, but shorter.")
            regions = []
            for result in _results(task):
                region = _shape(result, others, source)
                regions += [region] if region else []
            found.append((_path(task["data"], source), regions))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{source} is no Label Studio JSON that can be read ({error!r}).") from None
    used = {name for _, regions in found for name, _, _ in regions}
    listing = find_class_list(source.parent)
    names = [*listing.names] if listing and used <= {*listing.names} else sorted(used)
    if not names:
        raise DataError(f"{source} has no region of a class: {listed(others) or 'no annotation'}.")
    if background is not None:
        names = [background, *(name for name in names if name != background)]
    items = tuple(
        Annotated(
            path,
            regions[0][1] if regions else None,
            _painter([(names.index(name), draw) for name, _, draw in regions], background),
        )
        for path, regions in found
    )
    notes = (
        [f"{source}: results that are no regions, left out: {_counts(others)}"] if others else []
    )
    return Annotations(tuple(names), items, notes=tuple(notes))


Draw = Callable[[int, int], Region]


def _results(task: dict[str, Any]) -> list[Any]:
    done = [a for a in task.get("annotations") or [] if not a.get("was_cancelled")]
    versions = done or task.get("predictions") or []
    return list(versions[-1]["result"]) if versions else []


def _path(data: dict[str, Any], source: Path) -> PurePosixPath:
    """Where the image is: `image`, or the only field with an address."""
    texts = [value for value in data.values() if isinstance(value, str) and "." in value]
    text = data["image"] if isinstance(data.get("image"), str) else texts[0] if texts else None
    if text is None:
        raise DataError(f"{source}: a task names no image, only {listed(map(str, data))}.")
    address = urlsplit(text)
    served = parse_qs(address.query, errors="surrogateescape").get("d")
    path = served[0] if served else unquote(address.path, errors="surrogateescape")
    if "/data/upload/" in text:
        path = PurePosixPath(_UPLOADED.sub("", path)).name
    return PurePosixPath(path.replace("\\", "/").lstrip("/"))


def _shape(
    result: dict[str, Any], others: Counter[str], source: Path
) -> tuple[str, tuple[int, int], Draw] | None:
    """The class of a region, the size of its image and what draws it; None: it is none."""
    value = result.get("value") or {}
    labels = next((value[kind] for kind in KINDS if value.get(kind)), None)
    if not isinstance(labels, list) or not {"rle", "points", "width", "radiusX"} & value.keys():
        others[str(result.get("type"))] += 1
        return None
    if len(labels) != 1:
        raise DataError(f"{source}: a region has the classes {listed(map(str, labels))}, not one.")
    if result.get("image_rotation"):
        raise DataError(f"{source}: an image was turned while it was annotated. Turn the file.")
    size = int(result["original_width"]), int(result["original_height"])
    return str(labels[0]), size, _drawer(value, size)


def _drawer(value: dict[str, Any], size: tuple[int, int]) -> Draw:
    """Positions are in percent of the image."""
    if "rle" in value:
        return lambda height, width: from_brush_rle(value["rle"], height, width)
    across, down = size[0] / 100, size[1] / 100
    if "points" in value:
        polygon = [c for x, y in value["points"] for c in (float(x) * across, float(y) * down)]
        return lambda height, width: from_polygons([polygon], height, width)
    left, top = float(value["x"]) * across, float(value["y"]) * down
    turned = float(value.get("rotation") or 0)
    if "radiusX" in value:
        radii = float(value["radiusX"]) * across, float(value["radiusY"]) * down
        return lambda height, width: from_ellipse((left, top), radii, turned, height, width)
    cosine, sine = np.cos(np.radians(turned)), np.sin(np.radians(turned))
    sides = float(value["width"]) * across, float(value["height"]) * down
    corners = [(0.0, 0.0), (sides[0], 0.0), sides, (0.0, sides[1])]  # turned about the first
    box = [
        float(c)
        for x, y in corners
        for c in (left + x * cosine - y * sine, top + x * sine + y * cosine)
    ]
    return lambda height, width: from_polygons([box], height, width)


def _painter(
    regions: list[tuple[int, Draw]], background: str | None
) -> Callable[[int, int], UInt16[np.ndarray, "H W"]]:
    def paint(height: int, width: int) -> UInt16[np.ndarray, "H W"]:
        ids = np.full((height, width), IGNORE if background is None else 0, np.uint16)
        for index, draw in regions:
            ids[draw(height, width)] = index
        return ids

    return paint


def _counts(kinds: Counter[str]) -> str:
    return listed(f"{kind} ({count})" for kind, count in kinds.most_common())
