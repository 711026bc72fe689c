"""`python -m iddc`, the same as the command `iddc`."""

from __future__ import annotations

import os
import sys

from iddc.cli import main


def run() -> None:
    """Run the command line of this process and exit with its code."""
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # else Python would complain of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    run()
