"""A model as a file that other programs run: uint8 RGB of any size in, probabilities out.

The graph sees the whole image at once: no sliding windows, no mirror image, no refinement. All
else is as in `Segmenter.predict`, the working size and the resizing back included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from iddc import __version__
from iddc.backbones import licence_of
from iddc.config import ExportFormat, PredictionConfig
from iddc.engines import exporting, in_patches, onnx_graph
from iddc.errors import ConfigError
from iddc.masks import Labels
from iddc.network import Network
from iddc.quantizing import quantized
from iddc.runtimes import run_onnx
from iddc.segmenter import Segmenter

EXPORT_VERSION = 1
"""The format of an exported file. It rises when its input, its output or its metadata change."""
INPUT, OUTPUT = "image", "probs"
"""The names of the input and of the output."""
METADATA = "iddc.json"
"""The extra file that holds the metadata in a torch-export file; ONNX has a place for them."""

Runner = Callable[[UInt8[np.ndarray, "1 H W 3"]], Float[np.ndarray, "1 k H W"]]
"""An exported file at work."""


class WholeImage(nn.Module):
    """All of a prediction as one graph, in single precision.

    Args:
        network: What gives the probabilities of patches.
        short_side: The working size: a larger image is reduced to it, antialiased (0: not).
    """

    def __init__(self, network: Network, short_side: int) -> None:
        super().__init__()
        self.network = network
        self.short_side = short_side

    def forward(self, image: UInt8[Tensor, "1 H W 3"]) -> Float[Tensor, "1 k H W"]:
        """Give the probability of every cluster at every pixel."""
        height, width = image.shape[1:3]
        working, rounded = self.sizes(height, width)
        pixels = image.permute(0, 3, 1, 2).float()
        # As Pillow does it: along rows, then along columns, each to whole grey levels, a half up.
        for size in ((height, working[1]), working):
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
            pixels = (pixels + 0.5001).floor()
        pixels = functional.interpolate(pixels / 255, rounded, mode="bilinear")
        return functional.interpolate(
            self.network.probs(pixels), (height, width), mode="bilinear", align_corners=False
        )

    def sizes(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """The working size of an image, and that in whole patches; heights first.

        Both are computed by tensors; see `in_patches`.
        """
        sides = torch.stack([torch.scalar_tensor(n, dtype=torch.float64) for n in (height, width)])
        if self.short_side:  # the arithmetic of views.working_size, in its order
            sides = (sides * (self.short_side / sides.min()).clamp(max=1)).round()
        working = sides.long().tolist()
        for side in working:
            torch._check(side >= 1)
        return working, in_patches(self.network.backbone, sides.long())


def export(
    segmenter: Segmenter,
    to: ExportFormat,
    calibration: Iterable[Image.Image] | None = None,
) -> bytes:
    """Turn a model into the bytes of a file that runs without iddc.

    Args:
        segmenter: On the CPU; it must hold a Network.
        to: onnx, or torch-export (`torch.export.load` reads it).
        calibration: RGB images from whose activations the ranges of 8-bit numbers are taken. The
            products of matrices and the convolutions are then computed in 8 bits. None: they are
            computed in single precision.

    Raises:
        ConfigError: The predictor is not a Network, or 8 bits are asked of torch-export.
        SetupError: The extra `export` is missing, or PyTorch cannot export this backbone.
    """
    network = segmenter.network
    if not isinstance(network, Network):
        raise ConfigError(
            f"Only a Network can be exported, found {type(network).__name__}. Export your own "
            "predictor yourself."
        )
    if to == "torch-export" and calibration is not None:
        raise ConfigError("--int8 is for --to onnx, found torch-export.")
    graph = WholeImage(network, segmenter.experiment.views.short_side).eval()
    size: Any = torch.export.Dim
    example = torch.zeros(1, 97, 121, 3, dtype=torch.uint8)
    free = {1: size("height", min=1), 2: size("width", min=1)}
    about = metadata(segmenter)
    if to == "torch-export":
        with exporting(network):
            return _torch_export(graph, example, free, about)
    with exporting(network):
        data = onnx_graph(graph, example, free, INPUT, OUTPUT, about)
    if calibration is None:
        return data
    return quantized(data, INPUT, (np.asarray(image)[None] for image in calibration))


def metadata(segmenter: Segmenter) -> dict[str, str]:
    """What an exported file says about itself: by key, as ONNX stores it, JSON where it is more."""
    return {
        "format_version": str(EXPORT_VERSION),
        "iddc": __version__,
        "backbone_licence": licence_of(segmenter.experiment.backbone),
        "short_side": str(segmenter.experiment.views.short_side),
        **{key: json.dumps(value) for key, value in label_maps(segmenter.labels).items()},
    }


def label_maps(labels: Labels) -> dict[str, dict[str, Any]]:
    """Names as a configuration of `transformers` has them, and colours, all by cluster.

    `label2id` gives a name that several clusters share its lowest cluster.
    """
    names = dict(enumerate(labels.names))
    return {
        "id2label": {str(cluster): name for cluster, name in names.items()},
        "label2id": {name: cluster for cluster, name in reversed(names.items())},
        "colours": {
            str(cluster): f"#{bytes(colour).hex()}"
            for cluster, colour in enumerate(labels.cluster_colours)
        },
    }


@dataclass(frozen=True)
class Check:
    """How an exported file compares with PyTorch on some images."""

    num_images: int
    error: float
    """The largest difference of a probability."""
    agreement: float
    """The share of pixels with the same most probable cluster, in [0, 1]."""


def check(
    segmenter: Segmenter, data: bytes, to: ExportFormat, images: Iterable[Image.Image]
) -> Check:
    """Run an exported file beside `Segmenter.predict`, which sees the whole image as the file does.

    Args:
        segmenter: What was exported, on the CPU.
        data: From `export`.
        to: The format of `data`.
        images: RGB, at least one.

    Raises:
        SetupError: The extra `export` is missing.
    """
    run = open_exported(data, to)
    own = segmenter.experiment
    experiment = own.model_copy(
        update={
            "prediction": PredictionConfig(window=0, flip=False),
            "training": own.training.model_copy(update={"precision": "fp32"}),
        }
    )
    whole = Segmenter.of(segmenter.network, experiment)
    count, error, same, pixels = 0, 0.0, 0, 0
    for image in images:
        probs: Any = whole.predict(image, with_probs=True).probs
        found = torch.from_numpy(run(np.asarray(image)[None])[0])
        count, pixels = count + 1, pixels + image.width * image.height
        error = max(error, float((found - probs).abs().max()))
        same += int((found.max(0).indices == probs.max(0).indices).sum())
    return Check(count, error, same / pixels)


def open_exported(data: bytes, to: ExportFormat) -> Runner:
    """Make an exported file runnable on the CPU.

    Raises:
        SetupError: The extra `export` is missing.
    """
    if to == "torch-export":
        graph: Any = torch.export.load(BytesIO(data)).module()
        return lambda image: graph(torch.tensor(image)).detach().numpy()
    return run_onnx(data, torch.get_num_threads())


def _torch_export(
    graph: nn.Module, example: Tensor, free: dict[int, Any], about: dict[str, str]
) -> bytes:
    program = torch.export.export(graph, (example,), dynamic_shapes=(free,), strict=False)
    data = BytesIO()
    torch.export.save(program, data, extra_files={METADATA: json.dumps(about)})
    return data.getvalue()
