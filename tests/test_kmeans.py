"""K-means on embeddings: the clustering alone, then on images."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from iddc import clustering, samples
from iddc.backbones import Backbone, load_backbone
from iddc.clustering import KMeansConfig, spherical_kmeans
from iddc.config import (
    Experiment,
    ObjectiveConfig,
    PredictionConfig,
    ReadingConfig,
    Runtime,
    TrainingConfig,
    ViewsConfig,
)
from iddc.errors import DataError, NumericError
from iddc.images import ImageFile, Picture, Skipped, find_images, open_picture
from iddc.learning import fit
from iddc.network import Centroids, Network, build_network
from iddc.runs import Run
from iddc.samples import Sampler
from iddc.segmenter import Segmenter

QUIET = Runtime(device="cpu", workers=2)
COLOURS = np.array([[200, 30, 30], [30, 180, 60], [40, 60, 210]], np.uint8)


# The clustering alone -----------------------------------------------------------------------------


def blobs(num: int, dim: int, noise: float, *, per_blob: int = 50) -> tuple[Tensor, Tensor]:
    """`num` orthogonal directions and noisy vectors of varied length around each."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q[:num]
    vectors = directions.repeat_interleave(per_blob, 0)
    vectors = vectors + noise * torch.randn(vectors.shape, generator=generator)
    return directions, vectors * (0.1 + torch.rand(len(vectors), 1, generator=generator))


def noise_vectors(seed: int, num: int = 300, dim: int = 6) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def inertia_of(vectors: Tensor, centroids: Tensor) -> float:
    cosines = normalize(vectors.double(), dim=1) @ normalize(centroids.double(), dim=1).T
    return 1 - cosines.max(1).values.mean().item()


def test_well_separated_directions_are_recovered() -> None:
    directions, vectors = blobs(9, 16, noise=0.05)
    found = spherical_kmeans(vectors, 9).centroids
    cosines = found @ directions.T
    assert sorted(cosines.argmax(1).tolist()) == list(range(9))
    assert cosines.max(1).values.min() > 0.99


def test_the_inertia_is_the_mean_of_one_minus_the_cosine_to_the_nearest_centroid() -> None:
    vectors = noise_vectors(0)
    result = spherical_kmeans(vectors, 5)
    assert result.inertia == pytest.approx(inertia_of(vectors, result.centroids), abs=1e-6)


def test_two_vectors_and_one_cluster_give_the_bisector() -> None:
    result = spherical_kmeans(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), 1)
    assert result.centroids[0].tolist() == pytest.approx([0.5**0.5] * 2)
    assert result.inertia == pytest.approx(1 - 0.5**0.5)


@given(seed=st.integers(0, 2**31), num_clusters=st.integers(1, 12))
def test_the_inertia_never_rises_over_the_iterations(seed: int, num_clusters: int) -> None:
    vectors = noise_vectors(seed, num=60, dim=3)
    inertias = [
        spherical_kmeans(vectors, num_clusters, config, seed=seed).inertia
        for config in (KMeansConfig(restarts=1, max_iterations=i, tolerance=0) for i in range(1, 9))
    ]
    assert all(after <= before + 1e-6 for before, after in pairwise(inertias))


@pytest.mark.parametrize("num_clusters", [3, 8, 27])
@pytest.mark.parametrize("noise", [0.2, 0.6, 10.0])
def test_the_inertia_is_within_three_percent_of_scikit_learn(
    num_clusters: int, noise: float
) -> None:
    _, vectors = blobs(12, 16, noise=noise)
    reference = KMeans(num_clusters, n_init=3, random_state=0).fit(
        normalize(vectors, dim=1).numpy()
    )
    expected = inertia_of(vectors, torch.from_numpy(reference.cluster_centers_))
    assert spherical_kmeans(vectors, num_clusters).inertia <= 1.03 * expected


def test_the_length_of_a_vector_does_not_count() -> None:
    vectors = noise_vectors(1)
    powers = 2.0 ** torch.randint(-8, 8, (len(vectors), 1))
    one, other = (spherical_kmeans(v, 4).centroids for v in (vectors, vectors * powers))
    assert torch.allclose(one, other, atol=1e-5)


def test_an_empty_cluster_starts_again_at_the_farthest_vector() -> None:
    vectors = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [-0.2, 1.0]]), dim=1)
    twice = vectors[[0, 0]]
    cosine, sums, sizes = clustering._assign(vectors, twice)
    assert sizes.tolist() == [3, 0]
    centroids = clustering._update(vectors, cosine, sums, sizes)
    assert torch.equal(centroids[1], vectors[2])
    assert torch.allclose(centroids[0], normalize(vectors.sum(0), dim=0))


def test_the_size_of_a_block_does_not_change_the_assignment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = normalize(noise_vectors(2), dim=1)
    whole = clustering._assign(vectors, vectors[:7])
    monkeypatch.setattr(clustering, "_ROWS", 11)
    for one, other in zip(whole, clustering._assign(vectors, vectors[:7]), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_same_seed_gives_the_same_centroids_and_another_seed_others() -> None:
    vectors = noise_vectors(3)
    first, again, other = (spherical_kmeans(vectors, 6, seed=s).centroids for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_restarts_never_give_a_higher_inertia() -> None:
    vectors = noise_vectors(4)
    inertias = [
        spherical_kmeans(vectors, 10, KMeansConfig(restarts=restarts)).inertia
        for restarts in (1, 2, 4, 8)
    ]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_as_many_clusters_as_distinct_vectors_gives_one_each() -> None:
    vectors = noise_vectors(5, num=8).repeat(4, 1)
    assert spherical_kmeans(vectors, 8).inertia == pytest.approx(0, abs=1e-6)


def test_fewer_distinct_vectors_than_clusters_is_a_data_error() -> None:
    vectors = noise_vectors(5, num=8).repeat(4, 1)
    with pytest.raises(DataError, match=r"at least 9 distinct embeddings.*found 8"):
        spherical_kmeans(vectors, 9)


def test_vectors_that_are_not_finite_are_a_numeric_error() -> None:
    vectors = noise_vectors(6)
    vectors[10, 2] = torch.nan
    with pytest.raises(NumericError, match="NaN"):
        spherical_kmeans(vectors, 2)


# On images ----------------------------------------------------------------------------------------


def tiny(**changes: Any) -> Experiment:
    """Windows of 64 pixels, 4 x 4 patches of 16, on a ViT of width 64."""
    return Experiment(
        method="kmeans",
        num_clusters=3,
        backbone="untrained:test_vit",
        views=ViewsConfig(short_side=96),
        prediction=PredictionConfig(window=64, overlap=32),
        training=TrainingConfig(precision="fp32"),
        **changes,
    )


def bands(index: int) -> np.ndarray:
    """Which of three colours the rows of image `index` have, in bands of at least 32 pixels."""
    order = np.random.default_rng(index).permutation(3)
    ids: np.ndarray = np.repeat(order, [32, 32, 32])[:, None].repeat(128, axis=1)
    return ids


@pytest.fixture
def photos(tmp_path: Path) -> list[ImageFile]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 20, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(COLOURS[bands(i)] + noise).save(folder / f"{i:02}.png")
    return list(find_images(folder).files)


def start(tmp_path: Path, experiment: Experiment) -> Run:
    return Run.start(tmp_path / "run", experiment, source="photos")


def head_of(segmenter: Segmenter) -> Centroids:
    assert isinstance(segmenter.network, Network)
    assert isinstance(segmenter.network.head, Centroids)
    return segmenter.network.head


def test_a_fitted_segmenter_tells_three_colours_apart(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    with start(tmp_path, tiny()) as run:
        segmenter = Segmenter.of(fit(photos, tiny(), run, QUIET), tiny())
    counts = np.zeros((3, 3), int)
    for i, file in enumerate(photos[:6]):
        clusters = segmenter.predict(file.path).clusters
        np.add.at(counts, (clusters, bands(i)), 1)
    assert sorted(counts.argmax(1)) == [0, 1, 2]
    assert counts.max(1).sum() > 0.9 * counts.sum()


def test_a_run_of_kmeans_is_finished_and_predicts_the_same_after_loading(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    with start(tmp_path, tiny()) as run:
        segmenter = Segmenter.of(fit(photos, tiny(), run, QUIET), tiny())
    loaded = Segmenter.load(Run.open(run.path).path, device="cpu")
    assert loaded.experiment.head == "centroids"
    expected = segmenter.predict(photos[0].path).clusters
    assert np.array_equal(loaded.predict(photos[0].path).clusters, expected)


def test_the_log_tells_how_many_embeddings_were_clustered_and_how_well(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    with start(tmp_path, tiny()) as run:
        fit(photos, tiny(options={"max_vectors": 100, "restarts": 2}), run, QUIET)
    (entry,) = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert (entry["vectors"], entry["step"]) == (100, 0)
    assert 0 < entry["inertia"] < 1


@pytest.mark.parametrize("centering", ["none", "batch"])
def test_centred_means_less_the_mean_of_the_sample(
    photos: list[ImageFile], tmp_path: Path, centering: Any
) -> None:
    experiment = tiny(objective=ObjectiveConfig(centering=centering))
    with start(tmp_path, experiment) as run:
        segmenter = Segmenter.of(fit(photos, experiment, run, QUIET), experiment)
    assert isinstance(segmenter.network, Network)
    vectors = Sampler(photos, segmenter.network.backbone, experiment, QUIET).patches(200_000)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    mean = vectors.mean(0) if centering == "batch" else torch.zeros(64)
    head = head_of(segmenter)
    assert torch.allclose(head.mean, mean, atol=1e-5)
    expected = spherical_kmeans(vectors - mean, 3).centroids
    assert torch.allclose(head.centroids, expected, atol=1e-5)


def test_kmeans_and_training_see_the_same_untrained_backbone(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    experiment = tiny(seed=5)
    with start(tmp_path, experiment) as run:
        segmenter = Segmenter.of(fit(photos, experiment, run, QUIET), experiment)
    assert isinstance(segmenter.network, Network)
    found = segmenter.network.backbone.state_dict()
    for name, weight in build_network(experiment).backbone.state_dict().items():
        assert torch.equal(found[name], weight)


def test_fitting_leaves_the_random_numbers_of_the_caller_alone(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    with start(tmp_path, tiny()) as run:
        fit(photos, tiny(), run, QUIET)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_image_is_left_out_and_listed(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    photos[4].path.write_bytes(photos[4].path.read_bytes()[:200])
    earlier = Skipped(ImageFile(tmp_path / "a.jpg", PurePosixPath("a.jpg")), "the file is empty")
    runtime = QUIET.model_copy(update={"max_unreadable": 0.2})
    with start(tmp_path, tiny()) as run:
        fit(photos, tiny(), run, runtime, skipped=[earlier])
    rows = list(csv.reader((run.path / "skipped.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["name", "a.jpg", "04.png"]
    assert rows[1][1] == "the file is empty"
    assert "cut short" in rows[2][1]


def test_too_many_unreadable_images_stop_the_run_and_are_listed(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    photos[4].path.write_bytes(b"no image")
    with start(tmp_path, tiny()) as run:
        with pytest.raises(DataError, match=r"1 of 12 .* more than the 5%.*04\.png"):
            fit(photos, tiny(), run, QUIET)
        assert "04.png" in (run.path / "skipped.csv").read_text()
        assert not run.finished


def test_without_any_readable_image_there_is_nothing_to_cluster(tmp_path: Path) -> None:
    with start(tmp_path, tiny()) as run, pytest.raises(DataError, match="found 0"):
        fit([], tiny(), run, QUIET)


# The sample ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("untrained:test_vit")


def sample(
    files: list[ImageFile], backbone: Backbone, max_vectors: int, workers: int = 2, seed: int = 0
) -> Tensor:
    runtime = Runtime(device="cpu", workers=workers)
    experiment = tiny(seed=seed)
    return Sampler(files, backbone, experiment, runtime).patches(max_vectors)


def test_every_sampled_embedding_is_one_of_a_prediction_window(
    photos: list[ImageFile], backbone: Backbone
) -> None:
    pixels = torch.from_numpy(np.array(Image.open(photos[0].path))).permute(2, 0, 1)
    windows = [pixels[:, y : y + 64, x : x + 64] for y in (0, 32) for x in (0, 32, 64)]
    with torch.no_grad():
        every = backbone(torch.stack(windows)).permute(0, 2, 3, 1).reshape(-1, 64)
    drawn = sample(photos[:1], backbone, 60)
    assert len(drawn) == 60
    nearest = (drawn[:, None] - every).norm(dim=2).min(1)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) == 60


def test_each_image_gives_an_equal_share_whatever_the_others_are(
    photos: list[ImageFile], backbone: Backbone, tmp_path: Path
) -> None:
    missing = ImageFile(tmp_path / "missing.png", PurePosixPath("missing.png"))
    parts = [
        sample([file if i == j else missing for j in range(len(photos))], backbone, 50)
        for i, file in enumerate(photos)
    ]
    assert {len(part) for part in parts} == {4, 5}
    assert torch.equal(torch.cat(parts), sample(photos, backbone, 50))


def test_an_image_with_fewer_patches_than_its_share_gives_them_all(
    photos: list[ImageFile], backbone: Backbone
) -> None:
    assert len(sample(photos[:2], backbone, 10_000)) == 2 * 6 * 16


def test_large_images_are_opened_at_the_size_that_is_used(
    photos: list[ImageFile], backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def opened(file: ImageFile, min_side: int, reading: ReadingConfig, *, settled: bool) -> Picture:
        asked.append(min_side)
        return open_picture(file, min_side, reading, settled=settled)

    monkeypatch.setattr(samples, "open_picture", opened)
    experiment = tiny().model_copy(update={"views": ViewsConfig(short_side=64, crop_size=32)})
    sampler = Sampler(photos[:1], backbone, experiment, QUIET)
    sampler.patches(9)
    sampler.means()
    assert asked == [64, 32]


def test_patches_are_drawn_from_all_of_an_image_not_from_its_first_rows(
    backbone: Backbone, tmp_path: Path
) -> None:
    halves = np.zeros((96, 96, 3), np.uint8)
    halves[48:] = 255
    Image.fromarray(halves).save(tmp_path / "halves.png")
    files = [ImageFile(tmp_path / "halves.png", PurePosixPath("halves.png"))]
    whole = tiny().model_copy(update={"prediction": PredictionConfig(window=0, flip=False)})
    drawn = Sampler(files, backbone, whole, QUIET).patches(12)
    with torch.no_grad():
        maps = backbone(torch.from_numpy(halves).permute(2, 0, 1)[None])[0]
    distances = (drawn[:, None] - maps.flatten(1).T).norm(dim=2)  # to the 6 x 6 patches
    rows = distances.argmin(1) // 6
    assert 3 <= (rows >= 3).sum() <= 9  # of 12


def test_kmeans_compares_200000_embeddings_and_keeps_the_best_of_3() -> None:
    config = KMeansConfig()
    assert (config.max_vectors, config.restarts) == (200_000, 3)


def test_images_without_a_share_are_not_opened(backbone: Backbone, tmp_path: Path) -> None:
    files = [ImageFile(tmp_path / f"{i}.png", PurePosixPath(f"{i}.png")) for i in range(7)]
    sampler = Sampler(files, backbone, tiny(), QUIET)
    sampler.patches(3)
    assert [index for index, _ in sampler.failures] == [2, 4, 6]


def test_two_processes_draw_what_one_does(photos: list[ImageFile], backbone: Backbone) -> None:
    sampler = Sampler(photos, backbone, tiny(), QUIET)
    parts = [sampler.patches(50, part) for part in (range(5), range(5, 12), range(12, 12))]
    assert torch.equal(torch.cat(parts), sampler.patches(50))


def test_maps_are_of_whole_images_at_working_size(
    photos: list[ImageFile], backbone: Backbone
) -> None:
    for index, found in Sampler(photos, backbone, tiny(), QUIET).maps([3, 1]):
        pixels = torch.from_numpy(np.array(Image.open(photos[index].path))).permute(2, 0, 1)
        with torch.no_grad():
            assert torch.allclose(found, backbone(pixels[None])[0], atol=1e-5)


def test_the_sample_follows_from_the_seed_and_not_from_the_threads(
    photos: list[ImageFile], backbone: Backbone
) -> None:
    first = sample(photos, backbone, 100, workers=0)
    assert torch.equal(first, sample(photos, backbone, 100, workers=5))
    assert not torch.equal(first, sample(photos, backbone, 100, seed=1))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is not here")
def test_memory_does_not_grow_with_the_number_of_clusters() -> None:
    """Seeds once pinned what was computed between them: 16 GB for 3,000 clusters."""
    program = """
import resource, torch
from iddc.clustering import _seeds
generator = torch.Generator().manual_seed(0)
vectors = torch.nn.functional.normalize(torch.randn(50_000, 32, generator=generator), dim=1)
for clusters in (8, 200):
    _seeds(vectors, clusters, generator)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 60  # megabytes, and not 200 times 1.4
