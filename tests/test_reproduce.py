"""`iddc reproduce`, in small: every table and figure on drawn scenes, and what it promises."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import iddc.reproduce as reproducing
from iddc.backbones import save_backbone, untrained_backbone
from iddc.cli import main
from iddc.config import Experiment, ObjectiveConfig, Runtime, TrainingConfig, ViewsConfig
from iddc.datasets.fake import write_fake
from iddc.datasets.synthetic import write_scenes
from iddc.errors import ConfigError, Interrupted, NumericError, SetupError
from iddc.learning import fit
from iddc.progress import Progress
from iddc.recipes import FIGURES, RECIPES, TABLES, Panel, Row
from iddc.reproduce import Report, Settings, reproduce, work
from iddc.reproduce.plan import Job, choose, job_of
from iddc.reproduce.plots import _DRAWERS, _draw_sweep, regularizer_curves
from iddc.reproduce.report import Outcome, spread
from iddc.reproduce.smoke import LABEL
from iddc.reproduce.work import Runner
from iddc.runs import Run
from iddc.runs.configfile import load_config
from tiny import scoring_calls, write_photos

FEW = {
    "fig4": ("*x0.25", "sizes-*"),
    "fig5": ("log-*x1", "exp-*x1"),
    "fig6": ("*x1",),
    "fig7": ("thresholds+0*", "epochs"),
}
"""Of the sweeps some points, so that a test takes seconds."""


class Notes(Progress):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests that only read it, so that they share runs."""
    return tmp_path_factory.mktemp("reproduced")


def smoke(name: str, out: Path, **settings: Any) -> Report:
    rows = FEW.get(name, ())
    chosen = Settings(**{"smoke": True, "seeds": 2, "rows": rows, "refine": "fast"} | settings)
    return reproduce(name, chosen, out, progress=Notes())


def planned(table: str, row: str, classes: int = 27, **settings: Any) -> Job:
    """What a row needs, without doing it."""
    (found,) = (found for found in TABLES[table].rows if found.name == row)
    job = job_of(found, TABLES[table], Settings(**{"data": Path("data")} | settings), classes)
    assert job is not None
    return job


def saved(result: Report) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(result.path.with_suffix(".json").read_text())
    return record


def outcome(result: Report, name: str) -> Outcome:
    (found,) = (outcome for outcome in result.outcomes if outcome.row.name == name)
    return found


# Every table and figure ---------------------------------------------------------------------------


SLOW = {"table1", "table3"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TABLES]
)
def test_a_table_runs_on_drawn_scenes(name: str, out: Path) -> None:
    result = smoke(name, out, seeds=1)
    for found in result.outcomes:
        if found.job:
            assert not found.reason
            assert not found.failures
            assert sorted(found.entries) == [0]
            assert all(0 <= value <= 1 for value in found.values("miou"))
    page = result.path.read_text()
    assert LABEL in page
    assert ("hyper-parameters not published" in page) == (
        name in {"table5", "table6", "table7", "table8"}
    )
    for row in TABLES[name].rows:
        assert f"| {' | '.join(row.cells)} |" in page
        assert f"{100 * row.published[1]:.1f}" in page
    assert saved(result)["label"] == LABEL


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "fig2"])
def test_a_figure_runs_on_drawn_scenes_and_is_drawn(name: str, out: Path) -> None:
    result = smoke(name, out, seeds=1)
    assert all(sorted(found.entries) == [0] for found in result.outcomes)
    with Image.open(result.path.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert LABEL in result.path.read_text()


def test_the_smoke_of_a_table_touches_nothing_but_its_own_folder(out: Path) -> None:
    smoke("table8", out)
    assert [path.name for path in out.iterdir()] == ["smoke"]


@pytest.mark.parametrize(("repeat", "epochs"), [(0, 3 * 3), (2, 2 * 3 + 1), (9, 3 * 3)])
def test_the_time_of_a_training_is_guessed_from_steps_with_and_without_new_views(
    repeat: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_photos(tmp_path / "photos", 6)
    experiment = Experiment(
        num_clusters=3,
        backbone="untrained:test_vit",
        epochs=3,
        views=ViewsConfig(crop_size=32, short_side=0, repeat=repeat),
        training=TrainingConfig(batch_size=2, precision="fp32"),
    )
    # The first step takes 50 seconds, one with new views 3, and one with views that are kept 1.
    clock = iter([0, 50, 50, 53, 60, 61])
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    runner = Runner(files, "folder", tmp_path, 1, 3, Runtime(device="cpu"), Notes())
    # 3 steps of 2 images an epoch, and 4 images were in each of these steps.
    assert runner.seconds(experiment) == pytest.approx(3 * epochs * 2 / 4)


# Runs and scores are used again -------------------------------------------------------------------


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("this has been done before")


def test_finished_runs_and_their_scores_are_used_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = smoke("table6", out)
    monkeypatch.setattr("iddc.learning.loop.fit", refuse)
    monkeypatch.setattr(work, "evaluate", refuse)
    again = smoke("table6", out)
    assert saved(again)["rows"] == saved(before)["rows"]


def test_windows_are_embedded_once_and_scores_are_those_of_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = scoring_calls(monkeypatch)

    def scores(forget: bool) -> tuple[list[float], int]:
        calls.clear()
        if forget:
            monkeypatch.setattr(work, "keep_embeddings", lambda *_: None)
        result = smoke("table6", tmp_path / str(forget), seeds=2)
        return [value for found in result.outcomes for value in found.values("miou")], sum(calls)

    (ours, once), (plain, often) = scores(forget=False), scores(forget=True)
    assert ours == plain
    runs = 2 * len(TABLES["table6"].rows)
    assert 0 < once * runs == often


def test_rows_of_two_tables_that_are_one_experiment_share_a_run(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table5 = smoke("table5", out, rows=("exp",))
    monkeypatch.setattr("iddc.learning.loop.fit", refuse)
    table6 = smoke("table6", out, rows=("all",))
    figure = smoke("fig5", out, rows=("exp-lambda?x1",))
    points = [found for found in figure.outcomes if not found.kept]
    assert len(points) == 2
    for other in (outcome(table6, "all"), *points):
        assert other.runs == outcome(table5, "exp").runs


def test_rows_of_an_earlier_command_stay_in_the_table(tmp_path: Path) -> None:
    first = smoke("table6", tmp_path, rows=("kmeans",), seeds=1)
    both = smoke("table6", tmp_path, rows=("no-neg*",), seeds=1)
    assert [(found.row.name, found.kept) for found in both.outcomes] == [
        ("kmeans", True),
        ("no-negatives", False),
    ]
    assert outcome(both, "kmeans").entries == outcome(first, "kmeans").entries
    assert [row["name"] for row in saved(both)["rows"]] == ["kmeans", "no-negatives"]
    gone = Settings(data=tmp_path / "gone", seeds=1)
    before = both.path.read_bytes()
    assert reproduce("table6", gone, both.path.parent).exit_code == 3
    assert both.path.read_bytes() == before


def test_the_exit_code_is_that_of_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert smoke("table8", tmp_path, seeds=1, rows=("frozen",)).exit_code == 0
    monkeypatch.setattr(reproducing, "missing", lambda *_: "no weights")
    assert smoke("table8", tmp_path / "other", seeds=1).exit_code == 4
    monkeypatch.undo()

    def fail(*_: object, **__: object) -> Any:
        raise NumericError("Not finite at step 1.")

    monkeypatch.setattr("iddc.learning.loop.fit", fail)
    failed = smoke("table8", tmp_path, seeds=2, rows=("frozen",))
    assert (failed.exit_code, len(outcome(failed, "frozen").entries)) == (5, 1)


def test_a_row_with_refinement_scores_the_run_of_the_row_without(out: Path) -> None:
    result = smoke("table4", out)
    plain, refined = outcome(result, "vitb8"), outcome(result, "vitb8+crf")
    assert plain.runs == refined.runs
    entries = Run(plain.runs[0]).scores()
    assert [entry["refinement"] for entry in entries] == ["none", "fast"]


def test_more_seeds_keep_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = smoke("table8", tmp_path, seeds=1, rows=("frozen",))
    seeds: list[int] = []

    def count(files: Any, experiment: Experiment, *rest: Any, **named: Any) -> Any:
        seeds.append(experiment.seed)
        return fit(files, experiment, *rest, **named)

    monkeypatch.setattr("iddc.learning.loop.fit", count)
    two = smoke("table8", tmp_path, seeds=2, rows=("frozen",))
    assert seeds == [1]
    assert outcome(two, "frozen").entries[0] == outcome(one, "frozen").entries[0]


class StopAt(Notes):
    """Presses Ctrl-C after the first step of a run."""

    def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None:
        if where.startswith("epoch") and done == 1:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_goes_on_to_the_weights_it_would_have_had(
    out: Path, tmp_path: Path
) -> None:
    settings = Settings(smoke=True, seeds=1, rows=("frozen",))
    with pytest.raises(Interrupted):
        reproduce("table8", settings, tmp_path, progress=StopAt())
    (path,) = (tmp_path / "smoke" / "runs").iterdir()
    assert not Run(path).finished
    result = reproduce("table8", settings, tmp_path)
    assert outcome(result, "frozen").runs == {0: path}
    expected = load_file(outcome(smoke("table8", out), "frozen").runs[0] / "model.safetensors")
    found = load_file(path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)


def test_a_run_is_named_after_everything_in_it_but_its_seed_and_its_defaults() -> None:
    def digest(**changes: Any) -> str:
        last = {"last": lambda experiment: experiment.model_copy(update=changes)}
        return planned("table5", "exp", **last).digest

    own = RECIPES["cityscapes-linear-ibot-vits16"].experiment()
    assert digest() == digest(seed=3) == digest(epochs=own.epochs)
    others: list[dict[str, Any]] = [
        {"epochs": 51},
        {"num_clusters": 28},
        {"backbone": "dino-vits16"},
        {"training": TrainingConfig(power=1.0)},
    ]
    assert len({digest(), *(digest(**other) for other in others)}) == 5
    assert planned("table4", "stego-vitb8").digest != planned("table4", "vitb8").digest


def test_a_run_on_a_folder_is_of_that_folder_and_a_published_data_set_may_lie_anywhere() -> None:
    def digest(dataset: str, data: str) -> str:
        return planned("table8", "e2e", dataset=dataset, data=Path(data)).digest

    assert digest("folder", "a") != digest("folder", "b")
    assert digest("cityscapes", "a") == digest("cityscapes", "b")


# What is not run ----------------------------------------------------------------------------------


def test_rows_whose_data_are_missing_are_not_run_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    result = reproduce("table3", Settings(data=tmp_path / "data"), tmp_path / "out")
    for found in result.outcomes:
        assert not found.entries
        assert "No images of Cityscapes" in found.reason
    page = result.path.read_text()
    assert "not run: No images of Cityscapes (train)" in page
    assert "not run: another method" not in page
    assert not (tmp_path / "out" / "runs").exists()


def test_a_figure_without_any_number_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    result = reproduce("fig6", Settings(data=tmp_path / "data"), tmp_path / "out")
    assert all("No images of Cityscapes" in found.reason for found in result.outcomes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fig6.json", "fig6.md"]
    assert "| not run |" in result.path.read_text()
    assert "](fig6.png)" not in result.path.read_text()


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cityscapes")
    write_fake("cityscapes", root)
    return root


def test_rows_whose_weights_are_missing_are_not_run_and_say_which(
    cityscapes: Path, tmp_path: Path
) -> None:
    result = reproduce("table8", Settings(data=cityscapes), tmp_path)
    assert all("ibot-vitb16-in22k" in found.reason for found in result.outcomes)
    assert all("checkpoint_teacher.pth" in found.reason for found in result.outcomes)
    record = saved(result)["rows"][0]
    assert record["not_run"] == result.outcomes[0].reason
    assert record["miou"] == {"values": [], "mean": None, "deviation": None}


def test_rows_with_crf_are_not_run_without_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> Any:
        raise SetupError("The CRF needs pydensecrf2.")

    monkeypatch.setattr(work, "dense_crf", lacking)
    result = smoke("table4", out, refine="crf")
    assert outcome(result, "vitb8").entries
    assert outcome(result, "vitb8+crf").reason == "The CRF needs pydensecrf2."
    assert not outcome(result, "vitb8+crf").entries


def test_a_training_that_fails_leaves_the_other_rows_and_seeds_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unstable(files: Any, experiment: Experiment, *rest: Any, **named: Any) -> Any:
        if experiment.training.end_to_end and experiment.seed == 0:
            raise NumericError("Not finite at step 1.")
        return fit(files, experiment, *rest, **named)

    monkeypatch.setattr("iddc.learning.loop.fit", unstable)
    result = smoke("table8", tmp_path)
    assert sorted(outcome(result, "frozen").entries) == [0, 1]
    assert sorted(outcome(result, "e2e").entries) == [1]
    assert "e2e: not run with seed 0: Not finite at step 1." in result.path.read_text()
    assert saved(result)["rows"][1]["failures"] == {"0": "Not finite at step 1."}


def test_a_figure_is_refused_before_anything_is_trained_where_it_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["reproduce", "fig4", "--smoke", "--out", str(tmp_path / "out")]) == 4
    assert "pip install 'iddc[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Other data, other backbones ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["camvid", "camvid-new-views"])
def test_the_ablations_of_the_docs_are_of_iddc_from_random_weights(name: str) -> None:
    """Whatever the recipe `folder` is by now."""
    file = Path(__file__).parents[1] / "docs" / "results" / f"{name}.yaml"
    found = load_config(file, {name: RECIPES[name].experiment for name in RECIPES})
    assert (found.objective.affinity, found.objective.regularizer_weight) == ("cosine", 0.3)
    assert (found.training.start, found.training.heads, found.head) == ("random", 1, "linear")


def test_on_other_data_an_ablation_edits_the_recipe_for_folders(out: Path) -> None:
    result = smoke("table5", out, dataset="folder", rows=("log*", "exp"), num_clusters=5)
    folder = RECIPES["folder"].experiment()
    for found in result.outcomes:
        assert found.job is not None
        experiment = found.job.experiment
        assert (experiment.recipe, experiment.num_clusters) == ("folder", 5)
        assert experiment.objective.regularizer == folder.objective.regularizer
        assert experiment.head == folder.head
        assert (experiment.objective.affinity, experiment.training.start) == ("cosine", "random")
        assert experiment.objective.regularizer_weight == 0.3
        assert len(found.entries) == 2
    assert outcome(result, "log").job.experiment.objective.penalty == "log"  # type: ignore[union-attr]
    page = result.path.read_text()
    assert "paper (other data)" in page
    assert "26.6" in page
    assert "each row edits the recipe folder" in page
    assert "- 5 clusters\n" in page
    assert "hyper-parameters not published" not in page


def test_a_configuration_takes_the_place_of_the_recipe() -> None:
    base = Experiment(epochs=7, backbone="dino-vits16", num_clusters=12)
    expected = base.model_copy(update={"training": TrainingConfig(end_to_end=True)})
    assert planned("table8", "e2e", base=base).experiment == expected


def test_a_number_of_clusters_goes_before_the_number_of_classes() -> None:
    job = planned("table8", "frozen", 11, dataset="folder", num_clusters=40)
    assert job.experiment.num_clusters == 40


def test_other_data_have_as_many_clusters_as_classes() -> None:
    job = planned("table8", "frozen", 11, dataset="folder")
    assert job.experiment.num_clusters == 11
    assert job.experiment.backbone == "ibot-vitb16-in22k"


def test_weights_are_given_by_the_name_of_their_backbone() -> None:
    weights = {"dino-vitb8": "/a/b.pth", "dino-vits8-300ep": "/c.pth"}
    for name, word in (("vitb8", "dino-vitb8=/a/b.pth"), ("vits8", "dino-vits8-300ep=/c.pth")):
        assert planned("table3", name, weights=weights).experiment.backbone == word


def test_a_run_is_known_by_the_bytes_of_its_weights_not_by_their_place(tmp_path: Path) -> None:
    digests = []
    for name, content in (("a.pth", b"1"), ("b.pth", b"1"), ("c.pth", b"2")):
        (tmp_path / name).write_bytes(content)
        weights = {"dino-vitb8": str(tmp_path / name)}
        digests.append(planned("table3", "vitb8", weights=weights).digest)
    assert digests[0] == digests[1] != digests[2]
    folders = [planned("table3", "vitb8", backbones=(f"lr=0.{n}/bb",)).digest for n in (1, 2)]
    assert folders[0] != folders[1]


def test_thresholds_that_the_images_give_are_a_level_beside_the_sweep(out: Path) -> None:
    rows = ("thresholds+0+0", "own")
    result = smoke("fig7", out, dataset="folder", rows=rows, seeds=1)
    panel = result.target.panels[0]  # type: ignore[union-attr]
    assert [found.x(panel) for found in result.outcomes if not found.kept] == [0.2, None]
    assert "| the recipe's own | auto |" in result.path.read_text()
    assert "| t- 0.2 | 0.2 |" in result.path.read_text()


def test_table_7_compares_the_backbones_that_are_given(cityscapes: Path, tmp_path: Path) -> None:
    words = []
    for width in (16, 24):
        options = {"depth": 1, "embed_dim": width, "num_heads": 1}
        folder = tmp_path / f"width {width}"
        save_backbone(untrained_backbone("vit_tiny_patch16_224", options=options), folder)
        words.append(str(folder))
    small = (
        RECIPES["cityscapes-linear-ibot-vits16"]
        .experiment()
        .model_copy(update={"epochs": 1, "training": TrainingConfig(batch_size=4)})
    )
    settings = Settings(data=cityscapes, backbones=tuple(words), seeds=1, base=small)
    runtime = Runtime(device="cpu", workers=0)
    result = reproduce("table7", settings, tmp_path / "out", runtime)
    assert [found.cells[0] for found in result.outcomes] == words
    assert [found.job.experiment.backbone for found in result.outcomes if found.job] == words
    assert all(len(found.entries) == 1 for found in result.outcomes)


def test_a_table_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="Unknown table 'table0'"):
        choose("table0", Settings())


def test_other_tables_take_one_backbone() -> None:
    with pytest.raises(ConfigError, match="Only Table 7 compares backbones"):
        choose("table5", Settings(backbones=("bundled", "auto")))
    assert planned("table5", "log", backbones=("bundled",)).experiment.backbone == "bundled"


# Numbers ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_the_spread_is_numpy_s_mean_and_sample_deviation(values: list[float]) -> None:
    mean, deviation = map(float, spread(values).split(" ± "))
    assert mean == pytest.approx(100 * np.mean(values), abs=0.051)
    assert deviation == pytest.approx(100 * np.std(values, ddof=1), abs=0.051)


def test_one_seed_has_no_deviation_and_none_has_no_mean() -> None:
    assert spread([0.25]) == "25.0"
    assert spread([]) == "–"


def test_the_json_has_the_mean_and_the_deviation_of_its_values(out: Path) -> None:
    for row in saved(smoke("table8", out))["rows"]:
        for measure in ("accuracy", "miou", "live"):
            values = row[measure]["values"]
            assert len(values) == 2
            assert row[measure]["mean"] == pytest.approx(np.mean(values))
            assert row[measure]["deviation"] == pytest.approx(np.std(values, ddof=1))


def test_a_cluster_is_found_with_one_pixel_in_ten_thousand() -> None:
    row = TABLES["table8"].rows[0]
    entries = {
        0: {"cluster_pixels": [0, 1, 9999], "class_pixels": [4000, 6000]},
        1: {"cluster_pixels": [1, 19999, 0], "class_pixels": [8000, 12000]},
    }
    found = Outcome(row, None, entries=entries)
    assert found.values("live") == [2, 1]
    assert found.sizes() == [[0.9999, 0.0001, 0], [0.99995, 0.00005, 0]]
    assert found.sizes("class_pixels") == [[0.6, 0.4], [0.6, 0.4]]


def test_figure_3_is_scaled_to_1_and_weibull_forgives_imbalance_that_entropy_does_not() -> None:
    curves = regularizer_curves()
    ratios = np.array(curves.pop("x"))
    for values in curves.values():
        assert (values[0], values[-1]) == (1, 0)
    first = 1 / (1 + ratios)
    p = np.stack([first, 1 - first])
    entropy = (p * np.log(p)).sum(0)
    expected = (entropy + np.log(2)) / (entropy[0] + np.log(2))
    assert curves["entropy"] == pytest.approx(expected, abs=1e-6)
    tenth = int(np.argmin(abs(ratios - 0.1)))
    penalties = [curves[f"Weibull as printed, k {k}"][tenth] for k in (0.1, 0.3, 0.7)]
    assert penalties == sorted(penalties)  # the smaller k, the closer to an L (Sec. 3.4)
    assert penalties[-1] < curves["entropy"][tenth]


def test_a_run_with_snapshots_is_scored_after_each_epoch_and_at_last_as_ever(out: Path) -> None:
    result = smoke("fig7", out, rows=("epochs",))
    (found,) = (found for found in result.outcomes if not found.kept)
    for seed, entry in found.entries.items():
        assert [score["epoch"] for score in entry["epochs"]] == [1, 2]
        assert entry["epochs"][-1]["miou"] == entry["miou"]
        assert entry["epochs"][0]["miou"] != entry["miou"]
        snapshots = sorted((found.runs[seed] / "snapshots").glob("*.safetensors"))
        assert [path.name for path in snapshots] == ["0001.safetensors", "0002.safetensors"]


# What is said -------------------------------------------------------------------------------------


def test_the_time_is_told_before_the_first_run(tmp_path: Path) -> None:
    notes = Notes()
    settings = Settings(smoke=True, seeds=2, rows=("frozen",))
    reproduce("table8", settings, tmp_path, progress=notes)
    first, *rest = notes.lines
    assert re.match(r"2 runs to train, about 0:00:\d\d for those of IDDC on ", first)
    runs = [line for line in rest if line.startswith("run ")]
    assert runs == ["run 1 of 2: frozen, seed 0", "run 2 of 2: frozen, seed 1"]


@pytest.fixture
def few(tmp_path: Path) -> list[str]:
    """A command that trains one step on a labelled folder without classes.txt."""
    root = tmp_path / "data"
    write_scenes(root, count=8, seed=0, size=(64, 64))
    (root / "classes.txt").unlink()
    config = "recipe: folder\nbackbone: untrained:test_vit\nepochs: 1\nhead: linear\n"
    views = "views: {short_side: 32, crop_size: 32}\nprediction: {window: 0}\n"
    (tmp_path / "one.yaml").write_text(config + views)
    return [
        *("reproduce", "table8", "--rows", "frozen", "--seeds", "1", "--data", str(root)),
        *("--dataset", "folder", "--out", str(tmp_path / "out"), "--device", "cpu"),
    ]


def test_a_run_of_one_step_is_reproduced(few: list[str], tmp_path: Path) -> None:
    assert main([*few, "--config", str(tmp_path / "one.yaml")]) == 0
    (log,) = (tmp_path / "out" / "runs").glob("*/log.jsonl")
    assert len(log.read_text().splitlines()) == 1


def test_no_label_is_opened_before_the_training_ends(few: list[str], tmp_path: Path) -> None:
    for label in (tmp_path / "data" / "val" / "labels").iterdir():
        label.write_bytes(b"no label")
    (tmp_path / "data" / "classes.txt").write_text("a\nb\n")
    assert main([*few, "--config", str(tmp_path / "one.yaml")]) == 3  # when it is scored
    (model,) = (tmp_path / "out" / "runs").glob("*/model.safetensors")
    assert model.is_file()


def test_where_only_labels_say_the_number_of_classes_it_is_asked_for(
    few: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*few, "--backbone", "untrained:test_vit"]) == 2
    assert "Give --num-clusters" in capsys.readouterr().err


def test_a_time_that_cannot_be_measured_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise NumericError("Not finite at step 1.")

    monkeypatch.setattr(work, "Learner", fail)
    result = smoke("table8", tmp_path, seeds=1, rows=("frozen",))
    assert outcome(result, "frozen").entries


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        (["table9", "--smoke"], 2, "Unknown table 'table9'. Perhaps you meant table"),
        (["fig2", "--smoke"], 2, "iddc analyze"),
        (["table3"], 2, "--data DIR"),
        (["table3", "--smoke", "--data", "x"], 2, "--smoke draws its own data"),
        (["table3", "--smoke", "--backbone", "bundled"], 2, "--smoke draws its own data"),
        (["table3", "--smoke", "--rows", "vits9"], 2, "No row 'vits9' in table3. Known: mdc-"),
        (["table3", "--smoke", "--seeds", "0"], 2, "--seeds: expected at least 1, found 0"),
        (["table3", "--data", "x", "--num-clusters", "1"], 2, "expected 2 to 65535, found 1"),
        (["table3", "--data", "x", "--weights", "vitb8=f"], 2, "Unknown backbone in --weights"),
        (["table3", "--data", "x", "--weights", "dino-vitb8=no.pth"], 3, "there is no file no.pth"),
        (["table3", "--data", "x", "--config", "no.yaml"], 2, "No configuration file"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_writes_nothing(
    argv: list[str],
    code: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["reproduce", *argv, "--out", str(tmp_path / "out")]) == code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_ours_beside_the_paper_and_where_it_is(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", "table6", "--smoke", "--rows", "kmeans", "--out", str(out)]
    assert main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Table 6: the terms of the objective · {LABEL}"
    assert re.match(r"–    –    –    [\d.]+ ± [\d.]+ +50.1 +[\d.]+ ± [\d.]+ +12.4 +2$", printed[3])
    assert printed[-1] == str(out / "smoke" / "table6.md")


def test_the_command_can_print_json_and_nothing_else(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", "fig3", "--out", str(out / "curves"), "--json"]
    assert main(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "curves" / "fig3.json").read_text())
    assert record["curves"].keys() > {"x", "entropy"}


def test_the_command_takes_weights_and_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.pth").write_bytes(b"no weights")
    (tmp_path / "c.yaml").write_text("recipe: folder\nbackbone: dino-vits16\nepochs: 3\n")
    (tmp_path / "data").mkdir()
    argv = [
        *("reproduce", "table8", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")),
        *("--weights", f"dino-vits16={tmp_path / 'w.pth'}", "--config", str(tmp_path / "c.yaml")),
    ]
    assert main([*argv, "--json"]) == 3  # there are no images
    record = json.loads(capsys.readouterr().out)
    experiment = record["rows"][0]["experiment"]
    assert experiment["backbone"] == f"dino-vits16={(tmp_path / 'w.pth').resolve()}"
    assert (experiment["recipe"], experiment["epochs"]) == ("folder", 3)


# What is drawn -----------------------------------------------------------------------------------


def point(curve: str, weight: float | str, *entries: dict[str, Any]) -> Outcome:
    """Some seeds of a point of a curve over lambda_1, or over t+ if it is given as a text."""
    named = "positive_threshold" if isinstance(weight, str) else "negative_weight"
    objective = ObjectiveConfig.model_validate({named: weight})
    row = Row((curve,))
    job = Job(row, Experiment(objective=objective), "folder", Path("x"), "full", "none")
    return Outcome(row, job, entries=dict(enumerate(entries)))


def axes() -> Any:
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


@pytest.mark.parametrize(("y", "label"), [("miou", "mIoU (%)"), ("live", "clusters found")])
def test_a_sweep_draws_the_mean_of_its_seeds_over_each_value(y: Any, label: str) -> None:
    def entry(miou: float, *pixels: int) -> dict[str, Any]:
        return {"miou": miou, "cluster_pixels": pixels}

    outcomes = [
        point("one", 4.0, entry(0.5, 9, 1, 0)),
        point("one", 1.0, entry(0.2, 9, 0, 0), entry(0.4, 5, 4, 1)),
        point("two", 1.0, entry(0.1, 5, 5, 5)),
    ]
    ax = axes()
    _draw_sweep(ax, Panel("a", "negative_weight", y, ()), outcomes)
    lines = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in ax.get_lines()}
    wanted = {"miou": ([30, 50], [10]), "live": ([2, 2], [3])}[y]
    assert [*lines] == ["one", "two"]
    assert [*lines["one"][0]] == [1, 4]
    assert [*lines["one"][1]] == pytest.approx(wanted[0])
    assert [*lines["two"][0]] == [1]
    assert [*lines["two"][1]] == pytest.approx(wanted[1])
    assert ax.get_ylabel() == label
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "4"]


def test_a_threshold_that_only_the_run_knows_is_a_level_across() -> None:
    ax = axes()
    panel = Panel("a", "positive_threshold", "miou", ())
    outcomes = [point("auto", "auto", {"miou": 0.25}), point("auto", "0.5", {"miou": 0.5})]
    _draw_sweep(ax, panel, outcomes)
    across, line = ax.get_lines()
    assert [*across.get_ydata()] == [25, 25]
    assert ([*line.get_xdata()], [*line.get_ydata()]) == ([0.5], [50])
    assert ax.get_xscale() == "linear"


def test_sizes_are_ranked_shares_of_clusters_beside_those_of_classes() -> None:
    entries = [
        {"cluster_pixels": [1, 3], "class_pixels": [2, 6, 2]},
        {"cluster_pixels": [4, 0], "class_pixels": [2, 6, 2]},
    ]
    ax = axes()
    _DRAWERS["rank"](ax, Panel("a", "rank", "miou", ()), [point("iddc", 1.0, *entries)])
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.6, 0.2, 0.2])
    (line,) = ax.get_lines()
    assert [*line.get_xdata()] == [1, 2]
    assert [*line.get_ydata()] == pytest.approx([7 / 8, 1 / 8])


def test_epochs_are_drawn_with_the_mean_of_the_seeds() -> None:
    runs = [
        {"epochs": [{"epoch": e, "accuracy": a, "miou": a / 2} for e, a in enumerate(seed, 1)]}
        for seed in ((0.2, 0.4), (0.4, 0.8))
    ]
    ax = axes()
    _DRAWERS["epoch"](ax, Panel("a", "epoch", "miou", ()), [point("iddc", 1.0, *runs)])
    found = {line.get_label(): [*line.get_ydata()] for line in ax.get_lines()}
    assert found == {"accuracy": pytest.approx([30, 60]), "mIoU": pytest.approx([15, 30])}
    assert all([*line.get_xdata()] == [1, 2] for line in ax.get_lines())
