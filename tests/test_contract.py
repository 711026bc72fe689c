"""What users and scripts rely on, frozen: help, exit codes, the files of a run, and its weights.

Whoever changes one of these on purpose writes the new texts with

    REWRITE=1 python -m pytest -n 0 tests/test_contract.py

and says in the commit what changed and why; `-k help` and the like write a part. `contract/help`
has a text for each command, `contract/options.txt` the default and the bounds of each option,
`contract/runs` a file for each kind of run: the names of its files,
the keys of its configuration and of its log, and a fingerprint of its weights. A fingerprint is
what the last steps said and a few numbers of every tensor, which another CPU rounds a little
differently. The digest of all bytes is compared on the kind of CPU alone that has an entry in it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from iddc import config
from iddc.cli import COMMANDS, main
from iddc.cli.help import GROUPS, TEXTS
from iddc.errors import ConfigError, DataError, Interrupted, NumericError, SetupError
from iddc.methods import METHODS, find_method
from torchrun import exit_codes

# Tests fork to be quick; Python 3.12 warns of it where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CONTRACT = Path(__file__).parent / "contract"
RELATIVE, ABSOLUTE = 2e-4, 2e-5
"""How far a number of another CPU may be off: a twentieth of one step of the learning rate."""
CHAOTIC, COARSE = {"pretrain-contrast"}, 0.05
"""Runs in which batch norm over few pixels and Adam enlarge the last digit: after four steps, one
thread or two differ by 2 % of the gradient's norm. Of these the log and the norms of tensors are
compared, and may be so far off."""

SMALL = "--num-clusters 3 --device cpu --workers 0 --backbone untrained:test_vit"
TRAIN = f"train {SMALL} --views.crop-size 64 --views.short-side 0 --training.batch-size 3"
TRAIN += " --training.precision fp32 --epochs 3 --checkpoint-every 2"
FREE = f"{TRAIN} --training.start random --objective.affinity cosine"
FREE += " --objective.regularizer-weight 0.3"
PRETRAIN = "pretrain --device cpu --workers 0 --precision fp32 --steps 4 --batch-size 16"
RUNS = {
    "train": f"{FREE} --training.heads 4",
    "train-started": TRAIN,
    "train-linear": f"{FREE} --training.heads 4 --head linear --seed 1",
    "train-released": f"{TRAIN} --recipe cocostuff27-vits16-released --head conv",
    "train-end-to-end": f"{FREE} --training.heads 4 --training.end-to-end"
    " --training.backbone-learning-rate 1e-4",
    "train-new-views": f"{FREE} --training.heads 4 --views.repeat 0 --training.patches 7",
    "train-heads": f"{FREE} --training.heads 2 --epochs 4",
    "train-auto": f"{FREE} --training.heads 4 --objective.positive-threshold auto"
    " --objective.negative-threshold 0.1",
    "train-pieces": f"{FREE} --training.heads 4 --micro-batch-size 2",
    "kmeans": f"baseline kmeans {SMALL}",
    "consensus": f"baseline consensus {SMALL} --consensus.steps 20",
    "stego": f"baseline stego {SMALL} --stego.steps 6 --stego.batch-size 4",
    "pretrain-contrast": f"{PRETRAIN} --network test_resnet --contrast.small-size 32"
    " --contrast.large-size 64 --contrast.warmup 2 --contrast.recalibration-size 64"
    " --contrast.recalibration-steps 2",
    "pretrain-dino": f"{PRETRAIN} --method dino --network test_vit --depth 1"
    " --dino.local-crops 2 --dino.prototypes 16 --dino.hidden 32 --dino.bottleneck 16"
    " --dino.global-size 64 --dino.local-size 32",
}
CONFIGURED = {  # what `baseline` takes from a file
    "kmeans": "views: {short_side: 48}\nprediction: {window: 32, overlap: 8}\n",
    "consensus": "views: {short_side: 64}\nprediction: {window: 32, overlap: 8}\n"
    "training: {precision: fp32}\n",
    "stego": "views: {short_side: 64, crop_size: 32}\nprediction: {window: 32, overlap: 8}\n"
    "training: {precision: fp32}\n",
}
TOGETHER = {"train", "train-started", "train-end-to-end", "pretrain-dino"}
"""What torchrun is tried with here: two processes do what one does."""


def rewrites() -> bool:
    return bool(os.environ.get("REWRITE"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images that follow from arithmetic alone: no library's random numbers, no JPEG."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        coarse = np.arange(60) * (37 + 2 * i) % 251
        image = np.kron(coarse.reshape(4, 5, 3), np.ones((36 if i % 3 == 0 else 16, 16, 1)))
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


def run(name: str, photos: Path, out: Path) -> list[str]:
    """The words of a run's command."""
    verb, *options = RUNS[name].split()
    words = [options.pop(0)] if verb == "baseline" else []
    if name in CONFIGURED:
        config = out.with_name(f"{name}.yaml")
        config.write_text(CONFIGURED[name])
        options += ["--config", str(config)]
    if verb != "pretrain":
        options += ["--limit", "5" if verb == "train" else "8"]
    return [verb, *words, str(photos), "--out", str(out), *options]


def flat(record: dict[str, Any], *path: str) -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from flat(value, *path, key)
        else:
            yield ".".join((*path, key))


def files_of(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def layout(out: Path) -> dict[str, Any]:
    """Which files there are, and the keys in them."""
    lines = log_of(out)
    described = "backbone.json" if (out / "backbone.json").exists() else "model.json"
    return {
        "files": files_of(out),
        "config": [*flat(yaml.safe_load((out / "config.yaml").read_text()))],
        "versions": [*json.loads((out / "versions.json").read_text())],
        "model": [*flat(json.loads((out / described).read_text()))],
        "log": [*dict.fromkeys(" ".join(line) for line in lines)],
        "lines": len(lines),
    }


def numbers_of(out: Path) -> dict[str, list[float]]:
    """What the last line of the log says, and of each tensor the mean, the norm and two entries."""
    last = {k: v for k, v in log_of(out)[-1].items() if k != "seconds" and not isinstance(v, str)}
    found = {f"log {key}": [float(value)] for key, value in last.items()}
    for name, tensor in load_file(weights_of(out)).items():
        row = tensor.double().flatten()
        entries = [row[len(row) // 3], row[-1]]
        found[name] = [float(value) for value in (row.mean(), row.norm(), *entries)]
    return found


def weights_of(out: Path) -> Path:
    (path,) = out.glob("*.safetensors")
    return path


def digest_of(out: Path) -> str:
    return hashlib.sha256(weights_of(out).read_bytes()).hexdigest()


def machine() -> str:
    """What bytes depend on: the version of torch, and the CPU's instructions and model."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {model}"


def close(found: float, kept: float) -> bool:
    return math.isclose(found, kept, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def agree(name: str, found: list[float], kept: list[float]) -> bool:
    """Whether the numbers of one entry of a run are what they were."""
    if name in CHAOTIC:
        place = min(1, len(kept) - 1)  # the norm of a tensor, or the one number of the log
        return math.isclose(found[place], kept[place], rel_tol=COARSE, abs_tol=COARSE)
    return all(starmap(close, zip(found, kept, strict=True)))


def test_the_comparison_sees_a_step_more_and_not_the_last_digit() -> None:
    assert close(0.25 * (1 + 1e-6), 0.25)
    assert not close(0.25 + 5e-4, 0.25)  # one step of Adam at the default rate
    assert not close(1.4 * 1.001, 1.4)


@pytest.mark.parametrize("command", [*COMMANDS, "iddc"])
def test_help_is_what_it_was(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([command, "--help-all"] if command in COMMANDS else ["--help"]) == 0
    text, path = capsys.readouterr().out, CONTRACT / "help" / f"{command}.txt"
    if rewrites():
        path.write_text(text)
    assert text == path.read_text()


def test_every_command_has_a_short_help_that_the_overview_groups() -> None:
    grouped = [name for group in GROUPS.values() for name in group]
    assert TEXTS.keys() == COMMANDS.keys() == {*grouped}


def test_every_help_text_has_a_command() -> None:
    assert {path.stem for path in (CONTRACT / "help").iterdir()} == {*COMMANDS, "iddc"}


def test_every_option_has_the_default_and_the_bounds_that_it_had() -> None:
    """A narrower bound refuses files that were accepted, another default changes their meaning."""
    configs = {found for found in vars(config).values() if inspect.isclass(found)}
    configs |= {find_method(name).Config for name in METHODS}
    found = []
    for owner in sorted(filter(is_config, configs), key=lambda owner: owner.__name__):
        for name, field in owner.model_fields.items():
            default = field.get_default(call_default_factory=True)
            words = type(default).__name__ if is_config(type(default)) else repr(default)
            bounds = [str(one) for one in field.metadata]
            found.append(" ".join([f"{owner.__name__}.{name} =", words, *bounds]))
    path = CONTRACT / "options.txt"
    if rewrites():
        path.write_text("\n".join(found) + "\n")
    assert found == path.read_text().splitlines()


@pytest.mark.parametrize(
    ("owner", "values"),
    [
        (config.ViewsConfig, {"max_scale": math.inf}),
        (config.ObjectiveConfig, {"positive_threshold": math.nan}),
        (config.ReadingConfig, {"pages": (0,)}),
    ],
)
def test_what_is_no_number_and_a_page_before_the_first_are_refused(
    owner: type[config.Frozen], values: dict[str, Any]
) -> None:
    """These bounds stand beside no option, and so not in `contract/options.txt`."""
    with pytest.raises(ValidationError, match=next(iter(values))):
        owner(**values)


def is_config(owner: type) -> bool:
    return issubclass(owner, config.Frozen)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (SetupError, 4), (NumericError, 5)],
)
def test_errors_have_their_exit_codes(error: type[Exception], code: int) -> None:
    assert vars(error)["exit_code"] == code


def test_an_interrupted_command_exits_as_a_shell_expects() -> None:
    assert [Interrupted("", signum=signum).exit_code for signum in (2, 15)] == [130, 143]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ("trian", 2),
        ("train nowhere --out {out}", 3),
        ("train {photos} --out {out} --num-clusters 1", 2),
        ("train {photos} --out {out} --limit 1", 3),
        ("train {photos} --out {photos}/run", 2),
        ("train {photos} --out {out} --device cuda:99", 4),
        ("train {photos} --out {out} --head codes", 2),
        ("predict {out} {photos} --out {out}/masks", 3),
        ("pretrain {photos} --out {out} --method dino --network resnet18", 2),
        ("pretrain {photos}/00.png --out {out}", 3),
    ],
)
def test_what_goes_wrong_has_its_exit_code(
    argv: str, code: int, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = argv.format(photos=photos, out=tmp_path / "out").split()
    assert main(words) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_same_files_keys_and_weights(name: str, photos: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", CONTRACT / "runs" / f"{name}.json"
    assert main(run(name, photos, out)) == 0
    found = {**layout(out), "numbers": numbers_of(out)}
    kept = json.loads(path.read_text()) if path.exists() else {"digests": {}}
    if rewrites():
        digests = kept["digests"] | {machine(): digest_of(out)}
        kept = {**found, "digests": dict(sorted(digests.items()))}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    numbers = kept.pop("numbers")
    assert found["numbers"].keys() == numbers.keys()
    wrong = {
        key: (values, numbers[key])
        for key, values in found.pop("numbers").items()
        if not agree(name, values, numbers[key])
    }
    assert not wrong
    digests = kept.pop("digests")
    assert found == kept
    assert digest_of(out) == digests.get(machine(), digest_of(out))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_two_processes_do_what_one_does(name: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = json.loads((CONTRACT / "runs" / f"{name}.json").read_text())
    argv = run(name, photos, out)
    assert exit_codes(2, lambda _rank: main(argv)) == [0, 0]
    for key, values in numbers_of(out).items():
        assert all(starmap(close, zip(values, kept["numbers"][key], strict=True))), key
    found = layout(out)
    assert found == {key: kept[key] for key in found}
