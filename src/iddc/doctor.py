"""What this machine offers, and what is missing: the facts that a report of a problem needs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from iddc import __version__

EXTRAS = {
    "cloud": ("aiohttp", "fsspec", "gcsfs", "s3fs"),
    "codecs": ("imagecodecs",),
    "crf": ("pydensecrf2",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "formats": ("contourpy", "pycocotools"),
    "geo": ("rasterio", "pyogrio"),
    "label": ("fastapi", "uvicorn"),
    "openvino": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "parquet": ("pyarrow",),
    "plots": ("matplotlib",),
    "ray": ("ray",),
    "tensorboard": ("tensorboard",),
}
"""The optional extras and the packages that each brings."""
MIN_DISK_GB = 2
"""Room for one run with its checkpoints, and some masks."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    value: str
    advice: str = ""
    """What to do; empty when nothing is wrong."""


def examine(folder: Path) -> Iterator[Finding]:
    """Look at Python, the packages, the processor, the GPU, the disk and the weights.

    Args:
        folder: Where runs would be written; its disk is measured.
    """
    yield Finding("iddc", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    broken = False
    for package in ("torch", "torchvision", "timm"):
        finding = _package(package)
        broken |= bool(finding.advice)
        yield finding
    yield from _machine(folder)
    for extra, packages in EXTRAS.items():
        try:
            yield Finding(f"extra {extra}", ", ".join(map(version, packages)))
        except PackageNotFoundError:
            yield Finding(f"extra {extra}", f"not installed: pip install 'iddc[{extra}]'")
    if not broken:
        yield from _accelerators()
        yield from _weights()


def _package(name: str) -> Finding:
    try:
        return Finding(name, str(import_module(name).__version__))
    except Exception as error:  # a mismatched torch and torchvision raise RuntimeError on import
        return Finding(
            name,
            f"cannot be imported ({type(error).__name__}: {error})".splitlines()[0],
            "Install iddc again in a fresh environment: torch, torchvision and timm must match.",
        )


def _machine(folder: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    yield Finding("cpu cores", str(cores))
    if sys.platform != "win32":
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        yield Finding("memory", f"{pages * size / 1e9:.0f} GB")
    free = shutil.disk_usage(folder).free / 1e9
    yield Finding(
        "free disk",
        f"{free:.0f} GB in {folder.resolve()}",
        "" if free >= MIN_DISK_GB else f"Free at least {MIN_DISK_GB} GB, or write runs elsewhere.",
    )


def _accelerators() -> Iterator[Finding]:
    import torch

    from iddc.device import pick_device, pick_precision

    gpus = [
        f"{p.name}, {p.total_memory / 1e9:.0f} GB"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    if torch.backends.mps.is_available():
        gpus.append("Apple GPU (mps)")
    yield Finding("gpu", "; ".join(gpus) or "none: training runs on the CPU")
    precision = pick_precision("auto", pick_device())
    yield Finding("arithmetic", f"{precision} on {pick_device()}")
    yield Finding("fused loss", _fused_loss())


def _fused_loss() -> str:
    from iddc.losses import fused_obstacle

    obstacle = fused_obstacle()
    if obstacle:
        return f"not available ({obstacle}): blocks"
    return f"triton {import_module('triton').__version__}"


def _weights() -> Iterator[Finding]:
    from iddc.backbones import BACKBONES, is_here

    here = [name for name in (*BACKBONES, "bundled") if is_here(name)]
    yield Finding("backbones here", ", ".join(here) or "none; see `iddc models`")
