"""The scripts in benchmarks/, which are no part of the package, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    """A script by its name. It finds those beside it, and stays out of the way of others."""
    sys.path.insert(0, str(PATH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(PATH))
