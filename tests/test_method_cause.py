"""CAUSE: modularity and contrast against values of the authors' functions and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from iddc.config import Experiment
from iddc.methods.cause import Cause, concept_contrast
from iddc.methods.modularity import modularity_loss, one_of_each_block
from oracles import waves


def contrast(student: torch.Tensor, teacher: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return concept_contrast(
        normalize(student, dim=-1),
        normalize(teacher, dim=-1),
        concepts,
        waves(7, 4, 3),
        positive=0.3,
        negative=0.1,
        temperature=0.07,
    )


def nearest_concepts(features: torch.Tensor) -> torch.Tensor:
    return (normalize(features, dim=-1) @ normalize(waves(7, 4, 3), dim=1).T).argmax(-1)


def test_the_modularity_is_that_of_the_authors_function() -> None:
    loss = modularity_loss(waves(1, 5, 3), waves(7, 4, 3), 0.1)
    assert loss.item() == pytest.approx(-0.381953, abs=1e-6)


def test_at_a_temperature_of_one_the_modularity_moves_concepts() -> None:
    concepts = waves(7, 4, 3).requires_grad_()
    loss = modularity_loss(waves(1, 5, 3), concepts, 1.0)
    assert loss.item() == pytest.approx(-0.282231, abs=1e-6)
    loss.backward()
    assert concepts.grad is not None
    assert concepts.grad.norm().item() == pytest.approx(0.020974, abs=1e-6)


def test_one_concept_that_all_patches_share_has_no_modularity() -> None:
    vectors = normalize(torch.rand(6, 3, dtype=torch.float64), dim=1)
    # A concept whose cosine is so large to all that tanh is 1: no division of the graph.
    loss = modularity_loss(vectors, vectors.mean(0, keepdim=True), 1e-3)
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_the_contrast_is_that_of_the_authors_function() -> None:
    features = waves(1, 2, 3, 3)
    concepts = nearest_concepts(features)
    assert concepts.tolist() == [[0, 1, 0], [1, 2, 3]]
    value = contrast(waves(5, 2, 3, 2), waves(9, 2, 3, 2), concepts)
    assert value.item() == pytest.approx(10.178661, abs=1e-6)


def test_the_contrast_is_that_of_loops() -> None:
    features, batch, number = waves(2, 3, 4, 3), 3, 4
    student, teacher = waves(4, 3, 4, 5), waves(8, 3, 4, 5)
    concepts, codebook = nearest_concepts(features), normalize(waves(7, 4, 3), dim=1)
    flat = [(i, n) for i in range(batch) for n in range(number)]
    images = []
    for image in range(batch):
        costs = []
        for n in range(number):
            here = codebook[concepts[image, n]]
            cosines = {
                (i, m): float(here @ codebook[concepts[i, m]])
                for i, m in flat
                if (i, m) != (image, n)
            }
            code = normalize(student[image, n], dim=0)
            score = {at: float(code @ normalize(teacher[at], dim=0)) / 0.07 for at in flat}
            positives = [at for at in cosines if cosines[at] > 0.3]
            others = positives + [at for at in cosines if cosines[at] < 0.1]
            total = math.log(sum(math.exp(score[at]) for at in others)) if others else 0
            costs += [total - score[at] for at in positives]
        if costs:
            images.append(sum(costs) / len(costs))
    value = contrast(student, teacher, concepts)
    assert value.item() == pytest.approx(sum(images) / len(images), abs=1e-9)


def test_the_contrast_does_not_depend_on_the_order_of_patches() -> None:
    student, teacher, concepts = (
        waves(4, 2, 5, 3),
        waves(8, 2, 5, 3),
        nearest_concepts(waves(2, 2, 5, 3)),
    )
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = contrast(student[:, order], teacher[:, order], concepts[:, order])
    assert shuffled.item() == pytest.approx(contrast(student, teacher, concepts).item(), abs=1e-9)


def test_without_any_positive_pair_the_contrast_and_its_gradient_are_zero() -> None:
    student = waves(4, 1, 3, 3).requires_grad_()
    value = concept_contrast(
        student,
        waves(8, 1, 3, 3),
        torch.tensor([[0, 1, 2]]),
        torch.eye(3, dtype=torch.float64),
        positive=0.3,
        negative=0.1,
        temperature=0.07,
    )
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_an_anchor_without_any_pair_leaves_gradients_finite() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]], dtype=torch.float64)
    student = waves(4, 1, 3, 2).requires_grad_()
    # Concept 0 twice, and one at 45 degrees, which is neither a positive nor a negative at 0.75.
    value = concept_contrast(
        normalize(student, dim=-1),
        normalize(waves(8, 1, 3, 2), dim=-1),
        torch.tensor([[0, 0, 1]]),
        codebook,
        positive=0.75,
        negative=0.1,
        temperature=0.07,
    )
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_each_block_gives_one_of_its_own_patches() -> None:
    maps = torch.arange(9 * 10.0).view(1, 9, 10)
    drawn = one_of_each_block(maps, np.random.default_rng(0)).flatten().int().tolist()
    assert [(v // 10 // 4, v % 10 // 4) for v in drawn] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({(v // 10 % 4, v % 10 % 4) for v in drawn}) > 1


def test_a_grid_without_a_whole_block_gives_all_its_patches() -> None:
    assert len(one_of_each_block(torch.zeros(2, 3, 5), np.random.default_rng(0))) == 15


@pytest.mark.parametrize(
    ("epochs", "min_steps", "steps"),
    [
        (2, 1, 6),  # 33 images are two batches of 16 and one of 1
        (2, 7, 9),  # the third pass is done to its end
        (2, 6, 6),
        (5, 7, 15),
    ],
)
def test_the_second_stage_is_whole_passes_of_at_least_so_many_steps(
    epochs: int, min_steps: int, steps: int
) -> None:
    options = {"batch_size": 16, "epochs": epochs, "min_steps": min_steps}
    plan = Cause.plan(Experiment(method="cause", options=options), 33)
    assert (plan.steps, plan.steps_per_epoch) == (steps, 3)
