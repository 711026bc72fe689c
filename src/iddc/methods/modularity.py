"""Modularity: how many more edges of an image's graph lie inside of concepts than by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 4
"""One patch of each block of 4 x 4 stands for it in the modularity."""


def edges_above_chance(affinity: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """What each edge has more than by chance, over the sum e of all: (A_ij - d_i d_j / e) / e.

    With the degrees d_i = sum_j A_ij they sum to 0.

    Args:
        affinity: The weights of edges, symmetric and not negative.
    """
    degree = affinity.sum(dim=-1)
    total = degree.sum(dim=-1).clamp(min=1e-12)[..., None, None]
    return (affinity - degree[..., :, None] * degree[..., None, :] / total) / total


def modularity_loss(
    vectors: Float[Tensor, "n d"], concepts: Float[Tensor, "g d"], temperature: float
) -> Float[Tensor, ""]:
    """Less the modularity of an image's patches under soft concepts, in [-1, 1]."""
    directions = normalize(vectors, dim=1)
    excess = edges_above_chance((directions @ directions.T).relu().fill_diagonal_(0))
    likeness = (directions @ normalize(concepts, dim=1).T).relu()
    # As tanh rises, the concept of the largest product is all that a pair needs.
    own = likeness.gather(1, _shared_concepts(likeness.detach()))
    together = (own * own.T / temperature).tanh()
    return -(excess * together).sum()


def _shared_concepts(likeness: Float[Tensor, "n g"]) -> Int64[Tensor, "n n"]:
    """The concept with the largest product of both patches' likeness, for each pair of patches."""
    best = torch.zeros(len(likeness), len(likeness), dtype=torch.int64, device=likeness.device)
    for patch, row in enumerate(likeness):  # not all at once: each concept has all pairs
        best[patch, patch:] = (row * likeness[patch:]).argmax(dim=1)
    return torch.maximum(best, best.T)


def one_of_each_block(
    maps: Float[Tensor, "d h w"], rng: np.random.Generator
) -> Float[Tensor, "n d"]:
    """One patch, drawn at random, of each whole block of a grid; all of a grid without any."""
    height, width = (side - side % BLOCK for side in maps.shape[1:])
    if not height * width:
        return maps.flatten(1).T.float()
    rows, columns = np.mgrid[:height:BLOCK, :width:BLOCK]
    rows = rows + rng.integers(BLOCK, size=rows.shape)
    columns = columns + rng.integers(BLOCK, size=columns.shape)
    return maps[:, torch.from_numpy(rows), torch.from_numpy(columns)].flatten(1).T.float()


def fit_concepts(
    concepts: Float[Tensor, "g d"],
    images: Sequence[Float[Tensor, "n d"]],
    rates: Sequence[float],
    rng: np.random.Generator,
    *,
    batch_size: int,
    steps: int,
    clip: float,
    temperature: float,
) -> tuple[Float[Tensor, "g d"], float]:
    """Maximise the modularity of images, a batch at a time.

    Args:
        concepts: Where they start.
        images: The patches of each image.
        rates: Learning rates of Adam, for equal parts of the steps.
        rng: What draws the order of the images.
        batch_size: Images in a batch.
        steps: How many batches, at least one pass over the images.
        clip: The largest norm of the gradient.
        temperature: That of the modularity.

    Returns:
        The concepts, and the loss of the last batch.
    """
    concepts = concepts.clone().requires_grad_()
    optimizer = torch.optim.Adam([concepts])
    batches = max(-(-len(images) // batch_size), steps)
    last = 0.0
    order: list[int] = []
    for step in range(batches):
        optimizer.param_groups[0]["lr"] = rates[step * len(rates) // batches]
        if len(order) < batch_size:
            order += rng.permutation(len(images)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        last = 0.0
        for image in chosen:  # one after the other, as each has a graph of all pairs of patches
            with torch.enable_grad():
                loss = modularity_loss(images[image], concepts, temperature) / len(chosen)
                torch.autograd.backward(loss)
            last += loss.item()
        torch.nn.utils.clip_grad_norm_([concepts], clip)
        optimizer.step()
    return concepts.detach(), last
