"""Refinement: both mean fields against loops, and what holds for any of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from iddc import refine
from iddc.config import Experiment, PredictionConfig, RefineName
from iddc.datasets import Sample
from iddc.errors import ConfigError, SetupError
from iddc.evaluation import PROTOCOLS, EvalProtocol, evaluate
from iddc.progress import Progress
from iddc.refine import REACH, REFINERS, dense_crf, fast_rows, mean_field, refiner
from iddc.segmenter import Segmenter
from iddc.windows import Request, as_array, cluster_ids, predict_probs
from tiny import tiny_segmenter

needs_crf = pytest.mark.skipif(
    find_spec("pydensecrf") is None, reason="the extra crf is not installed: it needs a compiler"
)
EDGES = ["fast", pytest.param("crf", marks=needs_crf)]


def some_probs(clusters: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(clusters, height, width, generator=generator)).softmax(0)


def some_image(height: int, width: int, seed: int = 0) -> Tensor:
    """Blobs of a few colours with some noise, so that some neighbours are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([40, 60, 200], (height // 6 + 1, width // 6 + 1, 3))
    image = coarse.repeat(6, 0).repeat(6, 1)[:height, :width] + rng.integers(
        0, 8, (height, width, 3)
    )
    return torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1).contiguous()


def refined(name: RefineName, probs: Tensor, image: Tensor) -> Tensor:
    return torch.cat(list(refiner(name, image)([probs])), dim=1)


# The fast one -------------------------------------------------------------------------------------


def slow_fast(probs: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The docstring of `mean_field`, pixel by pixel."""
    _, height, width = probs.shape
    unary = np.log(np.maximum(probs, 1e-5))
    q = probs
    for d in (32, 16, 8, 4, 2):
        updated = np.empty_like(q)
        for y in range(height):
            for x in range(width):
                message, total = 0.01 * q[:, y, x], 0.01
                for step in (d, d // 2):
                    for dy in (-step, 0, step):
                        for dx in (-step, 0, step):
                            inside = 0 <= y + dy < height and 0 <= x + dx < width
                            if (dy, dx) == (0, 0) or not inside:
                                continue
                            difference = image[:, y, x] - image[:, y + dy, x + dx]
                            k = np.exp(-(difference**2).sum() / (2 * 8.0**2))
                            message = message + k * q[:, y + dy, x + dx]
                            total += k
                energy = unary[:, y, x] + 8 * message / total
                exponentials = np.exp(energy - energy.max())
                updated[:, y, x] = exponentials / exponentials.sum()
        q = updated
    return q


@pytest.mark.parametrize(("height", "width"), [(37, 7), (5, 36), (1, 1)])
def test_the_fast_mean_field_is_that_of_loops(height: int, width: int) -> None:
    probs, image = some_probs(3, height, width), some_image(height, width)
    expected = slow_fast(probs.double().numpy(), image.double().numpy())
    found = mean_field(probs[None], image[None])[0]
    assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_a_batch_is_refined_image_by_image() -> None:
    probs = torch.stack([some_probs(4, 20, 30, seed) for seed in range(3)])
    images = torch.stack([some_image(20, 30, seed) for seed in range(3)])
    alone = [mean_field(p[None], i[None])[0] for p, i in zip(probs, images, strict=True)]
    assert torch.allclose(mean_field(probs, images), torch.stack(alone), atol=1e-6)


@given(
    height=st.integers(1, 420),
    cuts=st.lists(st.integers(1, 90), max_size=40),
    tile=st.sampled_from([1, 2 * 5 * 260, 2 * 5 * 400]),
)
def test_tiles_equal_the_whole(height: int, cuts: list[int], tile: int) -> None:
    probs, image = some_probs(2, height, 5), some_image(height, 5)
    ends = [end for end in np.cumsum([0, *cuts]).tolist() if end < height]
    strips = probs.split(np.diff([*ends, height]).tolist(), dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "TILE_VALUES", tile)
        found = list(fast_rows(strips, image))
    assert (len(found) > 1) == (2 * 5 * height > tile and height > 2 * REACH)
    whole = mean_field(probs[None], image[None])[0]
    assert torch.allclose(torch.cat(found, dim=1), whole, atol=1e-6)


@given(width=st.integers(1, 420), tile=st.sampled_from([1, 2 * 5 * 260, 2 * 5 * 400]))
def test_tiles_of_columns_equal_the_whole(width: int, tile: int) -> None:
    probs, image, sizes = some_probs(2, 5, width), some_image(5, width), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "TILE_VALUES", tile)
        patch.setattr(
            refine, "mean_field", lambda p, i: (sizes.append(p.shape[3]), mean_field(p, i))[1]
        )
        (found,) = fast_rows([probs], image)
    assert (len(sizes) > 1) == (2 * 5 * width > tile and width > 2 * REACH)
    assert max(sizes) <= max(width if len(sizes) == 1 else 0, tile // 10, 4 * REACH)
    assert torch.allclose(found, mean_field(probs[None], image[None])[0], atol=1e-6)


def test_a_tile_has_64_megabytes_so_that_a_usual_image_is_one() -> None:
    assert refine._tile_size(27 * 600, 1000) == 1000
    # 2**24 values are 414 rows, of which 2 * 62 are margins: 290 rows, so four times 250.
    assert refine._tile_size(27 * 1500, 1000) == 250


def test_a_tile_comes_as_soon_as_the_rows_it_depends_on_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refine, "TILE_VALUES", 1)
    read = 0

    def rows() -> Iterator[Tensor]:
        nonlocal read
        for row in some_probs(2, 600, 4).split(1, dim=1):
            read += 1
            yield row

    first = next(fast_rows(rows(), some_image(600, 4)))
    assert read == first.shape[1] + REACH < 300


MEMORY = """
import resource
import torch
from iddc.refine import fast_rows
torch.set_num_threads(2)
image = torch.randint(0, 256, (3, 1024, 2048), dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
strips = fast_rows((torch.full((27, 64, 2048), 1 / 27) for _ in range(16)), image)
for _ in range(2):  # tiles
    next(strips)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_27_clusters_of_2048_x_1024_pixels_stay_below_600_megabytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    probs, image = some_probs(5, 90, 70), some_image(90, 70)
    found = refined("fast", probs.cuda(), image)
    assert found.is_cuda
    assert torch.allclose(found.cpu(), refined("fast", probs, image), atol=1e-4)


# The fully connected one --------------------------------------------------------------------------


def slow_crf(probs: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Mean field with every pair of pixels, kernels normalised symmetrically, Potts."""
    clusters, height, width = probs.shape
    places = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(float)
    colours = image.reshape(3, -1).T.astype(float)
    kernels = []
    for weight, xy, rgb in ((3, 1, None), (4, 67, 3)):
        kernel = np.empty((len(places), len(places)))
        for i in range(len(places)):
            exponent = ((places - places[i]) ** 2).sum(1) / (2 * xy**2)
            if rgb is not None:
                exponent += ((colours - colours[i]) ** 2).sum(1) / (2 * rgb**2)
            kernel[i] = np.exp(-exponent)
        scale = kernel.sum(1) ** -0.5
        kernels.append(weight * scale[:, None] * kernel * scale)
    unary = -np.log(np.maximum(probs.reshape(clusters, -1).T, 1e-5))
    energy = -unary
    for _ in range(11):  # the start, and ten updates
        q = np.exp(energy - energy.max(1, keepdims=True))
        q /= q.sum(1, keepdims=True)
        energy = -unary + sum(kernel @ q for kernel in kernels)
    return q.T.reshape(probs.shape)


@needs_crf
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("height", "width"), [(22, 26), (3, 200)])
def test_the_crf_is_the_mean_field_of_all_pairs_up_to_the_lattice(
    height: int, width: int, seed: int
) -> None:
    """Other constants are farther off: a distance of 20 instead of 67, say, by 0.04 or more."""
    probs, image = some_probs(4, height, width, seed), some_image(height, width, seed)
    expected = slow_crf(probs.double().numpy(), image.numpy())
    found = dense_crf(probs, image).numpy()
    assert np.abs(found - expected).mean() < 0.02
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.96


def test_a_large_image_is_refused_before_its_probabilities_are_held() -> None:
    read = []

    def strips() -> Iterator[Tensor]:
        for _ in range(100):
            read.append(torch.full((27, 1, 3000), 1 / 27))
            yield read[-1]

    image = torch.zeros(3, 2000, 3000, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"2,485,513 pixels with 27 clusters.*3000 x 2000.*fast"):
        list(refiner("crf", image)(strips()))
    assert len(read) == 1


def test_the_crf_has_the_constants_of_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """STEGO's and the release's: 10 iterations, 3 and 4 as weights, 1, 67 and 3 as widths."""
    told: dict[str, Any] = {}

    class Field:
        def __init__(self, width: int, height: int, clusters: int) -> None:
            told["shape"] = (clusters, height, width)

        def setUnaryEnergy(self, energy: np.ndarray) -> None:  # noqa: N802
            told["unary"] = energy

        def addPairwiseGaussian(self, sxy: float, compat: float) -> None:  # noqa: N802
            told["smoothness"] = (sxy, compat)

        def addPairwiseBilateral(  # noqa: N802
            self, sxy: float, srgb: float, rgbim: np.ndarray, compat: float
        ) -> None:
            told["appearance"], told["image"] = (sxy, srgb, compat), rgbim

        def inference(self, iterations: int) -> np.ndarray:
            told["iterations"] = iterations
            return np.full((3, 4 * 5), 1 / 3, np.float32)

    package, module = ModuleType("pydensecrf"), ModuleType("pydensecrf.densecrf")
    vars(module)["DenseCRF2D"] = Field
    monkeypatch.setitem(sys.modules, "pydensecrf", package)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", module)
    probs, image = some_probs(3, 4, 5), some_image(4, 5)
    dense_crf(probs, image)
    assert told["shape"] == (3, 4, 5)
    assert np.allclose(told["unary"], -np.log(probs.numpy().reshape(3, 20)), atol=1e-6)
    assert told["smoothness"] == (1, 3)
    assert told["appearance"] == (67, 3, 4)
    assert told["iterations"] == 10
    assert np.array_equal(told["image"], image.permute(1, 2, 0).numpy())


def test_a_prediction_is_refined_by_its_own_image() -> None:
    image = Image.fromarray(some_image(48, 64).permute(1, 2, 0).numpy())
    segmenter = tiny_segmenter(3)
    plain = segmenter.predict(image, with_probs=True).probs
    assert plain is not None
    own = segmenter.experiment.model_copy(
        update={"prediction": PredictionConfig(window=0, flip=False, refine="fast")}
    )
    fast = Segmenter.of(segmenter.network, own).predict(image).clusters
    guide = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = mean_field(plain[None].float(), guide[None])[0].argmax(0).numpy()
    assert (fast == expected).mean() > 0.999
    assert (fast != plain.argmax(0).numpy()).mean() > 0.01


def test_without_the_extra_the_crf_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(SetupError, match=r"pip install 'iddc\[crf\]'") as caught:
        refined("crf", some_probs(2, 3, 3), some_image(3, 3))
    assert caught.value.exit_code == 4


# Both ---------------------------------------------------------------------------------------------


def test_the_table_and_the_names_of_the_configuration_are_the_same() -> None:
    assert tuple(REFINERS) == get_args(RefineName)


def test_none_leaves_the_strips_as_they_are() -> None:
    strips = [some_probs(2, 3, 4), some_probs(2, 1, 4)]
    found = list(refiner("none", some_image(4, 4))(strips))
    assert all(one is other for one, other in zip(found, strips, strict=True))


@pytest.mark.parametrize("name", EDGES)
@given(
    clusters=st.integers(2, 6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_the_result_is_probabilities(
    name: RefineName, clusters: int, height: int, width: int, seed: int
) -> None:
    probs, image = some_probs(clusters, height, width, seed), some_image(height, width, seed)
    found = refined(name, probs, image)
    assert found.shape == probs.shape
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert torch.allclose(found.sum(0), torch.ones(height, width), atol=1e-5)


@pytest.mark.parametrize("name", EDGES)
def test_a_blurred_edge_moves_to_that_of_the_image(name: RefineName) -> None:
    image = torch.full((3, 32, 48), 90, dtype=torch.uint8)
    image[:, :, 20:] = 130
    right = torch.sigmoid((torch.arange(48.0) - 26) / 8).expand(32, 48)
    probs = torch.stack([1 - right, right])
    assert (probs.argmax(0)[0] == 1).nonzero().min() == 27
    clusters = refined(name, probs, image).argmax(0)
    assert not clusters[:, :20].any()
    assert clusters[:, 20:].all()


@pytest.mark.parametrize("name", EDGES)
def test_a_single_pixel_keeps_its_most_probable_cluster(name: RefineName) -> None:
    probs = torch.tensor([0.3, 0.5, 0.2])[:, None, None]
    assert refined(name, probs, some_image(1, 1)).argmax(0).item() == 1


@pytest.mark.parametrize("name", EDGES)
def test_a_cluster_of_probability_1_stays_the_most_probable(name: RefineName) -> None:
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (30, 30)))
    probs = torch.nn.functional.one_hot(truth, 3).permute(2, 0, 1).float()
    flat = torch.full((3, 30, 30), 128, dtype=torch.uint8)
    assert torch.equal(refined(name, probs, flat).argmax(0), truth)


@pytest.mark.parametrize("name", EDGES)
def test_in_an_even_image_even_probabilities_stay_even(name: RefineName) -> None:
    flat = torch.full((3, 24, 31), 128, dtype=torch.uint8)
    quarter = torch.full((4, 24, 31), 0.25)
    assert torch.allclose(refined(name, quarter, flat), quarter, atol=1e-6)
    slanted = torch.tensor([0.5, 0.3, 0.2])[:, None, None].expand(3, 24, 31)
    found = refined(name, slanted, flat)
    assert (found.argsort(0, descending=True) == torch.arange(3)[:, None, None]).all()


# In use -------------------------------------------------------------------------------------------


class Blurred:
    """Two clusters from the red of patches of 16 pixels."""

    num_clusters = 2

    def probs(self, images: Tensor) -> Tensor:
        red = torch.nn.functional.avg_pool2d(images[:, :1].float(), 16) / 255
        return torch.cat([1 - red, red], dim=1)


def half(width: int, height: int, edge: int) -> Sample:
    """Black on the left of the edge, red on the right, labelled so."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, edge:, 0] = 255
    return Sample(Image.fromarray(pixels), (pixels[..., 0] > 0).astype(np.uint8), "half.png")


@pytest.mark.parametrize("name", EDGES)
def test_maps_and_probabilities_are_refined_alike(name: RefineName) -> None:
    image = torch.from_numpy(np.array(half(96, 64, 43).image)).permute(2, 0, 1)
    config = PredictionConfig(window=32, overlap=16)
    device, size = torch.device("cpu"), (64, 96)
    chosen = refiner(name, image)
    probs = predict_probs(Blurred(), image, config, size, device=device, refine=chosen)

    def cluster_map(*refine: Any) -> np.ndarray:
        requests = [Request(image, size, *refine)]
        ((_, ids),) = cluster_ids(Blurred(), requests, config, device=device)
        return as_array(ids, Blurred().num_clusters)

    clusters = cluster_map(chosen)
    assert np.array_equal(clusters, probs.argmax(0).numpy())
    assert np.array_equal(clusters, (image[0] > 0).numpy())
    assert not np.array_equal(cluster_map(), clusters)


@pytest.mark.parametrize(
    "protocol",
    [
        EvalProtocol(PredictionConfig(window=32, overlap=8)),
        EvalProtocol(PredictionConfig(window=32, overlap=8), scored_at="square", side=40),
    ],
    ids=["label", "square"],
)
def test_a_refined_protocol_scores_what_was_refined(protocol: EvalProtocol) -> None:
    dataset = Halves([half(96, 64, edge) for edge in (39, 51)])
    segmenter = Segmenter.of(Blurred(), Experiment())
    assert evaluate(segmenter, dataset, protocol).scores.accuracy < 1
    assert evaluate(segmenter, dataset, protocol.refined("fast")).scores.accuracy == 1


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_published_protocols_are_not_refined_unless_asked(protocol: EvalProtocol) -> None:
    assert protocol.prediction.refine == "none"
    assert protocol.refined("none") == protocol
    assert protocol.refined("crf").prediction.refine == "crf"


class Halves(list[Sample]):
    """A labelled data set in memory."""

    name = "halves"
    num_classes = 2
    class_names = ("left", "right")


# The benchmark ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "refinement.py"
    spec = spec_from_file_location("refinement", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["refinement"] = module
    spec.loader.exec_module(module)
    return module


def test_the_band_holds_what_is_near_a_pixel_with_a_neighbour_of_another_class(
    benchmark: Any,
) -> None:
    label = np.random.default_rng(0).choice([0, 1, 255], (4, 5)).astype(np.uint8)
    label = label.repeat(7, 0).repeat(6, 1)
    height, width = label.shape
    inside = [(y, x) for y in range(height) for x in range(width)]
    at_edge = [
        (y, x)
        for y, x in inside
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
        if 0 <= y + dy < height
        and 0 <= x + dx < width
        and {label[y, x], label[y + dy, x + dx]} == {0, 1}
    ]
    expected = np.zeros(label.shape, bool)
    for y, x in inside:
        expected[y, x] = any((y - v) ** 2 + (x - u) ** 2 <= 9 for v, u in at_edge)
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(benchmark.edge_band(label, 3), expected)
    assert not benchmark.edge_band(np.zeros((3, 3), np.uint8), 3).any()


def test_the_benchmark_measures_what_refinement_gains_at_edges(benchmark: Any) -> None:
    dataset = Halves([half(300, 240, edge) for edge in (139, 150)])
    segmenter = Segmenter.of(Blurred(), Experiment())
    cases = benchmark.cases_of(segmenter, dataset, 2, Progress())
    found = benchmark.measure(cases, 2, 2, ("none", "fast"))
    assert found["none"].scores == evaluate(segmenter, dataset).scores
    assert found["none"].at_edges.miou < found["none"].scores.miou < 1
    assert found["fast"].at_edges.miou == found["fast"].scores.miou == 1
    assert 0 < found["none"].seconds < found["fast"].seconds


def test_the_fast_one_gains_on_drawn_scenes(benchmark: Any) -> None:
    cases = benchmark.drawn_cases(2, 16, torch.device("cpu"), (320, 240))
    found = benchmark.measure(cases, 6, 6, ("none", "fast"))
    assert found["fast"].scores.miou > found["none"].scores.miou + 0.04
    assert found["fast"].at_edges.miou > found["none"].at_edges.miou + 0.1
    rows = benchmark.table(found).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| none", "| fast"]
