"""The command line, in process through `main(argv) -> exit code`; a handful as real processes."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import iddc
import iddc.methods.pictures
from iddc import demo, learning, methods
from iddc.backbones import save_backbone, untrained_backbone
from iddc.cli import COMMANDS, listings, main
from iddc.config import PredictionConfig, TrainingConfig, ViewsConfig
from iddc.datasets.fake import write_fake
from iddc.doctor import _machine
from iddc.errors import Interrupted
from iddc.methods import completed, used
from iddc.recipes import RECIPES
from iddc.runs import Run
from iddc.runs.configfile import differences


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A photo with two regions of noise, so that there is something to find."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
    pixels[: size[1] // 2] += np.array([10, 80, 160], np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(4):
        picture(index).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    torch.manual_seed(0)  # the order of tests changes no weight
    save_backbone(untrained_backbone("vit_tiny_patch16_224", options=options), folder)
    return folder


@pytest.fixture(scope="session")
def tiny(backbone: Path) -> list[str]:
    """Options that make a run of two steps of a network of one small block."""
    return [
        *("--backbone", str(backbone), "--num-clusters", "3", "--workers", "0"),
        *("--training.min-steps", "2", "--training.batch-size", "4"),
        *("--views.crop-size", "32", "--views.short-side", "48"),
        *("--prediction.window", "32", "--prediction.overlap", "8"),
    ]


@pytest.fixture(scope="session")
def trained(photos: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", str(photos), "--out", str(run), *tiny]) == 0
    return run


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set of two classes with a `val` split."""
    root = tmp_path_factory.mktemp("labelled")
    for kind in ("images", "labels"):
        (root / "val" / kind).mkdir(parents=True)
    for index in range(3):
        picture(index).save(root / "val" / "images" / f"{index}.jpg")
        label = np.zeros((48, 64), np.uint8)
        label[24:] = 1
        Image.fromarray(label).save(root / "val" / "labels" / f"{index}.png")
    (root / "classes.txt").write_text("up\ndown\n")
    return root


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that an error is."""
    lines = capsys.readouterr().err.splitlines()
    assert lines, "nothing on stderr"
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def stopped_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr of a command that was stopped, which is no error."""
    lines = capsys.readouterr().err.splitlines()
    assert lines, "nothing on stderr"
    assert not any("error: " in line or "Traceback" in line for line in lines)
    return lines[-1]


def skipped(folder: Path) -> dict[str, str]:
    with (folder / "skipped.csv").open() as file:
        return {row["name"]: row["reason"] for row in csv.DictReader(file)}


def test_a_data_set_is_trained_on_its_train_split_alone(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_fake("cityscapes", tmp_path / "data")
    command = ["train", str(tmp_path / "data"), "--dataset", "cityscapes", *tiny]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 images")  # of 8, with val
    assert lines[-1].endswith(f"--data {tmp_path / 'data'} --dataset cityscapes")
    assert main([*command, "--out", str(tmp_path / "other"), "--limit", "3", "--dry-run"]) == 0
    assert "3 images" in capsys.readouterr().out


def test_a_root_without_the_data_set_is_exit_3_and_says_what_was_looked_for(
    photos: Path, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(photos), "--dataset", "potsdam3", "--out", str(tmp_path / "run")]
    assert main([*command, *tiny]) == 3
    assert "looked for *.mat in imgs" in error(capsys)
    assert not (tmp_path / "run").exists()


# Which command, which option ----------------------------------------------------------------------


def test_without_a_command_the_overview_lists_every_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    overview = capsys.readouterr().err
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview
    assert all(f"\n  {name} " in overview for name in COMMANDS)


def test_what_processes_cannot_do_together_is_refused_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # alone, it may be a cluster's for shards of predict
    assert main(["recipes"]) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["reproduce", "table6", "--smoke", "--out", str(tmp_path / "out")]) == 2
    assert "torchrun has started 2" in error(capsys)
    assert not (tmp_path / "out").exists()
    assert main(["train", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 3
    assert "torchrun" not in error(capsys)


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "x"}, "x")])
def test_threads_do_not_spin_while_they_wait(given: dict[str, str], found: str) -> None:
    shown = "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    code = f"import os, sys; from iddc import __main__ as m; m.main = lambda: {shown}; m.run()"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{found} False\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"iddc {iddc.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["trian", "x"], "train"),
        (["evalute"], "evaluate"),
        (["--versoin"], "--version"),
        (["train", "x", "--out", "y", "--num-cluster", "3"], "--num-clusters"),
        (["train", "x", "--out", "y", "--objective.negative-wieght", "1"], "negative-weight"),
        (["predict", "r", "x", "--out", "y", "--formatz", "png"], "--formats"),
        (["train", "x", "--out", "y", "--recipe", "foldr"], "Perhaps you meant folder"),
        (["baseline", "kmean", "x", "--out", "y"], "kmeans"),
    ],
)
def test_a_misspelling_is_exit_2_and_gets_a_suggestion(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--num-clusters", "1", "--num-clusters: expected greater than or equal to 2, found 1"),
        ("--objective.negative-weight", "-3", "--objective.negative-weight: expected greater"),
        ("--prediction.overlap", "500", "overlap must be smaller than window, found 500 >= 224"),
        ("--max-unreadable", "2", "--max-unreadable: expected less than or equal to 1"),
        ("--limit", "0", "--limit: expected at least 1 image, found 0"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_with_the_name_of_the_option(
    option: str, value: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "x", "--out", "y", option, value]) == 2
    said = error(capsys)
    assert sentence in said
    assert "http" not in said


def test_what_is_on_by_default_is_switched_off_by_name(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prediction.flip", "False", "--objective.positive-affinity", "False")
    found: Any = planned(capsys, str(photos), *options)
    assert found["prediction"]["flip"] is False
    assert found["objective"]["positive_affinity"] is False


@pytest.mark.parametrize("value", ["many", "1.5"])
def test_a_value_of_another_type_is_exit_2(value: str) -> None:
    assert main(["train", "x", "--out", "y", "--num-clusters", value]) == 2


def test_a_required_option_that_is_missing_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "x"]) == 2
    assert "--out" in capsys.readouterr().err


# Where the numbers come from ----------------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    """The experiment that --print-config prints."""
    assert main(["train", *argv, "--out", "nowhere", "--print-config"]) == 0
    plan: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return plan


def test_flags_override_the_configuration_file_which_overrides_the_recipe(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("recipe: cityscapes-vits8\nepochs: 7\nobjective: {negative_weight: 3.0}\n")
    plan = planned(capsys, str(photos), f"--config={file}", "--objective.regularizer", "none")
    expected = RECIPES["cityscapes-vits8"].experiment().model_dump(mode="json", exclude={"options"})
    expected["epochs"] = 7
    expected["objective"] |= {"negative_weight": 3.0, "regularizer": "none"}
    assert plan == expected


def test_a_recipe_sets_every_number(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, str(photos), "--recipe", "cocostuff171-vits8")
    assert plan == RECIPES["cocostuff171-vits8"].experiment().model_dump(
        mode="json", exclude={"options"}
    )


def test_without_a_recipe_it_is_the_one_for_a_folder(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = used(completed(RECIPES["folder"].experiment()))
    assert planned(capsys, str(photos)) == json.loads(json.dumps(expected))
    iddc = RECIPES["folder"].experiment().model_copy(update={"method": "iddc"})
    assert planned(capsys, str(photos), "--method", "iddc") == iddc.model_dump(
        mode="json", exclude={"options"}
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--epochs", "3"),
        ("--head", "linear"),
        ("--training.heads=1",),
        ("--training.end-to-end",),
        ("--objective.regularizer", "none"),
    ],
)
def test_an_option_of_iddc_trains_iddc_and_says_so(
    words: tuple[str, ...], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(photos), "--out", "nowhere", "--print-config", *words]) == 0
    captured = capsys.readouterr()
    assert "\nmethod: iddc\n" in captured.out
    assert f"note: {words[0].partition('=')[0]} is an option of --method iddc" in captured.err


def test_several_heads_do_not_start_at_the_consensus(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(photos), "--out", "nowhere", "--print-config", "--training.heads", "2"]
    assert main(words) == 2
    assert "expected heads 1, found 2; several heads take --training.start random" in error(capsys)
    assert main([*words, "--training.start", "random"]) == 0


@pytest.mark.parametrize(
    "words", [(), ("--training.precision", "fp32"), ("--seed", "3"), ("--consensus.groupings", "2")]
)
def test_without_one_the_method_is_the_consensus(
    words: tuple[str, ...], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, str(photos), *words)
    assert (plan["method"], plan["head"]) == ("consensus", "linear")


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "consensus", "--training.heads", "2"),
        ("--method", "consensus", "--training.end-to-end"),
        ("--consensus.groupings", "0"),
        ("--consensus.lengths", "long"),
    ],
)
def test_what_the_consensus_cannot_do_is_exit_2_and_names_the_option(
    words: tuple[str, ...], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(photos), "--out", "nowhere", *words]) == 2
    assert words[-2 if len(words) != 3 else -1].lstrip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("views: {short_side: 256}", "consensus"),
        ("training: {precision: fp32}", "consensus"),
        ("training: {heads: 1}", "iddc"),
        ("objective: {regularizer: none}", "iddc"),
        ("epochs: 3", "iddc"),
    ],
)
def test_a_file_that_says_how_iddc_trains_is_for_iddc(
    text: str, method: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"recipe: folder\n{text}\n")
    assert planned(capsys, str(photos), "--config", str(file))["method"] == method


def test_recipe_and_config_together_are_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "x", "--out", "y", "--recipe", "folder", "--config", "c.yaml"]
    assert main(argv) == 2
    assert "--recipe and --config" in error(capsys)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("objective: {negative_wieght: 1.0}", "objective.negative-weight"),
        ("epochs: -1", "epochs: expected greater"),
        ("- a list", "expected `name: value` lines"),
        ("epochs: [", "not a plain YAML file"),
        ("format_version: 99", "format 99"),
        (None, "No configuration file"),
    ],
)
def test_a_wrong_configuration_file_is_exit_2_and_one_sentence(
    text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["train", "x", "--out", "y", "--config", str(file)]) == 2
    assert sentence in error(capsys)


def test_a_dry_run_says_the_steps_and_writes_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = ["train", str(photos), "--out", str(run), "--epochs", "5", "--dry-run"]
    assert main([*argv, "--training.batch-size", "3"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "10 steps" in first  # 4 images in 2 batches, 5 times
    assert re.search(r" · cpu · about \d+ min and \d+\.\d GB of memory · ", first)
    assert first.endswith(f" · {run.resolve()}")
    assert not run.exists()


def test_a_dry_run_needs_no_folder_and_a_training_says_that_it_does(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(photos), "-k", "5", "--dry-run"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"4 images · auto · 5 clusters · .* · cpu · about \d+ min and .*", first)
    assert main(["train", str(photos), "-k", "5"]) == 2
    assert "--out RUN is missing" in error(capsys)


def test_the_printed_configuration_gives_the_same_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--recipe", "cityscapes-vits8", "-k", "9", "--seed", "3")
    plan = planned(capsys, str(photos), *options)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plan))
    assert planned(capsys, str(photos), "--config", str(file)) == plan
    assert plan["num_clusters"] == 9


# Images -------------------------------------------------------------------------------------------


def test_a_missing_folder_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 3
    assert "nowhere" in error(capsys)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["train", str(tmp_path / "empty"), "--out", str(tmp_path / "run")]) == 3
    assert "No image" in error(capsys)


def test_one_image_is_too_few_to_train_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", str(photos / "0.jpg"), "--out", str(tmp_path / "run")]
    assert main([*argv, "--method", "iddc"]) == 3
    assert "at least 2" in error(capsys)
    assert not (tmp_path / "run").exists()


def spoil(folder: Path) -> set[str]:
    """Add a file cut short, a text and an empty file, all named as photos."""
    whole = (folder / "0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "zero.jpg").touch()
    return {"cut.jpg", "text.jpg", "zero.jpg"}


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for index in range(5):
        picture(index).save(folder / f"{index}.jpg")
    spoil(folder)
    return folder


def test_training_skips_unreadable_images_and_lists_them_with_reasons(
    spoilt: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, before = tmp_path / "run", tree(spoilt)
    argv = ["train", str(spoilt), "--out", str(run), *tiny, "--max-unreadable", "0.5"]
    assert main(argv) == 0
    reasons = skipped(run)
    assert reasons.keys() == {"cut.jpg", "text.jpg", "zero.jpg"}
    assert "empty" in reasons["zero.jpg"]
    assert "not an image" in reasons["text.jpg"]
    assert "cut short" in reasons["cut.jpg"]
    first = capsys.readouterr().out.splitlines()[0]
    assert f"(2 skipped, see {run / 'skipped.csv'})" in first
    assert tree(spoilt) == before


@pytest.mark.parametrize("command", ["train", "predict"])
def test_more_than_5_percent_unreadable_images_are_exit_3(
    command: str,
    spoilt: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    run = [str(trained)] if command == "predict" else []
    assert main([command, *run, str(spoilt), "--out", str(out)]) == 3
    assert "2 of 8 images cannot be read" in error(capsys)
    assert not out.exists()


def test_prediction_stops_when_too_many_images_turn_out_to_be_cut_short(
    spoilt: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (spoilt / "text.jpg").unlink()
    (spoilt / "zero.jpg").unlink()
    out = tmp_path / "out"
    assert main(["predict", str(trained), str(spoilt), "--out", str(out)]) == 3
    assert "1 of 6 images cannot be read" in error(capsys)
    assert skipped(out).keys() == {"cut.jpg"}
    assert (out / "png" / "4.png").exists()


# The folder of a run ------------------------------------------------------------------------------


def test_a_run_says_where_it_is_and_what_to_do_next(
    photos: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    assert main(["train", str(photos), "--out", str(run), *tiny]) == 0
    first, *between, last = capsys.readouterr().out.splitlines()
    assert first.startswith("4 images · ")
    assert any(line.startswith("Verdict: ") for line in between)
    assert " · 3 clusters · 2 steps · cpu · about 1 min · " in first
    assert first.endswith(str(run.resolve()))
    assert last.startswith(f"{run / 'model.safetensors'}    next: iddc report '{run}'")


def test_a_number_of_clusters_that_was_not_chosen_is_called_the_default(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(photos), "--out", "nowhere", "--dry-run"]) == 0
    assert "27 clusters (the default; choose with -k, or -k auto)" in capsys.readouterr().out


def test_the_number_of_clusters_can_be_chosen_by_a_sweep(
    photos: Path,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("iddc.cli.sweep.CLUSTERS", (2, 4))
    words = [word for word in tiny if word not in ("--num-clusters", "3")]
    assert main(["train", str(photos), "--out", str(tmp_path / "run"), *words, "-k", "auto"]) == 0
    said = capsys.readouterr().out
    chosen = Run.open(tmp_path / "run").experiment.num_clusters
    assert chosen in (2, 4)
    assert f"{chosen} clusters, chosen by a sweep" in said


def test_a_finished_run_is_replaced_only_with_overwrite(
    photos: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = ["train", str(photos), "--out", str(run), *tiny]
    assert main(argv) == 0
    before = tree(run)
    assert main([*argv, "--seed", "1"]) == 2
    assert "finished run" in error(capsys)
    assert tree(run) == before
    assert main([*argv, "--seed", "1", "--overwrite"]) == 0
    assert tree(run)["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (["--backbone", "untrained:nope"], 2),
        (["--device", "quantum"], 2),
        (["--head", "centroids"], 2),
        (["--backbone", "dino-vits16=missing.pth"], 3),
    ],
)
def test_a_wrong_name_costs_no_earlier_model_even_with_overwrite(
    wrong: list[str], code: int, photos: Path, tiny: list[str], trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    argv = ["train", str(photos), "--out", str(run), *tiny, "--overwrite"]
    assert main([*argv, *wrong]) == code
    assert tree(run) == tree(trained)


def test_a_folder_of_something_else_is_left_alone(
    photos: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("learning_rate: 0.1\n")
    (tmp_path / "model.json").write_text("{}")
    before = tree(tmp_path)
    for option in ([], ["--overwrite"]):
        assert main(["train", str(photos), "--out", str(tmp_path), *tiny, *option]) == 2
        assert "something else" in error(capsys)
    assert tree(tmp_path) == before


def test_an_interrupted_run_resumes_with_the_same_options_and_only_with_those(
    photos: Path,
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = ["train", str(photos), "--out", str(tmp_path / "run"), *tiny]

    def interrupt(
        files: object, experiment: object, run: Run, *rest: object, **named: object
    ) -> None:
        run.checkpoint.write_bytes(b"state")
        raise Interrupted("Stopped after step 1 of 2.")

    with monkeypatch.context() as patch:
        patch.setattr(learning, "fit", interrupt)
        assert main(argv) == 130
    assert stopped_line(capsys) == "Stopped after step 1 of 2."
    assert main([*argv, "--seed", "1"]) == 2
    assert "seed: 0 in the run, 1 asked" in error(capsys)
    assert main(["predict", str(tmp_path / "run"), str(photos), "--out", "x"]) == 3
    assert "not finished" in error(capsys)
    (tmp_path / "run/checkpoint/state.pt").unlink()
    assert main(argv) == 0


def test_a_run_knows_its_images_from_any_folder(
    photos: Path,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photos.parent)
    assert main(["train", photos.name, "--out", str(tmp_path / "run"), *tiny]) == 0
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["images"]["source"] == str(photos.resolve())


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    "files",
    [{}, {"config.yaml": "learning_rate: 0.1\n"}, {"model.json": '{"weights": 1}'}],
    ids=["empty", "foreign config", "foreign model"],
)
def test_a_run_folder_of_another_program_is_exit_3(
    command: str,
    files: dict[str, str],
    photos: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name, text in files.items():
        (foreign / name).write_text(text)
    rest = {
        "predict": [str(photos), "--out", str(tmp_path / "out")],
        "evaluate": ["--data", str(labelled)],
    }
    assert main([command, str(foreign), *rest[command]]) == 3
    assert "foreign" in error(capsys)
    assert not (tmp_path / "out").exists()
    assert tree(foreign).keys() == files.keys()


# Masks --------------------------------------------------------------------------------------------


def odd_images(folder: Path) -> dict[str, tuple[int, int]]:
    """Images of every kind; the size at which each is seen upright."""
    rgb = picture(0, (40, 30))
    (folder / "deep er" / "été").mkdir(parents=True)
    images = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.convert("P"),
        "grey.png": rgb.convert("L"),
        "alpha.png": rgb.convert("RGBA"),
        "deep er/été/16 bit.png": Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)),
        "one.png": rgb.resize((1, 1)),
        "一.jpg": rgb,
    }
    for name, image in images.items():
        image.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    rgb.save(folder / "turned.jpg", exif=exif)
    sizes = {name: image.size for name, image in images.items()}
    return {**sizes, "turned.jpg": (30, 40)}


def test_masks_have_the_tree_and_the_sizes_of_their_images(trained: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    sizes, before = odd_images(images), tree(images)
    formats = ["--formats", "png", "palette", "overlay"]
    assert main(["predict", str(trained), str(images), "--out", str(out), *formats]) == 0
    for name, size in sizes.items():
        for kind, mode in (("png", "L"), ("palette", "P"), ("overlay", "RGB")):
            with Image.open((out / kind / name).with_suffix(".png")) as mask:
                assert (mask.size, mask.mode) == (size, mode), (name, kind)
                ids = np.asarray(mask)
            assert kind == "overlay" or ids.max() < 3
    assert tree(images) == before
    assert skipped(out) == {}


def test_finished_masks_are_not_written_again_and_this_is_said(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(trained), str(photos), "--out", str(tmp_path / "out")]
    assert main([*argv, "--limit", "2"]) == 0
    masks = tmp_path / "out" / "png"
    assert sorted(path.name for path in masks.iterdir()) == ["0.png", "1.png"]
    (masks / "0.png").write_bytes(b"kept")
    (masks / "1.png").unlink()
    assert main(argv) == 0
    assert "masks of 4 images, 1 of them there already" in capsys.readouterr().out
    assert (masks / "0.png").read_bytes() == b"kept"
    assert sorted(path.name for path in masks.iterdir()) == [f"{i}.png" for i in range(4)]


def test_an_image_that_was_replaced_gets_a_new_mask(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    argv = ["predict", str(trained), str(images), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    masks = tmp_path / "out" / "png"
    late = (masks / "0.png").stat().st_mtime_ns + 10**9
    for name in ("0.png", "1.png"):
        (masks / name).write_bytes(b"kept")
    (replaced,) = images.glob("0.*")
    os.utime(replaced, ns=(late, late))
    capsys.readouterr()
    assert main(argv) == 0
    assert "masks of 4 images, 3 of them there already" in capsys.readouterr().out
    assert (masks / "0.png").read_bytes() != b"kept"
    assert (masks / "1.png").read_bytes() == b"kept"


def test_masks_of_the_future_are_made_again(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the clock was set back, a mask that seems newer than its image need not be."""
    argv = ["predict", str(trained), str(photos), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    mask, clusters = (tmp_path / "out" / name / "1.png" for name in ("png", "parts/clusters"))
    mask.write_bytes(b"kept")
    tomorrow = time.time() + 86400
    os.utime(clusters, (tomorrow, tomorrow))
    capsys.readouterr()
    assert main(argv) == 0
    assert "masks of 4 images, 3 of them there already" in capsys.readouterr().out
    assert mask.read_bytes() != b"kept"
    assert clusters.stat().st_mtime < tomorrow - 1
    assert main(argv) == 0
    assert "masks of 4 images, 4 of them there already" in capsys.readouterr().out


def test_masks_of_two_models_are_not_mixed(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(trained), str(photos), "--out", str(tmp_path / "out"), "--limit", "1"]
    assert main(argv) == 0
    assert main([*argv, "--window", "48"]) == 2
    assert "out holds other masks: window was 32, now 48. Use --out with" in error(capsys)
    assert main([*argv, "--window", "32", "--overlap", "8"]) == 0  # its own


TOGETHER = """
import os, sys, time
from pathlib import Path
from iddc.cli import main
link, here = os.link, Path(sys.argv[1])

def together(*names):
    (here / f"ready-{os.getpid()}").touch()
    while len(list(here.glob("ready-*"))) < 2:
        time.sleep(0.01)
    link(*names)

os.link = together
sys.exit(main(sys.argv[2:]))
"""
"""A command that, once it has seen that nobody claimed its folder, waits for another as far."""


@pytest.mark.slow
def test_of_two_models_that_begin_in_one_folder_at_the_same_moment_one_is_refused(
    photos: Path, trained: Path, tmp_path: Path
) -> None:
    argv = ["predict", str(trained), str(photos), "--out", str(tmp_path / "out"), "--limit", "1"]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), *argv, *own],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for own in ([], ["--window", "48"])
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    windows = {"window was 32, now 48", "window was 48, now 32"}  # whichever came first
    (refusal,) = [line for line in "".join(said).splitlines() if line.startswith("error: ")]
    assert refusal in {
        f"error: {tmp_path / 'out'} holds other masks: {window}. Use --out with a new folder."
        for window in windows
    }


def test_masks_of_other_images_of_the_same_names_are_not_taken_for_finished(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "masks"
    other.mkdir()
    picture(9, (40, 30)).save(other / "0.jpg")
    assert main(["predict", str(trained), str(photos), "--out", str(out)]) == 0
    assert main(["predict", str(trained), str(other), "--out", str(out)]) == 2
    assert f"holds other masks: of {photos.resolve()}, now {other.resolve()}. " in error(capsys)


def test_a_damaged_note_of_the_model_is_one_sentence(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictions.json").write_text("{")
    assert main(["predict", str(trained), str(photos), "--out", str(tmp_path)]) == 2
    assert "predictions.json is damaged. Use --out with a new folder." in error(capsys)


def test_prediction_writes_neither_among_the_images_nor_into_a_foreign_folder(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(photos)
    for out in (photos, photos / "masks"):
        assert main(["predict", str(trained), str(photos), "--out", str(out)]) == 2
        assert "folder of images" in error(capsys)
    assert tree(photos) == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["predict", str(trained), str(photos), "--out", str(tmp_path)]) == 2
    assert "something else" in error(capsys)
    assert tree(tmp_path) == {"thesis.txt": b"mine"}


def test_an_overlap_as_large_as_the_window_is_exit_2(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(trained), str(photos), "--out", str(tmp_path / "out")]
    assert main([*argv, "--overlap", "32"]) == 2
    assert "overlap must be smaller than window" in error(capsys)


# Scores -------------------------------------------------------------------------------------------


def test_evaluation_adds_an_entry_to_scores_json_and_prints_the_same_as_json(
    trained: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", str(trained), "--data", str(labelled)]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((trained / "scores.json").read_text())["scores"] == [printed]
    assert printed["iou"].keys() == {"up", "down"}
    assert 0 <= printed["miou"] <= printed["accuracy"] <= 1
    assert main([*argv, "--protocol", "squash", "--save-masks"]) == 0
    table = capsys.readouterr().out
    entries = json.loads((trained / "scores.json").read_text())["scores"]
    assert [entry["protocol"] for entry in entries] == ["full", "squash"]
    assert f"{100 * entries[1]['miou']:.1f}" in table
    with Image.open(trained / "evaluation" / "folder-val-squash" / "0.png") as panel:
        assert panel.size == (3 * 320, 320)


def test_scores_that_cannot_be_written_are_printed(
    trained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns(".lock"))
    (run / ".lock").mkdir()
    argv = ["evaluate", str(run), "--data", str(labelled)]
    assert main(argv) == 4
    assert "mIoU" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 4
    captured = capsys.readouterr()
    assert 0 <= json.loads(captured.out)["miou"] <= 1
    assert "Cannot write" in captured.err


def test_binary_masks_are_refused_and_scored_as_two_classes_with_an_option(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:30] = 255
    for kind, image in (("images", Image.new("RGB", (64, 48))), ("labels", Image.fromarray(mask))):
        (tmp_path / kind).mkdir()
        image.save(tmp_path / kind / "a.png")
    argv = ["evaluate", str(trained), "--data", str(tmp_path), "--limit", "1", "--json"]
    assert main(argv) == 3
    assert "--binary" in error(capsys)
    assert main([*argv, "--binary"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["class_pixels"] == [18 * 64, 30 * 64]


def test_a_class_without_a_pixel_is_said_where_scores_are_printed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        Image.new("L", (64, 48)).save(tmp_path / kind / "a.png")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    argv = ["evaluate", str(trained), "--data", str(tmp_path), "--limit", "1"]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "warning: 1 of 2 classes have no pixel in these labels: sky." in said
    assert "warning: All labelled pixels belong to one class, road" in said


def test_scores_of_a_part_of_the_data_are_not_kept(
    trained: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(trained).get("scores.json")
    argv = ["evaluate", str(trained), "--data", str(labelled), "--limit", "1", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    assert tree(trained).get("scores.json") == before


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (np.zeros((10, 10), np.uint8), "10 x 10"),
        (np.full((48, 64), 7, np.uint8), "found 7"),
    ],
    ids=["another size", "out of range"],
)
def test_a_wrong_label_is_exit_3_and_leaves_the_run_as_it_was(
    label: np.ndarray,
    sentence: str,
    trained: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    picture(0).save(tmp_path / "images" / "0.jpg")
    Image.fromarray(label).save(tmp_path / "labels" / "0.png")
    (tmp_path / "classes.txt").write_text("up\ndown\n")
    before = tree(trained)
    assert main(["evaluate", str(trained), "--data", str(tmp_path)]) == 3
    assert sentence in error(capsys)
    assert tree(trained) == before


def test_a_data_set_without_the_split_is_exit_3(
    trained: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained), "--data", str(labelled), "--split", "tset"]) == 3
    assert "found val" in error(capsys)


def test_kmeans_gives_a_run_like_any_other(
    photos: Path, backbone: Path, labelled: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("views: {short_side: 48}\nprediction: {window: 32, overlap: 8}\n")
    run = tmp_path / "run"
    options = ["--config", str(config), "--backbone", str(backbone), "--num-clusters", "3"]
    assert main(["baseline", "kmeans", str(photos), "--out", str(run), *options]) == 0
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["num_clusters"], kept["head"], kept["views"]["short_side"]) == (3, "centroids", 48)
    assert main(["evaluate", str(run), "--data", str(labelled)]) == 0
    out = tmp_path / "out"
    assert main(["predict", str(run), str(photos), "--out", str(out), "--limit", "1"]) == 0
    assert (out / "png" / "0.png").exists()


def test_kmeans_has_no_option_that_it_would_ignore(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", "-hh"]) == 0
    text = capsys.readouterr().out
    assert "--num-clusters" in text
    for ignored in ("--objective", "--epochs", "--head", "--checkpoint-every"):
        assert ignored not in text


# What tells ---------------------------------------------------------------------------------------


def test_recipes_show_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    row = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("cityscapes-vitb8")
    )
    assert "Table 3" in row
    assert "78.0 / 21.6" in row
    assert "stego-center-crop" in row


@pytest.mark.parametrize("command", ["recipes", "models", "doctor"])
def test_json_is_one_object_and_nothing_else(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_models_names_every_backbone_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("dinov3-vits16 ")]
    *size, speed, licence, _ = row.split()[1:8]
    assert (size, licence) == (["16", "384", "22", "M"], "DINOv3")
    assert re.fullmatch(r"[\d.]+/s", speed)  # depends on the machine
    (row,) = [line for line in lines if line.startswith("bundled ")]
    words = row.split()
    assert re.fullmatch(r"[\d.]+/s", words.pop(5))
    assert words == ["bundled", "8", "128", "11", "M", "CC", "BY-NC", "4.0", "iddc", "yes"]


def test_doctor_is_exit_4_where_a_package_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> object:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("iddc.doctor.import_module", broken)
    assert main(["doctor"]) == 4
    captured = capsys.readouterr()
    assert "operator torchvision::nms does not exist" in captured.out
    assert "error: torchvision: Install iddc again" in captured.err


@pytest.mark.parametrize(("free", "enough"), [(2**40, True), (10**7, False)])
def test_doctor_says_how_many_gigabytes_are_free_and_whether_they_are_enough(
    free: int, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 4_000_000, "SC_PAGE_SIZE": 4096}.get)
    found = {one.name: one for one in _machine(Path("."))}
    assert found["free disk"].value == f"{round(free / 10**9)} GB in {Path.cwd()}"
    assert found["memory"].value == "16 GB"
    assert (found["free disk"].advice == "") == enough


@pytest.fixture
def small_demo(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = demo.demo_experiment().model_copy(
        update={
            "backbone": str(backbone),
            "training": TrainingConfig(batch_size=4, min_steps=4),
            # Large enough that regions, of at least 6 patches, outnumber the clusters.
            "views": ViewsConfig(crop_size=32, short_side=160),
            "prediction": PredictionConfig(window=64, overlap=0, flip=False),
        }
    )
    monkeypatch.setattr(demo, "demo_experiment", lambda: experiment)
    monkeypatch.setattr(demo, "SCENES", 5)


@pytest.mark.usefixtures("small_demo")
def test_a_demo_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, images = methods.pictures.both_regions, 0

    def stopped(*args: Any) -> Any:
        nonlocal images
        images += 1
        if images == 2:
            signal.raise_signal(signal.SIGTERM)
        return found(*args)

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(methods.pictures, "both_regions", stopped)
        assert main(["demo", "--out", str(out)]) == 143
    line = "Stopped before the end. Give the same command again to start this run anew."
    assert stopped_line(capsys) == line
    assert images == 2
    before = tree(out / "k-means")
    assert main(["demo", "--out", str(out)]) == 0
    assert {name: data for name, data in tree(out / "k-means").items() if name in before} == before


@pytest.mark.usefixtures("small_demo")
def test_the_demo_scores_both_methods_and_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    (out / "iddc").mkdir()  # as an earlier version wrote: now all that is ours is there
    assert main(["demo", "--out", str(out)]) == 0  # an earlier one is replaced
    text = capsys.readouterr().out
    assert "k-means" in text
    assert f"{out / 'contact-sheet.png'}    next: " in text
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.size == (4 * 320, 26 + 240)  # a title; image, truth, both methods
    assert len(list((out / "consensus" / "overlays").iterdir())) == 1


def test_the_demo_learns_as_the_default_recipe_does() -> None:
    folder, experiment = RECIPES["folder"].experiment(), demo.demo_experiment()
    changes = differences(folder.model_dump(), experiment.model_dump())
    assert {change.partition(":")[0] for change in changes} == {
        "num-clusters",
        "backbone",
    }


def test_the_demo_leaves_a_folder_of_something_else_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--out", str(tmp_path / "thesis.txt")]) == 2
    assert tree(tmp_path) == {"thesis.txt": b"mine"}


# What goes wrong ----------------------------------------------------------------------------------

TOO_LONG = "/".join(["d" * 200] * 25)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", TOO_LONG, "--out", "run"],
        ["train", "{photos}", "--num-clusters", "3", "--out", f"{TOO_LONG}/run"],
        ["predict", TOO_LONG, "{photos}", "--out", "masks"],
        ["report", TOO_LONG],
        ["label", TOO_LONG, "--list"],
        ["analyze", TOO_LONG, "--out", "out"],
        ["demo", "--out", TOO_LONG],
    ],
)
def test_a_path_that_is_too_long_is_exit_2_and_says_so(
    argv: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(photos=photos) for word in argv]) == 2
    said = error(capsys)
    assert re.search(r"A path is longer than this system allows, [1-9],\d{3} characters: ", said)
    assert len(said) < 250


@pytest.mark.parametrize(
    "command", ["train {photos} --out {loop}", "predict {run} {photos} --out {loop}"]
)
def test_a_link_that_leads_back_to_itself_is_no_bug(
    command: str, photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    argv = command.format(photos=photos, run=trained, loop=loop).split()
    assert main(argv) in {2, 4}  # Python before 3.13 tells while it resolves the path
    assert str(loop) in error(capsys)


def test_a_link_to_nothing_is_no_folder_to_write(
    photos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert main(["predict", str(trained), str(photos), "--out", str(tmp_path / "link")]) == 4
    assert "link: a file, or a link to nothing, has this name" in error(capsys)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("alloc_cpu.cpp:114: DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_a_limit_of_memory_is_exit_4_and_no_bug(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise failure

    monkeypatch.setattr(COMMANDS["models"], "__call__", fail)
    assert main(["models"]) == 4
    assert "limit of memory (ulimit -v)" in error(capsys)


def test_what_the_system_refuses_is_exit_4_and_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files", "photos/1.jpg")

    monkeypatch.setattr(COMMANDS["models"], "__call__", fail)
    assert main(["models"]) == 4
    assert error(capsys) == "error: The system refused (too many open files): photos/1.jpg."


@pytest.mark.parametrize(
    ("problem", "code", "sentence"),
    [
        (ValueError("x"), 1, "This is a bug in iddc (ValueError: x)"),
        (PermissionError(13, "Permission denied", "/there"), 4, "No permission: /there."),
        (MemoryError(), 4, "has not enough of it"),
    ],
)
def test_any_error_is_one_sentence_and_a_traceback_only_with_v(
    problem: BaseException,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise problem

    monkeypatch.setattr(listings, "print_table", fail)
    assert main(["recipes"]) == code
    assert sentence in error(capsys)
    assert main(["recipes", "-v"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(listings, "print_table", stop)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


# Real processes -----------------------------------------------------------------------------------


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


LIGHT = """
import sys
from iddc.cli import COMMANDS, main
codes = [main([name, "--help-all"]) for name in COMMANDS]
codes += [main(argv) for argv in (
    ["trian"],
    ["train", "x", "--out", "y", "--num-clusters", "1"],
    ["train", "x", "--out", "y", "--limti", "1"],
    ["train", "x", "--out", "y", "--recipe", "foldr"],
    ["train", "x", "--out", "y", "--recipe", "folder", "--config", "c"],
    ["train", "x", "--out", "y", "--config", "nowhere.yaml"],
    ["recipes"],
)]
print(codes)
print([name for name in ("torch", "timm", "scipy", "jinja2", "rich") if name in sys.modules])
"""


def test_help_and_configuration_errors_import_neither_torch_nor_timm_nor_scipy() -> None:
    process = python("-c", LIGHT)
    *_, codes, heavy = process.stdout.splitlines()
    assert json.loads(codes) == [0] * len(COMMANDS) + [2] * 6 + [0]
    assert heavy == "[]"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--version"], 0),
        (["evalute"], 2),
        (["train", "nowhere", "--out", "run"], 3),
    ],
)
def test_a_process_exits_with_the_code(argv: Sequence[str], code: int) -> None:
    process = python("-m", "iddc", *argv)
    assert process.returncode == code
    assert "Traceback" not in process.stderr


def test_a_reader_that_goes_away_is_no_bug() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "iddc", "recipes", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert said == ""


# Edges --------------------------------------------------------------------------------------------


def test_refined_scores_have_an_entry_of_their_own(
    trained: Path, labelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("scores.json", "evaluation"))
    for options in ([], ["--refine", "fast", "--save-masks"]):
        assert main(["evaluate", str(run), "--data", str(labelled), *options]) == 0
    entries = json.loads((run / "scores.json").read_text())["scores"]
    assert [entry["refinement"] for entry in entries] == ["none", "fast"]
    assert [path.name for path in (run / "evaluation").iterdir()] == ["folder-val-full-fast"]


def test_masks_of_another_refinement_are_not_mixed_in(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(trained), str(photos), "--out", str(tmp_path / "out"), "--limit", "1"]
    assert main([*argv, "--refine", "fast"]) == 0
    assert main(argv) == 2
    assert "holds other masks: refine was fast, now none. Use --out with" in error(capsys)


def test_crf_without_its_extra_is_exit_4(
    trained: Path,
    labelled: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert main(["evaluate", str(trained), "--data", str(labelled), "--refine", "crf"]) == 4
    assert "pip install 'iddc[crf]'" in error(capsys)
