"""The judge of backbones in benchmarks/quality.py, on synthetic scenes and planted answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from iddc.config import Experiment, PredictionConfig, Runtime, TrainingConfig, ViewsConfig
from iddc.datasets import Sample
from iddc.datasets.synthetic import write_scenes

PATH = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("quality", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted(seed: int, count: int = 300) -> tuple[Tensor, Tensor]:
    """Vectors around three directions, which overlap a little, and which direction it is."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, 5, generator=generator)
    return 2.5 * torch.eye(5)[classes] + noise, classes


def test_neighbours_vote_by_their_cosine(quality: Any) -> None:
    (known, classes), (queries, _) = planted(0), planted(1, 50)
    found = quality.nearest_neighbours(known, classes, queries, 3)
    for query, answer in zip(queries, found, strict=True):
        cosines = torch.cosine_similarity(query[None], known)
        near = cosines.argsort(descending=True)[:20]
        votes = [float((cosines[near] / 0.07).exp()[classes[near] == c].sum()) for c in range(3)]
        assert answer == votes.index(max(votes))


def test_the_linear_probe_is_logistic_regression(quality: Any) -> None:
    (known, classes), (queries, truth) = planted(0), planted(1)
    found = quality.linear_probe(known, classes, queries, 3)
    judge = LogisticRegression(C=1e3).fit(known.numpy(), classes.numpy())
    assert (found.numpy() == judge.predict(queries.numpy())).mean() > 0.98
    assert (found == truth).float().mean() > 0.8


def test_a_patch_has_the_class_at_its_centre_and_ignored_ones_are_left_out(quality: Any) -> None:
    label = np.kron([[0, 1, 255], [2, 3, 4]], np.ones((8, 8))).astype(np.uint8)
    image = Image.fromarray(np.repeat(label[..., None], 3, axis=2))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(images.float(), 8)

    vectors, classes = quality.labelled_patches(
        Mean(), [Sample(image, label, "a")], 10, Experiment(views=ViewsConfig(short_side=0))
    )
    assert sorted(classes.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(vectors[:, 0], classes.float())


def test_a_backbone_gets_all_four_scores(quality: Any, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 10, 0, (96, 64))
    experiment = Experiment(
        backbone="untrained:test_resnet",
        epochs=1,
        views=ViewsConfig(crop_size=32),
        training=TrainingConfig(batch_size=4),
        prediction=PredictionConfig(window=0),
    )
    runtime = Runtime(device="cpu", workers=0)
    record = quality.measure(experiment, tmp_path / "scenes", tmp_path / "out", range(2), runtime)
    assert 0.2 < record["knn"] <= 1
    assert 0.2 < record["linear"] <= 1
    for name in ("kmeans", "iddc"):
        assert len(record[name]["miou"]) == len(record[name]["accuracy"]) == 2
        assert all(0 < value < 1 for value in record[name]["miou"])
    again = quality.measure(experiment, tmp_path / "scenes", tmp_path / "out", range(2), runtime)
    assert again == record
    lines = quality.table(record).splitlines()
    assert [line.split(" | ")[0] for line in lines[-4:]] == [
        "| knn",
        "| linear",
        "| kmeans",
        "| iddc",
    ]
    probed = {**record, "kmeans": {"miou": [], "accuracy": []}, "iddc": {"miou": []}}
    assert [line.split(" | ")[0] for line in quality.table(probed).splitlines()[-2:]] == [
        "| knn",
        "| linear",
    ]
