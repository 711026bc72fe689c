"""Consensus of over-clusterings: planted groups of unequal sizes, twins by hand, bad input."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from torch.nn.functional import normalize

from iddc.clustering import spherical_kmeans
from iddc.consensus import (
    Consensus,
    ConsensusConfig,
    Grouping,
    fit_consensus,
    merge,
    over_cluster,
)
from iddc.errors import DataError, NumericError


def unequal(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three groups of 90, 8 and 2 %, the largest one wide, and the group of each vector."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor([1800, 160, 40]))
    width = torch.tensor([0.25, 0.05, 0.05])[groups, None]
    vectors = torch.eye(8)[groups] + width * torch.randn(2000, 8, generator=generator)
    order = torch.randperm(2000, generator=generator)
    return normalize(vectors, dim=1)[order], groups[order]


SMALL = ConsensusConfig(prototypes=40, groupings=3)


def purity(found: Tensor, truth: Tensor) -> float:
    """The share of vectors whose group is the majority of their cluster."""
    counts = torch.zeros(3, 3).index_put_((found, truth), torch.ones(len(found)), accumulate=True)
    return float(counts.max(1).values.sum() / len(found))


def test_groups_of_90_8_and_2_percent_are_found_where_kmeans_cuts_the_largest() -> None:
    vectors, truth = unequal()
    found = fit_consensus(vectors, 3, SMALL).probs(vectors).argmax(1)
    assert purity(found, truth) > 0.98
    assert sorted(torch.bincount(found).tolist()) == pytest.approx([40, 160, 1800], abs=30)
    centroids = spherical_kmeans(vectors, 3).centroids
    sizes = torch.bincount((vectors @ centroids.T).argmax(1))
    assert sizes.max() < 1700


def test_a_grouping_sums_the_softmax_of_squared_distances_over_its_centroids() -> None:
    centroids = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    grouping = Grouping(centroids, torch.tensor([0, 1, 0]), 2)
    vector = torch.tensor([[0.3, 0.4]])
    weights = [np.exp(-((vector[0] - c).square().sum().item()) / (2 * 0.5)) for c in centroids]
    by_hand = [weights[0] + weights[2], weights[1]] / np.sum(weights)
    assert grouping.probs(vector, 0.5).numpy() == pytest.approx(by_hand[None])


def test_the_product_of_two_codes_is_the_mean_agreement_of_the_groupings() -> None:
    vectors, _ = unequal()
    consensus = fit_consensus(vectors, 3, SMALL)
    one, other = vectors[:5], vectors[5:10]
    agreement = [
        (grouping.probs(one, 0.03) * grouping.probs(other, 0.03)).sqrt().sum(1)
        for grouping in consensus.groupings
    ]
    product = (consensus.codes(one) * consensus.codes(other)).sum(1)
    assert product.numpy() == pytest.approx(torch.stack(agreement).mean(0).numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["average", "ward"])
def test_merging_is_scipys_linkage_and_sees_no_sizes(kind: Literal["average", "ward"]) -> None:
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    expected = fcluster(linkage(vectors.numpy(), kind), 5, "maxclust")
    assert (merge(vectors, 5, kind).numpy() == expected - 1).all()


def test_groupings_merge_by_mean_distance_and_agree_by_ward() -> None:
    vectors = normalize(torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    found = fit_consensus(vectors, 5, SMALL)
    for one in found.groupings:
        tree = linkage(one.centroids.numpy(), "average")
        assert (one.classes.numpy() == fcluster(tree, 5, "maxclust") - 1).all()
    codes = found.codes(torch.cat([one.centroids for one in found.groupings])).numpy()
    ids = fcluster(linkage(codes, "ward"), 5, "maxclust")
    means = np.stack([codes[ids == number].mean(0) for number in range(1, 6)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert found.centres.numpy() == pytest.approx(means, abs=1e-4)


def test_centroids_are_means_of_their_vectors_and_none_is_empty() -> None:
    vectors, _ = unequal()
    centroids = over_cluster(vectors, torch.ones(2000), 30, 50)
    nearest = torch.cdist(vectors, centroids).argmin(1)
    for number, centroid in enumerate(centroids):
        mean = vectors[nearest == number].mean(0)
        assert centroid.numpy() == pytest.approx(mean.numpy(), abs=0.02)


def test_a_vector_of_weight_3_counts_as_three_vectors() -> None:
    vectors, _ = unequal()
    weights = torch.arange(2000) % 3 + 1
    repeated = torch.cat([vectors, vectors[weights >= 2], vectors[weights == 3]])
    alone = over_cluster(repeated, torch.ones(len(repeated)), 30, 5)
    weighted = over_cluster(vectors, weights.float(), 30, 5)
    assert weighted.numpy() == pytest.approx(alone.numpy(), abs=1e-4)
    assert (weighted - over_cluster(vectors, torch.ones(2000), 30, 5)).abs().max() > 0.01


def test_every_vector_keeps_its_weight_when_some_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, _ = unequal()
    seen: list[tuple[Tensor, Tensor]] = []

    def noted(rows: Tensor, weights: Tensor, most: int, iterations: int) -> Tensor:
        seen.append((rows, weights))
        return over_cluster(rows, weights, most, iterations)

    monkeypatch.setattr("iddc.consensus.over_cluster", noted)
    some = ConsensusConfig(prototypes=40, groupings=2, vectors=500)
    fit_consensus(vectors, 3, some, weights=vectors[:, 0].abs() + 1)
    assert [len(rows) for rows, _ in seen] == [500, 500]
    assert all(torch.equal(weights, rows[:, 0].abs() + 1) for rows, weights in seen)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_seed_decides_everything() -> None:
    vectors, _ = unequal()
    first, again = (fit_consensus(vectors, 3, SMALL, seed=4).centres for _ in range(2))
    assert torch.equal(first, again)
    other = fit_consensus(vectors, 3, SMALL, seed=5).centres
    assert not torch.equal(first, other)


@pytest.mark.parametrize("distinct", [1, 5])
def test_fewer_distinct_vectors_than_clusters_is_an_error_that_counts_them(distinct: int) -> None:
    vectors = torch.eye(8)[torch.arange(100) % distinct]
    with pytest.raises(DataError, match=rf"Found {distinct} distinct group"):
        fit_consensus(vectors, 6, SMALL)


def test_more_clusters_than_prototypes_are_found_all_the_same() -> None:
    vectors = normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    config = ConsensusConfig(prototypes=50, groupings=2, temperature=0.001)
    found = fit_consensus(vectors, 300, config).probs(vectors)
    assert found.shape == (3000, 300)
    assert len(found.argmax(1).unique()) > 290


def test_two_clusters_are_found_and_cut_none_of_three_groups() -> None:
    vectors, truth = unequal()
    found = fit_consensus(vectors, 2, SMALL).probs(vectors).argmax(1)
    assert len(found.unique()) == 2
    for group in range(3):
        inside = found[truth == group].bincount(minlength=2)
        assert inside.max() / inside.sum() > 0.97


def test_vectors_that_are_not_finite_are_an_error() -> None:
    vectors, _ = unequal()
    vectors[3, 2] = torch.nan
    with pytest.raises(NumericError, match="finite"):
        fit_consensus(vectors, 3)


def test_groupings_agree_on_the_vectors_of_matched_classes() -> None:
    vectors = torch.eye(4)
    sure = ConsensusConfig(temperature=0.01, class_temperature=0.01)
    # Classes 0 and 1 hold two vectors each; one grouping numbers them the other way round, and one
    # puts a vector of each into the other.
    groupings = tuple(
        Grouping(torch.eye(4), torch.tensor(ids), 2)
        for ids in ([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0])
    )
    codes = Consensus(groupings, torch.zeros(2, 6), sure).codes(vectors)
    centres = torch.stack([codes[:2].mean(0), codes[2:].mean(0)])
    found = Consensus(groupings, normalize(centres, dim=1), sure)
    assert found.probs(vectors).argmax(1).tolist() == [0, 0, 1, 1]
    assert found.agreement(vectors) == pytest.approx((1 + 1 + 1 / 2) / 3)
