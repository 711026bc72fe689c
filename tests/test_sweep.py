"""Several K at once: their numbers, the suggested one, the tree, and a page that works offline."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from iddc.backbones import untrained_backbone
from iddc.cli import main
from iddc.config import ConsensusConfig, Experiment, TrainingConfig, ViewsConfig
from iddc.consensus import fit_consensus, fit_each
from iddc.images import find_images
from iddc.report.sweep import draw_tree, inherited_colours
from iddc.sweep import EMBEDDINGS, Level, Sweep, _kept, _key, suggest
from tiny import write_photos

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SMALL = ConsensusConfig(groupings=2, prototypes=12, vectors=200, iterations=3)
QUICK = ["-k", "3", "5", "--backbone", "untrained:test_vit", "--device", "cpu", "--workers", "0"]
WHITE = (Image.new("RGB", (6, 4), "white"),)


def level(ids: list[list[int]], k: int, agreement: float = 1.0) -> Level:
    return Level(k, (np.array(ids),), k, 0.5, agreement, 0.5)


@pytest.fixture
def split() -> Sweep:
    """Cluster 0 of two stays, cluster 1 splits into three parts and one of one."""
    two = level([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]], 2)
    three = level([[2, 2, 2, 0, 0, 1], [2, 2, 2, 0, 0, 0]], 3)
    return Sweep(WHITE, ("a.png",), (two, three), "bundled")


def test_what_is_found_for_a_k_does_not_depend_on_the_others() -> None:
    vectors = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    both = fit_each(vectors, (3, 5), SMALL, seed=1)
    for k in (3, 5):
        alone = fit_consensus(vectors, k, SMALL, seed=1)
        assert torch.equal(both[k].probs(vectors), alone.probs(vectors))


def test_the_k_whose_seeds_agree_best_is_suggested_and_of_equals_the_smallest() -> None:
    assert suggest([(6, 0.75), (9, 0.8), (12, 0.73), (18, 0.71), (27, 0.4)]) == 9
    assert suggest([(6, 0.75), (9, 0.8), (12, 0.8)]) == 9
    assert suggest([(12, 0.8), (9, 0.8), (6, 0.75)]) == 9
    assert suggest([(4, 0.1)]) == 4


def test_the_flow_counts_the_patches_that_two_clusters_share(split: Sweep) -> None:
    assert split.flow(0).tolist() == [[0, 0, 6], [5, 1, 0]]


def test_the_largest_part_of_a_cluster_keeps_its_colour(split: Sweep) -> None:
    two, three = inherited_colours(split)
    assert three[2].tolist() == two[0].tolist()
    assert three[0].tolist() == two[1].tolist()
    assert three[1].tolist() not in two.tolist()


def test_the_tree_has_a_bar_for_each_cluster_and_a_band_for_each_flow(split: Sweep) -> None:
    drawn = str(draw_tree(split, inherited_colours(split)))
    assert drawn.count("<rect") == 2 + 3
    assert drawn.count("<path") == 3
    assert "K = 3, cluster 2: 50.0 %" in drawn
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights[2] == pytest.approx(heights[0], rel=0.02)  # the same half of the patches


def test_bands_join_bars_and_bars_stand_in_the_order_of_their_parents() -> None:
    counts, rng = (2, 4, 7), np.random.default_rng(0)
    ids = [rng.integers(0, k, (30, 40)) for k in counts]
    levels = tuple(level(map_.tolist(), k) for map_, k in zip(ids, counts, strict=True))
    found = Sweep(WHITE, ("a.png",), levels, "bundled")
    drawn = str(draw_tree(found, inherited_colours(found)))
    bar = r'<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)" fill="(.*?)">'
    bars = [(*map(float, each[:4]), each[4]) for each in re.findall(bar, drawn)]
    clusters = [tuple(map(int, each)) for each in re.findall(r"K = (\d), cluster (\d):", drawn)]
    top = dict(zip(clusters, (bar[1] for bar in bars), strict=True))
    assert len(top) == sum(counts)

    # The bars of a column do not overlap, and are as high as their clusters are large.
    for column, map_, k in zip(sorted({bar[0] for bar in bars}), ids, counts, strict=True):
        own = sorted((y, height) for x, y, _, height, _ in bars if x == column)
        assert all(y + height < following for (y, height), (following, _) in pairwise(own))
        shares = np.sort([height for _, height in own]) / sum(height for _, height in own)
        sizes = np.bincount(map_.ravel(), minlength=k) / map_.size
        assert shares == pytest.approx(np.sort(sizes), abs=0.001)

    # A band leads from the right side of a bar of its colour to the left side of another one.
    band = r'd="M(\S+) (\S+?)C\S+ \S+ \S+ \S+ (\S+) (\S+?)V(\S+?)C[^"]*" fill="(.*?)"'
    bands = re.findall(band, drawn)
    assert len(bands) == 2 * 4 + 4 * 7
    for *ends, colour in bands:
        x1, y1, x2, y2, end = map(float, ends)
        size = end - y2
        left = [one for one in bars if one[0] + one[2] == x1 and one[4] == colour]
        right = [one for one in bars if one[0] == x2]
        for y, beside in ((y1, left), (y2, right)):
            assert any(one[1] - 0.2 <= y and y + size <= one[1] + one[3] + 0.3 for one in beside)
    for index, (few, more) in enumerate(pairwise(counts)):
        parents = found.flow(index).argmax(0).tolist()
        ordered = sorted(range(more), key=lambda child, more=more: top[more, child])
        places = [top[few, parents[child]] for child in ordered]
        assert places == sorted(places)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sweep")
    write_photos(root / "photos", 4, (160, 128))
    assert main(["sweep", str(root / "photos"), "--out", str(root / "out"), *QUICK]) == 0
    return root / "photos", root / "out"


def test_the_page_shows_every_k_and_fetches_nothing(swept: tuple[Path, Path]) -> None:
    page = (swept[1] / "sweep.html").read_text("utf-8")
    record = json.loads((swept[1] / "sweep.json").read_text())
    assert [one["num_clusters"] for one in record["levels"]] == [3, 5]
    assert page.count('class="over"') == 4 * 2
    assert f"K = {record['suggested']}</strong>" in page
    assert f"-k {record['suggested']} --backbone untrained:test_vit" in page
    assert "<p><code>iddc train " in page  # no first letter of a sentence
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_second_sweep_embeds_nothing_and_finds_the_same(
    swept: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = swept
    before = json.loads((out / "sweep.json").read_text())
    monkeypatch.setattr("iddc.sweep.Sampler", None)
    assert main(["sweep", str(photos), "--out", str(out), *QUICK, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == before
    assert "embeddings of an earlier sweep" in printed.err


def test_embeddings_of_other_images_are_made_again(
    swept: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "other", 2, (160, 128))
    assert main(["sweep", str(tmp_path / "other"), "--out", str(swept[1]), *QUICK]) == 0
    assert "earlier sweep" not in capsys.readouterr().err
    assert json.loads((swept[1] / "sweep.json").read_text())["images"] == ["00.png", "01.png"]


def test_embeddings_are_made_again_where_anything_they_follow_from_is_another(
    tmp_path: Path,
) -> None:
    """The name of a backbone may stand for other weights than before, as after a pretraining."""
    write_photos(tmp_path / "photos", 2, (64, 64))
    files = list(find_images(tmp_path / "photos").files)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone, other = (untrained_backbone("test_vit") for _ in range(2))
    asked = Experiment(backbone="untrained:test_vit")
    key = _key(files, backbone, asked)
    assert key == _key(files, backbone, asked.model_copy(update={"num_clusters": 9}))
    smaller = asked.model_copy(update={"views": ViewsConfig(short_side=64)})
    rounded = asked.model_copy(update={"training": TrainingConfig(precision="bf16")})
    other_keys = [_key(files, other, asked), _key(files[1:], backbone, asked)]
    other_keys += [_key(files, backbone, changed) for changed in (smaller, rounded)]
    status = files[0].path.stat()
    os.utime(files[0].path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    other_keys.append(_key(files, backbone, asked))
    assert len({key, *other_keys}) == 6
    # What is gone or at an address may have changed without a sign: nothing is kept.
    assert not _key([replace(files[0], path=Path("gone.png"))], backbone, asked)


@pytest.mark.parametrize("damage", ["cut", "no names", "no picture"])
def test_damaged_embeddings_are_made_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / EMBEDDINGS
    about = {"key": "k", "names": '["a.png"]'}
    tensors = {
        "0.maps": torch.zeros(2, 3, 1, 1),
        "0.pixels": torch.zeros(3, 8, 8, dtype=torch.uint8),
    }
    save_file(tensors, path, about)
    assert [one.name for one in _kept(path, "k")] == ["a.png"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        lacking = {"key": "k", **({"names": '["a.png"]'} if damage == "no picture" else {})}
        save_file({} if damage == "no picture" else tensors, path, lacking)
    assert _kept(path, "k") == []


def test_a_folder_of_something_else_is_left_alone(
    swept: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("of somebody")
    assert main(["sweep", str(swept[0]), "--out", str(tmp_path), *QUICK]) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err
    assert (tmp_path / "sweep.json").read_text() == "{}"
    assert main(["sweep", str(swept[0]), "--out", str(tmp_path / "notes.txt"), *QUICK]) == 2


def test_more_clusters_than_there_are_groups_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos", 2, (64, 64))
    words = ["-k", "2", "500", *QUICK[3:], "--out", str(tmp_path / "out")]
    assert main(["sweep", str(tmp_path / "photos"), *words]) == 0
    assert "500 clusters are left out. Found" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [one["num_clusters"] for one in record["levels"]] == [2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-k", "1", "6"], "expected numbers from 2 to 1000, found 1 6"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
    ],
)
def test_values_out_of_range_are_exit_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "photos", "--out", "out", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_page_keeps_nobody_out(
    swept: tuple[Path, Path], browser: Chrome, check_page: Callable[[str], None]
) -> None:
    browser.get((swept[1] / "sweep.html").as_uri())
    check_page("sweep")
