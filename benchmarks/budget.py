"""Give k-means the processor time that IDDC takes, in restarts, and see who is better then.

    python benchmarks/budget.py --cache DIR --sets digital-rock --seeds 3

`iddc train` keeps the best of four heads, `iddc baseline kmeans` the best of three restarts, each
by its own objective and without a label. That is not the same chance, since a head takes far longer
than a restart. Here IDDC is trained first; k-means then gets as many restarts as fit into the same
seconds of the processor. Both learn from the same embeddings, made once (`embedded.py`, which also
scores; `learned.py` runs the product's own methods), so the backbone's time counts for neither.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from embedded import DATA, SETS, Result, load, score, truth
from learned import method_recipe

Row = tuple[Result, float, int]
"""A result, the seconds it took, and how many heads or restarts it is the best of."""


def timed(fit: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds of the processor."""
    started = time.process_time()
    found = fit()
    return found, time.process_time() - started


def restarts_in(budget: float, one: float, several: float, number: int) -> int:
    """How many restarts fit into some seconds, at least one.

    Args:
        budget: The seconds.
        one: What a single restart took, with all that is done once.
        several: What some restarts took.
        number: How many those were.
    """
    each = max((several - one) / (number - 1), 1e-3 * one)
    return max(1, 1 + int((budget - one) / each))


def compare(train: Any, val: Any, seed: int) -> dict[str, Row]:
    """Train and score IDDC, k-means as it is, and k-means with IDDC's seconds."""
    clusters = len(truth(val))

    def kmeans(restarts: int) -> tuple[Any, float]:
        fit = method_recipe("kmeans", restarts=restarts)
        return timed(lambda: fit(train, clusters, seed))

    iddc, budget = timed(lambda: method_recipe("iddc")(train, clusters, seed))
    _, one = kmeans(1)
    three, several = kmeans(3)
    most = restarts_in(budget, one, several, 3)
    many, spent = kmeans(most)
    return {
        "IDDC, the best of four heads": (score(val, iddc, clusters), budget, 4),
        "k-means, the best of three restarts": (score(val, three, clusters), several, 3),
        "k-means, restarts for the same time": (score(val, many, clusters), spent, most),
    }


def main() -> None:
    """Print a table for each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where embeddings are kept")
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/ and camvid/")
    parser.add_argument("--sets", nargs="+", default=["digital-rock"], choices=[*SETS])
    parser.add_argument("--backbone", default="bundled", help="as for `iddc train`")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(f"`python {' '.join(sys.argv)}`\n")
    for name in args.sets:
        train, val = (
            load(name, split, backbone=args.backbone, cache=args.cache, data=args.data)
            for split in ("train", "val")
        )
        runs = [compare(train, val, seed) for seed in range(args.seeds)]
        print(f"**{name}**, K = {len(truth(val))}\n")
        print("| | accuracy (%) | mIoU (%) | entropy | seconds of the processor | the best of |")
        print("|---|---|---|---|---|---|")
        for row in runs[0]:
            results = [run[row][0] for run in runs]
            cells = [spread([100 * result.accuracy for result in results])]
            cells += [spread([100 * result.miou for result in results])]
            cells += [f"{fmean(result.entropy for result in results):.2f}"]
            cells += [f"{fmean(run[row][1] for run in runs):.0f}"]
            cells += [", ".join(str(run[row][2]) for run in runs)]
            print(f"| {row} | {' | '.join(cells)} |", flush=True)
        print()


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
