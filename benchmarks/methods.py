"""Every method on every labelled set with every seed, all with the same few steps: one table.

    python benchmarks/methods.py --cache DIR --out FILE --methods kmeans iddc stego --steps 200

Methods learn as in `iddc train`, from embeddings made once (`learned.py`). Every run is a line of
FILE, so that the same command goes on where it stopped: seed by seed, so that what is there is
always a comparison. Labels of val score alone; the steps and the batch are given here, equal for
all, and no number of a method is chosen by a score.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from embedded import DATA, SETS, Pictures, load, score, truth
from iddc.errors import IddcError
from iddc.methods import METHODS, find_method
from learned import method_recipe

STEPS = ("steps", "min_steps", "fitting_steps", "start_steps")
"""The numbers of methods that say how long they learn."""
RANDOM = {"start": "random", "heads": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "iddc-cosine": ("iddc", {"objective": {"affinity": "cosine"}}),
    "iddc-random": (
        "iddc",
        {"training": RANDOM, "objective": {"affinity": "cosine", "regularizer_weight": 0.3}},
    ),
    "iddc-random-coassociation": (
        "iddc",
        {"training": RANDOM, "objective": {"regularizer_weight": 0.3}},
    ),
}
"""Rows that are a method with other numbers."""


def shortened(name: str, steps: int, batch_size: int) -> dict[str, Any]:
    """The numbers of a method that are made smaller, where they are larger."""
    if name in VARIANTS:
        method, changes = VARIANTS[name]
        found = shortened(method, steps, batch_size)
        return found | {key: {**found.get(key, {}), **values} for key, values in changes.items()}
    if name == "consensus":  # it has steps of another kind, which take seconds
        return {}
    if name == "iddc":  # its steps are those of `--training`
        return {"training": {"min_steps": steps, "batch_size": batch_size}}
    fields = find_method(name).Config.model_fields
    limits = {**dict.fromkeys(STEPS, steps), "batch_size": batch_size}
    if "object_start" in fields:  # EAGLE's second loss waits for the same share of the steps
        limits["object_start"] = steps * fields["object_start"].default // fields["steps"].default
    return {k: min(v, fields[k].default) for k, v in limits.items() if k in fields}


def method_of(name: str) -> str:
    """The method of a row."""
    return VARIANTS[name][0] if name in VARIANTS else name


def done(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The runs that are in a file, by set, method and seed."""
    lines = out.read_text("utf-8").splitlines() if out.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["data"], row["method"], row["seed"]): row for row in rows}


def run(
    name: str,
    train: Pictures,
    val: Pictures,
    seed: int,
    changes: dict[str, Any],
    picture: Path | None,
) -> Any:
    """Train and score; what the line says. The middle image's classes go to `picture`."""
    shares = truth(val)
    start = time.process_time()
    try:
        predict = method_recipe(method_of(name), **changes)(train, len(shares), seed)
    except IddcError as error:
        return {"error": str(error)}
    seconds = time.process_time() - start
    found = score(val, predict, len(shares))
    if picture:
        clusters = predict(val.items[len(val) // 2]).argmax(0).numpy()
        picture.parent.mkdir(parents=True, exist_ok=True)
        np.save(picture, found.confusion.match()[clusters])
    return {
        **{"accuracy": found.accuracy, "miou": found.miou, "entropy": found.entropy},
        **{"sizes": found.sizes, "seconds": seconds},
    }


def table(out: Path, data: str, methods: Sequence[str]) -> list[str]:
    """The table of a set in Markdown: means and deviations, differences to the first method."""
    rows = {key[1:]: row for key, row in done(out).items() if key[0] == data}
    lines = [
        "| method | seeds | accuracy | mIoU | mIoU - first | sizes | CPU s |",
        "|" + "---|" * 7,
    ]
    first = {seed: row for (method, seed), row in rows.items() if method == methods[0]}
    for name in methods:
        own = {seed: row for (method, seed), row in rows.items() if method == name}
        good = {seed: row for seed, row in own.items() if "miou" in row}
        if not good:
            reason = next((row["error"] for row in own.values()), "not run")
            lines.append(f"| {name} | 0 | {reason} |||||")
            continue
        pairs = [
            100 * (row["miou"] - first[seed]["miou"])
            for seed, row in good.items()
            if "miou" in first.get(seed, {}) and name != methods[0]
        ]
        cells = [
            *(spread([100 * row[key] for row in good.values()]) for key in ("accuracy", "miou")),
            spread(pairs, "+"),
            f"{fmean(row['entropy'] for row in good.values()):.2f}",
            f"{fmean(row['seconds'] for row in good.values()):.0f}",
        ]
        lines.append(f"| {name} | {len(good)} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    mean = f"{fmean(values):{sign}.1f}"
    return mean + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is missing, and print a table for each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where embeddings are kept")
    parser.add_argument("--data", type=Path, default=DATA, help="holds dev/ and camvid/")
    sets = ["idd-lite", "labelmefacade", "camvid"]
    parser.add_argument("--sets", nargs="+", default=sets, choices=[*SETS])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS, *VARIANTS])
    parser.add_argument("--backbone", default="bundled", help="as for `iddc train`")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="the most steps of a method")
    parser.add_argument("--batch-size", type=int, default=16, help="the most images of a step")
    parser.add_argument("--out", type=Path, required=True, help="has a line for each run")
    parser.add_argument("--maps", type=Path, help="keeps the classes of an image by each method")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    args = parser.parse_args()
    loaded: dict[tuple[str, str], list[Pictures]] = {}
    for seed in range(0 if args.table else args.seeds):
        for name in args.sets:
            for method in args.methods:
                if (name, method, seed) in done(args.out):
                    continue
                own = find_method(method_of(method)).backbone  # as pixels has
                backbone = own or args.backbone
                if (name, backbone) not in loaded:
                    options = {"backbone": backbone, "cache": args.cache, "data": args.data}
                    pictures = [load(name, split, **options) for split in ("train", "val")]
                    loaded[name, backbone] = pictures
                changes = shortened(method, args.steps, args.batch_size)
                picture = args.maps / name / f"{method}.npy" if args.maps and not seed else None
                found = run(method, *loaded[name, backbone], seed, changes, picture)
                row = {"data": name, "method": method, "seed": seed, "options": changes, **found}
                with args.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(name, method, seed, file=sys.stderr, flush=True)
    for name in args.sets:
        print(f"**{name}**\n")
        print("\n".join(table(args.out, name, args.methods)) + "\n")


if __name__ == "__main__":
    main()
