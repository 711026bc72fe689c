"""How good a backbone is for segmentation: k-NN, linear probe, k-means and IDDC on labelled images.

A judge, run once at the end. It reads labels, so nothing may be chosen by what it says: no
backbone, no recipe, no number of a configuration. Who scores a validation set notes it in
docs/log.md. To compare while developing, use label-free measures or the synthetic scenes.

    python benchmarks/quality.py --backbone DIR --data CAMVID --out runs/quality

CAMVID is a data set of the layout `folder` with the splits train and val. Both probes learn from
the labels of train; k-means and IDDC see its images only, and all four are scored on val. The
command can be given again when it was interrupted.

knn, linear    share of patches of val whose class is right; a patch has the class at its centre
kmeans, iddc   mIoU and accuracy by the protocol `full`, as many clusters as classes, last epoch
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from iddc.backbones import Backbone, load_backbone, resolve
from iddc.config import Experiment, Runtime
from iddc.datasets import LabelledImages, open_dataset
from iddc.device import autocast, pick_device
from iddc.errors import IddcError
from iddc.evaluation import evaluate
from iddc.images import find_images
from iddc.learning import fit
from iddc.methods import completed, used
from iddc.metrics import IGNORE
from iddc.pretraining import write_scores
from iddc.progress import Progress
from iddc.recipes import folder
from iddc.runs import Run, write_atomic
from iddc.segmenter import Segmenter
from iddc.windows import to_working_size

TRAIN_PATCHES, VAL_PATCHES = 100, 500
"""Labelled patches drawn from each image."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""A neighbour's vote counts exp(cosine / temperature), as DINO's k-NN has it."""
WEIGHT_DECAY, ITERATIONS = 1e-4, 100
"""Of the linear probe, fitted by L-BFGS on standardised embeddings."""
_ROWS = 1024
"""Patches that are compared with all others at once."""


def main() -> None:
    """Measure one backbone, print a table and write OUT/quality.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", required=True, help="as for `iddc train`")
    parser.add_argument("--data", type=Path, required=True, help="DIR/train and DIR/val")
    parser.add_argument("--out", type=Path, required=True, help="a folder for this backbone alone")
    parser.add_argument("--seeds", type=int, default=5, help="of k-means and IDDC; 0: probes alone")
    parser.add_argument("--epochs", type=int, default=0, help="of IDDC; 0: as by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--card", action="store_true", help="put the table into DIR's model card")
    args = parser.parse_args()
    changes = {"backbone": resolve(args.backbone), "epochs": args.epochs}
    experiment = folder().model_copy(update=changes)
    runtime = Runtime(device=args.device)
    record = measure(experiment, args.data, args.out, range(args.seeds), runtime)
    record["command"] = " ".join(sys.argv)
    record["date"] = datetime.now(UTC).date().isoformat()
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "quality.json", json.dumps(record, indent=2) + "\n")
    print(table(record))
    if args.card:
        write_scores(Path(args.backbone), table(record))


def measure(
    experiment: Experiment, data: Path, out: Path, seeds: range, runtime: Runtime
) -> dict[str, Any]:
    """All scores of a backbone, as plain values.

    Args:
        experiment: The backbone and how IDDC trains on it; K is the number of classes.
        data: A data set of the layout `folder` with the splits train and val.
        out: Where the runs are written; those that are there already are not done again.
        seeds: Of k-means and IDDC.
        runtime: How this machine works.
    """
    train, val = (open_dataset("folder", data, split) for split in ("train", "val"))
    record: dict[str, Any] = {
        "backbone": experiment.backbone,
        "data": str(data),
        "device": str(pick_device(runtime.device)),
        "experiment": experiment.model_dump(),
        **probes(experiment, train, val, runtime),
    }
    source = data / "train" / "images"
    files = find_images(source).files
    for name in ("kmeans", "iddc"):
        scores = []
        for seed in seeds:
            changes = {"seed": seed, "num_clusters": val.num_classes, "method": name}
            seeded = completed(experiment.model_copy(update=changes))
            path = out / f"{name}-{seed}"
            if Run(path).finished and used(Run(path).experiment) == used(seeded):
                segmenter = Segmenter.load(path, runtime.device)
            else:
                with Run.start(path, seeded, source=str(source), record=used(seeded)) as run:
                    network = fit(files, seeded, run, runtime, progress=Progress())
                    segmenter = Segmenter.of(network, seeded)
            scores.append(evaluate(segmenter, val).scores)
        record[name] = {
            "miou": [score.miou for score in scores],
            "accuracy": [score.accuracy for score in scores],
        }
    return record


def table(record: dict[str, Any]) -> str:
    """The scores in percent, as Markdown."""

    def percent(values: list[float]) -> str:
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * fmean(values):.1f}{spread}"

    rows = [f"| {name} | {percent([record[name]])} | |" for name in ("knn", "linear")]
    for name in ("kmeans", "iddc"):
        scores = record[name]
        if not scores["miou"]:
            continue
        rows.append(f"| {name} | {percent(scores['accuracy'])} | {percent(scores['miou'])} |")
    seeds = len(record["iddc"]["miou"])
    spread = f"; {seeds} seeds, mean and spread" if seeds else ""
    title = f"`{record['backbone']}` on `{record['data']}`, val{spread}\n"
    return "\n".join([title, "| % | accuracy | mIoU |", "|---|---|---|", *rows])


# Probes -------------------------------------------------------------------------------------------


def probes(
    experiment: Experiment, train: LabelledImages, val: LabelledImages, runtime: Runtime
) -> dict[str, float]:
    """The accuracy of k-NN and of a linear probe on patch embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)
        backbone = load_backbone(experiment.backbone).to(pick_device(runtime.device))
    known, classes = labelled_patches(backbone, train, TRAIN_PATCHES, experiment)
    queries, expected = labelled_patches(backbone, val, VAL_PATCHES, experiment)
    found = {
        "knn": nearest_neighbours(known, classes, queries, val.num_classes),
        "linear": linear_probe(known, classes, queries, val.num_classes),
    }
    return {name: float((ids == expected).float().mean()) for name, ids in found.items()}


def labelled_patches(
    backbone: Backbone, dataset: LabelledImages, most: int, experiment: Experiment
) -> tuple[Float[Tensor, "n d"], Int64[Tensor, " n"]]:
    """Embeddings of patches drawn from each image, whole at working size, and their classes."""
    device = next(backbone.parameters()).device
    vectors, classes = [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        pixels = to_working_size(sample.image, experiment.views.short_side, 0).to(device)
        with torch.no_grad(), autocast(device, experiment.training.precision):
            features: Tensor = backbone(pixels[None])[0]
        height, width = features.shape[1:]
        centres = Image.fromarray(sample.label).resize((width, height), Image.Resampling.NEAREST)
        label = torch.from_numpy(np.array(centres, np.int64)).flatten()
        labelled = (label != IGNORE).nonzero()[:, 0].numpy()
        rng = np.random.default_rng((experiment.seed, index))
        drawn = torch.from_numpy(rng.permutation(labelled)[:most])
        vectors.append(features.flatten(1).T[drawn.to(device)])
        classes.append(label[drawn].to(device))
    return torch.cat(vectors), torch.cat(classes)


def nearest_neighbours(
    known: Float[Tensor, "n d"],
    classes: Int64[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    num_classes: int,
) -> Int64[Tensor, " m"]:
    """The class for which the nearest known patches vote."""
    known, one_hot = normalize(known, dim=1), functional.one_hot(classes, num_classes).float()
    found = []
    for some in torch.split(normalize(queries, dim=1), _ROWS):
        cosines, places = (some @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
        votes = (cosines / TEMPERATURE).softmax(dim=1)
        found.append((votes[..., None] * one_hot[places]).sum(1).argmax(1))
    return torch.cat(found)


def linear_probe(
    known: Float[Tensor, "n d"],
    classes: Int64[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    num_classes: int,
) -> Int64[Tensor, " m"]:
    """The class that multinomial logistic regression finds most probable."""
    mean, std = known.mean(0), known.std(0) + 1e-6
    known, queries = (known - mean) / std, (queries - mean) / std
    weight = known.new_zeros(known.shape[1], num_classes, requires_grad=True)
    bias = known.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit_loss = functional.cross_entropy(known @ weight + bias, classes)
        total = fit_loss + WEIGHT_DECAY * weight.square().sum()
        torch.autograd.backward(total)
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (queries @ weight + bias).argmax(1)


if __name__ == "__main__":
    try:
        main()
    except IddcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
