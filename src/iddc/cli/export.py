"""The command that turns a model into one file: export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from iddc.cli.options import Command, RunPath, fitted, say
from iddc.config import ExportFormat, ReadingConfig
from iddc.errors import ConfigError, DataError, NumericError, UnreadableImage, counted
from iddc.runs import Run, disk_errors
from iddc.runs.files import open_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

    from iddc.images import ImageFile

NUM_CHECKED = 8
"""How many images --check takes, spread over all of them."""
NUM_CALIBRATED = 32
"""How many images --int8 takes, spread over all of them."""
TARGET = 0.999
"""The share of pixels in which an exported file must agree."""
TARGET_INT8 = 0.95
"""The same of a file that computes in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a model as one file that runs without iddc: image in, cluster probabilities out.

    FILE takes uint8 RGB of any size and gives the probability of every cluster at every pixel. It
    sees the whole image at once, without windows and mirror image. Names and colours are in FILE,
    and beside it in FILE's name with .labels.json. See docs/deployment.md.
    """

    run: RunPath
    to: ExportFormat
    """onnx needs the extra `export`."""
    out: Annotated[Path, arg(metavar="FILE")]
    """The file to write, .onnx or .pt2; an existing one is replaced."""
    int8: Annotated[tuple[Path, ...] | None, arg(metavar="IMAGES", help_behavior_hint="")] = None
    """Compute in 8 bits, for onnx: a quarter of the size. The ranges of numbers are measured on 32
    images, from IMAGES or else from the training images."""
    check: Annotated[tuple[Path, ...] | None, arg(metavar="IMAGES", help_behavior_hint="")] = None
    """Check the exported file against PyTorch on 8 images, from IMAGES or else from the training
    images. If more than 0.1% of pixels differ (--int8: 5%), write nothing and exit with code 5."""

    def __call__(self) -> int:
        """Export."""
        run = Run.open(self.run)
        _check_suffix(self.out, self.to)

        from iddc import export
        from iddc.segmenter import Segmenter

        segmenter = Segmenter.load(run.path, "cpu")
        reading = segmenter.experiment.reading
        # What is missing is said before the export, which takes a while.
        chosen = None if self.check is None else choose_images(run, "--check", self.check, reading)
        calibration = None
        if self.int8 is not None:
            given = choose_images(run, "--int8", self.int8, reading, NUM_CALIBRATED)
            calibration = opened(given, fitted(given, reading), NUM_CALIBRATED)
        data = export.export(segmenter, self.to, calibration)
        if chosen is not None:
            reading = fitted(chosen, reading)
            target = TARGET if self.int8 is None else TARGET_INT8
            found = export.check(segmenter, data, self.to, opened(chosen, reading))
            outcome = (
                counted(found.num_images, "image"),
                f"largest error of a probability {found.error:.1e}",
                f"the same cluster in {found.agreement:.3%} of the pixels",
            )
            if not found.agreement >= target:
                todo = "Report this with the versions of `iddc doctor`."
                if self.int8 is not None:
                    todo = "Give --int8 images like those to segment, or leave it out."
                raise NumericError(
                    f"{self.out} was not written: on {', '.join(outcome)}, expected at least "
                    f"{target:.1%}. {todo}"
                )
            say(*outcome)
        names = json.dumps(export.label_maps(segmenter.labels), indent=2, ensure_ascii=False)
        with disk_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        labels = self.out.with_suffix(".labels.json")
        with open_atomic(labels) as names_file, open_atomic(self.out) as model_file:
            names_file.write(names.encode() + b"\n")
            model_file.write(data)
            model_file.flush()
            # From here on there are no names, rather than those of another model, until both are
            # new: the model gets its name first, then the names get theirs.
            labels.unlink(missing_ok=True)
        say(f"{self.out}, {len(data) / 1e6:,.1f} MB    next: see docs/deployment.md")
        return 0


def _check_suffix(out: Path, to: ExportFormat) -> None:
    """Refuse other names, so that no other file is replaced by mistake."""
    suffix = {"onnx": ".onnx", "torch-export": ".pt2"}[to]
    if out.suffix.lower() != suffix:
        raise ConfigError(f"--out: a file for {to} ends in {suffix}, found {out.name!r}.")


def choose_images(
    run: Run,
    option: str,
    given: Sequence[Path],
    reading: ReadingConfig,
    count: int = NUM_CHECKED,
) -> list[ImageFile]:
    """Some of the images, evenly spread; without any, of those the run was trained on."""
    from iddc.datasets.samples import find_samples, recorded_source
    from iddc.images import expand_pages, find_images

    if given:
        every = [file for source in given for file in find_images(source).files]
        files = [*expand_pages(every, reading)]
    else:
        found, why = find_samples(run, None, reading)
        if why:
            source, _ = recorded_source(run)
            where = f" Looked for {source}." if source else ""
            raise DataError(f"{why}{where} Give others: {option} IMAGES.")
        files = [*found]
    return files[:: max(1, len(files) // count)]


def opened(
    files: Sequence[ImageFile], reading: ReadingConfig, count: int = NUM_CHECKED
) -> Iterator[Image.Image]:
    """The first of them that can be read, at least one."""
    from iddc.images import open_image

    done = 0
    for file in files:
        try:
            yield open_image(file, reading=reading)
        except UnreadableImage:
            continue
        done += 1
        if done == count:
            return
    if not done:
        raise DataError(f"No readable image to look at; the first is {files[0]}.")
