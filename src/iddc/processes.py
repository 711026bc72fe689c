"""The processes that train together, one if torchrun did not start more.

A step's loss is defined on the global batch. So processes exchange the small tensors of their
images, compute the same loss, and add up the gradients of their own images: their number changes
time and memory, never the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn

from iddc.device import keep_freed_memory, pick_device

T = TypeVar("T")


class Processes:
    """This process among `size` ones: its rank and its device."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.size = size

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that falls to this process; parts differ by at most one."""
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[start:stop]

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every process, by rank."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor([numbers], device=self.device)
        table: list[list[int]] = self.gather(mine, [1] * self.size).tolist()
        return table

    def gather(self, rows: Shaped[Tensor, "b *rest"], counts: Sequence[int]) -> Tensor:
        """The rows of every process, by rank, of which process i has counts[i]."""
        if self.size == 1:
            return rows
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def local(self, rows: Shaped[Tensor, "b *rest"], counts: Sequence[int]) -> Tensor:
        """The rows of this process among the gathered ones."""
        start = sum(counts[: self.rank])
        return rows[start : start + counts[self.rank]]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:  # no image fell to this process
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather_objects(self, thing: T) -> list[T]:
        """What every process has, by rank."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def broadcast(self, thing: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return thing
        things = [thing]
        dist.broadcast_object_list(things, device=self.device)
        return things[0]

    def sync(self, module: nn.Module) -> None:
        """Give every process the weights of the first."""
        if self.size > 1:
            for tensor in chain(module.parameters(), module.buffers()):
                dist.broadcast(tensor.data, 0)


@contextmanager
def joined(device_name: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    if size == 1:
        yield Processes(device)
        return
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
