"""What a pair of pixels costs, Eqs. (3)-(5), and how the cost grows.

As h-(s) = h+(1 - s), one function of the disagreement serves both terms: 1 - v.v' for pairs that
should agree, v.v' for pairs that should not. Its derivative stands beside it: autograd would make
more passes over millions of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from iddc.config import Penalty

_LOG2_E = 1 / math.log(2)


def log_penalty(disagreement: Float[Tensor, "..."], offset: float) -> Float[Tensor, "..."]:
    """-log(1 - disagreement), Eq. (3). Agreement below `offset` counts as `offset`."""
    return -torch.log((1 - disagreement).clamp(min=offset))


def linear_penalty(disagreement: Float[Tensor, "..."], _offset: float) -> Float[Tensor, "..."]:
    """The disagreement itself, Eq. (4)."""
    return disagreement


def exp_penalty(disagreement: Float[Tensor, "..."], _offset: float) -> Float[Tensor, "..."]:
    """exp(disagreement), Eq. (5): finite like the linear penalty, steeper where it is large."""
    return (disagreement * _LOG2_E).exp2_()  # faster than exp on CPUs


PENALTIES: dict[Penalty, Callable[[Tensor, float], Tensor]] = {
    "log": log_penalty,
    "linear": linear_penalty,
    "exp": exp_penalty,
}


def _log_slope(disagreement: Tensor, _cost: Tensor, offset: float) -> Tensor:
    agreement = 1 - disagreement
    return torch.where(agreement < offset, 0, 1 / agreement)


def _linear_slope(disagreement: Tensor, _cost: Tensor, _offset: float) -> Tensor:
    return disagreement.new_ones(())


def _exp_slope(_disagreement: Tensor, cost: Tensor, _offset: float) -> Tensor:
    return cost


SLOPES: dict[Penalty, Callable[[Tensor, Tensor, float], Tensor]] = {
    "log": _log_slope,
    "linear": _linear_slope,
    "exp": _exp_slope,
}
"""The derivative of each penalty, from the disagreement, the penalty itself and the offset."""
