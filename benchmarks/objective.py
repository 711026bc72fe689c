"""What makes IDDC's clusters equal in size? Its objective on embeddings made once, in variants.

    python benchmarks/objective.py --cache DIR --seeds 1

The views are crops of 28 x 28 patches of an image's grid of embeddings, without rescaling, so a
step costs milliseconds and thousands of steps, as the paper has, can be tried. Every variant is one
change of the default. Beside accuracy and mIoU stands the entropy of the clusters' sizes over
log K, and the truth's. Training reads no label.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedded import DATA, Picture, directions, entropy, load, score, truth
from iddc.clustering import spherical_kmeans
from iddc.config import ObjectiveConfig
from iddc.losses import Objective, Pixels
from iddc.thresholds import resolve_thresholds

SIDE, REACH = 28, 14
"""The side of a crop in patches, and how far the second may lie from the first."""
OVER = 200
"""Clusters of k-means that Ward's linkage merges."""


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    steps: int = 200
    rate: float = 2e-3
    batch: int = 48
    patches: int = 96
    regularizer: str = "weibull"
    weight: float = 0.3
    negative: float = 1.4
    thresholds: tuple[float, float] | None = None
    """t+ and t-; none: from clusters of k-means, as `auto`."""
    prior: str = ""
    """Sizes that p_c is pulled to by KL: ward; otherwise the regulariser."""
    start: str = "random"
    """First weights: random, kmeans or ward, by cross-entropy on their classes."""
    affinity: str = "cosine"
    """What tells how alike two patches are: cosine, or coassociation in six over-clusterings."""


def over_clusters(rows: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids of many clusters of k-means, and Ward's class of each, every one of weight 1."""
    from scipy.cluster.hierarchy import fcluster, ward

    generator = torch.Generator().manual_seed(seed)
    drawn = rows[torch.randperm(len(rows), generator=generator)[:20000]]
    found = spherical_kmeans(drawn, OVER, seed=seed).centroids
    classes = fcluster(ward(found.numpy()), num_clusters, "maxclust") - 1
    return normalize(found, dim=1), torch.from_numpy(classes).long()


def soft_classes(rows: Tensor, centroids: Tensor, classes: Tensor, k: int) -> Tensor:
    probs = (normalize(rows, dim=-1) @ centroids.T / 0.03).softmax(-1)
    return probs @ torch.nn.functional.one_hot(classes, k).float()


def fit(train: list[Tensor], k: int, seed: int, v: Variant) -> tuple[nn.Module, Tensor]:
    """Train a linear head; it and the mean embedding that is subtracted before."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    # About 60 patches of each image, for the mean, the thresholds and the first weights.
    patches = [grid[0].flatten(1).T for grid in train]
    sample = torch.cat([rows[:: max(1, len(rows) // 60)] for rows in patches]).float()
    mean = sample.mean(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(sample.shape[1], k)
    centred = normalize(sample - mean, dim=1)
    config = ObjectiveConfig(
        centering="none",
        positive_threshold="auto" if v.thresholds is None else v.thresholds[0],
        negative_threshold="auto" if v.thresholds is None else v.thresholds[1],
        negative_weight=v.negative,
        regularizer="none" if v.prior else v.regularizer,  # type: ignore[arg-type]
        regularizer_weight=v.weight,
    )
    if v.thresholds is None:
        config = resolve_thresholds(config, centred[:: len(centred) // 16384 + 1], k, seed=seed)
    objective = Objective(config)
    prior = pieces = None
    if v.prior == "ward" or v.start == "ward" or v.affinity == "coassociation":
        number = 6 if v.affinity == "coassociation" else 1
        pieces = [over_clusters(centred, k, seed * 100 + m) for m in range(number)]
        labels = soft_classes(centred, *pieces[0], k)
        prior = labels.mean(0)
    # First weights that know some clusters already.
    if v.start != "random":
        if v.start == "kmeans":
            centroids = normalize(spherical_kmeans(centred[:50000], k, seed=seed).centroids, dim=1)
            labels = torch.nn.functional.one_hot((centred @ centroids.T).argmax(1), k).float()
        teach = torch.optim.Adam(head.parameters(), 1e-2)
        for _ in range(300):
            rows = torch.randint(len(centred), (4096,), generator=generator)
            loss = -(labels[rows] * head(centred[rows]).log_softmax(1)).sum(1).mean()
            teach.zero_grad()
            loss.backward()
            teach.step()
    # IDDC's steps, on crops of the grids.
    optimizer = torch.optim.Adam(head.parameters(), v.rate)
    order: list[int] = []
    for step in range(v.steps):
        rows: list[list[Tensor]] = [[], []]
        for _ in range(v.batch):
            order = order or torch.randperm(len(train), generator=generator).tolist()
            image = train[order.pop()]
            grid = image[uniform(2)]
            corners = []
            for size in grid.shape[1:]:
                side = min(SIDE, size)
                first = uniform(size - side + 1)
                low, high = max(0, first - REACH), min(size - side, first + REACH)
                corners.append((first, low + uniform(high - low + 1), side))
            for crop in range(2):
                (top, height), (left, width) = [(c[crop], c[2]) for c in corners]
                window = grid[:, top : top + height, left : left + width].flatten(1)
                chosen = torch.randperm(window.shape[1], generator=generator)[: v.patches]
                rows[crop].append(window[:, chosen].T)
        u = [normalize(torch.stack(r).float() - mean, dim=-1) for r in rows]
        factor = (1 - step / v.steps) ** 0.9
        optimizer.param_groups[0]["lr"] = v.rate * factor
        probs = [head(x).softmax(-1) for x in u]
        targets = u
        if v.affinity == "coassociation":
            assert pieces is not None
            targets = [
                torch.cat([soft_classes(x, *p, k).sqrt() for p in pieces], -1) / len(pieces) ** 0.5
                for x in u
            ]
        rolls = (torch.randperm(v.batch - 1, generator=generator)[:3] + 1).tolist()
        terms = objective(Pixels(targets[0], probs[0]), Pixels(targets[1], probs[1]), rolls)
        loss = terms.total
        if v.prior:
            assert prior is not None
            ratio = prior.clamp(min=1e-4) / probs[0].mean((0, 1)).clamp(min=1e-8)
            loss = loss + v.weight * (prior * ratio.log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head, mean


D = Variant()
VARIANTS: dict[str, Variant] = {
    "default": D,
    "none": replace(D, regularizer="none", weight=0),
    "weibull-0.1": replace(D, weight=0.1),
    "weibull-0.03": replace(D, weight=0.03),
    "weibull-0.03-1000": replace(D, weight=0.03, steps=1000),
    "entropy-0.1": replace(D, regularizer="entropy", weight=0.1),
    "kmeans-start-0.03": replace(D, start="kmeans", weight=0.03),
    "ward-only": replace(D, start="ward", steps=0),
    "ward-start-0.03": replace(D, start="ward", weight=0.03),
    "ward-start-none": replace(D, start="ward", weight=0, regularizer="none"),
    "ward-prior": replace(D, prior="ward", weight=1),
    "ward-prior-start": replace(D, prior="ward", weight=1, start="ward"),
    "coassociation-0.03": replace(D, affinity="coassociation", thresholds=(0.5, 0.5), weight=0.03),
}


@torch.no_grad()
def predict(head: nn.Module, mean: Tensor, picture: Picture) -> Tensor:
    """The probabilities of an image's patches."""
    grid = directions(picture)
    rows = normalize(grid.flatten(1).T - mean, dim=1)
    return head(rows).softmax(1).T.unflatten(1, grid.shape[1:])


def main(args: argparse.Namespace) -> int:
    for name in args.sets:
        train, val = (
            load(name, split, backbone=args.backbone, cache=args.cache, data=args.data)
            for split in ("train", "val")
        )
        maps = [normalize(p.features.float(), dim=1).half() for p in train.items]
        k = len(val.classes)
        print(f"## {name}, K = {k}, entropy of the truth {entropy(truth(val)):.2f}", flush=True)
        for variant in args.variants or VARIANTS:
            results, start = [], time.monotonic()
            for seed in range(args.seeds):
                head, mean = fit(maps, k, seed, VARIANTS[variant])
                results.append(score(val, partial(predict, head, mean), k))
            rows = [[100 * getattr(r, f) for r in results] for f in ("accuracy", "miou", "entropy")]
            cells = " ".join(f"| {fmean(r):.1f} ± {pstdev(r):.1f}" for r in rows[:2])
            sizes = " ".join(f"{100 * s:.0f}" for s in results[0].sizes)
            took = (time.monotonic() - start) / args.seeds
            print(
                f"| {variant} {cells} | {fmean(rows[2]) / 100:.2f} | {sizes} | {took:.0f} s |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--backbone", default="bundled")
    parser.add_argument("--sets", nargs="+", default=["idd-lite", "labelmefacade"])
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    sys.exit(main(parser.parse_args()))
