"""What `iddc predict --formats geotiff` does."""

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
    """Write DIR/geotiff/a/b.tif for each GeoTIFF a/b.tif, tile by tile, at its own resolution."""
    from iddc.geo import MARGIN, segment_raster
    from iddc.images import find_images
    from iddc.masks import Collection

    first, step = parse_shard(command.shard)
    found = find_images(command.images, limit=command.limit)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    classes = segmenter.labels.classes
    collection = Collection(command.images, command.out, (), classes)
    claim(command.out, command.run, command.images, segmenter)
    # No larger than the working size, so that nothing is reduced.
    tile = max(segmenter.experiment.views.short_side or TILE, 3 * MARGIN)

    def classify(image: Image.Image) -> np.ndarray:
        ids: np.ndarray = segmenter.predict(image).classes
        return ids

    done, kept, own = 0, 0, found.files[first - 1 :: step]
    for file in own:
        target = command.out / "geotiff" / file.name.with_suffix(".tif")
        if target.exists():
            done, kept = done + 1, kept + 1
            collection.take_back(file)
            continue
        try:
            if file.member is not None:
                raise UnreadableImage(file, "unpack the zip, rasters are read in parts")
            segment_raster(file.path, target, classify, classes, tile)
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
    say(
        f"masks of {done:,} rasters{left_out if done < len(own) else ''}{there} in "
        f"{command.out / 'geotiff'}"
    )
    return 0
