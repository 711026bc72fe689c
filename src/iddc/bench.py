"""How fast this machine does a part of a training step, beside the plain way and the limit.

The plain way is what the equations and the libraries' defaults read like. Both ways get the same
inputs in the same process and take turns, so that a busy machine slows both. The limit is the time
that the part's arithmetic and memory traffic take at the measured rates of the machine.
"""

from __future__ import annotations

import json
import platform
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iddc import __version__
from iddc.config import ObjectiveConfig
from iddc.device import pick_precision
from iddc.losses import PENALTIES, REGULARIZERS, Objective, Pixels, cluster_frequencies
from iddc.runs import disk_errors, write_atomic
from iddc.thresholds import thresholds_of
from iddc.views import draw_rolls

VIT_SMALL = 384
"""The width of the backbone whose loss is measured."""
LOSSES = {
    "loss, ViT-S/16": (14**2, ObjectiveConfig()),
    "loss, ViT-S/8": (28**2, ObjectiveConfig()),
    "loss, 256 patches, centred": (256, ObjectiveConfig(centering="batch")),
}
"""Pixels of a crop, and the objective: of the paper's rows, and centred as by default."""
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""What the rates of a machine are measured with: larger than its caches."""
CPU_INFO = Path("/proc/cpuinfo")
TRIES = 5
"""The best of so many counts as the machine's rate."""


@dataclass(frozen=True)
class Part:
    """A part of a step, done two ways with the same result."""

    name: str
    plain: Callable[[], object]
    ours: Callable[[], object]
    flops: int
    """Floating-point operations of its matrix products, in fp32."""
    traffic: int
    """Bytes that are read or written at least once."""


@dataclass(frozen=True)
class Cost:
    """What one way takes."""

    seconds: tuple[float, ...]
    """Of each repetition."""
    memory: int
    """Bytes held at the peak, beyond what was there before."""

    @property
    def median(self) -> float:
        """The median of the repetitions, in seconds."""
        return median(self.seconds)

    def __str__(self) -> str:
        """The median and the range."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median:.4g} s ({low:.4g} to {high:.4g})"


@dataclass(frozen=True)
class Machine:
    """The hardware, and its measured rates."""

    hardware: str
    threads: int
    fp32_flops: float
    """Of a product of large matrices, per second."""
    bf16_flops: float | None
    """The same in bf16; None where the hardware does not compute in it."""
    bandwidth: float
    """Bytes read and written per second while a large tensor is copied."""

    def limit(self, part: Part) -> float:
        """The seconds that a part takes at least, if products and memory overlap fully."""
        return max(part.flops / self.fp32_flops, part.traffic / self.bandwidth)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    plain: Cost
    ours: Cost
    limit: float
    """Seconds."""

    @property
    def ratio(self) -> float:
        """How many times the plain way takes longer."""
        return self.plain.median / self.ours.median

    def cells(self) -> tuple[str, ...]:
        """As `HEADER` names them."""
        share = self.ours.memory / self.plain.memory if self.plain.memory else 0
        return (
            self.part,
            str(self.plain),
            str(self.ours),
            f"{self.ratio:.2f}",
            f"{self.limit:.4g} s",
            f"{self.plain.memory / 1e6:.0f} MB",
            f"{self.ours.memory / 1e6:.1f} MB ({share:.1%})",
        )


HEADER = ("part", "plain", "ours", "ratio", "limit", "plain memory", "our memory")


def bench(
    out: Path, device: torch.device, *, batch_size: int = 64, repeats: int = 7
) -> tuple[Machine, list[Row]]:
    """Measure every part and write the table, as text and as data.

    Args:
        out: The folder to write.
        device: Where to compute.
        batch_size: Images of a batch, at least 2.
        repeats: How often each way is done.

    Raises:
        SetupError: The folder cannot be written.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    machine = measure_machine(device)
    rows = [compare(part, machine, device, repeats) for part in parts(device, batch_size)]
    now = datetime.now(UTC)
    options = f"--batch-size {batch_size} --repeats {repeats} --device {device}"
    facts = {
        "hardware": machine.hardware,
        "date": now.date().isoformat(),
        "iddc": __version__,
        "torch": torch.__version__,
        "command": f"iddc bench --out DIR {options}",
    }
    words = re.sub(r"[^a-z0-9]+", "-", machine.hardware.lower()).strip("-")
    path = out / f"speed_{words}_{now:%Y-%m}"
    record = {**facts, "machine": asdict(machine), "parts": [asdict(row) for row in rows]}
    write_atomic(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    write_atomic(path.with_suffix(".md"), markdown(facts, machine, rows))
    return machine, rows


def markdown(facts: dict[str, str], machine: Machine, rows: Sequence[Row]) -> str:
    """The page of one machine."""
    bf16 = f"{machine.bf16_flops / 1e9:.0f}" if machine.bf16_flops else "no"
    lines = [
        f"# Speed on {machine.hardware}",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- threads: {machine.threads}",
        f"- matrix products: {machine.fp32_flops / 1e9:.0f} GFLOP/s in fp32, {bf16} in bf16",
        f"- memory: {machine.bandwidth / 1e9:.1f} GB/s read and written",
        "",
        "Median of the repetitions (fastest to slowest). Limit: the part's fp32 products or its "
        "memory traffic at these rates, whichever takes longer. Memory: the peak of tensors.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def compare(part: Part, machine: Machine, device: torch.device, repeats: int) -> Row:
    """Time both ways of a part in turns, after one unmeasured turn that takes their memory."""
    ways = (part.plain, part.ours)
    memory = [peak_memory(way, device) for way in ways]
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for way, times in zip(ways, seconds, strict=True):
            times.append(_time(way, device))
    plain, ours = (Cost(tuple(times), peak) for times, peak in zip(seconds, memory, strict=True))
    return Row(part.name, plain, ours, machine.limit(part))


def _time(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = perf_counter()
    work()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The bytes of tensors that exist at once while `work` runs, beyond those before.

    On a GPU as its allocator counts them. Elsewhere what an operation needs inside is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    storages = _Storages()
    with storages:
        work()
    return storages.most


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


def measure_machine(device: torch.device) -> Machine:
    """Measure how fast matrices are multiplied and memory is copied."""
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
    size = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])

    def product_rate(dtype: torch.dtype) -> float:
        a = torch.randn(side, side, device=device).to(dtype)
        return 2 * side**3 / _fastest(lambda: a @ a, device)

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    native = pick_precision("auto", device) == "bf16"
    return Machine(
        hardware=hardware(device),
        threads=torch.get_num_threads(),
        fp32_flops=product_rate(torch.float32),
        bf16_flops=product_rate(torch.bfloat16) if native else None,
        bandwidth=2 * size / _fastest(lambda: target.copy_(source), device),
    )


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(_time(work, device) for _ in range(TRIES))


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor and how many cores of it are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def parts(device: torch.device, batch_size: int) -> Iterator[Part]:
    """What is measured, one after the other, so that only one needs memory at a time."""
    for name, (pixels, config) in LOSSES.items():
        yield loss_part(name, device, batch_size, pixels, config=config)


# The loss, with its gradient.


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

    terms, pairs = 1 + len(rolls), batch_size * pixels**2
    return Part(
        name=name,
        plain=lambda: with_gradient(lambda a, b: plain_objective(config, a, b, rolls)),
        ours=lambda: with_gradient(lambda a, b: Objective(config)(a, b, rolls).total),
        flops=terms * 2 * pairs * (width + 3 * clusters),
        traffic=terms * 2 * batch_size * pixels * (width + 2 * clusters) * 4,
    )


def plain_objective(
    config: ObjectiveConfig, first: Pixels, second: Pixels, rolls: Sequence[int]
) -> Float[Tensor, ""]:
    """Eq. (8) as the equations read: all pairs in memory, and masks of booleans."""
    u, u_plus, v, v_plus = first.embeddings, second.embeddings, first.probs, second.probs
    if config.centering == "batch":
        mean = torch.stack([u, u_plus]).mean(dim=(0, 1, 2))
        u, u_plus = normalize(u - mean, dim=-1), normalize(u_plus - mean, dim=-1)

    def penalty(disagreement: Tensor) -> Tensor:
        return PENALTIES[config.penalty](disagreement, config.log_offset)

    t_plus, t_minus = map(float, thresholds_of(config))
    affinity = u @ u_plus.mT
    selected = affinity > t_plus
    weights = affinity if config.positive_affinity else torch.ones_like(affinity)
    costs = weights * selected * penalty(1 - v @ v_plus.mT)
    total = config.positive_weight * costs.sum() / selected.sum().clamp(min=1)

    others = (u, v) if config.negative_crops == "first" else (u_plus, v_plus)
    for roll in rolls:
        u_minus, v_minus = (x.roll(roll, dims=0) for x in others)
        affinity = u @ u_minus.mT
        selected = affinity < t_minus
        match config.negative_affinity:
            case "paper":
                weights = 1 - affinity
            case "released":
                weights = 1 - affinity.clamp(min=0)
            case "off":
                weights = torch.ones_like(affinity)
        costs = weights * selected * penalty(v @ v_minus.mT)
        negative = costs.sum() / selected.sum().clamp(min=1)
        total = total + config.negative_weight * negative / len(rolls)

    both = config.regularizer_crops == "both"
    frequencies = cluster_frequencies(torch.cat([v, v_plus]) if both else v)
    return total + config.regularizer_weight * REGULARIZERS[config.regularizer](frequencies, config)
