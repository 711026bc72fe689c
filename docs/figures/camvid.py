"""Make docs/figures/camvid.png: CamVid frames, their truth, and what some runs make of them.

Every run must have been scored with masks. Its column has the name of its method:

    iddc evaluate RUN --data CAMVID --split val --save-masks
    python docs/figures/camvid.py KMEANS_RUN CONSENSUS_RUN
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from iddc.figures import contact_sheet
from iddc.runs import Run

FRAMES = 4
COLUMN = 200


def main() -> None:
    """Put a few evenly spaced frames into one reduced picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = parser.parse_args().runs
    folders = [run / "evaluation" / "folder-val-full" for run in runs]
    names = sorted(path.name for path in folders[0].glob("*.png"))
    chosen = names[:: len(names) // FRAMES][:FRAMES]
    titles = ("image", "truth", *(Run.open(run).experiment.method for run in runs))
    sheet = contact_sheet(folders, titles, chosen)
    width = COLUMN * len(titles)
    sheet.resize((width, width * sheet.height // sheet.width), Image.Resampling.LANCZOS).save(
        Path(__file__).with_suffix(".png"), optimize=True
    )


if __name__ == "__main__":
    main()
