"""One step of a method: schedules, gradients of the global batch, and no bad number let through."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from iddc.config import Experiment
from iddc.images import ImageFile
from iddc.learning.batches import loaded_batches
from iddc.learning.embeddings import EmbeddingCache, Inputs, Shared
from iddc.learning.gradients import Pieces, StepResult, images_at_once
from iddc.learning.guards import RECENT, live_clusters, not_finite
from iddc.methods import build_method, completed, find_method, new_network
from iddc.methods.method import Collection, Group, Images, Method
from iddc.network import Network
from iddc.processes import Processes
from iddc.schedules import backbone_trains, poly
from iddc.views import draw_patches


class Learner:
    """A method, its network and its optimiser, and how many steps they have done.

    With `training.heads`, several copies of the method learn from the same batches, each with a
    head of its own, and the network has the one of the lowest loss in the last steps.
    """

    def __init__(
        self,
        experiment: Experiment,
        num_images: int,
        processes: Processes,
        micro_batch_size: int = 0,
        shared: Shared | None = None,
        note: Callable[[str], object] = warnings.warn,
        network: Network | None = None,
    ) -> None:
        self.experiment = experiment = completed(experiment)
        kind, training = find_method(experiment.method), experiment.training
        self.plan = kind.plan(experiment, num_images)
        self.processes = processes
        self.note = note
        self.step = 0
        """Steps done."""
        self.step_complete = True
        """No step is half done. The death of a data worker can interrupt it anywhere."""

        # The backbone never updates batch statistics or drops anything, even when it trains: a
        # step must not depend on how its batch is cut.
        self.network = (network or new_network(experiment)).to(processes.device)
        processes.sync(self.network)
        self.network.train().backbone.eval()
        self.network.backbone.requires_grad_(training.end_to_end)
        self.methods = nn.ModuleList(
            build_method(experiment, self.network, index) for index in range(training.heads)
        ).to(processes.device)
        for index in range(1, training.heads):
            self._of(index).share(self._of(0))
        processes.sync(self.methods)
        self.best_head = 0
        """The index of the network's head among those of all methods."""
        self.network.head = self.method.head

        groups = [
            {"params": [*group.parameters], "lr": group.rate, "weight_decay": group.decay}
            for group in self._groups(0)
        ]
        self.optimizer = torch.optim.AdamW(groups) if groups else None
        self.micro_batch_size = micro_batch_size or images_at_once(
            self.network.backbone,
            experiment.views.crop_size,
            processes.device,
            end_to_end=training.end_to_end,
        )
        views = shared.views if shared else None
        self.cache = EmbeddingCache(
            self.network, experiment, processes.device, self.micro_batch_size, views, note
        )
        self.losses = torch.zeros(len(self.methods), device=processes.device)
        """The mean loss of each head in the last steps."""
        self.cluster_shares = self.losses.new_zeros(len(self.methods), self.network.num_clusters)
        """The part of the patches that each cluster of each head won in them."""

    @property
    def method(self) -> Method:
        """The method whose head the network has."""
        return self._of(self.best_head)

    def _of(self, index: int) -> Method:
        return cast("Method", self.methods[index])

    # What comes in -------------------------------------------------------------------------------

    def stages(self) -> Iterator[tuple[int | None, range]]:
        """The steps that are left, between one refit and the next.

        Yields:
            The epoch before which the method is fitted now, None in the middle of a stage; and the
            steps that follow.
        """
        plan = self.plan
        epochs = sorted({0, *self.method.refits(plan.epochs), plan.epochs})
        starts = [min(epoch * plan.steps_per_epoch, plan.steps) for epoch in epochs]
        for epoch, (start, stop) in zip(epochs, pairwise([*starts, plan.steps]), strict=True):
            if self.step < stop or epoch == plan.epochs:
                begun = start < self.step
                yield None if begun else epoch, range(max(start, self.step), stop)

    @contextmanager
    def batches(
        self, files: Sequence[ImageFile], workers: int, steps: range
    ) -> Iterator[Iterator[Inputs]]:
        """This process's part of the batch of each step."""
        with loaded_batches(
            files,
            self.experiment,
            self.plan,
            self.processes,
            workers,
            self.cache,
            self.method.partners,
            steps,
        ) as batches:
            yield (self.cache.inputs(wanted, made) for wanted, made in batches)

    def refit(self, collection: Collection, epoch: int) -> dict[str, float | int]:
        """Fit every head's method to all images; what the log says of the best one's."""
        found = []
        for index in range(len(self.methods)):
            # What a method draws here follows from the seed, and the caller's numbers stay.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                own = np.random.SeedSequence((self.experiment.seed, index, 2, epoch))
                torch.default_generator.manual_seed(int(own.generate_state(1)[0]))
                found.append(dict(self._of(index).refit(collection, epoch, self.plan.epochs)))
        self.processes.sync(self.methods)
        return found[self.best_head]

    # What is done with it ------------------------------------------------------------------------

    def learn(self, inputs: Inputs, counts: Sequence[int]) -> dict[str, float]:
        """Do one step on the images of all processes; with fewer than two images, do nothing.

        Args:
            inputs: The images of this process.
            counts: How many images each process has.

        Returns:
            What the log says of the step. Where a number is not finite, no weight has changed.
        """
        if sum(counts) < 2:
            self.step += 1
            return {}
        if self.optimizer:
            self.optimizer.zero_grad()  # to None: Adam leaves a frozen backbone alone
        results: dict[int, StepResult] = {}
        for index in self._learning_heads():
            # Rows see images one by one and hold all parameters; the loss sees all and holds none.
            method, pieces = self._of(index), self._pieces(index, inputs, counts)
            batch, rows = pieces.forward()
            terms = method.loss(batch, rows)
            pieces.backward(terms["loss"])
            results[index] = StepResult.of(terms, batch, rows)
            self.micro_batch_size = pieces.at_once
        return self._take(results)

    def _learning_heads(self) -> Sequence[int]:
        """All heads; end to end, the best one alone from the moment the backbone trains."""
        training = self.experiment.training
        settled = training.end_to_end and self.plan.progress(self.step) >= training.backbone_from
        return [self.best_head] if settled else range(len(self.methods))

    def _pieces(self, index: int, inputs: Inputs, counts: Sequence[int]) -> Pieces:
        training, progress = self.experiment.training, self.plan.progress(self.step)
        return Pieces(
            self._of(index),
            self.network,
            inputs.views,
            self._images(inputs, counts),
            processes=self.processes,
            counts=counts,
            at_once=self.micro_batch_size,
            precision=training.precision,
            train_backbone=training.end_to_end
            and backbone_trains(progress, training.backbone_from, training.backbone_until),
            valid=inputs.valid,
            note=self.note,
        )

    def _take(self, results: dict[int, StepResult]) -> dict[str, float]:
        """Update what learns from the results of the heads; what the log says of the best one."""
        # What the step says, and whether all of it is finite.
        losses, shares = self.losses.clone(), self.cluster_shares.clone()
        for index, result in results.items():
            losses[index].lerp_(result.terms["loss"], 1 / min(self.step + 1, RECENT))
            if result.cluster_shares is not None:
                shares[index].lerp_(result.cluster_shares, 1 / min(self.step + 1, RECENT))
        numbers_of = {
            index: self._numbers(index, result, shares[index]) for index, result in results.items()
        }
        groups = self._groups(self.step)
        numbers = next((n for n in numbers_of.values() if not_finite(n)), None)

        # The update, from which an error on the way leaves nothing half done.
        self.step_complete = False
        if numbers is None:
            self._update(groups, results)
            self.losses, self.cluster_shares = losses, shares
            if len(numbers_of) > 1:  # the first process chooses: machines may round differently
                self.best_head = self.processes.broadcast(int(losses.argmin()))
            numbers = numbers_of[self.best_head]
        self.network.head = self.method.head
        self.step += 1
        self.step_complete = True
        head = {"head": float(self.best_head + 1)} if len(self.methods) > 1 else {}
        rate = {"learning_rate": groups[0].rate} if groups else {}
        return {**numbers, **rate, **head}

    def _images(self, inputs: Inputs, counts: Sequence[int]) -> Images:
        """Which images this process has in the step."""
        seed, patches = self.experiment.seed, None
        if self.experiment.training.patches:
            all_patches = self.network.backbone.num_patches(self.experiment.views.crop_size)
            patches = draw_patches(all_patches, self.experiment.training.patches, seed, self.step)
        start = sum(counts[: self.processes.rank])
        return Images(
            seed=seed,
            step=self.step,
            steps=self.plan.steps,
            total=sum(counts),
            positions=torch.arange(start, start + len(inputs.ids)),
            ids=torch.tensor(inputs.ids, dtype=torch.int64),
            partners=torch.tensor(inputs.partners, dtype=torch.int64),
            boxes=inputs.boxes,
            patches=patches,
        )

    def _groups(self, step: int) -> list[Group]:
        """What learns, and how fast in a step: every head's method, and the backbone end to end."""
        training, plan = self.experiment.training, self.plan
        progress = plan.progress(step, training.schedule_step) if plan.steps else 0.0
        each = [self._of(index).groups(progress) for index in range(len(self.methods))]
        groups = [
            Group([*chain(*(g.parameters for g in alike))], alike[0].rate, alike[0].decay)
            for alike in zip(*each, strict=True)
        ]
        if training.end_to_end:
            rate = training.backbone_learning_rate * poly(progress, training.power)
            groups.append(Group([*self.network.backbone.parameters()], rate))
        return groups

    def _update(self, groups: Sequence[Group], results: dict[int, StepResult]) -> None:
        """One step of Adam, and what the methods do after it."""
        for index in results:
            for group in self._of(index).groups(self.plan.progress(self.step)):
                if group.clip < math.inf:
                    learning = [p for p in group.parameters if p.grad is not None]
                    torch.nn.utils.clip_grad_norm_(learning, group.clip)
        if self.optimizer:
            for settings, group in zip(self.optimizer.param_groups, groups, strict=True):
                settings["lr"], settings["weight_decay"] = group.rate, group.decay
            self.optimizer.step()
        with torch.no_grad():
            for index, result in results.items():
                self._of(index).update(result.batch, result.rows)

    def _numbers(self, index: int, result: StepResult, shares: Tensor) -> dict[str, float]:
        """What the log says of a head that has learned."""
        weights = chain(self.methods[index].parameters(), self.network.backbone.parameters())
        gradients = [p.grad.norm() for p in weights if p.grad is not None]
        values = dict(result.terms)
        if gradients:
            values["gradient_norm"] = torch.stack(gradients).norm()
        if "logits" in result.rows:
            values["live_clusters"] = live_clusters(shares)
        # One transfer from the GPU for all of them.
        row = torch.stack([value.float() for value in values.values()]).tolist()
        return dict(zip(values, row, strict=True))

    # What is kept --------------------------------------------------------------------------------

    @property
    def trained(self) -> nn.Module:
        """The best head, or the network with it if the backbone trains."""
        return self.network if self.experiment.training.end_to_end else self.network.head

    def facts(self) -> dict[str, Any]:
        """What a diagnosis says beside the numbers of the steps."""
        return {"shares": self.cluster_shares[self.best_head].tolist()}

    def describe_choice(self) -> str:
        """Which of several heads the network has, and why, in one line."""
        losses = self.losses.tolist()
        rest = [f"{loss:.3f}" for i, loss in enumerate(losses) if i != self.best_head]
        return (
            f"Kept head {self.best_head + 1}, the best of {len(losses)} (final loss "
            f"{losses[self.best_head]:.3f}; the other{'s' if len(rest) > 1 else ''}: "
            f"{', '.join(rest)})."
        )

    @property
    def _learning(self) -> nn.ModuleList:
        """All that learns."""
        alone = not self.experiment.training.end_to_end
        return nn.ModuleList([self.methods] if alone else [self.methods, self.network.backbone])

    def state(self) -> dict[str, Any]:
        """What to save."""
        return {
            "step": self.step,
            "learning": self._learning.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "losses": self.losses,
            "shares": self.cluster_shares,
            "best": self.best_head,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        learning = self._learning
        for name, buffer in learning.named_buffers():
            if name in state["learning"]:  # a refit may have changed its size
                buffer.resize_(state["learning"][name].shape)
        learning.load_state_dict(state["learning"])
        if self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"].to(self.losses)
        self.cluster_shares = state["shares"].to(self.cluster_shares)
        self.best_head = state["best"]
        self.network.head = self.method.head
        self.step = state["step"]
