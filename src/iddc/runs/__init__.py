"""The RUN folder and how files are written: atomic, locked, with format versions. No torch here."""

from iddc.runs.configfile import (
    FORMAT_VERSION,
    WRITTEN,
    changed,
    explain,
    load_config,
    refuse_newer,
    spelt_in_python,
)
from iddc.runs.files import disk_errors, read_text, write_atomic
from iddc.runs.folder import Run

__all__ = [
    "FORMAT_VERSION",
    "WRITTEN",
    "Run",
    "changed",
    "disk_errors",
    "explain",
    "load_config",
    "read_text",
    "refuse_newer",
    "spelt_in_python",
    "write_atomic",
]
