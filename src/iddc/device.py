"""Where a run computes, in which arithmetic, and in pieces that fit its memory."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from iddc.config import Precision
from iddc.errors import ConfigError, SetupError

T = TypeVar("T")

_KEEP = {-4: 0, -1: -1, -2: 2**26}
"""Options of glibc's mallopt: no tensor is mapped (M_MMAP_MAX), none of the heap is given back
(M_TRIM_THRESHOLD), and it grows by 64 MB at a time (M_TOP_PAD)."""

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name, checked to be there; auto: a GPU if there is one.

    Raises:
        ConfigError: The name is not cpu, cuda, cuda:N, mps or auto.
        SetupError: This machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"Unknown device {name!r}. Known: auto, cpu, cuda, cuda:N, mps.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(
            f"No device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here. "
            "Use --device auto, or install a driver and a PyTorch build that fit the GPU."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SetupError("No device 'mps': it is for Macs with Apple silicon. Use --device auto.")
    return device


def pick_precision(name: Precision, device: torch.device) -> Precision:
    """bf16, fp16 or fp32; auto: bf16 where the hardware computes in it, else fp32.

    Emulated bf16 (old GPUs, CPUs without its instructions) is slower than fp32 and not chosen.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Underscored in torch 2.6 to 2.15; without them the answer is the safe one.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, check, bool)() for check in checks)
    else:
        native = False
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which layers compute in `precision`, auto being picked for the device."""
    dtype = AUTOCAST_TYPES.get(pick_precision(precision, device))
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def free_memory() -> int:
    """Bytes of this machine that are free or soon can be; where that is not told, half of all."""
    try:
        told = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        told = None
    if told:
        return int(told[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def keep_freed_memory() -> None:
    """Let this process keep the memory of large tensors that are freed, with the GNU C library.

    It maps a tensor of 32 MB or more anew each time and unmaps it when it is freed: every step then
    waits for the system to clear the same pages again (decision 010). Results do not change. On
    other systems nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _KEEP.items():
            mallopt(option, value)


def in_memory(
    work: Callable[[int], T], at_once: int, total: int, note: Callable[[str], object]
) -> tuple[T, int]:
    """Do work in pieces, and all of it again in pieces of half the size while memory is short.

    Args:
        work: Given how many images a piece has. Its result must not depend on it.
        at_once: How many it has at first.
        total: How many images there are.
        note: Told in one line of each repetition.

    Returns:
        The result, and how many images a piece had.

    Raises:
        SetupError: Memory is short for one image at a time.
    """
    while True:
        try:
            return work(at_once), at_once
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            if min(at_once, total) <= 1:
                raise SetupError(
                    "Not enough free memory for one image at a time. Use a smaller backbone, "
                    "smaller crops or windows, or --device cpu."
                ) from error
        # Only here are the tensors free that the error held.
        torch.cuda.empty_cache()
        at_once = (min(at_once, total) + 1) // 2
        note(f"not enough free memory: the same again with {at_once} images at once")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, of a GPU or of the machine."""
    words = ("can't allocate memory", "out of memory")  # on a CPU, and on Apple's GPUs
    short = any(word in str(error) for word in words)
    return short or isinstance(error, torch.OutOfMemoryError | MemoryError)
