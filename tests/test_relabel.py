"""A folder of masks after clusters were renamed: all of it is what a new prediction would write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddc import relabel as relabelling
from iddc.cli import main
from iddc.errors import ConfigError
from iddc.masks import FORMATS, Labels, edit_labels
from iddc.relabel import CLAIM, relabel
from tiny import tiny_segmenter

K = 4
EVERY = list(FORMATS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A model of K clusters that nobody named."""
    tiny_segmenter(K).save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/0.bmp", "1.png"):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / name)
    return folder


def predict(run: Path, photos: Path, out: Path, *formats: str) -> int:
    argv = ["predict", str(run), str(photos), "--out", str(out), "--device", "cpu"]
    return main([*argv, "--formats", *(formats or EVERY)])


def name(run: Path) -> None:
    """Name one cluster, merge two, ignore one."""
    names = {0: "tree", 1: "sky", 2: "sky", 3: "ignore"}
    edit_labels(run, K, lambda labels: labels.edit(names, {1: "#010203"}))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks a network for probabilities fails."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("iddc.network.Network.probs", fail)
    monkeypatch.setattr("iddc.segmenter.Segmenter.predict", fail)


@pytest.mark.parametrize("command", ["relabel", "predict"])
def test_after_a_renaming_every_file_is_what_a_new_prediction_writes(
    run: Path, photos: Path, tmp_path: Path, command: str, request: pytest.FixtureRequest
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    assert predict(run, photos, out) == 0
    before = tree(out)
    name(run)
    assert predict(run, photos, new) == 0
    request.getfixturevalue("no_network")
    assert (main(["relabel", str(out)]) if command == "relabel" else predict(run, photos, out)) == 0
    assert tree(out) == tree(new)
    assert tree(out) != before


def test_only_formats_that_are_there_are_written(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png", "csv") == 0
    names = tree(out).keys()
    name(run)
    assert main(["relabel", str(out)]) == 0
    assert tree(out).keys() == names
    assert (out / "classes.txt").read_text() == "tree\nsky\n"


def test_a_renaming_that_was_interrupted_is_ended_by_the_next_command(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    assert predict(run, photos, out, "png", "csv") == 0
    name(run)
    assert predict(run, photos, new, "png", "csv") == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(relabelling.Collection, "finish", stop)
        assert main(["relabel", str(out)]) == 130
    assert json.loads((out / CLAIM).read_text())["unfinished"]
    assert predict(run, photos, out, "png", "csv") == 0
    assert tree(out) == tree(new)


def test_masks_of_an_earlier_version_are_refused_with_what_differs(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png") == 0
    record = json.loads((out / CLAIM).read_text())
    old = {key: value for key, value in record.items() if key not in {"run", "labels"}}
    (out / CLAIM).write_text(json.dumps(old))
    assert predict(run, photos, out, "png") == 0  # the names are the same
    name(run)
    capsys.readouterr()
    assert predict(run, photos, out, "png") == 2
    said = capsys.readouterr().err
    assert "cluster 0 was unnamed, now 'tree'" in said
    assert "new folder" in said
    for words in ([], ["--run", str(run)]):
        assert main(["relabel", str(out), *words]) == 3
        assert "earlier version" in capsys.readouterr().err


def test_masks_of_a_version_without_an_option_are_refused_with_its_name(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png") == 0
    record = json.loads((out / CLAIM).read_text())
    del record["prediction"]["fit"]
    (out / CLAIM).write_text(json.dumps(record))
    assert predict(run, photos, out, "png") == 2
    assert "made by an earlier version of iddc, which had no fit." in capsys.readouterr().err


def test_masks_of_other_images_are_refused_with_what_differs(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png") == 0
    assert predict(run, photos / "a", out, "png") == 2
    assert f"of {photos}, now {photos / 'a'}" in capsys.readouterr().err
    argv = ["predict", str(run), str(photos), "--out", str(out), "--device", "cpu"]
    assert main([*argv, "--window", "32", "--overlap", "8"]) == 2
    assert "window was" in capsys.readouterr().err


def test_images_that_moved_can_be_named_and_missing_ones_change_nothing(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "overlay") == 0
    shutil.move(photos, tmp_path / "moved")
    before = tree(out)
    name(run)
    assert main(["relabel", str(out)]) == 3
    assert "--images" in capsys.readouterr().err
    assert tree(out) == before
    assert main(["relabel", str(out), "--images", str(tmp_path / "moved")]) == 0
    assert tree(out) != before


def test_a_folder_without_masks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["relabel", str(tmp_path)]) == 2
    assert "holds no masks of iddc" in capsys.readouterr().err


# Damage and other processes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", 3),
        ("run", "a\0b"),
        ("images", None),
        ("model", []),
        ("reading", 3),
        ("reading", {"pages": -5}),
        ("reading", {"nosuch": 1}),
        ("labels", 3),
        ("labels", {"id2label": 3}),
        ("labels", {"id2label": {"0": ["sky"]}}),
        ("labels", {"id2label": {"1": "sky"}}),
    ],
)
def test_a_claim_that_nobody_wrote_is_one_sentence_and_changes_no_mask(
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: object,
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png") == 0
    record = json.loads((out / CLAIM).read_text())
    (out / CLAIM).write_text(json.dumps({**record, field: value}))
    before = tree(out)
    capsys.readouterr()
    assert main(["relabel", str(out), "--run", str(run)]) == 2
    assert predict(run, photos, out, "png") == 2
    said = capsys.readouterr().err
    assert said.count(f"{CLAIM} is damaged. Use --out with a new folder.") == 2
    assert tree(out) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def too_many(path: Path) -> None:
    Image.fromarray(np.full((40, 48), K, np.uint8)).save(path)


def in_colour(path: Path) -> None:
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, too_many, in_colour, empty])
def test_clusters_that_nobody_predicted_are_one_sentence_with_the_file(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png", "npz") == 0
    damage(out / "parts/clusters/1.png")
    name(run)
    assert main(["relabel", str(out)]) == 3
    said = capsys.readouterr().err
    assert "parts/clusters/1.png" in said
    assert "Predict into a new folder" in said


def test_an_overlay_of_an_image_that_became_another_one_is_not_made(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "overlay") == 0
    Image.new("RGB", (48, 41)).save(photos / "1.png")
    name(run)
    assert main(["relabel", str(out)]) == 3
    assert "has 48 x 41 pixels, but its masks have 48 x 40" in capsys.readouterr().err


def test_of_two_processes_that_rename_the_same_masks_the_second_is_refused(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert predict(run, photos, out, "png") == 0
    refused = []
    finish = relabelling.Collection.finish

    def meanwhile(self: Any, files: Any) -> int:
        # A lock of a folder that is opened once more is that of another process to the system.
        with pytest.raises(ConfigError, match="Another process gives names"):
            relabel(out, Labels.numbered(K))
        refused.append(True)
        return finish(self, files)

    monkeypatch.setattr(relabelling.Collection, "finish", meanwhile)
    name(run)
    assert main(["relabel", str(out)]) == 0
    assert refused
    assert (out / "classes.txt").read_text() == "tree\nsky\n"
