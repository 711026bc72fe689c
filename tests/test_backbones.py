"""Backbones: shapes, features, names, and weights files in the layouts of their authors."""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from iddc import backbones
from iddc.backbones import (
    BACKBONES,
    Architecture,
    Backbone,
    KnownBackbone,
    build_backbone,
    is_here,
    licence_of,
    load_backbone,
    reduced_backbone,
    resolve,
    save_backbone,
    untrained_backbone,
)
from iddc.backbones import known as known_module
from iddc.backbones.known import BUNDLED
from iddc.backbones.weights import DROPPED, load_weights, read_weights
from iddc.config import BackboneName
from iddc.datasets.synthetic import draw_scene
from iddc.errors import ConfigError, DataError, SetupError
from tiny import some_images, with_random_tensors

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "dinov2": (
        "vit_small_patch14_reg4_dinov2",
        {"embed_dim": 32, "depth": 2, "num_heads": 2},
    ),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "gap": (
        "vit_wee_patch16_reg1_gap_256",
        {"embed_dim": 32, "depth": 2, "num_heads": 2},
    ),
    "xcit": (
        "xcit_small_12_p16_224",
        {"embed_dim": 32, "depth": 1, "num_heads": 2},
    ),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
}
PLAIN = ["vit", "dinov2", "dinov3", "gap", "xcit"]


def tiny(kind: str, seed: int = 0) -> Backbone:
    """A small backbone whose every tensor, class token and norm too, is random."""
    torch.manual_seed(seed)
    name, options = TINY[kind]
    return with_random_tensors(untrained_backbone(name, options=options))


def tokens_of(net: Any, images: Tensor) -> Tensor:
    """timm's own answer, with class token and registers."""
    return net.forward_features((images - MEAN) / STD)


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def vit_by_hand(state: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """The ViT of facebookresearch/dino from its tensors alone: all tokens after the final norm."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    width, _, patch, _ = kernel.shape
    cells = ((images - MEAN) / STD).unfold(2, patch, patch).unfold(3, patch, patch)
    cells = cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = cells @ kernel.flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    block = 0
    while f"blocks.{block}.norm1.weight" in state:
        at = f"blocks.{block}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").split(width, -1)
        out = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width // heads)
            out.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(out, -1), f"{at}.attn.proj")
        hidden = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, f"{at}.mlp.fc2")
        block += 1
    return norm(x, "norm")


# The table


def test_the_table_and_the_names_of_the_configuration_are_the_same() -> None:
    assert tuple(BACKBONES) == get_args(BackboneName)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_known_backbone_has_the_patch_and_the_width_that_the_table_says(name: str) -> None:
    known = BACKBONES[name]
    backbone = untrained_backbone(known.timm_name, options={"depth": 1})
    assert (backbone.patch_size, backbone.embed_dim) == (known.patch_size, known.width)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_can_be_fetched_is_where_timm_says(name: str) -> None:
    known = BACKBONES[name]
    if known.needs_file:
        assert timm.is_model(known.timm_name)
        return
    cfg = timm.get_pretrained_cfg(known.timm_name, allow_unregistered=False)
    assert cfg.hf_hub_id == f"timm/{known.timm_name}"
    if known.file.endswith(".pth"):
        assert cfg.url.endswith(f"/{known.file}")


def test_only_the_licence_of_dinov3_is_not_apache() -> None:
    assert {n for n, k in BACKBONES.items() if k.licence != "Apache-2.0"} == {
        "dinov3-vits16",
        "dinov3-vitb16",
    }


def test_no_module_imports_timm_or_the_hub_before_they_are_needed() -> None:
    for path in Path(backbones.__file__).parent.glob("*.py"):
        top = {ast.unparse(node) for node in ast.parse(path.read_text()).body}
        slow = {line for line in top if re.match(r"(import|from) (timm|huggingface_hub)", line)}
        assert not slow, path


# Features


def test_features_of_a_vit_are_the_patch_tokens_of_the_network_by_hand() -> None:
    backbone = tiny("vit")
    images = some_images(224, 224)
    with torch.no_grad():
        found = backbone(images)
        tokens = vit_by_hand(backbone.net.state_dict(), images, heads=2)
    torch.testing.assert_close(found, as_map(tokens[:, 1:], 14, 14), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "prefix"), [("dinov2", 5), ("dinov3", 5), ("gap", 1)])
def test_class_token_and_registers_are_dropped(kind: str, prefix: int) -> None:
    backbone = tiny(kind)
    patch = backbone.patch_size
    images = some_images(2 * patch, 3 * patch)
    with torch.no_grad():
        tokens = tokens_of(backbone.net, images)
        found = backbone(images)
    assert tokens.shape[1] == prefix + 6
    torch.testing.assert_close(found, as_map(tokens[:, prefix:], 2, 3))


def test_features_of_xcit_leave_its_class_token_out() -> None:
    backbone = tiny("xcit")
    images = some_images(32, 48)
    with torch.no_grad():
        tokens = tokens_of(backbone.net, images)
        torch.testing.assert_close(backbone(images), as_map(tokens[:, 1:], 2, 3))


@pytest.mark.parametrize("kind", PLAIN)
def test_the_final_norm_is_applied_to_every_patch(kind: str) -> None:
    name, options = TINY[kind]
    backbone = untrained_backbone(name, options=options).eval()
    with torch.no_grad():
        features = backbone(some_images(64, 64))
    # A fresh LayerNorm leaves each patch with mean 0 and variance 1 over its channels.
    torch.testing.assert_close(
        features.mean(1), torch.zeros(2, *features.shape[2:]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        features.var(1, correction=0), torch.ones(2, *features.shape[2:]), atol=1e-2, rtol=0
    )


def cubic_by_hand(values: np.ndarray, length: int) -> np.ndarray:
    """DINO's interpolation of the first axis: Keys' kernel of a = -0.75, the offset 0.1."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    side, result = len(values), []
    for i in range(length):
        place = (i + 0.5) * side / (length + 0.1) - 0.5
        low = math.floor(place)
        taps = [(kernel(place - j), min(max(j, 0), side - 1)) for j in range(low - 1, low + 3)]
        result.append(sum(weight * values[j] for weight, j in taps))
    return np.stack(result)


@pytest.mark.parametrize("grid", [(7, 5), (20, 20), (14, 15), (14, 14)], ids=str)
def test_positions_of_dino_are_interpolated_as_dino_does_it(grid: tuple[int, int]) -> None:
    name, options = TINY["vit"]
    torch.manual_seed(4)
    backbone = untrained_backbone(name, options=options, positions="dino").eval()
    with torch.no_grad():
        backbone.net.pos_embed.copy_(torch.randn_like(backbone.net.pos_embed))
    # A copy and a rebuilt one interpolate their own positions.
    copied = copy.deepcopy(backbone)
    rebuilt = build_backbone(Architecture.model_validate(backbone.architecture.model_dump()))
    rebuilt.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        backbone.net.pos_embed.zero_()
    images = some_images(16 * grid[0], 16 * grid[1])
    state = dict(copied.net.state_dict())
    first, patches = state["pos_embed"][:, :1], state["pos_embed"][0, 1:].unflatten(0, (14, 14))
    if grid != (14, 14):
        rows = cubic_by_hand(patches.double().numpy(), grid[0])
        columns = cubic_by_hand(rows.transpose(1, 0, 2), grid[1]).transpose(1, 0, 2)
        patches = torch.from_numpy(columns).float()
    state["pos_embed"] = torch.cat([first, patches.flatten(0, 1)[None]], 1)
    with torch.no_grad():
        expected = as_map(vit_by_hand(state, images, 2)[:, 1:], *grid)
        for network in (copied, rebuilt.eval()):
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("label", "positions"),
    [
        ("dino-vits16", "dino"),
        ("ibot-vitb16", "dino"),
        ("dino-xcits12-p8", "timm"),
        ("dinov2-vits14", "timm"),
        ("dinov3-vits16", "timm"),
        ("vit_base_patch8_224.dino", "dino"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "timm"),
        ("vit_small_patch16_224", "timm"),
    ],
)
def test_only_the_vits_of_dino_and_ibot_interpolate_as_dino_does(
    label: str, positions: str
) -> None:
    known = dict(BACKBONES).get(label)
    assert known_module.positions_of(label, known.timm_name if known else label) == positions


def test_positions_of_dino_need_learned_positions() -> None:
    with pytest.raises(ConfigError, match="positions 'dino' need positions learned"):
        untrained_backbone("test_resnet", positions="dino")


def test_positions_are_interpolated_to_another_size_as_timm_does_it() -> None:
    backbone = tiny("vit")
    name, options = TINY["vit"]
    fixed = timm.create_model(name, num_classes=0, **options).eval()
    fixed.load_state_dict(backbone.net.state_dict())
    fixed.set_input_size((64, 96))
    images = some_images(64, 96)
    with torch.no_grad():
        expected = as_map(tokens_of(fixed, images)[:, 1:], 4, 6)
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


@given(height=st.integers(1, 80), width=st.integers(1, 80), kind=st.sampled_from([*TINY]))
def test_the_grid_is_the_size_in_patches_rounded_and_at_least_one(
    height: int, width: int, kind: str
) -> None:
    backbone = BUILT.setdefault(kind, tiny(kind))
    patch = backbone.patch_size
    # A hierarchical network sees at least one step of its coarsest stage, stride 32.
    least = 32 // patch if backbone.architecture.stages else 1
    expected = [max(math.floor(side / patch + 0.5), least) for side in (height, width)]
    with torch.no_grad():
        features = backbone(some_images(height, width, batch=1))
    assert features.shape == (1, backbone.embed_dim, *expected)


BUILT: dict[str, Backbone] = {}


def test_a_size_that_is_no_multiple_of_the_patch_is_resized_bilinearly() -> None:
    backbone = tiny("vit")
    images = some_images(37, 50)
    resized = nn.functional.interpolate(images, (32, 48), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), backbone(resized))


def test_bytes_and_fractions_of_255_give_the_same_features() -> None:
    backbone = tiny("vit")
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), backbone(images.float() / 255))


@pytest.mark.parametrize("kind", TINY)
def test_under_bf16_autocast_features_are_single_precision_and_close(kind: str) -> None:
    backbone = tiny(kind)
    images = (some_images(64, 64) * 255).to(torch.uint8)
    with torch.no_grad():
        exact = backbone(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backbone(images)
    assert found.dtype == torch.float32
    assert nn.functional.cosine_similarity(found, exact, dim=1).min() > 0.98


@pytest.mark.parametrize("kind", TINY)
def test_training_mode_changes_neither_features_nor_buffers(kind: str) -> None:
    backbone = tiny(kind)
    images = some_images(64, 64)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with torch.no_grad():
        expected = backbone(images)
        torch.testing.assert_close(backbone.train()(images), expected)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_new_backbone_has_its_batch_norms_in_evaluation() -> None:
    for backbone in (untrained_backbone("test_resnet"), build_backbone(tiny("xcit").architecture)):
        norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert not any(norm.training for norm in norms)
        assert backbone.training


def test_gradients_reach_every_parameter_of_a_vit_unless_it_is_frozen() -> None:
    backbone = tiny("vit")
    images = some_images(32, 32)
    backbone.net.blocks[0].requires_grad_(False)
    backbone(images).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        frozen = name.startswith("net.blocks.0.")
        assert (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.any(), name


def test_in_double_precision_features_are_double() -> None:
    backbone = tiny("vit").double()
    assert backbone(some_images(32, 32)).dtype == torch.float64


# Hierarchical networks


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_stages_are_normalised_scaled_resized_and_concatenated(name: str) -> None:
    backbone = untrained_backbone(name).eval()
    source = timm.create_model(name, features_only=True).eval()
    strides = source.feature_info.reduction()
    chosen = tuple(i for i, stride in enumerate(strides) if stride in {8, 16, 32})
    assert backbone.architecture.stages == chosen
    assert backbone.patch_size == 8

    source.load_state_dict(
        dict(zip(source.state_dict(), backbone.net.state_dict().values(), strict=False))
    )
    images = some_images(64, 96)
    parts = []
    with torch.no_grad():
        for stage in (source((images - MEAN) / STD)[i] for i in chosen):
            lengths = stage.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
            part = stage / lengths * math.sqrt(stage.shape[1])
            parts.append(nn.functional.interpolate(part, (8, 12), mode="bilinear"))
        torch.testing.assert_close(backbone(images), torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_the_finest_chosen_stage_is_the_patch_size() -> None:
    backbone = untrained_backbone("test_resnet", stages=(3, 1))
    assert backbone.architecture.stages == (1, 3)
    assert (backbone.patch_size, backbone.embed_dim) == (4, 32 + 192)
    assert backbone(some_images(20, 33)).shape == (2, 224, 5, 8)


def test_stages_of_a_plain_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="no stages to choose from"):
        untrained_backbone("test_vit", stages=(1,))


def test_a_windowed_network_takes_images_of_any_size() -> None:
    if "strict_img_size" not in inspect.signature(timm.models.SwinTransformer).parameters:
        pytest.skip("the Swin of this timm takes one size only")
    backbone = untrained_backbone(
        "swin_tiny_patch4_window7_224",
        options={"embed_dim": 24},
    ).eval()
    assert backbone(some_images(72, 40)).shape == (2, 48 + 96 + 192, 9, 5)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "no_such_network"])
def test_a_network_that_takes_one_size_only_or_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} cannot be a backbone"):
        untrained_backbone(name, options={} if name.startswith("no") else {"depth": 1})


# Rebuilding and folders


@pytest.mark.parametrize("kind", TINY)
def test_an_architecture_rebuilds_its_backbone_through_json(kind: str) -> None:
    backbone = tiny(kind)
    text = backbone.architecture.model_dump_json()
    twin = build_backbone(Architecture.model_validate_json(text)).eval()
    twin.load_state_dict(backbone.state_dict())
    images = some_images(48, 70)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), backbone(images), rtol=0, atol=0)


def test_an_architecture_that_timm_cannot_build_says_which_timm_this_is() -> None:
    architecture = tiny("vit").architecture.model_copy(update={"timm_name": "vit_of_tomorrow"})
    with pytest.raises(SetupError, match=rf"timm {timm.__version__} cannot build vit_of_tomorrow"):
        build_backbone(architecture)


@pytest.mark.parametrize("kind", TINY)
def test_a_saved_folder_loads_as_the_same_backbone(kind: str, tmp_path: Path) -> None:
    backbone = tiny(kind)
    save_backbone(backbone, tmp_path / "mine")
    loaded = load_backbone(str(tmp_path / "mine"))
    assert loaded.architecture == backbone.architecture
    assert not loaded.training
    images = some_images(48, 70)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), backbone(images), rtol=0, atol=0)


def test_the_components_are_saved_with_the_backbone(tmp_path: Path) -> None:
    images = some_images(64, 64)
    backbone = reduced_backbone(tiny("resnet"), 5, [*images.split(1)])
    save_backbone(backbone, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_backbone(str(tmp_path))(images), backbone(images))


def test_the_bundled_backbone_is_a_saved_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny("resnet")
    save_backbone(backbone, tmp_path)
    for module in (backbones, known_module):
        monkeypatch.setattr(module, "BUNDLED", tmp_path)
    assert is_here("bundled")
    assert load_backbone("bundled").architecture == backbone.architecture


def test_the_package_has_a_backbone_of_at_most_25_mb_with_a_card() -> None:
    facts = backbones.bundled_backbone()
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 25e6
    backbone = load_backbone("bundled")
    assert (backbone.patch_size, backbone.embed_dim) == (facts.patch_size, facts.width)
    card = (BUNDLED / "README.md").read_text("utf-8")
    for word in ("research-only", "CamVid", facts.licence):
        assert word in card


def test_embeddings_of_the_bundled_backbone_tell_drawn_things_apart() -> None:
    """More clearly than with random weights: pairs of one class, against pairs of two."""
    scene, label = draw_scene(np.random.default_rng(0), (192, 128))
    pixels = torch.from_numpy(scene.transpose(2, 0, 1).copy())[None]
    classes = torch.from_numpy(label[4::8, 4::8].copy()).flatten()

    def gap(backbone: Backbone) -> float:
        with torch.no_grad():
            rows = backbone(pixels).flatten(2)[0].T
        rows = nn.functional.normalize(rows - rows.mean(0), dim=1)
        cosines, same = rows @ rows.T, classes[:, None] == classes
        return float(cosines[same].mean() - cosines[~same].mean())

    torch.manual_seed(0)
    assert gap(load_backbone("bundled")) > 1.2 * gap(load_backbone("untrained:resnet18"))


def test_without_a_bundled_backbone_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_module, "BUNDLED", tmp_path)
    assert not is_here("bundled")
    with pytest.raises(SetupError, match="no bundled backbone"):
        load_backbone("bundled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2, and this iddc .* reads formats up to 1"),
        ({"patch_size": 0}, "does not describe a backbone: patch-size: .* found 0"),
        ({"colour": "red"}, "unknown option colour"),
        ({"timm_name": "vit_of_tomorrow"}, "cannot build vit_of_tomorrow"),
    ],
)
def test_a_changed_description_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_backbone(tiny("vit"), tmp_path)
    path = tmp_path / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((DataError, SetupError), match=message):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_a_description_of_another_program_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "backbone.json").write_text(text)
    with pytest.raises(DataError, match="is not a description written by `iddc pretrain`"):
        load_backbone(str(tmp_path))


def test_a_folder_with_the_weights_of_another_architecture_is_refused(tmp_path: Path) -> None:
    save_backbone(tiny("vit"), tmp_path)
    save_file(tiny("xcit").net.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(DataError, match=r"does not fit this architecture.*missing.*unexpected"):
        load_backbone(str(tmp_path))


def test_a_folder_whose_weights_are_cut_short_is_refused(tmp_path: Path) -> None:
    save_backbone(tiny("vit"), tmp_path)
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        load_backbone(str(tmp_path))


def test_a_folder_without_a_description_is_no_weights_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no backbone\.json"):
        load_backbone(str(tmp_path))


def test_a_folder_that_cannot_be_written_is_a_set_up_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="Cannot write"):
        save_backbone(tiny("resnet"), tmp_path / "file" / "folder")


# Weights files


def dino(state: dict[str, Tensor]) -> object:
    return dict(state)


def dino_full(state: dict[str, Tensor]) -> object:
    """A training checkpoint of DINO or iBOT."""
    head = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2)}
    other = {"module.backbone.cls_token": torch.zeros(1)}
    return {
        "student": other,
        "teacher": {f"backbone.{k}": v for k, v in state.items()} | head,
        "epoch": 100,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(arch="vit_small"),
    }


def dino_student(state: dict[str, Tensor]) -> object:
    return {"student": {f"module.backbone.{k}": v for k, v in state.items()}}


def ibot(state: dict[str, Tensor]) -> object:
    extra = {"masked_embed": torch.zeros(1, 32), "head.last_layer.weight": torch.ones(2, 2)}
    return {"state_dict": dict(state) | extra}


def mae(state: dict[str, Tensor]) -> object:
    extra = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 5, 8),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
    }
    return {"model": dict(state) | extra}


def classifier(state: dict[str, Tensor]) -> object:
    return dict(state) | {"head.weight": torch.ones(9, 32), "fc.bias": torch.ones(9)}


LAYOUTS: list[Callable[[dict[str, Tensor]], object]] = [
    dino,
    dino_full,
    dino_student,
    ibot,
    mae,
    classifier,
]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_in_a_layout_of_its_authors_gives_the_features_of_the_source(
    layout: Callable[[dict[str, Tensor]], object], suffix: str, tmp_path: Path
) -> None:
    source = tiny("vit", seed=3)
    path = tmp_path / f"weights{suffix}"
    torch.save(layout(source.net.state_dict()), path)
    backbone = tiny("vit", seed=4)
    load_weights(backbone.net, read_weights(path), str(path))
    images = some_images(224, 224, batch=1)
    with torch.no_grad():
        tokens = vit_by_hand(source.net.state_dict(), images, heads=2)
        expected = as_map(tokens[:, 1:], 14, 14)
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-4)


def xcit_of_its_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names and tensors back in the layout of facebookresearch/xcit."""
    original: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("cls_attn_blocks.") and ".attn.q." in key:
            parts = [state[key.replace(".q.", f".{part}.")] for part in "qkv"]
            original[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif key.startswith("cls_attn_blocks.") and (".attn.k." in key or ".attn.v." in key):
            continue
        else:
            original[key.replace("pos_embed.", "pos_embeder.")] = value
    return original


def test_a_file_of_xcit_s_authors_gives_the_features_of_the_source(tmp_path: Path) -> None:
    source = tiny("xcit", seed=3)
    original = xcit_of_its_authors(source.net.state_dict())
    assert "pos_embeder.token_projection.weight" in original
    assert original["cls_attn_blocks.0.attn.qkv.weight"].shape == (96, 32)
    assert original["blocks.0.attn.qkv.weight"].shape == (96, 32)
    torch.save(original, tmp_path / "dino_xcit.pth")

    backbone = tiny("xcit", seed=4)
    load_weights(backbone.net, read_weights(tmp_path / "dino_xcit.pth"), "file")
    for key, value in source.net.state_dict().items():
        assert torch.equal(backbone.net.state_dict()[key], value), key
    images = some_images(32, 64)
    with torch.no_grad():
        expected = as_map(tokens_of(source.net, images)[:, 1:], 2, 4)
        torch.testing.assert_close(backbone(images), expected)


def test_xcit_is_translated_as_timm_translates_it() -> None:
    from timm.models.xcit import checkpoint_filter_fn

    source = tiny("xcit", seed=3)
    original = xcit_of_its_authors(source.net.state_dict())
    expected = checkpoint_filter_fn(dict(original), source.net)
    backbone = tiny("xcit", seed=4)
    load_weights(backbone.net, original, "file")
    found = backbone.net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_file_of_dinov2_s_authors_with_registers_loads_as_timm_loads_it() -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    backbone = tiny("dinov2")
    original = {k: torch.rand_like(v) for k, v in backbone.net.state_dict().items()}
    original["register_tokens"] = original.pop("reg_token")
    positions = original["pos_embed"].shape[1]
    original["pos_embed"] = torch.rand(1, positions + 1, 32)
    original["mask_token"] = torch.rand(1, 32)
    expected = checkpoint_filter_fn(dict(original), backbone.net)
    load_weights(backbone.net, original, "file")
    found = backbone.net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_final_norm_behind_average_pooling_is_the_final_norm() -> None:
    name, options = TINY["gap"]
    source = timm.create_model(name, num_classes=3, **options)
    nn.init.uniform_(source.fc_norm.weight)
    state = source.state_dict()
    assert "norm.weight" not in state
    backbone = tiny("gap")
    load_weights(backbone.net, state, "file")
    assert torch.equal(backbone.net.norm.weight, source.fc_norm.weight)
    with pytest.raises(DataError, match=r"unexpected: fc_norm\.weight"):
        load_weights(backbone.net, state | {"norm.weight": state["fc_norm.weight"]}, "file")


def test_half_precision_weights_are_loaded_in_single() -> None:
    source = tiny("vit", seed=3).net.state_dict()
    backbone = tiny("vit", seed=4)
    load_weights(backbone.net, {k: v.half() for k, v in source.items()}, "file")
    for key, value in backbone.net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, source[key].half().float())


def test_every_missing_tensor_is_an_error_that_names_it() -> None:
    backbone = tiny("vit")
    state = backbone.net.state_dict()
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        with pytest.raises(DataError, match=f"missing: {key}"):
            load_weights(backbone.net, rest, "file")


@pytest.mark.parametrize("name", ["blocks.2.norm1.weight", "norm.extra", "headless", "ema.norm"])
def test_an_unexpected_tensor_is_an_error_that_names_it(name: str) -> None:
    backbone = tiny("vit")
    state = backbone.net.state_dict() | {name: torch.ones(1)}
    with pytest.raises(DataError, match=f"unexpected: {name}"):
        load_weights(backbone.net, state, "file")


def test_a_tensor_of_another_shape_is_listed_with_both_shapes() -> None:
    backbone = tiny("vit")
    state = backbone.net.state_dict() | {"norm.weight": torch.ones(7)}
    message = r"of another shape: norm\.weight \(expected \(32,\), found \(7,\)\)"
    with pytest.raises(DataError, match=message):
        load_weights(backbone.net, state, "file")


def test_an_error_changes_no_tensor() -> None:
    backbone = tiny("vit")
    before = {k: v.clone() for k, v in backbone.net.state_dict().items()}
    state = {k: torch.zeros_like(v) for k, v in before.items()} | {"new": torch.zeros(1)}
    with pytest.raises(DataError):
        load_weights(backbone.net, state, "file")
    assert all(torch.equal(v, before[k]) for k, v in backbone.net.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    backbone = tiny("vit")
    state = {k: v.clone() for k, v in backbone.net.state_dict().items()}
    state["blocks.1.mlp.fc1.bias"][3] = value
    with pytest.raises(DataError, match=r"blocks\.1\.mlp\.fc1\.bias holds NaN or infinity"):
        load_weights(backbone.net, state, "file")


def test_a_dropped_name_that_the_network_has_is_kept() -> None:
    backbone = tiny("convnext")
    state = {k: v + 1 for k, v in backbone.net.state_dict().items()}
    heads = [key for key in state if key.startswith(DROPPED)]
    assert heads
    load_weights(backbone.net, state, "file")
    assert all(torch.equal(backbone.net.state_dict()[key], state[key]) for key in heads)


def test_positions_of_another_grid_are_interpolated_and_the_class_token_s_is_kept() -> None:
    backbone = tiny("vit")
    state = dict(backbone.net.state_dict())
    ramp = (torch.arange(24.0) + 0.5) / 24
    positions = ramp.view(1, 24, 1, 1).expand(1, 24, 24, 32).reshape(1, 576, 32)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 32), 9.0), positions], 1)
    load_weights(backbone.net, state, "file")
    found = backbone.net.pos_embed.detach()
    assert found.shape == (1, 197, 32)
    assert (found[:, 0] == 9).all()
    grid = found[0, 1:, 0].view(14, 14)
    expected = (torch.arange(14.0) + 0.5) / 14
    # A ramp stays a ramp away from the border, where the filter has no values to look at.
    torch.testing.assert_close(grid[2:-2, 5], expected[2:-2], atol=1e-3, rtol=0)


def test_positions_of_no_square_grid_are_refused_with_both_shapes() -> None:
    backbone = tiny("vit")
    state = backbone.net.state_dict() | {"pos_embed": torch.rand(1, 1 + 14 * 13, 32)}
    with pytest.raises(DataError, match=r"pos_embed \(expected \(1, 197, 32\), found \(1, 183, 32"):
        load_weights(backbone.net, state, "file")


class Foreign:
    """An object that no weights file should hold."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.save({"model": Foreign()}, p), "Python objects other than tensors"),
        (lambda p: p.write_text("a photo, really"), "Python objects other than tensors|no PyTorch"),
        (lambda p: p.write_bytes(b""), "cut short, or no PyTorch file"),
        (lambda p: torch.save([torch.ones(2)], p), "holds no weights"),
        (lambda p: torch.save({"epoch": 3}, p), "holds no weights"),
        (lambda p: torch.save({}, p), "holds no weights"),
        (
            lambda p: torch.save({"norm.weight": torch.ones(2), "epoch": 3}, p),
            "more than tensors beside its weights: epoch",
        ),
        (
            lambda p: torch.save(
                {"norm.bias": torch.ones(2), "backbone.norm.bias": torch.ones(2)}, p
            ),
            r"norm\.bias twice",
        ),
    ],
)
def test_a_file_without_a_plain_state_dict_is_refused(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(DataError, match=message):
        read_weights(path)


def test_a_foreign_object_is_never_built(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(DataError):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tiny("vit").net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match="cut short, or no PyTorch file"):
        read_weights(path)


@pytest.mark.parametrize("name", ["weights.npz", "weights"])
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"expected \.safetensors, \.pth, \.pt, \.bin or \.ckpt"):
        read_weights(tmp_path / name)


def test_a_missing_file_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"No weights file nowhere\.pth"):
        load_backbone("test_vit=nowhere.pth")


# Names


def test_a_name_and_a_file_load_that_network(tmp_path: Path) -> None:
    source = untrained_backbone("test_vit").eval()
    save_file(source.net.state_dict(), tmp_path / "odd=name.safetensors")
    loaded = load_backbone(f"test_vit={tmp_path / 'odd=name.safetensors'}")
    images = some_images(40, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), source(images), rtol=0, atol=0)


def test_a_known_name_and_a_file_normalise_with_the_statistics_of_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timm.get_pretrained_cfg("vit_small_patch16_224").mean == (0.5, 0.5, 0.5)
    tiny_ibot = KnownBackbone("test_vit", 16, 64, "checkpoint_teacher.pth", "bytedance/ibot")
    monkeypatch.setitem(BACKBONES, "ibot-vits16", tiny_ibot)
    assert timm.get_pretrained_cfg("test_vit").mean == (0.5, 0.5, 0.5)
    torch.save({"state_dict": untrained_backbone("test_vit").net.state_dict()}, tmp_path / "a.pth")
    architecture = load_backbone(f"ibot-vits16={tmp_path / 'a.pth'}").architecture
    assert architecture.timm_name == "test_vit"
    np.testing.assert_allclose(architecture.mean, MEAN.flatten())
    np.testing.assert_allclose(architecture.std, STD.flatten())


def test_a_tag_says_the_statistics_and_the_size_of_the_positions(tmp_path: Path) -> None:
    cfg = timm.get_pretrained_cfg("test_vit.r160_in1k")
    torch.save(untrained_backbone("test_vit.r160_in1k").net.state_dict(), tmp_path / "a.pth")
    architecture = load_backbone(f"test_vit.r160_in1k={tmp_path / 'a.pth'}").architecture
    assert architecture.mean == cfg.mean
    assert architecture.image_size == cfg.input_size[-1] == 160


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("dino-vits61", "dino-vits16"),
        ("dino_vits16", "dino-vits16"),
        ("bundeld", "bundled"),
        ("untrained:vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_small_patch16_224.dinno", r"vit_small_patch16_224\.dino"),
        ("dino-vitb61=file.pth", "dino-vitb16"),
    ],
)
def test_an_unknown_name_lists_the_known_and_suggests_the_nearest(
    name: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError, match=f"perhaps you meant {suggestion}") as error:
        load_backbone(name)
    assert all(known in str(error.value) for known in BACKBONES)


def test_a_network_without_a_tag_does_not_say_which_weights() -> None:
    with pytest.raises(ConfigError, match=r"\.dino.*untrained:vit_small_patch16_224;"):
        load_backbone("vit_small_patch16_224")


def test_a_file_alone_does_not_say_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pass NAME=.*a\.pth"):
        load_backbone(str(tmp_path / "a.pth"))


def test_untrained_weights_follow_the_generator_of_the_caller() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return load_backbone("untrained:test_vit").net.patch_embed.proj.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# Caches and the network


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No weights on this machine, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(known_module, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(backbones, "BUNDLED", tmp_path / "bundled")
    return tmp_path


def in_hub_cache(root: Path, timm_name: str, file: str = "model.safetensors") -> Path:
    """Where the hub's library keeps a file it has downloaded."""
    repository = root / "hub" / f"models--timm--{timm_name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    path = repository / "snapshots" / "c0ffee" / file
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("name", BACKBONES)
def test_without_weights_the_error_says_which_file_to_pass(name: str, empty_caches: Path) -> None:
    assert not is_here(name)
    start = time.monotonic()
    with pytest.raises(SetupError, match=f"--backbone {name}={BACKBONES[name].file}"):
        load_backbone(name)
    assert time.monotonic() - start < 10  # Importing timm takes its time; waiting must not.


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_timm_has_cached_are_used(file: str, empty_caches: Path) -> None:
    source = untrained_backbone("test_vit.r160_in1k").eval()
    path = in_hub_cache(empty_caches, "test_vit.r160_in1k", file)
    save = save_file if file.endswith("safetensors") else torch.save
    save(source.net.state_dict(), path)
    loaded = load_backbone("test_vit.r160_in1k")
    assert torch.equal(loaded.net.pos_embed, source.net.pos_embed)


def test_weights_that_torch_hub_has_cached_are_found_by_their_published_name(
    empty_caches: Path,
) -> None:
    folder = empty_caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "dino_deitsmall8_300ep_pretrain.pth").write_bytes(b"x")
    (folder / "checkpoint_teacher.pth").write_bytes(b"x")
    here = {name for name in BACKBONES if is_here(name)}
    assert here == {"dino-vits8-300ep"}  # Three backbones of iBOT share a file name.


def test_auto_is_dino_where_its_weights_are_cached(empty_caches: Path) -> None:
    in_hub_cache(empty_caches, "vit_small_patch16_224.dino").write_bytes(b"x")
    save_backbone(tiny("resnet"), empty_caches / "bundled")
    assert resolve("auto") == "dino-vits16"


def test_auto_is_bundled_without_network(empty_caches: Path) -> None:
    save_backbone(tiny("resnet"), empty_caches / "bundled")
    assert resolve("auto") == "bundled"
    assert load_backbone("auto").architecture == tiny("resnet").architecture


def test_auto_without_any_weights_says_what_to_do(empty_caches: Path) -> None:
    message = "dino-vits16=dino_deitsmall16_pretrain.pth.*untrained:vit_small_patch16_224"
    with pytest.raises(SetupError, match=message):
        resolve("auto")


def test_other_names_resolve_to_themselves() -> None:
    assert resolve("ibot-vits16=a.pth") == "ibot-vits16=a.pth"


def test_without_network_fetching_fails_at_once(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's library itself would retry for twenty seconds."""
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        nobody + "/{repo_id}/resolve/{revision}/{filename}",
    )
    start = time.monotonic()
    with pytest.raises(SetupError, match=r"could not be fetched \((Connect|Offline)"):
        load_backbone("dino-vits16")
    assert time.monotonic() - start < 10


@pytest.fixture
def hub(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that publishes one file and says what it wants of it; what was asked is in `asked`."""
    source = untrained_backbone("test_vit.r160_in1k").eval()
    file = empty_caches / "fetched.safetensors"
    save_file(source.net.state_dict(), file)
    told = SimpleNamespace(
        commit_hash="abc123", etag=sha256(file.read_bytes()).hexdigest(), net=source.net, asked=[]
    )

    def download(repository: str, name: str, revision: str) -> str:
        told.asked.append((repository, name, revision))
        return str(file)

    def facts(_: str, timeout: float) -> Any:
        assert 0 < timeout <= 5  # somebody waits for it
        return told

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", facts)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return told


def test_weights_that_can_be_fetched_are_fetched_once_asked_for(hub: Any) -> None:
    assert torch.equal(load_backbone("test_vit.r160_in1k").net.pos_embed, hub.net.pos_embed)
    assert hub.asked == [("timm/test_vit.r160_in1k", "model.safetensors", "abc123")]


@pytest.mark.parametrize("etag", ["0" * 64, "W/1234", None])
def test_fetched_weights_with_another_checksum_than_the_hub_says_are_refused(
    hub: Any, etag: str | None
) -> None:
    hub.etag = etag
    with pytest.raises(SetupError, match=r"SHA-256.*abc123|abc123.*SHA-256"):
        load_backbone("test_vit.r160_in1k")


def test_damaged_weights_are_not_kept_for_the_next_time(hub: Any, empty_caches: Path) -> None:
    (empty_caches / "fetched.safetensors").write_bytes(b"cut short")
    with pytest.raises(SetupError, match="are damaged: expected SHA-256"):
        load_backbone("test_vit.r160_in1k")
    assert not (empty_caches / "fetched.safetensors").exists()


# Licences and sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "licence"),
    [
        ("bundled", "CC BY-NC 4.0"),
        ("dino-vits16", "Apache-2.0"),
        ("dino-vits8-300ep=/tmp/a=b.pth", "Apache-2.0"),
        ("dinov3-vits16", "DINOv3 License"),
        ("untrained:resnet18", "none, as its weights are random"),
        ("my/folder", "not known to iddc"),
    ],
)
def test_the_licence_of_a_backbone_follows_from_its_name(backbone: str, licence: str) -> None:
    assert licence_of(backbone) == licence


@pytest.mark.parametrize("name", BACKBONES)
def test_the_listed_size_is_what_timm_builds(name: BackboneName) -> None:
    known = BACKBONES[name]
    with torch.device("meta"):
        network = timm.create_model(known.timm_name, num_classes=0)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert known.millions == pytest.approx(millions, abs=1)
