"""The check of a machine passes here, and finds what is made wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from iddc import canvas, evaluation, verify
from iddc.backbones import positions
from iddc.cli import main
from iddc.losses import REGULARIZERS
from iddc.verify import (
    Check,
    check_equations,
    check_matching,
    check_positions,
    check_protocols,
    check_windows,
    failed,
)

CPU = torch.device("cpu")
PARTS = [check_equations, check_windows, check_protocols, check_positions]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_part_agrees_with_its_twin(part: Callable[..., object]) -> None:
    checks = list(part(CPU, 3))  # type: ignore[call-overload]  # a generator of checks
    assert checks
    assert not failed(checks)


def test_the_matching_is_the_best() -> None:
    assert check_matching(3).passed


def test_a_difference_that_is_no_number_fails() -> None:
    assert not Check("a", "1", math.nan, 1.0).passed
    assert Check("a", "1", 1.0, 1.0).passed


def names(checks: object) -> set[str]:
    return {check.name for check in failed(list(checks))}  # type: ignore[call-overload]


def test_a_wrong_regulariser_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = REGULARIZERS["entropy"]
    monkeypatch.setitem(REGULARIZERS, "entropy", lambda p, config: 1.01 * right(p, config))
    assert names(check_equations(CPU, 0)) == {"Eq. (8), entropy", "its gradient, entropy"}


def test_windows_that_are_averaged_otherwise_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = canvas._blending
    monkeypatch.setattr(canvas, "_blending", lambda *given: right(*given).sqrt())
    canvas._windows_of_axis.cache_clear()
    canvas._bands.cache_clear()
    found = names(check_windows(CPU, 0))
    canvas._windows_of_axis.cache_clear()
    canvas._bands.cache_clear()
    assert found == {
        "windows: softmax pixels, blend tent",
        "windows: softmax patches, blend tent",
    }


def test_another_rule_of_nearest_resizing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_torch_nearest", evaluation._pillow_nearest)
    assert names(check_protocols(CPU, 0)) == {"protocol iddc-sliding"}


def test_another_interpolation_of_positions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "OFFSET", 0.0)
    assert names(check_positions(CPU, 0)) == {"positions of DINO"}


def test_the_command_prints_a_table_and_exits_with_5_where_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("first", "2 x 2", 1e-9, 1e-6), Check("second", "3 x 3", 0.25, 1e-6)]
    monkeypatch.setattr(verify, "verify", lambda *_: iter(checks))
    assert main(["verify", "--device", "cpu"]) == 5
    said = capsys.readouterr()
    assert "second" in said.out
    assert "2.5e-01" in said.out
    assert "1 of 2 checks on cpu are above their tolerance: second" in said.err
    monkeypatch.setattr(verify, "verify", lambda *_: iter(checks[:1]))
    assert main(["verify", "--device", "cpu"]) == 0
    assert "1 checks on cpu, all within" in capsys.readouterr().out
