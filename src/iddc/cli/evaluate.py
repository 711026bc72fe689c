"""The command that scores a run on labelled images: evaluate."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from iddc.cli.options import Flat, Informing, RayAddress, ReadsLikeModel, RunPath, helpers
from iddc.cli.printing import print_json, print_scores
from iddc.config import DatasetName, ProtocolName, RefineName, Runtime
from iddc.errors import counted
from iddc.runs import Run

if TYPE_CHECKING:
    from iddc.datasets import LabelledImages, Sample
    from iddc.evaluation import Evaluation
    from iddc.segmenter import Segmenter


@dataclass(frozen=True, kw_only=True)
class Evaluate(Informing, ReadsLikeModel):
    """Score a run on labelled images. This is where labels are read, and nowhere else.

    Clusters are matched to classes one to one so that the most pixels are right; pixels of
    unmatched clusters are errors. The scores are added to RUN/scores.json, unless --limit is given.
    """

    run: RunPath
    data: Annotated[Path, arg(metavar="DIR")]
    """The data set, as downloaded; folder: DIR/{SPLIT/}images and DIR/{SPLIT/}labels, pictures of
    class ids, 255 ignored, or of the colours that classes.txt names. Or a file of annotations:
    CVAT's zip ("Segmentation mask 1.1" or COCO), a COCO JSON, or Label Studio's JSON."""
    dataset: DatasetName = "folder"
    """The kind of data set."""
    split: str = "val"
    """The part of the data set."""
    images: Annotated[
        Path | None, arg(metavar="IMAGES", help_behavior_hint="(default: beside the file)")
    ] = None
    """Where the images of a file of annotations are: a folder, a zip, or a list."""
    background: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: ignored)")
    ] = None
    """A class of this name for the pixels that a file of annotations leaves out."""
    binary: bool = False
    """Labels of a folder are masks of 0 and 255, and both are classes; else 255 is ignored."""
    protocol: ProtocolName = "full"
    """How images are resized, seen and scored; published numbers name theirs (`iddc recipes`)."""
    refine: RefineName = "none"
    """Make masks follow edges before they are scored: fast, or crf, which needs the extra `crf`."""
    matching: Literal["hungarian", "names"] = "hungarian"
    """names: also score clusters by the names that a person gave them (iddc label)."""
    save_masks: bool = False
    """Write image, truth and prediction side by side to RUN/evaluation, in colours of classes."""
    ray: RayAddress = None
    """Let the processes of a Ray cluster do the work (extra `ray`). ADDRESS is HOST:PORT, or auto
    for the cluster of this machine; without it, a cluster of this machine's cores is started."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"device"})

    def __call__(self) -> int:
        """Evaluate."""
        from iddc.datasets import fit_dataset, open_dataset
        from iddc.evaluation import PROTOCOLS, evaluate
        from iddc.progress import Progress

        # The model, and what it is scored on.
        run = Run.open(self.run)
        stamp = run.stamp
        segmenter = self.segmenter()
        dataset = open_dataset(
            self.dataset,
            self.data,
            self.split,
            binary=self.binary,
            images=self.images,
            background=self.background,
            reading=segmenter.experiment.reading,
        )
        for note in (*getattr(dataset, "notes", ()), *fit_dataset(dataset)):
            print(f"note: {note}", file=sys.stderr)
        # The labels are opened here, for the first time.
        refined = "" if self.refine == "none" else f"-{self.refine}"
        masks = self.run / "evaluation" / f"{self.dataset}-{self.split}-{self.protocol}{refined}"
        evaluation = evaluate(
            segmenter,
            dataset if self.limit is None else First(dataset, self.limit),
            PROTOCOLS[self.protocol].refined(self.refine),
            by_name=self.matching == "names",
            save_masks=masks if self.save_masks else None,
            progress=Progress(),
            helpers=helpers(self.ray, self.segmenter, gpu=self.runtime.device != "cpu"),
        )
        # A score of some images is shown and not kept: it would be read as one of all.
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
            print(f"\n{counted(evaluation.num_images, 'image')} · {self.protocol} · {where}")
            if self.save_masks:
                print(masks)
        return 0

    def segmenter(self) -> Segmenter:
        """The run's model, which reads files as is asked for."""
        from iddc.segmenter import Segmenter

        segmenter = Segmenter.load(self.run, self.runtime.device)
        segmenter.experiment = self.read_by(segmenter.experiment)
        return segmenter

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
