"""The harness in benchmarks/develop.py, on planted pictures whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarking import benchmark
from iddc.backbones import save_backbone, untrained_backbone
from iddc.images import ImageFile
from tiny import photo


@pytest.fixture(scope="module")
def develop() -> Any:
    return benchmark("develop")


@pytest.fixture(scope="module")
def embedded(develop: Any) -> Any:
    return sys.modules[develop.load.__module__]


def pictures(embedded: Any, labels: np.ndarray) -> Any:
    """Images whose embedding is their class, two by two pixels a patch."""
    items = []
    for label in labels:
        ids = torch.from_numpy(label[::2, ::2].astype(np.int64))
        features = torch.eye(3)[ids].permute(2, 0, 1)[None].half()
        grid = ids.shape
        items.append(
            embedded.Picture(features, torch.zeros(27, *grid), torch.zeros(3, *grid), label)
        )
    return embedded.Pictures(tuple(items), ("one", "two", "three"))


@pytest.fixture
def planted(embedded: Any) -> Any:
    label = np.zeros((16, 24), np.uint8)
    label[:, 8:] = 1
    label[8:, 16:] = 2
    return pictures(embedded, np.stack([label, label[:, ::-1].copy()]))


def test_the_true_classes_score_1_and_have_the_entropy_of_their_sizes(
    develop: Any, embedded: Any, planted: Any
) -> None:
    def exact(picture: Any) -> torch.Tensor:
        return torch.from_numpy(np.eye(3)[picture.label]).permute(2, 0, 1)

    found = embedded.score(planted, exact, 3)
    assert (found.accuracy, found.miou) == (1, 1)
    # 128, 192 and 64 of 384 pixels: 1/3, 1/2, 1/6.
    by_hand = (np.log(3) / 3 + np.log(2) / 2 + np.log(6) / 6) / np.log(3)
    assert found.entropy == pytest.approx(by_hand)
    assert found.sizes == pytest.approx((1 / 2, 1 / 3, 1 / 6))
    assert embedded.truth(planted) == pytest.approx([1 / 3, 1 / 2, 1 / 6])
    constant = develop.one_cluster(planted, 3, 0)
    assert embedded.score(planted, constant, 3).accuracy == pytest.approx(1 / 2)


def test_methods_and_the_probe_find_classes_that_the_embeddings_are(
    develop: Any, embedded: Any, planted: Any
) -> None:
    for fit in (develop.kmeans, develop.consensus):
        predict = fit(planted, 3, 0)
        assert embedded.score(planted, predict, 3).accuracy > 0.9
    assert develop.linear_probe(planted).accuracy > 0.9
    assert develop.oracle(planted, 3, planted, 0)[0] > 0.9


def test_numbers_of_the_consensus_are_scored_as_the_recipe_scores_them(
    develop: Any, embedded: Any, planted: Any
) -> None:
    groupings = benchmark("groupings")
    data = groupings.prepared(planted, planted)
    # Two pictures of three things, each of them a region: 32, 48 and 16 patches.
    assert sorted(data.sizes.tolist()) == [16, 16, 32, 32, 48, 48]
    assert data.labels.sum(0).tolist() == [64, 96, 32]
    found = groupings.scored(data, develop.ConsensusConfig(), 0)
    alone = embedded.score(planted, develop.consensus(planted, 3, 0), 3)
    assert (found.accuracy, found.miou) == (1, 1)
    assert alone.accuracy > 0.9


def test_appearance_is_mean_deviation_and_gradient_of_its_windows(embedded: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 72, 72, generator=generator)
    found = embedded.appearance(image, (9, 9))
    grey = image.mean(0)
    for block, window in enumerate((8, 24, 56)):
        start = 36 - window // 2
        seen = grey[start : start + window, start : start + window]
        mean, deviation, _ = found[9 * block :: 3][:3, 4, 4]
        assert float(mean) == pytest.approx(float(seen.mean()), abs=1e-5)
        assert float(deviation) == pytest.approx(float(seen.std(correction=0)), abs=1e-4)
    ramp = torch.linspace(0, 1, 72).expand(3, 72, 72)
    gradient = embedded.appearance(ramp, (9, 9))[6::9, 4, 4]
    assert gradient.numpy() == pytest.approx(np.full(3, 1 / 71), abs=1e-5)


@pytest.fixture
def halves(embedded: Any, tmp_path: Path) -> Any:
    """Six images of two kinds of patches, left and right; their files do not exist."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 128, generator=generator)
    items, files = [], []
    for index in range(6):
        label = np.zeros((60, 64), np.uint8)
        label[:, 20 + 4 * index :] = 1
        ids = torch.from_numpy(label[::2, ::2].astype(np.int64))
        maps = kinds[ids].permute(2, 0, 1) + 0.3 * torch.randn(2, 128, 30, 32, generator=generator)
        blank = torch.zeros(27, 30, 32), torch.zeros(3, 30, 32)
        items.append(embedded.Picture(maps.half(), *blank, label))
        files.append(ImageFile(tmp_path / f"none-{index}.png", PurePosixPath(f"none-{index}.png")))
    return embedded.Pictures(tuple(items), ("left", "right"), tuple(files))


@pytest.mark.parametrize(
    ("name", "options"),
    [("kmeans", {}), ("stego", {"steps": 60, "batch_size": 4, "probe_learning_rate": 0.05})],
)
def test_a_method_of_the_product_learns_from_kept_embeddings_and_opens_no_file(
    develop: Any, embedded: Any, halves: Any, name: str, options: dict[str, float]
) -> None:
    assert not any(file.path.exists() for file in halves.files)
    predict = develop.method_recipe(name, **options)(halves, 2, 0)
    assert embedded.score(halves, predict, 2).accuracy > 0.9


def test_both_crops_lie_where_their_boxes_say(develop: Any) -> None:
    learned = sys.modules[develop.method_recipe.__module__]
    ramp = torch.arange(30 * 40).view(1, 30, 40).half()
    plain = torch.stack([ramp, ramp])
    seen = set()
    for seed in range(8):
        found = learned.two_crops(plain, 28, 0.5, np.random.default_rng(seed))
        for crop, (left, top, right, bottom) in zip(found.maps, found.boxes.tolist(), strict=True):
            seen.add(left > right)
            low, high = sorted((left, right))
            cut = ramp[:, round(top * 30) : round(bottom * 30), round(low * 40) : round(high * 40)]
            assert torch.equal(crop, cut.flip(-1) if left > right else cut)
    assert seen == {True, False}


def test_a_recipe_gives_a_method_other_numbers(
    develop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(develop, "method_recipe", lambda name, **o: given.update(o, name=name))
    develop.find_recipe("method:consensus:colour=1.5:lengths=free:regions=false")
    assert given == {"name": "consensus", "colour": 1.5, "lengths": "free", "regions": False}
    given.clear()
    develop.find_recipe("method:iddc:training={heads: 1, patches: 64}:epochs=2")
    assert given == {"name": "iddc", "training": {"heads": 1, "patches": 64}, "epochs": 2}


def test_an_unknown_recipe_is_refused_with_the_known_ones(develop: Any) -> None:
    with pytest.raises(SystemExit, match=r"method:steg.* Known: .*kmeans.*method:stego"):
        develop.find_recipe("method:steg")


def test_scores_of_backbones_are_those_of_the_recipes(
    develop: Any, embedded: Any, planted: Any
) -> None:
    backbones = benchmark("backbones")
    found = backbones.measure(planted, planted, [0, 1], ["kmeans", "probe", "oracle-K"])
    for seed in (0, 1):
        alone = embedded.score(planted, develop.kmeans(planted, 3, seed), 3)
        assert found["kmeans"]["miou"][seed] == alone.miou
    assert found["probe"]["accuracy"] == [develop.linear_probe(planted).accuracy]
    assert found["oracle-K"]["miou"] == [develop.oracle(planted, 3, planted, 0)[1]]


def test_appearance_beside_embeddings_is_standardised_and_as_long_on_average(
    embedded: Any, planted: Any
) -> None:
    backbones = benchmark("backbones")
    generator = torch.Generator().manual_seed(0)
    items = [
        embedded.Picture(
            one.features, 3 + torch.randn(27, 8, 12, generator=generator), one.lab, None
        )
        for one in planted.items
    ]
    some = embedded.Pictures(tuple(items), planted.classes)
    both = backbones.with_appearance(some, backbones.standardised(some), alone=False)
    assert all(len(one.features) == 2 for one in both.items)  # the head is taught by two views
    rows = torch.cat([one.features[0].float().flatten(1) for one in both.items], 1)
    assert torch.equal(
        rows[:3], torch.cat([one.features[0].float().flatten(1) for one in items], 1)
    )
    assert rows[3:].mean(1).numpy() == pytest.approx(np.zeros(27), abs=1e-3)
    assert float(rows[3:].square().sum(0).mean()) == pytest.approx(1, abs=0.01)


def test_an_image_gives_two_views_a_mirror_image_or_the_same_again(tmp_path: Path) -> None:
    backbones = benchmark("backbones")
    for split in ("train", "val"):
        for seed in (0, 1):
            for kind, image in (
                ("images", photo(seed, (96, 64))),
                ("labels", Image.fromarray(np.tile(np.uint8([0, 1]), (64, 48)))),
            ):
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / split / kind / f"{seed}.png")
    for name, mirrored in (("untrained:test_resnet", True), ("components:test_resnet", False)):
        train, val = backbones.pictures(name, tmp_path, backbones.Part(2, 1, 64, mirrored))
        assert (len(train), len(val)) == (2, 1)
        features = train.items[0].features
        assert features.shape[::2] == (2, 8)
        assert torch.equal(features[0], features[1]) != mirrored
        assert val.items[0].label.shape == (64, 96)
        assert train.items[0].label is None


def test_other_weights_under_the_same_name_are_embedded_anew(embedded: Any, tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / embedded.SETS["camvid"] / split
        halves = Image.fromarray(np.repeat(np.uint8([0, 1]), 32)[None].repeat(64, 0))
        for name, picture in (("images", photo(0, (64, 64))), ("labels", halves)):
            (folder / name).mkdir(parents=True)
            picture.save(folder / name / "one.png")
    weights = tmp_path / "weights"
    means = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_backbone(untrained_backbone("test_vit"), weights)
        found = embedded.load(
            "camvid", "val", backbone=str(weights), cache=tmp_path, data=tmp_path, short_side=64
        )
        means.append(float(found.items[0].features.float().mean()))
    assert means[0] != means[1]
