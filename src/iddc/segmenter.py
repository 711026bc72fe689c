"""The trained model as users have it: images in, clusters of every pixel out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from iddc.backbones import resolve
from iddc.config import Experiment, PredictionConfig, Runtime
from iddc.device import autocast, pick_device
from iddc.errors import ConfigError
from iddc.images import Picture, address_of, collect, find_images
from iddc.images.given import ImageLike, as_files, as_picture, items_of
from iddc.learning import fit
from iddc.masks import Labels, cluster_names
from iddc.methods import completed, used
from iddc.modelfile import load_model, save_model
from iddc.network import Network
from iddc.progress import SILENT, Progress
from iddc.recipes import RECIPES
from iddc.refine import refiner
from iddc.runs import Run, changed, explain, spelt_in_python
from iddc.segmentation import Segmentation
from iddc.windows import (
    Predictor,
    Request,
    as_array,
    cluster_ids,
    most_probable,
    pixel_probs,
    pixel_scores,
    probability_strips,
    to_working_size,
)

__all__ = ["Segmentation", "Segmenter"]

K = TypeVar("K")
T = TypeVar("T")
S = TypeVar("S", bound="Segmenter")


class Segmenter:
    """Learns to segment images without labels, and segments them. A trained one is a Predictor.

    The constructor says what is to be learned, as the options of `iddc train` do, and reads no
    image. `fit` trains, `load` reads what was trained, `of` takes a Predictor of any kind.

    Example:
        Drawn scenes and a tiny network without training, so that it takes a second; leave out
        `backbone` and what follows it for photos.

        >>> from pathlib import Path
        >>> from iddc import Segmenter
        >>> from iddc.datasets.synthetic import write_scenes
        >>> write_scenes(Path("scenes"), count=6, seed=0, size=(96, 64))
        >>> segmenter = Segmenter(
        ...     num_clusters=4,
        ...     backbone="untrained:test_vit",
        ...     epochs=2,
        ...     views={"crop_size": 64},
        ... ).fit("scenes/train", device="cpu", progress=False)
        >>> result = segmenter.predict("scenes/val/images/scene_00005.jpg")
        >>> result.clusters.shape
        (64, 96)
        >>> segmenter.rename({0: "sky", 3: "sky"})
        >>> segmenter.save("model")
        >>> Segmenter.load("model", device="cpu").labels.classes.names
        ('sky', 'cluster 1', 'cluster 2')

    Args:
        num_clusters: K; that of the recipe if not given.
        recipe: A name of `RECIPES`, which sets every number that is not given.
        method: How the head learns, such as "kmeans" (`config.MethodName`).
        backbone: A name of `iddc models`, NAME=FILE, a folder, or "untrained:TIMM_NAME".
        head: "conv" or "linear".
        epochs: Passes over the images; 0: as many as `training.min_steps` take.
        seed: Everything random follows from it.
        objective: Fields of `ObjectiveConfig`; those that are not given keep their values.
        reading: Fields of `ReadingConfig`.
        views: Fields of `ViewsConfig`.
        training: Fields of `TrainingConfig`.
        prediction: Fields of `PredictionConfig`.
        options: The numbers of the method.
        others: None; a name that is not known is refused with the one that may be meant.

    Raises:
        ConfigError: There is no such recipe or field, or a value is out of range.
    """

    def __init__(
        self,
        num_clusters: int | None = None,
        recipe: str = "folder",
        *,
        method: str | None = None,
        backbone: str | None = None,
        head: str | None = None,
        epochs: int | None = None,
        seed: int | None = None,
        objective: Mapping[str, Any] | None = None,
        reading: Mapping[str, Any] | None = None,
        views: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        prediction: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if recipe not in RECIPES:
            raise ConfigError(f"Unknown recipe {recipe!r}. Known: {', '.join(RECIPES)}.")
        given: dict[str, Any] = {
            **{"num_clusters": num_clusters, "method": method, "backbone": backbone},
            **{"head": head, "epochs": epochs, "seed": seed, "objective": objective},
            **{"reading": reading, "views": views, "training": training},
            **{"prediction": prediction, "options": options},
        }
        changes = {name: value for name, value in given.items() if value is not None} | others
        base = RECIPES[recipe].experiment()
        self.experiment = changed(base, changes, "Segmenter", python=True)
        self._network: Predictor | None = None
        self._labels: Labels | None = None

    @classmethod
    def of(
        cls: type[S], network: Predictor, experiment: Experiment, labels: Labels | None = None
    ) -> S:
        """Segment with a Predictor that is there already.

        Args:
            network: What gives the probabilities. A module is put in evaluation mode and stays on
                its device.
            experiment: Of it count the working size, the windows and the precision.
            labels: What the clusters are called; by their numbers if not given.
        """
        segmenter = cls()
        segmenter.experiment = experiment
        segmenter._network = network
        segmenter._labels = labels or Labels.numbered(network.num_clusters)
        if isinstance(network, nn.Module):
            network.eval()
        return segmenter

    @spelt_in_python()
    def fit(
        self: S,
        images: Any,
        out: str | Path | None = None,
        *,
        progress: bool = True,
        device: str | None = None,
        workers: int | None = None,
        micro_batch_size: int | None = None,
        checkpoint_every: int | None = None,
        max_unreadable: float | None = None,
        tensorboard: bool | None = None,
        snapshots: bool | None = None,
        **others: Any,
    ) -> S:
        """Train on unlabelled images, as `iddc train` does; the names of an earlier fit are gone.

        Args:
            images: A folder with its subfolders, a zip or a text file of paths, whose masks are
                left out as `iddc train` does; or several images, as a list, a generator, an array
                "n H W 3" or a data set of torch, each as `predict` takes it. Images that are no
                files are kept in memory. Of an item (image, label) the label is not looked at.
            out: The folder of the run, with its log, from which an interrupted training goes on
                when it is asked for again. Without it, nothing is kept on disk.
            progress: Show on stderr how far the training is.
            device: cpu, cuda, cuda:1 or mps; a GPU if there is one.
            workers: Processes that decode photos.
            micro_batch_size: Images that go through the network at once.
            checkpoint_every: Steps between two saved training states.
            max_unreadable: The share of unreadable images above which the run stops.
            tensorboard: Also write TensorBoard events.
            snapshots: Keep what has trained at the end of each epoch.
            others: None; a name that is not known is refused with the one that may be meant.

        Returns:
            The segmenter itself, trained.

        Raises:
            ConfigError: There is no such device, field or backbone, or `out` holds something else.
            DataError, SetupError, NumericError, Interrupted: See `iddc.learning.fit`.
        """
        asked: dict[str, Any] = {
            **{"device": device, "workers": workers, "micro_batch_size": micro_batch_size},
            **{"checkpoint_every": checkpoint_every, "max_unreadable": max_unreadable},
            **{"tensorboard": tensorboard, "snapshots": snapshots},
        }
        runtime = {name: value for name, value in asked.items() if value is not None} | others
        try:
            how = Runtime(**runtime)
        except ValidationError as error:
            raise ConfigError(f"fit: {explain(error, python=True)}") from None
        pick_device(how.device)
        backbone = resolve(self.experiment.backbone)
        experiment = completed(self.experiment.model_copy(update={"backbone": backbone}))
        if isinstance(images, str | Path):
            listing = find_images(Path(images))
            source = address_of(images) or str(Path(images).resolve())
            given, notes = listing.files, listing.notes
        else:
            given, notes = as_files(images), ()
            source = f"{len(given)} images"
        found = collect(given, experiment.reading, max_unreadable=how.max_unreadable)
        experiment = experiment.model_copy(update={"reading": found.reading})
        shown = Progress() if progress else SILENT
        for note in notes:
            shown.note(f"note: {note}")
        for note in found.notes:
            shown.note(note)
        if backbone != self.experiment.backbone:
            shown.note(f"backbone {self.experiment.backbone}: {backbone}")
        with (
            TemporaryDirectory() as folder,
            Run.start(
                Path(out or folder), experiment, source=source, record=used(experiment)
            ) as run,
        ):
            network = fit(found.files, experiment, run, how, skipped=found.skipped, progress=shown)
        vars(self).update(vars(type(self).of(network, experiment)))
        return self

    def __repr__(self) -> str:
        experiment = self.experiment
        what = f"{experiment.num_clusters} clusters, {experiment.backbone}, {experiment.recipe}"
        if self._network is None:
            return f"Segmenter({what}; not trained yet, call fit)"
        named = sum(
            name != own
            for name, own in zip(self.labels.names, cluster_names(self.num_clusters), strict=True)
        )
        return f"Segmenter({what}; trained, {named} of {self.num_clusters} clusters named)"

    @property
    def network(self) -> Predictor:
        """What gives the probabilities.

        Raises:
            ConfigError: Nothing was trained yet.
        """
        return _trained(self._network)

    @property
    def labels(self) -> Labels:
        """What the clusters are called.

        Raises:
            ConfigError: Nothing was trained yet.
        """
        return _trained(self._labels)

    @property
    def num_clusters(self) -> int:
        """K."""
        return self.network.num_clusters

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @property
    def sees_whole_images(self) -> bool:
        """Whether the network must not be shown windows (`Backbone.sees_whole_images`)."""
        return bool(getattr(self.network, "sees_whole_images", False))

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The network's probabilities, computed in the experiment's precision."""
        with autocast(self.device, self.experiment.training.precision):
            return self.network.probs(images).float()

    def scores(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """What of the network is enlarged to pixels, computed in the experiment's precision."""
        with autocast(self.device, self.experiment.training.precision):
            return pixel_scores(self.network, images).float()

    def probs_of(self, scores: Float[Tensor, "c ..."]) -> Float[Tensor, "k ..."]:
        """The probabilities of enlarged scores, in single precision."""
        return pixel_probs(self.network, scores)

    @overload
    def predict(
        self, image: Picture | ImageLike | Tensor, *, with_probs: bool = False
    ) -> Segmentation: ...

    @overload
    def predict(
        self, image: list[Any] | tuple[Any, ...], *, with_probs: bool = False
    ) -> list[Segmentation]: ...

    def predict(self, image: Any, *, with_probs: bool = False) -> Segmentation | list[Segmentation]:
        """Segment one image, or a list of them. A result has its image's size.

        Args:
            image: A file, a Pillow image of any mode, an array "H W 3" or a tensor "3 H W" of
                uint8, or the bytes of an image file; or a list of these, which gives a list.
                `predict_all` holds one result at a time in memory.
            with_probs: Also give the probabilities: `4 * K` bytes per pixel, 5 GB for 27 clusters
                of a photo of 48 megapixels.

        Raises:
            UnreadableImage: The file cannot be decoded.
            DataError: It is no image.
            ConfigError: Nothing was trained yet.
        """
        if isinstance(image, list | tuple):
            return [*self.predict_all(image, with_probs=with_probs)]
        (result,) = self.predict_all([image], with_probs=with_probs)
        return result

    def predict_all(
        self,
        images: Any,
        *,
        with_probs: bool = False,
        note: Callable[[str], object] = warnings.warn,
    ) -> Iterator[Segmentation]:
        """Segment images one after another; the network sees windows of several at once.

        Args:
            images: As `predict` takes them, or with labels as `fit` does. They are read ahead of
                the results.
            with_probs: See `predict`.
            note: Told in one line when memory is short and fewer windows are seen at once.

        Raises:
            UnreadableImage, DataError, ConfigError: See `predict`.
            SetupError: There is not enough memory.
        """
        items = ((None, image) for image in items_of(images))
        with spelt_in_python():
            for _, result in self.predict_items(items, with_probs=with_probs, note=note):
                yield result

    def predict_items(
        self,
        items: Iterable[tuple[K, Picture | ImageLike | Tensor]],
        *,
        with_probs: bool = False,
        note: Callable[[str], object] = warnings.warn,
    ) -> Iterator[tuple[K, Segmentation]]:
        """Segment images as `predict_all` does; each comes with a key, and so does its result."""
        config = self.experiment.prediction

        def requests() -> Iterator[Request]:
            for key, image in items:
                picture = as_picture(image, self.experiment.reading)
                request = make_request(picture.image, self.experiment.views.short_side, config)
                yield replace(request, key=(key, picture))

        options: Any = {"device": self.device, "note": note}
        if with_probs:
            for request, strips in probability_strips(self, requests(), config, **options):
                key, picture = request.key
                probs = torch.cat([strip.cpu() for strip in request.refine(strips)], dim=1)
                yield key, _segmentation(picture, most_probable(probs), self.labels, probs)
            return
        for request, ids in cluster_ids(self, requests(), config, **options):
            key, picture = request.key
            yield key, _segmentation(picture, as_array(ids, self.num_clusters), self.labels)

    def rename(self, names: Mapping[Any, str]) -> None:
        """Name clusters: `{3: "sky", 7: "sky", 12: "ignore"}` makes 3 and 7 one class.

        Clusters are whole numbers of any kind: 3, "3" as JSON has it, or one of numpy's.

        `save` keeps the names; `iddc label RUN` changes those of a run. See `Labels.edit`.

        Raises:
            ConfigError: There is no such cluster, or a name is none.
        """
        self._labels = self.labels.edit({_number(key): name for key, name in names.items()})

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and model.json, from which `load` needs nothing else.

        Where somebody named a cluster, the names are in labels.json.

        Raises:
            ConfigError: The predictor is not a Network, so there is no format for it.
            SetupError: The folder cannot be written.
        """
        if not isinstance(self.network, Network):
            raise ConfigError(
                f"Only a Network can be saved, found {type(self.network).__name__}. Save your own "
                "predictor yourself."
            )
        save_model(Path(folder), self.network, self.experiment, self.labels)

    @classmethod
    def load(cls: type[S], folder: str | Path, device: str = "auto") -> S:
        """Read what `save` or `iddc train` wrote.

        Args:
            folder: It holds model.safetensors and model.json; labels.json if clusters have names.
            device: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.

        Raises:
            DataError: There is no model, it or labels.json is damaged or from a newer iddc.
            ConfigError, SetupError: See `pick_device`.
        """
        chosen = pick_device(device)
        network, experiment, labels = load_model(Path(folder))
        return cls.of(network.to(chosen), experiment, labels)


def _number(key: Any) -> int:
    """A cluster as a whole number."""
    try:
        return int(key, 10) if isinstance(key, str) else index(key)
    except (TypeError, ValueError):
        raise ConfigError(f"rename: expected the number of a cluster, found {key!r}.") from None


def make_request(
    image: Image.Image, short_side: int, config: PredictionConfig, *, at_working_size: bool = False
) -> Request:
    """Ask for the clusters of an RGB image, at its own size or at that at which it is seen.

    Args:
        image: The image.
        short_side: See `to_working_size`.
        config: The windows and the refinement.
        at_working_size: Whether the result is as large as the prepared image.
    """
    pixels = to_working_size(image, short_side, config.min_side)
    height, width = pixels.shape[1:] if at_working_size else (image.height, image.width)
    if config.refine == "none":
        return Request(pixels, (height, width))
    guide = pixels if at_working_size else to_working_size(image, 0, 0)
    return Request(pixels, (height, width), refiner(config.refine, guide))


def _trained(part: T | None) -> T:
    """What only a trained segmenter has."""
    if part is None:
        raise ConfigError(
            "This segmenter is not trained. Call fit(IMAGES) first, or take Segmenter.load(RUN)."
        )
    return part


def _segmentation(
    picture: Picture,
    clusters: Integer[np.ndarray, "H W"],
    labels: Labels,
    probs: Float[Tensor, "k H W"] | None = None,
) -> Segmentation:
    return Segmentation(picture.image, clusters, labels, picture.valid, probs)
