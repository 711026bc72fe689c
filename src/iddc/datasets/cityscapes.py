"""Cityscapes with its 27 classes (Cordts et al., 2016): ids 7 to 33; those below are not scored."""

from __future__ import annotations

from iddc.datasets.published import Files, Published
from iddc.metrics import IGNORE

CLASSES = (
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail",
    "bridge", "tunnel", "pole", "polegroup", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "caravan", "trailer", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
FIRST = 7
"""The labelId of road."""

CITYSCAPES = Published(
    name="cityscapes",
    title="Cityscapes",
    class_names=CLASSES,
    classes=dict.fromkeys((*range(FIRST), IGNORE), IGNORE)
    | {FIRST + index: index for index in range(len(CLASSES))},
    counts={"train": 2975, "val": 500},  # the paper's 2,957 is a misprint
    images=Files(
        (
            "leftImg8bit/{split}",
            "leftImg8bit_trainvaltest/leftImg8bit/{split}",
            "leftImg8bit_trainvaltest.zip!leftImg8bit/{split}",
        ),
        "_leftImg8bit.png",
    ),
    labels=Files(
        (
            "gtFine/{split}",
            "gtFine_trainvaltest/gtFine/{split}",
            "gtFine_trainvaltest.zip!gtFine/{split}",
        ),
        "_gtFine_labelIds.png",
    ),
)
