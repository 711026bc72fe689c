"""Make docs/figures/methods.png: what each method makes of one CamVid frame.

The maps are those of the first seed of benchmarks/methods.py, in the colours of matched classes:

    python benchmarks/methods.py --cache DIR --out FILE --sets camvid --seeds 1 --maps MAPS
    python docs/figures/methods.py MAPS/camvid CAMVID
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iddc.datasets import open_dataset
from iddc.masks.colours import palette
from iddc.methods import METHODS, find_method

COLUMNS, WIDTH, BAND = 6, 170, 22


def main() -> None:
    """Draw the frame, the truth and each map below its name; without one, say why there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maps", type=Path)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    dataset = open_dataset("folder", args.data, "val")
    frame = dataset[len(dataset) // 2]
    size = (WIDTH, WIDTH * frame.image.height // frame.image.width)
    # Clusters without a class and pixels without a label are white.
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(dataset.class_names)] = palette(len(dataset.class_names))
    panels = {"image": frame.image, "truth": Image.fromarray(colours[frame.label])}
    for name in METHODS:
        if (args.maps / f"{name}.npy").exists():
            classes = np.load(args.maps / f"{name}.npy")
            panels[name] = Image.fromarray(colours[classes.astype(np.uint8)])
        else:
            reason = "needs a ViT" if find_method(name).needs_class_token else "not run"
            panels[f"{name}: {reason}"] = Image.new("RGB", size, "white")

    rows = -(-len(panels) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, rows * (size[1] + BAND)), "white")
    font, draw = ImageFont.load_default(0.65 * BAND), ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(panels.items()):
        left, top = index % COLUMNS * WIDTH, index // COLUMNS * (size[1] + BAND)
        draw.text((left + 4, top), title, fill="black", font=font)
        way = Image.Resampling.LANCZOS if title == "image" else Image.Resampling.NEAREST
        sheet.paste(panel.convert("RGB").resize((size[0] - 2, size[1]), way), (left, top + BAND))
    sheet.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
