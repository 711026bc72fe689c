"""Eqs. (1)-(8) of the paper as they read, with all pairs of pixels in memory.

Begin here to read the method. `terms.py` computes the same faster and in less memory; tests, `iddc
bench` and `iddc verify` compare it with these lines, with which it shares none.

Of a crop of each image, u are the embeddings of the pixels, of length 1, and v the probabilities of
their clusters. The ending `_plus` marks pixels that may look alike, in another crop of the same
image; `_minus` those that may look unlike, in another image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from iddc.config import ObjectiveConfig
from iddc.losses.objective import Terms
from iddc.losses.pairs import Pixels


def equation_1(
    u: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n k"],
    u_plus: Float[Tensor, "b m d"],
    v_plus: Float[Tensor, "b m k"],
    config: ObjectiveConfig,
) -> Float[Tensor, ""]:
    """L+: pixels that look alike agree. The mean over the N+ pairs above t+, or zero."""
    affinity = u @ u_plus.mT
    selected = affinity > float(config.positive_threshold)
    w_plus = affinity if config.positive_affinity else 1
    cost = selected * w_plus * h_plus(v @ v_plus.mT, config)
    return cost.sum() / selected.sum().clamp(min=1)


def equation_2(
    u: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n k"],
    u_minus: Float[Tensor, "b m d"],
    v_minus: Float[Tensor, "b m k"],
    config: ObjectiveConfig,
) -> Float[Tensor, ""]:
    """L-: pixels that look unlike differ. The mean over the N- pairs below t-, or zero."""
    affinity = u @ u_minus.mT
    selected = affinity < float(config.negative_threshold)
    cost = selected * w_minus(affinity, config) * h_minus(v @ v_minus.mT, config)
    return cost.sum() / selected.sum().clamp(min=1)


def w_minus(affinity: Float[Tensor, "..."], config: ObjectiveConfig) -> Float[Tensor, "..."]:
    """The weight of a selected pair in Eq. (2): as printed, as released, or none (Table 5)."""
    match config.negative_affinity:
        case "paper":
            return 1 - affinity
        case "released":
            return 1 - affinity.clamp(min=0)
        case "off":
            return torch.ones_like(affinity)


def h_plus(s: Float[Tensor, "..."], config: ObjectiveConfig) -> Float[Tensor, "..."]:
    """The cost of a pair that should agree and does by s = v . v': Eqs. (3), (4) and (5)."""
    match config.penalty:
        case "log":
            return -s.clamp(min=config.log_offset).log()
        case "linear":
            return 1 - s
        case "exp":
            return (1 - s).exp()


def h_minus(s: Float[Tensor, "..."], config: ObjectiveConfig) -> Float[Tensor, "..."]:
    """The cost of a pair that should differ and agrees by s: Eqs. (3), (4) and (5)."""
    match config.penalty:
        case "log":
            return -(1 - s).clamp(min=config.log_offset).log()
        case "linear":
            return s
        case "exp":
            return s.exp()


def equation_6(p: Float[Tensor, " k"], config: ObjectiveConfig) -> Float[Tensor, ""]:
    """Entropy: lowest where all clusters are equally frequent. The offset makes 0 log 0 zero."""
    return (p * p.clamp(min=config.log_offset).log()).sum()


def equation_7(p: Float[Tensor, " k"], config: ObjectiveConfig) -> Float[Tensor, ""]:
    """Weibull: steep at an empty cluster. The offset keeps it finite there."""
    k, p = config.weibull_shape, p + config.weibull_offset
    return (k * p ** (k - 1) * (-(p**k)).exp()).sum()


def equation_7_released(p: Float[Tensor, " k"], config: ObjectiveConfig) -> Float[Tensor, ""]:
    """Weibull as in the authors' release, relative to the largest cluster (decision 001)."""
    k, s = config.weibull_shape, config.weibull_scale
    x = p / p.max() + config.weibull_offset
    return (k / s * (x / s) ** (k - 1) * (-((x / s) ** k)).exp()).mean() / config.weibull_divisor


def equation_8(
    first: Pixels, second: Pixels, rolls: Sequence[int], config: ObjectiveConfig
) -> Terms:
    """L = L+ + lambda_1 L- + lambda_2 L_reg, and its terms.

    Args:
        first: Pixels of one crop of each image.
        second: Pixels of another, overlapping crop of the same images.
        rolls: Image i is compared with each image i - roll; L- is the mean over them.
        config: The weights, the thresholds, and what the paper leaves open.
    """
    (u, v), (u_plus, v_plus) = ((crop.embeddings, crop.probs) for crop in (first, second))
    if config.centering == "batch":
        mean = torch.stack([u, u_plus]).mean(dim=(0, 1, 2))
        u, u_plus = normalize(u - mean, dim=-1), normalize(u_plus - mean, dim=-1)
    u_minus, v_minus = (u, v) if config.negative_crops == "first" else (u_plus, v_plus)
    counted = v if config.regularizer_crops == "first" else torch.cat([v, v_plus])

    positive = equation_1(u, v, u_plus, v_plus, config)
    negative = torch.stack(
        [equation_2(u, v, u_minus.roll(roll, 0), v_minus.roll(roll, 0), config) for roll in rolls]
    ).mean()
    regularizer = _regularizer(counted.mean((0, 1)), config)
    total = (
        config.positive_weight * positive
        + config.negative_weight * negative
        + config.regularizer_weight * regularizer
    )
    return Terms(positive, negative, regularizer, total)


def _regularizer(p: Float[Tensor, " k"], config: ObjectiveConfig) -> Float[Tensor, ""]:
    """What keeps every cluster alive, from the mean p of v over the pixels."""
    match config.regularizer:
        case "none":
            return p.new_zeros(())
        case "entropy":
            return equation_6(p, config)
        case "weibull":
            return equation_7(p, config)
        case "weibull-released":
            return equation_7_released(p, config)
