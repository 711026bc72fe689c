"""Every format: what it writes for one image, and how it puts a whole collection together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Integer
from PIL import Image

from iddc.errors import ConfigError
from iddc.masks import coco, cvat, labelme, labelstudio, shares, yolo
from iddc.masks.colours import overlay
from iddc.masks.ids import encode, with_palette, without_gaps
from iddc.masks.labels import Classes, Labels


@runtime_checkable
class Segmented(Protocol):
    """One image as formats take it; `segmenter.Segmentation` is one."""

    @property
    def image(self) -> Image.Image:
        """What was segmented."""

    @property
    def clusters(self) -> Integer[np.ndarray, "H W"]:
        """The cluster of every pixel."""

    @property
    def classes(self) -> Integer[np.ndarray, "H W"]:
        """The class of every pixel; ignored pixels have the highest value of the type."""

    @property
    def valid(self) -> Bool[np.ndarray, "H W"] | None:
        """Which pixels hold data; None: all of them."""

    @property
    def labels(self) -> Labels:
        """What clusters and classes are called."""

    @property
    def probs(self) -> Any:
        """The probability of every cluster at every pixel, where a format needs it."""


class Origin(NamedTuple):
    """Where other programs find an image."""

    name: str
    """The path of an image in the folder of images."""
    served: str
    """The path from the folder around that one."""
    path: str = ""
    """The absolute path; of a member of a zip, the name alone."""


@dataclass(frozen=True)
class Format:
    """How a format is written."""

    files: Mapping[str, Callable[[Origin, Segmented], bytes]]
    """What DIR/KEY holds for each image, made of its origin and its result."""
    suffix: str = ".png"
    """The suffix of those files."""
    check: Callable[[Classes], None] | None = None
    """Raises a ConfigError where the format cannot hold these classes."""
    with_probs: bool = False
    """Whether it needs probabilities."""
    whole: str = ""
    """The one file of all images, if there is one: DIR/WHOLE, made of DIR/parts/FORMAT."""
    assemble: Callable[[Path, Path, Sequence[PurePosixPath], Classes], None] | None = None
    """Makes it of the parts of the named images."""
    package: str = ""
    """The module that it needs, which the extra `formats` brings."""


def _check_palette(classes: Classes) -> None:
    if classes.of_cluster.dtype != np.uint8:
        raise ConfigError(
            f"A palette PNG holds at most 256 classes, found {len(classes.names)}. Use the formats "
            "png (ids) and overlay (colours) instead."
        )


def _npz(_: Origin, result: Segmented) -> bytes:
    data, names = BytesIO(), np.array(result.labels.names)
    probs = np.asarray(result.probs, np.float16)
    if result.valid is not None:
        probs = probs * result.valid
    clusters = without_gaps(result.clusters, result.valid, len(names))
    np.savez(data, probs=probs, clusters=clusters, names=names)
    return data.getvalue()


def _coco(segmentation: Callable[[coco.Region], object]) -> Callable[[Origin, Segmented], bytes]:
    return lambda origin, result: coco.describe_image(
        origin.name, result.classes, len(result.labels.classes.names), segmentation
    )


FORMATS: dict[str, Format] = {
    "png": Format({"png": lambda _, result: encode(Image.fromarray(result.classes))}),
    "palette": Format(
        {
            "palette": lambda _, result: encode(
                with_palette(result.classes, result.labels.classes.colours)
            )
        },
        check=_check_palette,
    ),
    "overlay": Format(
        {
            "overlay": lambda _, result: encode(
                overlay(result.image, result.classes, result.labels.classes.colours)
            )
        }
    ),
    "coco": Format(
        {"parts/coco": _coco(coco.as_rle)},
        ".json",
        whole="coco.json",
        assemble=coco.assemble,
        package="pycocotools",
    ),
    "coco-polygons": Format(
        {"parts/coco-polygons": _coco(coco.as_polygons)},
        ".json",
        whole="coco-polygons.json",
        assemble=coco.assemble,
        package="contourpy",
    ),
    "cvat": Format(
        {
            f"parts/cvat/{cvat.CLASS}": lambda _, result: encode(
                cvat.class_mask(result.classes, result.labels.classes)
            ),
            f"parts/cvat/{cvat.OBJECT}": lambda _, result: encode(cvat.object_mask(result.classes)),
        },
        check=cvat.check,
        whole="cvat.zip",
        assemble=cvat.assemble,
    ),
    "labelstudio": Format(
        {
            "parts/labelstudio": lambda origin, result: labelstudio.task(
                origin.served, result.classes, result.labels.classes.names
            )
        },
        ".json",
        whole="labelstudio.json",
        assemble=labelstudio.assemble,
    ),
    "csv": Format(
        {
            "parts/csv": lambda origin, result: shares.describe_image(
                origin.name,
                shares.count_pixels(result.classes, len(result.labels.classes.names)),
            )
        },
        ".json",
        whole="shares.csv",
        assemble=shares.assemble,
    ),
    "yolo": Format(
        {
            "yolo/labels": lambda _, result: yolo.describe_image(
                result.classes, len(result.labels.classes.names)
            )
        },
        ".txt",
        whole="yolo/data.yaml",
        assemble=yolo.assemble,
        package="contourpy",
    ),
    "labelme": Format(
        {
            "labelme": lambda origin, result: labelme.describe_image(
                origin.path or origin.name, result.classes, result.labels.classes.names
            )
        },
        ".json",
        package="contourpy",
    ),
    "npz": Format({"npz": _npz}, ".npz", with_probs=True),
}
"""What each name of `iddc predict --formats` writes."""
