"""Large GeoTIFFs, tile by tile: ids of classes at the same place on Earth; needs extra `geo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iddc.errors import SetupError, UnreadableImage
from iddc.masks import Classes
from iddc.runs import disk_errors
from iddc.runs.files import open_atomic

MARGIN = 64
"""How far a tile sees beyond what is kept of it, in pixels, so that tiles meet without seams."""
PERCENTILES = (2, 98)
"""Of each band that has not 8 bits: what becomes 0 and 255."""
OVERVIEW = 1024
"""The longest side of the reduced raster on which they are measured, in pixels."""


def segment_raster(
    source: Path, target: Path, classify: Callable[[Image.Image], Any], classes: Classes, tile: int
) -> None:
    """Write the classes of a GeoTIFF as one of the same size, CRS and transform.

    The first three bands are red, green and blue; of one or two bands the first is grey. Bands of
    8 bits are taken as they are, others are stretched between two `PERCENTILES`. Where the raster
    has no data the result has none: 255, or 65535 in 16 bits, as in ignored pixels. One tile is in
    memory at a time.

    Args:
        source: The GeoTIFF.
        target: The GeoTIFF to write, with the colours of the classes; complete or absent.
        classify: From an RGB image to the class of every pixel, "H W".
        classes: What they mean.
        tile: The side of what `classify` gets, in pixels; more than two margins.

    Raises:
        SetupError: The extra `geo` is missing, or the file cannot be written.
        UnreadableImage: GDAL cannot read the source, or it holds no real numbers.
    """
    rasterio = _rasterio()
    kind = classes.of_cluster.dtype
    none = int(np.iinfo(kind).max)
    colours = {index: (*map(int, colour), 255) for index, colour in enumerate(classes.colours)}
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _reading(source):
        raster = rasterio.open(source, driver="GTiff")
    with raster:
        with _reading(source):
            to_rgb = _scaling(raster)
        profile = {
            "driver": "GTiff",
            "height": raster.height,
            "width": raster.width,
            "count": 1,
            "dtype": kind.name,
            "crs": raster.crs,
            "transform": raster.transform,
            "nodata": none,
            "compress": "deflate",
            "tiled": True,
            "blockxsize": 256,
            "blockysize": 256,
            "BIGTIFF": "IF_SAFER",
        }
        with open_atomic(target) as file, rasterio.open(file.name, "w", **profile) as result:
            if kind == np.uint8:  # as far as GDAL's colour tables go
                result.write_colormap(1, colours)
            for kept, seen in _tiles(raster.height, raster.width, tile):
                with _reading(source):
                    image, valid = to_rgb(seen), raster.dataset_mask(window=kept)
                ids = classify(image)[_inside(kept, seen)].copy()
                ids[valid == 0] = none
                result.write(ids, 1, window=kept)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Tell what cannot be read from what cannot be written, which is an OSError too."""
    try:
        yield
    except _rasterio().errors.RasterioError as error:
        raise UnreadableImage(f"{source}: GDAL says: {error}") from error


Window = tuple[tuple[int, int], tuple[int, int]]
"""First and last row, first and last column, the last ones not included."""


def _tiles(height: int, width: int, tile: int) -> list[tuple[Window, Window]]:
    """What is kept of each tile, and what it sees: the margins more, as far as the raster goes."""
    step = tile - 2 * MARGIN

    def spans(size: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        if size <= tile:
            return [((0, size), (0, size))]
        kept = [(start, min(start + step, size)) for start in range(0, size, step)]
        # The last tiles are moved back, so that all are of one size.
        firsts = [max(0, min(start - MARGIN, size - tile)) for start, _ in kept]
        return [(span, (first, first + tile)) for span, first in zip(kept, firsts, strict=True)]

    return [
        ((rows, columns), (seen_rows, seen_columns))
        for rows, seen_rows in spans(height)
        for columns, seen_columns in spans(width)
    ]


def _inside(kept: Window, seen: Window) -> tuple[slice, slice]:
    (rows, columns), (above, left) = kept, (seen[0][0], seen[1][0])
    return slice(rows[0] - above, rows[1] - above), slice(columns[0] - left, columns[1] - left)


def _scaling(raster: Any) -> Callable[[Window], Image.Image]:
    """What reads a window as RGB."""
    bands = [1, 2, 3] if raster.count >= 3 else [1, 1, 1]
    kinds = {np.dtype(raster.dtypes[band - 1]) for band in bands}
    if any(kind.kind not in "uif" for kind in kinds):
        raise UnreadableImage(f"{raster.name}: its bands hold {kinds.pop()}, no real numbers")
    if kinds == {np.dtype(np.uint8)}:
        return lambda window: _image(raster.read(bands, window=window))
    scale = min(1, OVERVIEW / max(raster.height, raster.width))
    shape = (3, max(1, round(raster.height * scale)), max(1, round(raster.width * scale)))
    overview = raster.read(bands, out_shape=shape, masked=True)
    limits = []
    for band in overview:
        values = band.compressed()
        values = values[np.isfinite(values)]
        limits.append(np.percentile(values, PERCENTILES) if len(values) else np.array([0.0, 1.0]))
    low, high = np.array(limits).T[:, :, None, None]
    width = np.where(high > low, high - low, 1)

    def read(window: Window) -> Image.Image:
        values = np.nan_to_num(raster.read(bands, window=window).astype(np.float64))
        return _image(np.rint(((values - low) / width).clip(0, 1) * 255).astype(np.uint8))

    return read


def _image(bands: UInt8[np.ndarray, "3 H W"]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(bands.transpose(1, 2, 0)))


def _rasterio() -> Any:
    try:
        import rasterio
        import rasterio.errors
    except ImportError as error:
        raise SetupError(
            "GeoTIFFs need rasterio, which is not installed. Install it with `pip install "
            "'iddc[geo]'`."
        ) from error
    return rasterio
