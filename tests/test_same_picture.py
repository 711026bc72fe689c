"""Whoever reads a file sees the same picture: training, prediction, evaluation, reports, Python."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

import iddc
from iddc import geo
from iddc.config import ReadingConfig, ViewsConfig
from iddc.datasets.labelfiles import read_pair
from iddc.images import ImageFile, open_image, open_picture, settle, survey
from iddc.masks import Labels
from iddc.predicting import _photos
from iddc.segmenter import Segmenter
from iddc.views import ViewDataset
from tiny import tiny_segmenter

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),
]
SIDE = 64
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
COLLAR = np.zeros((SIDE, SIDE), np.uint8)
COLLAR[8:, 3:] = 255
HEIGHTS = RNG.uniform(300, 700, (SIDE, SIDE)).astype(np.float32)
HEIGHTS[:5] = -9999


def raster(path: Path, bands: np.ndarray, **options: Any) -> None:
    size = {"height": SIDE, "width": SIDE, "count": len(bands), "dtype": bands.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **options) as file:
        file.write(bands)


def bands(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.transpose(2, 0, 1))


TIFFS: dict[str, tuple[Callable[[Path], object], ReadingConfig]] = {
    "colours": (lambda path: raster(path, bands(RGB)), ReadingConfig()),
    "collar": (
        lambda path: raster(path, bands(np.dstack([RGB, COLLAR])), photometric="RGB", alpha="yes"),
        ReadingConfig(),
    ),
    "near infrared": (
        lambda path: raster(path, bands(np.dstack([RGB, RGB[..., :1] // 2 + 9]))),
        ReadingConfig(),
    ),
    "12 bits": (
        lambda path: tifffile.imwrite(path, RGB[..., 0].astype(np.uint16) * 16),
        ReadingConfig(),
    ),
    "own range": (
        lambda path: tifffile.imwrite(path, RGB[..., 0].astype(np.uint16) * 11 + 900),
        ReadingConfig(range="file"),
    ),
    "heights": (lambda path: raster(path, HEIGHTS[None], nodata=-9999), ReadingConfig()),
    "white is zero": (
        lambda path: tifffile.imwrite(path, RGB[..., 0], photometric="miniswhite"),
        ReadingConfig(),
    ),
    "signed": (lambda path: raster(path, bands(RGB.astype(np.int16) - 99)), ReadingConfig()),
    "13 bands": (
        lambda path: raster(path, RNG.integers(0, 9999, (13, SIDE, SIDE)).astype(np.uint16)),
        ReadingConfig(bands=(4, 3, 2)),
    ),
    "palette": (
        lambda path: Image.fromarray(RGB).quantize(32).save(path),
        ReadingConfig(),
    ),
    "planes": (
        lambda path: raster(
            path, bands(RGB.astype(np.uint16) * 257), photometric="RGB", interleave="band"
        ),
        ReadingConfig(),
    ),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_all_see_the_same_colours_and_the_same_missing_pixels(kind: str, tmp_path: Path) -> None:
    write, wanted = TIFFS[kind]
    path = tmp_path / "a.tif"
    write(path)
    file = ImageFile(path, PurePosixPath("a.tif"))
    reading, _ = settle([file], survey([file], wanted).layouts, wanted)

    # Reports, labelling and export.
    picture = open_picture(file, reading=reading)
    expected = np.asarray(picture.image)
    assert np.array_equal(np.asarray(open_image(file, reading=reading)), expected)

    # Training: a crop that is the whole image.
    whole = ViewsConfig(
        short_side=0, crop_size=SIDE, min_scale=1, max_scale=1, flip_probability=0, max_offset=0
    )
    crops = ViewDataset([file], whole, 0, reading)[0, 0].crops
    assert crops is not None
    assert np.array_equal(crops[0].permute(1, 2, 0).numpy(), expected)

    # Prediction of photos, by the command and in Python.
    ((_, seen),) = _photos([file], reading)
    assert np.array_equal(np.asarray(seen.image), expected)
    tiny = tiny_segmenter(3)
    segmenter = Segmenter.of(
        tiny.network, tiny.experiment.model_copy(update={"reading": reading}), tiny.labels
    )
    result = segmenter.predict(path)
    assert np.array_equal(np.asarray(result.image), expected)
    missing = np.zeros((SIDE, SIDE), bool) if picture.valid is None else ~picture.valid
    assert np.array_equal(result.classes == 255, missing)

    # Evaluation.
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "label.png")
    label = ImageFile(tmp_path / "label.png", PurePosixPath("label.png"))
    assert np.array_equal(np.asarray(read_pair(file, label, reading=reading)[0]), expected)

    # Prediction of rasters, tile by tile.
    tiles: list[np.ndarray] = []

    def classify(image: Image.Image) -> np.ndarray:
        tiles.append(np.asarray(image))
        return np.zeros(image.size[::-1], np.uint8)

    classes = Labels.numbered(3).classes
    geo.segment_raster(path, tmp_path / "ids.tif", classify, classes, 3 * geo.MARGIN, reading)
    assert np.array_equal(tiles[0], expected)
    with rasterio.open(tmp_path / "ids.tif") as ids:
        assert np.array_equal(ids.read(1) == 255, missing)


def test_tiles_of_a_large_raster_are_parts_of_the_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geo, "MARGIN", 4)
    values = RNG.integers(0, 3000, (700, 900)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(64, 64))
    photo = np.asarray(open_image(tmp_path / "a.tif"))  # its range is that of a sample
    seen: list[np.ndarray] = []

    def classify(image: Image.Image) -> np.ndarray:
        seen.append(np.asarray(image))
        return np.zeros(image.size[::-1], np.uint8)

    geo.segment_raster(
        tmp_path / "a.tif", tmp_path / "b.tif", classify, Labels.numbered(3).classes, 256
    )
    windows = [seen for _, seen in geo._tiles(700, 900, 256)]
    assert len(windows) == len(seen) > 1
    for ((top, bottom), (left, right)), tile in zip(windows, seen, strict=True):
        assert np.array_equal(tile, photo[top:bottom, left:right])


def test_everybody_who_opens_an_image_says_how_it_is_read() -> None:
    source = Path(iddc.__file__).parent
    silent = []
    for path in sorted(source.rglob("*.py")):
        if path.parts[-2] in ("images", "bench"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                given = len(node.args) + len(node.keywords)
                least = {"open_image": 2, "open_picture": 2, "picture_of": 2}.get(node.func.id, 0)
                words = ast.unparse(node)
                if given < least or (least and "reading" not in words):
                    silent.append(f"{path.name}:{node.lineno}: {words}")
    assert not silent
