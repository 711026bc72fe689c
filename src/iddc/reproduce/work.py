"""What a row costs: training, scores, and a guess of how long the training takes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from iddc.backbones import load_backbone
from iddc.config import Experiment, RefineName, Runtime
from iddc.datasets import LabelledImages, open_dataset, outline, train_images
from iddc.device import pick_device
from iddc.errors import DataError, IddcError, SetupError
from iddc.evaluation import PROTOCOLS, evaluate
from iddc.images import ImageFile
from iddc.learning import trained_run
from iddc.learning.embeddings import Embeddings, Shared, Wanted, keep_embeddings
from iddc.learning.learner import Learner
from iddc.processes import Processes
from iddc.progress import Progress
from iddc.refine import dense_crf
from iddc.reproduce.plan import Job
from iddc.runs import Run, write_atomic
from iddc.runs.folder import SCORE_KEY
from iddc.segmenter import Segmenter
from iddc.views import ViewDataset, collate_views

SPLIT = "val"
"""What every table is scored on."""
_TRIAL = 4
"""Images of the step by which the time is guessed."""
_TRIAL_STEPS = 3
"""To warm up; with new views; with views that may be kept."""


@dataclass(frozen=True)
class Runner:
    """The data set and the machine on which a table is rerun."""

    files: Sequence[ImageFile]
    """To train on."""
    name: str
    """The data set to score on."""
    data: Path
    """Where it lies."""
    num_scored: int
    """How many images it has to score on."""
    num_classes: int | None
    """How many classes it has, if that is known before a label is opened."""
    runtime: Runtime
    progress: Progress
    kept: dict[str, Embeddings] = field(default_factory=dict)
    """What runs of the same backbone, views and seed share: of one such group at a time."""
    cached_embeddings: dict[bytes, dict[bytes, Tensor]] = field(default_factory=dict)
    """Embeddings of the windows that are scored, of one frozen backbone at a time."""

    @classmethod
    def open(cls, name: str, data: Path, runtime: Runtime, progress: Progress) -> Runner:
        """Find images and labels.

        Raises:
            DataError: They are not there, or in part.
        """
        files, scored = train_images(name, data), outline(name, data, SPLIT)
        return cls(files, name, data, *scored, runtime, progress)

    @cached_property
    def dataset(self) -> LabelledImages:
        """What is scored on. Labels may be opened from here on, when a run is trained."""
        return open_dataset(self.name, self.data, SPLIT)

    def train(self, job: Job, path: Path, seed: int) -> Run:
        """The finished run of a seed: one that is there, or a new one, or an interrupted one."""
        experiment = job.experiment.model_copy(update={"seed": seed})
        if is_done(path):  # wherever its weights lay: the digest in its path knows their bytes
            experiment = experiment.model_copy(update={"backbone": Run(path).experiment.backbone})
        runtime = self.runtime.model_copy(update={"snapshots": job.row.snapshots})
        return trained_run(
            self.files,
            experiment,
            path,
            runtime,
            source=f"{job.dataset}:{job.data.resolve()}",
            shared=Shared(views=self._kept(experiment)),
            progress=self.progress,
        )

    def _kept(self, experiment: Experiment) -> Embeddings:
        key = experiment.model_dump_json(include={"backbone", "views", "seed"})
        key += experiment.training.precision
        if key not in self.kept:  # those of others are let go
            self.kept.clear()
            self.kept[key] = {}
        return self.kept[key]

    def score(self, job: Job, run: Run) -> dict[str, Any]:
        """The scores of a run, from its folder if they are there.

        Beside what `iddc evaluate` writes, those of a run with snapshots have the scores after
        each epoch.
        """
        key, entry = _key(job), self.kept_score(job, run)
        if entry is None:
            entry = key | self._evaluate(self._load(job, run), job)
            run.add_score(**entry)
        if job.row.snapshots:
            entry = entry | {"epochs": self._score_snapshots(job, run, key)}
        return entry

    def kept_score(self, job: Job, run: Run) -> dict[str, Any] | None:
        """The scores in the folder of a run, if they are there."""
        key = _key(job)
        return next((found for found in run.scores() if _is(found, key)), None)

    def _score_snapshots(self, job: Job, run: Run, key: dict[str, Any]) -> list[dict[str, Any]]:
        """Accuracy and mIoU after each epoch; each is kept beside its snapshot."""
        segmenter, scores = None, []
        for path in sorted(run.path.glob("snapshots/*.safetensors")):
            kept = path.with_suffix(".json")
            entry = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
            if not _is(entry, key):
                segmenter = segmenter or self._load(job, run)
                network: Any = segmenter.network
                end_to_end = job.experiment.training.end_to_end
                (network if end_to_end else network.head).load_state_dict(load_file(path))
                entry = key | self._evaluate(segmenter, job)
                write_atomic(kept, json.dumps(entry, indent=2) + "\n")
            scores.append({"epoch": int(path.stem), **{k: entry[k] for k in ("accuracy", "miou")}})
        return scores

    def _load(self, job: Job, run: Run) -> Segmenter:
        segmenter = Segmenter.load(run.path, self.runtime.device)
        if not job.experiment.training.end_to_end:
            keep_embeddings(segmenter.network, segmenter.experiment, self.cached_embeddings)
        return segmenter

    def _evaluate(self, segmenter: Segmenter, job: Job) -> dict[str, Any]:
        protocol = PROTOCOLS[job.protocol].refined(job.refine)
        return evaluate(segmenter, self.dataset, protocol, progress=self.progress).as_dict()

    def seconds(self, experiment: Experiment) -> float:
        """How long a training takes, guessed from steps of a few images; 0 if they fail."""
        training = experiment.training
        number, times = min(_TRIAL, len(self.files)), []
        with suppress(IddcError):
            device = pick_device(self.runtime.device)
            learner = Learner(
                experiment, len(self.files), Processes(device), self.runtime.micro_batch_size
            )
            views = ViewDataset(self.files, experiment.views, experiment.seed, experiment.reading)
            for epoch in (0, 1, 1):
                started = time.monotonic()
                keys = learner.cache.keys(epoch, range(number))
                batch = collate_views([views[key] for key in learner.cache.missing(keys)])
                learner.learn(learner.cache.inputs(Wanted(keys, keys), batch), [number])
                times.append(time.monotonic() - started)
        if len(times) < _TRIAL_STEPS:
            return 0.0
        plan = learner.plan
        repeat = 0 if training.end_to_end else experiment.views.repeat
        fresh = min(repeat or plan.epochs, plan.epochs)
        epochs = fresh * times[1] + (plan.epochs - fresh) * times[2]
        if training.end_to_end:  # forward and backward take about three times as long as forward
            epochs *= 1 + 2 * (training.backbone_until - training.backbone_from)
        size = min(training.batch_size, len(self.files))
        return plan.steps_per_epoch * epochs * size / number


def is_done(path: Path) -> bool:
    """Whether a folder holds a finished run."""
    return path.is_dir() and Run(path).finished


def missing(refine: RefineName, backbone: str | None) -> str:
    """Why rows with this refinement and this backbone cannot be run here; "" if they can."""
    try:
        if refine == "crf":
            dense_crf(torch.full((2, 1, 1), 0.5), torch.zeros(3, 1, 1, dtype=torch.uint8))
        if backbone is not None:
            load_backbone(backbone)
    except (DataError, SetupError) as error:
        return str(error)
    return ""


def _key(job: Job) -> dict[str, Any]:
    return {
        "data": str(job.data.resolve()),
        "dataset": job.dataset,
        "split": SPLIT,
        "protocol": job.protocol,
        "refinement": job.refine,
    }


def _is(entry: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether an entry of scores.json is of this key; those of older versions lack the pixels."""
    return "cluster_pixels" in entry and all(entry.get(name) == key[name] for name in SCORE_KEY)
