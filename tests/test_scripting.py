"""What the Segmenter of scripts can do beside the one of the library."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import iddc
from iddc.config import Experiment, Runtime
from iddc.datasets import open_dataset
from iddc.errors import ConfigError, NumericError
from iddc.evaluation import PROTOCOLS, evaluate
from iddc.export import Check
from iddc.segmenter import Segmenter as Base
from tiny import photo, tiny_segmenter, write_photos


@pytest.fixture
def segmenter(model: Path) -> iddc.Segmenter:
    return iddc.Segmenter.load(model, device="cpu")


def test_a_loaded_one_is_of_the_same_class_and_predicts_the_same(
    segmenter: iddc.Segmenter, model: Path
) -> None:
    assert type(segmenter) is iddc.Segmenter
    image = photo(3)
    expected = Base.load(model, device="cpu").predict(image)
    assert (segmenter.predict(image).clusters == expected.clusters).all()


def test_keywords_are_the_fields_that_configure_a_run_and_a_machine() -> None:
    def names(function: object) -> set[str]:
        return {*inspect.signature(function).parameters}  # type: ignore[arg-type]

    assert names(iddc.Segmenter) >= Experiment.model_fields.keys()
    assert names(iddc.Segmenter.fit) >= Runtime.model_fields.keys()


def test_it_scores_labelled_images(segmenter: iddc.Segmenter, model: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 2)
    for kind in ("images", "labels"):
        (tmp_path / "data" / "val" / kind).mkdir(parents=True)
    for file in (tmp_path / "photos").iterdir():
        with Image.open(file) as image:
            image.save(tmp_path / "data" / "val" / "images" / file.name)
            clusters = segmenter.predict(image).clusters
        label = np.array([2, 0, 1], np.uint8)[clusters]
        Image.fromarray(label).save(tmp_path / "data" / "val" / "labels" / file.name)
    found = segmenter.evaluate(tmp_path / "data", progress=False)
    labelled = open_dataset("folder", tmp_path / "data", "val")
    expected = evaluate(Base.load(model, device="cpu"), labelled, PROTOCOLS["full"])
    assert found.scores == expected.scores
    assert found.num_images == 2


def test_it_writes_an_exported_file_unless_that_disagrees_with_it(
    segmenter: iddc.Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("iddc.scripting.export", lambda model, to: asked.append(to) or b"graph")
    for agreement in (1.0, 0.999, 0.99):  # 99.9 % is enough
        found = Check(1, 0.0, agreement)
        monkeypatch.setattr("iddc.scripting.check", lambda *arguments, found=found: found)
        if agreement >= 0.999:
            assert (
                segmenter.export(tmp_path / "a.pt2", check_on=[photo(1)]).read_bytes() == b"graph"
            )
        else:
            with pytest.raises(NumericError, match=r"agrees with PyTorch on 99.00% of the pixels"):
                segmenter.export(tmp_path / "b.onnx", check_on=[photo(1)])
            assert not (tmp_path / "b.onnx").exists()
    assert asked == ["torch-export", "torch-export", "onnx"]
    with pytest.raises(ConfigError, match=r"ends in .onnx or .pt2, found .*model.bin"):
        segmenter.export(tmp_path / "model.bin")


def test_it_writes_a_report_with_its_names(segmenter: iddc.Segmenter, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 2)
    segmenter.rename({0: "heather"})
    path = segmenter.report(tmp_path / "r.html", tmp_path / "photos", samples=1, progress=False)
    text = path.read_text("utf-8")
    assert "heather" in text
    assert "Verdict: " in text


def test_a_plot_has_the_overlay_and_a_legend() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    result = tiny_segmenter(3).predict(photo(2))
    axes = result.plot()
    (shown,) = axes.get_images()
    assert (np.asarray(shown.get_array()) == np.asarray(result.overlay())).all()
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [f"{name} {share:.1%}" for name, share in result.shares.items()]
    pyplot.close("all")
