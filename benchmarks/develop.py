"""Compare recipes on the labelled development sets, over seeds, from embeddings made once.

    python benchmarks/develop.py --cache DIR --recipes kmeans one-cluster bands --seeds 5
    python benchmarks/develop.py --cache DIR --recipes method:iddc method:stego --seeds 5

Recipes, defaults and backbones may be chosen by these labels, but for those of CamVid, which is
scored and never chooses; training reads none. So results are those of recipes selected on IDD-Lite,
LabelMeFacade and digital rock. For every set there is a table of accuracy, mIoU, the entropy of
the clusters' sizes over log K (the truth's is in the title), and the seconds that fitting took.

`method:NAME` is a method of `iddc train`, which learns from the same embeddings (`learned.py`);
`method:NAME:colour=2:lengths=free` gives it other numbers. Add a recipe: a function of (pictures to
fit, K, seed) that returns a function from a `Picture` to probabilities of its patches, in RECIPES.
See `embedded.py` for the pieces.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize, one_hot

from embedded import DATA, SETS, Picture, Pictures, Result, directions, entropy, load, score, truth
from iddc.clustering import spherical_kmeans
from iddc.config import Experiment
from iddc.consensus import fit_consensus
from iddc.methods import METHODS
from iddc.methods.consensus import Consensus, ConsensusConfig
from iddc.metrics import IGNORE, Confusion
from iddc.network import LinearHead
from iddc.regions import both_regions, colour_share, pooled, region_means
from learned import method_recipe

Predict = Callable[[Picture], Float[Tensor, "k h w"]]
Fit = Callable[[Pictures, int, int], Predict]
"""From the images to learn from, K and a seed to what segments an image."""
VECTORS = 100_000
"""Patches that k-means sees."""


# Recipes without a network ------------------------------------------------------------------------


def one_cluster(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """Everything in the first cluster."""
    del pictures, seed
    return lambda picture: one_hot_map(torch.zeros(picture.lab.shape[1:]).long(), num_clusters)


def bands(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """K horizontal bands of equal height."""
    del pictures, seed

    def predict(picture: Picture) -> Tensor:
        height, width = 4 * num_clusters, picture.lab.shape[2]
        rows = torch.arange(height) * num_clusters // height
        return one_hot_map(rows[:, None].expand(height, width), num_clusters)

    return predict


def pixels(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """k-means on colour, row and distance from the central column, standardised."""
    return euclidean(pictures, num_clusters, seed, position)


def grey(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """k-means on grey values."""
    return euclidean(pictures, num_clusters, seed, lambda picture: picture.lab[:1].float())


def appearance_only(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """k-means on appearance, standardised."""
    return euclidean(pictures, num_clusters, seed, lambda picture: picture.appearance.float())


def position(picture: Picture) -> Float[Tensor, "5 h w"]:
    """Colour, row and distance from the central column."""
    height, width = picture.lab.shape[1:]
    row = torch.linspace(0, 1, height)[:, None].expand(height, width)
    column = torch.linspace(-1, 1, width).abs().expand(height, width)
    return torch.cat([picture.lab.float(), torch.stack([row, column])])


def euclidean(
    pictures: Pictures, num_clusters: int, seed: int, view: Callable[[Picture], Tensor]
) -> Predict:
    """scikit-learn's k-means on some features of patches, standardised."""
    from sklearn.cluster import KMeans

    rows = torch.cat([view(picture).flatten(1).T for picture in pictures.items])
    rows = rows[sample(len(rows), VECTORS, seed)]
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    found = KMeans(num_clusters, n_init=3, random_state=seed).fit((rows - mean) / std)
    centres = torch.from_numpy(found.cluster_centers_).float()

    def predict(picture: Picture) -> Tensor:
        maps = view(picture)
        distances = torch.cdist((maps.flatten(1).T - mean) / std, centres)
        return (-distances.square()).softmax(1).T.unflatten(1, maps.shape[1:])

    return predict


# Recipes on embeddings ----------------------------------------------------------------------------


def kmeans(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """The product's k-means on centred embeddings."""
    rows = pictures.features()
    rows = rows[sample(len(rows), VECTORS, seed)]
    mean = rows.mean(0)
    centroids = spherical_kmeans(rows - mean, num_clusters, seed=seed).centroids

    def predict(picture: Picture) -> Tensor:
        maps = normalize(directions(picture) - mean[:, None, None], dim=0)
        return (torch.einsum("kd,dhw->khw", centroids, maps) / 0.1).softmax(0)

    return predict


def consensus(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """The classes that `--method consensus` finds, as they are, with regions at test too."""
    view = region_view(pictures)
    none = torch.empty(0, dtype=torch.long)
    pools = [pooled(view(one), divided(one), none) for one in pictures.items]
    vectors = torch.cat([pool.vectors for pool in pools])
    weights = torch.cat([pool.sizes for pool in pools]).float() ** ConsensusConfig().size_power
    found = fit_consensus(vectors, num_clusters, weights=weights, seed=seed)

    def predict(picture: Picture) -> Tensor:
        maps = view(picture)
        return found.probs(maps.flatten(1).T).T.unflatten(1, maps.shape[1:])

    return predict


def region_view(pictures: Pictures) -> Callable[[Picture], Float[Tensor, "d h w"]]:
    """What the consensus sees of an image, but for colours; the mean is of these images."""
    mean = pictures.features().mean(0)
    shares = [colour_share(directions(one), divided(one)[1]) for one in pictures.items]
    unit = fmean(shares) >= ConsensusConfig().known_share

    def view(picture: Picture) -> Float[Tensor, "d h w"]:
        centred = normalize(directions(picture) - mean[:, None, None], dim=0)
        maps = region_means(centred, divided(picture))
        return normalize(maps, dim=0) if unit else maps

    return view


def taught(pictures: Pictures, num_clusters: int, seed: int) -> Predict:
    """`consensus`, taught to a linear head that sees embeddings alone, as the product does."""
    teacher = consensus(pictures, num_clusters, seed)
    rows = torch.cat(
        [one.features.float().flatten(2).permute(0, 2, 1) for one in pictures.items], 1
    )
    targets = torch.cat([teacher(picture).flatten(1).T for picture in pictures.items])
    drawn = sample(len(targets), ConsensusConfig().sample, seed)
    experiment = Experiment(num_clusters=num_clusters, seed=seed, head="linear")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = LinearHead(rows.shape[2], num_clusters)
    Consensus(head, experiment, ConsensusConfig()).teach(rows[:, drawn], targets[drawn])

    @torch.no_grad()
    def predict(picture: Picture) -> Tensor:
        return head(picture.features.float()).softmax(1).mean(0)

    return predict


def divided(picture: Picture) -> tuple[Tensor, Tensor]:
    """The regions of a picture; kept, since they depend on nothing else."""
    if picture not in _REGIONS:
        _REGIONS[picture] = both_regions(directions(picture), picture.lab)
    return _REGIONS[picture]


_REGIONS: WeakKeyDictionary[Picture, tuple[Tensor, Tensor]] = WeakKeyDictionary()


RECIPES: dict[str, Fit] = {
    "one-cluster": one_cluster,
    "bands": bands,
    "pixels": pixels,
    "grey": grey,
    "appearance": appearance_only,
    "kmeans": kmeans,
    "consensus": consensus,
    "consensus-head": taught,
}
"""Recipes by name. `method:NAME` is a method of `iddc train` with the numbers of the recipe
`folder`, which learns from the same embeddings step by step (`learned.py`)."""


def find_recipe(name: str) -> Fit:
    """A recipe of this file, or a method of the product."""
    kind, _, rest = name.partition(":")
    method, *numbers = re.split(r":(?=\w+=)", rest)
    if kind == "method" and method in METHODS:
        options = dict(number.split("=", 1) for number in numbers)
        return method_recipe(method, **{key: yaml.safe_load(v) for key, v in options.items()})
    if name in RECIPES:
        return RECIPES[name]
    known = ", ".join([*RECIPES, *(f"method:{one}" for one in METHODS)])
    raise SystemExit(f"Unknown recipe {name!r}. Known: {known}.")


# Bounds that need labels --------------------------------------------------------------------------


def constant_picture(val: Pictures) -> Result:
    """The majority class of each position, from val's own labels: what position alone can give."""
    classes, side = len(val.classes), 64
    votes = np.zeros((classes, side, side))
    for picture in val.items:
        small = nearest(picture.label, (side, side))
        for number in range(classes):
            votes[number] += small == number
    best = torch.from_numpy(votes.argmax(0))
    return score(val, lambda _: one_hot_map(best, classes), classes)


def oracle(pictures: Pictures, num_clusters: int, val: Pictures, seed: int) -> tuple[float, float]:
    """Accuracy and mIoU where every cluster of k-means has its majority class: a bound of K."""
    predict = kmeans(pictures, num_clusters, seed)
    counts = score(val, predict, num_clusters).confusion.counts
    classes = counts.shape[1]
    merged = np.zeros((classes, classes), np.int64)
    np.add.at(merged, counts.argmax(1), counts)
    scores = Confusion(merged).scores(np.arange(classes))
    return scores.accuracy, scores.miou


def linear_probe(val: Pictures, seed: int = 0) -> Result:
    """Logistic regression of patches, taught by half of val's images and scored on the others."""
    order = np.random.default_rng(seed).permutation(len(val))
    half = len(val) // 2
    known = Pictures(tuple(val.items[i] for i in order[:half]), val.classes)
    asked = Pictures(tuple(val.items[i] for i in order[half:]), val.classes)
    rows, labels = [], []
    for picture in known.items:
        maps = directions(picture)
        small = torch.from_numpy(nearest(picture.label, maps.shape[1:]).astype(np.int64))
        rows.append(maps.flatten(1).T)
        labels.append(small.flatten())
    vectors, classes = torch.cat(rows), torch.cat(labels)
    vectors, classes = vectors[classes != IGNORE], classes[classes != IGNORE]
    drawn = sample(len(vectors), 50_000, seed)
    vectors, classes = vectors[drawn], classes[drawn]
    mean, std = vectors.mean(0), vectors.std(0) + 1e-6
    layer = torch.nn.Linear(vectors.shape[1], len(val.classes))
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(layer((vectors - mean) / std), classes)
        loss = loss + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]

    @torch.no_grad()
    def predict(picture: Picture) -> Tensor:
        maps = directions(picture)
        logits = layer((maps.flatten(1).T - mean) / std)
        return logits.softmax(1).T.unflatten(1, maps.shape[1:])

    confusion = score(asked, predict, len(val.classes)).confusion
    scores = confusion.scores(np.arange(len(val.classes)))
    sizes = confusion.counts.sum(1) / confusion.counts.sum()
    return Result(scores.accuracy, scores.miou, entropy(sizes), tuple(sizes), confusion)


# Pieces -------------------------------------------------------------------------------------------


def sample(count: int, most: int, seed: int) -> Tensor:
    """Draw at most so many of `count` rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most]


def one_hot_map(ids: Tensor, num_clusters: int) -> Float[Tensor, "k h w"]:
    """Probabilities 0 and 1."""
    return one_hot(ids, num_clusters).permute(2, 0, 1).float()


def nearest(label: Any, size: Sequence[int]) -> np.ndarray:
    """A label at the centres of a grid."""
    height, width = label.shape
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
    small: np.ndarray = label[rows[:, None], columns]
    return small


# Tables -------------------------------------------------------------------------------------------


def main() -> None:
    """Fit and score every recipe on every set, and print a table for each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where embeddings are kept")
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/ and camvid/")
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    parser.add_argument("--backbone", default="bundled", help="as for `iddc train`")
    parser.add_argument("--short-side", type=int, default=448, help="the working size")
    parser.add_argument("--recipes", nargs="+", default=["kmeans"], help="see RECIPES")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bounds", action="store_true", help="linear probe, oracles, positions")
    parser.add_argument("--out", type=Path, help="also append every result to this file (JSON)")
    args = parser.parse_args()
    fits = {name: find_recipe(name) for name in args.recipes}
    print(f"`python {' '.join(sys.argv)}`\n")
    for name in args.sets:
        splits = (
            load(
                name,
                split,
                backbone=args.backbone,
                cache=args.cache,
                data=args.data,
                short_side=args.short_side,
            )
            for split in ("train", "val")
        )
        train, val = splits
        shares = truth(val)
        print(f"**{name}**, K = {len(shares)}, entropy of the classes {entropy(shares):.2f}\n")
        print("| recipe | accuracy | mIoU | entropy | sizes, seed 0 | seconds |")
        print("|---|---|---|---|---|---|")
        for recipe, fit in fits.items():
            results, seconds = [], []
            for seed in range(args.seeds):
                start = time.perf_counter()
                predict = fit(train, len(shares), seed)
                seconds.append(time.perf_counter() - start)
                results.append(score(val, predict, len(shares)))
            print(row(recipe, results, fmean(seconds)), flush=True)
            if args.out:
                with args.out.open("a") as stream:
                    stream.write(json.dumps(record(name, recipe, args.backbone, results)) + "\n")
        if args.bounds:
            print_bounds(train, val)
        print()


def print_bounds(train: Pictures, val: Pictures) -> None:
    """What labels say of the embeddings."""
    probe = linear_probe(val)
    print(row("*linear probe, half of val*", [probe], 0))
    print(row("*constant picture, from val*", [constant_picture(val)], 0), flush=True)
    for clusters in sorted({len(val.classes), 27, 100}):
        accuracy, miou = oracle(train, clusters, val, 0)
        cells = f"{100 * accuracy:.1f} | {100 * miou:.1f}"
        print(f"| *majority class of {clusters} clusters* | {cells} ||||", flush=True)


def row(name: str, results: Sequence[Result], seconds: float) -> str:
    """A line of Markdown: mean and spread over seeds, in percent."""
    cells = [
        spread([100 * one.accuracy for one in results]),
        spread([100 * one.miou for one in results]),
        f"{fmean(one.entropy for one in results):.2f}",
        " ".join(f"{100 * size:.0f}" for size in results[0].sizes[:12]),
        f"{seconds:.1f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def record(data: str, recipe: str, backbone: str, results: Sequence[Result]) -> dict[str, Any]:
    """The numbers of a row."""
    return {
        "data": data,
        "recipe": recipe,
        "backbone": backbone,
        "accuracy": [one.accuracy for one in results],
        "miou": [one.miou for one in results],
        "entropy": [one.entropy for one in results],
        "sizes": [one.sizes for one in results],
    }


if __name__ == "__main__":
    main()
