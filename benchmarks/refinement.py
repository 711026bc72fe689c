"""What each refinement does to masks: mIoU, accuracy, edges, and time per image.

    python benchmarks/refinement.py RUN --data CAMVID --split val --out docs/results/refinement.md
    python benchmarks/refinement.py --drawn 12

The first judges a run by the protocol `full`: probabilities at the label's size, refined there. It
reads labels, so nothing may be chosen by what it says of photos; who scores a validation set notes
it in docs/log.md. The second is where constants are chosen: scenes drawn by a program, with the
true probabilities of patches of 8, 16 and 32 pixels, under noise, resized as a network's are.

trimap     the mIoU of pixels within EDGE_WIDTH pixels of an edge between two classes of the truth
           (Kohli, Ladicky and Torr, *Robust higher order potentials for enforcing label
           consistency*, 2009), with the matching of all pixels
seconds    per image, of the refinement alone: probabilities to probabilities, median
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from iddc.config import DatasetName, RefineName
from iddc.datasets import LabelledImages, Sample, open_dataset
from iddc.datasets.synthetic import CLASSES, draw_scene
from iddc.device import pick_device
from iddc.errors import IddcError
from iddc.evaluation import PROTOCOLS
from iddc.metrics import EDGE_WIDTH, IGNORE, Confusion, Scores, edge_band
from iddc.progress import SILENT, Progress
from iddc.refine import refiner
from iddc.runs import Run
from iddc.segmenter import Segmenter
from iddc.windows import most_probable, predict_probs, to_working_size

PATCHES = (8, 16, 32)
"""The sides of the patches of drawn scenes, in pixels."""
SIZE = (640, 480)
"""Of a drawn scene."""
SHARPNESS, NOISE = 2.0, 1.5
"""Logits of a drawn patch: this times the log of its true shares, plus normal noise."""

Case = tuple[Sample, Float[Tensor, "k H W"]]
"""An image with its label, and the probabilities to refine."""


@dataclass(frozen=True)
class Measured:
    """What a refinement does on a data set."""

    scores: Scores
    """Of all pixels."""
    at_edges: Scores
    """Of those near an edge of the truth."""
    seconds: float
    """The median per image."""


def main() -> None:
    """Print a table for each run, and write all of them to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--data", type=Path, help="what the runs are judged on")
    parser.add_argument("--dataset", default="folder", choices=get_args(DatasetName))
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="use the first images only")
    parser.add_argument("--drawn", type=int, default=0, help="this many drawn scenes a patch size")
    parser.add_argument(
        "--refine", nargs="+", default=get_args(RefineName), choices=get_args(RefineName)
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, tables = pick_device(args.device), []

    def judge(title: str, cases: Iterable[Case], clusters: int, classes: int) -> None:
        found = measure(cases, clusters, classes, args.refine)
        tables.append(
            f"{title}, on {device}, {torch.get_num_threads()} threads:\n\n{table(found)}\n"
        )
        print(tables[-1], flush=True)

    for patch in PATCHES if args.drawn else ():
        cases = drawn_cases(args.drawn, patch, device)
        title = f"{args.drawn} drawn scenes of {SIZE[0]} x {SIZE[1]}, patches of {patch}"
        judge(title, cases, len(CLASSES), len(CLASSES))
    if args.runs:
        dataset = open_dataset(args.dataset, args.data, args.split)
        number = min(len(dataset), args.limit)
    for run in args.runs:
        segmenter = Segmenter.load(Run.open(run).path, args.device)
        title = f"`{run.name}`, {number} images of `{dataset.name}` {args.split}"
        cases = cases_of(segmenter, dataset, number, Progress())
        judge(title, cases, segmenter.num_clusters, dataset.num_classes)
    if args.out:
        args.out.write_text("\n".join(tables))


def cases_of(
    segmenter: Segmenter, dataset: LabelledImages, number: int, progress: Progress = SILENT
) -> Iterator[Case]:
    """The first images and what a segmenter says of them, at the label's size."""
    config = PROTOCOLS["full"].prediction
    progress.begin(number)
    for index in range(number):
        sample = dataset[index]
        pixels = to_working_size(sample.image, segmenter.experiment.views.short_side, config.window)
        height, width = sample.label.shape
        yield (
            sample,
            predict_probs(segmenter, pixels, config, (height, width), device=segmenter.device),
        )
        progress.update(index + 1, "refining", f"image {index + 1} of {number}")
    progress.end()


def drawn_cases(
    number: int, patch: int, device: torch.device, size: tuple[int, int] = SIZE
) -> Iterator[Case]:
    """Drawn scenes, and probabilities as a good network with such patches would give them."""
    for index in range(number):
        rng = np.random.default_rng((index, patch))
        image, label = draw_scene(rng, size)
        truth = functional.one_hot(torch.from_numpy(label).long(), len(CLASSES))
        shares = functional.avg_pool2d(truth.permute(2, 0, 1)[None].float(), patch)
        logits = SHARPNESS * (shares + 0.05).log()
        logits += NOISE * torch.from_numpy(rng.standard_normal(logits.shape, np.float32))
        probs = functional.interpolate(
            logits.softmax(1), size=label.shape, mode="bilinear", align_corners=False
        )
        yield Sample(Image.fromarray(image), label, f"scene {index}"), probs[0].to(device)


def measure(
    cases: Iterable[Case],
    num_clusters: int,
    num_classes: int,
    names: Sequence[RefineName] = get_args(RefineName),
) -> dict[RefineName, Measured]:
    """Refine the same probabilities in each way, and score and time it."""
    nothing = Confusion.zeros(num_clusters, num_classes)
    everywhere, at_edges = dict.fromkeys(names, nothing), dict.fromkeys(names, nothing)
    seconds: dict[RefineName, list[float]] = {name: [] for name in names}
    for sample, probs in cases:
        image = to_working_size(sample.image, 0, 0)
        near_edge = np.where(edge_band(sample.label, EDGE_WIDTH), sample.label, IGNORE)
        for name in names:
            started = _now(probs.device)
            refined = torch.cat(list(refiner(name, image)([probs])), dim=1)
            seconds[name].append(_now(probs.device) - started)
            clusters = most_probable(refined)
            for sums, label in ((everywhere, sample.label), (at_edges, near_edge)):
                sums[name] += Confusion.count(clusters, label, num_clusters, num_classes)
    matchings = {name: everywhere[name].match() for name in names}
    return {
        name: Measured(
            everywhere[name].scores(matchings[name]),
            at_edges[name].scores(matchings[name]),
            median(seconds[name]),
        )
        for name in names
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(found: dict[RefineName, Measured]) -> str:
    """The measurements as Markdown."""
    rows = [
        "| refinement | mIoU (%) | accuracy (%) | trimap mIoU (%) | seconds per image |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        percent = (one.scores.miou, one.scores.accuracy, one.at_edges.miou)
        cells = " | ".join(f"{100 * value:.1f}" for value in percent)
        rows.append(f"| {name} | {cells} | {one.seconds:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        main()
    except IddcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
