"""The method of docs/extending.md, added to a copy of the package as the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import iddc
from tiny import write_photos

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTION = PAGE[PAGE.index("## A method") :]


def block(before: str) -> str:
    """The code that follows the line that names a file."""
    after = SECTION[SECTION.index(before) :]
    found = re.search(r"```python\n(.*?)```", after, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and the tests with one file, one line and one test more."""
    shutil.copytree(iddc.__path__[0], tmp_path / "src" / "iddc")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("contract"))
    for name in re.findall(r"`((?:src|tests)/\S*infomax\.py)`", SECTION)[:2]:
        (tmp_path / name).write_text(block(f"`{name}`"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    config = tmp_path / "src" / "iddc" / "config.py"
    text = config.read_text()
    config.write_text(text.replace("MethodName = Literal[", 'MethodName = Literal["infomax", '))
    return tmp_path


def run(copy: Path, *words: str) -> str:
    """A module of Python on the copy; what it prints."""
    environment = {"PYTHONPATH": str(copy / "src"), "PATH": "/usr/bin:/bin", "HOME": str(copy)}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_method_of_the_page_keeps_every_rule(copy: Path) -> None:
    options = (
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-k",
        "infomax or every_module",
        "-m",
        "not slow",
    )
    files = ("tests/test_method_infomax.py", "tests/test_methods.py")
    said = run(copy, "pytest", *options, *files)
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 10


@pytest.mark.slow
def test_the_method_of_the_page_trains_and_predicts(copy: Path) -> None:
    write_photos(copy / "photos", 3)
    small = ("--backbone", "untrained:test_vit", "--device", "cpu", "--workers", "0")
    options = ("--method", "infomax", "--infomax.balance", "2", "--infomax.steps", "2")
    words = ("iddc", "train", "photos", "--out", "run", "--num-clusters", "3")
    assert "infomax" in run(copy, *words, *options, *small)
    run(copy, "iddc", "predict", "run", "photos", "--out", "masks", "--device", "cpu")
    assert len([*(copy / "masks").rglob("*.png")]) >= 3


def test_the_method_of_the_page_fits_on_a_screen() -> None:
    module = block("`src/iddc/methods/infomax.py`")
    code = [line for line in module.splitlines() if line.strip() and '"""' not in line]
    assert len(code) <= 40
