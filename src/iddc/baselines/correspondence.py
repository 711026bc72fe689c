"""The losses of STEGO: short codes that keep the likeness of embeddings, and centroids of them.

Hamilton et al., *Unsupervised semantic segmentation by distilling feature correspondences*, ICLR
2022; equations of this module are theirs. Codes of two images attract each other where the
embeddings are alike and repel each other elsewhere. Centroids follow the codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from iddc.config import SpatialCentering

_ROWS = 1024
"""Images compared with all others at once."""


@dataclass(frozen=True)
class Patches:
    """Some patches of each image of a batch."""

    features: Float[Tensor, "b n d"]
    """The backbone's features, of any length; a target without gradient."""
    codes: Float[Tensor, "b n c"]
    """The codes, of any length."""

    @classmethod
    def of(cls, features: Float[Tensor, "b d h w"], codes: Float[Tensor, "b c h w"]) -> Patches:
        """All patches of the images."""
        return cls(features.flatten(2).mT, codes.flatten(2).mT)

    def halves(self) -> tuple[Patches, Patches]:
        """Those of the first half of the images, and of the second."""
        pairs = zip(self.features.chunk(2), self.codes.chunk(2), strict=True)
        first, second = (Patches(features, codes) for features, codes in pairs)
        return first, second

    def at(self, places: Int64[Tensor, " m"]) -> Patches:
        """Some of these patches."""
        return Patches(self.features[:, places], self.codes[:, places])

    def roll(self, images: int) -> Patches:
        """Those of another image of the batch for each."""
        return Patches(self.features.roll(images, 0), self.codes.roll(images, 0))


def correspondence_loss(
    first: Patches, second: Patches, *, shift: float, centering: SpatialCentering
) -> Float[Tensor, ""]:
    """Attract codes whose features are more alike than the shift, repel the others, Eq. (4).

    With the cosines F of features and S of codes, over the pairs of a patch of the first image and
    one of the second,

        L = -mean((F' - b) max(S, 0)),    F' = F - the mean of F over the second image    (Eq. 3)

    Codes that are orthogonal are pushed no further. The paper has a sum in place of the mean.

    Args:
        first: Patches of each image.
        second: Patches of the image that each is compared with.
        shift: b, a cosine.
        centering: paper: Eq. (3); released: the mean F of the batch is added to it, so that the
            shift is compared with cosines as they are; none: F' = F.
    """
    affinity = normalize(first.features, dim=-1) @ normalize(second.features, dim=-1).mT
    likeness = normalize(first.codes, dim=-1) @ normalize(second.codes, dim=-1).mT
    attraction = affinity.detach() - shift
    if centering != "none":
        attraction = attraction - affinity.mean(dim=2, keepdim=True).detach()
    if centering == "released":
        attraction = attraction + affinity.mean().detach()
    return -(attraction * likeness.relu()).mean()


def probe_loss(cosines: Float[Tensor, "b k h w"]) -> Float[Tensor, ""]:
    """Move each centroid towards the codes nearest to it: k-means by gradients."""
    return -cosines.amax(dim=1).mean()


def nearest(vectors: Float[Tensor, "n d"], count: int) -> Int64[Tensor, "n k"]:
    """For each vector, which others have the highest cosine with it, the nearest first."""
    vectors = normalize(vectors, dim=1)
    found = []
    for start in range(0, len(vectors), _ROWS):
        cosines = vectors[start : start + _ROWS] @ vectors.T
        cosines.diagonal(start).fill_(-math.inf)
        found.append(cosines.topk(min(count, len(vectors) - 1)).indices.cpu())
    return torch.cat(found)
