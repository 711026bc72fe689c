"""Read what other authors released: their checkpoint becomes a segmenter, whole or not at all.

A checkpoint holds tensors by name. Each layout says which of them are the head, under which names,
where the backbone is, and which tensors prediction does not need. Every other name is an error.

    layout     head                                        scores of a patch u
    iddc       3x3, 1x1 and 1x1 convolutions               the logits
    stego, hp  z = W1 u + W3 relu(W2 u), centroids m       cos(z, m)
    smooseg    z with SiLU, the teacher's centroids M      cos(z, M)
    cause-mlp  z of the moving average of the head, m      cos(z, m)
    primaps    the moving average theta of unit rows       g (v / |v|) u

The names are those of the authors' public code. EAGLE's head sees keys of three blocks instead of
the last block's patches, and CAUSE-TR's is a decoder of a fixed grid: neither is a head here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iddc.backbones import Backbone, backbone_with, is_plain, load_backbone, not_numbers, read_file
from iddc.config import Experiment, HeadName
from iddc.errors import DataError
from iddc.network import CODE_DIM, Network
from iddc.segmenter import Segmenter

Tensors = dict[str, Tensor]

_CODES = {
    "linear.weight": "{}1.0.weight",
    "linear.bias": "{}1.0.bias",
    "nonlinear.0.weight": "{}2.0.weight",
    "nonlinear.0.bias": "{}2.0.bias",
    "nonlinear.2.weight": "{}2.2.weight",
    "nonlinear.2.bias": "{}2.2.bias",
}
"""Our names of STEGO's head, and those of all that descends from its code."""

OUTER = ("state_dict.", "module.")
"""What Lightning and DistributedDataParallel put before every name."""
NOT_TENSORS = (
    *("epoch", "iter", "best", "best_epoch", "best_iter", "global_step"),
    *("pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "lr_schedulers"),
    *("net_optimizer_state_dict", "linear_optimizer_state_dict", "cluster_optimizer_state_dict"),
)
"""Parts of a checkpoint beside its weights: counters, and the state of optimisers."""
MOST_NAMES = 200
"""How many names of tensors an error lists."""


@dataclass(frozen=True)
class Layout:
    """Where the authors of a method keep the tensors of their network."""

    name: str
    """The method."""
    head: HeadName
    """The head that computes the same."""
    tensors: Mapping[str, str]
    """Our names of the head's tensors, and theirs."""
    backbone: str
    """What stands before the backbone's names; nothing if the file has no backbone."""
    unused: tuple[str, ...] = ()
    """Beginnings of names that prediction does not need, such as a probe that labels trained."""
    convert: Callable[[Tensors], Tensors] = dict
    """From their tensors, by our names, to ours."""


def _unit_rows(found: Tensors) -> Tensors:
    """PriMaPs' weight normalisation, g v / |v| for each cluster, as a linear head without bias."""
    length = found["weight"].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    weight = found.pop("length") * found["weight"] / length
    return {"weight": weight, "bias": torch.zeros(len(weight))}


LAYOUTS = (
    Layout(
        "iddc",
        "conv",
        {
            f"{ours}.{kind}": f"{theirs}.{kind}"
            for ours, theirs in (
                ("0", "head_nonlinear.0"),
                ("2", "head_nonlinear.2"),
                ("4", "classifier"),
            )
            for kind in ("weight", "bias")
        },
        "backbone.model.",
    ),
    Layout(
        "hp",
        "codes",
        {
            **{
                ours: f"net_model_state_dict.{theirs.format('cluster')}"
                for ours, theirs in _CODES.items()
            },
            "centroids": "cluster_model_state_dict.clusters",
        },
        "net_model_state_dict.model.",
        ("net_model_state_dict.ema_model", "linear_model_state_dict."),
    ),
    Layout(
        "smooseg",
        "smooth-codes",
        {
            **{ours: f"projection.{theirs.format('cluster')}" for ours, theirs in _CODES.items()},
            "centroids": "prediction.global_clusters",
        },
        "net.model.",
        ("prediction.local_clusters",),
    ),
    Layout(
        "primaps",
        "linear",
        {
            "weight": "cluster_probe.ema_model.weight_v",
            "length": "cluster_probe.ema_model.weight_g",
        },
        "net.model.",
        (
            *("cluster_probe.online_model.", "cluster_probe.initted", "cluster_probe.step"),
            *("seghead.", "linear_probe."),
        ),
        _unit_rows,
    ),
    Layout(
        "stego",
        "codes",
        {
            **{ours: f"net.{theirs.format('cluster')}" for ours, theirs in _CODES.items()},
            "centroids": "cluster_probe.clusters",
        },
        "net.model.",
        ("train_cluster_probe.", "linear_probe.", "decoder."),
    ),
    Layout(
        "cause-mlp",
        "codes",
        {
            **{
                ours: theirs.format("head_ema.f").replace("f1.0.", "f1.")
                for ours, theirs in _CODES.items()
            },
            "centroids": "cluster_probe",
        },
        "",
        ("head.", "projection_head.", "projection_head_ema.", "linear.", "codebook"),
    ),
)
"""In the order in which they are tried."""


@dataclass(frozen=True, eq=False)
class Imported:
    """A network from a checkpoint, and what was left out of it."""

    segmenter: Segmenter
    """What predicts."""
    layout: str
    """Whose checkpoint it is."""
    unused: tuple[str, ...]
    """The names of the tensors that prediction does not need."""


def import_checkpoint(files: Sequence[Path], experiment: Experiment) -> Imported:
    """Build the network of a released checkpoint.

    Args:
        files: The checkpoint; of CAUSE two files, the segmenter's and the clusters'.
        experiment: It says the architecture of the backbone, K, and how images are seen. The head
            is the checkpoint's.

    Raises:
        DataError: A file holds anything but tensors, no known layout, a tensor that has no place,
            or another backbone or number of clusters than the experiment says.
    """
    source = " and ".join(str(file) for file in files)
    found = _tensors(files)
    layout = next((one for one in LAYOUTS if {*one.tensors.values()} <= found.keys()), None)
    if layout is None:
        raise DataError(_unknown(source, found))

    # Every name is one of the head, the backbone, or those that are not needed.
    theirs = {*layout.tensors.values()}
    inside = {
        name.removeprefix(layout.backbone): value
        for name, value in found.items()
        if layout.backbone and name.startswith(layout.backbone)
    }
    unused = sorted(name for name in found if name not in theirs and name.startswith(layout.unused))
    foreign = [
        name
        for name in found
        if name not in theirs
        and name not in unused
        and not (layout.backbone and name.startswith(layout.backbone))
    ]
    if foreign:
        raise DataError(
            f"{source} is a checkpoint of {layout.name} with {len(foreign)} tensors that have no "
            f"place in its network: {_names(foreign)}. Nothing was imported."
        )

    # Codes may have any length; all other shapes must be those of the experiment.
    head = layout.convert({ours: found[name] for ours, name in layout.tensors.items()})
    backbone = _backbone(experiment.backbone, inside, source)
    options = {}
    if "centroids" in head and (length := head["centroids"].shape[-1]) != CODE_DIM:
        options = {"dim": int(length)}
    network = Network(backbone, layout.head, experiment.num_clusters, options)
    wanted = network.head.state_dict()
    wrong = [
        f"{layout.tensors.get(name, name)} is {tuple(head[name].shape)} instead of "
        f"{tuple(wanted[name].shape)}"
        for name in wanted
        if head[name].shape != wanted[name].shape
    ] or not_numbers(head, wanted)
    if wrong:
        raise DataError(
            f"{source} does not fit {experiment.backbone} with {experiment.num_clusters} clusters: "
            f"{_names(wrong)}. Give the --recipe, --backbone or --num-clusters it was trained with."
        )
    network.head.load_state_dict(head)
    experiment = experiment.model_copy(update={"head": layout.head})
    return Imported(Segmenter.of(network, experiment), layout.name, tuple(unused))


def _tensors(files: Sequence[Path]) -> Tensors:
    """All tensors of the files by their full names, without what stands before every name."""
    found: Tensors = {}
    foreign: list[str] = []

    def collect(part: object, name: str) -> None:
        if isinstance(part, Tensor) and is_plain(part):
            if name in found:
                raise DataError(f"The files hold {name} twice.")
            found[name] = part
        elif isinstance(part, Mapping):
            for key, value in part.items():
                collect(value, f"{name}.{key}" if name else str(key))
        elif name != "" and part is not None:
            foreign.append(name)

    for file in files:
        saved = read_file(file)
        if isinstance(saved, Mapping):
            saved = {key: value for key, value in saved.items() if key not in NOT_TENSORS}
        collect(saved, "")
        if foreign or not found:
            held = f": {_names(foreign)}" if foreign else ""
            raise DataError(
                f"{file} holds more than tensors by name, or none{held}. Save its state dict alone."
            )
    for prefix in OUTER:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _backbone(name: str, inside: Tensors, source: str) -> Backbone:
    if not inside:
        return load_backbone(name)
    try:
        return backbone_with(name, inside, source)
    except DataError as error:
        raise DataError(f"{error} Give the --recipe or --backbone it was trained with.") from None


def _names(names: Iterable[str]) -> str:
    """Names in order, so many that a reader can tell whose checkpoint it is."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MOST_NAMES} more" if len(ordered) > MOST_NAMES else ""
    return ", ".join(ordered[:MOST_NAMES]) + more


def _unknown(source: str, found: Tensors) -> str:
    names = sorted(found)
    if any(name.startswith("head_ema.tr.") for name in names):
        return (
            f"{source} is of CAUSE-TR, whose head is a decoder over a fixed grid of patches and is "
            "not known here. CAUSE-MLP's can be imported."
        )
    known = ", ".join(layout.name for layout in LAYOUTS)
    return (
        f"{source} has no layout that is known ({known}). It holds {len(names)} tensors: "
        f"{_names(names)}. Of CAUSE-MLP give both files, segment_mlp.pth and cluster_mlp.pth."
    )
