"""The RUN folder and how files are written: atomic, locked, with format versions. No torch here."""

from iddc.runs.configfile import FORMAT_VERSION, explain, load_config
from iddc.runs.files import disk_errors, write_atomic
from iddc.runs.folder import Run

__all__ = ["FORMAT_VERSION", "Run", "disk_errors", "explain", "load_config", "write_atomic"]
