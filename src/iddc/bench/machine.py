"""What a machine can do at most, and what a part of the work asks of it at least."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from iddc.device import pick_precision
from iddc.errors import counted

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""What the rates of a machine are measured with: larger than its caches."""
CPU_INFO = Path("/proc/cpuinfo")
TRIES = 5
"""The best of so many counts as the machine's rate."""


@dataclass(frozen=True)
class Work:
    """What must be computed and moved, whichever way it is done."""

    fp32: int = 0
    """Floating-point operations of products whose result needs single precision."""
    bf16: int = 0
    """The part of those that may be rounded to bf16: the frozen backbone's, and prediction's."""
    traffic: int = 0
    """Bytes that are read or written at least once."""

    def __add__(self, other: Work) -> Work:
        return Work(self.fp32 + other.fp32, self.bf16 + other.bf16, self.traffic + other.traffic)

    def __mul__(self, times: int) -> Work:
        return Work(self.fp32 * times, self.bf16 * times, self.traffic * times)


@dataclass(frozen=True)
class Machine:
    """The hardware, and its measured rates."""

    hardware: str
    threads: int
    fp32_flops: float
    """Floating-point operations per second of a product of large matrices."""
    bf16_flops: float | None
    """The same in bf16; None where the hardware does not compute in it."""
    bandwidth: float
    """Bytes read and written per second while a large tensor is copied."""

    def limit(self, work: Work) -> float:
        """The seconds that work takes at least, if products and memory overlap fully."""
        products = work.fp32 / self.fp32_flops + work.bf16 / (self.bf16_flops or self.fp32_flops)
        return max(products, work.traffic / self.bandwidth)


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


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the processor and how many cores of it are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Do it, and say how long it took until the device had finished."""
    _wait(device)
    start = perf_counter()
    work()
    _wait(device)
    return perf_counter() - start


def count_flops(work: Callable[[], object]) -> int:
    """Do it, and count its products, convolutions and attention, two operations for each term."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # as products: older PyTorch skips fused ones
        work()
    return int(counter.get_total_flops())


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(seconds_of(work, device) for _ in range(TRIES))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
