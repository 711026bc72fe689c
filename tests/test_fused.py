"""The fused kernel against the dense form, on a GPU, or on the CPU in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that the last test starts this file
once more, in a process of its own. The interpreter multiplies bf16 wrongly and gets fp32 instead:
that products of bf16 are right is tested on a GPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch.nn.functional import normalize

import oracles
from iddc.config import NegativeAffinity, ObjectiveConfig
from iddc.doctor import examine
from iddc.losses import PENALTIES, Objective, Pixels, fused_obstacle, terms
from iddc.losses.pairs import PairRule, PairSums, sum_in_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RULES = [
    PairRule(positive=True, threshold=0.1, weights=weights, penalty=penalty, log_offset=0.2)
    for weights, penalty in product(("affinity", "off"), PENALTIES)
] + [
    PairRule(positive=False, threshold=0.3, weights=weights, penalty=penalty, log_offset=0.2)
    for weights, penalty in product(get_args(NegativeAffinity), PENALTIES)
]
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    # of numpy, for the interpreter of Triton 3.2
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture
def device() -> torch.device:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU here; the last test runs this one in Triton's interpreter")
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def fused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from iddc.losses import fused

    if INTERPRETED:  # several tiles even of small images
        monkeypatch.setattr(fused, "SIDE", 16)
        monkeypatch.setattr(fused, "MAX_CLUSTERS", 16)
    return fused


def some_pixels(seed: int, device: torch.device, b: int, n: int, k: int = 5, d: int = 7) -> Pixels:
    generator = torch.Generator().manual_seed(seed)
    embeddings = normalize(torch.randn(b, n, d, generator=generator) + 0.3, dim=-1)
    logits = 2 * torch.randn(b, n, k, generator=generator)
    return Pixels(embeddings.to(device), logits.softmax(dim=-1).to(device))


def dense(first: Pixels, other: Pixels, rule: PairRule, roll: int, centre: Any = None) -> PairSums:
    """Every pair in memory, in double precision, with autograd's gradient."""
    v, other_v = (x.probs.double().requires_grad_() for x in (first, other))
    u, other_u = (x.embeddings.double() for x in (first, other))
    if centre is not None:
        u, other_u = (normalize(x - centre, dim=-1) for x in (u, other_u))
    affinity = u @ other_u.roll(roll, 0).mT
    assert (affinity - rule.threshold).abs().min() > 1e-6, "rounding may cross the threshold"
    agreement = v @ other_v.roll(roll, 0).mT
    selected = affinity > rule.threshold if rule.positive else affinity < rule.threshold
    weights = {
        "affinity": affinity,
        "paper": 1 - affinity,
        "released": 1 - affinity.clamp(min=0),
        "off": torch.ones_like(affinity),
    }[rule.weights]
    disagreement = 1 - agreement if rule.positive else agreement
    cost = (weights * PENALTIES[rule.penalty](disagreement, rule.log_offset))[selected].sum()
    gradients = torch.autograd.grad(cost, (v, other_v))
    return PairSums(cost.detach(), selected.sum(), (gradients[0], gradients[1]))


def same(found: PairSums, expected: PairSums, rel: float = 1e-5) -> None:
    assert found.count == expected.count
    assert found.cost.item() == pytest.approx(expected.cost.item(), rel=rel, abs=1e-6)
    assert found.gradients is not None
    assert expected.gradients is not None
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= rel * (1 + other.abs().max())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sums_of_every_rule_equal_the_dense_form(
    fused: ModuleType, device: torch.device, rule: PairRule
) -> None:
    first, other = some_pixels(0, device, 2, 18), some_pixels(1, device, 2, 18)
    same(fused.sum_fused(first, other, rule, roll=1), dense(first, other, rule, 1))


@pytest.mark.parametrize("roll", [0, 2])
@pytest.mark.parametrize("case", range(4))
def test_sums_of_any_size_equal_the_dense_form(
    fused: ModuleType, device: torch.device, case: int, roll: int
) -> None:
    side, width = fused.SIDE, fused.MAX_CLUSTERS
    n, m, k, d = [
        (1, 1, 1, 1),
        (side + 3, 2 * side + 1, 5, 7),
        (side, 3 * side, width, 32),
        (3, side + 1, width + 4, 40),
    ][case]
    first, other = some_pixels(0, device, 3, n, k, d), some_pixels(1, device, 3, m, k, d)
    rule = RULES[2]
    same(fused.sum_fused(first, other, rule, roll=roll), dense(first, other, rule, roll))


@pytest.mark.parametrize("rule", [RULES[2], RULES[6]], ids=str)
def test_affinities_less_a_centre_equal_those_of_centred_embeddings(
    fused: ModuleType, device: torch.device, rule: PairRule
) -> None:
    first, other = some_pixels(0, device, 2, 18), some_pixels(1, device, 2, 19)
    centre = first.embeddings.mean((0, 1))
    found = fused.sum_fused(first, other, rule, roll=1, centre=centre)
    same(found, dense(first, other, rule, 1, centre))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centred", [False, True])
def test_half_precision_gives_the_sums_of_its_rounded_numbers(
    fused: ModuleType, device: torch.device, dtype: torch.dtype, centred: bool
) -> None:
    first, other = (
        Pixels(x.embeddings.to(dtype), x.probs.to(dtype))
        for x in (some_pixels(s, device, 2, 18, d=40) for s in (0, 1))
    )
    centre = first.embeddings.float().mean((0, 1)) if centred else None
    found = fused.sum_fused(first, other, RULES[2], roll=1, centre=centre)
    same(found, dense(first, other, RULES[2], 1, centre))


def test_embeddings_may_lie_in_memory_as_a_network_leaves_them(
    fused: ModuleType, device: torch.device
) -> None:
    first, other = some_pixels(0, device, 2, 18), some_pixels(1, device, 2, 18)
    maps = [Pixels(x.embeddings.mT.contiguous().mT, x.probs) for x in (first, other)]
    same(fused.sum_fused(*maps, RULES[2]), dense(first, other, RULES[2], 0))


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_the_number_of_programs_does_not_matter(
    fused: ModuleType, device: torch.device, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    n = 4 * fused.SIDE + 1
    first, other = some_pixels(0, device, 2, n), some_pixels(1, device, 2, 18)
    found = fused.sum_fused(first, other, RULES[2])
    same(found, dense(first, other, RULES[2], 0))
    again = fused.sum_fused(first, other, RULES[2])
    assert all(map(torch.equal, found.gradients, again.gradients))


def test_without_gradients_cost_and_count_are_the_same(
    fused: ModuleType, device: torch.device
) -> None:
    first, other = some_pixels(0, device, 2, 18), some_pixels(1, device, 2, 18)
    found = fused.sum_fused(first, other, RULES[2], needs_grad=False)
    expected = fused.sum_fused(first, other, RULES[2])
    assert found.gradients is None
    assert (found.cost, found.count) == (expected.cost, expected.count)


WITHOUT_NUMBER = [(rule, "probs") for rule in RULES[::3]]
WITHOUT_NUMBER += [(rule, "embeddings") for rule in RULES[::3] if rule.weights != "off"]


@pytest.mark.parametrize(("rule", "field"), WITHOUT_NUMBER, ids=str)
def test_a_nan_is_seen(fused: ModuleType, device: torch.device, rule: PairRule, field: str) -> None:
    """A run must stop at it, not go on without the pixel that has it."""
    first = some_pixels(0, device, 1, 5)
    assert not fused.sum_fused(first, first, rule).cost.isnan()
    getattr(first, field)[0, 3, 2] = torch.nan
    assert fused.sum_fused(first, first, rule).cost.isnan()


def test_the_objective_of_fused_sums_is_equation_8(
    fused: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms, "_fastest_sum", lambda *_: fused.sum_fused)
    first, second = some_pixels(2, device, 3, 4), some_pixels(3, device, 3, 4)
    first, second = (replace(x, probs=x.probs.requires_grad_()) for x in (first, second))
    config = ObjectiveConfig(centering="batch", negative_crops="second")
    found = Objective(config)(first, second, [1, 2])
    found.total.backward()
    u, v, u_plus, v_plus = (
        x.tolist() for x in (first.embeddings, first.probs, second.embeddings, second.probs)
    )

    def loops(v: oracles.Crop) -> float:
        return oracles.equation_8(u, v, u_plus, v_plus, [1, 2], config).total

    assert found.total.item() == pytest.approx(loops(v), rel=1e-5)
    slopes = torch.tensor(oracles.slopes(loops, v, step=1e-4))
    assert first.probs.grad is not None
    assert (first.probs.grad.cpu() - slopes).abs().max() < 1e-5


def test_on_a_gpu_the_objective_uses_the_kernel() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    from iddc.losses.fused import sum_fused

    assert fused_obstacle() == ""
    assert terms._fastest_sum(torch.device("cuda"), torch.float32) is sum_fused


def test_blocks_are_used_on_a_cpu_in_double_precision_and_where_the_kernel_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from iddc.losses.fused import sum_fused

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(terms, "fused_obstacle", lambda: "")
    assert terms._fastest_sum(cuda, torch.bfloat16, torch.float32) is sum_fused
    assert terms._fastest_sum(cpu, torch.float32, torch.float32) is sum_in_blocks
    assert terms._fastest_sum(cuda, torch.float32, torch.float64) is sum_in_blocks
    monkeypatch.setattr(terms, "fused_obstacle", lambda: "no C compiler")
    assert terms._fastest_sum(cuda, torch.float32, torch.float32) is sum_in_blocks


def test_an_obstacle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    obstacle = fused_obstacle.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert obstacle() == "no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("iddc.losses.fused.try_out", broken)
    assert obstacle() == "RuntimeError: Failed to find C compiler."
    monkeypatch.setattr("iddc.losses.fused.try_out", lambda: None)
    assert obstacle() == ""
    monkeypatch.setitem(sys.modules, "iddc.losses.fused", None)
    assert obstacle().startswith("ModuleNotFoundError: import of iddc.losses.fused")


def test_the_doctor_says_which_form_the_loss_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.losses.fused_obstacle", lambda: "no CUDA GPU")
    found = {finding.name: finding for finding in examine(Path.cwd())}["fused loss"]
    assert (found.value, found.advice) == ("not available (no CUDA GPU): blocks", "")
    monkeypatch.setattr("iddc.losses.fused_obstacle", lambda: "")
    found = {finding.name: finding for finding in examine(Path.cwd())}["fused loss"]
    assert found.value.startswith("triton 3.")


@pytest.mark.parametrize(
    ("device", "hip", "capability", "expected"),
    [
        ("cuda", None, (9, 0), "tf32x3"),
        ("cuda", None, (8, 0), "tf32x3"),
        ("cuda", None, (7, 5), "ieee"),
        ("cuda", "6.2", (9, 4), "ieee"),
        ("cpu", None, (0, 0), "ieee"),
    ],
)
def test_fp32_is_multiplied_by_tensor_cores_where_they_can(
    device: str,
    hip: str | None,
    capability: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from iddc.losses.fused import _precision

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert _precision(torch.device(device)) == expected


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability: int, dtype: str) -> None:
    """Type errors that the interpreter does not see; and what a GPU has room for."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iddc.losses import fused

    wide = dtype == "fp32"
    constants: dict[str, Any] = {
        "positive": True,
        "weighting": "affinity",
        "penalty": "exp",
        "centred": wide,
        "needs_grad": True,
        "wide": wide,
        "precision": "tf32x3",
        "side": fused.SIDE,
        "depth": fused.DEPTH_BYTES // (4 if wide else 2),
        "width": 32,
    }
    pointers = {"u": dtype, "other_u": dtype, "counts": "i32"}
    pointers |= dict.fromkeys(
        ("v", "other_v", "centre", "costs", "gradient", "other_gradient"), "fp32"
    )
    types = dict.fromkeys(fused._kernel.arg_names, "i32")
    types |= {name: f"*{element}" for name, element in pointers.items()}
    types |= {"threshold": "fp32", "log_offset": "fp32"} | dict.fromkeys(constants, "constexpr")
    compiled = compile_kernel(
        ASTSource(fused._kernel, types, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
    )
    assert compiled.metadata.shared <= 99 * 1024  # what a block may have on consumer GPUs


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_everything_above_holds_in_the_interpreter() -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            __file__,
        ],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    assert "passed" in process.stdout
