"""Fewer channels for a network with stages: those in which regions of an image differ.

The stages of a ResNet-18 have 896 channels together, most of which tell photos, lights or single
patches apart. Fisher's criterion, with the regions of an image for classes, keeps the others. It
reads no label, and the result is one 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from iddc.backbones.architecture import Backbone
from iddc.progress import SILENT, Progress
from iddc.regions import both_regions, patch_colours

_SIDE = 224
"""Images of a smaller shorter side are enlarged to it, so that things are several patches wide."""
_SMALLER = 2 / 3
"""The size of an image's second look, as a part of its own."""


@dataclass(frozen=True)
class Spread:
    """How embeddings of patches differ, as covariances."""

    mean: Float64[Tensor, " c"]
    """The mean of the images' means."""
    images: Float64[Tensor, "c c"]
    """How the means of images spread about the mean."""
    regions: Float64[Tensor, "c c"]
    """How the means of regions spread about their image's; a region counts as its patches do."""
    inside: Float64[Tensor, "c c"]
    """How patches spread about their region's mean."""
    looks: Float64[Tensor, "c c"]
    """How two looks at one patch spread about their mean, times 2."""


def reduced_backbone(
    backbone: Backbone, components: int, images: Iterable[Tensor], progress: Progress = SILENT
) -> Backbone:
    """Reduce the embeddings of a network with stages to what tells regions of an image apart.

    Regions need embeddings that are fit for them: those of `within_images`.

    Args:
        backbone: The backbone. The result shares its network.
        components: How many to keep; where there are not so many channels, all.
        images: Whole images, one at a time, as the backbone takes them; at least two.
        progress: Shows how far the work is.
    """
    kept = [*images]
    first = within_images(backbone, components, progress.each(kept, "components 1/2", "image"))
    return regional(first, progress.each(kept, "components 2/2", "image"))


def regional(backbone: Backbone, images: Iterable[Tensor]) -> Backbone:
    """Choose the components of a backbone anew: `projection`.

    Args:
        backbone: A backbone with components, which say what the regions are. The result shares
            its network, and has as many components.
        images: Whole images, one at a time, as the backbone takes them; at least two.
    """
    spread = spread_of(backbone, images)
    if spread.regions.trace() <= 1e-6 * (spread.regions + spread.inside).trace():
        return backbone  # each image is one region
    rows = projection(spread, backbone.embed_dim)
    return _mapped(backbone, rows, -rows @ spread.mean)


@torch.no_grad()
def within_images(backbone: Backbone, components: int, images: Iterable[Tensor]) -> Backbone:
    """Reduce the embeddings of a network with stages to what varies most within images.

    Directions are first divided by how much the means of images spread along them (within-class
    covariance normalisation, Hatch et al., 2006, with an image as the nuisance); of the result,
    the principal components within images are kept.
    """
    width = backbone.embed_dim
    means, within = [], torch.zeros(width, width).double()
    for image in images:
        rows = backbone(image)[0].flatten(1).T.double().cpu()
        means.append(rows.mean(0))
        within += torch.cov(rows.T, correction=0)
    within /= len(means)
    between = torch.cov(torch.stack(means).T, correction=0)
    _, rows = _eigenvectors(within, between, components)
    rows /= ((rows @ (within + between) @ rows.T).trace() / len(rows)).sqrt()
    return _mapped(backbone, rows, -rows @ torch.stack(means).mean(0))


@torch.no_grad()
def _mapped(
    backbone: Backbone, weight: Float64[Tensor, "k c"], bias: Float64[Tensor, " k"]
) -> Backbone:
    """The same network, whose stages are reduced by this map."""
    update = {"components": len(weight), "embed_dim": len(weight)}
    result = Backbone(backbone.architecture.model_copy(update=update), backbone.net)
    reduce: Any = result.reduce
    reduce.weight.copy_(weight[:, :, None, None])
    reduce.bias.copy_(bias)
    return result.to(backbone.mean.device).train(backbone.training)


def _eigenvectors(
    wanted: Float64[Tensor, "c c"], nuisance: Float64[Tensor, "c c"], components: int
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "k c"]]:
    """The largest generalised eigenvalues, and their vectors, one a row.

    Few images span few directions of the nuisance: its average is added to all of them.
    """
    width = len(nuisance)
    nuisance = nuisance + (nuisance.trace() / width + 1e-12) * torch.eye(width)
    sizes, axes = torch.linalg.eigh(nuisance)
    whitened = axes @ (sizes**-0.5 * axes).T
    values, directions = torch.linalg.eigh(whitened @ wanted @ whitened)
    return values[-components:].flip(0), directions[:, -components:].flip(1).T @ whitened


def projection(spread: Spread, components: int) -> Float64[Tensor, "k c"]:
    """The directions in which regions differ most, compared with what is no matter of kinds.

    That is: what tells whole images apart, such as the light of a photo; how patches of a region
    differ; how one patch looks under another light, mirrored and smaller. A channel is the
    direction over the deviation of all this along it (Fisher's criterion), times the root of the
    regions' share of the variance there: where they have none, nothing is left. The strongest come
    first. Their squares are 1 on average over the patches of all images.
    """
    nuisance = spread.images + spread.inside + spread.looks
    ratios, rows = _eigenvectors(spread.regions, nuisance, components)
    rows *= (ratios / (1 + ratios)).clamp(min=0).sqrt()[:, None]
    every = spread.images + spread.regions + spread.inside
    return rows / ((rows @ every @ rows.T).trace() / len(rows)).sqrt()


@torch.no_grad()
def spread_of(backbone: Backbone, images: Iterable[Tensor]) -> Spread:
    """How all channels of a backbone's stages spread, with regions by its components and colour."""
    channels = _channels(backbone)
    stages = Backbone(
        backbone.architecture.model_copy(update={"components": 0, "embed_dim": channels}),
        backbone.net,
    )
    stages.to(backbone.mean.device).train(backbone.training)
    generator = torch.Generator().manual_seed(0)
    means = []
    within, regions, looks = (torch.zeros(channels, channels).double() for _ in range(3))
    for image in images:
        pixels = _enlarged(image if image.is_floating_point() else image.float() / 255)
        found = stages(pixels)
        maps = found[0].cpu()
        rows = maps.flatten(1).T
        means.append(rows.double().mean(0))
        centred = rows - rows.mean(0)
        within += centred.T @ centred / len(rows)

        # A region counts as often as it has patches.
        colours = patch_colours((pixels[0].cpu() * 255).round().byte(), maps.shape[1:])
        ids = both_regions(backbone.reduce(found)[0].cpu(), colours)[0].flatten()
        sizes = torch.bincount(ids)
        sums = torch.zeros(len(sizes), channels).index_add(0, ids, centred)
        regions += (sums / sizes[:, None]).T @ sums / len(rows)

        other = stages(_second_look(pixels, generator)).flip(-1).cpu()
        other = functional.interpolate(other, maps.shape[1:], mode="bilinear")[0]
        change = rows - other.flatten(1).T
        looks += change.T @ change / (2 * len(rows))
    mean = torch.stack(means).mean(0)
    between = torch.stack(means) - mean
    within, regions, looks = (every / len(means) for every in (within, regions, looks))
    return Spread(mean, between.T @ between / len(means), regions, within - regions, looks)


def _channels(backbone: Backbone) -> int:
    """The channels of all stages, which `reduce` takes."""
    reduce: Any = backbone.reduce
    return int(reduce.in_channels)


def _enlarged(pixels: Float[Tensor, "1 3 H W"]) -> Float[Tensor, "1 3 h w"]:
    """An image of a shorter side of at least 224 pixels."""
    sides = pixels.shape[-2:]
    if min(sides) >= _SIDE:
        return pixels
    size = [round(side * _SIDE / min(sides)) for side in sides]
    return functional.interpolate(pixels, size, mode="bilinear").clamp(0, 1)


def _second_look(
    pixels: Float[Tensor, "1 3 H W"], generator: torch.Generator
) -> Float[Tensor, "1 3 h w"]:
    """The mirror image, smaller, in another light, contrast and tint."""
    small = functional.interpolate(
        pixels.flip(-1), scale_factor=_SMALLER, mode="bilinear", antialias=True
    )
    light, contrast = (0.6 + 0.8 * torch.rand(2, generator=generator)).tolist()
    tint = 0.9 + 0.2 * torch.rand(1, 3, 1, 1, generator=generator)
    changed = (small - small.mean()) * contrast + small.mean()
    seen: Tensor = (changed * light * tint.to(small.device)).clamp(0, 1)
    return seen
