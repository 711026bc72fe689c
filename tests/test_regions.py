"""Regions on the grid of patches, against drawn pictures and the algorithm as its paper has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import Int64
from torch import Tensor

from iddc.regions import both_regions, grid_regions, patch_colours, pooled, region_means

Edge = tuple[float, tuple[int, int], tuple[int, int]]


def spanning(edges: list[Edge]) -> list[Edge]:
    """The edges of the minimum spanning tree, the lightest first: Kruskal's algorithm."""
    tree, joined = [], {end: {end} for _, *ends in edges for end in ends}
    for weight, tail, head in sorted(edges):
        if joined[tail] is not joined[head]:
            tree.append((weight, tail, head))
            both = joined[tail] | joined[head]
            for patch in both:
                joined[patch] = both
    return tree


def by_sets(across: Tensor, down: Tensor, scale: float, smallest: int) -> Int64[np.ndarray, "h w"]:
    """Felzenszwalb and Huttenlocher on that tree, with sets in place of a forest."""
    height, width = across.shape[0], down.shape[1]
    edges = [
        (float(across[y, x]), (y, x), (y, x + 1)) for y in range(height) for x in range(width - 1)
    ]
    edges += [
        (float(down[y, x]), (y, x), (y + 1, x)) for y in range(height - 1) for x in range(width)
    ]
    edges = spanning(edges)
    region = {(y, x): frozenset([(y, x)]) for y in range(height) for x in range(width)}
    inner = dict.fromkeys(region.values(), 0.0)

    def merge(one: frozenset, other: frozenset, weight: float) -> None:
        union = one | other
        inner[union] = weight
        for patch in union:
            region[patch] = union

    for weight, tail, head in edges:
        one, other = region[tail], region[head]
        tolerated = min(inner[side] + scale / len(side) for side in (one, other))
        if one != other and weight <= tolerated:
            merge(one, other, weight)
    for weight, tail, head in edges:
        one, other = region[tail], region[head]
        if one != other and min(len(one), len(other)) < smallest:
            merge(one, other, weight)
    numbers = {patches: number for number, patches in enumerate(dict.fromkeys(region.values()))}
    return np.array([[numbers[region[y, x]] for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_those_of_the_paper_on_the_spanning_tree(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    across = torch.rand(9, 11, generator=generator)
    down = torch.rand(8, 12, generator=generator)
    found = grid_regions(across, down, scale=0.8, smallest=4).numpy()
    expected = by_sets(across, down, 0.8, 4)
    assert 1 < expected.max() + 1 < 60
    # The same division, whatever the numbers.
    pairs = set(zip(found.flat, expected.flat, strict=True))
    assert len(pairs) == len(set(found.flat)) == len(set(expected.flat))


def test_two_colours_are_two_regions_and_a_speck_joins_what_surrounds_it() -> None:
    colours = torch.zeros(3, 8, 10)
    colours[0, :, 5:] = 90
    colours[0, 2, 2] = 60
    features = torch.ones(4, 8, 10)
    for regions in both_regions(features, colours):
        assert regions.unique().tolist() == [0, 1]
        assert (regions[:, :5] == regions[0, 0]).all()
        assert (regions[:, 5:] == regions[0, 9]).all()


def test_embeddings_part_what_has_one_colour() -> None:
    features = torch.zeros(2, 6, 8)
    features[0, :, :4] = 1
    features[1, :, 4:] = 1
    mixed, colour = both_regions(features, torch.zeros(3, 6, 8))
    assert (len(mixed.unique()), len(colour.unique())) == (2, 1)


def test_means_are_taken_over_each_division_and_averaged() -> None:
    maps = torch.tensor([[[0.0, 2.0, 10.0]]])
    one, other = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]])
    # (1, 1, 10) and (0, 6, 6).
    assert region_means(maps, (one, other)).flatten().tolist() == [0.5, 3.5, 8.0]


def test_patches_that_share_their_regions_are_one_vector() -> None:
    maps = torch.tensor([[[5.0, 5.0, 7.0], [5.0, 9.0, 9.0]]])
    one = torch.tensor([[0, 0, 0], [0, 1, 1]])
    other = torch.tensor([[3, 3, 8], [3, 8, 8]])
    found = pooled(maps, (one, other), torch.tensor([5, 0, 2]), start=10)
    vectors = dict(zip(found.vectors.flatten().tolist(), found.sizes.tolist(), strict=True))
    assert vectors == {5: 3, 7: 1, 9: 2}
    assert found.vectors[found.owners - 10].flatten().tolist() == [9, 5, 7]


def test_without_regions_each_drawn_patch_is_a_vector() -> None:
    maps = torch.tensor([[[5.0, 5.0, 7.0]]])
    found = pooled(maps, (), torch.tensor([1, 0]), start=4)
    assert (found.vectors.flatten().tolist(), found.sizes.tolist()) == ([5, 5], [1, 1])
    assert found.owners.tolist() == [4, 5]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_grids_of_one_row_column_or_patch_are_divided_too(size: tuple[int, int]) -> None:
    regions = both_regions(torch.ones(3, *size), torch.zeros(3, *size))
    assert all(ids.shape == size and not ids.any() for ids in regions)


def test_colours_are_those_of_the_standard() -> None:
    # White, red and blue of sRGB, D65: values of every table of CIELAB. Of dark grey 8 both curves
    # are straight, so that L is 903.3 * 8 / 255 / 12.92.
    pixels = torch.tensor([[255] * 3, [0] * 3, [255, 0, 0], [0, 0, 255], [8] * 3]).byte()
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    expected.append([2.19, 0, 0])
    found = patch_colours(pixels.T[:, None].repeat_interleave(8, 2), (1, 5))
    assert found[:, 0].T.numpy() == pytest.approx(np.array(expected), abs=0.05)
