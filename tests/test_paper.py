"""What the paper says about its terms, in numbers that a reader can work out by hand."""

from __future__ import annotations

from math import e, exp, log, pi
from typing import Any

import pytest
import torch
from torch import Tensor

from iddc.config import ObjectiveConfig
from iddc.losses import PENALTIES, REGULARIZERS, Objective, Pixels, negative_loss, positive_loss


def one_image(embeddings: list[list[float]], probs: list[list[float]]) -> Pixels:
    return Pixels(torch.tensor([embeddings]), torch.tensor([probs]))


# Two pixels per crop. Affinities (rows: first, columns: second): [[1, 0.6], [0, 0.8]].
# Agreements v.v':                                               [[1, 0.25], [0, 0.75]].
FIRST = one_image([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
SECOND = one_image([[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.25, 0.75]])


@pytest.mark.parametrize(
    ("penalty", "weighted", "expected"),
    [
        ("linear", True, (1 * 0 + 0.6 * 0.75 + 0.8 * 0.25) / 3),
        ("exp", True, (1 * 1 + 0.6 * exp(0.75) + 0.8 * exp(0.25)) / 3),
        ("log", True, (1 * 0 - 0.6 * log(0.25) - 0.8 * log(0.75)) / 3),
        ("linear", False, (0 + 0.75 + 0.25) / 3),
    ],
)
def test_equation_1_by_hand(penalty: Any, weighted: bool, expected: float) -> None:
    loss = positive_loss(FIRST, SECOND, threshold=0.2, penalty=penalty, affinity_weights=weighted)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("penalty", "weights", "expected"),
    [
        ("linear", "paper", (0.4 * 0.25 + 1 * 0 + 0.2 * 0.75) / 3),
        ("exp", "paper", (0.4 * exp(0.25) + 1 * 1 + 0.2 * exp(0.75)) / 3),
        ("log", "paper", (-0.4 * log(0.75) + 1 * 0 - 0.2 * log(0.25)) / 3),
        ("linear", "off", (0.25 + 0 + 0.75) / 3),
    ],
)
def test_equation_2_by_hand(penalty: Any, weights: Any, expected: float) -> None:
    loss = negative_loss(FIRST, SECOND, threshold=0.9, penalty=penalty, affinity_weights=weights)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("weights", "expected"), [("paper", 2.0), ("released", 1.0), ("off", 1.0)])
def test_opposite_embeddings_count_twice_in_the_paper_and_once_in_the_release(
    weights: Any, expected: float
) -> None:
    pixel = one_image([[1.0, 0.0]], [[1.0, 0.0]])
    opposite = one_image([[-1.0, 0.0]], [[1.0, 0.0]])
    loss = negative_loss(
        pixel, opposite, threshold=0.12, penalty="linear", affinity_weights=weights
    )
    assert loss.item() == pytest.approx(expected)


def test_a_pair_at_a_threshold_is_neither_positive_nor_negative() -> None:
    pixel = one_image([[1.0, 0.0]], [[1.0, 0.0]])
    other = one_image([[0.5, 0.75**0.5]], [[0.5, 0.5]])
    assert positive_loss(pixel, other, threshold=0.5) == 0
    assert negative_loss(pixel, other, threshold=0.5) == 0
    assert positive_loss(pixel, other, threshold=0.49) > 0
    assert negative_loss(pixel, other, threshold=0.51) > 0


def test_pairs_are_averaged_over_the_batch_and_not_image_by_image() -> None:
    # Image 0 has one positive pair of cost 1, image 1 has four of cost 0.
    embeddings = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    others = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    disagreeing = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    loss = positive_loss(
        Pixels(embeddings, probs), Pixels(others, disagreeing), threshold=0.2, penalty="linear"
    )
    assert loss.item() == pytest.approx(1 / 5)


# Sec. 3.3.2: what the three penalties do with a disagreement of 0, 1/2 and 1.


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [("log", [0, log(2), -log(1e-6)]), ("linear", [0, 0.5, 1]), ("exp", [1, e**0.5, e])],
)
def test_penalties_at_no_half_and_full_disagreement(penalty: Any, expected: list[float]) -> None:
    found = PENALTIES[penalty](torch.tensor([0.0, 0.5, 1.0]), 1e-6)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def slope(penalty: Any, disagreement: float) -> float:
    x = torch.tensor(disagreement, dtype=torch.float64, requires_grad=True)
    PENALTIES[penalty](x, 1e-6).backward()
    assert x.grad is not None
    return x.grad.item()


@pytest.mark.parametrize("disagreement", [0.0, 0.3, 0.99])
def test_slopes_of_the_penalties(disagreement: float) -> None:
    assert slope("linear", disagreement) == pytest.approx(1)
    assert slope("exp", disagreement) == pytest.approx(exp(disagreement))
    assert slope("log", disagreement) == pytest.approx(1 / (1 - disagreement))


# Eqs. (6) and (7).


def regularizer(name: Any, p: list[float], **options: float) -> float:
    frequencies = torch.tensor(p, dtype=torch.float64)
    return REGULARIZERS[name](frequencies, ObjectiveConfig(**options)).item()  # type: ignore[arg-type]


def test_entropy_of_two_equal_clusters_is_minus_log_2() -> None:
    assert regularizer("entropy", [0.5, 0.5]) == pytest.approx(-log(2))


def test_entropy_of_one_full_and_one_empty_cluster_is_zero() -> None:
    assert regularizer("entropy", [1.0, 0.0]) == 0


def test_printed_weibull_of_one_cluster() -> None:
    found = regularizer("weibull", [1.0], weibull_shape=0.5, weibull_offset=1e-12)
    assert found == pytest.approx(0.5 * exp(-1))


def test_printed_weibull_is_a_sum_over_clusters() -> None:
    found = regularizer("weibull", [0.25] * 4, weibull_shape=0.5, weibull_offset=1e-12)
    assert found == pytest.approx(4 * 0.5 * 2 * exp(-0.5))


def test_released_weibull_of_equal_clusters_is_the_density_at_one_whatever_their_number() -> None:
    options = {"weibull_shape": 0.5, "weibull_scale": 4.0, "weibull_divisor": 10.0}
    density = (0.5 / 4) * (1 / 4) ** -0.5 * exp(-((1 / 4) ** 0.5))
    for k in (1, 2, 27):
        found = regularizer("weibull-released", [1 / k] * k, weibull_offset=1e-12, **options)
        assert found == pytest.approx(density / 10)


def test_released_weibull_sees_only_ratios_of_frequencies() -> None:
    one = regularizer("weibull-released", [0.4, 0.2, 0.1])
    assert regularizer("weibull-released", [0.8, 0.4, 0.2]) == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "p", "expected", "rounding"),
    [
        ("weibull", [1 / 27] * 27, 22.4, 0.05),
        ("weibull-released", [1 / 27] * 27, 0.0008, 0.00005),
        ("weibull", [1e-4] + [(1 - 1e-4) / 26] * 26, 92, 0.5),
        ("weibull-released", [1e-4] + [(1 - 1e-4) / 26] * 26, 0.004, 0.0005),
    ],
)
def test_the_two_weibull_forms_differ_by_orders_of_magnitude_at_the_published_weight(
    name: Any, p: list[float], expected: float, rounding: float
) -> None:
    """0.4 L_reg with 27 clusters, all equal or one nearly empty, at shape 0.3."""
    assert 0.4 * regularizer(name, p, weibull_shape=0.3) == pytest.approx(expected, abs=rounding)


@pytest.mark.parametrize("name", ["weibull", "weibull-released"])
def test_weibull_forgives_imbalance_that_the_entropy_punishes(name: Any) -> None:
    """Fig. 3: two clusters at a ratio of 0.1, as a share of the rise from equal to 0.001."""

    def share(form: Any) -> float:
        def at(ratio: float) -> float:
            return regularizer(form, [ratio / (1 + ratio), 1 / (1 + ratio)])

        return (at(0.1) - at(1)) / (at(0.001) - at(1))

    assert share(name) < 0.1
    assert share("entropy") > 0.5


# Eq. (8).


def test_equation_8_by_hand() -> None:
    """Two images of one pixel, all embeddings at right angles to those of the other image."""
    embeddings = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    first = Pixels(embeddings, torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))
    second = Pixels(embeddings, torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]]))
    config = ObjectiveConfig(
        penalty="linear", regularizer="entropy", negative_weight=10.0, regularizer_weight=100.0
    )
    terms = Objective(config)(first, second, [1])
    assert terms.positive.item() == pytest.approx((1 + 0.5) / 2)
    assert terms.negative.item() == pytest.approx(0.5)
    entropy = 0.75 * log(0.75) + 0.25 * log(0.25)
    assert terms.regularizer.item() == pytest.approx(entropy)
    assert terms.total.item() == pytest.approx(0.75 + 10 * 0.5 + 100 * entropy)


def test_centred_affinities_are_cosines_about_the_batch_mean() -> None:
    """Two directions 60 degrees apart are opposite once their mean is taken away."""

    def direction(angle: float) -> Tensor:
        t = torch.tensor(angle)
        return torch.stack([t.cos(), t.sin()])

    embeddings = torch.stack([direction(0.0), direction(pi / 3)])[:, None]
    crop = Pixels(embeddings, torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))

    def negative(centering: Any) -> float:
        config = ObjectiveConfig(penalty="linear", centering=centering)
        return Objective(config)(crop, crop, [1]).negative.item()

    assert negative("none") == 0  # an affinity of 1/2 is above t- = 0.12
    assert negative("batch") == pytest.approx(1 - -1)  # w- = 1 - (-1), h- = 1
