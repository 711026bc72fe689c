"""A model sees new images as it saw those of its training, or it is said in what they differ."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as coco_mask

from iddc.cli import main
from iddc.config import Experiment, ReadingConfig
from iddc.datasets import open_dataset
from iddc.datasets.samples import find_samples
from iddc.errors import ConfigError
from iddc.evaluation import PROTOCOLS, evaluate
from iddc.images import ImageFile, find_images, fit_to_model, open_picture
from iddc.predicting import predict_collection
from iddc.progress import Progress
from iddc.relabel import _items, claim
from iddc.runs import Run
from iddc.segmenter import Segmenter
from tiny import photo, tiny_segmenter

K = 3
RNG = np.random.default_rng(0)


def files(folder: Path, **values: np.ndarray) -> list[ImageFile]:
    folder.mkdir(exist_ok=True)
    for name, numbers in values.items():
        tifffile.imwrite(folder / f"{name}.tif", numbers)
    return list(find_images(folder).files)


def of_16_bits(top: int) -> np.ndarray:
    return RNG.integers(0, top + 1, (40, 48)).astype(np.uint16)


TRAINED = ReadingConfig(measured={"uint16": (0.0, 4095.0)}, kinds=("uint16 grey",))


# New images and the range of the model


def test_images_of_another_kind_are_said_with_their_number(tmp_path: Path) -> None:
    Image.new("RGB", (48, 40), "red").save(tmp_path / "a.png")
    reading, notes = fit_to_model(find_images(tmp_path).files, TRAINED)
    assert notes == ("1 image is uint8 rgb (a.png); the model was trained on uint16 grey",)
    assert reading == TRAINED


@pytest.mark.parametrize(
    ("top", "unlike"), [(4095, False), (3000, False), (255, True), (60000, True)]
)
def test_values_that_do_not_fit_the_range_of_the_model_are_said(
    top: int, unlike: bool, tmp_path: Path
) -> None:
    reading, notes = fit_to_model(files(tmp_path, a=of_16_bits(top)), TRAINED)
    assert reading.measured == TRAINED.measured
    assert len(notes) == unlike
    if unlike:
        assert "the model shows 0..4095 of uint16 as 0..255, and these images have 0.." in notes[0]
        assert "--range auto" in notes[0]


def test_a_kind_of_values_that_the_model_does_not_know_gets_one_range_for_all(
    tmp_path: Path,
) -> None:
    trained = ReadingConfig(kinds=("uint8 rgb",))
    found = files(tmp_path, a=of_16_bits(1000), b=of_16_bits(4095))
    reading, notes = fit_to_model(found, trained)
    assert reading.measured == {"uint16": (0, 4095)}
    assert "2 images are uint16 grey (a.tif and 1 more)" in notes[0]
    assert notes[1] == "16-bit images: 0..4095 is shown as 0..255"


def test_marks_of_missing_data_are_found_in_new_images_too(tmp_path: Path) -> None:
    trained = ReadingConfig(measured={"int16": (0.0, 500.0)}, kinds=("int16 grey",))
    values = RNG.integers(0, 500, (40, 48)).astype(np.int16)
    values[:4] = -9999
    found = files(tmp_path, a=values)
    reading, notes = fit_to_model(found, trained)
    assert reading.marks == {"int16": (-9999.0,)}
    assert len(notes) == 1
    picture = open_picture(found[0], reading=reading)
    assert picture.valid is not None
    assert np.array_equal(~picture.valid, values == -9999)


# The options of predict and evaluate


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that was trained on the first of several pages of 12 bits in 16."""
    segmenter = tiny_segmenter(K)
    segmenter.experiment = segmenter.experiment.model_copy(update={"reading": TRAINED})
    segmenter.save(tmp_path / "model")
    return tmp_path / "model"


def predicted(model: Path, images: Path, out: Path, *options: str) -> dict[str, Any]:
    words = ["predict", str(model), str(images), "--out", str(out), "--device", "cpu"]
    assert main([*words, *options]) == 0
    record: dict[str, Any] = json.loads((out / "predictions.json").read_text())
    return record


def test_predict_reads_as_the_model_does_unless_it_is_told_otherwise(
    model: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    tifffile.imwrite(
        images / "a.tif", np.stack([of_16_bits(4095)] * 3), photometric="minisblack",
        metadata={"axes": "ZYX"},
    )  # fmt: skip
    own = predicted(model, images, tmp_path / "own")["reading"]
    assert (own["pages"], own["range"], own["measured"]) == ("first", "auto", {"uint16": [0, 4095]})
    assert [path.name for path in (tmp_path / "own/png").iterdir()] == ["a.png"]
    options = ["--pages", "1", "3", "--range", "0", "255", "--nodata", "7"]
    other = predicted(model, images, tmp_path / "other", *options)["reading"]
    assert (other["pages"], other["range"], other["nodata"]) == ([1, 3], [0, 255], 7)
    names = sorted(path.name for path in (tmp_path / "other/png").iterdir())
    assert names == ["a#0001.png", "a#0003.png"]
    anew = predicted(model, images, tmp_path / "anew", "--range", "auto")["reading"]
    assert anew["measured"]["uint16"] == [0, 4095]


def test_masks_of_another_reading_are_not_mixed_into_a_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path / "images", a=of_16_bits(4095))
    predicted(model, tmp_path / "images", tmp_path / "out")
    words = ["predict", str(model), str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu", "--range", "file"]) == 2
    assert "range was auto, now file" in capsys.readouterr().err


def test_bands_are_chosen_for_images_that_a_model_of_photos_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_segmenter(K).save(tmp_path / "model")
    bands = RNG.integers(0, 256, (5, 40, 48), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(
        tmp_path / "images/a.tif", bands, photometric="minisblack", planarconfig="separate"
    )
    words = ["predict", str(tmp_path / "model"), str(tmp_path / "images"), "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 3
    assert "5 bands of uint8, and does not say which are red" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "b"), "--bands", "3", "2", "1"]) == 0
    assert main([*words, "--out", str(tmp_path / "c"), "--bands", "3", "2"]) == 2
    assert "bands must be three, or one" in capsys.readouterr().err


# Masks that were read like photos


def test_a_run_remembers_that_it_read_masks_like_photos(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "masks").mkdir(parents=True)
    photo(0).save(images / "a.png")
    Image.new("L", (90, 80), 1).save(images / "masks/a.png")
    for given in (False, True):
        path = tmp_path / f"run-{given}"
        Run.start(path, Experiment(), source=str(images), include_masks=given).close()
        found, _ = find_samples(Run(path), None)
        assert len(found) == 1 + given


def test_a_run_is_resumed_with_the_same_masks_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Run.start(path, Experiment(), source="images") as run:
        run.checkpoint.write_bytes(b"state")
    Run.start(path, Experiment(), source="images").close()
    with pytest.raises(ConfigError, match="include-masks: False in the run"):
        Run.start(path, Experiment(), source="images", include_masks=True)


def test_a_folder_of_masks_says_whether_masks_were_read_like_photos(
    model: Path, tmp_path: Path
) -> None:
    segmenter = Segmenter.load(model, "cpu")
    claim(tmp_path / "out", model, tmp_path, segmenter, include_masks=True)
    claim(tmp_path / "out", model, tmp_path, segmenter, include_masks=True)
    with pytest.raises(ConfigError, match="other masks: with --include-masks"):
        claim(tmp_path / "out", model, tmp_path, segmenter)


def test_frames_of_a_video_are_found_again_by_their_numbers(tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(b"video")
    for kept in (["clip/frame_000000.png", "clip/frame_000012.png"], ["clip/000003.png"]):
        found = _items(source, [Path(name) for name in kept], ReadingConfig(), needs_images=False)
        assert [str(file.name) for file, _ in found] == kept


# Masks that somebody corrected


def corrected(folder: Path, form: str, change: np.ndarray) -> tuple[Path, np.ndarray]:
    """Give some pixels of class 0 to class 1 with another program; the file, and the true ids."""
    ids = np.asarray(Image.open(folder / "png/a.png")).copy()
    ids[change & (ids == 0)] = 1
    if form == "png":
        (folder / "data/images").mkdir(parents=True)
        (folder / "data/labels").mkdir()
        Image.fromarray(ids).save(folder / "data/labels/a.png")
        (folder / "data/classes.txt").write_bytes((folder / "classes.txt").read_bytes())
        (folder.parent / "images/a.png").rename(folder / "data/images/a.png")
        return folder / "data", ids
    if form == "coco":
        record = json.loads((folder / "coco.json").read_text())
        for one in record["annotations"]:
            region = np.asfortranarray(ids == one["category_id"] - 1).astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(region))
            one["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        (folder / "coco.json").write_text(json.dumps(record))
        return folder / "coco.json", ids
    colours = {}
    buffer = BytesIO()
    with zipfile.ZipFile(folder / "cvat.zip") as old, zipfile.ZipFile(buffer, "w") as new:
        for line in old.read("labelmap.txt").decode().splitlines():
            name, colour, *_ = line.split(":")
            if not line.startswith("#") and name != "background":
                colours[name] = [int(value) for value in colour.split(",")]
        table = np.array([*colours.values()], np.uint8)
        for name in old.namelist():
            data = old.read(name)
            if name.startswith("SegmentationClass/"):
                picture = BytesIO()
                Image.fromarray(table[ids]).save(picture, "PNG")
                data = picture.getvalue()
            new.writestr(name, data)
    (folder / "cvat.zip").write_bytes(buffer.getvalue())
    return folder / "cvat.zip", ids


@pytest.mark.parametrize("form", ["png", "coco", "cvat"])
def test_a_corrected_mask_is_scored_exactly(form: str, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    photo(3, (160, 120)).save(images / "a.png")
    tiny_segmenter(K).save(tmp_path / "model")
    segmenter = Segmenter.load(tmp_path / "model", "cpu")
    formats = [*dict.fromkeys(["png", form])]
    predict_collection(segmenter, images, out, formats, model=tmp_path / "model")
    before = np.asarray(Image.open(out / "png/a.png"))
    change = np.zeros((120, 160), bool)
    change[:9, :30] = True
    moved = int((change & (before == 0)).sum())
    data, ids = corrected(out, form, change)
    given = {} if form == "png" else {"images": images}
    dataset = open_dataset("folder", data, "val", **given)
    assert np.array_equal(dataset[0].label, ids)
    protocol = replace(
        PROTOCOLS["full"], prediction=segmenter.experiment.prediction, working_size="model"
    )
    found = evaluate(segmenter, dataset, protocol, progress=Progress())
    assert found.scores.accuracy == pytest.approx(1 - moved / ids.size, abs=1e-12)


def test_a_page_of_a_file_is_a_file_of_a_run(tmp_path: Path) -> None:
    values = np.stack([of_16_bits(255)] * 2)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", metadata={"axes": "ZYX"})
    run = Run(tmp_path / "run")
    found, why = find_samples(run, tmp_path / "a.tif", ReadingConfig(pages="all"))
    assert why == ""
    assert [file.name for file in found] == [
        PurePosixPath("a#0001.tif"),
        PurePosixPath("a#0002.tif"),
    ]
