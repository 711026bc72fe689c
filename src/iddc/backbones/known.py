"""Published self-supervised backbones, and where their weights may lie on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from iddc.backbones.pixels import PIXEL_NETS
from iddc.backbones.positions import Positions
from iddc.config import BackboneName
from iddc.errors import SetupError

BUNDLED = Path(__file__).parents[1] / "weights" / "bundled"
"""The folder of the backbone inside the package."""

BUNDLED_LICENCE = "CC BY-NC 4.0"
"""The licence of its weights, which were trained on images under research-only terms: see
its card."""

DESCRIPTION = "backbone.json"
"""The file that makes a folder a weights folder: its architecture and format version."""


@dataclass(frozen=True)
class KnownBackbone:
    """A published backbone: its network in timm, its weights and their terms."""

    timm_name: str
    """With a tag (`.dino`) where timm fetches the weights, without one where it has none."""
    patch_size: int
    """In pixels."""
    width: int
    """D, the channels of an embedding."""
    file: str
    """The published weights file, for `--backbone NAME=FILE`."""
    source: str
    """Who published it, as a GitHub name."""
    licence: str = "Apache-2.0"
    """The licence of the weights."""

    @property
    def millions(self) -> int:
        """The number of its parameters, in millions."""
        kind = re.match("[a-z]+_?[a-z]*", self.timm_name)
        return _MILLIONS[kind[0] if kind else ""]

    @property
    def needs_file(self) -> bool:
        """Whether the weights cannot be fetched, but must be passed as a file."""
        return "." not in self.timm_name


_MILLIONS = {"vit_small": 22, "vit_base": 86, "xcit_small": 26, "resnet": 11}
_DINO, _IBOT = "facebookresearch/dino", "bytedance/ibot"
_DINOV2, _DINOV3 = "facebookresearch/dinov2", "facebookresearch/dinov3"

BACKBONES: dict[BackboneName, KnownBackbone] = {
    "dino-vits16": KnownBackbone(
        "vit_small_patch16_224.dino", 16, 384, "dino_deitsmall16_pretrain.pth", _DINO
    ),
    "dino-vits8": KnownBackbone(
        "vit_small_patch8_224.dino", 8, 384, "dino_deitsmall8_pretrain.pth", _DINO
    ),
    "dino-vits8-300ep": KnownBackbone(
        "vit_small_patch8_224", 8, 384, "dino_deitsmall8_300ep_pretrain.pth", _DINO
    ),
    "dino-vitb16": KnownBackbone(
        "vit_base_patch16_224.dino", 16, 768, "dino_vitbase16_pretrain.pth", _DINO
    ),
    "dino-vitb8": KnownBackbone(
        "vit_base_patch8_224.dino", 8, 768, "dino_vitbase8_pretrain.pth", _DINO
    ),
    "ibot-vits16": KnownBackbone("vit_small_patch16_224", 16, 384, "checkpoint_teacher.pth", _IBOT),
    "ibot-vitb16": KnownBackbone("vit_base_patch16_224", 16, 768, "checkpoint_teacher.pth", _IBOT),
    "ibot-vitb16-in22k": KnownBackbone(
        "vit_base_patch16_224", 16, 768, "checkpoint_teacher.pth", _IBOT
    ),
    "dino-xcits12-p16": KnownBackbone(
        "xcit_small_12_p16_224", 16, 384, "dino_xcit_small_12_p16_pretrain.pth", _DINO
    ),
    "dino-xcits12-p8": KnownBackbone(
        "xcit_small_12_p8_224", 8, 384, "dino_xcit_small_12_p8_pretrain.pth", _DINO
    ),
    "dinov2-vits14": KnownBackbone(
        "vit_small_patch14_dinov2.lvd142m", 14, 384, "dinov2_vits14_pretrain.pth", _DINOV2
    ),
    "dinov2-vits14-reg": KnownBackbone(
        "vit_small_patch14_reg4_dinov2.lvd142m", 14, 384, "dinov2_vits14_reg4_pretrain.pth", _DINOV2
    ),
    "dinov2-vitb14": KnownBackbone(
        "vit_base_patch14_dinov2.lvd142m", 14, 768, "dinov2_vitb14_pretrain.pth", _DINOV2
    ),
    "dinov2-vitb14-reg": KnownBackbone(
        "vit_base_patch14_reg4_dinov2.lvd142m", 14, 768, "dinov2_vitb14_reg4_pretrain.pth", _DINOV2
    ),
    "dinov3-vits16": KnownBackbone(
        "vit_small_patch16_dinov3.lvd1689m", 16, 384, "model.safetensors", _DINOV3, "DINOv3 License"
    ),
    "dinov3-vitb16": KnownBackbone(
        "vit_base_patch16_dinov3.lvd1689m", 16, 768, "model.safetensors", _DINOV3, "DINOv3 License"
    ),
}


def bundled_backbone() -> KnownBackbone:
    """The backbone inside the package. Its patch and width are those of its own description."""
    facts = json.loads((BUNDLED / DESCRIPTION).read_text("utf-8"))
    name, patch, width = (facts[key] for key in ("timm_name", "patch_size", "embed_dim"))
    return KnownBackbone(name, patch, width, "backbone.safetensors", "iddc", BUNDLED_LICENCE)


_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SECONDS = 5


def lookup(name: str) -> KnownBackbone | None:
    """The entry of BACKBONES of that name, if it has one."""
    return next((known for key, known in BACKBONES.items() if key == name), None)


def licence_of(backbone: str) -> str:
    """The licence of the weights of a backbone, as far as its name tells it.

    Args:
        backbone: As `--backbone` takes it.
    """
    if backbone == "bundled":
        return BUNDLED_LICENCE
    if backbone in PIXEL_NETS:
        return "none, as it has no weights"
    if backbone.startswith("untrained:"):
        return "none, as its weights are random"
    known = lookup(backbone.partition("=")[0])
    return known.licence if known else "not known to iddc"


def positions_of(label: str, timm_name: str) -> Positions:
    """How the authors of some weights interpolate positions: DINO's and iBOT's ViTs by DINO's rule.

    Args:
        label: What the user called the backbone.
        timm_name: Its name in timm, with the tag of its weights if it has one.
    """
    known = lookup(label)
    theirs = known.source in (_DINO, _IBOT) if known else timm_name.endswith(".dino")
    return "dino" if theirs and timm_name.startswith("vit_") else "timm"


def is_here(name: str) -> bool:
    """Whether a name of BACKBONES, or `bundled`, can be used without network and without a file."""
    if name == "bundled":
        return (BUNDLED / DESCRIPTION).is_file()
    known = lookup(name)
    return known is not None and find_weights(known.timm_name, known.file) is not None


def find_weights(timm_name: str, file: str = "") -> Path | None:
    """Look for weights in the caches of timm and of torch.hub; no network.

    Args:
        timm_name: A name of timm; only with a tag does it say which weights.
        file: The published file, as torch.hub stores it.
    """
    import huggingface_hub
    from torch import hub

    for name in _HUB_FILES if "." in timm_name else ():
        cached = huggingface_hub.try_to_load_from_cache(f"timm/{timm_name}", name)
        if isinstance(cached, str):
            return Path(cached)
    # checkpoint_teacher.pth may be any of three backbones: the name of the file does not say.
    if Counter(known.file for known in BACKBONES.values())[file] != 1:
        return None
    path = Path(hub.get_dir(), "checkpoints", file)
    return path if path.is_file() else None


def fetch_weights(timm_name: str, file: str = "", *, name: str = "") -> Path:
    """Find weights on this machine, or else download them.

    Args:
        timm_name: As in `find_weights`.
        file: As in `find_weights`.
        name: What the user called the backbone.

    Raises:
        SetupError: They are neither here nor within reach; the message says which file to pass.
    """
    cached = find_weights(timm_name, file)
    if cached is not None:
        return cached
    source = next((known.source for known in BACKBONES.values() if known.file == file), "timm")
    name, file = name or timm_name, file or _HUB_FILES[0]
    advice = f"Pass --backbone {name}={file}, a file published by {source}."
    if "." not in timm_name:
        raise SetupError(f"The weights of {name} cannot be fetched by themselves. {advice}")
    try:
        return _download(f"timm/{timm_name}")
    except SetupError:
        raise
    except Exception as error:  # the hub's library raises its own, requests' and httpx' errors
        raise SetupError(
            f"The weights of {name} are not on this machine and could not be fetched "
            f"({type(error).__name__}). {advice}"
        ) from error


def _download(repository: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    name, other = _HUB_FILES
    # hf_hub_download retries for 20 seconds when there is no network; this asks once.
    try:
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name), timeout=_SECONDS)
    except EntryNotFoundError:
        name = other
        facts = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name), timeout=_SECONDS)
    # The file is of the revision whose checksum was told, even if another one is published now.
    path = Path(hub.hf_hub_download(repository, name, revision=facts.commit_hash))
    _check(path, facts.etag or "", f"{repository}, revision {facts.commit_hash}")
    return path


def _check(path: Path, etag: str, source: str) -> None:
    """Compare a download with the SHA-256 that the hub has of it.

    Raises:
        SetupError: They differ. The file is removed, or it would be taken from the cache next time.
    """
    if not re.fullmatch("[0-9a-f]{64}", etag):
        raise SetupError(
            f"The hub does not say the SHA-256 of the weights of {source}, so they are not used. "
            "Pass --backbone NAME=FILE."
        )
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != etag:
        path.resolve().unlink()
        raise SetupError(
            f"The weights of {source} are damaged: expected SHA-256 {etag}, found {found}. They "
            "were removed; give the command again."
        )
