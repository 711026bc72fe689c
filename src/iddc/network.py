"""Network = backbone + head: images -> logits of K clusters per patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from iddc.backbones import Architecture, Backbone, build_backbone, load_backbone
from iddc.config import Experiment, Frozen, HeadName, Precision
from iddc.decoders import CodebookDecoder, Concepts, MaskTransformer
from iddc.device import autocast
from iddc.errors import DataError
from iddc.runs import explain

TEMPERATURE = 0.1
"""What a fresh Centroids head divides cosines by. It changes how sure a cluster is, never which."""
CODE_DIM = 70
"""The length of a code of STEGO with a small ViT."""


CPU_CROPS = 16
"""Crops that a CPU embeds at once: more leave its cache and cost a fifth more time (ViT-Ti/16)."""
CODE_TEMPERATURE = 0.5
"""What STEGO divides the cosines of its codes by where it needs probabilities, for the CRF."""


class ConvHead(nn.Sequential):
    """3x3 and 1x1 convolutions of D channels with ReLU, then 1x1 to K: the head of Tables 1-3."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, num_clusters, 1),
        )

    def at(
        self, features: Float[Tensor, "b d h w"], patches: Int64[Tensor, " m"]
    ) -> Float[Tensor, "b k m"]:
        """The logits of some patches, without computing those of the others."""
        first: Any = self[0]
        width = features.shape[3] + 2  # with the border that the 3x3 convolution adds
        maps = functional.pad(features, (1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1, 2)
        corners = patches // features.shape[3] * width + patches % features.shape[3]
        offsets = (torch.arange(3)[:, None] * width + torch.arange(3)).flatten()
        around = (corners[:, None] + offsets.to(corners)).flatten()
        rows = maps[:, around].reshape(len(maps), len(patches), -1)
        weight = first.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = functional.linear(rows, weight, first.bias).mT[..., None]
        for layer in list(self)[1:]:
            hidden = layer(hidden)
        return hidden[..., 0]


class LinearHead(nn.Conv2d):
    """One 1x1 convolution: the head of the ablations."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__(width, num_clusters, 1)


class Centroids(nn.Module):
    """Spherical k-means as a head: the cosine to each of K centroids over a temperature.

    Fresh centroids are random directions; whoever fits the head overwrites the buffers.
    """

    mean: Float[Tensor, " d"]
    """Subtracted from the features of length 1; zero unless they are centred."""
    centroids: Float[Tensor, "k d"]
    """The centroids, of any length but zero."""
    temperature: Float[Tensor, ""]
    """Above 0."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("centroids", torch.randn(num_clusters, width))
        self.register_buffer("temperature", torch.tensor(TEMPERATURE))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """Give the cosines over the temperature."""
        directions = functional.normalize(features, dim=1)
        directions = functional.normalize(directions - self.mean[:, None, None], dim=1)
        weights = functional.normalize(self.centroids, dim=1)[:, :, None, None]
        return functional.conv2d(directions, weights) / self.temperature


class Means(nn.Module):
    """K-means as a head: how near each of K means is, as K normal densities of one variance.

    Computed without matrix products, which lose digits at lower precision.
    """

    variance: Float[Tensor, ""]
    """The variance of the vectors about their mean, over all axes; above 0."""

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(num_clusters, width))
        self.register_buffer("variance", torch.tensor(1.0))

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """Give the logarithms of the densities, up to a number that all share."""
        squares = torch.zeros_like(features[:, :1])
        for axis, means in enumerate(self.means.T):
            squares = squares + (features[:, axis, None] - means[:, None, None]) ** 2
        return -squares / (2 * self.variance)


class Codes(nn.Module):
    """STEGO as a head (Hamilton et al., 2022): short codes, and the cosine to each of K centroids.

    A code is the sum of a linear and of a nonlinear map of the features.
    """

    def __init__(self, width: int, num_clusters: int, dim: int = CODE_DIM) -> None:
        super().__init__()
        self.linear = nn.Conv2d(width, dim, 1)
        self.nonlinear = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, dim, 1)
        )
        self.centroids = nn.Parameter(torch.randn(num_clusters, dim))

    def codes(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """Give the codes, of any length."""
        codes: Tensor = self.linear(features) + self.nonlinear(features)
        return codes

    def cosines(self, codes: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Give the cosine of each code and each centroid."""
        centroids = functional.normalize(self.centroids, dim=1)[:, :, None, None]
        return functional.conv2d(functional.normalize(codes, dim=1), centroids)

    def mappings(self) -> list[nn.Parameter]:
        """Give what the codes are made with: all parameters but the centroids."""
        return [each for name, each in self.named_parameters() if name != "centroids"]

    def logits_of(self, codes: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Give the cosines over the temperature."""
        return self.cosines(codes) / CODE_TEMPERATURE

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """Give the cosines of the codes over the temperature."""
        return self.logits_of(self.codes(features))


class SmoothCodes(Codes):
    """The codes of SmooSeg (Lan et al., 2023): SiLU instead of ReLU."""

    def __init__(self, width: int, num_clusters: int, dim: int = CODE_DIM) -> None:
        super().__init__(width, num_clusters, dim)
        self.nonlinear[1] = nn.SiLU(inplace=True)


class CodebookCodes(Codes):
    """The codes of CAUSE-TR (Kim et al., 2023): of embeddings that were decoded by a codebook."""

    def __init__(
        self,
        width: int,
        num_clusters: int,
        dim: int = CODE_DIM,
        concepts: int = 2048,
        grid: int = 28,
        hidden: int = 2048,
    ) -> None:
        super().__init__(width, num_clusters, dim)
        self.decoder = CodebookDecoder(width, concepts, grid, hidden)

    def codes(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """Give the codes, of any length; they depend on all patches of the image."""
        return super().codes(self.decoder(features))


HEADS: dict[HeadName, Callable[..., nn.Module]] = {
    "conv": ConvHead,
    "linear": LinearHead,
    "centroids": Centroids,
    "means": Means,
    "codes": Codes,
    "smooth-codes": SmoothCodes,
    "codebook-codes": CodebookCodes,
    "concepts": Concepts,
    "mask-transformer": MaskTransformer,
}
"""From D, K and the head's own options to a module with random weights, of torch's generator."""


class NetworkSpec(Frozen):
    """All that rebuilds a network without its weights: the content of `model.json`."""

    backbone: Architecture
    """The architecture of the backbone."""
    head: HeadName
    """The name of the head in HEADS."""
    num_clusters: int = Field(ge=2, le=65535)
    """K."""
    head_options: dict[str, int] = Field(default_factory=dict)
    """What the head is built with beside D and K; most heads need nothing."""


class Network(nn.Module):
    """A backbone and a head. It is a Predictor.

    A new head is random, drawn from torch's generator.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: HeadName,
        num_clusters: int,
        head_options: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = HEADS[head](backbone.embed_dim, num_clusters, **head_options)
        self.head_name = head
        self.head_options = dict(head_options)
        self.num_clusters = num_clusters

    @property
    def sees_whole_images(self) -> bool:
        """Whether it must not be shown windows (`Backbone.sees_whole_images`)."""
        return self.backbone.sees_whole_images

    def forward(
        self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, "b k h w"]:
        """The logits of every patch."""
        return self.logits_from(self.embed(images))

    def embed(
        self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, "b d h w"]:
        """The raw embeddings of every patch."""
        features: Tensor = self.backbone(images)
        return features

    def logits_from(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b k h w"]:
        """The logits of embeddings, for a backbone that runs apart from its head."""
        logits: Tensor = self.head(features)
        return logits

    def probs(
        self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, "b k h w"]:
        """The probabilities of every patch, a softmax in single precision also under autocast."""
        logits: Tensor = self(images)
        return logits.float().softmax(dim=1)

    def scores(
        self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, "b c h w"]:
        """What of every patch is enlarged to pixels, see `PixelPredictor`: logits, or codes."""
        features = self.embed(images)
        if isinstance(self.head, Codes):
            return self.head.codes(features)
        return self.logits_from(features)

    def probs_of(self, scores: Float[Tensor, "c ..."]) -> Float[Tensor, "k ..."]:
        """The probabilities of enlarged scores, a softmax in single precision."""
        logits = scores.float()
        if isinstance(self.head, Codes):
            flat = logits.flatten(1)[None, :, :, None]
            logits = self.head.logits_of(flat).reshape(-1, *scores.shape[1:])
        return logits.softmax(dim=0)

    def spec(self) -> dict[str, Any]:
        """Describe the network without its weights, as JSON."""
        spec = NetworkSpec(
            backbone=self.backbone.architecture,
            head=self.head_name,
            num_clusters=self.num_clusters,
            head_options=self.head_options,
        )
        return spec.model_dump(
            mode="json", exclude=set() if self.head_options else {"head_options"}
        )

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Network:
        """Rebuild a network with random weights, for its own to be loaded into it.

        Raises:
            DataError: It is no description of a network.
            SetupError: The timm of this machine cannot build it.
        """
        try:
            known = NetworkSpec.model_validate(spec)
        except ValidationError as error:
            raise DataError(f"No description of a network: {explain(error)}") from error
        backbone = build_backbone(known.backbone)
        return cls(backbone, known.head, known.num_clusters, known.head_options)


def logits_at(
    head: nn.Module, features: Float[Tensor, "b d h w"], patches: Int64[Tensor, " m"]
) -> Float[Tensor, "b k m"]:
    """The logits of some patches of each grid, numbered row by row."""
    if isinstance(head, ConvHead):
        return head.at(features, patches)
    if isinstance(head, CodebookCodes | Concepts | MaskTransformer):
        whole: Tensor = head(features)
        return whole.flatten(2)[:, :, patches]
    # Every other head maps each patch by itself.
    logits: Tensor = head(features.flatten(2)[:, :, patches, None])
    return logits[..., 0]


def embed_crops(
    network: Network, crops: UInt8[Tensor, "n 3 S S"], precision: Precision
) -> Float[Tensor, "n d h w"]:
    """The raw embeddings of crops, in single precision."""
    # As in prediction: convolutions are faster when the channels of a pixel lie together.
    crops = crops.contiguous(memory_format=torch.channels_last)
    parts = torch.split(crops, CPU_CROPS) if crops.device.type == "cpu" else (crops,)
    with autocast(crops.device, precision):
        return torch.cat([network.embed(part).float() for part in parts])


def build_network(
    experiment: Experiment, head_options: Mapping[str, int] = MappingProxyType({})
) -> Network:
    """The network before anything is learned or fitted. Its random weights follow from the seed.

    Training and k-means start here, so that they see the same untrained backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)
        backbone = load_backbone(experiment.backbone)
        return Network(backbone, experiment.head, experiment.num_clusters, head_options)


def build_head(
    experiment: Experiment,
    width: int,
    index: int,
    head_options: Mapping[str, int] = MappingProxyType({}),
) -> nn.Module:
    """The head at this position among several, 1 or more, which differ in their random weights.

    The one at position 0 is that of `build_network`.
    """
    with torch.random.fork_rng(devices=[]):
        own = np.random.SeedSequence((experiment.seed, index)).generate_state(1)
        torch.default_generator.manual_seed(int(own[0]))
        return HEADS[experiment.head](width, experiment.num_clusters, **head_options)
