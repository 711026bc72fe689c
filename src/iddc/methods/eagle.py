"""EAGLE: objects from the eigenvectors of each image's graph of codes, contrasted across the batch.

Kim et al., *EAGLE: eigen aggregation learning for object-centric unsupervised semantic
segmentation*, CVPR 2024. With codes z and z~ of two views of an image, F and S the cosines of
embeddings and of codes, F' as in STEGO, and the shifts

    b = |<F> - <S> - beta| between both views,     b = 3.5 (<F> + <S> - beta) to random images,
    l(b) = -mean((F' - b) min(max(S, 0), 0.8))

Each image's graph W = [z z^T]+ / max + 1 has the Laplacian I - D^-1/2 W D^-1/2; of its eigenvectors
the second to the fourth describe each patch. The nearest of some centroids of these descriptions
is the patch's label y. The prototype of a label is the medoid of its projected codes p in the
batch, and with weights w_i = mean_j u_i . n(u_j)

    l_object = (0.3 mean(w CE(p . prototypes / 0.07, y)) + 0.7 the same with the other view's p) / 2
    L = (1 - q) (w_pos l_pos + w_neg l_neg) + 0.85 q (l_object + the other view's) + probes

with q = 0 at first. Left out: keys of the last three blocks (embeddings here), colours in W (there
divided by 255 twice, so that all are alike: the 1), the dropout, and clusters beyond K. There the
views are a blurred neighbour and itself; here two crops of the image, in which patches are matched
by where they are. Eigenvectors are of codes pooled to 14 x 14.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize

from iddc.config import Experiment, Frozen
from iddc.methods.alignment import aligned
from iddc.methods.correspondence import attraction, probe_loss
from iddc.methods.method import Batch, Group, Images, Method, Rows
from iddc.network import Codes
from iddc.views import draw_patches, draw_rolls

GRID = 14
"""The most rows and columns of the grid whose eigenvectors are found."""
CEILING = 0.8
"""The cosine of codes above which they attract each other no further."""
TEMPERATURE = 0.07
"""What the cosines to prototypes are divided by."""


class EagleConfig(Frozen):
    """The numbers of EAGLE. Defaults: the authors' for COCO-Stuff-27 and ViT-S/8."""

    positive_weight: float = Field(0.25, ge=0)
    """w_pos, the weight of both views' correspondence."""
    negative_weight: float = Field(0.63, ge=0)
    """w_neg, the weight of the correspondence with random images."""
    beta: float = Field(0.0, ge=-2, le=2)
    """beta, a part of both shifts."""
    object_share: float = Field(0.9, ge=0, le=1)
    """q, the share of the object contrast in the loss after its start."""
    object_start: int = Field(200, ge=0)
    """The step from which objects are contrasted."""
    objects: int = Field(32, ge=2)
    """The number of centroids of eigenvector descriptions."""
    dim: int = Field(512, ge=2)
    """The length of a code."""
    patches: int = Field(121, ge=1)
    """How many patches of a crop, drawn anew in each step, correspond; 11 * 11 there."""
    negatives: int = Field(5, ge=1)
    """Random images an image is compared with; fewer if the batch is smaller."""
    steps: int = Field(10_000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(5e-4, gt=0)
    """The learning rate of the codes and the projector (Adam)."""
    probe_learning_rate: float = Field(5e-3, gt=0)
    """The learning rate of the clusters' centroids (Adam)."""
    eigen_learning_rate: float = Field(5e-5, gt=0)
    """The learning rate of the centroids of descriptions (Adam)."""


CITYSCAPES = EagleConfig(
    positive_weight=0.18,
    negative_weight=1.0,
    beta=0.11,
    object_share=0.7,
    object_start=380,
    objects=28,
    steps=6000,
    probe_learning_rate=3e-3,
    eigen_learning_rate=5e-4,
)
"""The authors' for Cityscapes and ViT-B/8, but for 28 * 28 positions and smoothed labels."""


class Eagle(Method):
    """Codes and their centroids; the projector and the centroids of descriptions are here."""

    name = "eagle"
    about = "EAGLE (Kim et al., 2024): objects from eigenvectors, contrasted across images."
    Config = EagleConfig
    heads = ("codes",)
    head: Codes
    options: EagleConfig

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.projector = nn.Linear(self.options.dim, self.options.dim)
        self.eigen = nn.Parameter(torch.randn(2, self.options.objects, 3))

    @classmethod
    def defaults(cls, experiment: Experiment) -> EagleConfig:
        """The numbers for the data set of a recipe."""
        return CITYSCAPES if experiment.recipe.startswith("cityscapes") else EagleConfig()

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """Codes of both views; on a coarser grid, what the object contrast needs of each view."""
        codes = self.head.codes(maps.flatten(0, 1))
        codes = codes.view(len(maps), 2, *codes.shape[1:])
        logits = self.head.cosines(codes[:, 0].detach()).flatten(2)[:, None]
        first, second = (self._view(maps, codes, images.boxes, view) for view in (0, 1))
        both = {name: torch.stack([first[name], second[name]], dim=1) for name in first}
        return {"codes": codes, "logits": logits, **both}

    def _view(self, maps: Tensor, codes: Tensor, boxes: Tensor, view: int) -> Rows:
        """Descriptions, labels, weights and both views' projected codes at a view's patches."""
        grid = min(GRID, maps.shape[3]), min(GRID, maps.shape[4])
        boxes = boxes if view == 0 else boxes.flip(1)
        moved, inside = aligned(codes[:, 1 - view], boxes)
        own, other = (
            adaptive_avg_pool2d(each, grid).flatten(2).mT for each in (codes[:, view], moved)
        )
        vectors = adaptive_avg_pool2d(maps[:, view], grid).flatten(2).mT
        known = adaptive_avg_pool2d(inside[:, None].to(maps), grid).flatten(1) == 1
        described = normalize(descriptions(own.detach()), dim=-1)
        cosines = described @ normalize(self.eigen[view], dim=1).T
        labels = cosines.argmax(dim=-1)
        return {
            "eigen": cosines,
            "labels": labels,
            "seen": known.long(),
            "weights": (vectors @ normalize(vectors, dim=-1).mean(dim=1)[..., None])[..., 0],
            "own": normalize(self.projector(own), dim=-1),
            "other": normalize(self.projector(other), dim=-1),
        }

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The correspondences, the object contrast and the probes."""
        options, codes = self.options, rows["codes"].flatten(3).mT
        features = batch.features.flatten(3).mT
        here, there = draw_patches(codes.shape[2], options.patches, batch.seed, batch.step)
        first, second = (
            [(features[:, view, at], codes[:, view, at]) for at in (here, there)] for view in (0, 1)
        )
        positive = correspondence(*second[0], *first[1], beta=options.beta, positive=True)
        each = []
        for roll in draw_rolls(batch.total, options.negatives, batch.seed, batch.step):
            others = (rows_.roll(roll, 0) for rows_ in first[1])
            each.append(correspondence(*first[0], *others, beta=options.beta, positive=False))
        negative = torch.stack(each).mean()
        names = ("own", "other", "labels", "seen", "weights")
        objects = [object_contrast(*(rows[n][:, v].flatten(0, 1) for n in names)) for v in (0, 1)]
        contrast = objects[0] + objects[1]
        probe = probe_loss(rows["logits"])
        eigen = -(rows["eigen"].softmax(dim=-1) * rows["eigen"]).sum(dim=-1).mean()
        share = options.object_share if batch.step >= options.object_start else 0.0
        pairs = options.positive_weight * positive + options.negative_weight * negative
        terms = {"positive": positive, "negative": negative, "objects": contrast}
        total = (1 - share) * pairs + share * 0.85 * contrast + probe + eigen
        return {"loss": total, **terms, "probe": probe, "eigen": eigen}

    def groups(self, progress: float) -> list[Group]:
        """The codes and the projector, and both kinds of centroids."""
        options, head = self.options, self.head
        return [
            Group([*head.mappings(), *self.projector.parameters()], options.learning_rate),
            Group([head.centroids], options.probe_learning_rate),
            Group([self.eigen], options.eigen_learning_rate),
        ]


def correspondence(
    features: Float[Tensor, "b n d"],
    codes: Float[Tensor, "b n c"],
    other_features: Float[Tensor, "b m d"],
    other_codes: Float[Tensor, "b m c"],
    *,
    beta: float,
    positive: bool,
) -> Float[Tensor, ""]:
    """Attract codes whose features are more alike than a shift, through which gradients flow."""
    likeness = normalize(codes, dim=-1) @ normalize(other_codes, dim=-1).mT
    affinity = normalize(features, dim=-1) @ normalize(other_features, dim=-1).mT
    mean, shift = affinity.mean().detach(), likeness.mean()
    shift = (mean - shift - beta).abs() if positive else 3.5 * (mean + shift - beta)
    pull = attraction(features, other_features, 0.0, "released") - shift
    return -(pull * likeness.clamp(0, CEILING)).mean()


def laplacian(
    codes: Float[Tensor, "*b n c"], colours: Float[Tensor, "*b n n"] | float = 1.0
) -> Float[Tensor, "*b n n"]:
    """The Laplacian of a graph whose edges are the positive products of codes, and of colours."""
    products = (codes @ codes.mT).relu()
    edges = products / products.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12) + colours
    degree = edges.sum(dim=-1)
    scale = torch.where(degree < 1e-12, 1.0, degree).rsqrt()
    identity = torch.eye(codes.shape[-2], dtype=codes.dtype, device=codes.device)
    return identity - scale[..., None] * edges * scale[..., None, :]


@torch.no_grad()
def descriptions(codes: Float[Tensor, "b n c"]) -> Float[Tensor, "b n 3"]:
    """The second to the fourth eigenvector of each image's graph.

    Where more than half of the entries of the first four are positive, all change their sign.
    """
    vectors = torch.linalg.eigh(laplacian(codes.float())).eigenvectors[..., :4]
    mostly = (vectors > 0).float().mean(dim=(-2, -1), keepdim=True) > 0.5
    return torch.where(mostly, -vectors, vectors)[..., 1:]


def object_contrast(
    codes: Float[Tensor, "n c"],
    others: Float[Tensor, "n c"],
    labels: Int64[Tensor, " n"],
    seen: Int64[Tensor, " n"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Contrast codes of length 1 of both views with the prototypes of all labels.

    Args:
        codes: Those of the view that has the labels.
        others: Those of the other view at the same patches.
        labels: The object of each patch.
        seen: 1 where the other view shows it, else 0.
        weights: What it counts.
    """
    present, wanted = torch.unique(labels, return_inverse=True)
    prototypes = torch.stack([codes[medoid(codes.detach(), labels == one)] for one in present])
    local, distant = (
        weights * cross_entropy(each @ prototypes.T / TEMPERATURE, wanted, reduction="none")
        for each in (codes, others)
    )
    return (0.3 * local.mean() + 0.7 * (distant * seen).sum() / seen.sum().clamp(min=1)) / 2


def medoid(codes: Float[Tensor, "n c"], members: Tensor) -> Int64[Tensor, ""]:
    """The index of the member with the smallest sum of distances to all members."""
    own = codes[members]
    return members.nonzero()[torch.cdist(own, own).sum(dim=1).argmin(), 0]
