"""ACSeg: an image's own concepts, found by modularity, and k-means of the regions they cut.

Li et al., *ACSeg: adaptive conceptualization for unsupervised semantic segmentation*, CVPR 2023.
Learned prototypes become the concepts c_1..c_k of an image by attention to its embeddings u
(`decoders.Concepts`). With A_ij = max(cos(u_i, u_j), 0), the pair of a patch and itself included,
d_i = sum_j A_ij, 2m = sum_i d_i and S_ik = max(cos(u_i, c_k), 0):

    L = -1/(2m) sum_ij (A_ij - d_i d_j / 2m) max_k S_ik S_jk

averaged over images. At the end spherical k-means groups the mean embeddings of the regions of all
images, a region being the patches nearest to one concept; with fewer regions than clusters, it
groups patches. The loss never compares images: what a
class is follows from this k-means alone.

The authors' code is not public: this follows the paper as others describe it. Left out: the split
into foreground and background by the attention of class tokens, which is for VOC.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import Frozen
from iddc.decoders import Concepts
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.methods.modularity import edges_above_chance
from iddc.views import draw_patches


class AcsegConfig(Frozen):
    """The numbers of ACSeg. Defaults: the paper's where they are known."""

    concepts: int = Field(5, ge=2)
    """k, the most regions of an image."""
    blocks: int = Field(6, ge=1)
    """The number of blocks that turn prototypes into concepts."""
    hidden: int = Field(1024, ge=2)
    """The width of a block's inner layer."""
    patches: int = Field(196, ge=2)
    """How many patches of a crop, drawn anew in each step, are compared; all of them there."""
    steps: int = Field(2500, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(1e-4, gt=0)
    """The learning rate of prototypes and blocks (AdamW)."""
    weight_decay: float = Field(0.01, ge=0)
    """The weight decay of prototypes and blocks."""


class Acseg(Method):
    """The generator of concepts; the head's centroids are those of the regions at the end."""

    name = "acseg"
    about = "ACSeg (Li et al., 2023): concepts of each image, and k-means of their regions."
    Config = AcsegConfig
    heads = ("concepts",)
    head: Concepts
    options: AcsegConfig

    @classmethod
    def head_options(cls, options: Frozen) -> dict[str, int]:
        """The sizes of the generator."""
        return options.model_dump(include={"concepts", "blocks", "hidden"})

    @torch.no_grad()
    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Cluster the regions of all images, after the last step."""
        if epoch < epochs:
            return {}
        collection.note("clustering the regions of all images")
        seed, clusters = self.experiment.seed, self.experiment.num_clusters
        found = [self.head.centroids[:0]]
        for _, maps in collection.maps():
            features = maps[None].float()
            members, means = self.head.regions(self.head.cosines(features), features)
            found.append(means[0, members[0].any(dim=0)])
        regions = torch.cat(found)
        if len(regions) < clusters:
            collection.note(f"{len(regions)} regions are too few: clustering patches instead")
            regions = collection.sample(KMeansConfig().max_vectors).float()
        result = spherical_kmeans(regions, clusters, KMeansConfig(), seed=seed)
        self.head.centroids.copy_(result.centroids)
        return {"regions": float(len(regions)), "inertia": result.inertia}

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The likeness of some patches of the first view and the concepts of its image."""
        first = maps[:, 0]
        cosines = self.head.cosines(first)
        here, _ = draw_patches(cosines.shape[1], self.options.patches, images.seed, images.step)
        logits = self.head.logits_of(cosines.detach(), first)[:, None]
        return {"likeness": cosines[:, here.to(maps.device)].relu(), "logits": logits}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """Less the mean modularity of the images."""
        features = batch.features[:, 0].flatten(2).mT
        here, _ = draw_patches(features.shape[1], self.options.patches, batch.seed, batch.step)
        return {"loss": concept_loss(features[:, here.to(features.device)], rows["likeness"])}

    def groups(self, progress: float) -> list[Group]:
        """The generator."""
        options = self.options
        return [Group([*self.head.parameters()], options.learning_rate, options.weight_decay)]


def concept_loss(
    features: Float[Tensor, "b n d"], likeness: Float[Tensor, "b n k"]
) -> Float[Tensor, ""]:
    """Less the modularity of each image's patches under its concepts; the mean over images.

    Args:
        features: Embeddings of any length, a target.
        likeness: S, the positive cosines of patches and concepts.
    """
    directions = normalize(features, dim=-1)
    excess = edges_above_chance((directions @ directions.mT).relu()).detach()
    together = likeness[:, :, None, 0] * likeness[:, None, :, 0]
    for concept in range(1, likeness.shape[2]):
        own = likeness[..., concept]
        together = torch.maximum(together, own[:, :, None] * own[:, None, :])
    return -(excess * together).sum(dim=(1, 2)).mean()
