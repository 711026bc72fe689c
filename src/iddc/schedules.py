"""How long a run is, and what changes on the way: functions of the progress in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from iddc.config import Experiment, ScheduleStep


@dataclass(frozen=True)
class Plan:
    """The steps of a run."""

    steps: int
    """All steps of the run; 0 for a method that is fitted without any."""
    steps_per_epoch: int
    """The steps that show each image once."""
    batch_size: int = 2
    """The most images of a step, over all processes."""

    @classmethod
    def of(cls, experiment: Experiment, num_images: int) -> Plan:
        """Cut the images into batches; with `epochs` 0, repeat them up to `min_steps` steps."""
        training = experiment.training
        steps_per_epoch = max(1, math.ceil(num_images / training.batch_size))
        epochs = experiment.epochs or math.ceil(training.min_steps / steps_per_epoch)
        return cls(epochs * steps_per_epoch, steps_per_epoch, training.batch_size)

    @classmethod
    def of_steps(cls, steps: int, batch_size: int, num_images: int) -> Plan:
        """So many steps, whatever the number of images; the last epoch may be cut short."""
        return cls(steps, max(1, math.ceil(num_images / batch_size)), batch_size)

    @property
    def epochs(self) -> int:
        """The epochs that are begun."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def epoch_and_batch(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the batch in it, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def progress(self, step: int, per: ScheduleStep = "iteration") -> float:
        """The share of the run before a step, in [0, 1); per epoch, before its epoch."""
        if per == "iteration":
            return step / self.steps
        return self.epoch_and_batch(step)[0] / self.epochs


def poly(progress: float, power: float) -> float:
    """The factor (1 - t)^power of the learning rate (Sec. 4.2.2): 1 at the start, 0 at the end.

    It stays 0 after the end, where the power of a negative number would be no number.
    """
    factor: float = max(0.0, 1 - progress) ** power
    return factor


def backbone_trains(progress: float, start: float, stop: float) -> bool:
    """Whether the backbone learns now: frozen first and last, trained between (Sec. 4.2.2)."""
    return start <= progress < stop
