"""Numbers that are not finite, and clusters that die: what a run does about both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iddc.backbones import Backbone
from iddc.config import (
    Experiment,
    ObjectiveConfig,
    PretrainConfig,
    Runtime,
    TrainingConfig,
    ViewsConfig,
)
from iddc.errors import NumericError
from iddc.images import ImageFile
from iddc.learning import fit
from iddc.learning.guards import live_clusters
from iddc.learning.learner import Learner
from iddc.learning.log import StepLog
from iddc.losses import Objective, Terms
from iddc.methods.iddc import Iddc
from iddc.pretraining import pretrain
from iddc.pretraining.contrast import Contrast
from iddc.pretraining.losses import GlobalBatch
from iddc.progress import SILENT, Progress
from iddc.runs import Run
from iddc.schedules import Plan
from steps import learn, learner_of
from tiny import write_photos

STEPS = 6
OFTEN = Runtime(device="cpu", workers=0, checkpoint_every=1)


def tiny(**objective: Any) -> Experiment:
    """Six steps of 8 images on a ViT of width 64."""
    thresholds = {"positive_threshold": 0.3, "negative_threshold": 0.1}
    return Experiment(
        num_clusters=4,
        backbone="untrained:test_vit",
        epochs=STEPS,
        objective=ObjectiveConfig(**thresholds | {"centering": "batch"} | objective),
        views=ViewsConfig(crop_size=32, short_side=0),
        training=TrainingConfig(batch_size=16, precision="fp32"),
    )


def small_pretraining() -> PretrainConfig:
    contrast = {"small_size": 32, "large_size": 32, "recalibration_size": 32}
    return PretrainConfig(
        method="contrast",
        network="test_resnet",
        depth=0,
        steps=STEPS,
        batch_size=16,
        components=4,
        precision="fp32",
        contrast=contrast | {"warmup": 1, "recalibration_steps": 1},
    )


@pytest.fixture
def photos(tmp_path: Path) -> list[ImageFile]:
    return write_photos(tmp_path / "photos", 16, (70, 64))


class Notes(Progress):
    """Keeps what would be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def train(
    photos: list[ImageFile], path: Path, progress: Progress = SILENT, **objective: Any
) -> Run:
    experiment = tiny(**objective)
    with Run.start(path, experiment, source="photos") as run:
        fit(photos, experiment, run, OFTEN, progress=progress)
    return run


def learn_backbone(photos: list[ImageFile], path: Path, progress: Progress = SILENT) -> Run:
    pretrain({"photos": photos}, small_pretraining(), path, OFTEN, progress=progress)
    return Run(path)


def log(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def weights(run: Run) -> bytes:
    (path,) = run.path.glob("*.safetensors")
    return path.read_bytes()


# Numbers that are not finite ----------------------------------------------------------------------


def poison_loss(terms: Terms) -> Terms:
    return Terms(terms.positive, terms.negative, terms.regularizer, terms.total * torch.nan)


def poison_gradient(terms: Terms) -> Terms:
    zero = terms.total - terms.total  # its value is 0, the gradient of its root infinite
    return Terms(terms.positive, terms.negative, terms.regularizer, terms.total + zero.sqrt())


def poison_training(
    patch: pytest.MonkeyPatch, steps: range, how: Callable[[Terms], Terms] = poison_loss
) -> None:
    """Make the loss of some steps, counted from 1, not finite."""
    sound, calls = Objective.__call__, 0

    def poisoned(self: Objective, *args: Any) -> Terms:
        nonlocal calls
        calls += 1
        return how(sound(self, *args)) if calls in steps else sound(self, *args)

    patch.setattr(Objective, "__call__", poisoned)


def poison_pretraining(patch: pytest.MonkeyPatch, steps: range) -> None:
    sound = Contrast.losses

    def poisoned(self: Contrast, batch: Any, everyone: GlobalBatch) -> dict[str, Tensor]:
        worth = math.inf if everyone.step + 1 in steps else 1
        return {name: term * worth for name, term in sound(self, batch, everyone).items()}

    patch.setattr(Contrast, "losses", poisoned)


KINDS = {
    "training": (train, poison_training, "--training.learning-rate"),
    "pretraining": (learn_backbone, poison_pretraining, "--contrast.learning-rate"),
}


@pytest.mark.parametrize("how", [poison_loss, poison_gradient])
def test_a_step_that_is_not_finite_changes_no_weight(
    monkeypatch: pytest.MonkeyPatch, how: Callable[[Terms], Terms]
) -> None:
    crops = torch.randint(0, 256, (4, 2, 3, 32, 32), dtype=torch.uint8)
    learner = learner_of(tiny(), 9)

    def everything() -> list[Tensor]:
        adam = [x for state in learner.optimizer.state.values() for x in state.values()]
        return [x.clone() for x in (*learner.network.parameters(), *adam, learner.cluster_shares)]

    learn(learner, crops)
    before = everything()
    poison_training(monkeypatch, range(1, 2), how)
    numbers = learn(learner, crops)
    assert not all(map(math.isfinite, numbers.values()))
    assert learner.step == 2
    assert all(map(torch.equal, before, everything()))


@pytest.mark.parametrize(("work", "poison", "_"), KINDS.values(), ids=KINDS)
def test_two_steps_that_are_not_finite_are_left_out_and_said(
    photos: list[ImageFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[..., Run],
    poison: Callable[..., None],
    _: str,
) -> None:
    poison(monkeypatch, range(3, 5))
    report = Notes()
    run = work(photos, tmp_path / "run", report)
    assert ["loss" in line for line in log(run)] == [True, True, False, False, True, True]
    assert all(line["not_finite"] >= 1 for line in log(run)[2:4])
    said = [line for line in report.lines if "left out" in line]
    assert [re.findall(r"step (\d)", line) for line in said] == [["3"], ["4"]]
    assert all(re.search("loss (nan|inf)", line) for line in said)
    assert run.checkpoint.exists() is False
    assert not (run.path / "diagnosis.json").exists()


@pytest.mark.parametrize(("work", "poison", "option"), KINDS.values(), ids=KINDS)
def test_three_steps_in_a_row_end_the_run_at_its_last_good_state_with_a_diagnosis(
    photos: list[ImageFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[..., Run],
    poison: Callable[..., None],
    option: str,
) -> None:
    expected = weights(work(photos, tmp_path / "sound"))
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, range(3, 99))
        with pytest.raises(NumericError, match=rf"step 5.*diagnosis\.json.*{option}") as caught:
            work(photos, path)
    assert caught.value.exit_code == 5
    assert torch.load(path / "checkpoint" / "state.pt", weights_only=True)["step"] == 2
    seen = json.loads((path / "diagnosis.json").read_text())
    assert seen["format_version"] == 1
    assert option in seen["advice"]
    assert [step["step"] for step in seen["steps"]] == [3, 4, 5]
    for step in seen["steps"]:
        assert step["loss"] in ("nan", "inf")
        assert step["learning_rate"] > 0
        assert {*step["images"]} == {file.name.name for file in photos}
    if work is train:
        assert sum(seen["shares"]) == pytest.approx(1)
        assert isinstance(seen["steps"][0]["positive"], float)
    assert weights(work(photos, path)) == expected
    assert not (path / "diagnosis.json").exists()


def test_a_run_of_two_steps_is_not_finished_when_none_was_finite(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_training(monkeypatch, range(99))
    experiment = tiny().model_copy(update={"epochs": 2})
    with (
        Run.start(tmp_path / "run", experiment, source="photos") as run,
        pytest.raises(NumericError, match="at step 2, nor at the 1 before"),
    ):
        fit(photos, experiment, run, OFTEN)
    assert not run.finished


def test_embeddings_that_are_not_finite_are_named(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, images: sound(self, images) * torch.nan)
    with pytest.raises(NumericError, match="embeddings nan"):
        train(photos, tmp_path / "run", positive_threshold="auto", negative_threshold="auto")


# Clusters that die --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "live"),
    [
        ([0.25] * 4, 4),
        ([0.5, 0.5, 0, 0], 2),
        ([0.95, 0.026, 0.02, 0.004], 2),  # a tenth of a quarter is 0.025
        ([0.499, 0.499, *[0.002 / 9] * 9], 2),  # decision 001: each of the nine wins some patch
    ],
)
def test_a_cluster_lives_if_it_has_a_tenth_of_an_even_share(shares: list[float], live: int) -> None:
    assert live_clusters(torch.tensor(shares)) == live


@given(sizes=st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any))
def test_some_cluster_is_always_alive(sizes: list[int]) -> None:
    shares = torch.tensor(sizes) / sum(sizes)
    assert 1 <= live_clusters(shares) <= torch.count_nonzero(shares)


def test_shares_and_losses_are_those_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.learning.learner.RECENT", 4)
    crops = torch.randint(0, 256, (4, 2, 3, 32, 32), dtype=torch.uint8)
    training = TrainingConfig(batch_size=4, precision="fp32", learning_rate=1e-12)
    learner = learner_of(tiny().model_copy(update={"training": training}), 99)
    bias: Any = learner.network.head[-1].bias
    found, loss = [], 0.0
    for step, winner in enumerate((0, 0, 1, 1, 1)):  # of all patches
        bias.data[:] = torch.eye(4)[winner] * 10 ** (1 + step % 2)
        said = learn(learner, crops)["loss"]
        loss += (said - loss) / min(step + 1, 4)
        assert learner.losses.tolist() == pytest.approx([loss], rel=1e-5)
        found.append(learner.cluster_shares[0, 1].item())
    # The mean of the steps so far, and from the fourth on 3/4 of the last and 1/4 of the new one.
    assert found == pytest.approx([0, 0, 1 / 3, 1 / 2, 5 / 8])


def diary(tmp_path: Path, report: Notes, steps: int = 100, **objective: Any) -> StepLog:
    plan = Plan(steps, 1)
    experiment = tiny(**objective)
    advice = Iddc.advice(experiment)
    return StepLog(Run(tmp_path), plan, report, num_clusters=4, advice=advice)


def write(book: StepLog, report: Notes, lives: dict[int, int]) -> list[int]:
    """The steps at which a warning came, where so many clusters were alive."""
    report.update = lambda *_: None  # type: ignore[method-assign]
    warned = []
    for step, live in lives.items():
        number = len(report.lines)
        book.write(step, {"live_clusters": float(live)}, images=2, seconds=0.1, making=0.0)
        warned += [step] * (len(report.lines) - number)
    return warned


def test_live_clusters_are_shown_after_the_loss(tmp_path: Path) -> None:
    report, shown = Notes(), []
    report.update = lambda *given: shown.append(given[1:3])  # type: ignore[method-assign]
    book = diary(tmp_path, report)
    numbers = {"loss": 1.5, "positive": 0.25, "live_clusters": 3.0}
    book.write(1, numbers, images=2, seconds=0.1, making=0.0)
    assert shown == [("epoch 1/100", "loss 1.50  3 of 4 clusters alive  positive 0.25")]


def test_fewer_than_half_alive_is_warned_about_once_and_at_the_end(tmp_path: Path) -> None:
    report = Notes()
    book = diary(tmp_path, report)
    assert write(book, report, {10: 1, 49: 1, 50: 2, 60: 1, 61: 1, 99: 0, 100: 1}) == [60, 100]
    assert "after step 60 only 1 of 4 clusters" in report.lines[0]


def test_half_alive_is_no_reason_to_warn(tmp_path: Path) -> None:
    report = Notes()
    assert write(diary(tmp_path, report), report, {50: 2, 60: 3, 100: 2}) == []


@pytest.mark.parametrize(
    ("objective", "hints"),
    [
        ({"regularizer": "weibull", "regularizer_weight": 0.3}, "a larger .* than 0.3 or fewer"),
        ({"regularizer": "entropy"}, "--objective.regularizer weibull, a larger"),
        ({"centering": "none"}, "--objective.centering batch, a larger"),
    ],
)
def test_the_warning_says_what_to_change(
    tmp_path: Path, objective: dict[str, Any], hints: str
) -> None:
    report = Notes()
    write(diary(tmp_path, report, **objective), report, {60: 1})
    assert re.search(hints, report.lines[0])


def test_a_run_in_which_clusters_die_says_so(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, sound = Notes(), Learner.__init__

    def collapsed(self: Learner, *args: Any) -> None:
        sound(self, *args)
        self.network.head[-1].bias.data[0] = 1e3  # type: ignore[index]

    monkeypatch.setattr(Learner, "__init__", collapsed)
    train(photos, tmp_path / "run", report)
    assert any("only 1 of 4 clusters" in line for line in report.lines)
