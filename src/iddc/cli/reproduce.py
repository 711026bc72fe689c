"""The command that reruns the paper: reproduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from tyro.conf import Positional, arg

from iddc.cli.options import Command, Flat, unknown
from iddc.cli.printing import print_json, print_table
from iddc.config import BackboneName, DatasetName, Experiment, Runtime
from iddc.errors import ConfigError, DataError
from iddc.recipes import FIGURES, RECIPES, TABLES
from iddc.recipes.ablations import from_scratch
from iddc.runs import load_config

SEEDS, SMOKE_SEEDS = 5, 2


def _default(metavar: str, default: str) -> Any:
    """An option that may be left out, and what it is then."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Reproduce(Command):
    """Rerun a table or a figure of the paper, and put our scores beside the published ones.

    TABLE is table1 to table8 or fig2 to fig9. Runs are in DIR/runs, results in DIR/TABLE.md, .json
    and, of a figure, .png. Rows whose data or weights are not here are named and left out. Finished
    rows are not run again, so you can repeat an interrupted command (docs/reproduce.md). Exits with
    0 if at least one row could be run and none of them failed.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder of the data set, as it was downloaded."""
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write."""
    rows: Annotated[tuple[str, ...], _default("ROW", "all")] = ()
    """Names of rows, or patterns such as vits8*. A wrong one is answered with those there are."""
    seeds: Annotated[int | None, _default("N", "5; with --smoke 2")] = None
    """Runs of each row."""
    smoke: bool = False
    """Try everything on drawn scenes with a tiny untrained network. It gives no result."""
    weights: Annotated[
        tuple[str, ...], arg(metavar="NAME=FILE", help_behavior_hint="(default: none)")
    ] = ()
    """Published weights that cannot be fetched (`iddc models`)."""
    dataset: Annotated[DatasetName | None, _default("NAME", "the paper's")] = None
    """Another data set: each row edits the recipe `folder`, or --config, instead of the paper's."""
    config: Annotated[Path | None, _default("FILE", "none")] = None
    """Start every row from this config file instead of from its recipe."""
    backbone: Annotated[tuple[str, ...], _default("B", "the paper's")] = ()
    """Another backbone; of table7, the backbones to compare."""
    num_clusters: Annotated[int | None, _default("K", "the paper's, or as many as classes")] = None
    """How many clusters to find."""
    refine: Literal["crf", "fast"] = "crf"
    """What rows with +CRF do; fast needs no compiler."""
    json: bool = False
    """Print the content of DIR/TABLE.json instead of tables."""
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"device", "workers", "micro_batch_size", "checkpoint_every", "max_unreadable"}
    )

    def __post_init__(self) -> None:
        known = [*TABLES, *FIGURES]
        if self.table not in known:
            raise unknown("table", self.table, known)
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"--seeds: expected at least 1, found {self.seeds}.")
        if self.num_clusters is not None and not 2 <= self.num_clusters <= 65535:
            raise ConfigError(f"--num-clusters: expected 2 to 65535, found {self.num_clusters}.")
        if self.smoke and (self.data or self.weights or self.config or self.backbone):
            raise ConfigError(
                "--smoke draws its own data and makes its own backbone. Leave out --data, "
                "--weights, --config and --backbone."
            )

    def __call__(self) -> int:
        """Rerun."""
        weights = dict(map(_weights, self.weights))
        base = None
        if self.config:
            # As in the paper, what the file leaves out is of IDDC from random weights.
            recipes: dict[str, Callable[[], Experiment]]
            recipes = {name: RECIPES[name].experiment for name in RECIPES}
            recipes["folder"] = lambda: from_scratch(RECIPES["folder"].experiment())
            base = load_config(self.config, recipes)

        from iddc.progress import Progress
        from iddc.reproduce import Settings, reproduce

        result = reproduce(
            self.table,
            Settings(
                data=self.data,
                seeds=self.seeds or (SMOKE_SEEDS if self.smoke else SEEDS),
                rows=self.rows,
                dataset=self.dataset,
                base=base,
                backbones=self.backbone,
                weights=weights,
                num_clusters=self.num_clusters,
                refine=self.refine,
                smoke=self.smoke,
            ),
            self.out,
            self.runtime,
            progress=Progress(),
        )
        # The paper's numbers beside those of the runs, and what keeps them apart.
        if self.json:
            print_json(result.as_dict())
            return result.exit_code
        print(result.target.title, *filter(None, [result.label]), sep=" · ")
        for title, header, rows in result.tables():
            print(f"\n{title}" if title else "")
            print_table(header, rows)
        print()
        for note in result.notes():
            print(f"- {note}")
        print(f"\n{result.path}")
        return result.exit_code


def _weights(word: str) -> tuple[str, str]:
    """Read NAME=FILE."""
    name, _, file = word.partition("=")
    if name not in get_args(BackboneName):
        raise unknown("backbone in --weights", name, get_args(BackboneName))
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"--weights {word}: there is no file {path}. Expected NAME=FILE.")
    return name, str(path.resolve())
