"""The clusters and classes of one image, and what can be made of them."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image
from torch import Tensor

from iddc.errors import ConfigError, needs_extra
from iddc.masks import IGNORED, Labels, overlay, write_image
from iddc.masks.coco import as_rle, describe_image
from iddc.masks.ids import encode, with_palette, without_gaps
from iddc.masks.shares import count_pixels


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The clusters of one image, at its size."""

    image: Image.Image
    """What was segmented: RGB, upright."""
    clusters: Integer[np.ndarray, "H W"]
    """The cluster of every pixel: uint8, or uint16 with more than 256 clusters."""
    labels: Labels
    """What the clusters are called."""
    valid: Bool[np.ndarray, "H W"] | None = None
    """Which pixels hold data, where some hold none: transparent ones, or without a number."""
    probs: Float[Tensor, "k H W"] | None = None
    """The probability of every cluster at every pixel, on the CPU, if asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """One per cluster; clusters of one name are one class."""
        return self.labels.names

    @property
    def colours(self) -> UInt8[np.ndarray, "k 3"]:
        """RGB, one per cluster."""
        return self.labels.cluster_colours

    @cached_property
    def classes(self) -> Integer[np.ndarray, "H W"]:
        """The class of every pixel, as `labels.classes` numbers them; without names, its cluster.

        Pixels of ignored clusters and pixels without data have the highest value of the type, 255
        or 65535.
        """
        named = self.labels.classes
        return without_gaps(named.of_cluster[self.clusters], self.valid, len(named.names))

    @property
    def class_names(self) -> tuple[str, ...]:
        """One per class: `class_names[c]` is the name of the pixels where `classes` is c."""
        return self.labels.classes.names

    @property
    def shares(self) -> dict[str, float]:
        """The share of the image that each class covers, in [0, 1], the largest first.

        Ignored pixels are part of the whole: they are `ignore`, where there are any.
        """
        names = (*self.class_names, IGNORED)
        counts = count_pixels(self.classes, len(names) - 1)
        found = {name: int(n) / counts.sum() for name, n in zip(names, counts, strict=True) if n}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image under the colours of its classes; opacity 0 is the image alone."""
        return overlay(self.image, self.classes, self.labels.classes.colours, opacity)

    def plot(self, axes: Any = None, *, opacity: float = 0.5) -> Any:
        """Draw the overlay and a legend with matplotlib.

        Args:
            axes: Axes of matplotlib to draw into; new ones if not given.
            opacity: See `overlay`.

        Returns:
            The axes.

        Raises:
            SetupError: The extra `plots` is missing.
        """
        with needs_extra("plots", "plot needs matplotlib"):
            from matplotlib import pyplot
            from matplotlib.patches import Patch
        if axes is None:
            axes = pyplot.subplots()[1]
        axes.imshow(np.asarray(self.overlay(opacity)))
        axes.set_axis_off()
        colours = dict(zip(self.class_names, self.labels.classes.colours / 255, strict=True))
        handles = [
            Patch(facecolor=colours[name], label=f"{name} {share:.1%}")
            for name, share in self.shares.items()
            if name in colours
        ]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        return axes

    def save(self, path: str | Path, kind: Literal["ids", "palette", "overlay"] = "ids") -> None:
        """Write the mask as an image.

        Args:
            path: The file; a PNG, but for overlays.
            kind: Class ids, 255 or 65535 ignored; the same with a palette; or the overlay.

        Raises:
            ConfigError: Ids would lose values in a file that is no PNG, or in a palette.
            SetupError: The file cannot be written.
        """
        target, classes = Path(path), self.labels.classes
        if kind != "overlay" and target.suffix.lower() != ".png":
            raise ConfigError(f"save: ids need a file that ends in .png, found {target.name!r}.")
        if kind == "palette" and classes.of_cluster.dtype != np.uint8:
            raise ConfigError(
                f"save: a palette holds at most 256 classes, found {len(classes.names)}. Use ids."
            )
        if kind == "ids":
            write_image(target, Image.fromarray(self.classes))
        elif kind == "palette":
            write_image(target, with_palette(self.classes, classes.colours))
        else:
            write_image(target, self.overlay())

    def to_coco(self, file_name: str = "image") -> dict[str, Any]:
        """The mask as a COCO record with one image, its annotations as RLE, and all categories.

        Args:
            file_name: What the record calls the image.
        """
        record = json.loads(describe_image(file_name, self.classes, len(self.class_names), as_rle))
        annotations = [
            {"id": number, "image_id": 1, **annotation}
            for number, annotation in enumerate(record["annotations"], start=1)
        ]
        return {
            "images": [{"id": 1, **record["image"]}],
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name, "supercategory": ""}
                for number, name in enumerate(self.class_names, start=1)
            ],
        }

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {share:.0%}" for name, share in [*self.shares.items()][:4])
        more = ", ..." if len(self.shares) > 4 else ""
        return f"Segmentation({self.image.width} x {self.image.height}: {found}{more})"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the overlay, and what its colours mean."""
        small = self.overlay()
        small.thumbnail((640, 640))
        address = b64encode(encode(small, ".jpg")).decode()
        colours = dict(zip(self.class_names, self.labels.classes.colours.tolist(), strict=True))
        items = "".join(
            f'<span style="white-space:nowrap"><span style="color:#{bytes(colours[name]).hex()}">'
            f"\N{BLACK SQUARE}</span> {escape(name)} {share:.1%}</span> "
            for name, share in self.shares.items()
            if name in colours
        )
        return f'<img src="data:image/jpeg;base64,{address}"><div>{items}</div>'
