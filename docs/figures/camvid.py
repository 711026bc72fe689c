"""Make docs/figures/camvid.png: CamVid frames, their truth, k-means and IDDC side by side.

Both runs must have been scored with masks:

    iddc evaluate RUN --data CAMVID --split val --save-masks
    python docs/figures/camvid.py KMEANS_RUN IDDC_RUN
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from iddc.figures import contact_sheet

FRAMES = 4
WIDTH = 720


def main() -> None:
    """Put a few evenly spaced frames into one reduced picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs=2)
    folders = [run / "evaluation" / "folder-val-full" for run in parser.parse_args().runs]
    names = sorted(path.name for path in folders[0].glob("*.png"))
    chosen = names[:: len(names) // FRAMES][:FRAMES]
    sheet = contact_sheet(folders, ("image", "truth", "k-means", "IDDC"), chosen)
    sheet.resize((WIDTH, WIDTH * sheet.height // sheet.width), Image.Resampling.LANCZOS).save(
        Path(__file__).with_suffix(".png"), optimize=True
    )


if __name__ == "__main__":
    main()
