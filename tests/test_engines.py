"""Masks by onnxruntime and OpenVINO: the same files as by PyTorch, with nearly the same pixels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from iddc import engines
from iddc.backbones import untrained_backbone
from iddc.cli import main
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.engines import ENGINE, ENGINE_INT8, EngineNetwork, engine_network
from iddc.errors import SetupError
from iddc.network import Network
from iddc.quantizing import quantized
from iddc.runtimes import run_onnx
from iddc.segmenter import Segmenter
from tiny import photo, write_photos

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
if not (find_spec("openvino") and find_spec("onnxruntime")):
    pytest.skip("the extra `openvino` is not installed", allow_module_level=True)
if torch.__version__ < "2.7":
    pytest.skip("PyTorch 2.6 exports no model for images of any size", allow_module_level=True)

ENGINES = ("onnx", "openvino")


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes() -> Iterator[None]:
    """While an exporter traces, sizes are symbols and no ints, which beartype would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts in feathered windows with mirror images, and its graph."""
    folder = tmp_path_factory.mktemp("engines") / "run"
    torch.manual_seed(0)
    # Without positions, which OpenVINO may interpolate by another rule.
    options = {"embed_dim": 16, "depth": 1, "num_heads": 2, "pos_embed": "none"}
    network: Any = Network(untrained_backbone("vit_tiny_patch16_224", options=options), "conv", 3)
    with torch.no_grad():
        network.head[-1].weight *= 100  # so that clusters differ
    windows = PredictionConfig(window=48, overlap=16, blend="tent", softmax="pixels")
    experiment = Experiment(
        num_clusters=3,
        views=ViewsConfig(short_side=64),
        prediction=windows,
        training=TrainingConfig(precision="fp32"),
    )
    Segmenter.of(network, experiment).save(folder)
    told: list[str] = []
    network = Segmenter.load(folder, "cpu").network
    engine_network(network, folder, "onnx", "fp32", note=told.append)
    assert len(told) == 1
    assert str(folder / ENGINE) in told[0]
    return folder


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "run"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise AssertionError("exported again")

    monkeypatch.setattr(engines, "onnx_graph", fail)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_computes_something_else_is_exit_5(
    run: Path,
    tmp_path: Path,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_photos(tmp_path / "photos", 1)
    honest = getattr(engines, f"run_{engine}")
    monkeypatch.setattr(
        engines, f"run_{engine}", lambda *given: lambda image: 1.01 * honest(*given)(image)
    )
    assert predict(run, tmp_path / "photos", tmp_path / "masks", "--engine", engine) == 5
    assert "scores differ by 1.00%" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def opened(run: Path, engine: Any) -> EngineNetwork:
    network: Any = Segmenter.load(run, "cpu").network
    return engine_network(network, run, engine, "fp32")


def pixels(seed: int, size: tuple[int, int] = (90, 80)) -> torch.Tensor:
    return torch.from_numpy(np.array(photo(seed, size))).permute(2, 0, 1)


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "png").iterdir()}


def predict(run: Path, photos: Path, out: Path, *options: str) -> int:
    return main(["predict", str(run), str(photos), "--out", str(out), *options])


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_scores_every_size_as_the_network_does(run: Path, engine: str) -> None:
    found = opened(run, engine)
    for height, width in [(48, 48), (64, 96), (50, 71), (7, 90), (1, 5)]:
        image = pixels(1, (width, height))[None]
        with torch.inference_mode():
            expected = found.network.scores(image)
        torch.testing.assert_close(found.scores(image), expected, atol=1e-4, rtol=1e-4)
        with torch.inference_mode():
            expected = found.network.probs(image)
        torch.testing.assert_close(found.probs(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("engine", "precision", "last"),
    [
        ("onnx", "bf16", {}),
        ("openvino", "bf16", {"precision": "bf16"}),
        ("openvino", "fp32", {"precision": "fp32"}),
    ],
)
def test_the_engine_that_is_asked_for_does_the_work_and_no_other(
    run: Path, engine: Any, precision: Any, last: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, dict[str, Any]]] = []
    for each in ENGINES:
        honest = getattr(engines, f"run_{each}")

        def noted(*given: Any, each: str = each, honest: Any = honest, **options: Any) -> Any:
            begun.append((each, options))
            return honest(*given, **options)

        monkeypatch.setattr(engines, f"run_{each}", noted)
    network: Any = Segmenter.load(run, "cpu").network
    engine_network(network, run, engine, precision)
    assert {each for each, _ in begun} == {engine}
    assert begun[-1] == (engine, last)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("engine", ENGINES)
def test_scores_of_an_image_do_not_depend_on_the_images_beside_it(run: Path, engine: str) -> None:
    found = opened(run, engine)
    images = torch.stack([pixels(1), pixels(2)])
    assert torch.equal(found.scores(images)[1:], found.scores(images[1:]))


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_writes_the_files_of_pytorch_with_nearly_the_same_pixels(
    run: Path, tmp_path: Path, engine: str
) -> None:
    write_photos(tmp_path / "photos", 3)
    assert predict(run, tmp_path / "photos", tmp_path / "torch", "--device", "cpu") == 0
    assert predict(run, tmp_path / "photos", tmp_path / "engine", "--engine", engine) == 0
    expected, found = masks(tmp_path / "torch"), masks(tmp_path / "engine")
    assert found.keys() == expected.keys() == {"00.png", "01.png", "02.png"}
    for name, mask in expected.items():
        assert len(np.unique(mask)) > 1
        assert (mask == found[name]).mean() >= 0.999


@pytest.mark.usefixtures("no_export")
def test_masks_of_two_engines_are_not_mixed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos", 1)
    assert predict(run, tmp_path / "photos", tmp_path / "masks", "--device", "cpu") == 0
    assert predict(run, tmp_path / "photos", tmp_path / "masks", "--engine", "onnx") == 2
    assert "made with --engine torch, now onnx" in capsys.readouterr().err


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("engine", ENGINES)
def test_8_bits_give_nearly_the_same_clusters_and_are_measured_once(
    run: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos", 3)
    assert predict(run, tmp_path / "photos", tmp_path / "torch", "--device", "cpu") == 0
    options = ("--engine", engine, "--int8")
    assert predict(run, tmp_path / "photos", tmp_path / "engine", *options) == 0
    assert str(run / ENGINE_INT8) in capsys.readouterr().err
    expected, found = masks(tmp_path / "torch"), masks(tmp_path / "engine")
    assert np.mean([(mask == found[name]).mean() for name, mask in expected.items()]) >= 0.95
    # Other images do not change it.
    before = (run / ENGINE_INT8).read_bytes()
    (tmp_path / "others").mkdir()
    photo(9).save(tmp_path / "others" / "a.png")
    assert predict(run, tmp_path / "others", tmp_path / "more", *options) == 0
    assert (run / ENGINE_INT8).read_bytes() == before


def test_a_graph_of_another_model_or_a_damaged_one_is_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (run / ENGINE).read_bytes()
    monkeypatch.setattr(engines, "onnx_graph", lambda *_: whole)
    (run / ENGINE).write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match="making"):
        opened(run, "onnx")
    assert (run / ENGINE).read_bytes() == whole
    other = Segmenter.load(run, "cpu")
    with torch.no_grad():
        network: Any = other.network
        network.head[-1].bias += 1
    other.save(run)

    def export_again(*_: object) -> bytes:
        raise SetupError("exported again")

    monkeypatch.setattr(engines, "onnx_graph", export_again)
    with pytest.warns(UserWarning, match="making"), pytest.raises(SetupError, match="again"):
        opened(run, "onnx")


def test_a_graph_that_cannot_be_kept_is_used(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (run / ENGINE).read_bytes()
    (run / ENGINE).unlink()

    def fail(*_: object) -> None:
        raise SetupError("Cannot write it: the disk is full.")

    monkeypatch.setattr(engines, "onnx_graph", lambda *_: whole)
    monkeypatch.setattr(engines, "write_atomic", fail)
    network: Any = Segmenter.load(run, "cpu").network
    told: list[str] = []
    found = engine_network(network, run, "onnx", "fp32", note=told.append)
    assert found.scores(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).shape == (1, 3, 3, 3)
    assert "the disk is full" in told[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "onnx", "--device", "cuda"), "--engine onnx computes on the CPU"),
        (("--int8",), "--int8 is for --engine onnx and openvino"),
    ],
)
def test_options_that_exclude_each_other_are_exit_2(
    run: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_photos(tmp_path / "photos", 1)
    assert predict(run, tmp_path / "photos", tmp_path / "masks", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize(
    ("engine", "package", "extra"),
    [("onnx", "onnxruntime", "export"), ("openvino", "openvino", "openvino")],
)
def test_a_missing_engine_is_exit_4_and_says_how_to_install_it(
    run: Path,
    tmp_path: Path,
    engine: str,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    write_photos(tmp_path / "photos", 1)
    assert predict(run, tmp_path / "photos", tmp_path / "masks", "--engine", engine) == 4
    said = capsys.readouterr().err
    assert package in said
    assert f"pip install 'iddc[{extra}]'" in said


def test_no_engine_tells_its_makers_that_it_is_used(tmp_path: Path) -> None:
    # Before one reports, it writes an identifier to the home folder.
    code = "from iddc import runtimes; runtimes.import_onnxruntime(); runtimes.import_openvino(); "
    code += "import openvino.tools.ovc.telemetry_utils as used; print(used.tm.__name__)"
    hidden = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.split() == ["openvino.tools.ovc.telemetry_stub"]
    assert not [*tmp_path.iterdir()]


def test_whole_numbers_are_multiplied_exactly_in_8_bits() -> None:
    # Inputs from 0 to 255 have a step of 1, and so have weights whose largest is 127.
    weights = np.array([[127, -3], [-64, 127]], np.float32)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, [1, 2])],
        [helper.make_tensor_value_info("y", kind, [1, 2])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"who": "iddc"})
    data = model.SerializeToString()
    samples = [np.array([[0, 255]], np.float32), np.array([[255, 0]], np.float32)]
    found = quantized(data, "x", samples)
    read = onnx.load_from_string(found)
    assert {(item.key, item.value) for item in read.metadata_props} == {("who", "iddc")}
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in read.graph.initializer)
    run = run_onnx(found, 1)
    inputs = np.array([[2, 7]], np.float32)
    # The output has its own 256 steps between the least and the largest that samples gave.
    step = (255 * 127 - -255 * 64) / 255
    expected = np.array([[2 * 127 - 7 * 64, -2 * 3 + 7 * 127]])
    assert np.abs(run(inputs) - expected).max() <= step / 2 + 1e-3
