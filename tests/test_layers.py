"""The layers of the design: a module imports only from lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import iddc

SOURCE = Path(iddc.__file__).parent
LAYERS: dict[str, float] = {
    "config": 0,
    "errors": 0,
    "canvas": 1,
    "clustering": 1,
    "consensus": 1,
    "device": 1,
    "images": 1,
    "losses": 1,
    "metrics": 1,
    "predicting": 5,
    "progress": 1,
    "recipes": 1,
    "regions": 1,
    "runs": 1,
    "schedules": 1,
    "backbones": 2,
    "datasets": 2,
    "masks": 2,
    "refine": 2,
    "views": 2,
    "windows": 2,
    "modelfile": 3.5,
    "network": 3,
    "thresholds": 3,
    "video": 2,
    "segmenter": 4,
    "evaluation": 5,
    "geo": 3,
    "ground": 1,
    "rasters": 4,
    "export": 5,
    "importing": 5,
    "verify": 8,
    "processes": 2,
    "samples": 5,
    "methods": 6,
    "learning": 7,
    "analysis": 8,
    "bench": 8,
    "doctor": 8,
    "figures": 8,
    "labelling": 8,
    "pretraining": 8,
    "report": 8,
    "demo": 9,
    "reproduce": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
EXCEPTIONS = {("segmenter", "learning"), ("segmenter", "methods")}
"""Segmenter(...).fit imports the training loop inside the method (DESIGN, section 1)."""


def part(path: Path) -> str:
    """The top-level module or package a file belongs to: `datasets` for datasets/folder.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of iddc that a file imports, wherever in the file it does."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            parts |= {
                name.name.split(".")[1] for name in node.names if name.name.startswith("iddc.")
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "iddc":
                parts |= {n.name for n in node.names if n.name in LAYERS}
            elif node.module and node.module.startswith("iddc."):
                parts.add(node.module.split(".")[1])
    return parts


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_to_lower_layers(path: Path) -> None:
    here = part(path)
    assert here in LAYERS, f"{here} has no layer: add it to the design and to this table"
    for other in imported_parts(path) - {here}:
        if (here, other) in EXCEPTIONS:
            continue
        assert LAYERS[other] < LAYERS[here], f"{path}: {here} must not import {other}"


def test_layers_name_no_module_that_is_gone() -> None:
    assert set(LAYERS) <= {part(path) for path in FILES}
