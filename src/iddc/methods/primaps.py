"""PriMaPs-EM: masks of principal directions vote for the clusters of prototypes.

Hahn et al., *Boosting unsupervised semantic segmentation with principal mask proposals*, TMLR 2024.
Once for each image, masks are cut from its embeddings: the first principal direction of the patches
that are free, the free patch most along it, and all that are alike it. K prototypes then learn by
expectation and maximisation. E: a teacher gives each patch its cluster, and each mask takes the one
most frequent in it. M: a student, rows g_k w_k / |w_k| on embeddings u, learns these labels,

    L = mean_i a_{y_i} CE(student(u_i), y_i),    a_k = (1 - pbar_k)^2

with pbar the student's mean probabilities over the batch, and patches without a mask counting 0.
The teacher is a running mean of the student, every 10 steps. Left out: the CRF and the median
filter of masks, which are of patches here, and the augmented view of the student.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from iddc.config import Experiment, Frozen
from iddc.methods.alignment import at_patches, stacked
from iddc.methods.correspondence import probe_loss
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.network import LinearHead

FREE = 255
"""A patch without a mask."""
FEW = 5
"""With fewer free patches no further mask is cut."""


class PrimapsConfig(Frozen):
    """The numbers of PriMaPs-EM. Defaults: the authors', steps ours."""

    coverage: float = Field(0.95, gt=0, le=1)
    """The share of an image's patches that masks shall cover."""
    likeness: float = Field(0.4, gt=0, le=1)
    """What a patch must have of the largest cosine to a mask's seed to be in the mask."""
    vectors: int = Field(100_000, ge=2)
    """How many patches prototypes start from."""
    start_steps: int = Field(400, ge=0)
    """Steps of the cosine probe before the first one, from principal directions."""
    start_learning_rate: float = Field(5e-3, gt=0)
    """The learning rate of these steps (Adam)."""
    every: int = Field(10, ge=1)
    """The number of steps between two updates of the teacher."""
    momentum: float = Field(0.98, ge=0, lt=1)
    """The largest pace of the teacher; before, it is the mean of the student so far."""
    steps: int = Field(2000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(5e-3, gt=0)
    """The learning rate of the student (Adam)."""


class Primaps(Method):
    """The head is the teacher, a linear map without bias; the student is here."""

    name = "primaps"
    about = "PriMaPs-EM (Hahn et al., 2024): masks of principal directions vote for clusters."
    Config = PrimapsConfig
    heads = ("linear",)
    head: LinearHead
    options: PrimapsConfig
    masks: Tensor
    """The mask of each patch of each image, "n h w" uint8, FREE for none and beyond its size."""
    sizes: Int64[Tensor, "n 2"]
    """The height and width of each image's masks; 0 for one that cannot be read."""
    calls: Int64[Tensor, ""]
    """How often the teacher was updated."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.head.requires_grad_(False)
        weight = self.head.weight[:, :, 0, 0]
        self.directions = nn.Parameter(weight.clone())
        self.lengths = nn.Parameter(torch.ones(len(weight)))
        assert self.head.bias is not None
        self.head.bias.zero_()
        self.register_buffer("masks", torch.zeros(0, 0, 0, dtype=torch.uint8))
        self.register_buffer("sizes", torch.zeros(0, 2, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Cut the masks of all images and start the prototypes, before the first step."""
        if epoch:
            return {}
        options = self.options
        collection.note("cutting masks of principal directions")
        found = {
            index: principal_masks(maps.float(), options.coverage, options.likeness)
            for index, maps in collection.maps()
        }
        self.masks, self.sizes = stacked(found, FREE)
        start = self._start(collection.sample(options.vectors).float())
        with torch.no_grad():
            self.directions.copy_(start)
            self.head.weight.copy_(self._prototypes()[:, :, None, None])
        number_of = [int(mask[mask != FREE].max()) + 1 for mask in found.values()]
        return {"masks": sum(number_of) / len(number_of)}

    def _start(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
        """The first principal directions, and some steps of the cosine probe from them."""
        options, clusters = self.options, len(self.directions)
        generator = torch.Generator().manual_seed(self.experiment.seed)
        axes = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False).Vh[:clusters]
        extra = torch.randn(max(0, clusters - len(axes)), vectors.shape[1], generator=generator)
        found = torch.cat([axes, normalize(extra, dim=1).to(axes)]).clone().requires_grad_()
        optimizer = torch.optim.Adam([found], lr=options.start_learning_rate)
        for _ in range(options.start_steps):
            rows = torch.randint(len(vectors), (4096,), generator=generator).to(vectors.device)
            with torch.enable_grad():
                cosines = normalize(found, dim=1) @ normalize(vectors[rows], dim=1).T
                loss = probe_loss(cosines[None, None])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            optimizer.step()
        return found.detach()

    def _prototypes(self) -> Float[Tensor, "k d"]:
        return self.lengths[:, None] * normalize(self.directions, dim=1)

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The student's logits of the first view, the teacher's clusters and the masks there."""
        features = maps[:, 0].flatten(2)
        with torch.no_grad():
            teacher = (self.head.weight[:, :, 0, 0] @ features).argmax(dim=1)
        masks = at_patches(self.masks, self.sizes, images, 0, maps.shape[3:]).long()
        return {
            "logits": (self._prototypes() @ features)[:, None],
            "teacher": teacher,
            "masks": masks.flatten(1).to(maps.device),
        }

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The focal cross-entropy of the labels that masks vote for."""
        logits = rows["logits"][:, 0].mT
        labels = voted(rows["teacher"], rows["masks"], logits.shape[2])
        return {"loss": focal_cross_entropy(logits, labels)}

    @torch.no_grad()
    def update(self, batch: Batch, rows: Rows) -> None:
        """Move the teacher towards the student, from time to time."""
        if batch.step % self.options.every == 0:
            pace = teacher_pace(int(self.calls), self.options.momentum)
            self.head.weight.lerp_(self._prototypes()[:, :, None, None], 1 - pace)
            self.calls += 1

    def groups(self, progress: float) -> list[Group]:
        """The student's prototypes."""
        return [Group([self.directions, self.lengths], self.options.learning_rate)]


def principal_masks(maps: Float[Tensor, "d h w"], coverage: float, likeness: float) -> Tensor:
    """Which mask each patch of an image is in, "h w" uint8, from 0 in the order they are cut.

    Args:
        maps: Embeddings of any length.
        coverage: The share of the patches after which no further mask is cut.
        likeness: What a patch must have of the largest cosine to the seed.
    """
    vectors = maps.flatten(1).T
    directions = normalize(vectors, dim=1)
    free = torch.ones(len(vectors), dtype=torch.bool, device=maps.device)
    masks = torch.full((len(vectors),), FREE, dtype=torch.uint8, device=maps.device)
    for number in range(FREE):
        if free.sum() <= (1 - coverage) * len(free) or free.sum() < FEW:
            break
        # The sign of a principal direction means nothing: its largest entry is positive.
        rest = vectors[free]
        axis = torch.linalg.svd(rest - rest.mean(0), full_matrices=False).Vh[0]
        axis = axis * axis[axis.abs().argmax()].sign()
        seed = (directions @ axis).masked_fill(~free, -math.inf).argmax()
        cosines = (directions @ directions[seed]).masked_fill(~free, 0)
        taken = cosines >= (likeness * cosines.max()).clamp(min=1e-6)
        masks[taken] = number
        free &= ~taken
    return masks.view(maps.shape[1:])


def voted(
    clusters: Int64[Tensor, "b n"], masks: Int64[Tensor, "b n"], num_clusters: int
) -> Int64[Tensor, "b n"]:
    """The cluster most frequent in each patch's mask, the first of several; -1 without a mask."""
    labels = torch.full_like(masks, -1)
    members = one_hot(clusters, num_clusters)
    for image, own in enumerate(masks):
        present, where = own.unique(return_inverse=True)
        votes = members.new_zeros(len(present), num_clusters).index_add_(0, where, members[image])
        labels[image] = torch.where(own == FREE, -1, votes.argmax(dim=1)[where])
    return labels


def focal_cross_entropy(
    logits: Float[Tensor, "b n k"], labels: Int64[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """The mean of a_y CE over all patches, of which those below 0 cost nothing."""
    flat, wanted = logits.flatten(0, 1), labels.flatten()
    weights = (1 - flat.softmax(dim=1).mean(dim=0).detach()).square()
    cost = cross_entropy(flat, wanted.clamp(min=0), weight=weights, reduction="none")
    return cost.masked_fill(wanted < 0, 0).mean()


def teacher_pace(call: int, largest: float) -> float:
    """What the teacher keeps of itself in an update, from 0: the first two copy the student."""
    return 0.0 if call < 2 else min(1 - 1 / (call + 1), largest)
