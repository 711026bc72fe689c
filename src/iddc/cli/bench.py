"""The command that measures: bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, get_args

from tyro.conf import arg

from iddc.cli.options import Command, Flat, say
from iddc.cli.printing import print_table
from iddc.config import BenchPart, Runtime
from iddc.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure each part of the work on this machine beside a reference: six minutes on a CPU.

    Prints the speed-up over a naive implementation and the fraction of the hardware's peak. Writes
    both, with memory use, to DIR. Inputs are random. Run nothing else meanwhile.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write: a page (.md) and its figures (.json), named after the hardware."""
    parts: Annotated[tuple[BenchPart, ...], arg(help_behavior_hint="(default: all)")] = ()
    """What is measured."""
    batch_size: int = 64
    """Images of a training batch. With 64, the reference needs about 2.5 GB."""
    repeats: int = 7
    """How often each way is done, what takes long only three times; the median counts."""
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
        from iddc.bench import HEADER, bench, cells
        from iddc.device import pick_device
        from iddc.progress import Progress

        machine, rows = bench(
            self.out,
            pick_device(self.runtime.device),
            names=self.parts or get_args(BenchPart),
            batch_size=self.batch_size,
            repeats=self.repeats,
            progress=Progress(),
        )
        print_table(HEADER[:6], [cells(row)[:6] for row in rows])
        bf16 = f"{machine.bf16_flops / 1e9:.0f} in bf16" if machine.bf16_flops else "no bf16"
        say(
            machine.hardware,
            f"{machine.fp32_flops / 1e9:.0f} GFLOP/s in fp32, {bf16}",
            f"{machine.bandwidth / 1e9:.1f} GB/s",
            f"see {self.out}",
        )
        return 0
