"""The loop: the value of a step, what trains when, and what a run survives."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from iddc.backbones import Backbone, save_backbone, untrained_backbone
from iddc.config import Experiment, ObjectiveConfig, Runtime, TrainingConfig, ViewsConfig
from iddc.errors import ConfigError, DataError, IddcError, Interrupted, SetupError
from iddc.images import ImageFile, Skipped, find_images
from iddc.learning import fit, trained_run
from iddc.learning.batches import failures_in_words, loaded_batches
from iddc.learning.checkpoint import digest, load_state
from iddc.learning.embeddings import EmbeddingCache, Shared, Wanted
from iddc.learning.gradients import images_at_once
from iddc.learning.learner import Learner
from iddc.losses import Objective, Pixels
from iddc.methods import build_method
from iddc.network import build_head, build_network, embed_crops
from iddc.processes import Processes, joined
from iddc.progress import Progress
from iddc.runs import Run
from iddc.samples import Sampler, Wholes
from iddc.schedules import Plan, poly
from iddc.segmenter import Segmenter
from iddc.thresholds import resolve_thresholds, thresholds_of
from iddc.views import ViewDataset, collate_views, draw_rolls
from steps import backpropagate, images_of, learn, learner_of
from tiny import write_photos
from torchrun import in_processes

# Tests fork to be quick; Python 3.12 warns of it where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

STEPS = 6
ONE = Processes(torch.device("cpu"))
QUIET = Runtime(device="cpu", workers=0)


def tiny(**changes: Any) -> Experiment:
    """Six steps on a ViT of width 64: 5 images in batches of 3 and 2, 3 epochs."""
    training = TrainingConfig(batch_size=3, precision="fp32", **changes.pop("training", {}))
    return Experiment(
        num_clusters=4,
        backbone="untrained:test_vit",
        epochs=3,
        objective=ObjectiveConfig(
            centering="batch", positive_threshold=0.3, negative_threshold=0.1
        ),
        views=ViewsConfig(crop_size=64, short_side=0),
        training=training,
        **changes,
    )


@pytest.fixture
def photos(tmp_path: Path) -> list[ImageFile]:
    return write_photos(tmp_path / "photos", 5)


def start(tmp_path: Path, experiment: Experiment, name: str = "run") -> Run:
    return Run.start(tmp_path / name, experiment, source="photos")


def weights(run: Run) -> bytes:
    return (run.path / "model.safetensors").read_bytes()


def log(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def skipped_rows(run: Run) -> list[list[str]]:
    return list(csv.reader((run.path / "skipped.csv").read_text().splitlines()))[1:]


def damage(file: ImageFile) -> None:
    file.path.write_bytes(file.path.read_bytes()[:200])


# The value of a step ------------------------------------------------------------------------------


def step_of(
    crops: Tensor,
    *,
    processes: Processes = ONE,
    counts: Sequence[int] | None = None,
    micro_batch_size: int = 64,
    train_backbone: bool = True,
    precision: Any = "fp32",
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss and all gradients, as one vector, of a step on these crops."""
    experiment = tiny()
    names = ("positive_weight", "negative_weight", "regularizer_weight")
    scaled = {name: weight * getattr(experiment.objective, name) for name in names}
    objective = experiment.objective.model_copy(update={**scaled, "negatives": 2})
    experiment = experiment.model_copy(update={"objective": objective})
    network = build_network(experiment)
    network.backbone.requires_grad_(train_backbone)
    counts = counts or [len(crops)]
    result = backpropagate(
        build_method(experiment, network),
        network,
        crops,
        images_of(crops, total=sum(counts), first=sum(counts[: processes.rank])),
        processes=processes,
        counts=counts,
        at_once=micro_batch_size,
        precision=precision,
        train_backbone=train_backbone,
    )
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return result.terms["loss"], torch.cat(gradients)


@pytest.fixture
def crops() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(10, 3, 4, 4, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")
    return fine.to(torch.uint8).unflatten(0, (5, 2))


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("train_backbone", [False, True], ids=["frozen", "end to end"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(
    crops: Tensor, micro_batch_size: int, train_backbone: bool
) -> None:
    loss, gradients = step_of(crops, train_backbone=train_backbone)
    parts_loss, parts = step_of(
        crops, train_backbone=train_backbone, micro_batch_size=micro_batch_size
    )
    assert relative(parts_loss, loss) < 1e-6
    assert relative(parts, gradients) < 1e-6


@pytest.mark.parametrize("train_backbone", [False, True], ids=["frozen", "end to end"])
@pytest.mark.parametrize(
    ("place", "call", "micro_batch_size"),
    [
        ("iddc.methods.iddc.patch_logits", 1, 64),
        ("iddc.methods.iddc.patch_logits", 2, 4),
        ("torch.autograd.backward", 1, 64),
        ("torch.autograd.backward", 2, 4),
    ],
    ids=["forward, whole", "forward, in two", "backward, whole", "backward, in two"],
)
def test_a_step_that_runs_out_of_memory_is_repeated_in_halves_with_the_same_value(
    place: str,
    call: int,
    micro_batch_size: int,
    train_backbone: bool,
    crops: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss, gradients = step_of(crops, train_backbone=train_backbone)
    module, name = place.rsplit(".", 1)
    real, calls = getattr(importlib.import_module(module), name), 0

    def short_once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError
        return real(*args, **options)

    monkeypatch.setattr(place, short_once)
    with pytest.warns(UserWarning, match="not enough free memory: the same again with"):
        short_loss, short = step_of(
            crops, train_backbone=train_backbone, micro_batch_size=micro_batch_size
        )
    assert calls > call
    assert relative(short_loss, loss) < 1e-6
    assert relative(short, gradients) < 1e-6


def test_a_run_that_runs_out_of_memory_says_it_once_and_goes_on_in_halves(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, notes = list[int](), list[str]()

    def short(network: Any, crops: Tensor, precision: Any) -> Tensor:
        at_once.append(len(crops) // 2)
        if len(crops) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return embed_crops(network, crops, precision)

    class Notes(Progress):
        def note(self, line: str) -> None:
            notes.append(line)

    monkeypatch.setattr("iddc.learning.gradients.embed_crops", short)
    fit(photos, tiny(), start(tmp_path, tiny()), QUIET, progress=Notes())
    assert at_once[:3] == [3, 2, 1]
    assert max(at_once[1:]) == 2
    halved = "not enough free memory: the same again with 2 images at once"
    assert [line for line in notes if "memory" in line] == [halved]


def test_a_loss_that_does_not_fit_in_memory_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match="loss of a whole batch"), failures_in_words():
        raise torch.OutOfMemoryError


def test_the_gradients_are_those_of_the_plain_objective(crops: Tensor) -> None:
    network = build_network(tiny())
    features = network.embed(crops.flatten(0, 1))
    probs = network.logits_from(features).softmax(1).flatten(2).transpose(1, 2).unflatten(0, (5, 2))
    vectors = features.detach().flatten(2).transpose(1, 2).unflatten(0, (5, 2))
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    first, second = (Pixels(vectors[:, i], probs[:, i]) for i in (0, 1))
    rolls = draw_rolls(5, 2, 0, 0)
    Objective(tiny().objective)(first, second, rolls).total.backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert relative(step_of(crops)[1], expected) < 1e-5


@pytest.mark.parametrize("counts", [[2, 3], [5, 0]], ids=["uneven", "one process without images"])
@pytest.mark.parametrize("micro_batch_size", [2, 64])
def test_two_processes_give_the_loss_and_gradients_of_one(
    crops: Tensor, tmp_path: Path, counts: list[int], micro_batch_size: int
) -> None:
    loss, gradients = step_of(crops)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        with joined("cpu") as processes:
            own = torch.split(crops, counts)[rank]
            return step_of(
                own, processes=processes, counts=counts, micro_batch_size=micro_batch_size
            )

    for their_loss, theirs in in_processes(2, work, tmp_path):
        assert relative(their_loss, loss) < 1e-6
        assert relative(theirs, gradients) < 1e-6


def test_fp16_keeps_gradients_that_it_cannot_represent(crops: Tensor) -> None:
    _, expected = step_of(crops, weight=1e-6)
    _, gradients = step_of(crops, weight=1e-6, precision="fp16")
    assert float(expected.abs().median()) < 2**-24  # half precision has no smaller number
    assert relative(gradients, expected) < 0.1


def test_the_papers_batch_is_one_forward_pass_of_vit_s16_on_a_cpu() -> None:
    class VitS16(Backbone):
        patch_size = 16
        embed_dim = 384

    backbone = VitS16.__new__(VitS16)  # its size is all that counts
    assert images_at_once(backbone, 224, torch.device("cpu"), end_to_end=False) >= 64


def test_a_backbone_that_trains_keeps_17_numbers_a_channel_of_each_block() -> None:
    """The head keeps as many as one block of 12, in embeddings of a patch."""
    backbone = untrained_backbone("vit_tiny_patch16_224", options={"depth": 12})
    frozen, trained = (
        images_at_once(backbone, 32, torch.device("cpu"), end_to_end=end_to_end)
        for end_to_end in (False, True)
    )
    assert frozen / trained == pytest.approx((12 + 12 * 17) / 12, rel=0.15)


@given(items=st.lists(st.integers(), max_size=20), size=st.integers(1, 8))
def test_processes_share_all_items_evenly(items: list[int], size: int) -> None:
    shares = [list(Processes(torch.device("cpu"), rank, size).split(items)) for rank in range(size)]
    assert list(chain(*shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# What trains when ---------------------------------------------------------------------------------


def moves(experiment: Experiment, crops: Tensor, steps: int) -> list[tuple[bool, bool]]:
    """For each step of a run, whether the backbone's weights moved and whether the head's did."""
    learner = learner_of(experiment, steps, 1)

    def copy(module: torch.nn.Module) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    result = []
    for _ in range(steps):
        before = copy(learner.network.backbone), copy(learner.network.head)
        learn(learner, crops, [len(crops)])
        after = copy(learner.network.backbone), copy(learner.network.head)
        result.append((not torch.equal(before[0], after[0]), not torch.equal(before[1], after[1])))
    return result


def test_end_to_end_the_backbone_moves_in_the_middle_two_fifths_and_only_there(
    crops: Tensor,
) -> None:
    experiment = tiny(training={"end_to_end": True, "backbone_learning_rate": 1e-3})
    backbone, head = zip(*moves(experiment, crops, 10), strict=True)
    assert backbone == (False,) * 4 + (True,) * 4 + (False,) * 2
    assert all(head)


def test_head_and_backbone_learn_at_their_own_rates(crops: Tensor) -> None:
    training = {"end_to_end": True, "learning_rate": 1e-2, "backbone_learning_rate": 1e-5}
    learner = learner_of(tiny(training=training), 4, 1)
    learner.step = 2
    learn(learner, crops, [len(crops)])
    head, backbone = (group["lr"] for group in learner.optimizer.param_groups)
    assert head == pytest.approx(1e-2 * 0.5**0.9)
    assert backbone == pytest.approx(1e-5 * 0.5**0.9)


def test_a_frozen_backbone_never_moves(crops: Tensor) -> None:
    backbone, head = zip(*moves(tiny(), crops, 3), strict=True)
    assert not any(backbone)
    assert all(head)


def test_the_objective_falls(crops: Tensor) -> None:
    learner = learner_of(tiny(training={"learning_rate": 1e-2}), 25, 1)
    losses = [learn(learner, crops, [5])["loss"] for _ in range(25)]
    assert losses[-1] < losses[0] - 0.2


def test_a_head_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="iddc does not train the head centroids"):
        learner_of(tiny(method="iddc", head="centroids"), 1, 1)


def test_the_callers_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_network(tiny())
    assert torch.rand(1) == expected


# A whole run --------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_and_one_line_per_step(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    experiment = tiny()
    with start(tmp_path, experiment) as run:
        segmenter = Segmenter.of(fit(photos, experiment, run, QUIET), experiment)
    assert run.finished
    assert segmenter.predict(photos[0].path).clusters.shape == (80, 90)
    lines = log(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2, 3, 3]
    assert sorted(line["images"] for line in lines) == [2, 2, 2, 3, 3, 3]
    rates = [5e-4 * poly(step / STEPS, 0.9) for step in range(STEPS)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    for line in lines:
        assert line["loss"] == pytest.approx(
            line["positive"] + 1.4 * line["negative"] + 0.4 * line["regularizer"], rel=1e-5
        )
        assert 1 <= line["live_clusters"] <= 4
    assert skipped_rows(run) == []


def test_the_number_of_workers_does_not_change_the_batches(photos: list[ImageFile]) -> None:
    experiment = tiny()
    plan = Plan.of(experiment, len(photos))
    cache = repeated(experiment)
    alone, shared = [], []
    for workers, batches in ((0, alone), (2, shared)):
        steps = range(1, STEPS)
        with loaded_batches(
            photos, experiment, plan, ONE, workers, cache, own_views, steps
        ) as loaded:
            batches.extend(loaded)
    assert len(alone) == STEPS - 1
    for (wanted, one), (other_wanted, other) in zip(alone, shared, strict=True):
        assert wanted == other_wanted
        assert one.indices == other.indices
        assert torch.equal(one.crops, other.crops)


# Views that come again ----------------------------------------------------------------------------


def repeating(**changes: Any) -> Experiment:
    """As `tiny`, 6 epochs of 2 steps, but an image has the crops of epochs 0 and 1 alone."""
    views = ViewsConfig(crop_size=64, short_side=0, repeat=2)
    return tiny(**changes).model_copy(update={"views": views, "epochs": 6})


def own_views(ids: Sequence[int], step: int) -> Sequence[int]:
    return ids


def repeated(experiment: Experiment) -> EmbeddingCache:
    return EmbeddingCache(build_network(experiment), experiment, ONE.device, 64)


def test_views_come_again_after_so_many_epochs(photos: list[ImageFile]) -> None:
    views = repeated(repeating())
    assert views.keys(5, [3, 1]) == [(1, 3), (1, 1)]
    assert repeated(tiny()).keys(5, [3, 1]) == [(5, 3), (5, 1)]


def test_a_view_that_comes_again_is_made_once(photos: list[ImageFile]) -> None:
    experiment = repeating()
    plan = Plan.of(experiment, len(photos))
    views = repeated(experiment)
    made = []
    steps = range(plan.steps)
    with loaded_batches(photos, experiment, plan, ONE, 0, views, own_views, steps) as loaded:
        for wanted, batch in loaded:
            made.append(len(batch.indices))
            assert len(views.inputs(wanted, batch).views) == len(wanted.first)
    assert made == [3, 2, 3, 2] + 8 * [0]


def test_kept_embeddings_are_those_of_the_crops_in_half_precision(photos: list[ImageFile]) -> None:
    experiment = repeating()
    views = repeated(experiment)
    dataset = ViewDataset(photos, experiment.views, experiment.seed)
    keys = [(1, 4), (1, 2)]
    batch = collate_views([dataset[key] for key in views.missing(keys)])
    network = build_network(experiment)
    with torch.no_grad():
        expected = torch.stack([network.embed(crops) for crops in batch.crops])
    made = views.inputs(Wanted(keys, keys), batch)
    again = views.inputs(Wanted(keys[::-1], keys[::-1]), collate_views([]))
    for found in (made.views, again.views.flip(0)):
        assert torch.equal(found, expected.half().float())
    assert torch.equal(again.boxes.flip(0), batch.boxes)


def test_runs_that_share_embeddings_make_them_once_and_end_with_the_same_bits(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = repeating().model_copy(update={"head": "linear"})
    alone = start(tmp_path, other, "alone")
    fit(photos, other, alone, QUIET)
    shared = Shared()
    fit(photos, repeating(), start(tmp_path, repeating(), "first"), QUIET, shared=shared)
    assert len(shared.views) == 2 * len(photos)
    monkeypatch.setattr("iddc.learning.embeddings.embed_crops", refuse)
    second = start(tmp_path, other, "second")
    fit(photos, other, second, QUIET, shared=shared)
    assert weights(second) == weights(alone)


@pytest.mark.parametrize(
    ("backbone", "room", "kept"),
    [("saved", 10**9, 4), ("saved", 50_000, 1), ("saved", 0, 0), ("untrained:test_vit", 10**9, 0)],
)
def test_runs_of_several_seeds_embed_whole_images_once_and_end_with_the_same_bits(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    backbone: str, room: int, kept: int,
) -> None:  # fmt: skip
    """Random weights follow from the seed, so that nothing is shared."""
    damage(photos[1])  # between others that are kept
    embedded: list[int] = []
    embed = Sampler._embed

    def counted(self: Sampler, images: Tensor) -> Tensor:
        embedded.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Sampler, "_embed", counted)
    if backbone == "saved":
        backbone = str(tmp_path / "backbone")
        save_backbone(untrained_backbone("test_vit"), Path(backbone))
    shared = Shared(wholes=Wholes(room))
    lenient = QUIET.model_copy(update={"max_unreadable": 0.5})
    for seed in (0, 1):
        changes = {"method": "consensus", "seed": seed, "num_clusters": 2}
        experiment = tiny().model_copy(update={**changes, "backbone": backbone})
        alone, one = start(tmp_path, experiment, f"alone{seed}"), f"shared{seed}"
        fit(photos, experiment, alone, lenient)
        embedded.clear()
        fit(photos, experiment, start(tmp_path, experiment, one), lenient, shared=shared)
        assert weights(Run(tmp_path / one)) == weights(alone)
        assert skipped_rows(Run(tmp_path / one)) == skipped_rows(alone) != []
        assert embedded == [2] * (4 - kept * seed)


def refuse(*_: object) -> Tensor:
    raise AssertionError("this has been done before")


@pytest.mark.parametrize("room", [0, 3, 7])
def test_memory_for_kept_embeddings_changes_no_bit_of_the_result(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    experiment = repeating()
    plenty = start(tmp_path, experiment, "plenty")
    fit(photos, experiment, plenty, QUIET)
    bytes_each = 2 * 2 * 64 * 16  # two crops of 4 x 4 patches of width 64, in half precision
    monkeypatch.setattr("iddc.learning.embeddings.MEMORY", room * bytes_each)
    little = start(tmp_path, experiment, "little")
    fit(photos, experiment, little, QUIET)
    assert weights(little) == weights(plenty)


def cut_and_resumed(
    photos: list[ImageFile],
    tmp_path: Path,
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    *,
    done: int,
    checkpoint_every: int,
) -> Run:
    """A run that stopped after so many steps, between two checkpoints, and was given again."""
    cut, learn = start(tmp_path, experiment, "cut"), Learner.learn

    def interrupted(self: Learner, *arguments: Any) -> dict[str, float]:
        if self.step == done:
            raise KeyboardInterrupt
        return learn(self, *arguments)

    runtime = QUIET.model_copy(update={"checkpoint_every": checkpoint_every})
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(photos, experiment, cut, runtime)
    cut._held.close()
    fit(photos, experiment, start(tmp_path, experiment, "cut"), QUIET)
    return cut


def test_a_run_with_kept_embeddings_goes_on_to_the_same_bytes(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = repeating()
    whole = start(tmp_path, experiment, "whole")
    fit(photos, experiment, whole, QUIET)
    cut = cut_and_resumed(photos, tmp_path, experiment, monkeypatch, done=7, checkpoint_every=5)
    assert weights(cut) == weights(whole)


def test_an_unreadable_image_is_left_out_each_time_it_comes_again(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    damage(photos[2])
    run = start(tmp_path, repeating())
    fit(photos, repeating(), run, QUIET.model_copy(update={"max_unreadable": 0.5}))
    assert sum(line["images"] for line in log(run)) == 6 * 4
    assert len(skipped_rows(run)) == 1


def test_an_end_to_end_run_embeds_anew(photos: list[ImageFile]) -> None:
    views = repeated(repeating(training={"end_to_end": True}))
    keys = views.keys(0, [0, 1])
    assert views.missing(keys) == views.missing(keys) == keys


# Thresholds from the images -----------------------------------------------------------------------


def automatic() -> Experiment:
    objective = tiny().objective.model_copy(
        update={"positive_threshold": "auto", "negative_threshold": "auto"}
    )
    return tiny().model_copy(update={"objective": objective})


def test_automatic_thresholds_are_those_of_the_first_batch_and_stay(crops: Tensor) -> None:
    learner = learner_of(automatic(), 6, 2)
    numbers = learn(learner, crops, [5])
    with torch.no_grad():
        maps = build_network(automatic()).embed(crops.flatten(0, 1))
    vectors = maps.movedim(1, -1).flatten(0, 2)
    expected = resolve_thresholds(automatic().objective, vectors, 4)
    # All 160 patches are compared by both, in another order.
    assert numbers["positive_threshold"] == pytest.approx(expected.positive_threshold, abs=0.05)
    assert numbers["positive_threshold"] == numbers["negative_threshold"]
    assert "positive_threshold" not in learn(learner, crops.flip(0), [5])


def test_automatic_thresholds_are_the_same_as_when_they_are_given(crops: Tensor) -> None:
    learner = learner_of(automatic(), 6, 2)
    numbers = learn(learner, crops, [5])
    given = {name: numbers[name] for name in ("positive_threshold", "negative_threshold")}
    objective = automatic().objective.model_copy(update=given)
    other = learn(learner_of(automatic().model_copy(update={"objective": objective}), 6, 2), crops)
    assert other["loss"] == numbers["loss"]


def test_automatic_thresholds_do_not_depend_on_the_number_of_processes(
    crops: Tensor, tmp_path: Path
) -> None:
    counts = [2, 3]
    alone = learn(learner_of(automatic(), 6, 2), crops)

    def work(rank: int) -> dict[str, float]:
        with joined("cpu") as processes:
            learner = learner_of(automatic(), 6, 2, processes)
            return learn(learner, torch.split(crops, counts)[rank], counts)

    for numbers in in_processes(2, work, tmp_path):
        assert numbers["positive_threshold"] == alone["positive_threshold"]


def test_a_run_with_automatic_thresholds_goes_on_with_them(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    whole = start(tmp_path, automatic(), "whole")
    fit(photos, automatic(), whole, QUIET)
    learner = learner_of(automatic(), 6, 2)
    dataset = ViewDataset(photos, automatic().views, 0)
    batch = collate_views([dataset[0, index] for index in range(3)])
    learn(learner, batch.crops, [3])
    other = learner_of(automatic(), 6, 2)
    other.restore(learner.state())
    assert thresholds_of(other.method.objective.config) == thresholds_of(
        learner.method.objective.config
    )
    assert "auto" not in thresholds_of(other.method.objective.config)
    (first, *rest) = log(whole)
    assert isinstance(first["positive_threshold"], float)
    assert not any("positive_threshold" in line for line in rest)


# A part of the patches ----------------------------------------------------------------------------


def test_the_loss_of_some_patches_is_that_of_these_alone(crops: Tensor) -> None:
    patches = torch.tensor([[0, 5, 9], [3, 4, 15]])
    network = build_network(tiny())
    features = network.embed(crops.flatten(0, 1)).unflatten(0, (5, 2)).detach()
    logits = network.logits_from(features.flatten(0, 1)).unflatten(0, (5, 2))
    pixels = []
    for i in (0, 1):
        vectors = features[:, i].flatten(2).transpose(1, 2)[:, patches[i]]
        probs = logits[:, i].flatten(2).transpose(1, 2)[:, patches[i]].softmax(-1)
        pixels.append(Pixels(vectors / vectors.norm(dim=-1, keepdim=True), probs))
    expected = Objective(tiny().objective)(*pixels, draw_rolls(5, 3, 0, 0)).total
    expected.backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    for inputs in (crops, features):
        other = build_network(tiny())
        found = backpropagate(
            build_method(tiny(), other),
            other,
            inputs,
            images_of(inputs, patches=patches),
            processes=ONE,
            counts=[5],
            at_once=2,
        )
        assert relative(found.terms["loss"], expected.detach()) < 1e-5
        own = [p.grad.flatten() for p in other.parameters() if p.grad is not None]
        assert relative(torch.cat(own), torch.cat(gradients)) < 1e-5


def test_some_patches_are_compared_if_asked_for(crops: Tensor) -> None:
    found = []
    for patches in (0, 5, 16, 99):
        learner = learner_of(tiny(training={"patches": patches}), 6, 2)
        found.append(learn(learner, crops, [5])["loss"])
    assert found[0] == found[2] == found[3] != found[1]


def test_two_processes_train_as_one(photos: list[ImageFile], tmp_path: Path) -> None:
    experiment = tiny()
    with start(tmp_path, experiment, "one") as one:
        fit(photos, experiment, one, QUIET)

    def work(_rank: int) -> Tensor:
        with start(tmp_path, experiment, "two") as run:
            segmenter = Segmenter.of(fit(photos, experiment, run, QUIET), experiment)
        head = segmenter.network.head
        return torch.cat([parameter.detach().flatten() for parameter in head.parameters()])

    first, second = in_processes(2, work, tmp_path)
    assert torch.equal(first, second)
    two = Run.open(tmp_path / "two")
    assert [line["images"] for line in log(two)] == [line["images"] for line in log(one)]
    losses = [line["loss"] for line in log(one)]
    assert [line["loss"] for line in log(two)] == pytest.approx(losses, rel=1e-3)


def test_training_opens_no_label_file(photos: list[ImageFile], tmp_path: Path) -> None:
    labels = photos[0].path.parent / "labels"
    labels.mkdir()
    for file in photos:
        Image.new("L", (90, 80)).save(labels / file.path.name)
    opened: list[str] = []
    listening = True

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if listening and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(hear)
    experiment = tiny()
    with start(tmp_path, experiment) as run:
        fit(find_images(photos[0].path.parent).files, experiment, run, QUIET)
    listening = False
    assert str(photos[0].path) in opened
    assert not [name for name in opened if "labels" in name]


def test_tensorboard_gets_the_terms(photos: list[ImageFile], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    experiment = tiny()
    with start(tmp_path, experiment) as run:
        fit(photos, experiment, run, QUIET.model_copy(update={"tensorboard": True}))
    assert list((run.path / "tensorboard").glob("events*"))


def test_a_missing_tensorboard_is_said_before_training(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    experiment = tiny()
    with start(tmp_path, experiment) as run, pytest.raises(SetupError, match="pip install"):
        fit(photos, experiment, run, QUIET.model_copy(update={"tensorboard": True}))
    assert not (run.path / "log.jsonl").exists()


# Interruption and resuming ------------------------------------------------------------------------


class At(Progress):
    """Does something once a step is done and written down."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        super().__init__()
        self.step = step
        self.action = action

    def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None:
        if done == self.step:
            self.action()


@pytest.fixture
def expected(photos: list[ImageFile], tmp_path: Path) -> bytes:
    """The weights of a run that nothing disturbs."""
    experiment = tiny(training={"end_to_end": True})
    with start(tmp_path, experiment, "undisturbed") as run:
        fit(photos, experiment, run, QUIET)
    return weights(run)


def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(
    photos: list[ImageFile], tmp_path: Path, expected: bytes
) -> None:
    experiment = tiny(training={"end_to_end": True})
    rng = random.Random(0)
    often = QUIET.model_copy(update={"checkpoint_every": 2})

    def train() -> None:
        slow = At(-1, lambda: None)
        slow.update = lambda *_: time.sleep(0.02)  # type: ignore[method-assign]
        with start(tmp_path, experiment) as run:
            fit(photos, experiment, run, often, progress=slow)

    path = tmp_path / "run" / "log.jsonl"
    kills = 0
    for _ in range(5):
        child = multiprocessing.get_context("fork").Process(target=train)
        child.start()
        step = rng.randint(1, STEPS)
        while child.is_alive() and not (path.exists() and path.read_text().count("\n") >= step):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if (tmp_path / "run" / "model.json").exists():
            break
    assert kills >= 2
    if not Run(tmp_path / "run").finished:
        with start(tmp_path, experiment) as run:
            fit(photos, experiment, run, often)
    run = Run.open(tmp_path / "run")
    assert weights(run) == expected
    assert [line["step"] for line in log(run)] == list(range(1, STEPS + 1))
    assert not list(run.path.rglob("*.tmp"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_the_run_goes_on(
    photos: list[ImageFile], tmp_path: Path, expected: bytes, signum: int, code: int
) -> None:
    experiment = tiny(training={"end_to_end": True})
    before = signal.getsignal(signum)
    with start(tmp_path, experiment) as run, pytest.raises(Interrupted) as caught:
        fit(photos, experiment, run, QUIET, progress=At(3, lambda: signal.raise_signal(signum)))
    assert caught.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert log(run)[-1]["step"] == 3
    with start(tmp_path, experiment) as run:
        fit(photos, experiment, run, QUIET)
    assert weights(run) == expected


def test_a_signal_to_the_whole_group_spares_the_workers_until_the_step_is_done(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    def train() -> None:
        os.setpgrp()
        wait = At(2, lambda: time.sleep(1))
        try:
            with start(tmp_path, tiny()) as run:
                fit(photos, tiny(), run, QUIET.model_copy(update={"workers": 2}), progress=wait)
        except Interrupted as error:
            sys.exit(error.exit_code)  # with the loop's frames still referred to, as in a shell

    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    path = tmp_path / "run" / "log.jsonl"
    while not (path.exists() and path.read_text().count("\n") == 2):
        assert child.is_alive()
        time.sleep(0.01)
    assert child.pid
    os.killpg(child.pid, signal.SIGTERM)
    child.join(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    assert child.exitcode == 143
    state = load_state(Run(tmp_path / "run"), digest(photos))
    assert state is not None
    assert state["step"] == log(Run(tmp_path / "run"))[-1]["step"]


def test_a_second_ctrl_c_stops_at_once(photos: list[ImageFile], tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with start(tmp_path, tiny()) as run, pytest.raises(KeyboardInterrupt):
        fit(photos, tiny(), run, QUIET, progress=At(2, twice))


def test_a_signal_to_all_processes_is_heard_at_one_step(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    def work(rank: int) -> int:
        report = At(2, lambda: signal.raise_signal(signal.SIGTERM))
        with start(tmp_path, tiny()) as run:
            try:
                fit(photos, tiny(), run, QUIET, progress=report)
            except Interrupted as error:
                return error.exit_code
        return 0

    assert in_processes(2, work, tmp_path) == [143, 143]
    assert log(Run(tmp_path / "run"))[-1]["step"] == 3  # only the first heard it, after step 2


def interrupted(photos: list[ImageFile], tmp_path: Path) -> None:
    stop = At(2, lambda: signal.raise_signal(signal.SIGTERM))
    with start(tmp_path, tiny()) as run, pytest.raises(Interrupted):
        fit(photos, tiny(), run, QUIET, progress=stop)


def test_a_run_that_is_wanted_whole_goes_on_and_is_not_trained_twice(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(photos, tmp_path)
    folder = tmp_path / "run"
    assert not Run(folder).finished
    assert trained_run(photos, tiny(), folder, QUIET, source="photos").finished
    assert len(log(Run(folder))) == STEPS
    monkeypatch.setattr(Learner, "learn", None)
    assert trained_run(photos, tiny(), folder, QUIET, source="photos").finished
    with pytest.raises(ConfigError, match="is a run with other options"):
        trained_run(photos, tiny(seed=1), folder, QUIET, source="photos")


def test_other_images_than_before_are_refused(photos: list[ImageFile], tmp_path: Path) -> None:
    interrupted(photos, tmp_path)
    with start(tmp_path, tiny()) as run, pytest.raises(DataError, match="not those"):
        fit(photos[1:], tiny(), run, QUIET)


def test_another_number_of_threads_is_noted(
    photos: list[ImageFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(photos, tmp_path)
    begun = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: begun + 1)
    with start(tmp_path, tiny()) as run:
        fit(photos, tiny(), run, QUIET, progress=Progress())
    assert f"with {begun + 1} threads, begun with {begun}" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_sentence(photos: list[ImageFile], tmp_path: Path) -> None:
    with start(tmp_path, tiny()) as run:
        run.checkpoint.write_bytes(b"damaged")
        with pytest.raises(DataError, match="cannot be read"):
            fit(photos, tiny(), run, QUIET)


# What goes wrong ----------------------------------------------------------------------------------


def test_an_image_that_breaks_off_is_listed_once_and_left_out(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    damage(photos[1])
    header = Skipped(ImageFile(tmp_path / "text.jpg", photos[0].name.with_name("text.jpg")), "text")
    runtime = QUIET.model_copy(update={"max_unreadable": 0.4})
    with start(tmp_path, tiny()) as run:
        fit(photos, tiny(), run, runtime, skipped=[header])
    names = [name for name, _ in skipped_rows(run)]
    assert names == ["text.jpg", photos[1].name.name]
    assert sum(line["images"] for line in log(run)) == 3 * 4


def test_too_many_unreadable_images_stop_the_run(photos: list[ImageFile], tmp_path: Path) -> None:
    damage(photos[0])
    with start(tmp_path, tiny()) as run, pytest.raises(DataError, match="1 of 5 images cannot"):
        fit(photos, tiny(), run, QUIET)
    assert [name for name, _ in skipped_rows(run)] == [photos[0].name.name]


def test_a_batch_of_one_image_is_passed_over(photos: list[ImageFile], tmp_path: Path) -> None:
    for file in photos[:3]:
        damage(file)
    with start(tmp_path, tiny()) as run:
        fit(photos, tiny(), run, QUIET.model_copy(update={"max_unreadable": 1.0}))
    assert run.finished
    lines = log(run)
    assert len(lines) == STEPS
    assert all(("loss" in line) == (line["images"] >= 2) for line in lines)
    assert any("loss" not in line for line in lines)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(
    photos: list[ImageFile], tmp_path: Path, count: int
) -> None:
    with start(tmp_path, tiny()) as run, pytest.raises(DataError, match=f"Found {count} "):
        fit(photos[:count], tiny(), run, QUIET)


def test_two_images_are_enough(photos: list[ImageFile], tmp_path: Path) -> None:
    with start(tmp_path, tiny()) as run:
        fit(photos[:2], tiny(), run, QUIET)
    assert run.finished
    assert all(line["images"] == 2 and "loss" in line for line in log(run))


def test_a_full_disk_keeps_the_last_checkpoint(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(photos, tmp_path)
    kept = (tmp_path / "run" / "checkpoint" / "state.pt").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with start(tmp_path, tiny()) as run:
        fill = At(3, lambda: monkeypatch.setattr(os, "fsync", full))
        with pytest.raises(SetupError, match="disk is full"):
            fit(
                photos, tiny(), run, QUIET.model_copy(update={"checkpoint_every": 1}), progress=fill
            )
    assert run.checkpoint.read_bytes() == kept


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_worker_that_dies_is_one_sentence(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def die(_self: ViewDataset, _key: tuple[int, int]) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError

    monkeypatch.setattr(ViewDataset, "__getitem__", die)
    with start(tmp_path, tiny()) as run, pytest.raises(IddcError, match="workers 0") as caught:
        fit(photos, tiny(), run, QUIET.model_copy(update={"workers": 1}))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


# Several heads ------------------------------------------------------------------------------------


def several(**training: Any) -> Experiment:
    return tiny(training={"heads": 3, "learning_rate": 1e-2, **training})


def head_alone(experiment: Experiment, index: int, steps: int) -> Learner:
    """A run whose only head begins with the weights of one of several."""
    training = experiment.training.model_copy(update={"heads": 1})
    learner = learner_of(experiment.model_copy(update={"training": training}), steps, 1)
    if index:
        start = build_head(experiment, learner.network.backbone.embed_dim, index)
        learner.network.head.load_state_dict(start.state_dict())
    return learner


def test_each_of_several_heads_learns_as_if_alone(crops: Tensor) -> None:
    experiment, steps = several(), 5
    together = learner_of(experiment, steps, 1)
    losses = []
    for index in range(3):
        alone = head_alone(experiment, index, steps)
        losses.append([learn(alone, crops, [5])["loss"] for _ in range(steps)])
        if index == 0:
            logs = [learn(together, crops, [5]) for _ in range(steps)]
        for name, tensor in together.methods[index].head.state_dict().items():
            assert torch.equal(tensor, alone.network.head.state_dict()[name])
    # Fewer steps than the mean looks back, so it is the mean of all.
    assert together.losses.tolist() == pytest.approx([sum(row) / steps for row in losses], 1e-5)
    for step, numbers in enumerate(logs):
        means = [sum(row[: step + 1]) for row in losses]
        best = means.index(min(means))
        assert numbers["head"] == best + 1
        assert numbers["loss"] == losses[best][step]
    assert together.network.head is together.methods[best].head
    assert together.best_head == best


def test_heads_begin_with_weights_of_their_own_that_follow_from_the_seed() -> None:
    def first(seed: int) -> list[Tensor]:
        experiment = several().model_copy(update={"seed": seed})
        return [each.head[-1].weight for each in learner_of(experiment, 1, 1).methods]  # type: ignore[index]

    drawn = [*first(0), *first(1)]
    assert all(torch.equal(one, other) for one, other in zip(first(0), drawn, strict=False))
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(len(drawn)) for j in range(i))


def test_one_head_that_is_not_finite_stops_the_step_of_all(crops: Tensor) -> None:
    learner = learner_of(several(), 3, 1)
    broken: Any = learner.methods[2]
    broken.head[-1].bias.data[0] = float("nan")
    before = learner.methods[0].state_dict()["head.0.weight"].clone()
    assert not math.isfinite(learn(learner, crops, [5])["loss"])
    assert torch.equal(learner.methods[0].state_dict()["head.0.weight"], before)
    assert learner.losses.tolist() == [0, 0, 0]


def test_end_to_end_the_best_head_learns_alone_once_the_backbone_does(crops: Tensor) -> None:
    experiment = several(end_to_end=True, backbone_learning_rate=1e-3)
    learner = learner_of(experiment, 10, 1)
    moved = []
    for _ in range(10):
        before = [each.state_dict()["head.0.weight"].clone() for each in learner.methods]
        learn(learner, crops, [5])
        after = [each.state_dict()["head.0.weight"] for each in learner.methods]
        moved.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    alone = [index == learner.best_head for index in range(3)]
    assert moved == 4 * [[True] * 3] + 6 * [alone]


@pytest.mark.parametrize("experiment", [several(), several(end_to_end=True)])
def test_a_run_of_several_heads_goes_on_to_the_same_bytes(
    photos: list[ImageFile], tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, report = start(tmp_path, experiment, "whole"), Progress()
    notes: list[str] = []
    monkeypatch.setattr(report, "note", notes.append)
    fit(photos, experiment, whole, QUIET, progress=report)
    assert [
        line for line in notes if f"Kept head {log(whole)[-1]['head']:.0f}, the best of 3" in line
    ]
    cut = cut_and_resumed(photos, tmp_path, experiment, monkeypatch, done=4, checkpoint_every=3)
    assert weights(cut) == weights(whole)
    assert [line["head"] for line in log(cut)] == [line["head"] for line in log(whole)]


def test_several_heads_share_what_the_backbone_computes(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = []

    def counted(network: Any, crops: Tensor, precision: Any) -> Tensor:
        embedded.append(len(crops))
        return embed_crops(network, crops, precision)

    monkeypatch.setattr("iddc.learning.embeddings.embed_crops", counted)
    monkeypatch.setattr("iddc.learning.gradients.embed_crops", refuse)
    experiment = several()
    fit(photos, experiment, start(tmp_path, experiment), QUIET)
    assert len(embedded) == STEPS


def test_processes_agree_on_the_best_head(crops: Tensor, tmp_path: Path) -> None:
    counts = [2, 3]
    alone = learner_of(several(), 6, 2)
    expected = [learn(alone, crops, [5]) for _ in range(3)]

    def work(rank: int) -> list[dict[str, float]]:
        with joined("cpu") as processes:
            learner = learner_of(several(), 6, 2, processes)
            return [learn(learner, torch.split(crops, counts)[rank], counts) for _ in range(3)]

    for found in in_processes(2, work, tmp_path):
        assert [numbers["head"] for numbers in found] == [numbers["head"] for numbers in expected]
        for numbers, wanted in zip(found, expected, strict=True):
            assert numbers["loss"] == pytest.approx(wanted["loss"], 1e-5)
