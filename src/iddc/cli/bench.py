"""The command that measures: bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from iddc.cli.inform import print_table
from iddc.cli.learn import say
from iddc.cli.options import Command, Flat
from iddc.config import Runtime
from iddc.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure the parts of a training step on this machine, beside the plain way.

    Prints how many times the plain way takes longer, and writes that, the memory that both take
    and the limit of the machine to DIR. Let nothing else run meanwhile.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write: a page (.md) and its figures (.json), named after the hardware."""
    batch_size: int = 64
    """Images of a batch. With 64, the plain way needs about 2.5 GB."""
    repeats: int = 7
    """How often each way is done; the median counts."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device"})

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch-size", self.batch_size, 2),
            ("repeats", self.repeats, 1),
        ):
            if value < least:
                raise ConfigError(f"--{name}: expected at least {least}, found {value}.")

    def __call__(self) -> int:
        """Measure."""
        from iddc.bench import HEADER, bench
        from iddc.device import pick_device

        machine, rows = bench(
            self.out,
            pick_device(self.runtime.device),
            batch_size=self.batch_size,
            repeats=self.repeats,
        )
        print_table(HEADER[:4], [row.cells()[:4] for row in rows])
        say(
            machine.hardware,
            f"{machine.fp32_flops / 1e9:.0f} GFLOP/s in fp32",
            f"{machine.bandwidth / 1e9:.1f} GB/s",
            f"see {self.out}",
        )
        return 0
