"""A trained network on disk: model.json says what it is, model.safetensors has its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from iddc.backbones import check_embeds, licence_of, not_numbers, without_memory
from iddc.config import Experiment, Frozen
from iddc.errors import DataError
from iddc.images import listed
from iddc.masks import LABELS, Labels, read_labels, write_labels
from iddc.network import Network
from iddc.runs import WRITTEN, disk_errors, explain, read_text, refuse_newer, write_atomic


class ModelFile(Frozen):
    """The content of model.json."""

    format_version: int
    """The format version of the RUN folder."""
    iddc: str
    """The version that wrote it."""
    network: dict[str, Any]
    """`Network.spec()`."""
    experiment: Experiment
    """What it was trained with; of it, prediction needs the working size and the windows."""
    backbone_licence: str = ""
    """The licence of the weights that the backbone began with."""


def save_model(
    folder: Path, network: Network, experiment: Experiment, labels: Labels | None = None
) -> None:
    """Write model.safetensors and model.json, from which `load_model` needs nothing else.

    Where somebody named a cluster, the names are in labels.json.

    Raises:
        SetupError: The folder cannot be written.
    """
    state = network.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    record = ModelFile(
        **WRITTEN,
        network=network.spec(),
        experiment=experiment,
        backbone_licence=licence_of(experiment.backbone),
    )
    # model.json comes last: where it is, the model is complete.
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").unlink(missing_ok=True)
        (folder / LABELS).unlink(missing_ok=True)
    if labels and labels != Labels.numbered(network.num_clusters):
        write_labels(folder, labels)
    write_atomic(folder / "model.safetensors", save(tensors))
    write_atomic(folder / "model.json", record.model_dump_json(indent=2) + "\n")


def digest_of(model: Path) -> str:
    """What tells the weights of a model from all others."""
    with (model / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(folder: Path) -> tuple[Network, Experiment, Labels]:
    """Read what `save_model` wrote, on the CPU.

    Raises:
        DataError: There is no model, it or labels.json is damaged or from a newer iddc.
    """
    record = _read_model_file(folder / "model.json")
    network = _rebuilt(record.network, folder / "model.safetensors")
    return network, record.experiment, read_labels(folder, network.num_clusters)


def _read_model_file(path: Path) -> ModelFile:
    try:
        record = json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(
            f"No model in {path.parent}: expected model.json and model.safetensors, which "
            "`iddc train` writes at its end. Give the folder of a finished run."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not isinstance(record, dict) or "format_version" not in record:
        raise DataError(f"{path} was not written by iddc: it has no format_version.")
    refuse_newer(record, path)
    try:
        return ModelFile.model_validate(record)
    except ValidationError as error:
        raise DataError(f"{path}: {explain(error)}") from error


def _rebuilt(spec: dict[str, Any], path: Path) -> Network:
    """The network of `Network.spec` with every tensor of a file, and no other."""
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}. Copy it again.") from error
    with without_memory():
        wanted = Network.from_spec(spec).state_dict()
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is unknown" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    wrong += not_numbers(found, wanted)
    if wrong:
        raise DataError(
            f"{path} does not fit model.json beside it: {listed(sorted(wrong))}. Both files must "
            "come from the same run."
        )
    network = Network.from_spec(spec)
    network.load_state_dict(found)
    check_embeds(network.backbone, path.with_name("model.json"))
    return network
