"""Modified DeepCluster: clusters of the codes become labels, and a classifier learns them.

PiCIE's comparison (Cho et al., CVPR 2021), after DeepCluster (Caron et al., ECCV 2018). From time
to time k-means groups the codes n(z) of a sample, mu_k is the mean of each group and w_k its share
of all. Then, with labels y_i = argmin_k |n(z_i) - mu_k| and a classifier c that starts anew,

    L = sum_i w_{y_i} CE(c(n(z_i)), y_i) / sum_i w_{y_i}

so that large clusters weigh more. There a ResNet-18 with a feature pyramid learns from augmented
crops in 10 epochs and k-means comes before each; here a head learns from frozen embeddings, and
k-means comes ten times too, but never twice in an epoch. At the end k-means groups the codes once
more, those of the training images: the release may take the images that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import Experiment, Frozen
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.network import Codes
from iddc.views import draw_patches

CLASSIFIER_STD = 0.01
"""The deviation of a fresh classifier's weights."""


class MdcConfig(Frozen):
    """The numbers of MDC. Defaults: PiCIE's code for COCO-Stuff-27, steps ours."""

    clusterings: int = Field(10, ge=1)
    """How many times labels are made, at most once in an epoch."""
    vectors: int = Field(100_000, ge=2)
    """How many patches k-means sees."""
    dim: int = Field(128, ge=2)
    """The length of a code."""
    patches: int = Field(196, ge=2)
    """How many patches of a crop, drawn anew in each step, are classified; all of them there."""
    steps: int = Field(1000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(64, ge=2)
    """Images in a batch, over all processes; 128 there."""
    learning_rate: float = Field(1e-4, gt=0)
    """The learning rate (Adam)."""


class Mdc(Method):
    """Codes and a classifier of them; the head's centroids are those of the last k-means."""

    name = "mdc"
    about = "Modified DeepCluster (Cho et al., 2021): a classifier learns what k-means finds."
    Config = MdcConfig
    heads = ("codes",)
    head: Codes
    options: MdcConfig
    means: Float[Tensor, "k c"]
    """mu: the mean of each cluster's codes of length 1, itself shorter than 1."""
    weights: Float[Tensor, " k"]
    """w: the share of each cluster."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.head.centroids.requires_grad_(False)
        self.classifier = nn.Linear(self.options.dim, experiment.num_clusters)
        self.register_buffer("means", torch.zeros_like(self.head.centroids))
        self.register_buffer("weights", torch.zeros(experiment.num_clusters))
        self._sample: Tensor | None = None

    def refits(self, epochs: int) -> Sequence[int]:
        """Some epochs at equal distances, and the end."""
        return [*spaced(epochs, self.options.clusterings), epochs]

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Cluster the codes of a sample, and start a classifier of the clusters."""
        if self._sample is None:
            self._sample = collection.sample(self.options.vectors).float()
        codes = unit_codes(self.head, self._sample)
        seed = self.experiment.seed + epoch
        self.means, self.weights, inertia = clustered(codes, len(self.means), seed)
        if epoch == epochs:
            self.head.centroids.copy_(self.means)
        else:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(self.classifier.weight.shape, generator=generator)
            self.classifier.weight.data.copy_(CLASSIFIER_STD * start)
            self.classifier.bias.data.zero_()
        return {"inertia": inertia}

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """What the classifier says of some patches, and their labels."""
        first = maps[:, 0].flatten(2)
        here, _ = draw_patches(first.shape[2], self.options.patches, images.seed, images.step)
        codes = self.head.codes(first[:, :, here.to(first.device), None])[..., 0].mT
        codes = normalize(codes, dim=-1)
        return {
            "logits": self.classifier(codes).mT[:, None],
            "labels": nearest_means(codes.detach(), self.means),
        }

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The cross-entropy, weighted by the size of clusters."""
        logits = rows["logits"][:, 0].mT
        return {"loss": weighted_cross_entropy(logits, rows["labels"], self.weights)}

    def groups(self, progress: float) -> list[Group]:
        """The codes and the classifier."""
        return [
            Group(
                [*self.head.mappings(), *self.classifier.parameters()], self.options.learning_rate
            )
        ]


def spaced(epochs: int, count: int) -> list[int]:
    """At most `count` epochs at equal distances, the first of them 0."""
    return sorted({i * epochs // count for i in range(count)} - {epochs} | {0})


@torch.no_grad()
def unit_codes(head: Codes, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
    """The codes of embeddings, of length 1."""
    return normalize(head.codes(vectors.T[None, :, :, None])[0, :, :, 0].T, dim=1)


def clustered(
    codes: Float[Tensor, "n c"], num_clusters: int, seed: int
) -> tuple[Float[Tensor, "k c"], Float[Tensor, " k"], float]:
    """Group codes of length 1: the mean of each group, its share, and the mean distance to it.

    A group's mean is shorter than 1, the more so the less its codes are alike.
    """
    config = KMeansConfig(restarts=1)
    found = spherical_kmeans(codes, num_clusters, config, seed=seed)
    members = one_hot((codes @ found.centroids.T).argmax(dim=1), num_clusters).to(codes.dtype)
    sizes = members.sum(dim=0)
    means = members.T @ codes / sizes.clamp(min=1)[:, None]
    return means, sizes / len(codes), found.inertia


def nearest_means(codes: Float[Tensor, "*b c"], means: Float[Tensor, "k c"]) -> Int64[Tensor, "*b"]:
    """The mean nearest to each code of length 1, argmin |z - mu|."""
    return (2 * codes @ means.T - means.square().sum(dim=1)).argmax(dim=-1)


def weighted_cross_entropy(
    logits: Float[Tensor, "*b k"], labels: Int64[Tensor, "*b"], weights: Float[Tensor, " k"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy, in which each patch weighs as its label does; labels below 0 do not.

    Zero if no patch counts.
    """
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    counts = torch.where(wanted < 0, 0.0, weights.to(flat)[wanted.clamp(min=0)])
    costs = cross_entropy(flat, wanted.clamp(min=0), reduction="none")
    return (counts * costs).sum() / counts.sum().clamp(min=torch.finfo(flat.dtype).tiny)
