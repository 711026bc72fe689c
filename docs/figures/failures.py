"""Draws the pictures of docs/bad-clusters.md (python docs/figures/failures.py).

A drawn scene, whose true classes are known, and masks that are wrong in one way each. They are
drawn, not found by a run: a picture shows one failure alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from iddc.datasets.synthetic import BUILDING, CAR, CLASSES, PAVEMENT, ROAD, SKY, TREE, draw_scene
from iddc.masks import overlay, palette

FOLDER = Path(__file__).parent / "failures"
SIZE = (320, 240)
GAP = 6
Ids = Integer[np.ndarray, "H W"]


def halved(truth: Ids, _: UInt8[np.ndarray, "H W 3"]) -> Ids:
    """Buildings are two clusters without a reason."""
    noise = np.random.default_rng(1).random((15, 20)).repeat(16, 0).repeat(16, 1)
    return np.where((truth == BUILDING) & (noise > 0.5), len(CLASSES), truth)


def merged(truth: Ids, _: UInt8[np.ndarray, "H W 3"]) -> Ids:
    """Road and pavement are one cluster, and so are trees and buildings."""
    ids = np.where(truth == PAVEMENT, ROAD, truth)
    return np.where(ids == TREE, BUILDING, ids)


def swallowed(truth: Ids, _: UInt8[np.ndarray, "H W 3"]) -> Ids:
    """One cluster has nearly everything."""
    return np.where(np.isin(truth, (SKY, CAR)), truth, BUILDING)


def banded(truth: Ids, _: UInt8[np.ndarray, "H W 3"]) -> Ids:
    """Clusters are rows of the image."""
    rows = np.arange(len(truth))[:, None] * len(CLASSES) // len(truth)
    return np.broadcast_to(rows, truth.shape)


def lit(_: Ids, photo: UInt8[np.ndarray, "H W 3"]) -> Ids:
    """Clusters are levels of light."""
    grey = np.asarray(Image.fromarray(photo).convert("L").resize((80, 60)).resize(SIZE, 0))
    return grey.astype(int) * len(CLASSES) // 256


def coarse(truth: Ids, _: UInt8[np.ndarray, "H W 3"]) -> Ids:
    """Small things are gone, and borders are blocks."""
    ids = truth[8::16, 8::16].repeat(16, 0).repeat(16, 1)
    return np.where(ids == CAR, ROAD, ids)


FAILURES: dict[str, Callable[[Ids, UInt8[np.ndarray, "H W 3"]], Ids]] = {
    "split": halved,
    "merged": merged,
    "swallowed": swallowed,
    "banded": banded,
    "light": lit,
    "coarse": coarse,
}


def main() -> None:
    """Write a picture for each failure: the photo, what is wrong, and how it should be."""
    FOLDER.mkdir(exist_ok=True)
    photo, truth = draw_scene(np.random.default_rng(4), SIZE)
    colours = palette(len(CLASSES) + 1)
    image = Image.fromarray(photo)
    for name, fail in FAILURES.items():
        wrong = fail(truth.astype(int), photo)
        tiles = [image, overlay(image, wrong, colours, 0.7), overlay(image, truth, colours, 0.7)]
        sheet = Image.new("RGB", (3 * (SIZE[0] + GAP) - GAP, SIZE[1]), "white")
        for place, tile in enumerate(tiles):
            sheet.paste(tile, (place * (SIZE[0] + GAP), 0))
        sheet.save(FOLDER / f"{name}.jpg", quality=82)


if __name__ == "__main__":
    main()
