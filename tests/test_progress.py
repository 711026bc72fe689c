"""What a long job says on stderr."""

from __future__ import annotations

import io
import re
from typing import TypeVar

import pytest

from iddc.progress import Progress

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
    now = 0.0
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
