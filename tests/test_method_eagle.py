"""EAGLE: its terms against values of the authors' functions, and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from iddc.config import Experiment
from iddc.methods import completed
from iddc.methods.eagle import (
    Eagle,
    EagleConfig,
    correspondence,
    descriptions,
    laplacian,
    medoid,
    object_contrast,
)
from iddc.methods.method import Batch
from iddc.network import Codes
from oracles import waves
from steps import images_of

INPUTS = (waves(1, 4, 3), waves(2, 4, 2), waves(7, 4, 3), waves(5, 4, 2))
"""Features and codes of a patch, and of the other patches."""


@pytest.mark.parametrize(
    ("positive", "beta", "value", "gradient"),
    [(True, 0.0, 0.046713, 0.223672), (False, 0.11, -0.154834, 0.114454)],
)
def test_the_correspondence_and_its_gradient_are_those_of_the_authors_function(
    positive: bool, beta: float, value: float, gradient: float
) -> None:
    features, codes, others, other_codes = (each[None].clone() for each in INPUTS)
    codes.requires_grad_()
    loss = correspondence(features, codes, others, other_codes, beta=beta, positive=positive)
    assert loss.item() == pytest.approx(value, abs=1e-6)
    loss.backward()
    assert codes.grad is not None
    assert codes.grad.norm().item() == pytest.approx(gradient, abs=1e-6)


def test_the_correspondence_does_not_depend_on_lengths() -> None:
    lengths = torch.tensor([0.5, 2.0, 3.0, 0.1], dtype=torch.float64)[:, None]
    plain = correspondence(*(each[None] for each in INPUTS), beta=0.1, positive=True)
    scaled = correspondence(*((each * lengths)[None] for each in INPUTS), beta=0.1, positive=True)
    assert scaled.item() == pytest.approx(plain.item(), abs=1e-12)


def test_the_laplacian_has_the_eigenvalues_of_the_authors_function() -> None:
    colours = waves(4, 5, 3) / 255
    closeness = torch.exp(-torch.cdist(colours, colours).square() / (2 * 0.1**2))
    found = torch.linalg.eigvalsh(laplacian(waves(2, 5, 2), closeness / closeness.max()))
    expected = [0, 0.758685, 0.901464, 0.995669, 0.997702]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_laplacian_is_that_of_loops() -> None:
    codes = waves(3, 6, 4)
    edges = [[max(0.0, float(a @ b)) for b in codes] for a in codes]
    top = max(max(row) for row in edges)
    edges = [[edge / top + 1 for edge in row] for row in edges]
    degree = [sum(row) for row in edges]
    found = laplacian(codes)
    for i in range(6):
        for j in range(6):
            value = (i == j) - edges[i][j] / math.sqrt(degree[i] * degree[j])
            assert float(found[i, j]) == pytest.approx(value, abs=1e-12)


def test_descriptions_are_eigenvectors_and_their_sign_is_fixed() -> None:
    codes = waves(2, 1, 9, 4).float()
    found = descriptions(codes)[0].double()
    matrix = laplacian(codes)[0].double()
    values = torch.linalg.eigvalsh(matrix)[1:4]
    torch.testing.assert_close(matrix @ found, found * values, rtol=0, atol=1e-5)
    # A graph of positive edges has a first eigenvector of one sign, here that of fewer entries.
    assert int((found > 0).sum()) <= 18


PLUS, OTHER = normalize(waves(1, 6, 3), dim=1), normalize(waves(2, 6, 3), dim=1)
LABELS = torch.tensor([0, 0, 1, 1, 1, 2])
WEIGHTS = torch.arange(1, 7, dtype=torch.float64) / 10


def test_prototypes_are_the_medoids_of_the_authors_function() -> None:
    assert [int(medoid(PLUS, label == LABELS)) for label in range(3)] == [0, 2, 5]


def contrast(seen: Tensor) -> float:
    return object_contrast(PLUS, OTHER, LABELS, seen, WEIGHTS).item()


def test_the_object_contrast_is_that_of_the_authors_function() -> None:
    assert contrast(torch.ones(6, dtype=torch.long)) == pytest.approx(0.977352, abs=1e-6)


def test_patches_that_the_other_view_does_not_show_count_in_their_own_alone() -> None:
    seen = torch.tensor([1, 0, 1, 1, 0, 1])
    scores = OTHER @ PLUS[[0, 2, 5]].T / 0.07
    costs = [float(scores[i].logsumexp(0) - scores[i, LABELS[i]]) for i in range(6)]
    distant = sum(float(WEIGHTS[i]) * costs[i] for i in (0, 2, 3, 5)) / 4
    expected = (0.3 * 2.790852 + 0.7 * distant) / 2
    assert contrast(seen) == pytest.approx(expected, abs=1e-6)
    assert contrast(torch.zeros(6, dtype=torch.long)) == pytest.approx(0.15 * 2.790852, abs=1e-6)


# The whole loss -----------------------------------------------------------------------------------


def step_of(step: int, **options: float) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Maps, rows and terms of a step of two images whose patches are nearly alike."""
    torch.manual_seed(0)
    numbers = {"object_start": 3, "objects": 2, "dim": 2, "negatives": 5, **options}
    experiment = completed(Experiment(method="eagle", num_clusters=3, options=numbers))
    method = Eagle(Codes(4, 3, 2), experiment, EagleConfig.model_validate(numbers))
    maps = torch.randn(2, 1, 4, 1, 1).expand(2, 2, 4, 3, 3) + 1e-3 * torch.randn(2, 2, 4, 3, 3)
    images = images_of(maps, step=step)
    rows = method.rows(maps, images)
    batch = Batch(**vars(images), features=maps)
    return maps, rows, method.loss(batch, rows)


@pytest.mark.parametrize(("step", "share"), [(2, 0.0), (3, 0.5), (4, 0.5)])
def test_the_loss_is_that_of_the_docstring_and_objects_count_from_their_start(
    step: int, share: float
) -> None:
    options = {"positive_weight": 2.0, "negative_weight": 3.0, "object_share": 0.5}
    _, _, terms = step_of(step, **options)
    pairs = 2 * terms["positive"] + 3 * terms["negative"]
    expected = (1 - share) * pairs + 0.85 * share * terms["objects"]
    expected = expected + terms["probe"] + terms["eigen"]
    assert terms["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_random_images_are_the_others_of_the_batch() -> None:
    maps, rows, terms = step_of(0)
    features, codes = maps[:, 0].flatten(2).mT[:, :1], rows["codes"][:, 0].flatten(2).mT[:, :1]
    others = features.flip(0), codes.flip(0)  # all patches of an image are nearly alike
    expected = correspondence(features, codes, *others, beta=0.0, positive=False)
    itself = correspondence(features, codes, features, codes, beta=0.0, positive=False)
    assert abs(itself.item() - expected.item()) > 0.1
    assert terms["negative"].item() == pytest.approx(expected.item(), abs=0.02)


def test_centroids_of_descriptions_follow_them_as_softly_as_they_win() -> None:
    _, rows, terms = step_of(0)
    cosines = rows["eigen"].reshape(-1, 2).tolist()
    total = 0.0
    for row in cosines:
        weights = [math.exp(value) for value in row]
        total += sum(w * value for w, value in zip(weights, row, strict=True)) / sum(weights)
    assert terms["eigen"].item() == pytest.approx(-total / len(cosines), abs=1e-6)
    assert terms["probe"].item() == pytest.approx(-rows["logits"].amax(2).mean().item(), abs=1e-6)
