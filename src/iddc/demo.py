"""The whole way in three minutes: draw scenes, train, compare with k-means, show the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iddc.config import Experiment, MethodName
from iddc.datasets import open_dataset
from iddc.datasets.synthetic import CLASSES, write_scenes
from iddc.errors import ConfigError
from iddc.evaluation import Evaluation, evaluate
from iddc.figures import contact_sheet
from iddc.images import find_images
from iddc.learning import fit
from iddc.masks import write_image
from iddc.methods import completed, used
from iddc.progress import SILENT, Progress
from iddc.recipes import RECIPES
from iddc.runs import Run
from iddc.segmenter import Segmenter

SCENES = 60
SHOWN = 4
"""Scenes on the contact sheet."""
_SHEET = "contact-sheet.png"
OWNED_FILES = {"scenes", "consensus", "iddc", "k-means", _SHEET}
"""What a demonstration writes; those before the consensus was the default have `iddc`."""


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration has made."""

    scores: dict[str, Evaluation]
    """The scores of each method, on scenes it has not seen."""
    sheet: Path
    """One row per scene: image, truth, k-means, consensus."""


def demo_experiment() -> Experiment:
    """The default recipe with as many clusters as there are classes."""
    folder = RECIPES["folder"].experiment()
    return folder.model_copy(
        update={
            "num_clusters": len(CLASSES),
            "backbone": "bundled",
        }
    )


def run_demo(out: Path, *, progress: Progress = SILENT) -> DemoResult:
    """Draw scenes, fit the default method and k-means, score both, save pictures.

    Args:
        out: The folder to write. A demonstration in it that was stopped goes on; a finished one is
            replaced.
        progress: Shows how far the work is.

    Raises:
        ConfigError: `out` holds something else.
    """
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= OWNED_FILES):
        raise ConfigError(f"{out} holds something else than a demo. Choose a new or empty folder.")
    finished = (out / _SHEET).exists()  # it is written last
    scenes, experiment = out / "scenes", demo_experiment()
    write_scenes(scenes, SCENES, experiment.seed)
    files = find_images(scenes / "train").files
    dataset = open_dataset("folder", scenes, "val")
    scores = {}
    methods: dict[str, MethodName] = {"k-means": "kmeans", "consensus": "consensus"}
    for name, method in methods.items():
        chosen = completed(experiment.model_copy(update={"method": method}))
        progress.note(f"{name}: {len(files)} scenes, then {len(dataset)} others to score it")
        run = Run(out / name)
        # A demonstration that was stopped keeps what it has finished.
        alike = run.has_config and used(run.experiment) == used(chosen)
        if not finished and alike and run.finished:
            segmenter = Segmenter.load(run.path)
        else:
            anew = finished or not alike
            source = str(scenes / "train")
            with Run.start(
                run.path, chosen, source=source, overwrite=anew, record=used(chosen)
            ) as run:
                network = fit(files, chosen, run, progress=progress)
            segmenter = Segmenter.of(network, chosen)
        masks = run.path / "evaluation"
        scores[name] = evaluate(segmenter, dataset, save_masks=masks, progress=progress)
        for index in range(min(SHOWN, len(dataset))):
            sample = dataset[index]
            path = run.path / "overlays" / Path(sample.name).with_suffix(".png")
            write_image(path, segmenter.predict(sample.image).overlay())
    folders = [out / name / "evaluation" for name in scores]
    names = sorted(path.name for path in folders[0].glob("*.png"))[:SHOWN]
    sheet = contact_sheet(folders, ("image", "truth", *scores), names)
    write_image(out / _SHEET, sheet)
    return DemoResult(scores, out / _SHEET)
