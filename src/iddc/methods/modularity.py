"""Modularity: how many more edges of an image's graph lie inside of concepts than by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 4
"""One patch of each block of 4 x 4 stands for it in the modularity."""
CONCEPTS_AT_ONCE = 128
"""Concepts whose pairs of patches are in memory at once."""


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
    # In parts, as every concept has a matrix of all pairs; the largest needs no other one.
    together = torch.zeros_like(excess)
    for part in torch.split(likeness, CONCEPTS_AT_ONCE, dim=1):
        products = torch.einsum("ig,jg->gij", part, part)
        together = torch.maximum(together, (products / temperature).tanh().amax(dim=0))
    return -(excess * together).sum()


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
        with torch.enable_grad():
            losses = [modularity_loss(images[i], concepts, temperature) for i in chosen]
            loss = torch.stack(losses).mean()
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_([concepts], clip)
        optimizer.step()
        last = loss.item()
    return concepts.detach(), last
