"""Clusters against classes: a confusion that adds up, its matching, and the scores.

One confusion covers a whole data set: count each image, add, match once, score once. Averages over
images would be another number: published accuracy and mIoU are those of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer

from iddc.config import MatchingRows
from iddc.errors import DataError

IGNORE = 255
"""The label of pixels that are not scored."""
LABELS = 256
"""How many values a label has: classes, `IGNORE` and wrong ones."""
UNMATCHED = -1
"""The class of a cluster that is matched to none."""
EDGE_WIDTH = 5
"""Pixels at most so far from an edge of the labels count in the trimap mIoU."""


@dataclass(frozen=True, eq=False)
class Confusion:
    """How many pixels of each cluster carry each class; confusions of disjoint pixels add up."""

    counts: Int64[np.ndarray, "k c"]

    @classmethod
    def zeros(cls, num_clusters: int, num_classes: int) -> Confusion:
        """The confusion of no pixel, where a sum starts."""
        return cls(np.zeros((num_clusters, num_classes), np.int64))

    @classmethod
    def count(
        cls,
        clusters: Integer[np.ndarray, "*pixels"],
        labels: Integer[np.ndarray, "*pixels"],
        num_clusters: int,
        num_classes: int,
        ignore: int = IGNORE,
    ) -> Confusion:
        """Count the pixels of one image, or of any set of pixels.

        Args:
            clusters: The cluster of each pixel, in [0, num_clusters).
            labels: The class of each pixel, in [0, num_classes), or `ignore`.
            num_clusters: K, the rows of the result.
            num_classes: The columns of the result.
            ignore: Pixels with this label are not counted.

        Raises:
            DataError: A label is neither a class nor `ignore`.
            ValueError: A cluster is out of range.
        """
        scored = labels != ignore
        found, true = clusters[scored].astype(np.int64), labels[scored].astype(np.int64)
        if wrong := _out_of_range(true, num_classes):
            raise _wrong_label(wrong[0], num_classes, ignore)
        if wrong := _out_of_range(found, num_clusters):
            raise ValueError(f"cluster {wrong[0]} of {num_clusters} does not exist")
        counts = np.bincount(found * num_classes + true, minlength=num_clusters * num_classes)
        return cls(counts.astype(np.int64).reshape(num_clusters, num_classes))

    @classmethod
    def of_table(cls, table: Int64[np.ndarray, "k 256"], num_classes: int) -> Confusion:
        """Take how many pixels of each cluster carry each value of a label.

        Raises:
            DataError: A label is neither a class nor `IGNORE`.
        """
        found = np.flatnonzero(table.any(axis=0))
        if len(wrong := found[(found >= num_classes) & (found != IGNORE)]):
            raise _wrong_label(int(wrong[-1]), num_classes, IGNORE)
        return cls(np.ascontiguousarray(table[:, :num_classes]))

    def __add__(self, other: Confusion) -> Confusion:
        if self.counts.shape != other.counts.shape:
            raise ValueError(f"cannot add {other.counts.shape} counts to {self.counts.shape}")
        return Confusion(self.counts + other.counts)

    def match(self, rows: MatchingRows = "clusters") -> Int64[np.ndarray, " k"]:
        """Give each cluster a class of its own, so that the most pixels are right.

        The assignment is one to one (Hungarian method): with more clusters than classes the rest
        is UNMATCHED, with fewer some classes get no cluster. Among assignments that are right
        equally often, the first in scipy's order counts, as in the field's code. It depends on how
        clusters are numbered and on what the rows are; only classes without pixels, or equal
        counts, make it matter.

        Args:
            rows: What the rows of the table are that scipy gets: clusters in STEGO's code and what
                descends from it, classes in IDDC's.

        Returns:
            The class of each cluster, or UNMATCHED.
        """
        from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]  # no stubs

        if rows == "clusters":
            clusters, classes = linear_sum_assignment(self.counts, maximize=True)
        else:
            classes, clusters = linear_sum_assignment(self.counts.T, maximize=True)
        matching = np.full(len(self.counts), UNMATCHED, np.int64)
        matching[clusters] = classes
        return matching

    def scores(self, matching: Int64[np.ndarray, " k"] | None = None) -> Scores:
        """Score the clusters as classes.

        A pixel whose cluster is UNMATCHED is an error: it counts in the accuracy's denominator and
        as missed by its class. Several clusters may be given the same class.

        Args:
            matching: The class of each cluster, or UNMATCHED; `match()` if not given.

        Raises:
            DataError: No pixel was counted, so there is nothing to score.
        """
        if not self.counts.any():
            raise DataError(
                "No labelled pixel to score: every pixel is to be ignored, or there is no image."
            )
        matching = self.match() if matching is None else matching
        matched = matching != UNMATCHED
        true = self.counts.sum(0)
        by_class = np.zeros((true.size, true.size), np.int64)  # predicted, true
        np.add.at(by_class, matching[matched], self.counts[matched])
        hits = by_class.diagonal()
        union = by_class.sum(1) + true - hits
        iou = tuple(int(h) / int(u) if u else None for h, u in zip(hits, union, strict=True))
        present = [value for value in iou if value is not None]
        return Scores(
            accuracy=int(hits.sum()) / int(true.sum()),
            miou=sum(present) / len(present),
            iou=iou,
            matching=tuple(int(value) for value in matching),
        )


@dataclass(frozen=True)
class Scores:
    """Pixel accuracy and intersection over union, as fractions in [0, 1]."""

    accuracy: float
    """Pixels whose cluster is matched to their class / all labelled pixels."""
    miou: float
    """The mean of `iou` over the classes that have one."""
    iou: tuple[float | None, ...]
    """Hits / (hits + false + missed) of each class; None where neither labels nor matched
    predictions have the class."""
    matching: tuple[int, ...]
    """The class of each cluster, or UNMATCHED."""

    def as_dict(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """The scores as plain values for a JSON file, the classes by name."""
        return {
            "accuracy": self.accuracy,
            "miou": self.miou,
            "iou": dict(zip(class_names, self.iou, strict=True)),
            "matching": [class_names[i] if i != UNMATCHED else None for i in self.matching],
        }


def edge_band(label: Integer[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """The pixels within `width` pixels of one that has a neighbour of another class.

    Neighbours share a side. Ignored pixels have no class, and their outlines are no edges.
    """
    from scipy.ndimage import distance_transform_edt  # type: ignore[attr-defined]  # no stubs

    edge = np.zeros(label.shape, bool)
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        one, other = label[here], label[there]
        differs = (one != other) & (one != IGNORE) & (other != IGNORE)
        edge[here] |= differs
        edge[there] |= differs
    if not edge.any():
        return edge
    distance: np.ndarray = distance_transform_edt(~edge)
    return distance <= width


def _wrong_label(value: int, num_classes: int, ignore: int) -> DataError:
    return DataError(
        f"A label has the value {value}: expected classes 0 to {num_classes - 1}, "
        f"or {ignore} for pixels to ignore. Check the label files and the class list."
    )


def _out_of_range(values: Int64[np.ndarray, " n"], end: int) -> list[int]:
    """The smallest or the largest value if it lies outside [0, end); nothing if all lie inside."""
    if not values.size:
        return []
    return [int(value) for value in (values.min(), values.max()) if not 0 <= value < end]
