"""Shared fixtures. Every tensor shape that a signature states is checked while tests run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
install_import_hook("iddc", "beartype.beartype")  # before the first import of iddc

settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the checkout; users do not have it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development data (shared/data beside the checkout) is not here")
    return folder
