"""What can go wrong, as a tree, with the exit code of each branch.

    IddcError
    ├── ConfigError          2   an option, a recipe or a configuration file is wrong
    ├── DataError            3   an image, a label, a data set or a run folder is wrong
    │   └── UnreadableImage  3   one image file; a run skips it and lists it in skipped.csv
    ├── SetupError           4   this machine lacks something: weights, an extra, space, a right
    ├── NumericError         5   numbers are not finite, or an exported model disagrees
    └── Interrupted    130 / 143   stopped by Ctrl-C or SIGTERM (129: the terminal was closed); the
                                   state on disk can be resumed

A message says what is wrong, what was expected, what was found and what to do. The command line
prints it as one line and returns the exit code; a traceback appears only with `-v`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class IddcError(Exception):
    """Any foreseen failure. Its text is meant for the user."""

    exit_code = 1


class ConfigError(IddcError):
    """An option, a recipe name or a configuration file is wrong."""

    exit_code = 2


class DataError(IddcError):
    """An image, a label, a data set or a run folder is not what it should be."""

    exit_code = 3


class UnreadableImage(DataError):
    """One image file cannot be decoded. Callers may skip it, and name the reason.

    Attributes:
        file: The file, or its path.
        reason: What is wrong with it, in plain words.
    """

    def __init__(self, file: object, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason


class SetupError(IddcError):
    """The machine lacks something: weights, an optional package, disk space, a permission."""

    exit_code = 4


class NumericError(IddcError):
    """A loss or a gradient is not finite, or an exported model computes something else."""

    exit_code = 5


class Interrupted(IddcError):
    """Stopped by a signal after the state was saved; running the same command again resumes."""

    def __init__(self, message: str, *, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@contextmanager
def needs_extra(extra: str, what: str, otherwise: str = "") -> Iterator[None]:
    """Turn the lack of an optional package into a sentence that says how to install it.

    Args:
        extra: The extra of iddc that brings it.
        what: What needs which package, as the beginning of the sentence.
        otherwise: What else can be done, as its end.

    Raises:
        SetupError: An import inside fails.
    """
    try:
        yield
    except ImportError as error:
        raise SetupError(
            f"{what}, which is not installed. Install it with `pip install 'iddc[{extra}]'`"
            f"{otherwise}."
        ) from error


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 image, 2 images."""
    return f"{number:,} {noun}{'s'[: number != 1]}"


def one_line(text: str) -> str:
    """Show as they are written what a terminal would obey: names of files may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def too_few(found: int, noun: str, num_clusters: int) -> DataError:
    """The error where images hold fewer distinct things than there should be clusters."""
    return DataError(
        f"Found {counted(found, noun)} in these images, expected at least {num_clusters}, one for "
        f"each cluster. Ask for {max(2, found)} clusters or fewer, or give more varied images."
    )
