"""What a run shows of four images on its way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iddc.config import Experiment, Runtime, TrainingConfig, ViewsConfig
from iddc.images import ImageFile
from iddc.learning import fit
from iddc.learning.overlays import Overlays
from iddc.masks import palette
from iddc.methods import completed
from iddc.network import Network, build_network
from iddc.runs import Run
from tiny import write_photos

TINY = Experiment(
    num_clusters=3,
    backbone="untrained:test_vit",
    epochs=12,
    views=ViewsConfig(crop_size=64, short_side=0),
    training=TrainingConfig(batch_size=4, precision="fp32"),
)


def shown(run: Run) -> set[str]:
    return {path.name for path in (run.path / "samples").iterdir()}


def trained(files: list[ImageFile], experiment: Experiment, folder: Path) -> Run:
    with Run.start(folder, experiment, source="photos") as run:
        fit(files, experiment, run, Runtime(device="cpu", workers=0))
    return run


@pytest.fixture
def photos(tmp_path: Path) -> list[ImageFile]:
    return write_photos(tmp_path / "photos", 5)


def test_there_is_a_picture_after_every_tenth_of_the_run(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    run = trained(photos, TINY, tmp_path / "run")
    steps = 24  # 5 images in batches of 4 are 2 steps, 12 times
    assert shown(run) == {f"step-{math.ceil(n * steps / 10)}.jpg" for n in range(1, 11)}


def test_a_method_without_steps_shows_its_result(photos: list[ImageFile], tmp_path: Path) -> None:
    experiment = completed(TINY.model_copy(update={"method": "kmeans"}))
    assert shown(trained(photos, experiment, tmp_path / "run")) == {"step-0.jpg"}


def test_a_picture_has_the_colour_of_the_most_probable_cluster(
    photos: list[ImageFile], tmp_path: Path
) -> None:
    network = build_network(TINY)

    def always_second(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1, 0])[None, :, None, None].expand(len(images), 3, 5, 5)

    network.forward = always_second  # type: ignore[method-assign]
    run = Run(tmp_path)
    Overlays(run, photos, TINY, 1).after(1, network)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "step-1.jpg")).astype(float)
    with Image.open(photos[0].path) as image:
        first = np.asarray(image.convert("RGB")).astype(float)
    blended = (first + palette(3)[1]) / 2
    height, width = first.shape[:2]
    assert np.abs(sheet[:height, :width] - blended).mean() < 6  # JPEG
    assert sheet.shape == (2 * height + 6, 2 * width + 6, 3)


def test_images_that_cannot_be_read_are_left_out(photos: list[ImageFile], tmp_path: Path) -> None:
    network: Network = build_network(TINY)
    for file in photos[:3]:
        file.path.write_bytes(b"no image")
    Overlays(Run(tmp_path), photos[:4], TINY, 1).after(1, network)
    with (
        Image.open(tmp_path / "samples" / "step-1.jpg") as sheet,
        Image.open(photos[3].path) as one,
    ):
        assert sheet.size == one.size
