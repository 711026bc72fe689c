"""What a kill, a signal, a full disk and other mishaps leave behind: whole files, and a way on.

Commands run in forked processes. A process may strike itself before any of its changes to the
folder that it writes, which an audit hook counts: so the worst moments are hit, each time alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from iddc import export
from iddc.__main__ import run as run_process
from iddc.cli import main
from iddc.datasets.synthetic import write_scenes
from iddc.runs.files import TEMPORARY
from iddc.views import ViewDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
needs_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, which this system lacks"
)

TRAIN = (
    "train {photos} --out {out} --num-clusters 4 --backbone untrained:test_vit --epochs 2 "
    "--views.crop-size 64 --views.short-side 64 --training.batch-size 5 --checkpoint-every 1 "
    "--prediction.window 0 --prediction.flip False --workers 0 --device cpu"
)
PRETRAIN = (
    "pretrain {photos} --out {out} --method contrast --network test_resnet --depth 0 --steps 3 "
    "--batch-size 16 --contrast.small-size 32 --contrast.large-size 64 --contrast.warmup 1 "
    "--contrast.recalibration-size 64 --contrast.recalibration-steps 1 --components 8 "
    "--checkpoint-every 1 --workers 0 --device cpu"
)

BASELINE = (
    "{photos} --out {out} --num-clusters 4 --backbone untrained:test_vit --workers 0 --device cpu"
)


@dataclass(frozen=True)
class Command:
    """A command that writes to {out}: a new folder, a finished run, or a folder of masks."""

    words: str
    in_run: bool = False
    in_masks: bool = False


COMMANDS = {
    "train": Command(TRAIN),
    "pretrain": Command(PRETRAIN),
    "predict": Command("predict {run} {photos} --out {out} --formats png coco cvat --device cpu"),
    "geotiff": Command("predict {run} {self.scans} --out {out} --formats geotiff --device cpu"),
    "video": Command("predict {run} {self.film} --out {out} --formats png --device cpu"),
    "report": Command("report {out} --images {photos} --samples 2 --device cpu", in_run=True),
    "label": Command(f"label {{out}} --set 0={'sky' * 30} 2={'road' * 20}", in_run=True),
    "evaluate": Command("evaluate {out} --data {data} --save-masks --device cpu", in_run=True),
    "kmeans": Command(f"baseline kmeans {BASELINE}"),
    "stego": Command(f"baseline stego {BASELINE} --stego.steps 4 --stego.batch-size 8"),
    "analyze": Command(
        "analyze {photos} --out {out} --backbone untrained:test_vit --num-clusters 4 --device cpu"
    ),
    "relabel": Command("relabel {out} --run {self.named}", in_masks=True),
    "sweep": Command(
        "sweep {photos} --out {out} -k 2 3 --seeds 1 --backbone untrained:test_vit --device cpu"
        " --views.short-side 64"
    ),
    "compare": Command(
        f"compare {BASELINE} --data {{data}} --methods kmeans --seeds 2 --views.short-side 64"
    ),
}
"""A line for each command that writes."""
OFTEN = ("train", "pretrain", "predict", "report", "label", "relabel", "compare", "sweep")
"""Those that are killed in every test run; all are in the soak."""


@dataclass
class World:
    """What the commands read."""

    data: Path
    photos: Path
    run: Path

    @property
    def scans(self) -> Path:
        """Some of the photos as GeoTIFFs."""
        folder = self.data.parent / "scans"
        if not folder.exists():
            rasterio = pytest.importorskip("rasterio")
            folder.mkdir()
            for photo in sorted(self.photos.iterdir())[:3]:
                bands = np.asarray(Image.open(photo)).transpose(2, 0, 1)
                place = {"crs": "EPSG:32632", "transform": rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)}
                size = dict(zip(("count", "height", "width"), bands.shape, strict=True))
                path = folder / f"{photo.stem}.tif"
                with rasterio.open(path, "w", "GTiff", dtype="uint8", **size, **place) as raster:
                    raster.write(bands)
        return folder

    @property
    def film(self) -> Path:
        """Some of the photos as a video."""
        path = self.data.parent / "film.avi"
        if not path.exists():
            if not shutil.which("ffmpeg"):
                pytest.skip("needs ffmpeg")
            photos = sorted(map(str, self.photos.glob("*.jpg")))[:4]
            source = ["-f", "image2pipe", "-framerate", "2", "-c:v", "mjpeg", "-i", "-"]
            stream = b"".join(Path(photo).read_bytes() for photo in photos)
            command = ["ffmpeg", "-loglevel", "error", *source, "-c:v", "copy", str(path)]
            subprocess.run(command, input=stream, check=True)
        return path

    @property
    def masks(self) -> Path:
        """The masks of the photos by the run, whose clusters have no names."""
        folder = self.data.parent / "masks"
        if not folder.exists():
            argv = f"predict {self.run} {self.photos} --out {folder} --formats png csv --device cpu"
            assert main(argv.split()) == 0
        return folder

    @property
    def named(self) -> Path:
        """A copy of the run in which clusters have names."""
        folder = self.data.parent / "named"
        if not folder.exists():
            shutil.copytree(self.run, folder)
            assert main(["label", str(folder), "--set", "0=sky", "2=sky", "3=ignore"]) == 0
        return folder

    def argv(self, command: Command, out: Path) -> list[str]:
        return [word.format(self=self, out=out, **vars(self)) for word in command.words.split()]

    def prepare(self, command: Command, out: Path) -> Path:
        if command.in_run:
            shutil.copytree(self.run, out)
        if command.in_masks:
            shutil.copytree(self.masks, out)
        return out


@dataclass
class End:
    """How a process ended."""

    code: int | None
    said: str
    changes: int
    """How often it was about to change its folder."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def process(
    argv: list[str],
    out: Path,
    *,
    at: int = 0,
    strike: Callable[[], object] = kill,
    first: Callable[[], object] = lambda: None,
    after: float | None = None,
) -> End:
    """Run a command in a process of its own.

    Args:
        argv: The words after `iddc`.
        out: The folder whose changes count.
        at: Before which change `strike` is called; 0: never.
        strike: What happens then.
        first: Called in the process before the command.
        after: Kill the process after so many seconds.
    """
    notes = out.with_name(f"{out.name}-said.txt"), out.with_name(f"{out.name}-changes.txt")

    def work() -> None:
        sys.stdout = sys.stderr = notes[0].open("w")
        counter, changes, busy = count(1), 0, False

        def hear(event: str, args: tuple[Any, ...]) -> None:
            nonlocal changes, busy
            writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if busy or not (writes or event in CHANGES) or not str(args[0]).startswith(str(out)):
                return
            changes = number = next(counter)  # in one step: threads write too
            if number == at:
                busy = True
                strike()
                busy = False

        sys.addaudithook(hear)
        # As in a terminal: what a shell starts in the background begins with Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.argv = ["iddc", *argv]
        first()
        try:
            run_process()
        except SystemExit as end:
            sys.stdout.flush()
            notes[1].write_text(str(changes))
            os._exit(int(end.code or 0))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(after or 120)
    child.kill()
    child.join()
    heard = int(notes[1].read_text()) if notes[1].exists() else 0
    said = notes[0].read_text() if notes[0].exists() else ""
    for note in notes:
        note.unlink(missing_ok=True)
    return End(child.exitcode, said, heard)


def damaged(folder: Path) -> list[str]:
    """The files under their final names that cannot be read whole."""

    def read(path: Path) -> object:
        match path.suffix:
            case ".json":
                return json.loads(path.read_bytes())
            case ".jsonl":  # the last line may be cut short: the next start drops it
                return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            case ".yaml":
                return yaml.safe_load(path.read_text())
            case ".tif":
                return pytest.importorskip("rasterio").open(path).read()
            case ".png":
                return Image.open(path).load()
            case ".pt":
                return torch.load(path, weights_only=True)
            case ".safetensors":
                return load_file(path)
            case ".zip":
                assert not zipfile.ZipFile(path).testzip()
        return None

    found = []
    for path in folder.rglob("*"):
        if path.is_file() and "/.iddc-" not in str(path) and path.parent.name != "cache":
            try:
                read(path)
            except Exception as error:
                found.append(f"{path.relative_to(folder)}: {error!r}")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, without what time it took and without what is left of killed processes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock" and "/.iddc-" not in str(path):
            data = path.read_bytes()
            if path.name.startswith("comparison.") and path.suffix != ".json":
                continue  # made of the JSON
            if path.name.endswith(".cost.json"):
                continue
            if path.name in ("log.jsonl", "README.md", "comparison.json"):
                data = re.sub(rb'"(seconds|memory)": ([\d.]+|null)|[\d.]+ minutes', b"", data)
            found[str(path.relative_to(folder))] = data.replace(bytes(folder), b"OUT")
    return found


def give_again(argv: list[str], out: Path) -> None:
    """The command once more, which may find that everything was done."""
    end = process(argv, out)
    finished = end.code == 2 and "holds a finished run" in end.said
    assert end.code == 0 or finished, end.said


def one_sentence(end: End) -> str:
    """The error that was printed; there is one, in one line, without a traceback."""
    (line,) = [line for line in end.said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in end.said
    assert "bug" not in line
    assert end.said.rstrip().endswith(line)
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_scenes(folder / "data", count=20, seed=0, size=(80, 64))
    world = World(folder / "data", folder / "data" / "train" / "images", folder / "run")
    # Not in a process of its own: what is imported here, forked processes need not import.
    assert main(world.argv(COMMANDS["train"], world.run)) == 0
    return world


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a command leaves that nothing disturbs, and how it ends; each runs once."""
    known: dict[str, tuple[dict[str, bytes], End, float]] = {}

    def of(name: str) -> tuple[dict[str, bytes], End, float]:
        if name not in known:
            command = COMMANDS[name]
            out = world.prepare(command, tmp_path_factory.mktemp("undisturbed") / "out")
            started = time.monotonic()
            end = process(world.argv(command, out), out)
            assert end.code == 0, end.said
            known[name] = contents(out), end, time.monotonic() - started
        return known[name]

    return of


# SIGKILL ------------------------------------------------------------------------------------------


def survives(world: World, name: str, out: Path, expected: dict[str, bytes], **how: Any) -> bool:
    """Kill a command, look at what is there, give it again. Whether the kill came in time."""
    command = COMMANDS[name]
    argv = world.argv(command, world.prepare(command, out))
    end = process(argv, out, **how)
    assert end.code in (0, -signal.SIGKILL), end.said
    assert damaged(out) == []
    give_again(argv, out)
    assert damaged(out) == []
    assert contents(out) == expected
    return end.code != 0


@pytest.mark.parametrize("name", OFTEN)
def test_a_command_that_is_killed_leaves_whole_files_and_ends_as_if_it_were_not(
    world: World, undisturbed: Any, tmp_path: Path, name: str
) -> None:
    expected, end, _ = undisturbed(name)
    at = random.Random(name).randint(end.changes // 2, end.changes)
    assert survives(world, name, tmp_path / "out", expected, at=at)


@pytest.mark.soak
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_before_any_change_of_a_file_does_no_harm(
    world: World, undisturbed: Any, tmp_path: Path, name: str, record_property: Any
) -> None:
    expected, end, _ = undisturbed(name)
    for at in range(1, end.changes + 1):
        assert survives(world, name, tmp_path / "out", expected, at=at)
        shutil.rmtree(tmp_path / "out")
    record_property("did", f"{end.changes} kills")


@pytest.mark.soak
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_time_does_no_harm(
    world: World, undisturbed: Any, tmp_path: Path, name: str, record_property: Any
) -> None:
    expected, _, seconds = undisturbed(name)
    moments, kills = random.Random(name), 0
    for _ in range(10):
        after = moments.uniform(0, seconds)
        kills += survives(world, name, tmp_path / "out", expected, after=after)
        shutil.rmtree(tmp_path / "out")
    assert kills or seconds < 0.5  # the shortest may always be done before
    record_property("did", f"{kills} kills")


def test_a_run_that_is_killed_again_and_again_goes_on(
    world: World, undisturbed: Any, tmp_path: Path
) -> None:
    expected, end, _ = undisturbed("train")
    argv = world.argv(COMMANDS["train"], tmp_path / "out")
    for _ in range(4):  # each time a little further
        assert process(argv, tmp_path / "out", at=end.changes // 3).code == -signal.SIGKILL
        assert damaged(tmp_path / "out") == []
    give_again(argv, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.rglob(TEMPORARY))


def test_a_kill_never_leaves_a_model_beside_the_names_of_another(
    world: World, tmp_path: Path
) -> None:
    out, old = tmp_path / "out", (b"old model", b"old names")
    model, labels = out / "model.onnx", out / "model.labels.json"
    argv = ["export", str(world.run), "--to", "onnx", "--out", str(model)]

    def replace_the_old(at: int) -> End:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        model.write_bytes(old[0])
        labels.write_bytes(old[1])
        return process(argv, out, at=at, first=quick)

    def quick() -> None:
        export.export = lambda *_: b"new model"  # the real one takes seconds

    whole = replace_the_old(0)
    assert whole.code == 0
    new = model.read_bytes(), labels.read_bytes()
    assert new[0] == b"new model"
    seen = set()
    for at in range(1, whole.changes + 1):
        replace_the_old(at)
        seen.add((model.read_bytes(), labels.read_bytes() if labels.exists() else None))
    assert seen <= {old, (old[0], None), (new[0], None), new}
    assert (new[0], None) in seen  # between the two


# Signals ------------------------------------------------------------------------------------------


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
"""SIGHUP: the terminal is closed."""


@pytest.mark.parametrize("name", ["train", "pretrain", "predict"])
@pytest.mark.parametrize(("signum", "code"), ENDS)
def test_a_signal_is_one_sentence_and_its_code_and_the_command_can_be_given_again(
    world: World, undisturbed: Any, tmp_path: Path, name: str, signum: int, code: int
) -> None:
    expected, whole, _ = undisturbed(name)
    out = tmp_path / "out"
    argv = world.argv(COMMANDS[name], out)
    end = process(argv, out, at=whole.changes // 2, strike=lambda: signal.raise_signal(signum))
    assert end.code == code
    # Whoever stops a command made no error: the last line says where it is, without the word.
    last = end.said.splitlines()[-1]
    assert re.match("Stopped|Interrupted", last)
    assert "error: " not in end.said
    assert "Traceback" not in end.said
    assert damaged(out) == []
    assert not list(out.rglob(TEMPORARY))
    give_again(argv, out)
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["train", "pretrain", "predict"])
def test_under_nohup_the_end_of_the_terminal_stops_nothing(
    world: World, undisturbed: Any, tmp_path: Path, name: str
) -> None:
    expected, whole, _ = undisturbed(name)
    out = tmp_path / "out"
    end = process(
        world.argv(COMMANDS[name], out),
        out,
        first=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup starts a program
        at=whole.changes // 2,
        strike=lambda: signal.raise_signal(signal.SIGHUP),
    )
    assert end.code == 0
    assert contents(out) == expected


# Streams ------------------------------------------------------------------------------------------


def full_streams() -> None:
    sys.stdout, sys.stderr = Path("/dev/full").open("w"), Path("/dev/full").open("w")  # noqa: SIM115


@needs_full
def test_a_training_whose_lines_nobody_can_read_ends_as_if_they_were_read(
    world: World, undisturbed: Any, tmp_path: Path
) -> None:
    expected, _, _ = undisturbed("train")
    out = tmp_path / "out"
    end = process(world.argv(COMMANDS["train"], out), out, first=full_streams)
    assert contents(out) == expected
    assert end.code == 4  # its last line, on stdout, says where the model is


# The machine --------------------------------------------------------------------------------------


def small_files_only(most: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("train", 100_000),
        ("pretrain", 300_000),
        ("predict", 400),
        ("label", 400),
        ("relabel", 400),
        ("compare", 3000),
    ],
)
def test_a_disk_without_room_is_one_sentence_and_nothing_is_lost(
    world: World, undisturbed: Any, tmp_path: Path, name: str, most: int
) -> None:
    """Writing stops in the middle of a file, as on a full disk."""
    command, out = COMMANDS[name], tmp_path / "out"
    argv = world.argv(command, world.prepare(command, out))
    before = contents(out) if command.in_run else {}
    end = process(argv, out, first=lambda: small_files_only(most))
    assert end.code == 4, end.said
    assert "Cannot write" in one_sentence(end)
    assert damaged(out) == []
    assert contents(out).items() >= before.items()
    assert not list(out.rglob(TEMPORARY))
    give_again(argv, out)
    assert contents(out) == undisturbed(name)[0]


@pytest.mark.parametrize("name", ["train", "pretrain", "predict"])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    world: World, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "read-only"
    place.mkdir(0o555)
    if os.access(place, os.W_OK):  # as root, who may write everywhere but here
        place = Path("/sys")
    if os.access(place, os.W_OK) and not place.is_relative_to("/sys"):
        pytest.skip("this user may write everywhere")
    end = process(world.argv(COMMANDS[name], place / "out"), tmp_path / "out")
    assert end.code == 4, end.said
    assert re.search("may not write|read-only", one_sentence(end))


def test_a_folder_that_is_deleted_while_it_is_written_is_one_sentence(
    world: World, undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    at = undisturbed("train")[1].changes // 2
    argv = world.argv(COMMANDS["train"], out)
    end = process(argv, out, at=at, strike=lambda: shutil.rmtree(out))
    assert end.code == 4, end.said
    assert "its folder is gone" in one_sentence(end)


def test_a_photo_that_is_deleted_during_training_is_listed_and_left_out(
    world: World, undisturbed: Any, tmp_path: Path
) -> None:
    out, photos = tmp_path / "out", Path(shutil.copytree(world.photos, tmp_path / "photos"))
    name = sorted(path.name for path in photos.iterdir())[3]
    argv = World(world.data, photos, world.run).argv(COMMANDS["train"], out)
    options = ["--views.repeat", "0", "--max-unreadable", "0.1"]
    at = undisturbed("train")[1].changes // 3
    end = process([*argv, *options], out, at=at, strike=(photos / name).unlink)
    assert end.code == 0, end.said
    assert name in (out / "skipped.csv").read_text()
    assert "model.safetensors" in contents(out)


def test_a_worker_that_dies_costs_no_step(
    world: World, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    log = out / "log.jsonl"
    argv = world.argv(COMMANDS["train"], out)
    sound = ViewDataset.__getitem__

    def die(self: ViewDataset, key: tuple[int, int]) -> Any:
        if key[0] == 1:  # of 2 epochs, while the main process waits for it
            while not (log.exists() and len(log.read_text().splitlines()) == 4):
                time.sleep(0.01)
            # The error comes wherever Python is, and a checker of types would take it for its own.
            time.sleep(0.5)
            kill()
        return sound(self, key)

    options = ["--workers", "1", "--checkpoint-every", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(ViewDataset, "__getitem__", die)
        end = process([*argv, *options], out)
    assert end.code == 4, end.said
    assert "--workers 0" in one_sentence(end)
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == 4
    give_again(argv, out)
    expected = undisturbed("train")[0]
    assert contents(out)["model.safetensors"] == expected["model.safetensors"]


def test_a_clock_that_jumps_back_changes_nothing(
    world: World, undisturbed: Any, tmp_path: Path
) -> None:
    out, now = tmp_path / "out", [time.time()]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    def turn() -> None:
        time.time = back

    end = process(world.argv(COMMANDS["train"], out), out, first=turn)
    assert end.code == 0, end.said
    assert contents(out) == undisturbed("train")[0]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["step"]]  # 0: before the steps
    assert len(seconds) > 1
    assert all(0 <= each < 60 for each in seconds)


@pytest.mark.parametrize("name", ["train", "pretrain"])
def test_a_second_process_on_a_folder_is_refused_and_the_first_is_not_disturbed(
    world: World, undisturbed: Any, tmp_path: Path, name: str
) -> None:
    expected, whole, _ = undisturbed(name)
    out, seen = tmp_path / "out", tmp_path / "second.txt"
    argv = world.argv(COMMANDS[name], out)

    def second() -> None:
        end = process(argv, out.with_name("unused"))
        seen.write_text(f"{end.code} {one_sentence(end)}")

    end = process(argv, out, at=whole.changes // 2, strike=second)
    assert end.code == 0, end.said
    assert re.match("2 .* is in use by process", seen.read_text())
    assert contents(out) == expected
