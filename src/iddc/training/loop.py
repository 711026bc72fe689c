"""The training loop.

What is unusual here: nothing random is kept. Data, negatives and first weights follow from the seed
and the step, so a run that was killed goes on to the same weights. Labels are never read.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import chain

import torch

from iddc.config import Experiment, Runtime
from iddc.errors import DataError, Interrupted, SetupError
from iddc.images import ImageFile, Skipped, refuse_many
from iddc.progress import SILENT, Progress
from iddc.runs import Run
from iddc.schedules import Plan
from iddc.segmenter import Segmenter
from iddc.training.batches import failures_in_words, loaded_batches
from iddc.training.checkpoint import digest, load_state, save_snapshot, save_state
from iddc.training.diary import Diary
from iddc.training.distributed import joined
from iddc.training.features import Kept
from iddc.training.health import Health
from iddc.training.learner import Learner
from iddc.training.stopping import StopRequest


def fit(
    files: Sequence[ImageFile],
    experiment: Experiment,
    run: Run,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    skipped: Sequence[Skipped] = (),
    shared: Kept | None = None,
    progress: Progress = SILENT,
) -> Segmenter:
    """Train a segmenter on unlabelled images (Sec. 3) and leave it in the run's folder.

    A run that was interrupted goes on from its last checkpoint. Under torchrun every process calls
    this with the same arguments and gets the same segmenter; the first one writes.

    Args:
        files: The images.
        experiment: Every choice of the run.
        run: The folder; see `Run.start`.
        runtime: How this machine works; it does not change the result.
        skipped: Files that are left out already. They go to skipped.csv and count as unreadable.
        shared: Embeddings of repeated views, kept for further runs like this one.
        progress: Shows how far the work is.

    Raises:
        DataError: Fewer than 2 images, or too many of them cannot be read.
        SetupError: The machine lacks memory, disk space or an optional package.
        NumericError: The loss or a gradient is not finite for some steps in a row. The last
            checkpoint stays; diagnosis.json says what was seen.
        Interrupted: SIGINT or SIGTERM came. The state after the step is on disk.
    """
    if len(files) < 2:
        raise DataError(
            f"Found {len(files)} readable image; training compares images with each other and "
            "needs at least 2."
        )
    plan = Plan.of(experiment, len(files))
    with (
        failures_in_words(),
        joined(runtime.device) as processes,
        StopRequest(alone=processes.size == 1) as stop,
        ExitStack() as stack,
    ):
        first = processes.rank == 0  # the one that writes
        progress = progress if first else SILENT
        diary = None
        if first:
            diary = Diary(run, plan, experiment, progress, tensorboard=runtime.tensorboard)
        advice = "--training.precision fp32 or a lower --training.learning-rate"
        health = Health(run, plan.steps, processes, advice, progress)
        note = diary.note if diary else warnings.warn
        learner = Learner(experiment, plan, processes, runtime.micro_batch_size, shared, note)
        left_out = LeftOut(files, skipped, runtime.max_unreadable)
        state = processes.from_first(load_state(run, digest(files)) if first else None)
        if state:
            learner.restore(state)
            left_out.reasons |= state["left_out"]
        if diary:
            stack.callback(diary.close)
            diary.open(learner.done)
            if state and state["threads"] != torch.get_num_threads():
                diary.note(
                    f"resumed with {torch.get_num_threads()} threads, begun with "
                    f"{state['threads']}: the result is the same up to rounding"
                )
            run.write_skipped(left_out.reasons.items())

        def save() -> None:
            if first and health.good:
                save_state(run, learner.state(digest(files), left_out.reasons))

        def save_after(_kind: object, error: BaseException | None, _trace: object) -> None:
            """Keep the steps done when images cannot be read or a data worker dies."""
            disk_or_signal = isinstance(error, SetupError | Interrupted)
            if isinstance(error, Exception) and not disk_or_signal and learner.whole:
                save()

        batches = stack.enter_context(
            loaded_batches(
                files, experiment, plan, learner.done, processes, runtime.workers, learner.views
            )
        )
        stack.push(save_after)
        for step in range(learner.done, plan.steps):
            started = time.monotonic()
            keys, batch = next(batches)
            inputs = learner.views.inputs(keys, batch)
            making = time.monotonic() - started
            table = processes.exchange([len(inputs), len(batch.failures), stop.signum])
            counts = [row[0] for row in table]
            if any(row[1] for row in table):
                left_out.add(processes.gather_objects(batch.failures))
                if first:
                    run.write_skipped(left_out.reasons.items())
                left_out.check()
            names = (str(files[index].name) for _, index in keys)
            numbers = learner.learn(inputs, counts)
            numbers = health.judge(
                step + 1, numbers, names, shares=learner.shares[learner.best].tolist()
            )
            if diary:
                seconds = time.monotonic() - started
                diary.write(step + 1, numbers, images=sum(counts), seconds=seconds, making=making)
            epoch, place = plan.place(step + 1)
            if first and runtime.snapshots and place == 0:
                save_snapshot(run, epoch, learner.trained)
            # With one process a signal is heard at once; several must agree on the step.
            signum = stop.signum if processes.size == 1 else max(row[2] for row in table)
            if signum or (step + 1) % runtime.checkpoint_every == 0 or step + 1 == plan.steps:
                save()
            if signum:
                raise Interrupted(
                    f"Stopped after step {step + 1} of {plan.steps}. Give the same command again "
                    "to resume.",
                    signum=signum,
                )
        if diary and len(learner.heads) > 1:
            diary.note(learner.choice())
        segmenter = Segmenter.of(learner.network, experiment)
        if first:
            segmenter.save(run.path)
            run.finish()
        return segmenter


class LeftOut:
    """The images that cannot be read, and how many of them are too many."""

    def __init__(
        self, files: Sequence[ImageFile], skipped: Sequence[Skipped], max_share: float
    ) -> None:
        self._files = files
        self._total = len(files) + len(skipped)
        self._max_share = max_share
        self.reasons = {str(item.file.name): item.reason for item in skipped}

    def add(self, failures: Iterable[Sequence[tuple[int, str]]]) -> None:
        """Remember what the processes could not read: indices of files, and reasons."""
        for index, reason in chain.from_iterable(failures):
            self.reasons[str(self._files[index].name)] = reason

    def check(self) -> None:
        """Raise if the share of unreadable images is too large.

        Raises:
            DataError: It is.
        """
        refuse_many(self.reasons, self._total, self._max_share)
