"""The verdict on a run: planted images and clusters whose numbers are known by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import csr_array

from iddc.config import Experiment
from iddc.report.look import RunStatistics, ViewedImage
from iddc.report.verdict import confused_pairs, follows_colours, judge, position_shares
from iddc.thresholds import Affinities

NONE = np.zeros(100)
OWN = Experiment(backbone="dino-vits16", num_clusters=2)


def look(
    clusters: Sequence[np.ndarray],
    k: int,
    given: np.ndarray | None = None,
    *,
    split: bool = True,
    mode: str = "RGB",
) -> RunStatistics:
    """Images of 8 x 12 patches, the left half red and the right half blue."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, : 48 if split else 96, 0] = 200
    pixels[:, 48 if split else 96 :, 2] = 200
    image = Image.fromarray(pixels).convert(mode).convert("RGB")
    seen = tuple(ViewedImage(str(n), image, ids, None) for n, ids in enumerate(clusters))
    counts = np.bincount(np.concatenate([ids.ravel() for ids in clusters]), minlength=k)
    table = np.eye(k) if given is None else given
    return RunStatistics(
        seen, counts, (counts > 0).astype(np.int64), counts / counts.sum(),
        csr_array(table.astype(np.float32)), (), np.zeros(0), Affinities(NONE, NONE),
    )  # fmt: skip


def halves() -> np.ndarray:
    ids = np.zeros((8, 12), np.int64)
    ids[:, 6:] = 1
    return ids


def test_clusters_that_are_the_regions_of_colour_follow_them_fully() -> None:
    assert follows_colours(look([halves()] * 3, 2)) == 1


def test_clusters_that_cut_every_region_in_half_follow_nothing() -> None:
    crosswise = np.zeros((8, 12), np.int64)
    crosswise[4:] = 1
    # Of each region half has the cluster of most; one cluster for all would have half, too.
    assert follows_colours(look([crosswise] * 3, 2)) == pytest.approx(0)


def test_one_cluster_for_everything_follows_nothing() -> None:
    assert follows_colours(look([np.zeros((8, 12), np.int64)], 2)) == 0


def test_a_part_that_is_cut_counts_as_that_part() -> None:
    ids = halves()
    ids[6:, :6] = 1  # 12 of 96 patches are in a region of the other cluster
    # (84/96 - 60/96) / (1 - 60/96)
    assert follows_colours(look([ids], 2)) == pytest.approx(24 / 36)


def test_what_is_at_the_same_place_everywhere_is_explained_by_its_position() -> None:
    assert position_shares([halves()] * 9, 3) == pytest.approx([1, 1, 0])


def test_what_is_anywhere_is_not_explained_by_its_position() -> None:
    rng = np.random.default_rng(0)
    clusters = [rng.integers(0, 2, (12, 12)) for _ in range(200)]
    assert position_shares(clusters, 2) == pytest.approx([0, 0], abs=0.03)


def test_images_that_are_mirrored_half_of_the_time_leave_nothing_to_the_position() -> None:
    # Each patch is 1 in half of the images: no variance between positions.
    assert position_shares([halves(), 1 - halves()] * 5, 2) == pytest.approx([0, 0])


def test_two_clusters_are_hard_to_tell_apart_if_each_nearly_has_the_others_probability() -> None:
    given = np.array([[0.5, 0.4, 0.1], [0.3, 0.5, 0.2], [0.4, 0.1, 0.5]])
    ids = np.arange(96).reshape(8, 12) % 3
    # 0 and 1: 0.4 / 0.5 and 0.3 / 0.5. Of 0 and 2, only one has half of the other's.
    assert confused_pairs(look([ids], 3, given)) == [(0, 1, pytest.approx(0.6))]


def test_a_verdict_names_the_number_behind_every_advice() -> None:
    given = np.array([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])
    found = judge(
        look([halves()] * 8, 3, given), OWN, ("cluster 0", "sky", "cluster 2"), images=8,
        agreement=0.25,
    )  # fmt: skip
    text = "\n".join(found.lines())
    assert found.grade == "good"
    assert "follow the colours of the images: 100 %" in text
    assert "2 of 3 clusters are in use" in text
    assert "cluster 0 and sky (1) (75 %)" in text
    assert "iddc label RUN --set 0=NAME 1=NAME" in text
    assert "Mostly at the same place in every image: cluster 0 (100 %), sky (1) (100 %)" in text
    assert "The mean confidence is 40 %." in text
    assert "agree on 25 % of the patches" in text
    assert "The training saw only 8 images." in text


def test_a_run_without_fault_is_given_no_advice() -> None:
    mixed = [halves(), 1 - halves()] * 5
    found = judge(look(mixed, 2), OWN, ("cluster 0", "cluster 1"), images=100)
    assert found.grade == "good"
    assert not [finding for finding in found.findings if finding.advice]


def test_a_poor_run_on_the_bundled_backbone_is_told_of_a_better_one() -> None:
    crosswise = np.zeros((8, 12), np.int64)
    crosswise[4:] = 1
    experiment = OWN.model_copy(update={"backbone": "bundled"})
    found = judge(look([crosswise], 2), experiment, ("a", "b"), images=100)
    assert found.grade == "poor"
    assert "dino-vits16" in found.findings[-1].advice


def test_of_grey_images_the_verdict_says_how_little_it_knows() -> None:
    mixed = [halves(), 1 - halves()] * 5
    found = judge(look(mixed, 2, mode="L"), OWN, ("cluster 0", "cluster 1"), images=100)
    assert found.findings[0].text.startswith("The images are grey.")
    assert "`iddc baseline grey IMAGES --out RUN2`" in found.findings[0].advice


def test_a_large_cluster_is_a_reason_for_more_clusters_only_where_all_are_in_use() -> None:
    ids = np.zeros((8, 12), np.int64)
    ids[:, 9:] = 1
    for k, advice in ((2, "-k 4"), (3, "look at the masks")):
        found = judge(look([ids] * 3, k), OWN, ("a", "b", "c")[:k], images=100)
        (large,) = (one for one in found.findings if "covers" in one.text)
        assert large.text == "The largest cluster, a (0), covers 75 % of the patches."
        assert large.advice.startswith(advice)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], ""),
        ([(0, 1)], "cluster 0 and cluster 1 (80 %). The"),
        ([(0, 1), (2, 3), (4, 5)], "cluster 4 and cluster 5 (80 %). The"),
        ([(0, 1), (2, 3), (4, 5), (6, 7)], "cluster 4 and cluster 5 (80 %) and 1 other pair. The"),
    ],
    ids=len,
)
def test_three_confused_pairs_are_named_and_further_ones_counted(
    given: list[tuple[int, int]], told: str
) -> None:
    table = 0.5 * np.eye(8)
    for one, other in given:
        table[one, other] = table[other, one] = 0.4
    mixed = [np.arange(96).reshape(8, 12) % 8]
    found = judge(look(mixed, 8, table), OWN, [f"cluster {c}" for c in range(8)], images=100)
    texts = [one.text for one in found.findings if one.text.startswith("Hard to tell apart")]
    assert len(texts) == bool(given)
    assert told in "".join(texts)


@pytest.mark.parametrize(("count", "told"), [(3, ". The"), (4, " and 1 other. The")])
def test_three_clusters_of_one_place_are_named_and_further_ones_counted(
    count: int, told: str
) -> None:
    bands = np.repeat(np.arange(12) * count // 12, 8).reshape(12, 8).T
    found = judge(look([bands] * 8, count), OWN, [f"cluster {c}" for c in range(count)], images=100)
    (text,) = (one.text for one in found.findings if one.text.startswith("Mostly at"))
    assert f"cluster 0 (100 %), cluster 1 (100 %), cluster 2 (100 %){told}" in text


@pytest.mark.parametrize(("images", "few"), [(1, True), (49, True), (50, False)])
def test_fifty_images_are_not_called_few(images: int, few: bool) -> None:
    found = judge(look([halves()] * 3, 2), OWN, ("a", "b"), images=images)
    assert any("training saw only" in one.text for one in found.findings) == few


def test_a_mask_that_is_at_one_place_in_every_second_image_is_half_explained() -> None:
    """Where it may be, the chance is 1/2; between places it varies by 1/16, in all by 3/16."""
    clusters = []
    for number in range(400):
        ids = np.zeros((12, 12), np.int64)
        ids[:, 6:] = number % 2
        clusters.append(ids)
    # mean 1/4; variance within places (1/2)(1/2)(1/2) = 1/8; whole 1/4 * 3/4 = 3/16
    assert position_shares(clusters, 2) == pytest.approx([1 / 3] * 2, abs=0.01)
