"""The short help: one screen, options that exist, examples that are understood."""

from __future__ import annotations

import re
import shlex

import pytest

from iddc.cli import COMMANDS, main
from iddc.cli.help import TEXTS
from iddc.cli.options import parse


@pytest.mark.parametrize("name", TEXTS)
def test_a_short_help_fits_on_a_screen_and_says_how_to_see_everything(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "-hh or --help-all lists everything."
    assert sum(line.startswith(f"  iddc {name}") for line in lines) == 2
    assert main(["help", name]) == 0
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("name", TEXTS)
def test_the_options_of_a_short_help_are_among_all_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help-all"]) == 0
    everything = {word.strip(",") for word in capsys.readouterr().out.split()}
    shown = {
        word for option in TEXTS[name].options for word in re.findall(r"--?[a-z0-9-]+", option)
    }
    assert shown <= everything


@pytest.mark.parametrize(
    ("name", "example"), [(name, e) for name, text in TEXTS.items() for e in text.examples]
)
def test_the_examples_of_a_short_help_are_understood(name: str, example: str) -> None:
    parse(COMMANDS[name], name, shlex.split(example))


def test_the_number_of_clusters_has_a_short_name() -> None:
    train = parse(COMMANDS["train"], "train", ["photos", "-k", "7", "--out", "run"])
    assert train.chosen().num_clusters == 7  # type: ignore[attr-defined]


def test_values_that_training_refuses_are_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "iddc", "-hh"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"--head \S*centroids", text)
    assert "cityscapes-vits8-e2e" not in text


def test_the_overview_lists_every_command_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    text = capsys.readouterr().out
    first = re.split(r"\n\n(?=\w[^\n]*:\n)", text)[1]
    assert re.findall(r"^  (\w+) ", first, re.MULTILINE) == [
        *("demo", "check", "sweep", "train", "report", "label", "predict")
    ]


def test_a_long_description_fills_its_lines_instead_of_breaking_as_in_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["label", "-hh"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "restores its number" in line]
    assert len(lines) == 1
    assert "3=sky 7=sky makes two clusters one class" in lines[0]
