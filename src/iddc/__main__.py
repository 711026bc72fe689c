"""`python -m iddc`, the same as the command `iddc`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from iddc.cli import main
from iddc.cli.streams import end_streams, guard_streams


def run() -> None:
    """Run the command line of this process and exit with its code."""
    # A thread that spins while it waits takes the core of one that works, if cores are shared.
    # PyTorch's threads read this as they are loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
