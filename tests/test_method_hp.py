"""HP: its positives and its loss against values of the authors' functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from iddc.methods.hp import hidden_positive_loss, hidden_positives
from oracles import waves
from steps import images_of
from test_methods import features, learner_of

U, E = normalize(waves(1, 5, 3), dim=1), normalize(waves(4, 5, 2), dim=1)
PROJECTED, MIXED = normalize(waves(6, 5, 2), dim=1), normalize(waves(8, 5, 2), dim=1)
POOL, TEACHER_POOL = normalize(waves(20, 2, 3), dim=1), normalize(waves(30, 2, 2), dim=1)


def pairs(found: Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in found.nonzero() if i < j}


def test_positives_are_pairs_that_are_nearer_than_the_pool() -> None:
    found = hidden_positives(U, POOL)
    assert pairs(found) == {(0, 2), (0, 4), (1, 3), (2, 4)}
    assert found.equal(found.T)


def test_the_teachers_positives_come_from_its_codes() -> None:
    assert pairs(hidden_positives(E, TEACHER_POOL)) == {(0, 3), (1, 4)}


@pytest.mark.parametrize(
    ("weight", "others", "expected"),
    [(0.5, True, 20.135982), (0.5, False, 1.762023), (0.0, True, 23.912547)],
)
def test_the_loss_is_that_of_the_authors_function(
    weight: float, others: bool, expected: float
) -> None:
    """Theirs is half the sum of that of the projected codes and of the mixed ones."""
    losses = [
        hidden_positive_loss(
            codes[None],
            hidden_positives(U, POOL),
            hidden_positives(E, TEACHER_POOL),
            weight=weight,
            others=torch.full((5, 5), others),
            temperature=0.8,
        )
        for codes in (PROJECTED, MIXED)
    ]
    assert sum(losses).item() / 2 == pytest.approx(expected, abs=1e-6)


def test_images_of_a_batch_are_contrasted_with_each_other() -> None:
    codes = normalize(waves(3, 2, 3, 4), dim=-1).requires_grad_()
    positives = torch.zeros(6, 6, dtype=torch.bool)
    positives[0, 4] = positives[4, 0] = True
    loss = hidden_positive_loss(
        codes, positives, None, weight=0.0, others=~torch.ones(3, 6).bool(), temperature=0.5
    )
    # The one positive is the whole denominator, so that there is nothing to pay.
    assert loss.item() == pytest.approx(0, abs=1e-12)
    full = hidden_positive_loss(
        codes, positives, None, weight=0.0, others=torch.ones(3, 6).bool(), temperature=0.5
    )
    flat = codes.flatten(0, 1).detach()
    by_hand = []
    for i, j in ((0, 4), (4, 0)):
        scores = torch.stack([flat[i] @ flat[m] / 0.5 for m in range(6) if m != i])
        by_hand.append(0.5 / 0.07 * (scores.exp().sum().log() - flat[i] @ flat[j] / 0.5))
    assert full.item() == pytest.approx(sum(by_hand).item() / 2, abs=1e-9)


def test_without_an_anchor_loss_and_gradient_are_zero() -> None:
    codes = waves(3, 2, 3, 4).requires_grad_()
    none = torch.zeros(6, 6, dtype=torch.bool)
    loss = hidden_positive_loss(codes, none, none, weight=1.0, others=~none[:3], temperature=1.0)
    loss.backward()
    assert loss == 0
    assert codes.grad is not None
    assert not codes.grad.any()


def test_codes_are_projected_to_length_1_where_the_teacher_sees_the_same_patches() -> None:
    method: Any = learner_of("hp").method
    maps = features()
    rows = method.rows(maps, images_of(maps))
    here = method._patches(maps[0, 0, 0].numel(), images_of(maps))
    for image, found in enumerate(rows["projected"]):
        codes = method.head.codes(maps[image, :1])[0].flatten(1).T[here]
        assert torch.allclose(found, normalize(method.projector(codes), dim=1), atol=1e-5)
        codes = method.teacher.codes(maps[image, :1])[0].flatten(1).T[here]
        assert torch.allclose(rows["teacher"][image], normalize(codes, dim=1), atol=1e-5)
