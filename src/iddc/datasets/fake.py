"""Tiny fake copies of the data sets with their true names: for tests and for trying a table.

The images are drawn street scenes (`synthetic.py`); scores on them mean nothing. `FAKE.txt` marks
a copy, so that no one takes it for the data set, and so that its few images are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iddc.config import DatasetName
from iddc.datasets import cocostuff, potsdam
from iddc.datasets.published import FAKE
from iddc.datasets.synthetic import draw_scene, write_scenes
from iddc.metrics import IGNORE

Pixels = UInt8[np.ndarray, "H W 3"]
Ids = UInt8[np.ndarray, "H W"]


@dataclass(frozen=True)
class _Fake:
    ids: tuple[int, int, int, int, int, int]
    """What the labels call the synthetic sky, building, road, pavement, tree and car."""
    ignored: int
    """What they call pixels that are not scored, the two lowest rows of each scene."""
    size: tuple[int, int]
    write: Callable[[Path, str, int, Pixels, Ids], None]
    """Write number i of a split below a root."""


def write_fake(name: DatasetName, root: Path, count: int = 4, seed: int = 0) -> None:
    """Write `count` images and labels for each split of a data set, as its download has them.

    COCO-Stuff-27 and COCO-Stuff-171 are one download, of which the latter reads one image more. A
    `folder` gets four times as many to train on.

    Args:
        name: The data set.
        root: Where to write; made if it is not there.
        count: At least 2.
        seed: Everything random follows from it.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / FAKE).write_text(f"A fake copy of the data set {name}: drawn scenes.\n")
    if name == "folder":
        write_scenes(root, 5 * count, seed)
        return
    fake = _FAKES[name]
    for number, split in enumerate(("train", "val")):
        for index in range(count):
            image, label = draw_scene(np.random.default_rng((seed, number, index)), fake.size)
            ids = np.array(fake.ids, np.uint8)[label]
            ids[-2:] = fake.ignored
            fake.write(root, split, index, image, ids)


def _write_cityscapes(root: Path, split: str, index: int, image: Pixels, ids: Ids) -> None:
    city = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}[split][index % 2]
    stem = f"{split}/{city}/{city}_{index:06}_000019"
    _save(root / f"leftImg8bit/{stem}_leftImg8bit.png", image)
    _save(root / f"gtFine/{stem}_gtFine_labelIds.png", ids)


def _write_cocostuff(root: Path, split: str, index: int, image: Pixels, ids: Ids) -> None:
    listed = cocostuff.read_list(root, split)
    unlisted = f"{int(listed[0]) + 1:012}"  # COCO-Stuff-171 has it, COCO-Stuff-27 does not
    for stem in (listed[index], *([unlisted] if index == 0 else [])):
        _save(root / f"images/{split}2017/{stem}.jpg", image)
        _save(root / f"annotations/{split}2017/{stem}.png", ids)


def _write_potsdam(root: Path, split: str, index: int, image: Pixels, ids: Ids) -> None:
    from scipy.io import savemat  # type: ignore[attr-defined]  # no stubs

    stem = 2 * index + (split == "val")
    infrared = image[..., 1:2]
    for folder, variable, array in (
        ("imgs", "img", np.concatenate([image, infrared], axis=2)),
        ("gt", "gt", ids.astype(np.int32)),
    ):
        (root / folder).mkdir(exist_ok=True)
        savemat(root / folder / f"{stem}.mat", {variable: array})
    with (root / potsdam.LISTS[split]).open("w" if index == 0 else "a") as file:
        file.write(f"{stem}\n")


def _save(path: Path, pixels: Pixels | Ids) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


_COCO = _Fake((156, 95, 148, 139, 168, 2), IGNORE, (160, 120), _write_cocostuff)
_FAKES: dict[DatasetName, _Fake] = {
    "cityscapes": _Fake((23, 11, 7, 8, 21, 26), 1, (192, 96), _write_cityscapes),
    "cocostuff27": _COCO,
    "cocostuff171": _COCO,
    "potsdam3": _Fake((5, 1, 0, 0, 3, 4), IGNORE, (200, 200), _write_potsdam),
}
