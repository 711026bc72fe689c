"""PiCIE: its terms against values of the authors' functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from iddc.methods.mdc import nearest_means
from iddc.methods.picie import picie_loss
from iddc.views import draw_patches
from oracles import waves
from steps import images_of
from test_methods import features, learner_of

CODES = torch.stack([normalize(waves(start, 5, 3), dim=1) for start in (1, 3)])
MEANS = torch.stack([0.8 * waves(start, 2, 3) for start in (3, 5)])


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.stack([nearest_means(CODES[view], MEANS[view]) for view in (0, 1)])


def test_labels_are_those_of_the_authors_function(labels: torch.Tensor) -> None:
    assert labels.tolist() == [[1, 0, 1, 0, 1]] * 2


@pytest.mark.parametrize(
    ("by_size", "within", "across"), [(True, 0.290218, 1.178859), (False, 0.289166, 1.179620)]
)
def test_the_terms_are_those_of_the_authors_function(
    labels: torch.Tensor, by_size: bool, within: float, across: float
) -> None:
    shares = torch.tensor([0.4, 0.6]) if by_size else torch.ones(2)
    cosines = (CODES[:, None] @ MEANS.mT)[None]
    found = picie_loss(cosines, labels[None], shares.double().expand(2, 2))
    assert [value.item() for value in found] == pytest.approx([within, across], abs=1e-6)


def test_the_first_view_has_the_cosines_of_its_codes_to_the_means_of_both_clusterings() -> None:
    method = learner_of("picie").method
    maps = features()
    found = method.rows(maps, images_of(maps))["cosines"][:, 0]
    head: Any = method.head
    means: Any = method.means
    here = draw_patches(maps[0, 0, 0].numel(), found.shape[2], 0, 0)[0]
    for image in range(len(maps)):
        codes = head.codes(maps[image, :1])[0].flatten(1).T[here]
        for clustering in (0, 1):
            expected = normalize(codes, dim=1) @ means[clustering].T
            assert torch.allclose(found[image, clustering], expected, atol=1e-5)
    assert means.norm(dim=2).max() <= 1 + 1e-5
