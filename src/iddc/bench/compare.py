"""Two ways to the same result, done in turns: time, memory, and how far they differ."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iddc.bench.machine import Machine, Work, seconds_of
from iddc.errors import NumericError

PATIENCE = 40.0
"""After so many seconds a part is not repeated again, if it was `FEWEST` times."""
FEWEST = 3


@dataclass(frozen=True)
class Part:
    """A part of the work, done two ways with the same result."""

    name: str
    reference: Callable[[], object]
    """The work as the equations and the libraries' defaults read."""
    fast: Callable[[], object]
    """The work as the package does it."""
    work: Work
    """What both must do, all `units` together."""
    difference: Callable[[Any, Any], float]
    """The difference of the two results."""
    tolerance: float
    """The largest difference that counts as the same result."""
    units: int = 1
    """The steps or images of one turn: time and work are given for one of them."""


@dataclass(frozen=True)
class Cost:
    """What one way takes."""

    seconds: tuple[float, ...]
    """The time of each repetition."""
    memory: int
    """Bytes of tensors at the peak, beyond what was there before."""

    @property
    def median(self) -> float:
        """The median of the repetitions, in seconds."""
        return median(self.seconds)

    def __str__(self) -> str:
        """The median and the range."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median:.4g} s ({low:.4g} to {high:.4g})"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    reference: Cost
    fast: Cost
    limit: float
    """Seconds."""
    difference: float
    """Between the two results, as the part measures it."""

    @property
    def ratio(self) -> float:
        """How many times the reference takes longer."""
        return self.reference.median / self.fast.median

    @property
    def share(self) -> float:
        """How much of the limit is reached, in [0, 1]."""
        return self.limit / self.fast.median


def time_both(part: Part, machine: Machine, device: torch.device, repeats: int) -> Row:
    """Time both ways of a part in turns, after one unmeasured turn that takes their memory.

    Raises:
        NumericError: The results of that turn differ by more than the part tolerates.
    """
    ways = (part.reference, part.fast)
    results, memory = zip(*(_with_peak_memory(way, device) for way in ways), strict=True)
    difference = part.difference(*results)
    if not difference <= part.tolerance:
        raise NumericError(
            f"{part.name}: the result differs from the reference by {difference:.3g}, expected at "
            f"most {part.tolerance:g}. Its time would mean nothing; please report this."
        )
    del results
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(repeats):
        if turn >= FEWEST and sum(map(sum, seconds)) > PATIENCE:
            break
        for way, times in zip(ways, seconds, strict=True):
            times.append(seconds_of(way, device))
    reference, fast = (
        Cost(tuple(time / part.units for time in times), peak)
        for times, peak in zip(seconds, memory, strict=True)
    )
    return Row(part.name, reference, fast, machine.limit(part.work) / part.units, difference)


def relative_error(expected: Any, found: Any) -> float:
    """The largest |found - expected| / |expected| (L2) of numbers, arrays or tensors in turn."""
    errors = []
    for one, other in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        a, b = (x.detach() if isinstance(x, Tensor) else torch.tensor(x) for x in (one, other))
        a, b = a.double(), b.double()
        errors.append(float((b - a).norm() / a.norm().clamp(min=1e-300)))
    return max(errors)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The bytes of tensors that exist at once while `work` runs, beyond those before.

    On a GPU as its allocator counts them. Elsewhere what an operation needs inside, and what
    Pillow and other processes hold, is not seen.
    """
    return _with_peak_memory(work, device)[1]


def _with_peak_memory(work: Callable[[], object], device: torch.device) -> tuple[object, int]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, int(torch.cuda.max_memory_allocated(device) - before)
    storages = _Storages()
    with storages:
        result = work()
    return result, storages.most


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, from their birth to their end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.now = self.most = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import its compiler, only to keep it away: seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self.known and storage not in inputs:
                self.known.add(storage)
                weakref.finalize(storage, self._add, -storage.nbytes())
                self._add(storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
