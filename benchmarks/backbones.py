"""Compare backbones on the labelled development sets, each from one embedding pass.

    python benchmarks/backbones.py bundled DIR components:resnet18 appearance --out FILE

For each backbone and set: k-means and consensus (the classes, and the head that learns them), a
linear probe, and the majority class of K, 27 and 100 clusters. Backbones and recipes of pretraining
may be chosen by these labels; training reads none. A backbone is anything that `iddc train` takes,
and besides:

    components:NAME      timm's network with random weights, reduced to 128 channels
    appearance           local means, deviations and gradients, without a network
    BACKBONE+appearance  both side by side

By default a fixed part of each set is used, so that a trial is scored in about two CPU-minutes.
With `--train 0 --val 0 --short-side 448 --mirror --seeds 5` the numbers are those of develop.py.
Nothing is kept but the scores: weights that change under one name cannot be mistaken for others.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from develop import RECIPES, linear_probe, oracle, spread
from embedded import (
    DATA,
    SETS,
    Picture,
    Pictures,
    directions,
    embed,
    images_of,
    score,
    spaced,
)
from iddc.backbones import Backbone, load_backbone, reduced_backbone, resolve, untrained_backbone
from iddc.datasets import open_dataset
from iddc.windows import to_working_size

TRAIN, VAL, SHORT_SIDE, SEEDS = 100, 75, 224, 3
"""The defaults: images of each split, their shorter side, seeds of the methods."""
COMPONENTS = 128
"""Channels of components:NAME, as many as the bundled backbone has."""
PHOTOS = ("idd-lite", "labelmefacade")
"""The sets whose mean chooses; micrographs are shown beside it."""
_APPEARANCE = "appearance"


@dataclass(frozen=True)
class Part:
    """How much of each set is used, and how it is embedded."""

    train: int = TRAIN
    val: int = VAL
    short_side: int = SHORT_SIDE
    mirrored: bool = False


def main() -> None:
    """Score every backbone on every set; print a table of each set, and write all numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backbones", nargs="+", metavar="BACKBONE")
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/ and camvid/")
    parser.add_argument("--sets", nargs="+", default=[*PHOTOS, "digital-rock"], choices=[*SETS])
    parser.add_argument("--train", type=int, default=TRAIN, help="images to fit; 0: all")
    parser.add_argument("--val", type=int, default=VAL, help="images to score; 0: all")
    parser.add_argument("--short-side", type=int, default=SHORT_SIDE, help="the working size")
    parser.add_argument("--mirror", action="store_true", help="embed mirror images too")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--scores", nargs="+", default=[*SCORES], choices=[*SCORES])
    parser.add_argument("--out", type=Path, help="append the numbers to this file (JSON lines)")
    args = parser.parse_args()
    part = Part(args.train, args.val, args.short_side, args.mirror)
    print(f"`python {' '.join(sys.argv)}`\n")
    print(header(args.scores), flush=True)
    for name in args.backbones:
        for data in args.sets:
            start = cpu_seconds()
            train, val = pictures(name, args.data / SETS[data], part)
            record = measure(train, val, range(args.seeds), args.scores)
            record |= {"backbone": name, "data": data, "part": asdict(part)}
            record["cpu_seconds"] = cpu_seconds() - start
            print(line(record), flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")


def cpu_seconds() -> float:
    """The processor time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# Pictures -----------------------------------------------------------------------------------------


def pictures(name: str, root: Path, part: Part) -> tuple[Pictures, Pictures]:
    """Embed the images of both splits of a set: train without labels, val with them."""
    network, plus, kind = name.rpartition("+")
    beside = bool(plus) and kind == _APPEARANCE
    backbone = named(network if beside else name, root, part)
    dataset = open_dataset("folder", root, "val")
    labels = [dataset[i].label for i in spaced(len(dataset), part.val)]

    def rows(split: str, most: int) -> list[tuple[Tensor, ...]]:
        images = images_of(root, split, part.short_side, most)
        found = [embed(backbone, one, part.short_side, mirrored=part.mirrored) for one in images]
        if part.mirrored:
            return found
        # The head is taught by two views of each image: here both are the same.
        return [(features.expand(2, -1, -1, -1), *others) for features, *others in found]

    known, scored = rows("train", part.train), rows("val", part.val)
    train = Pictures(tuple(Picture(*row, label=None) for row in known), tuple(dataset.class_names))
    val = Pictures(
        tuple(Picture(*row, label=label) for row, label in zip(scored, labels, strict=True)),
        train.classes,
    )
    if beside or name == _APPEARANCE:
        looks = standardised(train)
        train, val = (with_appearance(one, looks, alone=not beside) for one in (train, val))
    return train, val


def named(name: str, root: Path, part: Part) -> Backbone | Callable[[Tensor], Tensor]:
    """The backbone of a name; for `appearance`, what gives the grid alone."""
    if name == _APPEARANCE:
        return lambda images: functional.adaptive_avg_pool2d(
            images[:, :1].float(), [max(1, (side + 4) // 8) for side in images.shape[2:]]
        )
    torch.manual_seed(0)
    kind, colon, network = name.partition(":")
    if kind != "components" or not colon:
        return load_backbone(resolve(name)).eval()
    backbone = untrained_backbone(network).eval()
    images = images_of(root, "train", part.short_side, part.train)
    pixels = (to_working_size(image, part.short_side, 0)[None] / 255 for image in images)
    return reduced_backbone(backbone, COMPONENTS, pixels)


def standardised(train: Pictures) -> Callable[[Picture], Float[Tensor, "27 h w"]]:
    """Appearance with mean 0 and deviation 1 over the images to fit."""
    rows = torch.cat([one.appearance.float().flatten(1) for one in train.items], 1)
    mean, std = rows.mean(1)[:, None, None], rows.std(1)[:, None, None] + 1e-6
    return lambda picture: (picture.appearance.float() - mean) / std


def with_appearance(some: Pictures, looks: Callable[[Picture], Tensor], *, alone: bool) -> Pictures:
    """Put appearance in the place of the embeddings, or beside them with equal mean length.

    Both views of an image, by which the head is taught, are then the same.
    """

    def changed(picture: Picture) -> Picture:
        seen = looks(picture)
        if not alone:
            seen = torch.cat([directions(picture), seen / seen.shape[0] ** 0.5])
        return replace(picture, features=seen.half().expand(2, -1, -1, -1))

    return Pictures(tuple(changed(one) for one in some.items), some.classes)


# Scores -------------------------------------------------------------------------------------------


def measure(
    train: Pictures, val: Pictures, seeds: Sequence[int], scores: Sequence[str]
) -> dict[str, Any]:
    """Some scores of a backbone on a set, as plain numbers."""
    classes = len(val.classes)
    return {name: SCORES[name](name, train, val, classes, seeds) for name in scores}


def of_method(
    name: str, train: Pictures, val: Pictures, classes: int, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """The scores of a recipe of develop.py, for each seed."""
    found = [score(val, RECIPES[name](train, classes, seed), classes) for seed in seeds]
    return {
        "accuracy": [one.accuracy for one in found],
        "miou": [one.miou for one in found],
        "entropy": [one.entropy for one in found],
    }


def of_probe(
    _name: str, _train: Pictures, val: Pictures, _classes: int, _seeds: Sequence[int]
) -> dict[str, list[float]]:
    """The scores of a linear probe, from half of the labels."""
    found = linear_probe(val)
    return {"accuracy": [found.accuracy], "miou": [found.miou]}


def of_oracle(
    name: str, train: Pictures, val: Pictures, classes: int, _seeds: Sequence[int]
) -> dict[str, list[float]]:
    """The scores of the majority class of each of many clusters."""
    clusters = name.partition("-")[2]
    accuracy, miou = oracle(train, classes if clusters == "K" else int(clusters), val, 0)
    return {"accuracy": [accuracy], "miou": [miou]}


SCORES: dict[str, Callable[[str, Pictures, Pictures, int, Sequence[int]], dict[str, list[float]]]]
SCORES = {
    "kmeans": of_method,
    "consensus": of_method,
    "consensus-head": of_method,
    "probe": of_probe,
    "oracle-K": of_oracle,
    "oracle-27": of_oracle,
    "oracle-100": of_oracle,
}
"""What is measured, by name."""


def header(scores: Sequence[str]) -> str:
    """The first lines of the table."""
    names = ("backbone", "set", *scores, "CPU s")
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def line(record: dict[str, Any]) -> str:
    """A row: accuracy / mIoU of each score, in percent."""
    cells = []
    for column in (name for name in SCORES if name in record):
        accuracy = 100 * fmean(record[column]["accuracy"])
        cells.append(f"{accuracy:.1f} / {spread([100 * x for x in record[column]['miou']])}")
    seconds = f"{record['cpu_seconds']:.0f}"
    return f"| {record['backbone']} | {record['data']} | {' | '.join(cells)} | {seconds} |"


if __name__ == "__main__":
    main()
