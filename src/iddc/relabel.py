"""A folder of masks after clusters were renamed: everything is made again, without the network.

The folder keeps the cluster of every pixel. Names, colours and merges are looked up, so that every
file of every format is right again in seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer
from PIL import Image
from pydantic import ValidationError

from iddc.config import ReadingConfig
from iddc.engines import EngineNetwork
from iddc.errors import ConfigError, DataError, IddcError, UnreadableImage
from iddc.images import (
    AS_STORED,
    ImageFile,
    address_of,
    expand_pages,
    find_images,
    open_picture,
)
from iddc.masks import FORMATS, Collection, Labels, cluster_names
from iddc.masks.collection import CLUSTERS, VALID
from iddc.masks.ids import without_gaps
from iddc.modelfile import digest_of
from iddc.progress import SILENT, Progress
from iddc.rasters import SUFFIXES, has_rasters, write_raster
from iddc.runs import WRITTEN, disk_errors, refuse_newer, write_atomic
from iddc.runs.files import TEMPORARY, read_text, write_new
from iddc.segmenter import Segmenter
from iddc.video import frames, is_video

CLAIM = "predictions.json"
"""In DIR: which model, names and windows its masks are of, so that no others are mixed in."""
_UNFINISHED = "unfinished"
_SHOWN = 3
"""How many differences a sentence names."""


@dataclass(frozen=True)
class Relabelled:
    """What was made again."""

    images: int
    formats: tuple[str, ...]


def claim(
    out: Path,
    model: Path,
    images: Path,
    segmenter: Segmenter,
    reading: ReadingConfig = AS_STORED,
    progress: Progress = SILENT,
    *,
    include_masks: bool = False,
) -> None:
    """Note in `out` which model, names and images its masks are of.

    Shards that start at once write the same note. Masks that have other names get these.

    Raises:
        ConfigError: It holds those of others, or of other windows, or something else.
        DataError, SetupError: See `relabel`.
    """
    record: dict[str, Any] = {
        "model": digest_of(model),
        "run": str(model.resolve()),
        "images": address_of(images) or str(images.resolve()),
        "include_masks": include_masks,
        "reading": reading.model_dump(mode="json"),
        "prediction": segmenter.experiment.prediction.model_dump(),
        "labels": _chosen(segmenter.labels),
    }
    if isinstance(segmenter.network, EngineNetwork):
        record["engine"] = segmenter.network.name
    path = out / CLAIM
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        # Listed first: another shard may make the note, and then its masks, at any moment.
        others = [item for item in out.iterdir() if not item.match(TEMPORARY)]
        if others and not path.exists():
            raise ConfigError(
                f"{out} holds something else than masks of iddc. Choose a new or empty folder."
            )
        # Of two models that begin at the same moment, only one may have the folder.
        if not path.exists() and write_new(path, _text(record)):
            return
    kept = read_claim(out)
    differing = [*_differences(kept, record)]
    if differing:
        raise ConfigError(
            f"{out} holds other masks: {'; '.join(differing)}. Use --out with a new folder."
        )
    names = _name_differences(kept.get("labels"), segmenter.labels)
    if names or _UNFINISHED in kept:
        if "run" not in kept:
            raise ConfigError(
                f"{out} was made with different names ({names}) by an earlier version of iddc, "
                "which kept no clusters. Use --out with a new folder."
            )
        what = f"made with different names ({names})" if names else "not renamed completely"
        with _alone(out, wait=True):
            kept = read_claim(out)  # another shard may have renamed them while we waited
            if _UNFINISHED in kept or _name_differences(kept.get("labels"), segmenter.labels):
                progress.note(f"note: {out} was {what}. Its masks get the present names.")
                _relabel(out, segmenter.labels, images=None, progress=progress)


def confirm(out: Path, labels: Labels) -> None:
    """Check, when masks were written, that nobody gave the folder other names meanwhile.

    Raises:
        ConfigError: Somebody did, so some masks have these names and some have those.
    """
    names = _name_differences(read_claim(out).get("labels"), labels)
    if names:
        raise ConfigError(
            f"Clusters were renamed while masks were written ({names}, or the other way round). "
            f"Give `iddc relabel {out}` when no predict runs any more."
        )


def read_claim(out: Path) -> dict[str, Any]:
    """Read what a folder of masks says of itself.

    Raises:
        ConfigError: It is no such folder, or a newer iddc wrote it.
    """
    path = out / CLAIM
    try:
        kept = json.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{out} holds no masks of iddc: expected {CLAIM} in it. Give the --out of predict."
        ) from None
    except (ValueError, RecursionError):
        kept = None
    if isinstance(kept, dict):
        refuse_newer(kept, path, ConfigError)
        kept = {key: value for key, value in kept.items() if key not in WRITTEN}
    if not isinstance(kept, dict) or not _is_sound(kept):
        raise ConfigError(f"{path} is damaged. Use --out with a new folder.")
    return kept


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a claim holds what `claim` writes, now or in an earlier version."""
    texts = [record.get(name, "") for name in ("model", "run", "images")]
    labels = record.get("labels", "")
    try:
        ReadingConfig.model_validate(record.get("reading", {}))
        if not isinstance(labels, str | None):  # a digest and nothing, in earlier versions
            Labels.model_validate(labels)
    except ValidationError:
        return False
    return all(isinstance(text, str) and "\0" not in text for text in texts)


def relabel(
    out: Path, labels: Labels, *, images: Path | None = None, progress: Progress = SILENT
) -> Relabelled:
    """Give all masks of a folder other names, colours and merges.

    If this is interrupted, the folder says so, and the next `predict` or `relabel` does all again.

    Args:
        out: A folder that `predict` wrote.
        labels: The names and colours of the clusters.
        images: Where the images are now, if they were moved; overlays need them.
        progress: Shows how far the work is.

    Raises:
        ConfigError: It is no such folder, another process renames it, or a format cannot hold these
            classes.
        DataError: An image is needed and missing, or an earlier iddc kept no clusters.
        SetupError: A file cannot be written.
    """
    read_claim(out)
    with _alone(out):
        return _relabel(out, labels, images=images, progress=progress)


@contextmanager
def _alone(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that renames the masks of a folder: names of two would be mixed.

    The folder itself is locked, so that no file stays in it.

    Raises:
        ConfigError: Another process renames them, and we do not wait.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk that cannot lock a folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ConfigError(
                    f"Another process gives names to the masks in {out}. Wait for it, then give "
                    "the command again."
                ) from None
        yield
    finally:
        os.close(descriptor)


def no_clusters(out: Path) -> DataError:
    """The error where a folder of masks does not keep what new names need."""
    return DataError(
        f"{out} holds no clusters: an earlier version of iddc made it, or {CLUSTERS} was deleted. "
        "Predict into a new folder."
    )


def _relabel(out: Path, labels: Labels, *, images: Path | None, progress: Progress) -> Relabelled:
    record = read_claim(out)
    record.pop(_UNFINISHED, None)
    source = images or Path(str(record.get("images", "")))
    kept = sorted(path.relative_to(out / CLUSTERS) for path in (out / CLUSTERS).rglob("*.*"))
    if "run" not in record or not kept:
        raise no_clusters(out)
    # Missing images, and a format that cannot hold these classes, are said before any change.
    reading = ReadingConfig.model_validate(record.get("reading", {}))
    if not is_video(source):
        _files(source, kept, reading)
    collections = {
        name: Collection(source, out, (name,), labels.classes)
        for name, form in FORMATS.items()
        if any((out / key).is_dir() for key in form.files)
    }
    rasters = [name for name in SUFFIXES if (out / name).is_dir()]
    # Unfinished until all is done: a run that is killed must not pass for the new names.
    write_atomic(out / CLAIM, _text({**record, "labels": _chosen(labels), _UNFINISHED: True}))

    files: list[ImageFile] = []
    with progress.job(len(kept)):
        for file, opened in _items(source, kept, reading, needs_images="overlay" in collections):
            files.append(file)
            if (out / CLUSTERS / file.name.with_suffix(".tif")).exists():
                own = [name for name in rasters if has_rasters(out, file, [name])]
                write_raster(
                    out,
                    file,
                    own,
                    collections.get("csv", Collection(source, out, (), labels.classes)),
                )
            else:
                stored = _Stored(out, file, labels, opened)
                stored.check(with_image="overlay" in collections)
                for collection in collections.values():
                    if collection.has(file):
                        collection.write(file, stored)
            progress.update(len(files), f"{len(files)}/{len(kept)}", str(file.name))
    # Files for the whole collection come last, when every image has its new names.
    for name, collection in collections.items():
        if not FORMATS[name].whole or (out / FORMATS[name].whole).exists():
            collection.finish([file for file in files if collection.has(file)])
    Collection(source, out, (), labels.classes).finish(files)
    write_atomic(out / CLAIM, _text({**record, "labels": _chosen(labels)}))
    return Relabelled(len(files), (*collections, *rasters))


@dataclass(frozen=True)
class _Stored:
    """An image whose clusters are known already; see `masks.Segmented`."""

    out: Path
    file: ImageFile
    labels: Labels
    opened: Callable[[], Image.Image]

    def check(self, *, with_image: bool) -> None:
        """Read what there is before any file of the image is written again.

        Raises:
            DataError: It is damaged, or not what `predict` wrote.
        """
        _ = self.clusters, self.classes, self.probs
        if with_image:
            _ = self.image

    @cached_property
    def image(self) -> Image.Image:
        """The image; only overlays ask for it."""
        otherwise = f"delete {self.out / 'overlay'} and give the command again."
        try:
            image = self.opened()
        except UnreadableImage as error:
            raise DataError(
                f"{error}. Its overlay cannot be made again: put the image back, or {otherwise}"
            ) from error
        height, width = self.clusters.shape
        if image.size != (width, height):
            raise DataError(
                f"{self.file.name} has {image.width} x {image.height} pixels, but its masks have "
                f"{width} x {height}: it is another image now. Put the old one back, or {otherwise}"
            )
        return image

    @cached_property
    def clusters(self) -> Integer[np.ndarray, "H W"]:
        """The cluster of every pixel."""
        path = self.out / CLUSTERS / self.file.name.with_suffix(".png")
        clusters, number = _pixels(path), len(self.labels.id2label)
        if clusters.ndim != 2 or clusters.max() >= number:
            raise DataError(
                f"{path} does not hold clusters from 0 to {number - 1}. Predict into a new folder."
            )
        return clusters.astype(np.uint16) if clusters.dtype != np.uint8 else clusters

    @cached_property
    def classes(self) -> Integer[np.ndarray, "H W"]:
        """The class of every pixel."""
        known = self.labels.classes
        return without_gaps(known.of_cluster[self.clusters], self.valid, len(known.names))

    @cached_property
    def valid(self) -> Bool[np.ndarray, "H W"] | None:
        """Which pixels hold data; None: all."""
        path = self.out / VALID / self.file.name.with_suffix(".png")
        if not path.exists():
            return None
        valid: np.ndarray = _pixels(path) != 0
        if valid.shape != self.clusters.shape:
            raise DataError(f"{path} has another size than the clusters of its image.")
        return valid

    @cached_property
    def probs(self) -> Any:
        """What `predict` wrote: a person's names do not change probabilities."""
        path = self.out / "npz" / self.file.name.with_suffix(".npz")
        if not path.exists():
            return None
        try:
            with np.load(path) as stored:
                return stored["probs"]
        except Exception as error:  # damaged archives make NumPy raise almost anything
            raise DataError(f"{path} cannot be read. Predict into a new folder.") from error


def _pixels(path: Path) -> np.ndarray:
    """A picture that `predict` wrote.

    Raises:
        DataError: It is damaged.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.asarray(image)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise DataError(f"{path} cannot be read ({error}). Predict into a new folder.") from error


def _items(
    source: Path, kept: Sequence[Path], reading: ReadingConfig, *, needs_images: bool
) -> Iterator[tuple[ImageFile, Callable[[], Image.Image]]]:
    """The images that have clusters, each with what opens it.

    Raises:
        DataError: See `_files`.
    """
    if is_video(source):
        names = {_frame_number(path): PurePosixPath(path.with_suffix(".png")) for path in kept}
        moving: Iterator[Any] = frames(source) if needs_images else repeat(None)
        for index, frame in zip(range(max(names) + 1), moving, strict=False):
            if name := names.pop(index, None):
                yield ImageFile(source, name, name.name), partial(_decoded, frame)
        if names:
            raise DataError(f"{source} has fewer frames than there are masks of it.")
        return
    for file in _files(source, kept, reading):
        yield file, partial(_opened, file, reading)


def _frame_number(path: Path) -> int:
    """The number at the end of the name of a frame: frame_000012, or 000012 in older folders."""
    return int(re.findall(r"\d+$", path.stem)[0])


def _opened(file: ImageFile, reading: ReadingConfig) -> Image.Image:
    return open_picture(file, reading=reading).image


def _decoded(frame: Image.Image) -> Image.Image:
    return frame


def _files(source: Path, kept: Sequence[Path], reading: ReadingConfig) -> list[ImageFile]:
    """The images that have clusters.

    Raises:
        DataError: One is not found.
    """
    stems = {path.with_suffix("").as_posix() for path in kept}
    found: list[ImageFile] = []
    for include_masks in (False, True):
        try:
            every = find_images(source, include_masks=include_masks).files
        except IddcError as error:
            raise DataError(f"{error} Say where the images are now with --images.") from error
        every = expand_pages(every, reading)
        found = [file for file in every if str(file.name.with_suffix("")) in stems]
        if len(found) == len(stems):
            return found
    raise DataError(
        f"Of {len(stems):,} images, {len(stems) - len(found):,} are no longer in {source}. Put "
        "them back, or say where all are now with --images."
    )


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps({**WRITTEN, **record}, indent=2) + "\n"


def _chosen(labels: Labels) -> dict[str, Any]:
    """The names and colours of labels, without the history of their edits."""
    record: dict[str, Any] = json.loads(labels.model_dump_json(exclude={"history"}))
    return record


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What else than names tells the masks of a folder from new ones."""
    if kept.get("model") != now["model"]:
        yield f"of another model (now that of {now['run']})"
    if kept.get("images") != now["images"]:
        yield f"of {kept.get('images')}, now {now['images']}"
    if kept.get("include_masks", now["include_masks"]) != now["include_masks"]:
        yield "with --include-masks" if kept["include_masks"] else "without --include-masks"
    files: Any = kept.get("reading")
    for name in ("range", "bands", "pages", "nodata") if isinstance(files, dict) else ():
        if name in files and files[name] != now["reading"][name]:
            yield f"{name} was {files[name]}, now {now['reading'][name]}"
    engines = [record.get("engine", "torch") for record in (kept, now)]
    if engines[0] != engines[1]:
        yield f"made with --engine {engines[0]}, now {engines[1]}"
    before, after = kept.get("prediction"), now["prediction"]
    if before != after:
        before = before if isinstance(before, dict) else {}
        for name in after:
            if name not in before:
                yield f"made by an earlier version of iddc, which had no {name}"
            elif before[name] != after[name]:
                yield f"{name} was {before[name]}, now {after[name]}"


def _name_differences(kept: Any, labels: Labels) -> str:
    """Which names and colours are not those of the folder; empty if there are none.

    An earlier version kept a digest of them, and nothing where nobody had named a cluster.
    """
    own = cluster_names(len(labels.id2label))
    chosen = _chosen(labels)
    if isinstance(kept, str):
        text = labels.model_dump_json(exclude={"history"})
        return "" if kept == hashlib.sha256(text.encode()).hexdigest() else "a cluster was renamed"
    before = kept if isinstance(kept, dict) else _chosen(Labels.numbered(len(own)))
    if before == chosen:
        return ""

    def called(name: str, cluster: int) -> str:
        return "unnamed" if name == own[cluster] else repr(name)

    old_names, old_colours = before.get("id2label", {}), before.get("colours", {})
    found = [
        f"cluster {cluster} was {called(old_names.get(str(cluster), ''), cluster)}, "
        f"now {called(name, cluster)}"
        for cluster, name in labels.id2label.items()
        if old_names.get(str(cluster), old_names.get(cluster)) != name
    ]
    found += [
        f"cluster {cluster} had the colour {old_colours.get(str(cluster), 'of the palette')}, now "
        f"{labels.colours.get(cluster, 'that of the palette')}"
        for cluster in labels.id2label
        if old_colours.get(str(cluster)) != labels.colours.get(cluster)
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
