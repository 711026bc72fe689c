"""k-means of colours and positions, without any network: the floor that every method must beat.

x = (red, green, blue, row, distance from the central column), each in [0, 1], of squares of 4
pixels. It minimises sum_i min_k |x_i - m_k|^2; the probability of a cluster is that of K normal
densities about the m_k, all of the variance that is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from iddc.config import Experiment, Frozen
from iddc.errors import too_few
from iddc.methods.method import Collection, Group, Method
from iddc.network import Means
from iddc.schedules import Plan

_LEAST_VARIANCE = 1e-6
"""A variance below that of one grey value of 255 would make probabilities of 0 and 1 alone."""


class PixelsConfig(Frozen):
    """The numbers of k-means without a network."""

    images: int = Field(600, ge=2)
    """The most images that are looked at, spread evenly over the collection."""
    vectors: int = Field(300, ge=1)
    """Squares that are drawn from each of these images."""
    restarts: int = Field(3, ge=1)
    """Independent beginnings; the one that ends nearest to its means is kept."""


class Pixels(Method):
    """Means of squares that are drawn from whole images."""

    name = "pixels"
    about = "k-means of colour, row and distance from the central column, without a network."
    Config = PixelsConfig
    heads = ("means",)
    uses = frozenset()
    backbone = "pixels"
    head: Means
    options: PixelsConfig

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """No steps."""
        return Plan(steps=0, steps_per_epoch=1)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float | int]:
        """Draw squares and find their means."""
        options, seed = self.options, self.experiment.seed
        rows = []
        for index, maps, _ in collection.pictures(options.images):
            every = maps[0].flatten(1).T.cpu().double().numpy()
            order = np.random.default_rng((seed, index)).permutation(len(every))
            rows.append(every[order[: options.vectors]])
        vectors = np.concatenate(rows)
        means, variance = kmeans(vectors, self.experiment.num_clusters, options.restarts, seed)
        with torch.no_grad():
            self.head.means.copy_(torch.from_numpy(means))
        self.head.variance.fill_(max(variance, _LEAST_VARIANCE))
        return {"vectors": len(vectors), "variance": variance}

    def groups(self, progress: float) -> Sequence[Group]:
        """Nothing learns by steps."""
        return []


def kmeans(
    vectors: Float[np.ndarray, "n d"], num_clusters: int, restarts: int, seed: int
) -> tuple[Float[np.ndarray, "k d"], float]:
    """The means of k-means, begun by k-means++, and the variance about them over all axes.

    Raises:
        DataError: There are fewer distinct vectors than clusters. It says how many.
    """
    from scipy.cluster.vq import kmeans2, vq

    distinct = len(np.unique(vectors.round(6), axis=0))
    if distinct < num_clusters:
        raise too_few(distinct, "distinct colour", num_clusters)
    found = []
    for restart in range(restarts):
        rng = np.random.default_rng((seed, restart))
        first = vectors[rng.integers(len(vectors), size=1)]
        distance = ((vectors - first) ** 2).sum(1)
        for _ in range(1, num_clusters):
            drawn = vectors[rng.choice(len(vectors), p=distance / distance.sum())]
            first = np.concatenate([first, drawn[None]])
            distance = np.minimum(distance, ((vectors - drawn) ** 2).sum(1))
        means, _ = kmeans2(vectors, first, iter=100, minit="matrix", missing="warn")
        found.append((means, float((vq(vectors, means)[1] ** 2).mean()) / vectors.shape[1]))
    return min(found, key=lambda each: each[1])
