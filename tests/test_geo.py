"""GeoTIFFs: tiles in, ids at the same place on Earth out."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iddc import geo
from iddc.backbones import untrained_backbone
from iddc.cli import main
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.errors import SetupError, UnreadableImage
from iddc.masks import Classes, Labels
from iddc.network import Network
from iddc.segmenter import Segmenter

rasterio = pytest.importorskip("rasterio", reason="the extra `geo` is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
"""rasterio 1.4 uses affine 3 in the old way."""
CLASSES = Labels.numbered(3).classes
PLACE = rasterio.Affine(10, 0, 500_000, 0, -10, 5_200_000)
"""The corner of a raster in UTM, with pixels of 10 m."""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geo, "MARGIN", 4)


def write(path: Path, bands: np.ndarray, **options: Any) -> Path:
    profile = {"driver": "GTiff", "count": len(bands), "dtype": bands.dtype.name}
    size = {"height": bands.shape[1], "width": bands.shape[2]}
    placed = {"crs": "EPSG:32632", "transform": PLACE}
    with rasterio.open(path, "w", **profile, **size, **placed, **options) as raster:
        raster.write(bands)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def brightness(image: Image.Image) -> np.ndarray:
    """A classification of each pixel by itself: tiles must not show."""
    return (np.asarray(image).astype(int).sum(axis=2) // 256).astype(np.uint8)


def segmented(source: Path, classify: Any = brightness, classes: Classes = CLASSES) -> Any:
    target = source.with_name("result") / source.name
    geo.segment_raster(source, target, classify, classes, 32)
    return rasterio.open(target)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(9, 40))
def test_tiles_keep_every_pixel_once_and_see_a_margin_around_it(
    height: int, width: int, tile: int
) -> None:
    geo.MARGIN = 4
    kept_times = np.zeros((height, width), int)
    for (rows, columns), seen in geo._tiles(height, width, tile):
        kept_times[slice(*rows), slice(*columns)] += 1
        for (first, last), (low, high), size in zip(
            (rows, columns), seen, (height, width), strict=True
        ):
            assert high - low == min(tile, size)
            assert 0 <= low <= max(0, first - 4)
            assert min(size, last + 4) <= high <= size
    assert (kept_times == 1).all()


def test_the_result_is_that_of_the_whole_at_the_same_place(tmp_path: Path) -> None:
    bands = noise(4, 70, 101)
    # Or GDAL would take the fourth band for the opacity.
    source = write(tmp_path / "a.tif", bands, photometric="minisblack")
    with segmented(source) as found:
        ids = found.read(1)
        assert (found.crs.to_epsg(), found.transform) == (32632, PLACE)
        assert (found.count, found.dtypes[0], found.nodata) == (1, "uint8", 255)
        colours = found.colormap(1)
    np.testing.assert_array_equal(ids, bands[:3].astype(int).sum(axis=0) // 256)
    assert [colours[index][:3] for index in range(3)] == [tuple(c) for c in CLASSES.colours]


def test_where_there_is_no_data_there_is_no_class(tmp_path: Path) -> None:
    bands = noise(3, 40, 50) // 2 + 1
    bands[:, 10:20, 30:] = 0
    with segmented(write(tmp_path / "a.tif", bands, nodata=0)) as found:
        ids = found.read(1)
    np.testing.assert_array_equal(ids == 255, bands[0] == 0)


def test_more_than_256_classes_take_16_bits(tmp_path: Path) -> None:
    classes = Labels.numbered(300).classes
    found = segmented(
        write(tmp_path / "a.tif", noise(3, 40, 50)),
        lambda image: np.full(image.size[::-1], 299, np.uint16),
        classes,
    )
    with found:
        assert (found.dtypes[0], found.nodata) == ("uint16", 65535)
        assert (found.read(1) == 299).all()


@pytest.mark.parametrize("kind", ["uint16", "int16", "float32"])
def test_other_than_8_bits_is_stretched_between_percentiles_of_each_band(
    kind: str, tmp_path: Path
) -> None:
    ramp = np.arange(101 * 30).reshape(30, 101) % 101  # each of 0..100 equally often
    bands = np.stack([ramp, 10 * ramp, np.full_like(ramp, 7)]).astype(kind)
    seen = np.zeros((30, 101, 3), np.uint8)

    def keep(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image)
        seen[: pixels.shape[0], : pixels.shape[1]] = pixels
        return np.zeros(pixels.shape[:2], np.uint8)

    source = write(tmp_path / "a.tif", bands)
    geo.segment_raster(source, tmp_path / "b.tif", keep, CLASSES, 128)
    expected = np.rint(((ramp - 2) / 96).clip(0, 1) * 255)
    np.testing.assert_array_equal(seen[..., 0], expected)
    np.testing.assert_array_equal(seen[..., 1], expected)
    assert not seen[..., 2].any()


def test_pixels_that_are_no_number_count_for_nothing(tmp_path: Path) -> None:
    bands = np.full((1, 20, 20), np.nan, np.float32)
    with segmented(write(tmp_path / "a.tif", bands)) as found:
        assert not found.read(1).any()


def test_one_band_is_grey(tmp_path: Path) -> None:
    bands = noise(2, 20, 30)
    with segmented(write(tmp_path / "a.tif", bands)) as found:
        np.testing.assert_array_equal(found.read(1), 3 * bands[0].astype(int) // 256)


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tif", noise(3, 400, 300), compress="deflate")
    source.write_bytes(source.read_bytes()[:100_000])
    with pytest.raises(UnreadableImage, match="as a GeoTIFF"):
        segmented(source)
    assert not any((tmp_path / "result").iterdir())
    source.write_bytes(b"no raster")
    with pytest.raises(UnreadableImage, match="as a GeoTIFF"):
        segmented(source)
    with pytest.raises(UnreadableImage, match="complex64"):
        segmented(write(tmp_path / "c.tif", np.zeros((1, 5, 5), np.complex64)))


def test_without_the_extra_it_is_said_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(SetupError, match=r"pip install 'iddc\[geo\]'"):
        geo.segment_raster(tmp_path / "a.tif", tmp_path / "b.tif", brightness, CLASSES, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    network = Network(untrained_backbone("vit_tiny_patch16_224", options=options), "linear", 3)
    experiment = Experiment(
        num_clusters=3,
        views=ViewsConfig(short_side=32),
        prediction=PredictionConfig(window=0, flip=False),
        training=TrainingConfig(precision="fp32"),
    )
    folder = tmp_path_factory.mktemp("run")
    Segmenter.of(network, experiment).save(folder)
    return folder


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    (folder / "north").mkdir(parents=True)
    write(folder / "north" / "a.tif", noise(3, 40, 70))
    write(folder / "b.tiff", noise(3, 30, 20))
    (folder / "c.tif").write_bytes(b"no raster")
    return folder


def predict(model: Path, scenes: Path, out: Path, *options: str) -> int:
    argv = ["predict", str(model), str(scenes), "--out", str(out), "--device", "cpu"]
    return main([*argv, "--formats", "geotiff", "--max-unreadable", "0.5", *options])


def test_the_command_writes_rasters_and_lists_what_is_none(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(model, scenes, out, "--shard", "1/2") == 0
    assert predict(model, scenes, out, "--shard", "2/2") == 0
    assert {str(path.relative_to(out)) for path in (out / "geotiff").rglob("*.tif")} == {
        "geotiff/north/a.tif",
        "geotiff/b.tif",
    }
    with rasterio.open(out / "geotiff" / "b.tif") as found:
        expected = Segmenter.load(model, "cpu").predict(np.moveaxis(noise(3, 30, 20), 0, 2))
        np.testing.assert_array_equal(found.read(1), expected.classes)
    assert "c.tif" in (out / "skipped.csv").read_text()
    assert (out / "classes.txt").read_text().splitlines()[0] == "cluster 0"
    capsys.readouterr()
    assert predict(model, scenes, out) == 0
    said = capsys.readouterr().out
    assert "masks of 2 rasters (1 skipped" in said
    assert "2 of them there already" in said
    assert predict(model, scenes, out, "--max-unreadable", "0.1") == 3
    assert "1 of 3 rasters cannot be read" in capsys.readouterr().err


def test_rasters_in_a_zip_are_left_out_with_a_reason(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as archive:
        archive.write(scenes / "b.tiff", "b.tiff")
        archive.writestr("notes.md", "")
    out = tmp_path / "out"
    assert predict(model, tmp_path / "scenes.zip", out, "--max-unreadable", "1") == 0
    assert "unpack the zip" in (out / "skipped.csv").read_text()
    assert "files of other kinds" in capsys.readouterr().err


def test_geotiff_goes_with_no_other_format(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(model), str(scenes), "--out", str(tmp_path / "out")]
    assert main([*argv, "--formats", "png", "geotiff"]) == 2
    assert "goes with no other" in capsys.readouterr().err
