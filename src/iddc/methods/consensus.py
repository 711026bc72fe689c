"""Consensus of over-clusterings on image regions, taught to one head. It takes no step.

Embeddings are averaged over the regions of their image, over-clustered several times, merged
without regard to size, and brought to agreement (`iddc.consensus`). Regions are counted, not
patches: one of n patches has the weight sqrt(n), so that the few large ones do not decide alone. A
linear head then learns to give each patch the class of its region from the patch alone, so that
prediction needs neither regions nor centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from iddc.config import CONSENSUS_USES, ConsensusConfig, Experiment
from iddc.consensus import fit_consensus
from iddc.errors import DataError, counted
from iddc.methods.method import Collection, Group, Method
from iddc.network import LinearHead
from iddc.regions import both_regions, colour_share, patch_colours, pooled, region_means
from iddc.schedules import Plan

_ROWS = 8192
"""Patches that the head sees at once when its clusters are counted."""
_COMPARED = 10_000
"""Patches on which the groupings are compared with their consensus."""
_PATCHES, _TEACHING = range(2)
"""The independent streams of random numbers."""


@dataclass(frozen=True)
class _Picture:
    """An image on the grid of patches."""

    maps: Float[Tensor, "2 d h w"]
    """The raw embeddings of the image and of its mirror image, mirrored back; half precision."""
    colours: Float[Tensor, "3 h w"]
    """The CIELAB colour of each patch."""
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
    uses = CONSENSUS_USES
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
            _picture(maps.cpu(), pixels.cpu(), divided=options.regions)
            for _, maps, pixels in collection.pictures(options.images)
        ]
        if not pictures:
            raise DataError("Found no image that can be read; the consensus needs at least one.")

        # Whether the backbone knows such images decides what lengths and colours say.
        mean = torch.stack([one.directions().mean((1, 2)) for one in pictures]).mean(0)
        share = 1.0
        if options.regions:
            shares = [colour_share(one.directions(), one.divisions[-1]) for one in pictures]
            share = float(np.mean(shares))
        known = share >= options.known_share
        unit = known if options.lengths == "auto" else options.lengths == "unit"
        weight = float(not known) if options.colour == "auto" else options.colour
        shift, scale = _spread([one.colours for one in pictures])

        # The head learns from some patches of each image, and sees either mirror image.
        rng = self._rng(_PATCHES)
        each = -(-options.sample // len(pictures))
        pools, seen, count = [], [], 0
        for one in pictures:
            drawn = torch.from_numpy(rng.permutation(one.maps[0, 0].numel())[:each])
            view = _view(one, mean, unit)
            if weight:
                colours = ((one.colours - shift) * (weight / scale)).clamp(-4 * weight, 4 * weight)
                view = torch.cat([view, _means(colours, one)])
            pools.append(pooled(view, one.divisions, drawn, count))
            count += len(pools[-1].vectors)
            seen.append(one.maps.flatten(2)[:, :, drawn].transpose(1, 2))

        # The classes are found among regions: a larger one counts more, but less than its patches.
        vectors = torch.cat([pool.vectors for pool in pools])
        weights = torch.cat([pool.sizes for pool in pools]).float() ** options.size_power
        kind = "regions" if options.regions else "patches"
        collection.note(f"consensus of {options.groupings} groupings of {len(vectors):,} {kind}")
        found = fit_consensus(
            vectors,
            self.experiment.num_clusters,
            options,
            weights=weights,
            seed=self.experiment.seed,
        )
        rows, owners = torch.cat(seen, 1).float(), torch.cat([pool.owners for pool in pools])
        loss = self.teach(rows, found.probs(vectors)[owners])
        compared = torch.from_numpy(rng.permutation(len(owners))[:_COMPARED])
        return {
            "pictures": float(len(pictures)),
            "colour_share": share,
            "unit_length": float(unit),
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


def _picture(
    maps: Float[Tensor, "2 d h w"], pixels: UInt8[Tensor, "3 H W"], *, divided: bool
) -> _Picture:
    height, width = maps.shape[2:]
    colours = patch_colours(pixels, (height, width))
    directions = normalize(maps, dim=1).mean(0)
    return _Picture(maps.half(), colours, both_regions(directions, colours) if divided else ())


def _spread(colours: Sequence[Float[Tensor, "3 _ _"]]) -> tuple[Float[Tensor, "3 1 1"], float]:
    """The mean colour, and the root mean square of the distance to it; 1 if there is but one."""
    rows = torch.cat([one.flatten(1) for one in colours], 1).double()
    mean = rows.mean(1, keepdim=True)
    deviation = float((rows - mean).square().sum(0).mean().sqrt())
    # Less than a step of 8 bits is rounding.
    return mean[..., None].float(), deviation if deviation > 0.1 else 1.0


def _view(picture: _Picture, mean: Float[Tensor, " d"], unit: bool) -> Float[Tensor, "d h w"]:
    """Centred embeddings, averaged over regions."""
    centred = normalize(picture.directions() - mean[:, None, None], dim=0)
    averaged = _means(centred, picture)
    return normalize(averaged, dim=0) if unit else averaged


def _means(maps: Float[Tensor, "c h w"], picture: _Picture) -> Float[Tensor, "c h w"]:
    """Averages over the regions of a picture, if it has been divided."""
    return region_means(maps, picture.divisions) if picture.divisions else maps
