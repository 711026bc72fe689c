"""Does the verdict of a run go with its scores? On the labelled development sets.

    python benchmarks/verdict.py --cache DIR --out FILE.jsonl

Recipes, numbers of clusters, backbones and seeds give runs that are good and bad. Each is fitted to
images of `train`, judged as `iddc train` does (`report/verdict.py`), and scored on `val` at the
grid of patches. For each set and backbone there is a line with Spearman's rank correlation of the
verdict's score and the mIoU. CamVid is not among the sets. A file that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from scipy.stats import spearmanr

from develop import RECIPES, Predict, nearest
from embedded import DATA, Picture, Pictures, load
from iddc.metrics import Confusion
from iddc.regions import colour_regions, follows_regions
from iddc.report.verdict import FAIR, GOOD

SETS = ("idd-lite", "labelmefacade", "digital-rock")
NAMES = ("kmeans", "consensus-head", "appearance", "pixels", "bands", "grey")


def thinned(pictures: Pictures, count: int) -> Pictures:
    """Some pictures, evenly spread."""
    taken = min(count, len(pictures))
    items = tuple(pictures.items[i * len(pictures) // taken] for i in range(taken))
    return Pictures(items, pictures.classes)


def clusters_of(predict: Predict, picture: Picture) -> torch.Tensor:
    """The cluster of each patch of a picture."""
    probs = predict(picture).float()[None]
    if probs.shape[2:] != picture.lab.shape[1:]:
        probs = torch.nn.functional.interpolate(probs, picture.lab.shape[1:], mode="nearest")
    return probs[0].argmax(0)


def judged(predict: Predict, pictures: Pictures, num_clusters: int) -> float:
    """The score of the verdict."""
    clusters = [clusters_of(predict, one).numpy() for one in pictures.items]
    regions = [colour_regions(one.lab.float()).numpy() for one in pictures.items]
    return follows_regions(clusters, regions, num_clusters)


def scored(predict: Predict, val: Pictures, num_clusters: int) -> float:
    """The mIoU at the grid of patches."""
    total = Confusion.zeros(num_clusters, len(val.classes))
    for one in val.items:
        ids = clusters_of(predict, one).numpy()
        total += Confusion.count(ids, nearest(one.label, ids.shape), *total.counts.shape)
    return total.scores().miou


def main() -> None:
    """Fit, judge and score; print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where embeddings are kept")
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/")
    parser.add_argument("--out", type=Path, required=True, help="a line for each run (JSON)")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--backbones", nargs="+", default=["bundled"], help="as for `iddc train`")
    parser.add_argument("--recipes", nargs="+", default=NAMES, choices=[*RECIPES])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=32, help="that are learned from and judged")
    args = parser.parse_args()
    args.out.touch()
    done = {tuple(json.loads(line)["run"]) for line in args.out.read_text().splitlines()}
    for backbone in args.backbones:
        for name in args.sets:
            train, val = (
                thinned(
                    load(name, split, backbone=backbone, cache=args.cache, data=args.data),
                    args.images,
                )
                for split in ("train", "val")
            )
            for recipe in args.recipes:
                for factor in (1, 2, 4):
                    for seed in range(args.seeds):
                        k = factor * len(val.classes)
                        run = (name, backbone, recipe, k, seed)
                        if run in done:
                            continue
                        predict = RECIPES[recipe](train, k, seed)
                        found = {
                            "score": judged(predict, train, k),
                            "miou": scored(predict, val, k),
                        }
                        with args.out.open("a") as stream:
                            stream.write(json.dumps({"run": run, **found}) + "\n")
    print(f"`python {' '.join(sys.argv)}`\n")
    print("| set | backbone | runs | rank correlation | mIoU if good | fair | poor |")
    print("|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for line in args.out.read_text().splitlines():
        record = json.loads(line)
        groups.setdefault((record["run"][0], record["run"][1]), []).append(record)
    for (name, backbone), rows in groups.items():
        rank = spearmanr([row["score"] for row in rows], [row["miou"] for row in rows])[0]
        grades = [
            [row["miou"] for row in rows if low <= row["score"] < high]
            for low, high in ((GOOD, 2), (FAIR, GOOD), (-1, FAIR))
        ]
        cells = [f"{100 * fmean(mious):.1f}" if mious else "-" for mious in grades]
        print(f"| {name} | {backbone} | {len(rows)} | {rank:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
