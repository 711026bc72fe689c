"""The images of a run as a method is fitted to them: each process embeds its part of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from iddc.backbones import ClassAttention, attend
from iddc.learning.embeddings import Shared
from iddc.learning.learner import Learner
from iddc.learning.session import Session
from iddc.samples import Sampler

AT_ONCE = 16
"""Images in one forward pass where the class token is asked."""


class EmbeddedCollection:
    """All images of a run. It is a `Collection`."""

    def __init__(self, session: Session, learner: Learner, shared: Shared | None = None) -> None:
        self._session = session
        self._learner = learner
        self._sampler = Sampler(
            session.files,
            learner.network.backbone,
            learner.experiment,
            session.runtime,
            check=session.check,
            progress=session.progress,
            # A backbone that learns makes something else of an image in each epoch.
            wholes=None if learner.experiment.training.end_to_end or not shared else shared.wholes,
        )
        everything = range(len(session.files))
        self._part: range = session.processes.split(everything)  # type: ignore[assignment]

    def sample(self, count: int) -> Float[Tensor, "n d"]:
        """At most `count` raw patch embeddings in equal shares from all images."""
        self._session.pause()
        rows = self._sampler.patches(count, self._part)
        self._leave_out()
        return self._gathered(rows)

    def means(self) -> tuple[Int64[Tensor, " n"], Float[Tensor, "n d"]]:
        """The indices of the readable images, and the mean embedding of each."""
        self._session.pause()
        ids, rows = self._sampler.means(self._part)
        self._leave_out()
        indices = torch.tensor(ids, dtype=torch.int64, device=rows.device)
        return self._gathered(indices), self._gathered(rows)

    def maps(self) -> Iterator[tuple[int, Float[Tensor, "d h w"]]]:
        """The index and the embeddings of each image as a whole, one by one."""
        self._session.pause()
        yield from self._sampler.maps(range(len(self._session.files)))
        self._leave_out()

    def pictures(
        self, count: int
    ) -> Iterator[tuple[int, Float[Tensor, "2 d h w"], UInt8[Tensor, "3 H W"]]]:
        """The index, both embeddings and the pixels of some images as a whole, one by one."""
        self._session.pause()
        total = len(self._session.files)
        chosen = min(count, total)
        yield from self._sampler.pictures(i * total // chosen for i in range(chosen))
        self._leave_out()

    def attend(
        self, images: UInt8[Tensor, "b 3 H W"], targets: Float[Tensor, "k d"] | None = None
    ) -> ClassAttention:
        """What the class token of a ViT sees in images, a few at a time where there are no targets.

        Slopes are those of each image by itself.
        """
        backbone, device = self._learner.network.backbone, self._session.processes.device
        parts = torch.split(images, AT_ONCE)
        found = [attend(backbone, part.to(device), targets) for part in parts]
        slopes = [each.slopes for each in found if each.slopes is not None]
        return ClassAttention(
            torch.cat([each.token for each in found]),
            torch.cat([each.attention for each in found]),
            torch.cat(slopes) if slopes else None,
        )

    def note(self, line: str) -> None:
        """Tell the user something."""
        if self._session.first:
            self._session.note(line)

    def _gathered(self, rows: Tensor) -> Tensor:
        processes = self._session.processes
        return processes.gather(rows, [row[0] for row in processes.exchange([len(rows)])])

    def _leave_out(self) -> None:
        """Count the images that could not be read, of all processes."""
        failures, self._sampler.failures = self._sampler.failures, []
        if any(row[0] for row in self._session.processes.exchange([len(failures)])):
            self._session.unreadable.gather(failures)
