"""Every experiment of the paper by name, the paper's tables, and our preset for your own images.

    RECIPES["cityscapes-vitb8"].experiment()     a complete Experiment
    TABLES["table3"].rows                        what was published, and the recipe of each row

`paper.py` has the experiments, `ablations.py` the edits that make others of them, `tables.py` the
published numbers. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from iddc.config import Experiment, ProtocolName, RecipeName
from iddc.recipes.ablations import ABLATIONS, Edit, as_released, end_to_end, unchanged
from iddc.recipes.paper import (
    cityscapes_linear,
    cityscapes_vitb8,
    cityscapes_vits8,
    cocostuff27_vits8,
    cocostuff27_vits16,
    cocostuff27_vits16_released,
    cocostuff171_vits8,
    folder,
)
from iddc.recipes.tables import FIGURES, TABLES, Figure, Panel, Row, Table

__all__ = ["FIGURES", "RECIPES", "TABLES", "Figure", "Panel", "Recipe", "Row", "Table"]


@dataclass(frozen=True)
class Recipe:
    """A named experiment, and what the paper reports for it."""

    summary: str
    """One line for `iddc recipes`."""
    experiment: Callable[[], Experiment]
    """Returns the complete experiment."""
    edit: Edit = unchanged
    """What makes it of the experiment that it is a variant of."""

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
        wanted = (self.experiment().recipe, "iddc", "none")
        return [
            (table, row)
            for table in TABLES.values()
            for row in table.rows
            if (row.recipe, row.method, row.refine) == wanted
        ]


def _variant(
    name: RecipeName, summary: str, base: Callable[[], Experiment], edit: Edit = end_to_end
) -> Recipe:
    """An edit of an experiment under its own name."""
    return Recipe(summary, lambda: edit(base()).model_copy(update={"recipe": name}), edit)


def _linear(name: RecipeName, what: str) -> Recipe:
    """A row of Table 7."""
    return Recipe(f"Cityscapes, linear head, {what}", partial(cityscapes_linear, name))


def _ablation(name: RecipeName, what: str) -> Recipe:
    """A row of Tables 5 and 6."""
    base = partial(cityscapes_linear, "cityscapes-linear-ibot-vits16")
    return _variant(name, f"the same, {what}", base, ABLATIONS[name.removeprefix("ablation-")])


RECIPES: dict[RecipeName, Recipe] = {
    "folder": Recipe("your own images, any number of them; the default", folder),
    "cocostuff27-vits16": Recipe("COCO-Stuff-27, DINO ViT-S/16", cocostuff27_vits16),
    "cocostuff27-vits16-released": Recipe(
        "the same as the authors' code runs it: 20 epochs", cocostuff27_vits16_released, as_released
    ),
    "cocostuff27-vits16-e2e": _variant(
        "cocostuff27-vits16-e2e", "the same end to end", cocostuff27_vits16
    ),
    "cocostuff27-vits8": Recipe("COCO-Stuff-27, DINO ViT-S/8", cocostuff27_vits8),
    "cocostuff27-vits8-e2e": _variant(
        "cocostuff27-vits8-e2e", "the same end to end", cocostuff27_vits8
    ),
    "cocostuff171-vits8": Recipe("COCO-Stuff-171, DINO ViT-S/8", cocostuff171_vits8),
    "cocostuff171-vits8-e2e": _variant(
        "cocostuff171-vits8-e2e", "the same end to end", cocostuff171_vits8
    ),
    "cityscapes-vitb8": Recipe("Cityscapes, DINO ViT-B/8", cityscapes_vitb8),
    "cityscapes-vitb8-e2e": _variant(
        "cityscapes-vitb8-e2e", "the same end to end", cityscapes_vitb8
    ),
    "cityscapes-vits8": Recipe("Cityscapes, DINO ViT-S/8", cityscapes_vits8),
    "cityscapes-vits8-e2e": _variant(
        "cityscapes-vits8-e2e", "the same end to end", cityscapes_vits8
    ),
    "cityscapes-linear-vitb8": _linear("cityscapes-linear-vitb8", "DINO ViT-B/8"),
    "cityscapes-linear-vits8": _linear("cityscapes-linear-vits8", "DINO ViT-S/8"),
    "cityscapes-linear-vits16": _linear("cityscapes-linear-vits16", "DINO ViT-S/16"),
    "cityscapes-linear-vitb16": _linear("cityscapes-linear-vitb16", "DINO ViT-B/16"),
    "cityscapes-linear-xcits12-p16": _linear("cityscapes-linear-xcits12-p16", "DINO XCiT-S12/16"),
    "cityscapes-linear-xcits12-p8": _linear("cityscapes-linear-xcits12-p8", "DINO XCiT-S12/8"),
    "cityscapes-linear-ibot-vitb16": _linear("cityscapes-linear-ibot-vitb16", "iBOT ViT-B/16"),
    "cityscapes-linear-ibot-vitb16-in22k": _linear(
        "cityscapes-linear-ibot-vitb16-in22k", "iBOT ViT-B/16 of IN-22K"
    ),
    "cityscapes-linear-ibot-vitb16-in22k-e2e": _variant(
        "cityscapes-linear-ibot-vitb16-in22k-e2e",
        "the same end to end",
        partial(cityscapes_linear, "cityscapes-linear-ibot-vitb16-in22k"),
    ),
    "cityscapes-linear-ibot-vits16": _linear("cityscapes-linear-ibot-vits16", "iBOT ViT-S/16"),
    "ablation-log-unweighted": _ablation("ablation-log-unweighted", "log penalty, weights 1"),
    "ablation-linear-unweighted": _ablation(
        "ablation-linear-unweighted", "linear penalty, weights 1"
    ),
    "ablation-exp-unweighted": _ablation("ablation-exp-unweighted", "weights 1"),
    "ablation-log": _ablation("ablation-log", "log penalty"),
    "ablation-linear": _ablation("ablation-linear", "linear penalty"),
    "ablation-no-regularizer": _ablation("ablation-no-regularizer", "without regulariser"),
    "ablation-no-negatives": _ablation("ablation-no-negatives", "without negative term"),
}
