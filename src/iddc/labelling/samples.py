"""What the page shows: a dozen images as the model sees them, and where each cluster fills most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from iddc.config import ReadingConfig
from iddc.errors import UnreadableImage
from iddc.images import AS_STORED, ImageFile, Picture, open_picture
from iddc.masks import Segmented
from iddc.progress import Progress

NUM_SAMPLES = 12
NONE = 65535
"""What pixels without data have in the place of a cluster, which is 65534 at most."""
TILE = 128
"""The side of an example of a cluster, in pixels of a sample."""
_MAX_SIDE = 768
_CELL = 16
"""Squares begin at its multiples; 8 of them are a TILE."""
_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Sample:
    """An image, reduced to at most 768 pixels a side, and the cluster of each of its pixels."""

    name: str
    image: Image.Image
    clusters: Integer[np.ndarray, "H W"]
    """NONE where there is no data."""


class Example(NamedTuple):
    """A square of TILE pixels that shows a cluster."""

    sample: int
    left: int
    top: int


def predict_samples(
    predict: Callable[[Picture], Segmented],
    files: Sequence[ImageFile],
    progress: Progress,
    reading: ReadingConfig = AS_STORED,
) -> list[Sample]:
    """Segment a dozen of the images, evenly spread. Unreadable ones are named and left out."""
    num = min(NUM_SAMPLES, len(files))
    samples = []
    with progress.job(num):
        for index in range(num):
            file = files[index * len(files) // num]
            try:
                result = predict(open_picture(file, reading=reading))
            except UnreadableImage as error:
                progress.note(f"note: {error}")
            else:
                clusters = result.clusters
                if result.valid is not None:
                    clusters = np.where(result.valid, clusters.astype(np.uint16), np.uint16(NONE))
                samples.append(reduced(str(file.name), result.image, clusters))
            progress.update(index + 1, f"sample {index + 1}/{num}", str(file.name))
    return samples


def spread(num_files: int) -> Iterator[list[int]]:
    """All numbers below `num_files`, a dozen at a time, each dozen spread over those left."""
    left = [*range(num_files)]
    while left:
        taken = min(NUM_SAMPLES, len(left))
        chosen = [left[number * len(left) // taken] for number in range(taken)]
        yield chosen
        left = [number for number in left if number not in chosen]


def reduced(name: str, image: Image.Image, clusters: Integer[np.ndarray, "H W"]) -> Sample:
    """A sample of a page's size. Clusters are picked, never mixed."""
    scale = min(1, _MAX_SIDE / max(image.size))
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    ids = Image.fromarray(clusters).resize(size, Image.Resampling.NEAREST)
    return Sample(name, image.resize(size, Image.Resampling.LANCZOS), np.asarray(ids))


def shares(samples: Sequence[Sample], num_clusters: int) -> Float[np.ndarray, " k"]:
    """The share of each cluster among all pixels of the samples, in [0, 1]."""
    counts = np.zeros(num_clusters)
    for sample in samples:
        held = sample.clusters[sample.clusters != NONE]
        counts += np.bincount(held, minlength=num_clusters)
    counts /= max(1, counts.sum())
    return counts


def find_examples(samples: Sequence[Sample], num_clusters: int) -> list[list[Example]]:
    """For every cluster the squares that it fills most, the best first, at most one of a sample.

    The middle of a square counts more, so that a small region is not at its border.
    """
    found: list[list[tuple[int, Example]]] = [[] for _ in range(num_clusters)]
    for index, sample in enumerate(samples):
        height, width = sample.clusters.shape
        rows, columns = -(-height // _CELL), -(-width // _CELL)
        present, which = np.unique(sample.clusters, return_inverse=True)
        cell = np.arange(height)[:, None] // _CELL * columns + np.arange(width) // _CELL
        counts = np.bincount(
            (cell * len(present) + which.reshape(height, width)).ravel(),
            minlength=rows * columns * len(present),
        ).reshape(rows, columns, len(present))
        # Sums of 5, then of 4 neighbours: 8 cells, with the weights 1 2 3 4 4 3 2 1.
        for axis, length in product((0, 1), (5, 4)):
            counts = _sums(counts, length, axis)
        inside = counts.reshape(-1, len(present))
        for cluster, best, count in zip(present, inside.argmax(0), inside.max(0), strict=True):
            if cluster == NONE:
                continue
            top, left = divmod(int(best), counts.shape[1])
            found[cluster].append((-int(count), Example(index, left * _CELL, top * _CELL)))
    return [[example for _, example in sorted(each)[:_EXAMPLES]] for each in found]


def _sums(
    counts: Integer[np.ndarray, "r c p"], length: int, axis: int
) -> Integer[np.ndarray, "s t p"]:
    """The sums of all runs of so many neighbours along an axis; of all if there are fewer."""
    total = np.insert(counts.cumsum(axis), 0, 0, axis)
    length = min(length, counts.shape[axis])
    starts = np.arange(total.shape[axis] - length)
    sums: np.ndarray = total.take(starts + length, axis) - total.take(starts, axis)
    return sums
