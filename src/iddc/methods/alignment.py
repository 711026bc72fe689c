"""Where the patches of one view of an image are in its other view, which is another crop of it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample


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
