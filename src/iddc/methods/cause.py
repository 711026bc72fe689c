"""CAUSE with a perceptron (CAUSE-MLP): codes that keep what a codebook of concepts tells apart.

Kim et al., *Causal unsupervised semantic segmentation*, 2023. In three stages:

1. A codebook of G concepts c_g in the space of the embeddings u maximises the modularity of each
   image's graph. With A_ij = max(cos(u_i, u_j), 0) and no diagonal, d_i = sum_j A_ij, e = sum d_i,
   C_ig = max(cos(u_i, c_g), 0):

       L = -1/e sum_ij (A_ij - d_i d_j / e) max_g tanh(C_ig C_jg / T),    T = 0.1

2. Codes learn by contrast. v_i is the concept nearest to u_i. Of all patches of the batch, those
   with cos(v_i, v_j) > 0.3 are positives of an anchor, those below 0.1 negatives. With s the cosine
   of the anchor's projected code and the teacher's, over 0.07, the mean over all pairs of

       log sum_{positive or negative} exp(s) - s_positive

3. K centroids maximise the same modularity of the teacher's codes.

The release's third stage sends the loss of its labelled probe into the codes that are evaluated;
here no label is read and the codes are fixed by then. Left out: the bank of earlier codes and the
dropout. Concepts, codes and their moving average are as released, on IDDC's views.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from iddc.config import Experiment, Frozen, HeadName
from iddc.errors import ConfigError
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.methods.modularity import fit_concepts, one_of_each_block
from iddc.network import Codes
from iddc.schedules import Plan
from iddc.views import draw_patches


class CauseConfig(Frozen):
    """The numbers of CAUSE. Defaults: the authors' for COCO-Stuff-27, CAUSE-MLP."""

    concepts: int = Field(2048, ge=2)
    """G, the size of the codebook."""
    modularity_temperature: float = Field(0.1, gt=0)
    """T, the temperature of the modularity's tanh."""
    positive_threshold: float = Field(0.3, ge=-1, le=1)
    """The cosine of two concepts above which patches are a positive pair."""
    negative_threshold: float = Field(0.1, ge=-1, le=1)
    """The cosine of two concepts below which patches are a negative pair."""
    temperature: float = Field(0.07, gt=0)
    """The temperature of the contrast."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """The pace of the teacher, the moving average of the codes."""
    dim: int = Field(90, ge=2)
    """The length of a code."""
    projection: int = Field(256, ge=2)
    """The length of a projected code; 2048 in the release."""
    patches: int = Field(49, ge=2)
    """How many patches of a crop, drawn anew in each step, are contrasted."""
    epochs: int = Field(2, ge=1)
    """Passes over the images in the second stage."""
    min_steps: int = Field(400, ge=1)
    """The steps of the second stage at least, whatever the number of epochs says."""
    batch_size: int = Field(16, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    fitting_steps: int = Field(400, ge=1)
    """Batches of images in the first stage and in the third, at least one pass."""
    learning_rate: float = Field(1e-3, gt=0)
    """The learning rate of all three stages (Adam); halved twice in the third."""
    weight_decay: float = Field(1e-4, ge=0)
    """The weight decay of the codes."""
    clip: float = Field(0.1, gt=0)
    """The largest norm of the gradients in the second and third stage."""


class Cause(Method):
    """The head's codes are the teacher's, and its centroids those of the third stage."""

    name = "cause"
    about = "CAUSE-MLP (Kim et al., 2023): codes that tell the concepts of a codebook apart."
    Config = CauseConfig
    heads: ClassVar[tuple[HeadName, ...]] = ("codes",)
    head: Codes
    options: CauseConfig
    codebook: Float[Tensor, "g d"]
    """The concepts of the first stage."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        if experiment.num_clusters > self.options.concepts:
            raise ConfigError(
                f"--{self.name}.concepts: expected at least the {experiment.num_clusters} clusters "
                f"that are asked for, found {self.options.concepts}."
            )
        self.student = copy.deepcopy(self.head)
        self.student.centroids.requires_grad_(False)
        self.projector = nn.Linear(self.options.dim, self.options.projection)
        self.teacher_projector = copy.deepcopy(self.projector)
        self.head.requires_grad_(False)
        self.teacher_projector.requires_grad_(False)
        width = self.head.linear.in_channels
        start = torch.rand(self.options.concepts, width) * 2 - 1
        self.register_buffer("codebook", start / self.options.concepts)

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """The second stage, in whole epochs."""
        options, batch = experiment.options, experiment.options["batch_size"]
        per_epoch = -(-num_images // batch)
        epochs = max(options["epochs"], -(-options["min_steps"] // per_epoch))
        return Plan.of_steps(epochs * per_epoch, batch, num_images)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """The first stage before the steps, and the third after them."""
        options = self.options
        rng = np.random.default_rng((self.experiment.seed, epoch))
        fit = partial(
            fit_concepts,
            rng=rng,
            batch_size=options.batch_size,
            steps=options.fitting_steps,
            clip=options.clip,
            temperature=options.modularity_temperature,
        )
        if not epoch:
            collection.note(f"learning a codebook of {options.concepts:,} concepts")
            images = (one_of_each_block(maps, rng) for _, maps in collection.maps())
            rate = 4 * options.learning_rate  # the release has four processes
            self.codebook, loss = fit(self.codebook, [*images], [rate])
            return {"codebook_loss": loss}
        if epoch == epochs:
            collection.note(f"fitting {self.experiment.num_clusters:,} centroids")
            images = (one_of_each_block(self._codes(maps), rng) for _, maps in collection.maps())
            drawn = torch.from_numpy(rng.uniform(-1, 1, tuple(self.head.centroids.shape)))
            rates = [options.learning_rate * 0.5**i for i in range(3)]
            found, loss = fit(drawn.to(self.codebook) / len(drawn), [*images], rates)
            self.head.centroids.copy_(found)
            return {"centroids_loss": loss}
        return {}

    @staticmethod
    def codes_at(
        head: Codes, maps: Float[Tensor, "b d h w"], here: Int64[Tensor, " m"]
    ) -> Float[Tensor, "b c m 1"]:
        """The codes of some patches."""
        return head.codes(maps.flatten(2)[:, :, here, None])

    @torch.no_grad()
    def _codes(self, maps: Float[Tensor, "d h w"]) -> Float[Tensor, "c h w"]:
        return self.head.codes(maps[None].float())[0]

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The projected codes of student and teacher, and the nearest concepts, of some patches."""
        first = maps[:, 0]
        number = first.shape[2] * first.shape[3]
        here = draw_patches(number, self.options.patches, images.seed, images.step)[0]
        here = here.to(first.device)
        features = first.flatten(2)[:, :, here]
        with torch.no_grad():
            kept = self.codes_at(self.head, first, here)
            teacher = normalize(self.teacher_projector(kept[..., 0].mT), dim=-1)
            cosines = normalize(features, dim=1).mT @ normalize(self.codebook, dim=1).T
            concepts = cosines.argmax(dim=-1)
            logits = self.head.cosines(kept)[..., 0][:, None]
        codes = self.codes_at(self.student, first, here)[..., 0].mT
        student = normalize(self.projector(codes), dim=-1)
        return {"student": student, "teacher": teacher, "concepts": concepts, "logits": logits}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The contrast of each image with all of the batch."""
        options = self.options
        loss = concept_contrast(
            rows["student"],
            rows["teacher"],
            rows["concepts"],
            self.codebook,
            positive=options.positive_threshold,
            negative=options.negative_threshold,
            temperature=options.temperature,
        )
        return {"loss": loss}

    @torch.no_grad()
    def update(self, batch: Batch, rows: Rows) -> None:
        """Move the teacher towards the student."""
        pairs = ((self.head, self.student), (self.teacher_projector, self.projector))
        for slow, fast in pairs:
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - self.options.momentum)

    def groups(self, progress: float) -> list[Group]:
        """The student's codes and projector."""
        options = self.options
        parameters = [*self.student.mappings(), *self.projector.parameters()]
        return [Group(parameters, options.learning_rate, options.weight_decay, options.clip)]


def concept_contrast(
    student: Float[Tensor, "b n c"],
    teacher: Float[Tensor, "b n c"],
    concepts: Int64[Tensor, "b n"],
    codebook: Float[Tensor, "g d"],
    *,
    positive: float,
    negative: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Contrast each image's patches with the teacher's of the whole batch; the mean over images.

    Args:
        student: Projected codes of length 1.
        teacher: The teacher's, a target.
        concepts: The index of the concept nearest to each patch.
        codebook: The concepts.
        positive: The cosine of concepts above which two patches belong together.
        negative: The cosine below which they do not; what lies between is left out.
        temperature: Divides the cosines of codes.
    """
    directions = normalize(codebook, dim=1)
    vectors = directions[concepts]
    everything, targets = vectors.flatten(0, 1), teacher.flatten(0, 1).detach()
    batch, number = concepts.shape
    losses = []
    for image in range(batch):
        likeness = vectors[image] @ everything.T
        itself = torch.arange(number, device=likeness.device)
        together = likeness > positive
        together[itself, image * number + itself] = False
        apart = likeness < negative
        scores = student[image] @ targets.T / temperature
        among = scores.masked_fill(~(together | apart), torch.finfo(scores.dtype).min)
        pairs = together.sum()
        # A row without a pair has no positive, and so no part in the sum.
        total = among.logsumexp(dim=1, keepdim=True).masked_fill(~together, 0)
        cost = (total - scores.masked_fill(~together, 0)).sum()
        if pairs:
            losses.append(cost / pairs)
    return torch.stack(losses).mean() if losses else student.sum() * 0
