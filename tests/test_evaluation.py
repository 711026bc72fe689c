"""Each protocol against a slow twin that goes pixel by pixel, and the masks that are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from iddc.cluster import Helpers
from iddc.config import Experiment, PredictionConfig, ProtocolName, TrainingConfig, ViewsConfig
from iddc.datasets import LabelledImages, Sample, open_dataset
from iddc.errors import DataError
from iddc.evaluation import BLACK, GREY, PROTOCOLS, EvalProtocol, _Count, _nearest, evaluate
from iddc.masks import palette
from iddc.metrics import IGNORE, UNMATCHED
from iddc.progress import Progress
from iddc.segmenter import Segmenter

PATCH = 16
SHORT_SIDE = 240
Ids = np.ndarray


class Textures:
    """Four clusters from each patch's colours; left and right count differently."""

    num_clusters = 4

    def probs(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        grid = [max(1, side // PATCH) for side in pixels.shape[-2:]]
        cells = torch.nn.functional.adaptive_avg_pool2d(pixels, grid)
        red, green, blue = cells.unbind(1)
        slope = torch.linspace(0, 0.05, grid[1]).expand_as(red)
        return torch.stack([red, green, blue, 0.45 + slope], dim=1).mul(30).softmax(1)


class Identity:
    """The cluster of a pixel is its red value; the grid is the image."""

    def __init__(self, num_clusters: int) -> None:
        self.num_clusters = num_clusters

    def probs(self, images: Tensor) -> Tensor:
        ids = images[:, 0].long().clamp(max=self.num_clusters - 1)
        return torch.nn.functional.one_hot(ids, self.num_clusters).permute(0, 3, 1, 2).float()


@dataclass
class Scenes:
    """A labelled data set in memory."""

    samples: list[Sample]
    num_classes: int = 3
    name: str = "scenes"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(f"class {index}" for index in range(self.num_classes))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def scene(width: int, height: int, seed: int) -> Sample:
    """Smooth blobs of colour; labels that follow them in part, with some ignored pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    label = np.asarray(image).argmax(2).astype(np.uint8)
    label[rng.random((height, width)) < 0.1] = 1
    label[: height // 5, : width // 7] = IGNORE
    return Sample(image, label, f"scene {seed}.jpg")


def coloured(ids: list[list[int]], label: list[list[int]], name: str = "a") -> Sample:
    """A tiny image whose red values are the clusters that Identity finds."""
    red = np.array(ids, np.uint8)
    image = Image.fromarray(np.stack([red, red, red], axis=2))
    return Sample(image, np.array(label, np.uint8), name)


def segmenter(predictor: Textures | Identity) -> Segmenter:
    return Segmenter.of(
        predictor,
        Experiment(
            views=ViewsConfig(short_side=SHORT_SIDE), training=TrainingConfig(precision="fp32")
        ),
    )


AS_IS = EvalProtocol(PredictionConfig(window=0, flip=False))


# The twins: numpy and loops; only Pillow's bilinear filter is shared with the code.


def slow_enlarge(grid: np.ndarray, height: int, width: int, *, corners: bool = False) -> np.ndarray:
    """Bilinear by pixel centres, or corner on corner: each output pixel mixes four cells."""

    def mixes(length: int, cells: int) -> np.ndarray:
        weights = np.zeros((length, cells))
        for i in range(length):
            position = max(0.0, (i + 0.5) * cells / length - 0.5)
            if corners:
                position = i * (cells - 1) / (length - 1)
            cell = int(position)
            weights[i, cell] += 1 - (position - cell)
            weights[i, min(cell + 1, cells - 1)] += position - cell
        return weights

    rows, columns = mixes(height, grid.shape[1]), mixes(width, grid.shape[2])
    return np.stack([rows @ channel @ columns.T for channel in grid])


def slow_grid(array: np.ndarray) -> np.ndarray:
    images = torch.tensor(np.ascontiguousarray(array)).permute(2, 0, 1)[None]
    return Textures().probs(images)[0].double().numpy()


def slow_probs(
    array: np.ndarray, *, flip: bool, corners: bool = False, logits: bool = True
) -> np.ndarray:
    """At the array's size, mirrored after enlarging; of logits the softmax comes last."""
    height, width = array.shape[:2]

    def enlarged(pixels: np.ndarray) -> np.ndarray:
        grid = np.log(slow_grid(pixels)) if logits else slow_grid(pixels)
        return slow_enlarge(grid, height, width, corners=corners)

    values = enlarged(array)
    if flip:
        values = (values + enlarged(array[:, ::-1])[:, :, ::-1]) / 2
    raised = np.exp(values) if logits else values
    return raised / raised.sum(0)


def slow_windows(array: np.ndarray, *, logits: bool = True) -> np.ndarray:
    """Windows of 224 with stride 149, the last at the border, on one canvas."""

    def starts(length: int) -> list[int]:
        found = [0]
        while found[-1] + 224 < length:
            found.append(min(found[-1] + 149, length - 224))
        return found

    height, width = array.shape[:2]
    canvas, count = np.zeros((4, height, width)), np.zeros((height, width))
    for y in starts(height):
        for x in starts(width):
            window = array[y : y + 224, x : x + 224]
            canvas[:, y : y + 224, x : x + 224] += slow_probs(window, flip=True, logits=logits)
            count[y : y + 224, x : x + 224] += 1
    return canvas / count


def slow_nearest(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel by pixel: the source pixel under the centre of each new one."""
    result = np.zeros((height, width, *ids.shape[2:]), ids.dtype)
    for y in range(height):
        for x in range(width):
            result[y, x] = ids[
                int((y + 0.5) * ids.shape[0] / height), int((x + 0.5) * ids.shape[1] / width)
            ]
    return result


def slow_square(ids: np.ndarray) -> np.ndarray:
    """To 320 x 320, pixel by pixel: the source pixel at floor(i m / 320), torch's rule."""
    height, width = ids.shape
    return np.array(
        [[ids[y * height // 320, x * width // 320] for x in range(320)] for y in range(320)]
    )


def at_least_224(image: Image.Image) -> Image.Image:
    width, height = image.size
    scale = 224 / min(width, height)
    if scale > 1:
        size = (round(width * scale), round(height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    return image


def slow_full(sample: Sample) -> tuple[Ids, Ids]:
    width, height = sample.image.size
    image, scale = sample.image, SHORT_SIDE / min(width, height)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    probs = slow_windows(np.asarray(at_least_224(image)), logits=False)
    return slow_enlarge(probs, height, width).argmax(0), sample.label


def slow_stego(sample: Sample) -> tuple[Ids, Ids]:
    width, height = sample.image.size
    if width < height:
        new_width, new_height = 320, int(320 * height / width)
    else:
        new_width, new_height = int(320 * width / height), 320
    top, left = round((new_height - 320) / 2), round((new_width - 320) / 2)
    image, label = (
        slow_nearest(array, new_height, new_width)[top : top + 320, left : left + 320]
        for array in (np.asarray(sample.image), sample.label)
    )
    return slow_probs(image, flip=True).argmax(0), label


def slow_sliding(sample: Sample) -> tuple[Ids, Ids]:
    clusters = slow_windows(np.asarray(at_least_224(sample.image))).argmax(0)
    return slow_square(clusters), slow_square(sample.label)


def slow_squash(sample: Sample, *, corners: bool = True) -> tuple[Ids, Ids]:
    image = sample.image.resize((320, 320), Image.Resampling.BILINEAR)
    clusters = slow_probs(np.asarray(image), flip=False, corners=corners).argmax(0)
    return clusters, slow_nearest(sample.label, 320, 320)


TWINS: dict[ProtocolName, Callable[[Sample], tuple[Ids, Ids]]] = {
    "full": slow_full,
    "stego-center-crop": slow_stego,
    "iddc-sliding": slow_sliding,
    "squash": slow_squash,
    "squash-centers": partial(slow_squash, corners=False),
}


def slow_counts(clusters: Ids, label: Ids) -> np.ndarray:
    counts = np.zeros((4, 3), int)
    for k, c in zip(clusters.ravel().tolist(), label.ravel().tolist(), strict=True):
        if c != IGNORE:
            counts[k, c] += 1
    return counts


def test_the_table_and_the_names_of_the_configuration_are_the_same() -> None:
    assert tuple(PROTOCOLS) == get_args(ProtocolName)
    assert tuple(TWINS) == get_args(ProtocolName)


@pytest.mark.parametrize("name", PROTOCOLS)
# Odd sizes: no pixel's centre falls between two others, where Pillow's rounding decides.
@pytest.mark.parametrize("size", [(151, 91), (251, 401), (471, 331)], ids=str)
def test_a_protocol_equals_its_slow_twin(name: ProtocolName, size: tuple[int, int]) -> None:
    sample = scene(*size, seed=size[0])
    found = evaluate(segmenter(Textures()), Scenes([sample]), PROTOCOLS[name]).confusion.counts
    clusters, label = TWINS[name](sample)
    expected = slow_counts(clusters, label)
    assert found.sum() == expected.sum()
    assert (expected.sum(1) > 0).sum() >= 3  # the example is no trivial one
    # Where two clusters tie, float32 may choose the other.
    assert np.abs(found - expected).sum() <= 4


def test_protocols_differ_on_the_same_images() -> None:
    scenes = Scenes([scene(470, 330, seed=1)])
    scores = {evaluate(segmenter(Textures()), scenes, p).scores for p in PROTOCOLS.values()}
    assert len(scores) == len(PROTOCOLS)


@pytest.mark.parametrize("size", [(2048, 1024), (1024, 1300), (640, 480), (481, 321)])
def test_the_centre_crop_is_that_of_torchvision(size: tuple[int, int]) -> None:
    # STEGO's transforms, of an image and a label that both say which column a pixel came from.
    columns = np.array(np.broadcast_to(np.arange(size[0]) % 251, size[::-1]), np.uint8)
    sample = Sample(Image.fromarray(columns).convert("RGB"), columns, "a")
    crop = v2.Compose([v2.Resize(320, Image.Resampling.NEAREST), v2.CenterCrop(320)])
    theirs = np.asarray(crop(Image.fromarray(columns)))

    class Looking(Identity):
        def probs(self, images: Tensor) -> Tensor:
            assert (images[0, 0].numpy() == theirs).all()
            return super().probs(images)

    protocol = replace(PROTOCOLS["stego-center-crop"], prediction=AS_IS.prediction)
    found = evaluate(segmenter(Looking(251)), Scenes([sample], num_classes=251), protocol)
    counts = np.bincount(theirs.ravel(), minlength=251)
    assert (found.confusion.counts == np.diag(counts)).all()


def test_matching_is_done_once_over_all_images() -> None:
    # Each image alone could be matched perfectly, the two together cannot: cluster 0 is class 0
    # in three pixels and class 1 in two.
    scenes = Scenes(
        [coloured([[0, 0, 0, 1]], [[0, 0, 0, 1]]), coloured([[0, 0, 1]], [[1, 1, 0]])],
        num_classes=2,
    )
    evaluation = evaluate(segmenter(Identity(2)), scenes, AS_IS)
    assert evaluation.confusion.counts.tolist() == [[3, 2], [1, 1]]
    assert evaluation.scores.accuracy == 4 / 7
    assert evaluation.num_images == 2


def test_more_clusters_than_classes_cost_accuracy() -> None:
    scenes = Scenes([coloured([[0, 0, 0, 1, 2]], [[0, 0, 0, 1, 1]])], num_classes=2)
    scores = evaluate(segmenter(Identity(3)), scenes, AS_IS).scores
    assert scores.accuracy == 4 / 5
    assert sorted(scores.matching) == [UNMATCHED, 0, 1]


def test_fewer_clusters_than_classes_leave_classes_without_hits() -> None:
    scenes = Scenes([coloured([[0, 0, 0, 1, 1]], [[0, 0, 2, 1, 1]])])
    scores = evaluate(segmenter(Identity(2)), scenes, AS_IS).scores
    assert scores.accuracy == 4 / 5
    assert scores.iou == (2 / 3, 1.0, 0.0)


def test_the_result_as_plain_values_is_json_with_class_names() -> None:
    scenes = Scenes([coloured([[0, 1, 2]], [[0, 1, 1]])])
    record = evaluate(segmenter(Identity(3)), scenes, AS_IS).as_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["images"] == 1
    assert set(record["iou"]) == {"class 0", "class 1", "class 2"}


def test_classes_without_a_pixel_are_warned_about_and_recorded() -> None:
    scenes = Scenes([coloured([[0, 1, 2]], [[0, 2, IGNORE]])])
    (sentence,) = evaluate(segmenter(Identity(3)), scenes, AS_IS).as_dict()["warnings"]
    assert sentence.startswith("1 of 3 classes have no pixel in these labels: class 1.")


def test_scores_on_a_single_class_say_that_they_say_little() -> None:
    scenes = Scenes([coloured([[0, 1]], [[2, 2]])])
    absent, single = evaluate(segmenter(Identity(3)), scenes, AS_IS).warnings
    assert "2 of 3 classes have no pixel" in absent
    assert "class 0, class 1" in absent
    assert "one class, class 2" in single


def test_labels_with_every_class_are_not_warned_about() -> None:
    scenes = Scenes([coloured([[0, 1, 2]], [[0, 1, 2]])])
    assert evaluate(segmenter(Identity(3)), scenes, AS_IS).warnings == ()


def test_a_label_out_of_range_is_a_data_error_that_names_the_image() -> None:
    scenes = Scenes([coloured([[0]], [[7]], name="street.jpg")])
    with pytest.raises(DataError, match=r"street\.jpg: .* value 7: expected classes 0 to 2"):
        evaluate(segmenter(Identity(3)), scenes, AS_IS)


@pytest.mark.parametrize("samples", [[], [coloured([[0, 0]], [[IGNORE, IGNORE]])]])
def test_without_a_labelled_pixel_there_is_no_score(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="No labelled pixel"):
        evaluate(segmenter(Identity(3)), Scenes(samples), AS_IS)


class ToHost(TorchFunctionMode):
    """Remembers the largest tensor that was copied to the host."""

    values = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__array__):
            self.values = max(self.values, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_pixels_are_counted_on_the_device_and_only_the_counts_leave_it(name: ProtocolName) -> None:
    with ToHost() as copied:
        evaluate(segmenter(Textures()), Scenes([scene(151, 91, seed=0)]), PROTOCOLS[name])
    assert copied.values == Textures.num_clusters * 256


@given(size=st.integers(1, 60), out=st.integers(1, 60))
def test_nearest_resizing_of_tensors_is_that_of_pillow(size: int, out: int) -> None:
    ids = np.arange(3 * size, dtype=np.int32).reshape(3, size)
    image = Image.fromarray(ids).resize((out, 2), Image.Resampling.NEAREST)
    assert (_nearest(torch.from_numpy(ids), (out, 2)).numpy() == np.asarray(image)).all()


def test_progress_counts_the_images() -> None:
    calls: list[object] = []

    class Recording(Progress):
        def begin(self, total: int, done: int = 0) -> None:
            calls.append(total)

        def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None:
            calls.append(text)

        def end(self) -> None:
            calls.append("end")

    scenes = Scenes([coloured([[0]], [[0]])] * 2)
    evaluate(segmenter(Identity(3)), scenes, AS_IS, progress=Recording())
    assert calls == [2, "image 1 of 2", "image 2 of 2", "end"]


def test_masks_show_image_truth_and_prediction_in_the_colours_of_the_matched_classes(
    tmp_path: Path,
) -> None:
    # Clusters 0 and 1 are classes 1 and 0, cluster 2 (one pixel) is left over.
    sample = coloured([[0, 0, 0], [1, 1, 2]], [[1, 1, IGNORE], [0, 0, 1]], name="in/a.jpg")
    scenes = Scenes([sample], num_classes=2)
    evaluation = evaluate(segmenter(Identity(3)), scenes, AS_IS, save_masks=tmp_path / "out")
    assert evaluation.scores.matching == (1, 0, UNMATCHED)

    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written == [tmp_path / "out" / "in" / "a.png"]
    with Image.open(written[0]) as image:
        panels = np.asarray(image)
    first, second = (tuple(colour) for colour in palette(2).tolist())
    truth, prediction = panels[:, 3:6].tolist(), panels[:, 6:].tolist()
    assert panels[:, :3].tolist() == np.asarray(sample.image).tolist()
    assert [[tuple(p) for p in row] for row in truth] == [
        [second, second, BLACK],
        [first, first, second],
    ]
    assert [[tuple(p) for p in row] for row in prediction] == [
        [second, second, second],
        [first, first, GREY],
    ]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_masks_have_the_size_at_which_a_protocol_scores(name: ProtocolName, tmp_path: Path) -> None:
    scenes = Scenes([scene(150, 90, seed=0)])
    plain = evaluate(segmenter(Textures()), scenes, PROTOCOLS[name])
    saving = evaluate(segmenter(Textures()), scenes, PROTOCOLS[name], save_masks=tmp_path)
    assert saving.scores == plain.scores
    assert [path.name for path in tmp_path.iterdir()] == ["scene 0.png"]
    with Image.open(tmp_path / "scene 0.png") as image:
        assert image.size == ((450, 90) if name == "full" else (960, 320))


def test_other_processes_count_what_this_one_counts_in_whatever_order() -> None:
    model = segmenter(Identity(3))
    scenes = Scenes([coloured([[i % 3, 2]], [[i % 2, 1]], f"{i}.png") for i in range(5)])

    class Backwards(Helpers[Segmenter]):
        """Two images at a time, the last ones first."""

        def spread(self, work: Any, items: Any, size: int) -> Iterator[Any]:
            assert size > 0
            for some in ([3, 4], [1, 2], [0]):
                yield some, work(model, [items[index] for index in some])

    backwards, count = Backwards("", lambda: model), _Count(scenes, AS_IS, trimap=False)
    found = [one.counts.tolist() for one, _ in count.elsewhere(backwards)]
    assert found == [one.counts.tolist() for one, _ in count.each(model, range(5))]
    assert len(found) == 5
    expected = evaluate(model, scenes, AS_IS).as_dict()
    elsewhere = evaluate(model, scenes, AS_IS, helpers=backwards)
    assert elsewhere.as_dict() == expected


def test_a_folder_data_set_is_evaluated_as_it_is_on_disk(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    sample = scene(100, 60, seed=5)
    sample.image.save(tmp_path / "images" / "a.png")
    Image.fromarray(sample.label).save(tmp_path / "labels" / "a.png")
    folder: LabelledImages = open_dataset("folder", tmp_path, "val")
    on_disk = evaluate(segmenter(Textures()), folder, PROTOCOLS["full"])
    in_memory = evaluate(segmenter(Textures()), Scenes([sample]), PROTOCOLS["full"])
    assert (on_disk.confusion.counts == in_memory.confusion.counts).all()
