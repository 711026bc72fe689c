"""SmooSeg: labels that are smooth where embeddings are alike, within images and across them.

Lan et al., *SmooSeg: smoothness prior for unsupervised semantic segmentation*, NeurIPS 2023. A code
z of each patch is compared with K centroids of a teacher, M, a moving average of a student's, m:

    P = softmax(cos(z, M) / T),    delta_ij = 1 - cos(P_i, P_j)
    L = mean((F'_ij - b1) delta_ij) within each image                   smooth within
      + mean((F'_ij - b2) delta_ij) between an image and another        smooth across
      + mean(CE(cos(sg z, m), argmax_k cos(z, M)))                      data

F' are centred cosines of embeddings (`stego.attraction`). Codes learn from smoothness through the
teacher's centroids, the student's centroids from the teacher's labels. Left out: the dropout, and
the five fixed crops, in whose place are IDDC's views. The teacher follows after the optimiser's
step, the release's before it. A run too short for the teacher's pace gets a faster one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from iddc.config import Experiment, Frozen
from iddc.methods.correspondence import attraction
from iddc.methods.method import Batch, Group, Images, Method, Rows
from iddc.network import SmoothCodes
from iddc.views import draw_patches, draw_rolls


class SmoosegConfig(Frozen):
    """The numbers of SmooSeg. Defaults: the authors' for Cityscapes and ViT-S/8."""

    within_shift: float = Field(-0.02, ge=-1, le=1)
    """b1, the centred affinity in an image above which two patches should have one cluster."""
    across_shift: float = Field(0.5, ge=-1, le=1)
    """b2, the same between an image and another."""
    temperature: float = Field(0.1, gt=0)
    """T, the temperature of the teacher's probabilities."""
    momentum: float = Field(0.998, ge=0, lt=1)
    """alpha, the pace of the teacher; less in runs below 5 / (1 - alpha) steps."""
    dim: int = Field(64, ge=2)
    """The length of a code."""
    patches: int = Field(196, ge=2)
    """How many patches of a crop, drawn anew in each step, are compared; all 784 there."""
    steps: int = Field(3000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(1e-4, gt=0)
    """The learning rate of the codes (Adam)."""
    centroid_learning_rate: float = Field(5e-4, gt=0)
    """The learning rate of the student's centroids (Adam)."""


class Smooseg(Method):
    """The head's centroids are the teacher's; the student's are here."""

    name = "smooseg"
    about = "SmooSeg (Lan et al., 2023): clusters that are smooth where embeddings are alike."
    Config = SmoosegConfig
    heads = ("smooth-codes",)
    head: SmoothCodes
    options: SmoosegConfig

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        start = nn.init.xavier_normal_(torch.empty_like(self.head.centroids))
        self.student = nn.Parameter(normalize(start, dim=1))
        self.head.centroids.data.copy_(self.student)
        self.head.centroids.requires_grad_(False)

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The cosines of an image's codes to the teacher's and to the student's centroids."""
        codes = self.head.codes(maps[:, 0])
        directions = normalize(codes.detach(), dim=1).flatten(2)
        student = normalize(self.student, dim=1) @ directions
        return {"logits": self.head.cosines(codes).flatten(2)[:, None], "student": student}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The three terms, on the same patches of every image."""
        options = self.options
        teacher, student = rows["logits"][:, 0].mT, rows["student"].mT
        number = teacher.shape[1]
        here, there = draw_patches(number, options.patches, batch.seed, batch.step)
        features = batch.features[:, 0].flatten(2).mT
        probs = (teacher / options.temperature).softmax(dim=-1)
        (roll,) = draw_rolls(batch.total, 1, batch.seed, batch.step)

        def term(features_2: Tensor, probs_2: Tensor, shift: float) -> Float[Tensor, ""]:
            return smoothness_loss(features[:, here], features_2, probs[:, here], probs_2, shift)

        within = term(features[:, here], probs[:, here], options.within_shift)
        others = features.roll(roll, 0)[:, there], probs.roll(roll, 0)[:, there]
        across = term(*others, options.across_shift)
        data = data_loss(student, teacher)
        total = within + across + data
        return {"loss": total, "within": within, "across": across, "data": data}

    @torch.no_grad()
    def update(self, batch: Batch, rows: Rows) -> None:
        """Move the teacher's centroids towards the student's."""
        momentum = min(self.options.momentum, max(0.0, 1 - 5 / batch.steps))
        self.head.centroids.lerp_(self.student, 1 - momentum)

    def groups(self, progress: float) -> list[Group]:
        """The codes, and the student's centroids at a rate of their own."""
        return [
            Group(self.head.mappings(), self.options.learning_rate),
            Group([self.student], self.options.centroid_learning_rate),
        ]


def smoothness_loss(
    features: Float[Tensor, "b n d"],
    other_features: Float[Tensor, "b m d"],
    probs: Float[Tensor, "b n k"],
    other_probs: Float[Tensor, "b m k"],
    shift: float,
) -> Float[Tensor, ""]:
    """Ask patches that are more alike than the shift for the same probabilities, others not.

    The mean of (F' - b) (1 - cos(P, P')) over all pairs of an image's patches and the other's.
    """
    agreement = normalize(probs, dim=-1) @ normalize(other_probs, dim=-1).mT
    return (attraction(features, other_features, shift, "released") * (1 - agreement)).mean()


def data_loss(
    student: Float[Tensor, "b n k"], teacher: Float[Tensor, "b n k"]
) -> Float[Tensor, ""]:
    """Teach the student the cluster that the teacher gives each patch."""
    return cross_entropy(student.flatten(0, 1), teacher.argmax(dim=-1).flatten())
