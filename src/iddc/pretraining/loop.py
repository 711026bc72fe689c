"""The loop of a pretraining, resumable at every step as training is.

What is unusual here: all images are decoded once into one file, so that threads make the batches,
each from the seed and its step alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from iddc.backbones import Backbone, load_backbone, save_backbone
from iddc.config import PretrainConfig, Runtime
from iddc.errors import ConfigError, DataError, Interrupted
from iddc.images import ImageFile, Skipped, ahead
from iddc.learning.checkpoint import digest
from iddc.learning.log import StepLog
from iddc.learning.session import Session, running
from iddc.pretraining.cache import ImageCache, fill_cache, find_cache
from iddc.pretraining.folder import WeightsFolder, hardware, write_card
from iddc.pretraining.learner import Learner, build_method
from iddc.progress import SILENT, Progress

MIN_IMAGES = 16
"""With fewer there is too little to tell an image from."""
_IMAGES_EACH = 8
"""The fewest images of a small batch that a process may have: a large batch has fewer."""


def pretrain(
    sources: Mapping[str, Sequence[ImageFile]],
    config: PretrainConfig,
    out: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    overwrite: bool = False,
    skipped: Sequence[Skipped] = (),
    progress: Progress = SILENT,
) -> Backbone:
    """Train a backbone on unlabelled images and leave it in its weights folder.

    A pretraining that was interrupted goes on from its last checkpoint. Under torchrun every
    process calls this with the same arguments and gets the same backbone; the first one writes.
    Batch norms see the images of their own process, everything else those of all.

    Args:
        sources: The images of each source, which has a name for the model card.
        config: Every choice.
        out: The weights folder. Until it is complete it holds what a RUN folder does, and cache/,
            the decoded images.
        runtime: How this machine works.
        overwrite: Replace an earlier run in `out`.
        skipped: Files that are left out already. They go to skipped.csv and count as unreadable.
        progress: Shows how far the work is.

    Raises:
        ConfigError: The network does not fit the method or `init`, or the shares not the sources;
            or `out` holds something else, or the weights of `init`.
        DataError: There are too few images, or too many of them cannot be used.
        SetupError: The machine lacks memory or disk space.
        NumericError: The loss or a gradient is not finite for some steps in a row. The last
            checkpoint stays; diagnosis.json says what was seen.
        Interrupted: SIGINT or SIGTERM came. The state after the step is on disk.
    """
    files = [file for source in sources.values() for file in source]
    # What can be wrong is found before anything is written, and before an hour of decoding.
    _check_shares(config, len(sources))
    _check_number(len(files), config, 1)
    if config.init and out.exists() and out.resolve() == Path(config.init).resolve():
        raise ConfigError(
            f"--out {out} is the folder of --init: the result would replace the weights that it "
            "begins with. Give another --out."
        )
    method = build_method(config)
    with (
        WeightsFolder.begin(out, config, sources=[*sources], overwrite=overwrite) as folder,
        running(folder, files, runtime, skipped, progress) as session,
    ):
        # Decoded once: a pretraining sees every image many times.
        processes = session.processes
        photos = _decoded([*sources.values()], config, folder.cache, session)
        session.unreadable.add(photos.failures)
        _check_number(len(photos), config, processes.size)
        learner = Learner(method, photos, config, processes)
        log = StepLog(folder, learner.plan, progress)
        advice = f"--precision fp32 or a lower --{config.method}.learning-rate"
        session.resume(learner, log, advice=advice)
        failed = {index for index, _ in photos.failures}
        readable = [index for index in range(len(files)) if index not in failed]
        # Steps, as in the training of heads.
        left = session.steps(
            [(None, range(learner.step, learner.plan.steps))],
            partial(_batches, learner, readable, _threads(runtime)),
        )
        with closing(left):
            for batch, counts in left:
                numbers = learner.learn(batch, counts)
                session.end_step(numbers)  # log, checkpoint, and a stop that was asked for
        # The result is kept in half precision, at half the size.
        if session.first:
            backbone = learner.method.result(photos, progress)
            backbone.half()
            save_backbone(backbone, folder.path)
        processes.exchange([0])  # the others wait for the file
        trained = load_backbone(str(folder.path))
        if session.first:
            write_card(
                folder,
                trained.architecture,
                num_images=len(photos),
                hardware=hardware(processes.device, processes.size),
            )
            folder.finish()
        return trained


def _decoded(
    sources: Sequence[Sequence[ImageFile]], config: PretrainConfig, cache: Path, session: Session
) -> ImageCache:
    """The decoded images: of an earlier call, or of the first process while the others wait."""
    names = digest([file for source in sources for file in source])
    key = f"{names} {config.short_side} {config.min_side} {config.reading!r}"

    def check() -> None:
        if session.stop.signum:
            raise Interrupted(
                "Stopped while images were decoded. Give the same command again.",
                signum=session.stop.signum,
            )

    while (photos := find_cache(cache, key)) is None:
        check()
        if session.first:
            return fill_cache(
                sources,
                cache,
                key,
                short_side=config.short_side,
                min_side=config.min_side,
                reading=config.reading,
                threads=max(1, _threads(session.runtime)),
                check=check,
                progress=session.progress,
            )
        time.sleep(0.5)  # not in a barrier, which gives up after some minutes
    return photos


@contextmanager
def _batches(
    learner: Learner, readable: Sequence[int], threads: int, steps: range
) -> Iterator[Iterator[Any]]:
    """This process's part of the batch of each step, made by threads ahead of time."""

    def made(step: int) -> Any:
        batch: Any = learner.views[step]
        return replace(batch, ids=[readable[index] for index in batch.ids])

    yield (batch for _, batch in ahead(made, steps, threads))


def _threads(runtime: Runtime) -> int:
    """One for each core, at most 8, shared by the processes of this machine."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    as_many_as_help = min(8, (os.cpu_count() or 1) // neighbours)
    return runtime.workers if runtime.workers >= 0 else as_many_as_help


def _check_shares(config: PretrainConfig, num_sources: int) -> None:
    for name in ("small_shares", "large_shares"):
        given = len(getattr(config.contrast, name))
        if given not in (0, num_sources):
            raise ConfigError(
                f"--contrast.{name.replace('_', '-')} needs a share for each of the {num_sources} "
                f"sources of images, found {given}."
            )


def _check_number(found: int, config: PretrainConfig, processes: int) -> None:
    if found < MIN_IMAGES:
        raise DataError(
            f"Found {found} usable images; pretraining compares images with each other and needs "
            f"at least {MIN_IMAGES}."
        )
    batch = min(config.batch_size, found)
    if batch < _IMAGES_EACH * processes:
        raise ConfigError(
            f"{processes} processes share batches of {batch} images, and each needs at least "
            f"{_IMAGES_EACH}. Start fewer processes, or give more images or a larger --batch-size."
        )
