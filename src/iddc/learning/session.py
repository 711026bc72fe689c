"""What every training does beside learning: processes, signals, log, checkpoints, bad images."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from iddc.config import Runtime
from iddc.errors import Interrupted, SetupError
from iddc.images import ImageFile, Skipped
from iddc.learning.batches import failures_in_words
from iddc.learning.checkpoint import State, digest, load_state, save_snapshot, save_state
from iddc.learning.guards import FiniteGuard, Unreadable
from iddc.learning.log import StepLog
from iddc.learning.signals import StopRequest
from iddc.processes import Processes, joined
from iddc.progress import SILENT, Progress
from iddc.runs import Run
from iddc.schedules import Plan


@runtime_checkable
class StepBatch(Protocol):
    """What a process has for a step."""

    @property
    def ids(self) -> Sequence[int]:
        """The indices of its images among the files of the run."""

    @property
    def failures(self) -> Sequence[tuple[int, str]]:
        """The index and the reason of each image that could not be read."""


B = TypeVar("B", bound=StepBatch)


@runtime_checkable
class Trainee(Protocol):
    """What learns, as a session sees it."""

    plan: Plan
    """The steps of the run."""
    step: int
    """Steps done."""
    step_complete: bool
    """No step is half done."""

    @property
    def trained(self) -> torch.nn.Module:
        """What a snapshot keeps."""

    def state(self) -> dict[str, Any]:
        """All that is needed to go on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""

    def facts(self) -> dict[str, Any]:
        """What a diagnosis says beside the numbers of the steps."""


class Session:
    """A run while it trains. `running` makes one.

    Args:
        run: The folder.
        files: The images.
        unreadable: Those that cannot be read.
        runtime: How this machine works.
        processes: This process among all.
        stop: The signals that came.
        progress: Shows how far the work is.
        closing: What is done at the end, whatever happened.
    """

    def __init__(
        self,
        run: Run,
        files: Sequence[ImageFile],
        unreadable: Unreadable,
        runtime: Runtime,
        processes: Processes,
        stop: StopRequest,
        progress: Progress,
        closing: ExitStack,
    ) -> None:
        self._closing = closing
        self.processes = processes
        self.runtime = runtime
        self.files = files
        self.unreadable = unreadable
        self.progress = progress if processes.rank == 0 else SILENT
        self.first = processes.rank == 0
        """Whether this is the process that writes."""
        self.stop = stop
        self._run = run
        self._log: StepLog | None = None
        self._guard: FiniteGuard | None = None
        self._learner: Trainee | None = None
        self._begun = self._made = 0.0
        self._ids: Sequence[int] = ()
        self._images = self._signum = 0

    def note(self, line: str) -> None:
        """Say something that is not about one step; the first process does."""
        self.progress.note(line)

    def resume(self, learner: Trainee, log: StepLog, *, advice: str) -> None:
        """Begin, or go on from the last checkpoint.

        Args:
            learner: What learns.
            log: What the first process writes of each step.
            advice: What to try when numbers are not finite.

        Raises:
            DataError: The checkpoint cannot be read, or the images are others.
        """
        self._guard = FiniteGuard(
            self._run, learner.plan.steps, self.processes, advice, self.progress
        )
        if self.first:
            self._log = log
            self._closing.callback(log.close)
        there = self.first and self._run.checkpoint.exists()
        loaded = load_state(self._run, self._digest) if there else None
        state = self.processes.broadcast(loaded)
        self._learner = learner  # from here on there is something to save
        if state:
            learner.restore(state["learner"])
            self.unreadable.reasons |= state["left_out"]
            self.note(f"resumed at step {learner.step:,} of {learner.plan.steps:,}")
            if state["threads"] != torch.get_num_threads():
                self.note(
                    f"resumed with {torch.get_num_threads()} threads, begun with "
                    f"{state['threads']}: the result is the same up to rounding"
                )
        if self._log:
            self._log.open(learner.step)
        self.unreadable.write()

    @cached_property
    def _digest(self) -> str:
        """That of the files, made once: of millions it takes seconds."""
        return digest(self.files)

    def save(self) -> None:
        """Replace the checkpoint, if the last step was good."""
        if self.first and self._learner and self._guard and self._guard.good:
            state = State(
                step=self._learner.step,
                threads=torch.get_num_threads(),
                files=self._digest,
                left_out=self.unreadable.reasons,
                learner=self._learner.state(),
            )
            save_state(self._run, state)

    def check(self) -> None:
        """End the run if a signal came between two steps; called by one process after the other.

        Raises:
            Interrupted: It did. What is on disk is what the last step left.
        """
        if self.stop.signum and self.processes.size == 1:
            self._interrupt(self.stop.signum)

    def pause(self) -> None:
        """Show another job than the steps, until `fitted`."""
        if self._log:
            self._log.pause()

    def fitted(self, epoch: int | None, numbers: Mapping[str, float | int]) -> None:
        """Note what a refit found, if there was one, and go on with the steps."""
        if self._log and self._learner:
            if epoch is not None and numbers:
                self._run.log(step=self._learner.step, epoch=epoch, **numbers)
            if self._learner.step < self._learner.plan.steps:
                self._log.begin(self._learner.step)

    # A step --------------------------------------------------------------------------------------

    def steps(
        self,
        stages: Iterable[tuple[int | None, range]],
        batches: Callable[[range], AbstractContextManager[Iterator[B]]],
        refit: Callable[[int], Mapping[str, float | int]] = lambda _epoch: {},
    ) -> Generator[tuple[B, Sequence[int]], None, None]:
        """Every step that is left. Whoever takes it learns, and then calls `end_step`.

        Args:
            stages: The epoch before which something is fitted to all images, or None; and the
                steps that follow.
            batches: Makes what this process has for each of these steps.
            refit: Fits, and gives what the log says of it.

        Yields:
            What this process has for the step, and how many images each process has.
        """
        for epoch, steps in stages:
            # What is fitted to all images: codebooks, neighbours, or all there is to learn.
            self.fitted(epoch, {} if epoch is None else refit(epoch))
            with batches(steps) as made:
                for _ in steps:
                    self._begun = time.monotonic()
                    batch = next(made)
                    yield batch, self.exchange(batch.ids, batch.failures)

    def exchange(
        self, ids: Sequence[int], failures: Sequence[tuple[int, str]] = ()
    ) -> Sequence[int]:
        """Tell the other processes what this one has for the step.

        Args:
            ids: The indices of its images.
            failures: The index and the reason of each image that could not be read.

        Returns:
            How many images each process has.

        Raises:
            DataError: Too many images cannot be read.
        """
        self._ids, self._made = ids, time.monotonic()
        table = self.processes.exchange([len(ids), len(failures), self.stop.signum])
        counts = [row[0] for row in table]
        self._images, self._signum = sum(counts), max(row[2] for row in table)
        if any(row[1] for row in table):
            self.unreadable.gather(failures)
        return counts

    def end_step(self, numbers: dict[str, float]) -> None:
        """Log a step, save the state now and then, and stop if a signal came.

        Raises:
            NumericError: Too many steps in a row had numbers that are not finite.
            Interrupted: SIGINT or SIGTERM came. The state after the step is on disk.
        """
        assert self._learner
        assert self._guard
        done = self._learner.step
        names = (str(self.files[index].name) for index in self._ids)
        numbers = self._guard.judge(done, numbers, names, **self._learner.facts())
        if self._log:
            seconds, making = time.monotonic() - self._begun, self._made - self._begun
            self._log.write(done, numbers, images=self._images, seconds=seconds, making=making)
        epoch, number = self._learner.plan.epoch_and_batch(done)
        if self.first and self.runtime.snapshots and number == 0:
            save_snapshot(self._run, epoch, self._learner.trained)
        # With one process a signal is heard at once; several must agree on the step.
        signum = self.stop.signum if self.processes.size == 1 else self._signum
        if signum or done % self.runtime.checkpoint_every == 0 or done == self._learner.plan.steps:
            self.save()
        if signum:
            self._interrupt(signum)

    def _interrupt(self, signum: int) -> None:
        where = "before the first step"
        if self._learner:
            if not self._learner.plan.steps:  # nothing is kept of what is fitted at once
                text = "Stopped before the end. Give the same command again to start this run anew."
                raise Interrupted(text, signum=signum)
            where = f"after step {self._learner.step} of {self._learner.plan.steps}"
        raise Interrupted(f"Stopped {where}. Give the same command again to resume.", signum=signum)

    def save_after(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Keep the steps done when images cannot be read or a data worker dies."""
        disk_or_signal = isinstance(error, SetupError | Interrupted)
        learner = self._learner
        if (
            isinstance(error, Exception)
            and not disk_or_signal
            and learner
            and learner.step_complete
        ):
            self.save()


@contextmanager
def running(
    run: Run,
    files: Sequence[ImageFile],
    runtime: Runtime,
    skipped: Sequence[Skipped],
    progress: Progress,
) -> Iterator[Session]:
    """Join the processes of torchrun, hear signals, and keep what is done if the work fails.

    Args:
        run: The folder of the run.
        files: Its images.
        runtime: How this machine works.
        skipped: Files that are left out already.
        progress: Shows how far the work is.
    """
    with (
        failures_in_words(),
        joined(runtime.device) as processes,
        StopRequest(alone=processes.size == 1) as stop,
        ExitStack() as closing,
    ):
        unreadable = Unreadable(run, files, skipped, runtime.max_unreadable, processes)
        session = Session(run, files, unreadable, runtime, processes, stop, progress, closing)
        closing.push(session.save_after)
        yield session
