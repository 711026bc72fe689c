"""The tables and figures of the paper as data: what each row is, and what was published for it.

A row names the recipe that reruns it. Rows of other methods have published numbers only; STEGO is
one of our baselines. Figures 4-7 are sweeps: the paper shows them as curves without their values,
so the values are ours, relative to the recipe that is varied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iddc.config import DatasetName, ProtocolName, RecipeName, RefineName
from iddc.recipes.ablations import Edit, objective, plus, times

Method = Literal["iddc", "kmeans", "stego"]
Axis = Literal[
    "negative_weight", "regularizer_weight", "positive_threshold", "epoch", "rank", "image"
]
Measure = Literal["miou", "live", "size"]


@dataclass(frozen=True)
class Row:
    """One row of a table, or one point of a figure."""

    cells: tuple[str, ...]
    """Its first columns, as the paper has them; of a figure, the name of its curve."""
    published: tuple[float | None, float] | None = None
    """Accuracy and mIoU in [0, 1]."""
    name: str = ""
    """Its name in options and files; none for a method that is not ours to run."""
    recipe: RecipeName | None = None
    """What is trained, or the backbone and the data on which a baseline is fitted."""
    method: Method = "iddc"
    edits: tuple[Edit, ...] = ()
    """What a point of a figure changes in the recipe."""
    refine: RefineName = "none"
    """Rows that differ in this alone share a run."""
    snapshots: bool = False
    """Score the model after each epoch."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    columns: tuple[str, ...]
    """Of the cells of its rows."""
    rows: tuple[Row, ...]
    dataset: DatasetName
    protocol: ProtocolName
    """How the published numbers were computed."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One plot. Rows with the same cells are one curve; along "image", one column of pictures."""

    title: str
    x: Axis
    y: Measure
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper."""

    title: str
    panels: tuple[Panel, ...] = ()
    """None where nothing is trained."""
    notes: tuple[str, ...] = ()
    dataset: DatasetName = "cityscapes"
    protocol: ProtocolName = "full"

    @property
    def rows(self) -> tuple[Row, ...]:
        """The points of all its panels."""
        return tuple(row for panel in self.panels for row in panel.rows)


UNPUBLISHED = "hyper-parameters not published: lambda_1 and lambda_2 are ours"
TWIN = "the paper does not say whether its number is end to end"


def _scores(accuracy: float | None, miou: float) -> tuple[float | None, float]:
    """Percent, as printed in the paper, to fractions."""
    return None if accuracy is None else accuracy / 100, miou / 100


def _other(method: str, backbone: str, accuracy: float | None, miou: float) -> Row:
    """A row of another method."""
    return Row((method, backbone), _scores(accuracy, miou))


def _iddc(
    backbone: str,
    recipe: RecipeName,
    name: str,
    accuracy: float,
    miou: float,
    *,
    what: str = "IDDC",
    refine: RefineName = "none",
    note: str = "",
) -> Row:
    return Row((what, backbone), _scores(accuracy, miou), name, recipe, refine=refine, note=note)


def _stego(
    backbone: str, recipe: RecipeName, accuracy: float, miou: float, refine: RefineName = "none"
) -> Row:
    name = f"stego-{backbone.lower().replace('-', '').replace('/', '')}"
    crf = refine == "crf"
    return Row(
        ("STEGO+CRF" if crf else "STEGO", backbone),
        _scores(accuracy, miou),
        f"{name}+crf" if crf else name,
        recipe,
        "stego",
        refine=refine,
    )


def _ablation(
    cells: tuple[str, ...], name: str, recipe: RecipeName, accuracy: float, miou: float
) -> Row:
    return Row(cells, _scores(accuracy, miou), name, recipe, note=UNPUBLISHED)


_IBOT: RecipeName = "cityscapes-linear-ibot-vits16"
_E2E = "IDDC, end to end"
_METHODS = ("method", "backbone")

TABLES: dict[str, Table] = {
    "table1": Table(
        "Table 1: COCO-Stuff-27",
        _METHODS,
        (
            _other("Modified DC (ECCV'18)", "R18+FPN", 32.2, 9.8),
            _other("IIC (ICCV'19)", "R18+FPN", 21.8, 6.7),
            _other("PiCIE (CVPR'21)", "R18+FPN", 48.1, 13.8),
            _other("PiCIE+H (CVPR'21)", "R18+FPN", 50.0, 14.4),
            _stego("ViT-S/16", "cocostuff27-vits16", 52.5, 23.7),
            _other("HP (CVPR'23)", "ViT-S/16", 54.5, 24.3),
            _iddc("ViT-S/16", "cocostuff27-vits16", "vits16", 59.9, 25.8),
            _iddc(
                "ViT-S/16",
                "cocostuff27-vits16-released",
                "vits16-released",
                59.9,
                25.8,
                what="IDDC as released",
                note="20 epochs, as the authors' code runs it",
            ),
            _iddc(
                "ViT-S/16",
                "cocostuff27-vits16-e2e",
                "vits16-e2e",
                59.9,
                25.8,
                what=_E2E,
                note=TWIN,
            ),
            _other("ACSeg (CVPR'23)", "ViT-S/8", None, 16.4),
            _other("TransFGU (ECCV'22)", "ViT-S/8", 52.7, 17.5),
            _other("HP (CVPR'23)", "ViT-S/8", 57.2, 24.6),
            _stego("ViT-S/8", "cocostuff27-vits8", 47.7, 24.0),
            _stego("ViT-S/8", "cocostuff27-vits8", 48.3, 24.5, "crf"),
            _iddc("ViT-S/8", "cocostuff27-vits8", "vits8", 58.3, 25.5),
            _iddc(
                "ViT-S/8",
                "cocostuff27-vits8",
                "vits8+crf",
                58.8,
                25.8,
                what="IDDC+CRF",
                refine="crf",
            ),
            _iddc(
                "ViT-S/8", "cocostuff27-vits8-e2e", "vits8-e2e", 58.3, 25.5, what=_E2E, note=TWIN
            ),
        ),
        "cocostuff27",
        "iddc-sliding",
    ),
    "table2": Table(
        "Table 2: COCO-Stuff-171",
        _METHODS,
        (
            _other("PiCIE (CVPR'21)", "ViT-S/8", 18.5, 3.0),
            _other("TransFGU (ECCV'22)", "ViT-S/8", 34.3, 11.9),
            _iddc("ViT-S/8", "cocostuff171-vits8", "vits8", 34.3, 12.2),
            _iddc(
                "ViT-S/8", "cocostuff171-vits8-e2e", "vits8-e2e", 34.3, 12.2, what=_E2E, note=TWIN
            ),
        ),
        "cocostuff171",
        "iddc-sliding",
        ("the paper states no protocol for this table: this is the one of Table 1",),
    ),
    "table3": Table(
        "Table 3: Cityscapes, centre crops",
        _METHODS,
        (
            _other("Modified DC (ECCV'18)", "R18+FPN", 40.7, 7.1),
            _other("IIC (ICCV'19)", "R18+FPN", 47.9, 6.4),
            _other("PiCIE (CVPR'21)", "R18+FPN", 65.6, 12.3),
            _other("HP (CVPR'23)", "ViT-B/8", 79.5, 18.4),
            _stego("ViT-B/8", "cityscapes-vitb8", 66.4, 19.6),
            _stego("ViT-B/8", "cityscapes-vitb8", 73.2, 21.0, "crf"),
            _iddc("ViT-B/8", "cityscapes-vitb8", "vitb8", 78.0, 21.6),
            _iddc(
                "ViT-B/8",
                "cityscapes-vitb8",
                "vitb8+crf",
                78.6,
                21.7,
                what="IDDC+CRF",
                refine="crf",
            ),
            _iddc("ViT-B/8", "cityscapes-vitb8-e2e", "vitb8-e2e", 78.0, 21.6, what=_E2E, note=TWIN),
            _other("TransFGU (ECCV'22)", "ViT-S/8", 77.9, 16.8),
            _other("HP (CVPR'23)", "ViT-S/8", 80.1, 18.4),
            _iddc("ViT-S/8", "cityscapes-vits8", "vits8", 79.9, 22.0),
            _iddc("ViT-S/8", "cityscapes-vits8-e2e", "vits8-e2e", 79.9, 22.0, what=_E2E, note=TWIN),
        ),
        "cityscapes",
        "stego-center-crop",
        ("the training size, shorter side 320, is ours: the paper does not state it",),
    ),
    "table4": Table(
        "Table 4: Cityscapes, whole images",
        _METHODS,
        (
            _stego("ViT-B/8", "cityscapes-linear-vitb8", 64.0, 19.8),
            _stego("ViT-B/8", "cityscapes-linear-vitb8", 68.9, 20.9, "crf"),
            _iddc("ViT-B/8", "cityscapes-linear-vitb8", "vitb8", 76.3, 22.2),
            _iddc(
                "ViT-B/8",
                "cityscapes-linear-vitb8",
                "vitb8+crf",
                77.0,
                22.4,
                what="IDDC+CRF",
                refine="crf",
            ),
        ),
        "cityscapes",
        "full",
        (
            "linear head: the row without CRF has the scores of Table 7's",
            "windows and training size, shorter side 320, are ours: the paper states neither",
        ),
    ),
    "table5": Table(
        "Table 5: penalties, with and without weights",
        ("h", "weights"),
        (
            _ablation(("Log", "–"), "log-unweighted", "ablation-log-unweighted", 68.8, 20.4),
            _ablation(
                ("Linear", "–"), "linear-unweighted", "ablation-linear-unweighted", 77.2, 24.4
            ),
            _ablation(("Exp", "–"), "exp-unweighted", "ablation-exp-unweighted", 79.5, 24.8),
            _ablation(("Log", "✓"), "log", "ablation-log", 76.8, 21.4),
            _ablation(("Linear", "✓"), "linear", "ablation-linear", 78.7, 25.2),
            _ablation(("Exp", "✓"), "exp", _IBOT, 80.2, 26.6),
        ),
        "cityscapes",
        "full",
        (
            "each published row is the best of a grid, chosen by labels; ours has one setting",
            "without weights every selected pair counts as 1",
        ),
    ),
    "table6": Table(
        "Table 6: the terms of the objective",
        ("pos", "neg", "reg"),
        (
            Row(("–", "–", "–"), _scores(50.1, 12.4), "kmeans", _IBOT, "kmeans"),
            _ablation(("✓", "✓", "–"), "no-regularizer", "ablation-no-regularizer", 70.2, 22.7),
            _ablation(("✓", "–", "✓"), "no-negatives", "ablation-no-negatives", 77.5, 23.8),
            _ablation(("✓", "✓", "✓"), "all", _IBOT, 80.2, 26.6),
        ),
        "cityscapes",
        "full",
        (
            "the first row is k-means on the embeddings",
            "each published row is the best of a grid, chosen by labels; ours has one setting",
        ),
    ),
    "table7": Table(
        "Table 7: backbones",
        ("method", "data", "arch", "patch"),
        (
            _ablation(
                ("iBoT", "IN-1K", "ViT-Base", "16"),
                "ibot-vitb16",
                "cityscapes-linear-ibot-vitb16",
                73.6,
                26.4,
            ),
            _ablation(
                ("iBoT", "IN-22K", "ViT-Base", "16"),
                "ibot-vitb16-in22k",
                "cityscapes-linear-ibot-vitb16-in22k",
                80.5,
                26.3,
            ),
            _ablation(
                ("DINO", "IN-1K", "ViT-Small", "16"),
                "vits16",
                "cityscapes-linear-vits16",
                76.8,
                24.5,
            ),
            Row(
                ("DINO", "IN-1K", "ViT-Small", "8"),
                _scores(78.9, 23.1),
                "vits8",
                "cityscapes-linear-vits8",
            ),
            _ablation(
                ("DINO", "IN-1K", "ViT-Base", "16"),
                "vitb16",
                "cityscapes-linear-vitb16",
                77.4,
                19.8,
            ),
            Row(
                ("DINO", "IN-1K", "ViT-Base", "8"),
                _scores(76.3, 22.2),
                "vitb8",
                "cityscapes-linear-vitb8",
            ),
            _ablation(
                ("DINO", "IN-1K", "XCiT-Small", "16"),
                "xcits12-p16",
                "cityscapes-linear-xcits12-p16",
                77.5,
                22.7,
            ),
            _ablation(
                ("DINO", "IN-1K", "XCiT-Small", "8"),
                "xcits12-p8",
                "cityscapes-linear-xcits12-p8",
                76.6,
                23.1,
            ),
        ),
        "cityscapes",
        "full",
    ),
    "table8": Table(
        "Table 8: frozen or end to end",
        ("training strategy",),
        (
            _ablation(
                ("w/o end-to-end",), "frozen", "cityscapes-linear-ibot-vitb16-in22k", 80.5, 26.3
            ),
            _ablation(
                ("end-to-end",), "e2e", "cityscapes-linear-ibot-vitb16-in22k-e2e", 80.2, 27.7
            ),
        ),
        "cityscapes",
        "full",
        ("iBOT ViT-B/16 of IN-22K is inferred: the first row has the scores of Table 7's",),
    ),
}

WIDE = (0.25, 0.5, 1.0, 2.0, 4.0)
NARROW = (0.25, 1.0, 4.0)
"""By which sweeps multiply lambda_1 or lambda_2 of the recipe."""
_WEIGHTS: dict[Axis, str] = {"negative_weight": "lambda1", "regularizer_weight": "lambda2"}


def _sweep(
    curve: str,
    name: str,
    field: Axis,
    factors: tuple[float, ...],
    recipe: RecipeName = _IBOT,
    *edits: Edit,
) -> tuple[Row, ...]:
    """One curve over lambda_1 or lambda_2."""
    return tuple(
        Row(
            (curve,),
            name=f"{name}-{_WEIGHTS[field]}x{factor:g}",
            recipe=recipe,
            edits=(*edits, times(field, factor)),
        )
        for factor in factors
    )


_FORMS: dict[str, tuple[str, RecipeName]] = {
    "log-unweighted": ("log, no weights", "ablation-log-unweighted"),
    "linear-unweighted": ("linear, no weights", "ablation-linear-unweighted"),
    "exp-unweighted": ("exp, no weights", "ablation-exp-unweighted"),
    "log": ("log", "ablation-log"),
    "linear": ("linear", "ablation-linear"),
    "exp": ("exp", _IBOT),
}
_ENTROPY = objective(regularizer="entropy")


def _released(shape: float, scale: float) -> Edit:
    return objective(regularizer="weibull-released", weibull_shape=shape, weibull_scale=scale)


_REGULARIZERS: dict[str, tuple[str, Edit]] = {
    "entropy": ("entropy", _ENTROPY),
    "printed-k0.3": ("Weibull as printed, k 0.3", objective(regularizer="weibull")),
    "k0.3-scale5": ("Weibull as released, k 0.3, scale 5", _released(0.3, 5.0)),
    "k0.5-scale5": ("Weibull as released, k 0.5, scale 5", _released(0.5, 5.0)),
    "k0.3-scale1": ("Weibull as released, k 0.3, scale 1", _released(0.3, 1.0)),
}
_OURS = "the values of the sweep are ours: the paper gives none"


def _side_by_side(
    title: str,
    recipe: RecipeName,
    dataset: DatasetName = "cityscapes",
    protocol: ProtocolName = "full",
) -> Figure:
    rows = (
        Row(("STEGO",), name="stego", recipe=recipe, method="stego"),
        Row(("IDDC",), name="iddc", recipe=recipe),
    )
    note = "images, backbone and run are our choice: the paper names none"
    return Figure(title, (Panel("", "image", "miou", rows),), (note,), dataset, protocol)


FIGURES: dict[str, Figure] = {
    "fig2": Figure("Fig. 2: affinities of pixels of the same and of different classes"),
    "fig3": Figure(
        "Fig. 3: regularisers of two clusters by the ratio of their sizes",
        notes=(
            "from 0 at equal sizes to 1 at a ratio of 0.001; k and scale are ours: the paper gives "
            "none",
        ),
    ),
    "fig4": Figure(
        "Fig. 4: the regulariser",
        (
            Panel(
                "a: clusters found",
                "negative_weight",
                "live",
                (
                    *_sweep(
                        "without regulariser",
                        "none",
                        "negative_weight",
                        WIDE,
                        "ablation-no-regularizer",
                    ),
                    *_sweep("with regulariser", "weibull", "negative_weight", WIDE),
                ),
            ),
            Panel(
                "b: form of the regulariser",
                "regularizer_weight",
                "miou",
                tuple(
                    row
                    for name, (curve, edit) in _REGULARIZERS.items()
                    for row in _sweep(curve, name, "regularizer_weight", NARROW, _IBOT, edit)
                ),
            ),
            Panel(
                "c: ranked cluster sizes",
                "rank",
                "size",
                (
                    Row(("Weibull",), name="sizes-weibull", recipe=_IBOT),
                    Row(("entropy",), name="sizes-entropy", recipe=_IBOT, edits=(_ENTROPY,)),
                ),
            ),
        ),
        (_OURS, "published: the best mIoU without regulariser is 22.7, with it 26.6"),
    ),
    "fig5": Figure(
        "Fig. 5: penalties, with and without weights",
        (
            Panel(
                "over lambda_1",
                "negative_weight",
                "miou",
                tuple(
                    row
                    for name, (curve, recipe) in _FORMS.items()
                    for row in _sweep(curve, name, "negative_weight", NARROW, recipe)
                ),
            ),
            Panel(
                "over lambda_2",
                "regularizer_weight",
                "miou",
                tuple(
                    row
                    for name, (curve, recipe) in _FORMS.items()
                    for row in _sweep(curve, name, "regularizer_weight", NARROW, recipe)
                ),
            ),
        ),
        (_OURS, "published: the best of each curve is a row of Table 5"),
    ),
    "fig6": Figure(
        "Fig. 6: the terms, over lambda_1 and lambda_2",
        (
            Panel(
                "over lambda_1",
                "negative_weight",
                "miou",
                (
                    *_sweep("all terms", "all", "negative_weight", WIDE),
                    *_sweep(
                        "without regulariser",
                        "no-regularizer",
                        "negative_weight",
                        WIDE,
                        "ablation-no-regularizer",
                    ),
                ),
            ),
            Panel(
                "over lambda_2",
                "regularizer_weight",
                "miou",
                (
                    *_sweep("all terms", "all", "regularizer_weight", WIDE),
                    *_sweep(
                        "without negative term",
                        "no-negatives",
                        "regularizer_weight",
                        WIDE,
                        "ablation-no-negatives",
                    ),
                ),
            ),
        ),
        (_OURS, "published: the best of each setting is a row of Table 6"),
    ),
    "fig7": Figure(
        "Fig. 7: thresholds, and scores after each epoch",
        (
            Panel(
                "a: thresholds",
                "positive_threshold",
                "miou",
                (
                    *(
                        Row(
                            ("t- {negative_threshold:g}",),
                            name=f"thresholds{up:+g}{low:+g}",
                            recipe=_IBOT,
                            edits=(plus("positive_threshold", up), plus("negative_threshold", low)),
                        )
                        for low in (-0.1, 0.0, 0.1)
                        for up in (-0.2, -0.1, 0.0, 0.1, 0.2)
                    ),
                    Row(("the recipe's own",), name="own", recipe=_IBOT),
                ),
            ),
            Panel(
                "b: after each epoch",
                "epoch",
                "miou",
                (Row(("mIoU",), name="epochs", recipe=_IBOT, snapshots=True),),
            ),
        ),
        (_OURS, "published: best at t+ = t- = 0.2; no obvious fluctuation over the epochs"),
    ),
    "fig8": _side_by_side("Fig. 8: image, truth, STEGO, IDDC on Cityscapes", "cityscapes-vitb8"),
    "fig9": _side_by_side(
        "Fig. 9: image, truth, STEGO, IDDC on COCO-Stuff-27",
        "cocostuff27-vits8",
        "cocostuff27",
        "iddc-sliding",
    ),
}
