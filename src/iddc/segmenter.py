"""The trained model as users have it: images in, clusters of every pixel out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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
from iddc.masks import LABELS, Labels, overlay, read_labels, write_labels
from iddc.network import Network
from iddc.refine import refiner
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
    labels: Labels
    """What the clusters are called."""
    probs: Float[Tensor, "k H W"] | None = None
    """The probability of every cluster at every pixel, on the CPU, if asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """One per cluster; clusters of one name are one class."""
        return self.labels.names

    @property
    def colours(self) -> UInt8[np.ndarray, "k 3"]:
        """RGB, one per cluster."""
        return self.labels.cluster_colours

    @cached_property
    def classes(self) -> Integer[np.ndarray, "H W"]:
        """The class of every pixel, as `labels.classes` numbers them; without names, its cluster.

        Pixels of ignored clusters have the highest value of the type, 255 or 65535.
        """
        classes: np.ndarray = self.labels.classes.of_cluster[self.clusters]
        return classes

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image under the colours of its classes; opacity 0 is the image alone."""
        return overlay(self.image, self.classes, self.labels.classes.colours, opacity)


class Segmenter:
    """Segments images with any Predictor, as an experiment says. It is a Predictor itself.

    Args:
        network: What gives the probabilities. A module is put in evaluation mode and stays on its
            device.
        experiment: Of it count the working size, the windows and the precision.
        labels: What the clusters are called; by their numbers if not given.
    """

    def __init__(
        self, network: Predictor, experiment: Experiment, labels: Labels | None = None
    ) -> None:
        self.network = network
        self.experiment = experiment
        self.labels = labels or Labels.numbered(network.num_clusters)
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
        size, refine = (rgb.height, rgb.width), refiner(config.refine, prepare(rgb, 0, 0))
        if with_probs:
            probs = predict_probs(
                self, pixels, config, size, device=self.device, refine=refine
            ).cpu()
            return Segmentation(rgb, most_probable(probs), self.labels, probs)
        clusters = cluster_map(self, pixels, config, size, device=self.device, refine=refine)
        return Segmentation(rgb, clusters, self.labels)

    def rename(self, names: Mapping[int, str]) -> None:
        """Name clusters: `{3: "sky", 7: "sky", 12: "ignore"}` makes 3 and 7 one class.

        `save` keeps the names; `iddc label RUN` changes those of a run. See `Labels.edit`.

        Raises:
            ConfigError: There is no such cluster, or a name is none.
        """
        self.labels = self.labels.edit(names)

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and model.json, from which `load` needs nothing else.

        Where somebody named a cluster, the names are in labels.json.

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
            (folder / LABELS).unlink(missing_ok=True)
        if self.labels != Labels.numbered(self.num_clusters):
            write_labels(folder, self.labels)
        write_atomic(folder / "model.safetensors", save(tensors))
        write_atomic(folder / "model.json", record.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Segmenter:
        """Read what `save` or `iddc train` wrote.

        Args:
            folder: It holds model.safetensors and model.json; labels.json if clusters have names.
            device: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.

        Raises:
            DataError: There is no model, it or labels.json is damaged or from a newer iddc.
            ConfigError, SetupError: See `pick_device`.
        """
        folder, place = Path(folder), pick_device(device)
        record = _read_model_file(folder / "model.json")
        network = Network.from_spec(record.network)
        _load_weights(network, folder / "model.safetensors")
        labels = read_labels(folder, network.num_clusters)
        return cls(network.to(place), record.experiment, labels)


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
