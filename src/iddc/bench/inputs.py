"""What is measured on: drawn scenes, and the backbones with their recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from iddc.config import Experiment, RecipeName
from iddc.datasets.synthetic import write_scenes
from iddc.images import ImageFile, find_images
from iddc.recipes import RECIPES

SCENES = {"cpu": 10, "cuda": 160}
"""How many are drawn. A batch has most more than once; a fifth is segmented and scored."""
SIZE = (640, 480)
"""Width and height, as most photos of COCO have."""
THRESHOLD = 0.08
"""What `auto` finds for the bundled backbone on photos (decision 007)."""


@dataclass(frozen=True)
class Case:
    """A backbone, as one recipe trains on it."""

    name: str
    backbone: str
    recipe: RecipeName
    num_clusters: int = 27

    def experiment(self, batch_size: int) -> Experiment:
        """IDDC by the recipe's numbers: this backbone, K and batch, one head, fixed thresholds.

        Embeddings are compared, as in the paper: codes of a consensus would be fitted to photos.
        """
        start = RECIPES[self.recipe].experiment()
        objective = start.objective.model_copy(update={"affinity": "cosine"})
        if objective.positive_threshold == "auto":
            numbers = {"positive_threshold": THRESHOLD, "negative_threshold": THRESHOLD}
            objective = objective.model_copy(update=numbers)
        training = start.training.model_copy(update={"batch_size": batch_size, "heads": 1})
        changes: dict[str, object] = {
            "method": "iddc",  # whose step is measured; the recipe `folder` takes no step
            "backbone": self.backbone,
            "num_clusters": self.num_clusters,
        }
        return start.model_copy(update={**changes, "objective": objective, "training": training})


CASES = (
    Case("ViT-S/16", "untrained:vit_small_patch16_224", "cocostuff27-vits16"),
    Case("bundled", "bundled", "folder"),
)
"""The paper's smallest row, with random weights, which take as long as others; the default."""


@dataclass(frozen=True)
class Inputs:
    """The scenes on disk, and how they are used."""

    folder: Path
    """A data set `folder`, whose split val has labels."""
    files: tuple[ImageFile, ...]
    """A batch of images, drawn ones again and again."""
    device: torch.device

    @classmethod
    def draw(
        cls,
        folder: Path,
        device: torch.device,
        batch_size: int,
        *,
        count: int = 0,
        size: tuple[int, int] = SIZE,
    ) -> Inputs:
        """Draw `count` scenes into a folder, or `SCENES`."""
        count = count or SCENES.get(device.type, SCENES["cpu"])
        write_scenes(folder, count, seed=0, size=size)
        drawn = find_images(folder / "train").files
        return cls(folder, tuple(drawn[i % len(drawn)] for i in range(batch_size)), device)
