"""Fig. 2: what affinities say, with labels and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddc import analysis
from iddc.analysis import IMAGES, analyze, draw
from iddc.cli import main
from iddc.config import Experiment, Runtime
from iddc.datasets import open_dataset
from iddc.datasets.synthetic import write_scenes
from iddc.errors import DataError
from iddc.images import Picture, find_images
from iddc.recipes import RECIPES

QUIET = Runtime(device="cpu", workers=0)


def experiment() -> Experiment:
    return (
        RECIPES["folder"]
        .experiment()
        .model_copy(update={"num_clusters": 4, "backbone": "untrained:test_vit"})
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, 10, 0)
    return root


def test_labels_change_nothing_about_the_estimate(scenes: Path, tmp_path: Path) -> None:
    files = find_images(scenes / "train").files
    labelled = open_dataset("folder", scenes, "val")
    alone = analyze(files, experiment(), tmp_path / "a", QUIET)
    beside = analyze(files, experiment(), tmp_path / "b", QUIET, labelled=labelled)
    assert alone.threshold == beside.threshold
    assert np.array_equal(alone.clusters.same, beside.clusters.same)
    assert alone.classes is None
    assert beside.classes is not None
    record = json.loads((tmp_path / "b" / "affinities.json").read_text())
    assert record["labelled_crossing"] == beside.crossing
    assert sum(record["classes"]["same"]) * 2 / record["bins"] == pytest.approx(1)


def test_classes_are_those_at_the_centres_of_patches(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each class has a colour of its own, pairs of one class are more alike."""
    root = tmp_path / "flat"
    for kind in ("images", "labels"):
        (root / "val" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(3):
        label = rng.integers(0, 2, (4, 6), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
        colours = np.array([[200, 40, 40], [30, 60, 220]], np.uint8)
        Image.fromarray(colours[label]).save(root / f"val/images/{index}.png")
        Image.fromarray(label).save(root / f"val/labels/{index}.png")
    labelled = open_dataset("folder", root, "val")
    files = find_images(root / "val" / "images").files
    two = experiment().model_copy(update={"num_clusters": 2})
    found = analyze(files, two, tmp_path / "out", QUIET, labelled=labelled)
    assert found.classes is not None
    centres = np.arange(len(found.classes.same))
    same, different = (
        (pairs * centres).sum() / pairs.sum()
        for pairs in (found.classes.same, found.classes.different)
    )
    assert same > different + 5  # of 100 steps


def test_a_patch_has_the_class_of_the_pixel_at_its_centre(tmp_path: Path) -> None:
    """Only those pixels have one: from any other, nothing would be left to compare."""
    for kind in ("images", "labels"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        label = np.full((64, 96), 255, np.uint8)
        label[8::16, 8::16] = rng.integers(0, 3, (4, 6))
        Image.fromarray(pixels).save(tmp_path / f"val/images/{index}.png")
        Image.fromarray(label).save(tmp_path / f"val/labels/{index}.png")
    labelled = open_dataset("folder", tmp_path, "val")
    files = find_images(tmp_path / "val" / "images").files
    found = analyze(files, experiment(), tmp_path / "new" / "out", QUIET, labelled=labelled)
    assert found.classes is not None


def test_no_more_images_are_opened_than_it_says(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list(find_images(scenes / "train").files) * 20
    opened = []
    real = analysis.open_picture

    def open_picture(*args: Any, **options: Any) -> Picture:
        opened.append(args)
        return real(*args, **options)

    monkeypatch.setattr(analysis, "open_picture", open_picture)
    analyze(files, experiment(), tmp_path, QUIET)
    assert len(opened) == IMAGES


def test_without_any_readable_image_it_is_a_data_error(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="No image can be read"):
        analyze(find_images(tmp_path).files, experiment(), tmp_path / "out", QUIET)


def test_a_picture_is_drawn_where_matplotlib_is(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    labelled = open_dataset("folder", scenes, "val")
    files = find_images(scenes / "train").files
    found = analyze(files, experiment(), tmp_path, QUIET, labelled=labelled)
    assert draw(found, tmp_path / "affinities.png")
    with Image.open(tmp_path / "affinities.png") as image:
        assert image.width > image.height


def test_the_command_prints_the_estimate_and_what_to_do_with_it(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["analyze", str(scenes / "train"), "--data", str(scenes), "--num-clusters", "4"]
    command += ["--backbone", "untrained:test_vit", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "out" / "affinities.json").read_text())
    assert f"t+ = t- = {record['threshold']:.2f}" in lines[0]
    assert (
        f"--objective.affinity cosine --objective.positive-threshold {record['threshold']}"
        in (lines[-1])
    )
    assert f"{scenes / 'train'} --num-clusters 4 --backbone untrained:test_vit" in lines[-1]
    assert main([*command, "--out", str(tmp_path / "row"), "--recipe", "cityscapes-vits8"]) == 0
    assert "--recipe cityscapes-vits8 --num-clusters 4" in capsys.readouterr().out
    config = tmp_path / "out.yaml"
    config.write_text("recipe: folder\n")
    assert main([*command, "--out", str(tmp_path / "own"), "--config", str(config)]) == 0
    assert f"--config {config} --num-clusters 4" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == record["threshold"]
