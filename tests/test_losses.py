"""The terms of the objective against the loops of oracles.py, and the laws they obey.

The loops also check `losses/reference.py`, whose gradients autograd takes; the fast terms are
compared with both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import e, log
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode

import oracles
from iddc.config import NegativeAffinity, ObjectiveConfig, Penalty, Regularizer
from iddc.losses import (
    PENALTIES,
    REGULARIZERS,
    Objective,
    Pixels,
    cluster_frequencies,
    negative_loss,
    positive_loss,
)
from iddc.losses.pairs import BLOCK_PAIRS, PairRule, sum_in_blocks
from iddc.losses.penalties import SLOPES
from iddc.losses.reference import equation_1, equation_2, equation_8

NEGATIVE_AFFINITIES = get_args(NegativeAffinity)
POSITIVE_FORMS = list(product(PENALTIES, [True, False]))
NEGATIVE_FORMS = list(product(PENALTIES, NEGATIVE_AFFINITIES))
EXACT = 1e-10
"""Relative error allowed in double precision."""


def some_pixels(
    seed: int, b: int = 2, n: int = 4, k: int = 3, d: int = 3, dtype: torch.dtype = torch.float64
) -> Pixels:
    """Directions and probabilities at random, in double precision unless told."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(b, n, d, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(b, n, k, generator=generator, dtype=torch.float64)
    return Pixels(normalize(embeddings, dim=-1).to(dtype), logits.softmax(dim=-1).to(dtype))


def learning(pixels: Pixels) -> Pixels:
    """The same pixels, with probabilities that collect a gradient."""
    return replace(pixels, probs=pixels.probs.detach().clone().requires_grad_())


def gradient(pixels: Pixels) -> Tensor:
    assert pixels.probs.grad is not None
    return pixels.probs.grad


def same(found: Tensor, expected: Any, rel: float = EXACT) -> None:
    """Equal up to `rel` of each number, and of 1. (torch.testing takes seconds to load.)"""
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert found.shape == expected.shape
    error = (found.detach().double() - expected).abs() / (1 + expected.abs())
    assert error.max() <= rel, f"{found} is not {expected}"


def test_tables_have_the_names_of_the_configuration() -> None:
    assert set(PENALTIES) == set(SLOPES) == set(get_args(Penalty))
    assert set(REGULARIZERS) == set(get_args(Regularizer))


# Each equation against its loops: value, then gradient by finite differences of the loops.


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("agreement", [0.0, 1e-9, 0.3, 0.999, 1.0])
def test_penalties_of_the_disagreement_are_equations_3_to_5(penalty: Any, agreement: float) -> None:
    s = torch.tensor(agreement, dtype=torch.float64)
    same(PENALTIES[penalty](1 - s, 1e-6), oracles.H_PLUS[penalty](agreement, 1e-6))
    same(PENALTIES[penalty](s, 1e-6), oracles.H_MINUS[penalty](agreement, 1e-6))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_slopes_are_the_derivatives_of_the_penalties(penalty: Any) -> None:
    x = torch.tensor([0.0, 0.3, 0.7, 0.71, 1.0], dtype=torch.float64, requires_grad=True)
    cost = PENALTIES[penalty](x, 0.3)
    (expected,) = torch.autograd.grad(cost.sum(), x)
    same(SLOPES[penalty](x.detach(), cost.detach(), 0.3).expand(5), expected)


@pytest.mark.parametrize(("penalty", "weighted"), POSITIVE_FORMS)
@pytest.mark.parametrize("threshold", [-1.0, -0.3, 0.2])
def test_positive_loss_is_equation_1(penalty: Any, weighted: bool, threshold: float) -> None:
    first, second = learning(some_pixels(0)), learning(some_pixels(1, n=3))
    u, v, u_plus, v_plus = numbers(first, second)
    loss = positive_loss(
        first, second, threshold=threshold, penalty=penalty, affinity_weights=weighted
    )
    loss.backward()

    def loops(v: oracles.Crop, v_plus: oracles.Crop) -> float:
        return oracles.equation_1(
            u, v, u_plus, v_plus, t_plus=threshold, h=penalty, weighted=weighted
        )

    same(loss, loops(v, v_plus))
    same(gradient(first), oracles.slopes(lambda x: loops(x, v_plus), v), rel=1e-7)
    same(gradient(second), oracles.slopes(lambda x: loops(v, x), v_plus), rel=1e-7)


@pytest.mark.parametrize(("penalty", "weights"), NEGATIVE_FORMS)
@pytest.mark.parametrize("threshold", [-0.3, 0.12, 1.0])
def test_negative_loss_is_equation_2(penalty: Any, weights: Any, threshold: float) -> None:
    first, other = learning(some_pixels(2)), learning(some_pixels(3, n=3))
    u, v, u_minus, v_minus = numbers(first, other)
    loss = negative_loss(
        first, other, threshold=threshold, penalty=penalty, affinity_weights=weights
    )
    loss.backward()

    def loops(v: oracles.Crop, v_minus: oracles.Crop) -> float:
        return oracles.equation_2(
            u, v, u_minus, v_minus, t_minus=threshold, h=penalty, form=weights
        )

    same(loss, loops(v, v_minus))
    same(gradient(first), oracles.slopes(lambda x: loops(x, v_minus), v), rel=1e-7)
    same(gradient(other), oracles.slopes(lambda x: loops(v, x), v_minus), rel=1e-7)


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("p", [[0.5, 0.3, 0.2], [0.94, 0.05, 0.01], [0.1, 0.0, 0.9]])
def test_regularizers_are_equations_6_and_7(name: Any, p: list[float]) -> None:
    config = ObjectiveConfig()
    frequencies = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    found = REGULARIZERS[name](frequencies, config)
    same(found, oracles.REGULARIZERS[name](p, config))
    if name == "none" or 0 in p:
        return
    found.backward()
    assert frequencies.grad is not None
    expected = oracles.slopes(lambda x: oracles.REGULARIZERS[name](x[0][0], config), [[p]])
    same(frequencies.grad, expected[0][0], rel=1e-6)


def test_released_weibull_has_no_gradient_along_the_frequencies() -> None:
    """It depends on ratios only: scaling p changes nothing, as the max has a gradient too."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64, requires_grad=True)
    REGULARIZERS["weibull-released"](p, ObjectiveConfig()).backward()
    assert p.grad is not None
    assert p.grad.abs().min() > 1e-6
    assert (p @ p.grad).abs().item() < 1e-12


def test_cluster_frequencies_are_the_mean_over_images_and_pixels() -> None:
    pixels = some_pixels(4)
    same(cluster_frequencies(pixels.probs), oracles.frequencies(pixels.probs.tolist()))


CHANGES: list[dict[str, Any]] = [
    {},
    *({"penalty": name} for name in PENALTIES),
    *({"regularizer": name} for name in REGULARIZERS),
    *({"negative_affinity": name} for name in NEGATIVE_AFFINITIES),
    {"positive_affinity": False},
    {"negative_crops": "second"},
    {"regularizer_crops": "both"},
    {"centering": "batch"},
    {"centering": "batch", "negative_crops": "second", "regularizer_crops": "both"},
    {"positive_threshold": -0.4},
    {"negative_threshold": 0.4},
    {"positive_weight": 0.0},
    {"positive_weight": 2.5},
    {"negative_weight": 0.0},
    {"regularizer_weight": 0.0},
    {"regularizer": "weibull", "weibull_shape": 0.6, "weibull_offset": 1e-3},
    {"weibull_shape": 0.6, "weibull_scale": 2.0, "weibull_divisor": 5.0, "weibull_offset": 1e-3},
    {"penalty": "log", "log_offset": 0.5},
    {"regularizer": "entropy", "log_offset": 0.5},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("rolls", [[1], [2, 1]], ids=str)
def test_the_reference_reads_as_the_loops_do(change: dict[str, Any], rolls: list[int]) -> None:
    config = ObjectiveConfig(**{"regularizer_weight": 10.0, **change})
    first, second = some_pixels(5, b=3, n=3), some_pixels(6, b=3, n=3)
    found = equation_8(first, second, rolls, config)
    for name, expected in (
        oracles.equation_8(*numbers(first, second), rolls, config)._asdict().items()
    ):
        if name == "total" or getattr(config, f"{name}_weight"):
            same(getattr(found, name), expected)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("rolls", [[1], [2, 1]], ids=str)
def test_objective_is_equation_8(change: dict[str, Any], rolls: list[int]) -> None:
    config = ObjectiveConfig(**{"regularizer_weight": 10.0, **change})
    first, second = learning(some_pixels(5, b=3, n=3)), learning(some_pixels(6, b=3, n=3))
    terms = Objective(config)(first, second, rolls)
    for name, expected in (
        oracles.equation_8(*numbers(first, second), rolls, config)._asdict().items()
    ):
        same(getattr(terms, name), expected)
    reference = equation_8(first, second, rolls, config)
    probs = (first.probs, second.probs)
    found, expected_gradients = (
        torch.autograd.grad(total, probs, allow_unused=True, materialize_grads=True)
        for total in (terms.total, reference.total)
    )
    for one, other in zip(found, expected_gradients, strict=True):
        same(one, other)


def tensors(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """u and v."""
    return pixels.embeddings, pixels.probs


def numbers(first: Pixels, second: Pixels) -> list[list[list[list[float]]]]:
    """u, v, u', v' as the lists that the loops read."""
    return [
        tensor.tolist()
        for tensor in (first.embeddings, first.probs, second.embeddings, second.probs)
    ]


# Size: one pixel, odd numbers, more pairs than one block holds.


SIZES = [(1, 1, 1), (1, 2, 31), (3, 63, 65), (2, 257, 1023), (2, 1031, 1031)]


@pytest.mark.parametrize(("b", "n", "m"), SIZES)
def test_positive_loss_of_any_size_equals_the_reference(b: int, n: int, m: int) -> None:
    first, second = learning(some_pixels(7, b, n, d=8)), learning(some_pixels(8, b, m, d=8))
    positive_loss(first, second, threshold=-0.5).backward()
    again, second_again = learning(first), learning(second)
    config = ObjectiveConfig(positive_threshold=-0.5)
    expected = equation_1(*tensors(again), *tensors(second_again), config)
    expected.backward()
    same(positive_loss(first, second, threshold=-0.5), expected)
    same(gradient(first) * n * b, gradient(again) * n * b)
    same(gradient(second) * m * b, gradient(second_again) * m * b)


@pytest.mark.parametrize(("b", "n", "m"), SIZES)
def test_negative_loss_of_any_size_equals_the_reference(b: int, n: int, m: int) -> None:
    first, other = learning(some_pixels(9, b, n, d=8)), learning(some_pixels(10, b, m, d=8))
    negative_loss(first, other, threshold=0.7).backward()
    again, other_again = learning(first), learning(other)
    config = ObjectiveConfig(negative_threshold=0.7)
    expected = equation_2(*tensors(again), *tensors(other_again), config)
    expected.backward()
    same(negative_loss(first, other, threshold=0.7), expected)
    same(gradient(first) * n * b, gradient(again) * n * b)
    same(gradient(other) * m * b, gradient(other_again) * m * b)


def test_single_precision_is_enough_for_a_million_pairs() -> None:
    first, second = some_pixels(7, 1, 1031, d=8), some_pixels(8, 1, 1031, d=8)
    single = positive_loss(
        Pixels(first.embeddings.float(), first.probs.float()),
        Pixels(second.embeddings.float(), second.probs.float()),
        threshold=-1.0,
    )
    same(single, positive_loss(first, second, threshold=-1.0), rel=1e-5)


class Largest(TorchFunctionMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class Kept:
    """A tensor that autograd keeps. The class counts the elements kept now, and at most."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.now += tensor.numel()
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.tensor.numel()


@pytest.mark.parametrize("term", [positive_loss, negative_loss])
def test_no_tensor_of_all_pairs_is_made_or_kept(term: Callable[..., Tensor]) -> None:
    b, n = 10, 1100
    first, second = (learning(some_pixels(s, b, n, dtype=torch.float32)) for s in (11, 12))
    Kept.most = Kept.now
    before = Kept.now
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor),
    ):
        term(first, second, threshold=0.1).backward()
    assert gradient(first).any()
    assert 0 < largest.numel <= b * n * n // 4
    assert 0 < Kept.most - before < n * n


@pytest.mark.parametrize("limit", [1, 7, 30, 50, 80])
@pytest.mark.parametrize("rolls", [[1], [2, 4, -1]], ids=str)
def test_the_size_of_blocks_does_not_matter(
    limit: int, rolls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = learning(some_pixels(0, b=5)), learning(some_pixels(1, b=5))
    again, second_again = learning(first), learning(second)
    objective = Objective(ObjectiveConfig(negative_crops="second", centering="batch"))
    terms = objective(first, second, rolls)
    terms.total.backward()
    monkeypatch.setitem(BLOCK_PAIRS, "cpu", limit)
    terms_again = objective(again, second_again, rolls)
    terms_again.total.backward()
    for name, value in vars(terms).items():
        same(getattr(terms_again, name), value)
    same(gradient(again), gradient(first))
    same(gradient(second_again), gradient(second))


def test_more_pairs_are_counted_exactly_than_fp32_has_integers() -> None:
    pixels = Pixels(torch.zeros(1, 4097, 1), torch.ones(1, 4097, 1))
    rule = PairRule(
        positive=False, threshold=1.0, weights="paper", penalty="linear", log_offset=1e-6
    )
    sums = sum_in_blocks(pixels, pixels, rule, needs_grad=False)
    assert sums.count == 4097**2 > 2**24
    assert sums.gradients is None


def test_embeddings_may_lie_in_memory_as_a_network_leaves_them() -> None:
    """A feature map b d h w, seen as b n d: neighbours in memory are pixels, not channels."""
    first, second = some_pixels(0, b=3, n=6), some_pixels(1, b=3, n=6)

    def as_map(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    maps = [Pixels(as_map(x.embeddings), as_map(x.probs)) for x in (first, second)]
    config = ObjectiveConfig(centering="batch")
    same(Objective(config)(*maps, [1]).total, Objective(config)(first, second, [1]).total)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_pixel_of_one_image_has_no_negatives_and_a_finite_loss(penalty: Any) -> None:
    first, second = learning(some_pixels(13, 1, 1)), learning(some_pixels(13, 1, 1))
    terms = Objective(ObjectiveConfig(penalty=penalty))(first, second, [])
    terms.total.backward()
    assert terms.negative == 0
    u, v, u_plus, v_plus = numbers(first, second)
    expected = oracles.equation_8(u, v, u_plus, v_plus, [], ObjectiveConfig(penalty=penalty))
    same(terms.total, expected.total)
    assert gradient(first).isfinite().all()


# Selection.


@pytest.mark.parametrize(("penalty", "weighted"), POSITIVE_FORMS)
def test_with_no_positive_pair_loss_and_gradient_are_zero(penalty: Any, weighted: bool) -> None:
    first, second = learning(some_pixels(0)), learning(some_pixels(1))
    loss = positive_loss(first, second, threshold=1.001, penalty=penalty, affinity_weights=weighted)
    loss.backward()
    assert loss == 0
    assert not gradient(first).any()
    assert not gradient(second).any()


@pytest.mark.parametrize(("penalty", "weights"), NEGATIVE_FORMS)
def test_with_no_negative_pair_loss_and_gradient_are_zero(penalty: Any, weights: Any) -> None:
    first, other = learning(some_pixels(0)), learning(some_pixels(1))
    loss = negative_loss(first, other, threshold=-1.001, penalty=penalty, affinity_weights=weights)
    loss.backward()
    assert loss == 0
    assert not gradient(first).any()
    assert not gradient(other).any()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_objective_with_no_pair_at_all_is_zero(penalty: Any) -> None:
    """Directions along one axis: affinities are 1 and -1, which t+ = 1 and t- = -1 both exclude."""
    pixels = some_pixels(14, d=1)
    first, second = learning(pixels), learning(pixels)
    config = ObjectiveConfig(
        penalty=penalty, positive_threshold=1, negative_threshold=-1, regularizer="none"
    )
    terms = Objective(config)(first, second, [1])
    terms.total.backward()
    assert terms.total == 0
    assert not gradient(first).any()


def test_a_roll_without_any_negative_pair_counts_as_zero() -> None:
    """Image 1 is opposite to image 0, image 2 is not: the mean is over both rolls."""
    embeddings = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    crop = Pixels(embeddings, torch.ones(4, 1, 1))
    objective = Objective(ObjectiveConfig(penalty="linear"))
    assert objective(crop, crop, [1]).negative == 1
    assert objective(crop, crop, [2]).negative == 0
    assert objective(crop, crop, [1, 2]).negative == 0.5


def test_each_roll_weighs_the_same_however_many_pairs_it_selects() -> None:
    first, second = some_pixels(15, b=5), some_pixels(16, b=5)

    def negative(*rolls: int) -> Tensor:
        return Objective(ObjectiveConfig(negative_crops="second"))(first, second, rolls).negative

    def selected(roll: int) -> int:
        affinity = first.embeddings @ second.embeddings.roll(roll, dims=0).mT
        return int((affinity < 0.12).sum())

    assert selected(1) != selected(2)
    same(negative(1, 2), (negative(1) + negative(2)) / 2)


def test_rolls_of_the_negative_loss_are_rolls_of_the_batch() -> None:
    first, other = learning(some_pixels(15, b=5)), learning(some_pixels(16, b=5))
    negative_loss(first, other, threshold=0.1, rolls=[1, -2]).backward()
    again, other_again = learning(first), learning(other)
    losses = [
        negative_loss(
            again,
            Pixels(other.embeddings.roll(roll, 0), other_again.probs.roll(roll, 0)),
            threshold=0.1,
        )
        for roll in (1, -2)
    ]
    ((losses[0] + losses[1]) / 2).backward()
    same(gradient(first), gradient(again))
    same(gradient(other), gradient(other_again))


def test_negatives_of_an_image_are_never_its_own_pixels() -> None:
    """Every image has the same two embeddings at right angles, and a cluster of its own."""
    embeddings = torch.eye(2).expand(3, 2, 2)
    crop = Pixels(embeddings, torch.eye(3)[:, None].expand(3, 2, 3))
    objective = Objective(ObjectiveConfig(penalty="linear"))
    assert objective(crop, crop, [1, 2]).negative == 0
    assert negative_loss(crop, crop, threshold=0.12, penalty="linear") == 1


def test_roll_r_compares_image_i_with_image_i_minus_r() -> None:
    """Only the first crop of image 1 and the second crop of image 0 share a cluster."""
    first = Pixels(torch.ones(3, 1, 1), torch.eye(4)[[1, 0, 1]][:, None])
    second = Pixels(-torch.ones(3, 1, 1), torch.eye(4)[[0, 2, 3]][:, None])
    config = ObjectiveConfig(penalty="linear", negative_crops="second", negative_affinity="off")
    objective = Objective(config)
    assert objective(first, second, [1]).negative.item() == pytest.approx(1 / 3)
    assert objective(first, second, [2]).negative == 0


@pytest.mark.parametrize("roll", [0, 3, -3])
def test_a_roll_that_compares_an_image_with_itself_is_refused(roll: int) -> None:
    with pytest.raises(ValueError, match="own negative"):
        Objective(ObjectiveConfig())(some_pixels(0, b=3), some_pixels(1, b=3), [1, roll])


@pytest.mark.parametrize("name", ["positive_threshold", "negative_threshold"])
def test_a_threshold_without_number_is_refused(name: str) -> None:
    config = ObjectiveConfig(**{name: "auto"})
    with pytest.raises(ValueError, match="A threshold is 'auto'"):
        Objective(config)(some_pixels(0), some_pixels(1), [1])


# Terms that are off (Table 6).


@pytest.mark.parametrize("term", ["positive", "negative", "regularizer"])
def test_a_term_of_weight_zero_is_zero_and_not_computed(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("computed")

    if term == "regularizer":
        monkeypatch.setitem(REGULARIZERS, "entropy", computed)
    else:
        monkeypatch.setattr(f"iddc.losses.objective.{term}_loss", computed)
    first, second = some_pixels(17), some_pixels(18)
    on = ObjectiveConfig(regularizer="entropy")
    with pytest.raises(AssertionError, match="computed"):
        Objective(on)(first, second, [1])
    off = on.model_copy(update={f"{term}_weight": 0.0})
    terms = Objective(off)(first, second, [1])
    assert getattr(terms, term) == 0
    assert terms.total != 0


def test_without_the_positive_term_the_second_crop_is_not_touched() -> None:
    first, second = learning(some_pixels(19)), some_pixels(20)
    broken = Pixels(torch.full_like(second.embeddings, torch.nan), second.probs * torch.nan)
    config = ObjectiveConfig(positive_weight=0)
    terms = Objective(config)(first, broken, [1])
    terms.total.backward()
    assert terms.total == Objective(config)(first, second, [1]).total
    assert gradient(first).isfinite().all()


def test_without_any_pair_term_the_embeddings_are_not_touched() -> None:
    pixels = some_pixels(21)
    broken = replace(pixels, embeddings=torch.full_like(pixels.embeddings, torch.nan))
    config = ObjectiveConfig(positive_weight=0, negative_weight=0, centering="batch")
    terms = Objective(config)(broken, broken, [1])
    assert terms.positive == terms.negative == 0
    same(terms.total, 0.4 * terms.regularizer)


def test_an_objective_without_any_term_is_refused() -> None:
    off = {"positive_weight": 0.0, "negative_weight": 0.0}
    for rest in ({"regularizer_weight": 0.0}, {"regularizer": "none"}):
        with pytest.raises(ValidationError, match="every term of the objective is off"):
            ObjectiveConfig(**off, **rest)


# Gradients and precision.


@pytest.mark.parametrize("centering", ["none", "batch"])
def test_no_gradient_reaches_the_embeddings(centering: Any) -> None:
    first, second = learning(some_pixels(22)), learning(some_pixels(23))
    first.embeddings.requires_grad_()
    second.embeddings.requires_grad_()
    config = ObjectiveConfig(centering=centering, negative_crops="second")
    Objective(config)(first, second, [1]).total.backward()
    assert first.embeddings.grad is None
    assert second.embeddings.grad is None
    assert gradient(first).any()
    assert gradient(second).any()


@pytest.mark.parametrize("term", [positive_loss, negative_loss])
def test_probabilities_without_gradient_give_a_loss_without(term: Callable[..., Tensor]) -> None:
    first, second = some_pixels(22), some_pixels(23)
    first.embeddings.requires_grad_()
    assert not term(first, second, threshold=0.1).requires_grad


def test_value_is_the_same_without_gradients() -> None:
    first, second = learning(some_pixels(22)), learning(some_pixels(23))
    objective = Objective(ObjectiveConfig())
    total = objective(first, second, [1]).total
    with torch.no_grad():
        assert objective(first, second, [1]).total == total
    with torch.inference_mode():
        assert objective(some_pixels(22), some_pixels(23), [1]).total == total


def test_terms_can_be_back_propagated_one_by_one() -> None:
    first, second = learning(some_pixels(24)), learning(some_pixels(25))
    config = ObjectiveConfig(regularizer_weight=10.0)
    terms = Objective(config)(first, second, [1])
    weighted = terms.positive + 1.4 * terms.negative + 10 * terms.regularizer
    (apart,) = torch.autograd.grad(weighted, first.probs, retain_graph=True)
    (together,) = torch.autograd.grad(terms.total, first.probs)
    same(apart, together)


@pytest.mark.parametrize("same_cluster", [True, False])
def test_log_penalty_is_finite_for_certain_pixels(same_cluster: bool) -> None:
    """One-hot probabilities: the agreement is exactly 1 or exactly 0."""
    embeddings = torch.tensor([[[1.0, 0.0]]])
    certain = learning(Pixels(embeddings, torch.tensor([[[1.0, 0.0]]])))
    other = Pixels(embeddings, torch.tensor([[[1.0, 0.0] if same_cluster else [0.0, 1.0]]]))
    positive = positive_loss(certain, other, threshold=0.2, penalty="log")
    negative = negative_loss(certain, other, threshold=2.0, penalty="log", affinity_weights="off")
    (positive + negative).backward()
    ceiling = -log(1e-6)
    assert positive.item() == pytest.approx(0 if same_cluster else ceiling, abs=1e-6)
    assert negative.item() == pytest.approx(ceiling if same_cluster else 0, abs=1e-6)
    assert gradient(certain).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_half_precision_inputs_give_the_value_of_their_rounded_numbers(
    dtype: torch.dtype, penalty: Any, regularizer: Any
) -> None:
    first, second = similar_pixels(26, dtype), similar_pixels(27, dtype)
    config = selecting_every_pair(penalty, regularizer)
    terms = Objective(config)(first, second, [1])
    terms.total.backward()
    expected = oracles.equation_8(*numbers(first, second), [1], config)
    for name, value in expected._asdict().items():
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-2)
    assert gradient(first).isfinite().all()
    assert gradient(first).dtype == dtype


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_autocast_to_bf16_leaves_the_value(penalty: Any, regularizer: Any) -> None:
    first, second = similar_pixels(28, torch.float32), similar_pixels(29, torch.float32)
    config = selecting_every_pair(penalty, regularizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = Objective(config)(first, second, [1])
    terms.total.backward()
    expected = oracles.equation_8(*numbers(first, second), [1], config)
    for name, value in expected._asdict().items():
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-5)
    assert gradient(first).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_saturated_probabilities_give_finite_losses_and_gradients(
    dtype: torch.dtype, penalty: Any, regularizer: Any
) -> None:
    """A confident softmax is exactly one-hot in low precision, and leaves clusters empty."""
    pixels = some_pixels(30, b=3, n=5, k=6, dtype=dtype)
    certain = torch.eye(6, dtype=dtype)[torch.arange(15).reshape(3, 5) % 2]
    first, second = (learning(replace(pixels, probs=certain)) for _ in range(2))
    terms = Objective(selecting_every_pair(penalty, regularizer))(first, second, [1, 2])
    terms.total.backward()
    assert terms.total.isfinite()
    assert gradient(first).isfinite().all()
    assert gradient(second).isfinite().all()


def similar_pixels(seed: int, dtype: torch.dtype) -> Pixels:
    """Affinities above 0, so that rounding is not magnified where weights of both signs cancel."""
    pixels = learning(some_pixels(seed, n=5, dtype=dtype))
    return replace(pixels, embeddings=pixels.embeddings.abs())


def selecting_every_pair(penalty: Any, regularizer: Any) -> ObjectiveConfig:
    """Thresholds that rounding cannot cross."""
    return ObjectiveConfig(
        penalty=penalty, regularizer=regularizer, positive_threshold=-1, negative_threshold=1
    )


# Laws.

seeds = st.integers(0, 2**31)
counts = st.integers(1, 6)


@given(seeds, st.integers(2, 4), counts, st.sampled_from(list(PENALTIES)), st.data())
def test_the_order_of_pixels_does_not_matter(
    seed: int, b: int, n: int, penalty: Any, data: st.DataObject
) -> None:
    first, second = some_pixels(seed, b, n), some_pixels(seed + 1, b, n)
    order = data.draw(st.permutations(range(n)))
    shuffled = Pixels(second.embeddings[:, order], second.probs[:, order])
    config = ObjectiveConfig(
        penalty=penalty, negative_crops="second", regularizer_crops="both", centering="batch"
    )
    same(
        Objective(config)(first, shuffled, [1]).total,
        Objective(config)(first, second, [1]).total,
    )


@given(seeds, counts, counts, st.sampled_from(POSITIVE_FORMS), st.floats(-1, 1))
def test_positive_loss_is_symmetric_in_the_crops(
    seed: int, n: int, m: int, form: tuple[Any, bool], threshold: float
) -> None:
    first, second = some_pixels(seed, 2, n), some_pixels(seed + 1, 2, m)
    penalty, weighted = form

    def loss(one: Pixels, other: Pixels) -> Tensor:
        return positive_loss(
            one, other, threshold=threshold, penalty=penalty, affinity_weights=weighted
        )

    same(loss(first, second), loss(second, first))


@given(
    seeds,
    st.permutations(range(5)),
    st.sampled_from(list(PENALTIES)),
    st.sampled_from(list(REGULARIZERS)),
)
def test_the_names_of_clusters_do_not_matter(
    seed: int, order: list[int], penalty: Any, regularizer: Any
) -> None:
    first, second = some_pixels(seed, k=5), some_pixels(seed + 1, k=5)
    objective = Objective(ObjectiveConfig(penalty=penalty, regularizer=regularizer))
    terms = objective(first, second, [1])
    renamed = objective(
        replace(first, probs=first.probs[..., order]),
        replace(second, probs=second.probs[..., order]),
        [1],
    )
    for name in ("positive", "negative", "regularizer", "total"):
        same(getattr(renamed, name), getattr(terms, name))


@given(seeds, counts, st.floats(0, 1), st.booleans())
def test_positive_loss_has_its_bounds(seed: int, n: int, threshold: float, weighted: bool) -> None:
    first, second = some_pixels(seed, 2, n), some_pixels(seed + 1, 2, n)
    options: dict[str, Any] = {"threshold": threshold, "affinity_weights": weighted}
    assert 0 <= positive_loss(first, second, penalty="exp", **options) <= e + 1e-9
    assert 0 <= positive_loss(first, second, penalty="linear", **options) <= 1 + 1e-9


@given(seeds, counts, st.floats(-1, 1), st.sampled_from(NEGATIVE_AFFINITIES))
def test_negative_loss_has_its_bounds(seed: int, n: int, threshold: float, weights: Any) -> None:
    first, other = some_pixels(seed, 2, n), some_pixels(seed + 1, 2, n)
    heaviest = 2 if weights == "paper" else 1
    options: dict[str, Any] = {"threshold": threshold, "affinity_weights": weights}
    assert 0 <= negative_loss(first, other, penalty="exp", **options) <= heaviest * e + 1e-9
    assert 0 <= negative_loss(first, other, penalty="linear", **options) <= heaviest + 1e-9


def shares(k: int) -> st.SearchStrategy[list[float]]:
    """Frequencies of k clusters, some of them small."""
    sizes = st.lists(st.floats(1e-6, 1), min_size=k, max_size=k)
    return sizes.map(lambda values: [value / sum(values) for value in values])


@given(st.integers(2, 6).flatmap(shares))
def test_entropy_is_lowest_when_clusters_are_equal(p: list[float]) -> None:
    found = REGULARIZERS["entropy"](torch.tensor(p, dtype=torch.float64), ObjectiveConfig())
    assert -log(len(p)) - 1e-9 <= found <= 1e-9


@given(st.integers(2, 6).flatmap(shares), st.sampled_from(["weibull", "weibull-released"]))
def test_weibull_rises_when_the_smallest_cluster_dies(p: list[float], name: Any) -> None:
    """What it held goes to the largest, the cluster that any form punishes least."""
    config = ObjectiveConfig()
    alive = sorted(max(x, 1e-3) for x in p)
    dead = [0.0, *alive[1:-1], alive[-1] + alive[0]]
    before = REGULARIZERS[name](torch.tensor(alive, dtype=torch.float64), config)
    after = REGULARIZERS[name](torch.tensor(dead, dtype=torch.float64), config)
    assert before < after < float("inf")


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers_are_finite_with_finite_gradient_at_an_empty_cluster(name: Any) -> None:
    p = torch.tensor([0.0, 1.0], requires_grad=True)
    value = REGULARIZERS[name](p, ObjectiveConfig()) + 0 * p.sum()
    value.backward()
    assert p.grad is not None
    assert value.isfinite()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("name", ["weibull", "weibull-released"])
def test_weibull_pulls_an_empty_cluster_to_life(name: Any) -> None:
    p = torch.tensor([1e-3, 0.999], requires_grad=True)
    REGULARIZERS[name](p, ObjectiveConfig()).backward()
    assert p.grad is not None
    assert p.grad[0] < p.grad[1]
