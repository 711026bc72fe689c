"""The second stage: which labels are kept, and what is learned of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from iddc.errors import ConfigError
from iddc.methods import completed
from iddc.methods.method import Batch
from iddc.methods.second_stage import NONE, kept_labels, masked_cross_entropy
from oracles import waves
from steps import images_of
from test_methods import Fixed, features, learner_of, tiny

TEACHER = (4 * waves(2, 5, 3)).softmax(dim=1)


def test_the_loss_is_that_of_the_patches_that_are_sure() -> None:
    """Of the confidences .955 .975 .908 .975 .792 four are above .9."""
    confidence, labels = TEACHER.max(dim=1)
    assert labels.tolist() == [0, 2, 0, 2, 0]
    labels = torch.where(confidence > 0.9, labels, NONE)
    loss = masked_cross_entropy(waves(1, 5, 3), labels)
    assert loss.item() == pytest.approx(0.954301, abs=1e-6)


def test_without_any_label_loss_and_gradient_are_zero() -> None:
    logits = waves(1, 5, 3).requires_grad_()
    loss = masked_cross_entropy(logits, torch.full((5,), NONE))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_each_cluster_loses_the_same_share_of_its_own_least_sure_patches() -> None:
    labels = [torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0], [1, 1]])]
    confidences = [torch.tensor([[0.9, 0.8, 0.2, 0.1]]), torch.tensor([[0.7, 0.6], [0.3, 0.4]])]
    found = kept_labels(labels, confidences, 0.5)
    assert [each.tolist() for each in found] == [
        [[0, 0, NONE, NONE]],
        [[NONE, NONE], [1, 1]],
    ]


def test_with_nothing_dropped_every_patch_keeps_its_label() -> None:
    labels = torch.tensor([[3, 0], [3, 1]])
    (found,) = kept_labels([labels], [torch.rand(2, 2)], 0.0)
    assert torch.equal(found, labels)


def test_the_first_stage_labels_all_images_before_the_first_step() -> None:
    method = learner_of("second-stage").method
    labels = method.labels
    assert labels.shape == (5, 4, 4)
    assert set(labels.unique().tolist()) <= {NONE, 0, 1, 2}
    # Half of the patches of each cluster, the median itself included.
    counts = [int((labels == cluster).sum()) for cluster in range(3)]
    assert sum(counts) / labels.numel() == pytest.approx(0.5, abs=0.05)
    assert min(counts) > 0
    # What the log says of them.
    said = learner_of("second-stage").method.refit(Fixed(features()), 0, 4)
    assert said == {"labelled": sum(counts) / labels.numel(), "clusters": 3}


def test_the_first_stage_must_be_a_method_without_steps() -> None:
    experiment = tiny("second-stage").model_copy(update={"options": {"first": "stego"}})
    with pytest.raises(ConfigError, match="expected 'kmeans' or 'consensus', found 'stego'"):
        completed(experiment)


def test_the_average_forgets_faster_in_short_rounds() -> None:
    """In a round of 20 steps it keeps 1 - 5 / 20 of itself in each, and never more than asked."""
    method: Any = learner_of("second-stage").method
    maps = features()
    for steps, kept in ((20, 0.75), (100_000, method.options.momentum), (3, 0.0)):
        images = replace(images_of(maps), steps=steps * method.options.rounds)
        with torch.no_grad():
            for slow, fast in zip(
                method.head.parameters(), method.student.parameters(), strict=True
            ):
                slow.fill_(1)
                fast.fill_(0)
        method.update(Batch(**vars(images), features=maps), {})
        for slow in method.head.parameters():
            assert torch.allclose(slow, torch.full_like(slow, kept), atol=1e-6)
