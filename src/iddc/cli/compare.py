"""The command that puts methods side by side: compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from iddc.cli.options import (
    ConfigFile,
    Flat,
    ImagesPath,
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
    tables in DIR/comparison.md, .csv, .tex and .json. An interrupted command goes on when it is
    given again. Labels are opened after the last training, to score alone. The exit code is 5 if a
    method failed; its reason stands in the table, and the others are done.
    """

    images: ImagesPath
    data: Annotated[Path, arg(metavar="DIR")]
    """The labelled images to score on, as for `iddc evaluate`."""
    split: str = "val"
    """The part of them."""
    methods: tuple[MethodName, ...] = METHODS
    """The methods; the differences in the table are to the first one."""
    seeds: Annotated[int, arg(metavar="N")] = 5
    """Runs of each method, from --seed on."""
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

    def __call__(self) -> int:
        """Compare."""
        refuse_inside(self.out, self.images)
        images = find_readable(
            self.images,
            self.limit,
            self.runtime,
            include_masks=self.include_masks,
            reading=self.experiment.reading,
        )
        from iddc.backbones import load_backbone
        from iddc.comparison import LEGEND, compare
        from iddc.datasets import open_dataset
        from iddc.evaluation import PROTOCOLS
        from iddc.images import address_of
        from iddc.progress import Progress

        dataset = open_dataset("folder", self.data, self.split)
        experiment = self.experiment.model_copy(update={"reading": images.reading})
        experiment = ready(experiment, self.runtime)
        load_backbone(experiment.backbone)  # one that is missing would fail every method
        found = compare(
            images.files,
            experiment,
            self.methods,
            self.seeds,
            dataset,
            PROTOCOLS[self.protocol],
            self.out,
            self.runtime,
            source=address_of(self.images) or str(self.images.resolve()),
            progress=Progress(),
        )
        if self.json:
            print_json(found.as_dict())
            return found.exit_code
        print_table(*found.table())
        print(f"\n{LEGEND}")
        for name, reason in found.failures.items():
            print(f"{name} failed: {reason}")
        say(f"\n{self.out / 'comparison.md'}")
        return found.exit_code
