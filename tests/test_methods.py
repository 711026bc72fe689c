"""What every method keeps to, tried with each one of the table; a new one needs no line here.

A method sees images one by one where it has parameters, and all of them where it has none. So it
learns the same in pieces, in several processes, and after it was killed. It reads no label, and
leaves the caller's random numbers alone. Toys at the end break one rule each, and are caught.
"""

from __future__ import annotations

import builtins
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from iddc import methods
from iddc.backbones import ClassAttention
from iddc.config import (
    Experiment,
    Frozen,
    ObjectiveConfig,
    PredictionConfig,
    Runtime,
    TrainingConfig,
    ViewsConfig,
)
from iddc.images import ImageFile, find_images
from iddc.learning import fit
from iddc.learning.learner import Learner
from iddc.methods import METHODS, completed, find_method
from iddc.methods.method import Batch, Group, Images, Method, Rows
from iddc.processes import Processes, joined
from iddc.runs import Run
from iddc.schedules import Plan
from iddc.segmenter import Segmenter
from steps import ONE, backpropagate, images_of
from torchrun import in_processes

# Tests fork to be quick; Python 3.12 warns of it where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

QUIET = Runtime(device="cpu", workers=0)
SMALL = {
    **{"steps": 4, "min_steps": 4, "epochs": 1, "fitting_steps": 2, "start_steps": 3},
    **{"batch_size": 3, "max_vectors": 90, "vectors": 90, "pool": 32, "concepts": 16},
    **{"dim": 8, "projection": 8, "clusterings": 2, "fine_clusters": 6, "object_start": 0},
    **{"blocks": 1, "hidden": 16, "grid": 3, "window_size": 32},
}
"""What is made small of a method's own numbers, where it has these names."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    """Five images with masks beside them, which nobody may open."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(5):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((90, 80)).save(folder / "images" / f"{i}.png")
        Image.fromarray(coarse[..., 0]).resize((90, 80)).save(folder / "labels" / f"{i}.png")
    return list(find_images(folder / "images").files)


def tiny(method: str, **changes: Any) -> Experiment:
    """A few steps on a ViT of width 64, crops of 4 x 4 patches; 5 images in batches of 3 and 2."""
    method, _, affinity = method.partition("+")
    if affinity:
        thresholds = dict.fromkeys(("positive_threshold", "negative_threshold"), "auto")
        changes["objective"] = ObjectiveConfig.model_validate({"affinity": affinity, **thresholds})
    fields = find_method(method).Config.model_fields
    experiment = Experiment(
        method=method,
        num_clusters=3,
        backbone="untrained:test_vit",
        epochs=2,
        views=ViewsConfig(crop_size=64, short_side=0),
        prediction=PredictionConfig(window=64, overlap=32, flip=False),
        training=TrainingConfig(batch_size=3, precision="fp32"),
        options={name: value for name, value in SMALL.items() if name in fields},
        **changes,
    )
    return completed(experiment)


def run_of(photos: list[ImageFile], folder: Path, method: str, runtime: Runtime = QUIET) -> Run:
    experiment = tiny(method)
    with Run.start(folder, experiment, source="photos") as run:
        fit(photos, experiment, run, runtime)
    return run


def weights(run: Run) -> bytes:
    return (run.path / "model.safetensors").read_bytes()


# The law ------------------------------------------------------------------------------------------


class Fixed:
    """A collection of maps that are there."""

    def __init__(self, maps: Tensor) -> None:
        self._maps = maps

    def sample(self, count: int) -> Tensor:
        return self._maps.movedim(2, -1).flatten(0, 3)[:count]

    def means(self) -> tuple[Tensor, Tensor]:
        return torch.arange(len(self._maps)), self._maps.mean((1, 3, 4))

    def maps(self) -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(self._maps[:, 0])

    def pictures(self, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for index, maps in enumerate(self._maps):
            pixels = torch.arange(3 * 64 * 64).remainder(251).reshape(3, 64, 64)
            yield index, maps, pixels.to(torch.uint8)

    def attend(self, images: Tensor, targets: Tensor | None = None) -> ClassAttention:
        generator = torch.Generator().manual_seed(int(images.sum()) % 1000)
        count = 1 if targets is None else len(targets)
        token = torch.randn(len(images), 64, generator=generator)
        attention = torch.rand(len(images), 4, 4, generator=generator)
        slopes = torch.randn(len(images), count, 4, 4, generator=generator)
        return ClassAttention(token, attention, slopes if targets is not None else None)

    def note(self, line: str) -> None:
        pass


def features() -> Tensor:
    """Embeddings of two views of five images, in which three directions return."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 64, generator=generator)
    which = torch.randint(0, 3, (5, 2, 4, 4), generator=generator)
    noise = torch.randn(5, 2, 4, 4, 64, generator=generator)
    return (directions[which] + 0.3 * noise).movedim(-1, 2).contiguous()


def learner_of(method: str, processes: Processes = ONE) -> Learner:
    """A method that was fitted to a collection, before its first step."""
    learner = Learner(tiny(method), 5, processes)
    learner.refit(Fixed(features()), 0)
    return learner


def step_of(
    method: str, processes: Processes = ONE, counts: Sequence[int] = (5,), at_once: int = 8
) -> dict[str, Tensor]:
    """The terms of a step on five images, and all gradients as one vector."""
    learner = learner_of(method, processes)
    kind, rank = learner.method, processes.rank
    maps = torch.split(features(), list(counts))[rank]
    first = sum(counts[:rank])
    result = backpropagate(
        kind,
        learner.network,
        maps,
        images_of(maps, total=5, first=first),
        processes=processes,
        counts=list(counts),
        at_once=at_once,
    )
    # Of rows without a graph, the loss has none.
    again = kind.loss(result.batch, result.rows)
    learned = [name for name, term in again.items() if term.requires_grad]
    assert not learned, f"loss() uses a parameter in {learned}; rows() should"
    grads = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in kind.parameters()
        if p.requires_grad
    ]
    return {**result.terms, "gradient": torch.cat(grads)}


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


LEARN = [name for name in METHODS if find_method(name).plan(tiny(name), 5).steps]
"""Methods that take steps."""
LAWFUL = [*LEARN, "iddc+coassociation"]
"""And what learns in another way with other numbers."""


def check_pieces(method: str) -> None:
    whole = step_of(method)
    for at_once in (1, 2):
        alike(step_of(method, at_once=at_once), whole)


def check_processes(method: str, folder: Path) -> None:
    whole = step_of(method)

    def work(_rank: int) -> dict[str, Tensor]:
        with joined("cpu") as processes:
            return step_of(method, processes, (2, 3), at_once=2)

    for found in in_processes(2, work, folder):
        alike(found, whole)


@pytest.mark.parametrize("method", LAWFUL)
def test_pieces_give_the_terms_and_gradients_of_the_whole(method: str) -> None:
    check_pieces(method)


@pytest.mark.parametrize("method", LAWFUL)
@pytest.mark.parametrize("at_once", [8, 2])
def test_what_a_gap_shows_enters_no_term_and_no_gradient(
    method: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, maps = learner_of(method), features()
    valid = torch.ones(5, 2, 64, 64, dtype=torch.bool)
    valid[1, 0, :, :32] = valid[3, :, 48:] = False
    spoilt = maps.clone()
    spoilt[1, 0, :, :, :2] = spoilt[3, :, :, 3] = torch.nan
    # The crops carry the number of their image; embeddings are those above.
    crops = torch.arange(10, dtype=torch.uint8).view(5, 2, 1, 1, 1).expand(5, 2, 3, 64, 64)
    monkeypatch.setattr(
        "iddc.learning.gradients.embed_crops",
        lambda _network, rows, _precision: spoilt.flatten(0, 1)[rows[:, 0, 0, 0].long()],
    )
    result = backpropagate(
        learner.method,
        learner.network,
        crops,
        images_of(crops, total=5),
        processes=ONE,
        counts=[5],
        at_once=at_once,
        valid=valid,
    )
    assert all(term.isfinite() for term in result.terms.values())
    gradients = [p.grad for p in learner.method.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("method", LAWFUL)
def test_two_processes_give_the_terms_and_gradients_of_one(method: str, tmp_path: Path) -> None:
    check_processes(method, tmp_path)


@pytest.mark.parametrize("method", LAWFUL)
def test_something_learns_and_everything_that_learns_is_in_a_group(method: str) -> None:
    learner = learner_of(method)
    names = {p: name for name, p in learner.method.named_parameters() if p.requires_grad}
    trained = {names.get(p) for group in learner.method.groups(0.0) for p in group.parameters}
    assert trained == {*names.values()}, "groups() should name what learns, and nothing else"
    assert step_of(method)["gradient"].abs().sum() > 0


# A run --------------------------------------------------------------------------------------------


def check_resumes(photos: list[ImageFile], folder: Path, method: str) -> None:
    """Killed before a step, between two checkpoints, it goes on to the same bytes."""
    whole = weights(run_of(photos, folder / "whole", method))
    learn = Learner.learn

    def killed(self: Learner, *arguments: Any) -> dict[str, float]:
        if self.step == 3:
            raise KeyboardInterrupt
        return learn(self, *arguments)

    often = QUIET.model_copy(update={"checkpoint_every": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "learn", killed)
        with pytest.raises(KeyboardInterrupt):
            run_of(photos, folder / "cut", method, often)
    again = weights(run_of(photos, folder / "cut", method, often))
    assert again == whole, "state that outlives a step is in no buffer or parameter"


@pytest.mark.parametrize("method", LAWFUL)
def test_a_killed_run_goes_on_to_the_same_bytes(
    photos: list[ImageFile], tmp_path: Path, method: str
) -> None:
    check_resumes(photos, tmp_path, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_predicts_the_same_after_loading_and_has_the_methods_numbers(
    photos: list[ImageFile], tmp_path: Path, method: str
) -> None:
    experiment = tiny(method)
    used = methods.used(experiment)
    with Run.start(tmp_path, experiment, source="photos", record=used) as run:
        trained = Segmenter.of(fit(photos, experiment, run, QUIET), experiment)
    loaded = Segmenter.load(tmp_path, device="cpu")
    expected, found = (
        each.predict(photos[0].path, with_probs=True).probs for each in (trained, loaded)
    )
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)
    assert completed(Run(tmp_path).experiment) == experiment
    assert completed(loaded.experiment) == experiment


def check_opens_no_label(photos: list[ImageFile], folder: Path, method: str) -> None:
    opened: list[str] = []
    real = {builtins: builtins.open, io: io.open, os: os.open}
    with pytest.MonkeyPatch.context() as patch:
        for module, function in real.items():

            def watched(path: Any, *rest: Any, _open: Any = function, **named: Any) -> Any:
                opened.append(str(path))
                return _open(path, *rest, **named)

            patch.setattr(module, "open", watched)
        run_of(photos, folder, method)
    assert any(str(photos[0].path.parent) in path for path in opened)
    assert not any(str(photos[0].path.parents[1] / "labels") in path for path in opened)


@pytest.mark.parametrize("method", METHODS)
def test_training_opens_no_label(photos: list[ImageFile], tmp_path: Path, method: str) -> None:
    check_opens_no_label(photos, tmp_path, method)


def check_random_state(photos: list[ImageFile], folder: Path, method: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (the global one is what must stay)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = weights(run_of(photos, folder / "one", method))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert weights(run_of(photos, folder / "two", method)) == first


@pytest.mark.parametrize("method", METHODS)
def test_a_run_follows_from_its_seed_and_leaves_the_callers_random_numbers_alone(
    photos: list[ImageFile], tmp_path: Path, method: str
) -> None:
    check_random_state(photos, tmp_path, method)


@pytest.mark.parametrize("method", LEARN)
def test_the_log_names_the_terms_and_counts_live_clusters(
    photos: list[ImageFile], tmp_path: Path, method: str
) -> None:
    run = run_of(photos, tmp_path, method)
    steps = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]  # others say what a refit found
    assert len(steps) == find_method(method).plan(tiny(method), 5).steps
    for step in steps:
        assert {"loss", "gradient_norm", "live_clusters", "learning_rate"} <= step.keys()
        assert 0 <= step["live_clusters"] <= Run(tmp_path).experiment.num_clusters + 9


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_in_a_module_of_its_name_and_says_what_it_is(method: str) -> None:
    kind = find_method(method)
    assert kind.__module__ == f"iddc.methods.{method.replace('-', '_')}"
    assert kind.about
    assert not {use for use in kind.uses if use != "epochs" and "." not in use}
    silent = [n for n, field in kind.Config.model_fields.items() if not field.description]
    assert not silent


def test_every_module_of_a_method_is_in_the_table() -> None:
    folder = Path(methods.__file__).parent
    others = {"__init__", "method", "alignment", "coassociation", "correspondence"}
    others |= {"modularity", "pictures"}
    there = {path.stem for path in folder.glob("*.py")} - others
    assert there == {name.replace("-", "_") for name in METHODS}


# Toys that break a rule are caught ----------------------------------------------------------------


class Toy(Method):
    """The mean of the largest probability, which a linear head makes larger. It keeps to all."""

    name = "toy"
    about = "A toy."
    Config = Frozen
    heads = ("linear",)

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        return Plan.of_steps(4, 3, num_images)

    def rows(self, maps: Tensor, images: Images) -> Rows:
        logits = self.head(maps.flatten(0, 1)).flatten(2)
        return {"logits": logits.view(*maps.shape[:2], *logits.shape[1:])}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        return {"loss": -(rows["logits"].softmax(2).amax(2).mean() ** 2)}

    def groups(self, progress: float) -> list[Group]:
        return [Group([*self.parameters()], 1e-3)]


class ParametersInLoss(Toy):
    def loss(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        (bias,) = (p for p in self.head.parameters() if p.ndim == 1)
        return {"loss": super().loss(batch, rows)["loss"] + bias.square().sum() + bias.sum()}


class BatchInRows(Toy):
    def rows(self, maps: Tensor, images: Images) -> Rows:
        return super().rows(maps - maps.mean(0), images)


class GlobalNoise(Toy):
    def rows(self, maps: Tensor, images: Images) -> Rows:
        return super().rows(maps + torch.rand(()), images)


class OpensLabels(Toy):
    def loss(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        self.labels.read_bytes()
        return super().loss(batch, rows)

    labels: Path


class Forgetful(Toy):
    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.steps = 0  # no buffer: it is not saved

    def update(self, batch: Batch, rows: Rows) -> None:
        self.steps += 1

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        return {"loss": super().loss(batch, rows)["loss"] * (self.steps - 1.5)}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Method]], str]:
    """Puts a toy in the place of STEGO."""

    def place(kind: type[Method]) -> str:
        for module in (methods, __import__(__name__)):
            monkeypatch.setattr(module, "find_method", lambda _name: kind)
        monkeypatch.setattr("iddc.learning.loop.find_method", lambda _name: kind)
        monkeypatch.setattr("iddc.learning.learner.find_method", lambda _name: kind)
        return "stego"

    return place


def test_a_sound_toy_passes_every_check(
    toy: Callable[[type[Method]], str], photos: list[ImageFile], tmp_path: Path
) -> None:
    name = toy(Toy)
    check_pieces(name)
    check_resumes(photos, tmp_path / "resumed", name)
    check_opens_no_label(photos, tmp_path / "unread", name)
    check_random_state(photos, tmp_path / "random", name)


@pytest.mark.slow
def test_a_sound_toy_is_the_same_in_two_processes(
    toy: Callable[[type[Method]], str], tmp_path: Path
) -> None:
    check_processes(toy(Toy), tmp_path)


def test_parameters_in_the_loss_are_caught(toy: Callable[[type[Method]], str]) -> None:
    with pytest.raises(AssertionError):
        check_pieces(toy(ParametersInLoss))


def test_a_row_that_sees_other_images_is_caught(toy: Callable[[type[Method]], str]) -> None:
    with pytest.raises(AssertionError):
        check_pieces(toy(BatchInRows))


@pytest.mark.slow
def test_a_row_that_sees_other_images_is_caught_in_two_processes(
    toy: Callable[[type[Method]], str], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        check_processes(toy(BatchInRows), tmp_path)


def test_a_state_that_is_not_saved_is_caught(
    toy: Callable[[type[Method]], str], photos: list[ImageFile], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        check_resumes(photos, tmp_path, toy(Forgetful))


def test_a_label_file_that_is_opened_is_caught(
    toy: Callable[[type[Method]], str], photos: list[ImageFile], tmp_path: Path
) -> None:
    OpensLabels.labels = photos[0].path.parents[1] / "labels" / "0.png"
    with pytest.raises(AssertionError):
        check_opens_no_label(photos, tmp_path, toy(OpensLabels))


def test_global_random_numbers_that_are_touched_are_caught(
    toy: Callable[[type[Method]], str], photos: list[ImageFile], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        check_random_state(photos, tmp_path, toy(GlobalNoise))
