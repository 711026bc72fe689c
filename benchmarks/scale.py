"""How time and memory grow with images, their size, clusters, patch size and processes.

Inputs are drawn and weights random: figures of time and memory, not of quality. `epoch` trains on
a sample of JPEGs of COCO's size and multiplies its median step up to COCO-Stuff-27's 49,629 images;
with `--images 49629 --epochs 5` it is the whole of the paper's run instead.

    python benchmarks/scale.py                                             every curve, on this CPU
    python benchmarks/scale.py --only epoch --images 49629 --epochs 5 --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from iddc.bench.compare import Part, peak_memory
from iddc.bench.inputs import Case, Inputs
from iddc.bench.machine import hardware, seconds_of
from iddc.bench.prediction import prediction_part
from iddc.bench.step import step_part
from iddc.datasets.synthetic import write_scenes
from iddc.device import pick_device
from iddc.images import AS_STORED, collect, find_images

VIT = Case("ViT-S/16", "untrained:vit_small_patch16_224", "cocostuff27-vits16")
VIT8 = Case("ViT-S/8", "untrained:vit_small_patch8_224", "cocostuff27-vits16")
COCO_IMAGES = 49_629
COCO_SIZE = (640, 480)
FEW_MILLIONS = 10_000_000
"""How many files nobody makes for a benchmark."""
IN_A_FOLDER = 1000
"""Files of a folder, when there are many."""
DRAWN = 16
"""Different scenes among the files of an epoch or of a large folder; the others are links."""


@dataclass(frozen=True)
class Settings:
    """Where and how large."""

    device: torch.device
    repeats: int = 3
    batches: tuple[int, ...] = (8, 16, 32, 64)
    batch: int = 16
    clusters: tuple[int, ...] = (27, 171, 1000)
    cases: tuple[Case, ...] = (VIT, VIT8)
    sizes: tuple[tuple[int, int], ...] = ((320, 240), (640, 480), (1280, 960), (2048, 1024))
    folders: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    processes: tuple[int, ...] = (1, 2)
    images: int = 512
    epochs: int = 1


@dataclass(frozen=True)
class Point:
    """One measurement."""

    curve: str
    at: str
    seconds: float
    """The median."""
    megabytes: float
    """Tensors at the peak; of whole trainings, the largest process."""


def measured(curve: str, at: str, part: Part, settings: Settings) -> Point:
    """Our way of a part: its memory, then its time."""
    memory = peak_memory(part.fast, settings.device)
    times = [seconds_of(part.fast, settings.device) for _ in range(settings.repeats)]
    return Point(curve, at, median(times) / part.units, memory / 1e6)


def batch_sizes(settings: Settings, folder: Path) -> Iterator[Point]:
    """A training step against the images in it."""
    for size in settings.batches:
        inputs = Inputs.draw(folder / str(size), settings.device, size)
        part = step_part(inputs, settings.cases[0])
        yield measured("step: images", str(size), part, settings)


def clusters(settings: Settings, folder: Path) -> Iterator[Point]:
    """A training step, and the prediction of an image, against the number of clusters."""
    inputs = Inputs.draw(folder, settings.device, settings.batch)
    first = settings.cases[0]
    for curve, make in (("step: clusters", step_part), ("image: clusters", prediction_part)):
        for count in settings.clusters:
            part = make(inputs, replace(first, num_clusters=count))
            yield measured(curve, str(count), part, settings)


def patch_sizes(settings: Settings, folder: Path) -> Iterator[Point]:
    """A training step against the patch size."""
    inputs = Inputs.draw(folder, settings.device, settings.batch)
    for case in settings.cases:
        yield measured("step: patch size", case.name, step_part(inputs, case), settings)


def image_sizes(settings: Settings, folder: Path) -> Iterator[Point]:
    """The prediction of an image against its size; nothing is reduced before."""
    for width, height in settings.sizes:
        inputs = Inputs.draw(folder / f"{width}", settings.device, 2, count=2, size=(width, height))
        part = prediction_part(inputs, settings.cases[0])
        yield measured("image: pixels", f"{width} x {height}", part, settings)


def folder_sizes(settings: Settings, folder: Path) -> Iterator[Point]:
    """Finding the images and reading headers, as `iddc train` does before anything else.

    Processor time, and the largest memory of this process so far. Ten million are extrapolated.
    """
    point = Point("", "", 0.0, 0.0)
    for count in settings.folders:
        images = many(folder / str(count), count)
        started = time.process_time()
        collect(find_images(images).files, AS_STORED, max_unreadable=0.0)
        seconds = time.process_time() - started
        point = Point("start: files", f"{count:,}", seconds, largest_memory())
        yield point
    if settings.folders[-1] == FEW_MILLIONS // 10:
        seconds = 10 * point.seconds
        yield Point("start: files", f"{FEW_MILLIONS:,}, extrapolated", seconds, math.nan)


def first_steps(settings: Settings, folder: Path) -> Iterator[Point]:
    """From the command to the line of the first step in the log, on the clock.

    And the processor time of the process, the first step and the end of the command with it.
    """
    for count in settings.folders:
        images = many(folder / str(count), count)
        seconds, busy, memory = until_first_step(images, folder / f"run-{count}", settings)
        yield Point("start: first step", f"{count:,}", seconds, memory)
        yield Point("start: first step, processor", f"{count:,}", busy, memory)


def process_counts(settings: Settings, folder: Path) -> Iterator[Point]:
    """A training step of one batch against the processes that share it."""
    images = many(folder / "images", 4 * settings.batch)
    for count in settings.processes:
        seconds, memory = train(
            images, folder / f"run-{count}", settings, processes=count, batch=settings.batch
        )
        yield Point("step: processes", str(count), median(seconds[1:]), memory)


def epoch(settings: Settings, folder: Path) -> Iterator[Point]:
    """A step of the paper's recipe on JPEGs of COCO's size, and what an epoch of them makes."""
    images = many(folder / "images", settings.images)
    batch = min(64, settings.images // 2)
    seconds, memory = train(images, folder / "run", settings, batch=batch)
    steps = math.ceil(COCO_IMAGES / batch)
    if settings.images == COCO_IMAGES:
        yield Point("epochs", f"measured, {settings.epochs} of them", sum(seconds), memory)
        return
    step = median(seconds[1:])
    yield Point("epoch", f"a step of {batch}, of {len(seconds)} steps", step, memory)
    yield Point("epoch", f"extrapolated to {COCO_IMAGES:,} images", step * steps, memory)


WHOLE = ("epoch", "epochs")
"""What is no curve."""
CURVES: dict[str, Callable[[Settings, Path], Iterator[Point]]] = {
    "batch": batch_sizes,
    "clusters": clusters,
    "patch": patch_sizes,
    "size": image_sizes,
    "folder": folder_sizes,
    "first": first_steps,
    "processes": process_counts,
    "epoch": epoch,
}


def many(folder: Path, count: int) -> Path:
    """A folder of so many JPEGs, most of them links to the first ones."""
    drawn = min(count, DRAWN)
    write_scenes(folder.with_name(f"{folder.name}-drawn"), max(2, drawn), 0, COCO_SIZE)
    sources = sorted(folder.with_name(f"{folder.name}-drawn").glob("*/images/*.jpg"))
    folder.mkdir()
    for index in range(count):
        inner = folder / f"{index // IN_A_FOLDER:04}" if count > IN_A_FOLDER else folder
        inner.mkdir(exist_ok=True)
        os.link(sources[index % len(sources)], inner / f"{index:07}.jpg")
    return folder


def largest_memory() -> float:
    """The largest memory of this process until now, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def until_first_step(images: Path, run: Path, settings: Settings) -> tuple[float, float, float]:
    """Train with IDDC until a step is logged: seconds, those of the processor, and megabytes."""
    words = [
        *(sys.executable, "-m", "iddc", "train", images, "--out", run),
        *("--method", "iddc", "--backbone", "bundled"),
        *("--training.batch-size", settings.batch, "--device", settings.device.type),
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        [*map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    seconds = time.monotonic() - started
    process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not (log.exists() and log.stat().st_size):
        raise SystemExit(f"exit code {process.returncode}: {' '.join(map(str, words))}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def train(
    images: Path, run: Path, settings: Settings, *, batch: int, processes: int = 1
) -> tuple[list[float], float]:
    """Train by the command: the seconds of each step, and the largest process in megabytes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    case = settings.cases[0]
    words = [
        *(sys.executable, *(launcher if processes > 1 else []), "-m", "iddc", "train", images),
        *("--recipe", case.recipe, "--backbone", case.backbone, "--out", run),
        *("--epochs", settings.epochs, "--training.batch-size", batch),
        *("--device", settings.device.type),
    ]
    threads = max(1, torch.get_num_threads() // processes)
    process = subprocess.Popen(
        [*map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(map(str, words))}")
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines], usage.ru_maxrss * 1024 / 1e6


def table(points: list[Point], facts: list[str]) -> str:
    """Facts and points as Markdown."""
    lines = [*facts, "", "| what | at | seconds | MB |", "|---|---|---|---|"]
    for point in points:
        memory = "" if math.isnan(point.megabytes) else f"{point.megabytes:,.0f}"
        lines.append(f"| {point.curve} | {point.at} | {point.seconds:,.3g} | {memory} |")
    return "\n".join(lines) + "\n"


def draw(points: list[Point], path: Path) -> None:
    """One panel for each curve: seconds as bars, megabytes as a line."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.curve for point in points if point.curve not in WHOLE))
    rows = math.ceil(len(names) / 3)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    for index, name in enumerate(names, start=1):
        chosen = [point for point in points if point.curve == name]
        labels = [point.at for point in chosen]
        axes = figure.add_subplot(rows, 3, index, title=name, ylabel="seconds")
        axes.bar(labels, [point.seconds for point in chosen], color="#9dbbe0")
        memory = axes.twinx()
        memory.plot(labels, [point.megabytes for point in chosen], "o-", color="#b3452c")
        memory.set_ylabel("MB", color="#b3452c")
        memory.set_ylim(bottom=0)
        axes.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--images", type=int, default=Settings.images)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    device = pick_device(args.device)
    run(Settings(device, images=args.images, epochs=args.epochs), args.only, args.out)


def run(settings: Settings, names: list[str], out: Path) -> None:
    """Measure curves and write the table, the figures and the picture."""
    points: list[Point] = []
    for name in names:
        with TemporaryDirectory() as folder:
            for point in CURVES[name](settings, Path(folder)):
                points.append(point)
                print(*asdict(point).values(), flush=True)
    now, machine = datetime.now(UTC), hardware(settings.device)
    words = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    path = out / f"scale_{words}_{now:%Y-%m}"
    facts = [f"{machine}, {now.date()}, torch {torch.__version__}: {command(settings, names)}."]
    path.with_suffix(".md").write_text(table(points, facts))
    record = {"facts": facts, "points": [asdict(point) for point in points]}
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    if any(point.curve not in WHOLE for point in points):
        draw(points, path.with_suffix(".png"))


def command(settings: Settings, names: list[str]) -> str:
    """What repeats this."""
    words = ["python benchmarks/scale.py", "--device", settings.device.type]
    words += ["--only", *names] if names != list(CURVES) else []
    for name in ("images", "epochs"):
        value = getattr(settings, name)
        words += [f"--{name}", str(value)] if value != getattr(Settings, name) else []
    return f"`{' '.join(words)}`"


if __name__ == "__main__":
    main()
