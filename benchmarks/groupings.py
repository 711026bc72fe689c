"""Numbers of the consensus, tried in seconds: its classes are scored as found, without a head.

    python benchmarks/groupings.py --cache DIR --numbers size_power=0.5 size_power=1 --seeds 10

Embeddings are averaged over regions once for each set. Each entry of --numbers is then a
consensus of all regions of the training images with these numbers of `ConsensusConfig`, such as
size_power=0:prototypes=400, scored on val's regions at the grid of patches. Colours are left out,
so digital rock, where the default has them, is better tried with `develop.py`. The labels of the
development sets may choose numbers; CamVid is no choice here.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from develop import divided, nearest, region_view, row
from embedded import DATA, SETS, Pictures, Result, load, result
from iddc.config import ConsensusConfig
from iddc.consensus import fit_consensus
from iddc.metrics import Confusion
from iddc.regions import pooled


@dataclass(frozen=True)
class Prepared:
    """The regions of a set: those to learn from, and those that are scored."""

    vectors: Float[Tensor, "n d"]
    """The vectors of the training images."""
    sizes: Int64[Tensor, " n"]
    """How many patches have each."""
    asked: Float[Tensor, "m d"]
    """The vectors of val."""
    labels: Int64[Tensor, "m k"]
    """How many patches with each of asked have each class."""


def prepared(train: Pictures, val: Pictures) -> Prepared:
    """Average over regions, and count the classes of each vector of val."""
    view = region_view(train)
    none = torch.empty(0, dtype=torch.long)
    learned = [pooled(view(one), divided(one), none) for one in train.items]
    asked, labels, classes = [], [], len(val.classes)
    for one in val.items:
        maps = view(one)
        pool = pooled(maps, divided(one), torch.arange(maps[0].numel()))
        truth = torch.from_numpy(nearest(one.label, maps.shape[1:]).astype(np.int64)).flatten()
        known = truth < classes
        pairs = pool.owners[known] * classes + truth[known]
        counts = torch.bincount(pairs, minlength=len(pool.vectors) * classes)
        asked.append(pool.vectors)
        labels.append(counts.reshape(-1, classes))
    return Prepared(
        torch.cat([pool.vectors for pool in learned]),
        torch.cat([pool.sizes for pool in learned]),
        torch.cat(asked),
        torch.cat(labels),
    )


def scored(data: Prepared, config: ConsensusConfig, seed: int) -> Result:
    """Find as many classes as there are labels, and score them."""
    clusters = data.labels.shape[1]
    weights = data.sizes.float() ** config.size_power
    found = fit_consensus(data.vectors, clusters, config, weights=weights, seed=seed)
    winners = one_hot(found.probs(data.asked).argmax(1), clusters)
    return result(Confusion((winners.T @ data.labels).numpy()))


def main() -> None:
    """Score every entry on every set, and print a table for each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where embeddings are kept")
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/")
    sets = [name for name in SETS if name != "camvid"]
    parser.add_argument("--sets", nargs="+", default=["idd-lite", "labelmefacade"], choices=sets)
    parser.add_argument("--backbone", default="bundled", help="as for `iddc train`")
    parser.add_argument("--numbers", nargs="+", default=["size_power=0.5"])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    print(f"`python {' '.join(sys.argv)}`\n")
    for name in args.sets:
        options = {"backbone": args.backbone, "cache": args.cache, "data": args.data}
        data = prepared(*(load(name, split, **options) for split in ("train", "val")))
        print(f"**{name}**\n\n| numbers | accuracy | mIoU | entropy | sizes, seed 0 | seconds |")
        print("|---|---|---|---|---|---|")
        for entry in args.numbers:
            numbers = dict(number.split("=", 1) for number in entry.split(":"))
            config = ConsensusConfig(**{key: yaml.safe_load(v) for key, v in numbers.items()})
            results, seconds = [], []
            for seed in range(args.seeds):
                start = time.perf_counter()
                results.append(scored(data, config, seed))
                seconds.append(time.perf_counter() - start)
            print(row(entry, results, fmean(seconds)), flush=True)
        print()


if __name__ == "__main__":
    main()
