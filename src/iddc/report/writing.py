"""Look at one run or two, and write what was found as one file."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from iddc import __version__
from iddc.datasets.samples import find_samples
from iddc.images import ImageFile, fit_to_model
from iddc.masks.ids import write_file
from iddc.progress import SILENT, Progress
from iddc.report import drawings, gallery, tables
from iddc.report.look import look_at
from iddc.report.sides import Match, ReportedRun, colours_of_partners, match, open_side
from iddc.report.verdict import Verdict, judge
from iddc.runs import Run
from iddc.segmenter import Segmenter

REPORT = "report.html"
"""The file in RUN."""


@dataclass(frozen=True)
class Written:
    """Where a report is, and why it shows no image if it shows none."""

    path: Path
    why: str


def write_report(
    run: Run,
    *,
    compare: Run | None = None,
    out: Path | None = None,
    images: Path | None = None,
    samples: int = 12,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Written:
    """Write a report, one file that needs nothing else.

    Args:
        run: A finished run.
        compare: Another one, to be shown beside it on the same images.
        out: The file to write. Without it, RUN/report.html; with another run beside it,
            RUN/report-NAME.html, where NAME is the name of the other.
        images: What is looked at, if not the images of the training.
        samples: How many images are shown with their masks.
        device: See `pick_device`.
        progress: Shows how far the work is.

    Raises:
        DataError: A model, scores or the given images cannot be read.
        ConfigError, SetupError: See `pick_device`; or the report cannot be written.
    """
    runs = [run, compare] if compare else [run]
    segmenters = [Segmenter.load(each.path, device) for each in runs]
    found, why = find_samples(run, images, segmenters[0].experiment.reading)
    names = _names([each.path.resolve() for each in runs])
    sides: list[ReportedRun] = []
    matched = None
    for each, segmenter, name in zip(runs, segmenters, names, strict=True):
        reading, notes = fit_to_model(found, segmenter.experiment.reading)
        for note in notes:
            progress.note(f"note: {note}")
        segmenter.experiment = segmenter.experiment.model_copy(update={"reading": reading})
        look = look_at(segmenter, found, samples=samples, progress=progress) if found else None
        colours = segmenter.labels.cluster_colours
        if sides and look and sides[0].look:
            matched = match(sides[0].look, look)
            colours = colours_of_partners(sides[0].colours, matched.partner)
        sides.append(open_side(each, name, segmenter, look, colours))
    if found and not sides[0].look:
        why = "None of the images can be read."
    own = f"report-{compare.path.resolve().name}.html" if compare else REPORT
    path = out or run.path / own
    verdicts = [_verdict(side, len(found)) for side in sides]
    write_file(path, _page(sides, matched, why, verdicts).encode("utf-8", "surrogateescape"))
    return Written(path, why)


def judge_run(
    run: Run, images: Sequence[ImageFile], *, device: str = "auto", progress: Progress = SILENT
) -> Verdict | None:
    """Say in plain words what a finished run is worth. None if no image can be read.

    Args:
        run: The run.
        images: Those of the training.
        device: See `pick_device`.
        progress: Shows how far the work is.
    """
    segmenter = Segmenter.load(run.path, device)
    look = look_at(segmenter, images, samples=0, progress=progress)
    colours = segmenter.labels.cluster_colours
    return _verdict(open_side(run, "", segmenter, look, colours), len(images))


def _verdict(side: ReportedRun, images: int) -> Verdict | None:
    if not side.look:
        return None
    return judge(
        side.look, side.experiment, side.labels.names, images=images, agreement=side.agreement
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart; one path twice is numbered."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len({*names}) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def _page(
    sides: Sequence[ReportedRun],
    matched: Match | None,
    why: str,
    verdicts: Sequence[Verdict | None],
) -> str:
    environment = Environment(
        loader=PackageLoader("iddc.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # In prose a number keeps its sign on its line.
    environment.filters["percent"] = lambda share: tables.percent(share).replace(" ", "\N{NBSP}")
    environment.filters["code"] = _with_code
    script = files("iddc.report").joinpath("page", "script.js").read_text("utf-8")
    looks = [(side, side.look) for side in sides if side.look]
    return environment.get_template("page.html").render(
        version=__version__,
        script=Markup(script),
        digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sides=sides,
        two=len(sides) > 1,
        why=why,
        agreement=matched and matched.agreement,
        verdicts=verdicts,
        facts=[tables.facts(side) for side in sides],
        summary=tables.summary(sides),
        figures=gallery.figures(sides),
        legends=[gallery.legend(side) for side in sides],
        cards=gallery.cards(sides, matched),
        cluster_tables=[tables.cluster_table(*known) for known in looks],
        sizes=[drawings.sizes(*known) for known in looks],
        affinities=[drawings.affinities(*known) for known in looks],
        thresholds=any(side.thresholds for side in sides),
        regularised=any(side.experiment.method == "iddc" for side in sides),
        training=drawings.training(sides),
        curve_table=tables.curve_table(sides),
        scores=list(tables.scores(sides)),
        choices=tables.choices(sides),
    )


def _with_code(text: str) -> Markup:
    """Text for the page, where what stands between backquotes is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
