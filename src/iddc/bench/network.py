"""Backbone, head and optimiser of a training step, beside the reference."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from iddc.bench.compare import Part, relative_error
from iddc.bench.inputs import Case, Inputs
from iddc.bench.machine import Work, count_flops
from iddc.config import Experiment
from iddc.learning.learner import Learner
from iddc.methods.iddc import patch_logits
from iddc.network import Network, build_network, embed_crops
from iddc.processes import Processes
from iddc.views import ViewDataset, collate_views, draw_patches

ROUNDED = 0.03
"""The difference that is tolerated where the backbone computes in bf16 and that of the reference in
fp32, or where embeddings are kept in half precision."""


def backbone_part(inputs: Inputs, case: Case) -> Part:
    """The embeddings of both crops: one after the other in fp32, or together as training does."""
    experiment = case.experiment(len(inputs.files))
    network = build_network(experiment).to(inputs.device).eval()
    views = ViewDataset(inputs.files, experiment.views, experiment.seed, experiment.reading)
    batch = collate_views([views[0, index] for index in range(len(inputs.files))])
    crops = batch.crops.to(inputs.device)

    @torch.no_grad()
    def reference() -> Tensor:
        return torch.stack([network.embed(crop) for crop in crops.unbind(1)], dim=1).flatten(0, 1)

    @torch.no_grad()
    def fast() -> Tensor:
        return embed_crops(network, crops.flatten(0, 1), experiment.training.precision)

    return Part(
        name=f"backbone, {case.name}",
        reference=reference,
        fast=fast,
        work=backbone_work(network, crops.shape[-1]) * (2 * len(crops)) + once(network.backbone),
        difference=relative_error,
        tolerance=ROUNDED,
    )


def backbone_work(network: Network, side: int) -> Work:
    """One crop: its products, and its pixels and embeddings; the weights are not in it."""
    crop = torch.zeros(1, 3, side, side, device=network.backbone.mean.device)
    with torch.no_grad():
        flops = count_flops(lambda: network.embed(crop))
    numbers = network.backbone.num_patches(side) * network.backbone.embed_dim
    return Work(bf16=flops, traffic=3 * side**2 + 4 * numbers)


def head_part(inputs: Inputs, case: Case) -> Part:
    """The logits of the patches that the loss compares, of both crops, and the head's gradients.

    Reference: of all patches, one crop after the other. Fast: as training does.
    """
    images = len(inputs.files)
    experiment = case.experiment(images)
    side, device = experiment.views.crop_size, inputs.device
    network = build_network(experiment).to(device).train()
    weights = list(network.head.parameters())
    patches = patches_of(network, experiment, 0).to(device)
    grid = round(network.backbone.num_patches(side) ** 0.5)
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(2, images, *shape, generator=generator).to(device)

    features = some(network.backbone.embed_dim, grid, grid)
    gradient = some(network.num_clusters, patches.shape[1])

    def reference() -> list[Tensor]:
        logits = [
            network.logits_from(crops).flatten(2)[:, :, here]
            for crops, here in zip(features, patches, strict=True)
        ]
        return [*torch.autograd.grad(torch.stack(logits), weights, gradient)]

    # As training has them: both crops of each image.
    rows, row_gradient = (both.transpose(0, 1).contiguous() for both in (features, gradient))
    compared = patches if experiment.training.patches else None

    def fast() -> list[Tensor]:
        logits = patch_logits(network.head, rows, compared)
        return [*torch.autograd.grad(logits, weights, row_gradient)]

    return Part(
        name=f"head, {case.name}",
        reference=reference,
        fast=fast,
        work=head_work(network, side, patches.shape[1]) * (2 * images) + once(network.head) * 2,
        difference=relative_error,
        tolerance=1e-3,  # one ReLU of 16 million that rounds to the other side of 0 is 3e-4
    )


def head_work(network: Network, side: int, compared: int) -> Work:
    """Some patches of one crop, forward and backward; the weights are not in it."""
    width, number = network.backbone.embed_dim, network.backbone.num_patches(side)
    grid = round(number**0.5)
    features = torch.zeros(1, width, grid, grid, device=network.backbone.mean.device)
    weights = list(network.head.parameters())
    flops = count_flops(lambda: torch.autograd.grad(network.logits_from(features).sum(), weights))
    return Work(
        fp32=flops * compared // number,
        traffic=4 * compared * (width + 2 * network.num_clusters),
    )


def patches_of(network: Network, experiment: Experiment, step: int) -> Int64[Tensor, "2 m"]:
    """The patches of the first and of the second crop that a step compares."""
    number = network.backbone.num_patches(experiment.views.crop_size)
    return draw_patches(number, experiment.training.patches, experiment.seed, step)


def optimizer_part(inputs: Inputs, case: Case) -> Part:
    """Adam on the head: every weight by itself, or as training does."""
    experiment = case.experiment(len(inputs.files))
    learner = Learner(experiment, len(inputs.files), Processes(inputs.device))
    twin = build_network(experiment).to(inputs.device).head
    rate = experiment.training.learning_rate
    reference = torch.optim.Adam(twin.parameters(), lr=rate, foreach=False)
    optimizer = learner.optimizer
    assert optimizer is not None
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(twin.parameters(), learner.network.head.parameters(), strict=True):
        one.grad = torch.randn(one.shape, generator=generator).to(one)
        other.grad = one.grad.clone()

    def run(optimizer: torch.optim.Optimizer, head: nn.Module) -> list[nn.Parameter]:
        optimizer.step()
        return list(head.parameters())

    return Part(
        name=f"optimizer, {case.name}",
        reference=lambda: run(reference, twin),
        fast=lambda: run(optimizer, learner.network.head),
        work=once(learner.network.head) * 7,  # read: and gradient, two moments; written: three
        difference=relative_error,
        tolerance=1e-6,
    )


def once(module: nn.Module) -> Work:
    """Every weight, read or written once."""
    return Work(traffic=sum(weight.nbytes for weight in module.parameters()))
