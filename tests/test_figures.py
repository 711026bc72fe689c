"""Pictures of several methods side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iddc.config import Experiment, PredictionConfig
from iddc.datasets import FolderDataset
from iddc.evaluation import GREY, EvalProtocol
from iddc.figures import compare, contact_sheet
from iddc.masks import palette
from iddc.segmenter import Segmenter

AS_IS = EvalProtocol(PredictionConfig(window=0, flip=False))


class Brightness:
    """Cluster by brightness; `flipped` numbers them the other way, `extra` have no pixel."""

    def __init__(self, num_clusters: int, *, flipped: bool = False) -> None:
        self.num_clusters = num_clusters
        self.flipped = flipped

    def probs(self, images: Tensor) -> Tensor:
        ids = images[:, 0].long() * (self.num_clusters - 1) // 255
        ids = self.num_clusters - 1 - ids if self.flipped else ids
        return torch.nn.functional.one_hot(ids, self.num_clusters).permute(0, 3, 1, 2).float()


def some_data(folder: Path) -> FolderDataset:
    """Two images of different sizes: black on the left is class 0, white on the right class 1."""
    for kind in ("images", "labels"):
        (folder / "val" / kind).mkdir(parents=True)
    for name, width, height in (("a", 40, 20), ("b", 80, 60)):
        pixels = np.zeros((height, width), np.uint8)
        pixels[:, width // 2 :] = 255
        pixels[: height // 2, : width // 4] = 128  # labelled black, seen grey
        Image.fromarray(pixels).convert("RGB").save(folder / "val" / "images" / f"{name}.png")
        Image.fromarray((pixels == 255).astype(np.uint8)).save(
            folder / "val" / "labels" / f"{name}.png"
        )
    return FolderDataset(folder, "val")


def test_each_method_has_a_column_in_the_colours_of_its_matched_classes(tmp_path: Path) -> None:
    segmenters = {
        "two": Segmenter.of(Brightness(2), Experiment()),
        "turned": Segmenter.of(Brightness(2, flipped=True), Experiment()),
        "three": Segmenter.of(Brightness(3), Experiment()),
    }
    sheet = np.asarray(compare(segmenters, some_data(tmp_path), AS_IS, shown=[1, 0]))
    # Five columns of 80 pixels; the smaller image is brought to the width of the first.
    assert sheet.shape == (20 + 60 + 40, 5 * 80, 3)
    assert sheet[:20].min() < 9  # the titles
    black, white = (tuple(colour) for colour in palette(2).tolist())
    for row in (slice(20, 80), slice(80, 120)):
        image, truth, two, turned, three = np.split(sheet[row], 5, axis=1)
        assert set(image[:, :, 0].ravel().tolist()) == {0, 128, 255}
        assert {tuple(c) for c in truth.reshape(-1, 3).tolist()} == {black, white}
        assert np.array_equal(two, truth)
        assert np.array_equal(turned, truth)
        assert tuple(three[0, 0]) == GREY  # the third cluster is no class
        assert np.array_equal(three[:, 40:], truth[:, 40:])


def test_a_sheet_shows_the_pictures_asked_for_in_their_order(tmp_path: Path) -> None:
    for folder, value in (("one", 50), ("other", 90)):
        (tmp_path / folder).mkdir()
        for name in ("a", "b", "c"):
            panels = np.full((4, 9, 3), value + ord(name) - ord("a"), np.uint8)
            Image.fromarray(panels).save(tmp_path / folder / f"{name}.png")
    folders = [tmp_path / "one", tmp_path / "other"]
    sheet = np.asarray(contact_sheet(folders, ("i", "t", "1", "2"), ["c.png", "a.png"]))
    assert sheet.shape == (20 + 4 + 4, 12, 3)
    assert sheet[20, :, 0].tolist() == [52] * 9 + [92] * 3
    assert sheet[24, :, 0].tolist() == [50] * 9 + [90] * 3
