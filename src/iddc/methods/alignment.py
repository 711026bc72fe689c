"""Where the patches of a view are: in the other view of the image, and in a map of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import grid_sample

from iddc.errors import DataError
from iddc.methods.method import Images


def aligned(
    maps: Float[Tensor, "b c h w"], boxes: Float[Tensor, "b 2 4"]
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, "b h w"]]:
    """The second view's maps at the places of the first view's patches, bilinearly.

    Args:
        maps: Maps of the second view.
        boxes: Left, top, right and bottom of both crops in the image (`methods.method.Images`).

    Returns:
        The maps, zero outside of the second crop; and which patches of the first view are inside.
    """
    height, width = maps.shape[2:]
    first, second = boxes.to(maps).unbind(dim=1)
    axes = []
    for start, end, size in ((0, 2, width), (1, 3, height)):
        centres = (torch.arange(size, device=maps.device, dtype=maps.dtype) + 0.5) / size
        there = first[:, start, None] + centres * (first[:, end] - first[:, start])[:, None]
        span = second[:, end] - second[:, start]
        axes.append((there - second[:, start, None]) / span[:, None])
    across, down = axes
    inside = ((across >= 0) & (across <= 1))[:, None] & ((down >= 0) & (down <= 1))[:, :, None]
    grid = torch.stack(
        [
            across[:, None].expand(-1, height, -1) * 2 - 1,
            down[:, :, None].expand(-1, -1, width) * 2 - 1,
        ],
        dim=-1,
    )
    found = grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return found * inside[:, None], inside


def stacked(
    maps: Mapping[int, Tensor], fill: int
) -> tuple[Shaped[Tensor, "n H W *c"], Int64[Tensor, "n 2"]]:
    """Maps of images of different sizes in one tensor, for `at_patches`.

    Args:
        maps: A map "h w *c" for each image that could be read, by its index.
        fill: What stands beyond a map's size, and for an image without one.

    Returns:
        The maps, on the CPU; and the height and width of each, 0 for an image without one.

    Raises:
        DataError: No image could be read.
    """
    if not maps:
        raise DataError("Found no image that can be read; this method needs at least one.")
    some = next(iter(maps.values()))
    height, width = (max(each.shape[axis] for each in maps.values()) for axis in (0, 1))
    number = max(maps) + 1
    found = torch.full((number, height, width, *some.shape[2:]), fill, dtype=some.dtype)
    sizes = torch.zeros(number, 2, dtype=torch.int64)
    for index, each in maps.items():
        found[index, : each.shape[0], : each.shape[1]] = each.cpu()
        sizes[index] = torch.tensor(each.shape[:2])
    return found, sizes


def at_patches(
    maps: Shaped[Tensor, "n H W *c"],
    sizes: Int64[Tensor, "n 2"],
    images: Images,
    view: int,
    grid: Sequence[int],
) -> Shaped[Tensor, "b h w *c"]:
    """What a map of each image has under the centre of each patch of a crop.

    Args:
        maps: Maps of all images, see `stacked`.
        sizes: Their heights and widths.
        images: Which images, and where their crops are.
        view: Which of the two crops.
        grid: The rows and columns of its patches.
    """
    known, chosen = sizes.cpu()[images.ids].clamp(min=1), []
    for axis, (start, end) in enumerate(((1, 3), (0, 2))):
        low, high = images.boxes[:, view, start, None], images.boxes[:, view, end, None]
        centres = low + (torch.arange(grid[axis]) + 0.5) / grid[axis] * (high - low)
        limit = known[:, axis, None]
        chosen.append((centres * limit).long().clamp(min=0).minimum(limit - 1))
    rows, columns = chosen
    return maps.cpu()[images.ids[:, None, None], rows[:, :, None], columns[:, None]]
