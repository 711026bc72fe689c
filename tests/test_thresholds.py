"""Thresholds without labels: histograms of affinities, and where they cross."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from iddc.config import ObjectiveConfig
from iddc.datasets.synthetic import write_scenes
from iddc.errors import DataError
from iddc.thresholds import (
    BINS,
    Affinities,
    estimate_threshold,
    resolve_thresholds,
    thresholds_of,
)


def gathered(spread: float, clusters: int = 4, count: int = 600, seed: int = 0) -> Tensor:
    """Directions around a few axes, at right angles to each other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 16, generator=generator)
    axes = torch.eye(16)[torch.arange(count) % clusters]
    return normalize(axes + spread * noise / 4, dim=1)


def test_histograms_are_densities_of_all_pairs_counted_by_hand() -> None:
    vectors, ids = gathered(1.0, count=40), torch.arange(40) % 4
    found = Affinities.of(vectors, ids)
    values: dict[bool, list[float]] = {True: [], False: []}
    for i in range(40):
        for j in range(i):
            values[bool(ids[i] == ids[j])].append(float(vectors[i] @ vectors[j]))
    edges = np.linspace(-1, 1, BINS + 1)
    for density, pairs in ((found.same, values[True]), (found.different, values[False])):
        expected = np.histogram(pairs, edges, density=True)[0]
        # Affinities on an edge may fall to either side.
        assert np.abs(np.cumsum(density - expected)).max() * 2 / BINS < 0.02
        assert density.sum() * 2 / BINS == pytest.approx(1)


def test_the_crossing_of_two_known_densities_is_found() -> None:
    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    same, different = (np.exp(-(((centres - m) / 0.15) ** 2) / 2) for m in (0.5, 0.1))
    assert Affinities(same, different).equal_error_threshold() == pytest.approx(0.3, abs=0.011)


def test_between_separate_densities_the_threshold_is_the_middle_of_the_gap() -> None:
    same, different = np.zeros(BINS), np.zeros(BINS)
    same[90], different[50] = 1, 1  # 0.80 to 0.82, and 0.00 to 0.02
    assert Affinities(same, different).equal_error_threshold() == pytest.approx(0.41, abs=0.011)


@given(st.integers(0, 99))
def test_no_other_threshold_makes_fewer_errors(seed: int) -> None:
    same, different = np.random.default_rng(seed).random((2, BINS))
    best = round((Affinities(same, different).equal_error_threshold() + 1) * BINS / 2)
    errors = [same[:i].sum() + different[i:].sum() for i in range(1, BINS)]
    assert errors[best - 1] == pytest.approx(min(errors))


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_the_estimate_tells_pairs_of_one_group_from_pairs_of_two(spread: float) -> None:
    vectors, ids = gathered(spread), torch.arange(600) % 4
    known = Affinities.of(vectors, ids).equal_error_threshold()
    assert estimate_threshold(vectors, 4) == pytest.approx(known, abs=0.06)


def test_the_same_seed_gives_the_same_estimate() -> None:
    vectors = gathered(1.0, count=3000)
    assert estimate_threshold(vectors, 4, seed=3) == estimate_threshold(vectors, 4, seed=3)


def test_only_auto_is_replaced_and_centring_is_that_of_the_objective() -> None:
    vectors = 3 * gathered(0.5) + 5
    config = ObjectiveConfig(positive_threshold="auto", centering="batch")
    resolved = resolve_thresholds(config, vectors, 4)
    directions = normalize(vectors, dim=1)
    centred = normalize(directions - directions.mean(0), dim=1)
    assert thresholds_of(resolved) == (estimate_threshold(centred, 4), 0.12)
    alone = resolve_thresholds(ObjectiveConfig(positive_threshold="auto"), vectors, 4)
    assert alone.positive_threshold != resolved.positive_threshold


def test_fewer_distinct_embeddings_than_clusters_are_a_data_error() -> None:
    with pytest.raises(DataError, match="fewer clusters or give more varied images"):
        estimate_threshold(torch.eye(3).repeat(9, 1), 4)


# The script that says what they cost --------------------------------------------------------------


@pytest.mark.slow
def test_what_thresholds_cost_is_measured_and_runs_are_used_again(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 10, 0, (96, 64))
    config = tmp_path / "small.yaml"
    config.write_text(
        "views: {crop_size: 64}\nhead: linear\nepochs: 1\ntraining: {precision: fp32}\n"
    )
    script = Path(__file__).parents[1] / "benchmarks" / "thresholds.py"
    out = tmp_path / "thresholds"
    command = [sys.executable, str(script), "--data", str(tmp_path / "scenes"), "--out", str(out)]
    command += ["--backbones", "untrained:resnet10t", "--seeds", "2", "--grid", "0.0", "0.5"]
    times = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--config", str(config)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(out.with_suffix(".json").read_text())
        times.append({path: path.stat().st_mtime_ns for path in out.glob("runs/*/model.*")})
    assert times[0] == times[1]
    assert len(times[0]) == 2 * 2 * 3  # model.json and its weights, seeds, thresholds
    assert set(row["miou"]) == {"auto", "0.0", "0.5"}
    assert all(0 < value < 1 for values in row["miou"].values() for value in values)
    assert "untrained:resnet10t | " in out.with_suffix(".md").read_text()
