"""Modified DeepCluster: labels, weights and the cross-entropy against other witnesses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch.nn.functional import normalize

from iddc.methods.mdc import clustered, nearest_means, spaced, weighted_cross_entropy
from oracles import waves


def test_a_patch_has_the_label_of_the_nearest_mean() -> None:
    codes, means = normalize(waves(1, 50, 4), dim=1), 0.6 * waves(5, 7, 4)
    distances = torch.cdist(codes, means)
    assert nearest_means(codes, means).equal(distances.argmin(dim=1))


def test_the_cross_entropy_is_that_of_scikit_learn_with_these_weights() -> None:
    logits, weights = waves(2, 6, 3), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 0, 1, 2])
    expected = log_loss(labels, logits.softmax(1), sample_weight=weights[labels], labels=[0, 1, 2])
    assert weighted_cross_entropy(logits, labels, weights).item() == pytest.approx(expected)


def test_patches_without_a_label_do_not_count() -> None:
    logits, weights = waves(2, 4, 3), torch.ones(3, dtype=torch.float64)
    some = weighted_cross_entropy(logits, torch.tensor([0, -1, 2, -1]), weights)
    assert some.item() == pytest.approx(
        weighted_cross_entropy(logits[[0, 2]], torch.tensor([0, 2]), weights).item()
    )
    assert weighted_cross_entropy(logits, torch.full((4,), -1), weights) == 0


def test_means_are_those_of_the_members_and_shares_add_up() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(3)[generator.integers(3, size=400)]
    noisy = torch.from_numpy(centres + 0.1 * generator.normal(size=(400, 3))).float()
    codes = normalize(noisy, dim=1)
    means, shares, _ = clustered(codes, 3, seed=0)
    groups = torch.cdist(codes, means).argmin(dim=1)
    for cluster in range(3):
        assert torch.allclose(means[cluster], codes[groups == cluster].mean(0), atol=1e-5)
        assert shares[cluster].item() == pytest.approx((groups == cluster).float().mean().item())
    assert (means.norm(dim=1) < 1).all()


@pytest.mark.parametrize(
    ("epochs", "count", "expected"),
    [(10, 10, list(range(10))), (40, 10, list(range(0, 40, 4))), (3, 10, [0, 1, 2]), (1, 10, [0])],
)
def test_labels_are_made_at_equal_distances(epochs: int, count: int, expected: list[int]) -> None:
    assert spaced(epochs, count) == expected
