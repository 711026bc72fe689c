"""Recipes against the numbers of the paper (Sec. 4.2.2, 4.2.3, Tables 1-3)."""

from __future__ import annotations

from typing import get_args

import pytest

from iddc.config import ObjectiveConfig, RecipeName, TrainingConfig, ViewsConfig
from iddc.recipes import RECIPES

# K, lambda_1, lambda_2, t+, t-, epochs, (Acc, mIoU): Sec. 4.2.3, 4.2.2 and the tables, typed again.
PAPER = {
    "cocostuff27-vits16": (27, 1.4, 0.4, 0.2, 0.12, 5, (59.9, 25.8)),
    "cocostuff27-vits8": (27, 1.4, 0.25, 0.2, 0.12, 5, (58.3, 25.5)),
    "cocostuff171-vits8": (171, 9.0, 0.61, 0.15, 0.15, 20, (34.3, 12.2)),
    "cityscapes-vits8": (27, 0.25, 0.3, 0.15, 0.25, 50, (79.9, 22.0)),
    "cityscapes-vitb8": (27, 0.38, 0.22, 0.2, 0.28, 50, (78.0, 21.6)),
}


def test_the_recipes_are_the_names_that_the_configuration_knows() -> None:
    assert tuple(RECIPES) == get_args(RecipeName)


@pytest.mark.parametrize("name", RECIPES)
def test_an_experiment_carries_the_name_of_its_recipe(name: RecipeName) -> None:
    assert RECIPES[name].experiment().recipe == name


@pytest.mark.parametrize("name", PAPER)
def test_a_row_of_the_paper_has_the_numbers_of_the_paper(name: RecipeName) -> None:
    experiment = RECIPES[name].experiment()
    objective = experiment.objective
    published = RECIPES[name].published
    assert published is not None
    assert (
        experiment.num_clusters,
        objective.negative_weight,
        objective.regularizer_weight,
        objective.positive_threshold,
        objective.negative_threshold,
        experiment.epochs,
        pytest.approx((100 * published[0], 100 * published[1])),
    ) == PAPER[name]


@pytest.mark.parametrize("name", PAPER)
def test_the_published_lambdas_go_with_the_released_regulariser_and_a_frozen_backbone(
    name: RecipeName,
) -> None:
    experiment = RECIPES[name].experiment()
    assert experiment.objective.regularizer == "weibull-released"
    assert experiment.training == TrainingConfig()
    assert experiment.head == "conv"


def test_the_defaults_of_training_and_views_are_those_of_section_4_2_2() -> None:
    training, views, objective = TrainingConfig(), ViewsConfig(), ObjectiveConfig()
    assert (training.batch_size, training.power) == (64, 0.9)
    assert (training.learning_rate, training.backbone_learning_rate) == (5e-4, 5e-7)
    assert (training.backbone_from, training.backbone_until) == (2 / 5, 4 / 5)
    assert (views.min_scale, views.max_scale, views.crop_size) == (0.8, 1.2, 224)
    assert objective.penalty == "exp"


def test_the_released_recipe_differs_from_the_paper_only_where_the_release_does() -> None:
    paper = RECIPES["cocostuff27-vits16"].experiment()
    released = RECIPES["cocostuff27-vits16-released"].experiment()
    back = released.model_copy(
        update={
            "recipe": paper.recipe,
            "epochs": 5,
            "training": released.training.model_copy(update={"schedule_step": "iteration"}),
            "objective": released.objective.model_copy(update={"negative_affinity": "paper"}),
        }
    )
    assert released != paper
    assert back == paper


def test_images_of_coco_keep_their_native_size() -> None:
    for name in PAPER:
        if name.startswith("coco"):
            assert RECIPES[name].experiment().views.short_side == 0  # type: ignore[index]


def test_a_folder_is_centred_and_regularised_as_printed_so_that_clusters_stay_alive() -> None:
    objective = RECIPES["folder"].experiment().objective
    assert (objective.centering, objective.regularizer) == ("batch", "weibull")
