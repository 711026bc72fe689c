"""What a run says about itself at each step: log.jsonl, the progress line, TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iddc.errors import needs_extra
from iddc.learning.guards import RECENT
from iddc.progress import Progress
from iddc.runs import Run
from iddc.schedules import Plan

QUIET = frozenset(
    {"gradient_norm", "learning_rate", "live_clusters", "head", "not_finite", "embeddings"}
)
"""Numbers of the log that the progress line leaves out, or words differently."""


class StepLog:
    """What the first process writes while the others are silent.

    Args:
        run: Its folder gets log.jsonl.
        plan: The steps of the run.
        progress: Shows how far the work is.
        num_clusters: K, for a method that has clusters.
        advice: What to try where most clusters die, as options.
        repeat: After how many epochs views come again, if their embeddings are kept; else 0.
        tensorboard: Whether to write TensorBoard events too.

    Raises:
        SetupError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        progress: Progress,
        *,
        num_clusters: int = 0,
        advice: Sequence[str] = (),
        repeat: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self._run = run
        self._plan = plan
        self._num_clusters = num_clusters
        self._advice = advice
        self._repeat = repeat
        self._warned = False
        self._progress = progress
        self._summary = _summary_writer() if tensorboard else None
        self._board: Any = None
        self._time = TimeLeft(plan, repeat)

    def open(self, done: int) -> None:
        """Go on after `done` steps: what was noted of later ones is forgotten."""
        self._run.cut_log(done)
        if self._summary:
            self._board = self._summary(str(self._run.path / "tensorboard"), purge_step=done + 1)

    def begin(self, done: int) -> None:
        """Show the progress of the steps, after `done` of them."""
        self._time = TimeLeft(self._plan, self._repeat, done)
        self._progress.begin(self._plan.steps, done)

    def pause(self) -> None:
        """Show the progress of the steps no more."""
        self._progress.end()

    def write(
        self, done: int, numbers: dict[str, float], *, images: int, seconds: float, making: float
    ) -> None:
        """Note a step.

        Args:
            done: How many steps are done now.
            numbers: What was learned; nothing, where fewer than two images could be read.
            images: How many were.
            seconds: How long the step took.
            making: How much of that went by until its inputs were there.
        """
        epoch = self._plan.epoch_and_batch(done - 1)[0] + 1
        left = self._time.after(done, seconds, making)
        self._run.log(step=done, epoch=epoch, images=images, **numbers, seconds=round(seconds, 4))
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, done)
        texts = [f"{name} {value:.2f}" for name, value in numbers.items() if name not in QUIET]
        if "live_clusters" in numbers:  # after the loss: a narrow terminal has no room for more
            alive = f"{numbers['live_clusters']:.0f} of {self._num_clusters}"
            texts.insert(1, f"{alive} clusters alive")
            self._warn(done, numbers["live_clusters"])
        where = f"epoch {epoch}/{self._plan.epochs}"
        self._progress.update(done, where, "  ".join(texts), left)

    def _warn(self, done: int, live: float) -> None:
        """Say once that most clusters die, and at the end that they are dead."""
        number, end = self._num_clusters, done == self._plan.steps
        soon = done < RECENT or self._warned
        if 2 * live >= number or (soon and not end):
            return
        self._warned = True
        hints = " or ".join(filter(None, (", ".join(self._advice[:-1]), self._advice[-1])))
        self.note(
            f"warning: after step {done} only {live:.0f} of {number} clusters have a tenth of an "
            f"even share of the patches. Try {hints}."
        )

    def note(self, line: str) -> None:
        """Say something that is not about one step."""
        self._progress.note(line)

    def close(self) -> None:
        """Finish the progress line and the TensorBoard file."""
        self.pause()
        if self._board:
            self._board.close()


class TimeLeft:
    """When a run ends whose views come again: only its first steps need photos and backbone."""

    def __init__(self, plan: Plan, repeat: int, begun: int = 0) -> None:
        self._begun, self._steps, self._made = begun, plan.steps, plan.steps
        """Where the run (re)started, its end, and the step after which every view was there."""
        if repeat:
            made = begun + repeat * plan.steps_per_epoch
            self._made = min(made, plan.steps)
        self._making = self._learning = 0.0

    def after(self, done: int, seconds: float, making: float) -> float:
        """The seconds until the end, from what the steps took; see `StepLog.write`."""
        if done > self._made:
            making = 0.0  # of next to nothing
        self._making += making
        self._learning += seconds - making
        learning = self._learning / (done - self._begun) * (self._steps - done)
        if done >= self._made:
            return learning
        return learning + self._making / (done - self._begun) * (self._made - done)


def _summary_writer() -> Any:
    with needs_extra(
        "tensorboard", "--tensorboard needs TensorBoard", ", or leave out --tensorboard"
    ):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter
