"""SmooSeg: its terms against values by hand and by loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from iddc.methods.method import Batch
from iddc.methods.smooseg import data_loss, smoothness_loss
from iddc.views import draw_patches, draw_rolls
from oracles import waves
from steps import images_of
from test_methods import features, learner_of

U, Z = waves(1, 2, 4, 3), waves(2, 2, 4, 2).requires_grad_()
TEACHER_CENTROIDS, STUDENT_CENTROIDS = waves(3, 3, 2), waves(11, 3, 2)


def cosines(codes: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return normalize(codes, dim=-1) @ normalize(centroids, dim=-1).T


@pytest.fixture
def probs() -> torch.Tensor:
    return (cosines(Z, TEACHER_CENTROIDS) / 0.1).softmax(-1)


def test_within_images_the_term_is_that_of_the_authors_function(probs: torch.Tensor) -> None:
    assert smoothness_loss(U, U, probs, probs, -0.02).item() == pytest.approx(-0.096912, abs=1e-6)


def test_across_images_the_term_is_that_of_the_authors_function(probs: torch.Tensor) -> None:
    value = smoothness_loss(U, U.flip(0), probs, probs.flip(0), 0.5)
    assert value.item() == pytest.approx(-0.414323, abs=1e-6)


def test_the_data_term_teaches_the_student_alone() -> None:
    centroids = STUDENT_CENTROIDS.clone().requires_grad_()
    value = data_loss(cosines(Z.detach(), centroids), cosines(Z, TEACHER_CENTROIDS))
    assert value.item() == pytest.approx(1.060144, abs=1e-6)
    (to_centroids,) = torch.autograd.grad(value, centroids)
    assert to_centroids.norm().item() == pytest.approx(0.476141, abs=1e-6)


def test_smoothness_moves_codes_as_much_as_the_slow_loop(probs: torch.Tensor) -> None:
    value = smoothness_loss(U, U, probs, probs, -0.02)
    value = value + smoothness_loss(U, U.flip(0), probs, probs.flip(0), 0.5)
    (to_codes,) = torch.autograd.grad(value, Z)
    assert to_codes.norm().item() == pytest.approx(0.484473, abs=1e-6)


def test_student_and_teacher_see_the_cosines_of_codes_and_their_centroids() -> None:
    method: Any = learner_of("smooseg").method
    with torch.no_grad():
        method.student.mul_(torch.linspace(0.5, 2, len(method.student))[:, None])
    maps = features()
    rows = method.rows(maps, images_of(maps))
    for image in range(len(maps)):
        codes = normalize(method.head.codes(maps[image, :1])[0].flatten(1).T, dim=1)
        student = codes @ normalize(method.student, dim=1).T
        assert torch.allclose(rows["student"][image].T, student, atol=1e-5)
        teacher = codes @ normalize(method.head.centroids, dim=1).T
        assert torch.allclose(rows["logits"][image, 0].T, teacher, atol=1e-5)


def test_the_terms_of_a_step_are_of_probabilities_over_clusters() -> None:
    method: Any = learner_of("smooseg").method
    maps = features()
    images = images_of(maps)
    rows = method.rows(maps, images)
    found = method.loss(Batch(**vars(images), features=maps), rows)
    # With every patch drawn once, each term is that of the whole images, in any order.
    number = maps[0, 0, 0].numel()
    assert number <= method.options.patches
    here, there = draw_patches(number, method.options.patches, images.seed, images.step)
    assert sorted(here.tolist()) == sorted(there.tolist()) == [*range(number)]
    u = maps[:, 0].flatten(2).mT
    p = (rows["logits"][:, 0].mT / method.options.temperature).exp()
    p = p / p.sum(2, keepdim=True)
    (roll,) = draw_rolls(len(maps), 1, images.seed, images.step)
    within = smoothness_loss(u, u, p, p, method.options.within_shift)
    across = smoothness_loss(u, u.roll(roll, 0), p, p.roll(roll, 0), method.options.across_shift)
    assert torch.allclose(found["within"], within, atol=1e-5)
    assert torch.allclose(found["across"], across, atol=1e-5)
    total = found["within"] + found["across"] + found["data"]
    assert torch.allclose(found["loss"], total)


def test_the_teachers_centroids_forget_faster_in_short_trainings() -> None:
    method: Any = learner_of("smooseg").method
    maps = features()
    for steps, kept in ((20, 0.75), (100_000, method.options.momentum), (3, 0.0)):
        with torch.no_grad():
            method.head.centroids.fill_(1)
            method.student.fill_(0)
        images = replace(images_of(maps), steps=steps)
        method.update(Batch(**vars(images), features=maps), {})
        expected = torch.full_like(method.student, kept)
        assert torch.allclose(method.head.centroids, expected, atol=1e-6)
