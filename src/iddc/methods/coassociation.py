"""Codes whose products are co-association: how often groupings of a consensus join two patches.

The code e(x) has the square roots of all groupings' probabilities, over sqrt(M). The product of two
codes is the mean over the M groupings of the Bhattacharyya coefficient of their classes, in [0, 1].
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from iddc.config import ConsensusConfig
from iddc.consensus import Consensus, Grouping, codes

CONSENSUS = ConsensusConfig()
"""The numbers of the consensus behind codes."""


class Coassociation(nn.Module):
    """The groupings of a consensus as buffers, so that a run goes on with those that it fitted."""

    mean: Float[Tensor, " d"]
    """The mean direction, which is subtracted before codes are taken."""
    centroids: Float[Tensor, "p d"]
    """The centroids of all groupings, one after the other; none before they are fitted."""
    classes: Int64[Tensor, " p"]
    """The class of each centroid in its grouping."""
    counts: Int64[Tensor, " m"]
    """How many centroids each grouping has."""

    def __init__(self, num_clusters: int) -> None:
        super().__init__()
        self.num_clusters = num_clusters
        self._kept: tuple[list[Tensor], list[Tensor]] = [], []
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("centroids", torch.zeros(0, 0))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def keep(self, mean: Float[Tensor, " d"], found: Consensus) -> None:
        """Take codes by the groupings of a consensus of embeddings about this mean."""
        device = self.mean.device
        self.mean = mean.to(device)
        self.centroids = torch.cat([one.centroids for one in found.groupings]).to(device)
        self.classes = torch.cat([one.classes for one in found.groupings]).to(device)
        self.counts = torch.tensor([len(one.classes) for one in found.groupings], device=device)

    def forward(self, views: list[Float[Tensor, "b m d"]]) -> list[Float[Tensor, "b m c"]]:
        """The codes of the patches of some views, from embeddings of length 1.

        The last ones are kept: several heads learn from a batch, one after the other.
        """
        asked, found = self._kept
        if len(asked) != len(views) or not all(map(torch.equal, asked, views)):
            found = [self._of(view) for view in views]
            self._kept = views, found
        return found

    def _of(self, directions: Float[Tensor, "b m d"]) -> Float[Tensor, "b m c"]:
        parts = (torch.split(each, self.counts.tolist()) for each in (self.centroids, self.classes))
        groupings = [
            Grouping(centroids, classes, self.num_clusters)
            for centroids, classes in zip(*parts, strict=True)
        ]
        centred = normalize(directions - self.mean, dim=-1)
        rows = codes(groupings, centred.flatten(0, 1), CONSENSUS.temperature)
        return rows.view(*centred.shape[:2], -1)
