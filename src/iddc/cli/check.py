"""The command that looks at images before anything is trained on them: check."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from iddc.cli.options import Flat, ImagesPath, Informing, ReadsPhotos
from iddc.cli.printing import print_json, print_table
from iddc.config import ConsensusConfig, Experiment, Runtime
from iddc.errors import counted
from iddc.methods import completed, find_method
from iddc.schedules import Plan

if TYPE_CHECKING:
    from iddc.images import Skipped
    from iddc.images.stock import Stock

_SHOWN = 5
"""How many values of a property, copies or unreadable files are listed."""
_GFLOP = {
    **{"vits16": 9.2, "vits8": 44.0, "vitb16": 35.0, "vitb8": 186.0},
    **{"vits14": 12.0, "vitb14": 46.0, "xcits12p16": 9.6, "xcits12p8": 37.6},
}
"""The work of a crop of 224 x 224 pixels in a backbone, in 10^9 multiplications and additions."""
_OTHER_GFLOP = 3.6
"""The work of a ResNet-18, such as the bundled backbone."""
_NO_NETWORK = 0.01
"""The work of reading colours."""
_WIDTHS = {"vits": 384, "xcits": 384, "vitb": 768}
"""The length of an embedding by the name of the backbone."""
_OTHER_WIDTH = 128
"""That of the bundled backbone."""
_PROGRAM = 0.7e9
"""Bytes of Python, PyTorch and a small backbone."""
_KEPT = 4 * 2**30
"""The most bytes of embeddings that are kept (`learning.embeddings.MEMORY`)."""
_TENSORS = 10
"""Tensors of the size of a batch that a head and its loss hold at once."""
_WHOLE = 1000
"""The shorter side of images that are not reduced, if nothing is known of them."""
_ASPECT = 4 / 3
"""The longer side of an image over the shorter one."""
_REGIONS = 0.006
"""Seconds that the regions of an image take."""
_MERGING = 12.0
"""Seconds in which the consensus is found and taught, whatever the number of images."""
_EFFICIENCY = 0.5
"""The share of the speed of a product of matrices that training reaches. CamVid with the bundled
backbone, 4 min 45 s on two cores (README), is 15 * 10^12 of these operations."""


@dataclass(frozen=True, kw_only=True)
class Check(Informing, ReadsPhotos):
    """Look at images before training: formats, ranges, masks, copies, what cannot be read.

    Nothing is written, and no network is run. The last line says whether they can be trained on;
    the exit code is 0 if they can, else 3.
    """

    images: ImagesPath
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"recipe", "backbone", "epochs", "reading", "max_unreadable"}
    )

    def __call__(self) -> int:
        """Check."""
        from iddc.images import find_images
        from iddc.images.stock import take_stock

        found = find_images(self.images, limit=self.limit, include_masks=self.include_masks)
        stock = take_stock(found.files, self.experiment.reading)
        total = len(stock.files) + len(stock.skipped)
        good = len(stock.files) >= 2 and len(stock.skipped) <= self.runtime.max_unreadable * total
        experiment = self.experiment.model_copy(update={"reading": stock.reading})
        minutes = training_minutes(experiment, len(stock.files), stock.seconds)
        notes = [*found.notes, *stock.notes]
        if self.json:
            print_json(_record(stock, notes, minutes, good=good))
            return 0 if good else 3
        print_table(
            ("what", "images"), [(name, _listed(values)) for name, values in stock.counts.items()]
        )
        for note in notes:
            print(f"note: {note}")
        for group in stock.copies[:_SHOWN]:
            print(f"the same bytes: {', '.join(str(file.name) for file in group[:_SHOWN])}")
        for item in stock.skipped[:_SHOWN]:
            print(f"unreadable: {item.file}: {item.reason}")
        line = verdict(len(stock.files), stock.skipped, minutes)
        copies = sum(len(group) - 1 for group in stock.copies)
        print(line + (f" · {copies:,} copies of others" if copies else ""))
        if good:
            images = shlex.quote(str(self.images))
            print(f"next: iddc train {images} -k K --out RUN")
            print(f"      iddc sweep {images} --out DIR    shows which K fits")
            return 0
        share = f"{self.runtime.max_unreadable:g}"
        print(
            "error: Training takes at least 2 images, and at most a share of "
            f"{share} may be unreadable (--max-unreadable). Repair or remove the files above.",
            file=sys.stderr,
        )
        return 3


def verdict(readable: int, skipped: Sequence[Skipped], minutes: float) -> str:
    """How many images can be trained on, and for how long: the last line of check."""
    bad = f", {len(skipped):,} cannot" if skipped else ""
    return (
        f"{counted(readable, 'image')} can be read{bad} · training takes about "
        f"{duration(minutes)} on this CPU"
    )


def duration(minutes: float) -> str:
    """A time as people say it."""
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{max(1, round(minutes))} min"


def training_minutes(experiment: Experiment, num_images: int, decoding: float) -> float:
    """Estimate a training on this CPU: decoding, embedding the crops, and the pairs of patches.

    Args:
        experiment: What would be trained.
        num_images: The number of images.
        decoding: How long one takes to decode, in seconds.
    """
    if not num_images:
        return 0.0
    if experiment.method == "consensus":
        options = ConsensusConfig(**experiment.options)
        return _consensus_seconds(experiment, options, num_images, decoding) / 60
    before, compared = 0.0, 128  # seconds, and the length of what is compared
    if experiment.method == "iddc":  # whose plan takes no torch
        plan = Plan.of(experiment, num_images)
        joined = experiment.objective.affinity == "coassociation"
        if joined or experiment.training.start == "consensus":
            options = ConsensusConfig()
            before = _consensus_seconds(experiment, options, num_images, decoding)
            compared = options.groupings * experiment.num_clusters if joined else compared
    else:
        experiment = completed(experiment)
        plan = find_method(experiment.method).plan(experiment, num_images)
    crop = crop_gflop(experiment.backbone)
    views, training = experiment.views, experiment.training
    epochs = max(1, plan.steps // max(1, plan.steps_per_epoch))
    new_views = min(epochs, views.repeat or epochs) * num_images
    embedding = 2 * new_views * crop * (views.crop_size / 224) ** 2
    patches = training.patches or (views.crop_size // 8) ** 2
    pairs = 2 * patches**2 * (compared + training.heads * experiment.num_clusters) / 1e9
    batch = min(training.batch_size, num_images)
    learning = 3 * plan.steps * batch * (1 + experiment.objective.negatives) * pairs
    work = (embedding + learning) / (_EFFICIENCY * _gflops())
    return (before + new_views * decoding + work) / 60


def _consensus_seconds(
    experiment: Experiment, options: ConsensusConfig, num_images: int, decoding: float
) -> float:
    """Each image and its mirror image embedded once, as a whole, divided, and all merged."""
    images = min(num_images, options.images)
    side = experiment.views.short_side or 448
    embedding = 2 * images * crop_gflop(experiment.backbone) * _ASPECT * (side / 224) ** 2
    work = embedding / (_EFFICIENCY * _gflops())
    return work + images * (decoding + _REGIONS) + _MERGING


def crop_gflop(backbone: str) -> float:
    """The work of a crop of 224 x 224 pixels in a backbone, by its name, in 10^9 operations."""
    if backbone in ("pixels", "grey"):
        return _NO_NETWORK
    name = backbone.replace("-", "")
    return next((work for key, work in _GFLOP.items() if key in name), _OTHER_GFLOP)


def crops_per_second(backbone: str) -> float:
    """Estimate how many crops of 224 x 224 pixels this CPU embeds in a second."""
    return _EFFICIENCY * _gflops() / crop_gflop(backbone)


def training_memory(experiment: Experiment, num_images: int) -> float:
    """Estimate the memory of a training on a CPU, in bytes.

    CamVid with the bundled backbone is estimated at 2.0 GB and takes 2.1 GB (README).

    Args:
        experiment: What would be trained.
        num_images: The number of images.
    """
    views, training = experiment.views, experiment.training
    name = experiment.backbone.replace("-", "")
    width = next((wide for key, wide in _WIDTHS.items() if key in name), _OTHER_WIDTH)
    side = 16 if name.endswith("16") else 8
    crop = (views.crop_size // side) ** 2
    kept = 2 * num_images * views.repeat * crop * width * 2  # both crops, in half precision
    if experiment.method == "consensus":  # whole images and their mirror images, no crops
        images = min(num_images, ConsensusConfig(**experiment.options).images)
        whole = 4 * ((views.short_side or _WHOLE) // side) ** 2 // 3
        return _PROGRAM + 2 * images * whole * width * 2
    if experiment.method == "iddc":
        batch = min(training.batch_size, num_images) * 2 * (training.patches or crop)
        step = training.heads * batch * width * 4 * _TENSORS
    else:
        experiment = completed(experiment)
        whole = 4 * ((views.short_side or _WHOLE) // side) ** 2 // 3
        images = min(num_images, int(experiment.options.get("images", num_images)))
        plan = find_method(experiment.method).plan(experiment, num_images)
        step = 0 if plan.steps else 2 * images * whole * width * 2
    return _PROGRAM + min(kept, _KEPT) + step


@cache
def _gflops() -> float:
    """How fast this machine multiplies matrices, in 10^9 operations a second."""
    side = 768
    matrix = np.ones((side, side), np.float32)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * side**3 / 1e9 / (time.perf_counter() - started))
    return best


def _listed(values: Counter[str]) -> str:
    every = [f"{name} ({count:,})" for name, count in values.most_common(_SHOWN)]
    more = [f"and {len(values) - _SHOWN} others"] if len(values) > _SHOWN else []
    return ", ".join(every + more)


def _record(stock: Stock, notes: list[str], minutes: float, *, good: bool) -> dict[str, Any]:
    return {
        "can_be_trained_on": good,
        "images": len(stock.files),
        **{name: dict(values) for name, values in stock.counts.items()},
        "reading": stock.reading.model_dump(mode="json"),
        "notes": notes,
        "copies": [[str(file.name) for file in group] for group in stock.copies],
        "unreadable": {str(item.file): item.reason for item in stock.skipped},
        "minutes": round(minutes, 1),
    }
