"""What ends a run that does not recover: numbers that are not finite, unreadable images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from jaxtyping import Float
from torch import Tensor

from iddc.errors import NumericError
from iddc.images import ImageFile, Skipped, refuse_many
from iddc.processes import Processes
from iddc.progress import Progress
from iddc.runs import Run

MAX_BAD = 3
"""Steps in a row without finite numbers after which a run stops."""
RECENT = 50
"""About how many steps back the share of a cluster looks."""
LIVE_SHARE = 0.1
"""A cluster is alive if it has this part of an even share, 1 / K, of the patches."""


def live_clusters(shares: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """How many clusters have `LIVE_SHARE` of an even share or more.

    To win some patch now and then means little: two of 11 clusters had 99.8 % of all pixels while
    each of the others won some (decision 001).
    """
    return (shares * len(shares) >= LIVE_SHARE).sum().float()


def not_finite(numbers: Mapping[str, float]) -> list[str]:
    """Those of the numbers that are NaN or infinite, as `loss nan`."""
    return [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]


class FiniteGuard:
    """Judges the numbers of each step, and ends a run that does not recover.

    Args:
        run: Its folder gets the diagnosis.
        steps: How many steps the run has.
        processes: The first of them writes.
        advice: What to try, for the user.
        progress: Shows what is left out.
    """

    def __init__(
        self, run: Run, steps: int, processes: Processes, advice: str, progress: Progress
    ) -> None:
        self._run = run
        self._limit = min(MAX_BAD, steps)
        self._processes = processes
        self._advice = advice
        self._progress = progress
        self._bad: list[dict[str, Any]] = []

    @property
    def good(self) -> bool:
        """Whether the last step was good, so that its state may be saved."""
        return not self._bad

    def judge(
        self, step: int, numbers: dict[str, float], images: Iterable[str], **facts: Any
    ) -> dict[str, float]:
        """Pass the numbers of a step on if they are finite, else how many are not.

        Args:
            step: Counted from 1.
            numbers: What the step found. Where one is not finite, it changed no weight.
            images: The names of this process's images.
            facts: What else the diagnosis should say.

        Raises:
            NumericError: They are not, for `MAX_BAD` steps in a row.
        """
        wrong = not_finite(numbers)
        if not wrong:
            self._bad.clear()
            return numbers
        names = self._processes.gather_objects([*images])
        texts = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._bad.append({"step": step, **texts, "images": [*chain(*names)]})
        if len(self._bad) == self._limit:
            if self._processes.rank == 0:
                self._run.write_diagnosis(advice=self._advice, **facts, steps=self._bad)
            raise NumericError(
                f"Not finite at step {step}, nor at the {self._limit - 1} before: "
                f"{', '.join(wrong)}. The last checkpoint is kept, and "
                f"{self._run.path / 'diagnosis.json'} says what was seen. Try {self._advice}, with "
                "--overwrite."
            )
        self._progress.note(f"step {step} is left out, as it is not finite: {', '.join(wrong)}")
        return {"not_finite": float(len(wrong))}


class Unreadable:
    """The images that cannot be read, and how many of them are too many.

    Args:
        run: Its skipped.csv lists them; the first process writes it.
        files: The images of the run.
        skipped: Files that are left out already.
        max_share: The largest share of unreadable images.
        processes: This process among all.
    """

    def __init__(
        self,
        run: Run,
        files: Sequence[ImageFile],
        skipped: Sequence[Skipped],
        max_share: float,
        processes: Processes,
    ) -> None:
        self._run = run
        self._files = files
        self._total = len(files) + len(skipped)
        self._max_share = max_share
        self._processes = processes
        self.reasons = {str(item.file.name): item.reason for item in skipped}

    def add(self, failures: Sequence[tuple[int, str]]) -> None:
        """Remember what was not read, and list it; all processes give the same.

        Args:
            failures: Indices of files, and reasons.

        Raises:
            DataError: The share of unreadable images is too large.
        """
        self.reasons |= {str(self._files[index].name): reason for index, reason in failures}
        self.write()
        refuse_many(self.reasons, self._total, self._max_share)

    def gather(self, failures: Sequence[tuple[int, str]]) -> None:
        """As `add`, of what each process could not read."""
        self.add([*chain(*self._processes.gather_objects([*failures]))])

    def write(self) -> None:
        """List them in skipped.csv."""
        if self._processes.rank == 0:
            self._run.write_skipped(self.reasons.items())
