"""What each regulariser does on drawn street scenes, with and without centred embeddings.

The truth of drawn scenes is known, so this is where settings of the method are chosen; no label of
a real image is read. One row per setting: mIoU and accuracy on scenes not trained on, and the live
clusters at the end of training.

    python benchmarks/regularizers.py --seeds 3 --out docs/results/regularizers.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from iddc.config import Centering, Experiment, Regularizer, TrainingConfig
from iddc.datasets import open_dataset
from iddc.datasets.synthetic import CLASSES, write_scenes
from iddc.evaluation import evaluate
from iddc.images import find_images
from iddc.learning import fit
from iddc.recipes import RECIPES
from iddc.recipes.ablations import from_scratch
from iddc.runs import Run
from iddc.segmenter import Segmenter

SETTINGS: list[tuple[Regularizer, float]] = [
    ("none", 0.0),
    ("entropy", 0.3),
    ("weibull-released", 0.3),
    ("weibull-released", 3.0),
    ("weibull", 0.1),
    ("weibull", 0.3),
    ("weibull", 1.0),
]


def experiments(args: argparse.Namespace) -> Iterator[Experiment]:
    """Every setting, on IDDC from random weights made short."""
    base = from_scratch(RECIPES["folder"].experiment())
    for centering in args.centerings:
        for regularizer, weight in SETTINGS:
            yield base.model_copy(
                update={
                    "method": "iddc",
                    "num_clusters": len(CLASSES),
                    "backbone": args.backbone,
                    "views": base.views.model_copy(update={"crop_size": args.crop}),
                    "training": TrainingConfig(batch_size=args.batch, min_steps=args.steps),
                    "objective": base.objective.model_copy(
                        update={
                            "centering": centering,
                            "regularizer": regularizer,
                            "regularizer_weight": weight,
                        }
                    ),
                }
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="untrained:vit_tiny_patch16_224")
    parser.add_argument("--centerings", nargs="+", default=get_args(Centering))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=80)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=160)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [
        "| centring | regulariser | lambda_2 | mIoU (%) | accuracy (%) | live of 6 |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder, "scenes")
        write_scenes(scenes, args.scenes, seed=0)
        files = find_images(scenes / "train").files
        dataset = open_dataset("folder", scenes, "val")
        for place, experiment in enumerate(experiments(args)):
            found = []
            for seed in range(args.seeds):
                chosen = experiment.model_copy(update={"seed": seed})
                path = Path(folder, f"{place}-{seed}")
                with Run.start(path, chosen, source=str(scenes)) as run:
                    segmenter = Segmenter.of(fit(files, chosen, run), chosen)
                    scores = evaluate(segmenter, dataset).scores
                last = json.loads((path / "log.jsonl").read_text().splitlines()[-1])
                found.append((100 * scores.miou, 100 * scores.accuracy, last["live_clusters"]))
            miou, accuracy, live = (statistics.mean(column) for column in zip(*found, strict=True))
            spread = statistics.stdev(row[0] for row in found) if args.seeds > 1 else 0.0
            objective = experiment.objective
            rows.append(
                f"| {objective.centering} | {objective.regularizer} "
                f"| {objective.regularizer_weight} | {miou:.1f} ± {spread:.1f} | {accuracy:.1f} "
                f"| {live:.1f} |"
            )
            print(rows[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
