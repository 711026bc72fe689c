"""The product's own methods on embeddings made once: every step as in `iddc train`, no photo read.

    fit = method_recipe("stego")
    predict = fit(pictures, num_clusters, seed)

`learning.learner.Learner` does the steps, so a method is what it is in the product: its numbers in
the recipe `folder`, its batches, its refits. What differs: crops are cut from an image's grid of
embeddings, without rescaling; samples are drawn from whole images; and a single view is predicted,
without windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from embedded import Picture, Pictures
from iddc.backbones import Backbone, ClassAttention, attend, load_backbone
from iddc.config import MethodName
from iddc.images import open_image
from iddc.learning.embeddings import Embedded, Embeddings, Shared
from iddc.learning.learner import Learner
from iddc.methods import completed, find_method
from iddc.processes import Processes
from iddc.recipes import RECIPES
from iddc.windows import to_working_size


class GridCollection:
    """Pictures as a method is fitted to them. It is a `Collection`."""

    def __init__(self, pictures: Pictures, seed: int) -> None:
        self._pictures = pictures
        self._seed = seed

    def sample(self, count: int) -> Float[Tensor, "n d"]:
        """At most `count` embeddings of patches, in equal shares from all images."""
        each, rows = -(-count // len(self._pictures)), []
        for index, picture in enumerate(self._pictures.items):
            flat = picture.features[0].flatten(1).T
            drawn = np.random.default_rng((self._seed, index)).permutation(len(flat))
            rows.append(flat[torch.from_numpy(drawn[:each])].float())
        return torch.cat(rows)[:count]

    def means(self) -> tuple[Int64[Tensor, " n"], Float[Tensor, "n d"]]:
        """All indices, and the mean embedding of the central square of each image."""
        rows = []
        for picture in self._pictures.items:
            height, width = picture.features.shape[2:]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = picture.features[0, :, top : top + side, left : left + side]
            rows.append(square.float().mean((1, 2)))
        return torch.arange(len(rows)), torch.stack(rows)

    def maps(self) -> Iterator[tuple[int, Float[Tensor, "d h w"]]]:
        """The index and the embeddings of each image."""
        for index, picture in enumerate(self._pictures.items):
            yield index, picture.features[0].float()

    def pictures(
        self, count: int
    ) -> Iterator[tuple[int, Float[Tensor, "2 d h w"], UInt8[Tensor, "3 H W"]]]:
        """The index, both embeddings and the pixels of some images."""
        total, short_side = len(self._pictures), self._pictures.short_side
        for index in (i * total // min(count, total) for i in range(min(count, total))):
            image = open_image(self._pictures.files[index], short_side)
            pixels = to_working_size(image, short_side, 0)
            yield index, self._pictures.items[index].features.float(), pixels

    def attend(
        self, images: UInt8[Tensor, "b 3 H W"], targets: Float[Tensor, "k d"] | None = None
    ) -> ClassAttention:
        """What the class token of a ViT sees in images."""
        return attend(self._backbone, images, targets)

    def note(self, line: str) -> None:
        """Nobody listens."""

    @cached_property
    def _backbone(self) -> Backbone:
        return load_backbone(self._pictures.backbone)


def method_recipe(
    name: str,
    training: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[[Pictures, int, int], Callable[[Picture], Tensor]]:
    """A method of `iddc train`, with the numbers that the recipe `folder` gives it.

    Args:
        name: One of `iddc.methods.METHODS`.
        training: Other numbers of `--training.*`, for a method that reads these.
        objective: Other numbers of `--objective.*`, likewise.
        options: Other numbers of its own, such as steps=100.
    """

    def fit(pictures: Pictures, num_clusters: int, seed: int) -> Callable[[Picture], Tensor]:
        update = {
            "method": cast("MethodName", name),
            "num_clusters": num_clusters,
            "backbone": pictures.backbone,
            "seed": seed,
            "options": options,
        }
        base = RECIPES["folder"].experiment()
        update["training"] = base.training.model_copy(update=training)
        update["objective"] = base.objective.model_copy(update=objective)
        experiment = completed(base.model_copy(update=update))

        # All crops that the run asks for, so that no file is opened for them.
        plan = find_method(name).plan(experiment, len(pictures))
        views = experiment.views
        crops: Embeddings = {}
        side = round(load_backbone(pictures.backbone).num_patches(views.crop_size) ** 0.5)
        for epoch in range(min(views.repeat, plan.epochs)):
            for index, picture in enumerate(pictures.items):
                rng = np.random.default_rng((seed, epoch, index))
                crops[epoch, index] = two_crops(picture.features, side, views.max_offset, rng)

        shared = Shared(crops)
        learner = Learner(experiment, len(pictures), Processes(torch.device("cpu")), shared=shared)
        collection = GridCollection(pictures, seed)
        for epoch, steps in learner.stages():
            if epoch is not None:
                learner.refit(collection, epoch)
            with learner.batches(pictures.files, 0, steps) as batches:
                for _ in steps:
                    batch = next(batches)
                    learner.learn(batch, [len(batch.ids)])
        network = learner.network.eval()

        @torch.no_grad()
        def predict(picture: Picture) -> Float[Tensor, "k h w"]:
            return network.logits_from(picture.features[:1].float())[0].softmax(0)

        return predict

    return fit


def two_crops(
    features: Float16[Tensor, "2 d h w"], side: int, max_offset: float, rng: np.random.Generator
) -> Embedded:
    """Two overlapping windows of a grid of embeddings, or of that of the mirror image.

    Args:
        features: The embeddings of an image, and of its mirror image mirrored back.
        side: The side of a window, in patches.
        max_offset: The second window starts within this share of a side of the first.
        rng: What draws.
    """
    height, width = features.shape[2:]
    if min(height, width) < side:
        raise SystemExit(
            f"An image has {height} x {width} patches, expected at least {side} on each side: "
            "give --short-side 224 or more."
        )
    mirrored, reach = int(rng.integers(2)), round(max_offset * side)
    corners = []
    for size in (height, width):
        first = int(rng.integers(size - side + 1))
        low, high = max(0, first - reach), min(size - side, first + reach)
        corners.append((first, int(rng.integers(low, high + 1))))
    maps, boxes = [], []
    for top, left in zip(*corners, strict=True):
        window = features[mirrored, :, top : top + side, left : left + side]
        across = [left / width, (left + side) / width]
        if mirrored:  # as the mirror image has it
            window, across = window.flip(-1), across[::-1]
        maps.append(window)
        boxes.append([across[0], top / height, across[1], (top + side) / height])
    found: Float32[Tensor, "2 4"] = torch.tensor(boxes)
    return Embedded(torch.stack(maps), found)
