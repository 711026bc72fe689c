"""Exported files: one graph for images of any size, which agrees with PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iddc import export
from iddc.backbones import load_backbone, untrained_backbone
from iddc.canvas import working_size
from iddc.cli import main
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.errors import ConfigError, SetupError
from iddc.masks import Labels
from iddc.network import HEADS, Network
from iddc.segmenter import Segmenter

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

K, SHORT_SIDE = 4, 48
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "onnx_predict.py"
SIZES = [(60, 84), (48, 48), (224, 224), (20, 30), (500, 61), (7, 900), (1, 5)]
"""Height and width: reduced, as it is, the size that positions are learned for, smaller than a
step of the coarsest stage, and two that hardly are images."""

NO_SIZES = torch.__version__ < "2.7"
UNABLE = "PyTorch 2.6 exports no model for images of any size, and iddc says so"
able = pytest.mark.skipif(NO_SIZES, reason=UNABLE)


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes() -> Iterator[None]:
    """While an exporter traces, sizes are symbols and no ints, which beartype would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def vit() -> Network:
    torch.manual_seed(0)
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = untrained_backbone("vit_tiny_patch16_224", options=options)
    network = Network(backbone, "conv", K)
    with torch.no_grad():
        network.head[-1].weight *= 100  # so that clusters differ
    return network


def segmenter(network: Network) -> Segmenter:
    experiment = Experiment(
        num_clusters=K,
        views=ViewsConfig(short_side=SHORT_SIDE),
        prediction=PredictionConfig(window=0, flip=False),
        training=TrainingConfig(precision="fp32"),
    )
    return Segmenter.of(network, experiment)


def picture(height: int, width: int) -> Image.Image:
    """Smooth colours: on noise, one grey level of rounding would decide."""
    down, across = np.linspace(0, 6, height)[:, None], np.linspace(0, 9, width)
    waves = [np.sin(down + shift) * np.cos(across * (1 + shift)) for shift in (0.0, 0.7, 1.9)]
    return Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=2)).astype(np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose clusters 1 and 3 are one class; cluster 2 is ignored."""
    folder = tmp_path_factory.mktemp("run")
    model = segmenter(vit())
    model.rename({1: "sky", 3: "sky", 2: "ignore"})
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def data(run: Path) -> bytes:
    if NO_SIZES:
        pytest.skip(UNABLE)
    return export.export(Segmenter.load(run, "cpu"), "onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    # No larger than the working size: a grey level of rounding would move untrained clusters.
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(48, 84).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"")
    picture(60, 48).save(folder / "c.png")
    return folder


def agrees_at_every_size(model: Segmenter, data: bytes, to: Any) -> None:
    run = export.open_exported(data, to)
    for height, width in SIZES:
        image = picture(height, width)
        expected = model.predict(image, with_probs=True).probs
        assert expected is not None
        found = torch.from_numpy(run(np.asarray(image)[None])[0])
        assert found.shape == (K, height, width)
        with torch.inference_mode():
            graph = export.WholeImage(model.network, SHORT_SIDE)(
                torch.tensor(np.asarray(image)[None])
            )
        torch.testing.assert_close(found, graph[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_one_onnx_file_takes_images_of_any_size(run: Path, data: bytes) -> None:
    agrees_at_every_size(Segmenter.load(run, "cpu"), data, "onnx")


@able
def test_one_torch_export_file_takes_images_of_any_size(run: Path) -> None:
    model = Segmenter.load(run, "cpu")
    agrees_at_every_size(model, export.export(model, "torch-export"), "torch-export")


@able
@pytest.mark.slow
def test_the_bundled_backbone_with_its_stages_is_one_onnx_file_for_any_size() -> None:
    torch.manual_seed(0)
    model = segmenter(Network(load_backbone("bundled"), "conv", K))
    agrees_at_every_size(model, export.export(model, "onnx"), "onnx")


@able
@pytest.mark.parametrize("head", sorted({*HEADS} - {"conv"}))
def test_every_head_is_exported(head: Any) -> None:
    torch.manual_seed(0)
    model = segmenter(Network(vit().backbone, head, K))
    agrees_at_every_size(model, export.export(model, "torch-export"), "torch-export")


GRAPH = export.WholeImage(vit(), SHORT_SIDE)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(0, 1000))
def test_the_graph_computes_sizes_as_prediction_does(height: int, width: int, short: int) -> None:
    GRAPH.short_side = short
    working, rounded = GRAPH.sizes(height, width)
    assert tuple(working[::-1]) == working_size((width, height), short)
    assert rounded == [max((side + 8) // 16 * 16, 16) for side in working]


def test_the_file_says_its_names_opset_and_interface(data: bytes) -> None:
    model = onnx.load(BytesIO(data))
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (image,), (probs,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == (
        "image",
        "tensor(uint8)",
        [1, "height", "width", 3],
    )
    assert (probs.name, probs.type, probs.shape) == (
        "probs",
        "tensor(float)",
        [1, K, "height", "width"],
    )
    about = session.get_modelmeta().custom_metadata_map
    assert about["format_version"] == "1"
    assert about["short_side"] == str(SHORT_SIDE)
    assert json.loads(about["id2label"]) == {
        "0": "cluster 0",
        "1": "sky",
        "2": "ignore",
        "3": "sky",
    }
    colours = json.loads(about["colours"])
    assert colours["1"] == colours["3"]
    assert colours["2"] == "#000000"


@able
def test_a_torch_export_file_has_the_same_metadata(run: Path) -> None:
    model = Segmenter.load(run, "cpu")
    extra = {export.METADATA: ""}
    torch.export.load(BytesIO(export.export(model, "torch-export")), extra_files=extra)
    assert json.loads(extra[export.METADATA]) == export.metadata(model)


def test_a_name_of_several_clusters_stands_for_its_lowest() -> None:
    maps = export.label_maps(Labels.numbered(3).edit({0: "road", 2: "road"}))
    assert maps["id2label"] == {"0": "road", "1": "cluster 1", "2": "road"}
    assert maps["label2id"] == {"road": 0, "cluster 1": 1}


def test_the_example_needs_no_iddc_and_20_lines(run: Path, data: bytes, tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 20
    assert "import iddc" not in text
    (tmp_path / "model.onnx").write_bytes(data)
    picture(60, 84).save(tmp_path / "photo.png")
    code = "import runpy, sys; sys.modules.update(iddc=None, torch=None); "
    code += "sys.argv[1:] = ['model.onnx', 'photo.png', 'mask.png']; "
    code += f"runpy.run_path({str(EXAMPLE)!r})"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    result = Segmenter.load(run, "cpu").predict(tmp_path / "photo.png")
    expected = result.colours[result.clusters]
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    assert (found == expected).all(axis=2).mean() > 0.99
    shown = {line.split("  ")[-1] for line in process.stdout.splitlines()}
    assert shown == {result.names[cluster] for cluster in np.unique(result.clusters)}


def exported(run: Path, out: Path, *options: str) -> int:
    to = "torch-export" if out.suffix == ".pt2" else "onnx"
    return main(["export", str(run), "--to", to, "--out", str(out), *options])


@able
def test_the_command_checks_the_file_on_given_images(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "model.onnx"
    assert exported(run, out, "--check", str(photos)) == 0
    said = capsys.readouterr().out
    assert "2 images" in said  # the third is broken
    assert "largest error" in said
    assert str(out) in said
    labels = json.loads((out.parent / "model.labels.json").read_text())
    assert labels["id2label"]["3"] == "sky"
    assert labels["label2id"]["sky"] == 1
    assert {path.name for path in out.parent.iterdir()} == {"model.onnx", "model.labels.json"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """What is exported is known already."""
    monkeypatch.setattr(export, "export", lambda *_: data)


@pytest.mark.usefixtures("quick")
def test_without_images_those_of_the_run_are_taken(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    assert exported(run, out, "--check") == 3
    assert "--check IMAGES" in capsys.readouterr().err
    config = run / "config.yaml"
    config.write_text(f"format_version: 1\niddc: '0'\nimages: {{source: '{photos}'}}\n")
    assert exported(run, out, "--check") == 0
    assert "2 images" in capsys.readouterr().out
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "images").symlink_to(photos)
    source = f"folder:{tmp_path / 'data'}"
    config.write_text(f"format_version: 1\niddc: '0'\nimages: {{source: '{source}'}}\n")
    assert exported(run, out, "--check") == 0
    config.write_text(f"format_version: 1\niddc: '0'\nimages: {{source: '{photos}-gone'}}\n")
    assert exported(run, out, "--check") == 3
    assert f"{photos}-gone" in capsys.readouterr().err
    config.unlink()


@pytest.mark.usefixtures("quick")
def test_images_that_cannot_be_read_check_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    assert exported(run, tmp_path / "a.onnx", "--check", str(tmp_path / "broken.png")) == 3
    assert "readable" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_file_that_disagrees_is_exit_5_and_not_written(
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = export.open_exported

    def other(*args: Any) -> export.Runner:
        run = honest(*args)
        return lambda image: np.roll(run(image), 1, axis=1)

    monkeypatch.setattr(export, "open_exported", other)
    out = tmp_path / "masks" / "model.onnx"
    assert exported(run, out, "--check", str(photos)) == 5
    assert "expected at least 99.9%" in capsys.readouterr().err
    assert not out.parent.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("agreement", "code"), [(0.96, 0), (0.94, 5)])
def test_a_file_in_8_bits_must_agree_in_95_percent_of_the_pixels(
    agreement: float,
    code: int,
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "check", lambda *_: export.Check(2, 0.1, agreement))
    out = tmp_path / "model.onnx"
    assert exported(run, out, "--int8", str(photos), "--check", str(photos)) == code
    assert out.exists() == (code == 0)
    assert ("expected at least 95.0%" in capsys.readouterr().err) == (code == 5)


def test_a_file_in_8_bits_gives_nearly_the_same_clusters(
    run: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "onnx_graph", lambda *_: data)
    model = Segmenter.load(run, "cpu")
    small = export.export(model, "onnx", [picture(60, 84), picture(48, 48)])
    found = export.check(model, small, "onnx", [picture(84, 60)])
    assert 0.9 <= found.agreement <= 1
    assert found.error > 1e-4  # single precision errs by less


def test_8_bits_and_torch_export_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="found torch-export"):
        export.export(Segmenter.load(run, "cpu"), "torch-export", [picture(48, 48)])


@pytest.mark.parametrize(("to", "name"), [("onnx", "model.pt2"), ("torch-export", "photo.jpg")])
def test_a_file_of_another_kind_is_exit_2(
    to: str, name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    argv = ["export", str(run), "--to", to, "--out", str(tmp_path / name)]
    assert main(argv) == 2
    assert "ends in" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_exit_4_and_says_how_to_install_it(
    package: str,
    run: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnxruntime":
        monkeypatch.setattr(export, "onnx_graph", lambda *_: b"")
    assert exported(run, tmp_path / "model.onnx", "--check", str(photos)) == 4
    said = capsys.readouterr().err
    assert re.search(rf"needs .*{package}.*, which is not installed", said)
    assert "pip install 'iddc[export]'" in said


def test_a_network_that_cannot_be_exported_is_one_sentence_that_names_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise ValueError("data-dependent\nand more")

    monkeypatch.setattr(export, "_torch_export", fail)
    with pytest.raises(SetupError, match=r"vit_tiny_patch16_224 .*\(ValueError: data-dependent\)"):
        export.export(Segmenter.load(run, "cpu"), "torch-export")


@pytest.mark.skipif(not NO_SIZES, reason="this PyTorch exports every size")
def test_a_pytorch_that_exports_no_sizes_is_one_sentence(run: Path) -> None:
    with pytest.raises(SetupError, match=r"PyTorch 2\.6.*Try a newer PyTorch"):
        export.export(Segmenter.load(run, "cpu"), "onnx")


def test_only_a_network_is_exported() -> None:
    class Other:
        num_clusters = 2

        def probs(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 2, 1, 1) / 2

    with pytest.raises(ConfigError, match="found Other"):
        export.export(Segmenter.of(Other(), Experiment(num_clusters=2)), "onnx")
