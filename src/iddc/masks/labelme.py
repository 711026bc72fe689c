"""LabelMe's JSON: one file for each image, a polygon for each connected region."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from iddc.masks.polygons import trace


def describe_image(path: str, ids: Integer[np.ndarray, "H W"], names: Sequence[str]) -> bytes:
    """An image and its regions.

    Args:
        path: Where LabelMe finds the image.
        ids: The class of each pixel; those of `len(names)` and more are ignored.
        names: The names of the classes.
    """
    height, width = ids.shape
    shapes = [
        {
            "label": names[index],
            "points": polygon.tolist(),
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
        }
        for index in np.unique(ids[ids < len(names)]).tolist()
        for polygon in trace(ids == index)
    ]
    record = {
        "version": "5.0.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": path,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }
    return json.dumps(record).encode()
