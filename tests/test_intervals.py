"""Intervals of scores over images: against a loop that adds up confusions, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from iddc.intervals import ImageCounts, intervals
from iddc.metrics import UNMATCHED, Confusion


def counted(*tables: list[list[int]]) -> tuple[ImageCounts, list[Confusion]]:
    confusions = [Confusion(np.array(table, np.int64)) for table in tables]
    counts = ImageCounts(confusions[0].counts.shape)
    for confusion in confusions:
        counts.add(confusion)
    return counts, confusions


def test_the_intervals_are_those_of_confusions_that_are_drawn_and_added_up() -> None:
    rng = np.random.default_rng(5)
    tables = rng.integers(0, 40, (6, 4, 3)) * rng.integers(0, 2, (6, 4, 3))
    counts, confusions = counted(*tables.tolist())
    matching = np.array([2, UNMATCHED, 0, 1])
    scores = []
    for row in np.random.default_rng(0).integers(6, size=(1000, 6)):
        total = Confusion.zeros(4, 3)
        for image in row:
            total += confusions[image]
        scores.append(total.scores(matching))
    found = intervals(counts, matching.tolist())
    for name in ("accuracy", "miou"):
        values = sorted(getattr(each, name) for each in scores)
        assert found[name] == pytest.approx(np.quantile(values, (0.025, 0.975)))


def test_a_class_that_a_draw_lacks_does_not_count_in_it() -> None:
    # Class 1 is in the second image alone, where all is wrong: without it, all is right.
    counts, _ = counted([[10, 0], [0, 0]], [[0, 10], [0, 0]])
    low, high = intervals(counts, [0, 1])["miou"]
    assert (low, high) == (0, 1)


def test_one_image_right_and_one_wrong_can_be_anything() -> None:
    counts, _ = counted([[10, 0], [0, 0]], [[0, 0], [10, 0]])
    assert intervals(counts, [0, 1])["accuracy"] == (0, 1)


def test_images_that_are_alike_have_no_spread() -> None:
    counts, _ = counted(*[[[8, 1], [1, 6]]] * 5)
    found = intervals(counts, [0, 1])
    assert found["accuracy"] == pytest.approx((14 / 16, 14 / 16))
    assert found["miou"] == pytest.approx([(8 / 10 + 6 / 8) / 2] * 2)


def test_one_image_has_no_interval() -> None:
    assert intervals(counted([[8, 1], [1, 6]])[0], [0, 1]) == {}


def test_images_without_a_labelled_pixel_do_no_harm() -> None:
    counts, _ = counted([[0, 0], [0, 0]], [[3, 0], [0, 1]])
    assert intervals(counts, [0, 1])["accuracy"] == (1, 1)
    counts, _ = counted([[0, 0], [0, 0]], [[0, 0], [1, 0]])
    assert intervals(counts, [0, 1])["accuracy"] == (0, 0)
