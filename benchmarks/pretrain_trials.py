"""Short pretrainings that start from given weights, to compare recipes by `backbones.py`.

    python benchmarks/pretrain_trials.py --photos CACHE --objective swav --minutes 10 --out DIR
    python benchmarks/backbones.py bundled DIR

A trial is resumable: give the same command again. Its budget is processor time, so a busy machine
makes it longer and not worse. DIR becomes a weights folder; trial.json says what was done and how
long it took. No label is read. Objectives, all at points that both crops of a photo show:

    swav      each view predicts the prototypes of the other (SwAV, dense), balanced by Sinkhorn
    regions   the same for the means of regions of like colour
    contrast  region means against those of other photos (DetCon)
    points    points against those of other photos, as `iddc pretrain` does
    whole     whole crops against those of other photos (NT-Xent)

With --context the larger crop of a photo teaches the smaller one, by the moving average of the
weights. Photos are decoded once, by the function of `iddc pretrain`, so that their shorter side is
at most --short-side. From given weights batch norms keep their statistics; the channels that a
backbone is reduced to learn too.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize

from iddc.backbones import (
    Backbone,
    load_backbone,
    reduced_backbone,
    save_backbone,
    untrained_backbone,
)
from iddc.device import autocast
from iddc.images import find_images
from iddc.pretraining.cache import ImageCache, fill_cache
from iddc.pretraining.contrast import ema_update
from iddc.pretraining.losses import nt_xent, point_nce, sinkhorn
from iddc.pretraining.views import (
    Crops,
    cut,
    draw_colours,
    draw_pairs,
    draw_points,
)
from iddc.regions import grid_regions, patch_colours

CPU = torch.device("cpu")
CELLS = 16
"""The shorter side of the grid on which a photo is divided into regions."""
SMALLEST = 3
"""Points of a region that both views show, at least, for its mean to count."""
WIDTH = 96
"""The width of a projection (contrast, points, whole)."""


@dataclass(frozen=True)
class Choices:
    """All that makes a trial."""

    objective: str = "swav"
    """One of the list above."""
    init: str = "bundled"
    """As for `iddc pretrain --init`; untrained:NAME begins with random weights."""
    batch: int = 48
    """Photos in a batch, of which each gives two crops."""
    crop: int = 64
    """The side of a crop, in pixels."""
    context: int = 0
    """The side of the larger crop of each photo, which then teaches the smaller one by the moving
    average of the weights, as in DINO; 0: both crops are alike and learn from each other."""
    smallest: int = 28
    """The shortest side that a crop is cut from, in pixels of the photo."""
    grid: int = 5
    """Each pair of crops shares this number of points, squared."""
    prototypes: int = 256
    """Prototypes of swav and regions."""
    queue: int = 0
    """Rows of past batches: further negatives of contrast, and what balances prototypes."""
    rate: float = 5e-4
    """The highest learning rate (AdamW); it falls to 0 in the second half."""
    decay: float = 0.01
    """Weight decay of matrices and kernels."""
    temperature: float = 0.1
    """What cosines to prototypes are divided by; the targets' is half of it."""
    jitter: float = 0.5
    """The strength of changes of colour."""
    gray: float = 0.05
    """The chance of a crop without colour."""
    textures: float = 0.0
    """The share of drawn textures in a batch."""
    large: float = 0.5
    """The share of photos with a shorter side of at least 96 pixels, before textures."""
    seed: int = 0
    """Everything random follows from it."""


# Photos -------------------------------------------------------------------------------------------


def decoded(cache: Path, sources: list[Path], short_side: int) -> ImageCache:
    """The photos of a cache, or of sources that are decoded into it."""
    if (cache / "index.npz").exists():
        return ImageCache(cache)
    files = [find_images(source).files for source in sources]
    return fill_cache(
        files, cache, "trials", short_side=short_side, min_side=28, threads=1, check=lambda: None
    )


def texture(rng: np.random.Generator, side: int = 96) -> UInt8[Tensor, "H W 3"]:
    """Cells of a plane, each a grey or coloured noise of its own scale: a drawn micrograph."""
    seeds = rng.random((rng.integers(3, 30), 2)) * side
    ys, xs = np.mgrid[:side, :side]
    nearest = ((ys[..., None] - seeds[:, 0]) ** 2 + (xs[..., None] - seeds[:, 1]) ** 2).argmin(-1)
    kinds = rng.integers(0, 4, len(seeds))[nearest]
    image = np.zeros((side, side, 3))
    colour = rng.random() < 0.5
    for kind in range(4):
        cells = int(np.exp(rng.uniform(np.log(6), np.log(side))))
        noise = torch.from_numpy(rng.standard_normal((1, 1, cells, cells)))
        grain = functional.interpolate(noise, (side, side), mode="bicubic")[0, 0].numpy()
        mean = rng.random(3) if colour else np.full(3, rng.random())
        layer = mean + rng.uniform(0.02, 0.15) * grain[..., None]
        image = np.where((kinds == kind)[..., None], layer, image)
    image += rng.uniform(0, 0.04) * rng.standard_normal((side, side, 1))
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8))


Batch = tuple[list[Crops], Tensor, Tensor]
"""Crops of both views, or of each; the points "b 2 p 2" that both show; their regions "b p"."""


class Pool:
    """Photos and drawn textures, with their regions."""

    def __init__(self, photos: ImageCache, choices: Choices) -> None:
        self.photos = photos
        self.choices = choices
        self.large = np.flatnonzero(photos.sizes.min(1) >= 96)
        self.small = np.flatnonzero(photos.sizes.min(1) < 96)

    def batch(self, step: int) -> Batch:
        """Two crops of each photo, points that both show, and the region of each point."""
        choices = self.choices
        rng = np.random.default_rng((choices.seed, step))
        large = round(choices.large * choices.batch)
        ids = [*rng.choice(self.large, large, replace=False)]
        ids += [*rng.choice(self.small, choices.batch - large, replace=False)]
        images = [self.photos[int(index)] for index in ids]
        for row in range(round(choices.textures * choices.batch)):
            images[row] = texture(rng)
        sizes = np.array([image.shape[:2] for image in images], np.float64)
        boxes = draw_pairs(rng, sizes, choices.smallest, 0.4)
        views = [(slice(2), choices.crop)]
        if choices.context:  # the larger box first
            smaller = boxes[:, 0, 2:].prod(1) < boxes[:, 1, 2:].prod(1)
            boxes[smaller] = boxes[smaller, ::-1]
            views = [(slice(1), choices.context), (slice(1, 2), choices.crop)]
        flips = rng.random((len(images), 2)) < 0.5
        matrix, offset = draw_colours(rng, flips.shape, choices.jitter, choices.gray)
        points = draw_points(rng, boxes, flips, choices.grid)
        rows = range(len(images))
        crops = [
            Crops(cut(images, rows, boxes[:, v], flips[:, v], side), matrix[:, v], offset[:, v])
            for v, side in views
        ]
        found = torch.zeros(points.shape[0], points.shape[2], dtype=torch.long)
        if choices.objective in ("regions", "contrast"):
            for row, image in enumerate(images):
                found[row] = regions_at(image, points[row, 0], boxes[row, 0], flips[row, 0])
        return crops, points, found


def regions_at(
    image: UInt8[Tensor, "H W 3"],
    points: Float[Tensor, "p 2"],
    box: Float[np.ndarray, "4"],
    flip: bool,
) -> Int64[Tensor, " p"]:
    """The region of like colour that each point of a crop lies in, numbered within the photo."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    grid = round(CELLS * height / shorter), round(CELLS * width / shorter)
    colours = patch_colours(image.permute(2, 0, 1), grid) / 100
    across = (colours[:, :, 1:] - colours[:, :, :-1]).norm(dim=0)
    down = (colours[:, 1:] - colours[:, :-1]).norm(dim=0)
    ids = grid_regions(across, down)
    x = (points[:, 0] * (-1 if flip else 1) + 1) / 2 * box[2] + box[0]
    y = (points[:, 1] + 1) / 2 * box[3] + box[1]
    rows = (y / height * grid[0]).long().clamp(0, grid[0] - 1)
    columns = (x / width * grid[1]).long().clamp(0, grid[1] - 1)
    return ids[rows, columns]


# Learning -----------------------------------------------------------------------------------------


class Trial(nn.Module):
    """The network that learns, its moving average, and what only training needs."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        torch.manual_seed(choices.seed)
        self.choices = choices
        self.scratch = choices.init.startswith("untrained:")
        if self.scratch:
            self.online = untrained_backbone(choices.init.partition(":")[2])
            self.online.net.train()
        else:
            self.online = load_backbone(choices.init).float()
        self.online.to(memory_format=torch.channels_last).requires_grad_(True)
        self.average = deepcopy(self.online).requires_grad_(False)
        width = self.online.embed_dim
        self.prototypes = nn.Parameter(normalize(torch.randn(choices.prototypes, width), dim=1))
        self.project = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, WIDTH))
        self.past = torch.zeros(0, WIDTH if choices.objective == "contrast" else width)

    def maps(self, network: Backbone, crops: Crops) -> Float[Tensor, "_ d h w"]:
        """The embeddings of all crops."""
        pixels = crops.recoloured(CPU).contiguous(memory_format=torch.channels_last)
        with autocast(CPU, "auto"):
            found: Tensor = network(pixels)
        return found.float()

    def loss(self, crops: list[Crops], points: Tensor, regions: Tensor) -> Float[Tensor, ""]:
        """The objective of a batch."""
        choices, images = self.choices, len(points)
        if choices.objective == "whole":
            maps = self.maps(self.online, crops[0])
            return nt_xent(self.project(maps.mean((2, 3))).view(images, 2, -1), 0.2)
        rows, owners = self.rows(crops, points, regions)
        if choices.objective == "points":
            return point_nce(self.project(rows).unflatten(1, (images, -1)).transpose(0, 1), 0.2)
        if choices.objective == "contrast":
            rows = normalize(self.project(rows), dim=-1)
            loss = region_nce(rows, owners, 0.2, self.past)
        else:
            loss = self.swapped(rows)
        self.remember(rows)
        return loss

    def rows(
        self, crops: list[Crops], points: Tensor, regions: Tensor
    ) -> tuple[Float[Tensor, "2 n d"], Int64[Tensor, " n"]]:
        """Both views of points, or of regions, and the photo of each."""
        images, count = len(points), points.shape[2]
        # The average, which has no gradients, sees the larger crops where there are some.
        networks = [self.average, self.online][-len(crops) :]
        parts = []
        for network, views, where in zip(networks, crops, points.chunk(len(crops), 1), strict=True):
            maps = self.maps(network, views)
            grid = where.flatten(0, 1)[:, :, None]
            seen = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
            parts.append(seen.flatten(2).transpose(1, 2).reshape(images, -1, count, maps.shape[1]))
        rows = torch.cat(parts, 1)
        if self.choices.objective in ("regions", "contrast"):
            return region_rows(rows, regions)
        return rows.transpose(0, 1).flatten(1, 2), torch.arange(images).repeat_interleave(count)

    def swapped(self, rows: Float[Tensor, "2 n d"]) -> Float[Tensor, ""]:
        """Predict the prototypes of each row from the other view (SwAV, Eq. 2)."""
        temperature = self.choices.temperature
        prototypes = normalize(self.prototypes, dim=1)
        scores = normalize(rows, dim=-1) @ prototypes.T
        with torch.no_grad():
            past = normalize(self.past, dim=1) @ prototypes.T
            every = [torch.cat([view, past]) / (temperature / 2) for view in scores]
            targets = torch.stack([sinkhorn(rows)[: scores.shape[1]] for rows in every])
        predicted = functional.log_softmax(scores / temperature, dim=-1)
        terms = -(targets.flip(0) * predicted).sum(-1)
        return terms[1:].mean() if self.choices.context else terms.mean()

    def remember(self, rows: Float[Tensor, "2 n d"]) -> None:
        """Put rows into the queue, and drop the oldest."""
        new = rows.detach().transpose(0, 1).flatten(0, 1)
        self.past = torch.cat([new, self.past])[: self.choices.queue]


def region_rows(
    rows: Float[Tensor, "b 2 p d"], regions: Int64[Tensor, "b p"]
) -> tuple[Float[Tensor, "2 n d"], Int64[Tensor, " n"]]:
    """The mean of each region that both views show, and the photo that it is of."""
    images = len(regions)
    most = int(regions.max()) + 1
    keys = (regions + most * torch.arange(images)[:, None]).flatten()
    found, ids, sizes = torch.unique(keys, return_inverse=True, return_counts=True)
    flat = rows.transpose(0, 1).flatten(1, 2)
    sums = flat.new_zeros(2, len(found), flat.shape[-1]).index_add(1, ids, flat)
    kept = sizes >= SMALLEST
    owner = found // most
    return (sums / sizes[:, None])[:, kept], owner[kept]


def region_nce(
    rows: Float[Tensor, "2 n d"],
    owners: Int64[Tensor, " n"],
    temperature: float,
    past: Float[Tensor, "q d"],
) -> Float[Tensor, ""]:
    """Tell a region in the other view from regions of other photos, both ways.

    Args:
        rows: Both views of each region, of length 1.
        owners: The photo of each region. Regions of one photo are no negatives.
        temperature: What cosines are divided by.
        past: Regions of photos of other batches: negatives.
    """
    same = owners[:, None] == owners
    same.fill_diagonal_(False)
    truth = torch.arange(len(owners))
    terms = []
    for one, other in (rows, rows.flip(0)):
        logits = (one @ other.T / temperature).masked_fill(same, float("-inf"))
        logits = torch.cat([logits, one @ past.T / temperature], 1)
        terms.append(functional.cross_entropy(logits, truth))
    return torch.stack(terms).mean()


def cpu_seconds() -> float:
    """The processor time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run a trial, or go on with it, and write its weights folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="zips or folders to decode once")
    parser.add_argument("--photos", type=Path, required=True, help="the cache of decoded photos")
    parser.add_argument("--short-side", type=int, default=144, help="of decoded photos, in pixels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10, help="of processor time")
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    for name, value in asdict(Choices()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = vars(parser.parse_args())
    choices = Choices(**{name: args[name] for name in asdict(Choices())})
    if choices.context and choices.objective == "whole":
        parser.error("--context: whole crops learn from each other, so they are alike")
    pool = Pool(decoded(args["photos"], args["sources"], args["short_side"]), choices)
    trial = Trial(choices)
    run(trial, pool, args["out"], 60 * args["minutes"], args["steps"])


def run(trial: Trial, pool: Pool, out: Path, seconds: float, steps: int, every: float = 60) -> None:
    """Learn until the budget is spent, or for some steps.

    Args:
        trial: What learns; it is changed.
        pool: Its photos.
        out: The weights folder, which also keeps the state of a trial that was stopped.
        seconds: The budget of processor time.
        steps: Instead of the budget.
        every: The processor time after which the state is written again.
    """
    out.mkdir(parents=True, exist_ok=True)
    choices, state = trial.choices, out / "state.pt"
    matrices = [p for p in trial.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in trial.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": choices.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    step, spent, losses = 0, 0.0, []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["choices"] != asdict(choices):
            raise SystemExit(f"error: {out} holds a trial of other choices: {saved['choices']}")
        trial.load_state_dict(saved["trial"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, losses = saved["step"], saved["spent"], saved["losses"]
        trial.past = saved["past"]
    elif choices.objective in ("swav", "regions") and not trial.scratch:
        start_prototypes(trial, pool)
    begun, saved_at = cpu_seconds() - spent, spent
    while True:
        spent = cpu_seconds() - begun
        progress = step / steps if steps else spent / seconds
        if progress >= 1:
            break
        rate = choices.rate * min(1, (step + 1) / 20, 2 * (1 - progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = trial.loss(*pool.batch(step))
        if not math.isfinite(float(loss.detach())):
            raise SystemExit(f"error: the loss of step {step} is not finite")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([*matrices, *others], 5.0)
        optimizer.step()
        ema_update(trial.average, trial.online, min(0.99, (1 + step) / (10 + step)))
        losses.append(float(loss.detach()))
        step += 1
        if cpu_seconds() - begun - saved_at >= every:
            saved_at = spent = cpu_seconds() - begun
            record: dict[str, Any] = {
                "choices": asdict(choices),
                "trial": trial.state_dict(),
                "optimizer": optimizer.state_dict(),
                "past": trial.past.clone(),
                "step": step,
                "spent": spent,
                "losses": losses,
            }
            torch.save(record, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
            print(f"step {step}, {spent:.0f} CPU s, loss {np.mean(losses[-20:]):.3f}", flush=True)
    save_backbone(finished(trial, pool).half(), out)
    summary = {**asdict(choices), "steps": step, "cpu_seconds": spent, "loss": losses[-50:]}
    (out / "trial.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{step} steps in {spent:.0f} CPU s, loss {np.mean(losses[-20:]):.3f}: {out}")


@torch.no_grad()
def start_prototypes(trial: Trial, pool: Pool) -> None:
    """Put the prototypes where k-means finds groups in the first embeddings."""
    from iddc.clustering import spherical_kmeans

    rows = []
    for step in range(24 if trial.choices.objective == "regions" else 6):
        found, _ = trial.rows(*pool.batch(2**20 + step))
        trial.remember(found)
        rows.append(normalize(found.flatten(0, 1), dim=1))
    groups = spherical_kmeans(torch.cat(rows), trial.choices.prototypes, seed=trial.choices.seed)
    trial.prototypes.copy_(groups.centroids)


@torch.no_grad()
def finished(trial: Trial, pool: Pool) -> Backbone:
    """The average; from random weights with statistics and components of fresh crops."""
    average = trial.average
    if not trial.scratch:
        return average.eval()
    norms = [m for m in average.net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    average.net.train()
    for step in range(24):
        average(pool.batch(2**21 + step)[0][-1].recoloured(CPU))
    average.eval()
    rng = np.random.default_rng((trial.choices.seed, 2**22))
    ids = rng.choice(pool.large, min(300, len(pool.large)), replace=False)
    images = (pool.photos[int(index)].permute(2, 0, 1)[None] for index in ids)
    return reduced_backbone(average, 128, images)


if __name__ == "__main__":
    main()
