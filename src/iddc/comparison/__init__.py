"""Methods side by side: the same images, backbone, protocol and seeds, and one table of them all.

Every run is a folder like any other, and its scores are kept, so an interrupted comparison goes on
where it stopped, and what is there is not done again. A method that fails has its reason in the
table, and the others finish. Labels are opened after all training is done.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import xlogy
from torch import Tensor

from iddc.comparison.memory import PeakMemory
from iddc.comparison.page import PICTURES, write_page
from iddc.comparison.table import LEGEND, Comparison, Entry, spread
from iddc.config import Experiment, MethodName, Runtime
from iddc.datasets import LabelledImages
from iddc.errors import ConfigError, IddcError, Interrupted, SetupError
from iddc.evaluation import EvalProtocol, Evaluation, evaluate
from iddc.images import ImageFile
from iddc.learning import trained_run
from iddc.learning.embeddings import Shared, keep_embeddings
from iddc.methods import completed, used
from iddc.progress import SILENT, Progress
from iddc.runs import Run, disk_errors, read_text, write_atomic
from iddc.runs.files import TEMPORARY
from iddc.segmenter import Segmenter

__all__ = ["LEGEND", "Comparison", "Entry", "compare", "compare_runs", "size_entropy", "spread"]

COST = ".cost.json"
"""The end of the file beside a run's folder that says how long its training took, and how much
memory."""
RESTART_SEEDS = 1_000_003
"""The distance of the seeds of two restarts; those of a comparison are near each other."""
SHOWN = 6
"""The number of images in the page."""
LAST_PART = 0.1
"""The share of the steps, the last ones, whose mean loss tells restarts apart."""

Cost = dict[str, float | None]
"""The seconds and the memory of a training, in bytes; none if a part of it was not seen."""


@dataclass(frozen=True)
class Labelled:
    """What runs are scored on."""

    dataset: LabelledImages
    """The images with labels."""
    name: str
    """What titles call them."""
    source: str
    """Where they lie, which part of them it is, and their `stamp_of`."""
    protocol: EvalProtocol
    """How they are scored."""


def stamp_of(root: Path, split: str, out: Path) -> str:
    """A digest of the names, sizes and times of the files of labelled images.

    Where it is another one, images or labels may have changed, and scores are made again.

    Args:
        root: The folder or the file of the data set.
        split: Of a folder `root/split` counts, where there is one.
        out: What lies in here does not count.
    """
    folder = root / split if (root / split).is_dir() else root
    found = [path for path in folder.rglob("*") if not path.is_relative_to(out)]
    stamp = hashlib.sha256()
    for path in sorted([root / "classes.txt", folder, *found]):
        if path.is_file():
            status = path.stat()
            stamp.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    return stamp.hexdigest()[:16]


def compare(
    files: Sequence[ImageFile],
    experiment: Experiment,
    methods: Sequence[MethodName],
    seeds: int,
    labelled: Labelled,
    out: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    source: str,
    budget: float = 0.0,
    progress: Progress = SILENT,
) -> Comparison:
    """Train every method with every seed on the same images, and score all of them alike.

    Args:
        files: The images to train on.
        experiment: What all methods have in common; `seed` is the first one.
        methods: Each once; the first is what the others are compared with.
        seeds: Runs of each method.
        labelled: What they are scored on.
        out: The folder to write; runs are in `out/runs`.
        runtime: How this machine works.
        source: Where the images come from, as the user gave it.
        budget: Minutes for each method and seed. A method starts again with another seed as long as
            one more run fits, and the run of the lowest loss counts. 0: one run.
        progress: Shows how far the work is.

    Raises:
        ConfigError: A method is named twice, a run in the folder has other options, or the folder
            holds something else.
        SetupError: The folder cannot be written; the same call goes on when it can.
        Interrupted: SIGINT or SIGTERM came; the same call goes on.
    """
    if len({*methods}) < len(methods):
        raise ConfigError(f"--methods: expected each method once, found {' '.join(methods)}.")
    refuse_foreign(out)
    failures: dict[str, str] = {}
    trained: dict[tuple[str, int], tuple[Path, Cost]] = {}

    # All training first: labels are not opened before the last run is done.
    wholes = Shared().wholes  # whole images are the same for all seeds
    for seed in range(experiment.seed, experiment.seed + seeds):
        shared = Shared(wholes=wholes)  # views are of one seed
        for name in methods:
            if name in failures:
                continue
            progress.note(f"{name}, seed {seed}")
            own = experiment.model_copy(update={"method": name, "seed": seed, "options": {}})
            restarts = Restarts(files, own, out / "runs" / f"{name}-{seed}", runtime, source)
            restarts.refuse_others()
            try:
                trained[name, seed] = restarts.best(60 * budget, shared, progress)
            except (SetupError, Interrupted):
                raise  # the machine's failure, such as a full disk, is not the method's
            except IddcError as error:
                failures[name] = str(error)
    runs = [
        (name, seed, *trained[name, seed])
        for name in methods
        for seed in range(experiment.seed, experiment.seed + seeds)
        if (name, seed) in trained and name not in failures
    ]
    title = f"{experiment.backbone}, {experiment.num_clusters} clusters, {labelled.name}"
    return _scored(title, runs, failures, labelled, out, runtime, progress)


def compare_runs(
    folders: Sequence[Path],
    labelled: Labelled,
    out: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    progress: Progress = SILENT,
) -> Comparison:
    """Score runs that exist. Folders whose names differ in the seed at their end are one row.

    Raises:
        ConfigError: Two folders have one name and seed, or `out` holds something else.
        DataError: A folder is no finished run.
    """
    refuse_foreign(out)
    runs = []
    for folder in folders:
        run = Run.open(folder)
        name, seed = folder.resolve().name, run.experiment.seed
        runs.append((name.removesuffix(f"-{seed}"), seed, folder, _cost(folder)))
    keys = [(name, seed) for name, seed, *_ in runs]
    if twice := [f"{name}, seed {seed}" for name, seed in keys if keys.count((name, seed)) > 1]:
        raise ConfigError(f"Two runs have one name and one seed: {twice[0]}. Rename a folder.")
    title = f"{len(runs)} runs, {labelled.name}"
    return _scored(title, runs, {}, labelled, out, runtime, progress)


def _scored(
    title: str,
    runs: Iterable[tuple[str, int, Path, Cost]],
    failures: Mapping[str, str],
    labelled: Labelled,
    out: Path,
    runtime: Runtime,
    progress: Progress,
) -> Comparison:
    """Score runs, and write the tables and the page."""
    with disk_errors(out):
        (out / "scores").mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    kept: dict[bytes, dict[bytes, Tensor]] = {}  # runs of one backbone embed each window once
    for name, seed, folder, cost in runs:
        first = name not in {entry.method for entry in entries}
        found = _entry(name, seed, folder, labelled, out, runtime, progress, kept, pictures=first)
        entries.append(Entry(name, seed, {**found["values"], **cost}, found["iou"], found["ends"]))
    comparison = Comparison(title, tuple(entries), failures)
    comparison.write(out)
    write_page(comparison, shown(labelled.dataset), out)
    return comparison


def _entry(
    name: str,
    seed: int,
    folder: Path,
    labelled: Labelled,
    out: Path,
    runtime: Runtime,
    progress: Progress,
    kept: dict[bytes, dict[bytes, Tensor]],
    *,
    pictures: bool,
) -> dict[str, Any]:
    """The scores of a run, from an earlier call if the weights and the protocol are the same."""
    file = out / "scores" / f"{name}-{seed}.json"
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    asked = f"{labelled.source} {labelled.dataset.name} {len(labelled.dataset)}"
    key = [weights, asked, json.dumps(asdict(labelled.protocol), default=str), pictures]
    record = _read(file)
    if record.get("key") == key and (not pictures or (out / PICTURES / name).is_dir()):
        return record
    progress.note(f"scoring {name}, seed {seed}")
    segmenter = Segmenter.load(folder, runtime.device)
    keep_embeddings(segmenter.network, segmenter.experiment, kept)
    found = evaluate(
        segmenter,
        labelled.dataset,
        labelled.protocol,
        trimap=True,
        save_masks=out / PICTURES / name if pictures else None,
        saved=[place for place, _ in shown(labelled.dataset)],
        progress=progress,
    )
    record = {
        "key": key,
        "values": _values(found),
        "iou": found.scores.as_dict(found.class_names)["iou"],
        "ends": {kind: list(ends) for kind, ends in found.intervals.items()},
    }
    write_atomic(file, json.dumps(record, indent=2) + "\n")
    return record


def shown(dataset: LabelledImages) -> list[tuple[int, str]]:
    """The places and names of the images in the page, spread evenly."""
    number = min(SHOWN, len(dataset))
    places = [i * len(dataset) // number for i in range(number)]
    return [(place, dataset[place].name) for place in places]


def _values(found: Evaluation) -> dict[str, float | None]:
    return {
        "accuracy": found.scores.accuracy,
        "miou": found.scores.miou,
        "size_entropy": size_entropy(found.confusion.counts.sum(1)),
        "trimap": found.near_edges.miou if found.near_edges else None,
    }


def size_entropy(pixels: np.ndarray) -> float:
    """The entropy of the clusters' shares over log K: 1 if all are equal, 0 if there is one."""
    shares = pixels / pixels.sum()
    return float(-xlogy(shares, shares).sum() / np.log(len(shares)))


@dataclass(frozen=True)
class Restarts:
    """The runs of one method and one seed: one, or as many as a budget of time allows."""

    files: Sequence[ImageFile]
    experiment: Experiment
    """That of the first run; others have other seeds."""
    folder: Path
    """That of the first run; others have a number at the end."""
    runtime: Runtime
    source: str
    """Where the images come from."""

    def refuse_others(self) -> None:
        """Raise a ConfigError if the first run is there with other options."""
        run = Run(self.folder)
        if not (run.has_config and run.finished):
            return
        try:
            same = used(completed(run.experiment)) == used(completed(self.experiment))
        except ConfigError:  # the training says it
            return
        if not same:
            raise ConfigError(
                f"{self.folder} is a run with other options. Choose another --out, or remove it."
            )

    def best(self, seconds: float, shared: Shared, progress: Progress) -> tuple[Path, Cost]:
        """Train while another run fits into the time; the run of the lowest loss, and its cost."""
        runs: list[tuple[float, Path, Cost]] = []
        spent = 0.0
        while not runs or spent + spent / len(runs) <= seconds:
            number = len(runs)
            folder = self.folder if not number else Path(f"{self.folder}.restart{number}")
            cost = self._train(
                folder, number, shared if not number else Shared(wholes=shared.wholes), progress
            )
            runs.append((final_loss(Run(folder)), folder, cost))
            if cost["seconds"] is None:  # an interrupted run took some time that nobody knows
                break
            spent += cost["seconds"]
        _, folder, cost = min(runs, key=lambda run: run[0])
        return folder, cost

    def _train(self, folder: Path, number: int, shared: Shared, progress: Progress) -> Cost:
        """Train a run unless it is there; what it cost, if all of it was done in one go."""
        seed = (self.experiment.seed + number * RESTART_SEEDS) % 2**32
        experiment = self.experiment.model_copy(update={"seed": seed})
        fresh, started = not Run(folder).has_config, time.monotonic()
        memory = PeakMemory(self.runtime.device)
        trained_run(
            self.files,
            experiment,
            folder,
            self.runtime,
            source=self.source,
            shared=shared,
            progress=progress,
        )
        if fresh:
            cost = {"seconds": round(time.monotonic() - started, 1), "memory": memory.bytes()}
            write_atomic(folder.with_name(folder.name + COST), json.dumps(cost) + "\n")
        return _cost(folder)


def _cost(folder: Path) -> Cost:
    """What the training of a run cost; nones if that is not known."""
    found = _read(folder.with_name(folder.name + COST))
    values = {name: found.get(name) for name in ("seconds", "memory")}
    return {
        name: value if isinstance(value, int | float) and math.isfinite(value) else None
        for name, value in values.items()
    }


def _read(file: Path) -> dict[str, Any]:
    """What an earlier call wrote; nothing if it is not there or damaged."""
    try:
        found = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds something else, whose files of the same names would be lost.

    Raises:
        ConfigError: It does, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the comparison.")
    with disk_errors(out):
        names = {path.name for path in out.iterdir()} if out.exists() else set()
    names = {name for name in names if not Path(name).match(TEMPORARY)}
    if names and not names & {"runs", "scores"}:
        raise ConfigError(
            f"{out} holds something else than a comparison; nothing was changed. Choose a new or "
            "empty folder."
        )


def final_loss(run: Run) -> float:
    """What a run says of itself without labels: the mean loss of its last steps, or its inertia."""
    file = run.path / "log.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    losses = losses or [line["inertia"] for line in lines if "inertia" in line]
    if not losses:
        return 0.0
    return fmean(losses[-max(1, round(LAST_PART * len(losses))) :])
