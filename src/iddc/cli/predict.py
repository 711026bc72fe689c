"""The command that segments images: predict."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import ValidationError
from tyro.conf import arg

from iddc.cli.export import NUM_CALIBRATED, choose_images, opened
from iddc.cli.options import (
    Flat,
    ImagesPath,
    RayAddress,
    ReadsLikeModel,
    ReadsPhotos,
    RunPath,
    fitted,
    helpers,
    refuse_inside,
    say,
)
from iddc.cli.shards import parse_shard
from iddc.config import SPEEDS, PredictionConfig, RefineName, Runtime, Speed
from iddc.errors import ConfigError, DataError, counted
from iddc.runs import Run, explain

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from iddc.config import Experiment
    from iddc.segmenter import Segmenter

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


@dataclass(frozen=True, kw_only=True)
class Predict(ReadsPhotos, ReadsLikeModel):
    """Write the masks of images, each as large as its image.

    DIR/png/a/b.png is the mask of a/b.jpg; other formats are alike, or one file of all images
    (docs/formats.md). Line i of DIR/classes.txt, from 0, names id i; DIR/legend.svg shows what the
    colours of a palette or an overlay mean. Images that have their masks are skipped, so give an
    interrupted command again to resume it.
    """

    run: RunPath
    images: ImagesPath
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write, outside of IMAGES. Unreadable images are listed in DIR/skipped.csv."""
    formats: tuple[MaskFormat, ...] = ("png",)
    """png: class ids, 8 or 16 bit, 255 or 65535 ignored; palette: the same, shown in colours;
    overlay: on the image; csv: how much of each image and folder a class covers; coco,
    coco-polygons, cvat, labelstudio, labelme, yolo: for that program (coco, labelme and yolo with
    the extra `formats`); npz: probabilities, 2 bytes a pixel and cluster. For GeoTIFFs, with the
    extra `geo`: geotiff, ids at their place on Earth; geojson, gpkg: polygons; csv beside one of
    these has square metres too."""
    shard: Annotated[str | None, arg(metavar="I/N", help_behavior_hint="(default: all)")] = None
    """Do every N-th image from the I-th on. All shards may write into one DIR, in any order. auto:
    the number of this task in an array of Slurm or AWS Batch; auto/N: in a Kubernetes Job of N."""
    speed: Annotated[
        Speed | None,
        arg(metavar="{exact,balanced,fast}", help_behavior_hint="(default: the model's own)"),
    ] = None
    """exact: windows of 224 pixels and their mirror images; balanced: as few windows as fit, not
    mirrored; fast: windows of 448 pixels at least."""
    window: Annotated[int | None, ModelsOwn] = None
    """The side of a sliding window at working size, in pixels; 0: the whole image at once."""
    overlap: Annotated[int | None, ModelsOwn] = None
    """How many pixels neighbouring windows share."""
    refine: Annotated[
        RefineName | None,
        arg(metavar="{none,fast,crf}", help_behavior_hint="(default: the model's own)"),
    ] = None
    """Make masks follow edges: fast, or crf, which needs the extra `crf`."""
    engine: Literal["torch", "onnx", "openvino"] = "torch"
    """What computes the network: PyTorch; or onnxruntime (extra `export`) or OpenVINO (extra
    `openvino`), on the CPU. At the border of clusters a few pixels differ."""
    int8: bool = False
    """With --engine onnx or openvino: compute in 8 bits. The ranges of numbers are measured once,
    on 32 training images or else on IMAGES, and kept in RUN."""
    ray: RayAddress = None
    """Let the processes of a Ray cluster do the work (extra `ray`). ADDRESS is HOST:PORT, or auto
    for the cluster of this machine; without it, a cluster of this machine's cores is started."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device", "max_unreadable"})

    def __call__(self) -> int:
        """Predict."""
        refuse_inside(self.out, self.images)
        if not self.formats:
            raise ConfigError(
                f"--formats: expected at least one of {', '.join(get_args(MaskFormat))}."
            )
        others = {*self.formats} - {"geotiff", "geojson", "gpkg", "csv"}
        if others and {"geotiff", "geojson", "gpkg"} & {*self.formats}:
            raise ConfigError(
                "--formats: geotiff, geojson and gpkg are for rasters and go with csv alone, "
                f"found {', '.join(sorted(others))} too. Give two commands."
            )
        shard = parse_shard(self.shard)

        from iddc.predicting import predict_collection
        from iddc.progress import Progress

        gpu = self.engine == "torch" and self.runtime.device != "cpu"
        predicted = predict_collection(
            self.segmenter(),
            self.images,
            self.out,
            self.formats,
            model=self.run,
            shard=shard,
            limit=self.limit,
            include_masks=self.include_masks,
            max_unreadable=self.runtime.max_unreadable,
            progress=Progress(),
            helpers=helpers(self.ray, self.segmenter, gpu=gpu),
        )
        # What was written, what was left out, and what other shards still owe.
        left_out, there = "", ""
        if predicted.skipped:
            left_out = f" ({predicted.skipped:,} skipped, see {self.out / 'skipped.csv'})"
        if predicted.kept:
            there = f", {predicted.kept:,} of them there already,"
        outputs = ", ".join(map(str, predicted.outputs))
        noun = predicted.kind.removesuffix("s")
        say(f"masks of {counted(predicted.done, noun)}{left_out}{there} in {outputs}")
        if predicted.missing:
            say(
                f"{', '.join(predicted.waiting)}: not yet, {predicted.missing:,} {predicted.kind} "
                "are missing. The shard that ends last writes them; if none does, give any of "
                "their commands again."
            )
        return 0

    def segmenter(self) -> Segmenter:
        """The run's model, with the windows and the refinement that are asked for."""
        from iddc.segmenter import Segmenter

        run = Run.open(self.run)
        segmenter = Segmenter.load(run.path, self._device())
        given = {"window": self.window, "overlap": self.overlap, "refine": self.refine}
        own = segmenter.experiment.prediction.model_dump() | (
            SPEEDS[self.speed] if self.speed else {}
        )
        try:
            config = PredictionConfig(**own | {k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            raise ConfigError(f"--window, --overlap: {explain(error)}") from None
        changed = segmenter.experiment.model_copy(update={"prediction": config})
        changed = self.read_by(changed)
        if self.engine == "torch":
            segmenter.experiment = changed
            return segmenter

        from iddc.engines import engine_network
        from iddc.network import Network

        own_network = segmenter.network
        assert isinstance(own_network, Network)  # as every run has
        network = engine_network(
            own_network,
            run.path,
            self.engine,
            changed.training.precision,
            self._crops(run, changed) if self.int8 else None,
            _note,
        )
        return Segmenter.of(network, changed, segmenter.labels)

    def _crops(self, run: Run, experiment: Experiment) -> Iterator[np.ndarray]:
        """One window of each of some images, of the training or else of IMAGES."""
        from iddc.windows import to_working_size, window_crops

        reading, config = experiment.reading, experiment.prediction
        try:
            files = choose_images(run, "--int8", (), reading, NUM_CALIBRATED)
        except DataError:  # they are gone
            files = choose_images(run, "--int8", (self.images,), reading, NUM_CALIBRATED)
        reading = fitted(files, reading)
        for index, image in enumerate(opened(files, reading, NUM_CALIBRATED)):
            pixels = to_working_size(image, experiment.views.short_side, config.min_side)
            crops = [*window_crops(pixels, config)]
            yield crops[index % len(crops)].numpy()

    def _device(self) -> str:
        """Where PyTorch computes: beside an engine, on the CPU."""
        if self.engine == "torch":
            if self.int8:
                raise ConfigError(
                    "--int8 is for --engine onnx and openvino, found --engine torch. Give one of "
                    "them, or leave out --int8."
                )
            return self.runtime.device
        if self.runtime.device not in ("auto", "cpu"):
            raise ConfigError(
                f"--engine {self.engine} computes on the CPU, found --device "
                f"{self.runtime.device}. Leave out one of the two."
            )
        return "cpu"


def _note(line: str) -> None:
    print(line, file=sys.stderr)
