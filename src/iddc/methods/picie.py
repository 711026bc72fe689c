"""PiCIE: clusters of two views of an image teach each other.

Cho et al., *PiCIE: unsupervised semantic segmentation using invariance and equivariance in
clustering*, CVPR 2021. As in Modified DeepCluster (`mdc`) k-means labels the codes from time to
time, here of both views apart, and the means of its clusters are the classifier. With C the
cross-entropy of logits mu_k . n(z), weighted by the size of clusters,

    within = (C(z1, mu1, y1) + C(z2, mu2, y2)) / 2
    across = (C(z1, mu2, y2) + C(z2, mu1, y1)) / 2,    L = (within + across) / 2

The codes of the second view are read at the first one's patches, which makes them follow geometry.
There the second view is the whole image, whose features are cropped, and colours differ; here the
views are IDDC's two crops, a head learns from frozen embeddings, and the two clusterings are of the
same sample with other starts. `picie-h` adds a second clustering with more clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from iddc.config import Experiment, Frozen
from iddc.methods.alignment import aligned
from iddc.methods.mdc import (
    MdcConfig,
    clustered,
    nearest_means,
    spaced,
    unit_codes,
    weighted_cross_entropy,
)
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.network import Codes
from iddc.views import draw_patches


class PicieConfig(MdcConfig):
    """The numbers of PiCIE. Defaults: the authors' code for COCO-Stuff-27, steps ours."""


class Picie(Method):
    """Codes; the head's centroids are those of the last k-means."""

    name = "picie"
    about = "PiCIE (Cho et al., 2021): clusters of two views that teach each other."
    Config = PicieConfig
    heads = ("codes",)
    head: Codes
    options: PicieConfig
    means: Float[Tensor, "2 k c"]
    """mu1 and mu2: the mean of each cluster's codes of length 1."""
    weights: Float[Tensor, "2 k"]
    """The share of each cluster in both clusterings."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.head.centroids.requires_grad_(False)
        self.register_buffer("means", torch.zeros(2, *self.head.centroids.shape))
        self.register_buffer("weights", torch.zeros(2, experiment.num_clusters))
        self._sample: Tensor | None = None

    def refits(self, epochs: int) -> Sequence[int]:
        """Some epochs at equal distances, and the end."""
        return [*spaced(epochs, self.options.clusterings), epochs]

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Cluster the codes of a sample twice."""
        if self._sample is None:
            self._sample = collection.sample(self.options.vectors).float()
        self.means, self.weights, inertia = self._clustered(self.means.shape[1], epoch)
        if epoch == epochs:
            self.head.centroids.copy_(self.means[0])
        return {"inertia": inertia}

    def _clustered(
        self, num_clusters: int, epoch: int
    ) -> tuple[Float[Tensor, "2 k c"], Float[Tensor, "2 k"], float]:
        """The means and shares of two clusterings of the sample, and the inertia of the first."""
        assert self._sample is not None
        codes = unit_codes(self.head, self._sample)
        seeds = [self.experiment.seed + 2 * epoch + view for view in range(2)]
        found = [clustered(codes, num_clusters, seed) for seed in seeds]
        means, weights, inertias = zip(*found, strict=True)
        return torch.stack(means), torch.stack(weights), inertias[0]

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The cosines of both views' codes to both sets of means, and both labels, at patches."""
        views, counted = self._views(maps, images)
        cosines, labels = compared(views, counted, self.means)
        logits = cosines[:, 0, 0].mT[:, None].detach()
        return {"cosines": cosines, "labels": labels, "logits": logits}

    def _views(
        self, maps: Float[Tensor, "b 2 d h w"], images: Images
    ) -> tuple[Float[Tensor, "b 2 n c"], Bool[Tensor, "b n"]]:
        """The codes of both views at some patches of the first; which of them both views show."""
        codes = normalize(self.head.codes(maps.flatten(0, 1)), dim=1)
        codes = codes.view(len(maps), 2, *codes.shape[1:])
        other, inside = aligned(codes[:, 1], images.boxes)
        pair = [codes[:, 0].flatten(2).mT, normalize(other, dim=1).flatten(2).mT]
        number = pair[0].shape[1]
        here, _ = draw_patches(number, self.options.patches, images.seed, images.step)
        here = here.to(maps.device)
        return torch.stack(pair, dim=1)[:, :, here], inside.flatten(1)[:, here]

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The four cross-entropies."""
        within, across = picie_loss(rows["cosines"], rows["labels"], self.weights)
        return {"loss": (within + across) / 2, "within": within, "across": across}

    def groups(self, progress: float) -> list[Group]:
        """The codes."""
        return [Group(self.head.mappings(), self.options.learning_rate)]


def compared(
    views: Float[Tensor, "b 2 n c"], counted: Bool[Tensor, "b n"], means: Float[Tensor, "2 k c"]
) -> tuple[Float[Tensor, "b 2 2 n k"], Int64[Tensor, "b 2 n"]]:
    """What two clusterings say of two views: the cosines, and each view's own labels.

    Args:
        views: Codes of length 1.
        counted: Which patches both views show; the label of the others is -1.
        means: The means of the clusters of both clusterings.
    """
    cosines = views[:, :, None] @ means.mT.to(views)  # image, view, clustering
    labels = [nearest_means(views[:, v].detach(), means[v]) for v in (0, 1)]
    return cosines, torch.stack(labels, dim=1).masked_fill(~counted[:, None], -1)


def picie_loss(
    cosines: Float[Tensor, "b 2 2 n k"], labels: Tensor, weights: Float[Tensor, "2 k"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The terms within views and across them.

    Args:
        cosines: mu_k . n(z) of each image, view and clustering.
        labels: The labels of each image and view, "b 2 n", from the clustering of that view; below
            0 where the views do not overlap.
        weights: The share of each cluster of both clusterings.
    """

    def cost(view: int, clustering: int) -> Float[Tensor, ""]:
        logits = cosines[:, view, clustering]
        return weighted_cross_entropy(logits, labels[:, clustering], weights[clustering])

    return (cost(0, 0) + cost(1, 1)) / 2, (cost(0, 1) + cost(1, 0)) / 2
