"""Self-supervised backbones by name, file or folder: images -> dense embeddings.

A backbone is any network of timm with a dense feature map. The names are those of
`iddc models`; `load_backbone` lists the other ways to name one.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from iddc.backbones.architecture import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    Backbone,
    Colour,
    build_backbone,
    check_embeds,
    pixel_backbone,
    untrained_backbone,
    without_memory,
)
from iddc.backbones.attention import ClassAttention, attend, has_class_token
from iddc.backbones.components import reduced_backbone, regional
from iddc.backbones.known import (
    BACKBONES,
    BUNDLED,
    DESCRIPTION,
    KnownBackbone,
    bundled_backbone,
    fetch_weights,
    is_here,
    licence_of,
    lookup,
    positions_of,
)
from iddc.backbones.pixels import PIXEL_NETS
from iddc.backbones.weights import (
    fitting_weights,
    is_plain,
    load_weights,
    not_numbers,
    read_file,
    read_weights,
)
from iddc.errors import ConfigError, DataError, SetupError
from iddc.runs import WRITTEN, disk_errors, explain, read_text, refuse_newer, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BACKBONES",
    "Architecture",
    "Backbone",
    "ClassAttention",
    "KnownBackbone",
    "attend",
    "backbone_with",
    "build_backbone",
    "bundled_backbone",
    "check_embeds",
    "has_class_token",
    "is_here",
    "is_plain",
    "licence_of",
    "load_backbone",
    "not_numbers",
    "read_file",
    "reduced_backbone",
    "regional",
    "resolve",
    "save_backbone",
    "untrained_backbone",
    "without_memory",
]

_TENSORS = "backbone.safetensors"
_UNTRAINED = "untrained:"


def resolve(name: str) -> str:
    """Turn `auto` into a name that works here; other names stay as they are.

    auto is DINO ViT-S/16 where its weights are cached or can be fetched, else `bundled`.

    Raises:
        SetupError: Neither is within reach.
    """
    if name != "auto":
        return name
    known = BACKBONES["dino-vits16"]
    try:
        fetch_weights(known.timm_name, known.file, name="dino-vits16")
    except SetupError as error:
        if is_here("bundled"):
            return "bundled"
        raise SetupError(
            f"No backbone for `auto`: this package has no bundled one. {error} "
            "For a trial without weights pass --backbone untrained:vit_small_patch16_224."
        ) from error
    return "dino-vits16"


def load_backbone(name: str) -> Backbone:
    """Build a backbone and load its weights, in evaluation mode, on the CPU.

    Args:
        name: A key of BACKBONES; a timm name with the tag of its weights
            (`vit_small_patch14_reg4_dinov2.lvd142m`); NAME=FILE, where NAME is a key or a timm
            name and says the architecture; a folder of `save_backbone`; `bundled`; `auto`; or
            `untrained:NAME`, random weights from torch's generator.

    Raises:
        ConfigError: There is no such name, or it does not say which weights.
        DataError: The weights do not fit the architecture, or are damaged.
        SetupError: The weights are neither here nor within reach.
    """
    name = resolve(name)
    if name in PIXEL_NETS:
        return pixel_backbone(name).eval()
    if name == "bundled":
        if not is_here(name):
            raise SetupError(
                "This package has no bundled backbone. Pass --backbone NAME=FILE, a folder "
                "written by `iddc pretrain`, or a name of `iddc models`."
            )
        return _load_folder(BUNDLED)
    if os.path.isfile(Path(name) / DESCRIPTION):
        return _load_folder(Path(name))
    if name.startswith(_UNTRAINED):
        return untrained_backbone(_timm_name(name.removeprefix(_UNTRAINED))).eval()
    label, equals, file = name.partition("=")
    timm_name = _timm_name(label)
    path = Path(file).expanduser() if equals else _published(label, timm_name)
    state = read_weights(path)
    mean, std = _statistics(label, timm_name)
    positions = positions_of(label, timm_name)
    backbone = untrained_backbone(timm_name, positions=positions, mean=mean, std=std)
    load_weights(backbone.net, state, str(path))
    return backbone.eval()


def backbone_with(name: str, state: Mapping[str, Tensor], source: str) -> Backbone:
    """Build the architecture that a name says, and give it these weights instead of its own.

    Args:
        name: As for `load_backbone`; the weights that it names are not read, but a folder's are.
        state: The tensors, in any known layout; every one must have its place.
        source: Where they come from, for messages.

    Raises:
        ConfigError, DataError, SetupError: See `load_backbone`.
    """
    if name in ("auto", "bundled") or os.path.isdir(name):
        backbone = load_backbone(name)
    else:
        label = name.partition("=")[0].removeprefix(_UNTRAINED)
        timm_name = _timm_name(label)
        mean, std = _statistics(label, timm_name)
        positions = positions_of(label, timm_name)
        backbone = untrained_backbone(timm_name, positions=positions, mean=mean, std=std)
    load_weights(backbone.net, state, source)
    return backbone.eval()


def fingerprint(backbone: Backbone, *words: object) -> bytes:
    """A digest of all weights, and of words that say how they are used."""
    found = blake2b(repr(words).encode())
    for tensor in backbone.state_dict().values():
        found.update(tensor.contiguous().cpu().numpy().data)
    return found.digest()


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write a weights folder, which `load_backbone` takes: `backbone.json` and the tensors.

    Raises:
        SetupError: The folder cannot be written.
    """
    from safetensors.torch import save

    tensors = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    record = {**WRITTEN, **backbone.architecture.model_dump(mode="json")}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / _TENSORS, save(tensors))
    write_atomic(folder / DESCRIPTION, json.dumps(record, indent=2) + "\n")


def _load_folder(folder: Path) -> Backbone:
    path = folder / DESCRIPTION
    try:
        record = json.loads(read_text(path))
        refuse_newer(record, path)
        del record["format_version"]
        record.pop("iddc", None)  # the first weights folders do not say it
        architecture = Architecture.model_validate(record)
    except ValidationError as error:
        raise DataError(f"{path} does not describe a backbone: {explain(error)}") from error
    except (ValueError, AttributeError, KeyError, TypeError, OSError, RecursionError) as error:
        raise DataError(f"{path} is not a description written by `iddc pretrain`.") from error
    state, source = read_weights(folder / _TENSORS), str(folder / _TENSORS)
    with without_memory():
        blank = build_backbone(architecture)
    state = fitting_weights(blank, state, source)
    backbone = build_backbone(architecture)
    backbone.load_state_dict(state)
    check_embeds(backbone, path)
    return backbone.eval()


def _timm_name(label: str) -> str:
    """The timm name of a key of BACKBONES, or of a timm name itself."""
    known = lookup(label)
    if known is not None:
        return known.timm_name
    if os.path.isdir(label):
        raise DataError(f"The folder {label} is no weights folder: it holds no {DESCRIPTION}.")
    if os.path.isfile(label):
        raise ConfigError(f"A file does not say its architecture: pass NAME={label}.")
    import timm

    if timm.is_model(label) and ("." not in label or timm.is_model_pretrained(label)):
        return label
    near = difflib.get_close_matches(label, [*BACKBONES, "auto", "bundled"], 1)
    near = near or difflib.get_close_matches(label, timm.list_models() + timm.list_pretrained(), 1)
    raise ConfigError(
        f"Unknown backbone {label!r}{f'; perhaps you meant {near[0]}' if near else ''}. "
        f"Known: {', '.join(BACKBONES)}; also auto, bundled, NAME=FILE, a folder written by "
        "`iddc pretrain`, untrained:NAME, and names of timm with the tag of their weights."
    )


def _published(label: str, timm_name: str) -> Path:
    """The published weights of a name, from this machine or fetched."""
    known = lookup(label)
    if known is None and "." not in timm_name:
        import timm

        tags = ", ".join(timm.list_pretrained(f"{timm_name}.*")) or "none"
        raise ConfigError(
            f"{timm_name} does not say which weights. timm's: {tags}. "
            f"Random ones: untrained:{timm_name}; your own: {timm_name}=FILE."
        )
    return fetch_weights(timm_name, known.file if known else "", name=label)


def _statistics(label: str, timm_name: str) -> tuple[Colour, Colour]:
    """Mean and std as the tag says; without one, and for every key of BACKBONES, ImageNet's.

    timm's default for `vit_small_patch16_224` is 0.5, which is wrong for iBOT's weights.
    """
    if label in BACKBONES or "." not in timm_name:
        return IMAGENET_MEAN, IMAGENET_STD
    import timm

    cfg: Any = timm.get_pretrained_cfg(timm_name)
    return cfg.mean, cfg.std
