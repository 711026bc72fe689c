"""Scores on labelled images, each published number by the protocol that gave it.

There are two rules of nearest resizing, half a step apart. Before the network it is Pillow's, as in
STEGO and in the release: pixel i of n out of m is the one under its centre, floor((i + 1/2) m / n).
The release brings predictions and labels to a square by torch's: floor(i m / n).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from iddc.cluster import Helpers, ended_processes
from iddc.config import (
    MatchingRows,
    Precision,
    PredictionConfig,
    ProtocolName,
    RefineName,
)
from iddc.datasets import LabelledImages
from iddc.datasets.labelfiles import read_ids
from iddc.errors import DataError
from iddc.images import ahead, listed
from iddc.intervals import LEVEL, RESAMPLES, ImageCounts, Interval, intervals
from iddc.masks import IGNORED, Labels, palette, write_ids, write_image
from iddc.metrics import EDGE_WIDTH, IGNORE, LABELS, UNMATCHED, Confusion, Scores, edge_band
from iddc.progress import SILENT, Progress
from iddc.runs import disk_errors
from iddc.segmenter import Segmenter, make_request
from iddc.windows import Request, as_array, cluster_ids

BLACK, GREY = (0, 0, 0), (128, 128, 128)
"""The colours of ignored pixels and of clusters that are matched to no class."""
PART = 8
"""Images that a process of a cluster does at a time: so many it does again if it dies."""
SEEN = (
    "A person saw images and named the clusters: these scores are not those of an unsupervised "
    "method."
)
"""Stands wherever scores by name do."""


@dataclass(frozen=True)
class EvalProtocol:
    """What is resized how before the network, how it sees an image, and where pixels are scored."""

    prediction: PredictionConfig
    """Windows, flip and refinement."""
    resize: Literal["none", "shorter side", "square"] = "none"
    """Bring image and label to `side`: not, by their shorter side, or both sides."""
    image_filter: Literal["nearest", "bilinear"] = "bilinear"
    """How the image is resized; bilinear is antialiased. Labels are always resized to nearest."""
    center_crop: bool = False
    """Keep the central square of `side` pixels of image and label."""
    working_size: Literal["model", "native"] = "native"
    """Whether the image is then reduced to the size at which the model was trained."""
    scored_at: Literal["label", "square"] = "label"
    """At the label's size, with probabilities brought there bilinearly; or clusters and label
    brought to a square of `side` by torch's nearest rule."""
    side: int = 320
    """The side of the square, in pixels."""
    precision: Precision = "fp32"
    """The network's arithmetic; published numbers are those of single precision."""
    matching_rows: MatchingRows = "clusters"
    """Which of equally good matchings counts; see `Confusion.match`."""

    def refined(self, name: RefineName) -> EvalProtocol:
        """The same protocol with this refinement of the probabilities, where they are scored."""
        prediction = self.prediction.model_copy(update={"refine": name})
        return replace(self, prediction=prediction)


_WINDOWS = PredictionConfig(window=224, overlap=75, flip=True, softmax="pixels")
_OWN_WINDOWS = PredictionConfig(window=224, overlap=75, flip=True)
_WHOLE = PredictionConfig(window=0, flip=False, softmax="pixels")

PROTOCOLS: dict[ProtocolName, EvalProtocol] = {
    # Table 4. The windows and the order of softmax and enlarging are our choice.
    "full": EvalProtocol(_OWN_WINDOWS, working_size="model", matching_rows="classes"),
    # STEGO, HP, SmooSeg, EAGLE, CAUSE; Table 3.
    "stego-center-crop": EvalProtocol(
        PredictionConfig(window=0, flip=True, softmax="pixels"),
        resize="shorter side",
        image_filter="nearest",
        center_crop=True,
    ),
    # The released validation on COCO-Stuff-27, behind Table 1.
    "iddc-sliding": EvalProtocol(_WINDOWS, scored_at="square", matching_rows="classes"),
    # The release's check after each epoch.
    "squash": EvalProtocol(
        PredictionConfig(window=0, flip=False, softmax="pixels", align_corners=True),
        resize="square",
        matching_rows="classes",
    ),
    # The release's validation mode 2; TransFGU on COCO.
    "squash-centers": EvalProtocol(_WHOLE, resize="square", matching_rows="classes"),
}


@dataclass(frozen=True)
class Evaluation:
    """The result on one data set by one protocol."""

    scores: Scores
    confusion: Confusion
    """The confusion of all pixels that count."""
    class_names: tuple[str, ...]
    num_images: int
    intervals: dict[str, Interval]
    """The intervals of accuracy and mIoU over other draws of the images; empty for one image."""
    by_name: Scores | None = None
    """Scores of clusters as the classes that a person named them after (`SEEN`)."""
    near_edges: Scores | None = None
    """Scores of the pixels near an edge of the labels, by the same matching (trimap)."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on labels that make the scores say less than they seem to."""
        pixels = self.confusion.counts.sum(0)
        absent = [name for name, count in zip(self.class_names, pixels, strict=True) if not count]
        found = [name for name in self.class_names if name not in absent]
        sentences = []
        if absent:
            sentences.append(
                f"{len(absent)} of {len(pixels)} classes have no pixel in these labels: "
                f"{listed(absent)}. Such a class counts in the mIoU only if a cluster is matched "
                "to it, and then with 0."
            )
        if len(found) == 1:
            sentences.append(
                f"All labelled pixels belong to one class, {found[0]}: these scores do not say "
                "how well classes are told apart."
            )
        return tuple(sentences)

    def as_dict(self) -> dict[str, Any]:
        """The scores as plain values, for scores.json, with the pixels of clusters and classes."""
        counts = self.confusion.counts
        record = {
            "images": self.num_images,
            "warnings": list(self.warnings),
            **self.scores.as_dict(self.class_names),
            "intervals": {
                "over": "images",
                "level": LEVEL,
                "resamples": RESAMPLES,
                **{name: list(ends) for name, ends in self.intervals.items()},
            },
            "cluster_pixels": counts.sum(1).tolist(),
            "class_pixels": counts.sum(0).tolist(),
        }
        if self.by_name:
            record["by_name"] = {"note": SEEN, **self.by_name.as_dict(self.class_names)}
        return record


def evaluate(
    segmenter: Segmenter,
    dataset: LabelledImages,
    protocol: EvalProtocol = PROTOCOLS["full"],
    *,
    by_name: bool = False,
    trimap: bool = False,
    save_masks: Path | None = None,
    saved: Sequence[int] | None = None,
    progress: Progress = SILENT,
    helpers: Helpers[Segmenter] | None = None,
) -> Evaluation:
    """Score a segmenter: one confusion over all images, one matching, one number.

    Args:
        segmenter: What is scored.
        dataset: Images with labels.
        protocol: How; one of PROTOCOLS for a published number.
        by_name: Score also the names that a person gave (`match_by_name`).
        trimap: Score also the pixels within EDGE_WIDTH of an edge of their label alone.
        save_masks: Write here, for each image, a PNG of the image, the truth and the prediction
            side by side as they were scored, in the colours of the classes. Ignored pixels are
            black, clusters that are matched to no class grey.
        saved: The positions in the data set of the images that have one; None: all.
        progress: Shows how far the work is.
        helpers: Processes that segment as `segmenter` does and do the work, if this one does not.

    Raises:
        DataError: A label has a value that is no class, no pixel is labelled, or no cluster has
            the name of a class. Or helpers died of some images.
        SetupError: The masks cannot be written.
    """
    named = match_by_name(segmenter.labels, dataset.class_names) if by_name else None
    if save_masks is None:
        count = _Count(dataset, protocol, trimap)
        return _scored(segmenter, count, named, progress, helpers)
    with disk_errors(save_masks):
        save_masks.mkdir(parents=True, exist_ok=True)
        kept = TemporaryDirectory(dir=save_masks, prefix=".iddc-")
    # The colours are known when all images are counted, so the clusters wait on the disk.
    with kept as folder:
        positions = range(len(dataset)) if saved is None else saved
        count = _Count(dataset, protocol, trimap, Path(folder), positions)
        evaluation = _scored(segmenter, count, named, progress, helpers)
        shown = evaluation.by_name or evaluation.scores
        for index in positions:
            sample = dataset[index]
            panel = _panel(
                *_before_network(sample.image, sample.label, protocol),
                read_ids(Path(folder) / f"{index}.png"),
                np.array(shown.matching),
                dataset.num_classes,
                protocol,
            )
            write_image(save_masks / Path(sample.name).with_suffix(".png"), panel)
    return evaluation


@dataclass(frozen=True)
class _Count:
    """What is done with each image of a data set, wherever it is done."""

    dataset: LabelledImages
    protocol: EvalProtocol
    trimap: bool
    """Whether pixels near an edge are counted too."""
    keep: Path | None = None
    """Gets the clusters of some images, as they are scored."""
    kept: Sequence[int] = ()
    """The positions of these images."""

    def each(
        self,
        segmenter: Segmenter,
        positions: Sequence[int],
        note: Callable[[str], object] = warnings.warn,
    ) -> Iterator[tuple[Confusion, Confusion | None]]:
        """The confusion of each image, and that of its pixels near an edge."""
        protocol, shape = self.protocol, (segmenter.num_clusters, self.dataset.num_classes)
        segmenter = _in_precision(segmenter, protocol.precision)

        def asked(index: int) -> Request:
            sample = self.dataset[index]
            image, label = _before_network(sample.image, sample.label, protocol)
            request = _request(segmenter, image, protocol)
            return replace(request, key=(index, sample.name, _as_scored(label, protocol)))

        found = cluster_ids(
            segmenter,
            (request for _, request in ahead(asked, positions)),
            protocol.prediction,
            device=segmenter.device,
            note=note,
        )
        for request, ids in found:
            index, name, label = request.key
            clusters = _as_scored(ids, protocol)
            try:
                one = _confusion(clusters, label, *shape)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            if self.keep and index in self.kept:
                write_ids(self.keep / f"{index}.png", as_array(clusters, segmenter.num_clusters))
            near = None
            if self.trimap:
                edges = np.where(edge_band(label, EDGE_WIDTH), label, IGNORE).astype(np.uint8)
                near = _confusion(clusters, edges, *shape)
            yield one, near

    def part(
        self, segmenter: Segmenter, positions: Sequence[int]
    ) -> list[tuple[Confusion, Confusion | None]]:
        """What `each` gives for some images, at once."""
        return [*self.each(segmenter, positions)]

    def elsewhere(
        self, helpers: Helpers[Segmenter]
    ) -> Iterator[tuple[Confusion, Confusion | None]]:
        """What `each` gives for all images, in their order, from other processes.

        Raises:
            DataError: Images remain that ended every process that had them.
        """
        found: dict[int, tuple[Confusion, Confusion | None]] = {}
        following, lost = 0, list[str]()
        for positions, results in helpers.spread(self.part, range(len(self.dataset)), PART):
            if results is None:
                lost.append(self.dataset[positions[0]].name)
            else:
                found |= zip(positions, results, strict=True)
            while following in found:
                yield found.pop(following)
                following += 1
        if lost:
            raise DataError(
                f"{ended_processes(len(lost), listed(lost))} Look whether they are damaged, or "
                "larger than the memory."
            )


def _scored(
    segmenter: Segmenter,
    count: _Count,
    named: Int64[np.ndarray, " k"] | None,
    progress: Progress,
    helpers: Helpers[Segmenter] | None,
) -> Evaluation:
    """Evaluate; `named` gives clusters their classes too."""
    dataset, total = count.dataset, len(count.dataset)
    confusion = Confusion.zeros(segmenter.num_clusters, dataset.num_classes)
    at_edges = confusion
    each = ImageCounts((segmenter.num_clusters, dataset.num_classes))
    note = warnings.warn if progress is SILENT else progress.note
    with progress.job(total):
        found = count.elsewhere(helpers) if helpers else count.each(segmenter, range(total), note)
        for done, (one, near) in enumerate(found, start=1):
            confusion += one
            each.add(one)
            if near is not None:
                at_edges += near
            progress.update(done, "evaluating", f"image {done} of {total}")
    matched = confusion.scores(confusion.match(count.protocol.matching_rows))
    spread = intervals(each, matched.matching)
    scores = Evaluation(matched, confusion, dataset.class_names, total, spread)
    if at_edges.counts.any():
        scores = replace(scores, near_edges=at_edges.scores(np.array(matched.matching)))
    return scores if named is None else replace(scores, by_name=confusion.scores(named))


def match_by_name(labels: Labels, class_names: Sequence[str]) -> Int64[np.ndarray, " k"]:
    """Give each cluster the class of its name, letter by letter, or UNMATCHED.

    Several clusters may have one class. Ignored clusters have none, so that their pixels are errors
    like those of any other cluster without a class.

    Raises:
        DataError: No cluster has the name of a class.
    """
    index = {name: number for number, name in enumerate(class_names) if name != IGNORED}
    matching = np.array([index.get(name, UNMATCHED) for name in labels.names], np.int64)
    if (matching == UNMATCHED).all():
        raise DataError(
            f"No cluster has the name of a class. Clusters: {listed(labels.classes.names)}. "
            f"Classes: {listed(class_names)}. Name clusters with `iddc label RUN --set 3=CLASS`."
        )
    return matching


def _before_network(
    image: Image.Image, label: Integer[np.ndarray, "H W"], protocol: EvalProtocol
) -> tuple[Image.Image, Integer[np.ndarray, "H2 W2"]]:
    """Resize and crop an image and its label alike."""
    if protocol.resize == "none":
        return image, label
    width, height = image.size
    side, shorter = protocol.side, min(image.size)
    if protocol.resize == "square":
        size = (side, side)
    else:
        size = (width * side // shorter, height * side // shorter)
    image = image.resize(size, Image.Resampling[protocol.image_filter.upper()])
    label = _nearest(label, size)
    if not protocol.center_crop:
        return image, label
    left, top = (round((length - side) / 2) for length in size)
    image = image.crop((left, top, left + side, top + side))
    return image, label[top : top + side, left : left + side]


def _request(segmenter: Segmenter, image: Image.Image, protocol: EvalProtocol) -> Request:
    """Ask for the clusters of an image where its label is, or where the network sees it."""
    short_side = segmenter.experiment.views.short_side if protocol.working_size == "model" else 0
    square = protocol.scored_at == "square"
    return make_request(image, short_side, protocol.prediction, at_working_size=square)


def _confusion(
    clusters: Integer[Tensor, "H W"],
    label: UInt8[np.ndarray, "H W"],
    num_clusters: int,
    num_classes: int,
) -> Confusion:
    """Count on the device of the clusters, which gives one small table."""
    labels = torch.tensor(label, device=clusters.device)
    pairs = clusters.long() * LABELS + labels
    table = torch.bincount(pairs.flatten(), minlength=num_clusters * LABELS)
    return Confusion.of_table(table.view(num_clusters, LABELS).cpu().numpy(), num_classes)


def _in_precision(segmenter: Segmenter, precision: Precision) -> Segmenter:
    """The same segmenter, computing in another precision."""
    experiment = segmenter.experiment
    training = experiment.training.model_copy(update={"precision": precision})
    changed = experiment.model_copy(update={"training": training})
    return Segmenter.of(segmenter.network, changed, segmenter.labels)


def _as_scored(ids: Any, protocol: EvalProtocol) -> Any:
    """An array or a tensor "H W" of ids, at the size at which it is scored."""
    if protocol.scored_at == "label":
        return ids
    rows, columns = (_torch_nearest(size, protocol.side) for size in ids.shape)
    return ids[rows][:, columns]


def _nearest(ids: Any, size: tuple[int, int]) -> Any:
    """Resize an array or a tensor "H W" of ids to (width, height) by Pillow's rule."""
    height, width = ids.shape
    return ids[_pillow_nearest(height, size[1])][:, _pillow_nearest(width, size[0])]


@lru_cache(maxsize=16)
def _pillow_nearest(size: int, out: int) -> Int64[np.ndarray, " out"]:
    """Which of `size` pixels each of `out` new ones is: what Pillow makes of their numbers."""
    numbers = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    resized = numbers.resize((out, 1), Image.Resampling.NEAREST)
    return np.array(resized, np.int64).ravel()


@lru_cache(maxsize=16)
def _torch_nearest(size: int, out: int) -> Int64[np.ndarray, " out"]:
    """Which of `size` pixels each of `out` new ones is: what torch makes of their numbers."""
    numbers = torch.arange(size, dtype=torch.float64)[None, None]
    resized = interpolate(numbers, out, mode="nearest")
    return resized.long().ravel().numpy()


def _panel(
    image: Image.Image,
    label: Integer[np.ndarray, "H W"],
    clusters: Integer[np.ndarray, "H2 W2"],
    matching: Int64[np.ndarray, " k"],
    num_classes: int,
    protocol: EvalProtocol,
) -> Image.Image:
    """Image, truth and prediction side by side."""
    colours = np.concatenate([palette(num_classes), np.array([GREY, BLACK], np.uint8)])
    unmatched, ignored = num_classes, num_classes + 1
    true = _as_scored(label, protocol).astype(np.int64)
    true[true == IGNORE] = ignored
    classes = np.where(matching == UNMATCHED, unmatched, matching)
    height, width = clusters.shape
    seen = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    panels = [seen, colours[true], colours[classes[clusters]]]
    return Image.fromarray(np.concatenate(panels, axis=1))
