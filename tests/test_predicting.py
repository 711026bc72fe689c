"""`iddc predict` over a collection: formats, shards, kills, full disks, hostile names."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from iddc.cli import main
from iddc.cli.predict import MaskFormat
from iddc.config import Experiment
from iddc.errors import DataError
from iddc.images import find_images, survey
from iddc.masks import FORMATS, Collection, Labels, collection, edit_labels
from iddc.predicting import predict_collection
from iddc.rasters import SUFFIXES
from iddc.relabel import CLAIM, claim
from iddc.runs import Run
from iddc.runs import files as run_files
from iddc.segmenter import Segmenter
from tiny import tiny_segmenter

K = 4
EVERY = list(FORMATS)
HTML = "<b>\"&'</b>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of K clusters: cluster 0 has a hostile name, 3 never wins."""
    segmenter = tiny_segmenter(K)
    head: Any = segmenter.network.head
    with torch.no_grad():
        head.bias[:] = torch.tensor([0.0, 0.0, 0.0, -1e4])
        head.weight *= 50
    folder = tmp_path_factory.mktemp("run")
    segmenter.save(folder)
    edit_labels(folder, K, lambda labels: labels.edit({0: HTML, 3: "never seen"}))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, two of one stem, in folders; one is cut short, one is empty."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a <b>").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a <b>/0.png", "a <b>/0.bmp", "1.png", "2.png", "3.png", "cut.png"):
        pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
        pixels[:20] //= 8
        Image.fromarray(pixels).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("form", ["cvat", "coco", "coco-polygons", "png"])
def test_names_that_cvat_cannot_tell_apart_or_list_are_said(tmp_path: Path, form: str) -> None:
    for name in ("a.jpg", "a.png", "b.png", "#7.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    classes = Labels.numbered(2).classes
    collection = Collection(tmp_path, tmp_path / "out", [form], classes)
    said = collection.remarks(find_images(tmp_path).files)
    if form == "png":
        assert not said
        return
    assert any("a.jpg, a.png" in sentence and "b.png" not in sentence for sentence in said)
    assert any("#7.png" in s and "%237" in s for s in said) == (form == "cvat")


class Zero:
    """Two clusters, of which the first is everywhere."""

    num_clusters = 2

    def probs(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.ones(len(images), 2, 2), torch.zeros(len(images), 2, 2)], dim=1)


def predict(model: Path, photos: Path, out: Path, *options: str) -> int:
    formats = () if "--formats" in options else ("--formats", *EVERY)
    share = () if "--max-unreadable" in options else ("--max-unreadable", "0.9")
    argv = ["predict", str(model), str(photos), "--out", str(out), "--device", "cpu"]
    return main([*argv, *share, *formats, *options])


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def done(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format of every image, by one process."""
    out = tmp_path_factory.mktemp("done")
    assert predict(model, photos, out) == 0
    return out


def test_the_command_line_knows_every_format() -> None:
    assert set(get_args(MaskFormat)) == {*FORMATS, *SUFFIXES}


def test_a_format_whose_package_is_missing_names_the_extra_before_anything_is_written(
    model: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "contourpy", None)
    assert predict(model, photos, tmp_path / "out", "--formats", "png", "yolo") == 4
    said = capsys.readouterr().err
    assert "--formats yolo needs contourpy" in said
    assert "pip install 'iddc[formats]'" in said
    assert not (tmp_path / "out").exists()


def test_every_format_leaves_what_it_promises_and_nothing_unfinished(done: Path) -> None:
    names = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    stems = ["1", "2", "3", "a <b>/0_bmp", "a <b>/0_png"]
    kinds = ("png", "palette", "overlay", "parts/clusters")
    expected = {f"{kind}/{s}.png" for kind in kinds for s in stems}
    expected |= {f"npz/{s}.npz" for s in stems}
    kinds = ("coco", "coco-polygons", "labelstudio")
    expected |= {f"parts/{kind}/{s}.json" for kind in (*kinds, "csv") for s in stems}
    expected |= {f"labelme/{s}.json" for s in stems} | {f"yolo/labels/{s}.txt" for s in stems}
    expected |= {"shares.csv", "shares-by-folder.csv", "yolo/data.yaml"}
    classes = ("SegmentationClass", "SegmentationObject")
    expected |= {f"parts/cvat/{kind}/{s}.png" for kind in classes for s in stems}
    expected |= {"parts/skipped/cut.txt", "parts/skipped/empty.txt"}
    expected |= {f"{kind}.json" for kind in kinds} | {"labelstudio.xml", "cvat.zip"}
    expected |= {"cvat-labels.json", "classes.txt", "legend.svg", "skipped.csv", "predictions.json"}
    assert names == expected


def test_formats_name_images_by_the_paths_they_have(done: Path, photos: Path) -> None:
    files = ["1.png", "2.png", "3.png", "a <b>/0.bmp", "a <b>/0.png"]
    images = json.loads((done / "coco.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in images] == list(enumerate(files, 1))
    tasks = json.loads((done / "labelstudio.json").read_text())
    assert tasks[3]["data"]["image"] == f"/data/local-files/?d={photos.name}/a%20%3Cb%3E/0.bmp"
    with zipfile.ZipFile(done / "cvat.zip") as archive:
        listed = archive.read("ImageSets/Segmentation/default.txt").decode().splitlines()
    assert listed == ["1", "2", "3", "a <b>/0_bmp", "a <b>/0_png"]


def test_images_are_served_from_the_folder_around_theirs(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep/er/list.txt").write_text(f"{photos / '1.png'}\n")
    (tmp_path / "set" / "images").mkdir(parents=True)
    shutil.copy(photos / "1.png", tmp_path / "set" / "images")
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "set")
    beside = shutil.copy(photos / "1.png", tmp_path)
    expected = {
        photos: f"{photos.name}/1.png",
        tmp_path / "set": "set/images/1.png",
        Path(archive): "zipped/images/1.png",
        tmp_path / "deep/er/list.txt": str(photos / "1.png")[1:],
        Path(beside): f"{tmp_path.name}/1.png",
    }
    for source, served in expected.items():
        masks = Collection(source, tmp_path / "out", ["labelstudio"], Labels.numbered(2).classes)
        file = find_images(source).files[0]
        masks.add(file, Segmenter.of(Zero(), Experiment()).predict(Image.new("RGB", (8, 8))))
        task = json.loads((tmp_path / "out/parts/labelstudio/1.json").read_text())
        assert task["data"]["image"] == f"/data/local-files/?d={quote(served)}"


def test_all_formats_name_the_classes_and_hold_one_mask(done: Path) -> None:
    names = [HTML, "cluster 1", "cluster 2", "never seen"]
    assert (done / "classes.txt").read_text().splitlines() == names
    legend = ElementTree.parse(done / "legend.svg").getroot()
    texts = ["".join(text.itertext()) for text in legend.iterfind("{*}text")]
    assert texts == [f"{index} · {name}" for index, name in enumerate(names)]
    colours = [patch.get("fill") for patch in legend.iterfind("{*}rect")][1:]
    shown = Image.open(done / "palette/1.png").getpalette()
    assert shown is not None
    assert colours == [f"#{bytes(shown[3 * i : 3 * i + 3]).hex()}" for i in range(4)]
    record = json.loads((done / "coco.json").read_text())
    assert [category["name"] for category in record["categories"]] == names
    ids = np.asarray(Image.open(done / "png/1.png"))
    assert len(np.unique(ids)) > 1
    assert ids.max() < 3  # the last never occurs
    assert (np.asarray(Image.open(done / "palette/1.png")) == ids).all()
    with np.load(done / "npz/1.npz") as file:
        assert (file["clusters"] == ids).all()
        assert file["probs"].shape == (K, *ids.shape)
    found = [a for a in record["annotations"] if a["image_id"] == 1]
    areas = {a["category_id"] - 1: a["area"] for a in found}
    assert areas == {index: (ids == index).sum() for index in np.unique(ids)}
    with Image.open(done / "parts/cvat/SegmentationClass/1.png") as mask:
        assert (np.asarray(mask) == ids + 1).all()


def test_images_that_cannot_be_read_are_listed_in_order(done: Path) -> None:
    with (done / "skipped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["cut.png", "empty.png"]
    assert rows[1]["reason"] == "the file is empty"


def killed(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, calls: int) -> None:
    """Let the process die at a call of a function of ours."""
    real, count = getattr(where, name), 0

    def die(*args: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(where, name, die)


KILLS: dict[str, tuple[Any, str, int]] = {
    "before the second image": (Collection, "add", 1),
    "between the files of an image": (collection, "write_file", 6),
}


def test_an_image_that_lacks_one_of_its_two_files_for_cvat_is_done_again(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert predict(model, photos, out, "--formats", "cvat") == 0
    before = tree(out)
    lost = sorted((out / "parts/cvat/SegmentationObject").rglob("*.png"))[0]
    lost.unlink()
    assert predict(model, photos, out, "--formats", "cvat") == 0
    assert tree(out) == before


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.parametrize(("where", "name", "calls"), KILLS.values(), ids=KILLS)
def test_two_shards_killed_and_given_again_leave_the_files_of_one_run(
    where: Any, name: str, calls: int, order: tuple[int, int], model: Path, photos: Path,
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    for shard in order:
        with monkeypatch.context() as patch:
            killed(patch, where, name, calls)
            assert predict(model, photos, out, "--shard", f"{shard}/2") == 130
    assert not (out / "coco.json").exists()
    assert predict(model, photos, out, "--shard", f"{order[0]}/2") == 0
    assert "images are missing" in capsys.readouterr().out
    assert not (out / "coco.json").exists()
    assert predict(model, photos, out, "--shard", f"{order[1]}/2") == 0
    assert str(out / "coco.json") in capsys.readouterr().out
    assert tree(out) == tree(done)


@pytest.mark.parametrize("whole", ["coco.json", "cvat.zip", "labelstudio.json"])
def test_a_kill_while_a_whole_file_is_written_leaves_none_of_it_and_costs_no_mask(
    whole: str, model: Path, photos: Path, done: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = Path(shutil.copytree(done, tmp_path / "out"))
    (out / whole).unlink()
    real = run_files.os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name == whole:
            raise KeyboardInterrupt
        real(source, target)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an image is segmented again")

    monkeypatch.setattr(Segmenter, "probs", never)
    with monkeypatch.context() as patch:
        patch.setattr(run_files.os, "replace", die)
        assert predict(model, photos, out) == 130
    assert tree(out).keys() == tree(done).keys() - {whole}
    assert predict(model, photos, out) == 0
    assert tree(out) == tree(done)


def test_a_disk_that_fills_up_is_exit_4_and_the_command_goes_on_where_it_was(
    model: Path, photos: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, calls = tmp_path / "out", 0
    real = run_files.os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(run_files.os, "fsync", full)
        assert predict(model, photos, out) == 4
    assert "the disk is full" in capsys.readouterr().err
    assert not list(out.rglob(".iddc-*"))
    assert predict(model, photos, out) == 0
    assert tree(out) == tree(done)


def test_more_shards_than_images_do_one_image_each_or_nothing(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    for shard in range(1, 10):
        options = ("--shard", f"{shard}/9", "--formats", "png")
        assert predict(model, photos, tmp_path, *options) == 0
    assert len(list((tmp_path / "png").rglob("*.png"))) == 5


def test_unreadable_images_are_a_share_of_all_images_not_of_a_shard(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def codes(share: str) -> list[int]:
        out, options = tmp_path / share, ("--formats", "coco", "--max-unreadable", share)
        return [
            predict(model, photos, out, *options, "--shard", f"{shard}/7") for shard in range(1, 8)
        ]

    assert codes("0.3") == [0] * 7  # 2 of 7
    assert codes("0.2") == [0] * 6 + [3]  # the last one sees that there are too many
    assert "2 of 7 images cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "0.2" / "coco.json").exists()
    assert codes("0.1") == [0] * 5 + [3, 3]


def test_a_twentieth_of_the_images_may_be_unreadable_unless_another_share_is_given(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(19):
        Image.new("RGB", (40, 40), (9 * index, 0, 0)).save(tmp_path / f"images/{index}.png")
    (tmp_path / "images/bad.png").write_bytes(b"")
    segmenter, arguments = Segmenter.load(model, "cpu"), (tmp_path / "images", tmp_path / "out")
    found = predict_collection(segmenter, *arguments, ["png"], model=model)
    assert (found.done, found.skipped) == (19, 1)
    (tmp_path / "images/0.png").unlink()  # 1 of 19 is more
    with pytest.raises(DataError, match="1 of 19 images cannot be read"):
        predict_collection(segmenter, *arguments, ["png"], model=model)


def test_as_many_damaged_images_as_are_allowed_cost_no_other_mask(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):  # the first two are cut after their headers
        shutil.copy(photos / ("cut.png" if number < 2 else "1.png"), images / f"{number}.png")
    options = ("--formats", "png", "--max-unreadable")
    assert predict(model, images, tmp_path / "out", *options, "0.25") == 0
    assert len(list((tmp_path / "out/png").iterdir())) == 6
    assert predict(model, images, tmp_path / "less", *options, "0.24") == 3


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "", "1/2/3"])
def test_a_shard_that_is_none_is_exit_2(
    shard: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model, photos, tmp_path / "out", f"--shard={shard}") == 2
    assert "expected I/N with I from 1 to N" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shard_that_starts_while_another_writes_its_note_is_not_refused(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / ".iddc-0123456789abcdef.tmp").write_text("{")
    assert predict(model, photos, tmp_path, "--formats", "png", "--limit", "1") == 0


def test_a_shard_that_writes_its_note_and_masks_while_another_looks_is_not_foreign(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, exists = Segmenter.load(model, "cpu"), Path.exists
    claim(tmp_path / "other", model, photos, segmenter)
    note = (tmp_path / "other" / CLAIM).read_bytes()
    out = tmp_path / "out"
    meanwhile = [True]

    def late(path: Path) -> bool:
        """Asked before the other shard has written, as it does right after."""
        there = exists(path)
        if path == out / CLAIM and meanwhile:
            meanwhile.clear()
            (out / CLAIM).write_bytes(note)
            (out / "png").mkdir()
        return there

    monkeypatch.setattr(Path, "exists", late)
    claim(out, model, photos, segmenter)
    assert (out / CLAIM).read_bytes() == note


def test_a_shard_sees_what_another_left_out_while_it_wrote(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = Collection(photos, tmp_path, ["png"], Segmenter.load(model, "cpu").labels.classes)
    files = find_images(photos).files
    real = Run.write_skipped
    meanwhile: list[Callable[[], None]] = [lambda: masks.mark_skipped(files[0], "late")]

    def write(run: Run, rows: Any) -> None:
        real(run, rows)
        if meanwhile:
            meanwhile.pop()()

    monkeypatch.setattr(Run, "write_skipped", write)
    masks.mark_skipped(files[1], "early")
    masks.write_skipped(files)
    assert (tmp_path / "skipped.csv").read_text().split() == [
        "name,reason", f"{files[0].name},late", f"{files[1].name},early",
    ]  # fmt: skip


def test_an_image_that_is_repaired_is_left_out_no_more(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(photos, tmp_path / "images"))
    assert predict(model, images, tmp_path / "out", "--formats", "coco") == 0
    for name in ("cut.png", "empty.png"):
        shutil.copy(images / "1.png", images / name)
    assert predict(model, images, tmp_path / "out", "--formats", "coco") == 0
    assert (tmp_path / "out/skipped.csv").read_text().split() == ["name,reason"]
    assert len(json.loads((tmp_path / "out/coco.json").read_text())["images"]) == 7


def test_only_headers_of_images_without_masks_are_read_again(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = Path(shutil.copytree(photos, tmp_path / "images")), tmp_path / "out"
    for name in ("cut.png", "empty.png"):
        (images / name).unlink()
    assert predict(model, images, out, "--formats", "png") == 0
    (out / "png/2.png").unlink()
    read: list[str] = []

    def noted(files: Any, reading: Any) -> Any:
        read.extend(str(file.name) for file in files)
        return survey(files, reading)

    monkeypatch.setattr("iddc.predicting.survey", noted)
    assert predict(model, images, out, "--formats", "png") == 0
    assert read == ["2.png"]
    assert (out / "png/2.png").exists()


def test_masks_with_other_names_are_not_mixed(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(model, tmp_path / "run"))
    options = ("--limit", "1", "--formats", "png")
    assert predict(run, photos, tmp_path / "out", *options) == 0
    edit_labels(run, K, lambda labels: labels.edit({1: "sky"}))
    assert predict(run, photos, tmp_path / "out", *options) == 0
    assert "cluster 1 was unnamed, now 'sky'" in capsys.readouterr().err
    edit_labels(run, K, lambda labels: labels.undo())
    assert predict(run, photos, tmp_path / "out", *options) == 0


def test_a_format_that_cannot_hold_the_classes_is_refused_before_anything_is_written(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(model, tmp_path / "run"))
    edit_labels(run, K, lambda labels: labels.edit(colours={0: "#000000"}))
    assert predict(run, photos, tmp_path / "out") == 2
    assert "CVAT tells classes by their colours" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
