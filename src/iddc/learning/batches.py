"""The batches of a run, in order, from as many decoding processes as asked for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch.utils.data import DataLoader

from iddc.config import Experiment
from iddc.device import lacks_memory
from iddc.errors import SetupError
from iddc.images import ImageFile
from iddc.learning.embeddings import EmbeddingCache, ViewKey, Wanted
from iddc.processes import Processes
from iddc.schedules import Plan
from iddc.views import ViewBatch, ViewDataset, collate_views, epoch_arrays


@contextmanager
def loaded_batches(
    files: Sequence[ImageFile],
    experiment: Experiment,
    plan: Plan,
    processes: Processes,
    workers: int,
    cache: EmbeddingCache,
    partners: Callable[[Sequence[int], int], Sequence[int]],
    steps: Iterable[int],
) -> Iterator[Iterator[tuple[Wanted, ViewBatch]]]:
    """Give this process's part of the batch of each step, one after another.

    A batch depends on the seed, its epoch and its position in it, not on who loads it. It is what
    is wanted, and what `cache` does not have of that.

    Args:
        files: The images.
        experiment: Its views and seed.
        plan: The steps of the run.
        processes: This process among all.
        workers: The processes that decode.
        cache: The embeddings that are kept.
        partners: See `Method.partners`.
        steps: The steps that are left.
    """
    asked: deque[Wanted] = deque()

    def missing() -> Iterator[list[ViewKey]]:
        batches: list[np.ndarray] = []
        shuffled = -1  # the epoch of `batches`
        for step in steps:
            epoch, number = plan.epoch_and_batch(step)
            if epoch != shuffled:
                batches = epoch_arrays(len(files), plan.batch_size, experiment.seed, epoch)
                shuffled = epoch
            images: list[int] = batches[number].tolist()
            first, second = (
                cache.keys(epoch, processes.split(row)) for row in (images, partners(images, step))
            )
            asked.append(Wanted(first, second))
            yield cache.missing(first + second)

    reader, writer = multiprocessing.Pipe(duplex=False)
    loader = DataLoader(
        ViewDataset(files, experiment.views, experiment.seed, experiment.reading),
        batch_sampler=missing(),
        num_workers=_processes(workers),
        collate_fn=collate_views,
        worker_init_fn=partial(_serve, reader, writer),
        generator=torch.Generator(),  # not the caller's
    )
    with reader, writer:
        yield ((asked.popleft(), batch) for batch in loader)


def _processes(workers: int) -> int:
    """One for each core but one, at most 8, shared by the processes of this machine."""
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, (cores or 1) // neighbours - 1))


def _serve(reader: Connection, writer: Connection, _worker: int) -> None:
    """Make a worker live exactly as long as the main process holds its end of the pipe.

    Ctrl-C, the SIGTERM of a scheduler and the SIGHUP of a terminal reach every process, and the
    main one finishes its step first. But at its end it waits for workers that SIGTERM would have
    to stop.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    writer.close()

    def leave() -> None:
        with suppress(EOFError):
            reader.recv()
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()


@contextmanager
def failures_in_words() -> Iterator[None]:
    """Turn the death of a worker, or a lack of memory, into one sentence.

    Raises:
        SetupError: Instead of the errors of PyTorch, which come at any moment.
    """
    try:
        yield
    except Exception as error:
        if "DataLoader worker" not in str(error):
            if lacks_memory(error):
                raise SetupError(
                    "Not enough free memory for the loss of a whole batch. Give a smaller "
                    "--training.batch-size, which changes the result, or --device cpu."
                ) from error
            raise
        reason = str(error).strip().splitlines()[-1]  # a traceback ends with it
        raise SetupError(
            f"A process that reads images died ({reason}), perhaps for lack of memory or, in a "
            "container, of shared memory. Give the command again with --workers 0."
        ) from error
