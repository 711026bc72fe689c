"""A model that is made and run in milliseconds."""

from __future__ import annotations

import torch

from iddc.backbones import untrained_backbone
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
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
