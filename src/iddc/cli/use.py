"""Commands that use a run: predict, evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ValidationError
from tyro.conf import arg

from iddc.cli.inform import Informing, print_json, print_scores
from iddc.cli.learn import find_readable, refuse_inside, say
from iddc.cli.options import Flat, ImagesPath, Limited, RunPath
from iddc.config import DatasetName, PredictionConfig, ProtocolName, Runtime
from iddc.errors import ConfigError, DataError, UnreadableImage
from iddc.runs import Run, disk_errors, explain, write_atomic

if TYPE_CHECKING:
    from iddc.datasets import LabelledImages, Sample
    from iddc.images import ImageFile, Skipped
    from iddc.segmenter import Segmentation, Segmenter

MaskFormat = Literal["png", "palette", "overlay"]
ModelsOwn = arg(metavar="N", help_behavior_hint="(default: the model's own)")
CLAIM = "predictions.json"
"""In DIR: which model and windows its masks are of, so that no others are mixed in."""


@dataclass(frozen=True, kw_only=True)
class Predict(Limited):
    """Write the masks of images, each as large as its image.

    DIR/png/a/b.png is the mask of a/b.jpg; DIR/palette and DIR/overlay are alike. Images whose
    masks are there are not done again, so an interrupted command can be given again.
    """

    run: RunPath
    images: ImagesPath
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write, outside of IMAGES. Unreadable images are listed in DIR/skipped.csv."""
    formats: tuple[MaskFormat, ...] = ("png",)
    """png: cluster ids, 8 or 16 bit; palette: the same, shown in colours; overlay: on the image."""
    window: Annotated[int | None, ModelsOwn] = None
    """The side of a sliding window at working size, in pixels; 0: the whole image at once."""
    overlap: Annotated[int | None, ModelsOwn] = None
    """How many pixels neighbouring windows share."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device", "max_unreadable"})

    def __call__(self) -> int:
        """Predict."""
        refuse_inside(self.out, self.images)
        if not self.formats:
            raise ConfigError("--formats: expected at least one of png, palette, overlay.")
        files, skipped = find_readable(self.images, self.limit, self.runtime)

        from iddc.segmenter import Segmenter

        segmenter = Segmenter.load(Run.open(self.run).path, self.runtime.device)
        segmenter.experiment = segmenter.experiment.model_copy(
            update={"prediction": self._prediction(segmenter)}
        )
        claim(self.out, self.run, self.images, segmenter)
        done, kept = self._predict(segmenter, files, skipped)
        left_out = f" ({len(skipped):,} skipped, see {self.out / 'skipped.csv'})" if skipped else ""
        folders = ", ".join(str(self.out / name) for name in self.formats)
        there = f", {kept:,} of them there already," if kept else ""
        say(f"masks of {done:,} images{left_out}{there} in {folders}")
        return 0

    def _prediction(self, segmenter: Segmenter) -> PredictionConfig:
        given = {"window": self.window, "overlap": self.overlap}
        own = segmenter.experiment.prediction.model_dump()
        try:
            return PredictionConfig(**own | {k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            raise ConfigError(f"--window, --overlap: {explain(error)}") from None

    def _predict(
        self, segmenter: Segmenter, files: Sequence[ImageFile], skipped: list[Skipped]
    ) -> tuple[int, int]:
        """Write what is not there yet; returns how many have masks now, and had before."""
        from iddc.images import Skipped, open_image
        from iddc.progress import Progress

        total, kept, progress = len(files) + len(skipped), 0, Progress()
        progress.begin(len(files))
        try:
            for index, file in enumerate(files, start=1):
                paths = {
                    name: self.out / name / file.name.with_suffix(".png") for name in self.formats
                }
                if all(path.exists() for path in paths.values()):
                    kept += 1
                    continue
                try:
                    result = segmenter.predict(open_image(file))
                except UnreadableImage as error:
                    skipped.append(Skipped(file, str(error).removeprefix(f"{file}: ")))
                    if len(skipped) > self.runtime.max_unreadable * total:
                        raise DataError(
                            f"{len(skipped)} of {total} images cannot be read, more than the "
                            f"{self.runtime.max_unreadable:.0%} allowed by --max-unreadable. See "
                            f"{self.out / 'skipped.csv'}."
                        ) from error
                    continue
                for name, path in paths.items():
                    write_mask(name, path, result)
                progress.update(index, f"{index}/{len(files)}", str(file.name))
        finally:
            progress.end()
            Run(self.out).write_skipped((str(item.file.name), item.reason) for item in skipped)
        return total - len(skipped), kept


def write_mask(name: MaskFormat, path: Path, result: Segmentation) -> None:
    """Write one format of one mask."""
    from iddc import masks

    if name == "png":
        masks.write_ids(path, result.clusters)
    elif name == "palette":
        masks.write_palette(path, result.clusters, result.colours)
    else:
        masks.write_image(path, result.overlay())


def claim(out: Path, run: Path, images: Path, segmenter: Segmenter) -> None:
    """Note in `out` which model and which images its masks are of.

    Raises:
        ConfigError: It holds those of others, or of other windows, or something else.
    """
    with (run / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record: dict[str, Any] = {
        "model": digest,
        "images": str(images.resolve()),
        "prediction": segmenter.experiment.prediction.model_dump(),
    }
    path = out / CLAIM
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(out.iterdir()):
            raise ConfigError(
                f"{out} holds something else than masks of iddc. Choose a new or empty folder."
            )
        try:
            kept = json.loads(path.read_text("utf-8")) if path.exists() else record
        except ValueError:
            kept = None
    if kept != record:
        raise ConfigError(
            f"{out} holds the masks of another model, of other images or of other windows. Choose "
            "another folder, or delete it."
        )
    write_atomic(path, json.dumps(record, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Informing, Limited):
    """Score a run on labelled images. This is where labels are read, and nowhere else.

    Clusters are matched to classes one to one so that the most pixels are right; pixels of
    unmatched clusters are errors. The scores are added to RUN/scores.json, unless --limit is given.
    """

    run: RunPath
    data: Annotated[Path, arg(metavar="DIR")]
    """The data set: DIR/{SPLIT/}images and DIR/{SPLIT/}labels, PNGs of class ids, 255 ignored."""
    dataset: DatasetName = "folder"
    """Its layout."""
    split: str = "val"
    """The part of it."""
    protocol: ProtocolName = "full"
    """How images are resized, seen and scored; published numbers name theirs (`iddc recipes`)."""
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
        dataset = open_dataset(self.dataset, self.data, self.split)
        masks = self.run / "evaluation" / f"{self.dataset}-{self.split}-{self.protocol}"
        evaluation = evaluate(
            Segmenter.load(self.run, self.runtime.device),
            dataset if self.limit is None else First(dataset, self.limit),
            PROTOCOLS[self.protocol],
            save_masks=masks if self.save_masks else None,
            report=Progress(),
        )
        entry = {
            "data": str(self.data.resolve()),
            "dataset": self.dataset,
            "split": self.split,
            "protocol": self.protocol,
            "refinement": "none",
            **evaluation.as_dict(),
        }
        if self.limit is None:
            run.add_score(**entry)
        if self.json:
            print_json(entry)
            return 0
        print_scores({self.run.name: evaluation})
        where = "not written, because of --limit" if self.limit else self.run / "scores.json"
        print(f"\n{evaluation.num_images:,} images · {self.protocol} · {where}")
        if self.save_masks:
            print(masks)
        return 0


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
