"""PiCIE+H: PiCIE, and beside it a second clustering of the same codes with more clusters.

Cho et al., *PiCIE: unsupervised semantic segmentation using invariance and equivariance in
clustering*, CVPR 2021. With PiCIE's loss (`picie`) of K clusters and of K2 clusters,

    L = l1 L_K + l2 L_K2,    l1 = log K2 / (log K + log K2),    l2 = log K / (log K + log K2)

The second clustering is dropped after training: the head has K clusters. The authors' code has no
such option, so this follows the paper; what `picie` leaves out is left out here too.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from iddc.config import Experiment, Frozen
from iddc.methods.method import Batch, Collection, Images, Rows
from iddc.methods.picie import Picie, PicieConfig, compared, picie_loss


class PicieHConfig(PicieConfig):
    """The numbers of PiCIE+H. Defaults: PiCIE's, and the paper's number of further clusters."""

    fine_clusters: int = Field(100, ge=2)
    """K2, the number of clusters of the second clustering."""


class PicieH(Picie):
    """Codes; the head's centroids are those of the last k-means with K clusters."""

    name = "picie-h"
    about = "PiCIE+H (Cho et al., 2021): PiCIE with a second, finer clustering."
    Config = PicieHConfig
    options: PicieHConfig
    fine_means: Float[Tensor, "2 f c"]
    """The means of the finer clusters."""
    fine_weights: Float[Tensor, "2 f"]
    """The share of each of them."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        fine = self.options.fine_clusters
        self.register_buffer("fine_means", torch.zeros(2, fine, self.means.shape[2]))
        self.register_buffer("fine_weights", torch.zeros(2, fine))

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Cluster the codes of a sample twice, and twice more into finer clusters."""
        found = super().refit(collection, epoch, epochs)
        self.fine_means, self.fine_weights, inertia = self._clustered(
            self.options.fine_clusters, epoch
        )
        return {**found, "fine_inertia": inertia}

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """What PiCIE has, of both numbers of clusters."""
        views, counted = self._views(maps, images)
        cosines, labels = compared(views, counted, self.means)
        fine_cosines, fine_labels = compared(views, counted, self.fine_means)
        return {
            **{"cosines": cosines, "labels": labels},
            **{"fine_cosines": fine_cosines, "fine_labels": fine_labels},
            "logits": cosines[:, 0, 0].mT[:, None].detach(),
        }

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """PiCIE's loss of both, weighted."""
        within, across = picie_loss(rows["cosines"], rows["labels"], self.weights)
        coarse = (within + across) / 2
        within, across = picie_loss(rows["fine_cosines"], rows["fine_labels"], self.fine_weights)
        fine = (within + across) / 2
        own, other = balance(self.means.shape[1], self.options.fine_clusters)
        return {"loss": own * coarse + other * fine, "coarse": coarse, "fine": fine}


def balance(num_clusters: int, fine_clusters: int) -> tuple[float, float]:
    """l1 and l2: the loss of more clusters is larger, so that each weighs by the other's log."""
    own, other = math.log(num_clusters), math.log(fine_clusters)
    return other / (own + other), own / (own + other)
