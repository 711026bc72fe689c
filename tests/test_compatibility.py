"""What an older iddc wrote is read for ever; what a newer one wrote is refused with its version.

`fixtures/` says how the run of the first release was made. It is not made again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from iddc.backbones import load_backbone
from iddc.cli import main
from iddc.datasets.synthetic import write_scenes
from iddc.errors import DataError
from iddc.learning import learner
from iddc.pretraining import learner as pretrained
from iddc.runs import FORMAT_VERSION, Run
from iddc.segmenter import Segmenter
from tiny import write_photos

FIXTURES = Path(__file__).parent / "fixtures"
RUN, WEIGHTS, PHOTO, MASK = (
    FIXTURES / name for name in ("run-v1", "weights-v1", "photo.jpg", "mask-v1.png")
)
FOREIGN = {"coco.json"}
"""Formats of other programs, which have no place for our version."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


# What was interrupted -----------------------------------------------------------------------------

INTERRUPTED = {
    "stego": "baseline stego {photos} --out {out} --num-clusters 3 --backbone untrained:test_vit"
    " --stego.steps 4 --stego.batch-size 4",
    "contrast": "pretrain {photos} --out {out} --network test_resnet --steps 4 --batch-size 16"
    " --contrast.small-size 32 --contrast.large-size 64",
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_what_older_code_left_undone_is_refused_with_the_way_to_start_anew(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_photos(tmp_path / "photos", 16)
    words = INTERRUPTED[name].format(photos=tmp_path / "photos", out=tmp_path / "out").split()
    words += ["--device", "cpu", "--workers", "0"]

    def stopped(*_: object) -> None:
        raise DataError("The disk was taken out.")

    with monkeypatch.context() as patch:
        for kind in (learner.Learner, pretrained.Learner):
            patch.setattr(kind, "learn", stopped)
        assert main(words) == 3
    # As it was written before there was one loop.
    path = tmp_path / "out" / "checkpoint" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["learner"]
    torch.save(state | {"head": {}, "optimizer": {}}, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert main(words) == 3
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "by an older iddc" in said
    assert "Start it anew with --overwrite." in said
    assert path.read_bytes() == before


# The first release --------------------------------------------------------------------------------


def test_the_run_of_the_first_release_predicts_what_it_did() -> None:
    found = Segmenter.load(RUN, device="cpu").predict(PHOTO)
    with Image.open(MASK) as mask:
        expected = np.asarray(mask)
    # Sums in another order move a border by a pixel here and there.
    assert (found.classes == expected).mean() > 0.98
    assert len(np.unique(expected)) >= 3


def test_the_records_of_the_first_release_are_read() -> None:
    assert Run.open(RUN).experiment.num_clusters == 6
    (entry,) = Run.open(RUN).scores()
    assert 0 < entry["miou"] < 1
    names = Segmenter.load(RUN, device="cpu").labels.names
    assert names[:2] == ("sky", "road or pavement")


def test_the_configuration_of_the_first_release_gives_the_same_experiment_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", count=4, seed=0, size=(64, 64))
    argv = ["train", str(tmp_path / "scenes" / "train"), "--out", str(tmp_path / "again")]
    config = ["--config", str(RUN / "config.yaml"), "--print-config"]
    assert main([*argv, *config]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == Run.open(RUN).experiment.model_dump(
        mode="json", exclude={"options"}
    )


def test_the_backbone_of_the_first_release_embeds() -> None:
    found = load_backbone(str(WEIGHTS))(torch.zeros(1, 3, 64, 96))
    assert found.shape == (1, 64, 4, 6)
    assert found.isfinite().all()


def test_a_run_of_the_first_release_is_labelled_evaluated_and_predicted_with(
    run: Path, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "scenes", count=2, seed=0, size=(64, 64))
    assert main(["label", str(run), "--undo"]) == 0
    assert main(["evaluate", str(run), "--data", str(tmp_path / "scenes"), "--device", "cpu"]) == 0
    out = ["--out", str(tmp_path / "masks"), "--device", "cpu"]
    assert main(["predict", str(run), str(PHOTO), *out]) == 0


def test_the_fixtures_are_small() -> None:
    assert sum(path.stat().st_size for path in RUN.rglob("*")) < 1_000_000


# Versions in files --------------------------------------------------------------------------------


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands write: run, weights, masks, and `cut`, a run cut short."""
    folder = tmp_path_factory.mktemp("written")
    run, scenes = shutil.copytree(RUN, folder / "run"), folder / "scenes"
    write_scenes(scenes, count=20, seed=0, size=(64, 64))
    photos, device = str(scenes / "train" / "images"), ("--device", "cpu")
    short = "--contrast.small-size 32 --contrast.large-size 32 --contrast.recalibration-size 32 "
    short += "--contrast.recalibration-steps 1 --batch-size 16 --workers 0 --steps 1 --depth 0"
    backbone = ["pretrain", photos, "--out", str(folder / "weights"), *device, *short.split()]
    assert main([*backbone, "--network", "test_resnet", "--components", "8"]) == 0
    assert main(["label", str(run), "--set", "4=car"]) == 0
    assert main(["evaluate", str(run), "--data", str(scenes), *device]) == 0
    masks = ["--out", str(folder / "masks"), "--formats", "png", "coco", *device]
    assert main(["predict", str(run), photos, *masks, "--limit", "2"]) == 0
    training = ["train", photos, "--out", str(folder / "cut"), "--workers", "0", *device]
    training += ["--checkpoint-every", "1", "--config", str(run / "config.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iddc.learning.loop.save_model", stop)
        assert main([*training, "--backbone", str(WEIGHTS), "--epochs", "1"]) == 130
    return folder


def read(path: Path) -> Any:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())


def test_every_file_says_its_format_and_who_wrote_it(written: Path) -> None:
    kinds = {".json", ".yaml", ".pt"}
    found = [path for path in written.rglob("*") if path.suffix in kinds]
    files = {p.name: p for p in found if "parts" not in p.parts and p.name not in FOREIGN}
    assert files.keys() == {
        "backbone.json",
        "config.yaml",
        "labels.json",
        "model.json",
        "predictions.json",
        "scores.json",
        "state.pt",
        "versions.json",
    }
    for path in files.values():
        record = read(path)
        assert record["format_version"] == FORMAT_VERSION, path
        assert record["iddc"][0].isdigit(), path


def from_the_future(path: Path) -> None:
    record = read(path) | {"format_version": 99, "iddc": "9.7.1", "surprise": ["!"]}
    if path.suffix == ".pt":
        torch.save(record, path)
    else:
        path.write_text(json.dumps(record))  # JSON is YAML too


PREDICT = "predict {run} {photos} --out {masks} --limit 2 --formats png coco --device cpu"
READERS: dict[str, tuple[str, int]] = {
    "run/model.json": (PREDICT, 3),
    "run/labels.json": (PREDICT, 3),
    "run/scores.json": ("evaluate {run} --data {scenes} --device cpu", 3),
    "run/config.yaml": ("train {photos} --out {new} --config {run}/config.yaml", 2),
    "masks/predictions.json": (PREDICT, 2),
    "weights/backbone.json": ("train {photos} --out {new} --backbone {weights} --device cpu", 3),
    "cut/checkpoint/state.pt": ("train {photos} --out {cut} --config {cut}/config.yaml", 3),
    "cut/config.yaml": ("train {photos} --out {cut} --backbone {weights} --device cpu", 2),
}
"""Each file that is read again: a command that does so, and its exit code."""


def test_a_file_of_a_newer_iddc_is_refused_with_the_version_to_install(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: written / name for name in ("run", "masks", "weights", "cut", "scenes", "new")}
    places["photos"] = written / "scenes" / "train" / "images"
    for name, (words, code) in READERS.items():
        path = written / name
        before = path.read_bytes()
        from_the_future(path)
        changed = path.read_bytes()
        capsys.readouterr()
        assert main(words.format(**places).split()) == code, name
        said = capsys.readouterr().err.splitlines()[-1]
        assert str(path) in said
        assert "has format 99" in said
        assert "Install iddc 9.7.1 or newer." in said
        assert path.read_bytes() == changed
        path.write_bytes(before)
