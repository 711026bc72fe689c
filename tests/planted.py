"""Images in which some things of known sizes are planted, as a method is fitted to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

COLOURS = torch.tensor([[200, 60, 60], [60, 160, 60], [60, 60, 220]], dtype=torch.uint8)
OFFSET = 3.0
"""Raw embeddings lie far from 0, as those after a ReLU do."""


class Planted:
    """Pictures of three things of 75, 20 and 5 %, as embeddings far from 0 and as colours."""

    def __init__(
        self, noise: float = 0.3, coloured: bool = True, things: int = 3, channels: int = 6
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.notes: list[str] = []
        self.asked = 0
        """How often its pictures were asked for."""
        self.truth, self.images = [], []
        for _ in range(12):
            ids = torch.zeros(16, 20, dtype=torch.long)
            ids[:8, :8] = 1
            ids[12:, 16:] = 2
            ids = ids.clamp(max=things - 1)
            directions = torch.eye(channels)[ids].permute(2, 0, 1) + OFFSET
            maps = directions + noise * torch.randn(2, channels, 16, 20, generator=generator)
            shown = ids if coloured else torch.zeros_like(ids)
            pixels = COLOURS[shown].permute(2, 0, 1)
            pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2)
            self.truth.append(ids)
            self.images.append((maps, pixels))

    def pictures(self, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        self.asked += 1
        for index, (maps, pixels) in enumerate(self.images[:count]):
            yield index, maps, pixels

    def note(self, line: str) -> None:
        self.notes.append(line)

    def sample(self, count: int) -> Tensor:
        raise NotImplementedError

    def attend(self, images: Tensor, targets: Tensor | None = None) -> Any:
        raise NotImplementedError

    def means(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def maps(self) -> Iterator[tuple[int, Tensor]]:
        raise NotImplementedError
