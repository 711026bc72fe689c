"""Which part of a collection a process does: --shard I/N, or what the scheduler numbered it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from iddc.errors import ConfigError


@dataclass(frozen=True)
class Scheduler:
    """The variables by which a scheduler tells a task its number."""

    name: str
    index: str
    """Holds the number of the task."""
    count: str = ""
    """Holds the number of all tasks; empty: tasks are not told."""
    first: str = ""
    """Holds the lowest number of a task; empty: 0."""
    step: str = ""
    """Holds the distance between two numbers; empty: 1."""


SCHEDULERS = (
    Scheduler(
        "Slurm",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
    ),
    Scheduler("Kubernetes", "JOB_COMPLETION_INDEX"),
    Scheduler("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
)
"""As documented by Slurm (sbatch, "Job array"), Kubernetes ("Indexed Job") and AWS Batch ("Array
jobs"). Kubernetes tells a pod its index, from 0, but not how many there are."""


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Read --shard: I/N; auto or auto/N, where a scheduler knows I; without it, all is one shard.

    Args:
        text: What was given.
        environment: Where schedulers leave their numbers.

    Raises:
        ConfigError: It has another form, I is not one of 1 to N, or no scheduler says I or N.
    """
    if text is None:
        return 1, 1
    if found := re.fullmatch(r"auto(?:/(\d{1,9}))?", text):
        return _numbered(int(found[1]) if found[1] else None, environment)
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    shard, shards = map(int, found.groups()) if found else (0, 0)
    if not 1 <= shard <= shards:
        raise ConfigError(
            "--shard: expected I/N with I from 1 to N, such as 1/4 to 4/4, or auto in a task of "
            f"an array, found {text!r}."
        )
    return shard, shards


def _numbered(shards: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """The shard of this task of an array."""
    # Two schedulers at once, or none, would be guesswork.
    there = [scheduler for scheduler in SCHEDULERS if scheduler.index in environment]
    if len(there) != 1:
        names = ", ".join(f"{scheduler.index} ({scheduler.name})" for scheduler in SCHEDULERS)
        number = f"found {' and '.join(s.index for s in there)}" if there else "found none"
        raise ConfigError(f"--shard auto: expected one of {names} to be set, {number}. Give I/N.")
    (scheduler,) = there

    def read(variable: str, default: int | None) -> int | None:
        value = environment.get(variable, "") if variable else ""
        if not value:
            return default
        if not re.fullmatch(r"\d{1,9}", value):
            raise ConfigError(f"--shard auto: {variable} is {value!r}, expected a whole number.")
        return int(value)

    # How many tasks there are: the scheduler says it, or the user does, or both agree.
    count = read(scheduler.count, None)
    if count is None and shards is None:
        raise ConfigError(
            f"--shard auto: {scheduler.name} does not say how many tasks there are. Give their "
            "number too: --shard auto/N."
        )
    if count is not None and shards is not None and count != shards:
        raise ConfigError(
            f"--shard auto/{shards}: this array of {scheduler.name} has {count} tasks. To repeat "
            f"task I of an array of {shards}, give --shard I/{shards}."
        )
    total = shards if count is None else count
    assert total is not None
    # Which of them this is, whatever number the first one has.
    index, first = read(scheduler.index, 0), read(scheduler.first, 0)
    step = read(scheduler.step, 1)
    assert index is not None
    assert first is not None
    assert step
    shard, rest = divmod(index - first, step)
    if rest or not 0 <= shard < total:
        raise ConfigError(
            f"--shard auto: {scheduler.index} is {index}, which is none of {total} numbers from "
            f"{first} in steps of {step}. Number the tasks without gaps, or give --shard I/N."
        )
    return shard + 1, total
