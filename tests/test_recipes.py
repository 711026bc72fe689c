"""Recipes and tables against the numbers of the paper (Sec. 4.2.2, 4.2.3, Tables 1-8)."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import pytest

from iddc.config import Experiment, ObjectiveConfig, RecipeName, TrainingConfig, ViewsConfig
from iddc.recipes import FIGURES, RECIPES, TABLES, Figure, Row, Table
from iddc.recipes.ablations import ABLATIONS, scaled, shifted
from iddc.recipes.tables import UNPUBLISHED

# K, lambda_1, lambda_2, t+, t-, epochs, (Acc, mIoU): Sec. 4.2.3, 4.2.2 and the tables, typed again.
PAPER = {
    "cocostuff27-vits16": (27, 1.4, 0.4, 0.2, 0.12, 5, (59.9, 25.8)),
    "cocostuff27-vits8": (27, 1.4, 0.25, 0.2, 0.12, 5, (58.3, 25.5)),
    "cocostuff171-vits8": (171, 9.0, 0.61, 0.15, 0.15, 20, (34.3, 12.2)),
    "cityscapes-vits8": (27, 0.25, 0.3, 0.15, 0.25, 50, (79.9, 22.0)),
    "cityscapes-vitb8": (27, 0.38, 0.22, 0.2, 0.28, 50, (78.0, 21.6)),
    "cityscapes-linear-vits8": (27, 0.25, 0.3, 0.15, 0.25, 50, (78.9, 23.1)),
    "cityscapes-linear-vitb8": (27, 0.38, 0.22, 0.2, 0.28, 50, (76.3, 22.2)),
}

# The tables as they are printed: the first columns, Acc%, mIoU%.
PRINTED = {
    "table1": """
        Modified DC (ECCV'18) | R18+FPN | 32.2 | 9.8
        IIC (ICCV'19) | R18+FPN | 21.8 | 6.7
        PiCIE (CVPR'21) | R18+FPN | 48.1 | 13.8
        PiCIE+H (CVPR'21) | R18+FPN | 50.0 | 14.4
        STEGO | ViT-S/16 | 52.5 | 23.7
        HP (CVPR'23) | ViT-S/16 | 54.5 | 24.3
        IDDC | ViT-S/16 | 59.9 | 25.8
        ACSeg (CVPR'23) | ViT-S/8 | – | 16.4
        TransFGU (ECCV'22) | ViT-S/8 | 52.7 | 17.5
        HP (CVPR'23) | ViT-S/8 | 57.2 | 24.6
        STEGO | ViT-S/8 | 47.7 | 24.0
        STEGO+CRF | ViT-S/8 | 48.3 | 24.5
        IDDC | ViT-S/8 | 58.3 | 25.5
        IDDC+CRF | ViT-S/8 | 58.8 | 25.8
    """,
    "table2": """
        PiCIE (CVPR'21) | ViT-S/8 | 18.5 | 3.0
        TransFGU (ECCV'22) | ViT-S/8 | 34.3 | 11.9
        IDDC | ViT-S/8 | 34.3 | 12.2
    """,
    "table3": """
        Modified DC (ECCV'18) | R18+FPN | 40.7 | 7.1
        IIC (ICCV'19) | R18+FPN | 47.9 | 6.4
        PiCIE (CVPR'21) | R18+FPN | 65.6 | 12.3
        HP (CVPR'23) | ViT-B/8 | 79.5 | 18.4
        STEGO | ViT-B/8 | 66.4 | 19.6
        STEGO+CRF | ViT-B/8 | 73.2 | 21.0
        IDDC | ViT-B/8 | 78.0 | 21.6
        IDDC+CRF | ViT-B/8 | 78.6 | 21.7
        TransFGU (ECCV'22) | ViT-S/8 | 77.9 | 16.8
        HP (CVPR'23) | ViT-S/8 | 80.1 | 18.4
        IDDC | ViT-S/8 | 79.9 | 22.0
    """,
    "table4": """
        STEGO | ViT-B/8 | 64.0 | 19.8
        STEGO+CRF | ViT-B/8 | 68.9 | 20.9
        IDDC | ViT-B/8 | 76.3 | 22.2
        IDDC+CRF | ViT-B/8 | 77.0 | 22.4
    """,
    "table5": """
        Log | – | 68.8 | 20.4
        Linear | – | 77.2 | 24.4
        Exp | – | 79.5 | 24.8
        Log | ✓ | 76.8 | 21.4
        Linear | ✓ | 78.7 | 25.2
        Exp | ✓ | 80.2 | 26.6
    """,
    "table6": """
        – | – | – | 50.1 | 12.4
        ✓ | ✓ | – | 70.2 | 22.7
        ✓ | – | ✓ | 77.5 | 23.8
        ✓ | ✓ | ✓ | 80.2 | 26.6
    """,
    "table7": """
        iBoT | IN-1K | ViT-Base | 16 | 73.6 | 26.4
        iBoT | IN-22K | ViT-Base | 16 | 80.5 | 26.3
        DINO | IN-1K | ViT-Small | 16 | 76.8 | 24.5
        DINO | IN-1K | ViT-Small | 8 | 78.9 | 23.1
        DINO | IN-1K | ViT-Base | 16 | 77.4 | 19.8
        DINO | IN-1K | ViT-Base | 8 | 76.3 | 22.2
        DINO | IN-1K | XCiT-Small | 16 | 77.5 | 22.7
        DINO | IN-1K | XCiT-Small | 8 | 76.6 | 23.1
    """,
    "table8": """
        w/o end-to-end | 80.5 | 26.3
        end-to-end | 80.2 | 27.7
    """,
}
OURS = {"IDDC as released", "IDDC, end to end"}
"""Rows that the paper does not have."""
TARGETS: dict[str, Table | Figure] = {**TABLES, **FIGURES}


def experiment_of(row: Row) -> Experiment:
    assert row.recipe is not None
    experiment = RECIPES[row.recipe].experiment()
    for edit in row.edits:
        experiment = edit(experiment)
    return experiment


# Recipes ------------------------------------------------------------------------------------------


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
    assert published[0] is not None
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
    assert experiment.head == ("linear" if "linear" in name else "conv")


def test_the_defaults_of_training_and_views_are_those_of_section_4_2_2() -> None:
    training, views, objective = TrainingConfig(), ViewsConfig(), ObjectiveConfig()
    assert (training.batch_size, training.power) == (64, 0.9)
    assert (training.learning_rate, training.backbone_learning_rate) == (5e-4, 5e-7)
    assert (training.backbone_from, training.backbone_until) == (2 / 5, 4 / 5)
    assert (views.min_scale, views.max_scale, views.crop_size) == (0.8, 1.2, 224)
    assert objective.penalty == "exp"


def test_the_recipe_for_folders_has_the_numbers_of_its_decisions() -> None:
    """Decisions 001, 002, 007, 009, 013 and 019; a change of one is a decision, and new results."""
    found = RECIPES["folder"].experiment()
    assert found.method == "consensus"
    objective, training = found.objective, found.training
    assert (objective.negative_weight, objective.regularizer_weight) == (1.4, 0.03)
    assert (objective.regularizer, objective.centering) == ("weibull", "batch")
    assert (objective.positive_threshold, objective.negative_threshold) == ("auto", "auto")
    assert (objective.affinity, training.start) == ("coassociation", "consensus")
    assert (training.learning_rate, training.heads, training.patches) == (2e-3, 1, 256)
    assert (training.min_steps, training.batch_size) == (200, 64)
    assert (found.views.repeat, found.views.short_side, found.views.crop_size) == (4, 448, 224)
    assert (found.prediction.window, found.prediction.overlap) == (224, 75)


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
    for name, recipe in RECIPES.items():
        if name.startswith("coco"):
            assert recipe.experiment().views.short_side == 0


def test_a_folder_is_centred_and_regularised_as_printed_so_that_clusters_stay_alive() -> None:
    objective = RECIPES["folder"].experiment().objective
    assert (objective.centering, objective.regularizer) == ("batch", "weibull")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-e2e")])
def test_an_end_to_end_twin_differs_in_nothing_else(name: RecipeName) -> None:
    base: Any = name.removesuffix("-e2e")
    frozen, twin = RECIPES[base].experiment(), RECIPES[name].experiment()
    changed = {"recipe": name, "training": TrainingConfig(end_to_end=True)}
    assert twin == frozen.model_copy(update=changed)


def test_the_rows_of_tables_1_to_3_and_8_have_end_to_end_twins() -> None:
    recipes = {
        row.recipe
        for name in ("table1", "table2", "table3", "table8")
        for row in TABLES[name].rows
        if row.method == "iddc"
    }
    frozen = {name for name in recipes if name and not name.endswith(("-e2e", "-released"))}
    assert {f"{name}-e2e" for name in frozen} <= recipes


UNWEIGHTED = {"positive_affinity": False, "negative_affinity": "off"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("log-unweighted", {"penalty": "log", **UNWEIGHTED}),
        ("linear-unweighted", {"penalty": "linear", **UNWEIGHTED}),
        ("exp-unweighted", {"penalty": "exp", **UNWEIGHTED}),
        ("log", {"penalty": "log"}),
        ("linear", {"penalty": "linear"}),
        ("no-regularizer", {"regularizer": "none"}),
        ("no-negatives", {"negative_weight": 0.0}),
    ],
)
@pytest.mark.parametrize("base", ["cityscapes-linear-ibot-vits16", "folder"])
def test_an_ablation_changes_this_and_nothing_else_in_any_experiment(
    name: str, changes: dict[str, Any], base: RecipeName
) -> None:
    before = RECIPES[base].experiment()
    after = ABLATIONS[name](before)
    expected = before.objective.model_dump() | changes
    assert after == before.model_copy(update={"objective": ObjectiveConfig(**expected)})


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_by_name_is_the_edit_of_the_paper_s_base(name: str) -> None:
    recipe: Any = f"ablation-{name}"
    edited = ABLATIONS[name](RECIPES["cityscapes-linear-ibot-vits16"].experiment())
    assert RECIPES[recipe].experiment() == edited.model_copy(update={"recipe": recipe})


def test_a_threshold_that_is_not_known_yet_is_shifted_from_the_best_one_of_figure_7a() -> None:
    experiment = Experiment(objective=ObjectiveConfig(positive_threshold="auto"))
    moved = shifted("positive_threshold", -0.05)(experiment)
    assert moved.objective.positive_threshold == 0.15


def test_a_threshold_stays_a_cosine() -> None:
    assert shifted("positive_threshold", 1.0)(Experiment()).objective.positive_threshold == 1
    assert shifted("negative_threshold", -2.0)(Experiment()).objective.negative_threshold == -1


def test_an_edit_is_checked_like_an_option() -> None:
    with pytest.raises(ValueError, match="negative_weight"):
        scaled("negative_weight", -1.0)(Experiment())


# Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_rows_and_the_numbers_that_are_printed(name: str) -> None:
    printed = [line.strip().split(" | ") for line in PRINTED[name].strip().splitlines()]
    found = []
    for row in TABLES[name].rows:
        assert row.published is not None
        if row.cells[0] not in OURS:
            scores = ["–" if score is None else f"{100 * score:.1f}" for score in row.published]
            found.append([*row.cells, *scores])
    assert found == printed


@pytest.mark.parametrize(
    ("name", "dataset", "protocol"),
    [
        ("table1", "cocostuff27", "iddc-sliding"),
        ("table2", "cocostuff171", "iddc-sliding"),
        ("table3", "cityscapes", "stego-center-crop"),
        ("table4", "cityscapes", "full"),
        ("table5", "cityscapes", "full"),
        ("table6", "cityscapes", "full"),
        ("table7", "cityscapes", "full"),
        ("table8", "cityscapes", "full"),
    ],
)
def test_a_table_is_scored_by_the_protocol_of_its_numbers(
    name: str, dataset: str, protocol: str
) -> None:
    assert (TABLES[name].dataset, TABLES[name].protocol) == (dataset, protocol)


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_that_is_ours_to_run_has_a_recipe_and_a_name_of_its_own(name: str) -> None:
    ours = [row for row in TARGETS[name].rows if row.recipe]
    assert {row.recipe for row in ours} <= RECIPES.keys()
    assert all(row.name for row in ours)
    assert len({row.name for row in ours}) == len(ours)
    assert not any(row.name for row in TARGETS[name].rows if not row.recipe)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_has_as_many_cells_as_its_table_has_columns(name: str) -> None:
    assert {len(row.cells) for row in TABLES[name].rows} == {len(TABLES[name].columns)}


@pytest.mark.parametrize("name", TABLES)
def test_a_row_with_crf_shares_the_training_of_one_without(name: str) -> None:
    rows = TABLES[name].rows
    plain = {(row.recipe, row.method) for row in rows if row.refine == "none"}
    assert {(row.recipe, row.method) for row in rows if row.refine == "crf"} <= plain


def test_rows_say_that_their_numbers_are_not_published_unless_they_are() -> None:
    for name in ("table5", "table6", "table7", "table8"):
        for row in TABLES[name].rows:
            published = row.recipe in PAPER or row.method == "kmeans"
            assert (row.note == UNPUBLISHED) == (not published), row


def test_table_4_without_crf_is_a_row_of_table_7() -> None:
    (row,) = (row for row in TABLES["table4"].rows if row.name == "vitb8")
    (twin,) = (other for other in TABLES["table7"].rows if other.recipe == row.recipe)
    assert row.published == twin.published


def test_a_recipe_in_several_tables_names_them_all() -> None:
    assert RECIPES["cityscapes-linear-vitb8"].table == "Tables 4, 7"
    assert RECIPES["cityscapes-vitb8"].table == "Table 3"
    assert RECIPES["cityscapes-vitb8"].protocol == "stego-center-crop"
    assert (RECIPES["folder"].table, RECIPES["folder"].protocol) == (None, "full")


# Figures ------------------------------------------------------------------------------------------


def curves(name: str, title: str) -> dict[str, list[ObjectiveConfig]]:
    """The objectives along each curve of a panel."""
    (panel,) = (panel for panel in FIGURES[name].panels if panel.title == title)
    found: dict[str, list[ObjectiveConfig]] = {}
    for row in panel.rows:
        found.setdefault(row.cells[0], []).append(experiment_of(row).objective)
    return found


@pytest.mark.parametrize("name", ["fig4", "fig5", "fig6", "fig7"])
def test_every_curve_but_the_regularisers_passes_through_the_recipe_itself(name: str) -> None:
    for panel in FIGURES[name].panels:
        points: dict[str, list[bool]] = {}
        for row in panel.rows:
            assert row.recipe is not None
            own = experiment_of(row) == RECIPES[row.recipe].experiment()
            points.setdefault(row.cells[0] + row.recipe, []).append(own)
        if panel.x in {"negative_weight", "regularizer_weight"} and panel.title[0] != "b":
            assert all(map(any, points.values()))
        if panel.x == "positive_threshold":
            assert any(own for curve in points.values() for own in curve)


@pytest.mark.parametrize("name", ["fig4", "fig5", "fig6"])
def test_a_sweep_goes_as_far_up_as_down(name: str) -> None:
    for panel in FIGURES[name].panels:
        factors: dict[str, list[float]] = {}
        for row in panel.rows:
            assert row.recipe is not None
            factor = re.search(r"-lambda[12]x([\d.]+)$", row.name)
            factors.setdefault(row.cells[0], []).append(float(factor[1]) if factor else 1.0)
        for curve in factors.values():
            assert math.prod(curve) == pytest.approx(1)
            assert len({*curve}) == len(curve)


def test_figure_4_compares_no_regulariser_entropy_and_weibull_with_k_and_scale() -> None:
    without, with_it = curves("fig4", "a: clusters found").values()
    assert {point.regularizer for point in without} == {"none"}
    assert {point.regularizer for point in with_it} == {"weibull-released"}
    forms = curves("fig4", "b: form of the regulariser").values()
    found = {
        (point.regularizer, point.weibull_shape, point.weibull_scale)
        for form in forms
        for point in form
    }
    assert found >= {
        ("entropy", 0.3, 5.0),
        ("weibull", 0.3, 5.0),
        ("weibull-released", 0.3, 5.0),
        ("weibull-released", 0.5, 5.0),
        ("weibull-released", 0.3, 1.0),
    }


def test_figure_5_sweeps_lambda_1_and_lambda_2_of_every_row_of_table_5() -> None:
    for title, field in (
        ("over lambda_1", "negative_weight"),
        ("over lambda_2", "regularizer_weight"),
    ):
        found = curves("fig5", title)
        settings = {
            (point.penalty, point.positive_affinity, point.negative_affinity)
            for curve in found.values()
            for point in curve
        }
        assert len(found) == len(settings) == 6
        assert all(len({getattr(point, field) for point in curve}) >= 3 for curve in found.values())


def test_figure_6_leaves_out_the_negative_term_and_the_regulariser() -> None:
    over_lambda_1, over_lambda_2 = curves("fig6", "over lambda_1"), curves("fig6", "over lambda_2")
    assert {p.regularizer for p in over_lambda_1["without regulariser"]} == {"none"}
    assert {p.negative_weight for p in over_lambda_2["without negative term"]} == {0.0}


def test_figure_7_varies_both_thresholds_around_0_2() -> None:
    points = [point for curve in curves("fig7", "a: thresholds").values() for point in curve]
    assert {point.positive_threshold for point in points} == {0.0, 0.1, 0.2, 0.3, 0.4}
    assert {point.negative_threshold for point in points} == {0.1, 0.2, 0.3}


def test_figure_7_scores_the_model_after_each_epoch() -> None:
    (panel,) = (panel for panel in FIGURES["fig7"].panels if panel.x == "epoch")
    assert [row.snapshots for row in panel.rows] == [True]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("picie-vits8", "picie"),
        ("picie-h-vits16", "picie-h"),
        ("stego-vits8+crf", "stego"),
        ("hp-vitb8", "hp"),
        ("vits8+crf", "iddc"),
        ("vits16-released", "iddc"),
    ],
)
def test_a_row_is_of_the_method_that_its_name_begins_with(name: str, method: str) -> None:
    rows = [row for table in TABLES.values() for row in table.rows if row.name == name]
    assert {row.method for row in rows} == {method}


def test_every_row_of_tables_1_to_4_is_run() -> None:
    names = ("table1", "table2", "table3", "table4")
    assert not [row.cells for name in names for row in TABLES[name].rows if row.recipe is None]


def test_a_backbone_that_would_train_for_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"less than backbone_until, found 0\.5 >= 0\.5"):
        TrainingConfig(backbone_from=0.5, backbone_until=0.5)
