"""Standard output and error that may be closed, full or gone: none of it ends a run.

A run of hours matters more than what it says on the way. So a line for stderr that cannot be
written is dropped. Results on stdout cannot be dropped in silence: the command goes on to its end,
its files are complete, and only then it exits with code 4.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class _Stream:
    """A text stream whose failures end nothing; everything else is that stream's."""

    def __init__(self, stream: TextIO, *, pipes_matter: bool) -> None:
        self._stream = stream
        self._pipes_matter = pipes_matter
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        # What waits in the buffer would fail again, at the latest when Python exits.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._pipes_matter and isinstance(error, BrokenPipeError):
            raise error
        self.failure = self.failure or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Let no write to stdout or stderr raise, except to a pipe on stdout that nobody reads.

    A stream that is closed becomes one that forgets: otherwise the next file that is opened would
    take its number, and get what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, number: int) -> Any:
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure:  # a path may be no UTF-8
        reconfigure(errors="backslashreplace")
    return _Stream(stream, pipes_matter=number == 1)


def end_streams(code: int) -> int:
    """Write what stdout still holds. The exit code is `code`, or 4 where output was lost."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    failure = getattr(sys.stdout, "failure", None)
    if failure is None:
        return code
    print(
        f"error: The output could not be written: {failure.strerror.lower()}. Files that the "
        "command wrote are complete. Make room, or send the output elsewhere.",
        file=sys.stderr,
    )
    return code or 4
