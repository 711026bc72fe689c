"""The documents: no dead link, no command and no option that does not exist."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from iddc.cli import COMMANDS, main
from iddc.cli.options import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
PAGES += ROOT.glob("src/iddc/weights/*/README.md")
HISTORY = {ROOT / "CHANGELOG.md", ROOT / "docs/log.md", *ROOT.glob("docs/decisions/*.md")}
"""Pages that tell what was: commands and lines of code may have changed since."""
GUIDES = [page for page in PAGES if page not in HISTORY]


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[str]:
    """The lines of a page's blocks that have no language; one that goes on is one line."""
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)
    shown = "".join(block for language, block in found if not language)
    return shown.replace("\\\n", " ").splitlines()


def prose(text: str) -> list[str]:
    """What a page has between backticks, in its sentences and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.M))


def commands(lines: list[str]) -> list[tuple[str, str]]:
    """Each command of iddc in some lines, and the words after it."""
    found = [re.search(r"(?:^|[\s/])iddc ([a-z]+)\b([^#|&;>]*)", line) for line in lines]
    return [(each[1], each[2]) for each in found if each]


def options(words: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--[\w.-]+", words))


@cache
def known_options(name: str, method: str) -> set[str]:
    """The options of a command, which --method adds to."""
    with redirect_stdout(io.StringIO()) as said:
        assert main([name, *method.split(), "--help-all"]) == 0
    return set(said.getvalue().split())


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


PLACEHOLDERS = {"S": "1", "N": "1", "K": "2", "RATE": "1e-3"}
"""What stands in a command for a number of the reader's."""


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if commands(blocks(page.read_text()))], ids=names
)
def test_commands_in_blocks_are_accepted_with_their_values(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # for files that are named
    for name, words in commands(blocks(page.read_text())):
        plain = re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", words).replace("'", "").replace('"', "").split()
        given = [PLACEHOLDERS.get(word, word) for word in plain]
        if not {"--help", "--help-all", "-h", "-hh"} & {*given}:
            parse(COMMANDS[name], name, given)


@pytest.mark.parametrize("page", GUIDES, ids=names)
def test_sentences_name_commands_and_options_that_exist(page: Path) -> None:
    for name, words in commands(prose(page.read_text())):
        assert name in COMMANDS, f"iddc {name} {words}"
        method = " ".join(re.findall(r"--method [a-z][a-z-]*", words))
        assert options(words) <= known_options(name, method), f"iddc {name} {words}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_scripts_that_a_page_names_are_there_and_have_the_options_it_gives(page: Path) -> None:
    text = page.read_text()
    for line in [*blocks(text), *prose(text)]:
        for script, words in re.findall(
            r"((?:benchmarks|docs/[a-z]+)/[a-z_]+\.py|scripts/[a-z]+)\b([^#|&;]*)", line
        ):
            source = (ROOT / script).read_text()
            if "bash" not in source.splitlines()[0]:  # its options are pytest's
                nodes = [*ast.walk(ast.parse(source))]
                known = {node.value for node in nodes if isinstance(node, ast.Constant)}
                if 'f"--{name}"' in source:  # an option for each field of a class
                    known |= {
                        f"--{node.target.id}"
                        for node in nodes
                        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                    }
                assert options(words) <= known, line


def test_targets_of_make_that_a_page_names_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in GUIDES:
        text = page.read_text()
        named = re.findall(r"^make ([a-z-]+)", "\n".join([*blocks(text), *prose(text)]), re.M)
        assert {*named} <= targets, names(page)


def test_the_readme_shows_the_way_from_images_to_scores() -> None:
    shown = {name for name, _ in commands(blocks((ROOT / "README.md").read_text()))}
    assert shown >= {"train", "predict", "evaluate"}


def test_what_no_script_can_repeat_is_said_to_be_so() -> None:
    """Whatever decides a default is a script with its command, or decides nothing."""
    log = (ROOT / "docs/log.md").read_text().split("\n## ")
    decisions = [page.read_text() for page in ROOT.glob("docs/decisions/*.md")]
    verdict = (ROOT / "docs/verdict.md").read_text()
    for text in [*log, *decisions, verdict]:
        if re.search("scripts? (that )?(was|were) not kept", text):
            assert re.search("not repeatable", text, re.I), text[:80]


@pytest.mark.parametrize("page", GUIDES, ids=names)
def test_where_scores_on_camvid_stand_it_is_said_that_they_are_of_one_shot(page: Path) -> None:
    text = page.read_text()
    pair = r"mIoU.*\d\d\.\d|\d\d\.\d.*mIoU|\d\d\.\d / \d\d\.\d"
    if "CamVid" in text.partition("\n")[0] or ("CamVid" in text and re.search(pair, text)):
        assert "one shot" in text


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
