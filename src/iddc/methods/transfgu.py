"""TransFGU: classes of a ViT's class tokens are found in images by attention, and segmented.

Yin et al., *TransFGU: a top-down approach to fine-grained unsupervised semantic segmentation*,
ECCV 2022. In three stages:

1. k-means groups the class tokens of square windows of all images: K centroids c_k.
2. Each image gets K maps. With the class token's attention a to each patch, over its maximum, and
   g_k the slope of 1 - cos(token, c_k) by the attention: a + max(-g_k, 0), of which the second part
   counts where the top 80 % of its mass are, and 0 where g_k > 0.
3. A segmenter (`decoders.MaskTransformer`) learns from Q, these maps in a crop, brought to [0, 1]
   over all classes; from the second round on the mean of Q and a teacher's probabilities. With
   y = argmax Q and y' = argmax of Q with classes permuted at random,

       L = CE(s, y) - alpha CE(s, y') + 0.3 mean(1 - (p1 - p2)) + mean_kl(1 + cos(t_k, t_l))

   p1 and p2 are the largest probabilities of a patch, t_k the class outputs, alpha grows from 0.03
   to 0.1 in a round and is 0 in the first. Steps with L <= 0 change nothing. At each further round
   the segmenter becomes the teacher and starts again from its first weights.

It needs a ViT with a class token. Left out: the split of windows into things and stuff by known
numbers of classes; colour jitter; the clamp of gradients. There maps are of images squashed to 320
pixels, and 8 of them share one gradient (`shared`); here of images at working size, one by one. The
maps of a collection are in memory: K numbers of 2 bytes for each patch of each image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import Experiment, Frozen
from iddc.decoders import MaskTransformer
from iddc.methods.alignment import at_patches, stacked
from iddc.methods.mdc import spaced
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows

_PERMUTATION = 0
"""The stream of random numbers of a step."""
UNCERTAIN_WEIGHT = 0.3
"""The weight of the term that asks for sure patches."""
WINDOW_SIDES = (0.5, 0.4, 0.3, 0.2)
"""The sides of windows, as parts of the shorter side; they step by half of their side."""
ALPHA = (0.03, 0.1)
"""alpha at the start and at the end of a round with a teacher."""


class TransfguConfig(Frozen):
    """The numbers of TransFGU. Defaults: the authors' for COCO-Stuff-27, steps and rounds ours."""

    window_size: int = Field(320, ge=16)
    """The side that windows are resized to, in pixels."""
    window_images: int = Field(1000, ge=1)
    """The most images of which windows are seen, spread evenly; all of them there."""
    mass: float = Field(0.8, gt=0, le=1)
    """The part of the mass of slopes that counts."""
    shared: int = Field(8, ge=1)
    """What slopes are divided by: the images of a batch there."""
    rounds: int = Field(3, ge=1)
    """How often the segmenter starts, the first time without a teacher."""
    steps: int = Field(2000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; 256 there."""
    learning_rate: float = Field(1e-4, gt=0)
    """The learning rate (Adam)."""
    weight_decay: float = Field(5e-4, ge=0)
    """The weight decay of matrices; biases and norms have none."""


class Transfgu(Method):
    """The segmenter; its teacher, its first weights and the maps of all images are here."""

    name = "transfgu"
    about = "TransFGU (Yin et al., 2022): classes of class tokens, found by attention. Needs a ViT."
    needs_class_token = True
    Config = TransfguConfig
    heads = ("mask-transformer",)
    head: MaskTransformer
    options: TransfguConfig
    maps: Tensor
    """The K maps of each image, "n h w k" float16, 0 beyond its size."""
    sizes: Int64[Tensor, "n 2"]
    """The height and width of each image's maps; 0 for one that cannot be read."""
    taught: Tensor
    """Whether there is a teacher."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.first = copy.deepcopy(self.head).requires_grad_(False)
        self.teacher = copy.deepcopy(self.first)
        self.register_buffer("maps", torch.zeros(0, 0, 0, 0, dtype=torch.float16))
        self.register_buffer("sizes", torch.zeros(0, 2, dtype=torch.int64))
        self.register_buffer("taught", torch.zeros((), dtype=torch.bool))

    def refits(self, epochs: int) -> Sequence[int]:
        """The start of each round."""
        return spaced(epochs, self.options.rounds)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """The first two stages before the first step; a new teacher before further rounds."""
        if epoch == 0:
            return self._maps(collection)
        if epoch in self.refits(epochs):
            self.teacher.load_state_dict(self.head.state_dict())
            self.head.load_state_dict(self.first.state_dict())
            self.taught.fill_(True)
        return {}

    def _maps(self, collection: Collection) -> dict[str, float]:
        """Find the centroids of windows, then the maps of all images."""
        options, clusters = self.options, self.experiment.num_clusters
        collection.note("clustering the class tokens of windows")
        tokens = []
        for _, _, pixels in collection.pictures(options.window_images):
            cut = windows(pixels, options.window_size)
            tokens.append(collection.attend(cut).token)
        rows = torch.cat(tokens) if tokens else torch.empty(0, 1)
        found = spherical_kmeans(rows, clusters, KMeansConfig(), seed=self.experiment.seed)
        collection.note(f"finding {clusters} classes in all images by attention")
        maps = {}
        for index, _, pixels in collection.pictures(2**31):
            seen = collection.attend(pixels[None], found.centroids)
            assert seen.slopes is not None
            scores = class_maps(seen.attention[0], seen.slopes[0] / options.shared, options.mass)
            maps[index] = scores.permute(1, 2, 0).half()
        self.maps, self.sizes = stacked(maps, 0)
        return {"windows": float(len(rows)), "inertia": found.inertia}

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The segmenter's logits of the first view, its class outputs, and the labels there."""
        first = maps[:, 0]
        patches, classes = self.head.tokens(first)
        stored = at_patches(self.maps, self.sizes, images, 0, first.shape[2:])
        scores = stored.flatten(1, 2).mT.to(first)
        with torch.no_grad():
            teacher = self.teacher(first).flatten(2) if self.taught else None
        labels = [
            pseudo_labels(each, None if teacher is None else teacher[i])
            for i, each in enumerate(scores)
        ]
        logits = self.head.logits_of(patches, classes)[:, None]
        return {"logits": logits, "classes": classes, "labels": torch.stack(labels)}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The four terms; without gradient where their sum is not positive."""
        logits, labels = rows["logits"][:, 0].mT.flatten(0, 1), rows["labels"].flatten()
        order = batch.rng(_PERMUTATION).permutation(logits.shape[1])
        alpha = self._alpha(batch.progress)
        category = category_loss(logits, labels, torch.from_numpy(order), alpha)
        sure, apart = uncertainty(logits), likeness(rows["classes"])
        total = category + UNCERTAIN_WEIGHT * sure + apart
        total = torch.where(total > 0, total, total.detach())
        return {"loss": total, "category": category, "uncertainty": sure, "likeness": apart}

    def _alpha(self, progress: float) -> float:
        """What the wrong labels weigh."""
        low, high = ALPHA
        return low + (high - low) * (progress * self.options.rounds % 1) if self.taught else 0.0

    def groups(self, progress: float) -> list[Group]:
        """The segmenter."""
        options, learned = self.options, [*self.head.parameters()]
        matrices, others = ([p for p in learned if (p.ndim > 1) == many] for many in (True, False))
        rate = options.learning_rate
        return [Group(matrices, rate, options.weight_decay), Group(others, rate)]


def windows(pixels: UInt8[Tensor, "3 H W"], size: int) -> UInt8[Tensor, "m 3 S S"]:
    """Square windows of an image, which overlap by half, all resized to one side."""
    short, found = min(pixels.shape[1:]), []
    for part in WINDOW_SIDES:
        side = max(1, round(part * short))
        step = max(1, side // 2)
        for top in range(0, pixels.shape[1] - side + 1, step):
            for left in range(0, pixels.shape[2] - side + 1, step):
                cut = pixels[None, :, top : top + side, left : left + side].float()
                found.append(interpolate(cut, (size, size), mode="bilinear"))
    return torch.cat(found).round().to(torch.uint8)


def class_maps(
    attention: Float[Tensor, "h w"], slopes: Float[Tensor, "k h w"], mass: float
) -> Float[Tensor, "k h w"]:
    """How much each patch is of each class: attention, and where more brings the class nearer.

    Args:
        attention: That of the class token to the patches.
        slopes: How the distance to each class changes with it.
        mass: The part of the mass of falling slopes that counts, the steepest first.
    """
    falling = (-slopes).relu().flatten(1)
    ordered, order = falling.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    kept = torch.zeros_like(falling, dtype=torch.bool)
    kept.scatter_(1, order, before < mass * falling.sum(dim=1, keepdim=True))
    relevant = (falling * kept).view_as(slopes)
    scores = attention / attention.max().clamp(min=1e-12) + relevant
    return scores.masked_fill(slopes > 0, 0)


def pseudo_labels(
    scores: Float[Tensor, "k n"], teacher: Float[Tensor, "k n"] | None
) -> Int64[Tensor, " n"]:
    """The class of each patch: that of the largest Q.

    Args:
        scores: The maps of an image, brought to [0, 1] over all classes and patches.
        teacher: A teacher's logits, whose probabilities are averaged with them.
    """
    low, high = scores.min(), scores.max()
    found = (scores - low) / (high - low).clamp(min=1e-12)
    if teacher is not None:
        found = (found + teacher.softmax(dim=0)) / 2
    return found.argmax(dim=0)


def category_loss(
    logits: Float[Tensor, "n k"],
    labels: Int64[Tensor, " n"],
    permutation: Int64[Tensor, " k"],
    alpha: float,
) -> Float[Tensor, ""]:
    """Ask for the labels, against wrong ones: class k of their map is class permutation[k] of Q."""
    loss = cross_entropy(logits, labels)
    if alpha:
        loss = loss - alpha * cross_entropy(logits, permutation.argsort().to(labels)[labels])
    return loss


def uncertainty(logits: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """One less the mean distance of the two largest probabilities of a patch."""
    first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return 1 - (first - second).mean()


def likeness(classes: Float[Tensor, "b k d"]) -> Float[Tensor, ""]:
    """The mean of 1 + cos over the pairs of an image's class outputs."""
    directions = normalize(classes, dim=-1)
    number = classes.shape[1]
    pairs = torch.triu_indices(number, number, offset=1, device=classes.device)
    return 1 + (directions @ directions.mT)[:, pairs[0], pairs[1]].mean()
