"""The images a run was trained on, to look at again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iddc.config import ReadingConfig
from iddc.datasets import DATASETS, train_images
from iddc.errors import DataError
from iddc.images import AS_STORED, ImageFile, expand_pages, find_images
from iddc.runs import Run
from iddc.runs.configfile import read_record


def find_samples(
    run: Run, images: Path | None, reading: ReadingConfig = AS_STORED
) -> tuple[Sequence[ImageFile], str]:
    """The images to look at: those given, or those of the training. If none: why, in a sentence.

    Args:
        run: The run.
        images: Given ones.
        reading: How its model reads files: which pages are images.

    Raises:
        DataError: The given ones cannot be found.
    """
    if images:
        return expand_pages(find_images(images).files, reading), ""
    source, limit = recorded_source(run)
    if not source:
        return (), "The run does not say which images it was trained on."
    dataset, _, root = source.partition(":")
    try:
        if dataset in DATASETS:
            return expand_pages(train_images(dataset, Path(root))[:limit], reading), ""
        own = find_images(Path(source), limit=limit, include_masks=recorded_masks(run))
        return expand_pages(own.files, reading), ""
    except DataError:
        return (), "The images of the training are no longer where they were."


def recorded_source(run: Run) -> tuple[str, int | None]:
    """What config.yaml says of the images: where they are, and how many of them were used."""
    record = _recorded(run)
    source, limit = record.get("source"), record.get("limit")
    return (
        source if isinstance(source, str) else "",
        limit if isinstance(limit, int) else None,
    )


def recorded_masks(run: Run) -> bool:
    """Whether masks among the images were read like photos."""
    return _recorded(run).get("include_masks") is True


def _recorded(run: Run) -> dict[str, Any]:
    path = run.path / "config.yaml"
    record = read_record(path).get("images") if path.exists() else None
    return record if isinstance(record, dict) else {}
