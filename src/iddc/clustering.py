"""Spherical k-means: find the directions around which vectors gather.

Dhillon and Modha, 2001: vectors and centroids have length 1, and closeness is their cosine, the
affinity of Sec. 3.2. Seeds are k-means++ (Arthur and Vassilvitskii, 2007).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from iddc.config import Frozen
from iddc.errors import DataError, NumericError

_RESOLUTION = 1e-6
"""Two vectors with 1 - cosine below this are one: float32 cannot tell them apart."""
_ROWS = 8192
"""Vectors compared with the centroids at once: their cosines to 1000 centroids are 33 MB."""


class KMeansConfig(Frozen):
    """How much work k-means does. The number of clusters and the seed are the experiment's."""

    max_vectors: int = Field(200_000, ge=2, le=2**24)
    """How many pixel embeddings are clustered, drawn in equal shares from the images."""
    restarts: int = Field(3, ge=1)
    """Independent seedings; the one that ends with the lowest inertia is kept."""
    max_iterations: int = Field(100, ge=1)
    """The most updates of the centroids in one restart."""
    tolerance: float = Field(1e-4, ge=0, lt=1)
    """A restart ends when an update lowers the inertia by less than this share of it."""


@dataclass(frozen=True)
class Clustering:
    """The result of k-means."""

    centroids: Float[Tensor, "k d"]
    """The centre of each cluster, of length 1."""
    inertia: float
    """The mean of 1 - cosine between a vector and its nearest centroid, in [0, 2]."""
    iterations: int
    """How many times the centroids of this restart were updated."""


def spherical_kmeans(
    vectors: Float[Tensor, "n d"],
    num_clusters: int,
    config: KMeansConfig = KMeansConfig(),  # noqa: B008  (frozen)
    *,
    seed: int = 0,
) -> Clustering:
    """Find the directions around which vectors gather.

    The length of a vector does not count. A cluster that loses all its vectors starts again at
    the vector farthest from its own centroid. The same seed on the same device gives the same
    result.

    Raises:
        NumericError: A vector is not finite.
        DataError: There are fewer distinct directions than clusters.
    """
    if not vectors.isfinite().all():
        raise NumericError(
            "Expected finite embeddings, found NaN or infinity. Check the backbone's weights, or "
            "set training.precision to fp32 in a --config."
        )
    if len(vectors) < num_clusters:
        raise _too_few(len(vectors), num_clusters)
    vectors = normalize(vectors.float(), dim=1)
    generator = torch.Generator(vectors.device).manual_seed(seed)
    results = (
        _lloyd(vectors, _seeds(vectors, num_clusters, generator), config)
        for _ in range(config.restarts)
    )
    return min(results, key=lambda result: result.inertia)


def _seeds(
    vectors: Float[Tensor, "n d"], num_clusters: int, generator: torch.Generator
) -> Float[Tensor, "k d"]:
    """Draw vectors far from each other: greedy k-means++, the best of a few draws at a time."""
    num_vectors, trials = len(vectors), 2 + int(math.log(num_clusters))
    # One tensor: thousands of small ones between the large ones of a CPU's heap keep it from ever
    # being used again.
    seeds = torch.zeros(num_clusters, dtype=torch.long, device=vectors.device)
    seeds[:1] = torch.randint(num_vectors, (1,), generator=generator, device=vectors.device)
    distance = _distance(vectors, seeds[:1])[:, 0]
    for found in range(1, num_clusters):
        if not distance.any():
            raise _too_few(found, num_clusters)
        drawn = distance.multinomial(trials, replacement=True, generator=generator)
        distances = torch.minimum(distance[:, None], _distance(vectors, drawn))
        best = distances.sum(0).argmin()
        seeds[found] = drawn[best]
        distance = distances[:, best]
    return vectors[seeds]


def _too_few(found: int, num_clusters: int) -> DataError:
    return DataError(
        f"Expected at least {num_clusters} distinct embeddings, one for each cluster, found "
        f"{found}. Ask for fewer clusters or give more varied images."
    )


def _distance(vectors: Float[Tensor, "n d"], indices: Tensor) -> Float[Tensor, "n m"]:
    """1 - cosine to the vectors of these indices, half the squared distance; 0 for the same."""
    distance = 1 - vectors @ vectors[indices].T
    return distance.where(distance > _RESOLUTION, 0)


def _lloyd(
    vectors: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"], config: KMeansConfig
) -> Clustering:
    """Move centroids to the mean directions of their vectors until that changes little."""
    cosine, sums, sizes = _assign(vectors, centroids)
    previous, inertia, iterations = math.inf, _inertia(cosine), 0
    while iterations < config.max_iterations and inertia < (1 - config.tolerance) * previous:
        centroids = _update(vectors, cosine, sums, sizes)
        cosine, sums, sizes = _assign(vectors, centroids)
        previous, inertia, iterations = inertia, _inertia(cosine), iterations + 1
    return Clustering(centroids, inertia, iterations)


def _inertia(cosine: Float[Tensor, " n"]) -> float:
    return float((1 - cosine).clamp(min=0).mean())


def _assign(
    vectors: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Give each vector to its nearest centroid: their cosine, and each cluster's sum and size."""
    sums, sizes = torch.zeros_like(centroids), centroids.new_zeros(len(centroids))
    cosines = []
    for block in torch.split(vectors, _ROWS):
        cosine, nearest = (block @ centroids.T).max(dim=1)
        # A product instead of index_add_, whose order of addition on a GPU is not fixed.
        members = one_hot(nearest, len(centroids)).to(block.dtype)
        sums += members.T @ block
        sizes += members.sum(0)
        cosines.append(cosine)
    return torch.cat(cosines), sums, sizes


def _update(
    vectors: Float[Tensor, "n d"],
    cosine: Float[Tensor, " n"],
    sums: Float[Tensor, "k d"],
    sizes: Float[Tensor, " k"],
) -> Float[Tensor, "k d"]:
    """The mean direction of each cluster; for an empty one, the vector farthest from its own."""
    centroids = normalize(sums, dim=1)
    empty = sizes == 0
    farthest = cosine.topk(int(empty.sum()), largest=False).indices
    centroids[empty] = vectors[farthest]
    return centroids
