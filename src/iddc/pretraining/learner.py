"""One step of AdamW on a method's losses, and what is saved of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from iddc.backbones import Backbone, load_backbone, untrained_backbone
from iddc.config import PretrainConfig
from iddc.device import autocast
from iddc.errors import ConfigError, SetupError
from iddc.learning.guards import not_finite
from iddc.pretraining.cache import ImageCache
from iddc.pretraining.contrast import Contrast
from iddc.pretraining.dino import Dino
from iddc.pretraining.losses import GlobalBatch
from iddc.processes import Processes
from iddc.schedules import Plan


def build_method(config: PretrainConfig) -> Contrast | Dino:
    """The method before the first step. Its random weights follow from the seed.

    Raises:
        ConfigError: timm has no such network, it does not fit the method, or the backbone of
            `init` has another one.
        DataError, SetupError: The weights of `init` are damaged, or not within reach.
    """
    options = {"patch_size": config.patch_size, "depth": config.depth}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        backbone = untrained_backbone(
            config.network,
            options={name: value for name, value in options.items() if value},
            stages=config.stages,
        )
        if config.init:
            backbone = _known(config.init, backbone)
        return (Contrast if config.method == "contrast" else Dino)(backbone, config)


def _known(name: str, fresh: Backbone) -> Backbone:
    """A trained backbone of the same network as a fresh one.

    What reduces its stages to components stays behind: the result has components of its own
    images.

    Raises:
        ConfigError: It has another network.
    """
    known = load_backbone(name)
    theirs, ours = known.architecture, fresh.architecture
    for part in ("timm_name", "options", "stages"):
        wanted, found = getattr(ours, part), getattr(theirs, part)
        if wanted != found:
            raise ConfigError(
                f"--init {name}: expected a backbone of the network that --network, --patch-size, "
                f"--depth and --stages say, with {part} {wanted!r}; found {found!r}. Change these "
                f"options (--network {theirs.timm_name}), or give another --init."
            )
    if not theirs.components:
        return known
    changes = {"components": 0, "embed_dim": ours.embed_dim}
    return Backbone(theirs.model_copy(update=changes), known.net)


class Learner:
    """A method, its batches and its optimiser, and how many steps they have done."""

    def __init__(
        self,
        method: Contrast | Dino,
        photos: ImageCache,
        config: PretrainConfig,
        processes: Processes,
    ) -> None:
        self.method = method.to(processes.device)
        self.processes = processes
        self.config = config
        self.step = 0
        """Steps done."""
        self.step_complete = True
        """No step is half done."""
        self.views = method.views(photos, processes)
        per_epoch = math.ceil(len(photos) / self.views.images_per_step)
        self.plan = Plan(config.epochs * per_epoch or config.steps, per_epoch, config.batch_size)
        method.plan(self.plan.steps, per_epoch)
        processes.sync(method)
        self._trained = [p for p in method.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._trained if p.ndim > 1], "decays": True},
            {"params": [p for p in self._trained if p.ndim < 2], "decays": False},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=method.betas)

    def learn(self, batch: Any, counts: Sequence[int]) -> dict[str, float]:
        """Do one step on the images of all processes.

        Args:
            batch: The images of this process.
            counts: How many images each process has.

        Returns:
            What the log says of the step. Where a number is not finite, no weight has changed.
        """
        try:
            return self._learn(batch, counts)
        except torch.OutOfMemoryError as error:
            raise SetupError(
                "The GPU has not enough free memory. Give a smaller --batch-size."
            ) from error

    def _learn(self, batch: Any, counts: Sequence[int]) -> dict[str, float]:
        step, method, processes = self.step, self.method, self.processes
        self._optimizer.zero_grad()
        with autocast(processes.device, self.config.precision):
            terms = method.losses(batch, GlobalBatch(processes, counts, step))
        values = torch.stack([*terms.values()])
        torch.autograd.backward(values.sum())
        # A term that a step leaves out gives some weights no gradient: they stay as they are.
        learning = [p for p in self._trained if p.grad is not None]
        processes.add_gradients(learning)
        norm = torch.nn.utils.clip_grad_norm_(learning, method.gradient_clip)
        parts = processes.gather(values.detach()[None], [1] * processes.size).sum(0)
        found = torch.stack([parts.sum(), *parts, norm]).tolist()
        numbers = dict(zip(("loss", *terms, "gradient_norm"), found, strict=True))
        rate, decay = method.rates(step)
        for group in self._optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay if group["decays"] else 0.0
        self.step_complete = False
        if not not_finite(numbers):
            method.before_update(step)
            self._optimizer.step()
            method.after_update(step)
        self.step += 1
        self.step_complete = True
        return {**numbers, "learning_rate": rate}

    @property
    def trained(self) -> nn.Module:
        """All that learns."""
        return self.method

    def facts(self) -> dict[str, Any]:
        """Nothing that a diagnosis would say beside the numbers."""
        return {}

    def state(self) -> dict[str, Any]:
        """What to save."""
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.method.load_state_dict(state["method"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
