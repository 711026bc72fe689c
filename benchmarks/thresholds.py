"""What thresholds without labels cost: beside the labelled crossing, and a grid scored with labels.

    python benchmarks/thresholds.py --data CAMVID --backbones bundled NAME... --out OUT

For each backbone: where the affinities of pairs of annotated classes cross (`iddc analyze`), where
`auto` puts t+ = t- in training, and the mIoU on val with `auto` and with each value of a grid. The
best of the grid is chosen by labels, so it is a bound and no setting to copy; who scores a
validation set notes it in docs/log.md. DATA has the layout `folder` with the splits train and val.
Runs are in OUT/runs, and those that are there are used again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from iddc.analysis import analyze
from iddc.config import Experiment, Runtime
from iddc.errors import IddcError
from iddc.progress import Progress
from iddc.recipes import RECIPES, Row, folder
from iddc.recipes.ablations import from_scratch, objective
from iddc.reproduce.plan import Job
from iddc.reproduce.report import spread
from iddc.reproduce.work import Runner
from iddc.runs import load_config, write_atomic

AUTO = "auto"
GRID = (-0.1, 0.0, 0.1, 0.2, 0.3, 0.4)
"""t+ = t-, cosines of centred embeddings."""


def main() -> None:
    """Measure each backbone, print a table and write OUT.md and OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbones", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--grid", type=float, nargs="+", default=GRID)
    parser.add_argument(
        "--config", type=Path, help="what is trained; none: IDDC by cosines from random weights"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    recipes = {name: RECIPES[name].experiment for name in RECIPES}
    base = load_config(args.config, recipes) if args.config else from_scratch(folder())
    bench = Runner.open("folder", args.data, Runtime(device=args.device, workers=0), Progress())
    base = base.model_copy(update={"num_clusters": bench.dataset.num_classes, "method": "iddc"})
    rows = []
    for backbone in args.backbones:
        experiment = base.model_copy(update={"backbone": backbone})
        rows.append(measure(experiment, args.data, bench, args.grid, args.seeds, args.out))
        write_atomic(args.out.with_suffix(".json"), json.dumps(rows, indent=2) + "\n")
        write_atomic(args.out.with_suffix(".md"), table(rows, " ".join(sys.argv)))
    print(table(rows, " ".join(sys.argv)))


def measure(
    experiment: Experiment,
    data: Path,
    bench: Runner,
    grid: list[float],
    seeds: int,
    out: Path,
) -> dict[str, Any]:
    """All numbers of a backbone, mIoU in [0, 1] for each seed."""
    scores: dict[str, list[float]] = {str(value): [] for value in (AUTO, *grid)}
    found, crossings = [], []
    for seed in range(seeds):
        for value in (AUTO, *grid):
            row = Row((), name=f"t-{value}", recipe="folder")
            edit = objective(positive_threshold=value, negative_threshold=value)
            job = Job(row, edit(experiment), "folder", data, "full", "none")
            run = bench.train(job, job.folder(out / "runs", "thresholds", seed), seed)
            scores[str(value)].append(bench.score(job, run)["miou"])
            if value == AUTO:
                first = json.loads((run.path / "log.jsonl").read_text("utf-8").splitlines()[0])
                found.append(first["positive_threshold"])
        seeded = experiment.model_copy(update={"seed": seed})
        look = analyze(
            bench.files, seeded, out / "affinities", bench.runtime, labelled=bench.dataset
        )
        crossings.append(look.crossing)
    return {
        "backbone": experiment.backbone,
        "auto": found,
        "labelled_crossing": crossings,
        "miou": scores,
    }


def table(rows: list[dict[str, Any]], command: str) -> str:
    """The measurements as Markdown."""
    columns = [name for name in rows[0]["miou"] if name != AUTO]
    titles = ["backbone", "labelled crossing", "auto", "mIoU, auto", "best of the grid", "cost"]
    lines = [
        f"`python {command}`\n",
        "Thresholds, and mIoU (%) on val, mean ± standard deviation of "
        f"{len(rows[0]['auto'])} seeds.\n",
        f"| {' | '.join([*titles, *(f't {name}' for name in columns)])} |",
        "|---" * (len(titles) + len(columns)) + "|",
    ]
    for row in rows:
        means = {name: fmean(row["miou"][name]) for name in columns}
        best = max(means, key=means.__getitem__)
        cells = [
            row["backbone"],
            f"{fmean(row['labelled_crossing']):.2f}",
            f"{fmean(row['auto']):.2f}",
            spread(row["miou"][AUTO]),
            f"{100 * means[best]:.1f} at {best}",
            f"{100 * (means[best] - fmean(row['miou'][AUTO])):.1f}",
            *(spread(row["miou"][name]) for name in columns),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main()
    except IddcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
