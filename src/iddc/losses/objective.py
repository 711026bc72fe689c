"""The whole objective, Eq. (8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iddc.config import ObjectiveConfig
from iddc.losses.pairs import Pixels
from iddc.losses.regularizers import REGULARIZERS, cluster_frequencies
from iddc.losses.terms import negative_loss, positive_loss


@dataclass(frozen=True)
class Terms:
    """The unweighted terms of Eq. (8) and their weighted sum. A term of weight 0 is zero."""

    positive: Float[Tensor, ""]
    negative: Float[Tensor, ""]
    regularizer: Float[Tensor, ""]
    total: Float[Tensor, ""]


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
        # What both terms of pairs have in common. Sums are in single precision at least.
        config = self.config
        zero = first.probs.new_zeros(
            (), dtype=torch.promote_types(first.probs.dtype, torch.float32)
        )
        positive = negative = regularizer = zero
        common: dict[str, Any] = {"penalty": config.penalty, "log_offset": config.log_offset}
        if config.centering == "batch":
            common["centre"] = _mean_embedding(first, second)
        # Terms of weight 0 are not computed: Eq. (1), Eq. (2), and Eq. (6) or (7).
        if config.positive_weight:
            positive = positive_loss(
                first,
                second,
                threshold=_cosine(config.positive_threshold),
                affinity_weights=config.positive_affinity,
                **common,
            )
        if config.negative_weight and rolls:
            if any(roll % len(first.probs) == 0 for roll in rolls):
                raise ValueError(
                    f"rolls {list(rolls)} make an image of {len(first.probs)} its own negative"
                )
            negative = negative_loss(
                first,
                first if config.negative_crops == "first" else second,
                threshold=_cosine(config.negative_threshold),
                affinity_weights=config.negative_affinity,
                rolls=rolls,
                **common,
            )
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


def _cosine(threshold: float | str) -> float:
    if isinstance(threshold, str):
        raise ValueError(f"A threshold is {threshold!r}. resolve_thresholds gives it a number.")
    return threshold


def _mean_embedding(first: Pixels, second: Pixels) -> Float[Tensor, " d"]:
    """The mean over both crops of the batch (decision 002)."""
    u, other_u = first.embeddings.detach(), second.embeddings.detach()
    dtype = torch.promote_types(u.dtype, torch.float32)
    return (u.mean((0, 1), dtype=dtype) + other_u.mean((0, 1), dtype=dtype)) / 2
