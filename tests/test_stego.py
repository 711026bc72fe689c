"""STEGO: its losses against loops, then how it trains."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from iddc.cli import main
from iddc.config import (
    Experiment,
    ObjectiveConfig,
    PredictionConfig,
    Runtime,
    TrainingConfig,
    ViewsConfig,
)
from iddc.datasets.synthetic import write_scenes
from iddc.errors import ConfigError, DataError, Interrupted, NumericError
from iddc.images import ImageFile, Skipped, find_images
from iddc.learning import embeddings, fit
from iddc.learning.learner import Learner
from iddc.methods import completed, stego
from iddc.methods.correspondence import SpatialCentering, probe_loss
from iddc.methods.stego import Patches, Stego, StegoConfig, correspondence_loss, nearest
from iddc.network import Codes, build_network
from iddc.progress import Progress
from iddc.runs import Run
from iddc.samples import Sampler
from iddc.segmenter import Segmenter
from iddc.views import ViewDataset, draw_patches, draw_rolls, epoch_batches
from steps import images_of

CENTERINGS = get_args(SpatialCentering)
QUIET = Runtime(device="cpu", workers=1)


# The losses ---------------------------------------------------------------------------------------


def some_patches(batch: int, count: int, seed: int) -> Patches:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, count, 6, generator=generator) + 0.5
    return Patches(features, torch.randn(batch, count, 4, generator=generator))


def cosine(one: Tensor, other: Tensor) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(one, other, strict=True))
    lengths = [sum(float(a) ** 2 for a in vector) ** 0.5 for vector in (one, other)]
    return dot / (lengths[0] * lengths[1])


def slow_loss(first: Patches, second: Patches, shift: float, centering: str) -> float:
    """STEGO's Eqs. (3) and (4), pair by pair; the mean over all pairs instead of the sum."""
    batch, here, there = len(first.features), first.features.shape[1], second.features.shape[1]
    f = [
        [[cosine(first.features[b, i], second.features[b, j]) for j in range(there)]
         for i in range(here)]
        for b in range(batch)
    ]  # fmt: skip
    everything = [value for image in f for row in image for value in row]
    overall = sum(everything) / len(everything)
    total = 0.0
    for b in range(batch):
        for i in range(here):
            mean = sum(f[b][i]) / there
            for j in range(there):
                centred = f[b][i][j]
                if centering != "none":
                    centred -= mean
                if centering == "released":
                    centred += overall
                s = cosine(first.codes[b, i], second.codes[b, j])
                total -= (centred - shift) * max(s, 0.0)
    return total / (batch * here * there)


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("shift", [0.0, 0.3, -0.2])
def test_the_loss_is_that_of_loops(centering: SpatialCentering, shift: float) -> None:
    first, second = some_patches(3, 5, 0), some_patches(3, 4, 1)
    found = correspondence_loss(first, second, shift=shift, centering=centering)
    assert found.item() == pytest.approx(slow_loss(first, second, shift, centering), abs=1e-6)


@pytest.mark.parametrize(
    ("centering", "expected"), [("none", -0.5), ("released", -0.5), ("paper", 0)]
)
def test_with_one_code_for_all_the_loss_is_less_the_mean_affinity(
    centering: SpatialCentering, expected: float
) -> None:
    # Two orthogonal features: half of all cosines are 1. Eq. (3) takes just that away.
    patches = Patches(torch.eye(2)[None], torch.ones(1, 2, 3))
    loss = correspondence_loss(patches, patches, shift=0.0, centering=centering)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_codes_that_are_orthogonal_or_opposite_cost_nothing_and_are_not_moved() -> None:
    codes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.0, -1.0], [-1.0, -0.5]]])
    moved = codes[0].clone().requires_grad_()
    loss = correspondence_loss(
        Patches(torch.eye(2)[None], moved),
        Patches(-torch.eye(2)[None], codes[1]),
        shift=0.5,
        centering="none",
    )
    loss.backward()
    assert loss == 0
    assert moved.grad is not None
    assert not moved.grad.any()


@pytest.mark.parametrize(("shift", "closer"), [(0.5, True), (0.9, False)])
def test_codes_come_closer_if_their_features_are_more_alike_than_the_shift(
    shift: float, closer: bool
) -> None:
    features = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.8, 0.6]]])  # cosine 0.8
    codes = torch.tensor([[[1.0, 0.0]]], requires_grad=True), torch.tensor([[[1.0, 1.0]]])
    first, second = (Patches(f, c) for f, c in zip(features, codes, strict=True))
    correspondence_loss(first, second, shift=shift, centering="none").backward()
    gradient = codes[0].grad
    assert gradient is not None
    towards_second = -gradient[0, 0, 1].item()
    assert (towards_second > 0) == closer


@pytest.mark.parametrize("centering", CENTERINGS)
def test_features_are_a_target(centering: SpatialCentering) -> None:
    patches = some_patches(2, 3, 0)
    patches.features.requires_grad_()
    patches.codes.requires_grad_()
    correspondence_loss(patches, patches, shift=0.1, centering=centering).backward()
    assert patches.features.grad is None
    assert patches.codes.grad is not None


def test_the_probe_pays_for_the_distance_to_the_nearest_centroid_alone() -> None:
    cosines = torch.tensor([[0.2, 0.5], [0.9, -1.0]])[None, None].requires_grad_()
    loss = probe_loss(cosines)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.9 + 0.5) / 2)
    assert cosines.grad is not None
    assert cosines.grad[0, 0].tolist() == [[0, -0.5], [-0.5, 0]]


@pytest.mark.parametrize("rows", [7, 1024])
def test_the_nearest_are_those_of_scikit_learn(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stego, "_ROWS", rows)
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    judge = NearestNeighbors(n_neighbors=6, metric="cosine").fit(vectors.numpy())
    expected = judge.kneighbors(vectors.numpy(), return_distance=False)[:, 1:]
    assert nearest(vectors, 5).tolist() == expected.tolist()


def test_no_image_is_its_own_neighbour_even_if_there_are_few() -> None:
    found = nearest(torch.eye(3), 7)
    assert [sorted(row) for row in found.tolist()] == [[1, 2], [0, 2], [0, 1]]


class Reading(Codes):
    """A head whose codes are the features that it is given."""

    def codes(self, features: Tensor) -> Tensor:
        return features


def test_dropout_leaves_out_whole_channels_and_keeps_the_mean() -> None:
    maps = torch.ones(4, 2, 70, 2, 3)
    for rate, values in ((0.2, {0, 1.25}), (0.0, {1})):
        config = StegoConfig(dropout=rate)
        method = Stego(Reading(70, 3), tiny(), config)
        found = method.rows(maps, images_of(maps))["codes"].view(maps.shape)
        assert set(found.unique().tolist()) == values
        assert (found == found[..., :1, :1]).all()
        assert found.mean().item() == pytest.approx(1, abs=0.05)
        parts = [
            method.rows(maps[part], images_of(maps).part(part))["codes"].view(2, *maps.shape[1:])
            for part in (slice(0, 2), slice(2, 4))
        ]
        assert torch.equal(torch.cat(parts), found)


@pytest.mark.parametrize("at_once", [0, 2, 3])
def test_an_image_is_pooled_over_its_central_square(photos: list[ImageFile], at_once: int) -> None:
    backbone = build_network(tiny()).eval().backbone
    photos[1].path.write_bytes(b"no image")
    checks: list[int] = []
    sampler = Sampler(
        photos[:5],
        backbone,
        tiny(),
        QUIET.model_copy(update={"micro_batch_size": at_once}),
        check=lambda: checks.append(1),
    )
    found, rows = sampler.means()
    failures = [index for index, _ in sampler.failures]
    assert (found, failures, len(checks)) == ([0, 2, 3, 4], [1], 5)
    for index, row in zip(found, rows, strict=True):
        image = Image.open(photos[index].path)  # 80 x 64
        square = np.array(image.resize((32, 32), Image.Resampling.BILINEAR, (8, 0, 72, 64)))
        with torch.no_grad():
            grid = backbone(torch.from_numpy(square).permute(2, 0, 1)[None])[0]
        assert torch.allclose(row, grid.mean(dim=(1, 2)), atol=1e-5)


def numbers_for(recipe: Any) -> StegoConfig:
    return Stego.defaults(Experiment(recipe=recipe))


def test_recipes_of_published_data_sets_have_their_numbers() -> None:
    assert numbers_for("folder") == StegoConfig()
    coco, cityscapes = numbers_for("cocostuff27-vits16"), numbers_for("cityscapes-vitb8")
    assert (coco.self_shift, coco.knn_shift, coco.random_shift) == (0.08, 0.02, 0.66)
    assert (coco.self_weight, coco.knn_weight, coco.random_weight) == (0.67, 0.25, 0.63)
    assert (cityscapes.self_shift, cityscapes.knn_shift, cityscapes.random_shift) == (
        0.46, 0.18, 0.31,
    )  # fmt: skip
    assert (cityscapes.self_weight, cityscapes.knn_weight, cityscapes.random_weight) == (
        1.0, 0.58, 0.91,
    )  # fmt: skip
    assert numbers_for("ablation-log") == cityscapes


# Training -----------------------------------------------------------------------------------------


SHORT = StegoConfig(steps=7, batch_size=5, neighbours=3, patches=6, negatives=2)


def tiny(**changes: Any) -> Experiment:
    """Crops of 32 pixels, 2 x 2 patches of 16, on a ViT of width 64."""
    return Experiment(
        method="stego",
        num_clusters=3,
        backbone="untrained:test_vit",
        views=ViewsConfig(short_side=64, crop_size=32),
        prediction=PredictionConfig(window=32, overlap=8),
        training=TrainingConfig(precision="fp32"),
        **changes,
    )


@pytest.fixture
def photos(tmp_path: Path) -> list[ImageFile]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        image = coarse.repeat(16, 0).repeat(16, 1)
        Image.fromarray(image // 2 + rng.integers(0, 90, image.shape, np.uint8)).save(
            folder / f"{i}.png"
        )
    return list(find_images(folder).files)


def fitted(
    files: list[ImageFile],
    folder: Path,
    experiment: Experiment | None = None,
    config: StegoConfig | None = SHORT,
    runtime: Runtime = QUIET,
    **options: Any,
) -> Segmenter:
    chosen = config.model_dump() if config else {}
    begun = completed((experiment or tiny()).model_copy(update={"options": chosen}))
    with Run.start(folder, begun, source="photos") as run:
        return Segmenter.of(fit(files, begun, run, runtime, **options), begun)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def at_step(step: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Do something when a step is about to be learned."""
    learn = Learner.learn

    def acting(self: Learner, *args: Any) -> dict[str, float]:
        if self.step == step:
            action()
        return learn(self, *args)

    patch.setattr(Learner, "learn", acting)


def interrupt(signum: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), signum)


def test_it_learns_on_drawn_scenes_and_clusters_live(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 15, 0, (128, 96))
    files = list(find_images(tmp_path / "scenes" / "train").files)
    views = ViewsConfig(short_side=96, crop_size=64, repeat=2)
    experiment = tiny().model_copy(update={"num_clusters": 6, "views": views})
    # Embeddings of random weights are all alike: the shifts must be as high as their cosines.
    shifts = {"self_shift": 0.9, "knn_shift": 0.9, "random_shift": 0.95}
    config = StegoConfig(steps=60, batch_size=8, patches=12, spatial_centering="none", **shifts)
    segmenter = fitted(files, tmp_path / "run", experiment, config)
    steps = log(tmp_path / "run")
    for name, fall in (("loss", 0.03), ("probe", 0.02)):
        values = np.array([entry[name] for entry in steps])
        assert values[-10:].mean() < values[:10].mean() - fall
    assert steps[-1]["live_clusters"] >= 5
    found = [np.unique(segmenter.predict(file.path).clusters) for file in files[:4]]
    assert len(np.unique(np.concatenate(found))) >= 4


def test_a_run_of_stego_is_finished_and_predicts_the_same_after_loading(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    segmenter = fitted(photos, tmp_path / "run", progress=Progress())
    loaded = Segmenter.load(Run.open(tmp_path / "run").path, device="cpu")
    assert loaded.experiment.head == "codes"
    expected = segmenter.predict(photos[0].path, with_probs=True).probs
    found = loaded.predict(photos[0].path, with_probs=True).probs
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)


def test_the_log_has_the_terms_of_each_step(photos: list[ImageFile], tmp_path: Path) -> None:
    fitted(photos, tmp_path / "run")
    steps = log(tmp_path / "run")
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6, 7]
    for entry in steps:
        terms = 0.67 * entry["own"] + 0.25 * entry["knn"] + 0.63 * entry["random"]
        assert entry["loss"] == pytest.approx(terms + entry["probe"], abs=1e-5)
        assert 1 <= entry["live_clusters"] <= 3


def test_the_released_batch_has_16_images() -> None:
    """The authors' train_config.yml; their paper says 32 for COCO-Stuff with ViT-B/8."""
    assert StegoConfig().batch_size == 16


@pytest.mark.parametrize("count", [6, 2])
def test_the_first_loss_is_eq_5_of_the_batch_by_loops(
    photos: list[ImageFile], tmp_path: Path, count: int
) -> None:
    """Of the views, neighbours, places and rolls that the seed gives, without dropout.

    A crop has 4 patches: with 2 of them, those of the first images are others than those of the
    images that they are compared with.
    """
    update = {"steps": 1, "dropout": 0.0, "spatial_centering": "none", "patches": count}
    config = SHORT.model_copy(update=update)
    fitted(photos, tmp_path / "run", config=config)
    network: Any = build_network(tiny().model_copy(update={"head": "codes"})).eval()
    rows = epoch_batches(8, 5, 0, 0)[0]
    _, pooled = Sampler(photos, network.backbone, tiny(), QUIET).means()
    drawn = np.random.default_rng((0, 0, 0)).integers(3, size=len(rows))
    near = nearest(pooled, 3)[rows, drawn].tolist()
    dataset = ViewDataset(photos, tiny().views, 0)

    def patches(indices: list[int], crop: int) -> Patches:
        views = torch.stack([dataset[0, index].crops[crop] for index in indices])  # type: ignore[index]
        with torch.no_grad():
            maps = network.embed(views)
            codes = network.head.linear(maps) + network.head.nonlinear(maps)
        return Patches(maps.flatten(2).transpose(1, 2), codes.flatten(2).transpose(1, 2))

    images, neighbours = patches(rows, 0), patches(near, 1)
    here, there = draw_patches(4, count, 0, 0)
    if count == 6:
        assert here.tolist() == there.tolist() == [0, 1, 2, 3]
    else:
        assert here.tolist() != there.tolist()

    def at(which: Patches, chosen: Tensor) -> Patches:
        return Patches(which.features[:, chosen], which.codes[:, chosen])

    others = []
    for roll in draw_rolls(len(rows), 2, 0, 0):
        order = [(row - roll) % len(rows) for row in range(len(rows))]
        rolled = Patches(images.features[order], images.codes[order])
        others.append(slow_loss(at(images, here), at(rolled, there), 0.46, "none"))
    own = slow_loss(at(images, here), at(images, here), 0.18, "none")
    knn = slow_loss(at(images, here), at(neighbours, there), 0.12, "none")
    (entry,) = log(tmp_path / "run")
    assert entry["own"] == pytest.approx(own, abs=1e-5)
    assert entry["knn"] == pytest.approx(knn, abs=1e-5)
    assert entry["random"] == pytest.approx(np.mean(others), abs=1e-5)
    total = 0.67 * own + 0.25 * knn + 0.63 * np.mean(others) + entry["probe"]
    assert entry["loss"] == pytest.approx(total, abs=1e-5)
    centroids = [
        [cosine(code, centroid) for centroid in network.head.centroids.detach()]
        for code in images.codes.flatten(0, 1)
    ]
    assert entry["probe"] == pytest.approx(-np.mean([max(row) for row in centroids]), abs=1e-5)
    assert entry["live_clusters"] == len({int(np.argmax(row)) for row in centroids})


def test_centred_means_less_the_mean_of_the_batch(photos: list[ImageFile], tmp_path: Path) -> None:
    centred = tiny(objective=ObjectiveConfig(centering="batch"))
    for name, experiment in (("plain", tiny()), ("centred", centred)):
        fitted(photos, tmp_path / name, experiment)
    # Embeddings of random weights are alike; less their mean, those of two images are not.
    plain, less_mean = (log(tmp_path / name)[0]["random"] for name in ("plain", "centred"))
    assert plain < less_mean - 0.002


def test_the_backbone_is_frozen_also_where_the_recipe_trains_it(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    experiment = tiny().model_copy(
        update={"training": TrainingConfig(precision="fp32", end_to_end=True)}
    )
    segmenter = fitted(photos, tmp_path / "run", experiment)
    found: Any = segmenter.network
    for name, weight in build_network(experiment).backbone.state_dict().items():
        assert torch.equal(found.backbone.state_dict()[name], weight)


def test_the_result_follows_from_the_seed_and_not_from_threads_or_the_caller(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    fitted(photos, tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    fitted(photos, tmp_path / "again", runtime=QUIET.model_copy(update={"workers": 2}))
    fitted(photos, tmp_path / "other", tiny(seed=1))
    assert weights(tmp_path / "one") == weights(tmp_path / "again")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


def test_views_that_come_again_are_embedded_once_with_the_same_result(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = ViewsConfig(short_side=64, crop_size=32, repeat=1)
    experiment = tiny().model_copy(update={"views": views})
    fitted(photos, tmp_path / "kept", experiment)
    monkeypatch.setattr(embeddings, "MEMORY", 0)
    fitted(photos, tmp_path / "made", experiment)
    assert weights(tmp_path / "kept") == weights(tmp_path / "made")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    photos: list[ImageFile], tmp_path: Path, signum: int
) -> None:
    fitted(photos, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_step(3, lambda: interrupt(signum), patch)
        with pytest.raises(Interrupted, match="step 4 of 7") as caught:
            fitted(photos, tmp_path / "parts")
    assert caught.value.exit_code == 128 + signum
    fitted(photos, tmp_path / "parts", progress=Progress())
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert [entry["step"] for entry in log(tmp_path / "parts")] == list(range(1, 8))


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    fitted(photos, tmp_path / "whole")
    often = QUIET.model_copy(update={"checkpoint_every": 2})
    with pytest.MonkeyPatch.context() as patch:
        at_step(5, kill, patch)
        with pytest.raises(Killed):
            fitted(photos, tmp_path / "parts", runtime=often)
    assert torch.load(tmp_path / "parts" / "checkpoint" / "state.pt")["step"] == 4
    fitted(photos, tmp_path / "parts", runtime=often)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert [entry["step"] for entry in log(tmp_path / "parts")] == list(range(1, 8))


def test_an_interrupted_run_is_not_resumed_with_other_options(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(1, interrupt, patch)
        with pytest.raises(Interrupted):
            fitted(photos, tmp_path / "run")
    other = SHORT.model_copy(update={"knn_shift": 0.5})
    with pytest.raises(ConfigError, match=r"options\.knn-shift: 0\.12 in the run, 0\.5 asked"):
        fitted(photos, tmp_path / "run", config=other)


def test_a_run_stopped_before_its_first_step_can_be_given_again(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Stego.refit

    def stopped(self: Stego, *args: Any) -> Any:
        interrupt()
        return find(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stego, "refit", stopped)
        with pytest.raises(Interrupted, match="step 0 of 7"):
            fitted(photos, tmp_path / "run")
    fitted(photos, tmp_path / "run")
    assert Run(tmp_path / "run").finished


def test_an_unreadable_image_is_left_out_and_listed(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    photos[4].path.write_bytes(photos[4].path.read_bytes()[:200])
    earlier = Skipped(ImageFile(tmp_path / "a.jpg", PurePosixPath("a.jpg")), "the file is empty")
    runtime = QUIET.model_copy(update={"max_unreadable": 0.3})
    fitted(photos, tmp_path / "run", runtime=runtime, skipped=[earlier])
    rows = list(csv.reader((tmp_path / "run" / "skipped.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["name", "a.jpg", "4.png"]
    assert "cut short" in rows[2][1]


def test_too_many_unreadable_images_stop_the_run(photos: list[ImageFile], tmp_path: Path) -> None:
    photos[4].path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 8 .* more than the 5%.*4\.png"):
        fitted(photos, tmp_path / "run")


def test_one_readable_image_is_too_few(photos: list[ImageFile], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Found 1 readable image"):
        fitted(photos[:1], tmp_path / "run")


def test_an_image_that_goes_away_is_left_out_with_the_images_whose_neighbour_it_is(
    photos: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Stego.refit

    def losing(self: Stego, *args: Any) -> Any:
        found = find(self, *args)
        photos[2].path.write_bytes(b"no image")
        return found

    monkeypatch.setattr(Stego, "refit", losing)
    runtime = QUIET.model_copy(update={"max_unreadable": 0.3})
    fitted(photos, tmp_path / "run", runtime=runtime)
    assert "2.png" in (tmp_path / "run" / "skipped.csv").read_text()
    assert min(entry["images"] for entry in log(tmp_path / "run")) < 4


def test_a_loss_that_is_not_finite_leaves_the_state_before_it(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    wild = SHORT.model_copy(update={"learning_rate": 1e30})
    often = QUIET.model_copy(update={"checkpoint_every": 1})
    with pytest.raises(NumericError, match=r"Not finite at step 4.*--stego.learning-rate"):
        fitted(photos, tmp_path / "run", config=wild, runtime=often)
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt")["step"] == 1


# The command --------------------------------------------------------------------------------------


def test_the_command_gives_a_run_like_any_other(
    photos: list[ImageFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(
        "views: {short_side: 48, crop_size: 32}\nprediction: {window: 32, overlap: 8}\n"
    )
    source = str(photos[0].path.parent)
    options = ["--config", str(config), "--backbone", "untrained:test_vit", "--num-clusters", "3"]
    options += ["--stego.steps", "2", "--stego.batch-size", "4"]
    assert main(["baseline", "stego", source, "--out", str(run), *options]) == 0
    assert "stego · 2 steps" in capsys.readouterr().out
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["num_clusters"], kept["head"], kept["views"]["short_side"]) == (3, "codes", 48)
    out = tmp_path / "out"
    assert main(["predict", str(run), source, "--out", str(out), "--limit", "1"]) == 0
    assert (out / "png" / "0.png").exists()


def test_kmeans_refuses_the_options_of_stego(
    photos: list[ImageFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["baseline", "kmeans", str(photos[0].path.parent), "--out", str(tmp_path / "run")]
    assert main([*argv, "--stego.knn-shift", "0.3"]) == 2
    assert "--stego.knn-shift" in capsys.readouterr().err


def test_a_value_out_of_range_is_named_as_the_option_is(
    photos: list[ImageFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["baseline", "stego", str(photos[0].path.parent), "--out", str(tmp_path / "run")]
    assert main([*argv, "--stego.dropout", "1.5"]) == 2
    assert "--stego.dropout: " in capsys.readouterr().err


def test_the_head_of_stego_cannot_be_trained_by_iddc(
    photos: list[ImageFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", str(photos[0].path.parent), "--out", str(tmp_path / "run")]
    assert main([*argv, "--head", "codes"]) == 2
    assert "iddc does not train the head codes" in capsys.readouterr().err
