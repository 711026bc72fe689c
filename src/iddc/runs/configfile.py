"""Configuration files: read one with suspicion, say what is wrong in a sentence, compare two."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from iddc import __version__, config
from iddc.config import Experiment
from iddc.errors import ConfigError, DataError, IddcError
from iddc.runs.files import read_text

FORMAT_VERSION = 1
"""The format of all our files. It rises when an older iddc would misread a newer file."""
WRITTEN: dict[str, Any] = {"format_version": FORMAT_VERSION, "iddc": __version__}
"""What each of our files says of itself."""

_MAX_BYTES = 100_000
_ABOUT_THE_RUN = frozenset({*WRITTEN, "images"})
"""What `RUN/config.yaml` holds beside the fields of the experiment."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def load_config(
    path: Path, recipes: Mapping[str, Callable[[], Experiment]] = MappingProxyType({})
) -> Experiment:
    """Read an experiment from `RUN/config.yaml` or from a file written by hand.

    A field that the file leaves out has the value of the recipe that the file names, or else its
    default. A run left none out that it knew: newer ones have their default, as in that run.

    Raises:
        ConfigError: The file cannot be read, comes from a newer iddc, or holds a wrong value.
    """
    record = read_record(path)
    fields = {key: value for key, value in record.items() if key not in _ABOUT_THE_RUN}
    recipe = fields.get("recipe")
    known = isinstance(recipe, str) and recipe in recipes and not WRITTEN.keys() <= record.keys()
    base = recipes[str(recipe)]() if known else Experiment()
    return changed(base, fields, path)


def _for_iddc(fields: Mapping[Any, Any]) -> bool:
    """Whether fields are of IDDC and not of the consensus."""
    training = fields.get("training")
    beyond = isinstance(training, dict) and training.keys() - {"precision"}
    return bool({"objective", "epochs", "head"} & fields.keys() or beyond)


def changed(
    base: Experiment, fields: Mapping[Any, Any], source: object, *, python: bool = False
) -> Experiment:
    """An experiment with other values of some fields; of a group, the given fields alone change.

    Where fields say how IDDC trains and name no method, as before the default was the consensus,
    the method is IDDC.

    Args:
        base: Where all other values come from.
        fields: Names and values, as in a configuration file.
        source: Who gives them, for the error.
        python: Whether the error spells names as Python does.

    Raises:
        ConfigError: There is no such field, or a value is wrong.
    """
    if base.method == "consensus" and "method" not in fields and _for_iddc(fields):
        base = base.model_copy(update={"method": "iddc", "options": {}})
    try:
        return Experiment.model_validate(_merged(base.model_dump(), fields))
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, python=python)}") from None


def read_record(path: Path) -> dict[Any, Any]:
    """Read a YAML mapping of a format we know.

    Raises:
        ConfigError: The file is missing, no YAML mapping, or from a newer iddc.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; expected a file such as {path}/config.yaml.")
        if not path.is_file():
            raise ConfigError(f"No configuration file {path}.")
        text = read_text(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8 text.") from error
    from iddc.runs.plain_yaml import parse  # a tenth of the time of --help, which needs no YAML

    try:
        record = parse(text)
    except Exception as error:  # odd values make PyYAML raise almost anything
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{path} is not a plain YAML file{line}.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: expected `name: value` lines, found {_SHORT.repr(record)}.")
    refuse_newer(record, path, ConfigError)
    return record


def refuse_newer(record: Mapping[Any, Any], path: Path, error: type[IddcError] = DataError) -> None:
    """Refuse a file that a newer iddc wrote, and name the version that reads it.

    Args:
        record: Its content. Without format_version it has the first format.
        path: Its name.
        error: What is raised.

    Raises:
        IddcError: The format is newer than ours, or no number.
    """
    version = record.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version < 1:
        raise error(f"{path}: format_version must be a number, found {_SHORT.repr(version)}.")
    if version > FORMAT_VERSION:
        writer = re.fullmatch(r"\d[\w.+]{0,30}", str(record.get("iddc")))
        newer = f"iddc {writer[0]} or newer" if writer else "a newer iddc"
        raise error(
            f"{path} has format {version}, and this iddc {__version__} reads formats up to "
            f"{FORMAT_VERSION}. Install {newer}."
        )


def _merged(base: dict[str, Any], given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Replace the values of `base` by the given ones, group by group."""
    result: dict[Any, Any] = dict(base)
    for key, value in given.items():
        group = result.get(key)
        groups = isinstance(group, dict) and isinstance(value, dict)
        result[key] = _merged(group or {}, value) if groups else value
    return result


def explain(error: ValidationError, *, python: bool = False) -> str:
    """Say in one sentence what pydantic found wrong: the field, what it expects, what it found.

    Args:
        error: What pydantic says.
        python: Whether names are spelt as Python does, instead of as options.
    """
    spell = field if python else option
    problems = error.errors(include_url=False)
    problem = problems[0]
    name = spell(problem["loc"])
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if problem["type"] == "extra_forbidden":
        sentence = f"unknown option {name}"
        near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(error.title, problem), 1)
        if near:
            sentence += f"; perhaps you meant {spell((*problem['loc'][:-1], near[0]))}"
    elif problem["type"] == "value_error":
        sentence = f"{name}: {text}" if name else text
    else:
        sentence = f"{name}: {text[0].lower() + text[1:]}, found {_SHORT.repr(problem['input'])}"
    more = len(problems) - 1
    return f"{sentence}{f' (and {more} more)' if more else ''}."


def option(path: tuple[int | str, ...]) -> str:
    """Write a field as the command line spells it: objective.negative-weight."""
    return field(path).replace("_", "-")


def field(path: tuple[int | str, ...]) -> str:
    """Write a field as Python and a configuration file spell it: objective.negative_weight."""
    return ".".join(str(part)[:60] for part in path)


def in_python(text: str) -> str:
    """Name keywords of Python where a text names options: `training.learning_rate`.

    The numbers of a method are `options` there, a run is never overwritten, and there is no file of
    --config. Whole commands in backquotes stay as they are.
    """

    def keyword(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        name, *part = match[1].replace("-", "_").split(".")
        if name == "overwrite":
            return "another `out`"
        if name in config.ReadingConfig.model_fields:
            return f"reading.{name}"
        group = name if name in Experiment.model_fields else "options"
        return ".".join([group, *part]) if part else name

    text = text.replace(" in a --config", "")
    return re.sub(r"`[^`]*`|--([a-z][a-z0-9-]*(?:\.[a-z0-9-]+)?)", keyword, text)


@contextmanager
def spelt_in_python() -> Iterator[None]:
    """Let the errors that leave it name keywords of Python instead of options."""
    try:
        yield
    except IddcError as error:
        error.args = (in_python(str(error)),)
        raise


def _fields(title: str, problem: Any) -> list[str]:
    """The names that the model at the path of a problem knows."""
    model: Any = getattr(config, title, None)
    for part in problem["loc"][:-1]:
        model = model.model_fields[part].annotation if model else None
    return list(model.model_fields) if model and issubclass(model, BaseModel) else []


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """List the options that differ: `objective.negative-weight: 1.4 in the run, 2.0 asked`."""
    old, new = dict(_flat(kept)), dict(_flat(asked))
    return [
        f"{name}: {old.get(name)} in the run, {new.get(name)} asked"
        for name in old | new
        if old.get(name) != new.get(name)
    ]


def _flat(record: Mapping[str, Any], *path: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, *path, key)
        else:
            yield option((*path, key)), value
