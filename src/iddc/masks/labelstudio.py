"""Label Studio's JSON of tasks, with the masks as predictions of its brush.

The brush stores a mask as an RGBA picture, four equal bytes per pixel, in the run lengths of
thi.ng/rle-pack. In bits: how many bytes (32), the width of a value less 1 (5), four widths of a
length less 1 (4 each); then runs: 1, which of the four widths (2), the length less 1, the value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import Bool, Int64, Integer

from iddc.masks.ids import write_file
from iddc.masks.labels import Classes
from iddc.runs.files import open_atomic

_WIDTHS = np.array([3, 4, 8, 16])
"""The bits of a run's length. These are the converter's; others would be read as well."""


def brush_rle(region: Bool[np.ndarray, "H W"]) -> list[int]:
    """The region as the bytes of the brush's run lengths."""
    flat = region.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = 4 * np.diff(starts, append=flat.size)
    # A run longer than the widest length is several runs.
    pieces = -(-lengths // 2**16)
    values = np.repeat(255 * flat[starts].astype(np.int64), pieces)
    last = np.cumsum(pieces) - 1
    runs = np.full(len(values), 2**16)
    runs[last] = lengths - 2**16 * (pieces - 1)
    which = np.searchsorted(2**_WIDTHS, runs)
    width = _WIDTHS[which]
    codes = ((4 + which) << width | (runs - 1)) << 8 | values
    header = [(4 * flat.size, 32), (7, 5), *((value - 1, 4) for value in _WIDTHS.tolist())]
    head_codes, head_widths = np.array(header).T
    return _packed(np.concatenate([head_codes, codes]), np.concatenate([head_widths, 11 + width]))


def task(file_name: str, ids: Integer[np.ndarray, "H W"], names: Sequence[str]) -> bytes:
    """One image with a brush mask for each of its classes, as JSON.

    Args:
        file_name: The image, relative to the folder that Label Studio serves local files from.
        ids: The class of each pixel; those of `len(names)` and more are ignored.
        names: Of the classes.
    """
    height, width = ids.shape
    result = [
        {
            "id": f"class-{index}",
            "type": "brushlabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": brush_rle(ids == index),
                "brushlabels": [names[index]],
            },
        }
        for index in np.unique(ids[ids < len(names)]).tolist()
    ]
    image = f"/data/local-files/?d={quote(file_name, errors='surrogateescape')}"
    return json.dumps(
        {"data": {"image": image}, "predictions": [{"model_version": "iddc", "result": result}]}
    ).encode()


def assemble(path: Path, parts: Path, names: Sequence[PurePosixPath], classes: Classes) -> None:
    """Write one JSON of all tasks, and beside it the labelling configuration.

    Args:
        path: The file; the configuration has the same name and the suffix .xml.
        parts: The folder of what `task` gave for each image. One at a time is in memory.
        names: The images, in order.
        classes: What the configuration offers.

    Raises:
        SetupError: A file cannot be written.
    """
    with open_atomic(path) as file:
        file.write(b"[")
        for number, name in enumerate(names):
            file.write(b",\n" if number else b"\n")
            file.write((parts / name.with_suffix(".json")).read_bytes())
        file.write(b"\n]\n")
    labels = [
        f'    <Label value={quoteattr(name)} background="#{bytes(colour).hex()}"/>\n'
        for name, colour in zip(classes.names, classes.colours.tolist(), strict=True)
    ]
    text = (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        '  <BrushLabels name="label" toName="image">\n'
        f"{''.join(labels)}  </BrushLabels>\n</View>\n"
    )
    write_file(path.with_suffix(".xml"), text.encode())


def _packed(codes: Int64[np.ndarray, " n"], widths: Int64[np.ndarray, " n"]) -> list[int]:
    """Write each code with its number of bits, the highest first; the last byte is filled up."""
    ends = np.cumsum(widths)
    shift = np.repeat(ends, widths) - 1 - np.arange(ends[-1])
    return np.packbits((np.repeat(codes, widths) >> shift & 1).astype(np.uint8)).tolist()
