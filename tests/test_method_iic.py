"""IIC: the mutual information against values of the authors' functions, and aligned views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from iddc.methods.alignment import aligned
from iddc.methods.iic import information_loss
from oracles import waves

P, Q = (3 * waves(1, 3, 2, 2)).softmax(0)[None], (3 * waves(2, 3, 2, 2)).softmax(0)[None]


@pytest.mark.parametrize(
    ("reach", "weight", "expected"),
    [(0, 1.0, -0.068197), (0, 1.5, -1.001817), (1, 1.0, -0.276612)],
)
def test_the_loss_is_that_of_the_authors_function(
    reach: int, weight: float, expected: float
) -> None:
    assert information_loss(P, Q, reach, weight).item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_that_of_the_slow_loop() -> None:
    logits = (3 * waves(1, 3, 2, 2)).requires_grad_()
    information_loss(logits.softmax(0)[None], Q, 0).backward()
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(0.052514, abs=1e-6)


def test_for_sure_clusters_the_loss_is_less_the_mutual_information_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, size=(2, 200))
    ids[1, :120] = ids[0, :120]
    both = np.concatenate([ids, ids[::-1]], axis=1)  # the joint is symmetric
    p, q = (torch.nn.functional.one_hot(torch.from_numpy(row), 3).double() for row in ids)
    loss = information_loss(p.T[None, :, :, None], q.T[None, :, :, None], 0)
    assert loss.item() == pytest.approx(-mutual_info_score(*both), abs=1e-9)


def test_it_is_lowest_for_equal_clusters_that_agree() -> None:
    sure = torch.eye(4, dtype=torch.float64)[None, :, :, None]
    assert information_loss(sure, sure, 0).item() == pytest.approx(-math.log(4))


def test_the_joint_is_of_all_images_together() -> None:
    two = torch.cat([P, Q]), torch.cat([Q, P])
    as_one = information_loss(torch.cat([P, Q], dim=3), torch.cat([Q, P], dim=3), 0)
    assert information_loss(*two, 0).item() == pytest.approx(as_one.item())


# The same place in both views ---------------------------------------------------------------------


def coordinates(box: list[float], side: int) -> torch.Tensor:
    """A map whose two channels say where in the file each patch is."""
    left, top, right, bottom = box
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    across, down = left + centres * (right - left), top + centres * (bottom - top)
    return torch.stack([across.expand(side, side), down[:, None].expand(side, side)])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.8, 0.6]),
        ([0.6, 0.2, 0.1, 0.7], [0.8, 0.1, 0.3, 0.6]),
    ],
    ids=["plain", "mirrored"],
)
def test_the_other_view_is_read_at_the_same_place_of_the_file(
    first: list[float], second: list[float]
) -> None:
    side = 16
    found, inside = aligned(
        coordinates(second, side)[None], torch.tensor([[first, second]], dtype=torch.float64)
    )
    wanted = coordinates(first, side)
    low, high = min(second[0], second[2]), max(second[0], second[2])
    expected = (wanted[0] >= low) & (wanted[0] <= high) & (wanted[1] >= 0.1) & (wanted[1] <= 0.6)
    assert inside[0].equal(expected)
    # Within half a patch of the border the nearest patch is read.
    half = 0.5 / side * 0.5
    sure = (
        (wanted[0] >= low + half)
        & (wanted[0] <= high - half)
        & (wanted[1] >= 0.1 + half)
        & (wanted[1] <= 0.6 - half)
    )
    assert sure.sum() > 50
    assert torch.allclose(found[0][:, sure], wanted[:, sure])
    assert not found[0][:, ~expected].any()
