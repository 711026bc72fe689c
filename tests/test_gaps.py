"""Pixels without data count in nothing. Oracles: positions on paper, and colours that none has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from iddc.analysis import _Look
from iddc.backbones import Backbone
from iddc.config import Experiment, PredictionConfig, Runtime, TrainingConfig, ViewsConfig
from iddc.datasets.labelfiles import read_pair
from iddc.gaps import data_patches, fill_pixels, filled, stand_ins
from iddc.images import Picture, find_images
from iddc.labelling.samples import NONE, predict_samples, shares
from iddc.learning.embeddings import EmbeddingCache, Wanted
from iddc.masks import Collection
from iddc.metrics import UNMATCHED
from iddc.network import build_network
from iddc.predicting import predict_collection
from iddc.pretraining.cache import fill_cache
from iddc.progress import SILENT, Progress
from iddc.report.look import look_at
from iddc.samples import Sampler
from iddc.segmenter import Segmenter
from iddc.views import ViewDataset, collate_views, draw_crops, most_data
from steps import ONE
from tiny import tiny_segmenter

WHITE = 255
SIDE = 64


def photo(path: Path, valid: np.ndarray, top: int = 200) -> Path:
    """Random colours below `top`, transparent where nothing is valid."""
    rgb = np.random.default_rng(0).integers(0, top, (*valid.shape, 3), dtype=np.uint8)
    alpha = np.where(valid, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(path)
    return path


def half(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A mask whose left half is a gap."""
    return np.broadcast_to(np.arange(width) >= width // 2, (height, width)).copy()


class Colours(Backbone):
    """A backbone whose embedding of a patch is its mean colour, in place of a network."""

    embed_dim, patch_size = 3, 8  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.net = nn.Identity()
        self.register_buffer("mean", torch.zeros(3))
        self.weight = nn.Parameter(torch.zeros(1))

    def num_patches(self, side: int) -> int:
        return (side // 8) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float(), 8)


def seen_by(folder: Path, **views: Any) -> tuple[list[Any], Experiment]:
    views = {"short_side": 0, "crop_size": SIDE, **views}
    return list(find_images(folder).files), Experiment(
        views=ViewsConfig(**views),
        prediction=PredictionConfig(window=32, overlap=0, flip=False),
        training=TrainingConfig(precision="fp32"),
    )


# Which patches count, and which stand for the others


def test_a_patch_counts_if_half_of_its_pixels_hold_data() -> None:
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[:, :3] = False  # of the first patch 4 of 16 pixels are left, of the second all
    assert data_patches(valid, (1, 2)).tolist() == [[False, True]]
    valid[:, 2] = True
    assert data_patches(valid, (1, 2)).tolist() == [[True, True]]


def test_where_no_patch_holds_half_the_fullest_count() -> None:
    valid = torch.zeros(4, 8, dtype=torch.bool)
    valid[0, :2] = valid[0, 4] = True
    assert data_patches(valid, (1, 2)).tolist() == [[True, False]]


def test_a_gap_is_filled_with_what_lies_opposite_at_its_border() -> None:
    row = np.array([[True, True, True, False, False, False, False]])
    assert stand_ins(row).tolist() == [[0, 1, 2, 1, 0, 2, 2]]
    square = np.ones((3, 3), bool)
    square[1, 1] = False
    assert stand_ins(square)[1, 1] != 4
    assert np.array_equal(np.delete(stand_ins(square).ravel(), 4), [0, 1, 2, 3, 5, 6, 7, 8])


def test_filled_maps_have_no_number_of_a_gap_and_keep_the_others() -> None:
    maps = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[1, :, 16:] = False
    spoilt = maps.clone()
    spoilt[1, :, :, 2:] = torch.nan
    found = filled(spoilt, valid)
    assert torch.equal(found[0], maps[0])
    assert torch.equal(found[1, :, :, :2], maps[1, :, :, :2])
    assert torch.equal(found[1, :, :, 2], maps[1, :, :, 0])  # the mirror image of 2 in 1
    assert filled(maps, None) is maps


# Crops


def test_the_mask_of_a_crop_lies_where_its_colours_lie(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", half(80, 80), top=250)
    files, experiment = seen_by(tmp_path)
    dataset = ViewDataset(files, experiment.views, 0)
    some = [dataset[epoch, 0] for epoch in range(12)]
    assert any(view.valid is not None for view in some)
    for view in some:
        assert view.crops is not None
        white = (view.crops == WHITE).all(1)
        gap = torch.zeros_like(white) if view.valid is None else ~view.valid
        assert (white != gap).float().mean() < 0.05  # resizing blurs the border


def test_an_image_without_gaps_has_no_mask(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", np.ones((SIDE, SIDE), bool))
    files, experiment = seen_by(tmp_path)
    batch = collate_views([ViewDataset(files, experiment.views, 0)[0, 0]])
    assert batch.valid is None


def test_crops_lie_around_data_however_little_there_is() -> None:
    valid = np.zeros((3000, 2000), bool)
    valid[2900, 1234] = True
    config = ViewsConfig(short_side=0, crop_size=32)
    rng = np.random.default_rng(0)
    drawn = [draw_crops((2000, 3000), config, rng) for _ in range(4)]
    for left, top in most_data(drawn, valid, 32, rng).corners:
        width, height = drawn[0].size
        assert left <= 1234.5 * width / 2000 <= left + 32
        assert top <= 2900.5 * height / 3000 <= top + 32


@pytest.mark.parametrize("repeat", [0, 2])
def test_embeddings_of_crops_are_those_of_data(repeat: int, tmp_path: Path) -> None:
    """Kept embeddings are filled where they are made, crops go on with their masks."""
    photo(tmp_path / "a.png", half())
    photo(tmp_path / "b.png", np.ones((SIDE, SIDE), bool))
    files, experiment = seen_by(tmp_path, repeat=repeat, min_scale=1, max_scale=1)
    experiment = experiment.model_copy(update={"backbone": "untrained:test_vit"})
    network = build_network(experiment)
    network.backbone = Colours()
    cache = EmbeddingCache(network, experiment, ONE.device, 4)
    dataset = ViewDataset(files, experiment.views, 0)
    made = collate_views([dataset[0, 0], dataset[0, 1]])
    keys = cache.keys(0, [0, 1])
    assert cache.missing(keys) == keys
    inputs = cache.inputs(Wanted(keys, keys), made)
    if repeat:
        assert inputs.valid is None
        assert inputs.views.max() < 200
    else:
        assert inputs.valid is not None
        assert inputs.valid[1].all()
        assert inputs.valid[0].float().mean() == pytest.approx(0.5, abs=0.05)


# What methods are fitted to


def sampler(folder: Path) -> Sampler:
    files, experiment = seen_by(folder)
    return Sampler(files, Colours(), experiment, Runtime(workers=0))


@pytest.mark.parametrize("count", [4, 40, 4000])
def test_samples_have_no_patch_of_a_gap(count: int, tmp_path: Path) -> None:
    for name in "abc":
        photo(tmp_path / f"{name}.png", half())
    found = sampler(tmp_path).patches(count)
    assert len(found) == min(count, 3 * 32)
    assert found.max() < 160  # the mean of 64 colours below 200; a gap has 255


def test_maps_and_pictures_show_no_gap(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", half(SIDE, 2 * SIDE))
    own = sampler(tmp_path)
    ((_, maps),) = own.maps([0])
    ((_, both, pixels),) = own.pictures([0])
    for shown in (maps, both, pixels):
        assert shown.max() < 200
    assert torch.equal(both[0], maps)
    assert torch.equal(both[1], maps)  # colours are the same in a mirror


def test_the_mean_of_an_image_is_that_of_its_data(tmp_path: Path) -> None:
    valid = np.zeros((SIDE, 2 * SIDE), bool)
    valid[:, :24] = True
    path = photo(tmp_path / "a.png", valid)
    _, (mean,) = sampler(tmp_path).means()
    expected = np.asarray(Image.open(path))[:, :24, :3].mean((0, 1))
    assert np.allclose(mean.numpy(), expected, atol=3)  # white would add 8 for each 5 %


def test_an_image_of_gaps_alone_is_left_out_with_the_reason(tmp_path: Path) -> None:
    nothing = np.full((SIDE, SIDE), np.nan, np.float32)
    Image.fromarray(nothing).save(tmp_path / "a.tif")
    own = sampler(tmp_path)
    assert len(own.patches(9)) == 0
    assert own.failures == [(0, "no pixel holds data")]


def test_affinities_are_those_of_patches_with_data() -> None:
    experiment = Experiment(views=ViewsConfig(short_side=0))
    rgb = np.full((SIDE, SIDE, 3), WHITE, np.uint8)
    rgb[half()] = (200, 10, 10)
    look = _Look(Colours(), experiment, np.random.default_rng(0))
    picture = Picture(Image.fromarray(rgb), half())
    vectors, _ = look.at(1, lambda _: (picture, None), SILENT)
    assert len(vectors) == 32
    red = torch.tensor([200.0, 10, 10])
    assert torch.allclose(vectors, (red / red.norm()).expand(32, 3), atol=1e-5)


# Pretraining


def test_no_crop_of_a_pretraining_shows_a_gap(tmp_path: Path) -> None:
    valid = half(80, 100)
    valid[40:50, 80:90] = False
    path = photo(tmp_path / "a.png", valid)
    photos = fill_cache(
        [find_images(path).files],
        tmp_path / "cache",
        "digest",
        short_side=448,
        min_side=16,
        threads=1,
        check=lambda: None,
    )
    pixels = photos[0].numpy()
    assert pixels.shape == (80, 50, 3)  # the left half is cut off
    assert pixels.max() < 200
    stored = np.asarray(Image.open(path))[:, 50:, :3]
    assert np.array_equal(pixels[valid[:, 50:]], stored[valid[:, 50:]])


def test_filled_pixels_are_mirrored_at_the_border_of_the_data() -> None:
    pixels = np.arange(5, dtype=np.uint8)[None, :, None].repeat(3, 2)
    assert fill_pixels(pixels, np.array([[1, 1, 0, 1, 1]], bool))[0, :, 0].tolist() in (
        [0, 1, 0, 3, 4],
        [0, 1, 4, 3, 4],
    )


# What is written


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Masks of an image whose left half is a gap, in all formats."""
    folder = tmp_path / "images"
    folder.mkdir()
    photo(folder / "a.png", half())
    formats = ["png", "palette", "csv", "coco", "coco-polygons", "cvat", "labelstudio", "labelme"]
    model = tmp_path / "model"
    tiny_segmenter(3).save(model)
    segmenter = Segmenter.load(model, "cpu")
    predict_collection(segmenter, folder, tmp_path / "out", [*formats, "yolo", "npz"], model=model)
    return tmp_path / "out"


def test_a_gap_has_no_id_in_masks_and_no_probability(masks: Path) -> None:
    for form in ("png", "palette"):
        ids = np.asarray(Image.open(masks / form / "a.png"))
        assert np.array_equal(ids == 255, ~half())
    with np.load(masks / "npz/a.npz") as found:
        assert np.array_equal(found["clusters"] == 255, ~half())
        assert np.array_equal(found["probs"].sum(0) == 0, ~half())
        assert np.allclose(found["probs"].astype(float).sum(0)[half()], 1, atol=0.01)


def test_a_gap_is_in_no_region_of_other_formats(masks: Path) -> None:
    record = json.loads((masks / "coco.json").read_text())
    assert sum(one["area"] for one in record["annotations"]) == half().sum()
    for one in json.loads((masks / "coco-polygons.json").read_text())["annotations"]:
        assert min(corner for ring in one["segmentation"] for corner in ring[::2]) >= SIDE // 2
    for shape in json.loads((masks / "labelme/a.json").read_text())["shapes"]:
        assert min(x for x, _ in shape["points"]) >= SIDE // 2
    for line in (masks / "yolo/labels/a.txt").read_text().splitlines():
        assert min(float(x) for x in line.split()[1::2]) >= 0.5
    rows = [line.split(",") for line in (masks / "shares.csv").read_text().splitlines()[1:]]
    assert [int(row[2]) for row in rows if row[1] == "ignore"] == [(~half()).sum()]
    assert sum(float(row[3]) for row in rows) == pytest.approx(1)


def test_masks_of_a_folder_keep_their_gaps_when_clusters_are_renamed(masks: Path) -> None:
    from iddc.masks import Labels
    from iddc.relabel import relabel

    relabel(masks, Labels.numbered(3).edit({0: "x", 1: "x"}))
    assert np.array_equal(np.asarray(Image.open(masks / "png/a.png")) == 255, ~half())
    with np.load(masks / "npz/a.npz") as found:
        assert np.array_equal(found["clusters"] == 255, ~half())


# What is shown and scored


def test_pixels_without_data_are_not_scored(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", half())
    Image.new("L", (SIDE, SIDE), 3).save(tmp_path / "label.png")
    image, label = (find_images(tmp_path / name).files[0] for name in ("a.png", "label.png"))
    _, ids = read_pair(image, label)
    assert np.array_equal(ids, np.where(half(), 3, 255))


def test_a_report_counts_patches_with_data_alone(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", half())
    look = look_at(tiny_segmenter(3), find_images(tmp_path / "a.png").files, samples=1)
    assert look is not None
    (seen,) = look.seen
    gap = seen.clusters == UNMATCHED
    assert gap.any()
    assert look.counts.sum() == (~gap).sum()
    assert look.frequencies.sum() == pytest.approx(1, abs=1e-5)
    assert seen.mask is not None
    assert np.array_equal(seen.mask == UNMATCHED, ~half())


def test_the_label_page_gives_gaps_to_no_cluster(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", half())
    files = find_images(tmp_path / "a.png").files
    (sample,) = predict_samples(tiny_segmenter(3).predict, files, Progress())
    assert np.array_equal(sample.clusters == NONE, ~half())
    assert shares([sample], 3).sum() == pytest.approx(1)


def test_a_collection_of_masks_without_gaps_keeps_no_masks_of_gaps(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", np.ones((SIDE, SIDE), bool))
    segmenter = tiny_segmenter(3)
    files = find_images(tmp_path / "a.png").files
    out = tmp_path / "out"
    collection = Collection(tmp_path, out, ["png"], segmenter.labels.classes)
    collection.add(files[0], segmenter.predict(tmp_path / "a.png"))
    assert not (out / "parts/valid").exists()
