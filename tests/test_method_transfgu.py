"""TransFGU: its terms against values of the authors' functions, its maps, and what it needs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from iddc.backbones import attend, has_class_token, untrained_backbone
from iddc.config import Experiment
from iddc.decoders import MaskTransformer
from iddc.errors import ConfigError
from iddc.learning.learner import Learner
from iddc.methods import completed
from iddc.methods.transfgu import (
    category_loss,
    class_maps,
    likeness,
    pseudo_labels,
    uncertainty,
    windows,
)
from oracles import waves
from steps import ONE

LOGITS, SCORES, TEACHER = waves(1, 3, 4), waves(5, 3, 4), waves(9, 3, 4)
PERMUTATION = torch.tensor([1, 2, 0])


def test_the_segmenter_gives_each_patch_the_normed_cosines_to_the_classes() -> None:
    torch.manual_seed(0)
    head, features = MaskTransformer(8, 3), torch.randn(2, 8, 2, 5)
    logits = head(features)
    patches, classes = head.tokens(features)
    for row in range(2):
        for column in range(5):
            cosines = (classes * patches[:, None, row * 5 + column]).sum(-1)
            expected = (cosines - cosines.mean(1, keepdim=True)) / cosines.std(
                1, correction=0, keepdim=True
            )
            assert torch.allclose(logits[:, :, row, column], expected, atol=1e-2)
    assert patches.norm(dim=-1).allclose(torch.ones(2, 10))
    # Where a patch stands says nothing: the transformer knows no places.
    assert torch.allclose(head(features.flip(3)), logits.flip(3), atol=1e-5)


def test_without_teacher_labels_and_loss_are_those_of_the_authors_function() -> None:
    labels = pseudo_labels(SCORES, None)
    assert labels.tolist() == [2, 2, 0, 0]
    loss = category_loss(LOGITS.T, labels, PERMUTATION, 0.0)
    assert loss.item() == pytest.approx(1.520936, abs=1e-6)


def test_with_a_teacher_labels_and_loss_are_those_of_the_authors_function() -> None:
    labels = pseudo_labels(SCORES, TEACHER)
    assert labels.tolist() == [1, 2, 2, 0]
    loss = category_loss(LOGITS.T, labels, PERMUTATION, 0.03)
    assert loss.item() == pytest.approx(2.114071, abs=1e-6)


def test_the_other_terms_are_those_of_the_authors_functions() -> None:
    assert uncertainty(LOGITS.T).item() == pytest.approx(0.642022, abs=1e-6)
    classes = normalize(waves(3, 3, 4), dim=1)[None]
    assert likeness(classes).item() == pytest.approx(0.514627, abs=1e-6)


def test_the_steepest_patches_that_hold_the_mass_are_kept() -> None:
    """The top 80 % of .05 .4 .1 .25 .2 are .4, .25 and .2."""
    slopes = -torch.tensor([[[0.05, 0.4, 0.1, 0.25, 0.2]]], dtype=torch.float64)
    found = class_maps(torch.zeros(1, 5, dtype=torch.float64), slopes, 0.8)
    assert found[0, 0].tolist() == pytest.approx([0, 0.4, 0, 0.25, 0.2])


def test_a_map_is_attention_and_relevance_and_zero_where_slopes_rise() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.float64)
    slopes = torch.tensor([[[-0.3, 0.1, 0.0]]], dtype=torch.float64)
    found = class_maps(attention, slopes, 1.0)
    assert found[0, 0].tolist() == pytest.approx([0.25 + 0.3, 0, 1])


def test_windows_overlap_by_half_and_have_one_size() -> None:
    found = windows(torch.zeros(3, 40, 60, dtype=torch.uint8), 16)
    # Sides 20, 16, 12 and 8 and steps of half of them: 3 * 5, 4 * 6, 5 * 9 and 9 * 14 places.
    assert found.shape == (15 + 24 + 45 + 126, 3, 16, 16)


def test_a_backbone_without_class_token_is_refused_with_the_names_of_others() -> None:
    experiment = completed(
        Experiment(method="transfgu", num_clusters=3, backbone="untrained:test_resnet")
    )
    message = "transfgu needs the class token of a ViT.*test_resnet has none. Usable: dino-vits16"
    with pytest.raises(ConfigError, match=message):
        Learner(experiment, 5, ONE)


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    experiment = completed(
        Experiment(method="transfgu", num_clusters=3, backbone="untrained:test_vit")
    )
    learner = Learner(experiment, 5, ONE)
    assert learner.optimizer is not None
    decays = {
        id(weight): group["weight_decay"]
        for group in learner.optimizer.param_groups
        for weight in group["params"]
    }
    head = dict(learner.network.head.named_parameters())
    assert decays.keys() == {id(weight) for weight in head.values()}
    for name, weight in head.items():
        single = "norm" in name or "balance" in name or name.endswith("bias")
        assert decays[id(weight)] == (0 if single else 5e-4), name


def test_a_vit_has_a_class_token_and_others_have_none() -> None:
    assert has_class_token(untrained_backbone("test_vit"))
    for name in ("test_vit2", "test_resnet"):  # registers without a class token; convolutions
        assert not has_class_token(untrained_backbone(name))


def test_the_class_token_is_that_of_timm() -> None:
    torch.manual_seed(0)
    backbone = untrained_backbone("test_vit").eval()
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        pixels, grid = backbone.prepared(images)
        expected = backbone.net.forward_features(pixels)[:, 0]  # type: ignore[operator]
    found = attend(backbone, images)
    torch.testing.assert_close(found.token, expected, rtol=1e-4, atol=1e-5)
    assert found.attention.shape == (2, *grid)
    assert found.attention.min() > 0
    assert found.attention.flatten(1).sum(1).max() < 1  # the token attends to itself too
    assert found.slopes is None


def test_slopes_are_how_the_distance_changes_with_attention() -> None:
    """Compared with a hook of timm's own attention that adds a little to one patch."""
    torch.manual_seed(0)
    backbone = untrained_backbone("test_vit").eval().double()
    images, targets = torch.rand(1, 3, 32, 48).double(), torch.randn(2, 64).double()
    slopes = attend(backbone, images, targets).slopes
    assert slopes is not None
    block = backbone.net.blocks[-1].attn  # type: ignore[index, union-attr]
    block.fused_attn = False
    patch, little = 4, 1e-6

    def distances(added: float) -> torch.Tensor:
        def more(_module: object, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            weights = arguments[0].clone()
            weights[:, :, 0, 1 + patch] += added  # of every head; after the softmax
            return (weights,)

        handle = block.attn_drop.register_forward_pre_hook(more)
        with torch.no_grad():
            token = backbone.net.forward_features(backbone.prepared(images)[0])[:, 0]  # type: ignore[operator]
        handle.remove()
        return 1 - torch.cosine_similarity(token, targets)

    change = (distances(little) - distances(-little)) / (2 * little)
    # The change of all heads together is their number times the mean slope.
    found = block.num_heads * slopes[0].flatten(1)[:, patch]
    torch.testing.assert_close(found, change.to(found), rtol=1e-3, atol=1e-6)
