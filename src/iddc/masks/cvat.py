"""CVAT's "Segmentation mask 1.1": a zip in the layout of Pascal VOC.

Its reader takes labelmap.txt apart at colons, knows no escapes, and needs every colour declared.
Every colour of SegmentationObject must be one of Pascal VOC's 256; its colour 0 is left out, which
is how ignored pixels stay without annotation.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from iddc.errors import ConfigError
from iddc.masks.ids import with_palette, write_file
from iddc.masks.labels import Classes
from iddc.runs.files import open_atomic

MAX_CLASSES = 255
"""Pascal VOC has 256 colours, and the first is for pixels without a class."""
CLASS, OBJECT = "SegmentationClass", "SegmentationObject"


def check(classes: Classes) -> None:
    """Refuse what the format cannot hold.

    Raises:
        ConfigError: There are more than 255 classes, or two of one colour, or a black one.
    """
    if len(classes.names) > MAX_CLASSES:
        raise ConfigError(
            f"CVAT's segmentation masks hold at most {MAX_CLASSES} classes, found "
            f"{len(classes.names)}. Merge or ignore clusters (iddc label), or use coco."
        )
    owners = {(0, 0, 0): "pixels without a class"}
    for name, colour in zip(classes.names, map(tuple, classes.colours.tolist()), strict=True):
        if colour in owners:
            raise ConfigError(
                f"CVAT tells classes by their colours, but {name!r} has that of "
                f"{owners[colour]!r}, {colour}. Give it another one (iddc label)."
            )
        owners[colour] = name


def class_mask(ids: Integer[np.ndarray, "H W"], classes: Classes) -> Image.Image:
    """The mask in the colours of the classes: class + 1 is the line in labelmap.txt."""
    black = np.zeros((1, 3), np.uint8)
    return with_palette(_shifted(ids), np.concatenate([black, classes.colours]))


def object_mask(ids: Integer[np.ndarray, "H W"]) -> Image.Image:
    """The same mask in Pascal VOC's colours: each class of an image is one object."""
    return with_palette(_shifted(ids), voc_colours())


def voc_colours() -> UInt8[np.ndarray, "256 3"]:
    """Pascal VOC's colours: from the lowest bit of the index on, red, green, blue, red, ..."""
    index = np.arange(256)[:, None] >> np.arange(3)
    bits = [((index >> 3 * bit) & 1) << (7 - bit) for bit in range(3)]
    colours: np.ndarray = np.bitwise_or.reduce(bits).astype(np.uint8)
    return colours


def assemble(path: Path, parts: Path, names: Sequence[PurePosixPath], classes: Classes) -> None:
    """Write the zip, and beside it the labels that the CVAT task needs. One mask is in memory.

    Args:
        path: The zip; the labels are `cvat-labels.json` in the same folder.
        parts: The folder with the folders CLASS and OBJECT.
        names: The images.
        classes: All of them are declared, whether or not they occur.

    Raises:
        SetupError: A file cannot be written.
    """
    labels = label_names(classes.names)
    rows = [
        f"{label}:{','.join(map(str, colour))}::"
        for label, colour in zip(labels, [[0] * 3, *classes.colours.tolist()], strict=True)
    ]
    with open_atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", *rows, ""]))
        stems = "".join(f"{in_list(name)}\n" for name in names)
        _add(archive, "ImageSets/Segmentation/default.txt", stems)
        for folder in (CLASS, OBJECT):
            for name in names:
                mask = (parts / folder / name.with_suffix(".png")).read_bytes()
                _add(archive, f"{folder}/{in_list(name)}.png", mask)
    wanted = [
        {"name": label, "color": f"#{bytes(colour).hex()}", "type": "any", "attributes": []}
        for label, colour in zip(labels[1:], classes.colours.tolist(), strict=True)
    ]
    write_file(path.with_name("cvat-labels.json"), json.dumps(wanted, indent=1).encode() + b"\n")


def label_names(names: Sequence[str]) -> list[str]:
    """Names that labelmap.txt can hold, no two equal, after that of pixels without a class."""
    taken: list[str] = []
    for name in ("background", *names):
        fitting = re.sub(r"^#|[:\x00-\x1f\x7f]", "_", name)
        while fitting in taken or (not taken and fitting in names):
            fitting += "_"
        taken.append(fitting)
    return taken


def _shifted(ids: Integer[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Class + 1. The id of ignored pixels, 255, becomes 0."""
    return ids.astype(np.uint8) + np.uint8(1)


def in_list(name: PurePosixPath) -> str:
    """An image without its suffix, as a line of the list of images.

    CVAT takes a line that begins with # for a comment, and drops spaces around it. Such characters,
    and those that a line in UTF-8 cannot hold, are written as %XX.
    """
    stem = str(name.with_suffix(""))
    unfit = r"[\x00-\x1f\x7f\ud800-\udfff]|^#|^\s|\s$"
    return re.sub(unfit, lambda m: f"%{ord(m[0]) & 255:02X}", stem)


def _add(archive: zipfile.ZipFile, name: str, data: str | bytes) -> None:
    """Add a member that does not depend on the clock and that everybody may read."""
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o644 << 16
    archive.writestr(member, data)
