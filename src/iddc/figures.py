"""Pictures that put methods side by side, as Figs. 8 and 9 do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iddc.datasets import LabelledImages
from iddc.evaluation import PROTOCOLS, EvalProtocol, evaluate
from iddc.progress import SILENT, Progress
from iddc.segmenter import Segmenter

_BAND = 20
"""The least height of the titles, in pixels; a twelfth of a wide column."""


def compare(
    segmenters: Mapping[str, Segmenter],
    dataset: LabelledImages,
    protocol: EvalProtocol = PROTOCOLS["full"],
    *,
    shown: Sequence[int],
    progress: Progress = SILENT,
) -> Image.Image:
    """Draw image, truth and the prediction of each method, one row per image (Figs. 8 and 9).

    Predictions have the colours of the classes that their clusters are matched to, over the whole
    data set; clusters without a class are grey, ignored pixels black.

    Args:
        segmenters: What is compared, by the titles of the columns.
        dataset: Images with labels.
        protocol: How they are seen and scored.
        shown: The positions in the data set of the images to draw.
        progress: Shows how far the work is.
    """
    names = [Path(dataset[position].name).with_suffix(".png") for position in shown]
    with TemporaryDirectory() as folder:
        folders = [Path(folder, str(number)) for number in range(len(segmenters))]
        for masks, segmenter in zip(folders, segmenters.values(), strict=True):
            evaluate(segmenter, dataset, protocol, save_masks=masks, saved=shown, progress=progress)
        return contact_sheet(folders, ("image", "truth", *segmenters), names)


def contact_sheet(
    folders: Sequence[Path], titles: Sequence[str], names: Sequence[str | Path]
) -> Image.Image:
    """Put the panels of several evaluations into one picture: image, truth, each prediction.

    Args:
        folders: What `evaluate(save_masks=...)` wrote, one folder per method, of the same images.
        titles: What stands over the columns: image, truth, and each method.
        names: The pictures to show, one row each; all get the width of the first.
    """
    rows: list[Image.Image] = []
    for name in names:
        panels = [np.split(np.asarray(Image.open(folder / name)), 3, 1) for folder in folders]
        image, truth, _ = panels[0]
        row = Image.fromarray(np.concatenate([image, truth, *(p[2] for p in panels)], axis=1))
        width = rows[0].width if rows else row.width
        height = round(row.height * width / row.width)
        # Nearest: colours between those of two classes would be those of a third.
        rows.append(row.resize((width, height), Image.Resampling.NEAREST))
    column = rows[0].width // len(titles)
    top = max(_BAND, column // 12)
    font = ImageFont.load_default(0.7 * top)  # still to be read where the sheet is reduced
    sheet = Image.new("RGB", (rows[0].width, top + sum(row.height for row in rows)), "white")
    for index, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((index * column + 6, 0), title, fill="black", font=font)
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
