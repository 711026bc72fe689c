"""Four images under their clusters, after every tenth of a run: what it learns, seen on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from iddc.config import Experiment
from iddc.device import autocast
from iddc.errors import UnreadableImage
from iddc.images import ImageFile, open_image
from iddc.masks import overlay, palette
from iddc.network import Network
from iddc.runs import Run, disk_errors, write_atomic
from iddc.windows import to_working_size

SAMPLES = "samples"
"""The folder in RUN."""
TIMES = 10
"""How many times a run shows its images."""
_IMAGES = 4
_SIDE = 480
"""The longer side of an image, in pixels."""
_GAP = 6


class Overlays:
    """Writes RUN/samples/step-N.jpg, four images two by two. They are opened at the first time.

    Nothing of the run changes: no random number is drawn, and no parameter is touched.

    Args:
        run: The folder.
        files: The images of the run, of which four are taken, evenly spread.
        experiment: It says how images are read and resized.
        steps: The steps of the run.
    """

    def __init__(
        self, run: Run, files: Sequence[ImageFile], experiment: Experiment, steps: int
    ) -> None:
        self._run = run
        count = min(_IMAGES, len(files))
        self._files = [files[i * len(files) // count] for i in range(count)]
        self._experiment = experiment
        self._steps = {math.ceil(part * steps / TIMES) for part in range(1, TIMES + 1)}
        self._images: list[Image.Image] | None = None

    def after(self, step: int, network: Network) -> None:
        """Write the images after a step, if it ends a tenth of the run."""
        if step not in self._steps:
            return
        if self._images is None:
            self._images = [*self._opened()]
        if not self._images:
            return
        tiles = [self._segmented(image, network) for image in self._images]
        width, height = (max(sizes) for sizes in zip(*(tile.size for tile in tiles), strict=True))
        across = min(2, len(tiles))
        down = -(-len(tiles) // across)
        sheet = Image.new(
            "RGB", (across * (width + _GAP) - _GAP, down * (height + _GAP) - _GAP), "white"
        )
        for number, tile in enumerate(tiles):
            row, column = divmod(number, across)
            sheet.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
        data = BytesIO()
        sheet.save(data, "JPEG", quality=85)
        folder = self._run.path / SAMPLES
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        write_atomic(folder / f"step-{step}.jpg", data.getvalue())

    def _opened(self) -> list[Image.Image]:
        images = []
        for file in self._files:
            try:
                image = open_image(file, reading=self._experiment.reading)
            except UnreadableImage:
                continue  # the run says so where it learns from it
            image.thumbnail((_SIDE, _SIDE))
            images.append(image)
        return images

    def _segmented(self, image: Image.Image, network: Network) -> Image.Image:
        device = next(network.parameters()).device
        pixels = to_working_size(image, self._experiment.views.short_side, 0)[None].to(device)
        with torch.no_grad(), autocast(device, self._experiment.training.precision):
            ids = network(pixels)[0].argmax(0)
        grid = Image.fromarray(ids.cpu().numpy().astype(np.int32))
        clusters = np.asarray(grid.resize(image.size, Image.Resampling.NEAREST))
        return overlay(image, clusters, palette(network.num_clusters))
