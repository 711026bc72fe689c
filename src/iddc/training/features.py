"""Embeddings of views that come again: a frozen backbone makes each of them once.

With `views.repeat`, the views of an epoch are those of an epoch before, so most steps of a run need
neither the photos nor the backbone, only what was kept of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor
from torch.nn.functional import pad

from iddc.config import Experiment
from iddc.device import free_memory, in_memory
from iddc.network import Network
from iddc.training.gradients import CPU_CROPS, embed_crops
from iddc.views import ViewBatch

MEMORY = 4 * 2**30
"""Bytes for what is kept, of all processes of this machine together: at most this, and at most a
quarter of what is free."""

CPU_IMAGES = CPU_CROPS // 2
"""Images that a CPU embeds at once, no more and no fewer: the last ones get black crops beside
them, so that to the last bit it does not matter which images are missing."""

Key = tuple[int, int]
"""An epoch, of those with views of their own, and the index of an image."""
Kept = dict[Key, Float16[Tensor, "2 d h w"]]
"""The embeddings of both crops. Runs on the same images with the same backbone, views, precision
and seed may share one, which saves all but the first of them the backbone's work."""


def room() -> int:
    """Bytes for what is kept, on this machine and now."""
    return min(MEMORY, free_memory() // 4)


class RepeatedViews:
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
        shared: Kept | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        self._network = network
        self._at_once = CPU_IMAGES if device.type == "cpu" else at_once
        self._note = note
        self._device = device
        self._precision = experiment.training.precision
        self._repeat = experiment.views.repeat
        several = experiment.training.heads > 1  # they share what the backbone computes
        self._fixed = (bool(self._repeat) or several) and not experiment.training.end_to_end
        self._shared: Kept = {} if shared is None else shared
        self._kept: dict[Key, Float16[Tensor, "2 d h w"] | None] = {}
        self._room = 0
        if self._fixed:
            self._kept.update(self._shared)
            backbone = network.backbone
            numbers = 2 * backbone.embed_dim * backbone.num_patches(experiment.views.crop_size)
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._room = room() // neighbours // (2 * numbers) if self._repeat else 0

    def keys(self, epoch: int, indices: Sequence[int]) -> list[Key]:
        """The views of images in an epoch."""
        return [(epoch % self._repeat if self._repeat else epoch, index) for index in indices]

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """The views that must be made from their photos. Asked once for each batch, in order."""
        missing = [key for key in keys if key not in self._kept]
        for key in missing[: max(0, self._room - len(self._kept))]:
            self._kept[key] = None  # comes with this batch, before any later one
        return missing

    def inputs(
        self, keys: Sequence[Key], made: ViewBatch
    ) -> UInt8[Tensor, "b 2 3 S S"] | Float32[Tensor, "b 2 d h w"]:
        """What a step learns from: crops, or their embeddings if several steps or heads do.

        Args:
            keys: The views of the batch.
            made: Those of them that were missing; images that cannot be read are left out.
        """
        if not self._fixed:
            return made.crops
        fresh = dict(zip(made.indices, self._embedded(made.crops), strict=True))
        rows = []
        for key in keys:
            row = self._kept.get(key)
            if row is None:
                row = fresh.get(key[1])
            if row is None:
                continue
            if key in self._kept:
                self._kept[key] = self._shared[key] = row
            rows.append(row.to(self._device).float())
        return torch.stack(rows) if rows else made.crops

    def _embedded(self, crops: UInt8[Tensor, "b 2 3 S S"]) -> list[Float16[Tensor, "2 d h w"]]:
        def embed(at_once: int) -> list[Tensor]:
            pairs: list[Tensor] = []
            for part in torch.split(crops, at_once) if len(crops) else ():
                rows = part.to(self._device).flatten(0, 1)
                if self._device.type == "cpu":
                    rows = pad(rows, (0,) * 7 + (2 * (at_once - len(part)),))
                features = embed_crops(self._network, rows, self._precision).half().cpu()
                pairs += torch.split(features[: 2 * len(part)], 2)
            return pairs

        with torch.no_grad():
            pairs, self._at_once = in_memory(embed, self._at_once, len(crops), self._note)
        return pairs
