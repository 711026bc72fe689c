"""Large GeoTIFFs, tile by tile: ids of classes at the same place on Earth; needs extra `geo`."""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from iddc.config import ReadingConfig
from iddc.errors import UnreadableImage, needs_extra
from iddc.images import AS_STORED, MAX_PIXELS, Picture, tiff
from iddc.images.meaning import every_nth, known_span, make_rule, may_hide_marks, show
from iddc.masks import Classes
from iddc.runs import disk_errors
from iddc.runs.files import open_atomic, read_text

MARGIN = 64
"""How far a tile sees beyond what is kept of it, in pixels, so that tiles meet without seams."""
MOST_PER_BYTE = 10_000
"""Pixels that a byte of a file may claim, beyond `MAX_PIXELS`; empty tiles of 256 x 256 claim 4096.
A file of 60 kB can claim 10^12, which no machine ever ends."""
MAX_BLOCK = 2**26
"""The most values of a tile of a file, which GDAL unpacks as a whole: 4 bands of 4096 x 4096."""
_RPC = (
    *(
        f"{what}_{part}"
        for what in ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")
        for part in ("OFF", "SCALE")
    ),
    *(f"{what}_{part}_COEFF" for what in ("LINE", "SAMP") for part in ("NUM", "DEN")),
)
"""What a camera file must have, as GDAL calls it."""
_RPB = {"Offset": "_OFF", "Scale": "_SCALE", "Num": "_NUM", "Den": "_DEN", "Coef": "_COEFF"}
_RPB |= {"Bias": "_BIAS", "Rand": "_RAND"}
"""What the names in a file .RPB become."""
ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}
"""No files beside a raster: any may be a list of addresses, which GDAL would fetch."""


def segment_raster(
    source: Path,
    target: Path,
    classify: Callable[[Image.Image], Any],
    classes: Classes,
    tile: int,
    reading: ReadingConfig = AS_STORED,
) -> None:
    """Write the classes of a GeoTIFF as one of the same size, CRS and transform.

    The numbers become colours as those of a photo do (`images.meaning`). Where the raster has no
    data the result has none: 255, or 65535 in 16 bits (256 classes and more), as in ignored pixels.
    One tile is in memory at a time. Of the files beside a raster only its world file is read
    (a.tfw, a.tifw or a.wld of a.tif), and a_RPC.TXT or a.RPB where the file has no coefficients of
    a camera itself, which are kept.

    Args:
        source: The GeoTIFF.
        target: The GeoTIFF to write, with the colours of the classes; complete or absent.
        classify: From an RGB image to the class of every pixel, "H W".
        classes: What they mean.
        reading: How the numbers become colours.
        tile: The side of what `classify` gets, in pixels; more than two margins.

    Raises:
        SetupError: The extra `geo` is missing, or the file cannot be written.
        UnreadableImage: GDAL cannot read the source, or it holds no real numbers, leads to other
            files, or claims more pixels than its bytes can hold.
    """
    rasterio = open_rasterio()
    # 255 cannot be both the last of 256 classes and no data.
    kind = np.promote_types(classes.of_cluster.dtype, np.min_scalar_type(len(classes.names)))
    none = int(np.iinfo(kind).max)
    colours = {index: (*map(int, colour), 255) for index, colour in enumerate(classes.colours)}
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    unplaced = rasterio.errors.NotGeoreferencedWarning
    with (
        warnings.catch_warnings(action="ignore", category=unplaced),
        rasterio.Env(**ALONE),
        _opened(source) as raster,
    ):
        with _reading(source):
            read_window = _reader(source, raster, reading)
            profile = {
                "driver": "GTiff",
                "height": raster.height,
                "width": raster.width,
                "count": 1,
                "dtype": kind.name,
                "nodata": none,
                "compress": "deflate",
                "tiled": True,
                "blockxsize": 256,
                "blockysize": 256,
                "BIGTIFF": "IF_SAFER",
                **_placed(source, raster),
            }
        written = checked = 0
        with open_atomic(target) as file:
            with rasterio.open(file.name, "w", **profile) as result:
                if kind == np.uint8:  # as far as GDAL's colour tables go
                    result.write_colormap(1, colours)
                for kept, seen in _tiles(raster.height, raster.width, tile):
                    with _reading(source):
                        picture = read_window(seen)
                    inside = _inside(kept, seen)
                    ids = classify(picture.image)[inside].astype(kind)
                    if picture.valid is not None:
                        ids[~picture.valid[inside]] = none
                    result.write(ids, 1, window=kept)
                    written = zlib.crc32(ids, written)
            # rasterio closes a file as if all were well where the disk is full.
            with suppress(rasterio.errors.RasterioError), rasterio.open(file.name) as result:
                for kept, _ in _tiles(raster.height, raster.width, tile):
                    checked = zlib.crc32(result.read(1, window=kept), checked)
            if checked != written:
                raise OSError("it does not hold what was written; is the disk full?")


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    """Open a GeoTIFF, if it is a file and leads to no other."""
    with _reading(source):
        if not source.is_file():
            raise ValueError("it is no regular file")
        # As an absolute path it is neither an address nor an option of GDAL.
        raster = open_rasterio().open(source.absolute(), driver="GTiff")
    with raster:
        with _reading(source):
            if raster.tags(ns="OVERVIEWS"):
                raise ValueError("it names another file as its overview")
            claimed = raster.height * raster.width
            if claimed > max(MAX_PIXELS, MOST_PER_BYTE * source.stat().st_size):
                raise ValueError(f"it claims {claimed / 1e6:,.0f} megapixels")
            together = raster.count if raster.interleaving.name == "pixel" else 1
            if together * math.prod(raster.block_shapes[0]) > MAX_BLOCK:
                raise ValueError(f"its tiles have more than {MAX_BLOCK // 10**6} million values")
        yield raster


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Tell what cannot be read from what cannot be written, which is an OSError too."""
    try:
        yield
    except Exception as error:  # damaged files make rasterio raise almost anything
        reason = str(error) or type(error).__name__
        raise UnreadableImage(source, f"cannot be read as a GeoTIFF: {reason}") from error


def _placed(source: Path, raster: Any) -> dict[str, Any]:
    """The place of a raster on Earth, if it is known, as the arguments of a new one."""
    points, crs = raster.gcps
    camera = raster.rpcs or _camera_beside(source)
    known = {"rpcs": camera} if camera else {}
    if points:
        return {**known, "gcps": points, "crs": crs}
    if not raster.transform.is_identity:
        return {**known, "crs": raster.crs, "transform": raster.transform}
    world = _world_file(source)
    if world is None:
        return {**known, "crs": raster.crs}
    import affine

    transform = affine.loadsw(read_text(world, 10_000))
    return {**known, "crs": raster.crs, "transform": transform}


def _camera_beside(source: Path) -> Any:
    """The coefficients of a camera in a_RPC.TXT or a.RPB beside a.tif; None without such a file.

    Raises:
        ValueError: The file lacks one of them.
    """
    beside = _names(source.parent, source.parent.stat().st_mtime_ns)
    stem = source.stem.lower()
    found = next(
        (beside[name] for name in (f"{stem}_rpc.txt", f"{stem}.rpb") if name in beside), []
    )
    if not found:
        return None
    text = read_text(found[0], 100_000)
    number = r"[-+]?[\d.]+(?:[eE][-+]?\d+)?"
    values: dict[str, list[str]] = {}
    if found[0].suffix.lower() == ".txt":
        for name, value in re.findall(rf"(?m)^\s*([A-Z_]+?)(?:_\d+)?:\s*({number})", text):
            values.setdefault(name, []).append(value)
    else:
        for name, value in re.findall(r"(\w+)\s*=\s*(\([^)]*\)|[^;\n]*);", text):
            parts = re.sub("|".join(_RPB), lambda part: _RPB[part[0]], name)
            values[parts.upper()] = re.findall(number, value)
    from rasterio.rpc import RPC

    lengths = {name: len(values.get(name, [])) for name in _RPC}
    if any(length != (20 if name.endswith("COEFF") else 1) for name, length in lengths.items()):
        raise ValueError(f"its coefficients of a camera are damaged: {found[0].name}")
    kept = {
        name: " ".join(values[name]) for name in (*_RPC, "ERR_BIAS", "ERR_RAND") if name in values
    }
    return RPC.from_gdal(kept)  # type: ignore[no-untyped-call]


def _world_file(source: Path) -> Path | None:
    """The first that there is of a.tfw, a.tifw (or a.tiffw) and a.wld, in any case, as in GDAL."""
    beside = _names(source.parent, source.parent.stat().st_mtime_ns)
    for suffix in (".tfw", f"{source.suffix}w", ".wld"):
        found = beside.get(f"{source.stem}{suffix}".lower(), [])
        # A.tfw is of A.tif, if there is an a.tif too.
        same = [path for path in found if path.stem == source.stem]
        if found:
            return (same or found)[0]
    return None


@lru_cache(maxsize=4)
def _names(folder: Path, changed: int) -> dict[str, list[Path]]:  # noqa: ARG001
    """The files of a folder by their names in lower case; read anew when it changed."""
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        names.setdefault(path.name.lower(), []).append(path)
    return names


Window = tuple[tuple[int, int], tuple[int, int]]
"""First and last row, first and last column, the last ones not included."""


def _tiles(height: int, width: int, tile: int) -> Iterator[tuple[Window, Window]]:
    """What is kept of each tile, and what it sees: the margins more, as far as the raster goes."""
    step = tile - 2 * MARGIN

    def spans(size: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        if size <= tile:
            yield (0, size), (0, size)
            return
        for start in range(0, size, step):
            # The last tiles are moved back, so that all are of one size.
            first = max(0, min(start - MARGIN, size - tile))
            yield (start, min(start + step, size)), (first, first + tile)

    for rows, seen_rows in spans(height):
        for columns, seen_columns in spans(width):
            yield (rows, columns), (seen_rows, seen_columns)


def _inside(kept: Window, seen: Window) -> tuple[slice, slice]:
    (rows, columns), (above, left) = kept, (seen[0][0], seen[1][0])
    return slice(rows[0] - above, rows[1] - above), slice(columns[0] - left, columns[1] - left)


def _reader(source: Path, raster: Any, reading: ReadingConfig) -> Callable[[Window], Picture]:
    """What reads a window as a photo is read: by what its tags say, and by `reading`."""
    with source.open("rb") as stream, tiff.opened(stream) as file:
        layout = tiff.read_layout(file, limited=False)
    if layout.size != (raster.width, raster.height) or layout.count != raster.count:
        raise ValueError(
            f"GDAL sees {raster.count} bands of {raster.width} x {raster.height} pixels, and its "
            f"tags {layout.count} of {layout.size[0]} x {layout.size[1]}; give it as a photo"
        )
    if layout.orientation != 1:
        raise ValueError("it is to be turned, which its position on Earth is not")

    def values(window: Window) -> Shaped[np.ndarray, "H W c"]:
        bands = raster.read(window=window)
        if layout.masked:
            bands = np.concatenate(
                [bands, raster.read_masks([1], window=window)], dtype=bands.dtype
            )
        return np.moveaxis(bands, 0, 2)

    sample = np.zeros((0, 0, layout.count + layout.masked), raster.dtypes[0])
    to_see = known_span(layout, reading) is None or layout.alpha is not None
    if to_see or may_hide_marks(layout, reading):
        # The pixels of a photo's sample, without ever holding more than some rows of the raster.
        step = every_nth(layout.size)
        height = max(1, raster.block_shapes[0][0])
        parts = []
        for top in range(0, raster.height, height):
            first = -top % step
            if top + first < min(raster.height, top + height):
                rows = values(((top, min(raster.height, top + height)), (0, raster.width)))
                parts.append(rows[first::step, ::step])
        sample = np.concatenate(parts)
    rule, _ = make_rule(layout, reading, sample)
    return lambda window: show(values(window), layout, rule)


def open_rasterio() -> Any:
    """Import rasterio.

    Raises:
        SetupError: The extra `geo` is missing.
    """
    with needs_extra("geo", "GeoTIFFs need rasterio"):
        import rasterio
        import rasterio.errors
    return rasterio
