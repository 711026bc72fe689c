"""Pretraining: the losses, what a step sees, and what a run leaves and survives."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from iddc.backbones import load_backbone, save_backbone, untrained_backbone
from iddc.backbones.positions import Positions
from iddc.cli import main
from iddc.config import ContrastConfig, Experiment, PretrainConfig, Runtime
from iddc.errors import ConfigError, DataError, Interrupted, SetupError
from iddc.images import ImageFile, find_images
from iddc.pretraining import pretrain, write_scores
from iddc.pretraining.cache import ImageCache, estimated_bytes, fill_cache, find_cache
from iddc.pretraining.contrast import Contrast
from iddc.pretraining.dino import Dino
from iddc.pretraining.folder import WeightsFolder, write_card
from iddc.pretraining.learner import Learner, build_method
from iddc.pretraining.losses import (
    GlobalBatch,
    cross_view_entropy,
    koleo,
    masked_entropy,
    nt_xent,
    point_nce,
    sinkhorn,
)
from iddc.pretraining.views import (
    Crops,
    cut,
    draw_boxes,
    draw_colours,
    draw_mask,
    draw_pairs,
    draw_points,
    overlap,
)
from iddc.processes import Processes
from iddc.progress import Progress
from iddc.runs import Run
from tiny import photo
from torchrun import in_processes

CPU = torch.device("cpu")
ONE = Processes(CPU)
QUIET = Runtime(device="cpu", workers=0)
OFTEN = {"checkpoint_every": 1}


def tiny(method: str, **changes: Any) -> PretrainConfig:
    """A few steps of a network of 0.3 million weights on batches of 16 images."""
    contrast = {"small_size": 32, "large_size": 64, "warmup": 2}
    contrast |= {"recalibration_size": 64, "recalibration_steps": 2}
    dino = {"local_crops": 2, "prototypes": 16, "hidden": 32, "bottleneck": 16}
    settings: dict[str, Any] = {
        "method": method,
        "network": "test_resnet" if method == "contrast" else "test_vit",
        "depth": 0 if method == "contrast" else 1,
        "steps": 4,
        "batch_size": 16,
        "precision": "fp32",
        "contrast": contrast | changes.pop("contrast", {}),
        "dino": dino | {"global_size": 64, "local_size": 32} | changes.pop("dino", {}),
    }
    return PretrainConfig(**settings | changes)


def drawn(seed: int, side: int = 70) -> Image.Image:
    return photo(seed, (side + seed % 20, side))


@pytest.fixture
def files(tmp_path: Path) -> list[ImageFile]:
    """24 images, of which 8 are large enough for large crops."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        drawn(i, 180 if i % 3 == 0 else 70).save(folder / f"{i:02}.png")
    return list(find_images(folder).files)


@pytest.fixture
def photos(files: list[ImageFile], tmp_path: Path) -> ImageCache:
    return decoded([files[:10], files[10:]], tmp_path / "cache")


def decoded(sources: Sequence[Sequence[ImageFile]], cache: Path, **options: Any) -> ImageCache:
    settings = {"short_side": 200, "min_side": 28, "threads": 2, "check": lambda: None}
    return fill_cache(sources, cache, "key", **settings | options)


# Losses, against loops over their definitions -----------------------------------------------------


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second / first.norm() / second.norm())


def test_nt_xent_is_simclrs_equation_1() -> None:
    embeddings, total = some(4, 2, 5), 0.0
    rows = [embeddings[i, v] for i in range(4) for v in range(2)]
    for i, row in enumerate(rows):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = [math.exp(cosine(row, other) / 0.2) for j, other in enumerate(rows) if j != i]
        total -= math.log(math.exp(cosine(row, rows[partner]) / 0.2) / sum(others))
    assert nt_xent(embeddings, 0.2).item() == pytest.approx(total / 8)


def test_the_negatives_of_a_point_are_points_of_other_images() -> None:
    z, total = some(3, 2, 4, 5), 0.0
    places = [(image, point) for image in range(3) for point in range(4)]
    for here, there in ((0, 1), (1, 0)):
        for image, point in places:
            own = math.exp(cosine(z[image, here, point], z[image, there, point]) / 0.2)
            others = [
                math.exp(cosine(z[image, here, point], z[i, there, p]) / 0.2)
                for i, p in places
                if i != image
            ]
            total -= math.log(own / (own + sum(others)))
    assert point_nce(z, 0.2).item() == pytest.approx(total / 24)


def sinkhorn_by_loops(logits: Tensor) -> list[list[float]]:
    """Three rounds: every cluster, then every row, to the same sum."""
    rows, columns = logits.shape
    q = [[math.exp(float(logits[i, j])) for j in range(columns)] for i in range(rows)]
    for _ in range(3):
        for j in range(columns):
            total = sum(q[i][j] for i in range(rows))
            for i in range(rows):
                q[i][j] /= total
        for i in range(rows):
            total = sum(q[i])
            q[i] = [value / total for value in q[i]]
    return q


def test_sinkhorn_is_three_rounds_of_loops() -> None:
    logits = some(6, 3)
    torch.testing.assert_close(sinkhorn(logits), torch.tensor(sinkhorn_by_loops(logits)).double())


@given(rows=st.integers(2, 30), clusters=st.integers(2, 6), seed=st.integers(0, 99))
def test_balanced_rows_are_probabilities_and_no_cluster_is_empty(
    rows: int, clusters: int, seed: int
) -> None:
    probs = sinkhorn(some(rows, clusters, seed=seed))
    torch.testing.assert_close(probs.sum(1), torch.ones(rows).double())
    assert (probs.sum(0) > 0.25 * rows / clusters).all()


def test_the_class_token_is_predicted_from_every_other_crop() -> None:
    targets, log_probs = some(3, 2, 5).softmax(-1), some(3, 4, 5, seed=1).log_softmax(-1)
    pairs = [
        -float((targets[image, i] * log_probs[image, j]).sum())
        for image in range(3)
        for i in range(2)
        for j in range(4)
        if i != j
    ]
    expected = sum(pairs) / len(pairs)
    assert cross_view_entropy(targets, log_probs).item() == pytest.approx(expected)


def test_every_masked_crop_counts_the_same_however_much_of_it_is_masked() -> None:
    hidden = torch.tensor([[True, True, False], [False, False, False], [False, False, True]])
    targets, log_probs = some(3, 4).softmax(-1), some(3, 4, seed=1).log_softmax(-1)
    each = [-float((targets[i] * log_probs[i]).sum()) for i in range(3)]
    expected = (each[0] + each[1]) / 2 + each[2]
    assert masked_entropy(targets, log_probs, hidden).item() == pytest.approx(expected)


def test_spread_is_the_mean_log_distance_to_the_nearest() -> None:
    tokens = some(5, 3)
    rows = normalize(tokens, dim=1)
    nearest = [min(float((rows[i] - rows[j]).norm()) for j in range(5) if j != i) for i in range(5)]
    expected = -sum(map(math.log, nearest)) / 5
    assert koleo(tokens).item() == pytest.approx(expected)


# What a step sees ---------------------------------------------------------------------------------


@given(
    height=st.integers(28, 300),
    width=st.integers(28, 300),
    side=st.floats(8, 300),
    seed=st.integers(0, 99),
)
def test_boxes_lie_in_the_image(height: int, width: int, side: float, seed: int) -> None:
    sizes, sides = np.array([[height, width]] * 3, float), np.full((3, 4), side)
    boxes = draw_boxes(np.random.default_rng(seed), sizes, sides)
    left, top, wide, tall = np.moveaxis(boxes, -1, 0)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + wide <= width).all()
    assert (top + tall <= height).all()
    assert (boxes[..., 2:] >= 8).all()


def test_the_size_of_a_cache_is_estimated_from_the_headers(tmp_path: Path) -> None:
    for name, size in (("a.png", (40, 20)), ("b.png", (400, 200))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no image")
    files = list(find_images(tmp_path).files)
    assert estimated_bytes(files, 100) == 3 * (40 * 20 + 200 * 100)  # larger ones are reduced
    # Of many, every second one, and so on; these are all alike.
    assert estimated_bytes(files[:1] * 1200, 100) == 3 * 40 * 20 * 1200


def test_a_second_box_that_shares_little_is_better_than_one_that_shares_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, beside, touching = [0, 0, 100, 10], [150, 0, 50, 10], [99, 9, 10, 10]
    drawn = iter([[[first, first]], [[beside, touching]]])
    monkeypatch.setattr(
        "iddc.pretraining.views.draw_boxes", lambda *_: np.array(next(drawn), float)
    )
    (pair,) = draw_pairs(np.random.default_rng(0), np.array([[200.0, 200.0]]), 8, 0.4).tolist()
    assert pair == [first, touching]


def test_pairs_share_the_asked_part_of_the_smaller_box() -> None:
    sizes = np.full((200, 2), 100.0)
    boxes = draw_pairs(np.random.default_rng(0), sizes, 28, 0.4)
    shared = overlap(boxes[:, 0], boxes[:, 1])[:, 2:].clip(0).prod(1)
    smaller = boxes[..., 2:].prod(-1).min(1)
    assert (shared >= 0.4 * smaller).mean() > 0.98  # of few, no second box of the twelve does
    assert boxes[..., 2:].min() < 35
    assert boxes[..., 2:].max() > 95


def test_matching_points_show_the_same_place(tmp_path: Path) -> None:
    """In an image whose red is x and whose green is y, both crops show the same colour there."""
    y, x = np.mgrid[:200, :240].astype(np.uint8)
    Image.fromarray(np.stack([x, y, x * 0], axis=-1)).save(tmp_path / "places.png")
    photos = decoded([find_images(tmp_path).files], tmp_path / "cache")
    rng = np.random.default_rng(0)
    boxes = draw_pairs(rng, np.array([[200.0, 240.0]] * 20), 60, 0.4)
    flips = rng.random((20, 2)) < 0.5
    points = draw_points(rng, boxes, flips, 3)
    crops = cut(photos, [0] * 20, boxes, flips, 64)
    seen = torch.nn.functional.grid_sample(
        crops.flatten(0, 1).float(), points.flatten(0, 1)[:, :, None], align_corners=False
    )
    places = seen[..., 0].unflatten(0, (20, 2))[:, :, :2]
    inside = (points.abs() < 0.95).all(-1).all(1)  # at the edge, interpolation has nothing to go on
    error = (places[:, 0] - places[:, 1]).abs().amax(1)[inside]
    assert inside.float().mean() > 0.7
    assert error.max() < 1.5
    assert places[:, 0].std() > 20


def test_masks_lie_as_often_in_one_corner_as_in_another() -> None:
    rng = np.random.default_rng(0)
    often = np.mean([draw_mask(rng, 8, 0.3) for _ in range(2000)], axis=0)
    corners = often[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners == pytest.approx([corners.mean()] * 4, abs=0.03)
    assert often == pytest.approx(often.T, abs=0.04)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_about_the_asked_share_of_patches_is_masked(share: float) -> None:
    for seed in range(50):
        masked = draw_mask(np.random.default_rng(seed), 12, share).sum()
        assert 0.9 * share * 144 <= masked <= round(share * 144)


def recoloured(jitter: float, gray: float) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(256, (2, 2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    colours = draw_colours(np.random.default_rng(0), (2, 2), jitter, gray)
    crops = Crops(pixels.to(torch.uint8), *colours)
    return pixels.flatten(0, 1) / 255, crops.recoloured(CPU)


def test_boxes_have_ratios_from_three_quarters_to_four_thirds_and_the_asked_area() -> None:
    rng = np.random.default_rng(0)
    boxes = draw_boxes(rng, np.full((500, 2), 4000.0), np.full((500, 4), 300.0))
    wide, tall = boxes[..., 2], boxes[..., 3]
    ratio = wide / tall
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.02  # as often tall as wide
    assert np.allclose(wide * tall, 300**2, rtol=0.01)


def test_colours_are_turned_around_grey_and_scaled_all_alike() -> None:
    """In NTSC's YIQ: brightness stays apart, and the two axes of colour turn by one angle."""
    matrix, _ = draw_colours(np.random.default_rng(0), (50, 2), 1.0, 0.0)
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turned = yiq @ matrix @ torch.linalg.inv(yiq)
    zero = torch.zeros(50, 2)
    for row, column in ((0, 1), (0, 2), (1, 0), (2, 0)):
        assert torch.allclose(turned[..., row, column], zero, atol=1e-4)
    assert torch.allclose(turned[..., 1, 1], turned[..., 2, 2], atol=1e-4)
    assert torch.allclose(turned[..., 1, 2], -turned[..., 2, 1], atol=1e-4)
    assert turned[..., 2, 1].abs().max() > 0.1


def test_each_change_of_colour_spans_its_range() -> None:
    """At full strength: contrast and brightness 0.2 to 1.8, saturation 0.4 to 1.6, hue 0.3 rad."""
    matrix, offset = draw_colours(np.random.default_rng(0), (1000, 2), 1.0, 0.0)
    both = matrix.sum(dim=-1).mean(dim=-1)  # what grey is multiplied by
    brightness = both + offset
    contrast = both / brightness
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turned = yiq @ matrix @ torch.linalg.inv(yiq) / both[..., None, None]
    hue = torch.atan2(turned[..., 2, 1], turned[..., 1, 1])
    saturation = torch.hypot(turned[..., 2, 1], turned[..., 1, 1])
    for found, middle, reach in (
        (contrast, 1, 0.8),
        (brightness, 1, 0.8),
        (saturation, 1, 0.6),
        (hue, 0, 0.3),
    ):
        for side in (found.max() - middle, middle - found.min()):
            assert 0.98 * reach < side <= reach + 1e-3


def test_without_jitter_colours_stay() -> None:
    before, after = recoloured(0.0, 0.0)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_grey_crops_have_equal_channels_and_values_stay_in_range() -> None:
    _, after = recoloured(1.0, 1.0)
    torch.testing.assert_close(after[:, 0], after[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[:, 1], after[:, 2], atol=1e-5, rtol=0)
    assert after.min() >= 0
    assert after.max() <= 1


def views_of(photos: ImageCache, config: PretrainConfig, processes: Processes = ONE) -> Any:
    return build_method(config).views(photos, processes)


def tensors(batch: Any) -> list[Tensor]:
    parts = [getattr(batch, name) for name in ("crops", "large", "small") if hasattr(batch, name)]
    found = [crops.pixels for crops in parts if isinstance(crops, Crops)]
    found += [crops.matrix for crops in parts if isinstance(crops, Crops)]
    return [*found, batch.points if hasattr(batch, "points") else batch.masks]


@pytest.mark.parametrize("method", ["contrast", "dino"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_batch_follows_from_the_seed_and_the_step_whoever_cuts_it(
    photos: ImageCache, method: str, step: int
) -> None:
    config = tiny(method)
    whole = views_of(photos, config)[step]
    parts = [views_of(photos, config, Processes(CPU, rank, 2))[step] for rank in range(2)]
    assert whole.ids == parts[0].ids + parts[1].ids
    for tensor, *others in zip(tensors(whole), *map(tensors, parts), strict=True):
        assert torch.equal(tensor, torch.cat(others))
    other = views_of(photos, config.model_copy(update={"seed": 1}))[step]
    assert other.ids != whole.ids


def test_every_second_batch_has_large_crops_of_large_images(photos: ImageCache) -> None:
    views = views_of(photos, tiny("contrast"))
    batches = [views[step] for step in range(6)]
    assert [batch.large for batch in batches] == [False, True] * 3
    assert [batch.crops.pixels.shape[-1] for batch in batches] == [32, 64] * 3
    assert [len(batch.ids) for batch in batches] == [16, 4] * 3
    assert [batch.points.shape[2] for batch in batches] == [9, 36] * 3
    assert all(photos.sizes[batch.ids].min() >= 80 for batch in batches if batch.large)
    assert all(len({*batch.ids}) == len(batch.ids) for batch in batches)


def test_a_batch_of_large_crops_has_two_images_at_least(photos: ImageCache) -> None:
    batch = views_of(photos, tiny("contrast", batch_size=8, contrast={"large_size": 96}))[1]
    assert (batch.large, len(batch.ids)) == (True, 2)


def test_unless_told_otherwise_a_pretraining_counts_steps() -> None:
    assert (PretrainConfig().epochs, PretrainConfig().steps) == (0, 2200)


@pytest.mark.parametrize("name", ["small_shares", "large_shares"])
def test_shares_are_any_numbers_of_which_one_is_above_zero(name: str) -> None:
    for good in ((), (0.5, 0.25), (0.0, 0.001), (3.0, 4.0)):
        assert getattr(ContrastConfig(**{name: good}), name) == good
    for bad in ((0.0, 0.0), (-0.5, 2.0)):
        with pytest.raises(ValueError, match=f"{name} must not be negative nor all zero"):
            ContrastConfig(**{name: bad})


def test_a_rate_is_any_number_above_zero() -> None:
    assert PretrainConfig(dino={"learning_rate": 1e-3}).dino.learning_rate == 1e-3
    with pytest.raises(ValueError, match="greater than 0"):
        PretrainConfig(dino={"learning_rate": 0.0})


def test_two_images_are_enough(files: list[ImageFile], tmp_path: Path) -> None:
    photos = decoded([files[:2]], tmp_path / "cache")
    assert sorted(views_of(photos, tiny("contrast"))[0].ids) == [0, 1]


def test_without_large_images_all_crops_are_small(photos: ImageCache) -> None:
    views = views_of(photos, tiny("contrast", contrast={"large_min_side": 300}))
    assert not any(views[step].large for step in range(6))


def test_shares_say_how_many_images_of_each_source_are_in_a_batch(photos: ImageCache) -> None:
    views = views_of(photos, tiny("contrast", contrast={"small_shares": (1.0, 3.0)}))
    assert np.bincount(photos.sources[views[0].ids]).tolist() == [4, 12]


def test_batches_keep_their_shares_where_a_source_has_few_images(photos: ImageCache) -> None:
    views = views_of(photos, tiny("contrast", contrast={"small_shares": (3.0, 1.0)}))
    assert np.bincount(photos.sources[views[0].ids]).tolist() == [10, 3]


def test_a_source_without_large_images_gives_none(files: list[ImageFile], tmp_path: Path) -> None:
    small = [file for i, file in enumerate(files) if i % 3]
    large = [file for i, file in enumerate(files) if i % 3 == 0]
    photos = decoded([small, large], tmp_path / "cache")
    views = views_of(photos, tiny("contrast", contrast={"large_shares": (0.9, 0.1)}))
    assert [len(views[step].ids) for step in (1, 3)] == [4, 4]
    config = tiny("contrast", contrast={"large_shares": (1.0, 0.0)})
    with pytest.raises(ConfigError, match="too few images of 80 pixels"):
        build_method(config).views(photos, ONE)


def test_small_shares_of_nothing_are_refused(files: list[ImageFile], tmp_path: Path) -> None:
    photos = decoded([files, []], tmp_path / "cache")
    with pytest.raises(ConfigError, match="small-shares"):
        views_of(photos, tiny("contrast", contrast={"small_shares": (0.0, 1.0)}))


def test_an_epoch_of_dino_shows_every_image_once(photos: ImageCache) -> None:
    views = views_of(photos, tiny("dino"))
    assert sorted(views[0].ids + views[1].ids) == list(range(24))


# Decoded photos -----------------------------------------------------------------------------------


def test_photos_are_the_decoded_images_reduced_to_the_short_side(
    files: list[ImageFile], tmp_path: Path
) -> None:
    photos = decoded([files], tmp_path / "cache", short_side=100)
    with Image.open(files[1].path) as image:
        assert np.array_equal(photos[1].numpy(), np.asarray(image))
    assert photos.sizes[0].tolist() == [100, 100]
    assert photos.sources.tolist() == [0] * 24


def test_what_cannot_be_used_is_named_and_the_sources_of_the_others_stay(
    files: list[ImageFile], tmp_path: Path
) -> None:
    files[2].path.write_bytes(files[2].path.read_bytes()[:300])
    drawn(0, 20).save(files[12].path)
    photos = decoded([files[:10], files[10:]], tmp_path / "cache")
    assert [index for index, _ in photos.failures] == [2, 12]
    assert "damaged" in photos.failures[0][1]
    assert photos.failures[1][1] == "20 x 20 pixels, smaller than --min-side 28"
    assert photos.sources.tolist() == [0] * 9 + [1] * 13


@pytest.mark.parametrize("name", ["index.npz", "pixels.u8"])
def test_a_cache_that_is_cut_short_is_none(photos: ImageCache, tmp_path: Path, name: str) -> None:
    assert find_cache(tmp_path / "cache", "key") is not None
    path = tmp_path / "cache" / name
    path.write_bytes(path.read_bytes()[:-50])
    assert find_cache(tmp_path / "cache", "key") is None


def test_a_cache_of_images_that_are_all_left_out_is_empty(
    files: list[ImageFile], tmp_path: Path
) -> None:
    photos = decoded([files], tmp_path / "cache", min_side=1000)
    assert (len(photos), len(photos.failures)) == (0, len(files))


def test_a_cache_of_other_images_is_none(photos: ImageCache, tmp_path: Path) -> None:
    assert find_cache(tmp_path / "cache", "other") is None


def test_a_disk_without_room_is_said_before_anything_is_written(
    files: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SetupError, match=r"about 1.* MB in .*smaller --short-side"):
        decoded([files], tmp_path / "cache")
    assert not [*(tmp_path / "cache").iterdir()]


# The global batch ---------------------------------------------------------------------------------


class Half(Processes):
    """One of two processes, of which the other has these rows: what gloo would exchange."""

    def __init__(self, rank: int, others: Tensor) -> None:
        super().__init__(CPU, rank, 2)
        self.others = others

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(rows) == counts[self.rank]
        return torch.cat([rows, self.others] if self.rank == 0 else [self.others, rows])


def test_the_parts_of_a_loss_add_up_to_it_and_so_do_their_gradients() -> None:
    rows = some(5, 2, 3).float().requires_grad_()
    loss = nt_xent(rows, 0.2)
    (expected,) = torch.autograd.grad(loss, rows)
    parts, gradients = [], []
    halves = rows.detach().split([2, 3])
    for rank, half in enumerate(halves):
        own = half.clone().requires_grad_()
        everyone = GlobalBatch(Half(rank, halves[1 - rank]), [2, 3])
        part = everyone.loss(lambda every: nt_xent(every, 0.2), own)
        parts.append(part.detach())
        gradients += torch.autograd.grad(part, own)
    torch.testing.assert_close(sum(parts), loss.detach())
    torch.testing.assert_close(torch.cat(gradients), expected)


def test_the_center_is_the_mean_over_all_processes() -> None:
    mine, theirs = some(2, 3), some(4, 3, seed=1)
    sums = torch.cat([theirs.sum(0), torch.tensor([4.0]).double()])[None]
    mean = GlobalBatch(Half(0, sums), [1, 1]).mean(mine)
    torch.testing.assert_close(mean, torch.cat([mine, theirs]).mean(0))


# A step -------------------------------------------------------------------------------------------


def learner_of(photos: ImageCache, config: PretrainConfig) -> Learner:
    return Learner(build_method(config), photos, config, ONE)


def step_of(learner: Learner) -> dict[str, float]:
    batch = learner.views[learner.step]
    return learner.learn(batch, [len(batch.ids)])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("contrast", {"learning_rate": 3e-3, "large_every": 0}),
        ("contrast", {"learning_rate": 3e-3, "large_every": 1}),
        ("dino", {"centering": "sinkhorn", "momentum": 1.0, "shared_head": False}),
    ],
    ids=["small crops", "large crops", "dino with a teacher that stays"],
)
def test_the_loss_of_a_batch_falls(
    photos: ImageCache, method: str, changes: dict[str, Any]
) -> None:
    learner = learner_of(photos, tiny(method, steps=30, **{method: changes}))
    batch = learner.views[0]
    losses = [learner.learn(batch, [len(batch.ids)])["loss"] for _ in range(30)]
    assert losses[-1] < losses[0] - 0.3


def test_without_points_the_whole_is_all_that_is_contrasted(photos: ImageCache) -> None:
    config = tiny("contrast", contrast={"small_grid": 0, "large_every": 0})
    learner = learner_of(photos, config)
    numbers = step_of(learner)
    assert numbers["loss"] == numbers["whole"] > 0
    assert not [name for name in numbers if name.startswith("points")]
    assert learner.method.result(photos).embed_dim == config.components


def test_dino_holds_its_prototypes_in_the_first_epoch_and_moves_the_rest(
    photos: ImageCache,
) -> None:
    learner = learner_of(photos, tiny("dino", steps=8))
    student = learner.method.student
    seen = []
    for _ in range(4):  # an epoch is two steps
        before = [p.detach().clone() for p in (student.whole.prototypes, student.mask_token)]
        step_of(learner)
        after = (student.whole.prototypes, student.mask_token)
        seen.append([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert seen == [[True, False], [True, False], [False, False], [False, False]]


def test_the_teacher_is_the_moving_average_of_the_student(photos: ImageCache) -> None:
    config = tiny("dino", dino={"momentum": 0.75})
    learner = learner_of(photos, config)
    method = learner.method
    before = [p.detach().clone() for p in method.teacher.parameters()]
    step_of(learner)
    moved = zip(before, method.student.parameters(), method.teacher.parameters(), strict=True)
    for old, student, teacher in moved:
        torch.testing.assert_close(teacher, 0.75 * old + 0.25 * student)


def test_the_average_of_contrast_forgets_its_first_weights_fast(photos: ImageCache) -> None:
    """The momentum is (1 + t) / (10 + t) at first: 1/10, then 2/11."""
    learner = learner_of(photos, tiny("contrast"))
    method = learner.method
    for momentum in (1 / 10, 2 / 11):
        before = [p.detach().clone() for p in method.average.parameters()]
        step_of(learner)
        moved = zip(before, method.online.parameters(), method.average.parameters(), strict=True)
        for old, online, average in moved:
            torch.testing.assert_close(average, momentum * old + (1 - momentum) * online)


def test_a_point_in_the_middle_of_a_patch_is_read_from_it_alone(photos: ImageCache) -> None:
    method = (learner := learner_of(photos, tiny("contrast"))).method
    batch, read = learner.views[0], []
    method.dense[0].register_forward_pre_hook(lambda _, rows: read.append(rows[0]))
    with torch.no_grad():
        features = method._stages(method.online, batch)[0]
        side = features.shape[-1]
        middles = (2 * torch.arange(side) + 1) / side - 1
        points = torch.cartesian_prod(middles, middles).flip(1)  # x, y, row by row
        points = points.expand(len(batch.ids), 2, -1, -1)
        method.losses(replace(batch, points=points), GlobalBatch(ONE, [len(batch.ids)]))
    (rows,) = read
    expected = normalize(features, dim=1) * features.shape[1] ** 0.5
    torch.testing.assert_close(rows, expected.flatten(2).transpose(1, 2).flatten(0, 1))


def test_all_stages_together_weigh_as_much_as_the_whole(photos: ImageCache) -> None:
    """A network that knows nothing pays about the logarithm of the choices, once for each part."""
    contrast = {"large_every": 0, "temperature": 1e3}  # so that all choices look alike
    numbers = step_of(learner_of(photos, tiny("contrast", contrast=contrast)))
    points = [value for name, value in numbers.items() if name.startswith("points")]
    grid, images = PretrainConfig().contrast.small_grid ** 2, 16
    assert len(points) > 1
    assert numbers["whole"] == pytest.approx(math.log(2 * images - 1), abs=0.01)
    assert sum(points) == pytest.approx(math.log(1 + (images - 1) * grid), abs=0.01)


def test_koleo_is_the_mean_over_both_large_crops(photos: ImageCache) -> None:
    learner = learner_of(photos, tiny("dino", dino={"koleo_weight": 0.5}))
    batch, student = learner.views[0], learner.method.student
    with torch.no_grad():
        images, masks = batch.large.recoloured(CPU), batch.masks.flatten(0, 1)
        tokens = student.tokens(images, masks)[0].unflatten(0, (-1, 2))
        expected = 0.5 * (koleo(tokens[:, 0]) + koleo(tokens[:, 1])) / 2
    numbers = learner.learn(batch, [len(batch.ids)])
    assert numbers["koleo"] == pytest.approx(float(expected), rel=1e-4)


def test_matrices_decay_in_a_pretraining_and_vectors_do_not(photos: ImageCache) -> None:
    learner = learner_of(photos, tiny("dino"))
    batch = learner.views[0]
    learner.learn(batch, [len(batch.ids)])
    decay = learner.method.rates(0)[1]
    assert decay > 0
    found = {
        (weight.ndim > 1, group["weight_decay"])
        for group in learner._optimizer.param_groups
        for weight in group["params"]
    }
    assert found == {(True, decay), (False, 0.0)}


def test_the_center_follows_the_teachers_scores(photos: ImageCache) -> None:
    learner = learner_of(photos, tiny("dino"))
    method = learner.method
    batch = learner.views[0]
    images = batch.large.recoloured(CPU)
    with torch.no_grad():
        mean = method.teacher.whole(method.teacher.tokens(images)[0]).mean(0)
    learner.learn(batch, [len(batch.ids)])
    torch.testing.assert_close(method.whole_center, 0.1 * mean)


def test_balanced_targets_are_those_of_the_sharpened_scores() -> None:
    """The first temperature of the teacher sharpens the scores of the first step."""
    method = build_method(tiny("dino", dino={"centering": "sinkhorn"}))
    scores, temperature = some(6, 16).float(), PretrainConfig().dino.first_teacher_temperature
    targets = method._targets(scores, "whole", GlobalBatch(ONE, [6]))
    torch.testing.assert_close(targets, sinkhorn(scores / temperature))


def test_the_student_does_not_see_masked_patches(photos: ImageCache) -> None:
    method = build_method(tiny("dino"))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[..., :16, :16] = 0  # the first of 4 x 4 patches
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = True
    hidden = [method.student.tokens(each, masks)[1] for each in (images, changed)]
    assert torch.equal(*hidden)
    assert not torch.equal(*(method.student.tokens(each)[1] for each in (images, changed)))


def test_schedules_of_contrast_rise_stay_and_end_at_zero() -> None:
    changes = {"learning_rate": 1.0, "cooldown": 0.5}
    method = build_method(tiny("contrast", steps=100, contrast=changes))
    rates = [method.rates(step)[0] for step in range(100)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[50] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_schedules_of_dino_are_cosines_after_the_warmup() -> None:
    changes = {"learning_rate": 1.0, "final_learning_rate": 0.0}
    method = build_method(tiny("dino", steps=100, dino=changes))
    rates, decays = zip(*(method.rates(step) for step in range(100)), strict=True)
    assert rates[:2] == pytest.approx((0.1, 0.2))
    assert rates[55] == pytest.approx(0.5)
    assert decays[0] == pytest.approx(0.04)
    assert decays[50] == pytest.approx(0.22)


def test_the_result_of_contrast_has_batch_norms_of_its_own_images(photos: ImageCache) -> None:
    learner = learner_of(photos, tiny("contrast"))
    step_of(learner)
    backbone = learner.method.result(photos)
    (norm, *_) = [m for m in backbone.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norm.num_batches_tracked == 2
    assert norm.momentum == 0.1
    assert not backbone.net.training


def test_the_last_part_of_a_pretraining_says_how_far_it_is(
    photos: ImageCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("iddc.progress.INTERVAL", 0)
    learner_of(photos, tiny("contrast")).method.result(photos, Progress())
    lines = capsys.readouterr().err.splitlines()
    last = "100%  image 8 of 8  eta 0:00"  # of the 14 photos, those that are large enough
    assert lines[1] == "batch norms  100%  batch 2 of 2  eta 0:00"
    assert [line for line in lines if "100%" in line][1:] == [
        f"components 1/2  {last}", f"components 2/2  {last}",
    ]  # fmt: skip


def test_the_mean_of_a_batch_norm_is_that_of_all_its_batches_alike(photos: ImageCache) -> None:
    learner = learner_of(photos, tiny("contrast", contrast={"recalibration_steps": 3}))
    norms = [m for m in learner.method.average.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    seen = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            seen.append(inputs[0].mean((0, 2, 3)))

    with norms[0].register_forward_pre_hook(note):
        learner.method.result(photos)
    assert len(seen) == 3
    torch.testing.assert_close(norms[0].running_mean, torch.stack(seen).mean(0))


# A whole run --------------------------------------------------------------------------------------


def run(
    files: Sequence[ImageFile], out: Path, config: PretrainConfig, **options: Any
) -> torch.nn.Module:
    runtime = QUIET.model_copy(update=options.pop("runtime", {}))
    return pretrain({"photos": files}, config, out, runtime, **options)


def weights(out: Path) -> bytes:
    return (out / "backbone.safetensors").read_bytes()


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class At(Progress):
    """Does something once a step is done and written down."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        super().__init__()
        self.step = step
        self.action = action

    def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None:
        if where.startswith("epoch") and done == self.step:
            self.action()


def image_bytes(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images from 64 to 400 pixels in a zip, one of them damaged, and in a folder."""
    root = tmp_path_factory.mktemp("collection")
    sides = [64, 80, 120, 200, 400]
    with zipfile.ZipFile(root / "many.zip", "w") as archive:
        for i in range(120):
            data = image_bytes(drawn(i, sides[i % 5]))
            archive.writestr(f"inner/{i}.jpg", data[:-500] if i == 7 else data)
    (root / "photos").mkdir()
    for i in range(80):
        (root / "photos" / f"{i}.jpg").write_bytes(image_bytes(drawn(i, sides[i % 5])))
    return root


def arguments(config: PretrainConfig) -> list[str]:
    words = []
    for group in ("", "contrast", "dino"):
        values = getattr(config, group).model_dump() if group else config.model_dump()
        prefix = f"--{group}." if group else "--"
        plain = {k: v for k, v in values.items() if not isinstance(v, dict | tuple | bool)}
        words += [f"{prefix}{k.replace('_', '-')}={v}" for k, v in plain.items()]
    return words


@pytest.mark.parametrize("method", ["contrast", "dino"])
def test_the_command_leaves_a_backbone_that_embeds_images(
    collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "weights"
    sources = [str(collection / "many.zip"), str(collection / "photos")]
    options = ["--device", "cpu", "--workers", "1", *arguments(tiny(method))]
    assert main(["pretrain", *sources, "--out", str(out), *options]) == 0
    backbone = load_backbone(str(out))
    features = backbone(torch.rand(2, 3, 64, 96))
    assert features.shape[1] == backbone.embed_dim
    assert features.isfinite().all()
    assert features.std() > 0
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4]
    name, reason = (out / "skipped.csv").read_text().splitlines()[1].split(",", 1)
    assert name.endswith("many.zip/inner/7.jpg")
    assert "damaged or cut short" in reason
    assert not (out / "cache").exists()
    assert not (out / "checkpoint").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"200 images · {method} · ")
    assert f"next: iddc train {sources[0]} --backbone {out}" in lines[-1]
    card = (out / "README.md").read_text()
    assert "199 unlabelled images" in card
    assert all(f"- `{source}`" in card for source in sources)
    assert f"Method: `{method}`" in card
    assert "4 steps" in card
    assert card.endswith("## Scores\n\nnot measured\n")


@pytest.mark.parametrize("method", ["contrast", "dino"])
def test_a_pretraining_begins_with_the_weights_of_init(
    files: list[ImageFile], tmp_path: Path, method: str
) -> None:
    run(files, tmp_path / "first", tiny(method, steps=1, components=8))
    known = load_backbone(str(tmp_path / "first")).net.state_dict()
    config = tiny(method, init=str(tmp_path / "first"), seed=3)
    begun = build_method(config)
    backbone = begun.online if isinstance(begun, Contrast) else begun.student.backbone
    found = backbone.net.state_dict()
    assert all(torch.equal(found[name], known[name]) for name in known)
    assert backbone.embed_dim > 8  # all channels of the stages, not their components
    run(files, tmp_path / "second", config)
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"- Start: `{tmp_path / 'first'}`." in card
    assert "licence: not known to iddc" in card
    assert load_backbone(str(tmp_path / "second")).architecture.timm_name == config.network


@pytest.mark.parametrize("positions", ["timm", "dino"])
def test_a_vit_goes_on_with_the_positions_of_init(tmp_path: Path, positions: Positions) -> None:
    known = untrained_backbone("test_vit", options={"depth": 1}, positions=positions)
    save_backbone(known, tmp_path / "known")
    begun = build_method(tiny("dino", init=str(tmp_path / "known")))
    assert isinstance(begun, Dino)
    image = some(1, 3, 64, 96).sigmoid()  # not the grid that was learned
    found = begun.student.backbone.eval()(image)
    assert torch.allclose(found, known.eval()(image), atol=1e-5)


def test_the_folder_of_init_is_not_replaced(files: list[ImageFile], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(files, out, tiny("dino", steps=1))
    before = weights(out)
    with pytest.raises(ConfigError, match="is the folder of --init"):
        run(files, out, tiny("dino", init=str(out)), overwrite=True)
    assert weights(out) == before


def test_the_card_of_what_began_with_the_bundled_backbone_says_its_licence(tmp_path: Path) -> None:
    config = PretrainConfig(init="bundled")
    with WeightsFolder.begin(tmp_path / "out", config, sources=["photos"]) as folder:
        (folder.path / "log.jsonl").write_text("")
        write_card(folder, load_backbone("bundled").architecture, num_images=20, hardware="a CPU")
    assert "CC BY-NC 4.0" in (tmp_path / "out" / "README.md").read_text()


def test_scores_take_the_place_of_not_measured(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No model card"):
        write_scores(tmp_path, "good")
    (tmp_path / "README.md").write_text("# Card\n\n## Scores\n\nnot measured\n")
    write_scores(tmp_path, "| a | b |\n")
    assert (tmp_path / "README.md").read_text() == "# Card\n\n## Scores\n\n| a | b |\n"


def test_epochs_count_the_images(files: list[ImageFile], tmp_path: Path) -> None:
    run(files, tmp_path / "out", tiny("dino", epochs=2))
    assert [line["images"] for line in log(tmp_path / "out")] == [12] * 4
    run(files, tmp_path / "pairs", tiny("contrast", epochs=2))
    assert [line["images"] for line in log(tmp_path / "pairs")] == [16, 4] * 3


def test_threads_do_not_change_the_result(files: list[ImageFile], tmp_path: Path) -> None:
    for workers in (0, 3):
        out = tmp_path / str(workers)
        run(files, out, tiny("contrast"), runtime={"workers": workers})
    assert weights(tmp_path / "0") == weights(tmp_path / "3")


@pytest.mark.parametrize("method", ["contrast", "dino"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pretraining_that_was_interrupted_ends_with_the_same_bytes(
    files: list[ImageFile], tmp_path: Path, method: str, signum: int, code: int
) -> None:
    out = tmp_path / "out"
    run(files, tmp_path / "undisturbed", tiny(method))
    stop = At(2, lambda: signal.raise_signal(signum))
    with pytest.raises(Interrupted, match="after step 2 of 4") as caught:
        run(files, out, tiny(method), progress=stop)
    assert caught.value.exit_code == code
    assert not (out / "backbone.json").exists()
    run(files, out, tiny(method))
    assert weights(out) == weights(tmp_path / "undisturbed")
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4]


def test_a_pretraining_that_was_killed_ends_with_the_same_bytes(
    files: list[ImageFile], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(files, tmp_path / "undisturbed", tiny("contrast"))
    die = At(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child = multiprocessing.get_context("fork").Process(
        target=lambda: run(files, out, tiny("contrast"), progress=die, runtime=OFTEN)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [line["step"] for line in log(out)] == [1, 2, 3]
    run(files, out, tiny("contrast"), runtime=OFTEN)
    assert weights(out) == weights(tmp_path / "undisturbed")


def test_a_signal_while_images_are_decoded_stops(
    files: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(self: Progress, total: int, done: int = 0) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(At, "begin", signalled)
    with pytest.raises(Interrupted, match="while images were decoded") as caught:
        run(files, tmp_path / "out", tiny("dino"), progress=At(-1, lambda: None))
    assert caught.value.exit_code == 143
    run(files, tmp_path / "out", tiny("dino"))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("contrast", {}),
        ("dino", {"centering": "mean", "koleo_weight": 0.1}),
        ("dino", {"centering": "sinkhorn"}),
    ],
)
def test_two_processes_pretrain_one_backbone(
    files: list[ImageFile], tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    config = tiny(method, **{method: changes})

    def work(_rank: int) -> Tensor:
        backbone = run(files, tmp_path / "two", config)
        return torch.cat([parameter.flatten() for parameter in backbone.parameters()]).detach()

    first, second = in_processes(2, work, tmp_path)
    assert torch.equal(first, second)
    run(files, tmp_path / "one", config)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [line["images"] for line in one] == [line["images"] for line in two]
    if method == "dino":  # batch norms see the images of their own process
        for name in ("loss", "whole", "patches", "gradient_norm"):
            expected = [line[name] for line in one]
            assert [line[name] for line in two] == pytest.approx(expected, rel=1e-3)


# What goes wrong ----------------------------------------------------------------------------------


def test_too_few_images_are_refused_before_anything_is_written(
    files: list[ImageFile], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="Found 15 usable images"):
        run(files[:15], tmp_path / "out", tiny("contrast"))
    assert not (tmp_path / "out").exists()


def test_images_smaller_than_the_smallest_crop_are_left_out_and_named(
    files: list[ImageFile], tmp_path: Path
) -> None:
    drawn(0, 20).save(files[5].path)
    run(files, tmp_path / "out", tiny("contrast"))
    rows = (tmp_path / "out" / "skipped.csv").read_text()
    assert rows == 'name,reason\n05.png,"20 x 20 pixels, smaller than --min-side 28"\n'


def test_too_many_unusable_images_stop_and_are_listed(
    files: list[ImageFile], tmp_path: Path
) -> None:
    for file in files[:3]:
        file.path.write_bytes(file.path.read_bytes()[:300])
    with pytest.raises(DataError, match="3 of 24 images cannot be read, more than the 5%") as e:
        run(files, tmp_path / "out", tiny("contrast"))
    assert e.value.exit_code == 3
    assert len((tmp_path / "out" / "skipped.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("contrast", {"network": "test_vit"}, "Give --method dino"),
        ("dino", {"network": "test_resnet", "depth": 0}, "Give --method contrast"),
        ("dino", {"dino": {"global_size": 72}}, "global-size must be a multiple of .* 16"),
        ("contrast", {"network": "resnt18"}, "resnt18"),
        ("contrast", {"init": "bundled"}, "timm_name 'test_resnet'; found 'resnet18'"),
        ("contrast", {"init": "bundled", "network": "resnet18", "stages": (2, 3)}, "with stages"),
        ("contrast", {"contrast": {"small_shares": (1.0, 2.0)}}, "each of the 1 sources"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    files: list[ImageFile], tmp_path: Path, method: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(files, tmp_path / "out", tiny(method, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contrast.jitter", "3"], "--contrast.jitter: expected less than or equal to 1"),
        (["--contrast.large-shares", "0", "0"], "all zero"),
        (["--dino.min-masked", "0.6"], "min_masked must not exceed max_masked"),
        (["--dino.local-scale", "0.5"], "local_scale must not exceed global_scale"),
        ([], "IMAGES"),
    ],
)
def test_wrong_options_are_a_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    images = [str(tmp_path)] if options else []
    assert main(["pretrain", *images, "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_run_with_other_options_is_refused_and_overwrite_starts_anew(
    files: list[ImageFile], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop = At(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(files, out, tiny("dino"), progress=stop)
    changed = tiny("dino", dino={"momentum": 0.5})
    with pytest.raises(ConfigError, match=r"dino\.momentum: 0\.994 in the run, 0\.5 asked"):
        run(files, out, changed)
    run(files, out, changed, overwrite=True)
    with pytest.raises(ConfigError, match="holds a finished run"):
        run(files, out, changed)
    assert load_backbone(str(out)).embed_dim == 64


def test_the_folder_of_another_command_is_refused(files: list[ImageFile], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run.start(out, Experiment(), source="photos").close()
    (out / "model.json").write_text("a model")
    Run(out).finish()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="something else than a run"):
            run(files, out, tiny("contrast"), overwrite=overwrite)
    assert Run(out).finished


def test_a_checkpoint_that_is_cut_short_is_kept_and_said(
    files: list[ImageFile], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop = At(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(files, out, tiny("dino"), progress=stop)
    path = out / "checkpoint" / "state.pt"
    path.write_bytes(short := path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"state\.pt cannot be read"):
        run(files, out, tiny("dino"))
    assert path.read_bytes() == short


def test_a_weights_folder_of_another_architecture_is_one_sentence(
    files: list[ImageFile], tmp_path: Path
) -> None:
    for method in ("contrast", "dino"):
        run(files, tmp_path / method, tiny(method, steps=1))
    (tmp_path / "dino" / "backbone.safetensors").write_bytes(weights(tmp_path / "contrast"))
    with pytest.raises(DataError, match="does not fit this architecture"):
        load_backbone(str(tmp_path / "dino"))
