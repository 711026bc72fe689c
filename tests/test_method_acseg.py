"""ACSeg: its loss against a value of other code and a loop, and what its head does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from iddc.decoders import Concepts
from iddc.learning.learner import Learner
from iddc.methods.acseg import concept_loss
from oracles import waves
from steps import ONE
from test_methods import Fixed, features, tiny


def likeness(features: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return (normalize(features, dim=-1) @ normalize(concepts, dim=-1).mT).relu()


def test_the_loss_and_its_gradient_are_those_of_other_code() -> None:
    features, concepts = waves(1, 1, 5, 3), waves(7, 1, 3, 3).requires_grad_()
    loss = concept_loss(features, likeness(features, concepts))
    assert loss.item() == pytest.approx(-0.415262, abs=1e-6)
    loss.backward()
    assert concepts.grad is not None
    assert concepts.grad.norm().item() == pytest.approx(0.046187, abs=1e-6)


def test_the_loss_is_that_of_loops_and_the_mean_over_images() -> None:
    features, concepts = waves(2, 2, 4, 3), waves(5, 2, 3, 3)
    values = []
    units = (normalize(each, dim=2) for each in (features, concepts))
    for u, c in zip(*units, strict=True):
        a = [[max(0.0, float(p @ q)) for q in u] for p in u]
        s = [[max(0.0, float(p @ q)) for q in c] for p in u]
        d = [sum(row) for row in a]
        two_m, total = sum(d), 0.0
        for i in range(4):
            for j in range(4):
                delta = max(s[i][k] * s[j][k] for k in range(3))
                total -= (a[i][j] - d[i] * d[j] / two_m) * delta / two_m
        values.append(total)
    found = concept_loss(features, likeness(features, concepts))
    assert found.item() == pytest.approx(sum(values) / 2, abs=1e-12)


def test_alike_patches_give_no_signal() -> None:
    features = torch.ones(1, 6, 3, dtype=torch.float64)
    assert concept_loss(features, waves(3, 1, 6, 2).abs()).item() == pytest.approx(0, abs=1e-12)


def test_with_fewer_regions_than_clusters_patches_are_clustered() -> None:
    """Two concepts in five images give at most ten regions."""
    experiment = tiny("acseg")
    options = experiment.options | {"concepts": 2}
    learner = Learner(
        experiment.model_copy(update={"num_clusters": 11, "options": options}), 5, ONE
    )
    found = learner.refit(Fixed(features()), learner.plan.epochs)
    assert found["regions"] > 10


def test_all_patches_of_a_region_have_the_cluster_of_its_mean_embedding() -> None:
    torch.manual_seed(0)
    head = Concepts(8, 4, concepts=3, blocks=1, hidden=16).eval()
    features = torch.randn(2, 8, 3, 4)
    with torch.no_grad():
        cosines, logits = head.cosines(features), head(features)
    for image in range(2):
        patches = features[image].flatten(1).T
        chosen = cosines[image].argmax(dim=1)
        for region in chosen.unique():
            mean = patches[chosen == region].mean(0)
            scores = torch.cosine_similarity(mean[None], head.centroids) / 0.1
            inside = logits[image].flatten(1).T[chosen == region]
            torch.testing.assert_close(inside, scores.expand_as(inside))
