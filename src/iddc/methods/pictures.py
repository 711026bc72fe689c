"""Some images of a collection as regions, in which classes of any size are found.

What `consensus` and IDDC by co-association have in common: embeddings of an image and its mirror
image, averaged over regions, about their mean over the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from iddc.config import ConsensusConfig
from iddc.errors import DataError
from iddc.methods.method import Collection
from iddc.regions import both_regions, colour_share, patch_colours, pooled, region_means


@dataclass(frozen=True)
class _Picture:
    """An image on the grid of patches."""

    maps: Float[Tensor, "2 d h w"]
    """The raw embeddings of the image and of its mirror image, mirrored back; half precision."""
    colours: Float[Tensor, "3 h w"]
    """The CIELAB colour of each patch."""
    divisions: tuple[Int64[Tensor, "h w"], ...]
    """The regions by embedding and colour, and those by colour alone; none if they are off."""

    def directions(self) -> Float[Tensor, "d h w"]:
        """The mean direction of both embeddings of a patch."""
        return normalize(normalize(self.maps.float(), dim=1).mean(0), dim=0)


@dataclass(frozen=True)
class Pictures:
    """Some images of a collection, and how they are looked at while the classes are found."""

    items: Sequence[_Picture]
    mean: Float[Tensor, " d"]
    """The mean direction of the embeddings of an image, over the images."""
    colour_share: float
    """How much of what varies within an image colours explain; 1 without regions."""
    options: ConsensusConfig

    @classmethod
    def of(cls, collection: Collection, options: ConsensusConfig) -> Pictures:
        """Embed images, and divide them into regions.

        Raises:
            DataError: No image can be read.
        """
        items = [
            _picture(maps.cpu(), pixels.cpu(), divided=options.regions)
            for _, maps, pixels in collection.pictures(options.images)
        ]
        if not items:
            raise DataError("Found no image that can be read; the consensus needs at least one.")
        mean = torch.stack([one.directions().mean((1, 2)) for one in items]).mean(0)
        share = 1.0
        if options.regions:
            shares = [colour_share(one.directions(), one.divisions[-1]) for one in items]
            share = float(np.mean(shares))
        return cls(items, mean, share, options)

    @property
    def known(self) -> bool:
        """Whether the backbone knows such images, which decides what lengths and colours say."""
        return self.colour_share >= self.options.known_share

    @property
    def unit(self) -> bool:
        """Whether the mean embedding of a region is brought to length 1."""
        lengths = self.options.lengths
        return self.known if lengths == "auto" else lengths == "unit"

    def facts(self) -> dict[str, float]:
        """What the log says of them."""
        return {
            "pictures": float(len(self.items)),
            "colour_share": self.colour_share,
            "unit_length": float(self.unit),
        }

    def regions(
        self, drawn: Sequence[Int64[Tensor, " _"]], colour: float = 0.0
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"], Int64[Tensor, " p"]]:
        """The vectors in which the classes are found, their weights, and those of some patches.

        A larger region counts more, but less than its patches.

        Args:
            drawn: Numbers of some patches of each image. Without regions, they are the vectors.
            colour: The weight of a region's mean colour beside its embedding.
        """
        shift, scale = _spread([one.colours for one in self.items])
        pools, count = [], 0
        for one, patches in zip(self.items, drawn, strict=True):
            view = _view(one, self.mean, self.unit)
            if colour:
                colours = ((one.colours - shift) * (colour / scale)).clamp(-4 * colour, 4 * colour)
                view = torch.cat([view, _means(colours, one)])
            pools.append(pooled(view, one.divisions, patches, count))
            count += len(pools[-1].vectors)
        return (
            torch.cat([pool.vectors for pool in pools]),
            torch.cat([pool.sizes for pool in pools]).float() ** self.options.size_power,
            torch.cat([pool.owners for pool in pools]),
        )


def _picture(
    maps: Float[Tensor, "2 d h w"], pixels: UInt8[Tensor, "3 H W"], *, divided: bool
) -> _Picture:
    height, width = maps.shape[2:]
    colours = patch_colours(pixels, (height, width))
    directions = normalize(maps, dim=1).mean(0)
    return _Picture(maps.half(), colours, both_regions(directions, colours) if divided else ())


def _spread(colours: Sequence[Float[Tensor, "3 _ _"]]) -> tuple[Float[Tensor, "3 1 1"], float]:
    """The mean colour, and the root mean square of the distance to it; 1 if there is but one."""
    rows = torch.cat([one.flatten(1) for one in colours], 1).double()
    mean = rows.mean(1, keepdim=True)
    deviation = float((rows - mean).square().sum(0).mean().sqrt())
    # Less than a step of 8 bits is rounding.
    return mean[..., None].float(), deviation if deviation > 0.1 else 1.0


def _view(picture: _Picture, mean: Float[Tensor, " d"], unit: bool) -> Float[Tensor, "d h w"]:
    """Centred embeddings, averaged over regions."""
    centred = normalize(picture.directions() - mean[:, None, None], dim=0)
    averaged = _means(centred, picture)
    return normalize(averaged, dim=0) if unit else averaged


def _means(maps: Float[Tensor, "c h w"], picture: _Picture) -> Float[Tensor, "c h w"]:
    """Averages over the regions of a picture, if it has been divided."""
    return region_means(maps, picture.divisions) if picture.divisions else maps
