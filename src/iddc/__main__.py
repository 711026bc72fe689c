"""`python -m iddc`, the same as the command `iddc`."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType

from iddc.cli import main


def run() -> None:
    """Run the command line of this process and exit with its code."""
    signal.signal(signal.SIGTERM, _stop)  # where a command does not hear it itself
    for stream in (sys.stdout, sys.stderr):  # a path may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # else Python would complain of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _stop(signum: int, _frame: FrameType | None) -> None:
    """End the process in order: no `except Exception` on the way takes this for its own failure."""
    print("error: Stopped. What is written is complete.", file=sys.stderr)
    sys.exit(128 + signum)


if __name__ == "__main__":
    run()
