"""What is made of a raster of clusters: a raster of classes, polygons, and areas on the ground.

The network is not needed: all of it is made again in seconds when a cluster gets another name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer

from iddc.errors import UnreadableImage, needs_extra
from iddc.geo import ALONE, open_rasterio
from iddc.ground import ring_area
from iddc.images import ImageFile
from iddc.masks import Classes, Collection
from iddc.masks.collection import CLUSTERS
from iddc.masks.ids import write_file
from iddc.masks.shares import count_pixels, describe_image
from iddc.runs import disk_errors
from iddc.runs.files import open_atomic

GRID = 64
"""Along each side, into how many parts a raster is cut to measure areas. Within a part every pixel
has the same one: of a raster that is 1 degree high the error is below 0.01 %."""
MOST = 400_000_000
"""The most pixels of a raster whose polygons are traced; they are in memory at once."""
WGS84 = "EPSG:4326"
SUFFIXES = {"geotiff": ".tif", "geojson": ".geojson", "gpkg": ".gpkg"}
"""The files of the formats that are for rasters alone, in DIR/FORMAT."""


def has_rasters(folder: Path, file: ImageFile, formats: Sequence[str]) -> bool:
    """Whether all files of a raster are there."""
    return all(_target(folder, file, form).exists() for form in formats)


def write_raster(
    folder: Path, file: ImageFile, formats: Sequence[str], collection: Collection
) -> None:
    """Make the files of a raster of its clusters, which are in `CLUSTERS`.

    Args:
        folder: DIR.
        file: The raster.
        formats: Some of `SUFFIXES`.
        collection: What its classes mean; where it has csv, the raster is measured too.

    Raises:
        UnreadableImage: See `write_polygons`.
        SetupError: A package is missing, or a file cannot be written.
    """
    source = folder / CLUSTERS / file.name.with_suffix(".tif")
    for form in formats:
        target = _target(folder, file, form)
        if form == "geotiff":
            write_classes(source, target, collection.classes)
        else:
            write_polygons(source, target, collection.classes, form)
    if "csv" in collection.formats:
        pixels, square_metres = measure(source, collection.classes)
        record = describe_image(str(file.name), pixels, square_metres)
        write_file(folder / "parts" / "csv" / file.name.with_suffix(".json"), record)


def _target(folder: Path, file: ImageFile, form: str) -> Path:
    return folder / form / file.name.with_suffix(SUFFIXES[form])


def write_classes(source: Path, target: Path, classes: Classes) -> None:
    """Write the classes of a raster of clusters, with their colours, at the same place.

    Args:
        source: A GeoTIFF of clusters; its no-data value stands for pixels without any.
        target: The GeoTIFF to write. Ignored pixels and those without data have 255, or 65535 in 16
            bits.
        classes: The class of every cluster.

    Raises:
        SetupError: It cannot be written.
    """
    rasterio = open_rasterio()
    kind = np.promote_types(classes.of_cluster.dtype, np.min_scalar_type(len(classes.names)))
    none = int(np.iinfo(kind).max)
    colours = {index: (*map(int, colour), 255) for index, colour in enumerate(classes.colours)}
    with _opened(source) as raster:
        profile = {**raster.profile, "dtype": kind.name, "nodata": none}
        points, crs = raster.gcps
        if points:
            profile |= {"gcps": points, "crs": crs}
        if raster.rpcs:
            profile |= {"rpcs": raster.rpcs}
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(target) as file, rasterio.open(file.name, "w", **profile) as result:
            if kind == np.uint8:
                result.write_colormap(1, colours)
            for _, window in raster.block_windows(1):
                ids = _classes(raster.read(1, window=window), classes)
                result.write(
                    np.where(ids < len(classes.names), ids, none).astype(kind), 1, window=window
                )


class Areas(NamedTuple):
    """How much of a raster each class covers; the last number is that of ignored pixels."""

    pixels: Int64[np.ndarray, " n"]
    square_metres: Float[np.ndarray, " n"] | None
    """None where the place of the raster on Earth is not known."""


def measure(source: Path, classes: Classes) -> Areas:
    """Count the pixels of each class in a raster of clusters, and measure them on the ground.

    Pixels without data count for nothing.
    """
    num = len(classes.names)
    pixels, area = np.zeros(num + 1, np.int64), np.zeros(num + 1)
    with _opened(source) as raster:
        placed = _is_placed(raster)
        rows = np.unique(np.linspace(0, raster.height, GRID + 1).round().astype(int))
        columns = np.unique(np.linspace(0, raster.width, GRID + 1).round().astype(int))
        corners = _on_earth(raster, rows, columns) if placed else None
        for i, (top, bottom) in enumerate(pairwise(rows)):
            strip = raster.read(1, window=((top, bottom), (0, raster.width)))
            for j, (left, right) in enumerate(pairwise(columns)):
                part = strip[:, left:right]
                valid = part[part != raster.nodata]
                counts = count_pixels(classes.of_cluster[valid][None], num)
                pixels += counts
                if corners is not None:
                    quad = corners[[i, i, i + 1, i + 1], [j, j + 1, j + 1, j]]
                    area += counts * (ring_area(quad) / part.size)
    return Areas(pixels, area if placed else None)


class Region(NamedTuple):
    """A connected region of one class."""

    class_id: int
    rings: list[Any]
    """The outline and its holes, in the coordinates of the raster."""
    square_metres: float


def write_polygons(source: Path, target: Path, classes: Classes, form: str) -> None:
    """Write the regions of a raster of clusters as polygons with `id`, `class` and `m2`.

    Regions that touch at a corner only are two. A GeoJSON is in longitude and latitude, as RFC 7946
    asks; a GeoPackage keeps the coordinates of the raster.

    Raises:
        UnreadableImage: The place of the raster on Earth is not known, or it is too large.
        SetupError: A package is missing, or the file cannot be written.
    """
    with _opened(source) as raster:
        if not _is_placed(raster):
            raise UnreadableImage(
                source, "its place on Earth is not known, and polygons need it; use geotiff"
            )
        if raster.height * raster.width > MOST:
            raise UnreadableImage(
                source, f"it has more than {MOST // 10**6} megapixels; cut it, or use geotiff"
            )
        regions = list(_regions(raster, classes))
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write = {"geojson": _write_geojson, "gpkg": _write_gpkg}[form]
        write(target, regions, classes, raster.crs)


def _regions(raster: Any, classes: Classes) -> Iterator[Region]:
    from rasterio.features import shapes
    from rasterio.warp import transform

    ids = _classes(raster.read(1), classes)
    found = shapes(ids, mask=ids < len(classes.names), connectivity=4, transform=raster.transform)
    for geometry, value in found:
        rings = geometry["coordinates"]
        areas = []
        for ring in rings:
            dense = _dense(np.array(ring))
            areas.append(ring_area(np.array(transform(raster.crs, WGS84, *dense.T)).T))
        yield Region(int(value), rings, areas[0] - sum(areas[1:]))


def _dense(ring: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """The corners of a ring, with seven more on each edge: few projections keep edges straight."""
    steps = np.arange(8)[:, None] / 8
    parts = [a + (b - a) * steps for a, b in pairwise(ring)]
    return np.concatenate(parts)


def _write_geojson(target: Path, regions: list[Region], classes: Classes, crs: Any) -> None:
    from rasterio.warp import transform_geom

    with open_atomic(target) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for number, region in enumerate(regions):
            geometry = {"type": "Polygon", "coordinates": region.rings}
            feature = {
                "type": "Feature",
                "properties": {
                    "id": region.class_id,
                    "class": classes.names[region.class_id],
                    "m2": round(region.square_metres, 2),
                },
                "geometry": transform_geom(crs, WGS84, geometry, precision=9),
            }
            file.write(b",\n" if number else b"\n")
            file.write(json.dumps(feature, ensure_ascii=False).encode())
        file.write(b"\n]}\n")


def _write_gpkg(target: Path, regions: list[Region], classes: Classes, crs: Any) -> None:
    with needs_extra("geo", "GeoPackages need pyogrio"):
        from pyogrio import raw
    # GDAL makes the file itself, so it is made under another name and put in place when complete.
    unfinished = target.with_name(f".iddc-{target.name}.tmp.gpkg")
    with disk_errors(target):
        try:
            raw.write(  # type: ignore[no-untyped-call]
                str(unfinished),
                geometry=np.array([_well_known(region.rings) for region in regions], object),
                field_data=[
                    np.array([region.class_id for region in regions], np.int32),
                    np.array([classes.names[region.class_id] for region in regions], object),
                    np.array([region.square_metres for region in regions], np.float64),
                ],
                fields=np.array(["id", "class", "m2"], object),
                geometry_type="Polygon",
                crs=crs.to_wkt(),
                driver="GPKG",
                layer=target.stem,
            )
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def _well_known(rings: list[Any]) -> bytes:
    """A polygon as well-known binary: byte order, type 3, rings, points, coordinates."""
    parts = [np.array([1], np.uint8).tobytes(), np.array([3, len(rings)], "<u4").tobytes()]
    for ring in rings:
        parts += [np.array([len(ring)], "<u4").tobytes(), np.array(ring, "<f8").tobytes()]
    return b"".join(parts)


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    rasterio = open_rasterio()
    unplaced = rasterio.errors.NotGeoreferencedWarning
    with (
        warnings.catch_warnings(action="ignore", category=unplaced),
        rasterio.Env(**ALONE),
        rasterio.open(source.absolute(), driver="GTiff") as raster,
    ):
        yield raster


def _classes(ids: Integer[np.ndarray, "H W"], classes: Classes) -> Integer[np.ndarray, "H W"]:
    """The class of every pixel; the highest value of the type for those without one.

    The type has room for it beside the ids: of 256 classes, 255 would be the last.
    """
    kind = np.promote_types(classes.of_cluster.dtype, np.min_scalar_type(len(classes.names)))
    known = ids < len(classes.of_cluster)
    table = np.where(
        classes.of_cluster < len(classes.names), classes.of_cluster, np.iinfo(kind).max
    ).astype(kind)
    result: np.ndarray = np.where(
        known, table[np.where(known, ids, 0)], np.array(np.iinfo(kind).max, kind)
    )
    return result


def _is_placed(raster: Any) -> bool:
    return bool(raster.crs) and not raster.transform.is_identity


def _on_earth(
    raster: Any, rows: Int64[np.ndarray, " r"], columns: Int64[np.ndarray, " c"]
) -> Float[np.ndarray, "r c 2"]:
    """Longitude and latitude of the corners of a grid."""
    from rasterio.warp import transform

    y, x = np.meshgrid(rows, columns, indexing="ij")
    a, b, c, d, e, f = (*raster.transform,)[:6]
    east, north = a * x + b * y + c, d * x + e * y + f
    found = transform(raster.crs, WGS84, east.ravel(), north.ravel())
    return np.stack([np.array(each).reshape(x.shape) for each in found], axis=-1)
