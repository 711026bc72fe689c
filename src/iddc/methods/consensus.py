"""Consensus of over-clusterings on image regions, taught to one head. It takes no step.

Embeddings are averaged over the regions of their image, over-clustered several times, merged
without regard to size, and brought to agreement (`iddc.consensus`). Regions are counted, not
patches: one of n patches has the weight sqrt(n), so that the few large ones do not decide alone. A
linear head then learns to give each patch the class of its region from the patch alone, so that
prediction needs neither regions nor centroids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from iddc.config import CONSENSUS_USES, ConsensusConfig, Experiment
from iddc.consensus import fit_consensus
from iddc.errors import counted
from iddc.methods.method import Collection, Group, Method
from iddc.methods.pictures import Pictures
from iddc.network import LinearHead
from iddc.schedules import Plan

_ROWS = 8192
"""Patches that the head sees at once when its clusters are counted."""
_COMPARED = 10_000
"""Patches on which the groupings are compared with their consensus."""
_PATCHES, _TEACHING = range(2)
"""The independent streams of random numbers."""


class Consensus(Method):
    """Classes of any size, found in regions and taught to one head."""

    name = "consensus"
    about = "Consensus of over-clusterings of image regions, taught to one head."
    Config = ConsensusConfig
    heads = ("linear",)
    uses = CONSENSUS_USES
    head: LinearHead
    options: ConsensusConfig

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """No steps of the loop: all is done in `refit`."""
        return Plan.of_steps(0, num_images, num_images)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Embed some images, find the classes, teach the head."""
        options, clusters, seed = self.options, self.experiment.num_clusters, self.experiment.seed
        pictures = Pictures.of(collection, options)
        weight = float(not pictures.known) if options.colour == "auto" else options.colour

        # The head learns from some patches of each image, and sees either mirror image.
        rng = self._rng(_PATCHES)
        each = -(-options.sample // len(pictures.items))
        drawn = [
            torch.from_numpy(rng.permutation(one.maps[0, 0].numel())[:each])
            for one in pictures.items
        ]
        seen = [
            one.maps.flatten(2)[:, :, patches].transpose(1, 2)
            for one, patches in zip(pictures.items, drawn, strict=True)
        ]
        vectors, weights, owners = pictures.regions(drawn, weight)
        kind = "regions" if options.regions else "patches"
        collection.note(f"consensus of {options.groupings} groupings of {len(vectors):,} {kind}")
        found = fit_consensus(vectors, clusters, options, weights=weights, seed=seed)
        rows = torch.cat(seen, 1).float()
        loss = self.teach(rows, found.probs(vectors)[owners])
        compared = torch.from_numpy(rng.permutation(len(owners))[:_COMPARED])
        return {
            **pictures.facts(),
            "colour_weight": weight,
            "loss": loss,
            "agreement": found.agreement(vectors[owners[compared]]),
            **self._counted(collection, rows[0]),
        }

    def groups(self, progress: float) -> Sequence[Group]:
        """Nothing learns by steps of the loop."""
        return []

    def _counted(self, collection: Collection, rows: Float[Tensor, "n d"]) -> dict[str, float]:
        """How many patches each cluster of the head wins; says so where one wins none."""
        clusters, device = self.experiment.num_clusters, self.head.weight.device
        winners = [
            self.head(part.T[None, :, :, None].to(device))[0, :, :, 0].argmax(0).cpu()
            for part in torch.split(rows, _ROWS)
        ]
        sizes = torch.cat(winners).bincount(minlength=clusters) / len(rows)
        if empty := int((sizes == 0).sum()):
            there, are = clusters - empty, "is" if empty == 1 else "are"
            collection.note(
                f"found {counted(there, 'distinct group')}, so {empty} of the {clusters} clusters "
                f"{are} empty in these images. Ask for {max(2, there)} clusters to have none empty"
            )
        return {
            "groups": float(clusters - empty),
            "largest": float(sizes.max()),
            "smallest": float(sizes.min()),
        }

    def teach(self, rows: Float[Tensor, "2 n d"], targets: Float[Tensor, "n k"]) -> float:
        """Teach the head the class of each patch; the mean of the last losses.

        It learns on standardised embeddings. Their mean and deviation are then part of its
        weights, so that it takes raw ones.
        """
        options, head = self.options, self.head
        device = next(head.parameters()).device
        mean, std = rows.mean((0, 1)), rows.std((0, 1)) + 1e-6
        optimizer = torch.optim.Adam(head.parameters(), options.learning_rate)
        rng, losses = self._rng(_TEACHING), []
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * (1 - step / options.steps)
            mirrored = torch.from_numpy(rng.integers(2, size=options.batch_size))
            drawn = torch.from_numpy(rng.integers(len(targets), size=options.batch_size))
            inputs = ((rows[mirrored, drawn] - mean) / std).to(device)
            with torch.enable_grad():
                logits = linear(inputs, head.weight.flatten(1), head.bias)
                loss = cross_entropy(logits, targets[drawn].to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            assert head.bias is not None
            head.weight /= std.to(device)[:, None, None]
            head.bias -= head.weight.flatten(1) @ mean.to(device)
        return float(np.mean(losses[-25:]))

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.experiment.seed, stream))
