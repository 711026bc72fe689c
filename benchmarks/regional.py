"""Choose the components of a backbone anew, by regions of photos, without a label or a step.

    python benchmarks/regional.py --photos CACHE --out DIR
    python benchmarks/backbones.py bundled DIR

CACHE is that of `pretrain_trials.py`. The network of --init stays as it is; what it is reduced by
is what `iddc pretrain` ends with (`iddc.backbones.regional`). The components at hand say what the
regions are, so that a second time gives other numbers than the first. The bundled backbone has
been through it; its card says how to make it again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from iddc.backbones import load_backbone, regional, save_backbone
from iddc.pretraining.cache import ImageCache

SMALLEST = 96
"""The shorter side that a photo must have, in pixels."""


def main() -> None:
    """Draw photos, measure, and write the weights folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="the cache of decoded photos")
    parser.add_argument("--init", default="bundled", help="a backbone with components")
    parser.add_argument("--source", type=int, default=5, help="whose photos, from 0; -1: all")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    photos = ImageCache(args.photos)
    chosen = (photos.sources == args.source) | (args.source < 0)
    ids = np.flatnonzero(chosen & (photos.sizes.min(1) >= SMALLEST))
    ids = np.random.default_rng(0).choice(ids, min(args.images, len(ids)), replace=False)
    images = (photos[int(index)].permute(2, 0, 1)[None] for index in ids)
    save_backbone(regional(load_backbone(args.init), images).half(), args.out)
    record = {"init": args.init, "source": args.source, "images": len(ids)}
    (args.out / "regional.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
