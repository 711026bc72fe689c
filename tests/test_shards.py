"""`--shard auto`: the numbers that Slurm, Kubernetes and AWS Batch give the tasks of an array."""

from __future__ import annotations

import pytest

from iddc.cli.shards import parse_shard
from iddc.errors import ConfigError


def slurm(index: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    """What sbatch sets in a task of `--array=first-last:step` (its manual, "Job array")."""
    numbers = {"ID": index, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        (None, {}, (1, 1)),
        ("3/8", slurm(5, 9), (3, 8)),
        ("auto", slurm(0, 4), (1, 4)),  # --array=0-3
        ("auto", slurm(3, 4), (4, 4)),
        ("auto", slurm(200, 200, 1), (200, 200)),  # --array=1-200
        ("auto", slurm(14, 3, 10, 2), (3, 3)),  # --array=10-14:2
        ("auto/4", slurm(3, 4), (4, 4)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "0"}, (1, 5)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "4"}, (5, 5)),
        (
            "auto",
            {"AWS_BATCH_JOB_ARRAY_INDEX": "9", "AWS_BATCH_JOB_ARRAY_SIZE": "10"},
            (10, 10),
        ),
        ("auto/7", {"AWS_BATCH_JOB_ARRAY_INDEX": "0"}, (1, 7)),
    ],
)
def test_a_task_finds_its_shard(
    text: str | None, environment: dict[str, str], shard: tuple[int, int]
) -> None:
    assert parse_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "says"),
    [
        ("auto", {}, "found none"),
        ("auto", slurm(0, 4) | {"JOB_COMPLETION_INDEX": "0"}, "SLURM_ARRAY_TASK_ID and JOB_COMP"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "--shard auto/N"),
        ("auto/5", {"JOB_COMPLETION_INDEX": "5"}, "is 5, which is none of 5 numbers from 0"),
        ("auto/5", {"JOB_COMPLETION_INDEX": "-1"}, "expected a whole number"),
        ("auto", slurm(7, 3, 1), "without gaps"),  # --array=1,3,7
        ("auto", slurm(3, 2, 0, 2), "without gaps"),
        ("auto/200", slurm(7, 1, 7), "give --shard I/200"),  # a lost task, submitted again alone
        ("auto/", {}, "expected I/N"),
        ("auto/0", slurm(0, 0), "none of 0 numbers"),
        ("automatic", {}, "expected I/N"),
    ],
)
def test_numbers_that_do_not_tell_the_shard_are_refused(
    text: str, environment: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_shard(text, environment)


def test_the_tasks_of_an_array_do_every_shard_once() -> None:
    tasks = [parse_shard("auto", slurm(index, 5, 3, 4)) for index in range(3, 23, 4)]
    assert tasks == [(shard, 5) for shard in range(1, 6)]
