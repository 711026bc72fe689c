"""The command that names clusters: label."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from iddc.cli.options import Informing, RunPath, fitted
from iddc.cli.printing import print_json, print_table
from iddc.errors import ConfigError, DataError, needs_extra
from iddc.runs import Run

if TYPE_CHECKING:
    from iddc.labelling.samples import Sample
    from iddc.masks import Labels

MAX_CLUSTERS = 65535
_DISPLAYS = {"DISPLAY", "WAYLAND_DISPLAY"}
"""Where none of them is set, Linux has no screen, and a browser would take the terminal."""


def _page(metavar: str, default: str) -> Any:
    """An option of the page."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Label(Informing):
    """Name clusters, merge them, ignore them. Predict uses the names; nothing is trained again.

    The names are in RUN/labels.json. Without an option, a page opens where you edit them beside
    sample images (extra `label`). It is served to this machine only, until Done or Ctrl-C.
    """

    run: RunPath
    names: Annotated[
        tuple[str, ...],
        arg(name="set", metavar="CLUSTER=NAME", help_behavior_hint="(default: none)"),
    ] = ()
    """3=sky 7=sky makes two clusters one class; 12=ignore removes a cluster from every mask; 3=
    restores its number."""
    colours: Annotated[
        tuple[str, ...],
        arg(name="colour", metavar="CLUSTER=#RRGGBB", help_behavior_hint="(default: none)"),
    ] = ()
    """Set a colour, such as 3=#87ceeb. 3= restores the default colour."""
    undo: bool = False
    """Undo the last change."""
    listed: Annotated[bool, arg(name="list")] = False
    """Print the names."""
    images: Annotated[Path | None, _page("IMAGES", "those of the run, if still there")] = None
    """What the page takes its samples from: a folder, a zip, a text file of paths, or an image."""
    port: Annotated[int, _page("N", "a free one")] = 0
    """The port of the page, on 127.0.0.1."""
    no_open: bool = False
    """Print the URL instead of opening a browser. On shared machines, other users can see a
    browser's command line, and the URL contains the access token."""

    def __call__(self) -> int:
        """List, edit or undo."""
        # Options that do not go together.
        names = _by_cluster("--set", self.names, "3=sky")
        colours = _by_cluster("--colour", self.colours, "3=#87ceeb")
        if self.undo and (names or colours):
            raise ConfigError("--undo goes with no other change. Give one of them.")
        with_page = not (self.undo or names or colours or self.listed or self.json)
        if not with_page and (self.images or self.port or self.no_open):
            raise ConfigError(
                "--images, --port and --no-open are for the page, which --set, --colour, --undo, "
                "--list and --json do without. Leave one or the other out."
            )
        opened = Run.open(self.run)
        run = opened.path
        num_clusters = read_num_clusters(run / "model.json")

        from iddc.masks import LABELS, edit_labels, read_labels

        if with_page:
            read_labels(run, num_clusters)  # damage is said here, not on the page
            self._serve(opened, num_clusters)
        # The change, and what there is after it.
        if self.undo:
            labels = edit_labels(run, num_clusters, lambda labels: labels.undo())
        elif names or colours:
            labels = edit_labels(run, num_clusters, lambda labels: labels.edit(names, colours))
        else:
            labels = read_labels(run, num_clusters)
        if self.json:
            print_json(labels.model_dump(mode="json", exclude={"history"}))
            return 0
        if self.listed and not (self.undo or names or colours):
            _print_list(labels)
            print()
        classes = labels.classes
        ignored = int((classes.of_cluster >= len(classes.names)).sum())
        left_out = f", {ignored:,} ignored" if ignored else ""
        print(
            f"{run / LABELS}: {len(classes.names):,} classes of {num_clusters:,} clusters{left_out}"
            f"    next: iddc predict {quote(str(run))} IMAGES --out DIR"
        )
        return 0

    def _serve(self, run: Run, num_clusters: int) -> None:
        """Open the page, and answer it until Ctrl-C."""
        what = "The page needs FastAPI with uvicorn"
        with needs_extra("label", what, ", or name clusters with --set"):
            from iddc.labelling.server import HOST, listen, make_app, make_server
        token = secrets.token_urlsafe(32)
        with listen(self.port) as listening:
            dozens = _samples(run, self.images)
            first = next(dozens, ())
            more = (lambda: next(dozens, ())) if first else None
            app = make_app(run.path, num_clusters, first, token, more)
            address = f"http://{HOST}:{listening.getsockname()[1]}/{token}/"
            print(f"{address}    Ctrl-C ends it", flush=True)
            if not self.no_open and (sys.platform == "darwin" or _DISPLAYS & os.environ.keys()):
                webbrowser.open(address)
            with suppress(KeyboardInterrupt):
                make_server(app).run(sockets=[listening])
        print()


def _samples(run: Run, images: Path | None) -> Iterator[Sequence[Sample]]:
    """Dozens of the images that were given, or of the run's, as its model sees them."""
    from iddc.datasets.samples import find_samples
    from iddc.labelling.samples import predict_samples, spread
    from iddc.progress import Progress
    from iddc.segmenter import Segmenter

    segmenter = Segmenter.load(run.path)
    files, reason = find_samples(run, images, segmenter.experiment.reading)
    if reason:
        print(f"note: {reason} Give others with --images.", file=sys.stderr)
    if files:
        reading = fitted(files, segmenter.experiment.reading)
        for chosen in spread(len(files)):
            own = [files[number] for number in chosen]
            yield predict_samples(segmenter.predict, own, Progress(), reading)


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


def read_num_clusters(model: Path) -> int:
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
