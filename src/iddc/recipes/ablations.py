"""What the ablations change (Sec. 4.4), as edits of whatever experiment they are of.

from iddc.recipes.ablations import ABLATIONS
ABLATIONS["log"](RECIPES["folder"].experiment())     the default recipe with the log penalty
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iddc.config import Experiment, ObjectiveConfig

Edit = Callable[[Experiment], Experiment]


def unchanged(experiment: Experiment) -> Experiment:
    """Change nothing."""
    return experiment


def objective(**values: Any) -> Edit:
    """Set fields of the objective."""

    def edit(experiment: Experiment) -> Experiment:
        fields = experiment.objective.model_dump() | values
        return experiment.model_copy(update={"objective": ObjectiveConfig(**fields)})

    return edit


def times(field: str, factor: float) -> Edit:
    """Multiply a weight of the objective."""
    return lambda experiment: objective(**{field: getattr(experiment.objective, field) * factor})(
        experiment
    )


def plus(field: str, step: float) -> Edit:
    """Shift a threshold within [-1, 1]; auto counts as 0.2, where Fig. 7a is best."""

    def edit(experiment: Experiment) -> Experiment:
        found = getattr(experiment.objective, field)
        shifted = round((0.2 if found == "auto" else found) + step, 6)
        return objective(**{field: min(1.0, max(-1.0, shifted))})(experiment)

    return edit


def as_released(experiment: Experiment) -> Experiment:
    """Use the release's own w-, and lower the learning rate once an epoch."""
    training = experiment.training.model_copy(update={"schedule_step": "epoch"})
    weighted = objective(negative_affinity="released")(experiment)
    return weighted.model_copy(update={"training": training})


def end_to_end(experiment: Experiment) -> Experiment:
    """Let the backbone train too, from 2/5 to 4/5 of the run (Sec. 4.2.2, Table 8)."""
    training = experiment.training.model_copy(update={"end_to_end": True})
    return experiment.model_copy(update={"training": training})


ABLATIONS: dict[str, Edit] = {
    # Table 5. Without weights, every selected pair counts as 1.
    "log-unweighted": objective(penalty="log", positive_affinity=False, negative_affinity="off"),
    "linear-unweighted": objective(
        penalty="linear", positive_affinity=False, negative_affinity="off"
    ),
    "exp-unweighted": objective(penalty="exp", positive_affinity=False, negative_affinity="off"),
    "log": objective(penalty="log"),
    "linear": objective(penalty="linear"),
    # Table 6.
    "no-regularizer": objective(regularizer="none"),
    "no-negatives": objective(negative_weight=0.0),
}
"""The rows of Tables 5 and 6 that differ from the full method. Each is the recipe `ablation-NAME`
on Cityscapes, and edits any other experiment alike."""
