"""Parts of heads that see all patches of an image at once: attention, and three decoders of it.

They hold weights and say what they compute; how they learn is in `iddc.methods`. Nothing is dropped
at random, so an image gives the same whatever is beside it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize

WIDTH_OF_HEAD = 64
"""Channels of one head of an attention, as in a ViT: 6 heads of 384 channels."""


class Attention(nn.Module):
    """Rows ask other rows: softmax(q k / sqrt(channels of a head)) v, with biases everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "b n d"],
        keys: Float[Tensor, "b m d"],
        values: Float[Tensor, "b m d"],
    ) -> Float[Tensor, "b n d"]:
        """What each query finds among the values."""
        pairs = ((self.query, queries), (self.key, keys), (self.value, values))
        q, k, v = (
            layer(rows).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, rows in pairs
        )
        found = functional.scaled_dot_product_attention(q, k, v)
        return self.out(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def heads_of(width: int) -> int:
    """The most heads of at least WIDTH_OF_HEAD channels that a width can be cut into."""
    most = max(1, width // WIDTH_OF_HEAD)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def feed_forward(width: int, hidden: int, activation: type[nn.Module]) -> nn.Sequential:
    """Two layers, for each row by itself."""
    return nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, width))


class CodebookDecoder(nn.Module):
    """One decoder block of CAUSE-TR: each patch asks the image by its nearest concept.

    The queries are the nearest concept of each patch and a learned position. They attend to each
    other, then to the embeddings; a norm follows each of the three parts. What they find is added
    to the embeddings. The release has a position for each patch of one size of image; here they are
    a square grid, interpolated to the size of the image.
    """

    codebook: Float[Tensor, "g d"]
    """The concepts, of any length but zero."""

    def __init__(self, width: int, concepts: int, grid: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(concepts, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.own = Attention(width, 1)
        self.cross = Attention(width, 1)
        self.feed = feed_forward(width, hidden, nn.ReLU)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """The embeddings, and what their concepts find added to them."""
        rows = features.flatten(2).mT
        cosines = normalize(rows, dim=-1) @ normalize(self.codebook, dim=1).T
        found = self.codebook[cosines.argmax(dim=-1)].to(rows)
        size = features.shape[2:]
        places = functional.interpolate(self.positions, size, mode="bilinear").flatten(2).mT
        found = self.norms[0](found + self.own(found + places, found + places, found))
        found = self.norms[1](found + self.cross(found + places, rows, rows))
        found = self.norms[2](found + self.feed(found))
        decoded: Tensor = rows + self.norms[3](found)
        return decoded.mT.reshape(features.shape)


class MaskTransformer(nn.Module):
    """The segmenter of TransFGU: patches and one token for each class attend to each other.

    After two blocks of a ViT the logit of a patch and a class is the product of their directions,
    normed over the classes.
    """

    def __init__(self, width: int, num_clusters: int, blocks: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.classes = nn.Parameter(nn.init.orthogonal_(torch.empty(num_clusters, width)))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.to_patch = nn.Linear(width, width, bias=False)
        self.to_class = nn.Linear(width, width, bias=False)
        self.balance = nn.LayerNorm(num_clusters)

    def tokens(
        self, features: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k d"]]:
        """The directions of all patches and of all classes, which depend on the image."""
        patches = self.enter(features.flatten(2).mT)
        rows = torch.cat([patches, self.classes.expand(len(features), -1, -1)], dim=1)
        for block in self.blocks:
            rows = block(rows)
        rows, number = self.norm(rows), patches.shape[1]
        patches, classes = self.to_patch(rows[:, :number]), self.to_class(rows[:, number:])
        return normalize(patches, dim=-1), normalize(classes, dim=-1)

    def logits_of(
        self, patches: Float[Tensor, "b n d"], classes: Float[Tensor, "b k d"]
    ) -> Float[Tensor, "b k n"]:
        """The logits of directions."""
        logits: Tensor = self.balance(patches @ classes.mT)
        return logits.mT

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """The logits of every patch."""
        logits = self.logits_of(*self.tokens(features))
        return logits.reshape(*logits.shape[:2], *features.shape[2:])


class _Block(nn.Module):
    """A block of a ViT: norms first, GELU, four times the width inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads_of(width))
        self.feed = feed_forward(width, 4 * width, nn.GELU)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, rows: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        first = self.norms[0](rows)
        rows = rows + self.attention(first, first, first)
        found: Tensor = rows + self.feed(self.norms[1](rows))
        return found


class Concepts(nn.Module):
    """ACSeg as a head: an image's own concepts cut it into regions, which centroids classify.

    Prototypes become the concepts of an image in blocks of attention to its embeddings, attention
    to each other, and a layer for each by itself. A patch belongs to the concept of the largest
    cosine; a region's mean embedding is compared with K centroids, and all its patches have the
    cosines over the temperature as logits. Windows of one image have regions of their own.
    """

    centroids: Float[Tensor, "k d"]
    """The centroids of regions, of any length but zero."""
    TEMPERATURE = 0.1
    """What divides cosines. It changes how sure a cluster is, never which."""

    def __init__(
        self, width: int, num_clusters: int, concepts: int = 5, blocks: int = 6, hidden: int = 1024
    ) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(concepts, width))
        self.blocks = nn.ModuleList(_ConceptBlock(width, hidden) for _ in range(blocks))
        self.register_buffer("centroids", torch.randn(num_clusters, width))

    def cosines(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b n k"]:
        """The cosine of every patch and every concept of its image."""
        rows = features.flatten(2).mT
        concepts = self.prototypes.expand(len(rows), -1, -1)
        for block in self.blocks:
            concepts = block(concepts, rows)
        return normalize(rows, dim=-1) @ normalize(concepts, dim=-1).mT

    def regions(
        self, cosines: Float[Tensor, "b n c"], features: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c d"]]:
        """The region of each patch, as 0 and 1, and the mean embedding of each, 0 if empty."""
        members = functional.one_hot(cosines.argmax(dim=-1), cosines.shape[-1]).to(features.dtype)
        sums = members.mT @ features.flatten(2).mT
        return members, sums / members.sum(dim=1)[..., None].clamp(min=1)

    def logits_of(
        self, cosines: Float[Tensor, "b n c"], features: Float[Tensor, "b d h w"]
    ) -> Float[Tensor, "b k n"]:
        """The logits of every patch: those of its region."""
        members, means = self.regions(cosines, features)
        scores = normalize(means, dim=-1) @ normalize(self.centroids, dim=1).T.to(means)
        return (members @ scores / self.TEMPERATURE).mT

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """The logits of every patch."""
        logits = self.logits_of(self.cosines(features), features)
        return logits.reshape(*logits.shape[:2], *features.shape[2:])


class _ConceptBlock(nn.Module):
    """Attention to the patches, to the other concepts, a layer; each is added and normed."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.cross = Attention(width, heads_of(width))
        self.own = Attention(width, heads_of(width))
        self.feed = feed_forward(width, hidden, nn.GELU)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, concepts: Float[Tensor, "b k d"], rows: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b k d"]:
        concepts = self.norms[0](concepts + self.cross(concepts, rows, rows))
        concepts = self.norms[1](concepts + self.own(concepts, concepts, concepts))
        found: Tensor = self.norms[2](concepts + self.feed(concepts))
        return found
