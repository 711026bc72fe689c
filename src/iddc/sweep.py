"""Clusters for several K at once: embed some images, then find clusters of every K in seconds.

The clusters are those of the method `consensus` before a head learns them: embeddings are averaged
over regions of their image, over-clustered, and merged. The over-clusterings do not depend on K, so
that each further K costs a merge of some hundred centroids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize

from iddc import __version__
from iddc.backbones import Backbone, load_backbone
from iddc.config import ConsensusConfig, Experiment, Runtime
from iddc.consensus import Consensus, fit_each
from iddc.device import pick_device
from iddc.errors import DataError
from iddc.images import ImageFile
from iddc.metrics import UNMATCHED, Confusion
from iddc.progress import SILENT, Progress
from iddc.regions import both_regions, follows_regions, patch_colours, pooled, region_means
from iddc.runs import disk_errors, write_atomic
from iddc.samples import Sampler

EMBEDDINGS = "embeddings.safetensors"
"""The file in DIR that keeps what was embedded, for further values of K."""
IMAGES, SEEDS = 64, 3
"""How many images are looked at, and how many seeds are compared."""
LIVE = 0.1
"""A cluster is in use if it has this part of an even share of the patches."""
_SIDE = 480
"""The longer side of an image as it is shown, in pixels."""


@dataclass(frozen=True)
class Level:
    """What was found with one K."""

    num_clusters: int
    """K."""
    clusters: tuple[Integer[np.ndarray, "_ _"], ...]
    """The cluster of each patch of each image, of the first seed."""
    live: int
    """Clusters in use."""
    largest: float
    """The share of the largest cluster."""
    agreement: float
    """The share of patches on which two seeds agree, clusters matched; the mean over all pairs."""
    follows: float
    """How well clusters follow regions of like colour (`regions.follows_regions`)."""


@dataclass(frozen=True)
class Sweep:
    """What was found with every K, from the smallest on."""

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]
    levels: tuple[Level, ...]
    backbone: str

    @property
    def suggested(self) -> int:
        """The K that the images suggest, see `suggest`."""
        return suggest([(level.num_clusters, level.agreement) for level in self.levels])

    def flow(self, index: int) -> Int64[np.ndarray, "k1 k2"]:
        """How many patches each cluster of a level gives to each cluster of the next one."""
        one, other = self.levels[index : index + 2]
        ids = np.concatenate([map_.ravel() for map_ in one.clusters])
        next_ids = np.concatenate([map_.ravel() for map_ in other.clusters])
        k = other.num_clusters
        counts = np.bincount(ids * k + next_ids, minlength=one.num_clusters * k)
        return counts.astype(np.int64).reshape(one.num_clusters, k)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for the record."""
        return {
            "backbone": self.backbone,
            "images": list(self.names),
            "suggested": self.suggested,
            "levels": [
                {
                    "num_clusters": level.num_clusters,
                    "live": level.live,
                    "largest": level.largest,
                    "agreement": level.agreement,
                    "follows": level.follows,
                }
                for level in self.levels
            ],
        }


def suggest(agreements: Sequence[tuple[int, float]]) -> int:
    """The K whose seeds agree best, and of equals the smallest one.

    docs/without-labels.md says how far that is from the number of classes on labelled sets.

    Args:
        agreements: K, and the agreement of its seeds.
    """
    return min(agreements, key=lambda level: (-level[1], level[0]))[0]


def sweep(
    files: Sequence[ImageFile],
    experiment: Experiment,
    clusters: Sequence[int],
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    images: int = IMAGES,
    seeds: int = SEEDS,
    keep: Path | None = None,
    progress: Progress = SILENT,
) -> Sweep:
    """Find clusters for every K on some of the images.

    Args:
        files: The images.
        experiment: Of it count backbone, seed, working size, precision, reading, and the numbers of
            the method `consensus`.
        clusters: The values of K.
        runtime: How this machine works.
        images: The most images that are looked at, evenly spread.
        seeds: How many seeds are compared at each K.
        keep: A folder that keeps the embeddings, and gives them back when it is given again.
        progress: Shows how far the work is.

    Raises:
        DataError: No image can be read, or it has fewer distinct groups than the largest K.
        SetupError: The folder cannot be written.
    """
    pictures = _embedded(files, experiment, runtime, images, keep, progress)
    directions = [normalize(normalize(one.maps.float(), dim=1).mean(0), dim=0) for one in pictures]
    mean = torch.stack([each.mean((1, 2)) for each in directions]).mean(0)

    # Each patch has the mean of its region, as the method `consensus` has it.
    pools, areas, shapes, count = [], [], [], 0
    with progress.job(len(pictures)):
        for done, (one, each) in enumerate(zip(pictures, directions, strict=True), start=1):
            divisions = both_regions(
                each, patch_colours(one.pixels, (each.shape[1], each.shape[2]))
            )
            centred = normalize(each - mean[:, None, None], dim=0)
            view = normalize(region_means(centred, divisions), dim=0)
            pools.append(pooled(view, divisions, torch.arange(view[0].numel()), count))
            count += len(pools[-1].vectors)
            shapes.append(view.shape[1:])
            areas.append(divisions[1].numpy())
            progress.update(done, "regions", f"image {done} of {len(pictures)}")
    rows = torch.cat([pool.vectors for pool in pools])
    owners = torch.cat([pool.owners for pool in pools])

    # Every seed begins from regions of its own, and is asked for every K.
    merging = ConsensusConfig()
    if experiment.method == "consensus":
        merging = ConsensusConfig(**experiment.options)
    weights = torch.cat([pool.sizes for pool in pools]).float() ** merging.size_power
    wanted = sorted({*clusters})
    found: dict[int, list[np.ndarray]] = {k: [] for k in wanted}
    with progress.job(seeds):
        for number in range(seeds):
            each_k = _fitted(rows, weights, wanted, merging, experiment.seed + number, progress)
            for k, consensus in each_k.items():
                found[k].append(consensus.probs(rows).argmax(1)[owners].numpy())
            progress.update(number + 1, "clusters", f"seed {number + 1} of {seeds}")
    sizes = [len(pool.owners) for pool in pools]
    levels = [_level(k, found[k], sizes, shapes, areas) for k in wanted]
    return Sweep(
        tuple(_shown(one.pixels) for one in pictures),
        tuple(one.name for one in pictures),
        tuple(levels),
        experiment.backbone,
    )


def _fitted(
    rows: Float[Tensor, "n d"],
    weights: Float[Tensor, " n"],
    wanted: list[int],
    merging: ConsensusConfig,
    seed: int,
    progress: Progress,
) -> dict[int, Consensus]:
    """The clusters of every K; a K for which there are too few groups is taken off the list."""
    while True:
        try:
            return fit_each(rows, wanted, merging, weights=weights, seed=seed)
        except DataError as error:
            if len(wanted) == 1:
                raise
            progress.note(f"{wanted.pop()} clusters are left out. {error}")


@dataclass(frozen=True)
class _Picture:
    name: str
    maps: Float[Tensor, "2 d h w"]
    pixels: UInt8[Tensor, "3 H W"]


def _embedded(
    files: Sequence[ImageFile],
    experiment: Experiment,
    runtime: Runtime,
    images: int,
    keep: Path | None,
    progress: Progress,
) -> list[_Picture]:
    """The pictures, embedded now or kept from an earlier sweep of the same images."""
    # Kept embeddings count only for the same images, unchanged, seen by the same backbone.
    count = min(images, len(files))
    chosen = [i * len(files) // count for i in range(count)]
    device = pick_device(runtime.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)
        backbone = load_backbone(experiment.backbone).eval()
    path = keep / EMBEDDINGS if keep else None
    key = _key([files[i] for i in chosen], backbone, experiment) if path else ""
    if path and key and (known := _kept(path, key)):
        progress.note(f"embeddings of an earlier sweep: {path}")
        return known
    sampler = Sampler(files, backbone.to(device), experiment, runtime, progress=progress)
    pictures = [
        _Picture(str(files[index].name), maps.half().cpu(), pixels.cpu())
        for index, maps, pixels in sampler.pictures(chosen)
    ]
    if not pictures:
        raise DataError("None of the images can be read, so there is nothing to find clusters in.")
    # A file that is there is whole: it gets its name last.
    if path and key:
        tensors = {}
        for number, one in enumerate(pictures):
            tensors[f"{number}.maps"] = one.maps.contiguous()
            tensors[f"{number}.pixels"] = one.pixels.contiguous()
        names = json.dumps([one.name for one in pictures])
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, {"key": key, "names": names}))
    return pictures


def _key(files: Sequence[ImageFile], backbone: Backbone, experiment: Experiment) -> str:
    """A digest of all that embeddings follow from; empty where nobody can tell."""
    stamps = []
    for file in files:
        try:
            status = file.path.stat()
        except OSError:  # it is at an address, or gone
            return ""
        stamps.append((str(file), status.st_size, status.st_mtime_ns))
    shown = [experiment.views.short_side, experiment.reading.model_dump(mode="json")]
    described = backbone.architecture.model_dump(mode="json")
    told = [__version__, experiment.training.precision, shown, described, stamps]
    key = hashlib.sha256(json.dumps(told).encode())
    for name, tensor in backbone.state_dict().items():
        key.update(name.encode())
        key.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return key.hexdigest()


def _kept(path: Path, key: str) -> list[_Picture]:
    """What a file keeps, if it is of this key; nothing if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return []
            return [
                _Picture(name, file.get_tensor(f"{i}.maps"), file.get_tensor(f"{i}.pixels"))
                for i, name in enumerate(json.loads(about["names"]))
            ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return []


def _level(
    k: int,
    found: Sequence[np.ndarray],
    sizes: Sequence[int],
    shapes: Sequence[torch.Size],
    areas: Sequence[np.ndarray],
) -> Level:
    first = found[0]
    counts = np.bincount(first, minlength=k)
    parts = np.split(first, np.cumsum(sizes)[:-1])
    maps = tuple(part.reshape(tuple(shape)) for part, shape in zip(parts, shapes, strict=True))
    agreements = [
        Confusion.count(other, one, k, k, ignore=UNMATCHED).scores().accuracy
        for one, other in combinations(found, 2)
    ]
    return Level(
        k,
        maps,
        int((counts * k >= LIVE * counts.sum()).sum()),
        float(counts.max() / counts.sum()),
        fmean(agreements) if agreements else 1.0,
        follows_regions(maps, areas, k),
    )


def _shown(pixels: UInt8[Tensor, "3 H W"]) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((_SIDE, _SIDE))
    return image
