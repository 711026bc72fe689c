"""Contrast of images and of matched points, for networks with stages.

NT-Xent on the last stage's mean teaches what an image shows; at points that both crops show, every
stage learns to tell points apart. The result is the moving average of the weights, with batch norms
measured anew.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize

from iddc.backbones import Backbone, reduced_backbone
from iddc.config import PretrainConfig
from iddc.device import autocast
from iddc.errors import ConfigError
from iddc.pretraining.cache import ImageCache
from iddc.pretraining.losses import GlobalBatch, nt_xent, point_nce
from iddc.pretraining.views import Pairs, PairViews
from iddc.processes import Processes
from iddc.progress import SILENT, Progress

COMPONENT_IMAGES = 512
"""From which components are taken, whole and in the shares of large crops."""
GLOBAL_WIDTHS, DENSE_WIDTHS = (512, 128), (384, 96)
"""The hidden and output widths of the projections of a crop, and of a point."""


class Contrast(nn.Module):
    """The network that learns, its moving average, and its projections."""

    betas = (0.9, 0.98)

    def __init__(self, backbone: Backbone, config: PretrainConfig) -> None:
        super().__init__()
        if not backbone.architecture.stages:
            raise ConfigError(
                f"Method contrast is for networks with stages, such as resnet18, and "
                f"{config.network} has none. Give --method dino, or another --network."
            )
        self.config = config
        self.gradient_clip = config.contrast.gradient_clip
        self._steps = config.steps
        self.online = backbone.to(memory_format=torch.channels_last)
        self.average = deepcopy(self.online).requires_grad_(False)
        info: Any = backbone.net
        widths = [info.feature_info[stage]["num_chs"] for stage in backbone.architecture.stages]
        self.whole = _projection(widths[-1], *GLOBAL_WIDTHS)
        self.dense = nn.ModuleList(_projection(width, *DENSE_WIDTHS) for width in widths)
        self.online.net.train()  # a Backbone keeps its batch norms in evaluation

    def plan(self, steps: int, _steps_per_epoch: int) -> None:
        """Set how long the schedules are."""
        self._steps = steps

    def views(self, photos: ImageCache, processes: Processes) -> PairViews:
        """The batches, as this process sees them.

        Raises:
            ConfigError: The images do not do for the shares.
        """
        views, config = PairViews(photos, self.config, processes), self.config.contrast
        if config.large_shares and config.large_every and not views.large_every:
            raise ConfigError(
                "--contrast.large-shares: the sources that have a share have too few images of "
                f"{config.large_min_side} pixels (--contrast.large-min-side). Change the shares, "
                "or give --contrast.large-every 0."
            )
        return views

    def losses(self, batch: Pairs, everyone: GlobalBatch) -> dict[str, Tensor]:
        """The terms of a step, this process's part. Stages weigh together as much as the whole."""
        config = self.config.contrast
        maps = self._stages(self.online, batch)
        points = batch.points.to(maps[0].device).flatten(0, 1)[:, :, None]
        terms = {}
        if not batch.large:
            rows = self.whole(maps[-1].mean((2, 3)))
            loss = partial(nt_xent, temperature=config.temperature)
            terms["whole"] = everyone.loss(loss, rows.view(len(batch.ids), 2, -1))
        if not points.numel():
            return terms
        for stage, features in enumerate(maps):
            directions = normalize(features.float(), dim=1) * features.shape[1] ** 0.5
            seen = functional.grid_sample(
                directions, points, padding_mode="border", align_corners=False
            )
            rows = self.dense[stage](seen.flatten(2).transpose(1, 2).flatten(0, 1))
            loss = partial(point_nce, temperature=config.temperature)
            term = everyone.loss(loss, rows.view(len(batch.ids), 2, points.shape[1], -1))
            terms[f"points{stage}"] = term / len(maps)
        return terms

    def _stages(self, backbone: Backbone, batch: Pairs) -> list[Float[Tensor, "_ d h w"]]:
        """The feature maps of the chosen stages."""
        net: Any = backbone.net
        pixels = batch.crops.recoloured(backbone.mean.device)
        pixels = (pixels - backbone.mean) / backbone.std
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        maps: list[Tensor] = net.forward_intermediates(
            pixels, indices=[*backbone.architecture.stages], intermediates_only=True
        )
        return maps

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rate and weight decay: up, level, and down to 0 in the cooldown."""
        config = self.config.contrast
        up = (step + 1) / max(1, config.warmup)
        down = (self._steps - step) / (config.cooldown * self._steps)
        return config.learning_rate * min(1, up, down), config.weight_decay

    def before_update(self, step: int) -> None:
        """All weights learn from the first step."""

    def after_update(self, step: int) -> None:
        """Move the average. It forgets the first weights fast."""
        momentum = min(self.config.contrast.momentum, (1 + step) / (10 + step))
        ema_update(self.average, self.online, momentum)

    @torch.no_grad()
    def result(self, photos: ImageCache, progress: Progress = SILENT) -> Backbone:
        """The average, with statistics of its batch norms, and components, from fresh crops."""
        device, contrast = self.average.mean.device, self.config.contrast
        changes = {
            "jitter": contrast.recalibration_jitter,
            "gray": 0.0,
            "large_every": 2,
            "large_size": contrast.recalibration_size,
            "large_min_side": contrast.recalibration_min_side,
        }
        fresh = self.config.model_copy(update={"contrast": contrast.model_copy(update=changes)})
        views = PairViews(photos, fresh, Processes(device))
        norms = [m for m in self.average.net.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
        self.average.net.train()
        steps = range(contrast.recalibration_steps if norms else 0)
        for step in progress.each(steps, "batch norms", "batch"):
            with autocast(device, self.config.precision):
                self._stages(self.average, views[self._steps + step])
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
        self.average.eval()
        if not self.config.components:
            return self.average
        ids = views.draw(np.random.default_rng((self.config.seed, 0)), COMPONENT_IMAGES)
        images = (photos[index].permute(2, 0, 1)[None].to(device) for index in ids)
        return reduced_backbone(self.average, self.config.components, images, progress)


def _projection(width: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out),
    )


@torch.no_grad()
def ema_update(average: nn.Module, towards: nn.Module, momentum: float) -> None:
    """Move every parameter of a moving average."""
    for slow, fast in zip(average.parameters(), towards.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)
