"""The cosine probe: centroids of the embeddings themselves, found by gradients.

The rows "DINO" of STEGO's tables (Hamilton et al., 2022), and the start of PriMaPs-EM. With the
embeddings u, a target, and K centroids m_k drawn from a normal distribution:

    L = -mean(max_k cos(u, m_k))

It is k-means by gradients: a centroid that wins no patch is never moved.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from iddc.config import Experiment, Frozen
from iddc.methods.correspondence import probe_loss
from iddc.methods.method import Batch, Group, Images, Method, Rows
from iddc.network import Centroids


class ProbeConfig(Frozen):
    """The numbers of the cosine probe. Defaults: STEGO's."""

    steps: int = Field(5000, ge=1)
    """How many batches are seen."""
    batch_size: int = Field(16, ge=2)
    """Images in a batch, over all processes; fewer if there are fewer images."""
    learning_rate: float = Field(5e-3, gt=0)
    """The learning rate of the centroids (Adam)."""


class Probe(Method):
    """Centroids that learn; the head has a copy of them."""

    name = "probe"
    about = "The cosine probe: centroids of the embeddings, found by gradients."
    Config = ProbeConfig
    heads = ("centroids",)
    head: Centroids
    options: ProbeConfig

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.centroids = nn.Parameter(self.head.centroids.clone())

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The cosines of both views' embeddings and the centroids."""
        directions = normalize(maps.flatten(3), dim=2)
        return {"logits": normalize(self.centroids, dim=1) @ directions}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The distance to the nearest centroid."""
        return {"loss": probe_loss(rows["logits"])}

    @torch.no_grad()
    def update(self, batch: Batch, rows: Rows) -> None:
        """Give the head what has been learned."""
        self.head.centroids.copy_(self.centroids)

    def groups(self, progress: float) -> list[Group]:
        """The centroids."""
        return [Group([self.centroids], self.options.learning_rate)]
