"""Windows, flips and strips against a full canvas filled by loops."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from iddc.canvas import STRIP_VALUES, window_starts, windows_of
from iddc.config import PredictionConfig, SoftmaxAt
from iddc.windows import (
    Predictor,
    Request,
    argmax_clusters,
    as_array,
    cluster_ids,
    predict_probs,
    probability_rows,
    size_for_windows,
)

CPU = torch.device("cpu")
WHOLE = PredictionConfig(window=0, flip=False)


@dataclass
class Cells:
    """A cheap predictor: each cell's colours, and where it lies, give its probabilities.

    Where it lies: the grid is not symmetric, so mirrored and shifted windows give something else.
    """

    num_clusters: int = 5
    patch: int = 4

    def probs(self, images: Tensor) -> Tensor:
        grid = (max(1, images.shape[-2] // self.patch), max(1, images.shape[-1] // self.patch))
        cells = functional.adaptive_avg_pool2d(images.float() / 255, grid)
        generator = torch.Generator().manual_seed(0)
        logits = torch.einsum(
            "bihw,ki->bkhw", cells, 5 * torch.randn(self.num_clusters, 3, generator=generator)
        )
        logits[:, 0] += torch.linspace(0, 2, grid[1])
        logits[:, -1] += torch.linspace(0, 1, grid[0])[:, None]
        return logits.softmax(1)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def cluster_map(
    predictor: Predictor, image: Tensor, config: PredictionConfig, out_size: tuple[int, int]
) -> np.ndarray:
    """The cluster of every pixel of one image."""
    requests = [Request(image, out_size)]
    ((_, ids),) = cluster_ids(predictor, requests, config, device=CPU)
    return as_array(ids, predictor.num_clusters)


def interpolate(probs: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(probs[None], size=size, mode="bilinear", align_corners=False)[0]


def slow_starts(size: int, window: int, overlap: int) -> list[int]:
    starts = [0]
    while starts[-1] + window < size:
        starts.append(min(starts[-1] + window - overlap, size - window))
    return starts


def slow_probs(
    predictor: Predictor, image: Tensor, config: PredictionConfig, out_size: tuple[int, int]
) -> Tensor:
    """The full canvas, window by window and mirror by mirror, then resized as a whole."""
    height, width = image.shape[1:]
    canvas = torch.zeros(predictor.num_clusters, height, width)
    count = torch.zeros(height, width)
    for y in slow_starts(height, config.window, config.overlap):
        for x in slow_starts(width, config.window, config.overlap):
            crop = image[:, y : y + config.window, x : x + config.window]
            size = (crop.shape[1], crop.shape[2])
            late = config.softmax == "pixels"  # of logits that were enlarged

            def enlarged(crop: Tensor, size: tuple[int, int] = size, late: bool = late) -> Tensor:
                grid = predictor.probs(crop[None])[0]
                return interpolate(grid.log() if late else grid, size)

            probs = enlarged(crop)
            if config.flip:
                probs = (probs + enlarged(crop.flip(2)).flip(2)) / 2
            probs = probs.softmax(0) if late else probs
            canvas[:, y : y + size[0], x : x + size[1]] += probs
            count[y : y + size[0], x : x + size[1]] += 1
    return interpolate(canvas / count, out_size)


def test_without_windows_an_image_as_large_as_the_overlap_is_one_window() -> None:
    config = PredictionConfig(window=0, overlap=8)
    clusters = cluster_map(Cells(), noise(8, 8), config, (8, 8))
    assert clusters.shape == (8, 8)


@pytest.mark.parametrize(
    ("size", "window", "enlarged"),
    [
        ((100, 50), 32, (100, 50)),
        ((10, 20), 32, (32, 64)),
        ((20, 10), 32, (64, 32)),
        ((3, 4), 10, (10, 13)),
        ((2, 100), 8, (8, 128)),
        ((2, 1000), 8, (8, 1000)),
        ((5, 7), 0, (5, 7)),
    ],
)
def test_an_image_is_enlarged_to_its_window_and_a_strip_to_16_of_them(
    size: tuple[int, int], window: int, enlarged: tuple[int, int]
) -> None:
    assert size_for_windows(size, window) == enlarged


@given(size=st.integers(1, 500), window=st.integers(1, 224), overlap=st.integers(0, 223))
def test_windows_cover_every_pixel_and_stay_inside(size: int, window: int, overlap: int) -> None:
    overlap = min(overlap, window - 1)
    starts = window_starts(size, window, overlap)
    covered = np.zeros(size, int)
    for start in starts:
        assert 0 <= start <= max(size - window, 0)
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert starts == sorted(set(starts)) == slow_starts(size, window, overlap)


@given(size=st.integers(1, 3000), window=st.integers(2, 500), overlap=st.integers(0, 400))
def test_fitted_windows_cover_evenly_and_are_no_smaller_than_asked(
    size: int, window: int, overlap: int
) -> None:
    overlap = min(overlap, window - 1)
    config = PredictionConfig(window=window, overlap=overlap, fit=True)
    starts, length = windows_of(size, config)
    assert length >= min(window, size)
    assert length % 16 == 0 or length == size
    assert starts[0] == 0
    assert starts[-1] + length == size
    steps = np.diff(starts)
    if len(steps):
        # None coincide, neighbours share what was asked for, and they are evenly spaced.
        assert steps.min() > 0
        assert length - steps.max() >= overlap - 1
        assert steps.max() - steps.min() <= 1
    # One more would be smaller than asked.
    if window >= 64 and overlap <= window / 2:
        assert (len(starts) + 1) * (window - overlap) + overlap > size


@pytest.mark.parametrize(
    ("size", "starts", "length"),
    [
        (227, [0], 227),
        (256, [0], 256),
        (320, [0], 320),
        (448, [0, 176], 272),
        (597, [0, 170, 341], 256),
    ],
)
def test_small_images_are_one_window_and_none_nearly_coincide(
    size: int, starts: list[int], length: int
) -> None:
    config = PredictionConfig(window=224, overlap=75, fit=True)
    assert windows_of(size, config) == (starts, length)


@dataclass
class Lopsided(Cells):
    """Each window adds a bias of its own, as context does: windows disagree where they overlap."""

    def probs(self, images: Tensor) -> Tensor:
        bias = images.float().mean((1, 2, 3)) / 255
        logits = super().probs(images).log()
        logits[:, 0] += (10 * (bias - bias.round(decimals=1)))[:, None, None] * 20
        return logits.softmax(1)


def changes_per_column(config: PredictionConfig, count: int = 12) -> np.ndarray:
    """How often the class changes from a column to the next, over smooth images without noise."""
    changes = np.zeros(399, int)
    for seed in range(count):
        coarse = noise(5, 6, seed).float()[None]
        image = functional.interpolate(coarse, (224, 400), mode="bicubic")[0]
        image = image.clamp(0, 255).round().byte()
        clusters = cluster_map(Lopsided(patch=16), image, config, (224, 400))
        changes += (clusters[:, 1:] != clusters[:, :-1]).sum(0)
    return changes


def test_feathered_windows_have_no_seams_where_averaged_ones_do() -> None:
    borders = [148, 175, 223]  # windows of 224 start at 0, 149 and 176
    plain, feathered = (
        changes_per_column(PredictionConfig(window=224, overlap=75, blend=blend))
        for blend in ("mean", "tent")
    )
    assert max(plain[borders]) > 4 * np.median(plain) + 10
    assert max(feathered[borders]) < 2 * np.median(feathered) + 10
    assert max(feathered) < max(plain) / 2


def test_windows_of_the_released_validation_on_a_coco_image() -> None:
    # Stride 149, the last window shifted to the border.
    assert window_starts(640, 224, 75) == [0, 149, 298, 416]
    assert window_starts(224, 224, 75) == [0]
    assert window_starts(225, 224, 75) == [0, 1]
    assert window_starts(100, 224, 75) == [0]


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    out_size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    window=st.integers(2, 24),
    overlap=st.integers(0, 23),
    flip=st.booleans(),
    batch_size=st.integers(1, 5),
)
def test_strips_equal_the_full_canvas(
    size: tuple[int, int],
    out_size: tuple[int, int],
    window: int,
    overlap: int,
    flip: bool,
    batch_size: int,
) -> None:
    config = PredictionConfig(window=window, overlap=min(overlap, window - 1), flip=flip)
    image, predictor = noise(*size), Cells()
    for target in (out_size, size):
        found = predict_probs(predictor, image, config, target, device=CPU, batch_size=batch_size)
        expected = slow_probs(predictor, image, config, target)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(found.sum(0), torch.ones(target), atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [2, 7])
@pytest.mark.parametrize(
    ("size", "out_size"),
    [((9, 13), (9, 13)), ((12, 17), (31, 40)), ((33, 3), (13, 2)), ((40, 9), (5, 4))],
    ids=["same", "larger", "smaller", "much smaller"],
)
def test_strips_of_a_softmax_at_pixels_equal_the_full_canvas(
    size: tuple[int, int], out_size: tuple[int, int], window: int, flip: bool
) -> None:
    config = PredictionConfig(window=window, overlap=window // 3, flip=flip, softmax="pixels")
    image, predictor = noise(*size), Cells()
    found = predict_probs(predictor, image, config, out_size, device=CPU)
    assert torch.allclose(found, slow_probs(predictor, image, config, out_size), atol=1e-5)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    out_size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_without_windows_the_grid_is_resized_at_once(
    size: tuple[int, int], out_size: tuple[int, int]
) -> None:
    image, predictor = noise(*size), Cells()
    found = predict_probs(predictor, image, WHOLE, out_size, device=CPU)
    grid = predictor.probs(image[None])[0]
    assert torch.allclose(found, interpolate(grid, out_size), atol=1e-5)
    late = WHOLE.model_copy(update={"softmax": "pixels"})
    found = predict_probs(predictor, image, late, out_size, device=CPU)
    assert torch.allclose(found, interpolate(grid.log(), out_size).softmax(0), atol=1e-5)


def test_flipping_matters_and_makes_mirror_images_agree() -> None:
    image, predictor = noise(24, 40), Cells()
    flipped = PredictionConfig(window=0, flip=True)
    probs, mirrored = (
        predict_probs(predictor, i, flipped, (24, 40), device=CPU) for i in (image, image.flip(2))
    )
    assert torch.allclose(probs, mirrored.flip(2), atol=1e-6)
    plain = predict_probs(predictor, image, WHOLE, (24, 40), device=CPU)
    assert not torch.allclose(probs, plain, atol=1e-2)


def test_the_map_is_the_most_probable_cluster_of_each_pixel() -> None:
    image, config = noise(30, 50), PredictionConfig(window=16, overlap=4)
    clusters = cluster_map(Cells(), image, config, (45, 61))
    probs = slow_probs(Cells(), image, config, (45, 61))
    assert clusters.shape == (45, 61)
    top = probs.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4).numpy()
    assert clear.mean() > 0.99
    assert (clusters == probs.argmax(0).numpy())[clear].all()


@pytest.mark.parametrize(("num_clusters", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_ids_have_eight_bits_up_to_256_clusters_and_sixteen_above(
    num_clusters: int, dtype: type
) -> None:
    clusters = cluster_map(Cells(num_clusters), noise(8, 8), WHOLE, (8, 8))
    assert clusters.dtype == dtype


def test_windows_go_through_the_predictor_in_batches_of_the_size_asked_for() -> None:
    sizes = []

    class Counting(Cells):
        def probs(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return super().probs(images)

    config = PredictionConfig(window=10, overlap=0, flip=True)
    predict_probs(Counting(), noise(20, 50), config, (20, 50), device=CPU, batch_size=4)
    assert sizes == [8, 8, 4]  # 10 windows, each with its mirror image


def test_windows_of_several_images_share_a_batch_and_each_image_has_its_own_clusters() -> None:
    sizes = []

    class Counting(Cells):
        def probs(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return super().probs(images)

    config = PredictionConfig(window=16, overlap=4, flip=False)
    # 4, 6, 4 and 1 windows; those of the last are smaller.
    images = [noise(*size, seed=i) for i, size in enumerate([(20, 20), (20, 40), (20, 20), (9, 9)])]
    requests = [Request(image, (31, 17)) for image in images]
    answers = cluster_ids(Counting(), requests, config, device=CPU, batch_size=10)
    found = [ids for _, ids in answers]
    assert sizes == [10, 4, 1]
    for ids, image in zip(found, images, strict=True):
        assert np.array_equal(ids.numpy(), cluster_map(Cells(), image, config, (31, 17)))


def test_short_memory_halves_the_batch_and_changes_no_probability() -> None:
    config, image, notes = PredictionConfig(window=10, overlap=0), noise(20, 50), list[str]()
    expected = slow_probs(Cells(), image, config, (20, 50)).argmax(0)

    class Large(Cells):
        def probs(self, images: Tensor) -> Tensor:
            if len(images) > 2 * 3:
                raise torch.OutOfMemoryError
            return super().probs(images)

    request = Request(image, (20, 50))
    ((_, ids),) = cluster_ids(
        Large(), [request], config, device=CPU, batch_size=8, note=notes.append
    )
    assert (ids == expected).float().mean() > 0.99
    assert notes == [
        f"not enough free memory: the same again with {n} images at once" for n in (4, 2)
    ]


@pytest.mark.parametrize("number", [2, 27, 255, 256, 257, 1000])
def test_the_winner_is_the_first_of_the_largest(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    probs = torch.randint(0, 50, (number, 9, 11), generator=generator).float()
    assert np.array_equal(argmax_clusters(probs).numpy(), probs.numpy().argmax(0))
    reverse = torch.zeros(number, 1, 1)
    reverse[-1] = 1
    assert argmax_clusters(reverse).item() == number - 1


def test_a_pixel_that_is_no_number_gets_a_cluster_that_exists() -> None:
    assert argmax_clusters(torch.full((27, 1, 1), torch.nan)).item() == 26


def test_predictions_build_no_graph_and_can_be_changed_by_the_caller() -> None:
    probs = predict_probs(Cells(), noise(8, 8), WHOLE, (16, 16), device=CPU)
    assert not probs.requires_grad
    probs += 1  # an inference tensor would refuse


class LargestTensor(TorchFunctionMode):
    """Remembers the most values that the result of any torch function had."""

    values = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result


def test_no_tensor_is_larger_than_the_canvas_of_one_window() -> None:
    # The full canvas of this tall image would be 75 times that of one window.
    predictor, image = Cells(num_clusters=30, patch=8), noise(2400, 64)
    config = PredictionConfig(window=32, overlap=8)
    with LargestTensor() as largest:
        for _ in probability_rows(predictor, image, config, (2400, 64), device=CPU):
            pass
    assert largest.values == max(30 * 32 * 64, 3 * 2 * 16 * 32 * 32)


@pytest.mark.parametrize("softmax", ["patches", "pixels"])
@pytest.mark.parametrize("config", [WHOLE, PredictionConfig(window=32, overlap=8)])
def test_enlarging_makes_no_tensor_larger_than_a_strip(
    config: PredictionConfig, softmax: SoftmaxAt
) -> None:
    image, out_size = noise(32, 40), (3000, 4000)
    config = config.model_copy(update={"softmax": softmax})
    with LargestTensor() as largest:
        for strip in probability_rows(Cells(), image, config, out_size, device=CPU):
            assert strip.shape[1] < 3000 / 4
    assert largest.values <= STRIP_VALUES["cpu"]


LARGE_IMAGE = """
import resource, sys, torch
from iddc.config import PredictionConfig
from iddc.windows import Request, cluster_ids
torch.set_num_threads(2)

class Cheap:
    num_clusters = 27
    def probs(self, images):
        return torch.ones(len(images), 27, 14, 14) / 27

height, width, window, *out = map(int, sys.argv[1:])
image = torch.zeros(3, height, width, dtype=torch.uint8)
config = PredictionConfig(window=window, overlap=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
list(cluster_ids(Cheap(), [Request(image, out)], config, device=torch.device("cpu")))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "window", "out", "limit"),
    [
        ((6000, 8000), 224, (6000, 8000), 300),
        ((448, 597), 0, (6000, 8000), 300),
        ((1024, 2048), 224, (1024, 2048), 150),
    ],
    ids=["windows at full size", "one grid enlarged", "a frame of Cityscapes"],
)
def test_a_large_image_stays_below_a_memory_limit(
    size: tuple[int, int], window: int, out: tuple[int, int], limit: int
) -> None:
    """In megabytes, above torch and the image. All probabilities would be 5184, and 226."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE_IMAGE, *map(str, (*size, window, *out))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < limit
