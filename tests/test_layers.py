"""The layers of the design: a module imports only from lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import iddc

SOURCE = Path(iddc.__file__).parent
LAYERS = {
    "config": 0,
    "errors": 0,
    "canvas": 1,
    "cluster": 1,
    "clustering": 1,
    "consensus": 1,
    "decoders": 1,
    "device": 1,
    "gaps": 1,
    "ground": 1,
    "images": 1,
    "losses": 1,
    "intervals": 2,
    "metrics": 1,
    "progress": 1,
    "recipes": 1,
    "regions": 1,
    "runs": 1,
    "schedules": 1,
    "backbones": 2,
    "datasets": 2,
    "manifest": 2,
    "masks": 2,
    "processes": 2,
    "refine": 2,
    "video": 2,
    "views": 2,
    "windows": 2,
    "geo": 3,
    "network": 3,
    "sweep": 4,
    "samples": 3,
    "segmentation": 3,
    "thresholds": 3,
    "methods": 4,
    "modelfile": 4,
    "rasters": 4,
    "engines": 5,
    "learning": 5,
    "quantizing": 2,
    "runtimes": 1,
    "segmenter": 6,
    "analysis": 7,
    "evaluation": 7,
    "export": 7,
    "figures": 8,
    "importing": 7,
    "labelling": 7,
    "predicting": 8,
    "relabel": 7,
    "pretraining": 7,
    "report": 7,
    "bench": 8,
    "doctor": 8,
    "verify": 8,
    "demo": 9,
    "scripting": 9,
    "comparison": 9,
    "reproduce": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}


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
        assert LAYERS[other] < LAYERS[here], f"{path}: {here} must not import {other}"


def test_layers_name_no_module_that_is_gone() -> None:
    assert set(LAYERS) <= {part(path) for path in FILES}


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of iddc that a file imports when it runs, wherever in the file it does."""
    found: set[str] = set()
    lines = [ast.parse(path.read_text())]
    while lines:
        node = lines.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iddc"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules.keys() or {str(node.module)}
        lines += ast.iter_child_nodes(node)
    return found & modules.keys()


def test_no_two_modules_import_each_other_even_by_way_of_others() -> None:
    modules = {
        ".".join(("iddc", *path.relative_to(SOURCE).with_suffix("").parts)): path
        for path in FILES
        if path.stem != "__init__"
    }
    waiting = {name: imported_modules(path, modules) - {name} for name, path in modules.items()}
    while leaves := {name for name, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {name: needed for name, needed in waiting.items() if name not in leaves}
    assert not waiting, f"a circle among {sorted(waiting)}"
