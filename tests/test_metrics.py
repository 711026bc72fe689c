"""Confusion, matching and scores, against hand counts, brute force and scikit-learn."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]  # no stubs
from sklearn.metrics import confusion_matrix, jaccard_score

from iddc.config import MatchingRows
from iddc.errors import DataError
from iddc.metrics import IGNORE, LABELS, UNMATCHED, Confusion


def counted(counts: list[list[int]]) -> Confusion:
    return Confusion(np.array(counts, np.int64))


@st.composite
def pixels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Clusters, labels (some ignored), and how many of each there may be."""
    num_clusters, num_classes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    size = draw(st.integers(1, 40))
    classes = [*range(num_classes), IGNORE]
    clusters = draw(st.lists(st.integers(0, num_clusters - 1), min_size=size, max_size=size))
    labels = draw(st.lists(st.sampled_from(classes), min_size=size, max_size=size))
    labels[0] = 0  # at least one pixel is scored
    return np.array(clusters), np.array(labels), num_clusters, num_classes


def slow_scores(counts: np.ndarray, matching: list[int]) -> tuple[float, float, list[float | None]]:
    """Accuracy, mIoU and IoU of one assignment, pixel kind by pixel kind."""
    num_clusters, num_classes = counts.shape
    right = total = 0
    iou: list[float | None] = []
    for c in range(num_classes):
        hit = false = missed = 0
        for k in range(num_clusters):
            for true in range(num_classes):
                n = int(counts[k, true])
                total += n
                hit += n if matching[k] == c and true == c else 0
                false += n if matching[k] == c and true != c else 0
                missed += n if matching[k] != c and true == c else 0
        right += hit
        iou.append(hit / (hit + false + missed) if hit + false + missed else None)
    present = [value for value in iou if value is not None]
    return right / (total / num_classes), sum(present) / len(present), iou


def assignments(num_clusters: int, num_classes: int) -> list[list[int]]:
    """Every one-to-one assignment with as many pairs as there can be."""
    if num_clusters <= num_classes:
        return [list(chosen) for chosen in permutations(range(num_classes), num_clusters)]
    result = []
    for chosen in permutations(range(num_clusters), num_classes):
        matching = [UNMATCHED] * num_clusters
        for c, k in enumerate(chosen):
            matching[k] = c
        result.append(matching)
    return result


def test_counts_clusters_in_rows_and_classes_in_columns_without_ignored_pixels() -> None:
    clusters = np.array([[0, 0, 1], [2, 2, 2]], np.uint8)
    labels = np.array([[1, 1, 0], [0, IGNORE, 1]], np.uint8)
    confusion = Confusion.count(clusters, labels, num_clusters=3, num_classes=2)
    assert confusion.counts.tolist() == [[0, 2], [1, 0], [1, 1]]


def test_scores_of_an_example_counted_by_hand() -> None:
    # Cluster 0 -> class 1 (6 right), cluster 1 -> class 0 (3 right), of 14 pixels.
    scores = counted([[2, 6], [3, 3]]).scores()
    assert scores.matching == (1, 0)
    assert scores.accuracy == 9 / 14
    assert scores.iou == (3 / (3 + 3 + 2), 6 / (6 + 2 + 3))
    assert scores.miou == pytest.approx((3 / 8 + 6 / 11) / 2)


def test_pixels_of_an_unmatched_cluster_are_errors() -> None:
    scores = counted([[5, 0], [0, 4], [3, 2]]).scores()
    assert scores.matching == (0, 1, UNMATCHED)
    assert scores.accuracy == 9 / 14
    assert scores.iou == (5 / 8, 4 / 6)


def test_a_class_without_a_cluster_has_iou_zero() -> None:
    scores = counted([[5, 1, 2]]).scores()
    assert scores.accuracy == 5 / 8
    assert scores.iou == (5 / 8, 0.0, 0.0)
    assert scores.miou == pytest.approx(5 / 24)


def test_a_class_absent_from_labels_and_matched_predictions_is_left_out() -> None:
    scores = counted([[5, 0], [0, 0]]).scores()
    assert scores.iou == (1.0, None)
    assert scores.miou == 1.0


def test_a_class_absent_from_labels_but_predicted_counts_as_zero() -> None:
    scores = counted([[5, 0], [1, 0]]).scores()
    assert scores.iou == (5 / 6, 0.0)


def test_the_matching_maximises_pixels_not_iou() -> None:
    # 10 pixels are right, the other way 9; by IoU the other way is better (0.61 to 0.53 in sum).
    assert counted([[10, 3], [6, 0]]).match().tolist() == [0, 1]


def test_several_clusters_may_be_given_one_class() -> None:
    confusion = counted([[5, 0], [3, 1], [0, 4]])
    scores = confusion.scores(np.array([0, 0, 1]))
    assert scores.accuracy == 12 / 13
    assert scores.iou == (8 / 9, 4 / 5)


@given(pixels())
def test_the_matching_is_the_best_of_all_assignments(
    case: tuple[np.ndarray, np.ndarray, int, int],
) -> None:
    confusion = Confusion.count(*case)
    every = [slow_scores(confusion.counts, a) for a in assignments(*case[2:])]
    scores = confusion.scores()
    assert list(scores.matching) in assignments(*case[2:])
    best = max(accuracy for accuracy, _, _ in every)
    assert scores.accuracy == pytest.approx(best)


@given(pixels())
def test_scores_agree_with_counting_each_kind_of_pixel(
    case: tuple[np.ndarray, np.ndarray, int, int],
) -> None:
    confusion = Confusion.count(*case)
    scores = confusion.scores()
    accuracy, miou, iou = slow_scores(confusion.counts, list(scores.matching))
    assert scores.accuracy == pytest.approx(accuracy)
    assert scores.miou == pytest.approx(miou)
    assert scores.iou == pytest.approx(iou)
    assert 0 <= scores.miou <= 1
    assert 0 <= scores.accuracy <= 1


@given(pixels())
def test_counts_and_iou_agree_with_scikit_learn(
    case: tuple[np.ndarray, np.ndarray, int, int],
) -> None:
    clusters, labels, num_clusters, num_classes = case
    kept = labels != IGNORE
    confusion = Confusion.count(*case)
    size = max(num_clusters, num_classes)
    theirs = confusion_matrix(clusters[kept], labels[kept], labels=range(size + 1))
    assert confusion.counts.tolist() == theirs[:num_clusters, :num_classes].tolist()

    scores = confusion.scores()
    predicted = np.array(scores.matching)[clusters[kept]]
    for c, iou in enumerate(scores.iou):
        true, found = labels[kept] == c, predicted == c
        if iou is None:
            assert not (true | found).any()
        else:
            assert iou == pytest.approx(jaccard_score(true, found))


@given(pixels(), st.integers(0, 40))
def test_adding_confusions_is_counting_all_pixels(
    case: tuple[np.ndarray, np.ndarray, int, int], cut: int
) -> None:
    clusters, labels, *sizes = case
    parts = [
        Confusion.count(clusters[part], labels[part], *sizes)
        for part in (slice(cut), slice(cut, None))
    ]
    total = sum(parts, Confusion.zeros(*sizes))
    assert total.counts.tolist() == Confusion.count(*case).counts.tolist()


@given(pixels(), st.randoms(use_true_random=False), st.sampled_from(["clusters", "classes"]))
def test_accuracy_does_not_depend_on_how_clusters_are_numbered_nor_on_what_the_rows_are(
    case: tuple[np.ndarray, np.ndarray, int, int], random: object, rows: MatchingRows
) -> None:
    clusters, labels, num_clusters, num_classes = case
    order = np.array(random.sample(range(num_clusters), num_clusters))  # type: ignore[attr-defined]
    renumbered = Confusion.count(order[clusters], labels, num_clusters, num_classes)
    accuracy = renumbered.scores(renumbered.match(rows)).accuracy
    assert accuracy == Confusion.count(*case).scores().accuracy


@pytest.mark.parametrize(
    ("rows", "matching", "miou"),
    [("clusters", (1, 2, 0), (5 / 10 + 0 + 0) / 3), ("classes", (2, 1, 0), (5 / 10 + 0) / 2)],
)
def test_ties_with_an_absent_class_are_decided_by_scipy_over_the_rows_that_are_said(
    rows: MatchingRows, matching: tuple[int, ...], miou: float
) -> None:
    """The example of docs/protocols.md: class 2 has no pixel, cluster 0 has none either."""
    confusion = counted([[0, 0, 0], [2, 0, 0], [5, 3, 0]])
    found = confusion.scores(confusion.match(rows))
    assert found.matching == matching
    assert found.miou == pytest.approx(miou)


@pytest.mark.parametrize("seed", range(20))
def test_equally_good_assignments_are_decided_as_scipy_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3, (int(rng.integers(1, 6)), int(rng.integers(1, 6))))
    confusion = Confusion(counts)
    for rows, table in (("clusters", counts), ("classes", counts.T)):
        first, second = linear_sum_assignment(table, maximize=True)
        clusters, classes = (first, second) if rows == "clusters" else (second, first)
        expected = np.full(len(counts), UNMATCHED)
        expected[clusters] = classes
        assert (confusion.match(rows) == expected).all()


def test_one_pixel_outweighs_any_iou() -> None:
    # 0 + 6 + 33 pixels with a sum of IoU of 0.72, against 17 + 5 + 16 with 1.09.
    assert counted([[0, 17, 0], [5, 0, 6], [0, 33, 16]]).match().tolist() == [0, 2, 1]


@pytest.mark.parametrize("value", [-1, 2, 254])
def test_a_label_that_is_no_class_is_a_data_error_with_its_value(value: int) -> None:
    with pytest.raises(DataError, match=rf"value {value}: expected classes 0 to 1"):
        Confusion.count(np.array([0, 0]), np.array([1, value]), num_clusters=1, num_classes=2)


def test_a_cluster_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster 3 of 3"):
        Confusion.count(np.array([3]), np.array([0]), num_clusters=3, num_classes=2)


def test_without_a_labelled_pixel_there_is_nothing_to_score() -> None:
    nothing = Confusion.count(np.array([0]), np.array([IGNORE]), num_clusters=2, num_classes=2)
    with pytest.raises(DataError, match="No labelled pixel"):
        nothing.scores()


def test_confusions_of_other_sizes_do_not_add() -> None:
    with pytest.raises(ValueError, match="cannot add"):
        Confusion.zeros(1, 2) + Confusion.zeros(3, 2)


def test_sums_beyond_32_bits_stay_exact() -> None:
    half = counted([[2**31, 1], [0, 2**31]])
    assert (half + half).counts.tolist() == [[2**32, 2], [0, 2**32]]
    assert (half + half).scores().matching == (0, 1)


def test_scores_as_plain_values_name_the_classes() -> None:
    scores = counted([[5, 0, 0], [0, 0, 0]]).scores(np.array([0, UNMATCHED]))
    assert scores.as_dict(("sky", "road", "car")) == {
        "accuracy": 1.0,
        "miou": 1.0,
        "iou": {"sky": 1.0, "road": None, "car": None},
        "matching": ["sky", None],
    }


@given(pixels())
def test_a_table_of_all_label_values_gives_the_same_confusion(
    case: tuple[np.ndarray, np.ndarray, int, int],
) -> None:
    clusters, labels, num_clusters, num_classes = case
    table = np.zeros((num_clusters, LABELS), np.int64)
    np.add.at(table, (clusters, labels), 1)
    expected = Confusion.count(clusters, labels, num_clusters, num_classes).counts
    assert (Confusion.of_table(table, num_classes).counts == expected).all()


def test_a_table_with_a_label_out_of_range_is_a_data_error() -> None:
    table = np.zeros((2, LABELS), np.int64)
    table[1, 7] = 1
    with pytest.raises(DataError, match="value 7: expected classes 0 to 2, or 255"):
        Confusion.of_table(table, 3)
