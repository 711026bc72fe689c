"""What was measured, as a page and as data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from iddc import __version__
from iddc.bench.compare import Row
from iddc.bench.machine import Machine
from iddc.runs import write_atomic

HEADER = (
    "part",
    "reference",
    "fast",
    "ratio",
    "limit",
    "of limit",
    "reference memory",
    "fast memory",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as `HEADER` names it."""
    saved = f" ({row.fast.memory / row.reference.memory:.1%})" if row.reference.memory else ""
    return (
        row.part,
        str(row.reference),
        str(row.fast),
        f"{row.ratio:.2f}",
        f"{row.limit:.4g} s",
        f"{row.share:.0%}",
        f"{row.reference.memory / 1e6:.0f} MB",
        f"{row.fast.memory / 1e6:.1f} MB{saved}",
    )


def write_table(
    out: Path, device: torch.device, machine: Machine, rows: Sequence[Row], *, command: str
) -> None:
    """Write speed_HARDWARE_YEAR-MONTH.md and .json.

    Raises:
        SetupError: The folder cannot be written.
    """
    now = datetime.now(UTC)
    facts = {
        "hardware": machine.hardware,
        "device": device.type,
        "date": now.date().isoformat(),
        "iddc": __version__,
        "torch": torch.__version__,
        "command": command,
    }
    words = re.sub(r"[^a-z0-9]+", "-", machine.hardware.lower()).strip("-")
    path = out / f"speed_{words}_{now:%Y-%m}"
    record = {**facts, "machine": asdict(machine), "parts": [asdict(row) for row in rows]}
    write_atomic(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    write_atomic(path.with_suffix(".md"), markdown(facts, machine, rows))


def markdown(facts: dict[str, str], machine: Machine, rows: Sequence[Row]) -> str:
    """The page of one machine."""
    bf16 = f"{machine.bf16_flops / 1e9:.0f}" if machine.bf16_flops else "no"
    lines = [
        f"# Speed on {machine.hardware}",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- threads: {machine.threads}",
        f"- matrix products: {machine.fp32_flops / 1e9:.0f} GFLOP/s in fp32, {bf16} in bf16",
        f"- memory: {machine.bandwidth / 1e9:.1f} GB/s read and written",
        "",
        "Median of the repetitions (fastest to slowest), of one batch, one step or one image. "
        "Limit: the part's products (bf16 for a frozen backbone and for prediction) or its memory "
        "traffic at these rates, whichever takes longer; of limit: the share that the fast way "
        "reaches. Memory: the peak of tensors.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
