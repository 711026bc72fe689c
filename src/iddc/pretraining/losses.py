"""The losses of both methods, each a function of the images of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from iddc.processes import Processes


@dataclass(frozen=True)
class GlobalBatch:
    """The images of all processes in a step: process i has `counts[i]` of them."""

    processes: Processes
    counts: Sequence[int]
    step: int = 0

    @property
    def share(self) -> float:
        """The part of this process."""
        return self.counts[self.processes.rank] / sum(self.counts)

    def loss(
        self, function: Callable[[Tensor], Tensor], rows: Float[Tensor, "b *rest"]
    ) -> Float[Tensor, ""]:
        """This process's part of a loss that compares the images of all processes.

        The parts add up to the loss, and their gradients to its gradient. It is computed in single
        precision, also under autocast.

        Args:
            function: The loss of the rows of all images; it has no parameters.
            rows: What this process computed, one row per image.
        """
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.float()
            if self.processes.size == 1:
                return function(rows)
            every = self.processes.gather(rows.detach(), self.counts).requires_grad_()
            value = function(every)
            (gradient,) = torch.autograd.grad(value, every)
        own = self.processes.local(gradient, self.counts)
        return value.detach() / self.processes.size + ((rows - rows.detach()) * own).sum()

    def mean(self, rows: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
        """The mean of the rows of all processes, however many each has."""
        sums = torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
        total = self.processes.gather(sums[None], [1] * self.processes.size).sum(0)
        return total[:-1] / total[-1]

    def sinkhorn(self, logits: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
        """`sinkhorn` over the rows of all processes."""
        counts = [row[0] for row in self.processes.exchange([len(logits)])]
        return self.processes.local(sinkhorn(self.processes.gather(logits, counts)), counts)


def nt_xent(embeddings: Float[Tensor, "n 2 d"], temperature: float) -> Float[Tensor, ""]:
    """Tell the other crop of an image from all crops of all images (SimCLR, Eq. 1)."""
    rows = normalize(embeddings, dim=-1).flatten(0, 1)
    logits = rows @ rows.T / temperature
    logits.fill_diagonal_(float("-inf"))
    partner = torch.arange(len(rows), device=rows.device) ^ 1
    return functional.cross_entropy(logits, partner)


def point_nce(embeddings: Float[Tensor, "n 2 p d"], temperature: float) -> Float[Tensor, ""]:
    """Tell a point, seen in the other crop, from the points of all other images, both ways.

    Other points of the same image are no negatives: they may show the same thing.
    """
    images, points = len(embeddings), embeddings.shape[2]
    first, second = normalize(embeddings, dim=-1).transpose(0, 1).flatten(1, 2)
    logits = first @ second.T / temperature
    image = torch.arange(images, device=logits.device).repeat_interleave(points)
    same = image[:, None] == image
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    own = torch.arange(len(logits), device=logits.device)
    ways = (functional.cross_entropy(way, own) for way in (logits, logits.T))
    return torch.stack([*ways]).mean()


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "m k"], iterations: int = 3) -> Float[Tensor, "m k"]:
    """Probabilities that use all k clusters about equally (Sinkhorn-Knopp; SwAV, Eq. 3)."""
    probs = (logits - logits.max()).exp()
    for _ in range(iterations):
        probs = probs / (probs.sum(0) + 1e-9)
        probs = probs / (probs.sum(1, keepdim=True) + 1e-9)
    return probs


def cross_view_entropy(
    targets: Float[Tensor, "b 2 k"], log_probs: Float[Tensor, "b v k"]
) -> Float[Tensor, ""]:
    """Predict the teacher's view of a global crop from every other crop (DINO, Eq. 3).

    The mean over images and pairs of crops. The first two of the v crops are the global ones.
    """
    pairs = torch.einsum("bik,bjk->", targets, log_probs)
    same = (targets * log_probs[:, :2]).sum()
    return (same - pairs) / (len(targets) * 2 * (log_probs.shape[1] - 1))


def masked_entropy(
    targets: Float[Tensor, "m k"], log_probs: Float[Tensor, "m k"], hidden: Bool[Tensor, "c p"]
) -> Float[Tensor, ""]:
    """Predict the teacher's view of masked patches (iBOT, Sec. 3.1).

    Args:
        targets: The teacher's probabilities for each of the m masked patches.
        log_probs: The student's.
        hidden: Which patches of which crop they are.

    Returns:
        The sum over crops of the mean over their masked patches.
    """
    crop = hidden.nonzero()[:, 0]
    return -((targets * log_probs).sum(1) / hidden.sum(1)[crop]).sum()


def koleo(tokens: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Push each image away from its nearest neighbour: KoLeo (Sablayrolles et al., 2019)."""
    tokens = normalize(tokens, dim=1)
    cosines = (tokens @ tokens.T).fill_diagonal_(-1)
    distances: Tensor = (tokens - tokens[cosines.argmax(1)]).norm(dim=1)
    return -(distances + 1e-8).log().mean()
