"""The method `consensus`: planted pictures, what decides the lengths, bad input, a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iddc.config import Experiment, PredictionConfig, Runtime, TrainingConfig, ViewsConfig
from iddc.consensus import fit_consensus
from iddc.datasets.synthetic import write_scenes
from iddc.errors import DataError
from iddc.images import find_images
from iddc.learning import fit
from iddc.methods.consensus import Consensus, ConsensusConfig
from iddc.methods.pictures import _spread
from iddc.network import LinearHead
from iddc.regions import colour_share
from iddc.runs import Run
from iddc.segmenter import Segmenter
from planted import OFFSET, Planted


def method(num_clusters: int = 3, **options: object) -> Consensus:
    torch.manual_seed(0)
    numbers = {"prototypes": 30, "groupings": 3, "steps": 100, "batch_size": 256} | options
    config = ConsensusConfig.model_validate(numbers)
    experiment = Experiment(num_clusters=num_clusters, head="linear")
    return Consensus(LinearHead(6, num_clusters), experiment, config)


def test_the_head_gives_each_raw_patch_the_class_of_its_thing_however_small() -> None:
    planted, consensus = Planted(), method()
    numbers = consensus.refit(planted, 0, 0)
    maps = torch.stack([maps.mean(0) for maps, _ in planted.images])
    found = consensus.head(maps).argmax(1)
    truth = torch.stack(planted.truth)
    counts = torch.zeros(3, 3).index_put_((found, truth), torch.ones(1), accumulate=True)
    assert counts.max(1).values.sum() / truth.numel() > 0.95
    assert sorted(counts.argmax(1).tolist()) == [0, 1, 2]
    assert numbers["groups"] == 3
    assert 0.5 < numbers["agreement"] <= 1
    # Sizes are those of single views, as prediction sees them; their noise moves some patches.
    single = consensus.head(torch.stack([maps[0] for maps, _ in planted.images])).argmax(1)
    sizes = single.flatten().bincount(minlength=3) / single.numel()
    assert numbers["largest"] == pytest.approx(float(sizes.max()), abs=1e-3)
    assert numbers["smallest"] == pytest.approx(float(sizes.min()), abs=1e-3)


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_a_region_of_n_patches_has_the_weight_n_to_the_power(
    power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures are alike: three things of 240, 64 and 16 patches, each a region of its own."""
    seen: list[Tensor] = []

    def noted(vectors: Tensor, k: int, config: ConsensusConfig, **rest: Any) -> Any:
        seen.append(rest["weights"])
        return fit_consensus(vectors, k, config, **rest)

    monkeypatch.setattr("iddc.methods.consensus.fit_consensus", noted)
    consensus = method(size_power=power)
    consensus.refit(Planted(noise=0), 0, 0)
    by_hand = torch.tensor([16.0, 64.0, 240.0]) ** power
    assert seen[0].sort().values.tolist() == pytest.approx(by_hand.repeat_interleave(12).tolist())


def test_lengths_are_free_where_colours_do_not_explain_embeddings() -> None:
    known = method().refit(Planted(noise=0.1), 0, 0)
    unknown = method(num_clusters=2).refit(Planted(noise=0.1, coloured=False), 0, 0)
    assert (known["unit_length"], unknown["unit_length"]) == (1, 0)
    assert unknown["colour_share"] == pytest.approx(0, abs=1e-6)
    assert method(lengths="free").refit(Planted(noise=0.1), 0, 0)["unit_length"] == 0


def test_colours_count_where_the_backbone_does_not_know_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embeddings are noise, and the colours are the things."""
    blind = Planted(noise=0.3)
    generator = torch.Generator().manual_seed(1)
    blind.images = [
        (OFFSET + torch.randn(2, 6, 16, 20, generator=generator), pixels)
        for _, pixels in blind.images
    ]
    assert method().refit(blind, 0, 0)["colour_weight"] == 1
    assert method().refit(Planted(noise=0.1), 0, 0)["colour_weight"] == 0
    consensus, taught = method(colour=2), []
    monkeypatch.setattr(consensus, "teach", lambda _, targets: taught.append(targets) or 0.0)
    assert consensus.refit(blind, 0, 0)["colour_weight"] == 2
    sizes = (taught[0].argmax(1).bincount() / len(taught[0])).sort().values
    assert sizes.numpy() == pytest.approx([0.05, 0.2, 0.75], abs=0.02)


def test_one_grey_level_has_no_colour_to_tell_apart() -> None:
    grey = torch.full((3, 4, 5), 41.0)
    shift, scale = _spread([grey, grey + 1e-3])
    assert shift.flatten().tolist() == pytest.approx([41.0, 41.0, 41.0], abs=1e-2)
    assert scale == 1
    # Half of the patches 3 and 4 away from the others in two channels: 2.5 from the mean.
    two = torch.stack([grey, grey + torch.tensor([3.0, 4.0, 0.0])[:, None, None]])
    assert _spread([*two])[1] == pytest.approx(2.5)


def test_the_colour_share_is_the_variance_between_regions() -> None:
    # Two regions with means -1 and 2 about the mean 0, in each a deviation of 1.
    maps = torch.tensor([[[0.0, -2, 0, -2, 3, 1]]])
    regions = torch.tensor([[0, 0, 0, 0, 1, 1]])
    between, within = (4 * 1 + 2 * 4) / 6, 1
    assert colour_share(maps, regions) == pytest.approx(between / (between + within))
    assert colour_share(torch.ones(2, 1, 6), regions) == 0


def test_images_with_fewer_things_than_clusters_are_an_error_that_counts_them() -> None:
    with pytest.raises(DataError, match="Found 1 distinct group in these images"):
        method().refit(Planted(noise=0, things=1), 0, 0)
    with pytest.raises(DataError, match=r"expected at least 300.*Ask for \d+ clusters or fewer"):
        method(num_clusters=300).refit(Planted(noise=0), 0, 0)


def test_clusters_that_win_no_patch_are_told() -> None:
    planted, consensus = Planted(), method(num_clusters=4)
    with torch.no_grad():  # the first four numbers of a patch are the scores
        consensus.head.weight.copy_(torch.eye(4, 6)[:, :, None, None])
        consensus.head.bias.zero_()
        numbers = consensus._counted(planted, torch.eye(6)[[0, 0, 0, 2]])
    assert numbers == {"groups": 2, "largest": 0.75, "smallest": 0}
    assert "found 2 distinct groups, so 2 of the 4 clusters are empty" in planted.notes[0]


def test_a_run_saves_what_it_predicts_and_its_seed_decides_it(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", count=8, size=(96, 80), seed=0)
    files = find_images(tmp_path / "scenes" / "train" / "images").files
    experiment = Experiment(
        method="consensus",
        num_clusters=3,
        backbone="untrained:resnet18",
        views=ViewsConfig(short_side=80, crop_size=64),
        training=TrainingConfig(precision="fp32"),
        prediction=PredictionConfig(window=0),
        options={"sample": 500, "prototypes": 20, "steps": 20},
    )
    weights = []
    for name in ("one", "two"):
        with Run.start(tmp_path / name, experiment, source="scenes") as run:
            fit(files, experiment, run, Runtime(device="cpu", workers=0))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
        record = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        assert record["pictures"] == len(files)
    assert weights[0] == weights[1]
    segmenter = Segmenter.load(tmp_path / "two", "cpu")
    mask = segmenter.predict(np.zeros((80, 96, 3), np.uint8)).clusters
    assert mask.shape == (80, 96)
