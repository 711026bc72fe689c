"""Affinities of pixels, Fig. 2: of one and of two clusters and, where there are labels, classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from iddc.backbones import Backbone
from iddc.config import Experiment, Runtime
from iddc.datasets import LabelledImages
from iddc.device import autocast, pick_device
from iddc.errors import DataError, UnreadableImage
from iddc.gaps import data_patches
from iddc.images import ImageFile, Picture, open_picture
from iddc.metrics import IGNORE
from iddc.network import build_network
from iddc.progress import SILENT, Progress
from iddc.runs import WRITTEN, disk_errors, write_atomic
from iddc.thresholds import BINS, Affinities, cluster_affinities
from iddc.windows import to_working_size

IMAGES, PATCHES = 64, 128
"""How many images are looked at, and how many patches of each: 8,192 pixels in all."""
_COMPARED = 4096
"""Labelled pixels of which all pairs are compared."""


@dataclass(frozen=True)
class Analysis:
    """What the affinities of a backbone are like on some images."""

    clusters: Affinities
    """Affinities of pairs of one and of two clusters of k-means."""
    classes: Affinities | None
    """Affinities of pairs of one and of two annotated classes, where there are labels."""

    @property
    def threshold(self) -> float:
        """t+ = t- without labels, as `auto` estimates it, but from other pixels than training."""
        return round(self.clusters.equal_error_threshold(), 2)

    @property
    def crossing(self) -> float | None:
        """Where the densities of the classes cross: what the estimate stands for."""
        return round(self.classes.equal_error_threshold(), 2) if self.classes else None

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for affinities.json. Densities are over BINS steps from -1 to 1."""
        found = {"clusters": self.clusters, "classes": self.classes}
        return {
            "threshold": self.threshold,
            "labelled_crossing": self.crossing,
            **{
                name: {"same": pairs.same.tolist(), "different": pairs.different.tolist()}
                for name, pairs in found.items()
                if pairs
            },
        }


def analyze(
    files: Sequence[ImageFile],
    experiment: Experiment,
    out: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    labelled: LabelledImages | None = None,
    progress: Progress = SILENT,
) -> Analysis:
    """Look at the affinities of a backbone's embeddings and write affinities.json.

    Whole images at working size are embedded, 64 of them. Labels are compared, never learned from:
    the estimate is made before they are read.

    Args:
        files: The images.
        experiment: Of it count the backbone, K, the seed, the working size, the precision and
            whether the objective centres embeddings.
        out: The folder to write.
        runtime: How this machine works.
        labelled: Images with labels, if there are any.
        progress: Shows how far the work is.

    Raises:
        DataError: No image can be read, there are fewer distinct embeddings than clusters, or
            no labelled pixels.
        SetupError: The folder cannot be written.
    """
    # Without labels first, so that nothing of the estimate can depend on them.
    device = pick_device(runtime.device)
    backbone = build_network(experiment).backbone.to(device).eval()
    rng = np.random.default_rng(experiment.seed)
    look = _Look(backbone, experiment, rng)

    def photo(index: int) -> tuple[Picture, None]:
        side = experiment.views.short_side
        return open_picture(files[index], side, experiment.reading, settled=True), None

    vectors, _ = look.at(len(files), photo, progress)
    clusters = cluster_affinities(vectors, experiment.num_clusters, seed=experiment.seed)
    classes = None
    # With labels: what the estimate should have been.
    if labelled:

        def sample(index: int) -> tuple[Picture, np.ndarray]:
            found = labelled[index]
            return Picture(found.image), found.label

        vectors, known = look.at(len(labelled), sample, progress)
        there = torch.nonzero(known != IGNORE)[:, 0]
        if not len(there):
            raise DataError(f"Every pixel looked at in {labelled.name} is ignored.")
        kept = there[torch.from_numpy(rng.permutation(len(there))[:_COMPARED])]
        classes = Affinities.of(vectors[kept], known[kept])
    analysis = Analysis(clusters, classes)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    facts = {"backbone": experiment.backbone, "num_clusters": experiment.num_clusters}
    facts |= {"bins": BINS, "centering": experiment.objective.centering}
    text = json.dumps({**WRITTEN, **facts, **analysis.as_dict()}, indent=2)
    write_atomic(out / "affinities.json", text + "\n")
    return analysis


@dataclass(frozen=True)
class _Look:
    """Draws patches of images, and embeds them."""

    backbone: Backbone
    experiment: Experiment
    rng: np.random.Generator

    def at(
        self,
        number: int,
        read: Callable[[int], tuple[Picture, np.ndarray | None]],
        progress: Progress,
    ) -> tuple[Float[Tensor, "n d"], Int64[Tensor, " _"]]:
        """Directions of patches, as the objective sees them, and the classes at their centres."""
        device, short_side = self.backbone.mean.device, self.experiment.views.short_side
        rows, ids = [], []
        chosen = self.rng.permutation(number)[:IMAGES].tolist()
        with progress.job(len(chosen)):
            for done, index in enumerate(chosen, start=1):
                try:
                    picture, label = read(index)
                except UnreadableImage:
                    continue  # it has been named when headers were checked, or is one of many
                pixels = to_working_size(picture.image, short_side, 0)[None].to(device)
                with torch.no_grad(), autocast(device, self.experiment.training.precision):
                    maps: Tensor = self.backbone(pixels)[0].float()
                height, width = maps.shape[1:]
                # Patches at random, but none where the image has no data.
                drawn = self.rng.permutation(height * width)
                if picture.valid is not None:
                    valid = torch.from_numpy(picture.valid)
                    drawn = drawn[data_patches(valid, (height, width)).flatten().numpy()[drawn]]
                drawn = drawn[:PATCHES]
                rows.append(maps.flatten(1).T[torch.from_numpy(drawn).to(device)].cpu())
                if label is not None:
                    down = ((drawn // width + 0.5) * label.shape[0] / height).astype(int)
                    right = ((drawn % width + 0.5) * label.shape[1] / width).astype(int)
                    ids.append(torch.from_numpy(label[down, right].astype(np.int64)))
                progress.update(done, "embedding", f"image {done} of {len(chosen)}")
        if not rows:
            raise DataError("No image can be read.")
        vectors = normalize(torch.cat(rows), dim=1)
        if self.experiment.objective.centering == "batch":
            vectors = normalize(vectors - vectors.mean(0), dim=1)
        return vectors, torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)


def draw(analysis: Analysis, path: Path) -> bool:
    """Draw the densities as a PNG; False where matplotlib (extra `plots`) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    from io import BytesIO

    centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    panels = {"clusters of k-means": (analysis.clusters, analysis.threshold)}
    if analysis.classes:
        panels["annotated classes"] = (analysis.classes, analysis.classes.equal_error_threshold())
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for number, (title, (pairs, threshold)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.plot(centres, pairs.same, color="tab:red", label="of the same")
        axes.plot(centres, pairs.different, color="tab:blue", label="of different ones")
        axes.axvline(threshold, color="grey", linestyle="--", label=f"{threshold:.2f}")
        axes.set(xlabel="affinity", ylabel="density", title=f"Pairs of pixels: {title}")
        axes.set_xticks(np.linspace(-1, 1, 5))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomic(path, data.getvalue())
    return True
