"""The command that names clusters: label."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from iddc.cli.inform import Informing, print_json, print_table
from iddc.cli.options import RunPath
from iddc.errors import ConfigError, DataError
from iddc.runs import Run

if TYPE_CHECKING:
    from iddc.masks import Labels

MAX_CLUSTERS = 65535


@dataclass(frozen=True, kw_only=True)
class Label(Informing):
    """Name clusters, merge them, ignore them. Predict uses the names; nothing is trained again.

    The names are in RUN/labels.json. Without an option they are listed.
    """

    run: RunPath
    names: Annotated[tuple[str, ...], arg(name="set", metavar="CLUSTER=NAME")] = ()
    """3=sky 7=sky makes one class of two clusters; 12=ignore takes one out of every mask; 3= gives
    a cluster its number back."""
    colours: Annotated[tuple[str, ...], arg(name="colour", metavar="CLUSTER=#RRGGBB")] = ()
    """The colour of a cluster's class; 3= gives it ours."""
    undo: bool = False
    """Take the last change back."""

    def __call__(self) -> int:
        """List, edit or undo."""
        names = _by_cluster("--set", self.names, "3=sky")
        colours = _by_cluster("--colour", self.colours, "3=#87ceeb")
        if self.undo and (names or colours):
            raise ConfigError(
                "--undo takes a change back and goes with no other. Give one of them."
            )
        run = Run.open(self.run).path
        num_clusters = _num_clusters(run / "model.json")

        from iddc.masks import LABELS, edit_labels, read_labels

        if self.undo:
            labels = edit_labels(run, num_clusters, lambda labels: labels.undo())
        elif names or colours:
            labels = edit_labels(run, num_clusters, lambda labels: labels.edit(names, colours))
        else:
            labels = read_labels(run, num_clusters)
        if self.json:
            print_json(labels.model_dump(mode="json", exclude={"history"}))
            return 0
        if not (self.undo or names or colours):
            _print_list(labels)
            print()
        classes = labels.classes
        ignored = int((classes.of_cluster >= len(classes.names)).sum())
        left_out = f", {ignored:,} ignored" if ignored else ""
        print(
            f"{run / LABELS}: {len(classes.names):,} classes of {num_clusters:,} clusters{left_out}"
            f"    next: iddc predict {run} IMAGES --out DIR"
        )
        return 0


def _by_cluster(option: str, words: Sequence[str], example: str) -> dict[int, str]:
    """Read CLUSTER=TEXT words."""
    result: dict[int, str] = {}
    for word in words:
        cluster, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[0-9]{1,5}", cluster):
            raise ConfigError(f"{option}: expected words such as {example}, found {word!r}.")
        if int(cluster) in result:
            raise ConfigError(f"{option}: cluster {int(cluster)} is given twice. Give it once.")
        result[int(cluster)] = text
    return result


def _num_clusters(model: Path) -> int:
    """Read K from model.json, without building the network."""
    try:
        num_clusters = json.loads(model.read_text("utf-8"))["network"]["num_clusters"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        num_clusters = None
    if not isinstance(num_clusters, int) or not 0 < num_clusters <= MAX_CLUSTERS:
        raise DataError(f"{model} does not say how many clusters there are. Copy it again.")
    return num_clusters


def _print_list(labels: Labels) -> None:
    rows = [
        (str(cluster), name, f"#{bytes(colour).hex()}")
        for (cluster, name), colour in zip(
            enumerate(labels.names), labels.cluster_colours.tolist(), strict=True
        )
    ]
    print_table(("cluster", "name", "colour"), rows)
