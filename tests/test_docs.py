"""The documents: no dead link, no command and no option that does not exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iddc.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
HISTORY = {"CHANGELOG.md", "log.md", *(page.name for page in ROOT.glob("docs/decisions/*.md"))}
"""Pages that tell what was: commands and lines of code may have changed since."""
GUIDES = [page for page in PAGES if page.name not in HISTORY]


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(text: str) -> list[tuple[list[str], set[str]]]:
    """The commands in the blocks of a page that have no language, and the options of each.

    A command has its --method beside it, which decides what further options there are.
    """
    blocks = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)
    shown = "".join(block for language, block in blocks if not language)
    lines = shown.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|[\s/])iddc ([a-z]+)\b([^#]*)", line) for line in lines]
    return [
        (
            [each[1], *re.findall(r"--method [\w-]+", each[2])],
            set(re.findall(r"--[\w.-]+", each[2])),
        )
        for each in found
        if each
    ]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    inside = [target for target in targets if not target.startswith("http")]
    assert [target for target in inside if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", GUIDES, ids=names)
def test_links_to_a_line_of_code_lead_to_what_they_name(page: Path) -> None:
    links = re.findall(r"\[`(\w+)`\]\(([^)#]+)#L(\d+)\)", page.read_text())
    for name, target, line in links:
        lines = (page.parent / target).read_text().splitlines()
        places = [
            at for at, code in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", code)
        ]
        assert [int(line)] == places, f"{names(page)}: {name} of {target}"


def test_each_equation_of_the_paper_is_linked_to_the_code_that_names_it() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    assert re.findall(r"\\tag\{(\d)\}", text) == list("12345678")
    named = set()
    for name, target in re.findall(r"\[`(\w+)`\]\(([^)#]+)#", text):
        tree = ast.parse((ROOT / "docs" / target).read_text())
        (node,) = (node for node in tree.body if getattr(node, "name", "") == name)
        assert isinstance(node, ast.FunctionDef | ast.ClassDef)
        summary = (ast.get_docstring(node) or "").split("\n\n")[0]
        named |= {*re.findall(r"Eq\. \((\d)\)", summary)} if "losses" in target else set()
    assert named == set("12345678")


@pytest.mark.parametrize("page", GUIDES, ids=names)
def test_pages_show_commands_and_options_that_exist(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for (name, *method), options in commands(page.read_text()):
        assert name in COMMANDS
        assert main([name, *" ".join(method).split(), "--help-all"]) == 0
        assert options <= set(capsys.readouterr().out.split())


def test_the_readme_shows_the_way_from_images_to_scores() -> None:
    shown = {name for (name, *_), _ in commands((ROOT / "README.md").read_text())}
    assert shown >= {"train", "predict", "evaluate"}


def test_the_readme_is_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_the_site_builds_without_a_warning_draws_every_equation_and_fetches_nothing(
    tmp_path: Path,
) -> None:
    pytest.importorskip("sphinx", reason="sphinx (dependency group docs) is not installed")
    options = ["-W", "--keep-going", "-n", "-q", "-d", tmp_path / "trees"]
    process = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert not process.stderr
    method = (tmp_path / "site" / "method.html").read_text()
    numbers = re.findall(r'<div class="math"[^>]*><span class="eqno">\((\d)\)</span><math', method)
    assert numbers == [*"12345678"]
    assert "$" not in method
    assert 'href="api.html#iddc.losses.terms.positive_loss"' in method
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="http', method)
