"""What `iddc predict` does for rasters: --formats geotiff, geojson, gpkg, and csv beside them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from iddc.cli.learn import say
from iddc.cli.use import claim, parse_shard
from iddc.errors import DataError, UnreadableImage

if TYPE_CHECKING:
    from iddc.cli.use import Predict
    from iddc.segmenter import Segmenter

TILE = 1024
"""The side of a tile where the model has no working size."""


def predict_rasters(command: Predict, segmenter: Segmenter) -> int:
    """Write DIR/geotiff/a/b.tif for each GeoTIFF a/b.tif, tile by tile, at its own resolution.

    The clusters are kept in DIR/parts/clusters; each format is made of them.
    """
    from iddc.geo import MARGIN, segment_raster
    from iddc.images import find_images
    from iddc.masks import Collection, Labels
    from iddc.rasters import CLUSTERS, has_rasters, write_raster

    first, step = parse_shard(command.shard)
    found = find_images(command.images, limit=command.limit)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    classes = segmenter.labels.classes
    tables = [name for name in command.formats if name == "csv"]
    collection = Collection(command.images, command.out, tables, classes)
    formats = [name for name in command.formats if name != "csv"]
    clusters = Labels.numbered(segmenter.num_clusters).classes
    claim(command.out, command.run, command.images, segmenter)
    # No larger than the working size, so that nothing is reduced.
    tile = max(segmenter.experiment.views.short_side or TILE, 3 * MARGIN)

    def classify(image: Image.Image) -> np.ndarray:
        ids: np.ndarray = segmenter.predict(image).clusters
        return ids

    done, kept, own = 0, 0, found.files[first - 1 :: step]
    for file in own:
        if has_rasters(command.out, file, formats) and collection.has(file):
            done, kept = done + 1, kept + 1
            collection.take_back(file)
            continue
        try:
            if file.member is not None:
                raise UnreadableImage(file, "unpack the zip, rasters are read in parts")
            found_there = command.out / CLUSTERS / file.name.with_suffix(".tif")
            if not found_there.exists():
                segment_raster(file.path, found_there, classify, clusters, tile)
            write_raster(command.out, file, formats, collection)
            collection.take_back(file)
            done += 1
        except UnreadableImage as error:
            collection.leave_out(file, error.reason)
    skipped = collection.write_skipped(found.files)
    collection.finish(found.files)
    if skipped > command.runtime.max_unreadable * len(found.files):
        raise DataError(
            f"{skipped} of {len(found.files)} rasters cannot be read, more than the "
            f"{command.runtime.max_unreadable:.0%} allowed by --max-unreadable. See "
            f"{command.out / 'skipped.csv'}."
        )
    left_out = f" ({len(own) - done:,} skipped, see {command.out / 'skipped.csv'})"
    there = f", {kept:,} of them there already," if kept else ""
    written = [command.out / name for name in formats]
    written += [command.out / form.whole for form in collection.formats.values()]
    say(
        f"masks of {done:,} rasters{left_out if done < len(own) else ''}{there} in "
        f"{', '.join(map(str, written))}"
    )
    return 0
