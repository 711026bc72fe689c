"""HP: patches of the whole batch contrasted, with hidden positives found by their embeddings.

Seong et al., *Leveraging hidden positives for unsupervised semantic segmentation*, CVPR 2023. r_i
is the largest cosine of patch i to a pool of reference patches. Patches i and j of the batch are
positives if cos(u_i, u_j) is above r_i or r_j: A_ij. S_ij is the same of a teacher's codes, whose
weight lambda grows from 0 after a warm-up to 1 at the end. With s_ij the cosine of projected codes,
W = A + lambda S, and D_i the patches with A_ij = 1 and a share rho of all others,

    l_i = -(T / 0.07) q_i sum_j W_ij [s_ij / T - log sum_{j in D_i} exp(s_ij / T)] / sum_j W_ij

over the patches i with some A_ij; q_i is sum_j W_ij over its mean in the image. Left out: the
mixing of neighbouring codes, which needs the attention of a ViT; the consistency with a photometric
view; and the dropout. The teacher's pool is a queue of codes of the last steps.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from iddc.config import Experiment, Frozen
from iddc.methods.correspondence import probe_loss
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.network import Codes
from iddc.views import draw_patches

_DENOMINATOR, _QUEUE = range(2)
"""The independent streams of random numbers of a step."""
BASE_TEMPERATURE = 0.07
"""The temperature that the release divides T by."""


class HpConfig(Frozen):
    """The numbers of HP. Defaults: the authors' for COCO-Stuff-27 and ViT-S/8."""

    temperature: float = Field(0.8, gt=0)
    """T, what divides the cosines of projected codes."""
    others: float = Field(0.02, ge=0, le=1)
    """rho, the share of patches that are no positives and count in the denominator."""
    pool: int = Field(2048, ge=1)
    """M, the number of reference patches; at most one for each image of the collection there."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """The pace of the teacher, the moving average of the codes."""
    warm_up: float = Field(0.15, ge=0, lt=1)
    """The share of the run before the teacher's positives count."""
    dim: int = Field(512, ge=2)
    """The length of a code."""
    patches: int = Field(49, ge=2)
    """How many patches of a crop, drawn anew in each step, are contrasted; all 784 there."""
    steps: int = Field(2000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; 64 there."""
    learning_rate: float = Field(5e-4, gt=0)
    """The learning rate of codes and projector (AdamW)."""
    probe_learning_rate: float = Field(5e-3, gt=0)
    """The learning rate of the centroids (Adam)."""
    weight_decay: float = Field(0.1, ge=0)
    """The weight decay of the codes."""
    clip: float = Field(10.0, gt=0)
    """The largest norm of the gradients of the codes."""


class Hp(Method):
    """Codes, their projector and their centroids, and a teacher of the codes."""

    name = "hp"
    about = "HP (Seong et al., 2023): a contrast of patches with hidden positives."
    Config = HpConfig
    heads = ("codes",)
    head: Codes
    options: HpConfig
    pool: Float[Tensor, "m d"]
    """Embeddings of the reference patches, of length 1."""
    teacher_pool: Float[Tensor, "m c"]
    """Codes of the teacher in the last steps, of length 1; zeros before there are any."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.projector = nn.Linear(self.options.dim, self.options.dim)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("pool", torch.zeros(0, self.head.linear.in_channels))
        self.register_buffer("teacher_pool", torch.zeros(self.options.pool, self.options.dim))

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Draw the reference patches, before the first step."""
        if not epoch:
            self.pool = normalize(collection.sample(self.options.pool).float(), dim=1)
        return {}

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """Projected codes of some patches, the teacher's codes, and the scores of the centroids."""
        features = maps[:, 0].flatten(2)
        here = self._patches(features.shape[2], images).to(features.device)
        chosen = features[:, :, here, None]
        codes = self.head.codes(chosen)
        with torch.no_grad():
            teacher = normalize(self.teacher.codes(chosen)[..., 0].mT, dim=-1)
        return {
            "projected": normalize(self.projector(codes[..., 0].mT), dim=-1),
            "teacher": teacher,
            "logits": self.head.cosines(codes.detach())[..., 0][:, None],
        }

    def _patches(self, number: int, images: Images) -> Tensor:
        return draw_patches(number, self.options.patches, images.seed, images.step)[0]

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The contrast of every image with the whole batch, and the centroids' loss."""
        options = self.options
        features = batch.features[:, 0].flatten(2)
        here = self._patches(features.shape[2], batch).to(features.device)
        vectors = normalize(features[:, :, here].mT.flatten(0, 1), dim=1)
        positives = hidden_positives(vectors, self.pool)
        weight = max(0.0, (batch.progress - options.warm_up) / (1 - options.warm_up))
        taught = None
        if weight and self.teacher_pool.any():
            filled = self.teacher_pool[self.teacher_pool.any(dim=1)]
            taught = hidden_positives(rows["teacher"].flatten(0, 1), filled)
        number = len(here)
        drawn = batch.rng(_DENOMINATOR).random((number, len(vectors))) < options.others
        contrast = hidden_positive_loss(
            rows["projected"],
            positives,
            taught,
            weight=weight,
            others=torch.from_numpy(drawn).to(vectors.device),
            temperature=options.temperature,
        )
        probe = probe_loss(rows["logits"])
        return {"loss": contrast + probe, "contrast": contrast, "probe": probe}

    @torch.no_grad()
    def update(self, batch: Batch, rows: Rows) -> None:
        """Move the teacher, and put a code of each image into its pool in place of the oldest."""
        for old, new in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            old.lerp_(new, 1 - self.options.momentum)
        codes = rows["teacher"]
        drawn = batch.rng(_QUEUE).integers(codes.shape[1], size=len(codes))
        fresh = codes[torch.arange(len(codes)), torch.from_numpy(drawn)]
        size = self.options.pool
        self.teacher_pool = torch.cat([self.teacher_pool, fresh.to(self.teacher_pool)])[-size:]

    def groups(self, progress: float) -> list[Group]:
        """Codes with decay and clipping, the projector, and the centroids."""
        options = self.options
        return [
            Group(self.head.mappings(), options.learning_rate, options.weight_decay, options.clip),
            Group([*self.projector.parameters()], options.learning_rate),
            Group([self.head.centroids], options.probe_learning_rate),
        ]


def hidden_positives(
    vectors: Float[Tensor, "n d"], pool: Float[Tensor, "m d"]
) -> Bool[Tensor, "n n"]:
    """Which pairs are more alike than either of them is to anything in the pool; none with itself.

    All vectors have length 1.
    """
    reference = (vectors @ pool.T).amax(dim=1)
    cosines = vectors @ vectors.T
    found = (cosines > reference[:, None]) | (cosines > reference)
    return found.fill_diagonal_(False)


def hidden_positive_loss(
    codes: Float[Tensor, "b n c"],
    positives: Bool[Tensor, "bn bn"],
    taught: Bool[Tensor, "bn bn"] | None,
    *,
    weight: float,
    others: Bool[Tensor, "n bn"],
    temperature: float,
) -> Float[Tensor, ""]:
    """The mean of l_i of the module's docstring over the anchors of an image, then over images.

    Args:
        codes: Projected codes of length 1.
        positives: A, of all patches of the batch.
        taught: S, or none where it does not count yet.
        weight: lambda.
        others: Which other patches count in the denominators of an image's patches.
        temperature: T.

    Returns:
        The loss; zero if no image has an anchor.
    """
    everything, number = codes.flatten(0, 1), codes.shape[1]
    losses = []
    for image, own in enumerate(codes):
        rows = slice(image * number, (image + 1) * number)
        near = positives[rows]
        anchors = near.any(dim=1)
        if not anchors.any():
            continue
        weights = near.to(codes.dtype)
        if taught is not None:
            weights = weights + weight * taught[rows].to(codes.dtype)
        scores = own @ everything.T / temperature
        itself = torch.zeros_like(near)
        itself[:, rows].fill_diagonal_(True)
        counted = (near | others) & ~itself
        floor = torch.finfo(scores.dtype).min
        total = scores.masked_fill(~counted, floor).logsumexp(dim=1, keepdim=True)
        sums = weights.sum(dim=1)[anchors]
        cost = (weights * (total - scores)).sum(dim=1)[anchors] / sums
        losses.append((sums / sums.mean() * cost).mean())
    if not losses:
        return codes.sum() * 0
    return temperature / BASE_TEMPERATURE * torch.stack(losses).mean()
