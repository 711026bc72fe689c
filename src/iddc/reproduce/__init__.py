"""The tables and figures of the paper, rerun: train, score, and put the numbers side by side.

Everything is under OUT: `runs/`, one folder for each experiment and seed, and NAME.md, NAME.json
and NAME.png for each table or figure. Whatever is there is used again: rows that are the same
experiment share a run, a finished run is not trained again, an interrupted one goes on.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from iddc import __version__
from iddc.config import Experiment, ObjectiveConfig, Runtime
from iddc.device import pick_device
from iddc.errors import ConfigError, DataError, IddcError, Interrupted
from iddc.progress import SILENT, Progress
from iddc.recipes import Figure
from iddc.reproduce import smoke
from iddc.reproduce.plan import Job, Settings, choose, is_asked, job_of, takes_classes
from iddc.reproduce.plots import CURVES, check_matplotlib, draw, draw_pictures
from iddc.reproduce.report import Outcome, Report
from iddc.reproduce.work import Runner, is_done, missing
from iddc.runs import Run, disk_errors

__all__ = ["Report", "Settings", "reproduce"]


def reproduce(
    name: str,
    settings: Settings,
    out: Path,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    progress: Progress = SILENT,
) -> Report:
    """Rerun a table or a figure.

    Rows whose data, weights or packages are not here are left out, with the reason; so are rows
    whose training fails.

    Args:
        name: A key of TABLES or FIGURES.
        settings: What to rerun, and what is other than in the paper.
        out: The folder to write.
        runtime: How this machine works.
        progress: Shows how far the work is.

    Raises:
        ConfigError: There is no such table or row, or no such backbone.
        SetupError: A figure is asked for and matplotlib is not installed, or `out` cannot be
            written.
        Interrupted: SIGINT or SIGTERM came. The same call goes on.
    """
    target = choose(name, settings)
    pictures = isinstance(target, Figure) and any(p.x == "image" for p in target.panels)
    if isinstance(target, Figure) and not pictures:
        check_matplotlib()
        if not target.panels and name not in CURVES:
            raise ConfigError("Fig. 2 is drawn by `iddc analyze IMAGES --data DIR --out DIR`.")
    if target.rows and settings.data is None and not settings.smoke:
        raise ConfigError(f"{name} needs the folder of a data set: --data DIR; or --smoke.")
    if settings.smoke:
        out = out / "smoke"
        settings = smoke.prepare(settings, settings.dataset or target.dataset, out)
        runtime = runtime.model_copy(update={"workers": 0})
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    result = Report(name, target, settings, out, _facts(runtime))
    runner = None
    if name in CURVES:
        result.curves = CURVES[name]()
    elif runner := _open(result, out / "runs", runtime, progress):
        _leave_out(result, out / "runs")
        todo = _todo(result, out / "runs")
        if progress is not SILENT:  # or nobody reads what takes some steps of training
            progress.note(_announcement(runner, todo))
        _work(result, runner, out, len(todo))
    if runner or result.curves or not result.path.exists():  # without data, keep what was found
        result.write()
    if pictures and runner:
        draw_pictures(result, runner.dataset, out / f"{name}.png")
    elif isinstance(target, Figure):
        draw(result, out / f"{name}.png")
    return result


def _facts(runtime: Runtime) -> dict[str, Any]:
    return {
        "iddc": __version__,
        "torch": torch.__version__,
        "device": str(pick_device(runtime.device)),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _open(result: Report, runs: Path, runtime: Runtime, progress: Progress) -> Runner | None:
    """Find the data, and say of each row what it needs; without data none can be run.

    Rows that are not asked for stay in the table if an earlier command has run them.
    """
    runner, reason, num_classes = None, "", Experiment().num_clusters
    assert result.settings.data is not None
    try:
        runner = Runner.open(result.dataset, result.settings.data, runtime, progress)
        num_classes = _num_classes(result, runner) or num_classes
    except DataError as error:
        reason, result.failure = str(error), error.exit_code
    for row in result.target.rows:
        job = job_of(row, result.target, result.settings, num_classes)
        outcome = Outcome(row, job, reason if job else "", kept=not is_asked(row, result.settings))
        if job and runner and outcome.kept:
            for seed, path in enumerate(_folders(result, job, runs)):
                if is_done(path) and runner.kept_score(job, Run(path)):
                    outcome.entries[seed] = runner.score(job, Run(path))
                    outcome.runs[seed] = path
        if outcome.entries or not outcome.kept:
            result.outcomes.append(outcome)
    return runner


def _num_classes(result: Report, runner: Runner) -> int | None:
    """K where the number of classes says it. No label is opened before the training.

    Raises:
        ConfigError: Nothing but the labels says it.
    """
    settings = result.settings
    if not takes_classes(result.target, settings):
        return None
    if runner.num_classes is None:
        raise ConfigError(
            f"{settings.data} has no classes.txt, and labels are not opened before the training. "
            "Give --num-clusters, or name the classes in classes.txt, one in a line."
        )
    return runner.num_classes


def _leave_out(result: Report, runs: Path) -> None:
    """Note which rows cannot be run on this machine, and why."""
    known: dict[tuple[str, str | None], str] = {}
    for outcome, job in result.runnable():
        trained = all(is_done(path) for path in _folders(result, job, runs))
        need = job.refine, None if trained else job.experiment.backbone
        if need not in known:
            known[need] = missing(*need)
        outcome.reason = known[need]


def _folders(result: Report, job: Job, runs: Path) -> list[Path]:
    return [job.folder(runs, result.name, seed) for seed in range(result.settings.seeds)]


def _todo(result: Report, runs: Path) -> dict[tuple[str, int], Job]:
    """What is to be trained, by digest and seed."""
    return {
        (job.digest, seed): job
        for _, job in result.runnable()
        for seed, path in enumerate(_folders(result, job, runs))
        if not is_done(path)
    }


def _announcement(runner: Runner, todo: dict[tuple[str, int], Job]) -> str:
    """How much there is to do, and about how long it takes."""
    costs: dict[str, float] = {}
    seconds = 0.0
    for job in todo.values():
        # What the objective is changes little.
        alike = job.experiment.model_copy(
            update={"objective": ObjectiveConfig(), "recipe": "folder"}
        )
        key = alike.model_dump_json()
        if job.row.method == "iddc":
            if key not in costs:
                costs[key] = runner.seconds(alike)
            seconds += costs[key]
    time = timedelta(seconds=round(seconds))
    return (
        f"{len(todo):,} runs to train, about {time} for those of IDDC on "
        f"{pick_device(runner.runtime.device)}, judged by a few steps; then scores on "
        f"{runner.num_scored:,} images each. Stop at any moment: the same command goes on."
    )


def _work(result: Report, runner: Runner, out: Path, total: int) -> None:
    """Train and score, all rows with the first seed, then with the next."""
    number = 0
    for seed in range(result.settings.seeds):
        for outcome, job in result.runnable():
            path = job.folder(out / "runs", result.name, seed)
            if not is_done(path):
                number += 1
                runner.progress.note(f"run {number} of {total}: {job.row.name}, seed {seed}")
            try:
                run = runner.train(job, path, seed)
                outcome.entries[seed] = runner.score(job, run)
            except Interrupted:
                raise
            except IddcError as error:
                outcome.failures[seed] = str(error)
                result.failure = result.failure or error.exit_code
                continue
            outcome.runs[seed] = path
            result.write()
