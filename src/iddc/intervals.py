"""How far a score depends on which images happened to be labelled: a bootstrap over images.

Images are drawn with replacement, as many as there are, and scored with the matching of the whole
set; the middle 95 % of many such scores are the interval. It says nothing of other seeds of a
training, and is too narrow where images resemble each other, as the frames of a video do: then
fewer images are independent than were counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Int64

from iddc.metrics import UNMATCHED, Confusion

RESAMPLES = 1000
"""How many times images are drawn."""
LEVEL = 0.95
"""The share of the scores that lie within the interval."""

Interval = tuple[float, float]


@dataclass
class ImageCounts:
    """The confusion of each image, without its zeros: of many clusters most do not occur."""

    shape: tuple[int, int]
    """Clusters and classes."""
    parts: list[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]] = field(
        default_factory=list
    )
    """The cells in the flattened table and their counts, for each image."""

    def add(self, confusion: Confusion) -> None:
        """Add an image."""
        flat = confusion.counts.ravel()
        cells = np.flatnonzero(flat)
        self.parts.append((cells, flat[cells]))

    def by_class(
        self, matching: Sequence[int]
    ) -> tuple[Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"], Float64[np.ndarray, "n c"]]:
        """The pixels of each image that are right, that have a class, and that are given it."""
        classes = self.shape[1]
        given = np.array(matching)
        hits, true, found = np.zeros((3, len(self.parts), classes))
        for image, (cells, counts) in enumerate(self.parts):
            cluster, label = np.divmod(cells, classes)
            predicted = given[cluster]
            right, known = predicted == label, predicted != UNMATCHED
            np.add.at(true[image], label, counts)
            np.add.at(hits[image], label[right], counts[right])
            np.add.at(found[image], predicted[known], counts[known])
        return hits, true, found


def intervals(counts: ImageCounts, matching: Sequence[int]) -> dict[str, Interval]:
    """The intervals of accuracy and mIoU, as fractions; nothing for less than two images.

    The draws are `numpy.random.default_rng(0).integers(n, size=(RESAMPLES, n))`, so a repeated
    evaluation gives the same. A draw without a labelled pixel does not count.
    """
    images = len(counts.parts)
    if images < 2:
        return {}
    drawn = np.random.default_rng(0).integers(images, size=(RESAMPLES, images))
    times = np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(float)
    hits, true, found = (times @ table for table in counts.by_class(matching))
    pixels = true.sum(1)
    hits, true, found = (table[pixels > 0] for table in (hits, true, found))
    union = true + found - hits
    # As for the whole: a class that neither labels nor predictions have does not count.
    iou = np.where(union > 0, hits / np.maximum(union, 1), np.nan)
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    values = {"accuracy": hits.sum(1) / pixels[pixels > 0], "miou": np.nanmean(iou, axis=1)}
    found_ends = {name: np.quantile(scores, ends) for name, scores in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found_ends.items()}
