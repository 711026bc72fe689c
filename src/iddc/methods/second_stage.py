"""Self-training: a student learns the labels that a first stage gave the training images.

As in U2Seg (Niu et al., CVPR 2024) and other second stages. A first method labels each patch of
each image, seen as a whole. Labels of which it is less sure than of a share of the patches of the
same cluster are dropped, as one threshold for all would starve rare clusters. The student sees
crops, so other context and scale, and learns with the logits s of both views and labels y

    L = mean(CE(s_i, y_i)) over the patches that have a label, 0 if there are none

A moving average of the student is what predicts. It gives the labels anew when a round begins.
Left out: the training of the backbone, the deeper decoder with its photometric augmentation, and
the average over windows and mirror images in the labels. The first stage is a method without steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from iddc.config import Experiment, Frozen
from iddc.methods import completed, find_method
from iddc.methods.alignment import at_patches, stacked
from iddc.methods.mdc import spaced
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.network import HEADS
from iddc.views import draw_patches

NONE = -1
"""The label of a patch that has none."""


class SecondStageConfig(Frozen):
    """The numbers of the second stage; all ours."""

    first: Literal["kmeans", "consensus"] = "kmeans"
    """The method of the first stage, with its usual numbers."""
    rounds: int = Field(2, ge=1)
    """How many times labels are made: by the first stage, then by the moving average."""
    dropped: float = Field(0.5, ge=0, lt=1)
    """The share of each cluster's patches whose labels are dropped, the least sure ones."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """The pace of the moving average; less in rounds below 5 / (1 - momentum) steps."""
    patches: int = Field(196, ge=2)
    """How many patches of a crop, drawn anew in each step, are learned."""
    steps: int = Field(2000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(1e-3, gt=0)
    """The learning rate of the student (Adam)."""


class SecondStage(Method):
    """The head is the moving average; the student is here."""

    name = "second-stage"
    about = "Self-training: a head learns the surer labels of a first method."
    Config = SecondStageConfig
    heads = ("conv", "linear")
    uses = frozenset({"training.precision", "objective.centering"})
    options: SecondStageConfig
    labels: Tensor
    """The label of each patch of each image, "n h w" int32, NONE for none and beyond its size."""
    sizes: Int64[Tensor, "n 2"]
    """The height and width of each image's labels; 0 for one that cannot be read."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.student = copy.deepcopy(self.head)
        self.head.requires_grad_(False)
        self.register_buffer("labels", torch.zeros(0, 0, 0, dtype=torch.int32))
        self.register_buffer("sizes", torch.zeros(0, 2, dtype=torch.int64))

    def refits(self, epochs: int) -> Sequence[int]:
        """The start of each round."""
        return spaced(epochs, self.options.rounds)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Label all images, by the first stage or by the moving average."""
        if epoch not in self.refits(epochs):
            return {}
        teacher = self.head if epoch else self._first_stage(collection)
        collection.note("labelling the images for the next round")
        found = dict(self._labelled(teacher, collection))
        sure = kept_labels(
            [labels for labels, _ in found.values()],
            [confidence for _, confidence in found.values()],
            self.options.dropped,
        )
        self.labels, self.sizes = stacked(dict(zip(found, sure, strict=True)), NONE)
        values = torch.cat([labels.flatten() for labels in sure])
        known = values[values != NONE]
        number = float(len(torch.unique(known)))
        return {"labelled": len(known) / len(values), "clusters": number}

    def _first_stage(self, collection: Collection) -> nn.Module:
        """The head of the first method, fitted to all images."""
        update: dict[str, Any] = {"method": self.options.first, "options": {}}
        experiment = completed(self.experiment.model_copy(update=update))
        kind = find_method(experiment.method)
        parameter = next(self.head.parameters())
        head = HEADS[experiment.head](parameter.shape[1], experiment.num_clusters)
        method = kind(head, experiment, kind.Config(**experiment.options)).to(parameter.device)
        method.refit(collection, 0, 0)
        return method.head

    @torch.no_grad()
    def _labelled(
        self, teacher: nn.Module, collection: Collection
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """The most probable cluster of each patch of each image, and its probability."""
        for index, maps in collection.maps():
            confidence, labels = teacher(maps[None].float())[0].softmax(dim=0).max(dim=0)
            yield index, (labels.to(torch.int32).cpu(), confidence.cpu())

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The student's logits of some patches of both views, and their labels."""
        grid = maps.shape[3:]
        patches = draw_patches(grid.numel(), self.options.patches, images.seed, images.step)
        logits, labels = [], []
        for view, here in enumerate(patches.to(maps.device)):
            logits.append(self.student(maps[:, view]).flatten(2)[:, :, here])
            stored = at_patches(self.labels, self.sizes, images, view, grid).flatten(1)
            labels.append(stored.long().to(maps.device)[:, here])
        return {"logits": torch.stack(logits, dim=1), "labels": torch.stack(labels, dim=1)}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The cross-entropy of the patches that have a label."""
        return {"loss": masked_cross_entropy(rows["logits"].mT, rows["labels"])}

    @torch.no_grad()
    def update(self, batch: Batch, rows: Rows) -> None:
        """Move the average towards the student."""
        steps = batch.steps / self.options.rounds
        momentum = min(self.options.momentum, max(0.0, 1 - 5 / steps))
        for slow, fast in zip(self.head.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)

    def groups(self, progress: float) -> list[Group]:
        """The student."""
        return [Group([*self.student.parameters()], self.options.learning_rate)]


def kept_labels(
    labels: Sequence[Tensor], confidences: Sequence[Tensor], dropped: float
) -> list[Tensor]:
    """The labels of some images, NONE where the first stage is less sure than usual.

    Args:
        labels: A map of clusters for each image.
        confidences: How sure the first stage is of each of them.
        dropped: The quantile of a cluster's confidences below which its labels are dropped.
    """
    clusters = torch.cat([each.flatten() for each in labels])
    values = torch.cat([each.flatten() for each in confidences])
    least = values.new_zeros(int(clusters.max()) + 1)
    for cluster in torch.unique(clusters).tolist():
        own = values[clusters == cluster].sort().values
        least[cluster] = own[min(int(dropped * len(own)), len(own) - 1)]
    return [
        torch.where(confidence < least[own.long()], NONE, own)
        for own, confidence in zip(labels, confidences, strict=True)
    ]


def masked_cross_entropy(
    logits: Float[Tensor, "*b k"], labels: Int64[Tensor, "*b"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the patches with a label; zero if there are none."""
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    known = wanted != NONE
    costs = cross_entropy(flat, wanted.clamp(min=0), reduction="none")
    return (costs * known).sum() / known.sum().clamp(min=1)
