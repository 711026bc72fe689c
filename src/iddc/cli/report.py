"""The command that shows a run: report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, ClassVar

from tyro.conf import arg

from iddc.cli.options import Command, Flat, RunPath
from iddc.config import Runtime
from iddc.errors import ConfigError
from iddc.runs import Run

MAX_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Show a run in one HTML file that works offline: samples, clusters, curves and scores.

    No label is read. Names and colours come from `iddc label`.
    """

    run: RunPath
    compare: Annotated[Path | None, arg(metavar="RUN2", help_behavior_hint="(default: none)")] = (
        None
    )
    """Show this run beside the first, on the same images, clusters matched one to one. The file is
    RUN/report-NAME2.html then."""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: RUN/report.html)")
    ] = None
    """The file to write, which ends in .html."""
    images: Annotated[
        Path | None, arg(metavar="IMAGES", help_behavior_hint="(default: those of the training)")
    ] = None
    """What to look at: a folder, a zip, a text file of paths, or one image."""
    samples: int = 12
    """How many images to show with their masks; up to 64 are looked at."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device"})

    def __call__(self) -> int:
        """Write the report."""
        if not 0 <= self.samples <= MAX_SAMPLES:
            raise ConfigError(f"--samples: expected 0 to {MAX_SAMPLES}, found {self.samples}.")
        if self.out and self.out.suffix.lower() not in {".html", ".htm"}:
            raise ConfigError(f"--out: expected a file that ends in .html, found {self.out}.")
        run = Run.open(self.run)
        compare = Run.open(self.compare) if self.compare else None

        from iddc.progress import Progress
        from iddc.report import write_report

        written = write_report(
            run,
            compare=compare,
            out=self.out,
            images=self.images,
            samples=self.samples,
            device=self.runtime.device,
            progress=Progress(),
        )
        if written.why:
            print(f"note: {written.why} Give others with --images.", file=sys.stderr)
        label = f"iddc label {quote(str(self.run))}"
        print(f"{written.path}    next: open it in a browser, then {label}")
        return 0
