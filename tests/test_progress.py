"""What a long job says on stderr."""

from __future__ import annotations

import io
import re
from typing import TypeVar

import pytest

from iddc.learning.log import TimeLeft
from iddc.progress import Progress
from iddc.schedules import Plan

TERMS = "loss 1.83  positive 1.31  negative 0.49  regularizer 0.03  12 of 12 clusters alive"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> list[str]:
    """The lines a terminal was sent, without colours and moves of the cursor."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


S = TypeVar("S", bound=io.StringIO)


def as_stderr(stream: S, monkeypatch: pytest.MonkeyPatch) -> S:
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_without_a_terminal_lines_are_plain_and_seconds_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = as_stderr(io.StringIO(), monkeypatch)
    now = 5000.0  # the clock begins anywhere
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress()
    progress.begin(100, done=40)
    for done in range(41, 101):
        now += 1
        progress.update(done, f"epoch {done}/100", TERMS)
    progress.end()
    lines = stderr.getvalue().splitlines()
    assert lines[0] == f"epoch 50/100   50%  {TERMS}  eta 0:50"
    assert [line.split("/")[0] for line in lines] == [f"epoch {n}" for n in range(50, 101, 10)]


def test_the_last_part_is_always_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = as_stderr(io.StringIO(), monkeypatch)
    progress = Progress()
    progress.begin(2)
    progress.update(2, "image 2/2")
    assert stderr.getvalue().startswith("image 2/2  100%")


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_a_terminal_of_any_width_shows_place_bar_and_time_left(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    stderr = as_stderr(Terminal(), monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    progress.begin(100)
    progress.update(61, "epoch 3/5", TERMS)
    progress.end()
    line = shown(stderr)[-1]
    assert line.startswith("epoch 3/5 ━")
    assert " 61% loss 1.83" in line
    said = re.split(r"  +", line.partition("61% ")[2].partition("eta")[0].strip())
    assert {*said} <= {*TERMS.split("  ")}  # no term is cut
    assert re.search(r"eta \d+:\d\d", line)


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_notes_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    stderr = as_stderr(kind(), monkeypatch)
    progress = Progress()
    progress.begin(2)
    progress.note("resumed at [bold] 3")
    progress.end()
    assert "resumed at [bold] 3" in shown(stderr)


@pytest.mark.parametrize(("repeat", "begun"), [(0, 0), (2, 0), (2, 7), (2, 45), (9, 0)])
def test_the_time_left_of_a_run_knows_which_steps_need_the_photos(repeat: int, begun: int) -> None:
    plan = Plan(50, 10)
    made = min(50, begun + 10 * repeat) if repeat else 50  # resumed, all views are made again
    takes = {step: 5.0 if step <= made else 1.0 for step in range(begun + 1, 51)}
    time = TimeLeft(plan, repeat, begun)
    for done, seconds in takes.items():
        left = time.after(done, seconds, 4.0 if done <= made else 0.01)
        assert left == pytest.approx(sum(takes[step] for step in range(done + 1, 51)))
