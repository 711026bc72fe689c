"""Decoding and cropping, beside the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from iddc.bench.compare import Part, relative_error
from iddc.bench.inputs import CASES, Inputs
from iddc.bench.machine import Work
from iddc.images import ImageFile, open_image
from iddc.views import Crops, cut, draw_crops


def decode_part(inputs: Inputs) -> Part:
    """The JPEGs of a batch."""
    return Part(
        name="decode",
        reference=lambda: [Image.open(file.path).convert("RGB") for file in inputs.files],
        fast=lambda: [open_image(file) for file in inputs.files],
        work=decode_work(inputs.files),
        difference=lambda a, b: relative_error([*map(np.array, a)], [*map(np.array, b)]),
        tolerance=0.0,
    )


def decode_work(files: Sequence[ImageFile]) -> Work:
    """The encoded bytes and the pixels; what a JPEG takes to decode is not counted."""
    traffic = 0
    for file in files:
        with Image.open(file.path) as image:
            traffic += file.path.stat().st_size + 3 * image.width * image.height
    return Work(traffic=traffic)


def views_part(inputs: Inputs) -> Part:
    """The two crops of every decoded image of a batch."""
    experiment = CASES[0].experiment(len(inputs.files))
    side = experiment.views.crop_size
    images = [open_image(file) for file in inputs.files]
    drawn = [
        draw_crops(image.size, experiment.views, np.random.default_rng(index))
        for index, image in enumerate(images)
    ]
    pairs = list(zip(images, drawn, strict=True))
    return Part(
        name="views",
        reference=lambda: torch.stack(
            [reference_cut(image, crops, side) for image, crops in pairs]
        ),
        fast=lambda: torch.stack([cut(image, crops, side) for image, crops in pairs]),
        work=views_work(len(images), side),
        difference=relative_error,
        tolerance=0.01,
    )


def reference_cut(image: Image.Image, crops: Crops, side: int) -> UInt8[Tensor, "2 3 S S"]:
    """Scale the whole image, then cut out both crops and mirror them."""
    whole = image.resize(crops.size, Image.Resampling.BILINEAR)
    cutouts = [whole.crop((left, top, left + side, top + side)) for left, top in crops.corners]
    pixels = torch.from_numpy(np.stack([*map(np.asarray, cutouts)])).permute(0, 3, 1, 2)
    return pixels.flip(-1) if crops.flip else pixels


def views_work(images: int, side: int) -> Work:
    """Two crops of each image: about as many bytes are read as written."""
    return Work(traffic=2 * images * 2 * 3 * side**2)
