"""The command that a reviewer runs first: verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from iddc.cli.options import Command, Flat, say
from iddc.cli.printing import print_table
from iddc.config import Runtime
from iddc.errors import NumericError


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check on this machine that the equations, windows and protocols compute what they say.

    Each part is compared with a slow twin in float64 on drawn inputs; nothing is downloaded. Prints
    the largest differences. The exit code is 5 if one is above its tolerance.
    """

    seed: int = 0
    """What is drawn."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device"})

    def __call__(self) -> int:
        """Verify."""
        from iddc.device import pick_device
        from iddc.verify import failed, verify

        device = pick_device(self.runtime.device)
        checks = list(verify(device, self.seed))
        rows = [
            (
                check.name,
                check.size,
                f"{check.difference:.1e}",
                f"{check.tolerance:.0e}",
                "ok" if check.passed else "ABOVE",
            )
            for check in checks
        ]
        print_table(("what", "input", "largest difference", "tolerance", ""), rows)
        if wrong := failed(checks):
            raise NumericError(
                f"{len(wrong)} of {len(checks)} checks on {device} are above their tolerance: "
                f"{', '.join(check.name for check in wrong)}. Report this with the output of "
                "`iddc doctor`."
            )
        say(f"{len(checks)} checks on {device}, all within their tolerance")
        return 0
