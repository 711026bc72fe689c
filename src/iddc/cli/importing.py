"""The command that takes over what other authors released: import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from iddc.cli.options import Command, Flat, NewRun, say
from iddc.config import Experiment
from iddc.errors import ConfigError
from iddc.runs import Run


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Turn a checkpoint that other authors released into a run, to evaluate and predict with.

    FILE is a PyTorch or safetensors file of IDDC's authors, or of STEGO, HP, SmooSeg, PriMaPs or
    CAUSE-MLP (two files: its segmenter and its clusters). Nothing in it is executed, so it must
    hold tensors alone, and it is refused whole if one tensor has no place in the network.
    """

    files: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="FILE", help_behavior_hint="(required)")
    ]
    """The checkpoint."""
    out: NewRun
    overwrite: bool = False
    """Replace an earlier run in RUN."""
    experiment: Annotated[Experiment, Flat]
    choices: ClassVar[frozenset[str]] = frozenset({"recipe", "num_clusters", "backbone"})

    def __call__(self) -> int:
        """Import."""
        if not self.files:
            raise ConfigError("Give the checkpoint: iddc import FILE --out RUN.")
        from iddc.importing import import_checkpoint

        found = import_checkpoint(self.files, self.experiment)
        experiment = found.segmenter.experiment
        source = "imported from " + ", ".join(str(file) for file in self.files)
        with Run.start(self.out, experiment, source=source, overwrite=self.overwrite) as run:
            run.log(imported=found.layout, unused=list(found.unused))
            found.segmenter.save(run.path)
            run.finish()
        left_out = f"{len(found.unused)} tensors that prediction does not need are left out"
        say(
            f"a checkpoint of {found.layout}",
            experiment.backbone,
            f"{experiment.num_clusters} clusters",
            *([left_out] if found.unused else []),
        )
        say(f"{self.out / 'model.safetensors'}    next: iddc evaluate {self.out} --data DIR")
        return 0
