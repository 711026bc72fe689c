"""The tables of README.md: each part on this machine and on a GPU, beside a reference.

python benchmarks/speed.py measure                  iddc bench into results/, then the tables
python benchmarks/speed.py measure --device cuda    the same for the column of the GPU
python benchmarks/speed.py compile                  what torch.compile costs and gains
python benchmarks/speed.py engines --run RUN --images DIR   PyTorch, onnxruntime, OpenVINO
python benchmarks/speed.py tables                   the tables alone, from results/
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from iddc.bench import bench
from iddc.bench.inputs import CASES, Case, Inputs
from iddc.bench.machine import hardware, seconds_of
from iddc.cli.predict import Predict
from iddc.config import Runtime
from iddc.device import autocast, pick_device
from iddc.engines import ENGINE, ENGINE_INT8
from iddc.images import find_images, open_image
from iddc.network import build_network
from iddc.progress import Progress
from iddc.segmenter import Segmenter

HERE = Path(__file__).parent
GPU_COMMAND = "python benchmarks/speed.py measure --device cuda"
COMPILED_CROPS = 16
"""What the CPU embeds at once."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "compile", "engines", "tables"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=HERE, help="with README.md and results/")
    parser.add_argument("--run", type=Path, help="engines: the folder of a finished run")
    parser.add_argument("--images", type=Path, help="engines: images like those of its training")
    args = parser.parse_args()
    device, results = pick_device(args.device), args.folder / "results"
    if args.what == "measure":
        bench(results, device, repeats=args.repeats, progress=Progress())
    elif args.what == "compile":
        text = compile_table(device, args.repeats)
        (results / f"compile_{device.type}.md").write_text(text)
    elif args.what == "engines":
        text = engines_table(args.run, args.images, args.repeats)
        (results / "engines_cpu.md").write_text(text)
    write_tables(args.folder)


def write_tables(folder: Path) -> None:
    """Put what is in results/ between the marks of README.md."""
    results, readme = folder / "results", folder / "README.md"
    text = readme.read_text()
    records = [json.loads(path.read_text()) for path in sorted(results.glob("speed_*.json"))]
    sections = {"speed": speed_table(records)}
    for name in ("compile", "engines", "scale"):
        pages = [path.read_text() for path in sorted(results.glob(f"{name}_*.md"))]
        sections[name] = "\n".join(pages) or "Not measured yet.\n"
    for name, content in sections.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    readme.write_text(text)


def speed_table(records: list[dict[str, Any]]) -> str:
    """Part, reference, fast, ratio and limit of the newest CPU, and the same of the newest GPU."""
    newest = {record["device"]: record for record in sorted(records, key=lambda r: r["date"])}
    cpu, gpu = newest.get("cpu"), newest.get("cuda")
    if cpu is None:
        return "Not measured yet.\n"
    there = {row["part"]: row for row in gpu["parts"]} if gpu else {}
    name = gpu["hardware"] if gpu else "GPU"
    columns = ("part", "reference", "fast", "ratio", "limit", "of limit", "memory", name)
    lines = [
        f"{cpu['hardware']}, {cpu['date']}, torch {cpu['torch']}: `{cpu['command']}`. "
        f"{_rates(cpu['machine'])}",
        "",
        f"{gpu['hardware']}, {gpu['date']}: {_rates(gpu['machine'])}"
        if gpu
        else f"No GPU has run it; this fills the last column: `{GPU_COMMAND}`.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row in cpu["parts"]:
        reference, fast, limit = _times(row)
        memory = [row[way]["memory"] / 1e6 for way in ("fast", "reference")]
        cells = [
            row["part"],
            _shown(reference),
            _shown(fast),
            f"{reference / fast:.2f}",
            _shown(limit),
            f"{limit / fast:.0%}",
            f"{memory[0]:.0f} of {memory[1]:.0f} MB" if memory[1] else "",
            _on_gpu(there.get(row["part"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rates(machine: dict[str, Any]) -> str:
    bf16 = machine["bf16_flops"]
    return (
        f"Measured rates: {machine['fp32_flops'] / 1e9:,.0f} GFLOP/s in fp32, "
        f"{f'{bf16 / 1e9:,.0f} in bf16' if bf16 else 'no bf16'}, "
        f"{machine['bandwidth'] / 1e9:,.0f} GB/s."
    )


def _on_gpu(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    reference, fast, limit = _times(row)
    times = f"{_shown(fast)}, reference {_shown(reference)}"
    return f"{times}: {reference / fast:.2f}, {limit / fast:.0%} of limit"


def _times(row: dict[str, Any]) -> tuple[float, float, float]:
    reference, fast = (median(row[way]["seconds"]) for way in ("reference", "fast"))
    return reference, fast, row["limit"]


def _shown(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def compile_table(device: torch.device, repeats: int) -> str:
    """Time backbones and heads as they are and compiled, in turns."""
    lines = [
        f"{hardware(device)}, torch {torch.__version__}, {COMPILED_CROPS} crops, medians of "
        f"{repeats}: `python benchmarks/speed.py compile --device {device.type}`.",
        "",
        "| part | as it is | compiled | gain | to compile | pays after |",
        "|---|---|---|---|---|---|",
    ]
    with TemporaryDirectory() as folder:
        inputs = Inputs.draw(Path(folder), device, COMPILED_CROPS)
        for case in CASES:
            for name, (eager, compiled) in ways(inputs, case).items():
                eager()
                started = time.perf_counter()
                compiled()
                cost = time.perf_counter() - started
                times: tuple[list[float], list[float]] = [], []
                for _ in range(repeats):
                    for way, seconds in zip((eager, compiled), times, strict=True):
                        seconds.append(seconds_of(way, device))
                before, after = map(median, times)
                saved = before - after
                pays = f"{cost / saved:,.0f} times" if saved > 0 else "never"
                lines.append(
                    f"| {name}, {case.name} | {_shown(before)} | {_shown(after)} "
                    f"| {before / after:.2f} | {_shown(cost)} | {pays} |"
                )
    return "\n".join(lines) + "\n"


def ways(
    inputs: Inputs, case: Case
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The backbone, and the head with its gradients, each as it is and compiled."""
    experiment = case.experiment(COMPILED_CROPS)
    network = build_network(experiment).to(inputs.device).eval()
    side = experiment.views.crop_size
    images = torch.randint(0, 256, (COMPILED_CROPS, 3, side, side), dtype=torch.uint8)
    images = images.to(inputs.device, memory_format=torch.channels_last)  # as training has them
    with torch.no_grad():
        features = network.embed(images)
    weights = list(network.head.parameters())

    def embed(backbone: Callable[..., Any]) -> Tensor:
        with torch.no_grad(), autocast(inputs.device, "auto"):
            found: Tensor = backbone(images)
            return found

    def learn(head: Callable[..., Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(head(features).square().mean(), weights)

    def both(run: Callable[..., object], module: Any) -> Any:
        fast = torch.compile(module)
        return (lambda: run(module)), (lambda: run(fast))

    return {"backbone": both(embed, network.backbone), "head": both(learn, network.head)}


def engines_table(run: Path, images: Path, count: int) -> str:
    """Time each engine on the same images in turns, and compare its clusters with fp32's.

    Seconds are those of the processor, not of the clock: other work on the machine may stretch
    them, but stretches those of all ways.
    """
    with TemporaryDirectory() as folder:
        own = Path(folder) / "run"
        shutil.copytree(run, own, ignore=shutil.ignore_patterns("checkpoint", "samples"))
        ways, sizes = engine_ways(own)
    files = find_images(images).files
    files = [*files[:: max(1, len(files) // (count + 1))]][: count + 1]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    same: dict[str, list[float]] = {name: [] for name in ways}
    for index, file in enumerate(files):
        image = open_image(file)
        found = {}
        # Each way comes first, second and so on in turn. The first image warms up.
        names = [*ways][index % len(ways) :] + [*ways][: index % len(ways)]
        for name in names:
            started = time.process_time()
            found[name] = ways[name].predict(image).clusters
            if index:
                seconds[name].append(time.process_time() - started)
        for name, clusters in found.items():
            same[name].append(float((clusters == found[EXACT]).mean()))
    base = median(seconds[BASE])
    lines = [
        f"{hardware(torch.device('cpu'))}, {date.today()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread, median of {len(files) - 1} images: "
        "`python benchmarks/speed.py engines --run RUN --images DIR`.",
        "",
        "| engine | s of the processor per image | times as fast | MB | same cluster as fp32 |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        lines.append(
            f"| {name} | {median(times):.3f} | {base / median(times):.2f} "
            f"| {sizes[name] / 1e6:.1f} | {100 * fmean(same[name]):.2f} % |"
        )
    return "\n".join(lines) + "\n"


EXACT, BASE = "PyTorch, fp32", "PyTorch, bf16"


def engine_ways(run: Path) -> tuple[dict[str, Segmenter], dict[str, int]]:
    """A run's model computed by each engine, and the bytes of its file."""
    ways, sizes = {}, {}
    for precision in ("bf16", "fp32"):
        segmenter = Segmenter.load(run, "cpu")
        training = segmenter.experiment.training.model_copy(update={"precision": precision})
        segmenter.experiment = segmenter.experiment.model_copy(update={"training": training})
        ways[f"PyTorch, {precision}"] = segmenter
        sizes[f"PyTorch, {precision}"] = (run / "model.safetensors").stat().st_size
    engines = [("onnxruntime", "onnx", "fp32"), ("OpenVINO", "openvino", "bf16")]
    for title, engine, precision in engines:
        for int8 in (False, True):
            name = f"{title}, {'int8' if int8 else precision}"
            command = Predict(
                run=run, images=run, out=run, engine=engine, int8=int8, runtime=Runtime()
            )
            segmenter = command.segmenter()
            ways[name] = segmenter
            sizes[name] = (run / (ENGINE_INT8 if int8 else ENGINE)).stat().st_size
    return ways, sizes


if __name__ == "__main__":
    main()
