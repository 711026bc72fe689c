"""One step's loss and gradients, in pieces that fit in memory.

Eq. (8) compares images with each other, so the loss of a batch is not the sum of the losses of its
parts. The backbone and the head run on micro-batches; their small outputs are put together, over
micro-batches and over processes; the loss is taken of the whole, and gives its gradient with
respect to the logits once; each micro-batch then sends its rows of that gradient backwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from iddc.backbones import Backbone
from iddc.config import Precision
from iddc.device import autocast, in_memory, pick_precision
from iddc.losses import Objective, Pixels, Terms
from iddc.network import Network
from iddc.training.distributed import Processes

CPU_CROPS = 16
"""Crops that a CPU embeds at once: more leave its cache and cost a fifth more time (ViT-Ti/16)."""


@dataclass(frozen=True)
class StepResult:
    """What one step found."""

    terms: Terms
    """The terms of the global batch, without graph."""
    shares: Float[Tensor, " k"]
    """The part of the patches of which each cluster is the most probable one."""
    images_at_once: int
    """Images in one forward pass that fit in memory: `micro_batch_size`, or fewer."""


def backpropagate(
    network: Network,
    inputs: UInt8[Tensor, "b 2 3 S S"] | Float[Tensor, "b 2 d h w"],
    rolls: Sequence[int],
    objective: Objective,
    *,
    processes: Processes,
    counts: Sequence[int],
    micro_batch_size: int,
    precision: Precision = "fp32",
    train_backbone: bool = False,
    places: Int64[Tensor, "2 m"] | None = None,
    note: Callable[[str], object] = warnings.warn,
) -> StepResult:
    """Add the gradients of the objective on the global batch to the parameters.

    The sum over processes is taken here: every process ends with the gradients of the whole batch.
    The backbone gets gradients only if `train_backbone`. The head and the loss are in float32.

    Args:
        network: The network; the caller has cleared its gradients.
        inputs: The two crops of this process's images, or their raw embeddings.
        rolls: Which images are negatives of which, in the global batch.
        objective: Eq. (8).
        processes: This process among all.
        counts: How many images each process has.
        micro_batch_size: Images in one forward pass, fewer where memory is short.
        precision: The backbone's arithmetic.
        train_backbone: Whether gradients reach the backbone.
        places: The patches of the first and of the second crop that the loss compares; None: all.
        note: Told in one line when memory is short.
    """
    device = processes.device
    empty = not len(inputs)  # no image fell to this process: a blank one tells the shapes
    blank = inputs.new_zeros(1, *inputs.shape[1:])
    images = blank if empty else inputs
    trained = list((network if train_backbone else network.head).parameters())
    graph: list[Tensor] = []  # the logits, if all images fit in one forward pass

    def embed(chunk: Tensor) -> Tensor:
        rows = chunk.to(device).flatten(0, 1)
        return rows if rows.is_floating_point() else embed_crops(network, rows, precision)

    def forward(at_once: int) -> tuple[Tensor, Tensor]:
        chunks = torch.split(images, at_once)
        keep = len(chunks) == 1
        with torch.set_grad_enabled(keep and train_backbone):
            features = [embed(chunk) for chunk in chunks]
        with torch.set_grad_enabled(keep):
            logits = [compared_logits(network, part, places) for part in features]
        graph[:] = logits if keep else []
        return torch.cat([part.detach() for part in features]), torch.cat(logits).detach()

    def backward(at_once: int) -> None:
        for parameter in trained:
            parameter.grad = None  # of an attempt that ran out of memory
        if graph and len(images) <= at_once:
            torch.autograd.backward(graph.pop(), own)
            return
        graph.clear()
        pairs = (torch.split(maps, 2 * at_once) for maps in (features, own))
        for chunk, part, rows in zip(torch.split(images, at_once), *pairs, strict=True):
            inner = embed(chunk) if train_backbone else part
            torch.autograd.backward(compared_logits(network, inner, places), rows)

    (features, logits), at_once = in_memory(forward, micro_batch_size, len(images), note)

    def gathered(rows: Tensor) -> Tensor:
        pairs = rows.reshape(-1, 2, *rows.shape[1:])
        return processes.gather(pairs[: len(inputs)], counts)

    all_logits = gathered(logits).requires_grad_()
    pixels = _pixels(gathered(features), all_logits, places)
    terms = objective(*pixels, rolls)
    (gradient,) = torch.autograd.grad(terms.total, all_logits)

    scale = 1.0
    if train_backbone and pick_precision(precision, device) == "fp16":
        scale = _power_of_two_to_one(gradient)
    own = (processes.own(gradient, counts) * scale).flatten(0, 1)
    if not empty:
        _, at_once = in_memory(backward, at_once, len(images), note)
    processes.add_gradients(trained)
    if scale != 1:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= scale
    winners = all_logits.detach().argmax(dim=2).flatten()  # of the patches compared
    shares = winners.bincount(minlength=network.num_clusters) / len(winners)
    values = Terms(*(term.detach() for term in vars(terms).values()))
    return StepResult(values, shares, at_once)


def embed_crops(
    network: Network, crops: UInt8[Tensor, "n 3 S S"], precision: Precision
) -> Float[Tensor, "n d h w"]:
    """The raw embeddings of crops, in single precision."""
    # As in prediction: convolutions are faster when the channels of a pixel lie together.
    crops = crops.contiguous(memory_format=torch.channels_last)
    parts = torch.split(crops, CPU_CROPS) if crops.device.type == "cpu" else (crops,)
    with autocast(crops.device, precision):
        return torch.cat([network.embed(part).float() for part in parts])


def compared_logits(
    network: Network, features: Float[Tensor, "b2 d h w"], places: Int64[Tensor, "2 m"] | None
) -> Float[Tensor, "b2 k m"]:
    """The logits of the patches that the loss compares; rows are first and second crops in turn."""
    if places is None:
        # A CPU's cache holds what the head computes for some crops, not for all of them.
        parts = torch.split(features, CPU_CROPS) if features.device.type == "cpu" else [features]
        return torch.cat([network.logits_from(part).flatten(2) for part in parts])
    here = places.to(features.device)
    crops = [network.logits_at(features[crop::2], here[crop]) for crop in (0, 1)]
    return torch.stack(crops, dim=1).flatten(0, 1)


def _pixels(
    features: Float[Tensor, "b 2 d h w"],
    logits: Float[Tensor, "b 2 k m"],
    places: Int64[Tensor, "2 m"] | None,
) -> tuple[Pixels, Pixels]:
    def crop(index: int) -> Pixels:
        embeddings = features[:, index].flatten(2).mT
        if places is not None:
            embeddings = embeddings[:, places[index].to(features.device)]
        return Pixels(normalize(embeddings, dim=-1), logits[:, index].mT.softmax(dim=-1))

    return crop(0), crop(1)


def _power_of_two_to_one(gradient: Tensor) -> float:
    """The power of two that brings the largest entry near 1: fp16 has no smaller numbers than 6e-8.

    It is exact to multiply by, and needs no memory from step to step.
    """
    largest = float(gradient.abs().max())
    return 2.0 ** -round(math.log2(largest)) if 0 < largest < math.inf else 1.0


def images_at_once(
    backbone: Backbone, crop_size: int, device: torch.device, *, end_to_end: bool
) -> int:
    """Estimate how many images fit in one forward pass, in a quarter of a GPU or 1 GiB elsewhere.

    On the CPU it depends on the configuration alone, so that a resumed run is the same.
    """
    floats: float = 12 * backbone.embed_dim  # the head's activations, one block of the backbone
    if end_to_end:
        # A block of a ViT of width d has 12 d^2 weights and keeps about 17 d numbers per patch.
        weights = sum(parameter.numel() for parameter in backbone.parameters())
        floats += 17 * weights / (12 * backbone.embed_dim)
    per_image = 2 * (crop_size / backbone.patch_size) ** 2 * floats * 4
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 4
    else:
        memory = 2**30
    return max(1, int(memory / per_image))
