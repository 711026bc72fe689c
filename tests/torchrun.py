"""Processes that find each other as under torchrun, without it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def exit_codes(size: int, work: Callable[[int], int]) -> list[int | None]:
    """Run `work(rank)` in forked processes; the exit code that each of them returns, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def member(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        sys.exit(work(rank))

    context = multiprocessing.get_context("fork")
    members = [context.Process(target=member, args=(rank,)) for rank in range(size)]
    try:
        for process in members:
            process.start()
        for process in members:
            process.join(300)  # a busy machine
        return [process.exitcode for process in members]
    finally:
        for process in members:
            process.kill()  # one that waits for another hears no other signal


def in_processes(size: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run `work(rank)` in forked processes; what each of them returns, by rank."""

    def saved(rank: int) -> int:
        torch.save(work(rank), folder / f"result{rank}.pt")
        return 0

    assert exit_codes(size, saved) == [0] * size
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(size)]
