"""One step of Adam: schedules, gradients of the global batch, and no bad number let through."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from iddc.config import Experiment
from iddc.errors import ConfigError
from iddc.losses import Objective
from iddc.network import build_head, build_network
from iddc.schedules import Plan, backbone_trains, poly
from iddc.thresholds import resolve_thresholds, thresholds_of
from iddc.training.checkpoint import State
from iddc.training.distributed import Processes
from iddc.training.features import Kept, RepeatedViews
from iddc.training.gradients import StepResult, backpropagate, embed_crops, images_at_once
from iddc.training.health import RECENT, live_clusters, not_finite
from iddc.views import draw_places, draw_rolls

SAMPLE = 2**14
"""Embeddings, of all images of the first step together, from which thresholds are estimated."""


class Learner:
    """The network and its optimiser, and how many steps they have done.

    With `training.heads`, several heads learn from the same batches, and the network has the one of
    the lowest loss in the last steps.
    """

    def __init__(
        self,
        experiment: Experiment,
        plan: Plan,
        processes: Processes,
        micro_batch_size: int,
        shared: Kept | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.experiment = experiment
        self.plan = plan
        self.processes = processes
        self.note = note
        self.done = 0
        self.whole = True
        """No step is half done. The death of a data worker can interrupt it anywhere."""
        self.network = build_network(experiment).to(processes.device)
        processes.align(self.network)
        # The backbone never updates batch statistics or drops anything, even when it trains: a
        # step must not depend on how its batch is cut.
        self.network.train().backbone.eval()
        self.network.backbone.requires_grad_(experiment.training.end_to_end)
        if not list(self.network.head.parameters()):
            raise ConfigError(
                f"The head {experiment.head!r} has nothing to train: it is for `iddc baseline`. "
                "Choose --head conv or linear."
            )
        width = self.network.backbone.embed_dim
        others = (build_head(experiment, width, i) for i in range(1, experiment.training.heads))
        self.heads = nn.ModuleList([self.network.head, *others]).to(processes.device)
        processes.align(self.heads)
        self.best = 0
        """The place of the network's head among all."""
        groups = [{"params": self.heads.parameters()}]
        if experiment.training.end_to_end:
            groups.append({"params": self.network.backbone.parameters()})
        self.optimizer = torch.optim.Adam(groups, lr=experiment.training.learning_rate)
        self.objective = Objective(experiment.objective)
        self.micro_batch_size = micro_batch_size or images_at_once(
            self.network.backbone,
            experiment.views.crop_size,
            processes.device,
            end_to_end=experiment.training.end_to_end,
        )
        self.views = RepeatedViews(
            self.network, experiment, processes.device, self.micro_batch_size, shared, note
        )
        self.losses = torch.zeros(len(self.heads), device=processes.device)
        """The mean loss of each head in the last steps."""
        self.shares = self.losses.new_zeros(len(self.heads), experiment.num_clusters)
        """The part of the patches that each cluster of each head won in them."""

    def learn(
        self,
        inputs: UInt8[Tensor, "b 2 3 S S"] | Float[Tensor, "b 2 d h w"],
        counts: Sequence[int],
    ) -> dict[str, float]:
        """Do one step on the images of all processes; with fewer than two images, do nothing.

        Args:
            inputs: The crops of the images of this process, or their embeddings.
            counts: How many images each process has.

        Returns:
            What the log says of the step. Where a number is not finite, no weight has changed.
        """
        step, batch = self.done, sum(counts)
        if batch < 2:
            self.done += 1
            return {}
        experiment, training = self.experiment, self.experiment.training
        progress = self.plan.progress(step)
        train_backbone = training.end_to_end and backbone_trains(
            progress, training.backbone_from, training.backbone_until
        )
        side = experiment.views.crop_size
        if not len(inputs):
            inputs = torch.zeros(0, 2, 3, side, side, dtype=torch.uint8)
        places = None
        if training.patches:
            patches = self.network.backbone.num_patches(side)
            places = draw_places(patches, training.patches, experiment.seed, step)
        found = {}
        if "auto" in thresholds_of(self.objective.config):
            if not self._estimate_thresholds(inputs, counts):
                self.done += 1
                return {"embeddings": math.nan}
            positive, negative = map(float, thresholds_of(self.objective.config))
            found = {"positive_threshold": positive, "negative_threshold": negative}
        self.optimizer.zero_grad()  # to None: Adam leaves a frozen backbone alone
        settled = training.end_to_end and progress >= training.backbone_from
        results: dict[int, StepResult] = {}
        for place in [self.best] if settled else range(len(self.heads)):
            self.network.head = self.heads[place]
            results[place] = backpropagate(
                self.network,
                inputs,
                draw_rolls(batch, experiment.objective.negatives, experiment.seed, step),
                self.objective,
                processes=self.processes,
                counts=counts,
                micro_batch_size=self.micro_batch_size,
                precision=training.precision,
                train_backbone=train_backbone,
                places=places,
                note=self.note,
            )
            self.micro_batch_size = results[place].images_at_once
        losses, shares = self.losses.clone(), self.shares.clone()
        for place, result in results.items():
            losses[place].lerp_(result.terms.total, 1 / min(step + 1, RECENT))
            shares[place].lerp_(result.shares, 1 / min(step + 1, RECENT))
        numbers_of = self._numbers(results, shares)
        factor = poly(self.plan.progress(step, training.schedule_step), training.power)
        rates = (training.learning_rate, training.backbone_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * factor
        numbers = next((n for n in numbers_of.values() if not_finite(n)), None)
        self.whole = False
        if numbers is None:
            self.optimizer.step()
            self.losses, self.shares = losses, shares
            if len(numbers_of) > 1:  # the first process chooses: machines may round differently
                self.best = self.processes.from_first(int(losses.argmin()))
            numbers = numbers_of[self.best]
        self.network.head = self.heads[self.best]
        self.done += 1
        self.whole = True
        if len(self.heads) > 1:
            found["head"] = float(self.best + 1)
        return {**numbers, "learning_rate": rates[0] * factor, **found}

    def _numbers(
        self, results: Mapping[int, StepResult], shares: Tensor
    ) -> dict[int, dict[str, float]]:
        """What the log says of each head that has learned."""
        rows = []
        for place, result in results.items():
            weights = chain(self.heads[place].parameters(), self.network.backbone.parameters())
            gradients = [p.grad.norm() for p in weights if p.grad is not None]
            values = {
                "loss": result.terms.total,
                "positive": result.terms.positive,
                "negative": result.terms.negative,
                "regularizer": result.terms.regularizer,
                "gradient_norm": torch.stack(gradients).norm(),
                "live_clusters": live_clusters(shares[place]),
            }
            rows.append(torch.stack(list(values.values())))
        # One transfer from the GPU for all of them.
        table = torch.stack(rows).tolist()
        return {
            place: dict(zip(values, row, strict=True))
            for place, row in zip(results, table, strict=True)
        }

    def _estimate_thresholds(self, inputs: Tensor, counts: Sequence[int]) -> bool:
        """Put numbers in place of `auto`, from images; whether their embeddings are finite."""
        experiment, device = self.experiment, self.processes.device
        start, share = sum(counts[: self.processes.rank]), max(1, SAMPLE // sum(counts))
        sample = [torch.zeros(0, self.network.backbone.embed_dim, device=device)]
        for place, image in enumerate(inputs.to(device), start):
            maps = image
            if not image.is_floating_point():
                with torch.no_grad():
                    maps = embed_crops(self.network, image, experiment.training.precision)
            rng = np.random.default_rng((experiment.seed, place))
            vectors = maps.movedim(1, -1).flatten(0, 2)
            sample.append(vectors[torch.from_numpy(rng.permutation(len(vectors))[:share])])
        rows = torch.cat(sample)
        everyone = self.processes.gather(
            rows, [row[0] for row in self.processes.exchange([len(rows)])]
        )
        if not everyone.isfinite().all():
            return False
        self.objective = Objective(
            resolve_thresholds(
                experiment.objective, everyone, experiment.num_clusters, seed=experiment.seed
            )
        )
        return True

    @property
    def trained(self) -> nn.Module:
        """The best head, or the network with it if the backbone trains."""
        return self.network if self.experiment.training.end_to_end else self.network.head

    def choice(self) -> str:
        """Which of several heads the network has, and why, in one line."""
        losses = self.losses.tolist()
        others = ", ".join(f"{loss:.4f}" for i, loss in enumerate(losses) if i != self.best)
        return (
            f"kept head {self.best + 1} of {len(losses)}, whose loss in the last steps is the "
            f"lowest: {losses[self.best]:.4f}, of the others {others}"
        )

    @property
    def _learning(self) -> nn.ModuleList:
        """All that learns."""
        alone = not self.experiment.training.end_to_end
        return nn.ModuleList([self.heads] if alone else [self.heads, self.network.backbone])

    def state(self, files: str, left_out: dict[str, str]) -> State:
        """What to save. See `State`."""
        return State(
            step=self.done,
            threads=torch.get_num_threads(),
            files=files,
            network=self._learning.state_dict(),
            optimizer=self.optimizer.state_dict(),
            losses=self.losses,
            shares=self.shares,
            best=self.best,
            thresholds=thresholds_of(self.objective.config),
            left_out=left_out,
        )

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        self._learning.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"].to(self.losses)
        self.shares = state["shares"].to(self.shares)
        self.best = state["best"]
        self.network.head = self.heads[self.best]
        positive, negative = state["thresholds"]
        thresholds = {"positive_threshold": positive, "negative_threshold": negative}
        self.objective = Objective(self.objective.config.model_copy(update=thresholds))
        self.done = state["step"]
