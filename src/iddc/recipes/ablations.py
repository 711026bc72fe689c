"""What the ablations change (Sec. 4.4), as edits of whatever experiment they are of.

from iddc.recipes.ablations import ABLATIONS
ABLATIONS["log"](RECIPES["folder"].experiment())     the default recipe with the log penalty
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iddc.config import Experiment, ObjectiveConfig

Edit = Callable[[Experiment], Experiment]


def identity(experiment: Experiment) -> Experiment:
    """Change nothing."""
    return experiment


def objective(**values: Any) -> Edit:
    """Set fields of the objective."""

    def edit(experiment: Experiment) -> Experiment:
        fields = experiment.objective.model_dump() | values
        return experiment.model_copy(update={"objective": ObjectiveConfig(**fields)})

    return edit


def training(**values: Any) -> Edit:
    """Set fields of the training."""
    return lambda experiment: experiment.model_copy(
        update={"training": experiment.training.model_copy(update=values)}
    )


def scaled(field: str, factor: float) -> Edit:
    """Multiply a weight of the objective."""
    return lambda experiment: objective(**{field: getattr(experiment.objective, field) * factor})(
        experiment
    )


def shifted(field: str, step: float) -> Edit:
    """Shift a threshold within [-1, 1]; auto counts as 0.2, where Fig. 7a is best."""

    def edit(experiment: Experiment) -> Experiment:
        found = getattr(experiment.objective, field)
        moved = round((0.2 if found == "auto" else found) + step, 6)
        return objective(**{field: min(1.0, max(-1.0, moved))})(experiment)

    return edit


def as_released(experiment: Experiment) -> Experiment:
    """Use the release's own w-, and lower the learning rate once an epoch."""
    weighted = objective(negative_affinity="released")(experiment)
    return training(schedule_step="epoch")(weighted)


def from_scratch(experiment: Experiment) -> Experiment:
    """IDDC of the recipe `folder` without the consensus: as in the paper, for its tables elsewhere.

    Weibull as printed then has the weight that keeps clusters alive in a few hundred steps.
    """
    paper = objective(affinity="cosine", regularizer_weight=0.3)(experiment)
    return training(start="random")(paper)


end_to_end = training(end_to_end=True)
"""Let the backbone train too, from 2/5 to 4/5 of the run (Sec. 4.2.2, Table 8)."""
UNWEIGHTED = {"positive_affinity": False, "negative_affinity": "off"}
"""Without weights, every selected pair counts as 1."""

ABLATIONS: dict[str, Edit] = {
    # Table 5.
    "log-unweighted": objective(penalty="log", **UNWEIGHTED),
    "linear-unweighted": objective(penalty="linear", **UNWEIGHTED),
    "exp-unweighted": objective(penalty="exp", **UNWEIGHTED),
    "log": objective(penalty="log"),
    "linear": objective(penalty="linear"),
    # Table 6.
    "no-regularizer": objective(regularizer="none"),
    "no-negatives": objective(negative_weight=0.0),
}
"""The rows of Tables 5 and 6 that differ from the full method. Each is the recipe `ablation-NAME`
on Cityscapes, and edits any other experiment alike."""
EDITS: dict[str, Edit] = {
    "": identity,
    "released": as_released,
    "end-to-end": end_to_end,
    **ABLATIONS,
}
"""What makes one recipe of another, by the words of `paper.RECIPES`."""
