"""The training loop.

What is unusual here: nothing random is kept. Data, negatives and first weights follow from the seed
and the step, so a run that was killed goes on to the same weights. Labels are never read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from iddc.config import Experiment, Runtime
from iddc.errors import ConfigError, DataError
from iddc.images import ImageFile, Skipped
from iddc.learning.collection import EmbeddedCollection
from iddc.learning.embeddings import Shared
from iddc.learning.learner import Learner
from iddc.learning.log import StepLog
from iddc.learning.overlays import Overlays
from iddc.learning.session import running
from iddc.methods import completed, find_method, used
from iddc.modelfile import save_model
from iddc.network import Network
from iddc.progress import SILENT, Progress
from iddc.runs import Run


def fit(
    files: Sequence[ImageFile],
    experiment: Experiment,
    run: Run,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    network: Network | None = None,
    skipped: Sequence[Skipped] = (),
    shared: Shared | None = None,
    progress: Progress = SILENT,
) -> Network:
    """Train a network on unlabelled images and leave it in the run's folder.

    A run that was interrupted goes on from its last checkpoint. Under torchrun every process calls
    this with the same arguments and gets the same network; the first one writes.

    Args:
        files: The images.
        experiment: Every choice of the run, among them the method.
        run: The folder; see `Run.start`.
        runtime: How this machine works; it does not change the result.
        network: What trains, as `new_network` gives it, which makes it where none is given.
        skipped: Files that are left out already. They go to skipped.csv and count as unreadable.
        shared: Embeddings that are kept for further runs like this one.
        progress: Shows how far the work is.

    Raises:
        DataError: Fewer than 2 images, or too many of them cannot be read.
        SetupError: The machine lacks memory, disk space or an optional package.
        NumericError: The loss or a gradient is not finite for some steps in a row. The last
            checkpoint stays; diagnosis.json says what was seen.
        Interrupted: SIGINT or SIGTERM came. The state after the step is on disk.
    """
    # What the method needs is known before anything is written.
    experiment = completed(experiment)
    method = find_method(experiment.method)
    plan = method.plan(experiment, len(files))
    if len(files) < 2 and plan.steps:
        raise DataError(
            f"Found {len(files)} readable image; training compares images with each other and "
            "needs at least 2."
        )
    log = StepLog(
        run,
        plan,
        progress,
        num_clusters=experiment.num_clusters,
        advice=method.advice(experiment),
        repeat=0 if experiment.training.end_to_end else experiment.views.repeat,
        tensorboard=runtime.tensorboard,
    )
    # An earlier attempt is taken up where it ended, so that nothing below sees a difference.
    with running(run, files, runtime, skipped, progress) as session:
        learner = Learner(
            experiment,
            len(files),
            session.processes,
            runtime.micro_batch_size,
            shared,
            session.note if session.first else warnings.warn,
            network,
        )
        session.resume(learner, log, advice=method.calming())
        overlays = Overlays(run, files, experiment, plan.steps)
        collection = EmbeddedCollection(session, learner, shared)
        # The batches that are left, and before each stage what the method fits to the images.
        left = session.steps(
            learner.stages(),
            partial(learner.batches, files, runtime.workers),
            partial(learner.refit, collection),
        )
        with closing(left):
            for batch, counts in left:
                numbers = learner.learn(batch, counts)
                if session.first:
                    overlays.after(learner.step, learner.network)
                session.end_step(numbers)  # log, checkpoint, and a stop that was asked for
        # Several heads have learned side by side: one is kept.
        if len(learner.methods) > 1:
            session.note(learner.describe_choice())
        trained = learner.network.eval()
        if session.first:
            if not plan.steps:
                overlays.after(0, trained)
            save_model(run.path, trained, experiment)
            run.finish()
        return trained


def trained_run(
    files: Sequence[ImageFile],
    experiment: Experiment,
    folder: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    source: str,
    shared: Shared | None = None,
    progress: Progress = SILENT,
) -> Run:
    """The finished run of an experiment: the one that is there, or one that is trained now.

    Args:
        files: The images.
        experiment: Every choice of the run.
        folder: Where it is. One that was interrupted goes on.
        runtime: How this machine works.
        source: Where the images come from, for the record.
        shared: See `fit`.
        progress: Shows how far the work is.

    Raises:
        ConfigError: The folder has a run of other choices, or something else.
    """
    run, record = Run(folder), used(completed(experiment))
    if run.has_config and run.finished:
        if used(completed(run.experiment)) != record:
            raise ConfigError(
                f"{folder} is a run with other options. Choose another folder, or remove it."
            )
        return run
    with Run.start(folder, experiment, source=source, record=record) as run:
        fit(files, experiment, run, runtime, shared=shared, progress=progress)
    return run
