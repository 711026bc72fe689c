"""PiCIE+H: how both clusterings are weighed."""

from __future__ import annotations

import pytest
import torch

from iddc.methods.picie import picie_loss
from iddc.methods.picie_h import balance
from steps import images_of
from test_methods import features, learner_of, step_of


def test_the_weights_are_those_of_the_paper_for_27_and_100_clusters() -> None:
    assert balance(27, 100) == pytest.approx((0.582859, 0.417141), abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_both_clusterings() -> None:
    terms = step_of("picie-h")
    own, other = balance(3, 6)
    assert float(terms["loss"]) == pytest.approx(
        own * float(terms["coarse"]) + other * float(terms["fine"]), abs=1e-6
    )


def test_both_clusterings_are_of_the_same_codes_and_have_shares_of_their_own() -> None:
    method = learner_of("picie-h").method
    assert method.means.shape[:2] == (2, 3)
    assert method.fine_means.shape[:2] == (2, 6)
    torch.testing.assert_close(method.fine_weights.sum(1), torch.ones(2))


def test_the_finer_clusters_alone_give_the_finer_term() -> None:
    method, maps = learner_of("picie-h").method, features()
    rows = method.rows(maps, images_of(maps))
    within, across = picie_loss(rows["fine_cosines"], rows["fine_labels"], method.fine_weights)
    mean = (within + across).detach() / 2
    assert float(step_of("picie-h")["fine"]) == pytest.approx(mean.item(), abs=1e-5)
