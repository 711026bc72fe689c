"""Say how far a long job is: a bar on a terminal, else a plain line now and then, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from iddc.errors import one_line

T = TypeVar("T")
INTERVAL = 10
"""Seconds between two plain lines where there is no terminal."""
_BAR = 20
"""The width of the bar, in characters."""


class Progress:
    """Shows one job after another, each between `begin` and `end`, or inside `job`."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, total: int | None, done: int = 0) -> None:
        """Start a job of `total` equal parts, None if unknown, of which some may be done."""
        self._total, self._first = total, done
        self._started = self._shown = time.monotonic()
        if sys.stderr and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task("", total=total, completed=done, text="", eta="")
            self._bar.start()

    def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None:
        """Tell how far we are.

        Args:
            done: How many parts are done.
            where: Where that is (`epoch 3/5`).
            text: What there is to know.
            left: The seconds until the end; None: as if all parts took the same time, if their
                number is known.
        """
        now, text = time.monotonic(), one_line(text)
        if left is None and self._total is not None:
            left = (now - self._started) / max(1, done - self._first) * (self._total - done)
        eta = "" if left is None else f"eta {_minutes(left)}"
        if self._bar:
            width = self._bar.console.width - len(where) - _BAR - len("100%") - len(eta) - 4
            text = _whole_terms(text, width)  # or rich shortens every column
            self._bar.update(self._task, completed=done, description=where, text=text, eta=eta)
        elif now - self._shown >= INTERVAL or done == self._total:
            self._shown = now
            parts = (where, f"{done / self._total:4.0%}" if self._total else "", text, eta)
            self.note("  ".join(part for part in parts if part))

    def note(self, line: str) -> None:
        """Write a line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Finish the job."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def each(self, items: Sequence[T], where: str, text: str) -> Iterator[T]:
        """Go through items, and tell how many are done."""
        with self.job(len(items)):
            for done, item in enumerate(items, 1):
                yield item
                self.update(done, where, f"{text} {done} of {len(items)}")

    @contextmanager
    def job(self, total: int | None, done: int = 0) -> Iterator[None]:
        """Begin a job, and end it whatever happens."""
        self.begin(total, done)
        try:
            yield
        finally:
            self.end()


class _Silent(Progress):
    """Shows nothing, for callers that do not ask."""

    def begin(self, total: int | None, done: int = 0) -> None: ...
    def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None: ...
    def note(self, line: str) -> None: ...
    def end(self) -> None: ...


SILENT = _Silent()
"""What functions take for a Progress where they are given none."""


def _whole_terms(text: str, width: int) -> str:
    """As many terms, which two spaces part, as there is width for; none is cut."""
    terms = text.split("  ")
    while terms and len("  ".join(terms)) > width:
        terms.pop()
    return "  ".join(terms)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    def column(field: str) -> TextColumn:
        return TextColumn(field, markup=False)

    return Progress(
        column("{task.description}"),
        BarColumn(_BAR),
        column("{task.percentage:3.0f}%"),
        column("{task.fields[text]}"),
        column("{task.fields[eta]}"),
        console=Console(stderr=True),
    )


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
