"""CAUSE-TR: its decoder against torch's own attention, and what it sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iddc.decoders import Attention, CodebookDecoder, heads_of
from iddc.errors import ConfigError
from iddc.learning.learner import Learner
from steps import ONE
from test_methods import learner_of, tiny


def twin(attention: Attention) -> nn.MultiheadAttention:
    """torch's attention with the same weights."""
    width = attention.query.in_features
    made = nn.MultiheadAttention(width, attention.heads, batch_first=True).eval()
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        made.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        made.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        made.out_proj.weight.copy_(attention.out.weight)
        made.out_proj.bias.copy_(attention.out.bias)
    return made


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    attention = Attention(12, 3)
    queries, keys, values = torch.randn(3, 2, 5, 12).unbind()
    expected, _ = twin(attention)(queries, keys, values)
    torch.testing.assert_close(attention(queries, keys, values), expected)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (128, 2), (64, 1), (200, 2)])
def test_heads_have_64_channels_where_the_width_allows(width: int, heads: int) -> None:
    assert heads_of(width) == heads


def test_the_decoder_is_the_block_written_with_torchs_attention() -> None:
    torch.manual_seed(0)
    decoder = CodebookDecoder(6, concepts=4, grid=3, hidden=8).eval()
    features = torch.randn(2, 6, 3, 3)
    rows = features.flatten(2).transpose(1, 2)
    places = decoder.positions.flatten(2).transpose(1, 2)
    nearest = [
        [int(torch.cosine_similarity(row[None], decoder.codebook).argmax()) for row in image]
        for image in rows
    ]
    found = decoder.codebook[torch.tensor(nearest)]
    own, cross = twin(decoder.own), twin(decoder.cross)
    norms = [norm for norm in decoder.norms if isinstance(norm, nn.LayerNorm)]
    found = norms[0](found + own(found + places, found + places, found)[0])
    found = norms[1](found + cross(found + places, rows, rows)[0])
    found = norms[2](found + decoder.feed(found))
    expected = (rows + norms[3](found)).transpose(1, 2).reshape(2, 6, 3, 3)
    torch.testing.assert_close(decoder(features), expected)


def test_both_heads_ask_by_the_codebook_of_the_first_stage() -> None:
    method = learner_of("cause-tr").method
    for head in (method.head, method.student):
        assert torch.equal(head.decoder.codebook, method.codebook)
    assert method.codebook.abs().max() > 0


@pytest.mark.parametrize("name", ["cause", "cause-tr"])
def test_more_clusters_than_concepts_are_refused(name: str) -> None:
    experiment = tiny(name).model_copy(update={"num_clusters": 17})
    message = f"--{name}.concepts: expected at least the 17 clusters that are asked for, found 16"
    with pytest.raises(ConfigError, match=message):
        Learner(experiment, 5, ONE)


def test_a_code_depends_on_other_patches_of_the_image() -> None:
    method = learner_of("cause-tr").method
    maps = torch.randn(1, 64, 4, 4)
    changed = maps.clone()
    changed[..., 3, 3] += 1
    with torch.no_grad():
        before, after = method.head.codes(maps), method.head.codes(changed)
    assert (before[..., 0, 0] - after[..., 0, 0]).abs().max() > 1e-6
