"""Embeddings of views that come again: a frozen backbone makes each of them once.

With `views.repeat`, the views of an epoch are those of an epoch before, so most steps of a run need
neither the photos nor the backbone, only what was kept of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float16, Float32, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad

from iddc.backbones import fingerprint
from iddc.config import Experiment
from iddc.device import free_memory, in_memory
from iddc.gaps import filled, part_of
from iddc.network import CPU_CROPS, Network, embed_crops
from iddc.samples import Wholes
from iddc.views import ViewBatch, stacked_masks

MEMORY = 4 * 2**30
"""Bytes for what is kept, of all processes of this machine together: at most this, and at most a
quarter of what is free."""

CPU_IMAGES = CPU_CROPS // 2
"""Images that a CPU embeds at once, no more and no fewer: the last ones get black crops beside
them, so that to the last bit it does not matter which images are missing."""

ViewKey = tuple[int, int]
"""An epoch, of those with views of their own, and the index of an image."""


class Embedded(NamedTuple):
    """Both views of an image."""

    maps: Float16[Tensor, "2 d h w"] | UInt8[Tensor, "2 3 S S"]
    """Embeddings with gaps filled, or crops where none are kept."""
    boxes: Float32[Tensor, "2 4"]
    """Where the crops lie, see `Crops.boxes`."""
    valid: Bool[Tensor, "2 S S"] | None = None
    """Which pixels of crops hold data; None: all, or embeddings are kept."""


Embeddings = dict[ViewKey, Embedded]


@dataclass(frozen=True)
class Shared:
    """What runs on the same images with the same frozen backbone and precision may share.

    That saves all but the first of them the backbone's work.
    """

    views: Embeddings = field(default_factory=dict)
    """Embeddings of crops, for runs with the same views and seed."""
    wholes: Wholes = field(default_factory=lambda: Wholes(cache_bytes()))
    """Embeddings of whole images, for runs of any seed."""


@dataclass(frozen=True)
class Wanted:
    """The views of a process's images of a step."""

    first: list[ViewKey]
    """Whose first crop is wanted."""
    second: list[ViewKey]
    """Whose second crop goes with it: the same ones, or those of partners."""


@dataclass(frozen=True)
class Inputs:
    """What a step learns from: the images that could be read."""

    views: UInt8[Tensor, "b 2 3 S S"] | Float32[Tensor, "b 2 d h w"]
    """Crops, or their embeddings, with gaps filled, if several steps or heads use them."""
    boxes: Float32[Tensor, "b 2 4"]
    """Where the crops lie, see `Crops.boxes`."""
    ids: list[int]
    """The indices of the images."""
    partners: list[int]
    """The indices of the images that gave the second crop."""
    failures: list[tuple[int, str]]
    """The index and the reason of each image that could not be read."""
    valid: Bool[Tensor, "b 2 S S"] | None = None
    """Which pixels of crops hold data; None: all of them."""


def cache_bytes() -> int:
    """Bytes for what is kept, on this machine and now."""
    return min(MEMORY, free_memory() // 4)


class EmbeddingCache:
    """The inputs of each step, from the photos or from what was kept of them.

    Several heads share the embeddings of a step, also of views that do not come again. Embeddings
    that are kept or shared are rounded to half precision. Those that find no room are computed
    again, and rounded too: memory changes time, never the result.
    """

    def __init__(
        self,
        network: Network,
        experiment: Experiment,
        device: torch.device,
        at_once: int,
        shared: Embeddings | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        self._network = network
        self._at_once = CPU_IMAGES if device.type == "cpu" else at_once
        self._note = note
        self._device = device
        self._precision = experiment.training.precision
        self._repeat = experiment.views.repeat
        self._side = experiment.views.crop_size
        several = experiment.training.heads > 1  # they share what the backbone computes
        self._fixed = (bool(self._repeat) or several) and not experiment.training.end_to_end
        self._shared: Embeddings = {} if shared is None else shared
        self._kept: dict[ViewKey, Embedded | None] = {}
        self._room = 0
        if self._fixed:
            self._kept.update(self._shared)
            backbone = network.backbone
            numbers = 2 * backbone.embed_dim * backbone.num_patches(experiment.views.crop_size)
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._room = cache_bytes() // neighbours // (2 * numbers) if self._repeat else 0

    def keys(self, epoch: int, indices: Sequence[int]) -> list[ViewKey]:
        """The views of images in an epoch."""
        return [(epoch % self._repeat if self._repeat else epoch, index) for index in indices]

    def missing(self, keys: Sequence[ViewKey]) -> list[ViewKey]:
        """The views that must be made from their photos. Asked once for each batch, in order."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        for key in missing[: max(0, self._room - len(self._kept))]:
            self._kept[key] = None  # comes with this batch, before any later one
        return missing

    def inputs(self, wanted: Wanted, made: ViewBatch) -> Inputs:
        """What a step learns from.

        Args:
            wanted: The views of the batch.
            made: Those of them that were missing; images that cannot be read are left out.
        """
        if not self._fixed and wanted.first == wanted.second and made.indices:
            ids = made.indices
            return Inputs(made.crops, made.boxes, ids, ids, made.failures, made.valid)
        fresh = self._fresh(made)
        pairs = [
            (first[1], second[1], self._find(first, fresh), self._find(second, fresh))
            for first, second in zip(wanted.first, wanted.second, strict=True)
        ]
        ids, partners, rows, boxes = [], [], [], []
        masks: list[Tensor | None] = []
        for index, partner, one, other in pairs:
            if one is None or other is None:
                continue
            ids.append(index)
            partners.append(partner)
            rows.append(self._crops_of(one.maps, other.maps))
            boxes.append(torch.stack([one.boxes[0], other.boxes[1]]))
            both = stacked_masks([one.valid, other.valid], self._side)
            masks.append(None if both is None else torch.stack([both[0, 0], both[1, 1]]))
        if not rows:
            blank = torch.zeros(0, 2, 3, self._side, self._side, dtype=torch.uint8)
            return Inputs(blank, torch.zeros(0, 2, 4), [], [], made.failures)
        valid = stacked_masks(masks, self._side)
        return Inputs(torch.stack(rows), torch.stack(boxes), ids, partners, made.failures, valid)

    def _find(self, key: ViewKey, fresh: dict[int, Embedded]) -> Embedded | None:
        """The views of a key, where its image could be read; they are kept if there is room."""
        found = self._kept.get(key) or fresh.get(key[1])
        if found is not None and key in self._kept:
            self._kept[key] = self._shared[key] = found
        return found

    def _crops_of(self, one: Tensor, other: Tensor) -> Tensor:
        """The first crop of one image and the second of the other."""
        row = one if one is other else torch.stack([one[0], other[1]])
        return row.to(self._device).float() if self._fixed else row

    def _fresh(self, made: ViewBatch) -> dict[int, Embedded]:
        """The views that were made for this batch, embedded if they are kept or shared."""
        if self._fixed:
            rows = map(Embedded, self._embedded(made.crops, made.valid), made.boxes)
        else:
            masks = repeat(None) if made.valid is None else made.valid
            rows = map(Embedded, made.crops, made.boxes, masks)
        return dict(zip(made.indices, rows, strict=True))

    def _embedded(
        self, crops: UInt8[Tensor, "b 2 3 S S"], valid: Bool[Tensor, "b 2 S S"] | None
    ) -> list[Float16[Tensor, "2 d h w"]]:
        def embed(at_once: int) -> list[Tensor]:
            pairs: list[Tensor] = []
            for start in range(0, len(crops), at_once):
                part = crops[start : start + at_once]
                mask = part_of(valid, slice(start, start + at_once))
                rows = part.to(self._device).flatten(0, 1)
                if self._device.type == "cpu":
                    rows = pad(rows, (0,) * 7 + (2 * (at_once - len(part)),))
                features = embed_crops(self._network, rows, self._precision)[: 2 * len(part)]
                features = filled(features, None if mask is None else mask.flatten(0, 1))
                pairs += torch.split(features.half().cpu(), 2)
            return pairs

        with torch.no_grad():
            pairs, self._at_once = in_memory(embed, self._at_once, len(crops), self._note)
        return pairs


class CachedBackbone(nn.Module):
    """A frozen backbone that embeds the same pixels only once, while there is memory for it.

    Args:
        backbone: The backbone.
        cached: Its embeddings, by the digest of the pixels.
    """

    def __init__(self, backbone: nn.Module, cached: dict[bytes, Tensor]) -> None:
        super().__init__()
        self.backbone, self._cached, self._most = backbone, cached, cache_bytes()

    def __getattr__(self, name: str) -> Any:
        """Answer with the backbone's own what a network asks of one beside embeddings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.backbone, name)

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings, from the cache if they are there."""
        key = blake2b(images.contiguous().cpu().numpy().data).digest()
        if key in self._cached:
            return self._cached[key].to(images.device)
        found: Tensor = self.backbone(images)
        if sum(map(attrgetter("nbytes"), self._cached.values())) + found.nbytes <= self._most:
            self._cached[key] = found.cpu()
        return found


def keep_embeddings(
    network: Any, experiment: Experiment, kept: dict[bytes, dict[bytes, Tensor]]
) -> None:
    """Let a network take the embeddings of windows that the same frozen backbone has made.

    Args:
        network: A `Network`. Its backbone keeps what it makes, too.
        experiment: Its precision counts.
        kept: Embeddings by the digest of the weights; those of one backbone at a time.
    """
    made_by = fingerprint(network.backbone, experiment.training.precision)
    if made_by not in kept:
        kept.clear()
        kept[made_by] = {}
    network.backbone = CachedBackbone(network.backbone, kept[made_by])
