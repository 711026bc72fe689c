"""PriMaPs-EM: masks, votes, the focal loss and the teacher's pace against values by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from iddc.methods.method import Batch
from iddc.methods.primaps import (
    FREE,
    focal_cross_entropy,
    principal_masks,
    teacher_pace,
    voted,
)
from oracles import waves
from steps import images_of
from test_methods import features, learner_of


def test_the_focal_loss_is_that_of_the_authors_function() -> None:
    """Their mean is over all six patches, the one without a label too."""
    labels = torch.tensor([[0, 1, -1, 2, 1, 0]])
    loss = focal_cross_entropy(waves(1, 1, 6, 3), labels)
    assert loss.item() == pytest.approx(0.361822, abs=1e-6)


def test_the_weights_of_clusters_are_those_of_the_authors_function() -> None:
    """One patch of each cluster with equal logits elsewhere shows them one by one."""
    probs = waves(1, 6, 3).softmax(1).mean(0)
    assert (1 - probs).square().tolist() == pytest.approx([0.424595, 0.441863, 0.467395], abs=1e-6)
    logits = waves(1, 1, 6, 3)
    for cluster, weight in enumerate((0.424595, 0.441863, 0.467395)):
        labels = torch.full((1, 6), -1)
        labels[0, 2] = cluster
        cost = -logits[0, 2].log_softmax(0)[cluster] * weight / 6
        assert focal_cross_entropy(logits, labels).item() == pytest.approx(cost.item(), abs=1e-6)


def test_the_teacher_is_a_running_mean_that_copies_twice() -> None:
    teacher, seen = 0.0, []
    for call in range(7):
        pace = teacher_pace(call, 0.98)
        teacher = pace * teacher + (1 - pace) * call
        seen.append(teacher)
    expected = [0, 1, 1.333333, 1.75, 2.2, 2.666667, 3.142857]
    assert seen == pytest.approx(expected, abs=1e-6)
    assert teacher_pace(100, 0.98) == 0.98


def test_masks_are_cut_from_a_seed_along_the_principal_direction() -> None:
    """Of six patches, three times, seed 0 takes 0, 1 and 5, then seed 2 takes 2 and 3."""
    rows = [(1, 0, 0), (0.9, 0.1, 0), (0, 1, 0), (0.1, 0.9, 0.1), (0, 0, 1), (1, 0.2, 0.1)]
    twice = torch.tensor(rows * 3, dtype=torch.float64).T.reshape(3, 3, 6)
    masks = principal_masks(twice, 0.8, 0.4)
    assert masks.tolist() == [[0, 0, 1, 1, FREE, 0]] * 3


def test_masks_cover_the_share_that_is_asked_for() -> None:
    maps = waves(1, 8, 12, 14).float()
    masks = principal_masks(maps, 0.95, 0.4)
    assert (masks == FREE).float().mean() <= 0.05 + 5 / masks.numel()


def test_alike_patches_are_one_mask() -> None:
    assert principal_masks(torch.ones(4, 3, 3), 0.95, 0.4).unique().tolist() == [0]


def test_a_mask_takes_the_cluster_most_frequent_in_it() -> None:
    clusters = torch.tensor([[2, 2, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]])
    masks = torch.tensor([[0, 0, 0, 1, 1, FREE], [3, 3, 3, FREE, 0, 0]])
    expected = [[2, 2, 2, 1, 1, -1], [0, 0, 0, -1, 1, 1]]
    assert voted(clusters, masks, 3).tolist() == expected


def test_the_teacher_moves_now_and_then_by_what_it_does_not_keep() -> None:
    method: Any = learner_of("primaps").method
    maps, before = features(), method.head.weight.clone()
    with torch.no_grad():
        method.directions.copy_(torch.randn_like(method.directions))
        method.lengths.fill_(2)
    student = 2 * normalize(method.directions, dim=1)[:, :, None, None]
    for step, calls, kept in ((1, 2, None), (0, 0, 0.0), (0, 2, 2 / 3)):
        method.calls.fill_(calls)
        with torch.no_grad():
            method.head.weight.copy_(before)
        images = images_of(maps, step=step * (method.options.every + 1))
        method.update(Batch(**vars(images), features=maps), {})
        expected = before if kept is None else kept * before + (1 - kept) * student
        assert torch.allclose(method.head.weight, expected, atol=1e-6)
        assert int(method.calls) == calls + (kept is not None)
