"""Configuration files: read one with suspicion, say what is wrong in a sentence, compare two."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from iddc import config
from iddc.config import Experiment
from iddc.errors import ConfigError

FORMAT_VERSION = 1
"""The format of a RUN folder. It rises when an older iddc would misread a newer folder."""

_MAX_BYTES = 1_000_000
_ABOUT_THE_RUN = frozenset({"format_version", "iddc", "images"})
"""What `RUN/config.yaml` holds beside the fields of the experiment."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def load_config(
    path: Path, recipes: Mapping[str, Callable[[], Experiment]] = MappingProxyType({})
) -> Experiment:
    """Read an experiment from `RUN/config.yaml` or from a file written by hand.

    A field that the file leaves out has the value of the recipe that the file names, or else its
    default.

    Raises:
        ConfigError: The file cannot be read, comes from a newer iddc, or holds a wrong value.
    """
    record = read_record(path)
    fields = {key: value for key, value in record.items() if key not in _ABOUT_THE_RUN}
    recipe = fields.get("recipe")
    known = isinstance(recipe, str) and recipe in recipes
    base = recipes[str(recipe)]() if known else Experiment()
    try:
        return Experiment.model_validate(_merged(base.model_dump(), fields))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None


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
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is too large for a configuration file.")
        record = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(f"{path} is not a plain YAML file{line}.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: expected `name: value` lines, found {_SHORT.repr(record)}.")
    version = record.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version < 1:
        raise ConfigError(f"{path}: format_version must be a number, found {_SHORT.repr(version)}.")
    if version > FORMAT_VERSION:
        newer = re.fullmatch(r"\d[\w.+]{0,30}", str(record.get("iddc")))
        raise ConfigError(
            f"{path} has format {version}, and this iddc reads formats up to {FORMAT_VERSION}. "
            f"Install {f'iddc {newer[0]}' if newer else 'a newer iddc'}."
        )
    return record


def _merged(base: dict[str, Any], given: dict[Any, Any]) -> dict[Any, Any]:
    """Replace the values of `base` by the given ones, group by group."""
    result: dict[Any, Any] = dict(base)
    for key, value in given.items():
        group = result.get(key)
        groups = isinstance(group, dict) and isinstance(value, dict)
        result[key] = _merged(group or {}, value) if groups else value
    return result


def explain(error: ValidationError) -> str:
    """Say in one sentence what pydantic found wrong: the field, what it expects, what it found."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    name = option(problem["loc"])
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if problem["type"] == "extra_forbidden":
        sentence = f"unknown option {name}"
        near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(error.title, problem), 1)
        if near:
            sentence += f"; perhaps you meant {option((*problem['loc'][:-1], near[0]))}"
    elif problem["type"] == "value_error":
        sentence = f"{name}: {text}" if name else text
    else:
        sentence = f"{name}: {text[0].lower() + text[1:]}, found {_SHORT.repr(problem['input'])}"
    more = len(problems) - 1
    return f"{sentence}{f' (and {more} more)' if more else ''}."


def option(place: tuple[int | str, ...]) -> str:
    """Write a field as the command line spells it: objective.negative-weight."""
    return ".".join(str(part).replace("_", "-") for part in place)


def _fields(title: str, problem: Any) -> list[str]:
    """The names that the model at the place of a problem knows."""
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


def _flat(record: Mapping[str, Any], *place: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, *place, key)
        else:
            yield option((*place, key)), value
