"""STEGO's numbers for the data sets it was published on."""

from __future__ import annotations

from iddc.config import StegoConfig

COCO_STUFF = StegoConfig(self_shift=0.08, knn_shift=0.02, random_shift=0.66)
"""COCO-Stuff-27 with ViT-S: from the authors' code, as the paper's own are for ViT-B."""
CITYSCAPES = StegoConfig(
    self_weight=1.0,
    knn_weight=0.58,
    random_weight=0.91,
    self_shift=0.46,
    knn_shift=0.18,
    random_shift=0.31,
    spatial_centering="none",
    steps=7000,
)
"""The paper's for Cityscapes, ViT-B/8; without its Eq. (3), as the authors' settings and the
reproduction of Koenig et al. (*Uncovering the inner workings of STEGO*, 2023) have it."""
_BY_RECIPE = {"cocostuff": COCO_STUFF, "cityscapes": CITYSCAPES, "ablation": CITYSCAPES}
"""The numbers by how the name of a recipe begins; all ablations are on Cityscapes."""


def stego_config(recipe: str) -> StegoConfig:
    """STEGO's numbers for the data set of a recipe; the defaults for one's own images."""
    found = (config for start, config in _BY_RECIPE.items() if recipe.startswith(start))
    return next(found, StegoConfig())
