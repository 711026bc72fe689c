"""The benchmark: both ways give the same, and what it writes is what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import oracles
from iddc import bench
from iddc.cli import main
from iddc.config import NegativeAffinity, ObjectiveConfig
from iddc.losses import PENALTIES, Pixels
from iddc.losses.pairs import BLOCK_PAIRS

CPU = torch.device("cpu")
MACHINE = bench.Machine("a machine", 2, fp32_flops=100.0, bf16_flops=None, bandwidth=10.0)


def some_part(**change: Any) -> bench.Part:
    part = bench.Part("sum", lambda: torch.ones(1000) + 1, lambda: None, flops=1000, traffic=20)
    return replace(part, **change)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment's work instead of a minute's."""
    monkeypatch.setitem(bench.MATMUL_SIDE, "cpu", 16)
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1024)
    small = {name: (9, config) for name, (_, config) in bench.LOSSES.items()}
    monkeypatch.setattr(bench, "LOSSES", small)


# Both ways.


@pytest.mark.parametrize("name", bench.LOSSES)
def test_loss_and_gradients_are_those_of_the_plain_form(name: str) -> None:
    pixels, config = bench.LOSSES[name]
    part = bench.loss_part(name, CPU, 3, pixels, config=config, width=32)
    plain, ours = part.plain(), part.ours()
    assert isinstance(plain, tuple)
    assert isinstance(ours, tuple)
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    for gradient, expected in zip(ours[1:], plain[1:], strict=True):
        assert expected.any()
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


CHANGES: list[dict[str, Any]] = [
    *({"penalty": name} for name in PENALTIES),
    *({"negative_affinity": name} for name in get_args(NegativeAffinity)),
    {"positive_affinity": False, "positive_weight": 0.7},
    {"centering": "batch"},
    {"negative_crops": "second", "regularizer_crops": "both"},
    {"positive_threshold": 1.0, "negative_threshold": -1.0},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_plain_form_is_equation_8(change: dict[str, Any]) -> None:
    config = ObjectiveConfig(**change)
    generator = torch.Generator().manual_seed(0)

    def directions() -> Tensor:
        u = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(u, dim=-1)

    first, second = (
        Pixels(
            directions(),
            torch.rand(3, 4, 2, generator=generator, dtype=torch.float64).softmax(dim=-1),
        )
        for _ in range(2)
    )
    crops = [x.tolist() for crop in (first, second) for x in (crop.embeddings, crop.probs)]
    found = bench.plain_objective(config, first, second, [1, 2])
    expected = oracles.equation_8(*crops, [1, 2], config).total
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_the_loss_takes_less_than_a_twentieth_of_the_plain_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks as small beside the batch as the default's are beside 64 images."""
    monkeypatch.setitem(BLOCK_PAIRS, "cpu", 2**13)
    part = bench.loss_part("loss", CPU, 2, 784, config=ObjectiveConfig(), width=48)
    assert bench.peak_memory(part.ours, CPU) < bench.peak_memory(part.plain, CPU) / 20


def test_products_of_the_loss_are_counted() -> None:
    """One affinity, one agreement and two gradients for each pair of four terms."""
    part = bench.loss_part("loss", CPU, 4, 10, config=ObjectiveConfig(), width=16, clusters=3)
    assert part.flops == 4 * 400 * 2 * (16 + 3 + 3 + 3)


# Measuring.


def test_peak_memory_counts_what_exists_at_once() -> None:
    kept = torch.ones(1000)

    def work() -> None:
        first = kept + 1  # 4000 bytes
        second = first.view(10, 100).mT.contiguous()  # 4000 more
        del first
        second.add_(1)
        kept.mul_(1).view(-1)
        torch.cat([second.flatten(), second.flatten()])  # 4000 + 8000 with the copies

    assert bench.peak_memory(lambda: kept.add_(1), CPU) == 0
    assert bench.peak_memory(lambda: kept + 1, CPU) == 4000
    assert bench.peak_memory(work, CPU) == 12000


def test_ways_take_turns_after_one_that_is_not_timed() -> None:
    turns: list[str] = []
    part = some_part(plain=lambda: turns.append("plain"), ours=lambda: turns.append("ours"))
    row = bench.compare(part, MACHINE, CPU, 3)
    assert turns == ["plain", "ours"] * 4
    assert len(row.plain.seconds) == len(row.ours.seconds) == 3


def test_memory_of_either_way_is_its_own() -> None:
    row = bench.compare(some_part(), MACHINE, CPU, 1)
    assert (row.plain.memory, row.ours.memory) == (8000, 0)


def test_the_limit_is_the_slower_of_products_and_memory() -> None:
    assert MACHINE.limit(some_part()) == 10
    assert MACHINE.limit(some_part(traffic=2000)) == 200


def test_a_row_shows_medians_ranges_ratio_and_limit() -> None:
    plain, ours = bench.Cost((4.0, 2.0, 9.0), 2_000_000), bench.Cost((1.0, 0.5, 3.0), 100_000)
    assert bench.Row("loss", plain, ours, 0.25).cells() == (
        "loss",
        "4 s (2 to 9)",
        "1 s (0.5 to 3)",
        "4.00",
        "0.25 s",
        "2 MB",
        "0.1 MB (5.0%)",
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rates_of_the_machine_are_measured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "pick_precision", lambda *_: precision)
    machine = bench.measure_machine(CPU)
    assert machine.fp32_flops > 0
    assert machine.bandwidth > 0
    assert (machine.bf16_flops is not None) == (precision == "bf16")
    assert f"{torch.get_num_threads()} threads" in machine.hardware


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_memory_and_name_of_a_gpu_are_its_own() -> None:
    gpu = torch.device("cuda")
    kept = torch.ones(2**20, device=gpu)
    assert bench.peak_memory(lambda: kept + 1, gpu) == 2**22
    assert bench.hardware(gpu) == torch.cuda.get_device_name()
    assert bench.compare(some_part(), MACHINE, gpu, 1).plain.median > 0


# The command.


@pytest.mark.usefixtures("small")
def test_bench_prints_a_table_and_writes_it_with_the_hardware(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "results"
    words = ["--batch-size", "2", "--repeats", "2", "--device", "cpu"]
    assert main(["bench", "--out", str(out), *words]) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["part", "plain", "ours", "ratio"]
    assert [line.split("  ")[0] for line in lines] == list(bench.LOSSES)
    assert str(out) in last
    page, record = sorted(out.iterdir(), reverse=True)
    assert (page.suffix, record.suffix) == (".md", ".json")
    figures = json.loads(record.read_text())
    hardware = bench.hardware(CPU)
    assert figures["hardware"] == figures["machine"]["hardware"] == hardware
    assert [len(part["ours"]["seconds"]) for part in figures["parts"]] == [2, 2, 2]
    text = page.read_text()
    assert hardware in text
    assert figures["command"] == f"iddc bench --out DIR {' '.join(words)}"
    assert text.count("\n| loss, ") == 3


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--batch-size", "1", 2), ("--repeats", "0", 1)]
)
def test_bench_refuses_what_it_cannot_measure(
    option: str, value: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--out", str(tmp_path / "out"), option, value]) == 2
    error = capsys.readouterr().err
    assert f"{option}: expected at least {least}, found {value}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_bench_says_where_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "--out", str(tmp_path / "file")]) == 4
    assert "Cannot write" in capsys.readouterr().err


def test_hardware_without_a_name_is_named_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert bench.hardware(CPU).startswith("riscv64, ")
