"""The loop of a pretraining, resumable at every step as training is.

What is unusual here: all images are decoded once into one file, so that threads make the batches,
each from the seed and its step alone.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from iddc.backbones import Backbone, load_backbone, save_backbone
from iddc.config import PretrainConfig, Runtime
from iddc.errors import ConfigError, DataError, Interrupted, SetupError
from iddc.images import ImageFile, Skipped
from iddc.pretraining.folder import WeightsFolder, hardware, write_card
from iddc.pretraining.learner import Learner, build_method
from iddc.pretraining.photos import Photos, decode_photos, find_photos
from iddc.progress import SILENT, Progress
from iddc.training.checkpoint import digest, load_state, save_state
from iddc.training.distributed import joined
from iddc.training.health import Health
from iddc.training.loop import LeftOut
from iddc.training.stopping import StopRequest

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
        ConfigError: The network does not fit the method, or the shares not the sources; or `out`
            holds something else.
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
    method = build_method(config)
    with (
        WeightsFolder.begin(out, config, sources=[*sources], overwrite=overwrite) as folder,
        joined(runtime.device) as processes,
        StopRequest(alone=processes.size == 1) as stop,
        ExitStack() as stack,
    ):
        first = processes.rank == 0  # the one that writes
        progress = progress if first else SILENT
        photos = _decoded([*sources.values()], config, folder.cache, runtime, stop, progress)
        left_out = LeftOut(files, skipped, runtime.max_unreadable)
        left_out.add([photos.failures])
        if first:
            folder.write_skipped(left_out.reasons.items())
        left_out.check()
        _check_number(len(photos), config, processes.size)
        learner = Learner(method, photos, config, processes)
        kept = load_state(folder, digest(files)) if first else None
        state = cast("dict[str, Any] | None", processes.from_first(kept))
        if state:
            learner.restore(state)
        if first:
            folder.cut_log(learner.done)
        if state and state["threads"] != torch.get_num_threads():
            progress.note(
                f"resumed with {torch.get_num_threads()} threads, begun with "
                f"{state['threads']}: the result is the same up to rounding"
            )
        stack.enter_context(progress.job(learner.steps, learner.done))

        unreadable = {index for index, _ in photos.failures}
        names = [str(file.name) for i, file in enumerate(files) if i not in unreadable]
        advice = f"--precision fp32 or a lower --{config.method}.learning-rate"
        health = Health(folder, learner.steps, processes, advice, progress)

        def save() -> None:
            if first and health.good:
                save_state(folder, cast("Any", learner.state(digest(files))))

        batches = _batches(learner, _threads(runtime))
        for step in range(learner.done, learner.steps):
            started = time.monotonic()
            batch = next(batches)
            table = processes.exchange([len(batch.ids), stop.signum])
            counts = [row[0] for row in table]
            try:
                numbers = learner.learn(batch, counts)
            except torch.OutOfMemoryError as error:
                raise SetupError(
                    "The GPU has not enough free memory. Give a smaller --batch-size."
                ) from error
            numbers = health.judge(step + 1, numbers, (names[index] for index in batch.ids))
            if first:
                seconds = round(time.monotonic() - started, 4)
                folder.log(step=step + 1, images=sum(counts), **numbers, seconds=seconds)
            hidden = {"gradient_norm", "learning_rate"}
            terms = [f"{k} {v:.2f}" for k, v in numbers.items() if k not in hidden]
            progress.update(step + 1, f"step {step + 1}/{learner.steps}", "  ".join(terms))
            # With one process a signal is heard at once; several must agree on the step.
            signum = stop.signum if processes.size == 1 else max(row[1] for row in table)
            if signum or (step + 1) % runtime.checkpoint_every == 0 or step + 1 == learner.steps:
                save()
            if signum:
                raise Interrupted(
                    f"Stopped after step {step + 1} of {learner.steps}. Give the same command "
                    "again to resume.",
                    signum=signum,
                )
        if first:
            backbone = learner.method.result(photos)
            backbone.half()
            save_backbone(backbone, folder.path)
        processes.exchange([0])  # the others wait for the file
        trained = load_backbone(str(folder.path))
        if first:
            write_card(
                folder,
                trained.architecture,
                num_images=len(photos),
                hardware=hardware(processes.device, processes.size),
            )
            folder.finish()
        return trained


def _decoded(
    sources: Sequence[Sequence[ImageFile]],
    config: PretrainConfig,
    cache: Path,
    runtime: Runtime,
    stop: StopRequest,
    progress: Progress,
) -> Photos:
    """The decoded images: of an earlier call, or of the first process while the others wait."""
    names = digest([file for source in sources for file in source])
    key = f"{names} {config.short_side} {config.min_side}"

    def check() -> None:
        if stop.signum:
            raise Interrupted(
                "Stopped while images were decoded. Give the same command again.",
                signum=stop.signum,
            )

    while (photos := find_photos(cache, key)) is None:
        check()
        if os.environ.get("RANK", "0") == "0":
            return decode_photos(
                sources,
                cache,
                key,
                short_side=config.short_side,
                min_side=config.min_side,
                threads=max(1, _threads(runtime)),
                check=check,
                progress=progress,
            )
        time.sleep(0.5)  # not in a barrier, which gives up after some minutes
    return photos


def _batches(learner: Learner, threads: int) -> Iterator[Any]:
    """This process's part of the batch of each step that is left, made by threads ahead of time."""
    steps = range(learner.done, learner.steps)
    if not threads:
        yield from (learner.views[step] for step in steps)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(learner.views.__getitem__, step) for step in steps[:threads])
        for step in steps:
            batch = waiting.popleft().result()
            if step + threads < learner.steps:
                waiting.append(pool.submit(learner.views.__getitem__, step + threads))
            yield batch


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
