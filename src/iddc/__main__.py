"""`python -m iddc`, the same as the command `iddc`."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from iddc.cli import main
from iddc.cli.streams import end_streams, guard_streams


def run() -> None:
    """Run the command line of this process and exit with its code."""
    for signum in (signal.SIGTERM, signal.SIGHUP):  # where a command does not hear it itself
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores the end of a terminal
            signal.signal(signum, _stop)
    guard_streams()
    sys.exit(end_streams(main()))


def _stop(signum: int, _frame: FrameType | None) -> None:
    """End the process in order: no `except Exception` on the way takes this for its own failure."""
    print("Stopped. What is written is complete.", file=sys.stderr)
    sys.exit(128 + signum)


if __name__ == "__main__":
    run()
