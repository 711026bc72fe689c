"""Trials of pretraining, and parts of sets, in benchmarks, on images small enough to check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarking import benchmark
from iddc.backbones import (
    load_backbone,
    reduced_backbone,
    regional,
    save_backbone,
    untrained_backbone,
)
from iddc.images import find_images
from iddc.pretraining.cache import ImageCache, fill_cache
from tiny import photo


@pytest.fixture(scope="module")
def trials() -> Any:
    return benchmark("pretrain_trials")


@pytest.fixture
def photos(tmp_path: Path) -> ImageCache:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        photo(i, (110, 100)).save(folder / f"{i}.png")
    files = find_images(folder).files
    return fill_cache(
        [files], tmp_path / "cache", "", short_side=144, min_side=28, threads=1, check=lambda: None
    )


def test_a_mean_counts_the_points_of_a_region_and_small_regions_are_left_out(trials: Any) -> None:
    rows = torch.zeros(2, 2, 4, 1)
    rows[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 10.0])
    rows[0, 1, :, 0] = torch.tensor([4.0, 5.0, 6.0, 20.0])
    rows[1, :, :, 0] = 8.0
    regions = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    means, owners = trials.region_rows(rows, regions)
    assert means[..., 0].tolist() == [[2.0, 8.0], [5.0, 8.0]]  # region 1 of photo 0 has one point
    assert owners.tolist() == [0, 1]


def test_negatives_are_regions_of_other_photos_and_of_past_batches(trials: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2, 3, 4, generator=generator), dim=-1)
    past = torch.nn.functional.normalize(torch.randn(2, 4, generator=generator), dim=-1)
    owners = [0, 0, 1]
    expected = 0.0
    for a, b in ((rows[0], rows[1]), (rows[1], rows[0])):
        for i in range(3):
            scores = {
                j: math.exp(float(a[i] @ b[j]) / 0.2)
                for j in range(3)
                if j == i or owners[i] != owners[j]
            }
            older = sum(math.exp(float(a[i] @ row) / 0.2) for row in past)
            expected -= math.log(scores[i] / (sum(scores.values()) + older)) / 6
    found = trials.region_nce(rows, torch.tensor(owners), 0.2, past)
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_points_of_a_crop_have_the_regions_that_they_lie_in(trials: Any, flip: bool) -> None:
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    image[:, 40:] = 255
    # The crop shows the columns 20 to 60: a quarter from its left is 30, three quarters 50.
    points = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, 0.0]])
    box = np.array([20.0, 10.0, 40.0, 40.0])
    found = trials.regions_at(image, points, box, flip)
    assert found[0] == found[1] != found[2]
    whole = trials.regions_at(image, torch.tensor([[-0.9, 0.0]]), np.array([0.0, 0, 64, 64]), False)
    dark = found[2] if flip else found[0]
    assert dark == whole[0]


def test_the_queue_keeps_the_newest_rows_of_both_views(trials: Any) -> None:
    trial = trials.Trial(trials.Choices("swav", "untrained:test_resnet", queue=6))
    width = trial.online.embed_dim
    for first in (0, 10, 20):
        rows = torch.arange(4.0).view(2, 2, 1).expand(2, 2, width) + first
        trial.remember(rows)
    assert trial.past[:, 0].tolist() == [20, 22, 21, 23, 10, 12]


def test_the_queue_says_what_is_rare_among_the_rows_of_a_batch(trials: Any) -> None:
    """Two like rows alone are shared by two prototypes; with a queue they may both have one."""
    trial = trials.Trial(trials.Choices("swav", "untrained:test_resnet", prototypes=2, queue=6))
    width = trial.online.embed_dim
    axes = torch.eye(width)
    trial.prototypes.data = axes[:2]
    rows = (axes[0] + torch.tensor([[0.1], [-0.1]]) * axes[1]).expand(2, 2, width)
    alone = float(trial.swapped(rows).detach())
    trial.past = axes[1].expand(6, width)
    assert float(trial.swapped(rows).detach()) < 0.1 < alone


def test_the_larger_crop_teaches_the_smaller_one(trials: Any, photos: ImageCache) -> None:
    """The average sees the larger crop and has no gradient; its points are those of the smaller."""
    sizes = {"batch": 6, "crop": 16, "context": 32, "smallest": 40, "large": 1.0}
    choices = trials.Choices("swav", "untrained:test_resnet", prototypes=4, **sizes)
    trial = trials.Trial(choices)
    crops, points, regions = trials.Pool(photos, choices).batch(0)
    assert [tuple(one.pixels.shape) for one in crops] == [(6, 1, 3, 32, 32), (6, 1, 3, 16, 16)]
    # Neighbouring points lie closer together, as parts of the crop, in the larger crop.
    spans = points.amax(2) - points.amin(2)
    assert bool((spans[:, 0].prod(-1) < spans[:, 1].prod(-1)).all())
    rows, _ = trial.rows(crops, points, regions)
    for view, network in ((0, trial.average), (1, trial.online)):
        maps = network(crops[view].recoloured(trials.CPU))
        seen = torch.nn.functional.grid_sample(
            maps, points[:, view, :, None], padding_mode="border", align_corners=False
        )
        expected = seen[..., 0].transpose(1, 2).flatten(0, 1)
        error = (rows[view] - expected).detach().norm() / expected.detach().norm()
        assert float(error) < 0.02  # the trial computes in half precision
    scores = torch.nn.functional.normalize(rows, dim=-1)
    scores = scores @ torch.nn.functional.normalize(trial.prototypes, dim=1).T
    targets = trials.sinkhorn(scores[0].detach() / 0.05)
    expected_loss = -(targets * (scores[1] / 0.1).log_softmax(-1)).sum(-1).mean()
    loss = trial.loss(crops, points, regions)
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in trial.average.parameters())
    assert any(p.grad is not None for p in trial.online.net.parameters())


def test_crops_are_cut_from_sides_of_the_length_that_is_asked_for(
    trials: Any, photos: ImageCache
) -> None:
    """Crops of a whole photo share nearly all of it; others may share a corner."""

    def spans(smallest: int) -> torch.Tensor:
        choices = trials.Choices(batch=8, grid=8, smallest=smallest, large=1.0)
        points = trials.Pool(photos, choices).batch(0)[1]
        return (points.amax(2) - points.amin(2)).flatten()

    assert float(spans(100).min()) > 1.3 > float(spans(28).min())  # of 2, edge to edge


def test_photos_are_decoded_once_at_the_size_that_is_asked_for(
    trials: Any, photos: ImageCache, tmp_path: Path
) -> None:
    found = trials.decoded(tmp_path / "small", [tmp_path / "photos"], 64)
    assert found.sizes.min(1).tolist() == [64] * len(photos)
    again = trials.decoded(tmp_path / "small", [], 100)
    assert again.sizes.tolist() == found.sizes.tolist()


SLOW = [
    pytest.param(name, context, marks=pytest.mark.slow)
    for name, context in (("swav", 0), ("swav", 48), ("regions", 0), ("contrast", 0))
]


@pytest.mark.parametrize(("objective", "context"), [*SLOW, ("points", 0), ("whole", 0)])
def test_a_trial_that_was_stopped_ends_with_the_same_bytes(
    trials: Any, photos: ImageCache, tmp_path: Path, objective: str, context: int
) -> None:
    choices = trials.Choices(
        objective=objective,
        context=context,
        init="untrained:test_resnet",
        batch=4,
        prototypes=4,
        queue=8,
        large=1.0,
        textures=0.25,
    )

    class Stopping(trials.Pool):  # type: ignore[misc,name-defined]
        def batch(self, step: int) -> Any:
            if step == 2:
                raise KeyboardInterrupt
            return super().batch(step)

    def go(pool: Any, out: str) -> bytes:
        trials.run(trials.Trial(choices), pool, tmp_path / out, 0, 3, every=0)
        return (tmp_path / out / "backbone.safetensors").read_bytes()

    with pytest.raises(KeyboardInterrupt):
        go(Stopping(photos, choices), "two")
    assert go(trials.Pool(photos, choices), "two") == go(trials.Pool(photos, choices), "one")


def test_from_given_weights_the_statistics_stay_and_the_components_learn(
    trials: Any, photos: ImageCache, tmp_path: Path
) -> None:
    first = trials.Choices("whole", "untrained:test_resnet", batch=4, large=1.0)
    pool = trials.Pool(photos, first)
    trials.run(trials.Trial(first), pool, tmp_path / "first", 0, 1)
    before = load_backbone(str(tmp_path / "first")).state_dict()
    choices = trials.Choices("regions", str(tmp_path / "first"), 4, prototypes=4, large=1.0)
    trials.run(trials.Trial(choices), pool, tmp_path / "second", 0, 2)
    after = load_backbone(str(tmp_path / "second")).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "reduce.weight" in moved
    assert any(name.startswith("net.layer1") for name in moved)
    assert not any("running" in name for name in moved)


def test_a_trial_of_other_choices_is_refused(
    trials: Any, photos: ImageCache, tmp_path: Path
) -> None:
    torch.save({"choices": {"objective": "whole"}}, tmp_path / "state.pt")
    choices = trials.Choices(init="untrained:test_resnet")
    pool = trials.Pool(photos, choices)
    with pytest.raises(SystemExit, match="a trial of other choices"):
        trials.run(trials.Trial(choices), pool, tmp_path, 0, 1)


@pytest.mark.parametrize("source", ["cache", "folder"])
def test_other_components_leave_the_network_as_it_is(
    photos: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    torch.manual_seed(0)
    images = [photos[index].permute(2, 0, 1)[None] for index in range(4)]
    first = reduced_backbone(untrained_backbone("test_resnet").eval(), 6, images)
    save_backbone(first, tmp_path / "first")
    where = {"cache": ["--photos", "cache", "--source", "0"], "folder": ["--folder", "photos"]}
    given = [*where[source], "--init", "first", "--images", "5", "--out", "second"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["regional.py", *given])
    benchmark("regional").main()
    before, after = (load_backbone(str(tmp_path / one)) for one in ("first", "second"))
    changed = [name for name, value in after.net.state_dict().items() if value.is_floating_point()]
    assert all(
        torch.equal(after.net.state_dict()[name], before.net.state_dict()[name].half().float())
        for name in changed
    )
    assert not torch.equal(after.reduce.weight, before.reduce.weight)
    record = json.loads((tmp_path / "second" / "regional.json").read_text())
    assert record["images"] == 5
    # What is written is what the function gives for these images.
    ids = (
        np.random.default_rng(0).choice(10, 5, replace=False)
        if source == "cache"
        else [*range(0, 10, 2)]
    )
    known = load_backbone(str(tmp_path / "first"))
    asked = regional(known, (photos[int(index)].permute(2, 0, 1)[None] for index in ids))
    assert torch.equal(after.reduce.weight, asked.half().reduce.weight.float())


def test_some_images_are_evenly_spaced(trials: Any) -> None:
    spaced = benchmark("embedded").spaced
    assert spaced(10, 4) == [0, 2, 5, 7]
    assert spaced(3, 0) == spaced(3, 9) == [0, 1, 2]
