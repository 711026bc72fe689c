"""`--ray`: the files of one process, also when a process dies that was at work."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from iddc import cluster, evaluation, predicting
from iddc.cli import main
from iddc.cluster import Helpers
from iddc.datasets import open_dataset
from iddc.errors import DataError, SetupError
from iddc.evaluation import evaluate
from iddc.predicting import predict_collection
from iddc.segmenter import Segmenter
from tiny import tiny_segmenter, write_photos

if find_spec("ray") is None:  # it reads its settings when it is imported: not yet
    pytest.skip("the extra `ray` is not installed", allow_module_level=True)
HERE = Path(__file__).parent
FORMATS = ("png", "overlay", "cvat", "labelstudio")
COUNT = 12


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two processes on this machine, which ends with the tests."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    settings = {
        "RAY_AUTH_MODE": "token",  # else Ray writes a token to the home folder
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # a busy machine would leave them next to nothing
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    words = f"start --head --block --node-ip-address 127.0.0.1 --port {port} --num-cpus 2"
    words += " --include-dashboard false --disable-usage-stats --temp-dir"
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (  # names of sockets must be short
        TemporaryDirectory(dir="/tmp", prefix="iddc-test-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen([*ray, *words.split(), folder], **quiet) as head,
    ):
        try:
            asked = [*ray, "status", "--address", f"127.0.0.1:{port}"]
            for _ in range(60):
                said = subprocess.run(asked, capture_output=True, check=False).stdout
                if b"/2.0 CPU" in said:
                    break
                time.sleep(1)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, one of them white, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("ray") / "photos"
    write_photos(folder, COUNT)
    Image.new("RGB", (90, 80), "white").save(folder / "05.png")
    (folder / "06.png").write_bytes(b"")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def predict(model: Path, photos: Path, out: Path, *options: str) -> int:
    words = ["--out", str(out), "--device", "cpu", "--max-unreadable", "0.5"]
    return main(["predict", str(model), str(photos), *words, "--formats", *FORMATS, *options])


class Deadly:
    """A network that ends its process where an image is white."""

    def __init__(self, flag: Path, times: int) -> None:
        self.network = tiny_segmenter(3).network
        self.num_clusters = 3
        self.flag = flag
        self.times = times

    def probs(self, images: torch.Tensor) -> torch.Tensor:
        deaths = len(self.flag.read_text()) if self.flag.is_file() else 0
        if (images == 255).flatten(1).all(dim=1).any() and deaths < self.times:
            self.flag.write_text("x" * (deaths + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        probs: torch.Tensor = self.network.probs(images)
        return probs


def deadly(flag: Path, times: int) -> Segmenter:
    return Segmenter.of(Deadly(flag, times), tiny_segmenter(3).experiment)


def spread_predict(
    address: str, model: Path, photos: Path, out: Path, times: int | None
) -> predicting.Predicted:
    """Masks by a deadly network; by this process if `times` is None."""
    flag = out.with_suffix(".flag")
    load = partial(deadly, flag, times or 0)
    helpers = None if times is None else Helpers(address, load)
    options: dict[str, Any] = {"model": model, "max_unreadable": 0.5, "helpers": helpers}
    return predict_collection(load(), photos, out, FORMATS, **options)


@pytest.mark.slow
def test_a_cluster_writes_the_files_of_one_process(
    address: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert predict(model, photos, tmp_path / "one") == 0
    monkeypatch.setattr(predicting, "PART", 3)
    monkeypatch.chdir(photos.parent)  # relative paths mean the same to all processes
    assert predict(model, Path(photos.name), tmp_path / "many", "--ray", address) == 0
    assert "masks of 11 images (1 skipped" in capsys.readouterr().out
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert len(list((tmp_path / "many/png").iterdir())) == COUNT - 1
    # What is there is not done again.
    (tmp_path / "many/png/03.png").unlink()
    assert predict(model, photos, tmp_path / "many", "--ray", address) == 0
    assert "10 of them there already" in capsys.readouterr().out
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_process_that_is_killed_costs_no_file(
    times: int, address: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    expected = spread_predict(address, model, photos, tmp_path / "one", None)
    found = spread_predict(address, model, photos, tmp_path / "many", times)
    assert (tmp_path / "many.flag").read_text() == "x" * times
    assert (found.done, found.skipped) == (expected.done, expected.skipped) == (COUNT - 1, 1)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


@pytest.mark.slow
def test_an_image_that_ends_every_process_is_named_and_all_others_are_done(
    address: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    spread_predict(address, model, photos, tmp_path / "one", None)
    with pytest.raises(DataError, match=r"1 image ended each of the 3 processes .*05\.png"):
        spread_predict(address, model, photos, tmp_path / "many", 99)
    assert (tmp_path / "many.flag").read_text() == "xxx"
    one, many = tree(tmp_path / "one"), tree(tmp_path / "many")
    assert {name for name in one if name.startswith("png/")} - many.keys() == {"png/05.png"}
    assert "05.png" in many["skipped.csv"].decode()
    assert "cvat.zip" not in many
    # The same command goes on.
    (tmp_path / "many.flag").write_text("x" * 99)
    spread_predict(address, model, photos, tmp_path / "many", 99)
    assert tree(tmp_path / "many") == one


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set, one of whose images is white."""
    folder = tmp_path_factory.mktemp("ray") / "set"
    (folder / "val/labels").mkdir(parents=True)
    write_photos(folder / "val/images", COUNT)
    Image.new("RGB", (90, 80), "white").save(folder / "val/images/05.png")
    for index in range(COUNT):
        label = np.random.default_rng(index).integers(0, 4, (80, 90), np.uint8)
        Image.fromarray(label).save(folder / f"val/labels/{index:02}.png")
    return folder


@pytest.mark.slow
def test_a_cluster_scores_as_one_process_does(
    address: str, model: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "PART", 5)
    found = []
    for name, options in (("one", []), ("many", ["--ray", address])):
        run = Path(shutil.copytree(model, tmp_path / name))
        words = ["--data", str(labelled), "--device", "cpu", "--save-masks"]
        assert main(["evaluate", str(run), *words, *options]) == 0
        panels = tree(run / "evaluation")
        assert len(panels) == COUNT
        found.append(((run / "scores.json").read_text(), panels))
    assert found[0] == found[1]


@pytest.mark.slow
def test_scores_are_the_same_when_a_process_is_killed_and_none_when_all_are(
    address: str, labelled: Path, tmp_path: Path
) -> None:
    dataset = open_dataset("folder", labelled, "val")
    expected = evaluate(deadly(tmp_path, 0), dataset).as_dict()
    once = Helpers(address, partial(deadly, tmp_path / "once", 1))
    assert evaluate(deadly(tmp_path, 0), dataset, helpers=once).as_dict() == expected
    assert (tmp_path / "once").read_text() == "x"
    always = Helpers(address, partial(deadly, tmp_path / "always", 99))
    with pytest.raises(DataError, match=r"1 image ended each of the 3 processes .*05"):
        evaluate(deadly(tmp_path, 0), dataset, helpers=always)


def exits() -> Segmenter:
    os._exit(1)


def lacks() -> Segmenter:
    raise SetupError("There is no model here.")


@pytest.mark.slow
@pytest.mark.parametrize(("load", "says"), [(exits, "3 processes .* died"), (lacks, "no model h")])
def test_processes_that_cannot_load_the_model_end_the_command(
    load: Any, says: str, address: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(SetupError, match=says):
        predict_collection(
            tiny_segmenter(3), photos, tmp_path / "out", ("png",), model=model,
            max_unreadable=0.5, helpers=Helpers(address, load),
        )  # fmt: skip


@pytest.mark.slow
def test_a_cluster_of_this_machine_leaves_nothing_but_masks(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = {*Path("/tmp").glob("iddc-ray-*")}
    words = ["-m", "iddc", "predict", str(model), str(photos), "--out", str(tmp_path / "many")]
    words += ["--device", "cpu", "--max-unreadable", "0.5", "--formats", *FORMATS, "--ray"]
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, *words], env=environment | {"HOME": str(home)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert predict(model, photos, tmp_path / "one") == 0
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert not list(home.rglob("*"))
    assert {*Path("/tmp").glob("iddc-ray-*")} <= before


def test_an_address_that_does_not_answer_is_exit_4(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "_PATIENCE", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert predict(model, photos, tmp_path, "--ray", address) == 4
    said = capsys.readouterr().err
    assert re.search(r"no Ray cluster at 127.0.0.1:\d+ \(no answer in 3 s\)", said)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "here", "ray://a:1"])
def test_an_address_that_is_none_is_exit_2(
    address: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model, photos, tmp_path, "--ray", address) == 2
    assert f"expected HOST:PORT or auto, found '{address}'" in capsys.readouterr().err


def test_a_video_is_not_spread(model: Path, tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"\0")
    assert predict(model, video, tmp_path / "out", "--ray") == 2


def test_without_the_extra_the_command_says_how_to_get_it(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)
    assert predict(model, photos, tmp_path, "--ray") == 4
    assert "pip install 'iddc[ray]'" in capsys.readouterr().err
