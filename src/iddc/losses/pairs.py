"""The pairs of pixels of a term: which count, and the sums over them, in blocks.

A block of affinities is made, used for the sum and for the gradient, and forgotten while it is in
the cache. Affinities are fp32 at least, whatever autocast says: bf16 would be faster, but it
rounds an affinity by up to 0.2 %, and pairs would cross the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iddc.config import Penalty
from iddc.losses.penalties import PENALTIES, SLOPES

BLOCK_PAIRS = {"cpu": 2**20, "cuda": 2**24}
"""Pairs in one block: what stays in the cache, or keeps a GPU busy. fp32 counts up to 2^24."""


@dataclass(frozen=True)
class Pixels:
    """The pixels of one crop of each image of a batch, on the feature grid."""

    embeddings: Float[Tensor, "b n d"]
    """u, of length 1."""
    probs: Float[Tensor, "b n k"]
    """v, which sums to 1 over the clusters."""


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """Which pairs count in a term, in which proportion, and what they cost."""

    positive: bool
    """Eq. (1): pairs above the threshold should agree. Otherwise Eq. (2): those below, differ."""
    threshold: float
    """t+ or t-, a cosine."""
    weights: Literal["affinity", "paper", "released", "off"]
    """u.u' of Eq. (1); 1 - u.u' and 1 - max(u.u', 0) of Eq. (2); 1."""
    penalty: Penalty
    log_offset: float


@dataclass(frozen=True)
class PairSums:
    """Sums over the pairs that count."""

    cost: Float[Tensor, ""]
    """The sum of the weighted penalties."""
    count: Int[Tensor, ""]
    gradients: tuple[Float[Tensor, "b n k"], Float[Tensor, "b m k"]] | None
    """Gradients of `cost` with respect to the probabilities of either side."""


def sum_in_blocks(
    first: Pixels,
    other: Pixels,
    rule: PairRule,
    *,
    roll: int = 0,
    centre: Float[Tensor, " d"] | None = None,
    needs_grad: bool = True,
) -> PairSums:
    """Sum over the pairs of pixels of each image i of `first` and image i - roll of `other`.

    Args:
        first: Pixels of one side.
        other: Pixels of the other side, of as many images.
        rule: Which pairs count, and what they cost.
        roll: Any integer.
        centre: If given, it is subtracted from all embeddings, which then get length 1 again.
        needs_grad: Whether to take the gradients.
    """
    images, pixels, clusters = first.probs.shape
    other_pixels = other.probs.shape[1]
    dtype = torch.promote_types(first.probs.dtype, first.embeddings.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    limit = BLOCK_PAIRS.get(first.probs.device.type, BLOCK_PAIRS["cpu"])
    image_step = max(1, limit // (pixels * other_pixels))
    row_step = math.ceil(pixels / math.ceil(pixels * other_pixels / limit))  # alike in size
    gradient = first.probs.new_zeros((images, pixels, clusters), dtype=dtype)
    other_gradient = first.probs.new_zeros((images, other_pixels, clusters), dtype=dtype)
    # Written again for every block: new memory would cost more than the arithmetic in it.
    workspace = gradient.new_empty(3, min(images, image_step) * row_step * other_pixels)
    costs, counts = [], []
    for block, partners in _image_blocks(images, roll, image_step):
        other_u = _directions(other.embeddings[partners], centre, dtype)
        other_v = other.probs[partners].to(dtype)
        for rows in (slice(i, i + row_step) for i in range(0, pixels, row_step)):
            u = _directions(first.embeddings[block, rows], centre, dtype)
            v = first.probs[block, rows].to(dtype)
            shape = (*u.shape[:2], other_pixels)
            affinity, selected, agreement = workspace[:, : math.prod(shape)].view(3, *shape)
            torch.bmm(u, other_u.mT, out=affinity)
            count, weights = _weigh(affinity, selected, rule)
            torch.bmm(v, other_v.mT, out=agreement)
            disagreement = torch.sub(1, agreement, out=agreement) if rule.positive else agreement
            penalty = PENALTIES[rule.penalty](disagreement, rule.log_offset)
            counts.append(count)
            costs.append(torch.dot(weights.flatten(), penalty.flatten()))
            if needs_grad:
                slope = SLOPES[rule.penalty](disagreement, penalty, rule.log_offset)
                pair_gradient = weights.mul_(slope)
                # Transposed: a product with few rows is faster than one with few columns.
                gradient[block, rows] = (other_v.mT @ pair_gradient.mT).mT
                other_gradient[partners] += (v.mT @ pair_gradient).mT
    if rule.positive:  # the disagreement falls as the agreement rises
        gradient.neg_()
        other_gradient.neg_()
    return PairSums(
        torch.stack(costs).sum(),
        torch.stack(counts).sum(dtype=torch.int64),
        (gradient, other_gradient) if needs_grad else None,
    )


def _image_blocks(images: int, roll: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Images i, and images i - roll modulo their number, neither with a wrap inside."""
    roll %= images
    for begin, end, shift in ((0, roll, images - roll), (roll, images, -roll)):
        for i in range(begin, end, step):
            stop = min(i + step, end)
            yield slice(i, stop), slice(i + shift, stop + shift)


def _directions(embeddings: Tensor, centre: Tensor | None, dtype: torch.dtype) -> Tensor:
    if centre is None:
        return embeddings.to(dtype)
    u = embeddings - centre.to(dtype)
    return u.div_(torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_(min=1e-12))


def _weigh(affinity: Tensor, selected: Tensor, rule: PairRule) -> tuple[Tensor, Tensor]:
    """How many pairs count, and the weights of all; writes into the affinities and `selected`."""
    # 1.0 or 0.0: booleans are slower to make, to count and to multiply by.
    compare = torch.gt if rule.positive else torch.lt
    compare(affinity, rule.threshold, out=selected)
    count = selected.sum()
    match rule.weights:
        case "affinity":
            return count, affinity.mul_(selected)
        case "paper":
            return count, torch.addcmul(selected, affinity, selected, value=-1, out=affinity)
        case "released":
            positive = affinity.clamp_(min=0)
            return count, torch.addcmul(selected, positive, selected, value=-1, out=affinity)
        case "off":
            return count, selected
