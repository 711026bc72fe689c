"""Choose the components of a backbone anew, by regions of photos, without a label or a step.

    python benchmarks/regional.py --photos CACHE --out DIR
    python benchmarks/regional.py --folder IMAGES --out DIR
    python benchmarks/backbones.py bundled DIR

CACHE is that of `pretrain_trials.py`; the images of a folder are taken evenly over it. The network
of --init stays as it is; what it is reduced by is what `iddc pretrain` ends with
(`iddc.backbones.regional`). The components at hand say what the regions are, so that a second time
gives other numbers than the first. The bundled backbone has been through it; its card says how to
make it again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from embedded import spaced
from iddc.backbones import load_backbone, regional, save_backbone
from iddc.images import find_images, open_image
from iddc.pretraining.cache import ImageCache

SMALLEST = 96
"""The shorter side that a photo of a cache must have, in pixels."""
LARGEST = 448
"""A larger image of a folder is reduced to this shorter side, the working size."""


def main() -> None:
    """Draw photos, measure, and write the weights folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--photos", type=Path, help="the cache of decoded photos")
    source.add_argument("--folder", type=Path, help="images of one's own, instead of a cache")
    parser.add_argument("--init", default="bundled", help="a backbone with components")
    parser.add_argument("--source", type=int, default=5, help="of a cache: whose photos; -1: all")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    images = [*(of_folder(args) if args.folder else of_cache(args))]
    rows = (image.permute(2, 0, 1)[None] for image in images)
    backbone = regional(load_backbone(args.init), rows)
    save_backbone(backbone.half(), args.out)
    record = {"init": args.init, "images": len(images)}
    record |= {"folder": str(args.folder)} if args.folder else {"source": args.source}
    (args.out / "regional.json").write_text(json.dumps(record, indent=2) + "\n")


def of_cache(args: argparse.Namespace) -> Iterator[UInt8[Tensor, "H W 3"]]:
    """Some photos of a cache, drawn."""
    photos = ImageCache(args.photos)
    chosen = (photos.sources == args.source) | (args.source < 0)
    ids = np.flatnonzero(chosen & (photos.sizes.min(1) >= SMALLEST))
    ids = np.random.default_rng(0).choice(ids, min(args.images, len(ids)), replace=False)
    yield from (photos[int(index)] for index in ids)


def of_folder(args: argparse.Namespace) -> Iterator[UInt8[Tensor, "H W 3"]]:
    """Some images of a folder."""
    files = find_images(args.folder).files
    for index in spaced(len(files), args.images):
        yield torch.from_numpy(np.array(open_image(files[index], LARGEST)))


if __name__ == "__main__":
    main()
