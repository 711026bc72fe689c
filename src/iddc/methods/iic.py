"""IIC for segmentation: the mutual information of clusters in two views of the same patch.

Ji et al., *Invariant information clustering*, ICCV 2019. With p(x) the cluster probabilities of a
patch and p'(x + t) those of a patch at the displacement t in the other view, over all images,

    P_kl = sum p_k(x) p'_l(x + t),  made to sum to 1 and symmetric;   r_k = sum_l P_kl
    L = mean over t of  -sum_kl P_kl (log P_kl - lambda log r_k - lambda log r_l)

which is less the mutual information where lambda is 1. A second layer with more clusters learns the
same beside the first from shared features. There a network learns from colours; here a head learns
from frozen embeddings, both layers in one step. The release's mask of labelled pixels is replaced
by the overlap of the two crops, which are aligned by where they lie in the image.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from iddc.config import Experiment, Frozen
from iddc.methods.alignment import aligned
from iddc.methods.method import Batch, Group, Images, Method, Rows
from iddc.network import ConvHead

SMALLEST = 2.2e-16
"""What a probability of a pair of clusters is at least before the logarithm."""


class IicConfig(Frozen):
    """The numbers of IIC. Defaults: COCO-Stuff of the authors' code, steps and rate ours."""

    displacement: int = Field(1, ge=0)
    """h, the largest displacement in patches; 10 pixels there."""
    over_clusters: int = Field(3, ge=1)
    """How many times as many clusters the second layer has."""
    entropy_weight: float = Field(1.0, ge=1)
    """lambda of the final clusters, above 1 an extra weight of their entropy."""
    steps: int = Field(2000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(32, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(5e-4, gt=0)
    """The learning rate (Adam)."""


class Iic(Method):
    """A convolutional head, and a second last layer with more clusters."""

    name = "iic"
    about = "IIC (Ji et al., 2019): clusters that two views of a patch say the most of each other."
    Config = IicConfig
    heads = ("conv",)
    head: ConvHead
    options: IicConfig

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        last: Any = self.head[-1]
        number = self.options.over_clusters * experiment.num_clusters
        self.over = nn.Conv2d(last.in_channels, number, 1)

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The probabilities of both layers in both views, the second at the first one's patches."""
        hidden = maps.flatten(0, 1)
        for layer in list(self.head)[:-1]:
            hidden = layer(hidden)
        rows: Rows = {}
        for name, layer in (("final", self.head[-1]), ("over", self.over)):
            logits = layer(hidden).unflatten(0, maps.shape[:2])
            first, second = logits.softmax(dim=2).unbind(dim=1)
            other, inside = aligned(second, images.boxes)
            rows[name] = torch.stack([first * inside[:, None], other], dim=1)
            if name == "final":
                rows["logits"] = logits.flatten(3).detach()
        return rows

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The loss of both layers."""
        options = self.options
        final, over = (
            information_loss(rows[name][:, 0], rows[name][:, 1], options.displacement, weight)
            for name, weight in (("final", options.entropy_weight), ("over", 1.0))
        )
        return {"loss": final + over, "final": final, "over": over}

    def groups(self, progress: float) -> list[Group]:
        """The head and the second layer."""
        return [
            Group([*self.head.parameters(), *self.over.parameters()], self.options.learning_rate)
        ]


def information_loss(
    probs: Float[Tensor, "b k h w"],
    others: Float[Tensor, "b k h w"],
    displacement: int,
    entropy_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Less the mutual information of two maps of probabilities, the mean over displacements.

    Args:
        probs: Probabilities of each patch, zero where a patch does not count.
        others: Those of the other view at the same places.
        displacement: h: displacements on both axes are -h..h.
        entropy_weight: lambda.

    Returns:
        The loss, in [-log K, 0] for lambda 1.
    """
    reach, (height, width) = displacement, probs.shape[2:]
    wide = pad(others, (reach,) * 4)
    losses = []
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            moved = wide[:, :, down : down + height, across : across + width]
            joint = torch.einsum("bkhw,blhw->kl", probs, moved)
            joint = joint / joint.sum().clamp(min=SMALLEST)
            joint = (joint + joint.T) / 2
            marginal = joint.sum(dim=1).clamp(min=SMALLEST).log()
            log = joint.clamp(min=SMALLEST).log()
            log = log - entropy_weight * (marginal[:, None] + marginal)
            losses.append(-(joint * log).sum())
    return torch.stack(losses).mean()
