"""What keeps every cluster alive, Eqs. (6) and (7), on the frequencies p_c of the clusters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from iddc.config import ObjectiveConfig, Regularizer


def cluster_frequencies(probs: Float[Tensor, "b n k"]) -> Float[Tensor, " k"]:
    """p_c of Eq. (6): the mean probability of each cluster over all pixels of the batch."""
    return probs.mean(dim=(0, 1), dtype=torch.promote_types(probs.dtype, torch.float32))


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
