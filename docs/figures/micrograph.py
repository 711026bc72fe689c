"""Draw micrographs of unequal phases, and find the phases: docs/figures/micrograph.png.

    python docs/figures/micrograph.py --work DIR

Each drawing has a matrix (about 80 %), dark pores, bright grains, and a little of a mineral that is
as bright as the matrix but rough. `iddc baseline grey`, `iddc baseline kmeans` and `iddc train`
learn from 24 drawings with K = 4; six others are scored. A table of the sizes is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from iddc.cli import main as iddc
from iddc.datasets import open_dataset
from iddc.evaluation import evaluate
from iddc.figures import contact_sheet
from iddc.metrics import UNMATCHED
from iddc.segmenter import Segmenter

CLASSES = ("matrix", "pore", "grain", "mineral")
SIDE, TRAIN, VAL, SHOWN = 256, 24, 6, 3
_BORDER = 48
RUNS = {"grey": "baseline grey", "kmeans": "baseline kmeans", "consensus": "train"}


def smooth(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Noise of deviation 1 whose spots are about `radius` pixels wide."""
    side = SIDE + 2 * _BORDER  # where a blur has nothing outside to look at
    noise = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
    field = np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)), dtype=float)
    inner = field[_BORDER:-_BORDER, _BORDER:-_BORDER]
    return (inner - field.mean()) / field.std()


def micrograph(seed: int) -> tuple[Image.Image, Image.Image]:
    """A drawing and its label."""
    rng = np.random.default_rng(seed)
    label = np.zeros((SIDE, SIDE), np.uint8)
    for phase, radius, level in ((1, 5, 1.35), (2, 9, 1.55), (3, 14, 1.8)):
        label[smooth(rng, radius) > level] = phase
    fine = rng.normal(0, 1, (SIDE, SIDE))
    rough = 26 * smooth(rng, 1.2)
    grey = np.array([128, 52, 196, 128])[label] + 6 * smooth(rng, 30) + 7 * fine
    grey[label == 3] += rough[label == 3]
    blurred = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(0.7)
    )
    return blurred, Image.fromarray(label)


def main() -> None:
    """Draw, learn, score, and put three drawings side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps drawings and runs")
    work = parser.parse_args().work
    for split, seeds in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + VAL))):
        for kind in ("images", "labels"):
            (work / split / kind).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            for kind, picture in zip(("images", "labels"), micrograph(seed), strict=True):
                picture.save(work / split / kind / f"{seed:02}.png")
    (work / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    dataset, folders = open_dataset("folder", work, "val"), []
    truth = np.bincount(
        np.concatenate([dataset[i].label.ravel() for i in range(len(dataset))]), minlength=4
    )
    print(f"| | accuracy / mIoU (%) | {' | '.join(CLASSES)} |\n|---|---|{'---|' * len(CLASSES)}")
    print(f"| truth | | {' | '.join(f'{100 * n / truth.sum():.0f} %' for n in truth)} |")
    for name, command in RUNS.items():
        run = work / name
        if not (run / "model.safetensors").exists():
            words = f"{command} {work / 'train' / 'images'} -k 4 --backbone bundled --out {run}"
            if name == "grey":
                words = words.replace(" --backbone bundled", "")
            if iddc(words.split()):
                raise SystemExit(f"iddc {words} failed")
        folders.append(work / "masks" / name)
        found = evaluate(Segmenter.load(run, "cpu"), dataset, save_masks=folders[-1])
        sizes = np.zeros(len(CLASSES))
        for count, phase in zip(found.confusion.counts.sum(1), found.scores.matching, strict=True):
            if phase != UNMATCHED:
                sizes[phase] += count
        cells = " | ".join(f"{100 * n / sizes.sum():.0f} %" for n in sizes)
        scores = f"{100 * found.scores.accuracy:.1f} / {100 * found.scores.miou:.1f}"
        print(f"| `{name}` | {scores} | {cells} |", flush=True)
    names = sorted(path.name for path in folders[0].glob("*.png"))[:SHOWN]
    sheet = contact_sheet(folders, ("image", "truth", *RUNS), names)
    width = 180 * (2 + len(RUNS))
    sheet.resize((width, width * sheet.height // sheet.width), Image.Resampling.LANCZOS).save(
        Path(__file__).with_suffix(".png"), optimize=True
    )


if __name__ == "__main__":
    main()
