"""The images a run was trained on, to look at again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iddc.datasets import DATASETS, train_images
from iddc.errors import DataError
from iddc.images import ImageFile, find_images
from iddc.runs import Run
from iddc.runs.configfile import read_record


def find_samples(run: Run, images: Path | None) -> tuple[Sequence[ImageFile], str]:
    """The images to look at: those given, or those of the training. If none: why, in a sentence.

    Raises:
        DataError: The given ones cannot be found.
    """
    if images:
        return find_images(images).files, ""
    source, limit = recorded_source(run)
    if not source:
        return (), "The run does not say which images it was trained on."
    dataset, _, root = source.partition(":")
    try:
        if dataset in DATASETS:
            return train_images(dataset, Path(root))[:limit], ""
        return find_images(Path(source), limit=limit).files, ""
    except DataError:
        return (), "The images of the training are no longer where they were."


def recorded_source(run: Run) -> tuple[str, int | None]:
    """What config.yaml says of the images: where they are, and how many of them were used."""
    path = run.path / "config.yaml"
    record = read_record(path).get("images") if path.exists() else None
    if not isinstance(record, dict):
        return "", None
    source, limit = record.get("source"), record.get("limit")
    return (
        source if isinstance(source, str) else "",
        limit if isinstance(limit, int) else None,
    )
