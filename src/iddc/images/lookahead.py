"""Work in threads on the next few items, while results come one by one and in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_MOST_WORKERS = 8
AHEAD = 2**29
"""Bytes that may wait to be used, decoded or to be written, beyond those in use."""
T = TypeVar("T")
U = TypeVar("U")


def ahead(
    function: Callable[[T], U],
    items: Iterable[T],
    workers: int = -1,
    *,
    nbytes: Callable[[T, U | None], int] = lambda _item, _result: 0,
) -> Iterator[tuple[T, U]]:
    """Each item and its result, in order, while threads work on the next few.

    Decoding and encoding images let other threads run. Unlike `Executor.map`, results do not pile
    up.

    Args:
        function: Called in a thread for each item.
        items: Taken in the caller's thread, a few ahead of the results.
        workers: Threads; 0: one; -1: one for each core, at most 8.
        nbytes: What an item and its result, once it is there, hold in memory. No further item is
            taken while those that wait hold more than `AHEAD`.
    """
    threads = min(_MOST_WORKERS, os.cpu_count() or 1) if workers < 0 else max(1, workers)
    waiting: deque[tuple[T, Future[U]]] = deque()

    def held() -> int:
        there = [(item, f.done() and not f.exception(), f) for item, f in waiting]
        return sum(nbytes(item, f.result() if done else None) for item, done, f in there)

    def first() -> tuple[T, U]:
        item, future = waiting.popleft()
        return item, future.result()

    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            del item  # else it lives on while the next one is made
            while waiting and (len(waiting) > 2 * threads or held() > AHEAD):
                yield first()
        while waiting:
            yield first()
