"""Every experiment of the paper by name, the paper's tables, and our preset for your own images.

    RECIPES["cityscapes-vitb8"].experiment()     a complete Experiment
    TABLES["table3"].rows                        what was published, and the recipe of each row

`paper.py` has the experiments, `ablations.py` the edits that make others of them, `tables.py` the
published numbers. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from iddc.config import Experiment, ProtocolName, RecipeName
from iddc.recipes.ablations import EDITS, Edit
from iddc.recipes.paper import PAPER, folder
from iddc.recipes.tables import FIGURES, TABLES, Figure, Panel, Row, Table
from iddc.recipes.text import rows_of

__all__ = ["FIGURES", "RECIPES", "TABLES", "Figure", "Panel", "Recipe", "Row", "Table"]

# Recipe, what it is an edit of, the edit, one line for `iddc recipes`.
_LISTED = """
    folder                                  | | | your own images, any number of them; the default
    cocostuff27-vits16                      | | | COCO-Stuff-27, DINO ViT-S/16
    cocostuff27-vits16-released | | released | the same as the authors' code runs it: 20 epochs
    cocostuff27-vits16-e2e      | cocostuff27-vits16 | end-to-end | the same end to end
    cocostuff27-vits8                       | | | COCO-Stuff-27, DINO ViT-S/8
    cocostuff27-vits8-e2e       | cocostuff27-vits8  | end-to-end | the same end to end
    cocostuff171-vits8                      | | | COCO-Stuff-171, DINO ViT-S/8
    cocostuff171-vits8-e2e      | cocostuff171-vits8 | end-to-end | the same end to end
    cityscapes-vitb8                        | | | Cityscapes, DINO ViT-B/8
    cityscapes-vitb8-e2e        | cityscapes-vitb8   | end-to-end | the same end to end
    cityscapes-vits8                        | | | Cityscapes, DINO ViT-S/8
    cityscapes-vits8-e2e        | cityscapes-vits8   | end-to-end | the same end to end
    cityscapes-linear-vitb8                 | | | Cityscapes, linear head, DINO ViT-B/8
    cityscapes-linear-vits8                 | | | Cityscapes, linear head, DINO ViT-S/8
    cityscapes-linear-vits16                | | | Cityscapes, linear head, DINO ViT-S/16
    cityscapes-linear-vitb16                | | | Cityscapes, linear head, DINO ViT-B/16
    cityscapes-linear-xcits12-p16           | | | Cityscapes, linear head, DINO XCiT-S12/16
    cityscapes-linear-xcits12-p8            | | | Cityscapes, linear head, DINO XCiT-S12/8
    cityscapes-linear-ibot-vitb16           | | | Cityscapes, linear head, iBOT ViT-B/16
    cityscapes-linear-ibot-vitb16-in22k     | | | Cityscapes, linear head, iBOT ViT-B/16 of IN-22K
    cityscapes-linear-ibot-vitb16-in22k-e2e | cityscapes-linear-ibot-vitb16-in22k | end-to-end \
                                                | the same end to end
    cityscapes-linear-ibot-vits16           | | | Cityscapes, linear head, iBOT ViT-S/16
    ablation-log-unweighted    | IBOT | log-unweighted    | the same, log penalty, weights 1
    ablation-linear-unweighted | IBOT | linear-unweighted | the same, linear penalty, weights 1
    ablation-exp-unweighted    | IBOT | exp-unweighted    | the same, weights 1
    ablation-log               | IBOT | log               | the same, log penalty
    ablation-linear            | IBOT | linear            | the same, linear penalty
    ablation-no-regularizer    | IBOT | no-regularizer    | the same, without regulariser
    ablation-no-negatives      | IBOT | no-negatives      | the same, without negative term
"""


@dataclass(frozen=True)
class Recipe:
    """A named experiment, and what the paper reports for it."""

    name: RecipeName
    base: str
    """The recipe of which this one is an edit; its own name if it is none."""
    edit: Edit
    """What makes it of that."""
    summary: str
    """One line for `iddc recipes`."""

    def experiment(self) -> Experiment:
        """The complete experiment."""
        base = folder() if self.base == "folder" else PAPER[self.base]
        return self.edit(base).model_copy(update={"recipe": self.name})

    @property
    def table(self) -> str | None:
        """Where in the paper it stands: "Table 3", "Tables 4, 7"."""
        numbers = [table.title.partition(":")[0].removeprefix("Table ") for table, _ in self._rows]
        return f"Table{'s'[: len(numbers) > 1]} {', '.join(numbers)}" if numbers else None

    @property
    def protocol(self) -> ProtocolName:
        """The evaluation protocol of the published numbers."""
        return self._rows[0][0].protocol if self._rows else "full"

    @property
    def published(self) -> tuple[float | None, float] | None:
        """Published accuracy and mIoU without CRF, in [0, 1]."""
        return self._rows[0][1].published if self._rows else None

    @property
    def _rows(self) -> list[tuple[Table, Row]]:
        wanted = (self.name, "iddc", "none")
        return [
            (table, row)
            for table in TABLES.values()
            for row in table.rows
            if (row.recipe, row.method, row.refine) == wanted
        ]


def _recipe(name: str, base: str, edit: str, summary: str) -> Recipe:
    base = "cityscapes-linear-ibot-vits16" if base == "IBOT" else base or name
    return Recipe(cast("RecipeName", name), base, EDITS[edit], summary)


RECIPES = {recipe.name: recipe for recipe in (_recipe(*row) for row in rows_of(_LISTED))}
