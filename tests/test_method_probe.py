"""The cosine probe: its loss against a value by hand, and that it finds clusters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from iddc.methods.correspondence import probe_loss
from oracles import waves


def test_the_loss_is_that_of_the_slow_loop() -> None:
    rows, centroids = waves(1, 6, 3), waves(4, 2, 3)
    cosines = normalize(centroids, dim=1) @ normalize(rows, dim=1).T
    assert probe_loss(cosines[None, None]).item() == pytest.approx(-0.958566, abs=1e-6)


def test_only_the_nearest_centroid_is_moved() -> None:
    cosines = torch.tensor([[[[0.2, 0.9], [0.7, 0.1], [-0.5, 0.3]]]], requires_grad=True)
    probe_loss(cosines).backward()
    assert cosines.grad is not None
    assert cosines.grad[0, 0].tolist() == [[0, -0.5], [-0.5, 0], [0, 0]]
