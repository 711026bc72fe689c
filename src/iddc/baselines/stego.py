"""STEGO, with which Tables 1, 3 and 4 and Figs. 8-9 compare: how its loss trains codes.

The paper is named in `correspondence.py`. The backbone is frozen, no label is read, and the last
step is the model. Where the paper says nothing, this is the authors' code, except for the views,
which are IDDC's instead of five fixed crops of each image; the neighbours, which are of images, not
of crops; the compared pixels, which are patches instead of points between them; and the dropout,
which is of the input of the codes alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from iddc.baselines.correspondence import Patches, correspondence_loss, nearest, probe_loss
from iddc.baselines.sampling import pooled_embeddings
from iddc.config import Experiment, Runtime, StegoConfig
from iddc.device import pick_device
from iddc.errors import ConfigError, DataError, Interrupted, NumericError
from iddc.images import ImageFile, Skipped, ahead
from iddc.network import Codes, build_network
from iddc.progress import SILENT, Progress
from iddc.recipes.stego import stego_config
from iddc.runs import Run
from iddc.runs.configfile import differences
from iddc.segmenter import Segmenter
from iddc.training.checkpoint import digest, load_state, save_state
from iddc.training.features import Key, RepeatedViews
from iddc.training.gradients import embed_crops, images_at_once
from iddc.training.loop import LeftOut
from iddc.training.stopping import StopRequest
from iddc.views import ViewBatch, ViewDataset, collate_views, draw_places, draw_rolls, epoch_batches

_NEIGHBOUR, _DROPOUT = range(2)
"""The independent streams of random numbers of a step."""


def fit_stego(
    files: Sequence[ImageFile],
    experiment: Experiment,
    run: Run,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    config: StegoConfig | None = None,
    *,
    skipped: Sequence[Skipped] = (),
    progress: Progress = SILENT,
) -> Segmenter:
    """Train STEGO on unlabelled images and leave the segmenter in the run's folder.

    A run that was interrupted goes on from its last checkpoint. Of the experiment it uses the
    number of clusters, the backbone, the seed, the views, the windows, the precision and
    `objective.centering`: with "batch" the mean of a batch is subtracted from the embeddings of
    length 1, as IDDC does.

    Args:
        files: The images.
        experiment: What to train; its head is taken to be "codes", and the backbone is frozen.
        run: The folder; see `Run.start`.
        runtime: How this machine works.
        config: The loss and how it is trained; those of the recipe's data set if not given.
        skipped: Files that are left out already. They go to skipped.csv and count as unreadable.
        progress: Shows how far the work is.

    Raises:
        ConfigError: The run was begun with another config.
        DataError: There are fewer than 2 images, or too many of them cannot be read.
        NumericError: The loss is not finite. The state before it is on disk.
        Interrupted: SIGINT or SIGTERM came. The state after the step is on disk.
    """
    config = config or stego_config(experiment.recipe)
    frozen = experiment.training.model_copy(update={"end_to_end": False})
    experiment = experiment.model_copy(update={"head": "codes", "training": frozen})
    with StopRequest() as stop, ExitStack() as stack:

        def check() -> None:
            if stop.signum:
                raise Interrupted(
                    f"Stopped after step {learner.done} of {config.steps}. Give the same command "
                    "again to resume.",
                    signum=stop.signum,
                )

        def save() -> None:
            kept = learner.state() | {"files": digest(files), "left_out": left_out.reasons}
            save_state(run, cast("Any", kept))

        left_out = LeftOut(files, skipped, runtime.max_unreadable)
        state = cast("dict[str, Any] | None", load_state(run, digest(files)))
        learner = Learner(files, experiment, config, runtime)
        if state:
            _refuse_other(config, state["config"], run)
            learner.restore(state)
            left_out.reasons |= state["left_out"]
            run.cut_log(learner.done)
        else:
            left_out.add([learner.find_neighbours(check, progress)])
            run.write_skipped(left_out.reasons.items())
            left_out.check()
            run.log(step=0, baseline="stego", **config.model_dump())
        stack.enter_context(progress.job(config.steps, learner.done))
        started = time.monotonic()
        for keys, made in learner.batches():
            try:
                numbers = learner.learn(keys, made)
            except NumericError:
                save()
                raise
            done, now = learner.done, time.monotonic()
            run.log(step=done, **numbers, seconds=round(now - started, 4))
            started = now
            alive = f"{numbers['live_clusters']:.0f} of {experiment.num_clusters} clusters alive"
            where = f"step {done}/{config.steps}"
            progress.update(done, where, f"loss {numbers['loss']:.3f}  {alive}")
            if stop.signum or done % runtime.checkpoint_every == 0 or done == config.steps:
                save()
            check()
        segmenter = Segmenter.of(learner.network, experiment)
        segmenter.save(run.path)
        run.finish()
        return segmenter


def _refuse_other(config: StegoConfig, kept: dict[str, Any], run: Run) -> None:
    changes = differences({"stego": kept}, {"stego": config.model_dump()})
    if changes:
        raise ConfigError(
            f"{run.path} holds an interrupted run with other options: {'; '.join(changes)}. Give "
            "the same options to resume it, or --overwrite to start anew."
        )


class Learner:
    """STEGO's network and optimiser, which images are alike, and how many steps are done."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        experiment: Experiment,
        config: StegoConfig,
        runtime: Runtime,
    ) -> None:
        self.experiment = experiment
        self.config = config
        self.done = 0
        self._files = files
        self._runtime = runtime
        self._device = pick_device(runtime.device)
        self.network = build_network(experiment).eval().to(self._device)
        self.network.backbone.requires_grad_(False)
        self._head = cast("Codes", self.network.head)
        maps = [*self._head.linear.parameters(), *self._head.nonlinear.parameters()]
        self._optimizer = torch.optim.Adam(
            [
                {"params": maps, "lr": config.learning_rate},
                {"params": [self._head.centroids], "lr": config.probe_learning_rate},
            ]
        )
        self._at_once = runtime.micro_batch_size or images_at_once(
            self.network.backbone, experiment.views.crop_size, self._device, end_to_end=False
        )
        self._views = RepeatedViews(self.network, experiment, self._device, self._at_once)
        self._places: list[int] = []  # of the images that can be read, among the files
        self._neighbours = torch.zeros(0, 0, dtype=torch.int64)  # of each of them, among them

    def find_neighbours(
        self, check: Callable[[], None], progress: Progress
    ) -> list[tuple[int, str]]:
        """Find which images are alike, before the first step.

        Returns:
            The places of the images that cannot be read, and the reasons.

        Raises:
            DataError: Fewer than 2 images can be read.
        """
        self._places, pooled, unreadable = pooled_embeddings(
            self._files,
            self.network.backbone,
            self.experiment,
            self._runtime,
            check=check,
            progress=progress,
        )
        if len(pooled) < 2:
            raise DataError(
                f"Found {len(pooled)} readable image; STEGO compares images with each other and "
                "needs at least 2."
            )
        self._neighbours = nearest(pooled, self.config.neighbours)
        return unreadable

    def batches(self) -> Iterator[tuple[list[Key], ViewBatch]]:
        """The views of each step that is left: of its images, then of a neighbour of each.

        Raises:
            DataError: An image cannot be read any more.
        """
        dataset = ViewDataset(self._files, self.experiment.views, self.experiment.seed)

        def missing() -> Iterator[tuple[list[Key], list[Key]]]:
            for step in range(self.done, self.config.steps):
                keys = self._keys(step)
                yield keys, self._views.missing(keys)

        def make(step: tuple[list[Key], list[Key]]) -> ViewBatch:
            return collate_views([dataset[key] for key in step[1]])

        for (keys, _), made in ahead(make, missing(), self._runtime.workers):
            for place, reason in made.failures:
                raise DataError(
                    f"{self._files[place]} could be read when the run began, and now cannot: "
                    f"{reason}. Restore it and give the same command again."
                )
            yield keys, made

    def _keys(self, step: int) -> list[Key]:
        seed, number = self.experiment.seed, len(self._places)
        epoch, part = divmod(step, math.ceil(number / self.config.batch_size))
        rows = epoch_batches(number, self.config.batch_size, seed, epoch)[part]
        rng = np.random.default_rng((seed, step, _NEIGHBOUR))
        drawn = rng.integers(self._neighbours.shape[1], size=len(rows))
        near = self._neighbours[torch.tensor(rows), torch.from_numpy(drawn)].tolist()
        return self._views.keys(epoch, [self._places[row] for row in (*rows, *near)])

    def learn(self, keys: Sequence[Key], made: ViewBatch) -> dict[str, float]:
        """Do one step.

        Returns:
            What the log says of it.

        Raises:
            NumericError: The loss is not finite. Nothing has changed.
        """
        features = self._embedded(self._views.inputs(keys, made))
        total, numbers = self._losses(features)
        if not math.isfinite(numbers["loss"] + numbers["probe"]):
            raise NumericError(
                f"Not finite at step {self.done + 1}: {numbers}. The state before it is saved. Try "
                "training.precision fp32 in a --config, or a lower --stego.learning-rate."
            )
        self._optimizer.zero_grad()
        torch.autograd.backward(total)
        self._optimizer.step()
        self.done += 1
        return numbers

    def _embedded(
        self, inputs: UInt8[Tensor, "b 2 3 S S"] | Float[Tensor, "b 2 d h w"]
    ) -> Float[Tensor, "b d h w"]:
        """One crop of each view: the first of the images, the second of their neighbours."""
        first, second = inputs.chunk(2)
        crops = torch.cat([first[:, 0], second[:, 1]]).to(self._device)
        if crops.is_floating_point():
            return crops
        precision = self.experiment.training.precision
        with torch.no_grad():
            parts = torch.split(crops, 2 * self._at_once)
            return torch.cat([embed_crops(self.network, part, precision) for part in parts])

    def _losses(
        self, features: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Eq. (5) plus the loss of the centroids, and what the log says of them.

        Half of the features are of images, the other half of a neighbour of each.
        """
        config, seed, step = self.config, self.experiment.seed, self.done
        rng = np.random.default_rng((seed, step, _DROPOUT))
        codes = self._head.codes(_dropped(features, config.dropout, rng))
        targets = features
        if self.experiment.objective.centering == "batch":
            targets = _centred(features)
        images, neighbours = Patches.of(targets, codes).halves()
        here, there = draw_places(features[0, 0].numel(), config.patches, seed, step)
        first, others = images.at(here), images.at(there)
        rolls = draw_rolls(len(features) // 2, config.negatives, seed, step)

        def loss(second: Patches, shift: float) -> Float[Tensor, ""]:
            centering = config.spatial_centering
            return correspondence_loss(first, second, shift=shift, centering=centering)

        own = loss(first, config.self_shift)
        knn = loss(neighbours.at(there), config.knn_shift)
        random = torch.stack([loss(others.roll(r), config.random_shift) for r in rolls]).mean()
        total = config.self_weight * own + config.knn_weight * knn + config.random_weight * random
        cosines = self._head.cosines(codes[: len(features) // 2].detach())
        probe = probe_loss(cosines)
        live = cosines.argmax(dim=1).flatten().bincount().count_nonzero()
        values = {
            "loss": total,
            "own": own,
            "knn": knn,
            "random": random,
            "probe": probe,
            "live_clusters": live,
        }
        # One transfer from the GPU for all of them.
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        return total + probe, dict(zip(values, numbers, strict=True))

    def state(self) -> dict[str, Any]:
        """What to save, beside what `fit_stego` knows."""
        return {
            "config": self.config.model_dump(),
            "step": self.done,
            "head": self._head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "places": self._places,
            "neighbours": self._neighbours,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._places, self._neighbours = state["places"], state["neighbours"]
        self.done = state["step"]


def _centred(features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
    """Features of length 1, less their mean: as IDDC's affinities see them (`centering`)."""
    directions = normalize(features, dim=1)
    return directions - directions.mean(dim=(0, 2, 3), keepdim=True)


def _dropped(
    maps: Float[Tensor, "b d h w"], rate: float, rng: np.random.Generator
) -> Float[Tensor, "b d h w"]:
    """Leave out some channels of each image; the others are enlarged to the same mean."""
    kept = torch.from_numpy(rng.random(maps.shape[:2]) >= rate).to(maps)
    return maps * (kept / (1 - rate))[:, :, None, None]
