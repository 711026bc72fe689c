"""Weights files: read them safely, translate foreign layouts, and account for every tensor."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iddc.errors import DataError

NESTS = ("teacher", "state_dict", "model", "student")
"""Where checkpoints keep the weights, the preferred place first: iBOT and DINO; MAE, XCiT."""

PREFIXES = ("module.", "backbone.")
"""What DistributedDataParallel and DINO's multi-crop wrapper put before each name."""

DROPPED = (
    "head.",  # classifiers of timm; DINO's and iBOT's projection heads
    "head_dist.",  # DeiT's second classifier
    "fc.",  # ResNet's classifier
    "classifier.",
    "attn_pool.",  # makes one vector of all tokens
    "masked_embed",  # iBOT's embedding of a masked patch
    "mask_token",  # MAE's and DINOv2's
    "decoder",  # MAE's
    "projector.",  # Barlow Twins, VICReg
    "predictor.",  # BYOL, MoCo v3
)
"""Beginnings of the names that a dense embedding does not need."""


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors`, `.pth`, `.pt` or `.bin` file onto the CPU.

    Nothing in the file is executed. Checkpoints are unwrapped (NESTS, PREFIXES).

    Raises:
        DataError: The file is missing, of another kind, cut short, or holds foreign objects.
    """
    return _unwrap(read_file(file), file)


def read_file(file: Path) -> object:
    """Read what a weights file holds, as it is nested there, onto the CPU; see `read_weights`.

    Raises:
        DataError: The file is missing, of another kind, cut short, or holds foreign objects.
    """
    if not os.path.isfile(file):  # pathlib objects to names that are too long
        raise DataError(f"No weights file {file}.")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in {".pth", ".pt", ".bin", ".ckpt"}:
        return _read_pickle(file)
    raise DataError(f"{file} is no weights file: expected .safetensors, .pth, .pt, .bin or .ckpt.")


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a complete safetensors file: {error}.") from error


def _read_pickle(file: Path) -> object:
    try:
        if zipfile.is_zipfile(file):  # PyTorch never packs its tensors, and unpacks any
            with zipfile.ZipFile(file) as archive:
                if sum(item.file_size for item in archive.infolist()) > file.stat().st_size:
                    raise ValueError("it claims more than it holds")
        # Full checkpoints of DINO and iBOT hold their options as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} holds Python objects other than tensors{_foreign(file)}, or is no PyTorch "
            "file; it is not loaded, because such objects can run code. Save its state dict alone."
        ) from error
    except Exception as error:  # a damaged archive raises many things
        raise DataError(f"{file} is cut short, or no PyTorch file.") from error


def _foreign(file: Path) -> str:
    """The names of the kinds of objects in a file that are no tensors, where torch can tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the file is no archive of torch, or damaged
        return ""
    return f" ({_listed(names)})" if names else ""


def _unwrap(saved: object, file: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, with the names the backbone itself gives."""
    while isinstance(saved, Mapping):
        nest = next((key for key in NESTS if isinstance(saved.get(key), Mapping)), None)
        if nest is None:
            break
        saved = saved[nest]
    if not isinstance(saved, Mapping) or not any(isinstance(v, Tensor) for v in saved.values()):
        raise DataError(
            f"{file} holds no weights: expected names and tensors, also under {', '.join(NESTS)}."
        )
    foreign = [str(key) for key, value in saved.items() if not is_plain(value)]
    if foreign:
        raise DataError(f"{file} holds more than tensors beside its weights: {_listed(foreign)}.")
    state: dict[str, Tensor] = {}
    for key, value in saved.items():
        name = str(key)
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name in state:
            raise DataError(f"{file} holds {name} twice, with and without {' or '.join(PREFIXES)}.")
        state[name] = value
    return state


def is_plain(value: object) -> bool:
    """Whether it is a tensor with a number in the file for each of its elements."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def load_weights(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put a state dict of any known layout into a timm network; see `fitting_weights`."""
    net.load_state_dict(fitting_weights(net, state, source))


def fitting_weights(net: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Translate a state dict of any known layout to a timm network's; every tensor counts.

    Args:
        net: The network; it may be one without memory, on the device meta.
        state: Names and tensors, as `read_weights` gives them.
        source: Where they come from, for messages.

    Raises:
        DataError: A tensor is missing, unexpected, of another shape, or not finite.
    """
    wanted: dict[str, Tensor] = net.state_dict()
    kept = {k: v for k, v in state.items() if k in wanted or not k.startswith(DROPPED)}
    try:
        found = translate(kept, net)
    except (RuntimeError, ValueError, LookupError):  # tensors of odd shapes
        found = kept
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": [
            f"{key} (expected {tuple(wanted[key].shape)}, found {tuple(value.shape)})"
            for key, value in found.items()
            if key in wanted and wanted[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in problems.items() if keys)
        raise DataError(f"{source} does not fit this architecture. Tensors {text}.")
    if broken := not_numbers(found, wanted):
        raise DataError(f"{source} does not fit this architecture: {_listed(broken)}.")
    return found


def not_numbers(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Say which tensors hold NaN or infinity, or are no kind of number that is wanted there."""
    problems = []
    for name in found.keys() & wanted.keys():
        value = found[name]
        if value.is_floating_point() != wanted[name].is_floating_point():
            problems.append(f"{name} is of type {value.dtype} instead of {wanted[name].dtype}")
        elif not value.float().isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def translate(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a foreign layout to those of a timm network.

    XCiT's authors call the position encoding `pos_embeder` and join q, k and v of class attention.
    DINOv2's authors give the class token a position of its own even beside registers. Average
    pooling in timm turns the final norm into `fc_norm`. Position embeddings learned on a square
    grid of another size are interpolated.
    """
    wanted: dict[str, Tensor] = net.state_dict()
    found: dict[str, Any] = {}
    for key, value in state.items():
        name = key.replace("pos_embeder.", "pos_embed.")
        if name.startswith("fc_norm.") and name not in wanted and name[3:] not in state:
            name = name[3:]
        joined = re.fullmatch(r"(.*\.)qkv(\..*)", name)
        if joined and name not in wanted and f"{joined[1]}q{joined[2]}" in wanted:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                found[f"{joined[1]}{part}{joined[2]}"] = tensor
        else:
            found[name] = value
    if "register_tokens" in found and {"cls_token", "pos_embed"} <= found.keys():
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    if "pos_embed" in found and "pos_embed" in wanted:
        found["pos_embed"] = _regridded(found["pos_embed"], wanted["pos_embed"], net)
    return found


def _regridded(found: Tensor, wanted: Tensor, net: Any) -> Tensor:
    """Interpolate position embeddings; what cannot be is returned as it is."""
    if found.shape == wanted.shape or found.ndim != 3 or found.shape[2] != wanted.shape[2]:
        return found
    from timm.layers.pos_embed import resample_abs_pos_embed

    prefix = wanted.shape[1] - math.prod(net.patch_embed.grid_size)
    patches = found.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        return found
    resized: Tensor = resample_abs_pos_embed(
        found, list(net.patch_embed.grid_size), [side, side], num_prefix_tokens=prefix
    )
    return resized


def _listed(names: Iterable[str], most: int = 12) -> str:
    """Up to `most` names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
