"""The common room of the commands: their options, and what several of them do first. No torch here.

tyro builds the options from the fields. The configuration models are built by our own rule, so
that a wrong value becomes one sentence, and so that the recipe or the file that the user names
gives the defaults: recipe < --config < flags.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from inspect import getsource
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_type_hints

import tyro
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional, arg
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from iddc.cluster import Helpers
from iddc.config import (
    CONSENSUS_USES,
    ConsensusConfig,
    DatasetName,
    Experiment,
    Frozen,
    MethodName,
    NoData,
    ObjectiveConfig,
    Pages,
    ReadingConfig,
    Runtime,
    TrainingConfig,
    ValueRange,
)
from iddc.errors import ConfigError
from iddc.methods import METHODS, completed, find_method
from iddc.recipes import RECIPES
from iddc.runs import explain, load_config

if TYPE_CHECKING:
    from iddc.images import Collected, ImageFile

ImagesPath = Annotated[
    Positional[Path],
    arg(
        metavar="IMAGES",
        help="A folder with subfolders, a zip, tar or Parquet file, a text file of paths, or one "
        "image.",
    ),
]
RunPath = Annotated[
    Positional[Path], arg(metavar="RUN", help="The folder of a finished run, which has its model.")
]
TrainedOn = Annotated[
    DatasetName,
    arg(help="What IMAGES is: any images, or a data set as downloaded, whose train split is read."),
]
NewRun = Annotated[Path, arg(metavar="RUN", help="The folder of the run to write.")]
ConfigFile = Annotated[
    Path | None,
    arg(
        metavar="FILE",
        help="Take every number from this file, such as RUN/config.yaml, instead of a recipe.",
        help_behavior_hint="(default: none)",
    ),
]
RayAddress = Annotated[
    tuple[()] | tuple[str] | None,
    arg(metavar="[ADDRESS]", help_behavior_hint="(default: this process)"),
]
READING = ("range", "bands", "pages", "nodata")
"""The fields of ReadingConfig that are options; the others are found."""
Flat = arg(name="")
"""The fields become options without a prefix: --num-clusters, --objective.penalty."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    verbose: Annotated[bool, arg(aliases=["-v"])] = False
    """Show the traceback of an error."""
    choices: ClassVar[frozenset[str]] = frozenset(Experiment.model_fields | Runtime.model_fields)
    """The fields of Experiment and Runtime that are options; the command ignores the others."""

    def __call__(self) -> int:
        """Do the work and return the exit code."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Limited(Command):
    """What the commands have that read images."""

    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Use the first N images only."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected at least 1 image, found {self.limit}.")


@dataclass(frozen=True, kw_only=True)
class ReadsPhotos(Limited):
    """What the commands have that read a folder or a zip of photos."""

    include_masks: bool = False
    """Read masks and labels among IMAGES like photos; otherwise they are left out, and listed."""


def _own(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: the model's own)")


@dataclass(frozen=True, kw_only=True)
class ReadsLikeModel(Limited):
    """What the commands have that show a model new images."""

    range: Annotated[ValueRange | None, _own("{auto,file}|MIN MAX")] = None
    """The values shown as black and white in files with more than 8 bits. auto: the range of these
    images instead of the training images; file: each file's own range; or two numbers."""
    bands: Annotated[tuple[int, ...] | None, _own("BAND...")] = None
    """Bands shown as red, green and blue, counted from 1, or one shown as grey."""
    pages: Annotated[Pages | None, _own("{first,all}|PAGE...")] = None
    """Pages of a file that are images of their own: first, all, or numbers from 1."""
    nodata: Annotated[NoData | None, _own("{auto,file}|NUMBER")] = None
    """Pixels that hold no data: those that the file marks (file), also numbers such as -9999 far
    from all others (auto), or a number."""

    def read_by(self, experiment: Experiment) -> Experiment:
        """The experiment with what the options say of reading files.

        Raises:
            ConfigError: A value is out of range.
        """
        given = {name: getattr(self, name) for name in READING}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.range == "auto":
            changes["measured"] = {}
        if self.bands is not None:
            changes["band_names"] = ()
        try:
            reading = ReadingConfig(**experiment.reading.model_dump() | changes)
        except ValidationError as error:
            raise ConfigError(f"--{explain(error)}") from None
        return experiment.model_copy(update={"reading": reading})


@dataclass(frozen=True, kw_only=True)
class Informing(Command):
    """What the commands have that print a table."""

    json: bool = False
    """Print one JSON object instead of a table."""


C = TypeVar("C", bound=Command)
M = TypeVar("M")


def parse(command: type[C], name: str, args: Sequence[str]) -> C:
    """Turn the words after a command into its dataclass.

    Raises:
        ConfigError: A value is out of range, or a recipe or a configuration file is wrong.
        SystemExit: With 0 after --help; with 2 after tyro has said which option is wrong.
    """
    return tyro.cli(
        command,
        prog=f"iddc {name}",
        args=args,
        config=(FlagCreatePairsOff,),
        registry=_model_rule(_starting_point(name, args), command.choices),
    )


def unknown(kind: str, word: str, known: Iterable[str]) -> ConfigError:
    """Say that a name is not known, which one may be meant, and which there are."""
    names = list(known)
    near = difflib.get_close_matches(word, names, 1)
    hint = f" Perhaps you meant {near[0]}." if near else ""
    return ConfigError(f"Unknown {kind} {word!r}.{hint} Known: {', '.join(names)}.")


def _starting_point(command: str, args: Sequence[str]) -> Experiment:
    """The experiment of --config or --recipe, on which the other options build, and the method."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", nargs="?")  # tyro complains about an option without value
    early.add_argument("--config", nargs="?", type=Path)
    early.add_argument("--method", nargs="?")
    given = early.parse_known_args(args)[0]
    if given.recipe and given.config:
        raise ConfigError(
            "--recipe and --config both set every number. Give one; single options override it."
        )
    name = given.recipe or "folder"
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if given.config:
        experiment = load_config(given.config, {key: RECIPES[key].experiment for key in RECIPES})
    else:
        experiment = RECIPES[name].experiment()
    method = given.method
    if command == "baseline":
        method = next((word for word in args if word in METHODS), None)
    if not method and not given.config and command not in _LEARNING:
        method = "iddc"  # whose numbers these commands read or pass on
    if not method and not given.config and (word := _names_iddc(experiment.method, args)):
        print(f"note: {word} is an option of --method iddc, which trains here", file=sys.stderr)
        method = "iddc"
    if method in METHODS and method != experiment.method:
        experiment = experiment.model_copy(update={"method": method, "options": {}})
    return experiment


_LEARNING = ("train", "check")
"""The commands for which a recipe's method counts."""


def _names_iddc(method: MethodName, args: Sequence[str]) -> str | None:
    """The first option that IDDC has and the default method has not.

    Commands from before the default was the consensus go on to mean IDDC.
    """
    if method != "consensus":
        return None
    for arg_ in args:
        word = arg_.partition("=")[0].replace("_", "-")
        group = word.startswith(("--objective.", "--training."))
        if word in ("--epochs", "--head") or (group and word != "--training.precision"):
            return word
    return None


def _type(name: str, field: FieldInfo) -> Any:
    """The type of a field; one that is on by default takes True or False instead of a no- flag."""
    if field.annotation is ReadingConfig:
        return Annotated[ReadingConfig, Flat]
    if name == "num_clusters":
        return Annotated[int, arg(aliases=["-k"], metavar="K")]
    if name == "head":  # the others belong to baselines, and training refuses them
        return Annotated[field.annotation, arg(metavar="{conv,linear}")]
    if name == "recipe":
        return Annotated[field.annotation, arg(metavar="NAME")]
    if field.default == ():  # what none means stands in the description
        return Annotated[field.annotation, arg(help_behavior_hint="(default: none)")]
    on = field.annotation is bool and field.default is True
    return Annotated[bool, FlagConversionOff] if on else field.annotation


def _model_rule(start: Experiment, choices: Collection[str]) -> ConstructorRegistry:
    """Build the models of config.py; an Experiment is `start` where no option says otherwise."""
    registry = ConstructorRegistry()
    shown = _Shown.of(start, choices)
    models = [model for model in Frozen.__subclasses__() if model.__module__ == Frozen.__module__]
    parts = {field.annotation for model in models for field in model.model_fields.values()}
    parts |= {type(options) for options in shown.options.values()}

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        model = info.type
        if not (isinstance(model, type) and issubclass(model, Frozen)):
            return None
        given = start if model is Experiment else info.default
        defaults = given if isinstance(given, model) else model()
        fields = [
            StructFieldSpec(
                name,
                _type(name, field),
                getattr(defaults, name),
                " ".join((field.description or "").split()),
            )
            for name, field in model.model_fields.items()
            if shown.has(model, name) and (model is not ReadingConfig or name in READING)
        ]
        if model is Experiment:  # the numbers of its method, under their own name
            fields += [
                StructFieldSpec(name, type(options), options, None)
                for name, options in shown.options.items()
            ]

        def build(**values: Any) -> Any:
            if model in parts:
                return values  # checked as a part of the whole, so that its full name is known
            own = [values.pop(name) for name in shown.options if name in values]
            if "consensus" in shown.options and own:
                own = [_checked_consensus(own[0])]
            try:
                built = model(**_merged(defaults.model_dump(), values))
            except ValidationError as error:
                raise ConfigError(
                    f"--{explain(error).removeprefix('reading.').removeprefix('reading: ')}"
                ) from None
            if isinstance(built, Experiment) and own:
                built = built.model_copy(update={"options": own[0]})
                return built if "consensus" in shown.options else completed(built)
            return built

        return StructConstructorSpec(build, tuple(fields))

    @registry.struct_rule
    def command_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        command = info.type
        if not (isinstance(command, type) and issubclass(command, Command)):
            return None
        types, texts = get_type_hints(command, include_extras=True), _texts(command)
        given = [
            StructFieldSpec(
                field.name,
                types[field.name],
                tyro.MISSING if field.default is MISSING else field.default,
                texts.get(field.name),
            )
            for field in fields(command)
        ]
        return StructConstructorSpec(command, tuple(given))

    return registry


def _texts(command: type[Command]) -> dict[str, str]:
    """What stands below each field, in one line: tyro would keep the breaks of the source."""
    texts = {}
    for part in reversed(command.__mro__[:-1]):
        (tree,) = ast.parse(getsource(part)).body
        assert isinstance(tree, ast.ClassDef)
        for pair in pairwise(tree.body):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    texts[name] = " ".join(text.split())
    return texts


def _checked_consensus(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return ConsensusConfig(**values).model_dump()
    except ValidationError as error:
        raise ConfigError(f"--consensus.{explain(error)}") from None


def find_readable(
    images: Path,
    limit: int | None,
    runtime: Runtime,
    dataset: DatasetName = "folder",
    *,
    include_masks: bool = False,
    reading: ReadingConfig = ReadingConfig(),  # noqa: B008 - it is frozen
    run: Path | None = None,
) -> Collected:
    """Find the images and check their headers; say on stderr what was not read as a photo.

    A run that goes on may have a manifest of them.
    """
    from iddc.images import collect, find_images
    from iddc.manifest import find_listed

    if dataset != "folder":
        from iddc.datasets import train_images

        if include_masks:
            raise ConfigError(
                f"--include-masks is for --dataset folder: {dataset} says which files are photos."
            )
        found = None
        files: Sequence[ImageFile] = train_images(dataset, images)[:limit]
    else:
        if run is None:
            found = find_images(images, limit=limit, include_masks=include_masks)
        else:
            found = find_listed(images, run, limit=limit, include_masks=include_masks)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        files = found.files
    collected = collect(files, reading, max_unreadable=runtime.max_unreadable)
    for note in collected.notes:
        print(f"note: {note}", file=sys.stderr)
    return replace(collected, listed=found)


def readable_for(
    experiment: Experiment, images: Path, limit: int | None, runtime: Runtime, include_masks: bool
) -> tuple[Collected, Experiment]:
    """The images that can be read, and the experiment with how they are read, made ready."""
    found = find_readable(
        images, limit, runtime, include_masks=include_masks, reading=experiment.reading
    )
    return found, ready(experiment.model_copy(update={"reading": found.reading}), runtime)


def refuse_inside(out: Path, images: Path) -> None:
    """Refuse to write among the images: they are not ours, and results would be read as photos."""
    if images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise ConfigError(f"--out {out} lies in the folder of images {images}. Choose another.")


def ready(experiment: Experiment, runtime: Runtime) -> Experiment:
    """The experiment with a backbone of this machine in place of auto; the device is there."""
    from iddc.backbones import BACKBONES, licence_of, resolve
    from iddc.device import pick_device

    pick_device(runtime.device)
    backbone = resolve(experiment.backbone)
    if backbone == "bundled":
        why = "" if experiment.backbone == backbone else ", as DINO ViT-S/16 is not within reach"
        better = BACKBONES["dino-vits16"]
        print(
            f"note: backbone bundled{why}: small, {licence_of(backbone)}, for research. Better, "
            f"and {better.licence}: --backbone dino-vits16=FILE, where FILE is {better.file} of "
            f"github.com/{better.source}",
            file=sys.stderr,
        )
    return experiment.model_copy(update={"backbone": backbone})


def helpers(
    address: tuple[str, ...] | None, load: Callable[[], M], *, gpu: bool
) -> Helpers[M] | None:
    """The processes that --ray asks for, each with what `load` makes."""
    return None if address is None else Helpers("".join(address), load, gpu)


def fitted(files: Sequence[ImageFile], reading: ReadingConfig) -> ReadingConfig:
    """How a model that reads so sees these images. In what they differ is said on stderr."""
    from iddc.images import fit_to_model

    reading, notes = fit_to_model(files, reading)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return reading


def say(*parts: str) -> None:
    """Print a line; of the processes of torchrun only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(*parts, sep=" · ", flush=True)


@dataclass(frozen=True)
class _Shown:
    """Which fields are options: those of the command that the method of the experiment reads."""

    choices: Collection[str]
    """The fields of Experiment and Runtime that the command has."""
    uses: Collection[str] | None
    """What the method reads; None: everything."""
    options: Mapping[str, Frozen]
    """The numbers of the method, by its name."""
    heads: bool
    """Whether the method can train several heads."""
    backbone: bool
    """Whether it works on any backbone."""

    @classmethod
    def of(cls, start: Experiment, choices: Collection[str]) -> _Shown:
        # The numbers of these two are in config.py: no need for torch.
        if start.method == "iddc":
            return cls(choices, None, {}, True, True)
        if start.method == "consensus":
            own = ConsensusConfig(**start.options)
            return cls(choices, CONSENSUS_USES, {"consensus": own}, False, True)
        method = find_method(start.method)
        whole = completed(start)
        options: dict[str, Frozen] = {start.method: method.Config(**whole.options)}
        heads, backbone = len(method.heads) > 1, not method.backbone
        return cls(choices, method.uses, options, heads, backbone)

    def has(self, model: type[Frozen], name: str) -> bool:
        group = {ObjectiveConfig: "objective", TrainingConfig: "training"}.get(model)
        if group and self.uses is not None:
            return f"{group}.{name}" in self.uses
        if model not in (Experiment, Runtime):
            return True
        if name == "options" or (name == "head" and not self.heads):
            return False
        if name == "backbone" and not self.backbone:
            return False
        if self.uses is not None and name in ("epochs", "objective", "training"):
            used = any(use == name or use.startswith(f"{name}.") for use in self.uses)
            return used and name in self.choices
        return name in self.choices


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values, and the defaults of what is no option here."""
    both = {k: {**defaults[k], **v} if isinstance(v, dict) else v for k, v in values.items()}
    return defaults | both
