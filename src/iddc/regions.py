"""Regions of an image: patches that hang together by colour, or by colour and embedding.

Felzenszwalb and Huttenlocher, *Efficient graph-based image segmentation*, IJCV 2004, on the grid of
patches with four neighbours each. The mean embedding of a region is less noisy than those of its
patches and stops at the region's border, so clusters follow things instead of distances to a
horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer, UInt8
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

SCALE = 1.0
"""k of the paper: a region of n patches tolerates an edge k / n above its own largest one."""
SMALLEST = 6
"""Smaller regions join a neighbour, in patches."""
_LIGHTNESS = 100.0
"""The largest L of CIELAB: a step from black to white weighs as much as orthogonal embeddings."""
_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
"""CIE XYZ of the primaries of sRGB (IEC 61966-2-1), and of its white."""


def both_regions(
    features: Float[Tensor, "d h w"], colours: Float[Tensor, "3 h w"]
) -> tuple[Int64[Tensor, "h w"], Int64[Tensor, "h w"]]:
    """The regions by embedding and colour, and those by colour alone.

    Args:
        features: Embeddings of any length.
        colours: The CIELAB colour of each patch.
    """
    directions = normalize(features.float(), dim=0)
    colour = _colour_steps(colours)
    meaning = tuple(1 - (a * b).sum(0) for a, b in _neighbours(directions))
    mixed = tuple(one + other for one, other in zip(colour, meaning, strict=True))
    return grid_regions(*mixed), grid_regions(*colour)


def colour_regions(colours: Float[Tensor, "3 h w"]) -> Int64[Tensor, "h w"]:
    """The regions by colour alone, from the CIELAB colour of each patch."""
    return grid_regions(*_colour_steps(colours))


def patch_colours(pixels: UInt8[Tensor, "3 H W"], grid: tuple[int, int]) -> Float[Tensor, "3 h w"]:
    """The mean CIELAB colour of each patch of an sRGB image, white D65; L in [0, 100]."""
    linear = pixels.float() / 255
    linear = torch.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    xyz = torch.einsum("ij,jhw->ihw", torch.tensor(_XYZ), linear)
    xyz = xyz / torch.tensor(_WHITE)[:, None, None]
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    colours = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])
    return functional.adaptive_avg_pool2d(colours, grid)


def region_means(
    maps: Float[Tensor, "d h w"], regions: tuple[Int64[Tensor, "h w"], ...]
) -> Float[Tensor, "d h w"]:
    """Replace each patch by the mean over its region, averaged over several divisions."""
    rows = maps.flatten(1).T
    total = torch.zeros_like(rows)
    for ids in regions:
        flat = ids.flatten()
        sizes = torch.bincount(flat)
        sums = rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, flat, rows)
        total += (sums / sizes[:, None])[flat]
    return (total / len(regions)).T.reshape(maps.shape)


@dataclass(frozen=True)
class Pooled:
    """The vectors of an image, each once, and those of some of its patches."""

    vectors: Float[Tensor, "n d"]
    """The vector of each set of patches that share their region in every division."""
    sizes: Int64[Tensor, " n"]
    """How many patches have this vector."""
    owners: Int64[Tensor, " p"]
    """The number of the vector of each drawn patch."""


def pooled(
    maps: Float[Tensor, "d h w"],
    regions: tuple[Int64[Tensor, "h w"], ...],
    drawn: Int64[Tensor, " p"],
    start: int = 0,
) -> Pooled:
    """Keep one vector for all patches that share their regions, as `region_means` made them equal.

    Args:
        maps: The vector of each patch.
        regions: The divisions. With none, each drawn patch is kept by itself, and no other.
        drawn: Numbers of patches, row by row.
        start: The number of the first vector.
    """
    rows = maps.flatten(1).T
    if not regions:
        numbers = torch.arange(len(drawn))
        return Pooled(rows[drawn], torch.ones_like(numbers), start + numbers)
    flat = np.stack([ids.flatten().numpy() for ids in regions])
    _, first, ids, sizes = np.unique(
        flat, axis=1, return_index=True, return_inverse=True, return_counts=True
    )
    owners = torch.from_numpy(ids.reshape(-1))[drawn]
    return Pooled(rows[torch.from_numpy(first)], torch.from_numpy(sizes), start + owners)


def colour_share(maps: Float[Tensor, "d h w"], regions: Int64[Tensor, "h w"]) -> float:
    """The share of how embeddings vary within an image that its regions by colour explain.

    The variance between regions over that of all patches, in [0, 1]. It is low where a backbone
    does not see what colours say: on micrographs 0.31, on photos 0.5 (bundled).
    """
    centred = maps - maps.mean((1, 2), keepdim=True)
    total = centred.square().sum()
    between = region_means(centred, (regions,)).square().sum()
    return float(between / total) if total > 0 else 0.0


def follows_regions(
    clusters: Sequence[Integer[np.ndarray, "_ _"]],
    regions: Sequence[Integer[np.ndarray, "_ _"]],
    k: int,
) -> float:
    """The share of patches with the cluster of most patches of their region, less chance.

    Chance is what one cluster for everything would have if it were the largest one: its share.

    Args:
        clusters: The cluster of each patch of each image.
        regions: The region of each patch, numbered from 0 in each image.
        k: K.
    """
    same, counts = 0, np.zeros(k, np.int64)
    for ids, areas in zip(clusters, regions, strict=True):
        pairs, sizes = np.unique(areas.ravel() * k + ids.ravel(), return_counts=True)
        most = np.zeros(areas.max() + 1, np.int64)
        np.maximum.at(most, pairs // k, sizes)
        same += int(most.sum())
        counts += np.bincount(ids.ravel(), minlength=k)
    total, largest = counts.sum(), counts.max()
    return float((same - largest) / (total - largest)) if largest < total else 0.0


def grid_regions(
    across: Float[Tensor, "h v"],
    down: Float[Tensor, "u w"],
    *,
    scale: float = SCALE,
    smallest: int = SMALLEST,
) -> Int64[Tensor, "h w"]:
    """Divide a grid into regions, given how unlike its neighbours are.

    Regions merge along the edges of the minimum spanning tree alone, from light to heavy. With all
    edges, as in the paper, a few more of them merge, round a third region that has parted from
    both; the tree takes half the time.

    Args:
        across: Between each patch and the one to its right, h x (w - 1), not negative.
        down: Between each patch and the one below, (h - 1) x w, not negative.
        scale: k of the paper; larger values give larger regions.
        smallest: Regions below this number of patches join a neighbour.

    Returns:
        The region of each patch, numbered from 0.
    """
    height, width = across.shape[0], down.shape[1]
    tails, heads, weights = _tree(across, down)
    parent, size = list(range(height * width)), [1] * (height * width)
    tolerance = [scale] * (height * width)
    parted = []

    # Merge where the edge is light for both sides.
    for tail, head, weight in zip(tails, heads, weights, strict=True):
        one, other = _root(parent, tail), _root(parent, head)
        if weight <= tolerance[one] and weight <= tolerance[other]:
            parent[other] = one
            size[one] += size[other]
            tolerance[one] = weight + scale / size[one]
        else:
            parted.append((one, other))

    # Give small regions to the neighbour that is least unlike.
    for tail, head in parted:
        one, other = _root(parent, tail), _root(parent, head)
        if min(size[one], size[other]) < smallest:
            parent[other] = one
            size[one] += size[other]

    roots = np.array([_root(parent, patch) for patch in range(height * width)])
    ids = np.unique(roots, return_inverse=True)[1]
    return torch.from_numpy(ids.reshape(height, width))


def _colour_steps(colours: Float[Tensor, "3 h w"]) -> tuple[Tensor, Tensor]:
    """How far the colours of neighbours are apart, from left to right and from top to bottom."""
    across, down = ((a - b).norm(dim=0) / _LIGHTNESS for a, b in _neighbours(colours.float()))
    return across, down


def _neighbours(maps: Float[Tensor, "d h w"]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Each patch and the one to its right, each patch and the one below."""
    return (maps[:, :, :-1], maps[:, :, 1:]), (maps[:, :-1], maps[:, 1:])


def _tree(across: Tensor, down: Tensor) -> tuple[list[int], list[int], list[float]]:
    """The edges of the minimum spanning tree of the grid, the lightest first."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    height, width = across.shape[0], down.shape[1]
    ids = np.arange(height * width).reshape(height, width)
    tails = np.concatenate([ids[:, :-1].ravel(), ids[:-1].ravel()])
    heads = np.concatenate([ids[:, 1:].ravel(), ids[1:].ravel()])
    weights: Float64[np.ndarray, " e"] = (
        torch.cat([across.flatten(), down.flatten()]).double().numpy()
    )
    # scipy takes a weight of 0 for no edge: all are shifted by 1, which keeps their order.
    graph = coo_matrix((weights + 1, (tails, heads)), shape=(ids.size, ids.size))
    tree = minimum_spanning_tree(graph.tocsr()).tocoo()
    order = np.argsort(tree.data, kind="stable")
    parts = tree.row[order], tree.col[order], tree.data[order] - 1
    first, second, weight = (part.tolist() for part in parts)
    return first, second, weight


def _root(parent: list[int], patch: int) -> int:
    """The patch that stands for a region, with the way there made shorter."""
    while parent[patch] != patch:
        parent[patch] = parent[parent[patch]]
        patch = parent[patch]
    return patch
