"""The loss with its gradient, beside the equations as they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from iddc.bench.compare import Part, relative_error
from iddc.bench.inputs import Inputs
from iddc.bench.machine import Work
from iddc.config import ObjectiveConfig
from iddc.losses import Objective, Pixels
from iddc.losses.reference import equation_8
from iddc.views import draw_rolls

VIT_SMALL = 384
"""The width of the backbone whose loss is measured."""
LOSSES = {
    "loss, ViT-S/16": (14**2, ObjectiveConfig()),
    "loss, ViT-S/8": (28**2, ObjectiveConfig()),
    "loss, 256 patches, centred": (256, ObjectiveConfig(centering="batch")),
}
"""Pixels of a crop, and the objective: of the paper's rows, and centred as by default."""


def loss_parts(inputs: Inputs) -> Iterator[Part]:
    """Every one of `LOSSES`."""
    for name, (pixels, config) in LOSSES.items():
        yield loss_part(name, inputs.device, len(inputs.files), pixels, config=config)


def loss_part(
    name: str,
    device: torch.device,
    batch_size: int,
    pixels: int,
    *,
    config: ObjectiveConfig,
    width: int = VIT_SMALL,
    clusters: int = 27,
) -> Part:
    """The objective and its gradient; both ways return the loss and both gradients.

    Args:
        name: Of the part.
        device: Where to compute.
        batch_size: b, at least 2.
        pixels: n, of each crop.
        config: The objective.
        width: d.
        clusters: K.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(8, width, generator=generator)
    crops = []
    for _ in range(2):  # affinities on both sides of the thresholds, as of real images
        kind = torch.randint(len(kinds), (batch_size, pixels), generator=generator)
        noise = torch.randn(batch_size, pixels, width, generator=generator)
        logits = 2 * torch.randn(batch_size, pixels, clusters, generator=generator)
        embeddings = normalize(kinds[kind] + noise, dim=-1)
        crops.append(Pixels(embeddings.to(device), logits.softmax(dim=-1).to(device)))
    rolls = draw_rolls(batch_size, config.negatives, seed=0, step=0)

    def with_gradient(loss: Callable[[Pixels, Pixels], Tensor]) -> tuple[Tensor, ...]:
        first, second = (
            Pixels(crop.embeddings, crop.probs.clone().requires_grad_()) for crop in crops
        )
        total = loss(first, second)
        gradients = torch.autograd.grad(total, (first.probs, second.probs))
        return total.detach(), *gradients

    return Part(
        name=name,
        reference=lambda: with_gradient(lambda a, b: equation_8(a, b, rolls, config).total),
        fast=lambda: with_gradient(lambda a, b: Objective(config)(a, b, rolls).total),
        work=loss_work(batch_size, pixels, width, clusters, 1 + len(rolls)),
        difference=relative_error,
        tolerance=1e-5,
    )


def loss_work(batch_size: int, pixels: int, width: int, clusters: int, terms: int) -> Work:
    """The affinity, the agreement and two gradients of every pair; u, v and its gradient moved.

    Args:
        batch_size: b.
        pixels: n, of each crop.
        width: d.
        clusters: K.
        terms: One, and one for each roll.
    """
    return Work(
        fp32=terms * 2 * batch_size * pixels**2 * (width + 3 * clusters),
        traffic=terms * 2 * batch_size * pixels * (width + 2 * clusters) * 4,
    )
