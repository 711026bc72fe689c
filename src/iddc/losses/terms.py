"""The two terms of pairs, Eqs. (1) and (2), fast and with exact gradients.

`reference.py` has them as they read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iddc.config import NegativeAffinity, Penalty
from iddc.losses.pairs import PairRule, PairSums, Pixels, sum_in_blocks


def positive_loss(
    first: Pixels,
    second: Pixels,
    *,
    threshold: float,
    penalty: Penalty = "exp",
    affinity_weights: bool = True,
    log_offset: float = 1e-6,
    centre: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, ""]:
    """Pull together the clusters of pixels that look alike, Eq. (1).

    A pair counts if its affinity exceeds `threshold`, and counts in proportion to it. The result is
    the mean over the pairs that count, and zero if there are none.

    Args:
        first: Pixels of one crop of each image.
        second: Pixels of another, overlapping crop of the same images.
        threshold: t+, a cosine in [-1, 1].
        penalty: h+.
        affinity_weights: w+ is the affinity; otherwise 1 for every pair that counts (Table 5).
        log_offset: The smallest agreement that the log penalty sees.
        centre: If given, affinities are cosines of the embeddings less this one.

    Returns:
        The loss, without unit. For "exp" and threshold >= 0 it lies in [0, e].
    """
    equation_1 = PairRule(
        positive=True,
        threshold=threshold,
        weights="affinity" if affinity_weights else "off",
        penalty=penalty,
        log_offset=log_offset,
    )
    return _pair_mean(first, second, equation_1, [0], centre)


def negative_loss(
    first: Pixels,
    other: Pixels,
    *,
    threshold: float,
    penalty: Penalty = "exp",
    affinity_weights: NegativeAffinity = "paper",
    log_offset: float = 1e-6,
    centre: Float[Tensor, " d"] | None = None,
    rolls: Sequence[int] = (0,),
) -> Float[Tensor, ""]:
    """Push apart the clusters of pixels of different images that look unlike, Eq. (2).

    A pair counts if its affinity is below `threshold`. The result is the mean over the pairs that
    count, and zero if there are none; with several rolls, the average of their means.

    Args:
        first: Pixels of one crop of each image.
        other: Pixels of a crop of as many images.
        threshold: t-, a cosine in [-1, 1].
        penalty: h-.
        affinity_weights: w-: 1 - u.u' (paper), 1 - max(u.u', 0) (released) or 1 (off, Table 5).
        log_offset: The smallest disagreement that the log penalty sees.
        centre: If given, affinities are cosines of the embeddings less this one.
        rolls: Image i of `first` is compared with images i - roll of `other`. At least one.

    Returns:
        The loss, without unit. For "exp" it lies in [0, 2e].
    """
    equation_2 = PairRule(
        positive=False,
        threshold=threshold,
        weights=affinity_weights,
        penalty=penalty,
        log_offset=log_offset,
    )
    return _pair_mean(first, other, equation_2, rolls, centre)


def _pair_mean(
    first: Pixels, other: Pixels, rule: PairRule, rolls: Sequence[int], centre: Tensor | None
) -> Float[Tensor, ""]:
    with torch.autocast(first.probs.device.type, enabled=False):
        mean: Tensor = _PairMean.apply(
            first.probs,
            other.probs,
            first.embeddings.detach(),
            other.embeddings.detach(),
            rule,
            rolls,
            centre,
        )
        return mean


class _PairMean(torch.autograd.Function):
    """Weighted costs over their number, averaged over rolls; the gradient is taken on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        probs: Tensor,
        other_probs: Tensor,
        embeddings: Tensor,
        other_embeddings: Tensor,
        rule: PairRule,
        rolls: Sequence[int],
        centre: Tensor | None,
    ) -> Tensor:
        first, other = Pixels(embeddings, probs), Pixels(other_embeddings, other_probs)
        sum_pairs = _fastest_sum(probs.device, probs.dtype, embeddings.dtype)
        needs_grad = any(ctx.needs_input_grad[:2])
        means: list[Tensor] = []
        gradients: list[Tensor] = []
        for roll in rolls:
            sums = sum_pairs(first, other, rule, roll=roll, centre=centre, needs_grad=needs_grad)
            count = sums.count.clamp(min=1)
            means.append(sums.cost / count)
            if sums.gradients is not None:
                new = [gradient.div_(count * len(rolls)) for gradient in sums.gradients]
                pairs = zip(gradients, new, strict=True)
                gradients = [a.add_(b) for a, b in pairs] if gradients else new
        ctx.save_for_backward(*gradients)
        ctx.dtypes = probs.dtype, other_probs.dtype
        return torch.stack(means).mean()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled before it is rounded, so that the loss scale of fp16 training takes effect.
        gradients = (
            (grad_output * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None, None


def _fastest_sum(device: torch.device, *dtypes: torch.dtype) -> Callable[..., PairSums]:
    """The fused kernel where it works, else blocks. Double precision is for blocks."""
    if device.type != "cuda" or torch.float64 in dtypes or fused_obstacle():
        return sum_in_blocks
    from iddc.losses.fused import sum_fused

    return sum_fused


@cache
def fused_obstacle() -> str:
    """Why the fused kernel cannot be used on this machine; empty if it can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    try:
        from iddc.losses.fused import try_out

        try_out()
    except Exception as error:  # no Triton, no C compiler, a GPU that Triton does not know, ...
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
