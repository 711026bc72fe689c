"""One step's loss and gradients, in pieces that fit in memory.

A loss compares images with each other, so the loss of a batch is not the sum of the losses of its
parts. The backbone and `Method.rows` run on micro-batches; what they find is put together, over
micro-batches and over processes; `Method.loss` is taken of the whole, and gives its gradient with
respect to the rows once; each micro-batch then sends its part of that gradient backwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from iddc.backbones import Backbone
from iddc.config import Precision
from iddc.device import in_memory, pick_precision
from iddc.gaps import filled, part_of
from iddc.methods.method import Batch, Images, Method, Rows
from iddc.network import Network, embed_crops
from iddc.processes import Processes


@dataclass(frozen=True)
class StepResult:
    """What one step found."""

    terms: dict[str, Float[Tensor, ""]]
    """The terms of the global batch, without graph."""
    batch: Batch
    """All images of the step."""
    rows: Rows
    """What `Method.rows` found for them, without graph."""

    @classmethod
    def of(cls, terms: dict[str, Tensor], batch: Batch, rows: Rows) -> StepResult:
        """Keep the values of a step, and forget its graph."""
        values, found = (
            {name: value.detach() for name, value in each.items()} for each in (terms, rows)
        )
        return cls(values, batch, found)

    @property
    def cluster_shares(self) -> Float[Tensor, " k"] | None:
        """The part of the patches of which each cluster is the most probable one."""
        if "logits" not in self.rows:
            return None
        logits = self.rows["logits"]
        clusters = logits.argmax(dim=2).flatten()
        return clusters.bincount(minlength=logits.shape[2]) / len(clusters)


class Pieces:
    """The images of a process in a step, cut into pieces that fit in memory.

    `forward` gives what the loss needs of the images of all processes, and `backward` sends the
    gradient of the loss through each piece. Every process ends with the gradients of the whole
    batch. Rows are in float32.

    Args:
        method: How the head learns.
        network: The network; of it the backbone is used.
        inputs: Both views of this process's images, or their raw embeddings, with gaps filled.
        images: This process's images.
        processes: This process among all.
        counts: How many images each process has.
        at_once: Images in one forward pass, fewer where memory is short.
        precision: The backbone's arithmetic.
        train_backbone: Whether gradients reach the backbone.
        valid: Which pixels of the views hold data; None: all of them.
        note: Told in one line when memory is short.
    """

    def __init__(
        self,
        method: Method,
        network: Network,
        inputs: UInt8[Tensor, "b 2 3 S S"] | Float[Tensor, "b 2 d h w"],
        images: Images,
        *,
        processes: Processes,
        counts: Sequence[int],
        at_once: int,
        precision: Precision = "fp32",
        train_backbone: bool = False,
        valid: Bool[Tensor, "b 2 S S"] | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.at_once = at_once
        """Images in one forward pass that fit in memory."""
        self._method, self._network, self._images = method, network, images
        self._processes, self._counts, self._note = processes, counts, note
        self._precision: Precision = precision
        self._train_backbone = train_backbone
        # A process to which no image fell computes a blank one, which tells the shapes.
        self._count, self._inputs, self._own = len(inputs), inputs, images
        self._valid = valid
        if not self._count:
            self._inputs, self._valid = inputs.new_zeros(1, *inputs.shape[1:]), None
            self._own = images.blank()
        self._features = self._inputs
        self._graph: Rows | None = None
        """The rows of this process with their graph, if all its images fit in one piece."""
        self._leaves: Rows = {}
        """The rows of all processes that the loss has gradients for."""

    def forward(self) -> tuple[Batch, Rows]:
        """All images of the step, and what the loss needs of each: leaves that want gradients."""
        (features, rows), self.at_once = in_memory(
            self._forward, self.at_once, len(self._inputs), self._note
        )
        gather, own = self._processes.gather, slice(self._count)
        batch = _gathered(
            self._images, gather(features[own], self._counts), self._processes, self._counts
        )
        every = {name: gather(row[own], self._counts).detach() for name, row in rows.items()}
        self._leaves = {
            name: row.requires_grad_() for name, row in every.items() if row.is_floating_point()
        }
        return batch, every

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of a loss of the rows to the parameters, and sum over processes."""
        # The gradient with respect to the rows is taken once, of the whole batch.
        found = torch.autograd.grad(loss, [*self._leaves.values()], allow_unused=True)
        gradients = {
            name: self._processes.local(gradient, self._counts)
            for name, gradient in zip(self._leaves, found, strict=True)
            if gradient is not None
        }
        scale = 1.0
        if self._train_backbone and self._half_precision:
            scale = _power_of_two_to_one([*gradients.values()])
        trained = [p for p in self._method.parameters() if p.requires_grad]
        if self._train_backbone:
            trained += self._network.backbone.parameters()

        # Each piece sends its part of that gradient backwards.
        def backward(at_once: int) -> None:
            for parameter in trained:
                parameter.grad = None  # of an attempt that ran out of memory
            self._backward(at_once, gradients, scale)

        if self._count:
            _, self.at_once = in_memory(backward, self.at_once, len(self._inputs), self._note)
        self._processes.add_gradients(trained)
        if scale != 1:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad /= scale

    @property
    def _half_precision(self) -> bool:
        return pick_precision(self._precision, self._processes.device) == "fp16"

    def _forward(self, at_once: int) -> tuple[Float[Tensor, "b 2 d h w"], Rows]:
        """The embeddings and the rows of this process's images."""
        self._graph = None  # of an attempt that ran out of memory
        starts, found = range(0, len(self._inputs), at_once), []
        keep = len(starts) == 1
        with torch.set_grad_enabled(keep and self._train_backbone):
            features = [self._embedded(slice(start, start + at_once)) for start in starts]
        with torch.set_grad_enabled(keep):
            for i, maps in enumerate(features):
                part = slice(i * at_once, i * at_once + len(maps))
                found.append(self._method.rows(maps, self._own.part(part)))
        if keep:
            self._graph = found[0]
        # Crops in one row: with five dimensions, the channels of a patch would move apart.
        crops = torch.cat([part.detach().flatten(0, 1) for part in features])
        self._features = crops.view(len(crops) // 2, 2, *crops.shape[1:])
        rows = {name: torch.cat([rows[name].detach() for rows in found]) for name in found[0]}
        return self._features, rows

    def _backward(self, at_once: int, gradients: Rows, scale: float) -> None:
        """Send the gradients of this process's rows backwards, times the scale."""
        if self._graph and len(self._inputs) <= at_once:
            graph, self._graph = self._graph, None
            _send(graph, gradients, slice(None), scale)
            return
        self._graph = None
        for start in range(0, len(self._inputs), at_once):
            part = slice(start, start + at_once)
            maps = self._features[part]
            if self._train_backbone:
                maps = self._embedded(part)
            rows = self._method.rows(maps, self._own.part(part))
            _send(rows, gradients, part, scale)

    def _embedded(self, part: slice) -> Float[Tensor, "b 2 d h w"]:
        device, chunk, valid = (
            self._processes.device,
            self._inputs[part],
            part_of(self._valid, part),
        )
        if chunk.is_floating_point():
            return chunk.to(device)
        crops = chunk.to(device).flatten(0, 1)
        maps = embed_crops(self._network, crops, self._precision)
        maps = filled(maps, None if valid is None else valid.flatten(0, 1))
        return maps.view(len(chunk), 2, *maps.shape[1:])


def _send(rows: Rows, gradients: Rows, part: slice, scale: float) -> None:
    learned = [name for name in gradients if rows[name].requires_grad]
    torch.autograd.backward(
        [rows[name] for name in learned],
        [gradients[name][part] * scale for name in learned],
    )


def _gathered(
    images: Images, features: Tensor, processes: Processes, counts: Sequence[int]
) -> Batch:
    """The images of all processes, with their embeddings."""
    values: dict[str, Any] = {field.name: getattr(images, field.name) for field in fields(images)}
    if processes.size > 1:
        for name in Images.PER_IMAGE:
            values[name] = processes.gather(values[name].to(processes.device), counts).cpu()
    return Batch(**values, features=features)


def _power_of_two_to_one(gradients: Sequence[Tensor]) -> float:
    """The power of two that brings the largest entry near 1: fp16 has no smaller numbers than 6e-8.

    It is exact to multiply by, and needs no memory from step to step.
    """
    largest = max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
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
