"""What a file of annotations says, whichever tool wrote it: classes, and how to paint images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import UInt16

from iddc.images import ImageFile


@dataclass(frozen=True)
class Annotated:
    """One annotated image.

    Attributes:
        path: Where the file says that it is.
        size: Width and height that the file states, or None.
        paint: The class of each pixel, from height and width; a `DataError` says what is wrong.
        stem: Whether the path lacks its suffix.
    """

    path: PurePosixPath
    size: tuple[int, int] | None
    paint: Callable[[int, int], UInt16[np.ndarray, "H W"]]
    stem: bool = False


@dataclass(frozen=True)
class Annotations:
    """What a file of annotations holds.

    Attributes:
        class_names: One per class.
        items: The images, in order.
        images: Where the file has its own images, if it has.
        notes: One-line remarks on what is not read.
    """

    class_names: tuple[str, ...]
    items: tuple[Annotated, ...]
    images: tuple[ImageFile, ...] = ()
    notes: tuple[str, ...] = ()
