"""How an image is cut and put together again: accuracy, mIoU and time of settings of prediction.

    for SET in idd-lite labelmefacade digital-rock; do for SEED in 0 1 2; do
        iddc baseline kmeans DATA/dev/$SET/train --backbone bundled --seed $SEED --out RUNS/...
        iddc train DATA/dev/$SET/train --backbone bundled --seed $SEED --out RUNS/...
    done; done
    python benchmarks/windows.py --data DATA/dev/idd-lite RUNS/idd-lite-* --settings order

All runs have the same frozen backbone, so an image is embedded once for all of them. Labels are
read to compare settings: give it development sets alone. Scores are those of the protocol `full`
but for the setting that is compared. Seconds are those of one run on this machine's CPU, of the
network and of what follows it, the median over --timed images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from iddc.config import SPEEDS, PredictionConfig
from iddc.datasets import LabelledImages, Sample, open_dataset
from iddc.device import autocast
from iddc.metrics import IGNORE, Confusion
from iddc.network import Network
from iddc.segmenter import Segmenter
from iddc.windows import (
    Request,
    argmax_clusters,
    cluster_ids,
    probability_strips,
    to_working_size,
)

CPU = torch.device("cpu")
Setting = tuple[dict[str, Any], int | None]
"""Fields of PredictionConfig, and the shorter side of the working size; None: the run's own."""
SETTINGS: dict[str, dict[str, Setting]] = {
    "order": {
        "patches, mean": ({"softmax": "patches"}, None),
        "pixels, mean": ({"softmax": "pixels"}, None),
        "patches, tent": ({"softmax": "patches", "blend": "tent"}, None),
        "pixels, tent": ({"softmax": "pixels", "blend": "tent"}, None),
    },
    "speed": {
        "224/75, mirrored, mean (paper)": ({}, None),
        "exact: 224/75, mirrored": (SPEEDS["exact"], None),
        "224/75": (SPEEDS["exact"] | {"flip": False}, None),
        "224/75 fitted, mirrored": (SPEEDS["balanced"] | {"flip": True}, None),
        "balanced: 224/75 fitted": (SPEEDS["balanced"], None),
        "fast: 448/64 fitted": (SPEEDS["fast"], None),
        "whole, mirrored": ({"window": 0}, None),
    },
}
"""`order` of softmax and enlarging; `speed`: the frontier of time against mIoU (decision 011)."""


class Heads:
    """Networks with one frozen backbone as one predictor: their clusters one after the other."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self.networks = networks
        self.sizes = [network.num_clusters for network in networks]
        self.num_clusters = sum(self.sizes)
        self.seen: dict[int, Tensor] = {}

    def scores(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The logits of all heads. A crop that was seen before is looked up."""
        keys = [hash(image.numpy().tobytes()) for image in images]
        new = [index for index, key in enumerate(keys) if key not in self.seen]
        if new:
            with autocast(CPU, "auto"):
                features = self.networks[0].embed(images[new])
                parts = [network.logits_from(features).float() for network in self.networks]
            found = zip((keys[index] for index in new), torch.cat(parts, 1), strict=True)
            self.seen |= dict(found)
        return torch.stack([self.seen[key] for key in keys])

    def probs_of(self, scores: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
        """The softmax of each head."""
        return torch.cat([part.softmax(0) for part in torch.split(scores, self.sizes)])

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The probabilities of all heads."""
        parts = torch.split(self.scores(images), self.sizes, dim=1)
        return torch.cat([part.softmax(1) for part in parts], 1)


@dataclass(frozen=True)
class Some:
    """Every n-th image of a data set, enlarged or reduced with its label."""

    whole: LabelledImages
    every: int
    short_side: int
    """0: as it is."""

    @property
    def name(self) -> str:
        """That of the whole."""
        return self.whole.name

    @property
    def num_classes(self) -> int:
        """Those of the whole."""
        return self.whole.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.class_names

    def __len__(self) -> int:
        return (len(self.whole) + self.every - 1) // self.every

    def __getitem__(self, index: int) -> Sample:
        sample = self.whole[index * self.every]
        if not self.short_side:
            return sample
        scale = self.short_side / min(sample.image.size)
        width, height = (round(scale * side) for side in sample.image.size)
        image = sample.image.resize((width, height), Image.Resampling.BICUBIC)
        label = Image.fromarray(sample.label).resize((width, height), Image.Resampling.NEAREST)
        return replace(sample, image=image, label=np.asarray(label))


def confusions(
    heads: Heads, dataset: LabelledImages, settings: Sequence[tuple[PredictionConfig, int]]
) -> list[list[Confusion]]:
    """Count for each setting what each head says of the images, at the size of the labels."""
    counts = [[np.zeros((k, dataset.num_classes), np.int64) for k in heads.sizes] for _ in settings]
    for index in range(len(dataset)):
        sample = dataset[index]
        heads.seen.clear()
        for tables, (config, short_side) in zip(counts, settings, strict=True):
            pixels = to_working_size(sample.image, short_side, config.min_side)
            request, row = Request(pixels, sample.label.shape), 0
            for _, strips in probability_strips(heads, [request], config, device=CPU):
                for strip in strips:
                    label = sample.label[row : row + strip.shape[1]]
                    row += strip.shape[1]
                    parts = torch.split(strip, heads.sizes)
                    for head, probs in enumerate(parts):
                        pairs = argmax_clusters(probs).numpy()[label != IGNORE].astype(np.int64)
                        pairs = pairs * dataset.num_classes + label[label != IGNORE]
                        found = np.bincount(pairs, minlength=tables[head].size)
                        tables[head] += found.reshape(tables[head].shape)
    return [[Confusion(table) for table in tables] for tables in counts]


def seconds(
    network: Network, dataset: LabelledImages, config: PredictionConfig, short_side: int, timed: int
) -> float:
    """The median seconds for an image."""
    one, times = Heads([network]), list[float]()
    for index in range(min(timed, len(dataset))):
        sample = dataset[index]
        one.seen.clear()
        start = time.process_time()
        pixels = to_working_size(sample.image, short_side, config.min_side)
        [*cluster_ids(one, [Request(pixels, sample.label.shape)], config, device=CPU)]
        times.append(time.process_time() - start)
    return median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table with a row for each setting and a column for each kind of run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders named SET-METHOD-SEED")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--settings", choices=SETTINGS, default="order")
    parser.add_argument("--every", type=int, default=1, help="score every n-th image")
    parser.add_argument(
        "--short-side", type=int, default=0, help="enlarge or reduce images and labels to it first"
    )
    parser.add_argument("--timed", type=int, default=10, help="images to time")
    given = parser.parse_args(argv)
    dataset: LabelledImages = Some(
        open_dataset("folder", given.data, "val"), given.every, given.short_side
    )
    segmenters = {path.name: Segmenter.load(path, "cpu") for path in given.runs}
    networks = [segmenter.network for segmenter in segmenters.values()]
    heads = Heads([network for network in networks if isinstance(network, Network)])
    own = next(iter(segmenters.values())).experiment.views.short_side
    methods = dict.fromkeys(name.split("-")[-2] for name in segmenters)
    print(f"{given.data.name}, {len(dataset)} images, accuracy / mIoU (%) and s per image\n")
    print(f"| setting | {' | '.join(methods)} | s |\n|---|{'---|' * (len(methods) + 1)}")
    settings = [
        (PredictionConfig.model_validate(fields), own if side is None else side)
        for fields, side in SETTINGS[given.settings].values()
    ]
    counted = confusions(heads, dataset, settings)
    for name, setting, tables in zip(SETTINGS[given.settings], settings, counted, strict=True):
        scores = [table.scores() for table in tables]
        cells = []
        for method in methods:
            found = [
                s for n, s in zip(segmenters, scores, strict=True) if n.split("-")[-2] == method
            ]
            cells.append(
                f"{spread([s.accuracy for s in found])} / {spread([s.miou for s in found])}"
            )
        took = seconds(heads.networks[0], dataset, *setting, given.timed)
        print(f"| {name} | {' | '.join(cells)} | {took:.3f} |", flush=True)
    return 0


def spread(values: Sequence[float]) -> str:
    """The mean of fractions in percent, and their standard deviation."""
    values = [100 * value for value in values]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
