"""Random input: every valid configuration builds, every damaged file loads or is an IddcError."""

from __future__ import annotations

import copy
import functools
import io
import json
import re
import shutil
import subprocess
import sys
import typing
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import annotated_types as bounds
import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from safetensors.torch import load_file

from iddc.backbones import load_backbone, save_backbone, untrained_backbone
from iddc.backbones.weights import read_weights
from iddc.config import (
    Experiment,
    PredictionConfig,
    PretrainConfig,
    Runtime,
    TrainingConfig,
    ViewsConfig,
)
from iddc.datasets.labelfiles import read_ids
from iddc.datasets.potsdam import MatFile
from iddc.errors import ConfigError, DataError, IddcError, UnreadableImage
from iddc.images import check_images, find_images, open_image, to_rgb
from iddc.learning.checkpoint import load_state
from iddc.losses import Objective, Pixels
from iddc.masks import LABELS, edit_labels, read_labels
from iddc.methods.stego import StegoConfig
from iddc.network import Network
from iddc.pretraining.cache import find_cache
from iddc.runs import Run, changed, explain, load_config
from iddc.runs.configfile import option
from iddc.schedules import Plan
from iddc.segmenter import Segmenter
from iddc.views import cut, draw_crops

FEW = settings(max_examples=max(1, settings().max_examples // 3))
"""For what takes milliseconds; `make soak` tries many more of everything."""
MODELS: list[type[BaseModel]] = [Experiment, PretrainConfig, StegoConfig, Runtime]
Path_ = tuple[str, ...]


# Configurations


def leaves(model: type[BaseModel], place: Path_ = ()) -> Iterator[tuple[Path_, FieldInfo]]:
    """Every field of a configuration that is no group, and where it stands."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*place, name))
        elif name != "options":  # what is in there is the method's to check
            yield (*place, name), field


def limits(field: FieldInfo) -> tuple[float, float, float, float]:
    """The values of ge, le, gt and lt; of a union, those of its number."""
    kinds = (bounds.Ge, bounds.Le, bounds.Gt, bounds.Lt)
    found = [*field.metadata]
    for part in typing.get_args(field.annotation):
        for item in getattr(part, "__metadata__", ()):
            found += getattr(item, "metadata", [item])
    values = [
        [getattr(item, kind.__name__.lower()) for item in found if isinstance(item, kind)]
        for kind in kinds
    ]
    return tuple(value[0] if value else None for value in values)  # type: ignore[return-value]


def valid(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that a field accepts."""
    kind, (ge, le, gt, lt) = field.annotation, limits(field)
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.text(st.characters(codec="utf-8"), max_size=20)
    if kind is int:
        low = ge if ge is not None else gt + 1
        return st.integers(low, min(lt - 1 if lt is not None else le or low + 1000, low + 5000))
    if kind is float:
        return st.floats(
            ge if ge is not None else gt,
            lt if lt is not None else le or 1e6,
            exclude_min=gt is not None,
            exclude_max=lt is not None,
            allow_subnormal=False,
        )
    if typing.get_origin(kind) is tuple:
        number = st.integers(0, 9) if int in typing.get_args(kind) else st.floats(0.5, 2)
        return st.lists(number, max_size=3).map(tuple)
    assert "auto" in str(kind), f"no values for {kind}"
    return st.floats(ge, le) | st.just("auto")


def wrong(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that a field refuses."""
    kind, (ge, le, gt, lt) = field.annotation, limits(field)
    values: list[Any] = [{"a": 1}, [[1]], b"\xff", None]
    if kind is not str and kind is not bool:
        values += ["many", "", float("nan"), float("inf"), -float("inf")]
    if kind is bool:
        values += ["maybe", 7]
    if kind is str or typing.get_origin(kind) is Literal:
        values += [3, 0.5, True]
    if kind is int:
        values += [0.5]
    out = [
        bound + sign for bound, sign in ((ge, -1), (gt, 0), (le, 1), (lt, 0)) if bound is not None
    ]
    return st.sampled_from(values + out)


def put(record: dict[str, Any], place: Path_, value: Any) -> None:
    for name in place[:-1]:
        record = record.setdefault(name, {})
    record[place[-1]] = value


ORDERED = [
    ("views", "min_scale", "max_scale"),
    ("training", "backbone_from", "backbone_until"),
    ("prediction", "overlap", "window"),
    ("dino", "min_masked", "max_masked"),
    ("dino", "local_scale", "global_scale"),
]
"""Pairs of fields of which the second is the larger."""


RANGES = st.tuples(st.floats(-1e6, 0), st.floats(1, 1e6))
READING: dict[str, st.SearchStrategy[Any]] = {
    "range": st.sampled_from(["auto", "file"]) | RANGES,
    "bands": st.sampled_from([(), (4,), (3, 2, 1)]),
    "pages": st.sampled_from(["first", "all"]) | st.lists(st.integers(1, 9), min_size=1).map(tuple),
    "measured": st.dictionaries(st.sampled_from(["uint16", "float32"]), RANGES),
    "nodata": st.sampled_from(["auto", "file", -9999.0, 0.0]),
    "marks": st.dictionaries(
        st.sampled_from(["int16", "float32"]),
        st.lists(st.floats(-1e6, 1e6), max_size=3).map(tuple),
    ),
    "kinds": st.just(()),
    "band_names": st.just(()),
}
"""Values of fields whose types do not say all that they accept."""


@st.composite
def records(draw: st.DrawFn, model: type[BaseModel]) -> dict[str, Any]:
    """Some fields of a configuration, each with a value it accepts, pairs in order."""
    every = list(leaves(model))
    record: dict[str, Any] = {}
    for index in draw(st.lists(st.integers(0, len(every) - 1), max_size=25, unique=True)):
        place, field = every[index]
        special = READING.get(place[-1]) if place[0] == "reading" else None
        put(record, place, draw(special if special is not None else valid(field)))
    defaults = model().model_dump()
    for group, low, high in ORDERED:
        if group not in record:
            continue
        values = [record[group].get(name, defaults[group][name]) for name in (low, high)]
        record[group] |= dict(zip((low, high), sorted(values), strict=True))
        assume(values[0] != values[1] and record[group].get("window") != 0)
    terms = ("positive_weight", "negative_weight", "regularizer_weight")
    given = record.get("objective", {})
    assume(any(given.get(name, 1) for name in terms))
    return record


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@given(data=st.data())
def test_every_valid_configuration_is_accepted(model: type[BaseModel], data: st.DataObject) -> None:
    record = data.draw(records(model))
    built = model.model_validate(record)
    assert model.model_validate(built.model_dump()) == built
    assert model.model_validate(json.loads(built.model_dump_json())) == built
    assert model.model_validate(yaml.safe_load(yaml.safe_dump(built.model_dump()))) == built


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@given(data=st.data())
def test_every_invalid_configuration_is_an_error_that_names_the_field(
    model: type[BaseModel], data: st.DataObject
) -> None:
    record = data.draw(records(model))
    place, field = data.draw(st.sampled_from(list(leaves(model))))
    put(record, place, data.draw(wrong(field)))
    with pytest.raises(ValidationError) as caught:
        model.model_validate(record)
    assert option(place) in explain(caught.value)
    if model is Experiment:
        with pytest.raises(ConfigError, match=f"here: .*{re.escape(option(place))}"):
            changed(Experiment(), record, "here")


@given(records(Experiment), st.text(min_size=1), st.integers(0, 4))
def test_an_unknown_option_is_an_error_that_names_it(
    record: dict[str, Any], name: str, group: int
) -> None:
    place = ([(), ("objective",), ("views",), ("training",), ("prediction",)][group], name)
    assume(
        (*place[0], name) not in dict(leaves(Experiment)) and name not in Experiment.model_fields
    )
    put(record, (*place[0], name), 1)
    with pytest.raises(ConfigError, match=re.escape(option((*place[0], name)))):
        changed(Experiment(), record, "here")


@given(records(Experiment), st.integers(2, 50), st.integers(1, 60), st.integers(1, 60))
def test_every_valid_experiment_has_a_plan_a_loss_and_crops(
    record: dict[str, Any], images: int, width: int, height: int
) -> None:
    put(record, ("views", "crop_size"), min(record.get("views", {}).get("crop_size", 16), 32))
    for name in ("min_scale", "max_scale"):
        if name in record.get("views", {}):
            record["views"][name] = min(max(record["views"][name], 0.1), 3.0)
    built = changed(Experiment(), record, "here")
    assert Plan.of(built, images).steps >= 1
    picture = Image.new("RGB", (width, height))
    rng = np.random.default_rng(0)
    crops = cut(picture, draw_crops(picture.size, built.views, rng), built.views.crop_size)
    assert crops.shape == (2, 3, built.views.crop_size, built.views.crop_size)
    rule = built.objective.model_copy(
        update={
            name: 0.1
            for name in ("positive_threshold", "negative_threshold")
            if getattr(built.objective, name) == "auto"
        }
    )
    torch.manual_seed(0)
    one, two = (
        Pixels(torch.nn.functional.normalize(torch.randn(3, 4, 5), dim=2), torch.rand(3, 4, 6))
        for _ in range(2)
    )
    one, two = (
        Pixels(pixels.embeddings, pixels.probs / pixels.probs.sum(2, keepdim=True))
        for pixels in (one, two)
    )
    assert not Objective(rule)(one, two, [1]).total.isnan()


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
YAML = st.text("abcez019-+.:,_ &*!|>?%@#{}[]\"'\\~<=\n\tnul\xa0\u2028é", max_size=60) | st.text(
    max_size=30
)


@given(YAML)
def test_any_text_is_a_configuration_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "config.yaml"
    for start in ("", "num_clusters: ", "objective: {negative_weight: "):
        path.write_text(start + text, encoding="utf-8", errors="replace", newline="")
        with suppress(ConfigError):
            assert isinstance(load_config(path), Experiment)


# Images

MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "LA", "PA",
         "La", "RGBa", "I;16", "I;16B", "I;16L"]  # fmt: skip
SIDES = st.integers(1, 70)


def noise(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """A picture of random bytes in any mode of Pillow."""
    image = Image.new(mode, (width, height))
    data = np.random.default_rng(seed).bytes(len(image.tobytes()))
    image.frombytes(data)
    if mode in {"P", "PA"}:
        image.putpalette(np.random.default_rng(seed).bytes(768))
    return image


class Halves:
    """Two clusters: the left half and the right half of what is seen."""

    num_clusters = 2

    def probs(self, images: torch.Tensor) -> torch.Tensor:
        left = torch.tensor([[0.9, 0.2]]).expand(len(images), 2, 2)
        return torch.stack([left, 1 - left], dim=1)


@given(
    st.sampled_from(MODES), SIDES, SIDES, st.integers(0, 99), st.integers(0, 40), st.integers(0, 40)
)
def test_an_image_of_any_mode_and_size_is_segmented_at_its_size(
    mode: str, width: int, height: int, seed: int, window: int, short_side: int
) -> None:
    image = noise(mode, width, height, seed)
    with suppress(ValueError):  # LAB, in older versions of Pillow
        rgb = to_rgb(image)
        assert (rgb.mode, rgb.size) == ("RGB", image.size)
        experiment = Experiment(
            views=ViewsConfig(short_side=short_side),
            prediction=PredictionConfig(window=window, overlap=window // 3, flip=False),
        )
        result = Segmenter.of(Halves(), experiment).predict(image)
        assert result.clusters.shape == (height, width)
        assert result.overlay().size == (width, height)
        if not window and width > 1:
            assert (result.clusters[:, 0] == 0).all()
            assert (result.clusters[:, -1] == 1).all()


KINDS = {"PNG": ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"], "TIFF": ["L", "RGB", "CMYK", "F"],
         "JPEG": ["L", "RGB", "CMYK"], "GIF": ["1", "L", "P"], "BMP": ["1", "L", "P", "RGB"],
         "WEBP": ["RGB", "RGBA"], "PPM": ["1", "L", "RGB"], "JPEG2000": ["L", "RGB"]}  # fmt: skip


@FEW
@given(
    st.sampled_from([(kind, mode) for kind, modes in KINDS.items() for mode in modes]),
    SIDES,
    SIDES,
    st.data(),
)
def test_a_damaged_image_opens_at_the_size_it_claims_or_is_unreadable(
    tmp_path_factory: pytest.TempPathFactory, kind: tuple[str, str], width: int, height: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    buffer = io.BytesIO()
    noise(kind[1], width, height, 0).save(buffer, kind[0])
    path = tmp_path_factory.mktemp("image") / "a.png"
    path.write_bytes(buffer.getvalue())
    assert open_image(path).size == (width, height)
    path.write_bytes(data.draw(damaged(buffer.getvalue())))
    with suppress(UnreadableImage):
        assert open_image(path).mode == "RGB"
    with suppress(DataError):
        assert read_ids(path).ndim == 2


# Damaged files


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a file after a few accidents."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(result) - 1)))
        match draw(st.integers(0, 5)):
            case 0 if result:
                result[place] ^= 1 << draw(st.integers(0, 7))
            case 1 if result:
                result[place] = draw(st.integers(0, 255))
            case 2:
                del result[place:]
            case 3:
                del result[place : place + draw(st.integers(1, 30))]
            case 4:
                result[place:place] = draw(st.binary(max_size=9))
            case _:
                length = draw(st.integers(1, 60))
                result[place:place] = result[place : place + length] * draw(st.integers(1, 3))
    return bytes(result)


@st.composite
def altered(draw: st.DrawFn, text: str) -> str:
    """JSON with another value somewhere, or without what was there."""
    record = json.loads(text)
    here = record
    while isinstance(here, dict | list) and here:
        keys = sorted(here) if isinstance(here, dict) else [*range(len(here))]
        key = draw(st.sampled_from(keys))
        if not isinstance(here[key], dict | list) or draw(st.booleans()):
            if draw(st.integers(0, 4)) == 0 and isinstance(here, dict):
                del here[key]
            else:
                here[key] = draw(VALUES)
            break
        here = here[key]
    return json.dumps(record)


@functools.cache
def run_folder() -> dict[str, bytes]:
    """The files of a small run that has everything."""
    import tempfile

    torch.manual_seed(0)
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = untrained_backbone("vit_tiny_patch16_224", options=options)
    experiment = Experiment(
        num_clusters=3,
        views=ViewsConfig(short_side=32),
        prediction=PredictionConfig(window=32, overlap=8, flip=False),
        training=TrainingConfig(precision="fp32"),
    )
    folder = Path(tempfile.mkdtemp())
    with Run.start(folder, experiment, source="photos") as run:
        run.log(step=1, loss=0.5)
        run.add_score(data="d", dataset="folder", split="val", protocol="full", refinement="none")
        torch.save(
            {"format_version": 1, "files": "x", "network": {"w": torch.ones(3)}}, run.checkpoint
        )
        Segmenter.of(Network(backbone, "linear", 3), experiment).save(folder)
    edit_labels(folder, 3, lambda labels: labels.edit({0: "sky", 1: "road"}, {0: "#00ff00"}))
    save_backbone(backbone, folder)
    torch.save(backbone.net.state_dict(), folder / "weights.pth")
    torch.save({"w": torch.ones(9)}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    shutil.rmtree(folder)
    return files


def loaded_model(folder: Path) -> None:
    model = Segmenter.load(folder, device="cpu")
    record = json.loads((folder / "model.json").read_text())
    assert model.num_clusters == record["network"]["num_clusters"] == len(model.labels.names)
    tensors = load_file(folder / "model.safetensors")
    assert isinstance(model.network, Network)
    state = model.network.state_dict()
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in state.items()
    }
    assert all(value.isfinite().all() for value in state.values())


READERS: dict[str, Callable[[Path], Any]] = {
    "model.json": loaded_model,
    "model.safetensors": loaded_model,
    LABELS: lambda folder: read_labels(folder, 3).classes,
    "config.yaml": lambda folder: (Run(folder).experiment, Run(folder).finished),
    "scores.json": lambda folder: Run(folder).scores(),
    "log.jsonl": lambda folder: Run(folder).cut_log(1),
    "checkpoint/state.pt": lambda folder: load_state(Run(folder), "x"),
    "backbone.json": lambda folder: load_backbone(str(folder)),
    "backbone.safetensors": lambda folder: load_backbone(str(folder)),
    "weights.pth": lambda folder: read_weights(folder / "weights.pth"),
    "legacy.pth": lambda folder: read_weights(folder / "legacy.pth"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@FEW
@given(data=st.data())
def test_a_damaged_file_of_a_run_loads_or_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    files = copy.copy(run_folder())
    files[name] = data.draw(damaged(files[name]))
    folder = tmp_path_factory.mktemp("run")
    for other, content in files.items():
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(content)
    with suppress(IddcError):
        READERS[name](folder)


@pytest.mark.parametrize("name", ["model.json", LABELS, "scores.json", "backbone.json"])
@FEW
@given(data=st.data())
def test_another_value_in_a_file_of_a_run_loads_or_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    files = copy.copy(run_folder())
    files[name] = data.draw(altered(files[name].decode())).encode()
    folder = tmp_path_factory.mktemp("run")
    for other, content in files.items():
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(content)
    with suppress(IddcError):
        READERS[name](folder)


@given(st.dictionaries(st.sampled_from(["a", "objective", "num_clusters", "views"]), VALUES))
def test_any_values_in_a_configuration_file_are_one_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(yaml.safe_dump(record))
    with suppress(ConfigError):
        assert isinstance(load_config(path), Experiment)


@functools.cache
def archive() -> bytes:
    photo, buffer = io.BytesIO(), io.BytesIO()
    noise("RGB", 9, 7, 0).save(photo, "PNG")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("a.png", "b/c.png", "labels/a.png"):
            file.writestr(name, photo.getvalue())
    return buffer.getvalue()


@given(st.data())
def test_a_damaged_zip_gives_images_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    path.write_bytes(data.draw(damaged(archive())))
    with suppress(DataError):
        found = find_images(path)
        good, bad = check_images(found.files, max_unreadable=1.0)
        assert len(good) + len(bad) == len(found.files)
        for file in good:
            assert ".." not in file.name.parts
            with suppress(UnreadableImage):
                open_image(file)


@functools.cache
def matlab() -> bytes:
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, {"img": np.zeros((9, 7, 4), np.uint8)}, do_compression=True)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@FEW
@given(st.data())
def test_a_damaged_matlab_file_is_an_image_or_unreadable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("mat") / "a.mat"
    path.write_bytes(data.draw(damaged(matlab())))
    with suppress(UnreadableImage):
        open_image(MatFile(path, PurePosixPath("a.png")))


@functools.cache
def index() -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        digest=np.array("x"),
        sizes=np.array([[2.0, 2.0]]),
        sources=np.array([0]),
        failed=np.array([1]),
        reasons=np.array(["no image"]),
    )
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_a_damaged_cache_is_one_or_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    (folder / "index.npz").write_bytes(data.draw(damaged(index())))
    (folder / "pixels.u8").write_bytes(bytes(12))
    photos = find_cache(folder, "x")
    assert photos is None or photos[0].shape == (2, 2, 3)


@pytest.mark.soak
def test_fuzzing_with_two_thousand_examples_each(record_property: Callable[..., None]) -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "--hypothesis-show-statistics"]
    process = subprocess.run(
        [*command, "--hypothesis-profile=soak"], capture_output=True, text=True, check=False
    )
    found = re.findall(r"(\d+) passing, (\d+) failing", process.stdout.replace(" examples", ""))
    tried = sum(int(number) for pair in found for number in pair)
    record_property("did", f"{tried:,} inputs")
    assert process.returncode == 0, process.stdout[-5000:]
    assert tried > 10_000
