"""The tables and figures of the paper as data: what each row is, and what was published for it.

A row names the recipe that reruns it, and its method where that is not IDDC. Figures 4-7 are
sweeps: the paper shows them as curves without their values, so the values are ours, relative to the
recipe that is varied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from iddc.config import DatasetName, MethodName, ProtocolName, RecipeName, RefineName
from iddc.recipes.ablations import Edit, objective, scaled, shifted
from iddc.recipes.text import rows_of

Axis = Literal[
    "negative_weight", "regularizer_weight", "positive_threshold", "epoch", "rank", "image"
]
Measure = Literal["miou", "live", "size"]


@dataclass(frozen=True)
class Row:
    """One row of a table, or one point of a figure."""

    cells: tuple[str, ...]
    """The first columns, as the paper has them; of a figure, the name of its curve."""
    published: tuple[float | None, float] | None = None
    """Accuracy and mIoU in [0, 1]."""
    name: str = ""
    """The name in options and files; none for a method that is not ours to run."""
    recipe: RecipeName | None = None
    """What is trained, or the backbone and the data on which a baseline is fitted."""
    method: MethodName = "iddc"
    edits: tuple[Edit, ...] = ()
    """What a point of a figure changes in the recipe."""
    refine: RefineName = "none"
    """The refinement of the masks. Rows that differ in this alone share a run."""
    snapshots: bool = False
    """Score the model after each epoch."""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    columns: tuple[str, ...]
    """The headings of the cells of its rows."""
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
_NOTES = {
    "unpublished": UNPUBLISHED,
    "twin": "the paper does not say whether its number is end to end",
    "released": "20 epochs, as the authors' code runs it",
    "trained": "a head on the recipe's frozen ViT; published with a ResNet-18 that was trained",
    "compact": "docs/methods.md says what is left out of the published system",
}
_IBOT: RecipeName = "cityscapes-linear-ibot-vits16"
_BEST = "each published row is the best of a grid, chosen by labels; ours has one setting"


def _table(
    title: str,
    columns: str,
    dataset: DatasetName,
    protocol: ProtocolName,
    rows: str,
    *notes: str,
) -> Table:
    """A table whose lines have the columns, accuracy and mIoU in percent as printed.

    What is ours to run also has the row's name, its recipe and perhaps a key of `_NOTES`. A name
    that begins with that of a method is of this method; one that ends with +crf is refined.
    """
    heads = tuple(name.replace("_", " ") for name in columns.split())

    def row(cells: list[str]) -> Row:
        accuracy, miou, name, recipe, note = (cells[len(heads) :] + [""] * 3)[:5]
        return Row(
            tuple(cells[: len(heads)]),
            (None if accuracy == "–" else float(accuracy) / 100, float(miou) / 100),
            name,
            _recipe(recipe) if recipe else None,
            _method(name),
            refine="crf" if name.endswith("+crf") else "none",
            note=_NOTES.get(note, ""),
        )

    return Table(title, heads, tuple(map(row, rows_of(rows))), dataset, protocol, notes)


def _method(name: str) -> MethodName:
    """The method whose name a row's begins with; the longest, as of picie and picie-h."""
    known = [one for one in get_args(MethodName) if f"{name}-".startswith(f"{one}-")]
    return max(known, key=len, default="iddc")


def _recipe(word: str) -> RecipeName:
    return _IBOT if word == "IBOT" else cast("RecipeName", word)


TABLES: dict[str, Table] = {
    "table1": _table(
        "Table 1: COCO-Stuff-27",
        "method backbone",
        "cocostuff27",
        "iddc-sliding",
        """
    Modified DC (ECCV'18) | R18+FPN  | 32.2 | 9.8  | mdc-vits16      | cocostuff27-vits16 | trained
    IIC (ICCV'19)         | R18+FPN  | 21.8 | 6.7  | iic-vits16      | cocostuff27-vits16 | trained
    PiCIE (CVPR'21)       | R18+FPN  | 48.1 | 13.8 | picie-vits16    | cocostuff27-vits16 | trained
    PiCIE+H (CVPR'21)     | R18+FPN  | 50.0 | 14.4 | picie-h-vits16  | cocostuff27-vits16 | trained
    STEGO                 | ViT-S/16 | 52.5 | 23.7 | stego-vits16    | cocostuff27-vits16
    HP (CVPR'23)          | ViT-S/16 | 54.5 | 24.3 | hp-vits16       | cocostuff27-vits16 | compact
    IDDC                  | ViT-S/16 | 59.9 | 25.8 | vits16          | cocostuff27-vits16
    IDDC as released      | ViT-S/16 | 59.9 | 25.8 | vits16-released \
                                                   | cocostuff27-vits16-released | released
    IDDC, end to end      | ViT-S/16 | 59.9 | 25.8 | vits16-e2e      | cocostuff27-vits16-e2e | twin
    ACSeg (CVPR'23)       | ViT-S/8  | –    | 16.4 | acseg-vits8     | cocostuff27-vits8  | compact
    TransFGU (ECCV'22)    | ViT-S/8  | 52.7 | 17.5 | transfgu-vits8  | cocostuff27-vits8  | compact
    HP (CVPR'23)          | ViT-S/8  | 57.2 | 24.6 | hp-vits8        | cocostuff27-vits8  | compact
    STEGO                 | ViT-S/8  | 47.7 | 24.0 | stego-vits8     | cocostuff27-vits8
    STEGO+CRF             | ViT-S/8  | 48.3 | 24.5 | stego-vits8+crf | cocostuff27-vits8
    IDDC                  | ViT-S/8  | 58.3 | 25.5 | vits8           | cocostuff27-vits8
    IDDC+CRF              | ViT-S/8  | 58.8 | 25.8 | vits8+crf       | cocostuff27-vits8
    IDDC, end to end      | ViT-S/8  | 58.3 | 25.5 | vits8-e2e       | cocostuff27-vits8-e2e | twin
        """,
    ),
    "table2": _table(
        "Table 2: COCO-Stuff-171",
        "method backbone",
        "cocostuff171",
        "iddc-sliding",
        """
    PiCIE (CVPR'21)    | ViT-S/8 | 18.5 | 3.0  | picie-vits8    | cocostuff171-vits8 | compact
    TransFGU (ECCV'22) | ViT-S/8 | 34.3 | 11.9 | transfgu-vits8 | cocostuff171-vits8 | compact
    IDDC               | ViT-S/8 | 34.3 | 12.2 | vits8     | cocostuff171-vits8
    IDDC, end to end   | ViT-S/8 | 34.3 | 12.2 | vits8-e2e | cocostuff171-vits8-e2e | twin
        """,
        "the paper states no protocol for this table: this is the one of Table 1",
    ),
    "table3": _table(
        "Table 3: Cityscapes, centre crops",
        "method backbone",
        "cityscapes",
        "stego-center-crop",
        """
    Modified DC (ECCV'18) | R18+FPN | 40.7 | 7.1  | mdc-vits8       | cityscapes-vits8 | trained
    IIC (ICCV'19)         | R18+FPN | 47.9 | 6.4  | iic-vits8       | cityscapes-vits8 | trained
    PiCIE (CVPR'21)       | R18+FPN | 65.6 | 12.3 | picie-vits8     | cityscapes-vits8 | trained
    HP (CVPR'23)          | ViT-B/8 | 79.5 | 18.4 | hp-vitb8        | cityscapes-vitb8 | compact
    STEGO                 | ViT-B/8 | 66.4 | 19.6 | stego-vitb8     | cityscapes-vitb8
    STEGO+CRF             | ViT-B/8 | 73.2 | 21.0 | stego-vitb8+crf | cityscapes-vitb8
    IDDC                  | ViT-B/8 | 78.0 | 21.6 | vitb8           | cityscapes-vitb8
    IDDC+CRF              | ViT-B/8 | 78.6 | 21.7 | vitb8+crf       | cityscapes-vitb8
    IDDC, end to end      | ViT-B/8 | 78.0 | 21.6 | vitb8-e2e       | cityscapes-vitb8-e2e | twin
    TransFGU (ECCV'22)    | ViT-S/8 | 77.9 | 16.8 | transfgu-vits8  | cityscapes-vits8 | compact
    HP (CVPR'23)          | ViT-S/8 | 80.1 | 18.4 | hp-vits8        | cityscapes-vits8 | compact
    IDDC                  | ViT-S/8 | 79.9 | 22.0 | vits8           | cityscapes-vits8
    IDDC, end to end      | ViT-S/8 | 79.9 | 22.0 | vits8-e2e       | cityscapes-vits8-e2e | twin
        """,
        "the training size, shorter side 320, is ours: the paper does not state it",
    ),
    "table4": _table(
        "Table 4: Cityscapes, whole images",
        "method backbone",
        "cityscapes",
        "full",
        """
    STEGO     | ViT-B/8 | 64.0 | 19.8 | stego-vitb8     | cityscapes-linear-vitb8
    STEGO+CRF | ViT-B/8 | 68.9 | 20.9 | stego-vitb8+crf | cityscapes-linear-vitb8
    IDDC      | ViT-B/8 | 76.3 | 22.2 | vitb8           | cityscapes-linear-vitb8
    IDDC+CRF  | ViT-B/8 | 77.0 | 22.4 | vitb8+crf       | cityscapes-linear-vitb8
        """,
        "linear head: the row without CRF has the scores of Table 7's",
        "windows and training size, shorter side 320, are ours: the paper states neither",
    ),
    "table5": _table(
        "Table 5: penalties, with and without weights",
        "h weights",
        "cityscapes",
        "full",
        """
    Log    | – | 68.8 | 20.4 | log-unweighted    | ablation-log-unweighted    | unpublished
    Linear | – | 77.2 | 24.4 | linear-unweighted | ablation-linear-unweighted | unpublished
    Exp    | – | 79.5 | 24.8 | exp-unweighted    | ablation-exp-unweighted    | unpublished
    Log    | ✓ | 76.8 | 21.4 | log               | ablation-log               | unpublished
    Linear | ✓ | 78.7 | 25.2 | linear            | ablation-linear            | unpublished
    Exp    | ✓ | 80.2 | 26.6 | exp               | IBOT                       | unpublished
        """,
        _BEST,
        "without weights every selected pair counts as 1",
    ),
    "table6": _table(
        "Table 6: the terms of the objective",
        "pos neg reg",
        "cityscapes",
        "full",
        """
    – | – | – | 50.1 | 12.4 | kmeans         | IBOT
    ✓ | ✓ | – | 70.2 | 22.7 | no-regularizer | ablation-no-regularizer | unpublished
    ✓ | – | ✓ | 77.5 | 23.8 | no-negatives   | ablation-no-negatives   | unpublished
    ✓ | ✓ | ✓ | 80.2 | 26.6 | all            | IBOT                    | unpublished
        """,
        "the first row is k-means on the embeddings",
        _BEST,
    ),
    "table7": _table(
        "Table 7: backbones",
        "method data arch patch",
        "cityscapes",
        "full",
        """
    iBoT | IN-1K  | ViT-Base   | 16 | 73.6 | 26.4 | ibot-vitb16 \
                                                | cityscapes-linear-ibot-vitb16       | unpublished
    iBoT | IN-22K | ViT-Base   | 16 | 80.5 | 26.3 | ibot-vitb16-in22k \
                                                | cityscapes-linear-ibot-vitb16-in22k | unpublished
    DINO | IN-1K  | ViT-Small  | 16 | 76.8 | 24.5 | vits16 | cityscapes-linear-vits16 | unpublished
    DINO | IN-1K  | ViT-Small  | 8  | 78.9 | 23.1 | vits8  | cityscapes-linear-vits8
    DINO | IN-1K  | ViT-Base   | 16 | 77.4 | 19.8 | vitb16 | cityscapes-linear-vitb16 | unpublished
    DINO | IN-1K  | ViT-Base   | 8  | 76.3 | 22.2 | vitb8  | cityscapes-linear-vitb8
    DINO | IN-1K  | XCiT-Small | 16 | 77.5 | 22.7 | xcits12-p16 \
                                                | cityscapes-linear-xcits12-p16       | unpublished
    DINO | IN-1K  | XCiT-Small | 8  | 76.6 | 23.1 | xcits12-p8 \
                                                | cityscapes-linear-xcits12-p8        | unpublished
        """,
    ),
    "table8": _table(
        "Table 8: frozen or end to end",
        "training_strategy",
        "cityscapes",
        "full",
        """
    w/o end-to-end | 80.5 | 26.3 | frozen | cityscapes-linear-ibot-vitb16-in22k     | unpublished
    end-to-end     | 80.2 | 27.7 | e2e    | cityscapes-linear-ibot-vitb16-in22k-e2e | unpublished
        """,
        "iBOT ViT-B/16 of IN-22K is inferred: the first row has the scores of Table 7's",
    ),
}

WIDE = (0.25, 0.5, 1.0, 2.0, 4.0)
NARROW = (0.25, 1.0, 4.0)
"""The factors by which sweeps multiply lambda_1 or lambda_2 of the recipe."""
_SYMBOLS: dict[Axis, str] = {"negative_weight": "lambda1", "regularizer_weight": "lambda2"}
_OURS = "the values of the sweep are ours: the paper gives none"


def _sweep(
    title: str, x: Axis, factors: Iterable[float], curves: str, y: Measure = "miou"
) -> Panel:
    """Curves over lambda_1 or lambda_2.

    A line of `curves` has the title of a curve, its name, its recipe and, if it has some, fields of
    the objective.
    """
    rows = []
    for curve, name, recipe, *fields in rows_of(curves):
        edits = [objective(**_fields(word)) for word in fields]
        rows += [
            Row(
                (curve,),
                name=f"{name}-{_SYMBOLS[x]}x{factor:g}",
                recipe=_recipe(recipe),
                edits=(*edits, scaled(x, factor)),
            )
            for factor in factors
        ]
    return Panel(title, x, y, tuple(rows))


def _fields(words: str) -> dict[str, str]:
    """`a=b c=1` as a dict; the objective turns texts into numbers."""
    return dict(word.split("=") for word in words.split())


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


_FORMS = """
    log, no weights    | log-unweighted    | ablation-log-unweighted
    linear, no weights | linear-unweighted | ablation-linear-unweighted
    exp, no weights    | exp-unweighted    | ablation-exp-unweighted
    log                | log               | ablation-log
    linear             | linear            | ablation-linear
    exp                | exp               | IBOT
"""
_RELEASED = "regularizer=weibull-released weibull_shape"
_REGULARIZERS = f"""
    entropy                            | entropy      | IBOT | regularizer=entropy
    Weibull as printed, k 0.3          | printed-k0.3 | IBOT | regularizer=weibull
    Weibull as released, k 0.3, scale 5 | k0.3-scale5 | IBOT | {_RELEASED}=0.3 weibull_scale=5
    Weibull as released, k 0.5, scale 5 | k0.5-scale5 | IBOT | {_RELEASED}=0.5 weibull_scale=5
    Weibull as released, k 0.3, scale 1 | k0.3-scale1 | IBOT | {_RELEASED}=0.3 weibull_scale=1
"""
_SIZES = (
    Row(("Weibull",), name="sizes-weibull", recipe=_IBOT),
    Row(
        ("entropy",), name="sizes-entropy", recipe=_IBOT, edits=(objective(regularizer="entropy"),)
    ),
)
_THRESHOLDS = tuple(
    Row(
        ("t- {negative_threshold:g}",),
        name=f"thresholds{up:+g}{low:+g}",
        recipe=_IBOT,
        edits=(shifted("positive_threshold", up), shifted("negative_threshold", low)),
    )
    for low in (-0.1, 0.0, 0.1)
    for up in (-0.2, -0.1, 0.0, 0.1, 0.2)
)
_OWN = Row(("the recipe's own",), name="own", recipe=_IBOT)
_EPOCHS = Row(("mIoU",), name="epochs", recipe=_IBOT, snapshots=True)

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
            _sweep(
                "a: clusters found",
                "negative_weight",
                WIDE,
                """
                without regulariser | none    | ablation-no-regularizer
                with regulariser    | weibull | IBOT
                """,
                "live",
            ),
            _sweep("b: form of the regulariser", "regularizer_weight", NARROW, _REGULARIZERS),
            Panel("c: ranked cluster sizes", "rank", "size", _SIZES),
        ),
        (_OURS, "published: the best mIoU without regulariser is 22.7, with it 26.6"),
    ),
    "fig5": Figure(
        "Fig. 5: penalties, with and without weights",
        (
            _sweep("over lambda_1", "negative_weight", NARROW, _FORMS),
            _sweep("over lambda_2", "regularizer_weight", NARROW, _FORMS),
        ),
        (_OURS, "published: the best of each curve is a row of Table 5"),
    ),
    "fig6": Figure(
        "Fig. 6: the terms, over lambda_1 and lambda_2",
        (
            _sweep(
                "over lambda_1",
                "negative_weight",
                WIDE,
                """
                all terms           | all            | IBOT
                without regulariser | no-regularizer | ablation-no-regularizer
                """,
            ),
            _sweep(
                "over lambda_2",
                "regularizer_weight",
                WIDE,
                """
                all terms             | all          | IBOT
                without negative term | no-negatives | ablation-no-negatives
                """,
            ),
        ),
        (_OURS, "published: the best of each setting is a row of Table 6"),
    ),
    "fig7": Figure(
        "Fig. 7: thresholds, and scores after each epoch",
        (
            Panel("a: thresholds", "positive_threshold", "miou", (*_THRESHOLDS, _OWN)),
            Panel("b: after each epoch", "epoch", "miou", (_EPOCHS,)),
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
