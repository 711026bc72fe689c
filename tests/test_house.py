"""The house around the code: what packaging, citation and contributors rely on."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml

import iddc
from iddc import backbones, config, network
from iddc.cli import main
from iddc.losses import objective
from tiny import write_photos

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "iddc"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("script", ["scripts/check", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.skipif(which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "last"), [("test", "scripts/check"), ("demo", "iddc demo")])
def test_make_sets_up_before_it_does_anything(target: str, last: str) -> None:
    """Judged as on a fresh machine: everything has to be made."""
    lines = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--always-make", target],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    installs = [index for index, line in enumerate(lines) if "--group dev" in line]
    assert installs
    assert max(installs) < len(lines) - 1
    assert lines[-1].endswith(last)


def test_continuous_integration_runs_the_one_definition_of_clean() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_there_is_no_lock_file() -> None:
    locks = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "pylock.toml"}
    assert not locks & {path.name for path in ROOT.iterdir()}


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "common", "base", "core", "misc"}
    assert not empty & {path.stem for path in SOURCE.rglob("*")}


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == iddc.__version__
    assert citation["license"] == PROJECT["license"].partition(" ")[0]  # of the code
    (paper,) = citation["references"]
    assert (paper["type"], paper["doi"]) == ("article", "10.1007/s11263-024-02083-x")
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Zhang", "Tang"]


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {iddc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_one_the_package_declares() -> None:
    assert PROJECT["license"] == "Apache-2.0 AND CC-BY-NC-4.0"  # of the bundled weights
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_text_of_both_licences_goes_into_the_wheel() -> None:
    code, weights = ((ROOT / name).read_text() for name in PROJECT["license-files"])
    assert code == (ROOT / "LICENSE").read_text()
    assert (SOURCE / "weights" / "bundled" / "LICENSE").read_text() == weights
    assert "Attribution-NonCommercial 4.0 International Public License" in weights
    for section in ("1 – Definitions", "2 – Scope", "5 – Disclaimer", "8 – Interpretation"):
        assert f"Section {section}" in weights


def test_the_dockerfile_copies_what_is_here_and_names_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert copied
    assert {*copied} <= kept
    assert all((ROOT / name).exists() for name in copied)
    (extras,) = re.findall(r"'\.\[(.+?)\]'", text)
    assert {*extras.split(",")} <= set(PROJECT["optional-dependencies"])
    assert {PROJECT["readme"], "LICENSE"} <= {*copied}  # the build needs them


def test_every_extra_is_known_to_the_doctor() -> None:
    from iddc.doctor import EXTRAS

    assert set(EXTRAS) == set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("model", config.Frozen.__subclasses__(), ids=lambda model: model.__name__)
def test_every_number_of_a_run_says_what_it_is(model: type[config.Frozen]) -> None:
    silent = [name for name, field in model.model_fields.items() if not field.description]
    assert not silent


def test_a_docstring_says_what_something_is_not_what_it_is_of() -> None:
    """In config.py docstrings are the text of --help, where nothing stands before them."""
    vague = [
        f"{path.name}: {node.value.value}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if re.match(r"(Of|By|See|Its)\b", str(node.value.value))
    ]
    assert not vague


def test_the_source_cites_no_document_that_is_not_here() -> None:
    plans = re.compile(r"\b(FACTS|DESIGN|STYLE|WORDS|METHODS\.md|METHODOBJECT)\b")
    assert not [path.name for path in SOURCE.rglob("*.py") if plans.search(path.read_text())]


def test_seven_calls_lead_from_the_command_to_equation_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader goes through, one file after another, until the equation is there."""
    seen: list[list[str]] = []
    equation_1 = objective.positive_loss

    def watched(*pixels: Any, **options: Any) -> Any:
        stack = traceback.extract_stack()
        seen.append([frame.name for frame in stack if Path(frame.filename).is_relative_to(SOURCE)])
        return equation_1(*pixels, **options)

    monkeypatch.setattr(objective, "positive_loss", watched)
    assert main(train(tmp_path)) == 0
    assert seen[0] == ["main", "__call__", "fit", "learn", "loss", "__call__"]  # and itself


def test_training_loads_its_backbone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = network.load_backbone

    def watched(name: str) -> Any:
        loaded.append(name)
        return load(name)

    for module in (network, backbones):
        monkeypatch.setattr(module, "load_backbone", watched)
    assert main(train(tmp_path)) == 0
    assert loaded == ["untrained:test_vit"]


def train(folder: Path) -> list[str]:
    """The words of a short training on two photos."""
    write_photos(folder / "photos", 2)
    words = f"train {folder}/photos --out {folder}/run --backbone untrained:test_vit"
    words += " --epochs 1 --views.crop-size 64 --num-clusters 2 --device cpu --workers 0"
    return words.split()


def test_importing_the_package_imports_no_heavy_library_and_offers_its_names() -> None:
    code = (
        "import sys, iddc; assert 'torch' not in sys.modules; "
        "print([getattr(iddc, name) for name in iddc.__all__])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert process.returncode == 0, process.stderr.decode()
