"""The objective of IDDC: Eqs. (1)-(8) of the paper.

Two crops of every image give pixels with embeddings u and cluster probabilities v. The positive
term pulls the probabilities of look-alike pixels of one image together, the negative term pushes
those of unlike pixels of different images apart, the regulariser keeps every cluster alive.

What is unusual here: a term is a mean over pairs of pixels, of which a batch at stride 8 has 40
million. They are visited in blocks of a few images. A block's sum and its gradient are taken in
one pass while its affinities are in the cache, so no more than a block of them, or those of one
image, is ever stored, and the gradient is exact. Affinities are targets and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iddc.config import NegativeAffinity, ObjectiveConfig, Penalty, Regularizer

BLOCK_PAIRS = {"cpu": 2**20, "cuda": 2**26}
"""Pairs of pixels in one block: what the cache of a CPU core holds, or what keeps a GPU busy."""


@dataclass(frozen=True)
class Pixels:
    """The pixels of one crop of each image of a batch, on the feature grid."""

    embeddings: Float[Tensor, "b n d"]
    """u, of length 1."""
    probs: Float[Tensor, "b n k"]
    """v, which sums to 1 over the clusters."""


@dataclass(frozen=True)
class Terms:
    """The unweighted terms of Eq. (8) and their weighted sum. A term of weight 0 is zero."""

    positive: Float[Tensor, ""]
    negative: Float[Tensor, ""]
    regularizer: Float[Tensor, ""]
    total: Float[Tensor, ""]


# Eqs. (3)-(5). As h-(s) = h+(1 - s), one function of the disagreement serves both terms: 1 - v.v'
# for pairs that should agree, v.v' for pairs that should not.


def log_penalty(disagreement: Float[Tensor, "..."], offset: float) -> Float[Tensor, "..."]:
    """-log(1 - disagreement), Eq. (3). Agreement below `offset` counts as `offset`."""
    return -torch.log((1 - disagreement).clamp(min=offset))


def linear_penalty(disagreement: Float[Tensor, "..."], _offset: float) -> Float[Tensor, "..."]:
    """The disagreement itself, Eq. (4)."""
    return disagreement


def exp_penalty(disagreement: Float[Tensor, "..."], _offset: float) -> Float[Tensor, "..."]:
    """exp(disagreement), Eq. (5): finite like the linear penalty, steeper where it is large."""
    return torch.exp(disagreement)


PENALTIES: dict[Penalty, Callable[[Tensor, float], Tensor]] = {
    "log": log_penalty,
    "linear": linear_penalty,
    "exp": exp_penalty,
}


def positive_loss(
    first: Pixels,
    second: Pixels,
    *,
    threshold: float,
    penalty: Penalty = "exp",
    affinity_weights: bool = True,
    log_offset: float = 1e-6,
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

    Returns:
        The loss, without unit. For "exp" and threshold >= 0 it lies in [0, e].
    """

    def select(affinity: Tensor) -> tuple[Tensor, Tensor]:
        selected = affinity > threshold
        return selected, affinity * selected if affinity_weights else selected.to(affinity)

    def cost(agreement: Tensor) -> Tensor:
        return PENALTIES[penalty](1 - agreement, log_offset)

    return _mean_over_pairs(first, second, select, cost)


def negative_loss(
    first: Pixels,
    other: Pixels,
    *,
    threshold: float,
    penalty: Penalty = "exp",
    affinity_weights: NegativeAffinity = "paper",
    log_offset: float = 1e-6,
) -> Float[Tensor, ""]:
    """Push apart the clusters of pixels of different images that look unlike, Eq. (2).

    A pair counts if its affinity is below `threshold`. The result is the mean over the pairs that
    count, and zero if there are none.

    Args:
        first: Pixels of one crop of each image.
        other: Pixels of a crop of another image, for each image of `first`.
        threshold: t-, a cosine in [-1, 1].
        penalty: h-.
        affinity_weights: w-: 1 - u.u' (paper), 1 - max(u.u', 0) (released) or 1 (off, Table 5).
        log_offset: The smallest disagreement that the log penalty sees.

    Returns:
        The loss, without unit. For "exp" it lies in [0, 2e].
    """

    def select(affinity: Tensor) -> tuple[Tensor, Tensor]:
        selected = affinity < threshold
        match affinity_weights:
            case "paper":
                return selected, (1 - affinity) * selected
            case "released":
                return selected, (1 - affinity.clamp(min=0)) * selected
            case "off":
                return selected, selected.to(affinity)

    def cost(agreement: Tensor) -> Tensor:
        return PENALTIES[penalty](agreement, log_offset)

    return _mean_over_pairs(first, other, select, cost)


Select = Callable[[Tensor], tuple[Bool[Tensor, "b n m"], Float[Tensor, "b n m"]]]
"""Affinities -> the pairs that count, and their weights (zero for all others)."""


def _mean_over_pairs(
    first: Pixels, second: Pixels, select: Select, cost: Callable[[Tensor], Tensor]
) -> Float[Tensor, ""]:
    """The weighted costs of the selected pairs over their number, for Eqs. (1) and (2)."""
    with torch.autocast(first.probs.device.type, enabled=False):
        mean: Tensor = _PairMean.apply(
            first.probs,
            second.probs,
            first.embeddings.detach(),
            second.embeddings.detach(),
            select,
            cost,
        )
        return mean


class _PairMean(torch.autograd.Function):
    """A mean over pairs in blocks. Its gradient is taken on the way forward, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        probs: Tensor,
        other_probs: Tensor,
        embeddings: Tensor,
        other_embeddings: Tensor,
        select: Select,
        cost: Callable[[Tensor], Tensor],
    ) -> Tensor:
        images, pixels = probs.shape[:2]
        limit = BLOCK_PAIRS.get(probs.device.type, BLOCK_PAIRS["cpu"])
        step = max(1, limit // (pixels * other_probs.shape[1]))
        needs_grad = any(ctx.needs_input_grad[:2])
        sums, counts, grads, other_grads = [], [], [], []
        for block in (slice(i, i + step) for i in range(0, images, step)):
            # Sums in bf16 lose the small costs, so everything is at least fp32 from here on.
            affinity = _at_least_fp32(embeddings[block] @ other_embeddings[block].mT)
            selected, weights = select(affinity)
            v = _at_least_fp32(probs[block].detach()).requires_grad_(needs_grad)
            w = _at_least_fp32(other_probs[block].detach()).requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                total = (weights.to(v.dtype) * cost(v @ w.mT)).sum()
            if needs_grad:
                grad, other_grad = torch.autograd.grad(total, (v, w))
                grads.append(grad)
                other_grads.append(other_grad)
            sums.append(total.detach())
            counts.append(selected.sum())
        count = torch.stack(counts).sum().clamp(min=1)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads) / count, torch.cat(other_grads) / count)
            ctx.dtypes = probs.dtype, other_probs.dtype
        return torch.stack(sums).sum() / count

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled before it is rounded, so that the loss scale of fp16 training takes effect.
        grads = (
            (grad_output * grad).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Eqs. (6) and (7), on the frequencies p_c of the clusters.


def cluster_frequencies(probs: Float[Tensor, "b n k"]) -> Float[Tensor, " k"]:
    """p_c of Eq. (6): the mean probability of each cluster over all pixels of the batch."""
    return _at_least_fp32(probs).mean(dim=(0, 1))


def no_regularizer(frequencies: Float[Tensor, " k"], _config: ObjectiveConfig) -> Float[Tensor, ""]:
    """Zero (Table 6)."""
    return frequencies.new_zeros(())


def entropy_regularizer(
    frequencies: Float[Tensor, " k"], config: ObjectiveConfig
) -> Float[Tensor, ""]:
    """sum of p log p, Eq. (6): lowest, at -log K, when all clusters are equally frequent."""
    return (frequencies * frequencies.clamp(min=config.log_offset).log()).sum()


def weibull_regularizer(
    frequencies: Float[Tensor, " k"], config: ObjectiveConfig
) -> Float[Tensor, ""]:
    """sum of k p^(k-1) exp(-p^k), Eq. (7) as printed: steep at an empty cluster, flat elsewhere."""
    p, k = frequencies + config.weibull_offset, config.weibull_shape
    return (k * p ** (k - 1) * torch.exp(-(p**k))).sum()


def released_weibull_regularizer(
    frequencies: Float[Tensor, " k"], config: ObjectiveConfig
) -> Float[Tensor, ""]:
    """Eq. (7) as in the authors' release, which the published lambda_2 belong to (decision 001).

    The Weibull density of p relative to the largest p, averaged over clusters and divided by 50.
    """
    k, scale = config.weibull_shape, config.weibull_scale
    x = (frequencies / frequencies.max() + config.weibull_offset) / scale
    return (k / scale * x ** (k - 1) * torch.exp(-(x**k))).mean() / config.weibull_divisor


REGULARIZERS: dict[Regularizer, Callable[[Tensor, ObjectiveConfig], Tensor]] = {
    "none": no_regularizer,
    "entropy": entropy_regularizer,
    "weibull": weibull_regularizer,
    "weibull-released": released_weibull_regularizer,
}


class Objective:
    """L = L+ + lambda_1 L- + lambda_2 L_reg, Eq. (8)."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(self, first: Pixels, second: Pixels, rolls: Sequence[int]) -> Terms:
        """Evaluate every term whose weight is not zero.

        Args:
            first: Pixels of one crop of each image.
            second: Pixels of another, overlapping crop of the same images.
            rolls: Image i is compared with images i - roll. The negative term is the average over
                the rolls, and zero without any. No roll may be a multiple of the batch size, or an
                image would be its own negative.

        Returns:
            The terms; `total` is the loss.
        """
        config = self.config
        if config.centering == "batch":
            first, second = _centered(first, second)
        zero = first.probs.new_zeros(
            (), dtype=torch.promote_types(first.probs.dtype, torch.float32)
        )
        positive = negative = regularizer = zero
        if config.positive_weight:
            positive = positive_loss(
                first,
                second,
                threshold=config.positive_threshold,
                penalty=config.penalty,
                affinity_weights=config.positive_affinity,
                log_offset=config.log_offset,
            )
        if config.negative_weight and rolls:
            if any(roll % len(first.probs) == 0 for roll in rolls):
                raise ValueError(
                    f"rolls {list(rolls)} make an image of {len(first.probs)} its own negative"
                )
            others = first if config.negative_crops == "first" else second
            negative = torch.stack(
                [
                    negative_loss(
                        first,
                        Pixels(others.embeddings.roll(roll, 0), others.probs.roll(roll, 0)),
                        threshold=config.negative_threshold,
                        penalty=config.penalty,
                        affinity_weights=config.negative_affinity,
                        log_offset=config.log_offset,
                    )
                    for roll in rolls
                ]
            ).mean()
        if config.regularizer_weight and config.regularizer != "none":
            both = config.regularizer_crops == "both"
            probs = torch.cat([first.probs, second.probs]) if both else first.probs
            regularizer = REGULARIZERS[config.regularizer](cluster_frequencies(probs), config)
        total = (
            config.positive_weight * positive
            + config.negative_weight * negative
            + config.regularizer_weight * regularizer
        )
        return Terms(positive, negative, regularizer, total)


def _centered(first: Pixels, second: Pixels) -> tuple[Pixels, Pixels]:
    """The same pixels, their embeddings less the mean over both crops, again of length 1."""
    embeddings = _at_least_fp32(torch.stack([first.embeddings, second.embeddings]).detach())
    deviations = embeddings - embeddings.mean(dim=(0, 1, 2))
    u, u_second = torch.nn.functional.normalize(deviations, dim=-1)
    return Pixels(u, first.probs), Pixels(u_second, second.probs)
