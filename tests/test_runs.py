"""The RUN folder: what may start in it, what a crash leaves, what the files say."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from iddc import __version__
from iddc.config import Experiment, ObjectiveConfig, TrainingConfig, ViewsConfig
from iddc.errors import ConfigError, DataError, SetupError
from iddc.runs import FORMAT_VERSION, Run, explain, load_config, write_atomic


def start(path: Path, experiment: Experiment | None = None, **options: Any) -> Run:
    return Run.start(path, experiment or Experiment(), **{"source": "photos", **options})


def finish(run: Run) -> None:
    write_atomic(run.path / "model.safetensors", b"weights")
    write_atomic(run.path / "model.json", "{}")
    run.finish()
    run.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Atomic files -------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.json"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="disk is full; free some space"):
        write_atomic(path, "new")
    assert contents(tmp_path) == {"scores.json": b"old"}


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="its folder is gone"):
        write_atomic(tmp_path / "gone" / "a.txt", "text")


def test_names_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    write_atomic(path, "text")
    assert path.read_text() == "text"


def test_a_written_file_gets_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_atomic(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


# What may start -----------------------------------------------------------------------------------


def test_a_new_run_says_all_its_choices(tmp_path: Path) -> None:
    experiment = Experiment(num_clusters=11, objective=ObjectiveConfig(negative_weight=2))
    with start(tmp_path / "a" / "run", experiment, limit=7) as run:
        assert run.experiment == experiment
        record = yaml.safe_load((run.path / "config.yaml").read_text())
        assert record["format_version"] == FORMAT_VERSION
        assert record["images"] == {"source": "photos", "limit": 7, "include_masks": False}
        versions = json.loads((run.path / "versions.json").read_text())
        assert versions["iddc"] == __version__
        assert versions["torch"][0].isdigit()


def test_a_run_starts_in_an_empty_folder(tmp_path: Path) -> None:
    start(tmp_path).close()
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [{"thesis.tex": "text"}, {"config.yaml": "model: {lr: 1}\n"}, {"config.yaml": "- a\n"}],
    ids=["no config", "another program's", "no mapping"],
)
def test_a_foreign_folder_is_never_touched(
    tmp_path: Path, files: dict[str, str], overwrite: bool
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ConfigError):
        start(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        start(tmp_path / "run")


def test_a_finished_run_is_refused_and_kept(tmp_path: Path) -> None:
    finish(start(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"finished run.*--overwrite"):
        start(tmp_path)
    assert contents(tmp_path) == before


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    finish(start(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "scores.json").write_text("{}")
    with start(tmp_path, Experiment(num_clusters=5), overwrite=True) as run:
        assert run.experiment.num_clusters == 5
        assert not run.finished
    assert set(contents(tmp_path)) == {".lock", "config.yaml", "notes.txt", "versions.json"}


def test_an_interrupted_run_goes_on_with_the_same_options(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.checkpoint.write_bytes(b"state")
    with start(tmp_path) as run:
        assert run.checkpoint.read_bytes() == b"state"


def test_overwriting_an_interrupted_run_starts_anew(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.checkpoint.write_bytes(b"state")
    with start(tmp_path, Experiment(seed=1), overwrite=True) as run:
        assert not run.checkpoint.exists()


def test_options_that_differ_from_an_interrupted_run_are_listed(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.checkpoint.write_bytes(b"state")
    asked = Experiment(seed=3, objective=ObjectiveConfig(negative_weight=2.0))
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, asked, source="others")
    text = str(caught.value)
    assert "images.source: photos in the run, others asked" in text
    assert "objective.negative-weight: 1.4 in the run, 2.0 asked" in text
    assert "seed: 0 in the run, 3 asked" in text
    assert text.count(" in the run, ") == 3


def test_a_run_that_stopped_before_its_first_checkpoint_may_start_with_other_options(
    tmp_path: Path,
) -> None:
    start(tmp_path).close()
    with start(tmp_path, Experiment(seed=3)) as run:
        assert run.experiment.seed == 3


def test_a_run_killed_before_its_first_file_starts_anew(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".iddc-0123456789abcdef.tmp").write_text("half")
    start(tmp_path).close()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_model_beside_a_checkpoint_is_not_finished(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.checkpoint.write_bytes(b"state")
        (tmp_path / "model.json").write_text("{}")
        assert not run.finished
        run.finish()
        assert run.finished
        assert not run.checkpoint.parent.exists()


def test_processes_after_the_first_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    start(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


# The lock -----------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from iddc.config import Experiment
from iddc.runs import Run
run = Run.start(Path(sys.argv[1]), Experiment(), source="photos")
child = os.fork()  # as a data worker: it must not keep the lock
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on "):
                start(tmp_path)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            start(tmp_path).close()
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_closing_a_run_frees_its_lock(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(ConfigError, match="in use"):
        start(tmp_path)
    start(tmp_path).close()


# Configuration files ------------------------------------------------------------------------------

EXPERIMENTS = st.builds(
    Experiment,
    num_clusters=st.integers(2, 65535),
    seed=st.integers(0, 2**32 - 1),
    backbone=st.text(min_size=1, max_size=20),
    objective=st.builds(
        ObjectiveConfig,
        negative_weight=st.floats(0, 1e9, allow_subnormal=False),
        positive_threshold=st.floats(-1, 1),
        penalty=st.sampled_from(["log", "linear", "exp"]),
        positive_affinity=st.booleans(),
    ),
    training=st.builds(TrainingConfig, learning_rate=st.floats(1e-12, 1)),
)


@given(experiment=EXPERIMENTS)
def test_a_written_configuration_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, experiment: Experiment
) -> None:
    path = tmp_path_factory.mktemp("run")
    with start(path, experiment):
        assert load_config(path / "config.yaml") == experiment


def test_a_file_by_hand_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("objective: {negative_weight: 9}\ntraining: {learning_rate: 5e-4}\n")
    assert load_config(path) == Experiment(objective=ObjectiveConfig(negative_weight=9))


def test_a_file_by_hand_builds_on_the_recipe_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: cityscapes-vits8\nseed: 4\n")
    recipe = Experiment(recipe="cityscapes-vits8", head="linear")
    loaded = load_config(path, {"cityscapes-vits8": lambda: recipe})
    assert loaded == recipe.model_copy(update={"seed": 4})


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: {negative_weigth: 2}", "unknown option objective.negative-weigth; perhaps"),
        ("objective: {negative_weight: -2}", "objective.negative-weight: expected greater than"),
        ("objective: {penalty: cubic}", "objective.penalty: expected 'log', 'linear' or 'exp'"),
        ("views: {min_scale: 2}", "views: min_scale must not exceed max_scale, found 2.0 > 1.2"),
        ("num_clusters: many", "num-clusters: .*found 'many'"),
        ("seed: -1\nepochs: -1", r"found -1 \(and 1 more\)"),
        ("objective: 3", "objective: .*found 3"),
        ("- a\n- b", "expected `name: value` lines"),
        ("a: [", r"not a plain YAML file \(line 1\)"),
        ("a: !!python/object/apply:os.getcwd []", "not a plain YAML file"),
        ("format_version: 99\niddc: 7.1.0", "format 99.*Install iddc 7.1.0"),
        ("format_version: 99", "Install a newer iddc"),
        ("format_version: new", "format_version must be a number"),
        ("date: 2001-99-99", "not a plain YAML file"),
        ("[" * 1000, "not a plain YAML file"),
        (BOMB, r"not a plain YAML file \(line 2\)"),
        ("1: 2", "1: keys should be strings"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_configuration_file_is_one_short_sentence(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "http" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_a_missing_configuration_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        load_config(tmp_path / name)


def test_explain_names_the_field_of_a_nested_model_as_the_command_line_does() -> None:
    with pytest.raises(ValidationError) as caught:
        ViewsConfig(crop_size=3)
    assert explain(caught.value) == "crop-size: expected greater than or equal to 16, found 3."


# Logs, lists and scores ---------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start(tmp_path)


def test_a_resumed_log_ends_at_the_checkpoint(run: Run) -> None:
    for step in (1, 2, 3):
        run.log(step=step, loss=0.5)
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    run.cut_log(2)
    run.log(step=3, loss=0.25)
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]


def test_skipped_files_keep_any_name(run: Run) -> None:
    rows = [('a, "b"\n.jpg', "empty"), (os.fsdecode(b"\xff.jpg"), "cut short")]
    run.write_skipped(rows)
    text = os.fsdecode((run.path / "skipped.csv").read_bytes())
    assert list(csv.reader(text.splitlines(keepends=True))) == [
        ["name", "reason"],
        *map(list, rows),
    ]


def test_a_score_replaces_only_its_own_kind(run: Run) -> None:
    key = {"dataset": "folder", "split": "val", "protocol": "full", "refinement": "none"}
    run.add_score(data="a", **key, miou=0.1)
    run.add_score(data="b", **key, miou=0.2)
    run.add_score(data="a", **key, miou=0.3)
    assert [(score["data"], score["miou"]) for score in run.scores()] == [("b", 0.2), ("a", 0.3)]
    record = json.loads((run.path / "scores.json").read_text())
    assert record["format_version"] == FORMAT_VERSION


def test_scores_of_a_model_that_was_trained_again_meanwhile_are_not_kept(run: Run) -> None:
    (run.path / "model.json").write_text("{}")
    stamp = run.stamp
    run.add_score(stamp=stamp, data="a")
    (run.path / "new").write_text("{}")
    (run.path / "new").rename(run.path / "model.json")
    with pytest.raises(DataError, match="trained again"):
        run.add_score(stamp=stamp, data="b")
    assert [score["data"] for score in run.scores()] == ["a"]


@pytest.mark.parametrize("text", ["", "[]", '{"scores": 3}', "[" * 10_000])
def test_damaged_scores_are_not_overwritten(run: Run, text: str) -> None:
    (run.path / "scores.json").write_text(text)
    with pytest.raises(DataError, match="not what iddc wrote"):
        run.add_score(data="a")
    assert (run.path / "scores.json").read_text() == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No run in"),
        (lambda path: start(path).close(), "not finished"),
    ],
)
def test_only_a_finished_run_can_be_opened(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        Run.open(tmp_path)
    write_atomic(tmp_path / "model.json", "{}")
    assert Run.open(tmp_path).path == tmp_path


def test_importing_runs_does_not_import_torch() -> None:
    code = "import sys, iddc.runs; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_finished_pretraining_is_no_run_and_nothing_in_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("format_version: 1\niddc: 0.1.0\nmethod: contrast\n")
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="something else than a run"):
            start(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before
