"""Commands that tell: recipes, models, doctor, demo."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from iddc.cli.check import crops_per_second
from iddc.cli.options import Command, Informing
from iddc.cli.printing import percent, print_json, print_scores, print_table
from iddc.recipes import RECIPES

if TYPE_CHECKING:
    from iddc.backbones import KnownBackbone


@dataclass(frozen=True, kw_only=True)
class Recipes(Informing):
    """List the recipes: the rows of the paper's tables, and the default for your own images."""

    def __call__(self) -> int:
        """Print them."""
        if self.json:
            print_json(
                {
                    name: {
                        "summary": recipe.summary,
                        "table": recipe.table,
                        "protocol": recipe.protocol,
                        "published": recipe.published,
                        "experiment": recipe.experiment().model_dump(),
                    }
                    for name, recipe in RECIPES.items()
                }
            )
            return 0
        rows = [
            (
                name,
                recipe.summary,
                recipe.table or "",
                " / ".join(percent(value).strip() for value in recipe.published or ()),
                recipe.protocol if recipe.published else "",
            )
            for name, recipe in RECIPES.items()
        ]
        print_table(("recipe", "what", "paper", "Acc / mIoU (%)", "protocol"), rows)
        print("\nnext: iddc train IMAGES --recipe NAME --out RUN --print-config shows every number")
        return 0


@dataclass(frozen=True, kw_only=True)
class Models(Informing):
    """List the backbones, their licences, and which have their weights on this machine."""

    def __call__(self) -> int:
        """Print them."""
        from iddc.backbones import BACKBONES, bundled_backbone, is_here

        models = [("bundled", bundled_backbone()), *BACKBONES.items()]
        facts = {name: {**asdict(known), "here": is_here(name)} for name, known in models}
        if self.json:
            print_json(facts)
            return 0
        rows = [
            (
                name,
                str(known.patch_size),
                str(known.width),
                f"{known.millions} M",
                f"{crops_per_second(name):.1f}/s",
                known.licence,
                known.source,
                _where(name, known, here=bool(facts[name]["here"])),
            )
            for name, known in models
        ]
        header = ("backbone", "patch", "width", "size", "speed", "licence", "source", "here")
        print_table(header, rows)
        print(
            "\nSpeed: crops of 224 x 224 pixels that this CPU embeds, estimated. A name without "
            "weights here is fetched when it is first used, or give NAME=FILE. Also: a timm name "
            "with the tag of its weights, or untrained:TIMM_NAME."
        )
        return 0


def _where(name: str, known: KnownBackbone, *, here: bool) -> str:
    """Whether the weights are on this machine, and what to do if they are not."""
    return "yes" if here else f"no: {name}=FILE" if known.needs_file else "no"


@dataclass(frozen=True, kw_only=True)
class Doctor(Informing):
    """Examine this machine: packages, processor, GPU, disk, weights; exit 4 if one is missing."""

    def __call__(self) -> int:
        """Examine."""
        from iddc.doctor import examine

        findings = list(examine(Path.cwd()))
        if self.json:
            print_json({finding.name: asdict(finding) for finding in findings})
        else:
            print_table(("what", "found"), [(finding.name, finding.value) for finding in findings])
        problems = [finding for finding in findings if finding.advice]
        for finding in problems:
            print(f"error: {finding.name}: {finding.advice}", file=sys.stderr)
        return 4 if problems else 0


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Draw street scenes, train on them, and compare with k-means: some minutes on a CPU."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/demo")
    """The folder to write: scenes, both runs, overlays and a contact sheet."""

    def __call__(self) -> int:
        """Run the demonstration."""
        from iddc.demo import run_demo
        from iddc.progress import Progress

        print(
            "Drawn scenes and the bundled backbone: the demo shows that everything works, not how "
            "good it is on photos."
        )
        result = run_demo(self.out, progress=Progress())
        print_scores(result.scores)
        print(f"\n{result.sheet}    next: iddc train IMAGES --out RUN")
        return 0
