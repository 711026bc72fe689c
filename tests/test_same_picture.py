"""Whoever reads a file sees the same picture: training, prediction, evaluation, reports, Python."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import iddc
from iddc import geo
from iddc.cli.export import opened
from iddc.config import ReadingConfig, ViewsConfig
from iddc.datasets.labelfiles import read_pair
from iddc.images import ImageFile, open_image, open_picture, settle, survey
from iddc.labelling.samples import NONE, predict_samples
from iddc.masks import Labels
from iddc.predicting import _photos
from iddc.progress import Progress
from iddc.report.look import look_at
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

    picture = open_picture(file, reading=reading)
    missing = np.zeros((SIDE, SIDE), bool) if picture.valid is None else ~picture.valid
    check_all_paths(path, reading, np.asarray(picture.image), missing)


@lru_cache(maxsize=1)
def segmenter_of_three() -> Segmenter:
    return tiny_segmenter(3)


def check_all_paths(
    path: Path, reading: ReadingConfig, expected: np.ndarray, missing: np.ndarray
) -> None:
    """Read a file as every part of the program does."""
    file = ImageFile(path, PurePosixPath("a.tif"))

    # Whoever opens the file, and the check of an export.
    picture = open_picture(file, reading=reading)
    assert np.array_equal(np.asarray(picture.image), expected)
    assert np.array_equal(picture.valid if missing.any() else ~missing, ~missing)
    (seen,) = opened([file], reading)
    assert np.array_equal(np.asarray(seen), expected)

    # Training: a crop that is the whole image.
    whole = ViewsConfig(
        short_side=0, crop_size=SIDE, min_scale=1, max_scale=1, flip_probability=0, max_offset=0
    )
    view = ViewDataset([file], whole, 0, reading)[0, 0]
    if missing.all():
        assert view.reason == "no pixel holds data"
    else:
        assert view.crops is not None
        assert np.array_equal(view.crops[0].permute(1, 2, 0).numpy(), expected)
        known = ~missing if view.valid is None else view.valid[0].numpy()
        assert np.array_equal(known, ~missing)

    # Prediction of photos, by the command and in Python.
    ((_, seen),) = _photos([file], reading)
    assert np.array_equal(np.asarray(seen.image), expected)
    tiny = segmenter_of_three()
    segmenter = Segmenter.of(
        tiny.network, tiny.experiment.model_copy(update={"reading": reading}), tiny.labels
    )
    result = segmenter.predict(path)
    assert np.array_equal(np.asarray(result.image), expected)
    assert np.array_equal(result.classes == 255, missing)

    # The label page and the thumbnails of a report.
    (sample,) = predict_samples(segmenter.predict, [file], Progress(), reading)
    assert np.array_equal(np.asarray(sample.image), expected)
    assert np.array_equal(sample.clusters == NONE, missing)
    look = look_at(segmenter, [file], samples=1)
    if not missing.all():
        assert look is not None
        assert np.array_equal(np.asarray(look.seen[0].image), expected)

    # Evaluation.
    Image.new("L", (SIDE, SIDE)).save(path.with_name("label.png"))
    label = ImageFile(path.with_name("label.png"), PurePosixPath("label.png"))
    scored, ids = read_pair(file, label, reading=reading)
    assert np.array_equal(np.asarray(scored), expected)
    assert np.array_equal(ids == 255, missing)

    # Prediction of rasters, tile by tile.
    tiles: list[np.ndarray] = []

    def classify(image: Image.Image) -> np.ndarray:
        tiles.append(np.asarray(image))
        return np.zeros(image.size[::-1], np.uint8)

    classes = Labels.numbered(3).classes
    geo.segment_raster(path, path.with_name("ids.tif"), classify, classes, 3 * geo.MARGIN, reading)
    assert np.array_equal(tiles[0], expected)
    with rasterio.open(path.with_name("ids.tif")) as raster_of_ids:
        assert np.array_equal(raster_of_ids.read(1) == 255, missing)


@st.composite
def tiffs(draw: st.DrawFn) -> tuple[dict[str, Any], np.ndarray, float | None]:
    """How a TIFF is written, its numbers, and the one that marks missing data."""
    kind = np.dtype(draw(st.sampled_from(["uint8", "uint16", "int16", "int32", "f4", "f8"])))
    colours = draw(st.booleans())
    with_alpha = kind.kind == "u" and draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.integers(0, 250, (SIDE, SIDE, 3 if colours else 1)).astype(kind)
    values[..., 0] += kind.type(3)
    options: dict[str, Any] = {
        "photometric": "rgb" if colours else draw(st.sampled_from(["minisblack", "miniswhite"])),
        "planarconfig": draw(st.sampled_from(["contig", "separate"])),
        "compression": draw(st.sampled_from([None, "deflate", "lzw", "zstd"])),
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
    }
    if options["compression"] and draw(st.booleans()):
        options["predictor"] = True
    if draw(st.booleans()):
        options["tile"] = (16, 32)
    else:
        options["rowsperstrip"] = draw(st.integers(1, SIDE))
    mark = draw(st.sampled_from([None, 7.0, -9999.0 if kind.kind != "u" else 200.0]))
    if mark is not None:
        values[rng.random((SIDE, SIDE)) < 0.2] = mark
        options["extratags"] = [(42113, "s", 0, f"{mark:g}", True)]
    if with_alpha:
        opaque = np.where(rng.random((SIDE, SIDE, 1)) < 0.3, 0, np.iinfo(kind).max)
        values = np.concatenate([values, opaque.astype(kind)], axis=2)
        options["extrasamples"] = ["unassalpha"]
    if values.shape[2] == 1:
        values = values[..., 0]
        options["planarconfig"] = "contig"
    elif options["planarconfig"] == "separate":
        values = values.transpose(2, 0, 1)
    return options, values, mark


def seen_by_hand(
    options: dict[str, Any], stored: np.ndarray, mark: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Colours and missing pixels of numbers of which 0..250 are shown, and 0..255 of 8 bits."""
    values = stored.reshape(SIDE, SIDE, -1)
    if options["planarconfig"] == "separate":
        values = stored.transpose(1, 2, 0)
    alpha = values[..., -1] if "extrasamples" in options else None
    colours = values[..., : values.shape[2] - (alpha is not None)]
    missing = np.zeros((SIDE, SIDE), bool)
    if mark is not None:
        marked = colours == mark
        missing = marked.all(-1) if stored.dtype.kind == "u" else marked.any(-1)
    top = 255 if stored.dtype == np.uint8 else 250
    shown = np.rint(colours.clip(0, top).astype(float) / top * 255)
    if options["photometric"] == "miniswhite":
        shown = 255 - shown
    if alpha is not None:
        missing |= alpha == 0
    shown = np.where(missing[..., None], 255, shown)
    return np.broadcast_to(shown, (SIDE, SIDE, 3)).astype(np.uint8), missing


@settings(max_examples=25, deadline=None, derandomize=True)
@given(written=tiffs())
def test_every_path_sees_the_numbers_that_were_written(
    written: tuple[dict[str, Any], np.ndarray, float | None],
) -> None:
    options, values, mark = written
    expected, missing = seen_by_hand(options, values, mark)
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.tif")
        tifffile.imwrite(path, values, **options)
        # The file holds what was written, as GDAL reads it.
        with rasterio.open(path) as file:
            plain = values.reshape(SIDE, SIDE, -1).transpose(2, 0, 1)
            assert np.array_equal(
                file.read(), values if options["planarconfig"] == "separate" else plain
            )
        # Of 8 bits the range is that of the bits, of others what is asked for.
        reading = ReadingConfig(range=(0.0, 250.0))
        check_all_paths(path, reading, expected, missing)


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
