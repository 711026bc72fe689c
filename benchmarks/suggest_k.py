"""How far is the K that a sweep suggests from the number of classes? On the development sets.

    python benchmarks/suggest_k.py --data DIR

Runs `iddc sweep`'s own code on the training images of each labelled set, and compares its
suggestion with the number of annotated classes. Labels are not opened. CamVid is scored and chose
nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from embedded import DATA, SETS
from iddc.cli.sweep import CLUSTERS
from iddc.config import Experiment, Runtime
from iddc.datasets import open_dataset
from iddc.images import find_images
from iddc.recipes import RECIPES
from iddc.sweep import sweep


def main() -> None:
    """Sweep every set; print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/ and camvid/")
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    parser.add_argument("--backbone", default="bundled", help="as for `iddc train`")
    parser.add_argument("--images", type=int, default=64, help="the most images that are looked at")
    args = parser.parse_args()
    experiment: Experiment = RECIPES["folder"].experiment()
    experiment = experiment.model_copy(update={"backbone": args.backbone})
    values = sorted({4, *CLUSTERS})
    print(f"`python {' '.join(sys.argv)}`\n")
    print(f"| set | classes | suggested | {' | '.join(f'K = {k}' for k in values)} |")
    print("|---|---|---|" + "---|" * len(values))
    for name in args.sets:
        root = args.data / SETS[name]
        files = find_images(root / "train" / "images").files
        found = sweep(files, experiment, values, Runtime(), images=args.images)
        classes = len(open_dataset("folder", root, "val").class_names)
        agreements = {level.num_clusters: f"{level.agreement:.2f}" for level in found.levels}
        cells = " | ".join(agreements.get(k, "-") for k in values)
        print(f"| {name} | {classes} | {found.suggested} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
