"""A whole training step, beside the reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from iddc.bench.compare import Part, relative_error
from iddc.bench.data import decode_work, views_work
from iddc.bench.inputs import Case, Inputs
from iddc.bench.loss import loss_work
from iddc.bench.machine import Work
from iddc.bench.network import ROUNDED, backbone_work, head_work, once, patches_of
from iddc.config import Experiment
from iddc.device import pick_precision
from iddc.learning.embeddings import EmbeddingCache
from iddc.learning.learner import Learner
from iddc.losses import Pixels
from iddc.losses.reference import equation_8
from iddc.network import Network, build_network
from iddc.processes import Processes
from iddc.views import ViewDataset, collate_views, draw_rolls, epoch_batches

STEPS = {"cpu": 3, "cuda": 10}
"""Steps in one turn: they share the start of the decoding processes."""


def step_parts(inputs: Inputs, case: Case) -> Iterator[Part]:
    """A step with new views, and one with views seen before where the recipe repeats them."""
    yield step_part(inputs, case)
    if case.experiment(2).views.repeat:
        yield step_part(inputs, case, again=True)


def step_part(inputs: Inputs, case: Case, *, again: bool = False) -> Part:
    """From the files of a batch to new weights of the head.

    The results are the loss and the gradient's norm of the first step: later ones magnify rounding.

    Args:
        inputs: The images.
        case: Backbone and recipe.
        again: Whether the embeddings of the views are kept from an epoch before.
    """
    device, batch_size = inputs.device, len(inputs.files)
    steps = STEPS.get(device.type, STEPS["cpu"])
    files, experiment = inputs.files * steps, case.experiment(batch_size)
    learner = Learner(experiment.model_copy(update={"epochs": 1}), len(files), Processes(device))
    network = build_network(experiment).to(device)
    optimizer = torch.optim.Adam(network.head.parameters(), lr=experiment.training.learning_rate)

    def fast(*, learn: bool = True) -> tuple[float, ...]:
        if not again:  # nothing is kept yet
            at_once = learner.micro_batch_size
            learner.cache = EmbeddingCache(learner.network, experiment, device, at_once)
        learner.step = 0
        with learner.batches(files, -1, range(steps)) as batches:
            found = [learner.learn(batch, [len(batch.ids)]) if learn else {} for batch in batches]
        return tuple(found[0][name] for name in ("loss", "gradient_norm") if learn)

    def reference() -> tuple[float, ...]:
        batches = epoch_batches(len(files), batch_size, experiment.seed, 0)
        loader = DataLoader(
            ViewDataset(files, experiment.views, experiment.seed, experiment.reading),
            batch_sampler=[[(0, index) for index in batch] for batch in batches],
            collate_fn=collate_views,
        )
        found = [
            reference_step(network, batch.crops.to(device), experiment, optimizer, step)
            for step, batch in enumerate(loader)
        ]
        return found[0]

    if again:
        fast(learn=False)
    # What is kept, or computed in bf16, is rounded.
    exact = pick_precision(experiment.training.precision, device) == "fp32"
    return Part(
        name=f"step, {case.name}{', views seen before' if again else ''}",
        reference=reference,
        fast=fast,
        work=step_work(inputs, network, experiment, again=again) * steps,
        difference=relative_error,
        tolerance=1e-5 if exact and not experiment.views.repeat else ROUNDED,
        units=steps,
    )


def reference_step(
    network: Network,
    crops: UInt8[Tensor, "b 2 3 S S"],
    experiment: Experiment,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> tuple[float, float]:
    """One crop after the other in fp32, all pairs in memory, one backward pass, Adam."""
    patches = patches_of(network, experiment, step).to(crops.device)
    pixels = []
    for images, here in zip(crops.unbind(1), patches, strict=True):
        with torch.no_grad():
            features = network.embed(images)
        embeddings, logits = (
            maps.flatten(2).mT[:, here] for maps in (features, network.logits_from(features))
        )
        pixels.append(Pixels(normalize(embeddings, dim=-1), logits.softmax(dim=-1)))
    objective = experiment.objective
    rolls = draw_rolls(len(crops), objective.negatives, experiment.seed, step)
    loss = equation_8(pixels[0], pixels[1], rolls, objective).total
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norms = [weight.grad.norm() for weight in network.head.parameters() if weight.grad is not None]
    optimizer.step()
    return loss.item(), torch.stack(norms).norm().item()


def step_work(inputs: Inputs, network: Network, experiment: Experiment, *, again: bool) -> Work:
    """The sum of the parts of a step, or of those after the backbone."""
    images, side = len(inputs.files), experiment.views.crop_size
    compared = patches_of(network, experiment, 0).shape[1]
    width, terms = network.backbone.embed_dim, 1 + min(experiment.objective.negatives, images - 1)
    work = (
        head_work(network, side, compared) * (2 * images)
        + loss_work(images, compared, width, network.num_clusters, terms)
        + once(network.head) * 9  # for the head and for Adam
    )
    if again:
        return work
    return (
        work
        + decode_work(inputs.files)
        + views_work(images, side)
        + backbone_work(network, side) * (2 * images)
        + once(network.backbone)
    )
