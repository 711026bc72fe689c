"""What a ViT's class token sees: its embedding, its attention to patches, and slopes of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from iddc.backbones.architecture import Backbone
from iddc.errors import ConfigError


@dataclass(frozen=True)
class ClassAttention:
    """The class tokens of some images, after the last block and its norm."""

    token: Float[Tensor, "b d"]
    """The embedding of the class token."""
    attention: Float[Tensor, "b h w"]
    """The attention of the class token to each patch in the last block, the mean of all heads."""
    slopes: Float[Tensor, "b k h w"] | None = None
    """How 1 - cos(token, target) changes with the attention to each patch, the mean of all heads;
    for each of K targets, if there were any."""


def has_class_token(backbone: Backbone) -> bool:
    """Whether the network is a ViT with a class token that attends to patches."""
    net: Any = backbone.net
    blocks = getattr(net, "blocks", None)
    if getattr(net, "cls_token", None) is None or not isinstance(blocks, nn.Sequential):
        return False
    attention = getattr(blocks[-1], "attn", None)
    return all(hasattr(attention, name) for name in ("qkv", "proj", "num_heads", "scale"))


def attend(
    backbone: Backbone,
    images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"],
    targets: Float[Tensor, "k d"] | None = None,
) -> ClassAttention:
    """Run a ViT, and keep what its class token sees in the last block.

    Only the row of the class token is computed there, as nothing else is asked for. Slopes are
    those of each image by itself.

    Raises:
        ConfigError: The network has no class token.
    """
    if not has_class_token(backbone):
        raise ConfigError(f"{backbone.architecture.timm_name} has no class token.")
    net: Any = backbone.net
    with torch.no_grad():
        pixels, grid = backbone.prepared(images)
        rows = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(pixels))))
        rows = net.blocks[:-1](rows)
    block = net.blocks[-1]
    with torch.set_grad_enabled(targets is not None):
        # The attention of the class token is a leaf, of which the rest of the block is a function.
        query, keys, values = _projected(block, rows.detach())
        attention = (block.attn.scale * query @ keys.mT).softmax(dim=-1).detach()
        attention.requires_grad_(targets is not None)
        found = (attention @ values).transpose(1, 2).flatten(2)
        own = rows[:, :1] + block.ls1(block.attn.proj(_normed(block.attn, found)))
        own = own + block.ls2(block.mlp(block.norm2(own)))
        token = net.norm(own)[:, 0]
        slopes = None if targets is None else _slopes(token, attention, targets, grid)
    return ClassAttention(token.detach(), _on_grid(attention.detach(), grid), slopes)


def _slopes(
    token: Float[Tensor, "b d"], attention: Tensor, targets: Float[Tensor, "k d"], grid: Any
) -> Float[Tensor, "b k h w"]:
    """How the distance to each target changes with the attention, which is a leaf of the token."""
    each = []
    for target in targets.to(token):
        distance = (1 - cosine_similarity(token, target[None])).sum()
        (slope,) = torch.autograd.grad(distance, attention, retain_graph=True)
        each.append(_on_grid(slope, grid))
    return torch.stack(each, dim=1)


def _projected(block: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The class token's query, and all keys and values, "b heads n channels"."""
    attn = block.attn
    both = attn.qkv(block.norm1(rows)).unflatten(2, (3, attn.num_heads, -1))
    query, keys, values = both.permute(2, 0, 3, 1, 4)
    return attn.q_norm(query[:, :, :1]), attn.k_norm(keys), values


def _normed(attn: Any, found: Tensor) -> Tensor:
    norm: Any = getattr(attn, "norm", None)
    return found if norm is None else norm(found)


def _on_grid(rows: Float[Tensor, "b a 1 n"], grid: tuple[int, int]) -> Float[Tensor, "b h w"]:
    """The mean of all heads at the patches, which come last."""
    return rows.mean(dim=1)[:, 0, -grid[0] * grid[1] :].reshape(-1, *grid)
