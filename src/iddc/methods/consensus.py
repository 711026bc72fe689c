"""Consensus of over-clusterings on image regions, taught to one head. It takes no step.

Embeddings are averaged over the regions of their image, over-clustered several times, merged
without regard to size, and brought to agreement (`iddc.consensus`). A linear head then learns to
give each patch the class of its region from the patch alone, so that prediction needs neither
regions nor centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from iddc.config import Experiment
from iddc.consensus import ConsensusConfig as MergingConfig
from iddc.consensus import fit_consensus
from iddc.errors import DataError
from iddc.methods.method import Collection, Group, Method
from iddc.network import LinearHead
from iddc.regions import both_regions, colour_share, patch_colours, region_means
from iddc.schedules import Plan

_PATCHES, _TEACHING = range(2)
"""The independent streams of random numbers."""


class ConsensusConfig(MergingConfig):
    """The numbers of the method. Recipe selected on IDD-Lite, LabelMeFacade and digital rock."""

    images: int = Field(600, ge=2)
    """The most images that are looked at, spread evenly over the collection."""
    sample: int = Field(60_000, ge=2)
    """Patches of these images from which the over-clusterings draw, and the head learns."""
    regions: bool = True
    """Whether embeddings are averaged over regions of their image."""
    lengths: Literal["auto", "unit", "free"] = "auto"
    """The length of a region's mean embedding. unit: 1. free: as it comes, so that regions in which
    embeddings differ lie near the mean of all. auto: free where the backbone does not know such
    images, that is where colours explain less than `known_share` of how embeddings vary."""
    known_share: float = Field(0.27, ge=0, le=1)
    """The part of the variance within images between regions of like colour; see lengths."""
    steps: int = Field(300, ge=1)
    """Steps in which the head learns the classes."""
    batch_size: int = Field(4096, ge=1)
    """Patches in such a step."""
    learning_rate: float = Field(1e-2, gt=0)
    """The learning rate of the head at the start (Adam); it falls to 0."""


@dataclass(frozen=True)
class _Picture:
    """An image on the grid of patches."""

    maps: Float[Tensor, "2 d h w"]
    """The raw embeddings of the image and of its mirror image, mirrored back; half precision."""
    divisions: tuple[Int64[Tensor, "h w"], ...]
    """The regions by embedding and colour, and those by colour alone; none if they are off."""

    def directions(self) -> Float[Tensor, "d h w"]:
        """The mean direction of both embeddings of a patch."""
        return normalize(normalize(self.maps.float(), dim=1).mean(0), dim=0)


class Consensus(Method):
    """Classes of any size, found in regions and taught to one head."""

    name = "consensus"
    about = "Consensus of over-clusterings of image regions, taught to one head."
    Config = ConsensusConfig
    heads = ("linear",)
    head: LinearHead
    options: ConsensusConfig

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """No steps of the loop: all is done in `refit`."""
        return Plan.of_steps(0, num_images, num_images)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Embed some images, find the classes, teach the head."""
        options = self.options
        pictures = [
            _Picture(maps.half().cpu(), _divide(maps.cpu(), pixels) if options.regions else ())
            for _, maps, pixels in collection.pictures(options.images)
        ]
        if not pictures:
            raise DataError("Found no image that can be read; the consensus needs at least one.")

        # Whether the backbone knows such images decides what the length of a mean says.
        mean = torch.stack([one.directions().mean((1, 2)) for one in pictures]).mean(0)
        share = 1.0
        if options.regions:
            shares = [colour_share(one.directions(), one.divisions[-1]) for one in pictures]
            share = float(np.mean(shares))
        unit = options.lengths == "unit" or (
            options.lengths == "auto" and share >= options.known_share
        )

        # The same patches are clustered and teach the head, which sees either mirror image.
        rng = self._rng(_PATCHES)
        each = -(-options.sample // len(pictures))
        averaged, seen = [], []
        for one in pictures:
            drawn = torch.from_numpy(rng.permutation(one.maps[0, 0].numel())[:each])
            averaged.append(_view(one, mean, unit).flatten(1).T[drawn])
            seen.append(one.maps.flatten(2)[:, :, drawn].transpose(1, 2))
        order = torch.from_numpy(rng.permutation(sum(map(len, averaged))))
        vectors = torch.cat(averaged)[order]
        collection.note(f"consensus of {options.groupings} groupings of {len(vectors):,} patches")
        found = fit_consensus(
            vectors, self.experiment.num_clusters, options, seed=self.experiment.seed
        )
        targets = found.probs(vectors)
        loss = self.teach(torch.cat(seen, 1)[:, order].float(), targets)
        return {
            "pictures": float(len(pictures)),
            "colour_share": share,
            "unit_length": float(unit),
            "loss": loss,
            **self._counted(collection, targets),
        }

    def groups(self, progress: float) -> Sequence[Group]:
        """Nothing learns by steps of the loop."""
        return []

    def _counted(self, collection: Collection, targets: Float[Tensor, "n k"]) -> dict[str, float]:
        """How many patches each class has; says so where one has none."""
        clusters = targets.shape[1]
        sizes = targets.argmax(1).bincount(minlength=clusters) / len(targets)
        if empty := int((sizes == 0).sum()):
            collection.note(
                f"found {clusters - empty} distinct groups: {empty} of the {clusters} clusters win "
                f"no patch of these images; --num-clusters {max(2, clusters - empty)} has none such"
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


def _divide(maps: Float[Tensor, "2 d h w"], pixels: Tensor) -> tuple[Tensor, ...]:
    height, width = maps.shape[2:]
    directions = normalize(maps, dim=1).mean(0)
    return both_regions(directions, patch_colours(pixels.cpu(), (height, width)))


def _view(picture: _Picture, mean: Float[Tensor, " d"], unit: bool) -> Float[Tensor, "d h w"]:
    """Centred embeddings, averaged over regions."""
    centred = normalize(picture.directions() - mean[:, None, None], dim=0)
    if not picture.divisions:
        return centred
    averaged = region_means(centred, picture.divisions)
    return normalize(averaged, dim=0) if unit else averaged
