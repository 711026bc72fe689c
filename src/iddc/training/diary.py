"""What a run says about itself at each step: log.jsonl, the progress line, TensorBoard."""

from __future__ import annotations

from typing import Any

from iddc.config import Experiment
from iddc.errors import needs_extra
from iddc.progress import Progress
from iddc.runs import Run
from iddc.schedules import Plan
from iddc.training.health import RECENT


class Diary:
    """What the first process writes while the others are silent.

    Raises:
        SetupError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        experiment: Experiment,
        progress: Progress,
        *,
        tensorboard: bool,
    ) -> None:
        self._run = run
        self._plan = plan
        self._experiment = experiment
        self._warned = False
        self._progress = progress
        self._summary = _summary_writer() if tensorboard else None
        self._board: Any = None
        self._time = _TimeLeft(plan, experiment)

    def open(self, done: int) -> None:
        """Go on after `done` steps: what was noted of later ones is forgotten."""
        self._run.cut_log(done)
        if self._summary:
            self._board = self._summary(str(self._run.path / "tensorboard"), purge_step=done + 1)
        self._time = _TimeLeft(self._plan, self._experiment, done)
        self._progress.begin(self._plan.steps, done)

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
        epoch = self._plan.place(done - 1)[0] + 1
        left = self._time.after(done, seconds, making)
        self._run.log(step=done, epoch=epoch, images=images, **numbers, seconds=round(seconds, 4))
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, done)
        terms = ("loss", "positive", "negative", "regularizer")
        texts = [f"{name} {numbers[name]:.2f}" for name in terms if name in numbers]
        if "live_clusters" in numbers:
            alive = f"{numbers['live_clusters']:.0f} of {self._experiment.num_clusters}"
            texts.append(f"{alive} clusters alive")
            self._warn(done, numbers["live_clusters"])
        where = f"epoch {epoch}/{self._plan.epochs}"
        self._progress.update(done, where, "  ".join(texts), left)

    def _warn(self, done: int, live: float) -> None:
        """Say once that most clusters die, and at the end that they are dead."""
        number, end = self._experiment.num_clusters, done == self._plan.steps
        soon = done < RECENT or self._warned
        if 2 * live >= number or (soon and not end):
            return
        self._warned = True
        objective = self._experiment.objective
        hints = [
            f"--objective.{name} {value}"
            for name, value in (("regularizer", "weibull"), ("centering", "batch"))
            if getattr(objective, name) != value
        ]
        weight = f"a larger --objective.regularizer-weight than {objective.regularizer_weight:g}"
        hints += [weight, "a smaller --num-clusters"]
        self.note(
            f"warning: after step {done} only {live:.0f} of {number} clusters have a tenth of an "
            f"even share of the patches. Try {', '.join(hints[:-1])} or {hints[-1]}."
        )

    def note(self, line: str) -> None:
        """Say something that is not about one step."""
        self._progress.note(line)

    def close(self) -> None:
        """Finish the progress line and the TensorBoard file."""
        self._progress.end()
        if self._board:
            self._board.close()


class _TimeLeft:
    """When a run ends whose views come again: only its first steps need photos and backbone."""

    def __init__(self, plan: Plan, experiment: Experiment, begun: int = 0) -> None:
        self._begun, self._steps, self._made = begun, plan.steps, plan.steps
        """Where the run (re)started, its end, and the step after which every view was there."""
        if experiment.views.repeat and not experiment.training.end_to_end:
            made = begun + experiment.views.repeat * plan.steps_per_epoch
            self._made = min(made, plan.steps)
        self._making = self._learning = 0.0

    def after(self, done: int, seconds: float, making: float) -> float:
        """The seconds until the end, from what the steps took; see `Diary.write`."""
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
