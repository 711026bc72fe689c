"""Steps of training without files: crops in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iddc.config import Experiment
from iddc.learning.embeddings import Inputs
from iddc.learning.gradients import Pieces, StepResult
from iddc.learning.learner import Learner
from iddc.methods.method import Images, Method
from iddc.network import Network
from iddc.processes import Processes
from iddc.schedules import Plan

ONE = Processes(torch.device("cpu"))


def learner_of(
    experiment: Experiment, steps: int, per_epoch: int = 1, processes: Processes = ONE
) -> Learner:
    """A learner with so many steps before it."""
    learner = Learner(experiment, 5, processes)
    learner.plan = Plan(steps, per_epoch)
    return learner


def inputs_of(views: Tensor) -> Inputs:
    """Crops or embeddings as the input of a step."""
    ids = list(range(len(views)))
    return Inputs(views, torch.zeros(len(views), 2, 4), ids, ids, [])


def backpropagate(
    method: Method, network: Network, inputs: Tensor, images: Images, **options: Any
) -> StepResult:
    """The gradients of a method's loss on the global batch, as `Learner.learn` takes them."""
    pieces = Pieces(method, network, inputs, images, **options)
    batch, rows = pieces.forward()
    terms = method.loss(batch, rows)
    pieces.backward(terms["loss"])
    return StepResult.of(terms, batch, rows)


def learn(learner: Learner, crops: Tensor, counts: Sequence[int] | None = None) -> dict[str, float]:
    """One step on these crops."""
    return learner.learn(inputs_of(crops), counts or [len(crops)])


def images_of(
    views: Tensor,
    *,
    step: int = 0,
    total: int | None = None,
    first: int = 0,
    patches: Tensor | None = None,
) -> Images:
    """The images of these views in a step: their positions begin at `first` of `total`."""
    positions = torch.arange(first, first + len(views))
    return Images(
        seed=0,
        step=step,
        steps=9,
        total=len(views) if total is None else total,
        positions=positions,
        ids=positions,
        partners=positions,
        boxes=torch.tensor([[0, 0, 0.6, 0.6], [0.15, 0.15, 0.75, 0.75]]).expand(len(views), 2, 4),
        patches=patches,
    )
