"""`pixels` and `grey`, the floor without a network, against values by hand and other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans

from iddc.backbones import load_backbone
from iddc.cli import main
from iddc.config import Experiment
from iddc.errors import DataError
from iddc.methods import completed, new_network
from iddc.methods.pixels import kmeans
from iddc.network import Means
from iddc.runs import Run
from iddc.segmenter import Segmenter


def test_pixels_are_mean_colour_row_and_distance_from_the_central_column() -> None:
    image = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    image[0, 0, 4:, 12:] = 255
    image[0, 2, 4:, 12:14] = 102  # half of the square
    found = load_backbone("pixels")(image)
    assert found.shape == (1, 5, 2, 4)
    assert found[0, :, 0, 0].tolist() == [0, 0, 0, 0.25, 0.75]
    assert found[0, :, 1, 3].tolist() == pytest.approx([1, 0, 0.2, 0.75, 0.75])
    assert found[0, :, 1, 1].tolist() == [0, 0, 0, 0.75, 0.25]


def test_grey_is_the_luma_of_bt_601() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 4)
    (grey,) = load_backbone("grey")(image).flatten().tolist()
    assert grey == pytest.approx((0.299 * 10 + 0.587 * 20 + 0.114 * 30) / 255)


def test_probabilities_are_those_of_normal_densities_about_the_means() -> None:
    head = Means(5, 3)
    head.variance.fill_(0.3)
    vectors = torch.randn(4, 5)
    found = head(vectors[:, :, None, None])[:, :, 0, 0].softmax(1).detach()
    means, unit = head.means.detach().double().numpy(), 0.3 * np.eye(5)
    expected = np.stack([multivariate_normal(mean, unit).pdf(vectors.numpy()) for mean in means], 1)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-4)


def test_lower_precision_changes_no_probability() -> None:
    head, vectors = Means(5, 3), torch.rand(4, 5, 2, 2)
    head.variance.fill_(0.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(vectors)
    assert torch.equal(found, head(vectors))


def test_the_means_are_as_near_as_those_of_scikit_learn() -> None:
    vectors = np.random.default_rng(0).random((2000, 5))
    means, variance = kmeans(vectors, 6, 3, 0)
    theirs = KMeans(6, n_init=10, random_state=0).fit(vectors).inertia_
    assert means.shape == (6, 5)
    nearest = ((vectors[:, None] - means) ** 2).sum(2).min(1)
    assert variance == pytest.approx(nearest.mean() / 5)
    assert nearest.sum() < 1.02 * theirs


def test_fewer_colours_than_clusters_are_counted_in_an_error() -> None:
    vectors = np.repeat(np.eye(5)[:3], 20, axis=0)
    assert kmeans(vectors, 3, 1, 0)[1] == 0
    with pytest.raises(DataError, match=r"Found 3 distinct colours .* Ask for 3 clusters or fewer"):
        kmeans(vectors, 4, 1, 0)


def test_a_position_is_that_in_the_image_and_not_in_a_window() -> None:
    experiment = completed(Experiment(method="pixels", num_clusters=2))
    network: Any = new_network(experiment)
    network.head.means.data.copy_(
        torch.tensor([[0.5, 0.5, 0.5, 0.25, 0.5], [0.5, 0.5, 0.5, 0.75, 0.5]])
    )
    network.head.variance.fill_(0.01)
    segmenter = Segmenter.of(network, experiment)
    found = segmenter.predict(Image.new("RGB", (640, 480), (128, 128, 128))).clusters
    assert (found[:236] == 0).all()
    assert (found[244:] == 1).all()


@pytest.fixture
def levels(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Labelled images of three grey levels of unequal size, as iddc evaluate takes them."""
    label = np.zeros((64, 96), np.uint8)
    label[8:16, 16:32] = 1
    label[40:56, 64:88] = 2
    picture = np.array([40, 120, 220], np.uint8)[label]
    for split in ("train", "val"):
        for kind, array in (("images", picture), ("labels", label)):
            (tmp_path / split / kind).mkdir(parents=True)
            for name in "ab":
                Image.fromarray(array).save(tmp_path / split / kind / f"{name}.png")
    (tmp_path / "classes.txt").write_text("rock\npore\nore\n")
    return tmp_path, label


@pytest.mark.parametrize("method", ["grey", "pixels"])
def test_the_command_trains_a_run_that_predicts_and_is_scored(
    levels: tuple[Path, np.ndarray], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, label = levels
    run = tmp_path / "run"
    words = ["baseline", method, str(data / "train" / "images"), "-k", "3", "--device", "cpu"]
    assert main([*words, "--out", str(run)]) == 0
    printed = capsys.readouterr()
    assert f" · {method} · 3 clusters" in printed.out
    assert "backbone bundled" not in printed.err  # no network is looked for
    assert Run(run).experiment.backbone == method
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    accuracy = float(next(line for line in capsys.readouterr().out.splitlines()
                          if line.startswith("accuracy")).split()[1])  # fmt: skip
    if method == "grey":
        assert accuracy > 97
        found = Segmenter.load(run, "cpu").predict(data / "val" / "images" / "a.png").clusters
        assert len({int(found[label == kind][0]) for kind in range(3)}) == 3
    else:
        assert accuracy > 40


def test_a_backbone_is_no_option_of_a_method_that_has_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["baseline", "pixels", "--help-all"]) == 0
    assert "--backbone" not in capsys.readouterr().out
