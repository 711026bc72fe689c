"""What a method is: a head that segments, and how it learns.

The law: `rows` sees images one by one and holds all parameters; `loss` sees all images of the step
and holds none. So micro-batches, processes, and a retry after running out of memory change time and
memory, never the value, for every method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from iddc.backbones import ClassAttention
from iddc.config import Experiment, Frozen, HeadName
from iddc.schedules import Plan

Rows = dict[str, Tensor]
"""What `Method.rows` finds, by name: one row for each image, of any further shape."""


@dataclass(frozen=True)
class Images:
    """Some images of a step: which they are, and what was drawn for them.

    Everything random follows from `seed`, `step` and `positions`, so that it is the same however
    the images are cut into pieces.
    """

    PER_IMAGE: ClassVar[tuple[str, ...]] = ("positions", "ids", "partners", "boxes")
    """The fields that have a row for each image."""
    seed: int
    """The seed of the experiment."""
    step: int
    """Steps done before this one."""
    steps: int
    """All steps of the run."""
    total: int
    """B, the images of the step in all pieces and processes."""
    positions: Int64[Tensor, " b"]
    """The position of each image among the B."""
    ids: Int64[Tensor, " b"]
    """The index of each image among the files of the run."""
    partners: Int64[Tensor, " b"]
    """The index of the file that gave the second view: the same, or another (`Method.partners`)."""
    boxes: Float[Tensor, "b 2 4"]
    """Left, top, right and bottom of both crops, as parts of the width and height of their file.
    In a mirrored crop left is greater than right."""
    patches: Int64[Tensor, "2 m"] | None
    """The patches of the first and of the second crop that are compared; None: all of them."""

    @property
    def progress(self) -> float:
        """The part of the run that is done, in [0, 1)."""
        return self.step / self.steps

    def rng(self, stream: int) -> np.random.Generator:
        """The random numbers of the whole step, the same in each piece of it.

        Draw for all `total` images and take the rows at `positions`.

        Args:
            stream: Tells independent draws of a step apart.
        """
        return np.random.default_rng((self.seed, self.step, stream))

    def part(self, rows: slice) -> Images:
        """Some of these images."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.PER_IMAGE})

    def blank(self) -> Images:
        """One image that is none of the step."""
        fields = {name: getattr(self, name) for name in self.PER_IMAGE}
        return replace(
            self, **{name: row.new_zeros(1, *row.shape[1:]) for name, row in fields.items()}
        )


@dataclass(frozen=True)
class Batch(Images):
    """All images of a step, of all processes, with their embeddings."""

    features: Float[Tensor, "b 2 d h w"]
    """The raw embeddings of both views, a target: no gradient goes through them. Patches without
    data have others in their places (`iddc.gaps`)."""

    def patch_features(self, view: int) -> Float[Tensor, "b m d"]:
        """The embeddings of the patches of a view that are compared, one row for each patch."""
        rows = self.features[:, view].flatten(2).mT
        return rows if self.patches is None else rows[:, self.patches[view].to(rows.device)]


@dataclass(frozen=True)
class Group:
    """Parameters that learn alike."""

    parameters: Sequence[nn.Parameter]
    """What learns."""
    rate: float
    """The learning rate of Adam now."""
    decay: float = 0.0
    """The weight decay, apart from the gradient (AdamW)."""
    clip: float = math.inf
    """The largest norm of the gradients of the group together."""


@runtime_checkable
class Collection(Protocol):
    """All images of the run, to which a method is fitted. What is asked for is computed then.

    Each call embeds images with the frozen backbone; those that cannot be read are left out and
    counted. Pixels without data count in nothing: samples have no patch of them, and maps another
    one in its place (`iddc.gaps`). Under torchrun every process must ask for the same, and gets the
    same.
    """

    def sample(self, count: int) -> Float[Tensor, "n d"]:
        """At most `count` raw patch embeddings, as prediction sees them.

        They are drawn in equal shares from all images (`samples.Sampler.patches`).
        """

    def means(self) -> tuple[Int64[Tensor, " n"], Float[Tensor, "n d"]]:
        """The indices of the images that can be read, and the mean embedding of each.

        It is that of the central square (`samples.Sampler.means`).
        """

    def maps(self) -> Iterator[tuple[int, Float[Tensor, "d h w"]]]:
        """The index and the embeddings of each image as a whole, at working size, one by one.

        Under torchrun each process gets all of them.
        """

    def pictures(
        self, count: int
    ) -> Iterator[tuple[int, Float[Tensor, "2 d h w"], UInt8[Tensor, "3 H W"]]]:
        """The index of at most `count` images, their embeddings, and their pixels at working size.

        The images are spread evenly over the collection, and embedded whole; the second map is
        that of the mirror image, mirrored back. Under torchrun each process gets all of them.
        """
        ...

    def attend(
        self, images: UInt8[Tensor, "b 3 H W"], targets: Float[Tensor, "k d"] | None = None
    ) -> ClassAttention:
        """What the class token of a ViT sees in images (`backbones.attend`).

        Only a method that `needs_class_token` may ask for it.
        """
        ...

    def note(self, line: str) -> None:
        """Tell the user something in one line."""


class Method(nn.Module):
    """A head that segments, and how it learns. A subclass states what differs from IDDC's habits.

    Random weights of a subclass are drawn from torch's generator, which is seeded by then.
    """

    name: ClassVar[str]
    """The name in `config.MethodName`; its module is `iddc.methods.NAME`, with _ for -."""
    about: ClassVar[str]
    """One line for `--help`, with the paper."""
    Config: ClassVar[type[Frozen]] = Frozen
    """The numbers of the method: the flags `--NAME.*` and the group `options` of config.yaml."""
    heads: ClassVar[tuple[HeadName, ...]] = ("conv", "linear")
    """The heads of `network.HEADS` that it can train; the first is the default."""
    uses: ClassVar[frozenset[str]] = frozenset({"training.precision"})
    """The fields of `Experiment` beyond K, backbone, seed, views and prediction that it reads, such
    as `epochs` or `objective.centering`. Others are neither options nor in config.yaml."""
    backbone: ClassVar[str] = ""
    """The backbone of a method that has its own, whatever the experiment says; most have none."""
    needs_class_token: ClassVar[bool] = False
    """Whether it works on a ViT with a class token alone; other backbones are refused."""
    head: nn.Module
    """What is saved and predicts."""

    def __init__(self, head: nn.Module, experiment: Experiment, options: Frozen) -> None:
        super().__init__()
        self.head = head
        self.experiment = experiment
        self.options = options

    @classmethod
    def defaults(cls, experiment: Experiment) -> Frozen:
        """The numbers where nothing else is asked for; may depend on `experiment.recipe`."""
        return cls.Config()

    @classmethod
    def plan(cls, experiment: Experiment, num_images: int) -> Plan:
        """How many images a step has, and how many steps the run; with 0, `refit` does it all.

        They are the `steps` and the `batch_size` of the method's own numbers where it has them,
        else what `epochs` and `training` say.

        Args:
            experiment: It has all numbers of the method (`methods.completed`).
            num_images: The images of the run.
        """
        own = experiment.options
        if {"steps", "batch_size"} <= own.keys():
            return Plan.of_steps(own["steps"], own["batch_size"], num_images)
        return Plan.of(experiment, num_images)

    @classmethod
    def head_options(cls, options: Frozen) -> dict[str, int]:
        """What `network.HEADS` needs to build the head, beyond its width and K.

        It is `dim`, the length of a code, where that is one of the method's numbers.
        """
        return options.model_dump(include={"dim"})

    def partners(self, ids: Sequence[int], step: int) -> Sequence[int]:
        """Whose second view goes with each image of a step: its own, or that of a neighbour.

        Args:
            ids: The indices of all images of the step, of all processes.
            step: Steps done before.
        """
        return ids

    def rows(self, maps: Float[Tensor, "b 2 d h w"], images: Images) -> Rows:
        """What the loss needs to know of each image, computed from that image alone.

        Rows of floats get the gradient of the loss. `logits` (b v k m), the scores of the clusters
        at the patches of v views, is what `live_clusters` is counted from.

        Args:
            maps: The raw embeddings of the first view of each image and of its partner's second.
            images: Which they are.
        """
        raise NotImplementedError

    def loss(self, batch: Batch, rows: Rows) -> dict[str, Float[Tensor, ""]]:
        """The named terms of the step over all its images. `loss` is minimised, all are logged.

        It reads no parameter. It is computed in single precision.

        Args:
            batch: All images of the step.
            rows: What `rows` found for all of them.
        """
        raise NotImplementedError

    def refits(self, epochs: int) -> Sequence[int]:
        """The epochs before which `refit` is called, from 0; `epochs` is the end of the run.

        Batches are made anew after each, as partners may change: at the start and the end alone it
        costs nothing.
        """
        return (0, epochs)

    def refit(self, collection: Collection, epoch: int, epochs: int) -> Mapping[str, float | int]:
        """Fit something to all images, before the epoch `epoch` or after all `epochs`.

        Buffers may change their size here, torch's generator is seeded, and there is no gradient
        but under torch.enable_grad(). With 0 epochs it is called once, with (0, 0).

        Returns:
            What the log says of it.
        """
        return {}

    def share(self, first: Method) -> None:
        """Take from the method of the first of several heads what is the same for all of them."""

    def update(self, batch: Batch, rows: Rows) -> None:
        """Follow the step that was just taken: moving averages, queues, banks. Without gradient.

        Args:
            batch: All images of the step.
            rows: What `rows` found for all of them before the step.
        """

    def groups(self, progress: float) -> Sequence[Group]:
        """What learns, and how fast at this progress in [0, 1). The parameters stay the same."""
        raise NotImplementedError

    @classmethod
    def advice(cls, experiment: Experiment) -> list[str]:
        """What to try where most clusters die, as options of the command line."""
        return ["fewer clusters"]

    @classmethod
    def calming(cls) -> str:
        """What to try where numbers are not finite any more, as options of the command line."""
        return f"--training.precision fp32 or a lower --{cls.name}.learning-rate"
