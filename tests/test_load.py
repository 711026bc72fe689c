"""Many images: memory and open files stay where they are."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddc.cli import main
from iddc.masks import Collection

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is not here"),
]
DISTINCT = 20
ROOM = 8
"""Megabytes by which memory may grow: what the allocator keeps, not what images take."""
FILES_AT_WORK = 4
"""Open files by which a moment may differ: those of the threads that decode and write."""


def write_photos(folder: Path, count: int, side: int) -> Path:
    """Many names of a few images of our own."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i // 1000}" / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < DISTINCT:
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((side, side)).save(path)
        else:
            os.link(folder / "0" / f"{i % DISTINCT:05}.png", path)
    return folder


def watched(model: Path, photos: Path, out: Path, *options: str) -> list[tuple[float, int]]:
    """Predict in a process of its own: its megabytes and open files after each image."""
    notes = out.with_name("seen.json")

    def work() -> None:
        seen: list[tuple[float, int]] = []
        sound = Collection.add

        def add(self: Collection, *args: Any) -> None:
            sound(self, *args)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((megabytes, len(os.listdir("/proc/self/fd"))))

        Collection.add = add  # type: ignore[method-assign]
        argv = ["predict", str(model), str(photos), "--out", str(out), "--device", "cpu"]
        assert main([*argv, *options]) == 0
        notes.write_text(json.dumps(seen))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    return [(megabytes, files) for megabytes, files in json.loads(notes.read_text())]


def flat(seen: list[tuple[float, int]]) -> str:
    """Check memory and open files from the first quarter on, and say what they were."""
    early, late = (seen[: len(seen) // 4], seen[len(seen) // 4 :])
    quarter, end = early[-1][0], seen[-1][0]
    assert max(megabytes for megabytes, _ in late) - quarter < ROOM
    assert max(files for _, files in late) <= max(files for _, files in early) + FILES_AT_WORK
    return f"{len(seen):,} images, {quarter:.0f} MB at 25 %, {end:.0f} MB at the end"


def test_memory_and_open_files_do_not_grow_with_the_number_of_images(
    model: Path, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", 200, side=256)
    seen = watched(model, photos, tmp_path / "out", "--formats", "png", "overlay", "coco")
    assert len(seen) == 200
    flat(seen)


@pytest.mark.soak
def test_memory_and_open_files_are_flat_over_20_000_images(
    model: Path, tmp_path: Path, record_property: Any
) -> None:
    photos = write_photos(tmp_path / "photos", 20_000, side=32)
    seen = watched(model, photos, tmp_path / "out", "--formats", "png", "coco")
    record_property("did", flat(seen))
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 20_000
