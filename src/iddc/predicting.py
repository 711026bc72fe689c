"""The masks of a whole collection: photos, the frames of a video, or rasters.

All three are done in one way. A shard's share of the images is gone through in order; an image
whose masks are there is not done again; one that cannot be read is listed with the reason; and who
finds that no image is missing writes the files that are about all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from iddc.cluster import ATTEMPTS, Helpers, ended_processes
from iddc.config import ReadingConfig
from iddc.errors import ConfigError, DataError, UnreadableImage
from iddc.geo import MARGIN, segment_raster
from iddc.images import (
    SURVEYED,
    ImageFile,
    Picture,
    Skipped,
    ahead,
    expand_pages,
    find_images,
    fit_layouts,
    leaves_open,
    listed,
    open_picture,
    refuse_many,
    sample,
    survey,
)
from iddc.masks import FORMATS, Collection, Labels
from iddc.masks.collection import CLUSTERS
from iddc.progress import SILENT, Progress
from iddc.rasters import SUFFIXES, has_rasters, write_raster
from iddc.relabel import claim, confirm
from iddc.segmenter import Segmentation, Segmenter
from iddc.video import frames, is_video

TILE = 1024
"""The side of a raster's tile where the model has no working size, in pixels."""
PART = 32
"""Images that a process of a cluster does at a time: so many it does again if it dies."""


@dataclass(frozen=True)
class Predicted:
    """What became of a shard of a collection."""

    kind: str
    """What its images are called: images, frames or rasters."""
    done: int
    """How many of the shard's images have masks now."""
    kept: int
    """How many of those had them before."""
    skipped: int
    """How many of the shard's images cannot be read."""
    missing: int
    """How many images of the whole collection have no masks yet. Only formats that are one file
    of all images ask; it is 0 without them."""
    outputs: tuple[Path, ...]
    """Files and folders that hold the masks."""
    waiting: tuple[str, ...]
    """Files that are written when no image is missing any more."""


def predict_collection(
    segmenter: Segmenter,
    source: Path,
    out: Path,
    formats: Sequence[str],
    *,
    model: Path,
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    include_masks: bool = False,
    max_unreadable: float = 0.05,
    progress: Progress = SILENT,
    helpers: Helpers[Segmenter] | None = None,
) -> Predicted:
    """Write the masks of a collection, each as large as its image.

    Args:
        segmenter: What predicts, with the windows and the refinement of its experiment.
        source: What `find_images` takes, or a video: frame 12 of a.mp4 is an image
            a/frame_000012.png, as CVAT calls it.
        out: The folder to write.
        formats: Names of `FORMATS`; or of `rasters.SUFFIXES`, for which every image is a GeoTIFF,
            and csv beside them.
        model: The folder of the model, to tell its masks from those of others.
        shard: (I, N): every N-th image from the I-th on, counted from 1.
        limit: Only the first images count.
        include_masks: See `find_images`.
        max_unreadable: The share of unreadable images that is accepted, in [0, 1].
        progress: Shows how far the work is.
        helpers: Processes that do the work, if this one does not.

    Raises:
        ConfigError: A format cannot hold the classes, or `out` holds something else. Masks that
            differ in their names alone get the new ones; see `relabel`. Or helpers are to do
            a video.
        DataError: There are no images, or too many of them cannot be read: masks of the others
            are written, except where a single shard's headers are unreadable. Or helpers died of
            some.
        SetupError: An extra or ffmpeg is missing, or the folder cannot be written.
    """
    # What there is, and what of it has no masks yet. Nothing is written so far.
    (first, step), video = shard, is_video(source)
    if video and helpers:
        raise ConfigError(
            f"--ray is for images, found the video {source}, which every process would decode from "
            "its beginning. Leave out --ray, or take frames out with ffmpeg first."
        )
    rasters = [name for name in formats if name in SUFFIXES]
    files: Sequence[ImageFile] = []
    if not video:
        found = find_images(source, include_masks=include_masks)
        for note in found.notes:
            progress.note(f"note: {note}")
        tiffs = _only_rasters(found.files, progress.note) if rasters else found.files
        files = expand_pages(tiffs[:limit], segmenter.experiment.reading)
    others = [name for name in formats if name not in SUFFIXES]
    collection = Collection(source, out, others, segmenter.labels.classes)

    def is_there(file: ImageFile) -> bool:
        there = has_rasters(out, file, rasters) and collection.has(file)
        return there and not collection.is_older(file)

    for remark in collection.remarks(files):
        progress.note(f"note: {remark}")
    own = files[first - 1 :: step]
    todo = [file for file in own if not is_there(file)]
    reading = segmenter.experiment.reading
    bad: list[Skipped] = []
    if not video and todo:
        # A model knows the range of the values it was trained on. Others have one range here, of
        # all images and not of a shard's, so that shards agree.
        sampled = len(files) > SURVEYED
        headers = survey([files[index] for index in sample(files)] if sampled else todo, reading)
        bad = [] if rasters or sampled else headers.skipped
        every, whole = headers, sampled or len(todo) == len(files)
        if not whole and any(leaves_open(layout, reading) for layout in headers.layouts):
            every = survey(files, reading)
        reading, remarks = fit_layouts(every.files, every.layouts, reading)
        for remark in (*every.notes, *remarks):
            progress.note(f"note: {remark}")
    if step == 1:  # of a shard the share may be larger than of all
        refuse_many({str(item.file): item.reason for item in bad}, len(files), max_unreadable)

    # The folder becomes ours, and says of each image that has no masks why.
    claim(out, model, source, segmenter, reading, progress, include_masks=include_masks)
    for file in {*own} - {*todo}:
        collection.clear_skipped(file)
    for item in bad:
        collection.mark_skipped(item.file, item.reason)

    # The work itself.
    kind = "frames" if video else "rasters" if rasters else "images"
    work = _Work(collection, rasters, reading)
    if video:
        shown: list[ImageFile] = []
        files = shown
        items = (
            (file, Picture(frame))
            for index, (file, frame) in enumerate(_frames(source, limit, shown, progress.note))
            if index % step == first - 1 and not is_there(file)
        )
        finished = _segment(segmenter, collection, items, math.inf, progress.note)
    else:
        unreadable = {item.file for item in bad}
        todo = [file for file in todo if file not in unreadable]
        most = math.inf if rasters else max_unreadable * len(files) - len(bad)
        if helpers:
            finished = _segment_elsewhere(helpers, work, todo, most)
        else:
            finished = work.segment(segmenter, todo, most, progress.note)
    written, total = 0, None if video else len(todo)
    try:
        with progress.job(total):
            for written, file in enumerate(finished, start=1):
                where = f"{written}/{total}" if total else f"frame {written:,}"
                progress.update(written, where, str(file.name))
    finally:
        reasons = collection.write_skipped(files)
    refuse_many(reasons, len(files), max_unreadable, kind)

    # What is about all images, and what became of this shard. The frames are known by now.
    own = files[first - 1 :: step]
    confirm(out, segmenter.labels)
    missing = collection.finish(files)
    wholes = {name: FORMATS[name].whole for name in others if FORMATS[name].whole}
    outputs = [wholes.get(name, name) for name in formats if not (missing and name in wholes)]
    skipped = sum(str(file.name) in reasons for file in own)
    return Predicted(
        kind,
        done=len(own) - skipped,
        kept=len(own) - skipped - written,
        skipped=skipped,
        missing=missing,
        outputs=tuple(out / name for name in outputs or ["parts"]),
        waiting=tuple(wholes.values() if missing else ()),
    )


@dataclass(frozen=True)
class _Work:
    """What is done with images, wherever it is done."""

    collection: Collection
    rasters: Sequence[str]
    reading: ReadingConfig

    def segment(
        self,
        segmenter: Segmenter,
        files: Sequence[ImageFile],
        most: float = math.inf,
        note: Callable[[str], object] = warnings.warn,
    ) -> Iterator[ImageFile]:
        """Write the masks of images, and list those that cannot be read; see `_segment`."""
        if self.rasters:
            return _segment_rasters(segmenter, self.collection, self.rasters, files, self.reading)
        return _segment(segmenter, self.collection, _photos(files, self.reading), most, note)

    def segment_all(self, segmenter: Segmenter, files: Sequence[ImageFile]) -> list[ImageFile]:
        """Do the same, and say at the end whose masks were written."""
        return [*self.segment(segmenter, files)]


def _segment_elsewhere(
    helpers: Helpers[Segmenter], work: _Work, files: Sequence[ImageFile], most_skipped: float
) -> Iterator[ImageFile]:
    """Write the masks of images in other processes, in any order; see `_segment`.

    Raises:
        DataError: Images remain that ended every process that had them. All others are done.
    """
    lost: list[ImageFile] = []
    skipped = 0
    for part, finished in helpers.spread(work.segment_all, files, 1 if work.rasters else PART):
        if finished is None:
            lost += part
            work.collection.mark_skipped(part[0], f"{ATTEMPTS} processes died that had it")
            continue
        yield from finished
        skipped += len(part) - len(finished)
        if skipped > most_skipped:
            return
    if lost:
        raise DataError(
            f"{ended_processes(len(lost), listed(map(str, lost)))} See "
            f"{work.collection.folder / 'skipped.csv'}; look whether they are damaged, or larger "
            "than the memory. All others are done."
        )


def _only_rasters(files: Sequence[ImageFile], note: Callable[[str], object]) -> Sequence[ImageFile]:
    """The TIFFs, if there are any: a preview beside them is no raster."""
    tiffs = tuple(file for file in files if file.name.suffix.lower() in (".tif", ".tiff"))
    kept = {*tiffs}
    others = [str(file.name) for file in files if file not in kept]
    if tiffs and others:
        note(f"note: no GeoTIFFs, left out ({len(others):,}): {listed(others)}")
    return tiffs or files


def _photos(
    files: Sequence[ImageFile], reading: ReadingConfig
) -> Iterator[tuple[ImageFile, Picture | str]]:
    """Each photo, decoded in threads ahead of time, or why it cannot be read."""

    def opened(file: ImageFile) -> Picture | str:
        try:
            return open_picture(file, reading=reading, settled=True)
        except UnreadableImage as error:
            return error.reason

    return ahead(opened, files, nbytes=_image_bytes)


def _frames(
    path: Path, limit: int | None, files: list[ImageFile], note: Callable[[str], object]
) -> Iterator[tuple[ImageFile, Image.Image]]:
    """Each frame of a video, under the name of an image, which is added to `files`.

    All frames are decoded, also where masks are there already or another shard makes them: few
    videos can be entered in the middle without decoding what comes before.
    """
    for index, frame in enumerate(islice(frames(path, note), limit)):
        name = f"frame_{index:06}.png"  # CVAT reads the number behind frame_
        files.append(ImageFile(path, PurePosixPath(path.stem.strip("."), name), name))
        yield files[-1], frame


def _segment(
    segmenter: Segmenter,
    collection: Collection,
    items: Iterable[tuple[ImageFile, Picture | str]],
    most_skipped: float,
    note: Callable[[str], object],
) -> Iterator[ImageFile]:
    """Write the masks of images, and list those that cannot be read; ends early if they are many.

    Files are decoded and encoded in threads, while the network computes in this one.
    """

    def readable() -> Iterator[tuple[ImageFile, Picture]]:
        skipped = 0
        for file, image in items:
            if isinstance(image, str):
                collection.mark_skipped(file, image)
                skipped += 1
                if skipped > most_skipped:
                    return  # those before it are still written
            else:
                yield file, image

    def write(item: tuple[ImageFile, Segmentation]) -> None:
        collection.add(*item)

    results = segmenter.predict_items(readable(), with_probs=collection.needs_probs, note=note)
    for (file, _), _ in ahead(write, results, nbytes=_result_bytes):
        yield file


def _segment_rasters(
    segmenter: Segmenter,
    collection: Collection,
    formats: Sequence[str],
    files: Iterable[ImageFile],
    reading: ReadingConfig,
) -> Iterator[ImageFile]:
    """Write the files of GeoTIFFs, tile by tile, and list those that cannot be read.

    The clusters are kept in DIR/parts/clusters; each format is made of them.
    """
    # No larger than the working size, so that nothing is reduced.
    tile = max(segmenter.experiment.views.short_side or TILE, 3 * MARGIN)

    clusters = Labels.numbered(segmenter.num_clusters).classes

    def classify(image: Image.Image) -> np.ndarray:
        ids: np.ndarray = segmenter.predict(image).clusters
        return ids

    for file in files:
        try:
            if file.inside != str(file.path):
                raise UnreadableImage(
                    file, "rasters are read in parts: unpack the zip, or copy the file here"
                )
            found = collection.path(CLUSTERS, file, ".tif")
            if not found.exists() or collection.is_older(file):
                segment_raster(file.path, found, classify, clusters, tile, reading)
            write_raster(collection.folder, file, formats, collection)
        except UnreadableImage as error:
            collection.mark_skipped(file, error.reason)
        else:
            collection.clear_skipped(file)
            yield file


def _image_bytes(_: ImageFile, picture: Picture | str | None) -> int:
    if not isinstance(picture, Picture):
        return 0
    return 4 * picture.image.width * picture.image.height


def _result_bytes(item: tuple[ImageFile, Segmentation], _: object) -> int:
    _, result = item
    probs = 0 if result.probs is None else result.probs.nbytes
    return 3 * result.clusters.size + result.clusters.nbytes + probs
