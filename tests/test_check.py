from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddc.cli import main
from iddc.cli.check import training_minutes
from iddc.config import Affinity, Experiment, ObjectiveConfig, TrainingConfig, ViewsConfig

RNG = np.random.default_rng(0)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two photos, a copy of one, a 12-bit image of 9000 x 1 pixels, a page and no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(RNG.integers(0, 256, (8, 9, 3), np.uint8)).save(folder / name)
    shutil.copy(folder / "a.png", folder / "copy.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16)[None]).save(folder / "deep.tif")
    pages = [Image.new("L", (4, 4), shade) for shade in (1, 2, 3)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def checked(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main(["check", *argv, "--json"])
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return code, found


def test_everything_is_counted(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked([str(mixed), "--max-unreadable", "0.2"], capsys)
    assert code == 0
    assert found["images"] == 5
    assert found["format"] == {"PNG": 3, "TIFF": 2}
    assert found["size"] == {"9 x 8": 3, "4096 x 1": 1, "4 x 4": 1}
    assert found["values"] == {"uint8": 4, "uint16": 1}
    assert found["pages"] == {"1": 4, "3": 1}
    assert found["copies"] == [["a.png", "copy.png"]]
    assert [*found["unreadable"]] == [str(mixed / "broken.jpg")]
    assert found["reading"]["measured"] == {"uint16": [0.0, 4095.0]}
    assert "16-bit images: 0..4095 is shown as 0..255" in found["notes"]
    assert any("have 3 pages, of which the first is read" in note for note in found["notes"])


def test_pages_are_images_when_they_are_asked_for(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = checked([str(mixed), "--pages", "all"], capsys)
    assert found["images"] == 7


def test_too_many_unreadable_images_are_exit_3(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(mixed)]) == 3
    out = capsys.readouterr()
    assert "unreadable: " in out.out
    assert "5 images can be read, 1 cannot" in out.out
    assert "the same bytes: a.png, copy.png" in out.out
    assert "--max-unreadable" in out.err


def test_one_image_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert checked([str(tmp_path)], capsys)[0] == 3


def test_no_network_is_loaded_and_nothing_is_written(
    mixed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from iddc.cli import main; main(['check', sys.argv[1]]); "
        "sys.exit('torch' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(mixed)], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.model_copy(update={"backbone": "dino-vitb8"}),
        lambda e: e.model_copy(
            update={"training": e.training.model_copy(update={"heads": 8, "min_steps": 2000})}
        ),
    ],
)
def test_more_work_takes_more_time(change: Callable[[Experiment], Experiment]) -> None:
    usual = Experiment()
    assert training_minutes(change(usual), 300, 0.01) > training_minutes(usual, 300, 0.01)


def test_the_consensus_looks_at_each_image_once_and_at_600_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("iddc.cli.check._gflops", lambda: 100.0)
    usual = Experiment(method="consensus")

    def decoding(images: int) -> float:
        return training_minutes(usual, images, 1.0) - training_minutes(usual, images, 0.0)

    assert decoding(300) == pytest.approx(300 / 60)
    assert decoding(5000) == pytest.approx(600 / 60)
    better = usual.model_copy(update={"backbone": "dino-vitb8"})
    assert training_minutes(better, 300, 0.01) > training_minutes(usual, 300, 0.01)


def test_decoding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.cli.check._gflops", lambda: 100.0)
    usual = Experiment(epochs=2)
    more = training_minutes(usual, 300, 1.0) - training_minutes(usual, 300, 0.0)
    assert more == pytest.approx(2 * 300 / 60)


def test_iddc_that_starts_at_the_consensus_looks_at_whole_images_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("iddc.cli.check._gflops", lambda: 100.0)
    random = Experiment(epochs=2)
    started = Experiment(epochs=2, training=TrainingConfig(start="consensus"))
    first = Experiment(method="consensus")
    for images in (300, 5000):
        alone = training_minutes(first, images, 1.0)
        assert training_minutes(started, images, 1.0) == pytest.approx(
            training_minutes(random, images, 1.0) + alone
        )


def test_codes_of_six_groupings_are_compared_in_the_place_of_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("iddc.cli.check._gflops", lambda: 100.0)

    def learning(clusters: int, affinity: Affinity) -> float:
        found = [
            training_minutes(
                Experiment(
                    epochs=1,
                    num_clusters=clusters,
                    objective=ObjectiveConfig(affinity=affinity),
                    training=TrainingConfig(patches=patches),
                ),
                300,
                0.0,
            )
            for patches in (1, 400)
        ]
        return found[1] - found[0]

    # 128 numbers or 6 of each cluster, and the probabilities of the clusters beside them.
    assert learning(10, "coassociation") / learning(10, "cosine") == pytest.approx(70 / 138)
    assert learning(64, "coassociation") / learning(64, "cosine") == pytest.approx(448 / 192)


def test_embedding_takes_time_by_the_area_of_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.cli.check._gflops", lambda: 100.0)
    few = TrainingConfig(patches=1)  # whose pairs take no time to speak of

    def minutes(side: int) -> float:
        return training_minutes(
            Experiment(epochs=1, views=ViewsConfig(crop_size=side), training=few), 300, 0.0
        )

    assert minutes(448) / minutes(224) == pytest.approx(4, rel=0.01)
    assert minutes(224) / minutes(112) == pytest.approx(4, rel=0.01)


def test_pairs_take_time_by_the_square_of_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.cli.check._gflops", lambda: 100.0)

    def minutes(patches: int) -> float:
        return training_minutes(
            Experiment(epochs=1, training=TrainingConfig(patches=patches)), 300, 0.0
        )

    rest = minutes(1)
    assert (minutes(400) - rest) / (minutes(100) - rest) == pytest.approx(16, rel=0.01)
