"""Where a run computes, and in which arithmetic."""

from __future__ import annotations

import re

import torch

from iddc.config import Precision
from iddc.errors import ConfigError, SetupError

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
