"""STEGO: short codes that keep the likeness of embeddings, and centroids of them.

Hamilton et al., *Unsupervised semantic segmentation by distilling feature correspondences*, ICLR
2022; equations of this module are theirs. Codes of two images attract each other where the
embeddings are alike and repel each other elsewhere. Centroids follow the codes.

Where the paper says nothing, this is the authors' code, except for the views, which are IDDC's
instead of five fixed crops of each image; the neighbours, which are of images, not of crops; the
compared pixels, which are patches instead of points between them; and the dropout, which is of the
input of the codes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from iddc.config import Experiment, Frozen
from iddc.errors import DataError
from iddc.methods.correspondence import SpatialCentering, attraction, probe_loss
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.network import Codes
from iddc.views import draw_patches, draw_rolls

_NEIGHBOUR, _DROPOUT = range(2)
"""The independent streams of random numbers of a step."""
_ROWS = 1024
"""Images compared with all others at once."""


class StegoConfig(Frozen):
    """The numbers of STEGO. Defaults: the authors' code, for images of one's own (ViT-S)."""

    self_weight: float = Field(0.67, ge=0)
    """lambda_self, the weight of the loss of an image with itself."""
    knn_weight: float = Field(0.25, ge=0)
    """lambda_knn, the weight of the loss with one of its nearest neighbours."""
    random_weight: float = Field(0.63, ge=0)
    """lambda_rand, the weight of the loss with random other images."""
    self_shift: float = Field(0.18, ge=-1, le=1)
    """b_self, the affinity in an image above which two codes attract each other."""
    knn_shift: float = Field(0.12, ge=-1, le=1)
    """b_knn, the same with a neighbour."""
    random_shift: float = Field(0.46, ge=-1, le=1)
    """b_rand, the same with a random image."""
    spatial_centering: SpatialCentering = "released"
    """How affinities are centred, STEGO's Eq. (3)."""
    neighbours: int = Field(7, ge=1)
    """How many nearest images are neighbours of an image."""
    negatives: int = Field(5, ge=1)
    """Random images an image is compared with; fewer if the batch is smaller."""
    patches: int = Field(121, ge=1)
    """How many patches of a crop, drawn anew in each step, are compared; 11 * 11 points there."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """The chance of a channel of the features to be left out of a step."""
    steps: int = Field(5000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(16, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(5e-4, gt=0)
    """The learning rate of the codes (Adam)."""
    probe_learning_rate: float = Field(5e-3, gt=0)
    """The learning rate of the centroids (Adam)."""


COCO_STUFF = StegoConfig(self_shift=0.08, knn_shift=0.02, random_shift=0.66)
"""COCO-Stuff-27 with ViT-S: from the authors' code, as the paper's own are for ViT-B."""
CITYSCAPES = StegoConfig(
    self_weight=1.0,
    knn_weight=0.58,
    random_weight=0.91,
    self_shift=0.46,
    knn_shift=0.18,
    random_shift=0.31,
    spatial_centering="none",
    steps=7000,
)
"""The paper's for Cityscapes, ViT-B/8; without its Eq. (3), as the authors' settings and the
reproduction of Koenig et al. (*Uncovering the inner workings of STEGO*, 2023) have it."""
_BY_RECIPE = {"cocostuff": COCO_STUFF, "cityscapes": CITYSCAPES, "ablation": CITYSCAPES}
"""The numbers by how the name of a recipe begins; all ablations are on Cityscapes."""


class Stego(Method):
    """Codes and their centroids. With `objective.centering` "batch", features are centred too."""

    name = "stego"
    about = "STEGO (Hamilton et al., 2022): codes that keep the likeness of embeddings."
    Config = StegoConfig
    heads = ("codes",)
    uses = frozenset({"training.precision", "objective.centering"})
    head: Codes
    options: StegoConfig
    neighbours: Int64[Tensor, "n k"]
    """The nearest images of each image, the nearest first; -1 for one that cannot be read."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.register_buffer("neighbours", torch.zeros(0, 0, dtype=torch.int64))

    @classmethod
    def defaults(cls, experiment: Experiment) -> StegoConfig:
        """The numbers for the data set of a recipe; the usual ones for one's own images."""
        found = (c for start, c in _BY_RECIPE.items() if experiment.recipe.startswith(start))
        return next(found, StegoConfig())

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Find which images are alike, before the first step."""
        if epoch:
            return {}
        ids, means = collection.means()
        if len(ids) < 2:
            raise DataError(
                f"Found {len(ids)} readable image; STEGO compares images with each other and "
                "needs at least 2."
            )
        found = nearest(means, self.options.neighbours)
        table = torch.full((int(ids.max()) + 1, found.shape[1]), -1)
        table[ids.cpu()] = ids.cpu()[found]
        self.neighbours = table.to(means.device)
        return {}

    def partners(self, ids: Sequence[int], step: int) -> Sequence[int]:
        """One of the nearest images of each; one that could not be read has itself alone."""
        rng = np.random.default_rng((self.experiment.seed, step, _NEIGHBOUR))
        drawn = rng.integers(self.neighbours.shape[1], size=len(ids)).tolist()
        table = self.neighbours.tolist()
        near = [table[i][k] if i < len(table) else -1 for i, k in zip(ids, drawn, strict=True)]
        return [i if partner < 0 else partner for i, partner in zip(ids, near, strict=True)]

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The codes of an image and of its partner, and the scores of the image's own codes."""
        rate = self.options.dropout
        kept = images.rng(_DROPOUT).random((images.total, *maps.shape[1:3])) >= rate
        mask = torch.from_numpy(kept)[images.positions].to(maps) / (1 - rate)
        dropped = (maps * mask[..., None, None]).flatten(0, 1)
        codes = self.head.codes(dropped)
        codes = codes.view(len(maps), 2, *codes.shape[1:])
        logits = self.head.cosines(codes[:, 0].detach())[:, None]
        return {"codes": codes, "logits": logits.flatten(3)}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """Eq. (5), with the image itself, a neighbour and random ones; and the centroids' loss."""
        options, features = self.options, batch.features
        if self.experiment.objective.centering == "batch":
            features = normalize(features, dim=2)
            features = features - features.mean(dim=(0, 1, 3, 4), keepdim=True)
        images, neighbours = (
            Patches.of(features[:, view], rows["codes"][:, view]) for view in (0, 1)
        )
        number = features.shape[3] * features.shape[4]
        here, there = draw_patches(number, options.patches, batch.seed, batch.step)
        first, others = images.at(here), images.at(there)
        rolls = draw_rolls(batch.total, options.negatives, batch.seed, batch.step)

        def loss(second: Patches, shift: float) -> Float[Tensor, ""]:
            centering = options.spatial_centering
            return correspondence_loss(first, second, shift=shift, centering=centering)

        own = loss(first, options.self_shift)
        knn = loss(neighbours.at(there), options.knn_shift)
        random = torch.stack([loss(others.roll(r), options.random_shift) for r in rolls]).mean()
        probe = probe_loss(rows["logits"])
        total = options.self_weight * own + options.knn_weight * knn
        total = total + options.random_weight * random + probe
        return {"loss": total, "own": own, "knn": knn, "random": random, "probe": probe}

    def groups(self, progress: float) -> list[Group]:
        """The codes, and the centroids at a rate of their own."""
        return [
            Group(self.head.mappings(), self.options.learning_rate),
            Group([self.head.centroids], self.options.probe_learning_rate),
        ]


@dataclass(frozen=True)
class Patches:
    """Some patches of each image of a batch."""

    features: Float[Tensor, "b n d"]
    """The backbone's embeddings, of any length; a target without gradient."""
    codes: Float[Tensor, "b n c"]
    """The codes, of any length."""

    @classmethod
    def of(cls, features: Float[Tensor, "b d h w"], codes: Float[Tensor, "b c h w"]) -> Patches:
        """All patches of the images."""
        return cls(features.flatten(2).mT, codes.flatten(2).mT)

    def at(self, patches: Int64[Tensor, " m"]) -> Patches:
        """Some of these patches."""
        return Patches(self.features[:, patches], self.codes[:, patches])

    def roll(self, images: int) -> Patches:
        """The patches of another image of the batch for each."""
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
    likeness = normalize(first.codes, dim=-1) @ normalize(second.codes, dim=-1).mT
    pull = attraction(first.features, second.features, shift, centering)
    return -(pull * likeness.relu()).mean()


def nearest(vectors: Float[Tensor, "n d"], count: int) -> Int64[Tensor, "n k"]:
    """For each vector, which others have the highest cosine with it, the nearest first."""
    vectors = normalize(vectors, dim=1)
    found = []
    for start in range(0, len(vectors), _ROWS):
        cosines = vectors[start : start + _ROWS] @ vectors.T
        cosines.diagonal(start).fill_(-math.inf)
        found.append(cosines.topk(min(count, len(vectors) - 1)).indices.cpu())
    return torch.cat(found)
