"""The benchmark: both ways give the same, what is counted is right, and what it writes is that."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from iddc import bench
from iddc.bench import compare, data, inputs, loss, machine, network, prediction, step, table
from iddc.cli import main
from iddc.config import (
    BenchPart,
    Experiment,
    ObjectiveConfig,
    Precision,
    PredictionConfig,
    TrainingConfig,
)
from iddc.errors import NumericError
from iddc.losses.pairs import BLOCK_PAIRS
from iddc.network import build_network
from iddc.segmenter import Segmenter

# Workers are forked; Python 3.12 warns of it where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CPU = torch.device("cpu")
MACHINE = bench.Machine("a machine", 2, fp32_flops=100.0, bf16_flops=None, bandwidth=10.0)
WORDS = ["--batch-size", "3", "--repeats", "2", "--device", "cpu"]


@dataclass(frozen=True)
class Tiny(inputs.Case):
    """Crops of 4 x 4 patches on a network of width 64; a recipe that compares some takes 5."""

    precision: Precision = "fp32"

    def experiment(self, batch_size: int) -> Experiment:
        """The recipe made small."""
        found = super().experiment(batch_size)
        some = 5 if found.training.patches else 0
        changes = {"patches": some, "precision": self.precision}
        return found.model_copy(
            update={
                "views": found.views.model_copy(update={"crop_size": 64, "short_side": 0}),
                "training": found.training.model_copy(update=changes),
                "prediction": PredictionConfig(window=64, overlap=16),
            }
        )


CASES = (
    Tiny("paper", "untrained:test_vit", "cocostuff27-vits16", 5),
    Tiny("default", "untrained:test_vit", "folder", 5),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment's work instead of minutes'."""
    monkeypatch.setitem(machine.MATMUL_SIDE, "cpu", 16)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 1024)
    monkeypatch.setattr(bench, "CASES", CASES)
    monkeypatch.setattr(data, "CASES", CASES)
    few = {name: (9, config) for name, (_, config) in loss.LOSSES.items()}
    monkeypatch.setattr(loss, "LOSSES", few)
    draw = inputs.Inputs.draw

    def draw_small(folder: Path, device: torch.device, batch_size: int) -> inputs.Inputs:
        return draw(folder, device, batch_size, count=4, size=(96, 80))

    monkeypatch.setattr(inputs.Inputs, "draw", draw_small)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> inputs.Inputs:
    folder = tmp_path_factory.mktemp("scenes")
    return inputs.Inputs.draw(folder, CPU, 3, count=4, size=(96, 80))


def some_part(**change: Any) -> compare.Part:
    part = compare.Part(
        "sum",
        reference=lambda: torch.ones(1000) + 1,
        fast=lambda: None,
        work=machine.Work(fp32=1000, traffic=20),
        difference=lambda reference, fast: 0.0,
        tolerance=0.0,
    )
    return replace(part, **change)


def difference(part: compare.Part) -> float:
    return part.difference(part.reference(), part.fast())


# Both ways.


@pytest.mark.parametrize("name", loss.LOSSES)
def test_loss_and_gradients_are_those_of_the_reference(name: str) -> None:
    pixels, config = loss.LOSSES[name]
    part = loss.loss_part(name, CPU, 3, pixels, config=config, width=32)
    reference: Any = part.reference()
    assert all(tensor.any() for tensor in reference)
    assert part.difference(reference, part.fast()) <= part.tolerance == 1e-5


def test_the_loss_takes_less_than_a_twentieth_of_the_memory_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks as small beside the batch as the default's are beside 64 images."""
    monkeypatch.setitem(BLOCK_PAIRS, "cpu", 2**13)
    part = loss.loss_part("loss", CPU, 2, 784, config=ObjectiveConfig(), width=48)
    assert compare.peak_memory(part.fast, CPU) < compare.peak_memory(part.reference, CPU) / 20


def test_decoded_pixels_are_equal(scenes: inputs.Inputs) -> None:
    part = data.decode_part(scenes)
    assert len(np.asarray(part.fast())) == 3
    assert difference(part) == 0


def test_crops_are_those_of_the_scaled_image(scenes: inputs.Inputs, small: None) -> None:
    part = data.views_part(scenes)
    reference: Any = part.reference()
    assert reference.shape == (3, 2, 3, 64, 64)
    assert part.difference(reference, part.fast()) <= part.tolerance


def test_a_crop_of_the_reference_is_cut_and_mirrored_by_hand() -> None:
    from PIL import Image

    from iddc.views import Crops

    values = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    crops = Crops((6, 4), ((0, 0), (3, 1)), flip=True)
    found = data.reference_cut(Image.fromarray(values), crops, 3).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found[0], values[0:3, 0:3][:, ::-1])
    assert np.array_equal(found[1], values[1:4, 3:6][:, ::-1])


NETWORK_PARTS = [network.backbone_part, network.head_part, network.optimizer_part]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("make", NETWORK_PARTS, ids=lambda make: make.__name__)
def test_parts_of_the_network_are_the_same_in_single_precision(
    make: Callable[..., compare.Part], case: Tiny, scenes: inputs.Inputs
) -> None:
    part = make(scenes, case)
    reference: Any = part.reference()
    assert all(torch.as_tensor(found).any() for found in reference)
    assert part.difference(reference, part.fast()) < 1e-5


@pytest.mark.parametrize("again", [False, True])
def test_a_default_step_learns_the_same_up_to_the_rounding_of_what_is_kept(
    again: bool, scenes: inputs.Inputs
) -> None:
    part = step.step_part(scenes, CASES[1], again=again)
    # PyTorch 2.6 rounds less well: there, the spacing of bf16.
    assert difference(part) < (1e-3 if torch.__version__ >= "2.7" else 2**-8)


def test_a_step_of_the_paper_learns_the_same(
    scenes: inputs.Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step.STEPS, "cpu", 2)
    part = step.step_part(scenes, CASES[0])
    assert part.units == 2
    assert difference(part) <= part.tolerance == 1e-5


def test_a_rounded_step_may_differ_more(scenes: inputs.Inputs) -> None:
    part = step.step_part(scenes, replace(CASES[0], precision="bf16"))
    assert 0 < difference(part) <= part.tolerance == network.ROUNDED


def test_views_seen_before_are_not_decoded_again(scenes: inputs.Inputs, tmp_path: Path) -> None:
    drawn = inputs.Inputs.draw(tmp_path, CPU, 3, count=4, size=(96, 80))
    fresh, again = step.step_parts(drawn, CASES[1])
    for path in tmp_path.glob("train/images/*"):
        path.unlink()
    again.fast()
    with pytest.raises(KeyError):  # no image, so no step and no loss
        fresh.fast()


def test_only_a_recipe_that_repeats_views_is_measured_on_them(scenes: inputs.Inputs) -> None:
    names = [part.name for case in CASES for part in step.step_parts(scenes, case)]
    assert names == ["step, paper", "step, default", "step, default, views seen before"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("make", [prediction.prediction_part, prediction.evaluation_part])
def test_clusters_are_those_of_single_windows(
    make: Callable[..., compare.Part], case: Tiny, scenes: inputs.Inputs
) -> None:
    part = make(scenes, case)
    assert difference(part) <= 0.001


def test_single_windows_are_feathered_as_those_of_a_prediction(scenes: inputs.Inputs) -> None:
    feathered = PredictionConfig(window=32, overlap=16, blend="tent", flip=False)
    experiment = CASES[0].experiment(3).model_copy(update={"prediction": feathered})
    experiment = experiment.model_copy(update={"training": TrainingConfig(precision="fp32")})
    network = build_network(experiment).eval()
    segmenter = Segmenter.of(network, experiment)
    for file in scenes.files:
        with Image.open(file.path) as image:
            found = prediction.reference_clusters(network, image.convert("RGB"), experiment)
            expected = segmenter.predict(image.convert("RGB")).clusters
        assert (found == expected).mean() > 0.999


def test_differences_of_clusters_are_shares_of_pixels(scenes: inputs.Inputs) -> None:
    maps = prediction.prediction_part(scenes, CASES[0])
    ones = np.ones((2, 5), np.uint8)
    other = ones.copy()
    other[0, 0] = 2
    assert maps.difference([ones, ones], [ones, other]) == 0.05
    counts = prediction.evaluation_part(scenes, CASES[0])
    assert counts.difference(np.array([[8, 2], [0, 0]]), np.array([[7, 2], [1, 0]])) == 0.1


# Counting.


def test_operations_are_two_for_each_term_of_a_product() -> None:
    def work() -> None:
        nn.functional.scaled_dot_product_attention(*(torch.ones(1, 2, 5, 3) for _ in range(3)))
        nn.functional.conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3))
        torch.ones(7, 3) @ torch.ones(3, 2)

    attention, convolution, product = 2 * 2 * 2 * 25 * 3, 2 * 2 * 9 * 3 * 4, 2 * 7 * 3 * 2
    assert machine.count_flops(work) == attention + convolution + product


def test_work_of_the_backbone_is_that_of_a_transformer() -> None:
    built = build_network(CASES[0].experiment(2))
    net: Any = built.backbone.net
    width, depth, hidden = net.embed_dim, len(net.blocks), net.blocks[0].mlp.fc1.out_features
    tokens = 16 + net.num_prefix_tokens
    block = 4 * width**2 + 2 * width * hidden + 2 * tokens * width
    patches = 16 * width * 3 * 16**2
    found = network.backbone_work(built, 64)
    assert found.bf16 == 2 * (depth * tokens * block + patches)
    assert found.traffic == 3 * 64**2 + 16 * width * 4
    assert found.fp32 == 0


def test_work_of_the_head_is_that_of_the_patches_compared() -> None:
    built = build_network(CASES[0].experiment(2))
    d, k = built.backbone.embed_dim, 5
    forward = 9 * d * d + d * d + d * k
    backward = 9 * d * d + 2 * (d * d + d * k)  # no gradient of the embeddings
    found = network.head_work(built, 64, 4)
    assert found.fp32 == 4 * 2 * (forward + backward)
    assert found.traffic == 4 * 4 * (d + 2 * k)


def test_products_of_the_loss_are_counted() -> None:
    """One affinity, one agreement and two gradients for each pair of four terms."""
    part = loss.loss_part("loss", CPU, 4, 10, config=ObjectiveConfig(), width=16, clusters=3)
    assert part.work.fp32 == 4 * 400 * 2 * (16 + 3 + 3 + 3)
    assert part.work.traffic == 4 * 2 * 40 * (16 + 3 + 3) * 4


def test_bytes_of_images_are_counted(scenes: inputs.Inputs) -> None:
    encoded = sum(file.path.stat().st_size for file in scenes.files)
    assert data.decode_part(scenes).work.traffic == encoded + 3 * 3 * 96 * 80
    assert data.views_work(3, 64).traffic == 2 * (3 * 2 * 3 * 64 * 64)


def test_adam_reads_four_numbers_for_each_weight_and_writes_three(scenes: inputs.Inputs) -> None:
    head = build_network(CASES[0].experiment(3)).head
    weights = sum(weight.numel() for weight in head.parameters())
    assert network.optimizer_part(scenes, CASES[0]).work == machine.Work(traffic=7 * 4 * weights)


def test_work_of_prediction_is_that_of_all_windows_and_mirror_images(
    scenes: inputs.Inputs,
) -> None:
    """96 x 80 pixels, windows of 64 that share 16: two by two, of each of two images."""
    experiment = CASES[0].experiment(2)
    built = build_network(experiment)
    part = prediction.prediction_part(scenes, CASES[0])
    images = len(list((scenes.folder / "val" / "images").iterdir()))
    d = built.backbone.embed_dim
    logits = 16 * 2 * (9 * d * d + d * d + 5 * d)
    one = network.backbone_work(built, 64).bf16 + logits
    assert part.work.bf16 == images * 2 * 4 * one
    weights = sum(4 * weight.numel() for weight in built.parameters())
    assert part.work.traffic == images * (4 * 96 * 80 + weights)


def test_work_of_a_step_is_the_sum_of_its_parts(scenes: inputs.Inputs) -> None:
    case = CASES[0]
    built = build_network(case.experiment(3))
    names = (data.decode_part(scenes), network.backbone_part(scenes, case))
    parts = [*names, network.head_part(scenes, case), network.optimizer_part(scenes, case)]
    expected = data.views_work(3, 64) + loss.loss_work(3, 16, built.backbone.embed_dim, 5, 3)
    for part in parts:
        expected += part.work
    assert step.step_part(scenes, case).work == expected * step.STEPS["cpu"]
    seen = step.step_part(scenes, CASES[1], again=True).work
    assert seen.bf16 == 0 < seen.fp32


def test_the_limit_is_the_slower_of_products_and_memory() -> None:
    assert MACHINE.limit(machine.Work(fp32=1000, traffic=20)) == 10
    assert MACHINE.limit(machine.Work(fp32=1000, traffic=2000)) == 200


def test_work_that_may_be_rounded_is_held_against_the_rate_of_bf16() -> None:
    work = machine.Work(fp32=1000, bf16=1000)
    assert MACHINE.limit(work) == 20
    assert replace(MACHINE, bf16_flops=500.0).limit(work) == 12


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

    assert compare.peak_memory(lambda: kept.add_(1), CPU) == 0
    assert compare.peak_memory(lambda: kept + 1, CPU) == 4000
    assert compare.peak_memory(work, CPU) == 12000


def test_ways_take_turns_after_one_that_is_not_timed() -> None:
    order: list[str] = []
    part = some_part(reference=lambda: order.append("reference"), fast=lambda: order.append("fast"))
    row = compare.time_both(part, MACHINE, CPU, 3)
    assert order == ["reference", "fast"] * 4
    assert len(row.reference.seconds) == len(row.fast.seconds) == 3


def test_what_takes_long_is_not_repeated_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "PATIENCE", 0.0)
    assert len(compare.time_both(some_part(), MACHINE, CPU, 9).fast.seconds) == compare.FEWEST
    assert len(compare.time_both(some_part(), MACHINE, CPU, 2).fast.seconds) == 2


def test_memory_of_either_way_is_its_own() -> None:
    row = compare.time_both(some_part(), MACHINE, CPU, 1)
    assert (row.reference.memory, row.fast.memory) == (8000, 0)


def test_time_and_limit_are_those_of_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "seconds_of", lambda work, device: 12.0)
    row = compare.time_both(some_part(units=4), MACHINE, CPU, 1)
    assert row.reference.seconds == row.fast.seconds == (3.0,)
    assert row.limit == 2.5


@pytest.mark.parametrize("found", [0.2, float("nan")])
def test_ways_that_disagree_are_not_timed(found: float) -> None:
    part = some_part(difference=lambda reference, fast: found, tolerance=0.1)
    with pytest.raises(NumericError, match=r"^sum: the result differs .* at most 0\.1\."):
        compare.time_both(part, MACHINE, CPU, 1)


def test_the_relative_error_is_that_of_the_worst_tensor() -> None:
    expected = [torch.tensor([3.0, 4.0]), (2.0, np.array([1, 2]))]
    found = [torch.tensor([3.0, 5.0]), (1.0, np.array([1, 2]))]
    assert compare.relative_error(expected, expected) == 0
    assert compare.relative_error(expected, found) == 0.5
    assert compare.relative_error(expected[0], found[0]) == pytest.approx(0.2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rates_of_the_machine_are_measured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pick_precision", lambda *_: precision)
    found = machine.measure_machine(CPU)
    assert found.fp32_flops > 0
    assert found.bandwidth > 0
    assert (found.bf16_flops is not None) == (precision == "bf16")
    assert f", {torch.get_num_threads()} thread" in found.hardware


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_memory_and_name_of_a_gpu_are_its_own() -> None:
    gpu = torch.device("cuda")
    kept = torch.ones(2**20, device=gpu)
    assert compare.peak_memory(lambda: kept + 1, gpu) == 2**22
    assert machine.hardware(gpu) == torch.cuda.get_device_name()
    assert compare.time_both(some_part(), MACHINE, gpu, 1).reference.median > 0


def test_hardware_without_a_name_is_named_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    for threads, told in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert machine.hardware(CPU) == f"riscv64, {told}"


# The table and the command.


def some_row(**change: Any) -> compare.Row:
    reference = compare.Cost((4.0, 2.0, 9.0), 2_000_000)
    fast = compare.Cost((1.0, 0.5, 3.0), 100_000)
    return replace(compare.Row("loss", reference, fast, 0.25, 0.0), **change)


def test_a_row_shows_medians_ranges_ratio_limit_and_memory() -> None:
    expected = ("loss", "4 s (2 to 9)", "1 s (0.5 to 3)", "4.00", "0.25 s", "25%")
    assert table.cells(some_row()) == (*expected, "2 MB", "0.1 MB (5.0%)")
    assert table.HEADER[5] == "of limit"


def test_a_part_without_tensors_has_no_share_of_memory() -> None:
    nothing = compare.Cost((1.0,), 0)
    row = some_row(reference=nothing, fast=nothing)
    assert table.cells(row)[6:] == ("0 MB", "0.0 MB")


@pytest.mark.usefixtures("small")
def test_bench_measures_every_part_and_writes_them_with_the_hardware(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "results"
    assert main(["bench", "--out", str(out), *WORDS]) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["part", "reference", "fast", "ratio", "limit", "of", "limit"]
    pairs = [f"{name}, {case.name}" for name in ("backbone", "head") for case in CASES]
    steps = ["step, paper", "step, default", "step, default, views seen before"]
    whole = [f"{name}, {case.name}" for name in ("prediction", "evaluation") for case in CASES]
    optimizers = [f"optimizer, {case.name}" for case in CASES]
    names = ["decode", "views", *pairs, *loss.LOSSES, *optimizers, *steps, *whole]
    assert [line.split("  ")[0] for line in lines] == names
    assert str(out) in last
    page, record = sorted(out.iterdir(), reverse=True)
    assert (page.suffix, record.suffix) == (".md", ".json")
    figures = json.loads(record.read_text())
    hardware = machine.hardware(CPU)
    assert figures["hardware"] == figures["machine"]["hardware"] == hardware
    assert figures["device"] == "cpu"
    assert [len(part["fast"]["seconds"]) for part in figures["parts"]] == [2] * len(names)
    text = page.read_text()
    assert hardware in text
    assert figures["command"] == f"iddc bench --out DIR {' '.join(WORDS)}"
    assert text.count("\n| loss, ") == 3


@pytest.mark.usefixtures("small")
def test_some_parts_can_be_measured_alone(tmp_path: Path) -> None:
    _, rows = bench.bench(tmp_path, CPU, names=["loss"], batch_size=2, repeats=1)
    assert [row.part for row in rows] == list(loss.LOSSES)
    (record,) = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["command"].endswith("--device cpu --parts loss")


def test_every_part_that_can_be_asked_for_is_known() -> None:
    assert tuple(bench.PARTS) == get_args(BenchPart)


def test_thresholds_of_a_case_are_numbers() -> None:
    for case in inputs.CASES:
        assert isinstance(case.experiment(4).objective.positive_threshold, float)


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


# The scripts.


def script(name: str) -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, name, module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def records() -> Iterator[list[dict[str, Any]]]:
    costs = {
        "reference": {"seconds": [4.0], "memory": 8e6},
        "fast": {"seconds": [1.0], "memory": 4e6},
    }
    rates = {"fp32_flops": 2e9, "bf16_flops": 4e9, "bandwidth": 3e9}
    facts = {"torch": "2", "command": "iddc bench", "machine": rates}
    row = {"part": "loss", **costs, "limit": 0.5}
    return [
        {**facts, "hardware": "an old CPU", "device": "cpu", "date": "2026-01-01", "parts": []},
        {**facts, "hardware": "a CPU", "device": "cpu", "date": "2026-02-01", "parts": [row]},
    ]


def test_without_a_gpu_its_column_says_not_run_and_how(records: list[dict[str, Any]]) -> None:
    speed = script("speed")
    text = speed.speed_table(records)
    assert "| loss | 4 s | 1 s | 4.00 | 500 ms | 50% | 4 of 8 MB | not run |" in text
    assert speed.GPU_COMMAND in text
    assert "an old CPU" not in text


def test_with_a_gpu_its_column_holds_its_figures(records: list[dict[str, Any]]) -> None:
    gpu = {**records[1], "hardware": "a GPU", "device": "cuda"}
    gpu["machine"] = {**gpu["machine"], "bf16_flops": None}
    text = script("speed").speed_table([*records, gpu])
    assert "| a GPU |" in text
    assert "| 1 s, reference 4 s: 4.00, 50% of limit |" in text
    assert "not run" not in text
    assert "no bf16" in text


def test_tables_replace_what_is_between_the_marks(
    tmp_path: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("speed", "compile", "engines", "scale")
    marks = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nkept\n" for name in names]
    (tmp_path / "README.md").write_text("first\n" + "".join(marks))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scale_machine.md").write_text("| scale |\n")
    (tmp_path / "results" / "speed_machine.json").write_text(json.dumps(records[1]))
    monkeypatch.setattr("sys.argv", ["speed.py", "tables", "--folder", str(tmp_path)])
    script("speed").main()
    text = (tmp_path / "README.md").read_text()
    assert text.count("kept") == 4
    assert "old" not in text
    assert "| loss | 4 s" in text
    assert "begin -->\nNot measured yet.\n<!-- compile" in text
    assert "begin -->\n| scale |\n<!-- scale" in text


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    records = [json.loads(path.read_text()) for path in folder.glob("results/speed_*.json")]
    assert script("speed").speed_table(records) in (folder / "README.md").read_text()


@pytest.mark.usefixtures("small")
def test_the_script_measures_into_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("speed", "compile", "engines", "scale")
    marks = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names)
    (tmp_path / "README.md").write_text(marks)
    monkeypatch.setattr(bench, "PARTS", {"loss": loss.loss_parts})
    speed = script("speed")
    asked: dict[str, Any] = {}

    def measure(out: Path, device: torch.device, **options: Any) -> None:
        asked.update(options)
        bench.bench(out, device, names=["loss"], batch_size=2, repeats=options["repeats"])

    monkeypatch.setattr(speed, "bench", measure)
    words = ["measure", "--device", "cpu", "--repeats", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["speed.py", *words])
    speed.main()
    assert asked["repeats"] == 1
    assert "| loss, ViT-S/8 |" in (tmp_path / "README.md").read_text()


def test_compiled_parts_are_timed_beside_themselves(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that changes nothing."""
    speed = script("speed")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(speed, "CASES", CASES)
    monkeypatch.setattr(speed, "COMPILED_CROPS", 2)
    lines = speed.compile_table(CPU, 1).splitlines()
    names = [line.split(" | ")[0] for line in lines[4:]]
    assert names == ["| backbone, paper", "| head, paper", "| backbone, default", "| head, default"]
    assert all(len(line.split(" | ")) == 6 for line in lines[2:3] + lines[4:])


def test_every_curve_has_its_points(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = script("scale")
    draw = inputs.Inputs.draw
    monkeypatch.setattr(
        scale.Inputs, "draw", lambda folder, device, batch, **_: draw(folder, device, batch)
    )
    monkeypatch.setattr(scale, "COCO_SIZE", (64, 48))
    monkeypatch.setattr(scale, "train", lambda *_, **options: ([9.0, 2.0, 4.0], 7.0))
    monkeypatch.setattr(scale, "until_first_step", lambda *_: (3.0, 2.0, 9.0))
    settings = scale.Settings(
        CPU,
        repeats=1,
        batches=(2, 3),
        batch=2,
        clusters=(3, 4),
        cases=CASES[:1],
        sizes=((96, 80),),
        folders=(5, 20),
        processes=(1,),
        images=6,
    )
    scale.run(settings, list(scale.CURVES), tmp_path)
    text = next(tmp_path.glob("*.md")).read_text()
    assert "`python benchmarks/scale.py --device cpu --images 6`" in text
    for start in (
        "step: images | 3",
        "step: clusters | 4",
        "image: clusters | 3",
        "step: patch size | paper",
        "image: pixels | 96 x 80",
        "start: files | 20",
    ):
        assert f"\n| {start} | " in text
    assert "| step: processes | 1 | 3 | 7 |" in text
    assert "| start: first step | 20 | 3 | 9 |" in text
    assert "| start: first step, processor | 20 | 2 | 9 |" in text
    assert "| epoch | a step of 3, of 3 steps | 3 | 7 |" in text
    assert f"| epoch | extrapolated to 49,629 images | {3 * 16543:,.3g} | 7 |" in text
    assert next(tmp_path.glob("*.png")).stat().st_size > 1000


def test_all_images_are_not_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = script("scale")
    monkeypatch.setattr(scale, "COCO_IMAGES", 4)
    monkeypatch.setattr(scale, "many", lambda folder, count: folder)
    monkeypatch.setattr(scale, "train", lambda *_, **options: ([9.0, 2.0], 7.0))
    settings = scale.Settings(CPU, images=4, epochs=5)
    scale.run(settings, ["epoch"], tmp_path)
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| epochs | measured, 5 of them | 11 | 7 |" in text
    assert "--only epoch --images 4 --epochs 5" in text
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_of_many_images_is_mostly_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = script("scale")
    monkeypatch.setattr(scale, "COCO_SIZE", (64, 48))
    monkeypatch.setattr(scale, "DRAWN", 3)
    files = list(scale.many(tmp_path / "images", 7).iterdir())
    assert len(files) == 7
    assert len({file.stat().st_ino for file in files}) == 3


@pytest.mark.slow
def test_training_by_the_command_says_the_seconds_of_each_step(tmp_path: Path) -> None:
    scale = script("scale")
    scale.COCO_SIZE = (64, 48)
    settings = scale.Settings(CPU, cases=CASES[:1])
    images = scale.many(tmp_path / "images", 6)
    seconds, memory = scale.train(images, tmp_path / "run", settings, batch=3)
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert memory > 100
    with pytest.raises(SystemExit, match="exit code 3"):
        scale.train(tmp_path / "missing", tmp_path / "other", settings, batch=3)
