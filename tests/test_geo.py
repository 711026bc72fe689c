"""GeoTIFFs: tiles in, ids at the same place on Earth out."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iddc import geo, ground, rasters
from iddc.cli import main
from iddc.errors import SetupError, UnreadableImage
from iddc.masks import Classes, Labels
from iddc.segmenter import Segmenter

rasterio = pytest.importorskip("rasterio", reason="the extra `geo` is not installed")
pyogrio = pytest.importorskip("pyogrio", reason="the extra `geo` is not installed")
features = pytest.importorskip("rasterio.features")
pyproj = pytest.importorskip("pyproj")
shapely = pytest.importorskip("shapely")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dataset has no geotransform"),
]
"""rasterio 1.4 uses affine 3 in the old way; and what the tests themselves open has no place."""
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
    bands = noise(3, 70, 101)
    source = write(tmp_path / "a.tif", bands)
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


def test_255_is_no_class(tmp_path: Path) -> None:
    for count, kind in ((255, "uint8"), (256, "uint16")):
        last = lambda image, ids=count - 1: np.full(image.size[::-1], ids, np.uint8)  # noqa: E731
        source = write(tmp_path / f"{count}.tif", noise(3, 40, 50))
        with segmented(source, last, Labels.numbered(count).classes) as found:
            assert found.dtypes[0] == kind
            assert (found.read(1) == count - 1).all()
            assert found.dataset_mask().all()


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
def test_other_than_8_bits_has_one_range_for_all_bands(kind: str, tmp_path: Path) -> None:
    ramp = np.arange(101 * 30).reshape(30, 101) % 101  # each of 0..100 equally often
    bands = np.stack([ramp, 7 * ramp, np.full_like(ramp, 7)]).astype(kind)
    seen = np.zeros((30, 101, 3), np.uint8)

    def keep(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image)
        seen[: pixels.shape[0], : pixels.shape[1]] = pixels
        return np.zeros(pixels.shape[:2], np.uint8)

    source = write(tmp_path / "a.tif", bands)
    geo.segment_raster(source, tmp_path / "b.tif", keep, CLASSES, 128)
    expected = np.rint(bands.transpose(1, 2, 0) / 700 * 255)
    np.testing.assert_array_equal(seen, expected)


def test_pixels_that_are_no_number_count_for_nothing(tmp_path: Path) -> None:
    bands = np.full((1, 20, 20), np.nan, np.float32)
    with segmented(write(tmp_path / "a.tif", bands)) as found:
        assert (found.read(1) == 255).all()


def test_one_band_is_grey(tmp_path: Path) -> None:
    bands = noise(1, 20, 30)
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


# Hostile and odd files


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A server that nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


def address(server: socket.socket) -> str:
    return f"/vsicurl/http://127.0.0.1:{server.getsockname()[1]}/a.tif"


def vrt(path: str) -> str:
    source = f"<SourceFilename>{path}</SourceFilename><SourceBand>1</SourceBand>"
    band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{source}</SimpleSource>'
    size = 'rasterXSize="50" rasterYSize="40"'
    return f"<VRTDataset {size}>{band}</VRTRasterBand></VRTDataset>"


def test_a_raster_that_names_an_address_as_its_overview_is_refused_before_it_is_called(
    listening: socket.socket, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", np.zeros((3, 2000, 2000), np.uint16))
    for domain in ("OVERVIEWS", "overviews"):
        with rasterio.open(path, "r+") as raster:
            raster.update_tags(ns=domain, OVERVIEW_FILE=address(listening))
        with pytest.raises(UnreadableImage, match="names another file"):
            segmented(path)


def test_files_beside_a_raster_lead_nowhere_and_change_nothing(
    listening: socket.socket, tmp_path: Path
) -> None:
    bands = noise(3, 1500, 20).astype(np.uint16)
    with segmented(write(tmp_path / "a.tif", bands)) as found:
        expected = found.read(1)
    overview = f'<MDI key="OVERVIEW_FILE">{address(listening)}</MDI>'
    domain = f'<Metadata domain="OVERVIEWS">{overview}</Metadata>'
    no_data = '<PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand>'
    beside = tmp_path / "a.tif.aux.xml"
    beside.write_text(f"<PAMDataset><SRS>EPSG:4326</SRS>{domain}{no_data}</PAMDataset>")
    for suffix in (".ovr", ".msk"):
        (tmp_path / f"a.tif{suffix}").write_text(vrt(address(listening)))
    before = sorted(tmp_path.iterdir())
    with segmented(tmp_path / "a.tif") as found:
        np.testing.assert_array_equal(found.read(1), expected)
        assert found.crs.to_epsg() == 32632
    assert sorted(tmp_path.iterdir()) == before
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["a.tif"]


def test_an_xml_that_lists_rasters_is_no_geotiff(listening: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    service = f"<ServerUrl>{address(listening)[9:]}</ServerUrl>"
    for text in (vrt(address(listening)), f"<GDAL_WMS><Service>{service}</Service></GDAL_WMS>"):
        path.write_text(text)
        with pytest.raises(UnreadableImage, match="as a GeoTIFF"):
            segmented(path)


def test_a_path_that_only_gdal_knows_is_no_file(listening: socket.socket, tmp_path: Path) -> None:
    write(tmp_path / "a.tif", noise(3, 20, 30))
    os.mkfifo(tmp_path / "pipe.tif")
    places = [address(listening), f"/vsisubfile/0_9,{tmp_path}/a.tif", "/vsistdin/a.tif"]
    for place in [*places, f"GTIFF_DIR:1:{tmp_path}/a.tif", "/dev/zero", f"{tmp_path}/pipe.tif"]:
        with pytest.raises(UnreadableImage, match="no regular file"):
            geo.segment_raster(Path(place), tmp_path / "b.tif", brightness, CLASSES, 32)


@pytest.mark.parametrize(
    "name", ["-rf %03d.tif", "GTIFF_DIR:1:b.tif", "zip:a.tif", "a?b#c.tif", "a\n\x1b[31m.tif"]
)
def test_the_name_of_a_raster_is_a_name_for_gdal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bands = noise(3, 20, 30)
    write(tmp_path / "a.tif", bands).rename(name)
    write(tmp_path / "b.tif", bands[:, :9])
    geo.segment_raster(Path(name), tmp_path / "c.tif", brightness, CLASSES, 32)
    with rasterio.open(tmp_path / "c.tif") as found:
        np.testing.assert_array_equal(found.read(1), bands.astype(int).sum(axis=0) // 256)


def test_a_name_that_is_no_utf_8_is_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3, 20, 30)).rename(tmp_path / os.fsdecode(b"\xff.tif"))
    with pytest.raises(UnreadableImage, match="utf-8"):
        geo.segment_raster(path, tmp_path / "b.tif", brightness, CLASSES, 32)


def claiming(path: Path, side: int, tile: int) -> Path:
    """A raster without a pixel in the file: GDAL takes missing tiles for zeros."""
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": side, "width": side}
    tiles = {"tiled": True, "blockxsize": tile, "blockysize": tile, "interleave": "pixel"}
    with rasterio.open(path, "w", **profile, **tiles, compress="deflate", SPARSE_OK=True):
        pass
    return path


def test_a_raster_that_claims_more_than_its_bytes_can_hold_takes_no_time_and_no_memory(
    tmp_path: Path,
) -> None:
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="claims 1,000,000 megapixels"):
        segmented(claiming(tmp_path / "a.tif", 1_000_000, 16384))
    with pytest.raises(UnreadableImage, match="its tiles have more than 67 million values"):
        segmented(claiming(tmp_path / "b.tif", 16384, 8192))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    assert not any((tmp_path / "result").iterdir())


def test_tiles_are_counted_one_by_one() -> None:
    assert next(iter(geo._tiles(2**31 - 1, 2**31 - 1, 192)))[0] == ((0, 184), (0, 184))


@pytest.mark.parametrize("kind", ["float32", "float64", "int64"])
def test_numbers_as_large_as_their_type_allows_are_stretched(kind: str, tmp_path: Path) -> None:
    # Larger floats are marks of missing data.
    low, high = (-9e29, 9e29) if kind[0] == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    bands = np.array([low, high] * 200, kind).reshape(1, 20, 20)
    seen = []

    def keep(image: Image.Image) -> np.ndarray:
        seen.append(np.asarray(image))
        return np.zeros(image.size[::-1], np.uint8)

    segmented(write(tmp_path / "a.tif", bands), keep).close()
    assert np.unique(seen[0]).tolist() == [0, 255]


def test_pixels_that_are_infinite_have_no_class(tmp_path: Path) -> None:
    bands = np.linspace(0, 1, 400, dtype=np.float32).reshape(1, 20, 20)
    bands[0, 0, :2] = np.inf, -np.inf
    with segmented(write(tmp_path / "a.tif", bands)) as found:
        assert np.argwhere(found.read(1) == 255).tolist() == [[0, 0], [0, 1]]


def test_indices_of_colours_are_seen_as_these(tmp_path: Path) -> None:
    bands = noise(1, 20, 30) % 2
    path = write(tmp_path / "a.tif", bands, photometric="palette")
    with rasterio.open(path, "r+") as raster:
        raster.write_colormap(1, {0: (255, 255, 255, 255), 1: (9, 9, 9, 255)})
    with segmented(path) as found:
        np.testing.assert_array_equal(found.read(1), np.where(bands[0] == 0, 2, 0))


@pytest.mark.parametrize("turned", [(7, 3, 0, 3, -7, 0), (0, 0, 0, 0, 0, 0.5)])
def test_an_odd_transform_is_kept(turned: tuple[float, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3, 20, 30))
    with rasterio.open(path, "r+") as raster:
        raster.transform = rasterio.Affine(*turned)
    with segmented(path) as found:
        assert found.transform[:6] == turned


def unplaced(path: Path) -> Path:
    bands = noise(3, 20, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(path, bands).unlink()
        profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": 20, "width": 30}
        with rasterio.open(path, "w", **profile) as raster:
            raster.write(bands)
    return path


def test_a_raster_without_a_place_gives_one_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = unplaced(tmp_path / "a.tif")
    geo.segment_raster(path, tmp_path / "b.tif", brightness, CLASSES, 32)
    assert not [each for each in recwarn if "Georeferenced" in each.category.__name__]
    with warnings.catch_warnings(action="ignore"), rasterio.open(tmp_path / "b.tif") as found:
        assert found.crs is None
        assert found.transform.is_identity


def test_a_world_file_places_a_raster_and_a_damaged_one_makes_it_unreadable(
    tmp_path: Path,
) -> None:
    path = unplaced(tmp_path / "a.tif")
    (tmp_path / "a.tfw").write_text("10\n0\n0\n-10\n500005\n5199995\n")
    with segmented(path) as found:
        assert found.transform == PLACE
    for text in ("10\n0\n", "x " * 6, "1" * 20_000):
        (tmp_path / "a.tfw").write_text(text)
        with pytest.raises(UnreadableImage, match=r"a\.tif"):
            segmented(path)
    (tmp_path / "a.tfw").unlink()
    os.mkfifo(tmp_path / "a.tfw")
    with pytest.raises(UnreadableImage, match="regular"):
        segmented(path)


@pytest.mark.parametrize(
    ("raster", "world"),
    [
        *(("a.tif", f"a.{suffix}") for suffix in ("tfw", "TFW", "tifw", "TIFW", "wld", "WLD")),
        *(("a.tiff", f"a.{suffix}") for suffix in ("tfw", "tiffw", "wld")),
        ("a.TIF", "a.TFW"),
        ("A.TIF", "a.tfw"),
    ],
)
def test_world_files_are_found_by_every_name_by_which_gdal_finds_them(
    tmp_path: Path, raster: str, world: str
) -> None:
    path = unplaced(tmp_path / raster)
    (tmp_path / world).write_text("10\n0\n0\n-10\n500005\n5199995\n")
    with rasterio.open(path) as witness, segmented(path) as found:
        assert found.transform == witness.transform == PLACE


def test_the_camera_of_a_raster_is_kept(tmp_path: Path) -> None:
    numbers = [1.0] + [0.0] * 19
    camera = rasterio.rpc.RPC(
        height_off=300.0, height_scale=500.0, lat_off=47.0, lat_scale=0.1, long_off=9.0,
        long_scale=0.1, line_off=20.0, line_scale=20.0, samp_off=20.0, samp_scale=20.0,
        line_num_coeff=numbers, line_den_coeff=numbers, samp_num_coeff=numbers,
        samp_den_coeff=numbers, err_bias=0.5, err_rand=0.25,
    )  # fmt: skip
    path = unplaced(tmp_path / "a.tif")
    with rasterio.open(path, "r+") as raster:
        raster.rpcs = camera
    with segmented(path) as found:
        assert found.rpcs.to_dict() == camera.to_dict()
    rasters.write_classes(tmp_path / "result/a.tif", tmp_path / "classes.tif", CLASSES)
    with rasterio.open(tmp_path / "classes.tif") as found:
        assert found.rpcs.to_dict() == camera.to_dict()


RPC_TEXT = {
    "a_RPC.TXT": "{0}_OFF: +0020.00 pixels\n",
    "a_rpc.txt": "{0}_OFF: +0020.00 pixels\n",
    "a.RPB": "\t{1}Offset = 20;\n",
    "A.rpb": "\t{1}Offset = +2.0E+01;\n",
}


@pytest.mark.parametrize("name", RPC_TEXT)
def test_the_camera_in_a_file_beside_a_raster_is_kept(name: str, tmp_path: Path) -> None:
    text = name.lower().endswith("txt")
    lines = [] if text else ['satId = "QB02";', "BEGIN_GROUP = IMAGE"]
    for long, short in zip(
        ("LINE", "SAMP", "LAT", "LONG", "HEIGHT"), ("line", "samp", "lat", "long", "height"),
        strict=True,
    ):  # fmt: skip
        lines.append(RPC_TEXT[name].format(long, short).strip("\n"))
        lines.append(f"{long}_SCALE: 0.5 meters" if text else f"\t{short}Scale = 0.5;")
    for long, short in (("LINE", "line"), ("SAMP", "samp")):
        for part in ("NUM", "DEN"):
            numbers = [f"{0.25 * i:+.6E}" for i in range(20)]
            if text:
                lines += [f"{long}_{part}_COEFF_{i + 1}: {n}" for i, n in enumerate(numbers)]
            else:
                lines.append(f"\t{short}{part.title()}Coef = (\n" + ",\n".join(numbers) + ");")
    path = unplaced(tmp_path / "a.tif")
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    with segmented(path) as found:
        camera = found.rpcs
    assert (camera.line_off, camera.height_scale) == (20, 0.5)
    assert camera.samp_den_coeff == [0.25 * i for i in range(20)]
    (tmp_path / name).write_text("\n".join(lines[:-1]))
    with pytest.raises(UnreadableImage, match="coefficients of a camera are damaged"):
        segmented(path)


def test_control_points_are_kept(tmp_path: Path) -> None:
    path = unplaced(tmp_path / "a.tif")
    point = pytest.importorskip("rasterio.control").GroundControlPoint
    points = [point(*place) for place in [(0, 0, 1, 2), (9, 9, 3, 4)]]
    with rasterio.open(path, "r+") as raster:
        raster.gcps = points, "EPSG:4326"
    with segmented(path) as found:
        kept, crs = found.gcps
    assert [(point.row, point.col, point.x, point.y) for point in kept] == [
        (0, 0, 1, 2),
        (9, 9, 3, 4),
    ]
    assert crs.to_epsg() == 4326


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_raster_is_read_or_unreadable_and_nothing_else(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "a.tif", noise(3, 60, 50), compress="deflate")
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, 600 if seed % 2 else len(data), 4):
        data[place] = rng.integers(0, 256)
    path.write_bytes(data)
    with suppress(UnreadableImage):
        segmented(path).close()
    left = {file.name for file in (tmp_path / "result").iterdir()}
    assert left <= {"a.tif"}


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from iddc import geo, ground, rasters
from iddc.errors import SetupError
from iddc.masks import Labels
source, target, room = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(room),) * 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def classify(image):
    return (np.asarray(image)[..., 0] % 3).astype(np.uint8)
try:
    geo.segment_raster(Path(source), Path(target), classify, Labels.numbered(3).classes, 192)
except SetupError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("room", [100, 10_000, 30_000])
def test_a_disk_that_is_full_when_gdal_closes_the_file_leaves_none(
    room: int, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.tif", noise(3, 400, 500))
    target = tmp_path / "result" / "b.tif"
    command = [sys.executable, "-c", FULL, str(source), str(target), str(room)]
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 1
    assert f"Cannot write {target}: " in end.stderr
    assert "Traceback" not in end.stderr
    assert not any(target.parent.iterdir())
    subprocess.run([*command[:-1], "1000000"], check=True)
    assert target.exists()


def test_without_the_extra_it_is_said_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(SetupError, match=r"pip install 'iddc\[geo\]'"):
        geo.segment_raster(tmp_path / "a.tif", tmp_path / "b.tif", brightness, CLASSES, 32)


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
    formats = () if "--formats" in options else ("--formats", "geotiff")
    return main([*argv, *formats, "--max-unreadable", "0.5", *options])


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
    write(scenes / "c.tif", noise(3, 30, 20))
    for _ in range(2):  # repaired, it is skipped no more
        assert predict(model, scenes, out, "--max-unreadable", "0.1") == 0
        assert "c.tif" not in (out / "skipped.csv").read_text()


def test_a_preview_beside_rasters_is_said_and_left_out(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scenes / "c.tif").unlink()
    Image.new("RGB", (8, 8)).save(scenes / "preview.jpg")
    out = tmp_path / "out"
    assert predict(model, scenes, out, "--max-unreadable", "0") == 0
    captured = capsys.readouterr()
    assert "no GeoTIFFs, left out (1): preview.jpg" in captured.err
    assert "masks of 2 rasters in" in captured.out


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


def test_rasters_and_photos_are_two_commands(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", str(model), str(scenes), "--out", str(tmp_path / "out")]
    assert main([*argv, "--formats", "png", "geotiff"]) == 2
    assert "go with csv alone, found png too" in capsys.readouterr().err


def test_a_table_and_polygons_of_rasters_say_the_same_as_their_masks(
    model: Path, scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert predict(model, scenes, out, "--formats", "geotiff", "geojson", "gpkg", "csv") == 0
    with rasterio.open(out / "geotiff" / "north" / "a.tif") as raster:
        ids = raster.read(1)
        transform = raster.transform
    rows = list(csv.DictReader((out / "shares.csv").read_text().splitlines()))
    found = {row["class"]: row for row in rows if row["image"] == "north/a.tif"}
    for index, name in enumerate((out / "classes.txt").read_text().splitlines()):
        pixels = int((ids == index).sum())
        assert int(found[name]["pixels"]) == pixels
        # A pixel has 10 m x 10 m, as the UTM grid is within 0.1 % of the ground here.
        assert float(found[name]["m2"]) == pytest.approx(100 * pixels, rel=2e-3)
    shares = [float(row["share"]) for row in found.values()]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    with closing(sqlite3.connect(out / "gpkg" / "north" / "a.gpkg")) as base:
        polygons = base.execute("select geom, id from a").fetchall()
    # A GeoPackage puts 8 bytes and an envelope (of 32 here) before the WKB.
    shapes = [(shapely.from_wkb(geom[40:]), index) for geom, index in polygons]
    assert all(shape.is_valid for shape, _ in shapes)
    drawn = features.rasterize(shapes, ids.shape, fill=254, transform=transform)
    assert (drawn == ids).all()


def test_polygons_of_geojson_are_in_degrees_and_gdal_reads_names_and_areas(tmp_path: Path) -> None:
    ids = np.zeros((1, 20, 30), np.uint8)
    ids[0, 5:15, 10:20] = 1
    ids[0, 8:10, 12:16] = 2  # a hole in it, which is ignored
    source = write(tmp_path / "clusters.tif", ids, nodata=255)
    classes = Labels.numbered(3).edit({0: "wood", 1: "lake é", 2: "ignore"}).classes
    rasters.write_polygons(source, tmp_path / "a.geojson", classes, "geojson")
    meta, _, wkb, (numbers, names, areas) = pyogrio.raw.read(tmp_path / "a.geojson")
    assert meta["crs"] == "EPSG:4326"
    assert [*meta["fields"]] == ["id", "class", "m2"]
    shapes = dict(zip(names, shapely.from_wkb(wkb), strict=True))
    assert dict(zip(names, numbers, strict=True)) == {"wood": 0, "lake é": 1}
    assert len(shapes["lake é"].interiors) == 1
    earth = pyproj.Geod(ellps="WGS84")
    for name, area in zip(names, areas, strict=True):
        expected, _ = earth.geometry_area_perimeter(shapely.orient_polygons(shapes[name]))
        assert area == pytest.approx(abs(expected), rel=1e-5)


def test_a_renaming_reaches_rasters_polygons_and_their_table(
    model: Path, scenes: Path, tmp_path: Path
) -> None:
    out, new, renamed = tmp_path / "out", tmp_path / "new", tmp_path / "run"
    shutil.copytree(model, renamed)  # its names change, and `model` serves other tests
    formats = ("--formats", "geotiff", "geojson", "csv")
    assert predict(renamed, scenes, out, *formats) == 0
    assert main(["label", str(renamed), "--set", "0=wood", "1=wood"]) == 0
    assert predict(renamed, scenes, new, *formats) == 0
    assert main(["relabel", str(out)]) == 0
    names = ["geotiff/b.tif", "geojson/b.geojson", "shares.csv", "classes.txt"]
    assert [(out / name).read_bytes() for name in names] == [
        (new / name).read_bytes() for name in names
    ]


@pytest.mark.parametrize(
    ("crs", "corner", "pixel"),
    [
        ("EPSG:4326", (8.0, 60.0), 0.01),
        ("EPSG:3857", (900_000.0, 8_000_000.0), 800.0),  # stretched by 4 in area
        ("EPSG:32632", (300_000.0, 6_600_000.0), 500.0),
        ("EPSG:3035", (4_000_000.0, 3_000_000.0), 500.0),
    ],
)
def test_areas_are_those_on_the_ground_in_any_projection(
    crs: str, corner: tuple[float, float], pixel: float, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (1, 70, 130), np.uint8)
    ids[0, :3] = 255
    place = rasterio.Affine(pixel, 0, corner[0], 0, -pixel, corner[1])
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=1, dtype="uint8", nodata=255,
        height=70, width=130, crs=crs, transform=place,
    ) as raster:  # fmt: skip
        raster.write(ids)
    classes = Labels.numbered(3).edit({2: "ignore"}).classes
    areas = rasters.measure(tmp_path / "a.tif", classes)
    expected = np.zeros(3)
    to_degrees = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    earth = pyproj.Geod(ellps="WGS84")
    for row in range(3, 70):
        for column in range(130):
            corners = [(column + a, row + b) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))]
            lon, lat = zip(*(to_degrees.transform(*(place * xy)) for xy in corners), strict=True)
            expected[ids[0, row, column]] += abs(earth.polygon_area_perimeter(lon, lat)[0])
    assert areas.pixels.tolist() == np.bincount(ids[0, 3:].ravel()).tolist()
    assert areas.square_metres is not None
    np.testing.assert_allclose(areas.square_metres, expected, rtol=1e-4)


def test_the_whole_earth_has_510_million_square_kilometres() -> None:
    # Moritz (1980): the surface of the WGS 84 ellipsoid is 510,065,621.7 square kilometres.
    ring = np.array([[-180.0, -90.0], [180.0, -90.0], [180.0, 90.0], [-180.0, 90.0]])
    assert ground.ring_area(ring) / 1e6 == pytest.approx(510_065_621.7, rel=1e-7)


def test_without_a_place_on_earth_there_are_no_polygons_and_no_areas(tmp_path: Path) -> None:
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=1, dtype="uint8", height=4, width=4
    ) as raster:
        raster.write(np.zeros((1, 4, 4), np.uint8))
    assert rasters.measure(tmp_path / "a.tif", CLASSES).square_metres is None
    with pytest.raises(UnreadableImage, match="place on Earth is not known"):
        rasters.write_polygons(tmp_path / "a.tif", tmp_path / "a.gpkg", CLASSES, "gpkg")
