"""A table in a minute: fake copies of its data set, an untrained network of one small block.

It shows that the machinery works from the first image to the last file. Its scores mean nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from iddc.backbones import save_backbone, untrained_backbone
from iddc.config import DatasetName, Experiment, PredictionConfig
from iddc.datasets.fake import write_fake
from iddc.reproduce.plan import Settings

LABEL = "SMOKE: drawn scenes, not a result"
SEEDS = 2
SIDE = 64
"""The side of a crop, in pixels."""
CLUSTERS = 64
"""The most clusters: the drawn scenes have 160 patches, which k-means can group."""
SHORT = {
    **{"steps": 2, "batch_size": 4, "clusterings": 1, "rounds": 2},
    **{"dim": 8, "pool": 32, "concepts": 64, "blocks": 1, "hidden": 16, "fine_clusters": 30},
    "window_size": 32,
}
"""What is small in the numbers of baselines, where they have these names."""


def prepare(settings: Settings, dataset: DatasetName, out: Path) -> Settings:
    """Draw the data, make the backbone, and shrink every experiment."""
    data, backbone = out / "data" / dataset, (out / "backbone").resolve()
    write_fake(dataset, data)
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        save_backbone(untrained_backbone("vit_tiny_patch16_224", options=options), backbone)

    def shrink(experiment: Experiment) -> Experiment:
        changes = {"short_side": SIDE, "crop_size": SIDE}
        return experiment.model_copy(
            update={
                "backbone": str(backbone),
                "epochs": 2,
                "num_clusters": min(experiment.num_clusters, CLUSTERS),
                "views": experiment.views.model_copy(update=changes),
                "training": experiment.training.model_copy(update={"batch_size": 4}),
                "prediction": PredictionConfig(window=SIDE, overlap=SIDE // 4),
            }
        )

    return replace(settings, data=data, last=shrink, options=SHORT)
