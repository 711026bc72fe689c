"""Commands that use a run: predict, evaluate."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import ValidationError
from tyro.conf import arg

from iddc.cli.inform import Informing, print_json, print_scores
from iddc.cli.learn import refuse_inside, say
from iddc.cli.options import Flat, ImagesPath, Limited, RunPath
from iddc.config import DatasetName, PredictionConfig, ProtocolName, RefineName, Runtime
from iddc.errors import ConfigError, DataError, UnreadableImage
from iddc.runs import WRITTEN, Run, disk_errors, explain, refuse_newer
from iddc.runs.files import TEMPORARY, write_new

if TYPE_CHECKING:
    from PIL.Image import Image

    from iddc.datasets import LabelledImages, Sample
    from iddc.evaluation import Evaluation
    from iddc.images import ImageFile
    from iddc.masks import Collection, Labels
    from iddc.segmenter import Segmentation, Segmenter

MaskFormat = Literal[
    "png",
    "palette",
    "overlay",
    "csv",
    "coco",
    "coco-polygons",
    "cvat",
    "labelstudio",
    "labelme",
    "yolo",
    "npz",
    "geotiff",
    "geojson",
    "gpkg",
]
ModelsOwn = arg(metavar="N", help_behavior_hint="(default: the model's own)")
CLAIM = "predictions.json"
"""In DIR: which model, names and windows its masks are of, so that no others are mixed in."""


@dataclass(frozen=True, kw_only=True)
class Predict(Limited):
    """Write the masks of images, each as large as its image.

    DIR/png/a/b.png is the mask of a/b.jpg; other formats are alike, or one file of all images
    (docs/formats.md). Line i of DIR/classes.txt, from 0, names id i; DIR/legend.svg
    shows what the colours of a palette or an overlay mean. Images whose masks are there are not
    done again, so an interrupted command can be given again.
    """

    run: RunPath
    images: ImagesPath
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write, outside of IMAGES. Unreadable images are listed in DIR/skipped.csv."""
    formats: tuple[MaskFormat, ...] = ("png",)
    """png: class ids, 8 or 16 bit, 255 or 65535 ignored; palette: the same, shown in colours;
    overlay: on the image; csv: how much of each image and folder a class covers; coco,
    coco-polygons, cvat, labelstudio, labelme, yolo: for that program; npz:
    probabilities, 2 bytes a pixel and cluster. For GeoTIFFs, with the extra `geo`: geotiff, ids at
    their place on Earth; geojson, gpkg: polygons; csv beside one of these has square metres too."""
    shard: Annotated[str | None, arg(metavar="I/N", help_behavior_hint="(default: all)")] = None
    """Do every N-th image from the I-th on. All shards may write into one DIR, in any order."""
    window: Annotated[int | None, ModelsOwn] = None
    """The side of a sliding window at working size, in pixels; 0: the whole image at once."""
    overlap: Annotated[int | None, ModelsOwn] = None
    """How many pixels neighbouring windows share."""
    refine: Annotated[
        RefineName | None,
        arg(metavar="{none,fast,crf}", help_behavior_hint="(default: the model's own)"),
    ] = None
    """Make masks follow edges: fast, or crf, which needs the extra `crf`."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device", "max_unreadable"})

    def __call__(self) -> int:
        """Predict."""
        refuse_inside(self.out, self.images)
        if not self.formats:
            raise ConfigError(
                f"--formats: expected at least one of {', '.join(get_args(MaskFormat))}."
            )
        first, step = parse_shard(self.shard)
        if {"geotiff", "geojson", "gpkg"} & {*self.formats}:
            if others := {*self.formats} - {"geotiff", "geojson", "gpkg", "csv"}:
                raise ConfigError(
                    "--formats: geotiff, geojson and gpkg are for rasters and go with csv alone, "
                    f"found {', '.join(sorted(others))} too. Give two commands."
                )
            from iddc.cli.geo import predict_rasters

            return predict_rasters(self, self._segmenter())

        from iddc.images import check_images, find_images
        from iddc.video import is_video

        if is_video(self.images):
            from iddc.cli.video import predict_video

            return predict_video(self, self._segmenter())
        found = find_images(self.images, limit=self.limit)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        own = found.files[first - 1 :: step]
        allowed = self.runtime.max_unreadable if step == 1 else 1.0  # a small shard may have many
        files, unreadable = check_images(own, max_unreadable=allowed)

        from iddc.masks import FORMATS, Collection

        segmenter = self._segmenter()
        collection = Collection(self.images, self.out, self.formats, segmenter.labels.classes)
        claim(self.out, self.run, self.images, segmenter)
        for item in unreadable:
            collection.leave_out(item.file, item.reason)
        try:
            done, kept = self._predict(segmenter, collection, files, len(own), len(found.files))
        finally:
            all_skipped = collection.write_skipped(found.files)
        self._refuse_many(all_skipped, len(found.files))
        missing, skipped = collection.finish(found.files), len(own) - done
        left_out = f" ({skipped:,} skipped, see {self.out / 'skipped.csv'})" if skipped else ""
        there = f", {kept:,} of them there already," if kept else ""
        wholes = [FORMATS[name].whole for name in self.formats if FORMATS[name].whole]
        written = [FORMATS[name].whole or name for name in self.formats]
        if missing:
            written = [name for name in written if name not in wholes] or ["parts"]
        places = ", ".join(str(self.out / name) for name in written)
        say(f"masks of {done:,} images{left_out}{there} in {places}")
        if missing:
            say(
                f"{', '.join(wholes)}: not yet, {missing:,} images are missing. The shard that "
                "ends last writes them; if none does, give any of their commands again."
            )
        return 0

    def _segmenter(self) -> Segmenter:
        from iddc.segmenter import Segmenter

        segmenter = Segmenter.load(Run.open(self.run).path, self.runtime.device)
        segmenter.experiment = segmenter.experiment.model_copy(
            update={"prediction": self._prediction(segmenter)}
        )
        return segmenter

    def _prediction(self, segmenter: Segmenter) -> PredictionConfig:
        given = {"window": self.window, "overlap": self.overlap, "refine": self.refine}
        own = segmenter.experiment.prediction.model_dump()
        try:
            return PredictionConfig(**own | {k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            raise ConfigError(f"--window, --overlap: {explain(error)}") from None

    def _predict(
        self,
        segmenter: Segmenter,
        collection: Collection,
        files: Sequence[ImageFile],
        own: int,
        total: int,
    ) -> tuple[int, int]:
        """Write what is not there yet; returns how many have masks now, and had before.

        `own` counts the images of this shard and `total` those of all, unreadable ones too.
        """
        from iddc.images import ahead, open_image
        from iddc.progress import Progress

        missing = [file for file in files if not collection.has(file)]
        done, progress = len(files), Progress()
        opened: deque[ImageFile] = deque()

        def decoded(file: ImageFile) -> Image | str:
            try:
                return open_image(file)
            except UnreadableImage as error:
                return error.reason

        def images() -> Iterator[Image]:
            nonlocal done
            for file, image in ahead(decoded, missing, nbytes=_image_bytes):
                if isinstance(image, str):
                    collection.leave_out(file, image)
                    done -= 1
                    if self._too_many(own - done, total):
                        return  # those before it are still written
                else:
                    opened.append(file)
                    yield image

        def segmented() -> Iterator[tuple[ImageFile, Segmentation]]:
            probs = collection.needs_probs
            for result in segmenter.predict_all(images(), with_probs=probs, note=progress.note):
                yield opened.popleft(), result

        def write(item: tuple[ImageFile, Segmentation]) -> None:
            collection.add(*item)

        with progress.job(len(missing)):
            # Files are decoded and encoded in threads, while the network computes in this one.
            written = ahead(write, segmented(), nbytes=_result_bytes)
            for index, ((file, _), _) in enumerate(written, start=1):
                progress.update(index, f"{index}/{len(missing)}", str(file.name))
        self._refuse_many(own - done, total)
        return done, len(files) - len(missing)

    def _too_many(self, skipped: int, total: int) -> bool:
        return skipped > self.runtime.max_unreadable * total

    def _refuse_many(self, skipped: int, total: int) -> None:
        if self._too_many(skipped, total):
            raise DataError(
                f"{skipped} of {total} images cannot be read, more than the "
                f"{self.runtime.max_unreadable:.0%} allowed by --max-unreadable. See "
                f"{self.out / 'skipped.csv'}."
            )


def _image_bytes(_: ImageFile, image: Image | str | None) -> int:
    return 0 if image is None or isinstance(image, str) else 3 * image.width * image.height


def _result_bytes(item: tuple[ImageFile, Segmentation], _: object) -> int:
    _, result = item
    probs = 0 if result.probs is None else result.probs.nbytes
    return 3 * result.clusters.size + result.clusters.nbytes + probs


def parse_shard(text: str | None) -> tuple[int, int]:
    """Read I/N of --shard; without it, all images are one shard.

    Raises:
        ConfigError: It is not of this form, or I is not one of 1 to N.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", "1/1" if text is None else text)
    shard, shards = map(int, found.groups()) if found else (0, 0)
    if not 1 <= shard <= shards:
        raise ConfigError(
            f"--shard: expected I/N with I from 1 to N, such as 1/4 to 4/4, found {text!r}."
        )
    return shard, shards


def claim(out: Path, run: Path, images: Path, segmenter: Segmenter) -> None:
    """Note in `out` which model, names and images its masks are of.

    Shards that start at once write the same note.

    Raises:
        ConfigError: It holds those of others, or of other windows, or something else.
    """
    with (run / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record: dict[str, Any] = {
        "model": digest,
        "images": str(images.resolve()),
        "prediction": segmenter.experiment.prediction.model_dump(),
        **_names(segmenter.labels),
    }
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
        note = json.dumps({**WRITTEN, **record}, indent=2) + "\n"
        if not path.exists() and write_new(path, note):
            return
        try:
            kept = json.loads(path.read_text("utf-8"))
        except ValueError:
            kept = {}
    if isinstance(kept, dict):
        refuse_newer(kept, path, ConfigError)
        kept = {key: value for key, value in kept.items() if key not in WRITTEN}
    if kept != record:
        raise ConfigError(
            f"{out} holds the masks of another model, of other names, of other images or of other "
            "windows. Choose another folder, or delete it."
        )


def _names(labels: Labels) -> dict[str, str]:
    """What tells masks with these names and colours from others; nothing where nobody named any."""
    chosen = labels.model_dump_json(exclude={"history"})
    if chosen == labels.numbered(len(labels.id2label)).model_dump_json(exclude={"history"}):
        return {}
    return {"labels": hashlib.sha256(chosen.encode()).hexdigest()}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Informing, Limited):
    """Score a run on labelled images. This is where labels are read, and nowhere else.

    Clusters are matched to classes one to one so that the most pixels are right; pixels of
    unmatched clusters are errors. The scores are added to RUN/scores.json, unless --limit is given.
    """

    run: RunPath
    data: Annotated[Path, arg(metavar="DIR")]
    """The data set, as downloaded; folder: DIR/{SPLIT/}images and DIR/{SPLIT/}labels, pictures of
    class ids, 255 ignored, or of the colours that classes.txt names."""
    dataset: DatasetName = "folder"
    """Which one it is."""
    split: str = "val"
    """The part of it."""
    binary: bool = False
    """Labels of a folder are masks of 0 and 255, and both are classes; else 255 is ignored."""
    protocol: ProtocolName = "full"
    """How images are resized, seen and scored; published numbers name theirs (`iddc recipes`)."""
    refine: RefineName = "none"
    """Make masks follow edges before they are scored: fast, or crf, which needs the extra `crf`."""
    matching: Literal["hungarian", "names"] = "hungarian"
    """names: score also clusters as the classes that a person named them after (iddc label)."""
    save_masks: bool = False
    """Write image, truth and prediction side by side to RUN/evaluation, in colours of classes."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device"})

    def __call__(self) -> int:
        """Evaluate."""
        from iddc.datasets import open_dataset
        from iddc.evaluation import PROTOCOLS, evaluate
        from iddc.progress import Progress
        from iddc.segmenter import Segmenter

        run = Run.open(self.run)
        stamp = run.stamp
        dataset = open_dataset(self.dataset, self.data, self.split, binary=self.binary)
        refined = "" if self.refine == "none" else f"-{self.refine}"
        masks = self.run / "evaluation" / f"{self.dataset}-{self.split}-{self.protocol}{refined}"
        evaluation = evaluate(
            Segmenter.load(self.run, self.runtime.device),
            dataset if self.limit is None else First(dataset, self.limit),
            PROTOCOLS[self.protocol].refined(self.refine),
            by_name=self.matching == "names",
            save_masks=masks if self.save_masks else None,
            progress=Progress(),
        )
        entry = {
            "data": str(self.data.resolve()),
            "dataset": self.dataset,
            "split": self.split,
            "protocol": self.protocol,
            "refinement": self.refine,
            **evaluation.as_dict(),
        }
        self._print(evaluation, entry)
        if self.limit is None:
            run.add_score(stamp=stamp, **entry)
        if not self.json:
            where = "not written, because of --limit" if self.limit else self.run / "scores.json"
            print(f"\n{evaluation.num_images:,} images · {self.protocol} · {where}")
            if self.save_masks:
                print(masks)
        return 0

    def _print(self, evaluation: Evaluation, entry: Mapping[str, Any]) -> None:
        """Show the scores, before anything can keep them from being written."""
        from iddc.evaluation import SEEN

        for sentence in evaluation.warnings:
            print(f"warning: {sentence}", file=sys.stderr)
        if self.json:
            print_json(entry)
            return
        columns = {self.run.name: evaluation}
        if evaluation.by_name:
            columns["by name"] = replace(evaluation, scores=evaluation.by_name)
        print_scores(columns)
        if evaluation.by_name:
            print(f"\nby name: {SEEN}")


@dataclass(frozen=True)
class First:
    """The first images of a labelled data set."""

    dataset: LabelledImages
    limit: int

    @property
    def name(self) -> str:
        """As the data set's."""
        return self.dataset.name

    @property
    def num_classes(self) -> int:
        """As the data set's."""
        return self.dataset.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the data set's."""
        return self.dataset.class_names

    def __len__(self) -> int:
        return min(self.limit, len(self.dataset))

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index]
