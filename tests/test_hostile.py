"""Files that somebody prepared: each is refused, or skipped and listed, and does no harm."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from iddc.backbones import load_backbone, save_backbone, untrained_backbone
from iddc.backbones.weights import read_weights
from iddc.cli import main
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.errors import ConfigError, DataError, IddcError, UnreadableImage
from iddc.images import ImageFile, check_images, find_images, open_image
from iddc.masks import FORMATS, read_labels
from iddc.masks.labels import LABELS
from iddc.methods import completed, used
from iddc.network import Network
from iddc.recipes import RECIPES
from iddc.runs import Run, load_config
from iddc.runs import changed as changed_experiment
from iddc.runs.files import read_text
from iddc.segmenter import Segmenter

K = 4
OPTIONS: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
GIGA = 10**9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = Network(untrained_backbone("vit_tiny_patch16_224", options=OPTIONS), "linear", K)
    experiment = Experiment(
        num_clusters=K,
        views=ViewsConfig(short_side=32),
        prediction=PredictionConfig(window=32, overlap=8, flip=False),
        training=TrainingConfig(precision="fp32"),
    )
    folder = tmp_path_factory.mktemp("trained")
    Segmenter.of(network, experiment).save(folder)
    return folder


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        picture(index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hostile file must not make anybody call home; whoever tries fails the test."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command said, which is one sentence and no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "bug in iddc" not in lines[0]
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def grown_megabytes(code: str, *arguments: object) -> float:
    """How much the memory of a new process grows at most while it runs `attack()` of `code`."""
    text = f"""
import sys
from pathlib import Path
{code}
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3
before = peak()
attack(*sys.argv[1:])
print(peak() - before)
"""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


# Pickles


class Evil:
    """Pickled, it is a command that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


PICKLES: dict[str, Callable[[Evil, Path], Any]] = {
    "torch": lambda evil, path: torch.save({"weight": torch.ones(1), "evil": evil}, path),
    "nested": lambda evil, path: torch.save({"state_dict": {"weight": evil}}, path),
    "options": lambda evil, path: torch.save({"args": argparse.Namespace(x=evil)}, path),
    "legacy": lambda evil, path: torch.save(
        {"weight": torch.ones(1), "evil": evil}, path, _use_new_zipfile_serialization=False
    ),
    "plain": lambda evil, path: path.write_bytes(pickle.dumps(evil, 2)),
    "protocol 0": lambda evil, path: path.write_bytes(pickle.dumps(evil, 0)),
    "an instruction without its number": lambda _, path: path.write_bytes(b"X"),
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    mark, path = tmp_path / "executed", tmp_path / f"weights{suffix}"
    PICKLES[kind](Evil(mark), path)
    with pytest.raises(DataError, match=f"weights{suffix}"):
        read_weights(path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_in_place_of_a_model_or_of_a_checkpoint_is_not_executed(
    kind: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, run = tmp_path / "executed", tmp_path / "run"
    PICKLES[kind](Evil(mark), model / "model.safetensors")
    assert main(["predict", str(model), str(photos), "--out", str(tmp_path / "out")]) == 3
    assert "model.safetensors cannot be read" in error(capsys)
    options = ["--backbone", "untrained:test_vit", "--epochs", "1", "--views.crop-size", "32"]
    command = ["train", str(photos), "--out", str(run), "--device", "cpu", *options]
    experiment = changed_experiment(
        RECIPES["folder"].experiment(),
        {
            "method": "iddc",
            "backbone": "untrained:test_vit",
            "epochs": 1,
            "views": {"crop_size": 32},
            "reading": {"kinds": ["uint8 rgb"]},
        },
        "test",
    )
    with Run.start(run, experiment, source=str(photos.resolve())):
        PICKLES[kind](Evil(mark), run / "checkpoint" / "state.pt")
    assert main(command) == 3
    assert "state.pt cannot be read" in error(capsys)
    assert not mark.exists()


# Weights


def safetensors_file(header: bytes, data: bytes = b"", *, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


def described(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


NUMBERS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "empty": b"",
    "larger than the file": safetensors_file(b"{}", claimed=2**63 - 1),
    "negative": safetensors_file(b"{}", claimed=2**64 - 1),
    "above 100 MB": safetensors_file(b"{}", claimed=200_000_000),
    "no JSON": safetensors_file(b"{" * 1000),
    "deep": safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "unknown type": safetensors_file(described(a=NUMBERS | {"dtype": "Q17"}), bytes(8)),
    "a shape too large": safetensors_file(described(a=NUMBERS | {"shape": [2**40]}), bytes(8)),
    "a shape that overflows": safetensors_file(
        described(a=NUMBERS | {"shape": [2**32, 2**32, 2]}), bytes(8)
    ),
    "a negative shape": safetensors_file(described(a=NUMBERS | {"shape": [-2]}), bytes(8)),
    "data outside": safetensors_file(described(a=NUMBERS | {"data_offsets": [8, 16]}), bytes(8)),
    "data twice": safetensors_file(described(a=NUMBERS, b=NUMBERS), bytes(8)),
    "more data than told": safetensors_file(described(a=NUMBERS), bytes(99)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_file_with_a_false_header_is_refused(
    case: str, model: Path, tmp_path: Path
) -> None:
    path = model / "model.safetensors"
    path.write_bytes(HEADERS[case])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Segmenter.load(model, device="cpu")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        read_weights(path)


WRONG: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN": (lambda t: torch.full_like(t, torch.nan), "NaN or infinity"),
    "infinity": (lambda t: torch.full_like(t, -torch.inf), "NaN or infinity"),
    "NaN in half precision": (lambda t: torch.full_like(t, torch.nan).half(), "NaN or infinity"),
    "integers": (lambda t: torch.ones_like(t).long(), "of type torch.int64"),
    "truth values": (lambda t: torch.ones_like(t).bool(), "of type torch.bool"),
    "complex numbers": (lambda t: t.to(torch.complex64), "of type torch.complex64"),
    "another shape": (lambda t: t[..., None], r"\(4, 16, 1, 1, 1\)|of another shape"),
    "no shape": (lambda _: torch.tensor(1.0), r"\(\) instead|of another shape"),
    "nothing in it": (lambda t: t[:0], r"\(0, .*instead|of another shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_of_a_wrong_kind_are_refused_in_a_model(case: str, model: Path) -> None:
    change, message = WRONG[case]
    path = model / "model.safetensors"
    tensors = load_file(path)
    try:
        save_file(tensors | {"head.weight": change(tensors["head.weight"]).contiguous()}, path)
    except KeyError:
        pytest.skip("this safetensors has no complex numbers")
    with pytest.raises(DataError, match=message):
        Segmenter.load(model, device="cpu")


@pytest.mark.parametrize("change", [{"dynamic_img_size": False}, {"num_heads": -1}])
def test_a_description_whose_network_cannot_embed_any_image_is_refused(
    change: dict[str, int], model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its tensors fit, so only running it tells."""
    record = json.loads((model / "model.json").read_text())
    record["network"]["backbone"]["options"] |= change
    (model / "model.json").write_text(json.dumps(record))
    assert main(["predict", str(model), str(photos), "--out", str(model / "out")]) == 3
    assert "model.json describes a network that cannot embed images" in error(capsys)


@pytest.mark.parametrize("change", [{"dynamic_img_size": False}, {"num_heads": -1}])
def test_a_backbone_that_cannot_embed_any_image_is_refused(
    change: dict[str, int], tmp_path: Path
) -> None:
    save_backbone(untrained_backbone("vit_tiny_patch16_224", options=OPTIONS), tmp_path)
    record = json.loads((tmp_path / "backbone.json").read_text())
    record["options"] |= change
    (tmp_path / "backbone.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"backbone\.json describes a network that cannot embed"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["norm.weight", "pos_embed", "blocks.0.attn.qkv.weight"])
def test_weights_of_a_wrong_kind_are_refused_in_a_backbone(
    name: str, case: str, tmp_path: Path
) -> None:
    change, message = WRONG[case]
    state = untrained_backbone("test_vit").net.state_dict()
    torch.save(state | {name: change(state[name])}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=message):
        load_backbone(f"test_vit={tmp_path / 'w.pth'}")


@pytest.mark.parametrize(
    "change",
    [
        {"register_tokens": torch.ones(()), "cls_token": torch.ones(3, 3, 3)},
        {"pos_embed": torch.ones(1, 1, 64)},
        {"pos_embeder.x": torch.ones(2)},
        {"blocks.0.attn.qkv.weight": torch.ones(1)},
    ],
)
def test_tensors_that_cannot_be_translated_are_a_data_error(
    change: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = untrained_backbone("test_vit").net.state_dict()
    torch.save(state | change, tmp_path / "w.pth")
    with pytest.raises(DataError, match="does not fit this architecture"):
        load_backbone(f"test_vit={tmp_path / 'w.pth'}")


def test_joined_weights_of_class_attention_that_do_not_divide_are_a_data_error(
    tmp_path: Path,
) -> None:
    name = "xcit_nano_12_p16_224"
    state = untrained_backbone(name, options={"depth": 1}).net.state_dict()
    joined = {"cls_attn_blocks.0.attn.qkv.weight": torch.ones(1, 128)}
    rest = {key: value for key, value in state.items() if "cls_attn_blocks.0.attn.q." not in key}
    torch.save(rest | joined, tmp_path / "w.pth")
    with pytest.raises(DataError, match="does not fit this architecture"):
        load_backbone(f"{name}={tmp_path / 'w.pth'}")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(2, 2).to_sparse(),
        torch.empty(10**12, device="meta"),
    ],
    ids=["one number for all", "sparse", "without numbers"],
)
def test_a_tensor_that_claims_more_numbers_than_the_file_holds_is_refused(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1), "pos_embed": tensor}, path)
    with pytest.raises(DataError, match=r"w\.pth"):
        read_weights(path)


def test_a_packed_checkpoint_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10)}, tmp_path / "small.pth")
    path = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(tmp_path / "small.pth") as small,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for item in small.infolist():
            data = bytes(GIGA // 5) if item.filename.endswith("data/0") else small.read(item)
            bomb.writestr(item.filename, data)
    assert path.stat().st_size < GIGA / 100
    code = """
from iddc.backbones.weights import read_weights
from iddc.errors import DataError
def attack(path):
    try: read_weights(Path(path))
    except DataError: return
    raise SystemExit("it was read")
"""
    assert grown_megabytes(code, path) < 50


# model.json and backbone.json


def changed(path: Path, place: str, value: object) -> None:
    record = json.loads(path.read_text())
    here = record
    *way, last = place.split("/")
    for part in way:
        here = here[part]
    here[last] = value
    path.write_text(json.dumps(record))


BACKBONE = "network/backbone/"
DESCRIPTIONS: list[tuple[str, object]] = [
    (BACKBONE + "timm_name", "hf-hub:someone/model"),
    (BACKBONE + "timm_name", "hf_hub:someone/model"),
    (BACKBONE + "timm_name", "local-dir:/etc"),
    (BACKBONE + "timm_name", "../../etc/passwd"),
    (BACKBONE + "timm_name", "no_such_network"),
    (BACKBONE + "timm_name", "vit_tiny_patch16_224\n"),
    (BACKBONE + "options", {"checkpoint_path": "/etc/passwd"}),
    (BACKBONE + "options", {"pretrained": True}),
    (BACKBONE + "options", {"pretrained_cfg": "x"}),
    (BACKBONE + "options", {"pretrained_strict": False}),
    (BACKBONE + "options", {"cache_dir": "/tmp"}),
    (BACKBONE + "options", {"device": "cpu"}),
    (BACKBONE + "options", {"no_such_option": 1}),
    (BACKBONE + "options", {"embed_dim": [1]}),
    (BACKBONE + "options/depth", 10**9),
    (BACKBONE + "options/depth", -1),
    (BACKBONE + "options/embed_dim", 4096),
    (BACKBONE + "options/embed_dim", 0),
    (BACKBONE + "options/num_heads", 0),
    (BACKBONE + "options/in_chans", 1),
    (BACKBONE + "image_size", 4096),
    (BACKBONE + "image_size", 10**9),
    (BACKBONE + "image_size", 10**400),
    (BACKBONE + "embed_dim", 2**20),
    (BACKBONE + "patch_size", 10**9),
    (BACKBONE + "patch_size", 0),
    (BACKBONE + "stages", [99]),
    (BACKBONE + "components", 10**9),
    (BACKBONE + "std", [0, 1, 1]),
    (BACKBONE + "std", [float("nan"), 1, 1]),
    (BACKBONE + "mean", [float("inf"), 0, 0]),
    ("network/head", "../../etc/passwd"),
    ("network/head", "conv"),
    ("network/num_clusters", 65535),
    ("network/num_clusters", 10**9),
    ("network/surprise", 1),
    ("network", None),
    ("experiment/prediction/window", 10**9),
    ("experiment/prediction/overlap", 10**9),
    ("experiment/views/short_side", -1),
    ("experiment/training/learning_rate", float("inf")),
    ("experiment/objective/positive_threshold", float("nan")),
    ("format_version", 10**400),
    ("format_version", "1"),
    ("format_version", None),
]


@pytest.mark.parametrize(("place", "value"), DESCRIPTIONS, ids=lambda part: str(part)[-30:])
def test_a_model_that_describes_something_else_is_refused(
    place: str, value: object, model: Path
) -> None:
    """No address is called (`offline`), no other file is read, and no memory is filled."""
    changed(model / "model.json", place, value)
    tracemalloc.start()
    with pytest.raises(IddcError) as caught:
        Segmenter.load(model, device="cpu")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert caught.value.exit_code in {3, 4}
    assert len(str(caught.value)) < 1000


def test_a_huge_network_in_a_small_file_takes_no_memory(trained: Path, tmp_path: Path) -> None:
    huge = {
        "wide": (BACKBONE + "options/embed_dim", 4096),
        "deep and wide": (BACKBONE + "options", {"embed_dim": 4096, "depth": 20, "num_heads": 2}),
        "many clusters": ("network/num_clusters", 65535),
    }
    for name, (place, value) in huge.items():
        shutil.copytree(trained, tmp_path / name)
        changed(tmp_path / name / "model.json", place, value)
        changed(tmp_path / name / "model.json", BACKBONE + "embed_dim", 4096)
    code = """
from iddc.errors import IddcError
from iddc.segmenter import Segmenter
Segmenter.load(sys.argv[1], device="cpu")
def attack(trained, *folders):
    for folder in folders:
        try: Segmenter.load(folder, device="cpu")
        except IddcError: continue
        raise SystemExit(folder)
"""
    assert grown_megabytes(code, trained, *(tmp_path / name for name in huge)) < 100


DEEP = "[" * 100_000
TEXTS = {
    "deep": DEEP,
    "a deep field": '{"format_version": 1, "network": ' + DEEP,
    "a huge number": '{"format_version": ' + "9" * 100_000 + "}",
    "not UTF-8": "\udcff\udcfe",
    "a null byte": "\0",
    "half a pair": '{"format_version": 1, "iddc": "\\ud800"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["model.json", LABELS, "scores.json", "backbone.json"])
def test_json_that_no_program_wrote_is_a_data_error(name: str, text: str, model: Path) -> None:
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    readers: dict[str, Callable[[], Any]] = {
        "scores.json": lambda: Run(model).scores(),
        "backbone.json": lambda: load_backbone(str(model)),
    }
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        readers.get(name, lambda: Segmenter.load(model, device="cpu"))()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


ODD = [pipe, device, folder, loop]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["model.json", "model.safetensors", LABELS])
def test_a_model_with_a_pipe_or_a_device_in_place_of_a_file_is_refused_at_once(
    name: str, odd: Callable[[Path], None], model: Path
) -> None:
    odd(model / name)
    with pytest.raises(DataError):
        Segmenter.load(model, device="cpu")


@pytest.mark.parametrize("odd", ODD)
def test_other_texts_are_no_pipe_and_no_device_either(
    odd: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "text"
    odd(path)
    with pytest.raises(OSError, match=r"regular|symbolic links"):
        read_text(path)
    with pytest.raises(ConfigError):
        load_config(path)
    path = tmp_path / "scores.json"
    odd(path)
    if odd is not loop:  # which leads nowhere: there are no scores
        with pytest.raises(DataError, match=r"scores\.json"):
            Run(tmp_path).scores()
    with pytest.raises(IddcError):
        load_backbone(f"test_vit={path}")


def test_a_log_that_is_no_text_loses_those_lines_alone(tmp_path: Path) -> None:
    lines = [b'{"step": 1}\n', b'\xff"step": 1}\n', b"[" * 100_000 + b"\n", b'{"step": 2}\n']
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    Run(tmp_path).cut_log(1)
    assert (tmp_path / "log.jsonl").read_bytes() == lines[0]


# config.yaml

MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGURATIONS = [
    "a: !!python/object/apply:os.mkdir [executed]",
    "a: !!python/name:os.system",
    "a: !!python/module:executed",
    "!!python/object/new:os.mkdir [executed]",
    "a: !include /etc/passwd",
    "a: &a [*a]",
    "objective: &a {objective: *a}",
    MERGES,
    "<<: 1",
    "[" * 90_000,
    "a: " * 20_000,
    "num_clusters: 0x" + "f" * 50_000,
    "num_clusters: 1" + ":1" * 40_000,
    "num_clusters: 1" + ":1" * 40_000 + ".5",
    "num_clusters: " + "9" * 90_000,
    "format_version: 0x" + "f" * 5000,
    "a: !!timestamp x",
    "a: !!float x",
    "a: !!int x",
    "a: !!bool x",
    "a: !!binary x",
    "? {a: b}\n: c",
    "\0",
    "\ufeff\ufeff",
    "%YAML 9.9\n---\na: 1",
    "training: {learning_rate: .inf}",
    "training: {learning_rate: .nan}",
    "objective: {positive_threshold: -.inf}",
    "prediction: {window: 100000000}",
    "x" * 90_000 + ": 1",
    '"\\e]0;title\\a\\n": 1',
    "a" * 200_000,
]


@pytest.mark.parametrize("text", CONFIGURATIONS, ids=lambda text: text[:30])
def test_a_hostile_configuration_is_one_short_sentence(
    text: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text(text)
    before = contents(tmp_path)
    assert main(["train", str(photos), "--out", "run", "--config", "evil.yaml"]) == 2
    said = error(capsys)
    assert "evil.yaml" in said
    assert len(said) < 500
    assert said.isprintable()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "backbone",
    ["../../../../etc/passwd", "/etc", "vit_tiny_patch16_224=/etc/passwd", "hf-hub:a/b",
     "vit_tiny_patch16_224=/dev/zero", "local-dir:/etc", "untrained:hf-hub:a/b", "a\0b", "x" * 5000,
     "test_vit=/dev/zero/w.safetensors"],
)  # fmt: skip
def test_a_configuration_that_leads_elsewhere_reads_and_writes_nothing_there(
    backbone: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil.yaml").write_text(json.dumps({"backbone": backbone}))
    before = contents(tmp_path)
    argv = ["train", str(photos), "--out", str(tmp_path / "run")]
    assert main([*argv, "--config", str(tmp_path / "evil.yaml")]) in {2, 3}
    error(capsys)
    assert contents(tmp_path) == before


def test_a_run_whose_record_leads_elsewhere_is_not_taken_for_ours(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    experiment = completed(RECIPES["folder"].experiment())
    with Run.start(run, experiment, source="../../etc", record=used(experiment)):
        (run / "checkpoint" / "state.pt").touch()
    text = (run / "config.yaml").read_text()
    other = "untrained:test_vit asked"
    for line, reason in (
        ("source: &a [*a]", "is not a plain YAML file"),
        ("source: ../../../etc", other),
        ("source: [[[[a]]]]", other),
    ):
        (run / "config.yaml").write_text(text.replace("source: ../../etc", line))
        argv = ["train", str(photos), "--out", str(run), "--backbone", "untrained:test_vit"]
        assert main(argv) == 2
        said = error(capsys)
        assert reason in said
        assert len(said) < 1000


# Names of clusters

NAMES = ["../../etc/passwd", "/etc/passwd", "C:\\x", "<script>alert(1)</script>", "=cmd|'/c x'!A1",
         "a:b#c", "%s%n{0}", "' OR 1=1 --", "\U0001f600"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_cluster_is_text_wherever_it_is_written(
    name: str, model: Path, photos: Path, tmp_path: Path
) -> None:
    names = {"0": name, "1": "b", "2": "c", "3": "d"}
    (model / LABELS).write_text(json.dumps({"id2label": names}))
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    argv = ["predict", str(model), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*argv, "--formats", *FORMATS]) == 0
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")} == (
        before
    )
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines()[0] == name
    categories = json.loads((tmp_path / "out" / "coco.json").read_text())["categories"]
    assert categories[0]["name"] == name
    with zipfile.ZipFile(tmp_path / "out" / "cvat.zip") as archive:
        assert all(".." not in member and member[0] != "/" for member in archive.namelist())
        assert len(archive.read("labelmap.txt").splitlines()) == 1 + 1 + K
    assert "<script" not in (tmp_path / "out" / "labelstudio.xml").read_text()


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {"0": "a\nb", "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"0": "a\x1b[2J", "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"0": "\u202eabc", "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"0": "\ud800", "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"0": "x" * 101, "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"0": "", "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"../../x": "a", "1": "b", "2": "c", "3": "d"}},
        {"id2label": {"-1": "a", "0": "a", "1": "b", "2": "c"}},
        {"id2label": {str(10**30): "a", "0": "a", "1": "b", "2": "c"}},
        {"id2label": ["a", "b", "c", "d"]},
        {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}, "colours": {"0": "red;}"}},
        {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}, "path": "../../x"},
    ],
    ids=lambda labels: ascii(str(labels))[12:50],
)
def test_labels_that_a_person_could_not_give_are_refused(
    labels: dict[str, Any], model: Path
) -> None:
    (model / LABELS).write_text(json.dumps(labels))
    with pytest.raises(DataError, match=r"labels\.json") as caught:
        read_labels(model, K)
    assert str(caught.value).isprintable()


# Images


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size."""
    every = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in every
    )


def tiff(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, height), (279, 2**32 - 1)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + head


def gif(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture().convert("P"), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


PHOTO = encoded(picture())
JPEG = encoded(picture(), "JPEG")
BAD: dict[str, bytes] = {
    "empty.png": b"",
    "text.jpg": b"not an image at all",
    "page.png": b"<html><script>alert(1)</script></html>",
    "script.svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "program.jpg": b"#!/bin/sh\ntouch executed\n",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "pickle.png": pickle.dumps({"a": 1}),
    "60000.png": png(60_000, 60_000),
    "most.png": png(2**31 - 1, 2**31 - 1),
    "none.png": png(0, 0),
    "square.gif": gif(65535, 65535),
    "square.tif": tiff(60_000, 60_000),
    "most.tif": tiff(2**32 - 1, 2**32 - 1),
    "none.tif": tiff(0, 0),
    "square.bmp": bmp(60_000, 60_000),
    "negative.bmp": bmp(-1, -(2**31)),
    "square.ppm": b"P6 60000 60000 255\n",
    "long.ppm": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "cut.png": PHOTO[:2000],
    "cut.jpg": JPEG[:100],
    "magic.png": PHOTO[:8],
    "magic.jp2": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(8),
    "magic.webp": b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\xff\x2f\xff\xff\xff\xff",
    "magic.avif": b"\x00\x00\x00\x1cftypavif" + bytes(16),
}
GOOD: dict[str, bytes] = {
    "plain.png": PHOTO,
    "wrong suffix.jpg": PHOTO,
    "photo and program.jpg": JPEG + b"\n#!/bin/sh\ntouch executed\n",
    "photo and zip.png": PHOTO + b"PK\x05\x06" + bytes(18),
    "exif.jpg": encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 500),
    "turned.jpg": encoded(
        picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\xff\xff\0\0\0\0"
    ),
    "icc.jpg": encoded(picture(), "JPEG", icc_profile=b"\xff" * 60_000),
    "<img src=x onerror=alert(1)>.png": PHOTO,
    "=HYPERLINK(1).png": PHOTO,
    "-rf.png": PHOTO,
    "$(touch executed).png": PHOTO,
    "%s%n{0}.png": PHOTO,
    "new\nline.png": PHOTO,
    "red\x1b[31m\x07.png": PHOTO,
    "left\u202egnp.png": PHOTO,
    "n" * 251 + ".png": PHOTO,
    "n" * 250 + "m.jpg": JPEG,
    "ü" * 125 + ".png": PHOTO,
    "dir.png/" + "d" * 255 + "/a.png": PHOTO,
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_photo_is_unreadable_and_takes_no_memory(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    import tifffile  # noqa: F401 - the library itself takes 46 MB, once

    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage) as caught:
            open_image(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def compressed(keyword: bytes) -> bytes:
    return keyword + b"\0\0" + zlib.compress(bytes(GIGA // 10))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_the_notes_in_a_photo_cannot_fill_the_memory(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(PHOTO[:33] + png(1, 1, (kind, compressed(b"a")))[33:])
    tracemalloc.start()
    with contextlib.suppress(UnreadableImage):
        open_image(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_a_float_image_of_every_number_is_stretched_and_not_overflowed(tmp_path: Path) -> None:
    values = np.array([[-9e29, 0, 9e29]], np.float32)  # larger ones mark missing data
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def hostile_folder(folder: Path, *, odd: bool) -> dict[str, bytes]:
    """Everything above in one folder, and with `odd` what is no file at all. Gives the bad ones."""
    files = {os.fsencode(name): data for name, data in (BAD | GOOD).items()}
    files[b"no utf-8 \xff\xfe.png"] = PHOTO
    files[b"no utf-8 \xff\xfe.bad.png"] = b"bad"
    for name, data in files.items():
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(data)
    bad = dict(BAD) | {os.fsdecode(b"no utf-8 \xff\xfe.bad.png"): b""}
    if odd:
        pipe(folder / "pipe.png")
        device(folder / "device.png")
        loop(folder / "loop.png")
        (folder / "nowhere.png").symlink_to("/no/such/file.png")
        (folder / "passwd.png").symlink_to("/etc/passwd")
        (folder / "process.png").symlink_to("/proc/self/mem")
        (folder / "dir.png" / "up").symlink_to(folder, target_is_directory=True)
        listening = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        listening.bind("socket.png")
        os.chdir(here)
        listening.close()
        with (folder / "sparse.png").open("wb") as file:
            file.write(PHOTO)
            file.truncate(10**12)
        odd_names = ("pipe", "device", "loop", "nowhere", "passwd", "process", "socket", "sparse")
        bad |= {f"{name}.png": b"" for name in odd_names}
    return bad


def test_a_folder_of_hostile_files_is_predicted_and_every_bad_one_is_listed(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inside = tmp_path / "inside"
    photos, out = inside / "photos", inside / "out"
    photos.mkdir(parents=True)
    bad = hostile_folder(photos, odd=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(photos)
    argv = ["predict", str(trained), str(photos), "--out", str(out), "--device", "cpu"]
    assert main([*argv, "--formats", *FORMATS, "--max-unreadable", "1"]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
    with (out / "skipped.csv").open(encoding="utf-8", errors="surrogateescape") as file:
        listed = {row["name"] for row in csv.DictReader(file)}
    sources = {str(file.name): file.path.name for file in find_images(photos).files}
    skipped = {name: sources[name] for name in listed}
    assert {*skipped.values()} == set(bad)
    written = [path for path in (out / "png").rglob("*.png") if path.is_file()]
    assert len(written) == len(GOOD) + 1
    after = [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(out)]
    assert after == before
    images = json.loads((out / "coco.json").read_text())["images"]
    assert len(images) == len(written)


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    for end in "ab":
        (tmp_path / ("n" * 250 + end + ".png")).write_bytes(PHOTO)
    names = [file.name for file in find_images(tmp_path).files]
    assert len({*names}) == 2
    assert all(len(os.fsencode(name.name)) < 240 and name.suffix == ".png" for name in names)
    (one,) = find_images(tmp_path / ("n" * 250 + "a.png")).files
    assert one.name == names[0]


# Zips


def zipped(path: Path, members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members.items():
            archive.writestr(name, data)
    return path


SLIPS = [
    *("../up.png", "../../../../tmp/slip.png", "/etc/slip.png", "a/../../slip.png", "..\\x.png"),
    *("C:\\Windows\\x.png", "C:/x.png", "//host/share/x.png", "a/./b/..//c.png"),
    *("\\\\host\\x.png", "dir/" + "d" * 300 + "/a.png", "e" * 300 + ".png", "f\nf\x1b[31m.png"),
]


def test_a_zip_whose_names_lead_elsewhere_writes_only_below_out(
    trained: Path, tmp_path: Path
) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    source = zipped(inside / "slip.zip", dict.fromkeys(SLIPS, PHOTO))
    before = sorted(tmp_path.rglob("*"))
    out = inside / "out"
    argv = ["predict", str(trained), str(source), "--out", str(out), "--device", "cpu"]
    assert main([*argv, "--formats", *FORMATS]) == 0
    assert len([*(out / "png").rglob("*.png")]) == len(SLIPS) - 1  # two are x.png
    after = [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(out)]
    assert after == before
    with zipfile.ZipFile(out / "cvat.zip") as archive:
        for member in archive.namelist():
            assert ".." not in Path(member).parts
            assert not member.startswith("/")


def test_a_zip_of_bombs_is_listed_without_unpacking_them(tmp_path: Path) -> None:
    path = tmp_path / "bombs.zip"
    zeros = bytes(2**24)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("good.png", PHOTO)
        for index in range(3):
            with archive.open(f"bomb{index}.png", "w") as member:
                member.write(PHOTO)
                for _ in range(8):
                    member.write(zeros)
        archive.writestr(
            "nested.zip", zipped(tmp_path / "inner.zip", {"a.png": PHOTO}).read_bytes()
        )
    code = """
from iddc.images import *
def attack(path):
    found = find_images(Path(path))
    assert "files of other kinds: .zip (1)" in found.notes
    good, bad = check_images(found.files, max_unreadable=1)
    assert [str(file.name) for file in good] == ["good.png"]
    assert all("claims 0.134 GB in the zip" in item.reason for item in bad)
    open_image(good[0])
"""
    assert grown_megabytes(code, path) < 50


def overlapping() -> bytes:
    """Many names of one packed member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", PHOTO)
        first = archive.infolist()[0]
        for index in range(2000):
            copy = zipfile.ZipInfo(f"{index}.png")
            for field in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(copy, field, getattr(first, field))
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
    return buffer.getvalue()


def test_the_members_of_an_overlapping_zip_are_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(overlapping())
    good, bad = check_images(find_images(path).files, max_unreadable=1.0)
    assert len(good) <= 1
    assert len(bad) >= 2000


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:50],
        lambda data: data[:-5],
        lambda data: b"",
        lambda data: b"PK\x05\x06" + b"\xff" * 18,
        lambda data: data[:-22] + data[-22:].replace(data[-12:-8], b"\xff\xff\xff\x7f"),
        lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x03"),
        lambda data: PHOTO,
    ],
)
def test_a_damaged_zip_is_a_data_error(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.png": PHOTO})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.zip is not a zip|Cannot read"):
        find_images(path)


@pytest.mark.parametrize("place", [6, 8])
def test_an_encrypted_or_oddly_packed_member_is_unreadable(place: int, tmp_path: Path) -> None:
    data = bytearray(zipped(tmp_path / "a.zip", {"a.png": PHOTO}).read_bytes())
    for start in (0, data.index(b"PK\x01\x02") + 2):
        data[start + place] = 1 if place == 6 else 97
    (tmp_path / "a.zip").write_bytes(data)
    (file,) = find_images(tmp_path / "a.zip").files
    with pytest.raises(UnreadableImage):
        open_image(file)


# Sources


@pytest.mark.parametrize("odd", [pipe, device, loop])
@pytest.mark.parametrize("name", ["list.txt", "a.zip", "a.png", "photos"])
def test_a_pipe_or_a_device_is_no_source_of_images(
    name: str, odd: Callable[[Path], None], tmp_path: Path
) -> None:
    odd(tmp_path / name)
    with pytest.raises(DataError):
        find_images(tmp_path / name)


def test_a_list_of_everything_that_is_no_photo_lists_it_as_unreadable(tmp_path: Path) -> None:
    pipe(tmp_path / "pipe")
    (tmp_path / "good.png").write_bytes(PHOTO)
    lines = [
        *("/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "/"),
        *(".", "..", "../../../../etc/shadow", "pipe", "good.png", "list.txt", "C:", "no.png"),
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = find_images(tmp_path / "list.txt")
    good, bad = check_images(found.files, max_unreadable=1.0)
    assert [file.path.name for file in good] == ["good.png"]
    assert len(bad) == len(lines) - 1
    assert all(file.name.name and ".." not in file.name.parts for file in found.files)
    assert not any(file.name.is_absolute() for file in found.files)
    assert "root:" not in str(bad)


def test_a_list_of_hostile_lines_is_predicted_below_out_only(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "good.png").write_bytes(PHOTO)
    (tmp_path / "in" / "list.txt").write_text("/\n.\n/etc/passwd\n../good.png\n../in/../good.png\n")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    argv = ["predict", str(trained), str(tmp_path / "in" / "list.txt"), "--out", str(out)]
    assert main([*argv, "--device", "cpu", "--max-unreadable", "0.9"]) == 0
    assert len([*(out / "png").rglob("*.png")]) == 1
    assert before == [p for p in sorted(tmp_path.rglob("*")) if not p.is_relative_to(out)]


@pytest.mark.parametrize("line", ["x" * 5000, "/".join(["a"] * 3000), "a\0b", "\udcff"])
def test_a_list_of_impossible_paths_is_a_data_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(os.fsencode(line))
    with pytest.raises(DataError):
        find_images(path)


def test_a_list_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "list.txt").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(DataError, match="neither a folder"):
        find_images(tmp_path / "list.txt")


def test_an_image_file_that_became_a_pipe_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PHOTO)
    (file,) = find_images(path).files
    pipe(path)
    with pytest.raises(UnreadableImage, match="no regular file"):
        open_image(file)
    assert isinstance(file, ImageFile)
