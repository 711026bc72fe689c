"""Thresholds without labels: how alike are pixels of one thing, and of different things (Sec. 3.2).

Fig. 2 of the paper draws the affinities of pixel pairs of the same class and of different classes;
where the two densities cross, at 0.2 there, is the threshold that works best (Fig. 7a). It takes
labels. Here clusters of k-means, as many as are wanted, stand in for the classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import ObjectiveConfig

BINS = 100
"""The bins of a histogram over [-1, 1]: steps of 0.02, finer than thresholds need to be."""
_ROWS = 2048
"""Pixels compared with each other: two million pairs."""


@dataclass(frozen=True)
class Affinities:
    """How often pairs of pixels have which affinity, in BINS steps from -1 to 1."""

    same: Float64[np.ndarray, " n"]
    """Pairs of one class or cluster, as a density: the mean over [-1, 1] is 1/2."""
    different: Float64[np.ndarray, " n"]
    """Pairs of two, as a density."""

    @classmethod
    def of(cls, embeddings: Float[Tensor, "n d"], ids: Int64[Tensor, " n"]) -> Affinities:
        """Compare all pairs of pixels.

        Args:
            embeddings: Of length 1.
            ids: The class or cluster of each pixel.
        """
        above = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).triu(1)
        same = ids[:, None] == ids
        cosines = (embeddings.float() @ embeddings.float().T).clamp(-1, 1)  # or histc drops it
        counts = [
            torch.histc(cosines[above & pairs], BINS, -1, 1).double().cpu().numpy()
            for pairs in (same, ~same)
        ]
        return cls(*(count / max(1, count.sum()) * BINS / 2 for count in counts))

    def equal_error_threshold(self) -> float:
        """The affinity above which a pair is rather of one class than of two, all else equal.

        It is the threshold with the fewest errors when pairs of both kinds are equally frequent;
        where several have as few, their middle.
        """
        errors = np.cumsum(self.same)[:-1] + np.cumsum(self.different[::-1])[-2::-1]
        best = np.flatnonzero(errors <= errors.min() * (1 + 1e-9))
        return float((best.mean() + 1) * 2 / BINS - 1)


def cluster_affinities(
    embeddings: Float[Tensor, "n d"], num_clusters: int, *, seed: int = 0
) -> Affinities:
    """Compare pairs of one and of two clusters of k-means, which stand in for classes.

    Args:
        embeddings: Of pixels of several images, of length 1, centred if the objective centres them.
        num_clusters: K.
        seed: Which pixels are compared, and where k-means starts, follows from it.

    Raises:
        DataError: There are fewer distinct embeddings than clusters.
    """
    config = KMeansConfig(restarts=1)
    centroids = spherical_kmeans(embeddings, num_clusters, config, seed=seed).centroids
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(embeddings), generator=generator)[:_ROWS].to(embeddings.device)
    pixels = embeddings[drawn]
    return Affinities.of(pixels, (pixels @ centroids.T).argmax(1))


def estimate_threshold(
    embeddings: Float[Tensor, "n d"], num_clusters: int, *, seed: int = 0
) -> float:
    """Estimate t+ = t- without labels: where the `cluster_affinities` cross, rounded to 0.01."""
    return round(cluster_affinities(embeddings, num_clusters, seed=seed).equal_error_threshold(), 2)


def thresholds_of(config: ObjectiveConfig) -> tuple[float | str, float | str]:
    """t+ and t-, each a number or `auto`."""
    return config.positive_threshold, config.negative_threshold


def resolve_thresholds(
    config: ObjectiveConfig, embeddings: Float[Tensor, "n d"], num_clusters: int, *, seed: int = 0
) -> ObjectiveConfig:
    """The objective with the estimate in place of each `auto`.

    Args:
        config: The objective. Where it centres embeddings, they are centred here.
        embeddings: Raw ones, of pixels of several images.
        num_clusters: K.
        seed: See `estimate_threshold`.
    """
    vectors = normalize(embeddings.float(), dim=1)
    if config.centering == "batch":
        vectors = normalize(vectors - vectors.mean(0), dim=1)
    estimate = estimate_threshold(vectors, num_clusters, seed=seed)
    names = ("positive_threshold", "negative_threshold")
    return config.model_copy(
        update={name: estimate for name in names if getattr(config, name) == "auto"}
    )
