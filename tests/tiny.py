"""A model that is made and run in milliseconds, and photos for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iddc.backbones import Backbone, untrained_backbone
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.images import ImageFile, find_images
from iddc.network import Network
from iddc.segmenter import Segmenter


def tiny_segmenter(num_clusters: int) -> Segmenter:
    """A ViT of one block with random weights, always the same; it sees images at 32 pixels."""
    torch.manual_seed(0)
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = untrained_backbone("vit_tiny_patch16_224", options=options)
    experiment = Experiment(
        num_clusters=num_clusters,
        views=ViewsConfig(short_side=32),
        prediction=PredictionConfig(window=0, flip=False),
        training=TrainingConfig(precision="fp32"),
    )
    return Segmenter.of(Network(backbone, "linear", num_clusters), experiment)


def with_random_tensors(backbone: Backbone) -> Backbone:
    """The same, in evaluation, with a random change of every tensor, by torch's generator."""
    backbone.eval()
    with torch.no_grad():
        for value in backbone.net.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.2)
    return backbone


def some_images(*size: int, batch: int = 2, seed: int = 1) -> Tensor:
    """Noise in [0, 1]."""
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def photo(seed: int, size: tuple[int, int] = (90, 80)) -> Image.Image:
    """Twenty random colours that run into each other, at some width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def write_photos(folder: Path, count: int, size: tuple[int, int] = (90, 80)) -> list[ImageFile]:
    """Photos 0, 1, ... as 00.png, 01.png, ... in a new folder."""
    folder.mkdir()
    for index in range(count):
        photo(index, size).save(folder / f"{index:02}.png")
    return list(find_images(folder).files)


def scoring_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images a backbone gets in each call from now on, but for those of trainings."""
    calls: list[int] = []
    embed = Backbone.forward

    def counted(self: Backbone, images: Any) -> Any:
        if torch.is_inference_mode_enabled():
            calls.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Backbone, "forward", counted)
    return calls
