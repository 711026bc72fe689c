"""The network: heads, probabilities, and the description that rebuilds it."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from iddc.backbones import Backbone, untrained_backbone
from iddc.config import HeadName
from iddc.errors import DataError
from iddc.network import HEADS, Network, logits_at
from iddc.windows import Predictor

WIDTH = 32


def some_backbone() -> Backbone:
    options: dict[str, int | float | bool | str] = {"embed_dim": WIDTH, "depth": 1, "num_heads": 2}
    return untrained_backbone("vit_small_patch16_224", options=options)


def some_network(head: HeadName = "conv", num_clusters: int = 5, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(some_backbone(), head, num_clusters).eval()


def some_images(seed: int = 1) -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def test_the_table_and_the_names_of_the_configuration_are_the_same() -> None:
    assert tuple(HEADS) == get_args(HeadName)


@pytest.mark.parametrize(
    ("head", "parameters"),
    [
        ("conv", (9 * 32 * 32 + 32) + (32 * 32 + 32) + (32 * 5 + 5)),
        ("linear", 32 * 5 + 5),
        ("centroids", 0),
        ("codes", 2 * (32 * 70 + 70) + (32 * 32 + 32) + 5 * 70),
        # one block: 2 * 4 projections, 4 norms, the layers, and 28 * 28 positions; then the codes
        (
            "codebook-codes",
            (8 * (32 * 32 + 32) + 4 * 64 + 2 * 32 * 2048 + 2048 + 32 + 32 * 28 * 28)
            + (2 * (32 * 70 + 70) + (32 * 32 + 32) + 5 * 70),
        ),
        ("concepts", 5 * 32 + 6 * (8 * (32 * 32 + 32) + 3 * 64 + 2 * 32 * 1024 + 1024 + 32)),
        # the entrance, 5 classes, two blocks, a norm, two matrices, the norm over 5 classes
        (
            "mask-transformer",
            (32 * 32 + 32 + 5 * 32)
            + 2 * (4 * (32 * 32 + 32) + 2 * 64 + 2 * 32 * 128 + 128 + 32)
            + (64 + 2 * 32 * 32 + 2 * 5),
        ),
    ],
)
def test_a_head_has_the_parameters_counted_by_hand(head: HeadName, parameters: int) -> None:
    assert sum(p.numel() for p in HEADS[head](WIDTH, 5).parameters()) == parameters


@pytest.mark.parametrize("head", HEADS)
def test_a_head_gives_k_logits_on_the_grid_of_the_features(head: HeadName) -> None:
    network = some_network(head, 7)
    images = some_images()
    assert network.embed(images).shape == (2, WIDTH, 2, 3)
    assert network(images).shape == (2, 7, 2, 3)
    assert torch.equal(network(images), network.logits_from(network.embed(images)))


def test_the_conv_head_is_3x3_1x1_1x1_with_relu_between() -> None:
    head = some_network("conv").head
    kernels = [m.kernel_size for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(3, 3), (1, 1), (1, 1)]
    first, second, third = (m for m in head.modules() if isinstance(m, nn.Conv2d))
    features = torch.randn(2, WIDTH, 4, 4)
    expected = third(second(first(features).clamp(min=0)).clamp(min=0))
    torch.testing.assert_close(head(features), expected)


def test_the_conv_head_sees_the_neighbours_of_a_patch_and_no_further() -> None:
    network = some_network("conv")
    features = torch.randn(1, WIDTH, 5, 5)
    changed = features.clone()
    changed[:, :, 2, 2] += 1
    moved = (network.logits_from(changed) != network.logits_from(features)).any(1)[0]
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("head", HEADS)
def test_the_logits_of_some_patches_are_those_of_the_whole_grid_there(head: HeadName) -> None:
    network, features = some_network(head), torch.randn(3, WIDTH, 4, 5)
    places = torch.tensor([0, 4, 7, 7, 15, 19])  # corners, edges, the inside, one twice
    expected = network.logits_from(features).flatten(2)[:, :, places]
    torch.testing.assert_close(logits_at(network.head, features, places), expected)


def test_the_linear_head_is_linear() -> None:
    head = some_network("linear").logits_from
    first, second = torch.randn(2, 1, WIDTH, 3, 3)
    zero = head(torch.zeros_like(first))
    found = head(2 * first - 3 * second) - zero
    expected = 2 * (head(first) - zero) - 3 * (head(second) - zero)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def cosine_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize("centred", [False, True])
def test_centroids_give_cosines_over_the_temperature_and_the_nearest_wins(centred: bool) -> None:
    head: Any = some_network("centroids", 6).head
    head.centroids.copy_(torch.randn(6, WIDTH) * torch.arange(1, 7)[:, None])
    head.temperature.fill_(0.25)
    if centred:
        head.mean.copy_(torch.randn(WIDTH) / WIDTH**0.5)
    features = torch.randn(2, WIDTH, 3, 4)
    logits = head(features).numpy()
    for b, i, j in np.ndindex(2, 3, 4):
        raw = features[b, :, i, j].numpy()
        pixel = raw / np.sqrt((raw * raw).sum()) - head.mean.numpy()
        cosines = [cosine_by_hand(pixel, centroid) for centroid in head.centroids.numpy()]
        np.testing.assert_allclose(logits[b, :, i, j], np.array(cosines) / 0.25, atol=1e-5)
        assert logits[b, :, i, j].argmax() == np.argmax(cosines)


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_are_the_softmax_of_the_logits(head: HeadName) -> None:
    network = some_network(head)
    with torch.no_grad():
        logits, probs = network(some_images()), network.probs(some_images())
    torch.testing.assert_close(probs.sum(1), torch.ones(2, 2, 3))
    exponentials = logits.double().exp()
    torch.testing.assert_close(probs.double(), exponentials / exponentials.sum(1, keepdim=True))


@pytest.mark.parametrize("head", HEADS)
def test_under_bf16_autocast_probabilities_are_single_precision(head: HeadName) -> None:
    network = some_network(head)
    images = (some_images() * 255).to(torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features, probs = network.embed(images), network.probs(images)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(1), torch.ones(2, 2, 3))
    # The backbone may run in bf16 and the head, outside, in fp32.
    assert network.logits_from(features).isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_a_network_is_rebuilt_from_its_description_and_its_tensors(head: HeadName) -> None:
    network = some_network(head)
    torch.manual_seed(5)
    twin = Network.from_spec(json.loads(json.dumps(network.spec()))).eval()
    assert not torch.equal(twin(some_images()), network(some_images()))
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(some_images()), network(some_images()))
    assert twin.spec() == network.spec()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head": "attention"},
            "head: expected 'conv', 'linear', 'centroids', 'means', 'codes', 'smooth-codes', "
            "'codebook-codes', 'concepts' or 'mask-transformer', found 'attention'",
        ),
        ({"num_clusters": 1}, "num-clusters: .*found 1"),
        ({"backbone": None}, "backbone"),
    ],
)
def test_a_wrong_description_is_an_error_that_names_the_field(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"No description of a network: {message}"):
        Network.from_spec(some_network().spec() | change)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_drawn_from_the_generator_of_the_caller(head: HeadName) -> None:
    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [*HEADS[head](WIDTH, 4).state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))


def test_a_network_is_a_predictor() -> None:
    network = some_network(num_clusters=9)
    assert isinstance(network, Predictor)
    assert network.num_clusters == 9


def test_gradients_reach_head_and_backbone() -> None:
    network = some_network("conv")
    network(some_images()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
