"""One file of many images, complete or absent, written piece by piece."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from iddc.runs import disk_errors
from iddc.runs.files import TEMPORARY


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when the block ends, and is gone if it fails.

    Raises:
        SetupError: It cannot be written: disk full, read-only, no permission.
    """
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    with disk_errors(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
