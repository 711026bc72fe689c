"""Methods side by side: the table against values by hand, then the command."""

from __future__ import annotations

import csv
import json
import math
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from iddc import comparison
from iddc.cli import main
from iddc.comparison import Comparison, Entry, Restarts, final_loss, size_entropy, spread
from iddc.comparison.page import PICTURES, _row, write_page
from iddc.config import Experiment, Runtime
from iddc.datasets.synthetic import write_scenes
from iddc.errors import DataError
from iddc.learning.embeddings import Shared
from iddc.methods.kmeans import KMeans
from iddc.methods.stego import Stego
from iddc.progress import SILENT
from iddc.runs import Run
from tiny import scoring_calls

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


def entry(method: str, seed: int, miou: float, seconds: float | None = 1.0) -> Entry:
    values = {"accuracy": 2 * miou, "miou": miou, "size_entropy": 0.5, "seconds": seconds}
    more = {"trimap": miou / 2, "memory": 2.5e9}
    ends = {"miou": (miou - 0.02, miou + 0.04)}
    return Entry(method, seed, {**values, **more}, {"sky": miou, "sea": None}, ends)


FOUND = Comparison(
    "bundled, 6 clusters, folder",
    (
        entry("kmeans", 0, 0.20),
        entry("kmeans", 1, 0.22),
        entry("hp", 0, 0.25, 7.0),
        entry("hp", 1, 0.23, None),
    ),
    {"stego": "it needs more images"},
)


def test_the_table_has_means_deviations_and_differences_seed_by_seed() -> None:
    header, rows = FOUND.table()
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert table["kmeans"]["mIoU (%)"] == "21.0 ± 1.4"
    assert table["kmeans"]["mIoU - first"] == "-"
    assert table["hp"]["accuracy (%)"] == "48.0 ± 2.8"
    # 5.0 and 1.0 points above k-means of the same seed.
    assert table["hp"]["mIoU - first"] == "+3.0 ± 2.8"
    assert table["hp"]["time (s)"] == "7"
    # The mean ends of 18.0 to 24.0 and 20.0 to 26.0.
    assert table["kmeans"]["over images"] == "19.0 to 25.0"
    assert table["kmeans"]["trimap (%)"] == "10.5 ± 0.7"
    assert table["kmeans"]["memory (GB)"] == "2.5 ± 0.0"
    assert table["stego"]["mIoU (%)"] == "-"


def test_classes_have_a_row_each_and_one_without_any_iou_a_dash() -> None:
    assert FOUND.classes() == (
        ["class", "kmeans", "hp"],
        [["sky", "21.0 ± 1.4", "24.0 ± 1.4"], ["sea", "-", "-"]],
    )


def test_every_format_has_the_same_cells(tmp_path: Path) -> None:
    FOUND.write(tmp_path)
    header, rows = FOUND.table()
    with (tmp_path / "comparison.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [header, *rows]
    text = (tmp_path / "comparison.md").read_text()
    assert "| hp | 2 | 48.0 ± 2.8 | 24.0 ± 1.4 | +3.0 ± 2.8 | 22.0 to 28.0 | 12.0 ± 0.7 |" in text
    assert "| sky | 21.0 ± 1.4 | 24.0 ± 1.4 |" in text
    assert "- stego: it needs more images" in text
    latex = (tmp_path / "comparison.tex").read_text()
    assert r"hp & 2 & 48.0 $\pm$ 2.8 & 24.0 $\pm$ 1.4" in latex
    assert r"accuracy (\%)" in latex
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["miou"] for run in record["runs"]] == [0.20, 0.22, 0.25, 0.23]
    assert record["runs"][0]["iou"] == {"sky": 0.20, "sea": None}
    assert record["runs"][0]["intervals"] == {"miou": pytest.approx([0.18, 0.24])}
    with (tmp_path / "classes.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["sky", "21.0 ± 1.4", "24.0 ± 1.4"]


def test_the_entropy_of_sizes_is_that_of_the_formula() -> None:
    shares = [0.5, 0.25, 0.25, 0.0]
    expected = -sum(p * math.log(p) for p in shares if p) / math.log(4)
    assert size_entropy(np.array([200, 100, 100, 0])) == pytest.approx(expected)
    assert size_entropy(np.array([7, 7])) == pytest.approx(1)


def test_one_value_has_no_deviation_and_none_is_a_dash() -> None:
    assert spread([0.123], 100) == "12.3"
    assert spread([], 100) == "-"


# The command --------------------------------------------------------------------------------------


def test_the_page_keeps_nobody_out(
    tmp_path: Path, browser: Chrome, check_page: Callable[[str], None]
) -> None:
    for method in FOUND.methods:
        (tmp_path / PICTURES / method).mkdir(parents=True)
        for name in ("street", f"{'long' * 40}"):
            panel = Image.effect_mandelbrot((960, 240), (-3, -2.5, 2, 2.5), 40).convert("RGB")
            panel.save(tmp_path / PICTURES / method / f"{name}.png")
    write_page(FOUND, [(0, "street"), (1, f"{'long' * 40}")], tmp_path)
    browser.get((tmp_path / "comparison.html").as_uri())
    check_page("comparison")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 10, 0, (96, 80))
    return folder


def words(scenes: Path, out: Path, *methods: str, seeds: int = 2) -> list[str]:
    options = "--num-clusters 4 --backbone untrained:test_vit --views.short-side 64"
    options += " --device cpu --workers 0"
    command = ["compare", str(scenes / "train"), "--data", str(scenes), "--out", str(out)]
    return [*command, *options.split(), "--seeds", str(seeds), "--methods", *methods]


def test_the_command_trains_scores_and_goes_on(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "comparison"
    assert main(words(scenes, out, "kmeans", seeds=1)) == 0
    first = json.loads((out / "comparison.json").read_text())["runs"]
    # What is there is not trained again; a further seed is.
    trained: list[int] = []
    fit = KMeans.refit

    def counting(self: KMeans, *args: Any) -> dict[str, float]:
        trained.append(self.experiment.seed)
        return fit(self, *args)

    scored: list[object] = []
    evaluate = comparison.evaluate

    def watched(*args: Any, **named: Any) -> Any:
        scored.append(args)
        return evaluate(*args, **named)

    monkeypatch.setattr(KMeans, "refit", counting)
    monkeypatch.setattr(comparison, "evaluate", watched)
    assert main(words(scenes, out, "kmeans")) == 0
    assert (trained, len(scored)) == ([1], 1)
    runs = json.loads((out / "comparison.json").read_text())["runs"]
    assert runs[0] == first[0]
    assert [run["seed"] for run in runs] == [0, 1]
    assert "kmeans" in capsys.readouterr().out
    # The page needs nothing else, and shows each image, its labels and what the method makes of it.
    page = (out / "comparison.html").read_text()
    assert page.count("<figure>") == page.count('src="data:image/webp;base64,') > 0
    assert page.count("<figure>") % 3 == 0
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page


def test_windows_are_embedded_once_for_all_runs_of_a_backbone(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = scoring_calls(monkeypatch)
    assert main(words(scenes, tmp_path / "one", "kmeans", seeds=1)) == 0
    alone = calls.copy()
    calls.clear()
    assert main(words(scenes, tmp_path / "two", "kmeans", "consensus", seeds=1)) == 0
    assert calls == alone != []
    # Random weights of another seed embed anew, once for both.
    calls.clear()
    assert main(words(scenes, tmp_path / "two", "kmeans", "consensus", seeds=2)) == 0
    assert len(calls) == len(alone)
    # The scores are those of the run by itself.
    capsys.readouterr()
    run = str(tmp_path / "two/runs/consensus-0")
    assert main(["evaluate", run, "--data", str(scenes), "--device", "cpu", "--json"]) == 0
    found = json.loads((tmp_path / "two/comparison.json").read_text())["runs"]
    expected = next(row for row in found if (row["method"], row["seed"]) == ("consensus", 0))
    assert json.loads(capsys.readouterr().out)["miou"] == expected["miou"]


def test_scores_are_made_again_where_a_label_was_corrected(tmp_path: Path) -> None:
    out = tmp_path / "val" / "comparison"
    for path in (tmp_path / "val/labels/a.png", tmp_path / "train/images/a.jpg", out / "x.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"first")
    before = comparison.stamp_of(tmp_path, "val", out)
    (tmp_path / "train/images/a.jpg").write_bytes(b"others")
    (out / "x.json").write_bytes(b"others")
    assert comparison.stamp_of(tmp_path, "val", out) == before
    (tmp_path / "classes.txt").write_text("sky")
    named = comparison.stamp_of(tmp_path, "val", out)
    (tmp_path / "val/labels/a.png").write_bytes(b"other")
    corrected = comparison.stamp_of(tmp_path, "val", out)
    assert len({before, named, corrected}) == 3
    assert comparison.stamp_of(tmp_path / "val/labels/a.png", "val", out) not in (named, corrected)


def test_runs_that_exist_are_scored_as_they_were(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(words(scenes, first, "kmeans", "consensus", seeds=1)) == 0
    runs = [str(first / "runs" / name) for name in ("kmeans-0", "consensus-0")]
    rest = ["--data", str(scenes), "--out", str(second), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert main(["compare", *runs, *rest]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((first / "comparison.json").read_text())
    assert found["runs"] == trained["runs"]
    assert found["title"] == f"2 runs, {scenes.name} val"
    assert trained["title"].endswith(f" clusters, {scenes.name} val")
    assert f"<h1>{found['title']}</h1>" in (second / "comparison.html").read_text()


@pytest.mark.parametrize("options", [["--methods", "kmeans"], ["--seeds", "2"], ["--budget", "3"]])
def test_options_of_training_are_refused_where_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    command = ["compare", str(run), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert f"{options[0]}: finished runs are scored as they are" in capsys.readouterr().err


def test_images_and_runs_together_are_refused(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(scenes, tmp_path / "out", "kmeans", seeds=1)
    command.insert(2, str(scenes / "val"))
    assert main(command) == 2
    assert "is no run. Give one folder of images, or the folders" in capsys.readouterr().err


def test_a_comparison_that_was_killed_goes_on_to_the_same_numbers(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words(scenes, whole, "kmeans", "consensus", seeds=1)) == 0
    evaluate, asked = comparison.evaluate, []

    def killed(*args: Any, **named: Any) -> Any:
        asked.append(args)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "evaluate", killed)
        assert main(words(scenes, cut, "kmeans", "consensus", seeds=1)) == 130
    assert not (cut / "comparison.json").exists()
    assert main(words(scenes, cut, "kmeans", "consensus", seeds=1)) == 0

    def numbers(folder: Path) -> list[dict[str, Any]]:
        runs = json.loads((folder / "comparison.json").read_text())["runs"]
        return [{k: v for k, v in run.items() if k not in {"seconds", "memory"}} for run in runs]

    assert numbers(cut) == numbers(whole)


def test_a_budget_is_for_restarts_and_the_lowest_loss_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of 30 s just fit twice into 60 s; the second has the lower loss."""
    losses = {"hp-0": 3.0, "hp-0.restart1": 2.0, "hp-0.restart2": 1.0}

    def train(self: Restarts, folder: Path, number: int, *_: Any) -> dict[str, float | None]:
        return {"seconds": 30.0, "memory": float(number)}

    monkeypatch.setattr(Restarts, "_train", train)
    monkeypatch.setattr(comparison, "final_loss", lambda run: losses[run.path.name])
    restarts = Restarts([], Experiment(), tmp_path / "hp-0", Runtime(), "photos")
    assert restarts.best(60.0, Shared(), SILENT) == (
        tmp_path / "hp-0.restart1",
        {"seconds": 30.0, "memory": 1.0},
    )
    assert restarts.best(0.0, Shared(), SILENT)[0] == tmp_path / "hp-0"


def test_restarts_have_seeds_of_their_own_that_a_run_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def train(_: Any, experiment: Experiment, folder: Path, *__: Any, **___: Any) -> None:
        seeds.append(Experiment.model_validate(experiment.model_dump()).seed)
        assert folder.name == f"hp-{len(seeds)}"

    monkeypatch.setattr(comparison, "trained_run", train)
    for seed in (0, 1, 2**32 - 2):
        for number in range(3):
            folder = tmp_path / f"hp-{len(seeds) + 1}"
            restarts = Restarts([], Experiment(seed=seed), folder, Runtime(), "photos")
            restarts._train(folder, number, Shared(), SILENT)
    assert seeds[::3] == [0, 1, 2**32 - 2]
    assert len({*seeds}) == len(seeds) == 9


def test_the_page_shows_the_image_the_labels_and_then_each_method(tmp_path: Path) -> None:
    def panel(method: str, colours: list[str]) -> None:
        sheet = Image.new("RGB", (90, 20))
        for place, colour in enumerate(colours):
            sheet.paste(colour, (30 * place, 0, 30 * place + 30, 20))
        (tmp_path / PICTURES / method).mkdir(parents=True)
        sheet.save(tmp_path / PICTURES / method / "one.png")

    panel("stego", ["red", "lime", "blue"])
    panel("hp", ["red", "lime", "white"])
    shown = []
    for picture in _row(["stego", "hp"], "one.jpg", tmp_path):
        with Image.open(BytesIO(b64decode(picture.address.split(",")[1]))) as image:
            pixels = np.asarray(image.convert("RGB"), int)
        assert np.ptp(pixels, axis=(0, 1)).max() < 20  # WebP
        shown.append((picture.title, (pixels.mean((0, 1)) > 128).tolist()))
    assert shown == [
        ("image", [True, False, False]),
        ("labels", [False, True, False]),
        ("stego", [False, False, True]),
        ("hp", [True, True, True]),
    ]


def test_restarts_are_told_apart_by_their_last_losses_or_their_inertia(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "loss": i}) + "\n" for i in range(20)))
    assert final_loss(Run(tmp_path)) == pytest.approx(18.5)  # the mean of the last two
    log.write_text(json.dumps({"inertia": 0.25}) + "\n")
    assert final_loss(Run(tmp_path)) == 0.25


def test_a_method_that_the_backbone_does_not_suit_is_a_row_with_its_reason(
    scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    command = words(scenes, out, "kmeans", "transfgu", seeds=1)
    command[command.index("untrained:test_vit")] = "untrained:test_resnet"
    assert main(command) == 5
    record = json.loads((out / "comparison.json").read_text())
    assert "needs the class token of a ViT" in record["failures"]["transfgu"]
    assert [run["method"] for run in record["runs"]] == ["kmeans"]


def test_scores_are_those_of_evaluate(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    assert main([*words(scenes, out, "kmeans", seeds=1), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    folder = str(out / "runs" / "kmeans-0")
    assert main(["evaluate", folder, "--data", str(scenes), "--device", "cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (run["accuracy"], run["miou"]) == (scores["accuracy"], scores["miou"])


def test_a_method_that_fails_has_its_reason_and_the_others_are_done(
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: Any) -> dict[str, float]:
        raise DataError("There are too few images.")

    monkeypatch.setattr(Stego, "refit", failing)
    out = tmp_path / "comparison"
    assert main(words(scenes, out, "stego", "kmeans", seeds=1)) == 5
    record = json.loads((out / "comparison.json").read_text())
    assert record["failures"] == {"stego": "There are too few images."}
    assert [run["method"] for run in record["runs"]] == ["kmeans"]
    assert "stego failed: There are too few images." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--budget", "-1"], "--budget: expected minutes of 0 or more, found -1"),
        (["--methods", "kmeans", "kmeans"], "--methods: expected each method once"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    out = tmp_path / "comparison"
    assert main([*words(scenes, out, "kmeans", seeds=1)[:-4], *change]) == 2
    assert said in capsys.readouterr().err
    assert not (out / "runs").exists()


def test_runs_with_other_options_are_not_taken_for_these(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    assert main(words(scenes, out, "kmeans", seeds=1)) == 0
    other = words(scenes, out, "kmeans", seeds=1)
    other[other.index("--num-clusters") + 1] = "5"
    assert main(other) == 2
    assert "is a run with other options" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.csv").write_text("a table of somebody")
    assert main(words(scenes, tmp_path, "kmeans", seeds=1)) == 2
    assert "holds something else than a comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.csv"]
    assert main(words(scenes, tmp_path / "comparison.csv", "kmeans", seeds=1)) == 2
    assert (tmp_path / "comparison.csv").read_text() == "a table of somebody"


@pytest.mark.parametrize("damage", ["", "soon", "nan", "\0"])
def test_a_time_that_cannot_be_read_is_left_out_of_the_table(
    scenes: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "comparison"
    assert main(words(scenes, out, "kmeans", seeds=1)) == 0
    (clock,) = (out / "runs").glob("*.cost.json")
    clock.write_text(damage)
    assert main(words(scenes, out, "kmeans", seeds=1)) == 0
    (run,) = json.loads((out / "comparison.json").read_text())["runs"]
    assert run["seconds"] is None
    assert run["miou"] > 0
