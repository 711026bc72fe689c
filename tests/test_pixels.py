"""The baselines without a network, in benchmarks/pixels.py, on pictures whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarking import benchmark
from iddc.datasets import Sample
from iddc.images import find_images


@pytest.fixture(scope="module")
def pixels() -> Any:
    return benchmark("pixels")


@dataclass
class Two:
    """Two images, half black above half white; their classes say so, but for the second's."""

    num_classes = 2

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        label = np.zeros((4, 6), np.uint8)
        label[2:] = 1
        image = Image.fromarray(np.repeat(255 * label[..., None], 3, axis=2))
        if index:
            label[:, 3:] = 255
        return Sample(image, label, "x")


def test_features_are_colour_row_and_distance_from_the_central_column(pixels: Any) -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[1, 3] = [255, 0, 51]
    found = pixels.features(image)
    assert found.shape == (8, 5)
    assert found[0].tolist() == [0, 0, 0, 0.25, 0.75]
    assert found[-1].tolist() == pytest.approx([1, 0, 0.2, 0.75, 0.75])
    assert found[1].tolist() == [0, 0, 0, 0.25, 0.25]


def test_one_cluster_has_the_share_of_the_most_frequent_class(pixels: Any) -> None:
    found = pixels.scores(Two(), pixels.one_cluster, 2)
    assert found.accuracy == pytest.approx(1 / 2)  # 18 of 36 labelled pixels
    assert found.miou == pytest.approx(1 / 4)


def test_the_constant_picture_is_the_most_frequent_class_of_each_position(pixels: Any) -> None:
    labels = [np.array(rows, np.uint8) for rows in ([[0, 1]], [[0, 2]], [[255, 2]], [[1, 255]])]
    picture = pixels.constant_picture(labels, 3)
    assert picture(np.zeros((1, 2, 3), np.uint8)).tolist() == [[0, 2]]
    assert picture(np.zeros((2, 4, 3), np.uint8)).tolist() == [[0, 0, 2, 2]] * 2
    two = Two()
    whole = pixels.constant_picture((two[index].label for index in range(2)), 2)
    assert pixels.scores(two, whole, 2).accuracy == 1


def test_kmeans_on_pixels_finds_what_colour_and_row_tell(pixels: Any, tmp_path: Path) -> None:
    for index in range(2):
        Two()[index].image.save(tmp_path / f"{index}.png")
    found = pixels.kmeans(find_images(tmp_path).files, 2, 0)
    assert pixels.scores(Two(), found, 2).accuracy == 1
