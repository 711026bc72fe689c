"""The report of a run: one file, right numbers, safe names, and a page that works in a browser."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from iddc.cli import main
from iddc.config import HeadName, MethodName, ObjectiveConfig
from iddc.datasets.synthetic import write_scenes
from iddc.errors import DataError
from iddc.images import find_images
from iddc.masks import Labels, palette, write_labels
from iddc.metrics import UNMATCHED
from iddc.network import build_network
from iddc.recipes import RECIPES
from iddc.report import REPORT, charts, write_report
from iddc.report.drawings import affinities
from iddc.report.look import largest_part, look_at
from iddc.report.pictures import _tile
from iddc.report.sides import ReportedRun, colours_of_partners, match
from iddc.report.tables import nearest
from iddc.report.writing import _names, _with_code
from iddc.runs import Run
from iddc.segmenter import Segmenter
from iddc.thresholds import Affinities
from iddc.windows import to_working_size

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

K = 4


def make_run(
    path: Path,
    source: Path | str,
    *,
    num_clusters: int = K,
    head: HeadName = "linear",
    method: MethodName = "iddc",
    seed: int = 0,
    steps: int = 0,
    objective: ObjectiveConfig | None = None,
) -> Run:
    """A finished run whose head is as random as its backbone."""
    experiment = RECIPES["folder"].experiment()
    cosines = experiment.objective.model_copy(update={"affinity": "cosine"})
    changes = {"num_clusters": num_clusters, "head": head, "method": method, "seed": seed}
    changes |= {"backbone": "untrained:test_vit", "objective": objective or cosines}
    experiment = experiment.model_copy(update=changes)
    with Run.start(path, experiment, source=str(source)) as run:
        for step in range(1, steps + 1):
            run.log(
                step=step, epoch=1, loss=4.0 / step, positive=1.0 / step, live_clusters=4.0,
                seconds=30.0, positive_threshold=0.25, negative_threshold=0.125,
            )  # fmt: skip
        Segmenter.of(build_network(experiment), experiment).save(path)
        run.finish()
    return run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, 5, 0, (96, 64))
    return root / "train"


def text_of(run: Run, **options: Any) -> str:
    written = write_report(run, device="cpu", **options)
    return written.path.read_text("utf-8")


class Tags(HTMLParser):
    """Every element of a page, and the words outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._silent = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.words += "" if self._silent else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def rows(page: str, title: str) -> dict[str, list[str]]:
    """The cells of a table by the first of their row."""
    table = page[page.index(f"<caption>{title}") :].split("</table>", maxsplit=1)[0]
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.S):
        first, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        found[unescape(first)] = [unescape(cell) for cell in cells]
    return found


# What is seen ------------------------------------------------------------------------------------


def test_sizes_and_confusion_are_those_of_the_probabilities(scenes: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(make_run(tmp_path / "run", scenes).path, "cpu")
    files = find_images(scenes).files
    look = look_at(segmenter, files, samples=0)
    assert look is not None
    probs = []
    for file in files:
        with torch.no_grad(), Image.open(file.path) as image:
            grid = segmenter.probs(to_working_size(image, 0, 0)[None])[0]
        probs += [*grid.flatten(1).T.double().numpy()]
    wins: dict[int, list[np.ndarray]] = {}
    for patch in probs:
        wins.setdefault(int(patch.argmax()), []).append(patch)
    for cluster in range(K):
        own = wins.get(cluster, [])
        assert look.counts[cluster] == len(own)
        mean = np.mean(own, axis=0) if own else np.zeros(K)
        assert look.mean_probs.toarray()[cluster] == pytest.approx(mean, abs=1e-5)
    assert look.frequencies == pytest.approx(np.mean(probs, axis=0), abs=1e-5)


def test_effective_clusters_and_confidence_weigh_clusters_by_their_size(
    scenes: Path, tmp_path: Path
) -> None:
    """exp of the entropy of the sizes (nats), and the mean of the highest probability."""
    run = make_run(tmp_path / "run", scenes)
    segmenter = Segmenter.load(run.path, "cpu")
    ids, sure = [], []
    for file in find_images(scenes).files:
        with torch.no_grad(), Image.open(file.path) as image:
            highest = segmenter.probs(to_working_size(image, 0, 0)[None])[0].max(0)
        ids += highest.indices.flatten().tolist()
        sure += highest.values.flatten().tolist()
    shares = [ids.count(cluster) / len(ids) for cluster in {*ids}]
    assert len({round(share, 2) for share in shares}) > 1  # or every mean would do
    effective = math.prod(share**-share for share in shares)
    words = " ".join(Tags(text_of(run)).words.split())
    assert re.search(rf"effective clusters ?{effective:.1f}(?!\d)", words)
    assert re.search(rf"mean confidence ?{100 * sum(sure) / len(sure):.1f} %", words)


def test_of_many_clusters_the_highest_64_probabilities_of_a_patch_are_its_confusion(
    scenes: Path, tmp_path: Path
) -> None:
    k = 20_000  # squared, 1.6 GB
    segmenter = Segmenter.load(make_run(tmp_path / "run", scenes, num_clusters=k).path, "cpu")
    file = find_images(scenes).files[0]
    look = look_at(segmenter, [file], samples=0)
    assert look is not None
    with torch.no_grad(), Image.open(file.path) as image:
        patches = segmenter.probs(to_working_size(image, 0, 0)[None])[0].flatten(1).T.numpy()
    assert look.mean_probs.nnz <= 64 * len(patches)
    cluster = int(look.counts.argmax())
    expected: dict[int, float] = {}
    own = [patch for patch in patches if patch.argmax() == cluster]
    for patch in own:
        for other in np.argsort(-patch)[:64].tolist():
            expected[other] = expected.get(other, 0) + float(patch[other]) / len(own)
    others = sorted((other for other in expected if other != cluster), key=lambda o: -expected[o])
    found = nearest(look, cluster)
    assert [share for _, share in found] == pytest.approx([expected[o] for o in others[:3]])
    assert look.mean_probs[cluster, cluster] == pytest.approx(expected[cluster])


def test_thelargest_part_part_is_connected_by_sides_not_corners() -> None:
    drawn = ["xx..x", "x..xx", ".x.x.", "...x."]
    where = np.array([[cell == "x" for cell in row] for row in drawn])
    right = np.array(
        [[cell == "x" for cell in row] for row in ["....x", "...xx", "...x.", "...x."]]
    )
    assert (largest_part(where) == right).all()


def test_regions_are_one_per_cluster_and_image_and_typical_ones_are_near_the_mean(
    scenes: Path, tmp_path: Path
) -> None:
    segmenter = Segmenter.load(make_run(tmp_path / "run", scenes).path, "cpu")
    look = look_at(segmenter, find_images(scenes).files, samples=2)
    assert look is not None
    places = [(region.image, region.cluster) for region in look.regions]
    assert len({*places}) == len(places) == look.images.sum()
    for region, cosine in zip(look.regions, look.typical, strict=True):
        assert (look.seen[region.image].clusters[look.patches(region)] == region.cluster).all()
        assert -1 <= cosine <= 1 + 1e-6
        with torch.no_grad(), Image.open(find_images(scenes).files[region.image].path) as image:
            grid = segmenter.probs(to_working_size(image, 0, 0)[None])[0, region.cluster]
        sure = grid[torch.from_numpy(look.patches(region))].mean()
        assert region.confidence == pytest.approx(float(sure), abs=1e-5)
    assert [seen.mask is not None for seen in look.seen] == [True, False, True, False]


def test_clusters_that_only_have_other_numbers_match_whole(scenes: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(make_run(tmp_path / "run", scenes).path, "cpu")
    files = find_images(scenes).files
    first = look_at(segmenter, files, samples=0)
    network: Any = segmenter.network
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        network.head.weight.copy_(network.head.weight[order])
        network.head.bias.copy_(network.head.bias[order])
    second = look_at(segmenter, files, samples=0)
    assert first is not None
    assert second is not None
    found = match(first, second)
    assert found.agreement == 1
    occurring = second.counts > 0
    assert (found.partner[occurring] == order.numpy()[occurring]).all()


def test_partners_share_a_colour_and_nobody_else_does() -> None:
    first = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    colours = colours_of_partners(first, np.array([1, UNMATCHED, 0, UNMATCHED]))
    assert colours[[0, 2]].tolist() == first[[1, 0]].tolist()
    assert len({tuple(colour) for colour in colours.tolist()}) == 4


# Charts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.0, 1.0), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((-0.5, 0.5), [-0.4, -0.2, 0, 0.2, 0.4]),
        ((1.0, 32.0), [10, 20, 30]),
        ((0.0, 4000.0), [0, 1000, 2000, 3000, 4000]),
    ],
)
def test_ticks_are_round_numbers(ends: tuple[float, float], expected: list[float]) -> None:
    assert charts.ticks(*ends) == pytest.approx(expected)


def test_values_are_drawn_in_proportion() -> None:
    axes = charts.Axes("t", (0.0, 10.0), (0.0, 4.0), "x")
    assert (axes.across(0.0), axes.across(5.0), axes.across(10.0)) == (46, 209, 372)
    assert (axes.down(0.0), axes.down(1.0), axes.down(4.0)) == (182, 139.5, 12)
    assert axes.path([(1.001, 1.001)]) == "M78.6 139.5"  # a tenth of a pixel is enough


@pytest.mark.parametrize("below", [True, False])
def test_numbers_stand_beside_the_places_they_name(below: bool) -> None:
    axes = charts.Axes("t", (0.0, 10.0), (0.0, 0.4), "the label", percent=True)
    drawn = str(axes.draw(x_ticks=below))
    found = re.findall(r'<text class="(\w+)" x="([\d.]+)" y="([\d.]+)">([^<]*)<', drawn)
    *numbers, label = found
    assert label[3] == "the label"
    left = {words: float(y) for side, _, y, words in numbers if side == "end"}
    under = {words: float(x) for side, x, _, words in numbers if side == "middle"}
    # A letter's middle is 4 pixels above its base.
    assert left == {f"{n} %": axes.down(n / 100) + 4 for n in (0, 10, 20, 30, 40)}
    assert under == ({str(n): axes.across(float(n)) for n in (0, 2, 4, 6, 8, 10)} if below else {})
    assert all(40 <= float(x) < 46 for side, x, *_ in numbers if side == "end")


def test_the_area_under_a_density_stands_on_zero() -> None:
    axes = charts.Axes("", (0.0, 4.0), (0.0, 2.0), "")
    points = [(0.5, 1.0), (2.0, 2.0), (3.0, 0.5)]
    drawn = charts.densities(axes, [charts.Line("a", "same", points)], [])
    assert axes.path([(0.5, 0.0), *points, (3.0, 0.0)]) in drawn
    assert axes.down(0.0) == 182


def test_the_longest_bar_or_highest_dot_reaches_nearly_to_the_top(
    scenes: Path, tmp_path: Path
) -> None:
    page = text_of(make_run(tmp_path / "run", scenes), samples=0)
    chart = page.split('aria-label="Sizes')[1].split("</svg>")[0]
    tops = [float(y) for y in re.findall(r'<(?:rect|circle)[^>]* c?y="([\d.]+)"', chart)]
    assert len(tops) == 2 * K
    assert min(tops) == pytest.approx(12 + 170 * (1 - 1 / 1.05), abs=0.06)


def test_affinities_are_drawn_where_there_are_any_and_two_steps_beyond(
    scenes: Path, tmp_path: Path
) -> None:
    objective = ObjectiveConfig(positive_threshold=0.2, negative_threshold=0.12)
    run = make_run(tmp_path / "run", scenes, objective=objective)
    look = look_at(Segmenter.load(run.path, "cpu"), find_images(scenes).files, samples=0)
    assert look is not None
    pairs, bins = look.affinities, len(look.affinities.same)
    there = [i for i in range(bins) if pairs.same[i] or pairs.different[i]]
    shown = range(max(0, there[0] - 2), min(bins, there[-1] + 3))
    page = text_of(run, samples=0)
    chart = page.split('aria-label="Affinities')[1].split("</svg>")[0]
    (path,) = re.findall(r'class="line same" d="M([^"]*)"', chart)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    assert len(points) == len(shown)
    # The axis ends 5 % of its span beyond the outermost middles of the steps and thresholds.
    middles = [-1 + (i + 0.5) * 2 / bins for i in shown]
    ends = [*middles, 0.2, 0.12]
    room = 0.05 * (max(ends) - min(ends))
    scale = (372 - 46) / (max(ends) - min(ends) + 2 * room)
    expected = [46 + (middle - min(ends) + room) * scale for middle in middles]
    assert [x for x, _ in points] == pytest.approx(expected, abs=0.06)
    marks = [float(x) for x in re.findall(r'<line class="mark" x1="([\d.]+)"', chart)]
    expected = [46 + (threshold - min(ends) + room) * scale for threshold in (0.12, 0.2)]
    assert marks == pytest.approx(expected, abs=0.06)


def test_a_tile_shows_its_region_in_the_middle() -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[120:140, 200:220] = 255
    patches = np.zeros((20, 30), bool)
    patches[12:14, 20:22] = True
    light = np.asarray(_tile(Image.fromarray(pixels), patches).convert("L"), float)
    bright = np.argwhere(light > 200)
    middle = (light.shape[0] - 1) / 2
    assert np.abs(bright.mean(axis=0) - middle).max() < 1


def test_a_tile_shows_all_of_a_long_region() -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[100:110, 60:220] = 255
    patches = np.zeros((20, 30), bool)
    patches[10, 6:22] = True
    light = np.asarray(_tile(Image.fromarray(pixels), patches).convert("L"), float) > 200
    across = light.any(axis=0)
    assert not across[[0, -1]].any()
    assert across.mean() == pytest.approx(1 / 1.25, abs=0.03)


def test_what_surrounds_a_region_is_grey_and_of_less_contrast() -> None:
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:, np.arange(300) // 10 % 2 > 0] = (255, 80, 80)  # stripes, in grey 132 apart
    patches = np.zeros((20, 30), bool)
    patches[8:12, 13:17] = True
    tile = np.asarray(_tile(Image.fromarray(pixels), patches), float)
    region, around = tile[len(tile) // 2], tile[0]
    assert np.ptp(region, axis=1).max() > 150
    assert np.ptp(around, axis=1).max() == 0
    where = region[:, 0] - region[:, 0].mean()
    assert 20 < np.ptp(around) < 132 / 2
    assert (where * around[:, 0]).sum() > 0  # what is light stays lighter


def test_shares_beyond_the_thresholds_are_those_of_the_pairs(scenes: Path, tmp_path: Path) -> None:
    objective = ObjectiveConfig(positive_threshold=0.2, negative_threshold=0.1)
    run = make_run(tmp_path / "run", scenes, objective=objective)
    look = look_at(Segmenter.load(run.path, "cpu"), find_images(scenes).files, samples=0)
    assert look is not None
    even = np.full(100, 0.5)  # from -1 to 1: 0.8 of 2 lie above 0.2, 1.1 of 2 below 0.1
    look = replace(look, affinities=Affinities(even, even))
    side = ReportedRun(
        "run", run.experiment, Labels.numbered(K), look, (), (), {}, "", 0, palette(K)
    )
    text = affinities(side, look)[1]
    assert "t+ = 0.20: 40.0 % of the pairs of one cluster" in text
    assert "t− = 0.10: 55.0 % of the pairs of two" in text


def test_the_words_of_a_mask_say_how_much_each_large_cluster_covers(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scenes)
    page = unescape(text_of(run, samples=1))
    file = find_images(scenes).files[0]
    with Image.open(file.path) as photo:
        clusters = Segmenter.load(run.path, "cpu").predict(photo).clusters
    words = re.search(rf"Mask of {file.name} by [^:]*: ([^\"<]*)", page)
    assert words is not None
    found = {int(c): float(share) for c, share in re.findall(r"(\d+) ([\d.]+) ?%", words[1])}
    shares = np.bincount(clusters.ravel(), minlength=K) / clusters.size
    assert found == {c: pytest.approx(100 * shares[c], abs=0.06) for c in found}
    assert sum(found.values()) > 90


def test_the_thresholds_of_a_log_of_one_line_are_read(scenes: Path, tmp_path: Path) -> None:
    page = text_of(make_run(tmp_path / "run", scenes, steps=1), samples=0)
    assert "t+ = 0.25: " in page
    assert "t− = 0.12: " in page


def test_a_curve_of_one_value_is_drawn(scenes: Path, tmp_path: Path) -> None:
    tags = Tags(text_of(make_run(tmp_path / "run", scenes, steps=1), samples=0))
    paths = [attrs["d"] or "" for attrs in tags.all("path") if attrs["class"] == "line run0"]
    assert len(paths) == 3
    assert all(re.fullmatch(r"M[\d.]+ [\d.]+", path) for path in paths)


# The page ----------------------------------------------------------------------------------------


def test_the_verdict_stands_above_the_samples(scenes: Path, tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path / "run", scenes))
    assert text.index("Verdict: ") < text.index('id="samples"')
    assert f"of {K} clusters are in use" in text


def test_commands_in_the_verdict_are_code_and_the_rest_of_it_is_text() -> None:
    assert _with_code("Try `iddc sweep <X>`, & look.") == (
        "Try <code>iddc sweep &lt;X&gt;</code>, &amp; look."
    )


def test_a_report_is_one_file_that_may_fetch_nothing(scenes: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenes, steps=3)
    tags = Tags(text_of(run))
    addresses = [a for _, attrs in tags.elements for k, a in attrs.items() if k in ("src", "href")]
    assert len(addresses) > 10
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    page = (run.path / REPORT).read_text()
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = tags.all("meta")[1]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not any(key.startswith("on") for _, attrs in tags.elements for key in attrs)


EVIL = "\"><img src=x onerror=alert(1)> & 'so'"


def test_names_with_quotes_and_html_are_only_text(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images \"'<b>"
    images.mkdir()
    photo = next((scenes / "images").iterdir())
    for name in ("<script>alert(1)<\n script>.jpg", '" onload="alert(1).jpg'):
        (images / name).write_bytes(photo.read_bytes())
    run = make_run(tmp_path / '<i onclick="x">run', images, steps=2)
    write_labels(run.path, Labels.numbered(K).edit({c: f"{EVIL} {c}" for c in range(3)}))
    run.add_score(
        data=f"/data/{EVIL}", dataset="folder", split="val", protocol="full", refinement="none",
        images=2, accuracy=0.5, miou=0.25, iou={f"{EVIL}\nnew line": 0.5}, matching=[],
    )  # fmt: skip
    plain = Tags(text_of(make_run(tmp_path / "plain", images, steps=2)))
    tags = Tags(text_of(run))
    assert len(tags.all("script")) == 1
    assert len(tags.all("img")) == len(plain.all("img"))
    assert not tags.all("b")
    assert not any(key.startswith("on") for _, attrs in tags.elements for key in attrs)
    assert tags.words.count(EVIL) > 3
    assert '<i onclick="x">run' in tags.words
    assert any(EVIL in (attrs.get("aria-label") or "") for attrs in tags.all("article"))


def test_a_run_whose_images_are_gone_still_has_a_report_that_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path / "gone", steps=3)
    written = write_report(run, device="cpu")
    tags = Tags(written.path.read_text())
    assert written.why == "The images of the training are no longer where they were."
    assert written.why in tags.words
    assert "iddc report RUN --images IMAGES" in tags.words
    assert [attrs["aria-label"] for attrs in tags.all("svg")] == [
        "Loss", "Positive term, L+", "Live clusters"
    ]  # fmt: skip


def test_images_can_be_given(scenes: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path / "gone")
    tags = Tags(text_of(run, images=scenes, samples=3))
    assert (
        len([attrs for attrs in tags.all("input") if "Line" in str(attrs.get("aria-label"))]) == 3
    )
    with pytest.raises(DataError, match="No such file"):
        write_report(run, images=tmp_path / "nowhere", device="cpu")


def test_a_run_that_names_no_images_and_images_that_cannot_be_read_are_said(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scenes)
    (run.path / "config.yaml").unlink()
    (run.path / "versions.json").write_text("{")
    assert "does not say which images" in write_report(run, device="cpu").why
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    why = write_report(run, images=tmp_path / "bad", device="cpu").why
    assert why == "None of the images can be read."


def test_only_images_that_were_trained_on_are_looked_at(scenes: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenes)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("limit: null", "limit: 2"))
    tags = Tags(text_of(run))
    assert "Learned without labels from train, the first 2." in tags.words
    assert len([attrs for attrs in tags.all("img") if attrs.get("class") == "mask"]) == 2


def test_a_data_set_that_was_trained_on_is_found_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", f"potsdam3:{tmp_path / 'gone'}")
    assert "no longer where they were" in write_report(run, device="cpu").why


@pytest.mark.slow
def test_a_thousand_clusters_of_noise_stay_below_20_megabytes(tmp_path: Path) -> None:
    """Noise is what no picture format makes small. Many clusters never occur."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        noise = rng.integers(0, 256, (640, 640, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{index:02}.png", compress_level=0)
    page = text_of(make_run(tmp_path / "run", images, num_clusters=1000), samples=1)
    tags = Tags(page)
    sample = sum(len(attrs["src"] or "") for attrs in tags.all("img")[:2])
    assert len(page) + 11 * sample < 20e6  # with 12 samples
    assert len(tags.all("article")) == 100
    table = rows(page, "All 1,000 clusters")
    assert {f"{cluster}" for cluster in range(1000)} <= table.keys()
    never = [cells for cells in table.values() if cells[1] == "0.0 %" and cells[4] == "–"]
    assert len(never) > 100
    assert "and 960 more" in page


def test_of_more_than_a_thousand_clusters_thelargest_part_have_bars(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scenes, num_clusters=1100)
    page = text_of(run, images=next((scenes / "images").iterdir()), samples=0)
    assert len(Tags(page).all("rect")) == 1000
    assert "the 1,000 largest clusters" in page
    assert len(rows(page, "All 1,100 clusters")) == 1101


def test_a_cluster_that_never_occurs_is_listed_without_pictures(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scenes)
    segmenter = Segmenter.load(run.path, "cpu")
    network: Any = segmenter.network
    with torch.no_grad():
        network.head.bias[1] = -1e4
    segmenter.save(run.path)
    page = text_of(run, samples=0)
    assert page.count("Not found in these images.") == 1
    assert rows(page, "All 4 clusters")["1"][1:5] == ["0.0 %", "0.0 %", "0", "–"]
    assert (
        dict(re.findall(r"<span>(.*?)</span><strong>(.*?)</strong>", page))["used in these images"]
        == "3"
    )


def test_ignored_clusters_are_in_no_mask_and_no_legend(scenes: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenes)
    segmenter, files = Segmenter.load(run.path, "cpu"), find_images(scenes).files
    look = look_at(segmenter, files, samples=0)
    assert look is not None
    named = int(look.counts.argmax())
    write_labels(run.path, Labels.numbered(K).edit(dict.fromkeys({*range(K)} - {named}, "ignore")))
    tags = Tags(text_of(run, samples=1))
    assert len([attrs for attrs in tags.all("li") if "data-colour" in attrs]) == 1
    (address,) = [attrs["src"] for attrs in tags.all("img") if attrs.get("class") == "mask"]
    data = base64.b64decode((address or "").split(",")[1])
    with Image.open(BytesIO(data)) as image, Image.open(files[0].path) as photo:
        shown = np.asarray(image.convert("RGBA"))[..., 3] > 0
        clusters = segmenter.predict(photo).clusters
    assert (shown == (clusters == named)).all()


# Numbers -----------------------------------------------------------------------------------------


def test_the_log_becomes_curves_and_a_broken_line_does_no_harm(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scenes, steps=240)
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"step": 241, "loss": NaN, "positive": 0.5}\n[1]\n{"step": 242, "lo')
    page = text_of(run, samples=0)
    body = page.split("<caption>The curves in numbers")[1].split("</table>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr>")[1:]]
    assert cells[0] == ["run", "step", "loss", "positive", "live clusters"]
    assert cells[1] == ["run", "2", "3", "0.75", "4"]  # means of 4/1 and 4/2, of 1/1 and 1/2
    assert len(cells) == 1 + 120
    summary = rows(page, "What was trained")
    assert summary["steps"] == ["240"]
    assert summary["time in steps"] == ["2 h 00 min"]
    assert summary["t+, t−"] == ["0.25, 0.12"]


def test_a_baseline_has_no_curves_no_thresholds_and_no_regularizer(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scenes, head="centroids", method="kmeans")
    run.log(vectors=100, inertia=0.5)
    run.log(step=0, epoch=0, loss=0.5, groups=4.0)  # as the consensus tells what it has taught
    page = text_of(run, samples=0)
    assert rows(page, "What was trained")["method"] == ["k-means"]
    assert "There are no curves" in page
    assert " steps." not in page.split("<main>")[0]
    assert "Training pulls pairs" not in page
    assert "A dot is its mean probability" in page
    assert "regulariser" not in page.split("<summary>Every option")[0]


def test_the_regularizer_at_equal_sizes_is_that_of_the_paper(scenes: Path, tmp_path: Path) -> None:
    """Eq. (7) by hand: K k p^(k-1) exp(-p^k) at p = 1/K."""
    objective = ObjectiveConfig(regularizer="weibull", weibull_shape=0.3, regularizer_weight=0.3)
    run = make_run(tmp_path / "run", scenes, objective=objective)
    p, k = 1 / K, 0.3
    expected = K * k * p ** (k - 1) * math.exp(-(p**k))
    text = Tags(text_of(run, samples=0)).words
    assert "Dashed: 1/K = 25.0 %, equal sizes." in text
    assert f"(weibull, weight 0.3) is lowest there, {expected:.4g};" in text


def test_thresholds_that_nobody_knows_are_not_drawn(scenes: Path, tmp_path: Path) -> None:
    objective = ObjectiveConfig(positive_threshold="auto", negative_threshold=0.1)
    page = text_of(make_run(tmp_path / "run", scenes, objective=objective), samples=0)
    assert rows(page, "What was trained")["t+, t−"] == ["–"]
    assert "t+ =" not in page


@pytest.mark.parametrize(("negative", "names"), [(0.1, ["t−", "t+"]), (0.2, ["t+ = t−"])])
def test_thresholds_are_marked_among_the_affinities(
    scenes: Path, tmp_path: Path, negative: float, names: list[str]
) -> None:
    objective = ObjectiveConfig(positive_threshold=0.2, negative_threshold=negative)
    page = text_of(make_run(tmp_path / "run", scenes, objective=objective), samples=0)
    chart = page.split('aria-label="Affinities')[1].split("</svg>")[0]
    assert re.findall(r"<text[^>]*>(t[^<]*)<", chart) == names
    assert f"t− = {negative:.2f}: " in page


def test_scores_are_in_the_report_class_by_class(scenes: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path / "gone")
    iou = {"sky": 0.5, "car": None}
    common: dict[str, Any] = {"accuracy": 0.75, "miou": 0.5, "iou": iou}
    note = "A person saw images."
    run.add_score(
        data="/home/me/town", dataset="folder", split="val", protocol="full", refinement="crf",
        images=7, **common, by_name={"note": note, **common, "accuracy": 0.25},
    )  # fmt: skip
    page = text_of(run)
    table = rows(page, "town · folder · val · protocol full · 7 images · refined: crf")
    assert table == {
        "": ["run", "run, by name"],
        "mIoU": ["50.0 %", "50.0 %"],
        "accuracy": ["75.0 %", "25.0 %"],
        "IoU sky": ["50.0 %", "50.0 %"],
        "IoU car": ["–", "–"],
    }
    assert note in page
    assert "/home/me" not in page
    assert "Labels were read for the scores only." in page


def test_damaged_scores_and_huge_numbers_are_dashes_or_left_out(
    scenes: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tmp_path / "gone", steps=2)
    with (run.path / "log.jsonl").open("a") as file:
        file.write(f'{{"step": 3, "loss": 1e-320, "positive": {10**400}, "seconds": "x"}}\n')
    run.add_score(data="d", dataset=[1], miou="high", accuracy=None, iou=[0.5], by_name=3)
    page = text_of(run)
    table = rows(page, "d · [1] · – · protocol – · – images")
    assert table == {"": ["run"], "mIoU": ["–"], "accuracy": ["–"]}
    assert rows(page, "What was trained")["steps"] == ["3"]


def test_two_runs_stand_side_by_side(scenes: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run", scenes, steps=2)
    second = make_run(tmp_path / "b" / "run", scenes, num_clusters=K + 1, seed=1)
    page = text_of(first, compare=second, samples=2)
    tags = Tags(page)
    assert rows(page, "What was trained")["clusters, K"] == ["4", "5"]
    assert rows(page, "What was trained")[""] == ["a/run", "b/run"]
    assert len([a for a in tags.all("img") if a.get("class") == "mask"]) == 4
    assert len(tags.all("article")) == K + K + 1
    assert "No cluster of a/run matches." in tags.words
    assert re.search(r"The two runs agree on [\d.]+\s% of the patches", tags.words)
    options = list(rows(page, "Every option, those that differ first").items())
    assert dict(options[1:3]) == {"num-clusters": ["4", "5"], "seed": ["0", "1"]}
    assert not (second.path / REPORT).exists()
    # The report of the first run alone stays what it was.
    assert [path.name for path in first.path.glob("*.html")] == ["report-run.html"]


def test_runs_have_as_much_of_their_paths_as_tells_them_apart(scenes: Path, tmp_path: Path) -> None:
    assert _names([Path("/a/runs/photos"), Path("/b/runs/photos")]) == [
        "a/runs/photos",
        "b/runs/photos",
    ]
    assert _names([Path("/a/b"), Path("/a/c")]) == ["b", "c"]
    assert _names([Path("/a/b")] * 2) == ["b (1)", "b (2)"]
    run = make_run(tmp_path / "my run", scenes)
    run.add_score(data="d", dataset="folder", split="val", protocol="full", miou=0.11)
    page = text_of(run, compare=run, samples=0)
    assert rows(page, "d · folder")["mIoU"] == ["11.0 %", "11.0 %"]


def test_an_image_of_one_patch_has_no_affinities(scenes: Path, tmp_path: Path) -> None:
    Image.new("RGB", (12, 12)).save(tmp_path / "one.png")
    page = text_of(make_run(tmp_path / "run", scenes), images=tmp_path / "one.png")
    assert "no pair of patches to compare" in Tags(page).words


# The command -------------------------------------------------------------------------------------


def test_the_command_says_where_the_report_is_and_what_is_missing(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "my run", scenes)
    assert main(["report", str(run.path), "--samples", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run.path / REPORT}    next: ")
    assert said.endswith(f"iddc label '{run.path}'\n")
    other = make_run(tmp_path / "other", tmp_path / "gone")
    command = ["report", str(other.path), "--compare", str(run.path), "--device", "cpu"]
    assert main(command) == 0
    assert "no longer where they were. Give others with --images." in capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 3
    assert "No run in" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--samples", "65"]) == 2
    assert "--samples: expected 0 to 64, found 65." in capsys.readouterr().err


def test_a_report_is_written_where_it_is_wanted(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run", scenes), tmp_path / "deep" / "page.html"
    command = ["report", str(run.path), "--samples", "0", "--device", "cpu", "--out"]
    assert main([*command, str(out)]) == 0
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert not (run.path / REPORT).exists()
    assert main([*command, str(tmp_path / "page.txt")]) == 2
    assert "a file that ends in .html" in capsys.readouterr().err


def test_names_stand_inside_the_regions_they_name(scenes: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scenes)
    segmenter, files = Segmenter.load(run.path, "cpu"), find_images(scenes).files
    write_labels(run.path, Labels.numbered(K).edit({0: "sky"}))
    page = text_of(run, samples=1)
    with Image.open(files[0].path) as photo:
        clusters = segmenter.predict(photo).clusters
    tags = re.findall(r'<span style="left:([\d.]+)%;top:([\d.]+)%">(.*?)</span>', page)
    height, width = clusters.shape
    found = {
        name: clusters[int(float(top) / 100 * height), int(float(left) / 100 * width)]
        for left, top, name in tags
    }
    # In the middle of a pixel that lies deepest in the largest region.
    for left, top, name in tags:
        inside = np.pad(largest_part(clusters == (0 if name == "sky" else int(name))), 1)
        depth: Any = ndimage.distance_transform_cdt(inside)
        row, column = float(top) / 100 * height - 0.5, float(left) / 100 * width - 0.5
        assert abs(row - round(row)) < 0.1
        assert depth[round(row) + 1, round(column) + 1] == depth.max()
    large = [c for c in range(K) if (clusters == c).mean() >= 0.02]
    assert found == {"sky" if c == 0 else str(c): c for c in large}


def test_a_report_of_5_000_images_looks_at_64_and_stays_small(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    photo = find_images(scenes).files[0].path
    for number in range(5000):
        os.link(photo, tmp_path / "many" / f"photo-{number:04}{photo.suffix}")
    text = text_of(make_run(tmp_path / "run", tmp_path / "many"), samples=64)
    assert "were measured on 64 images" in text
    assert text.count('class="mask"') == 64
    assert "photo-4921" in text  # the last of 64 that are spread evenly
    assert len(text) < 2_000_000


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report."""
    run = make_run(tmp_path_factory.mktemp("shown") / "run", scenes, steps=40)
    write_labels(run.path, Labels.numbered(K).edit({0: "sky", 1: EVIL}))
    return write_report(run, device="cpu", samples=2).path.as_uri()


def media(browser: Chrome, scheme: str, width: int) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_the_page_fits_follows_light_and_dark_and_keeps_nobody_out(
    browser: Chrome, shown: str, screen: str, check_page: Callable[[str], None]
) -> None:
    browser.get(shown)
    colour = browser.execute_script("return getComputedStyle(document.documentElement).color")
    light = sum(map(int, re.findall(r"\d+", colour)[:3])) > 3 * 128
    assert light == screen.startswith("dark")
    check_page("report")


def test_names_of_200_characters_push_nothing_out_of_a_narrow_page(
    browser: Chrome, scenes: Path, tmp_path: Path
) -> None:
    (tmp_path / "long").mkdir()
    for number, file in enumerate(find_images(scenes).files[:2]):
        os.link(file.path, tmp_path / "long" / f"{number}{'x' * 195}.jpg")
    run = make_run(tmp_path / ("r" * 200), tmp_path / "long")
    write_labels(run.path, Labels.numbered(K).edit({0: "n" * 100}))
    media(browser, "light", 390)
    browser.get(write_report(run, device="cpu", samples=2).path.as_uri())
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")


def test_a_sample_and_a_mosaic_are_enlarged(browser: Chrome, shown: str) -> None:
    from selenium.webdriver import Keys

    browser.get(shown)
    for selector, part in ((".enlarge", "dialog .mask"), (".mosaic", "dialog img")):
        small = browser.find_element("css selector", f".sample .mask, {part}").size["width"]
        browser.find_element("css selector", selector).click()
        assert browser.find_element("css selector", part).size["width"] > small
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert not browser.find_element("id", "large").is_displayed()


def test_further_images_are_shown_on_demand(browser: Chrome, tmp_path: Path) -> None:
    write_scenes(tmp_path / "many", 15, 0, (96, 64))
    run = make_run(tmp_path / "run", tmp_path / "many" / "train")
    browser.get(write_report(run, device="cpu", samples=12).path.as_uri())
    seen = "return [...document.querySelectorAll('.sample')].filter((s) => s.offsetWidth).length"
    assert browser.execute_script(seen) == 8
    browser.find_element("id", "more").click()
    assert browser.execute_script(seen) == 12


def test_the_line_between_photo_and_mask_moves_by_keys_and_by_mouse(
    browser: Chrome, shown: str
) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.get(shown)
    slider = browser.find_element("css selector", ".stage input")
    mask = browser.find_element("css selector", ".mask")

    def clip() -> float:
        found = re.search(r"([\d.]+)%\)", mask.value_of_css_property("clip-path"))
        assert found
        return float(found[1])

    assert clip() == 50
    slider.send_keys(Keys.ARROW_LEFT * 3)
    assert clip() == 47
    slider.send_keys(Keys.HOME)
    assert clip() == 0
    quarter = -slider.size["width"] // 4
    ActionChains(browser).move_to_element_with_offset(slider, quarter, 0).click().perform()
    assert clip() == pytest.approx(25, abs=2)


def test_pointing_at_a_mask_names_the_cluster_there(browser: Chrome, shown: str) -> None:
    from selenium.webdriver import ActionChains

    browser.get(shown)
    stage = browser.find_element("css selector", ".stage")
    ActionChains(browser).move_to_element(stage).perform()
    name = browser.find_element("css selector", ".sample output").text
    legend = [item.text for item in browser.find_elements("css selector", ".legend li")]
    assert name in legend


def test_tables_are_copied_as_tab_separated_text(browser: Chrome, shown: str) -> None:
    browser.get(shown)
    browser.execute_script(
        "navigator.clipboard.writeText = async (text) => { window.copied = text; }"
    )
    browser.find_element("css selector", "#run .copy").click()
    lines = browser.execute_script("return window.copied").splitlines()
    assert "method\tIDDC" in lines
    assert "clusters, K\t4" in lines


def test_the_masks_fade(browser: Chrome, shown: str) -> None:
    from selenium.webdriver import Keys

    browser.get(shown)
    browser.find_element("id", "opacity").send_keys(Keys.END)
    mask = browser.find_element("css selector", ".mask")
    assert mask.value_of_css_property("opacity") == "1"
