"""Spherical k-means on the backbone's embeddings, the baseline of Table 6. It takes no step."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.functional import normalize

from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import Experiment
from iddc.methods.method import Collection, Group, Method
from iddc.network import Centroids
from iddc.schedules import Plan


class KMeans(Method):
    """Centroids of a sample of all patches.

    With `objective.centering` "batch" the sample's mean is subtracted from the embeddings of
    length 1, as IDDC subtracts a batch's.
    """

    name = "kmeans"
    about = "Spherical k-means of the embeddings (Table 6)."
    Config = KMeansConfig
    heads = ("centroids",)
    uses = frozenset({"training.precision", "objective.centering"})
    head: Centroids
    options: KMeansConfig

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """No steps."""
        return Plan(steps=0, steps_per_epoch=1)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float | int]:
        """Cluster the sample."""
        experiment, head = self.experiment, self.head
        vectors = normalize(collection.sample(self.options.max_vectors), dim=1)
        if experiment.objective.centering == "batch" and len(vectors):
            head.mean.copy_(vectors.mean(0))
            vectors -= head.mean
        collection.note(f"clustering {len(vectors):,} embeddings")
        result = spherical_kmeans(
            vectors, experiment.num_clusters, self.options, seed=experiment.seed
        )
        head.centroids.copy_(result.centroids)
        return {
            "vectors": len(vectors),
            "inertia": result.inertia,
            "iterations": result.iterations,
        }

    def groups(self, progress: float) -> Sequence[Group]:
        """Nothing learns by steps."""
        return []
