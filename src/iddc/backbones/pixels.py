"""What an image shows before any network has seen it: the floor that embeddings must beat.

These stand where a network of timm stands. They have no weights, and cut an image into small
squares: `pixels` gives the colour of each and its position in the image, `grey` its grey value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

SIDE = 4
"""The side of a square, in pixels at working size."""
LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in a grey value (ITU-R BT.601)."""


class ColourAndPosition(nn.Module):
    """Red, green, blue, row, and distance from the central column, all in [0, 1]."""

    feature_info: ClassVar[list[dict[str, Any]]] = [{"reduction": SIDE, "num_chs": 5}]

    def forward_features(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n 5"]:
        """The squares of each image, row by row, as a ViT gives its patches."""
        colours = avg_pool2d(pixels, SIDE)
        _, _, height, width = colours.shape
        rows = (torch.arange(height, device=pixels.device) + 0.5) / height
        columns = (2 * (torch.arange(width, device=pixels.device) + 0.5) / width - 1).abs()
        grid = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])
        maps = torch.cat([colours, grid.to(colours).expand(len(colours), -1, -1, -1)], dim=1)
        return maps.flatten(2).mT


class GreyValue(nn.Module):
    """The grey value, in [0, 1]."""

    feature_info: ClassVar[list[dict[str, Any]]] = [{"reduction": SIDE, "num_chs": 1}]

    def forward_features(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n 1"]:
        """The squares of each image, row by row, as a ViT gives its patches."""
        weights = pixels.new_tensor(LUMA)[:, None, None]
        return avg_pool2d((pixels * weights).sum(1, keepdim=True), SIDE).flatten(2).mT


PIXEL_NETS: dict[str, Callable[[], nn.Module]] = {"pixels": ColourAndPosition, "grey": GreyValue}
"""The networks without weights, named as their backbones."""
