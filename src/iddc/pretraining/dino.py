"""DINO (Caron et al., 2021) with the patch loss of iBOT (Zhou et al., 2022), for plain ViTs.

A student sees global crops with some patches masked, and local crops. It predicts what its teacher,
its own moving average, says of the whole crop (class token) and of the masked patches. The teacher
sees the global crops only, unmasked, and is the result.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize

from iddc.backbones import Backbone
from iddc.config import DinoConfig, PretrainConfig
from iddc.errors import ConfigError
from iddc.pretraining.cache import ImageCache
from iddc.pretraining.contrast import ema_update
from iddc.pretraining.losses import GlobalBatch, cross_view_entropy, koleo, masked_entropy
from iddc.pretraining.views import MultiCrops, MultiCropViews
from iddc.processes import Processes
from iddc.progress import SILENT, Progress


class Head(nn.Module):
    """Tokens -> cosines to prototypes, in single precision also under autocast."""

    def __init__(self, width: int, config: DinoConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        # As a linear layer starts: the length of a prototype says how fast it turns.
        reach = config.bottleneck**-0.5
        fresh = torch.empty(config.prototypes, config.bottleneck).uniform_(-reach, reach)
        self.prototypes = nn.Parameter(fresh)

    def forward(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Give the cosines."""
        with torch.autocast(tokens.device.type, enabled=False):
            points = normalize(self.layers(tokens.float()), dim=-1)
            return functional.linear(points, normalize(self.prototypes, dim=-1))


class MaskedViT(nn.Module):
    """A ViT with the heads of its class token and of its patches, and a token for masked ones."""

    def __init__(self, backbone: Backbone, config: DinoConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.whole = Head(backbone.embed_dim, config)
        self.patch = self.whole if config.shared_head else Head(backbone.embed_dim, config)
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))

    def tokens(
        self, images: Float[Tensor, "b 3 S S"], masks: Bool[Tensor, "b h w"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b p d"]]:
        """The class token and the patches after the final norm, some patches being masked."""
        net: Any = self.backbone.net

        def hide(_module: nn.Module, _images: object, patches: Tensor) -> Tensor:
            if masks is None:
                return patches
            return torch.where(
                masks.view(*patches.shape[:-1], 1), self.mask_token.to(patches.dtype), patches
            )

        with net.patch_embed.register_forward_hook(hide):  # before positions are added
            mean, std = self.backbone.mean, self.backbone.std
            tokens: Tensor = net.forward_features((images - mean) / std)
        patches = (images.shape[-1] // self.backbone.patch_size) ** 2
        return tokens[:, 0], tokens[:, -patches:]


class Dino(nn.Module):
    """Student and teacher."""

    betas = (0.9, 0.999)
    whole_center: Float[Tensor, " k"]
    patch_center: Float[Tensor, " k"]

    def __init__(self, backbone: Backbone, config: PretrainConfig) -> None:
        super().__init__()
        net: Any = backbone.net
        if getattr(net, "cls_token", None) is None or not hasattr(net, "patch_embed"):
            raise ConfigError(
                "Method dino is for ViTs with a class token, such as vit_tiny_patch16_224, and "
                f"{config.network} is none. Give --method contrast, or another --network."
            )
        for name in ("global_size", "local_size"):
            size = getattr(config.dino, name)
            if size % backbone.patch_size:
                raise ConfigError(
                    f"--dino.{name.replace('_', '-')} must be a multiple of the network's patch "
                    f"size {backbone.patch_size}, found {size}."
                )
        self.config = config
        self.gradient_clip = config.dino.gradient_clip
        self.student = MaskedViT(backbone, config.dino)
        self.teacher = deepcopy(self.student).requires_grad_(False).eval()
        for name in ("whole_center", "patch_center"):
            self.register_buffer(name, torch.zeros(config.dino.prototypes))
        self._means: dict[str, Tensor] = {}
        self.plan(config.steps, 1)

    def plan(self, steps: int, steps_per_epoch: int) -> None:
        """Set how long the schedules are."""
        self._steps = steps
        self._frozen_steps = min(steps // 4, self.config.dino.frozen_epochs * steps_per_epoch)

    def views(self, photos: ImageCache, processes: Processes) -> MultiCropViews:
        """The batches, as this process sees them."""
        return MultiCropViews(photos, self.config, processes, self.student.backbone.patch_size)

    def losses(self, batch: MultiCrops, everyone: GlobalBatch) -> dict[str, Tensor]:
        """The weighted terms of a step, this process's part."""
        config, student, teacher = self.config.dino, self.student, self.teacher
        device = student.mask_token.device
        images = len(batch.ids)
        masks = batch.masks.to(device).flatten(0, 1)
        hidden = masks.flatten(1)
        large = batch.large.recoloured(device)

        def by_image(rows: Float[Tensor, "_ d"]) -> Float[Tensor, "b v d"]:
            return rows.reshape(images, -1, rows.shape[1])

        def log_probs(scores: Tensor) -> Tensor:
            return functional.log_softmax(scores / config.student_temperature, dim=-1)

        # The teacher sees whole crops; what it says is the target.
        with torch.no_grad():
            whole, patches = teacher.tokens(large)
            targets = self._targets(teacher.whole(whole), "whole", everyone)
            if config.patch_weight:
                scores = teacher.patch(patches[hidden])
                patch_targets = self._targets(scores, "patch", everyone)
        # The student sees masked and smaller crops, and says it too.
        whole, patches = student.tokens(large, masks)
        scores = by_image(student.whole(whole))
        if config.local_crops:
            local = student.whole(student.tokens(batch.small.recoloured(device))[0])
            scores = torch.cat([scores, by_image(local)], dim=1)
        terms = {"whole": everyone.share * cross_view_entropy(by_image(targets), log_probs(scores))}
        if config.patch_weight:
            predicted = log_probs(student.patch(patches[hidden]))
            entropy = masked_entropy(patch_targets, predicted, hidden)
            terms["patches"] = config.patch_weight * entropy / batch.num_masked
        if config.koleo_weight:
            views = by_image(whole).unbind(1)
            parts = [everyone.loss(koleo, view) for view in views]
            terms["koleo"] = config.koleo_weight * torch.stack(parts).mean()
        return terms

    def _targets(
        self, scores: Float[Tensor, "m k"], name: str, everyone: GlobalBatch
    ) -> Float[Tensor, "m k"]:
        """The teacher's probabilities, sharpened, and centred or balanced against collapse."""
        config = self.config.dino
        warmup = max(1, config.temperature_warmup * self._steps)
        first, last = config.first_teacher_temperature, config.teacher_temperature
        temperature = first + (last - first) * min(1, everyone.step / warmup)
        if config.centering == "sinkhorn":
            return everyone.sinkhorn(scores / temperature)
        self._means[name] = everyone.mean(scores)
        center: Tensor = getattr(self, f"{name}_center")
        return ((scores - center) / temperature).softmax(-1)

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rate: up, then down a cosine. Weight decay: up a cosine."""
        config = self.config.dino
        warmup = config.warmup * self._steps
        rate = config.learning_rate * min(1, (step + 1) / max(1, warmup))
        if step >= warmup:
            progress = (step - warmup) / (self._steps - warmup)
            rate = _cosine(config.learning_rate, config.final_learning_rate, progress)
        decay = _cosine(config.weight_decay, config.final_weight_decay, step / self._steps)
        return rate, decay

    def before_update(self, step: int) -> None:
        """Hold the prototypes at first."""
        if step < self._frozen_steps:
            for head in (self.student.whole, self.student.patch):
                head.prototypes.grad = None

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Move the teacher, and its centers."""
        config = self.config.dino
        momentum = _cosine(config.momentum, 1.0, step / self._steps)
        ema_update(self.teacher, self.student, momentum)
        for name, mean in self._means.items():
            center: Tensor = getattr(self, f"{name}_center")
            center.lerp_(mean, 1 - config.center_momentum)

    def result(self, _photos: ImageCache, _progress: Progress = SILENT) -> Backbone:
        """The teacher."""
        return self.teacher.backbone


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
