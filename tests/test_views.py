from __future__ import annotations

import math
import pickle
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from iddc.config import ViewsConfig
from iddc.images import ImageFile
from iddc.views import (
    Crops,
    ViewBatch,
    ViewDataset,
    collate_views,
    cut,
    cut_mask,
    draw_crops,
    draw_patches,
    draw_rolls,
    epoch_batches,
    working_size,
)


def drawn(size: tuple[int, int], config: ViewsConfig, seed: int = 0) -> Crops:
    return draw_crops(size, config, np.random.default_rng(seed))


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, size=(9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    """Seven images of different sizes; the fourth is damaged."""
    folder = tmp_path_factory.mktemp("images")
    result = []
    for i, size in enumerate([(60, 40), (40, 60), (90, 70), (5, 5), (1, 1), (33, 200), (48, 48)]):
        path = folder / f"{i}.png"
        photo(i, size).save(path)
        result.append(ImageFile(path, PurePosixPath(path.name)))
    result[3].path.write_bytes(b"no image")
    return result


SMALL = ViewsConfig(crop_size=16, short_side=32)
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
configs = st.builds(
    ViewsConfig,
    short_side=st.sampled_from([0, 16, 100, 448]),
    crop_size=st.sampled_from([16, 17, 224]),
    min_scale=st.floats(0.3, 1),
    max_scale=st.floats(1, 2),
    max_offset=st.floats(0, 0.99),
)


# working size


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((4000, 3000), 448, (597, 448)),
        ((3000, 4000), 448, (448, 597)),
        ((480, 360), 448, (480, 360)),
        ((480, 360), 0, (480, 360)),
        ((448, 448), 448, (448, 448)),
        ((1, 9000), 448, (1, 9000)),
    ],
)
def test_the_working_size_reduces_the_short_side_and_never_enlarges(
    size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    assert working_size(size, short_side) == expected


# what is drawn


@given(sizes, configs, st.integers(0, 1000))
def test_both_crops_lie_in_the_image_and_overlap_by_the_promised_share(
    size: tuple[int, int], config: ViewsConfig, seed: int
) -> None:
    crops = drawn(size, config, seed)
    side = config.crop_size
    for left, top in crops.corners:
        assert 0 <= left <= crops.size[0] - side
        assert 0 <= top <= crops.size[1] - side
    (left, top), (other_left, other_top) = crops.corners
    overlap = (side - abs(left - other_left)) * (side - abs(top - other_top)) / side**2
    assert overlap >= (1 - config.max_offset) ** 2


def test_the_default_overlap_is_at_least_a_quarter_and_reaches_it() -> None:
    config = ViewsConfig()
    offsets = np.array(
        [np.subtract(*drawn((2000, 2000), config, seed).corners) for seed in range(2000)]
    )
    assert offsets.min(axis=0).tolist() == [-112, -112]
    assert offsets.max(axis=0).tolist() == [112, 112]


def test_scales_of_width_and_height_are_uniform_and_independent() -> None:
    # 1000 x 1000, far above the crop: the drawn size is the factor times 1000.
    factors = np.array(
        [drawn((1000, 1000), ViewsConfig(short_side=0), seed).size for seed in range(4000)]
    )
    factors = factors / 1000
    assert factors.min() >= 0.8
    assert factors.max() <= 1.2
    # A uniform draw in [0.8, 1.2] has mean 1 and deviation 0.4 / sqrt(12); 4000 draws know the
    # mean to 0.0018.
    assert factors.mean(axis=0) == pytest.approx([1, 1], abs=0.008)
    assert factors.std(axis=0) == pytest.approx(0.4 / math.sqrt(12), rel=0.05)
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.06


def test_the_scale_applies_to_the_working_size() -> None:
    config = ViewsConfig(min_scale=1.0, max_scale=1.0)
    assert drawn((4000, 3000), config).size == (597, 448)


def test_the_first_corner_is_uniform_over_all_places() -> None:
    config = ViewsConfig(crop_size=16, short_side=0, min_scale=1.0, max_scale=1.0)
    corners = [drawn((19, 16), config, seed).corners[0] for seed in range(4000)]
    counts = np.bincount([left for left, _ in corners], minlength=4)
    assert {top for _, top in corners} == {0}
    assert counts == pytest.approx([1000] * 4, abs=110)  # four deviations


def test_half_of_the_draws_are_flipped_and_none_or_all_if_asked() -> None:
    share = [drawn((9, 9), ViewsConfig(), seed).flip for seed in range(2000)]
    assert np.mean(share) == pytest.approx(0.5, abs=0.05)
    for probability in (0.0, 1.0):
        config = ViewsConfig(flip_probability=probability)
        assert {drawn((9, 9), config, seed).flip for seed in range(50)} == {bool(probability)}


@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.integers(0, 100))
def test_an_image_smaller_than_the_crop_is_enlarged_just_enough(
    size: tuple[int, int], seed: int
) -> None:
    config = ViewsConfig(short_side=0)
    crops = drawn(size, config, seed)
    factors = np.random.default_rng(seed).uniform(0.8, 1.2, size=2)
    wanted = np.array(size) * factors
    if wanted.min() >= 224:
        assert crops.size == pytest.approx(wanted, abs=0.5)
    else:
        assert min(crops.size) == 224
        # The proportions are those drawn, up to the rounding of the longer side.
        assert max(crops.size) == pytest.approx(224 * wanted.max() / wanted.min(), abs=0.5)


# what is cut


@pytest.mark.parametrize("size", [(61, 47), (300, 180), (20, 90)])
@pytest.mark.parametrize("seed", range(4))
def test_cut_equals_scaling_the_whole_image_mirroring_and_cropping(
    size: tuple[int, int], seed: int
) -> None:
    image = photo(seed, size)
    crops = drawn(size, SMALL, seed)
    scaled = image.resize(crops.size, Image.Resampling.BILINEAR)
    for pixels, (left, top) in zip(cut(image, crops, 16), crops.corners, strict=True):
        expected = np.asarray(scaled)[top : top + 16, left : left + 16].astype(int)
        if crops.flip:
            expected = expected[:, ::-1]
        assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 1


@given(st.integers(0, 1000))
def test_the_two_crops_agree_where_they_overlap(seed: int) -> None:
    # Red says the column and green the row of a pixel.
    ramp = np.zeros((200, 250, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(250), np.arange(200)[:, None]
    crops = drawn((250, 200), ViewsConfig(crop_size=64), seed)
    first, second = cut(Image.fromarray(ramp), crops, 64).int()
    (left, top), (other_left, other_top) = crops.corners
    right, down = other_left - left, other_top - top
    if crops.flip:
        right = -right
        assert (first[0, :, 0] > first[0, :, -1]).all()
    else:
        assert (first[0, :, 0] < first[0, :, -1]).all()
    mine = first[:, max(0, down) : 64 + min(0, down), max(0, right) : 64 + min(0, right)]
    theirs = second[:, max(0, -down) : 64 + min(0, -down), max(0, -right) : 64 + min(0, -right)]
    assert mine.numel() >= 3 * 64 * 64 / 4
    assert (mine - theirs).abs().max() <= 1


def test_a_reduced_crop_is_antialiased() -> None:
    # A checkerboard of single pixels averages to grey; without antialiasing it stays 0 and 255.
    board = (np.indices((400, 400)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(np.stack([board] * 3, axis=-1))
    config = ViewsConfig(crop_size=16, short_side=40)
    pixels = cut(image, drawn((400, 400), config), 16).float()
    assert (pixels - 127.5).abs().max() < 16


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (65_000, 2)])
def test_any_size_gives_two_crops(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    for seed in range(5):
        pixels = cut(image, drawn(size, ViewsConfig(), seed), 224)
        assert pixels.shape == (2, 3, 224, 224)
        assert (pixels == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


# the data set


def batches(files: list[ImageFile], workers: int, epoch: int = 3) -> list[ViewBatch]:
    loader = DataLoader(
        ViewDataset(files, SMALL, seed=5),
        batch_sampler=[
            [(epoch, i) for i in batch] for batch in epoch_batches(len(files), 3, 5, epoch)
        ],
        num_workers=workers,
        collate_fn=collate_views,
    )
    return list(loader)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_views_are_the_same_whatever_the_number_of_workers(
    files: list[ImageFile], workers: int
) -> None:
    for alone, shared in zip(batches(files, 0), batches(files, workers), strict=True):
        assert alone.indices == shared.indices
        assert torch.equal(alone.crops, shared.crops)
        assert alone.failures == shared.failures


def test_views_depend_on_seed_epoch_and_index_only(files: list[ImageFile]) -> None:
    same = [files[0]] * 8
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in range(8) for index in range(8)]
    views = {key: ViewDataset(same, SMALL, key[0])[key[1:]].crops.numpy().tobytes() for key in keys}
    assert len(set(views.values())) == len(keys)
    for seed, epoch, index in reversed(keys):
        again = ViewDataset(same, SMALL, seed)[epoch, index].crops.numpy().tobytes()
        assert again == views[seed, epoch, index]


def test_an_unreadable_image_is_a_view_with_a_reason(files: list[ImageFile]) -> None:
    view = ViewDataset(files, SMALL, seed=0)[0, 3]
    assert view.index == 3
    assert view.crops is None
    assert view.reason.startswith("not an image in a known format")


def test_a_batch_keeps_failures_apart(files: list[ImageFile]) -> None:
    dataset = ViewDataset(files, SMALL, seed=0)
    batch = collate_views([dataset[0, i] for i in (5, 3, 0)])
    assert batch.indices == [5, 0]
    assert batch.crops.shape == (2, 2, 3, 16, 16)
    assert torch.equal(batch.crops[1], dataset[0, 0].crops)
    assert [index for index, _ in batch.failures] == [3]


def test_a_batch_of_failures_only_is_empty(files: list[ImageFile]) -> None:
    batch = collate_views([ViewDataset(files, SMALL, seed=0)[0, 3]])
    assert batch.indices == []
    assert len(batch.crops) == 0


def test_the_data_set_and_its_views_can_be_pickled(files: list[ImageFile]) -> None:
    dataset = pickle.loads(pickle.dumps(ViewDataset(files, SMALL, seed=0)))
    view = pickle.loads(pickle.dumps(dataset[0, 0]))
    assert torch.equal(view.crops, ViewDataset(files, SMALL, seed=0)[0, 0].crops)


# batches and negatives


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 3))
def test_an_epoch_visits_every_image_once_in_batches_of_nearly_one_size(
    num_images: int, batch_size: int, epoch: int
) -> None:
    batches = epoch_batches(num_images, batch_size, seed=0, epoch=epoch)
    lengths = [len(batch) for batch in batches]
    assert sorted(image for batch in batches for image in batch) == list(range(num_images))
    assert len(batches) == math.ceil(num_images / batch_size)
    assert max(lengths) <= batch_size
    assert max(lengths) - min(lengths) <= 1


def test_the_order_changes_with_epoch_and_seed() -> None:
    orders = {str(epoch_batches(50, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.integers(1, 70), st.integers(1, 64), st.integers(0, 9))
def test_rolls_are_distinct_and_none_pairs_an_image_with_itself(
    batch: int, count: int, step: int
) -> None:
    rolls = draw_rolls(batch, count, seed=0, step=step)
    assert len(rolls) == len(set(rolls)) == min(count, batch - 1)
    assert all(1 <= roll < batch for roll in rolls)


def test_every_roll_is_drawn_and_rolls_change_with_step_and_seed() -> None:
    drawn = [tuple(draw_rolls(6, 3, seed, step)) for seed in range(4) for step in range(50)]
    assert {roll for rolls in drawn for roll in rolls} == {1, 2, 3, 4, 5}
    assert len(set(drawn)) > 40  # of 60 ordered triples


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 9))
def test_places_are_distinct_and_all_of_them_where_there_are_not_more(
    patches: int, count: int, step: int
) -> None:
    for places in draw_patches(patches, count, seed=0, step=step).tolist():
        assert places == sorted(set(places))
        assert len(places) == min(count or patches, patches)
        assert {*places} <= {*range(patches)}


def test_every_place_is_drawn_and_the_two_crops_have_their_own() -> None:
    drawn = [draw_patches(9, 3, seed=0, step=step).tolist() for step in range(40)]
    assert {place for first, _ in drawn for place in first} == {*range(9)}
    assert sum(first == second for first, second in drawn) < 5  # of 84 subsets


def test_draws_of_views_order_and_rolls_do_not_share_random_numbers() -> None:
    order = [image for batch in epoch_batches(7, 7, seed=3, epoch=4) for image in batch]
    rolls = draw_rolls(8, 7, seed=3, step=4)
    assert order != [roll - 1 for roll in rolls]


def test_a_real_photo_gives_two_different_crops(shared_data: Path) -> None:
    path = sorted((shared_data / "camvid/val/images").iterdir())[0]
    file = ImageFile(path, PurePosixPath(path.name))
    first, second = ViewDataset([file], ViewsConfig(), seed=0)[0, 0].crops
    assert first.shape == second.shape == (3, 224, 224)
    assert first.float().std() > 20
    assert not torch.equal(first, second)


def test_a_large_jpeg_gives_the_crops_of_the_whole_photo(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    config = ViewsConfig(short_side=200, crop_size=96)  # so the JPEG comes at a quarter
    reduced, whole = (
        ViewDataset([ImageFile(tmp_path / name, PurePosixPath(name))], config, 0)[0, 0].crops
        for name in ("a.jpg", "a.png")
    )
    difference = (reduced.float() - whole.float()).abs()
    assert 0 < difference.mean() < 1


def test_crops_of_a_half_empty_image_lie_where_the_data_are(tmp_path: Path) -> None:
    pixels = np.full((256, 256, 4), 255, np.uint8)
    pixels[..., :3] = 7
    pixels[:, :128, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = ViewsConfig(short_side=0, crop_size=64, min_scale=1, max_scale=1)
    dataset = ViewDataset([ImageFile(tmp_path / "a.png", PurePosixPath("a.png"))], config, 0)
    shares = [float((dataset[epoch, 0].crops == 7).float().mean()) for epoch in range(8)]
    assert min(shares) > 0.9  # of a draw by chance half
    assert np.mean(shares) > 0.97


def test_an_image_without_data_is_left_out_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "a.tif")
    files = [ImageFile(tmp_path / "a.tif", PurePosixPath("a.tif"))]
    view = ViewDataset(files, SMALL, seed=0)[0, 0]
    assert (view.crops, view.reason) == (None, "no pixel holds data")


def test_a_mask_is_cut_where_its_image_is() -> None:
    """At twice the size of the scaled image, two crops of 4 pixels at (1, 3) and (5, 0)."""
    valid = np.random.default_rng(0).random((8, 12)).repeat(2, 0).repeat(2, 1) < 0.5
    masks = cut_mask(valid, Crops((12, 8), ((1, 3), (5, 0)), flip=False), 4)
    assert masks is not None
    assert masks.tolist() == [valid[6:14:2, 2:10:2].tolist(), valid[0:8:2, 10:18:2].tolist()]
