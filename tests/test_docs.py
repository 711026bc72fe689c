"""The documents: no dead link, no command and no option that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iddc.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    inside = [target for target in targets if not target.startswith("http")]
    assert [target for target in inside if not (page.parent / target).exists()] == []


def test_the_readme_shows_commands_and_options_that_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = re.findall(r"^(?:\S*/)?iddc (\w+)([^#\n]*)", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, _ in shown} >= {"train", "predict", "evaluate"}
    for name, rest in shown:
        assert name in COMMANDS
        assert main([name, "--help"]) == 0
        words = set(capsys.readouterr().out.split())
        assert set(re.findall(r"--[\w.-]+", rest)) <= words


def test_the_readme_is_at_most_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
