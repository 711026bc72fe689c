"""Semantic segmentation learned from unlabelled images (IDDC, IJCV 2024).

The public names load on first use, so that `import iddc` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iddc.config import Experiment as Experiment
    from iddc.errors import IddcError as IddcError
    from iddc.scripting import Segmenter as Segmenter
    from iddc.segmentation import Segmentation as Segmentation

__version__ = "0.1.0"

_HOMES = {
    "Experiment": "iddc.config",
    "IddcError": "iddc.errors",
    "Segmentation": "iddc.segmentation",
    "Segmenter": "iddc.scripting",
}
__all__ = ["Experiment", "IddcError", "Segmentation", "Segmenter", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'iddc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
