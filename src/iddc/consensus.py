"""Clusters of any size: over-cluster many times, merge without regard to size, agree.

K-means cuts what is frequent and merges what is rare, since every vector counts alike. Here k-means
only finds many small groups. Average linkage (Sokal and Michener, 1958) then merges their centroids
by their mean distance alone, so that a rare group counts as much as a frequent one, and a large
group may grow larger. Several such groupings differ in what chance decides; two vectors that most
of them put together belong together (evidence accumulation, Fred and Jain, 2005). Ward's linkage
(1963) finds what they agree on.

A vector may have a weight. The method `consensus` gives the vector of n patches that share their
regions the weight sqrt(n), between one vote for each region and one for each patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from iddc.config import ConsensusConfig
from iddc.errors import NumericError, too_few

_ROWS = 8192
"""Vectors compared with all centroids at once: 1200 cosines each are 39 MB."""


@dataclass(frozen=True)
class Grouping:
    """One over-clustering, merged."""

    centroids: Float[Tensor, "p d"]
    """The centroids, of any length."""
    classes: Int64[Tensor, " p"]
    """The class of each centroid after merging."""
    num_classes: int
    """K."""

    def probs(self, vectors: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, "n k"]:
        """The probability of each class: the sum over its centroids, the nearest count most."""
        closeness = vectors @ self.centroids.T - self.centroids.square().sum(1) / 2
        return (closeness / temperature).softmax(1) @ self._members

    @cached_property
    def _members(self) -> Float[Tensor, "p k"]:
        return one_hot(self.classes, self.num_classes).float()


@dataclass(frozen=True)
class Consensus:
    """Several groupings, and the classes on which they agree."""

    groupings: tuple[Grouping, ...]
    """The groupings, whose classes are numbered independently."""
    centres: Float[Tensor, "k c"]
    """The mean code of each class, of length 1."""
    config: ConsensusConfig

    def codes(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """The square roots of all groupings' probabilities, over sqrt(M).

        The product of two codes is soft co-association: the mean over the groupings of the
        Bhattacharyya coefficient of their probabilities, in [0, 1].
        """
        return codes(self.groupings, vectors, self.config.temperature)

    def probs(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """The probabilities of the K classes."""
        cosine = normalize(self.codes(vectors), dim=1) @ self.centres.T
        return (cosine / self.config.class_temperature).softmax(1)

    def agreement(self, vectors: Float[Tensor, "n d"]) -> float:
        """The share of vectors that a grouping puts where the consensus does, in [0, 1].

        The classes of each grouping are matched one to one, so that most vectors agree; the result
        is the mean over the groupings. Low values mean that chance decides much at this K.
        """
        from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]  # no stubs

        k, own = len(self.centres), self.probs(vectors).argmax(1)
        shares = []
        for grouping in self.groupings:
            other = grouping.probs(vectors, self.config.temperature).argmax(1)
            table = torch.bincount(other * k + own, minlength=k * k).reshape(k, k).numpy()
            rows, columns = linear_sum_assignment(table, maximize=True)
            shares.append(table[rows, columns].sum() / len(vectors))
        return float(np.mean(shares))


def fit_consensus(
    vectors: Float[Tensor, "n d"],
    num_clusters: int,
    config: ConsensusConfig = ConsensusConfig(),  # noqa: B008  (frozen)
    *,
    weights: Float[Tensor, " n"] | None = None,
    seed: int = 0,
) -> Consensus:
    """Find classes of any size. The same seed gives the same result.

    Args:
        vectors: Embeddings about their mean, of length about 1, on the CPU.
        num_clusters: K.
        config: The numbers.
        weights: How much each vector counts in the over-clusterings, above 0; all 1 if not given.
        seed: What is drawn follows from it.

    Raises:
        NumericError: A vector is not finite.
        DataError: There are fewer distinct groups than clusters. It says how many.
    """
    found = fit_each(vectors, (num_clusters,), config, weights=weights, seed=seed)
    return found[num_clusters]


def fit_each(
    vectors: Float[Tensor, "n d"],
    clusters: Sequence[int],
    config: ConsensusConfig = ConsensusConfig(),  # noqa: B008  (frozen)
    *,
    weights: Float[Tensor, " n"] | None = None,
    seed: int = 0,
) -> dict[int, Consensus]:
    """Find classes of any size for several K. The over-clusterings are the same for all of them.

    Args:
        vectors: As for `fit_consensus`.
        clusters: The values of K.
        config: The numbers.
        weights: As for `fit_consensus`.
        seed: What is drawn follows from it.

    Raises:
        NumericError, DataError: See `fit_consensus`.
    """
    if not vectors.isfinite().all():
        raise NumericError(
            "Expected finite embeddings, found NaN or infinity. Check the backbone's weights, or "
            "set training.precision to fp32 in a --config."
        )
    generator = torch.Generator().manual_seed(seed)
    most = max(config.prototypes, 2 * max(clusters))
    weights = vectors.new_ones(len(vectors)) if weights is None else weights
    divided = []
    for _ in range(config.groupings):
        drawn = torch.randperm(len(vectors), generator=generator)[: config.vectors]
        divided.append(over_cluster(vectors[drawn], weights[drawn], most, config.iterations))
    return {k: _agreed(divided, k, config) for k in clusters}


def _agreed(
    divided: Sequence[Float[Tensor, "_ d"]], num_clusters: int, config: ConsensusConfig
) -> Consensus:
    """Merge every over-clustering into K classes, and find those on which they agree."""
    groupings = [
        Grouping(centroids, merge(centroids, num_clusters, "average"), num_clusters)
        for centroids in divided
    ]
    # Every centroid is one vote on what belongs together, whatever the number of its patches.
    rows = codes(groupings, torch.cat([one.centroids for one in groupings]), config.temperature)
    members = one_hot(merge(rows, num_clusters, "ward"), num_clusters).float()
    return Consensus(tuple(groupings), normalize(members.T @ rows, dim=1), config)


def over_cluster(
    vectors: Float[Tensor, "n d"], weights: Float[Tensor, " n"], most: int, iterations: int
) -> Float[Tensor, "p d"]:
    """Centroids of weighted k-means, begun at the first distinct vectors; empty ones are dropped.

    The centroid of a group is sum(w x) / sum(w). Weights do not move a vector to another group.
    """
    centroids = _distinct(vectors[: 4 * most])[:most]
    weighted = vectors * weights[:, None]
    for _ in range(iterations):
        sums, sizes = torch.zeros_like(centroids), vectors.new_zeros(len(centroids))
        bias = centroids.square().sum(1) / 2
        for block, rows, share in zip(
            *(torch.split(each, _ROWS) for each in (vectors, weighted, weights)), strict=True
        ):
            nearest = (block @ centroids.T - bias).argmax(1)
            sums.index_add_(0, nearest, rows)
            sizes.index_add_(0, nearest, share)
        centroids = sums[sizes > 0] / sizes[sizes > 0, None]
    return centroids


def merge(
    vectors: Float[Tensor, "n d"], num_clusters: int, method: Literal["average", "ward"]
) -> Int64[Tensor, " n"]:
    """A linkage of a few vectors of weight 1 each, cut into K groups.

    Average linkage merges the two groups with the smallest mean distance between their vectors.
    Ward's merges those whose union adds least to the squares, so it keeps groups of many apart.

    Raises:
        DataError: There are fewer distinct vectors than clusters. It says how many.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    found = len(_distinct(vectors))
    if found < num_clusters:
        raise too_few(found, "distinct group", num_clusters)
    tree = linkage(vectors.double().numpy(), method)
    ids: np.ndarray = fcluster(tree, num_clusters, "maxclust")
    return torch.from_numpy(ids.astype(np.int64)) - 1


def codes(
    groupings: Sequence[Grouping], vectors: Float[Tensor, "n d"], temperature: float
) -> Float[Tensor, "n c"]:
    """The code of each vector, of length 1: see `Consensus.codes`."""
    blocks = []
    for block in torch.split(vectors, _ROWS):
        parts = [grouping.probs(block, temperature).sqrt() for grouping in groupings]
        blocks.append(torch.cat(parts, 1) / math.sqrt(len(parts)))
    return torch.cat(blocks)


def _distinct(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """The first of every set of vectors that are one to six digits, in their order."""
    rounded = (vectors * 1e6).round().long().numpy()
    first = np.unique(rounded, axis=0, return_index=True)[1]
    return vectors[torch.from_numpy(np.sort(first))]
