"""The Segmenter of scripts and notebooks: it also scores, exports and reports.

`iddc.segmenter` lies below evaluation, export and report, which take a segmenter. This class lies
above them, and is what `from iddc import Segmenter` gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from iddc import segmenter
from iddc.config import DatasetName, ExportFormat, ProtocolName, RefineName
from iddc.datasets import open_dataset
from iddc.errors import ConfigError, NumericError
from iddc.evaluation import PROTOCOLS, Evaluation, evaluate
from iddc.export import check, export
from iddc.progress import SILENT, Progress
from iddc.report import write_report
from iddc.runs import Run, spelt_in_python, write_atomic

LEAST = 0.999
"""The share of pixels on which a file must agree with PyTorch."""
_FORMATS: dict[str, ExportFormat] = {".onnx": "onnx", ".pt2": "torch-export"}
"""What the end of a file says."""


class Segmenter(segmenter.Segmenter):
    """Learns to segment images without labels, and segments, scores, exports and reports."""

    __doc__ = segmenter.Segmenter.__doc__

    @spelt_in_python()
    def evaluate(
        self,
        data: str | Path,
        *,
        dataset: DatasetName = "folder",
        split: str = "val",
        protocol: ProtocolName = "full",
        refine: RefineName = "none",
        by_name: bool = False,
        progress: bool = True,
    ) -> Evaluation:
        """Score it on labelled images, as `iddc evaluate` does. Nothing is written.

        Args:
            data: The labelled images: a folder with images/ and labels/, or a data set.
            dataset: What kind of data set it is.
            split: The part of it.
            protocol: How images are resized, seen and scored.
            refine: How masks are made to follow edges before.
            by_name: Score also the names that a person gave.
            progress: Show on stderr how far it is.

        Raises:
            ConfigError: Nothing was trained yet.
            DataError: There are no such images, or a label is no class.
        """
        labelled = open_dataset(dataset, Path(data), split, reading=self.experiment.reading)
        how = PROTOCOLS[protocol].refined(refine)
        shown = Progress() if progress else SILENT
        return evaluate(self, labelled, how, by_name=by_name, progress=shown)

    @spelt_in_python()
    def export(
        self,
        file: str | Path,
        to: ExportFormat | None = None,
        *,
        check_on: Iterable[Image.Image] = (),
    ) -> Path:
        """Write one file that runs without this package, as `iddc export` does.

        Args:
            file: It ends in .onnx or .pt2.
            to: onnx or torch-export; as the end of the file says if not given.
            check_on: RGB images on which the file and PyTorch are compared first.

        Raises:
            ConfigError: The end of the file says nothing, or the predictor is no Network.
            SetupError: The extra `export` is missing, or the file cannot be written.
            NumericError: The file and PyTorch disagree in more than 0.1 % of the pixels.
        """
        target = Path(file)
        kind = to or _FORMATS.get(target.suffix.lower())
        if kind is None:
            raise ConfigError(
                f"export: expected a file that ends in .onnx or .pt2, found {target}."
            )
        model: Segmenter = self
        if self.device.type != "cpu":
            with TemporaryDirectory() as folder:
                self.save(folder)
                model = type(self).load(folder, "cpu")
        data = export(model, kind)
        if images := [*check_on]:
            found = check(model, data, kind, images)
            if not found.agreement >= LEAST:
                raise NumericError(
                    f"export: {target} was not written: it agrees with PyTorch on "
                    f"{found.agreement:.2%} of the pixels, expected at least {LEAST:.1%}. Report "
                    "this with the versions of `iddc doctor`."
                )
        write_atomic(target, data)
        return target

    @spelt_in_python()
    def report(
        self, file: str | Path, images: str | Path, *, samples: int = 12, progress: bool = True
    ) -> Path:
        """Write the report as one HTML file that works offline.

        It has samples, clusters, sizes and the verdict. Curves need the log of a run: `iddc report
        RUN`.

        Args:
            file: The file to write.
            images: What is looked at: a folder, a zip, a text file of paths, or one image.
            samples: How many images are shown with their masks.
            progress: Show on stderr how far it is.

        Raises:
            ConfigError: Nothing was trained yet, or the predictor is no Network.
            DataError: There are no such images.
        """
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / "segmenter")
            written = write_report(
                Run(Path(folder) / "segmenter"),
                out=Path(file),
                images=Path(images),
                samples=samples,
                device=str(self.device),
                progress=Progress() if progress else SILENT,
            )
        return written.path
