"""Prediction and evaluation of an image, beside the reference."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Integer
from PIL import Image
from torch.nn.functional import interpolate

from iddc.bench.compare import Part
from iddc.bench.inputs import Case, Inputs
from iddc.bench.machine import Work, count_flops
from iddc.bench.network import once
from iddc.canvas import windows_of
from iddc.config import Experiment
from iddc.datasets import open_dataset
from iddc.evaluation import EvalProtocol, evaluate
from iddc.metrics import IGNORE, Confusion
from iddc.network import Network, build_network
from iddc.segmenter import Segmenter
from iddc.windows import to_working_size

TIES = 0.02
"""The share of pixels that may fall to another cluster: bf16 decides near ties otherwise."""


def prediction_part(inputs: Inputs, case: Case) -> Part:
    """The clusters of every pixel of decoded images."""
    network, experiment = _trained(inputs, case)
    segmenter = Segmenter.of(network, experiment)
    dataset = open_dataset("folder", inputs.folder, "val")
    images = [dataset[index].image for index in range(len(dataset))]
    return Part(
        name=f"prediction, {case.name}",
        reference=lambda: [reference_clusters(network, image, experiment) for image in images],
        fast=lambda: [found.clusters for found in segmenter.predict_all(images)],
        work=sum((prediction_work(network, image, experiment) for image in images), Work()),
        difference=lambda a, b: float((np.stack(a) != np.stack(b)).mean()),
        tolerance=TIES,
        units=len(images),
    )


def evaluation_part(inputs: Inputs, case: Case) -> Part:
    """From image files and labels to the confusion of clusters and classes, matched and scored."""
    network, experiment = _trained(inputs, case)
    segmenter = Segmenter.of(network, experiment)
    dataset = open_dataset("folder", inputs.folder, "val")
    protocol = EvalProtocol(
        experiment.prediction, working_size="model", precision=experiment.training.precision
    )

    def reference() -> Integer[np.ndarray, "k c"]:
        shape = (network.num_clusters, dataset.num_classes)
        counts = np.zeros(shape, np.int64)
        for index in range(len(dataset)):
            sample = dataset[index]
            clusters = reference_clusters(network, sample.image, experiment)
            scored = sample.label != IGNORE
            pairs = clusters[scored].astype(np.int64) * shape[1] + sample.label[scored]
            counts += np.bincount(pairs, minlength=counts.size).reshape(shape)
        Confusion(counts).scores()
        return counts

    images = [dataset[index].image for index in range(len(dataset))]
    return Part(
        name=f"evaluation, {case.name}",
        reference=reference,
        fast=lambda: evaluate(segmenter, dataset, protocol).confusion.counts,
        work=sum((prediction_work(network, image, experiment) for image in images), Work()),
        difference=lambda a, b: float(np.abs(a - b).sum() / 2 / a.sum()),
        tolerance=TIES,
        units=len(images),
    )


def _trained(inputs: Inputs, case: Case) -> tuple[Network, Experiment]:
    experiment = case.experiment(2)
    return build_network(experiment).to(inputs.device).eval(), experiment


@torch.no_grad()
def reference_clusters(
    network: Network, image: Image.Image, experiment: Experiment
) -> Integer[np.ndarray, "H W"]:
    """One window at a time, in fp32, added up at the size at which the image is seen."""
    config, device = experiment.prediction, network.backbone.mean.device
    pixels = to_working_size(image, experiment.views.short_side, config.min_side).to(device)
    height, width = pixels.shape[1:]
    probs = torch.zeros(network.num_clusters, height, width, device=device)
    total = torch.zeros(height, width, device=device)
    tops, rows = windows_of(height, config)
    lefts, columns = windows_of(width, config)
    weight = torch.ones(rows, columns, device=device)
    if config.blend == "tent":
        down, across = (
            torch.minimum(torch.arange(n), n - 1 - torch.arange(n)) + 1.0 for n in (rows, columns)
        )
        weight = torch.outer(down, across).to(device)
    for top in tops:
        for left in lefts:
            position = np.s_[..., top : top + rows, left : left + columns]
            for mirrored in (False, True) if config.flip else (False,):
                crop = pixels[position].flip(-1) if mirrored else pixels[position]
                grid = network.probs(crop[None])
                window = interpolate(grid, size=crop.shape[1:], mode="bilinear")[0]
                probs[position] += weight * (window.flip(-1) if mirrored else window)
                total[position] += weight
    full = interpolate((probs / total)[None], size=(image.height, image.width), mode="bilinear")
    clusters: np.ndarray = full[0].argmax(dim=0).cpu().numpy()
    return clusters


def prediction_work(network: Network, image: Image.Image, experiment: Experiment) -> Work:
    """The network on every window and its mirror image; pixels, clusters and weights moved."""
    config = experiment.prediction
    height, width = to_working_size(image, experiment.views.short_side, config.min_side).shape[1:]
    (tops, rows), (lefts, columns) = windows_of(height, config), windows_of(width, config)
    passes = len(tops) * len(lefts) * (2 if config.flip else 1)
    crop = torch.zeros(1, 3, rows, columns, device=network.backbone.mean.device)
    with torch.no_grad():
        flops = count_flops(lambda: network.probs(crop))
    return Work(
        bf16=passes * flops,
        traffic=4 * image.width * image.height,
    ) + once(network)
