"""The components of a network with stages, against slow twins and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor
from torch.nn import functional

from iddc.backbones import Backbone, reduced_backbone, regional, untrained_backbone
from iddc.backbones.components import (
    Spread,
    _second_look,
    projection,
    spread_of,
    within_images,
)
from iddc.regions import both_regions, patch_colours
from tiny import some_images, with_random_tensors


def network() -> Backbone:
    """A small network with stages, whose every tensor is random."""
    torch.manual_seed(0)
    return with_random_tensors(untrained_backbone("test_resnet"))


def halves(seed: int) -> Tensor:
    """Two parts of other brightness and grain."""
    image = 0.4 * some_images(224, 240, batch=1, seed=seed)
    image[..., 100:] = 1 - image[..., 100:] / 2
    return image


def covariances(maps: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Within images and between them, as sums over patches and images."""
    rows = [each[0].flatten(1).T.double().numpy() for each in maps]
    means = np.stack([each.mean(0) for each in rows])
    within = sum(np.einsum("ni,nj->ij", d, d) / len(d) for d in (r - r.mean(0) for r in rows))
    deviations = means - means.mean(0)
    return within / len(rows), np.einsum("ni,nj->ij", deviations, deviations) / len(rows)


def test_the_first_components_solve_the_eigenproblem_of_within_against_between() -> None:
    whole = network()
    images = [some_images(64, 96, batch=1, seed=seed) for seed in range(5)]
    backbone = within_images(whole, 6, images)
    assert (backbone.embed_dim, backbone.architecture.components) == (6, 6)
    with torch.no_grad():
        raw, found = ([net(image) for image in images] for net in (whole, backbone))
    within, between = covariances(raw)
    floor = np.trace(between) / len(between) * np.eye(len(between))
    values = eigh(within, between + floor, eigvals_only=True)[::-1][:6]
    kept_within, kept_between = covariances(found)
    # In the components the nuisance is at most 1 along each, and variance within is the eigenvalue.
    scale = values.sum() / np.trace(kept_within)
    np.testing.assert_allclose(kept_within * scale, np.diag(values), atol=2e-3 * values[0])
    assert np.linalg.eigvalsh(kept_between * scale).max() <= 1 + 1e-3
    flat = torch.cat([each.flatten(2)[0] for each in found], dim=1)
    assert flat.mean(1).abs().max() < 1e-3
    assert flat.square().mean() == pytest.approx(1, abs=1e-3)


def test_the_spread_is_that_of_images_regions_and_patches_one_by_one() -> None:
    whole = network()
    images = [halves(seed) for seed in range(3)]
    first = within_images(whole, 6, images)
    found = spread_of(first, images)
    means, within, regions = [], [], []
    for image in images:
        with torch.no_grad():
            maps, small = whole(image)[0].double(), first(image)[0]
        ids = both_regions(small, patch_colours((image[0] * 255).round().byte(), maps.shape[1:]))[0]
        assert len(ids.unique()) > 1
        mean = maps.flatten(1).mean(1)
        means.append(mean.numpy())
        for row in range(maps.shape[1]):
            for column in range(maps.shape[2]):
                same = ids == ids[row, column]
                about = maps[:, same].mean(1) - mean
                regions.append(torch.outer(about, about).numpy())
                off = maps[:, row, column] - mean
                within.append(torch.outer(off, off).numpy())
    np.testing.assert_allclose(found.mean, np.mean(means, 0), atol=1e-4)
    np.testing.assert_allclose(found.images, np.cov(np.stack(means).T, bias=True), atol=1e-3)
    np.testing.assert_allclose(found.regions, np.mean(regions, 0), atol=1e-3)
    np.testing.assert_allclose(found.inside, np.mean(within, 0) - np.mean(regions, 0), atol=1e-3)


def test_two_looks_differ_by_light_and_size_at_the_same_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a change of light or size, the mirrored look of a symmetric image is the same."""
    from iddc.backbones import components

    first = within_images(network(), 4, [halves(0), halves(1)])
    half = halves(2)[..., :128]
    image = torch.cat([half, half.flip(-1)], -1)
    assert float(spread_of(first, [image] * 2).looks.trace()) > 0
    monkeypatch.setattr(components, "_second_look", lambda pixels, generator: pixels.flip(-1))
    mirrored = spread_of(first, [image] * 2).looks
    with torch.no_grad():
        maps = first.net.forward_intermediates(  # a slow twin of the look at the mirror image
            (image - first.mean) / first.std, indices=[2, 3, 4], intermediates_only=True
        )
    change = []
    for features in maps:
        rows = functional.normalize(features, dim=1) * math.sqrt(features.shape[1])
        rows = functional.interpolate(rows, (28, 32), mode="bilinear")
        change.append(rows - rows.flip(-1))
    rows = torch.cat(change, 1)[0].flatten(1).T.double()
    np.testing.assert_allclose(mirrored, rows.T @ rows / (2 * len(rows)), atol=1e-3)


def test_a_second_look_has_another_light_and_a_tint_of_a_tenth() -> None:
    grey = torch.full((1, 3, 8, 8), 0.5)
    looks = [_second_look(grey, torch.Generator().manual_seed(seed)) for seed in range(200)]
    colours = torch.stack([seen.mean((0, 2, 3)) for seen in looks])
    tints = colours.amax(1) / colours.amin(1)
    assert 1.15 < float(tints.max()) < 1.1 / 0.9 + 1e-4
    light = colours.mean(1) / 0.5
    assert 0.6 * 0.9 <= float(light.min()) < 0.7
    assert 1.3 < float(light.max()) <= 1.4 * 1.1


def drawn(width: int) -> Spread:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, width, width, generator=generator).double()
    return Spread(torch.zeros(width).double(), *(root @ root.T for root in roots))


def test_components_solve_the_eigenproblem_of_regions_against_the_nuisance() -> None:
    spread = drawn(6)
    nuisance = (spread.images + spread.inside + spread.looks).numpy()
    nuisance = nuisance + np.trace(nuisance) / 6 * np.eye(6)
    ratios, vectors = (each[..., ::-1][..., :4] for each in eigh(spread.regions.numpy(), nuisance))
    expected = np.sqrt(ratios / (1 + ratios))[:, None] * vectors.T
    found = projection(spread, 4).numpy()
    scale = np.linalg.norm(found) / np.linalg.norm(expected)
    signs = np.sign((found * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(found, signs * expected * scale, atol=1e-9)
    every = (spread.images + spread.regions + spread.inside).numpy()
    assert np.trace(found @ every @ found.T) == pytest.approx(4)


def test_more_components_than_channels_are_all() -> None:
    whole = network()
    backbone = reduced_backbone(whole, 9999, [some_images(64, 96, batch=1)] * 2)
    assert backbone.embed_dim == whole.embed_dim


def share(backbone: Backbone, images: list[Tensor]) -> float:
    """The part of the variance that lies between images."""
    with torch.no_grad():
        within, between = covariances([backbone(image) for image in images])
    return float(np.trace(between) / np.trace(within + between))


def test_what_tells_images_apart_counts_less_in_components() -> None:
    """Each image has a colour of its own, and the same bright and dark parts."""
    whole = network()
    parts = torch.linspace(-0.2, 0.2, 224).expand(1, 3, 224, 224)
    images = [0.5 + 0.2 * (some_images(1, 1, batch=1, seed=s) - 0.5) + parts for s in range(8)]
    assert share(reduced_backbone(whole, 6, images), images) < 0.5 * share(whole, images)


def test_what_tells_regions_apart_counts_more_in_components() -> None:
    images = [halves(seed) for seed in range(4)]
    first = within_images(network(), 6, images)

    def between_parts(backbone: Backbone) -> float:
        shares = []
        for image in images:
            with torch.no_grad():
                maps = backbone(image)[0]
            left, right = maps[:, 2:-2, 2:10].flatten(1), maps[:, 2:-2, 15:-2].flatten(1)
            inside = left.var(1).sum() + right.var(1).sum()
            shares.append(float((left.mean(1) - right.mean(1)).square().sum() / inside))
        return float(np.mean(shares))

    assert between_parts(regional(first, images)) > between_parts(first)


def test_the_same_images_give_the_same_components() -> None:
    images = [halves(seed) for seed in range(2)]
    first = within_images(network(), 4, images)
    one, other = (regional(first, images).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_of_one_region_each_leave_the_components_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from iddc.backbones import components

    first = within_images(network(), 4, [halves(0), halves(1)])
    one = torch.zeros(28, 30, dtype=torch.long)
    monkeypatch.setattr(components, "both_regions", lambda maps, colours: (one, one))
    found = regional(first, [halves(0), halves(1)])
    assert torch.equal(found.reduce.weight, first.reduce.weight)
