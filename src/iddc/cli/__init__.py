"""The command line: find the command, run it, turn what goes wrong into a sentence and a code.

Nothing here imports torch before a command does its work, so that help and every configuration
error answer at once. Results go to stdout; progress, remarks and errors to stderr.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

from iddc import __version__
from iddc.cli.analyze import Analyze
from iddc.cli.bench import Bench
from iddc.cli.check import Check
from iddc.cli.compare import Compare
from iddc.cli.evaluate import Evaluate
from iddc.cli.export import Export
from iddc.cli.help import ALL, SHORT, TEXTS, overview, short_help
from iddc.cli.importing import Import
from iddc.cli.label import Label
from iddc.cli.listings import Demo, Doctor, Models, Recipes
from iddc.cli.options import Command, parse, unknown
from iddc.cli.predict import Predict
from iddc.cli.pretrain import Pretrain
from iddc.cli.relabel import Relabel
from iddc.cli.report import Report
from iddc.cli.reproduce import Reproduce
from iddc.cli.sweep import Sweep
from iddc.cli.train import Baseline, Train
from iddc.cli.verify import Verify
from iddc.errors import ConfigError, IddcError, Interrupted, one_line

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, type[Command]] = {
    "check": Check,
    "sweep": Sweep,
    "train": Train,
    "predict": Predict,
    "relabel": Relabel,
    "evaluate": Evaluate,
    "report": Report,
    "label": Label,
    "baseline": Baseline,
    "pretrain": Pretrain,
    "analyze": Analyze,
    "export": Export,
    "import": Import,
    "compare": Compare,
    "reproduce": Reproduce,
    "recipes": Recipes,
    "models": Models,
    "doctor": Doctor,
    "verify": Verify,
    "bench": Bench,
    "demo": Demo,
}
TOGETHER = ("train", "baseline", "pretrain")
"""What the processes of torchrun do together. Of all else each would do the whole."""
_SHOWN = 60
"""How many characters of a path that is too long an error repeats."""
_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
)
"""What PyTorch, Python's threads and the loader of libraries say where memory is short."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; nothing is raised.

    Args:
        argv: The words after `iddc`; those of the process if not given.

    Returns:
        0 for success, else the code of the error (`errors.py`), or 1 for a bug.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = _chosen(args)
        return chosen if isinstance(chosen, int) else chosen()
    except SystemExit as stop:  # tyro has printed help or what is wrong with an option
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the program that reads the output, such as `head`, has gone
        return 141
    except (Exception, KeyboardInterrupt) as error:
        code, sentence = _in_words(error)
        if {"-v", "--verbose"} & {*args}:
            traceback.print_exc()
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        print(f"{'' if stopped else 'error: '}{one_line(sentence)}", file=sys.stderr)
        return code


def _chosen(args: list[str]) -> Command | int:
    """The command with its options; or the exit code, where a help text was all to be done."""
    match args:
        case ["help", name, *_] if name in COMMANDS:
            return _chosen([name, "--help"])
        case ["-h" | "--help" | "help", *_]:
            print(overview(_summaries()))
        case ["--version", *_]:
            print(f"iddc {__version__}")
        case [name, *rest] if name in TEXTS and SHORT & {*rest}:
            print(short_help(name, _summaries()[name]))
        case [name, *rest] if name in COMMANDS:
            rest = ["--help" if word in ALL else word for word in rest]
            command = parse(COMMANDS[name], name, rest)
            _check_alone(name)
            return command
        case [name, *_] if name.startswith("-"):
            raise unknown("option", name, ("--help", "--version"))
        case [name, *_]:
            raise unknown("command", name, COMMANDS)
        case _:
            print(overview(_summaries()), file=sys.stderr)
            return 2
    return 0


def _check_alone(name: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if name not in TOGETHER and processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            f"iddc {name} works in one process, and torchrun has started {processes}. Give the "
            "command without torchrun."
        )


def _summaries() -> dict[str, str]:
    """The first line of what each command says of itself."""
    return {name: (each.__doc__ or "").splitlines()[0] for name, each in COMMANDS.items()}


def _in_words(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence of an error."""
    match error:
        case IddcError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return 130, "Interrupted."
        case PermissionError():
            return 4, f"No permission: {error.filename}."
        case OSError(errno=errno.ENAMETOOLONG):
            path = os.fsdecode(error.filename or "")
            return 2, (
                f"A path is longer than this system allows, {len(path):,} characters: "
                f"{path[:_SHOWN]}... Give a shorter one."
            )
        case RuntimeError() if "Symlink loop" in str(error):  # of pathlib, before Python 3.13
            return 2, f"A link of the path leads back to itself: {error}. Give another path."
    kind = type(error).__name__
    if kind == "OutOfMemoryError":  # of torch, which is not imported here
        return 4, "The GPU has not enough free memory. Free it, or give --device cpu."
    if isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY):
        return 4, (
            "This machine, or your limit of memory (ulimit -v), has not enough of it. Free some, "
            "raise the limit, or give smaller images or batches."
        )
    if isinstance(error, OSError) and error.errno:
        where = f": {os.fsdecode(error.filename)}" if error.filename else ""
        return 4, f"The system refused ({(error.strerror or str(error)).lower()}){where}."
    return 1, f"This is a bug in iddc ({kind}: {error}). Please report it with the output of -v."
