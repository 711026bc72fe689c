"""IDDC whose affinity is co-association: the codes by a slow loop, Eq. (8) of them, their fitting.

The laws that every method keeps to, among them going on after a kill, are in `test_methods.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from iddc.config import Experiment, Frozen, ObjectiveConfig, TrainingConfig
from iddc.errors import ConfigError, DataError
from iddc.learning.learner import Learner
from iddc.losses import Pixels
from iddc.losses.reference import equation_8
from iddc.methods.coassociation import Coassociation
from iddc.methods.iddc import Iddc
from iddc.methods.method import Batch
from iddc.report.sides import ReportedRun
from iddc.views import draw_rolls
from planted import OFFSET, Planted
from steps import ONE, images_of

AUTO = {"positive_threshold": "auto", "negative_threshold": "auto"}
COASSOCIATION = ObjectiveConfig.model_validate(
    {"affinity": "coassociation", "centering": "batch", **AUTO}
)


def experiment(objective: ObjectiveConfig = COASSOCIATION, **training: Any) -> Experiment:
    return Experiment(
        num_clusters=3,
        backbone="untrained:test_vit",
        head="linear",
        objective=objective,
        training=TrainingConfig(**{"heads": 2, "precision": "fp32"} | training),
    )


def method(**training: Any) -> Iddc:
    torch.manual_seed(0)
    return Iddc(torch.nn.Conv2d(6, 3, 1), experiment(**training), Frozen())


def by_hand(codes: Coassociation, vector: Tensor) -> list[float]:
    """e(x): over the groupings, the roots of the classes' probabilities, over sqrt(M)."""
    x = normalize(normalize(vector, dim=0) - codes.mean, dim=0).tolist()
    code, start = [], 0
    for count in codes.counts.tolist():
        shares = [0.0] * codes.num_clusters
        for centroid, k in zip(
            codes.centroids[start : start + count].tolist(),
            codes.classes[start : start + count].tolist(),
            strict=True,
        ):
            distance = sum((a - b) ** 2 for a, b in zip(x, centroid, strict=True))
            shares[k] += math.exp(-distance / 2 / 0.03)
        code += [math.sqrt(share / sum(shares) / len(codes.counts)) for share in shares]
        start += count
    return code


def hand_made() -> Coassociation:
    """Two groupings, of four and of three centroids, in three classes."""
    generator = torch.Generator().manual_seed(1)
    codes = Coassociation(3)
    codes.mean = 0.2 * torch.randn(5, generator=generator)
    codes.centroids = normalize(torch.randn(7, 5, generator=generator), dim=1)
    codes.centroids[2] *= 0.7  # a region in which embeddings differ
    codes.classes = torch.tensor([0, 1, 2, 0, 1, 1, 0])
    codes.counts = torch.tensor([4, 3])
    return codes


def test_codes_and_their_products_are_those_of_a_slow_loop() -> None:
    codes, generator = hand_made(), torch.Generator().manual_seed(2)
    rows = torch.randn(2, 4, 5, generator=generator)
    (found,) = codes([normalize(rows, dim=-1)])
    slow = torch.tensor([[by_hand(codes, vector) for vector in image] for image in rows])
    assert found.shape == (2, 4, 6)
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-6)
    affinity = found[0] @ found[1].T
    for i, j in ((0, 0), (1, 3), (2, 1)):
        expected = sum(a * b for a, b in zip(slow[0, i].tolist(), slow[1, j].tolist(), strict=True))
        assert float(affinity[i, j]) == pytest.approx(expected, abs=1e-6)
        assert 0 <= affinity[i, j] <= 1 + 1e-6
    assert found.norm(dim=-1).numpy() == pytest.approx(1, abs=1e-5)
    # The last ones are kept, and only for the same embeddings.
    assert codes([normalize(rows.clone(), dim=-1)])[0] is found
    assert torch.equal(codes([normalize(rows, dim=-1).flip(0)])[0], found.flip(0))


def test_the_loss_is_equation_8_of_codes_with_thresholds_of_a_half() -> None:
    iddc = Iddc(torch.nn.Conv2d(5, 3, 1), experiment(), Frozen())
    iddc.codes = hand_made()
    maps = torch.randn(4, 2, 5, 3, 3, generator=torch.Generator().manual_seed(3))
    images = images_of(maps)
    batch = Batch(**vars(images), features=maps)
    rows = iddc.rows(maps, images)
    found = iddc.loss(batch, rows)
    first, second = (
        Pixels(
            torch.tensor([[by_hand(iddc.codes, x) for x in image.flatten(1).T] for image in view]),
            iddc.head(view).flatten(2).mT.softmax(-1),
        )
        for view in maps.unbind(1)
    )
    plain = ObjectiveConfig(positive_threshold=0.5, negative_threshold=0.5, centering="none")
    expected = equation_8(first, second, draw_rolls(4, plain.negatives, 0, 0), plain)
    assert min(expected.positive, expected.negative) > 0
    for name, value in (("loss", expected.total), ("positive", expected.positive)):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["negative"], expected.negative, rtol=1e-4, atol=1e-6)


def test_patches_of_one_thing_are_joined_and_those_of_two_are_not() -> None:
    planted, iddc = Planted(noise=0.05), method()
    before = iddc.head.weight.clone()
    numbers = iddc.refit(planted, 0, 1)
    assert torch.equal(iddc.head.weight, before)
    assert numbers == {"pictures": 12, "colour_share": pytest.approx(1, abs=0.1), "unit_length": 1}
    assert planted.notes == ["6 groupings of 36 regions"]
    assert iddc.codes is not None
    (found,) = iddc.codes([normalize(planted.images[0][0][0].flatten(1).T[None], dim=-1)])
    rows = found[0]
    affinity, ids = rows @ rows.T, planted.truth[0].flatten()
    same = ids[:, None] == ids
    assert affinity[same].quantile(0.01) > 0.5
    assert affinity[~same].quantile(0.99) < 0.5


def test_heads_share_codes_that_are_fitted_once_and_that_no_model_has() -> None:
    learner, planted = Learner(experiment(), 5, ONE), Planted(channels=64)
    learner.refit(planted, 0)
    assert planted.asked == 1
    one, other = learner.methods
    assert other.codes is one.codes
    assert one.codes.counts.sum() == len(one.codes.centroids) > 0
    assert learner.trained.state_dict().keys() == {"weight", "bias"}

    # A run that goes on has them, whatever it held before.
    again = Learner(experiment(), 5, ONE)
    again.restore(learner.state())
    for mine, kept in zip(again.methods[1].codes.buffers(), one.codes.buffers(), strict=True):
        assert torch.equal(mine, kept)
    assert again.methods[1].codes is again.methods[0].codes


def test_cosines_fit_nothing() -> None:
    cosine = experiment(objective=ObjectiveConfig())
    learner, planted = Learner(cosine, 5, ONE), Planted(channels=64)
    assert learner.refit(planted, 0) == {}
    assert planted.asked == 0
    assert not [name for name, _ in learner.methods.named_buffers()]


@pytest.mark.parametrize("objective", [COASSOCIATION, ObjectiveConfig()])
def test_a_head_may_start_at_the_classes_of_the_consensus(objective: ObjectiveConfig) -> None:
    planted = Planted(noise=0.1)
    planted.images = [(10 * (maps - OFFSET), pixels) for maps, pixels in planted.images]
    iddc = method(objective=objective, heads=1, start="consensus")
    numbers = iddc.refit(planted, 0, 1)
    assert 0 < numbers["taught"] < 0.5
    found = iddc.head(torch.stack([maps[1] for maps, _ in planted.images])).argmax(1)
    table = torch.zeros(3, 3)
    table.index_put_((found, torch.stack(planted.truth)), torch.ones(1), accumulate=True)
    assert table.max(1).values.sum() / found.numel() > 0.95
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2]
    assert iddc.refit(planted, 1, 1) == {}


def test_several_heads_do_not_start_alike() -> None:
    with pytest.raises(ValidationError, match="expected heads 1, found 4"):
        TrainingConfig(start="consensus", heads=4)


def test_codes_of_a_backbone_that_moves_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Leave out --training\.end-to-end"):
        Iddc.plan(experiment(heads=1, end_to_end=True), 5)


def test_auto_is_a_half_and_given_thresholds_stay() -> None:
    given = COASSOCIATION.model_copy(update={"negative_threshold": 0.3})
    for objective, expected in ((COASSOCIATION, (0.5, 0.5)), (given, (0.5, 0.3))):
        learner = Learner(experiment(objective=objective), 5, ONE)
        assert learner.method.get_extra_state() == expected


def test_fewer_distinct_groups_than_clusters_is_an_error_that_counts_them() -> None:
    with pytest.raises(DataError, match="Found 1 distinct group in these images"):
        method().refit(Planted(things=1, noise=0), 0, 1)
    empty = Planted()
    empty.images = []
    with pytest.raises(DataError, match="no image that can be read"):
        method().refit(empty, 0, 1)


def test_a_report_marks_no_threshold_of_co_association_among_cosines() -> None:
    thresholds = {"positive_threshold": 0.4, "negative_threshold": 0.3}
    found = {}
    for affinity in ("cosine", "coassociation"):
        objective = ObjectiveConfig.model_validate({"affinity": affinity, **thresholds})
        side = ReportedRun.__new__(ReportedRun)
        object.__setattr__(side, "experiment", experiment(objective=objective))
        object.__setattr__(side, "log", [])
        found[affinity] = side.thresholds
    assert found == {"cosine": (0.4, 0.3), "coassociation": None}
