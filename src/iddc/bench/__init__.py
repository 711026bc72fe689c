"""How fast this machine does each part of the work, beside a reference and the limit.

The reference is what the equations and the libraries' defaults read like: fp32, one crop or one
window after the other, all pairs of pixels in memory, no worker that decodes. Both ways get the
same inputs in the same process and take turns, so that a busy machine slows both, and must agree
before they are timed. The limit is the time that the arithmetic and the memory traffic of a part
take at the measured rates of the machine. Inputs are drawn scenes, so anybody can repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch

from iddc.bench.compare import Part, Row, time_both
from iddc.bench.data import decode_part, views_part
from iddc.bench.inputs import CASES, Inputs
from iddc.bench.loss import loss_parts
from iddc.bench.machine import Machine, measure_machine
from iddc.bench.network import backbone_part, head_part, optimizer_part
from iddc.bench.prediction import evaluation_part, prediction_part
from iddc.bench.step import step_parts
from iddc.bench.table import HEADER, cells, write_table
from iddc.config import BenchPart
from iddc.progress import SILENT, Progress
from iddc.runs import disk_errors

__all__ = ["HEADER", "Machine", "Row", "bench", "cells"]

PARTS: dict[BenchPart, Callable[[Inputs], Iterator[Part]]] = {
    "decode": lambda inputs: iter([decode_part(inputs)]),
    "views": lambda inputs: iter([views_part(inputs)]),
    "backbone": lambda inputs: (backbone_part(inputs, case) for case in CASES),
    "head": lambda inputs: (head_part(inputs, case) for case in CASES),
    "loss": loss_parts,
    "optimizer": lambda inputs: (optimizer_part(inputs, case) for case in CASES),
    "step": lambda inputs: (part for case in CASES for part in step_parts(inputs, case)),
    "prediction": lambda inputs: (prediction_part(inputs, case) for case in CASES),
    "evaluation": lambda inputs: (evaluation_part(inputs, case) for case in CASES),
}
"""Iterators, so that only one part needs memory at a time."""


def bench(
    out: Path,
    device: torch.device,
    *,
    names: Sequence[BenchPart] = get_args(BenchPart),
    batch_size: int = 64,
    repeats: int = 7,
    progress: Progress = SILENT,
) -> tuple[Machine, list[Row]]:
    """Measure parts of the work and write the table, as text and as data.

    Args:
        out: The folder to write.
        device: Where to compute.
        names: Which parts.
        batch_size: Images of a training batch, at least 2.
        repeats: How often each way is done; long ones less often (`compare.PATIENCE`).
        progress: Shows how far the work is.

    Raises:
        NumericError: Both ways of a part disagree.
        SetupError: The folder cannot be written.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    machine, rows = measure_machine(device), []
    with TemporaryDirectory() as folder:
        inputs = Inputs.draw(Path(folder), device, batch_size)
        with progress.job(len(names)):
            for done, name in enumerate(names, start=1):
                rows += [time_both(part, machine, device, repeats) for part in PARTS[name](inputs)]
                progress.update(done, name)
    options = f"--batch-size {batch_size} --repeats {repeats} --device {device}"
    if set(names) != set(PARTS):
        options += f" --parts {' '.join(names)}"
    write_table(out, device, machine, rows, command=f"iddc bench --out DIR {options}")
    return machine, rows
