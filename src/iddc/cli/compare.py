"""The command that puts methods side by side: compare."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from iddc.cli.options import (
    ConfigFile,
    Flat,
    ReadsPhotos,
    find_readable,
    ready,
    refuse_inside,
    say,
)
from iddc.cli.printing import print_json, print_table
from iddc.config import Experiment, MethodName, ProtocolName, Runtime
from iddc.errors import ConfigError

METHODS: tuple[MethodName, ...] = ("kmeans", "iddc", "stego", "hp")
"""What is compared if nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Compare(ReadsPhotos):
    """Train several methods on the same images, score them alike, and write one table.

    All have the same backbone, number of clusters, working size and seeds. Runs are in DIR/runs,
    tables in DIR/comparison.md, .csv, .tex and .json, images side by side in DIR/comparison.html.
    With finished runs in place of IMAGES, nothing is trained and these runs are scored. Give an
    interrupted command again to resume it. Labels are opened after the last training, and only for
    scoring. The exit code is 5 if a method failed; the table says why, and the others finish.
    """

    paths: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="IMAGES|RUN",
            help="A folder with subfolders, a zip, tar or Parquet file, a text file of paths, or "
            "one image; or the folders of finished runs.",
            help_behavior_hint="(required)",
        ),
    ]
    data: Annotated[Path, arg(metavar="DIR")]
    """The labelled images to score on, as for `iddc evaluate`."""
    split: str = "val"
    """The part of them."""
    methods: tuple[MethodName, ...] = METHODS
    """The methods; the differences in the table are to the first one."""
    seeds: Annotated[int, arg(metavar="N")] = 5
    """Runs of each method, from --seed on."""
    budget: Annotated[float, arg(metavar="MINUTES", help_behavior_hint="(default: one run)")] = 0.0
    """Minutes that each method has for each seed. Further runs start as long as one more fits, and
    the run with the lowest loss counts."""
    protocol: ProtocolName = "full"
    """How images are resized, seen and scored."""
    out: Annotated[Path, arg(metavar="DIR")]
    """The folder to write."""
    config: ConfigFile = None
    json: bool = False
    """Print the content of DIR/comparison.json instead of the table."""
    experiment: Annotated[Experiment, Flat]
    runtime: Annotated[Runtime, Flat]
    choices: ClassVar[frozenset[str]] = frozenset(
        {"recipe", "num_clusters", "backbone", "seed", "views", "reading"}
        | {"device", "workers", "micro_batch_size", "max_unreadable"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ConfigError(f"--seeds: expected at least 1, found {self.seeds}.")
        if self.budget < 0:
            raise ConfigError(f"--budget: expected minutes of 0 or more, found {self.budget:g}.")
        usual = {field.name: field.default for field in fields(self)}
        given = [
            name for name in ("methods", "seeds", "budget") if getattr(self, name) != usual[name]
        ]
        if self._scores_runs and given:
            raise ConfigError(
                f"--{given[0]}: finished runs are scored as they are, and nothing is trained. "
                "Leave it out."
            )
        if not self.paths:
            raise ConfigError("Expected IMAGES or the folders of finished runs, found nothing.")
        if len(self.paths) > 1 and (others := [path for path in self.paths if not _is_run(path)]):
            raise ConfigError(
                f"{others[0]} is no run. Give one folder of images, or the folders of finished "
                "runs alone."
            )

    @property
    def _scores_runs(self) -> bool:
        return bool(self.paths) and all(map(_is_run, self.paths))

    def __call__(self) -> int:
        """Compare."""
        from iddc.backbones import load_backbone
        from iddc.comparison import LEGEND, Labelled, compare, compare_runs, stamp_of
        from iddc.datasets import open_dataset
        from iddc.evaluation import PROTOCOLS
        from iddc.images import address_of
        from iddc.progress import Progress

        for path in self.paths:
            refuse_inside(self.out, path)
        labelled = Labelled(
            open_dataset("folder", self.data, self.split),
            f"{self.data.resolve().name} {self.split}",
            f"{self.data.resolve()} {self.split} {stamp_of(self.data, self.split, self.out)}",
            PROTOCOLS[self.protocol],
        )
        # Runs that exist are scored; of images, every method is trained first.
        if self._scores_runs:
            found = compare_runs(self.paths, labelled, self.out, self.runtime, progress=Progress())
        else:
            (folder,) = self.paths
            images = find_readable(
                folder,
                self.limit,
                self.runtime,
                include_masks=self.include_masks,
                reading=self.experiment.reading,
            )
            experiment = self.experiment.model_copy(update={"reading": images.reading})
            experiment = ready(experiment, self.runtime)
            load_backbone(experiment.backbone)  # one that is missing would fail every method
            found = compare(
                images.files,
                experiment,
                self.methods,
                self.seeds,
                labelled,
                self.out,
                self.runtime,
                source=address_of(folder) or str(folder.resolve()),
                budget=self.budget,
                progress=Progress(),
            )
        # One method that failed leaves the others' rows, and its reason.
        if self.json:
            print_json(found.as_dict())
            return found.exit_code
        print_table(*found.table())
        print(f"\n{LEGEND}")
        for name, reason in found.failures.items():
            print(f"{name} failed: {reason}")
        say(f"\n{self.out / 'comparison.html'}")
        return found.exit_code


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()
