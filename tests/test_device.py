"""Names of devices and arithmetic, and what this machine answers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iddc.device import autocast, free_memory, in_memory, pick_device, pick_precision
from iddc.errors import ConfigError, SetupError
from iddc.learning import embeddings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0x", "CPU", "", "meta"])
def test_an_unknown_device_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Unknown device .* Known: auto, cpu, cuda, cuda:N, mps"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_a_setup_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if name == "cuda" else 1)
    with pytest.raises(SetupError, match=f"No device '{name}'"):
        pick_device(name)


def test_mps_where_there_is_none_is_a_setup_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SetupError, match="Apple"):
        pick_device("mps")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")],
)
def test_auto_takes_a_gpu_if_there_is_one(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_on_a_gpu_is_bf16_only_where_it_is_not_emulated(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert pick_precision("auto", CUDA) == ("bf16" if native else "fp32")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_precision_on_a_cpu_is_bf16_where_it_has_instructions(
    avx512: bool, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert pick_precision("auto", CPU) == expected


def test_auto_precision_is_fp32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert pick_precision("auto", CPU) == "fp32"


def test_a_precision_that_is_asked_for_is_kept() -> None:
    assert [pick_precision(name, CPU) for name in ("bf16", "fp16", "fp32")] == [
        "bf16",
        "fp16",
        "fp32",
    ]


def test_layers_compute_in_the_precision() -> None:
    layer, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    with autocast(CPU, "bf16"):
        assert layer(x).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert layer(x).dtype == torch.float32


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
    ),
    RuntimeError("MPS backend out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_work_is_done_again_in_halves_until_it_fits_and_each_time_is_said(error: Exception) -> None:
    tried, notes = [], []

    def work(at_once: int) -> str:
        tried.append(at_once)
        if at_once > 2:
            raise error
        return "done"

    assert in_memory(work, 64, 7, notes.append) == ("done", 2)
    assert tried == [64, 4, 2]  # 64 at once of 7 are 7
    assert notes == [
        f"not enough free memory: the same again with {n} images at once" for n in (4, 2)
    ]


def test_too_little_memory_for_one_image_is_a_setup_error() -> None:
    def work(at_once: int) -> None:
        raise MemoryError

    with pytest.raises(SetupError, match="Not enough free memory for one image at a time"):
        in_memory(work, 2, 2, lambda _: None)


def test_other_errors_are_no_lack_of_memory() -> None:
    def work(at_once: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        in_memory(work, 2, 2, lambda _: None)


@pytest.mark.parametrize("text", ["MemTotal: 9 kB\nMemAvailable:   3 kB\n", "MemFree: 9 kB", None])
def test_free_memory_is_what_the_system_says_or_half_of_all(
    text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: Path) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_memory() == (3072 if text and "Available" in text else whole // 2)


@pytest.mark.parametrize(("free", "room"), [(400, 100), (2**50, embeddings.MEMORY)])
def test_embeddings_are_kept_in_a_quarter_of_what_is_free_and_no_more_than_it_says(
    free: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "free_memory", lambda: free)
    assert embeddings.cache_bytes() == room


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the GNU C library")
def test_in_training_tensors_come_to_reuse_the_memory_of_those_that_were_freed() -> None:
    code = """
import resource, torch
from iddc.processes import joined
with joined("cpu"):
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = map(int, done.stdout.split())
    # A page has 4 kB, or 2 MB where the system uses such.
    assert first >= 32
    assert last < 8
