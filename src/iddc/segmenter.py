"""The trained model as users have it: images in, clusters of every pixel out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from iddc import __version__
from iddc.config import Experiment, Frozen
from iddc.device import autocast, pick_device
from iddc.errors import ConfigError, DataError
from iddc.images import listed, open_image, to_rgb
from iddc.masks import cluster_names, overlay, palette
from iddc.network import Network
from iddc.runs import FORMAT_VERSION, disk_errors, explain, write_atomic
from iddc.views import working_size
from iddc.windows import Predictor, cluster_map, most_probable, predict_probs, size_for_windows


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The clusters of one image, at its size."""

    image: Image.Image
    """What was segmented: RGB, upright."""
    clusters: Integer[np.ndarray, "H W"]
    """The cluster of every pixel: uint8, or uint16 with more than 256 clusters."""
    names: tuple[str, ...]
    """One per cluster."""
    colours: UInt8[np.ndarray, "k 3"]
    """RGB, one per cluster."""
    probs: Float[Tensor, "k H W"] | None = None
    """The probability of every cluster at every pixel, on the CPU, if asked for."""

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image under the colours of its clusters; opacity 0 is the image alone."""
        return overlay(self.image, self.clusters, self.colours, opacity)


class Segmenter:
    """Segments images with any Predictor, as an experiment says. It is a Predictor itself.

    Args:
        network: What gives the probabilities. A module is put in evaluation mode and stays on its
            device.
        experiment: Of it count the working size, the windows and the precision.
    """

    def __init__(self, network: Predictor, experiment: Experiment) -> None:
        self.network = network
        self.experiment = experiment
        self.names = cluster_names(network.num_clusters)
        self.colours = palette(network.num_clusters)
        if isinstance(network, nn.Module):
            network.eval()

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.network.num_clusters

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The network's probabilities, computed in the experiment's precision."""
        with autocast(self.device, self.experiment.training.precision):
            return self.network.probs(images).float()

    def predict(
        self, image: str | Path | Image.Image | np.ndarray | Tensor, *, with_probs: bool = False
    ) -> Segmentation:
        """Segment one image. The result has the image's size, whatever its working size.

        Args:
            image: A file, a Pillow image of any mode, an array "H W 3" or a tensor "3 H W" of
                uint8.
            with_probs: Also give the probabilities: `4 * K` bytes per pixel, 5 GB for 27 clusters
                of a photo of 48 megapixels.

        Raises:
            UnreadableImage: The file cannot be decoded.
            DataError: The array is no image.
        """
        rgb = _as_image(image)
        config = self.experiment.prediction
        pixels = prepare(rgb, self.experiment.views.short_side, config.window)
        size = rgb.height, rgb.width
        if with_probs:
            probs = predict_probs(self, pixels, config, size, device=self.device).cpu()
            return Segmentation(rgb, most_probable(probs), self.names, self.colours, probs)
        clusters = cluster_map(self, pixels, config, size, device=self.device)
        return Segmentation(rgb, clusters, self.names, self.colours)

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and model.json, from which `load` needs nothing else.

        Raises:
            ConfigError: The predictor is not a Network, so there is no format for it.
            SetupError: The folder cannot be written.
        """
        folder = Path(folder)
        if not isinstance(self.network, Network):
            raise ConfigError(
                f"Only a Network can be saved, found {type(self.network).__name__}. Save your own "
                "predictor yourself."
            )
        state = self.network.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        record = ModelFile(
            format_version=FORMAT_VERSION,
            iddc=__version__,
            network=self.network.spec(),
            experiment=self.experiment,
        )
        # model.json comes last: where it is, the model is complete.
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.json").unlink(missing_ok=True)
        write_atomic(folder / "model.safetensors", save(tensors))
        write_atomic(folder / "model.json", record.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Segmenter:
        """Read what `save` or `iddc train` wrote.

        Args:
            folder: It holds model.safetensors and model.json.
            device: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.

        Raises:
            DataError: There is no model, it is damaged, or it comes from a newer iddc.
            ConfigError, SetupError: See `pick_device`.
        """
        folder, place = Path(folder), pick_device(device)
        record = _read_model_file(folder / "model.json")
        network = Network.from_spec(record.network)
        _load_weights(network, folder / "model.safetensors")
        return cls(network.to(place), record.experiment)


class ModelFile(Frozen):
    """The content of model.json."""

    format_version: int
    """Of the RUN folder."""
    iddc: str
    """The version that wrote it."""
    network: dict[str, Any]
    """`Network.spec()`."""
    experiment: Experiment
    """What it was trained with; of it, prediction needs the working size and the windows."""


def prepare(image: Image.Image, short_side: int, window: int) -> UInt8[Tensor, "3 H W"]:
    """Bring an RGB image to the size at which a network sees it.

    A larger image is reduced to `short_side` (0: not), antialiased; one smaller than a window is
    enlarged, bilinearly.
    """
    size = size_for_windows(working_size(image.size, short_side), window)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _as_image(image: str | Path | Image.Image | np.ndarray | Tensor) -> Image.Image:
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    found = f"{type(image).__name__} of {getattr(image, 'dtype', '')} {tuple(image.shape)}"
    array = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) else image
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise DataError(
            f"Expected an image as an array (height, width, 3) or a tensor (3, height, width) of "
            f"uint8, found {found}."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _read_model_file(path: Path) -> ModelFile:
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"No model in {path.parent}: expected model.json and model.safetensors, which "
            "`iddc train` writes at its end. Give the folder of a finished run."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{path} was not written by iddc: it has no format_version.")
    if version > FORMAT_VERSION:
        writer = record.get("iddc")
        raise DataError(
            f"{path} has format {version}, and this iddc {__version__} reads formats up to "
            f"{FORMAT_VERSION}. Install {f'iddc {writer} or newer' if writer else 'a newer iddc'}."
        )
    try:
        return ModelFile.model_validate(record)
    except ValidationError as error:
        raise DataError(f"{path}: {explain(error)}") from error


def _load_weights(network: Network, path: Path) -> None:
    """Load every tensor of the network, and no other."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}. Copy it again.") from error
    wanted = network.state_dict()
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is unknown" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if wrong:
        raise DataError(
            f"{path} does not fit model.json beside it: {listed(sorted(wrong))}. Both files must "
            "come from the same run."
        )
    network.load_state_dict(found)
