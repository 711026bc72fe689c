"""Position embeddings of a ViT at other image sizes, as its authors interpolate them."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Positions = Literal["timm", "dino"]
"""timm: bicubic, antialiased, by pixel centres. dino: bicubic, not antialiased, with an offset."""

OFFSET = 0.1
"""DINO adds it to the size of the new grid when it says the scale, so that rounding never loses a
row; the samples lie accordingly. iBOT's code does the same."""


def dino_positions(
    positions: Float[Tensor, "1 n d"], grid: tuple[int, int]
) -> Float[Tensor, "1 h w d"]:
    """Interpolate the positions of a square grid to another grid, as DINO's code does.

    Args:
        positions: Those of the patches alone, row by row.
        grid: Height and width of the new grid, in patches.
    """
    side = math.isqrt(positions.shape[1])
    maps = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if grid != (side, side):
        scale = ((grid[0] + OFFSET) / side, (grid[1] + OFFSET) / side)
        maps = functional.interpolate(maps, scale_factor=scale, mode="bicubic")
    return maps.permute(0, 2, 3, 1)


def interpolate_as_dino(net: nn.Module) -> None:
    """Make a ViT of timm interpolate its positions as DINO does.

    timm adds its own interpolation to the patches. The difference of the two is added before.

    Raises:
        ValueError: The network has no learned positions on a square grid, or not for any size.
    """
    vit: Any = net
    positions, dynamic = getattr(vit, "pos_embed", None), getattr(vit, "dynamic_img_size", False)
    if positions is None or not dynamic or len({*vit.patch_embed.grid_size}) != 1:
        raise ValueError("positions 'dino' need positions learned on a square grid")

    vit.patch_embed.register_forward_hook(_Correction(vit))


class _Correction:
    """A hook of `patch_embed`. It is an object so that a copied network corrects by its own."""

    def __init__(self, vit: nn.Module) -> None:
        self.vit = vit

    def __call__(
        self, patch_embed: Any, _: object, patches: Float[Tensor, "b h w d"]
    ) -> Float[Tensor, "b h w d"]:
        """Add the difference of the two interpolations, nothing on the grid that was learned."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        grid = (patches.shape[1], patches.shape[2])
        learned, positions = tuple(patch_embed.grid_size), cast("Any", self.vit).pos_embed
        if grid == learned:
            return patches
        own = positions[:, positions.shape[1] - math.prod(learned) :]
        theirs: Tensor = resample_abs_pos_embed(own, list(grid), list(learned), num_prefix_tokens=0)
        return patches + (dino_positions(own, grid) - theirs.reshape(1, *grid, -1))
