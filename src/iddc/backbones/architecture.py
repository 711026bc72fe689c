"""A backbone: any timm network with a dense feature map, from images to raw embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor, nn
from torch.nn import functional

from iddc.backbones.pixels import PIXEL_NETS
from iddc.backbones.positions import Positions, interpolate_as_dino
from iddc.config import Frozen
from iddc.errors import ConfigError, DataError, SetupError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's training images, in [0, 1]: what DINO, iBOT and XCiT were
trained with."""

Colour = tuple[float, float, float]
Option = int | float | bool | str
MAX_SIZE = 4096
"""The largest image size, and the largest number among the options, of a saved network."""

NO_OPTIONS = ("checkpoint_path", "cache_dir", "device", "dtype")
"""Arguments of timm that load files, or say where a network is, and not what it is."""

ANY_SIZE: tuple[dict[str, Option], ...] = (
    {"dynamic_img_size": True, "global_pool": ""},
    {"strict_img_size": False},
    {},
)
"""How timm's ViTs, windowed networks and others are asked for images of any size. Without pooling a
ViT has its final norm where we read it; with average pooling timm moves it behind the pooling."""


class Architecture(Frozen):
    """All that rebuilds a backbone without its weights. It is part of every saved model."""

    timm_name: str = Field(pattern="^[A-Za-z0-9_]+$")
    """The network's name in timm, without the tag of its weights; no address of a hub."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Keyword arguments of timm beside the name: depth, embed_dim, dynamic_img_size."""
    image_size: int = Field(ge=0, le=MAX_SIZE)
    """The side of the image whose positions are learned, in pixels; 0: none are learned."""
    positions: Positions = "timm"
    """How learned positions are interpolated where an image has another size."""
    stages: tuple[int, ...] = ()
    """The stages of a hierarchical network that are concatenated; none: plain, the last block."""
    components: int = Field(0, ge=0)
    """What the stages together are reduced to (`reduced_backbone`); 0: all channels."""
    patch_size: int = Field(gt=0)
    """The pixels of a step of the feature grid: the finest stride of the stages, or the patch."""
    embed_dim: int = Field(gt=0)
    """D, the channels of an embedding."""
    mean: Colour = IMAGENET_MEAN
    """Subtracted from the red, green and blue of an image in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    """What the difference is divided by."""

    @field_validator("options")
    @classmethod
    def _only_shape_the_network(cls, options: dict[str, Option]) -> dict[str, Option]:
        """A saved model comes from anywhere: it must not name files, nor fill the memory."""
        for name, value in options.items():
            if name.startswith("pretrained") or name in NO_OPTIONS:
                raise ValueError(f"{name} is no option of a network")
            if isinstance(value, int) and abs(value) > MAX_SIZE:
                raise ValueError(f"{name} must be at most {MAX_SIZE}, found {value}")
        return options


class Backbone(nn.Module):
    """Dense embeddings of images: the last block after the final norm, or several stages.

    A plain network (ViT, XCiT) gives its patch tokens: no class token, no registers. A hierarchical
    one gives each chosen stage L2-normalised over its channels and multiplied by the square root
    of their number, so that no stage outweighs another per channel, brought bilinearly to the
    finest chosen stride and concatenated; `reduce` then keeps some components of them, if the
    architecture says how many.

    Batch norms use their stored statistics in training too: what an image gives does not depend
    on the images beside it, nor on how a batch is cut. Pretraining calls `backbone.net.train()`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture, net: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.net = net
        if architecture.positions == "dino":
            interpolate_as_dino(net)
        strides = [architecture.patch_size]
        strides += [_info(net)[stage]["reduction"] for stage in architecture.stages]
        self._smallest = max(strides)
        self.reduce: nn.Module = nn.Identity()
        if architecture.components:
            channels = sum(_info(net)[stage]["num_chs"] for stage in architecture.stages)
            self.reduce = nn.Conv2d(channels, architecture.components, 1)
        for name, values in (("mean", architecture.mean), ("std", architecture.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.train()

    @property
    def patch_size(self) -> int:
        """The pixels of a step of the feature grid."""
        return self.architecture.patch_size

    @property
    def sees_whole_images(self) -> bool:
        """Whether an embedding says where in the image it is, so that windows would mislead it."""
        return self.architecture.timm_name in PIXEL_NETS

    @property
    def embed_dim(self) -> int:
        """D, the channels of an embedding."""
        return self.architecture.embed_dim

    def train(self, mode: bool = True) -> Backbone:
        """Set training or evaluation; batch norms stay in evaluation."""
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self

    def forward(
        self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, "b d h w"]:
        """Embed every patch of every image; h and w are H and W in patches, rounded, at least one.

        Args:
            images: Of any size; floating point values in [0, 1]. Where a side is no multiple of
                the patch, or shorter than one step of the coarsest stage, it is resized to that,
                bilinearly.

        Returns:
            The embeddings, not L2-normalised, in single precision also under autocast.
        """
        pixels, grid = self.prepared(images)
        return self._stages(pixels, grid) if self.architecture.stages else self._last(pixels, grid)

    def prepared(
        self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]
    ) -> tuple[Float[Tensor, "b 3 h w"], tuple[int, int]]:
        """What the network sees of images, and the rows and columns of their patches."""
        pixels = images.to(self.mean.dtype)
        if not images.is_floating_point():
            pixels = pixels / 255
        height, width = (self._rounded(side) for side in images.shape[-2:])
        if (height, width) != images.shape[-2:]:
            pixels = functional.interpolate(pixels, (height, width), mode="bilinear")
        grid = height // self.patch_size, width // self.patch_size
        return (pixels - self.mean) / self.std, grid

    def num_patches(self, side: int) -> int:
        """The embeddings of a square image of that side, in pixels."""
        return (self._rounded(side) // self.patch_size) ** 2

    def _rounded(self, side: int) -> int:
        patch = self.patch_size
        return max((side + patch // 2) // patch * patch, self._smallest)

    def _last(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        net: Any = self.net
        tokens = _at_least_single(net.forward_features(pixels))
        # The class token and the registers come first.
        patches = tokens[:, -math.prod(grid) :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], *grid)

    def _stages(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        net: Any = self.net
        stages = [*self.architecture.stages]
        maps = net.forward_intermediates(
            pixels, indices=stages, intermediates_only=True, stop_early=True
        )
        scaled = [
            functional.normalize(_at_least_single(features), dim=1) * features.shape[1] ** 0.5
            for features in maps
        ]
        aligned = [functional.interpolate(maps, grid, mode="bilinear") for maps in scaled]
        return _at_least_single(self.reduce(torch.cat(aligned, dim=1)))


def untrained_backbone(
    timm_name: str,
    *,
    options: Mapping[str, Option] | None = None,
    stages: tuple[int, ...] = (),
    positions: Positions = "timm",
    mean: Colour = IMAGENET_MEAN,
    std: Colour = IMAGENET_STD,
) -> Backbone:
    """A backbone with random weights, drawn from torch's generator.

    Args:
        timm_name: A network of timm. A tag (`.lvd142m`) sets the size of its learned positions.
        options: Other keyword arguments of timm, such as depth=2.
        stages: For a hierarchical network, which of its stages; none: those of stride 8 to 32.
        positions: See Architecture.
        mean: See Architecture.
        std: See Architecture.

    Raises:
        ConfigError: timm cannot build it, or it has no feature map for images of any size.
    """
    problem: Exception | None = None
    for extra in ANY_SIZE:
        try:
            architecture, net = _created(timm_name, {**extra, **(options or {})}, stages)
            given = {"mean": mean, "std": std, "positions": positions}
            backbone = Backbone(architecture.model_copy(update=given), net)
            _check_any_size(backbone)
        except Exception as error:  # each of timm's networks objects in its own way
            problem = error
        else:
            return backbone
    raise ConfigError(
        f"timm's {timm_name} cannot be a backbone: it must give a feature map for images of any "
        f"size, and said {type(problem).__name__}: {problem}"
    ) from problem


def pixel_backbone(name: str) -> Backbone:
    """A backbone of `PIXEL_NETS`, which sees colours as they are."""
    net = PIXEL_NETS[name]()
    patch, width = _measured(net, ())
    none, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    architecture = Architecture(
        timm_name=name, image_size=0, patch_size=patch, embed_dim=width, mean=none, std=one
    )
    return Backbone(architecture, net)


def build_backbone(architecture: Architecture) -> Backbone:
    """Rebuild a saved backbone with random weights, for its own to be loaded into it.

    Raises:
        SetupError: The timm of this machine cannot build it.
    """
    import timm

    try:
        net = _create(architecture.timm_name, architecture.image_size, architecture.options)
        patch_size, width = _measured(net, architecture.stages)
        found = patch_size, architecture.components or width
        if found != (architecture.patch_size, architecture.embed_dim):
            raise ValueError(f"patch_size and embed_dim are {found}")
        return Backbone(architecture, net)
    except Exception as error:  # as above
        raise SetupError(
            f"timm {timm.__version__} cannot build {architecture.timm_name}, which this model "
            f"needs. Install the timm it was made with. ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks built here have only shapes: a foreign description may claim any size."""
    import timm  # noqa: F401  # the import computes with PyTorch 2.6, which shapes alone cannot

    with torch.device("meta"):
        yield


def check_embeds(backbone: Backbone, described: Path) -> None:
    """Refuse a network that was built from a description, and cannot do what backbones do.

    Raises:
        DataError: It gives no feature map for images of any size.
    """
    try:
        _check_any_size(backbone)
    except Exception as error:  # as above
        raise DataError(
            f"{described} describes a network that cannot embed images of any size "
            f"({type(error).__name__}: {error}). Take the file that iddc wrote."
        ) from error


def _created(
    timm_name: str, options: dict[str, Option], stages: tuple[int, ...]
) -> tuple[Architecture, nn.Module]:
    import timm

    name = timm_name.partition(".")[0]
    cfg = timm.get_pretrained_cfg(timm_name)
    # timm calls the size fixed where positions are learned for it.
    image_size = cfg.input_size[-1] if cfg is not None and cfg.fixed_input_size else 0
    net = _create(name, image_size, options)
    strides = [stage["reduction"] for stage in _info(net)]
    plain = len({*strides}) == 1
    if plain and stages:
        raise ValueError("it has no stages to choose from: all its blocks have one stride")
    if not plain and not stages:
        stages = tuple(i for i, stride in enumerate(strides) if 8 <= stride <= 32)
    patch_size, width = _measured(net, stages)
    architecture = Architecture(
        timm_name=name,
        options=options,
        image_size=image_size,
        stages=tuple(sorted(stages)),
        patch_size=patch_size,
        embed_dim=width,
    )
    return architecture, net


def _measured(net: nn.Module, stages: tuple[int, ...]) -> tuple[int, int]:
    """The finest stride and all channels of some stages; without any, of the last block."""
    chosen = [_info(net)[stage] for stage in stages or (-1,)]
    return min(stage["reduction"] for stage in chosen), sum(stage["num_chs"] for stage in chosen)


def _create(name: str, image_size: int, options: Mapping[str, Option]) -> nn.Module:
    if name in PIXEL_NETS:
        return PIXEL_NETS[name]()
    import timm

    arguments: dict[str, Any] = {"num_classes": 0, **options}
    if image_size:
        arguments["img_size"] = image_size
    return timm.create_model(name, **arguments)


def _info(net: Any) -> list[dict[str, Any]]:
    """timm's table of a network's stages: stride (`reduction`) and channels (`num_chs`)."""
    info: list[dict[str, Any]] = net.feature_info
    return info


def _check_any_size(backbone: Backbone) -> None:
    """Embed a small image whose sides are no multiples of the coarsest stride."""
    patch, coarsest = backbone.patch_size, backbone._smallest
    height, width = coarsest + patch, 2 * coarsest + patch
    training = backbone.training
    with torch.no_grad():
        found = backbone.eval()(torch.zeros(1, 3, height, width)).shape
    backbone.train(training)
    expected = (1, backbone.embed_dim, height // patch, width // patch)
    if found != expected:
        raise ValueError(f"a feature map of shape {tuple(found)} instead of {expected}")


def _at_least_single(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
