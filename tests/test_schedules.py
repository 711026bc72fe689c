"""The learning rate and the backbone's phases, from Sec. 4.2.2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iddc.config import Experiment, TrainingConfig
from iddc.schedules import Plan, backbone_trains, poly


def test_poly_falls_from_one_to_zero_by_the_papers_formula() -> None:
    assert poly(0.0, 0.9) == 1
    assert poly(1.0, 0.9) == 0
    assert poly(0.75, 0.5) == pytest.approx(0.5)  # sqrt(1 - 3/4)


def test_poly_stays_zero_after_the_end() -> None:
    assert poly(3.0, 0.9) == 0


def test_backbone_trains_in_the_middle_two_fifths() -> None:
    plan = Plan(steps=10, steps_per_epoch=2)
    trains = [backbone_trains(plan.progress(step), 0.4, 0.8) for step in range(plan.steps)]
    assert trains == [False] * 4 + [True] * 4 + [False] * 2


def test_per_epoch_the_rate_stays_the_same_within_an_epoch() -> None:
    plan = Plan(steps=6, steps_per_epoch=3)
    assert [plan.progress(step, "epoch") for step in range(6)] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert [plan.progress(step) for step in range(6)] == [i / 6 for i in range(6)]


def test_an_unset_number_of_epochs_reaches_the_minimum_of_steps() -> None:
    experiment = Experiment(training=TrainingConfig(batch_size=64, min_steps=400))
    assert Plan.of(experiment, 130) == Plan(134 * 3, 3, 64)  # 133 x 3 = 399


def test_a_given_number_of_epochs_is_kept() -> None:
    assert Plan.of(Experiment(epochs=5), 49_629).steps == 5 * 776


@given(images=st.integers(2, 500), batch=st.integers(2, 100), steps=st.integers(1, 1000))
def test_an_epoch_more_than_needed_is_never_planned(images: int, batch: int, steps: int) -> None:
    experiment = Experiment(training=TrainingConfig(batch_size=batch, min_steps=steps))
    plan = Plan.of(experiment, images)
    assert plan.steps - plan.steps_per_epoch < steps <= plan.steps
    assert plan.steps_per_epoch * batch >= images
