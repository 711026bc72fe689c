"""The methods, each in a module of its own: its equations, its numbers, its head.

A further method is one file here and one name in `config.MethodName`. This module imports torch
only with the method that is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast, get_args

from pydantic import ValidationError

from iddc.config import Experiment, MethodName
from iddc.errors import ConfigError
from iddc.runs import explain

if TYPE_CHECKING:
    from iddc.methods.method import Method
    from iddc.network import Network

METHODS: tuple[MethodName, ...] = get_args(MethodName)


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: There is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"Unknown method {name!r}. Known: {', '.join(METHODS)}.")
    module = import_module(f"iddc.methods.{name.replace('-', '_')}")
    for kind in vars(module).values():
        if isinstance(kind, type) and vars(kind).get("name") == name:
            return cast("type[Method]", kind)
    raise LookupError(f"{module.__name__} has no class with name = {name!r}.")


def completed(experiment: Experiment) -> Experiment:
    """The experiment with every number of its method and none that it does not read.

    A method with one head, or with a backbone of its own, has it whatever the experiment says.

    Raises:
        ConfigError: The method has no such option, or cannot train the head.
    """
    method = find_method(experiment.method)
    defaults = method.defaults(experiment)
    try:
        options = type(defaults)(**defaults.model_dump() | experiment.options)
    except ValidationError as error:
        raise ConfigError(f"--{experiment.method}.{explain(error)}") from None
    head = experiment.head
    if head not in method.heads:
        if len(method.heads) > 1:
            raise ConfigError(
                f"The method {experiment.method} does not train the head {head}. Choose --head "
                f"{' or '.join(method.heads)}."
            )
        head = method.heads[0]
    changes: dict[str, Any] = {"head": head, "options": options.model_dump()}
    for group in ("objective", "training"):  # what the method does not read is as if not given
        values = getattr(experiment, group)
        used = {k: v for k, v in values.model_dump().items() if f"{group}.{k}" in method.uses}
        changes[group] = type(values)(**used)
    if "epochs" not in method.uses:
        changes["epochs"] = 0
    if method.backbone:
        changes["backbone"] = method.backbone
    return experiment.model_copy(update=changes)


def used(experiment: Experiment) -> dict[str, Any]:
    """What a run of the experiment reads, for its record: nothing that would not change it."""
    record, uses = experiment.model_dump(), find_method(experiment.method).uses
    for group in ("objective", "training"):
        record[group] = {k: v for k, v in record[group].items() if f"{group}.{k}" in uses}
    unused = {name for name in ("objective", "training", "options") if not record[name]}
    if "epochs" not in uses:
        unused.add("epochs")
    return {name: value for name, value in record.items() if name not in unused}


def new_network(experiment: Experiment) -> Network:
    """The network of a method before the first step. Its random weights follow from the seed.

    Raises:
        DataError: The backbone's weights cannot be read.
        SetupError: They are not there, or the timm of this machine cannot build it.
    """
    from iddc.network import build_network

    experiment = completed(experiment)
    kind = find_method(experiment.method)
    return build_network(experiment, kind.head_options(kind.Config(**experiment.options)))


def build_method(experiment: Experiment, network: Network, index: int = 0) -> Method:
    """A method before the first step, with random weights that follow from the seed.

    Args:
        experiment: It has all numbers of the method, see `completed`.
        network: The network; method 0 trains its head, the others one of their own.
        index: Which one among several that learn side by side.

    Raises:
        ConfigError: The method needs a class token, and the backbone has none.
    """
    import numpy as np
    import torch

    from iddc.backbones import BACKBONES, has_class_token
    from iddc.network import build_head

    kind = find_method(experiment.method)
    if kind.needs_class_token and not has_class_token(network.backbone):
        usable = [name for name, known in BACKBONES.items() if known.timm_name.startswith("vit_")]
        raise ConfigError(
            f"The method {experiment.method} needs the class token of a ViT, and the backbone "
            f"{experiment.backbone} has none. Usable: {', '.join(usable)}, or another ViT."
        )
    options = kind.Config(**experiment.options)
    head = network.head
    if index:
        width = network.backbone.embed_dim
        head = build_head(experiment, width, index, kind.head_options(options))
    with torch.random.fork_rng(devices=[]):
        own = np.random.SeedSequence((experiment.seed, index, 1)).generate_state(1)
        torch.default_generator.manual_seed(int(own[0]))
        return kind(head, experiment, options)
