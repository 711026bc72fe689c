"""What methods with codes share: how embeddings attract codes, and centroids that follow them.

From STEGO (Hamilton et al., *Unsupervised semantic segmentation by distilling feature
correspondences*, ICLR 2022), whose equations these are.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

SpatialCentering = Literal["none", "paper", "released"]
"""Affinities as they are; less their mean over the other image; and the mean of all added again."""


def attraction(
    features: Float[Tensor, "b n d"],
    others: Float[Tensor, "b m d"],
    shift: float,
    centering: SpatialCentering,
) -> Float[Tensor, "b n m"]:
    """F' - b: how much the features of each pair attract their codes; a target without gradient."""
    affinity = (normalize(features, dim=-1) @ normalize(others, dim=-1).mT).detach()
    found = affinity - shift
    if centering != "none":
        found = found - affinity.mean(dim=2, keepdim=True)
    return found + affinity.mean() if centering == "released" else found


def probe_loss(cosines: Float[Tensor, "b v k m"]) -> Float[Tensor, ""]:
    """Move each centroid towards the codes nearest to it: k-means by gradients."""
    return -cosines.amax(dim=2).mean()
