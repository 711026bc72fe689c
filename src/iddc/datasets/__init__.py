"""Labelled data sets by name, for evaluation only: nothing here is read in training."""

from __future__ import annotations

from pathlib import Path

from iddc.config import DatasetName
from iddc.datasets.folder import FolderDataset, LabelledImages, Sample
from iddc.errors import ConfigError

__all__ = ["DATASETS", "FolderDataset", "LabelledImages", "Sample", "open_dataset"]

DATASETS: dict[DatasetName, type[FolderDataset]] = {"folder": FolderDataset}


def open_dataset(name: str, root: Path, split: str) -> LabelledImages:
    """Open one split of a labelled data set.

    Raises:
        ConfigError: There is no data set of this name.
        DataError: `root` does not hold it, or holds it in part.
    """
    if name not in DATASETS:
        raise ConfigError(f"Unknown data set {name!r}. Known: {', '.join(sorted(DATASETS))}.")
    return DATASETS[name](root, split)
