"""The same seed gives the same weights, byte by byte.

That one process and two compute the same step is in `test_training.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iddc.config import Experiment, Runtime, TrainingConfig, ViewsConfig
from iddc.datasets.synthetic import write_scenes
from iddc.images import find_images
from iddc.learning import fit
from iddc.recipes import RECIPES
from iddc.recipes.ablations import from_scratch
from iddc.runs import Run

STEPS = 20
WAYS = {
    "new views": {"views": {"repeat": 0}},
    "repeated views": {"views": {"repeat": 2}},
    "end to end": {"training": {"end_to_end": True, "backbone_learning_rate": 1e-4}},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, count=6, seed=0, size=(80, 64))
    return folder / "train" / "images"


def trained(photos: Path, out: Path, way: str, *, workers: int = 0, seed: int = 0) -> bytes:
    """The weights after 20 steps of the default recipe on a tiny network."""
    changes = WAYS[way]
    experiment = Experiment(
        num_clusters=4,
        backbone="untrained:test_vit",
        epochs=STEPS // 2,
        seed=seed,
        objective=from_scratch(RECIPES["folder"].experiment()).objective,
        views=ViewsConfig(crop_size=32, short_side=64, **changes.get("views", {})),
        training=TrainingConfig(batch_size=3, precision="fp32", **changes.get("training", {})),
    )
    with Run.start(out, experiment, source="photos") as run:
        fit(find_images(photos).files, experiment, run, Runtime(device="cpu", workers=workers))
    assert (out / "log.jsonl").read_text().count('"loss"') == STEPS
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(
    photos: Path, tmp_path: Path, way: str
) -> None:
    one = trained(photos, tmp_path / "one", way)
    assert trained(photos, tmp_path / "two", way, workers=2) == one
    assert trained(photos, tmp_path / "three", way, seed=1) != one


@pytest.mark.soak
def test_two_fresh_processes_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    """Hashes of strings differ between them, and nothing else is shared either."""
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        argv = f"train {photos} --out {out} --num-clusters 4 --backbone untrained:test_vit "
        argv += "--views.crop-size 64 --epochs 20 --training.batch-size 5 --device cpu"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "iddc", *argv.split()]
        subprocess.run(command, env=environment, check=True)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
