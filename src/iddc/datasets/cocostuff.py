"""COCO-Stuff (Caesar et al., 2018) with 27 and with 171 classes.

The labels are the PNGs of `stuffthingmaps`: ids 0 to 181 in the order of `FINE`, 255 unlabelled.
COCO-Stuff-27 merges them, on the image lists of IIC and PiCIE, which are part of this package.
"""

from __future__ import annotations

import lzma
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from iddc.datasets.published import Files, Published
from iddc.metrics import IGNORE

FINE = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird",
    "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "hat",
    "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window", "desk",
    "toilet", "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "blender", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "hair brush", "banner", "blanket", "branch", "bridge",
    "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other",
    "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel",
    "ground-other", "hill", "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss",
    "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree",
    "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
"""The name of each id."""
ABSENT = frozenset({11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90})
"""Ids that no image has. COCO-Stuff-171 is without them."""
COARSE = {
    "electronic": "71-76",
    "appliance": "77-82",
    "food": "51-60",
    "furniture": "61-70",
    "indoor": "83-90",
    "kitchen": "43-50",
    "accessory": "25-32",
    "animal": "15-24",
    "outdoor": "9-14",
    "person": "0",
    "sports": "33-42",
    "vehicle": "1-8",
    "ceiling": "101-102",
    "floor": "100 113-117",
    "food-stuff": "120-121 152 169",
    "furniture-stuff": "97 106-107 109 111 122 129 132 155 160 164",
    "rawmaterial": "99 131 138 142",
    "textile": "91-92 103-104 108 130 136 140 151 166-167",
    "wall": "170-176",
    "window": "179-180",
    "building": "94-95 127 150 157 165",
    "ground": "110 124-125 135 139 143-144 146 148 153 158",
    "plant": "93 96 118 123 128 133 141 162 168",
    "sky": "105 156",
    "solid": "126 134 149 159 161 181",
    "structural": "98 112 137 145 163",
    "water": "119 147 154 177-178",
}
"""The 27 classes, and the ids that each merges."""


def read_list(_root: Path, split: str) -> list[str]:
    """The images of COCO-Stuff-27: 49,629 for train, 2,175 for val."""
    packed = files("iddc.datasets").joinpath(f"cocostuff27_{split}.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("ascii").split()


def _ids(spans: str) -> list[int]:
    ends = [span.split("-") for span in spans.split()]
    return [index for end in ends for index in range(int(end[0]), int(end[-1]) + 1)]


_PRESENT = [index for index in range(len(FINE)) if index not in ABSENT]

COCOSTUFF171 = Published(
    name="cocostuff171",
    title="COCO-Stuff-171",
    class_names=tuple(FINE[index] for index in _PRESENT),
    classes={index: number for number, index in enumerate(_PRESENT)} | {IGNORE: IGNORE},
    # The paper counts 117,266 for train: 1,021 of train2017 have no annotated object. Which they
    # are stands in the labels, which training does not read.
    counts={"train": 118_287, "val": 5_000},
    images=Files(
        ("images/{split}2017", "{split}2017", "{split}2017.zip!{split}2017"),
        ".jpg",
    ),
    labels=Files(
        (
            "annotations/{split}2017",
            "stuffthingmaps/{split}2017",
            "stuffthingmaps_trainval2017/{split}2017",
            "stuffthingmaps_trainval2017.zip!{split}2017",
        ),
        ".png",
    ),
)
COCOSTUFF27 = replace(
    COCOSTUFF171,
    name="cocostuff27",
    title="COCO-Stuff-27",
    class_names=tuple(COARSE),
    classes={index: number for number, name in enumerate(COARSE) for index in _ids(COARSE[name])}
    | {IGNORE: IGNORE},
    counts={"train": 49_629, "val": 2_175},
    stems=read_list,
)
