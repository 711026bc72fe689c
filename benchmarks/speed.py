"""The tables of README.md: each part on this machine and on a GPU, beside a reference.

python benchmarks/speed.py measure                  iddc bench into results/, then the tables
python benchmarks/speed.py measure --device cuda    the same for the column of the GPU
python benchmarks/speed.py compile                  what torch.compile costs and gains
python benchmarks/speed.py tables                   the tables alone, from results/
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from iddc.bench import bench
from iddc.bench.inputs import CASES, Case, Inputs
from iddc.bench.machine import hardware, seconds_of
from iddc.device import autocast, pick_device
from iddc.network import build_network
from iddc.progress import Progress

HERE = Path(__file__).parent
GPU_COMMAND = "python benchmarks/speed.py measure --device cuda"
COMPILED_CROPS = 16
"""What the CPU embeds at once."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "compile", "tables"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=HERE, help="with README.md and results/")
    args = parser.parse_args()
    device, results = pick_device(args.device), args.folder / "results"
    if args.what == "measure":
        bench(results, device, repeats=args.repeats, progress=Progress())
    elif args.what == "compile":
        text = compile_table(device, args.repeats)
        (results / f"compile_{device.type}.md").write_text(text)
    write_tables(args.folder)


def write_tables(folder: Path) -> None:
    """Put what is in results/ between the marks of README.md."""
    results, readme = folder / "results", folder / "README.md"
    text = readme.read_text()
    records = [json.loads(path.read_text()) for path in sorted(results.glob("speed_*.json"))]
    sections = {"speed": speed_table(records)}
    for name in ("compile", "scale"):
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


if __name__ == "__main__":
    main()
