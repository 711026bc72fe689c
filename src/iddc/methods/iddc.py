"""IDDC (Liu et al., IJCV 2024), the method of this package.

Two overlapping crops of every image give pixels with embeddings u and cluster probabilities v. Over
the pairs of pixels, L = L+ + lambda_1 L- + lambda_2 L_reg, Eq. (8): pixels that look alike come
together, Eq. (1), those of different images that look unlike part, Eq. (2), and every cluster stays
alive, Eq. (7). `losses/reference.py` has the equations as they read.

How alike two pixels are is the cosine u.u', or co-association e.e' with `objective.affinity`: the
codes e(u) of the over-clusterings that `--method consensus` fits to regions (`iddc.consensus`),
here of single patches, stand in the place of u. Their products lie in [0, 1]. With
`training.start` the head begins at the classes on which they agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from iddc.config import Experiment, Frozen, ObjectiveConfig, TrainingConfig
from iddc.consensus import fit_consensus
from iddc.errors import ConfigError
from iddc.losses import Objective, Pixels
from iddc.methods.coassociation import CONSENSUS, Coassociation
from iddc.methods.method import Batch, Collection, Group, Images, Method, Rows
from iddc.methods.pictures import Pictures
from iddc.network import CPU_CROPS, logits_at
from iddc.schedules import Plan, poly
from iddc.thresholds import resolve_thresholds, thresholds_of
from iddc.views import draw_rolls

SAMPLE = 2**14
"""Embeddings, of all images of the first step together, from which thresholds are estimated."""
THRESHOLDS = ("positive_threshold", "negative_threshold")
"""The fields of t+ and t-."""
TEACHING_RATE = 2e-3
"""The learning rate at which a head learns the classes of the consensus (Adam); it falls to 0."""
HALF = 0.5
"""`auto` for co-association: half of the groupings join two pixels."""


class Iddc(Method):
    """The head of two convolutions or one, which learns from pairs of pixels."""

    name = "iddc"
    about = "IDDC: pairs of pixels that look alike agree, and those that look unlike do not."
    uses = frozenset(
        {"epochs"}
        | {f"objective.{field}" for field in ObjectiveConfig.model_fields}
        | {f"training.{field}" for field in TrainingConfig.model_fields}
    )

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__(head, experiment, options)
        self.objective = Objective(experiment.objective)
        """Eq. (8), with numbers for thresholds from the first step on."""
        self.codes: Coassociation | None = None
        """What gives pixels the codes that are compared; None: their embeddings are."""
        if experiment.objective.affinity == "coassociation":
            self.codes = Coassociation(experiment.num_clusters)
            joined = {n: HALF for n in THRESHOLDS if getattr(experiment.objective, n) == "auto"}
            # Codes are of centred embeddings; they have no mean of their own to subtract.
            update = {**joined, "centering": "none"}
            self.objective = Objective(experiment.objective.model_copy(update=update))

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """As the experiment says.

        Raises:
            ConfigError: Codes are fitted once, and the backbone is to learn.
        """
        if experiment.objective.affinity == "coassociation" and experiment.training.end_to_end:
            raise ConfigError(
                "--objective.affinity coassociation compares embeddings with centroids that are "
                "fitted before the first step, so the backbone must stay as it is. Leave out "
                "--training.end-to-end, or add --objective.affinity cosine."
            )
        return super().plan(experiment, num_images)

    def get_extra_state(self) -> tuple[float | str, ...]:
        """Give t+ and t-, which a run keeps once they are found."""
        return thresholds_of(self.objective.config)

    def set_extra_state(self, state: tuple[float | str, ...]) -> None:
        """Go on with these t+ and t-."""
        self._set_thresholds(*state)

    def _set_thresholds(self, positive: float | str, negative: float | str) -> None:
        update = dict(zip(THRESHOLDS, (positive, negative), strict=True))
        self.objective = Objective(self.objective.config.model_copy(update=update))

    def share(self, first: Method) -> None:
        """Take the codes of the first of several heads: they are fitted once."""
        assert isinstance(first, Iddc)
        self.codes = first.codes

    def refit(self, collection: Collection, epoch: int, epochs: int) -> dict[str, float]:
        """Fit a consensus before the first step, if codes or the first weights come from one."""
        start, codes = self.experiment.training.start == "consensus", self.codes
        if epoch or not (start or (codes and not len(codes.centroids))):
            return {}  # other heads share the codes
        pictures = Pictures.of(collection, CONSENSUS)
        patches = [torch.arange(one.maps[0, 0].numel() * start) for one in pictures.items]
        vectors, weights, owners = pictures.regions(patches)
        collection.note(f"{CONSENSUS.groupings} groupings of {len(vectors):,} regions")
        clusters, seed = self.experiment.num_clusters, self.experiment.seed
        found = fit_consensus(vectors, clusters, CONSENSUS, weights=weights, seed=seed)
        if codes:
            codes.keep(pictures.mean, found)
        if not start:
            return pictures.facts()
        targets = torch.split(owners, [len(each) for each in patches])
        return {**pictures.facts(), "taught": self._teach(pictures, found.probs(vectors), targets)}

    def _teach(
        self,
        pictures: Pictures,
        probs: Float[Tensor, "n k"],
        owners: Sequence[Int64[Tensor, " _"]],
    ) -> float:
        """Teach the head classes, an image in each step; the mean of the last losses.

        Args:
            pictures: The images.
            probs: The probabilities of the classes of each region.
            owners: The region of each patch of each image.
        """
        device, losses = next(self.head.parameters()).device, []
        optimizer = torch.optim.Adam(self.head.parameters(), TEACHING_RATE)
        rng = np.random.default_rng(self.experiment.seed)
        for step in range(CONSENSUS.steps):
            optimizer.param_groups[0]["lr"] = TEACHING_RATE * (1 - step / CONSENSUS.steps)
            image, mirrored = int(rng.integers(len(owners))), int(rng.integers(2))
            maps = pictures.items[image].maps[mirrored, None].float().to(device)
            with torch.enable_grad():
                logits = self.head(maps)[0].flatten(1).T
                loss = cross_entropy(logits, probs[owners[image]].to(device))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
        return float(np.mean(losses[-25:]))

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """The logits of the patches that are compared, from which `loss` takes v."""
        return {"logits": patch_logits(self.head, maps, images.patches)}

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """Eq. (8) and its terms; in the first step also the thresholds that are found."""
        found: dict[str, Tensor] = {}
        if "auto" in thresholds_of(self.objective.config):
            sample = self._sample(batch)
            if not sample.isfinite().all():
                return {name: rows["logits"].sum() * math.nan for name in ("loss", "embeddings")}
            found = self._find_thresholds(sample)
        u = [normalize(batch.patch_features(view), dim=-1) for view in (0, 1)]
        first, second = (
            Pixels(compared, rows["logits"][:, view].mT.softmax(dim=-1))
            for view, compared in enumerate(self.codes(u) if self.codes else u)
        )
        negatives = self.objective.config.negatives
        terms = self.objective(
            first, second, draw_rolls(batch.total, negatives, batch.seed, batch.step)
        )
        return {
            "loss": terms.total,
            "positive": terms.positive,
            "negative": terms.negative,
            "regularizer": terms.regularizer,
            **found,
        }

    def _sample(self, batch: Batch) -> Float[Tensor, "n d"]:
        """Some embeddings of a batch, equally many of each image."""
        share, sample = max(1, SAMPLE // batch.total), []
        for position, maps in enumerate(batch.features):
            vectors = maps.movedim(1, -1).flatten(0, 2)
            rng = np.random.default_rng((batch.seed, position))
            sample.append(vectors[torch.from_numpy(rng.permutation(len(vectors))[:share])])
        return torch.cat(sample)

    def _find_thresholds(self, sample: Float[Tensor, "n d"]) -> dict[str, Tensor]:
        """Put numbers in place of `auto`, and give them to the log."""
        experiment = self.experiment
        config = resolve_thresholds(
            experiment.objective, sample, experiment.num_clusters, seed=experiment.seed
        )
        self.objective = Objective(config)
        return {name: sample.new_tensor(float(getattr(config, name))) for name in THRESHOLDS}

    def groups(self, progress: float) -> list[Group]:
        """The head, at a rate that falls by the poly schedule (Sec. 4.2.2)."""
        training = self.experiment.training
        rate = training.learning_rate * poly(progress, training.power)
        return [Group([*self.head.parameters()], rate)]

    @classmethod
    def calming(cls) -> str:
        """What to try where numbers are not finite any more."""
        return "--training.precision fp32 or a lower --training.learning-rate"

    @classmethod
    def advice(cls, experiment: Experiment) -> list[str]:
        """What keeps more clusters alive."""
        objective = experiment.objective
        changes = [
            f"--objective.{name} {value}"
            for name, value in (("regularizer", "weibull"), ("centering", "batch"))
            if getattr(objective, name) != value
        ]
        weight = f"a larger --objective.regularizer-weight than {objective.regularizer_weight:g}"
        return [*changes, weight, *super().advice(experiment)]


def patch_logits(
    head: nn.Module, maps: Float[Tensor, "b 2 d h w"], patches: Int64[Tensor, "2 m"] | None
) -> Float[Tensor, "b 2 k m"]:
    """The logits of the patches that the loss compares, or of all of them."""
    if patches is not None:
        views = [logits_at(head, maps[:, view], patches[view].to(maps.device)) for view in (0, 1)]
        return torch.stack(views, dim=1)
    rows = maps.flatten(0, 1)
    # A CPU's cache holds what the head computes for some crops, not for all of them.
    parts = torch.split(rows, CPU_CROPS) if rows.device.type == "cpu" else [rows]
    logits: Tensor = torch.cat([head(part).flatten(2) for part in parts])
    return logits.view(*maps.shape[:2], *logits.shape[1:])
