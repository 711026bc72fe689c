"""The validation of the authors' release, written down again slowly, in float64, from its facts.

Facts (docs/protocols.md): `iddc-sliding` takes windows of 224 pixels at stride 149, the last one at
the border; averages the LOGITS of a window and of its mirror image; enlarges them bilinearly by
pixel centres; takes the softmax; averages on the canvas; takes the argmax; and brings prediction
and label to 320 x 320 by the nearest rule of torch. `squash` sees the whole image at 320 x 320
once; the check after each epoch enlarges the logits with aligned corners, the validation does not.
Classes are the rows of the table that is matched. Nothing here imports what it checks but the
protocols and the functions under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from iddc.config import Experiment, PredictionConfig, ProtocolName, TrainingConfig
from iddc.datasets import Sample
from iddc.evaluation import PROTOCOLS, evaluate
from iddc.metrics import IGNORE, Confusion
from iddc.segmenter import Segmenter
from iddc.windows import Request, predict_probs, probability_strips

PATCH, CLUSTERS = 16, 5
CPU = torch.device("cpu")
WEIGHTS = np.random.default_rng(7).normal(size=(CLUSTERS, 3)) * 12
Array = np.ndarray
SIZES = [(227, 301), (333, 251), (224, 225), (480, 361)]


def slow_logits(window: Array) -> Array:
    """Logits of each patch of uint8 "H W 3": its mean colour, and where in the window it lies."""
    rows, columns = window.shape[0] // PATCH, window.shape[1] // PATCH
    logits = np.zeros((CLUSTERS, rows, columns))
    for y in range(rows):
        for x in range(columns):
            patch = window[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH] / 255.0
            logits[:, y, x] = WEIGHTS @ (patch.reshape(-1, 3).mean(0) - 0.5)
            logits[0, y, x] += 2 * x / columns  # left and right, up and down are not the same
            logits[1, y, x] += y / rows
    return logits


@dataclass
class Patches:
    """The same logits from torch, as a network has them: this one has only probabilities."""

    num_clusters: int = CLUSTERS

    def logits(self, images: Tensor) -> Tensor:
        cells = functional.avg_pool2d(images.double() / 255, PATCH) - 0.5
        logits = torch.einsum("bihw,ki->bkhw", cells, torch.from_numpy(WEIGHTS))
        logits[:, 0] += 2 * torch.arange(logits.shape[3]) / logits.shape[3]
        logits[:, 1] += torch.arange(logits.shape[2])[:, None] / logits.shape[2]
        return logits

    def probs(self, images: Tensor) -> Tensor:
        return self.logits(images).softmax(1).float()


class Scoring(Patches):
    """A predictor that also tells what it enlarges, as a Network does."""

    def scores(self, images: Tensor) -> Tensor:
        return self.logits(images).float()

    def probs_of(self, scores: Tensor) -> Tensor:
        return scores.softmax(0)


def slow_positions(length: int, cells: int, *, corners: bool) -> list[tuple[int, int, float]]:
    """Of each pixel, the two cells it lies between, and the share of the second."""
    found = []
    for i in range(length):
        if corners:
            place = i * (cells - 1) / (length - 1)
        else:
            place = min(max((i + 0.5) * cells / length - 0.5, 0.0), cells - 1)
        low = min(math.floor(place), cells - 1)
        found.append((low, min(low + 1, cells - 1), place - low))
    return found


def slow_enlarge(grid: Array, height: int, width: int, *, corners: bool = False) -> Array:
    rows = slow_positions(height, grid.shape[1], corners=corners)
    columns = slow_positions(width, grid.shape[2], corners=corners)
    above = np.stack([(1 - s) * grid[:, a] + s * grid[:, b] for a, b, s in rows], axis=1)
    return np.stack([(1 - s) * above[:, :, a] + s * above[:, :, b] for a, b, s in columns], axis=2)


def slow_softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(0))
    return raised / raised.sum(0)


def slow_starts(length: int) -> list[int]:
    return [min(i * 149, length - 224) for i in range(math.ceil((length - 224) / 149) + 1)]


def slow_sliding(image: Array) -> Array:
    """The canvas of probabilities "k H W" of an image that is no smaller than a window."""
    height, width = image.shape[:2]
    canvas, count = np.zeros((CLUSTERS, height, width)), np.zeros((height, width))
    for y in slow_starts(height):
        for x in slow_starts(width):
            window = image[y : y + 224, x : x + 224]
            logits = (slow_logits(window) + slow_logits(window[:, ::-1])[:, :, ::-1]) / 2
            canvas[:, y : y + 224, x : x + 224] += slow_softmax(slow_enlarge(logits, 224, 224))
            count[y : y + 224, x : x + 224] += 1
    return canvas / count


def slow_squash(image: Array, *, corners: bool) -> Array:
    """The probabilities of an image of 320 x 320, seen whole and not mirrored."""
    return slow_softmax(slow_enlarge(slow_logits(image), 320, 320, corners=corners))


def slow_nearest(ids: Array) -> Array:
    """To 320 x 320 by torch's rule: pixel floor(i * size / 320), of a scale in single precision."""
    places = []
    for size in ids.shape:
        scale = np.float32(size) / np.float32(320)
        places.append([min(int(np.float32(i) * scale), size - 1) for i in range(320)])
    return ids[np.ix_(*places)]


def blobs(width: int, height: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return np.clip(np.asarray(smooth).astype(int) + noise, 0, 255).astype(np.uint8)


def as_tensor(image: Array) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("predictor", [Patches(), Scoring()], ids=["probabilities", "scores"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sliding_windows_are_those_of_the_release(
    size: tuple[int, int], predictor: Patches
) -> None:
    image = blobs(*size, seed=size[0])
    found = predict_probs(
        predictor,
        as_tensor(image),
        PROTOCOLS["iddc-sliding"].prediction,
        image.shape[:2],
        device=CPU,
        batch_size=3,
    )
    assert np.abs(found.numpy() - slow_sliding(image)).max() < 1e-6


@pytest.mark.parametrize("predictor", [Patches(), Scoring()], ids=["probabilities", "scores"])
@pytest.mark.parametrize(("name", "corners"), [("squash", True), ("squash-centers", False)])
def test_a_squashed_image_is_seen_as_the_release_does(
    name: ProtocolName, corners: bool, predictor: Patches
) -> None:
    image = blobs(320, 320, seed=3)
    config = PROTOCOLS[name].prediction
    found = predict_probs(predictor, as_tensor(image), config, (320, 320), device=CPU)
    assert np.abs(found.numpy() - slow_squash(image, corners=corners)).max() < 1e-6


def test_the_orders_of_softmax_and_enlarging_give_different_clusters() -> None:
    image = as_tensor(blobs(333, 251, seed=5))
    orders = [
        PredictionConfig(softmax="patches", flip=True),
        PredictionConfig(softmax="pixels", flip=True),
    ]
    first, second = (
        predict_probs(Patches(), image, config, (251, 333), device=CPU).argmax(0)
        for config in orders
    )
    assert 0.001 < (first != second).float().mean() < 0.2


@pytest.mark.parametrize("blend", ["mean", "tent"])
@pytest.mark.parametrize("softmax", ["patches", "pixels"])
@pytest.mark.parametrize("out_size", [(180, 155), (500, 643)], ids=str)
def test_at_another_size_the_canvas_is_resized_bilinearly(
    out_size: tuple[int, int], softmax: str, blend: str
) -> None:
    image = as_tensor(blobs(250, 267, seed=9))
    config = PredictionConfig.model_validate({"softmax": softmax, "blend": blend})
    canvas = predict_probs(Patches(), image, config, (267, 250), device=CPU)
    found = predict_probs(Patches(), image, config, out_size, device=CPU)
    expected = functional.interpolate(canvas[None], out_size, mode="bilinear")[0]
    assert (found - expected).abs().max() < 1e-5


def test_logits_beyond_the_range_of_probabilities_are_kept_where_a_predictor_tells_them() -> None:
    """Single precision has no probability below 1e-45: what a network says of logits counts."""

    class Steep(Scoring):
        def logits(self, images: Tensor) -> Tensor:
            return super().logits(images) * 40

    image = blobs(224, 224, seed=11)
    config = PROTOCOLS["iddc-sliding"].prediction
    found = predict_probs(Steep(), as_tensor(image), config, (224, 224), device=CPU)
    logits = 40 * (slow_logits(image) + slow_logits(image[:, ::-1])[:, :, ::-1]) / 2
    expected = slow_softmax(slow_enlarge(logits, 224, 224))
    assert np.abs(found.numpy() - expected).max() < 1e-4


@dataclass
class One:
    """A labelled data set of one image."""

    sample: Sample
    num_classes: int = 3
    name: str = "one"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(f"class {index}" for index in range(self.num_classes))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return self.sample


def labelled(width: int, height: int) -> Sample:
    image = blobs(width, height, seed=width)
    label = image.argmax(2).astype(np.uint8)
    label[: height // 6, : width // 5] = IGNORE
    return Sample(Image.fromarray(image), label, "a")


def slow_counts(clusters: Array, label: Array) -> Array:
    counts = np.zeros((CLUSTERS, 3), int)
    for k, c in zip(clusters.ravel().tolist(), label.ravel().tolist(), strict=True):
        if c != IGNORE:
            counts[k, c] += 1
    return counts


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_sliding_protocol_counts_the_pixels_of_the_release(size: tuple[int, int]) -> None:
    sample = labelled(*size)
    segmenter = Segmenter.of(Patches(), Experiment(training=TrainingConfig(precision="fp32")))
    found = evaluate(segmenter, One(sample), PROTOCOLS["iddc-sliding"]).confusion.counts
    clusters = slow_sliding(np.asarray(sample.image)).argmax(0)
    expected = slow_counts(slow_nearest(clusters), slow_nearest(sample.label))
    assert found.sum() == expected.sum()
    # Single precision may decide a tie otherwise.
    assert np.abs(found - expected).sum() <= 2


@pytest.mark.parametrize("size", [*range(1, 700, 37), 320, 427, 640])
def test_ids_are_brought_to_320_by_the_rule_of_torch(size: int) -> None:
    columns = np.arange(size, dtype=np.float32)
    theirs = functional.interpolate(torch.from_numpy(columns)[None, None], 320, mode="nearest")
    ours = slow_nearest(np.arange(size)[None])[0]
    assert (theirs[0, 0].numpy() == ours).all()


def release_scores(counts: Array) -> tuple[float, float]:
    """Accuracy and mIoU of a square table "class cluster", as the release forms them.

    The assignment maximises the matched count over that table, scipy's order deciding ties. The
    row of a class goes to the place of its cluster; a class without any pixel is left out.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]  # no stubs

    classes, clusters = linear_sum_assignment(counts, maximize=True)
    hits = sum(int(counts[c, k]) for c, k in zip(classes, clusters, strict=True))
    ious = []
    for c, k in zip(classes, clusters, strict=True):
        union = int(counts[c].sum() + counts[:, k].sum() - counts[c, k])
        if union:
            ious.append(int(counts[c, k]) / union)
    return hits / int(counts.sum()), sum(ious) / len(ious)


@pytest.mark.parametrize("seed", range(40))
def test_scores_with_absent_classes_are_those_of_the_release(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(3, 9))
    counts = rng.integers(0, 6, (number, number))
    counts[rng.random(number) < 0.4] = 0  # classes without a pixel
    counts[:, rng.random(number) < 0.3] = 0  # clusters without a pixel
    counts[0, 0] += 1
    confusion = Confusion(np.ascontiguousarray(counts.T, np.int64))
    scores = confusion.scores(confusion.match(rows=PROTOCOLS["iddc-sliding"].matching_rows))
    assert (scores.accuracy, scores.miou) == pytest.approx(release_scores(counts))


def test_published_protocols_are_scored_in_single_precision() -> None:
    seen = []

    class Watching(Patches):
        def probs(self, images: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().probs(images)

    experiment = Experiment(training=TrainingConfig(precision="bf16"))
    segmenter = Segmenter.of(Watching(), experiment)
    for protocol in PROTOCOLS.values():
        evaluate(segmenter, One(labelled(240, 230)), protocol)
    assert seen
    assert not any(seen)


def test_a_large_canvas_is_never_held_whole() -> None:
    image = torch.zeros(3, 2400, 240, dtype=torch.uint8)
    config = PROTOCOLS["iddc-sliding"].prediction
    requests = [Request(image, (2400, 240))]
    rows = [
        strip.shape[1]
        for _, strips in probability_strips(Patches(), requests, config, device=CPU)
        for strip in strips
    ]
    assert sum(rows) == 2400
    assert max(rows) <= 2**20 // (CLUSTERS * 240)
