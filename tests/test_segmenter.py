"""Any image in, clusters of its size out; saved, and read from two files."""

from __future__ import annotations

import doctest
import json
import shutil
import sys
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from iddc import __version__
from iddc.backbones import untrained_backbone
from iddc.config import Experiment, PredictionConfig, Runtime, TrainingConfig, ViewsConfig
from iddc.errors import ConfigError, DataError, UnreadableImage
from iddc.images import find_images
from iddc.learning import fit
from iddc.masks import palette
from iddc.network import Network
from iddc.runs import Run
from iddc.runs.configfile import in_python
from iddc.segmenter import Segmenter
from iddc.windows import Predictor, size_for_windows, to_working_size


class Brightness:
    """Three clusters by brightness, and a record of what it was shown."""

    num_clusters = 3

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.autocast: list[bool] = []

    def probs(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.sizes.append(tuple(images.shape))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        level = images.float().mean(1) / 255
        grid = torch.nn.functional.adaptive_avg_pool2d(level, 8)
        return torch.stack([1 - grid, grid, torch.full_like(grid, 0.3)], dim=1).softmax(1)


def experiment(short_side: int = 64, window: int = 32, precision: str = "fp32") -> Experiment:
    return Experiment(
        views=ViewsConfig(short_side=short_side),
        prediction=PredictionConfig(window=window, overlap=window // 4),
        training=TrainingConfig.model_validate({"precision": precision}),
    )


def some_network(seed: int = 0, num_clusters: int = 4) -> Network:
    torch.manual_seed(seed)
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = untrained_backbone("vit_tiny_patch16_224", options=options)
    return Network(backbone, "linear", num_clusters)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


TINY: dict[str, Any] = {
    "num_clusters": 3,
    "backbone": "untrained:test_vit",
    "epochs": 2,
    "views": {"crop_size": 64},
    "training": {"precision": "fp32"},
}
QUIET: dict[str, Any] = {"device": "cpu", "workers": 0, "progress": False}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four photos in a folder."""
    (tmp_path / "photos").mkdir()
    for index in range(4):
        photo(80, 70, seed=index).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Segmenter.of(some_network(), experiment()).save(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A saved model that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


@given(width=st.integers(1, 150), height=st.integers(1, 150), window=st.sampled_from([0, 16, 32]))
def test_clusters_have_the_size_of_the_image(width: int, height: int, window: int) -> None:
    segmenter = Segmenter.of(Brightness(), experiment(window=window))
    result = segmenter.predict(photo(width, height))
    assert result.clusters.shape == (height, width)
    assert result.overlay().size == (width, height)


def test_a_real_network_segments_images_of_any_size() -> None:
    segmenter = Segmenter.of(some_network(), experiment())
    for size in [(1, 1), (3, 90), (50, 33), (200, 130)]:
        assert segmenter.predict(photo(*size)).clusters.shape == size[::-1]


def test_large_images_are_reduced_and_small_ones_enlarged_before_the_network() -> None:
    predictor = Brightness()
    segmenter = Segmenter.of(predictor, experiment(short_side=64, window=0))
    segmenter.predict(photo(200, 100))
    segmenter.predict(photo(50, 40))
    assert predictor.sizes == [(2, 3, 64, 128), (2, 3, 40, 50)]
    predictor = Brightness()
    segmenter = Segmenter.of(predictor, experiment(short_side=64, window=32))
    segmenter.predict(photo(8, 10))
    assert {size[1:] for size in predictor.sizes} == {(3, 32, 32)}


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [
        ((224, 300), (224, 300)),
        ((112, 150), (224, 300)),
        ((1, 1), (224, 224)),
        ((3, 5000), (224, 5000)),  # not 373,333
        ((2, 100), (224, 3584)),
    ],
)
def test_images_smaller_than_a_window_are_enlarged_in_proportion_within_reason(
    size: tuple[int, int], enlarged: tuple[int, int]
) -> None:
    assert size_for_windows(size, 224) == enlarged
    assert size_for_windows(size, 0) == size


def test_reducing_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = to_working_size(Image.fromarray(stripes), short_side=8, window=0)
    assert pixels.shape == (3, 8, 8)
    assert (pixels[:, :, 1:-1].float() - 127.5).abs().max() < 8


def test_every_kind_of_input_gives_the_same_clusters(tmp_path: Path) -> None:
    image = photo(40, 30)
    path = tmp_path / "ä photo.png"
    image.save(path)
    array = np.asarray(image)
    segmenter = Segmenter.of(Brightness(), experiment())
    expected = segmenter.predict(image).clusters
    encoded = path.read_bytes()
    kinds = [path, str(path), array, torch.tensor(array).permute(2, 0, 1), image.convert("RGBA")]
    kinds += [encoded, bytearray(encoded), BytesIO(encoded), path.open("rb")]
    for kind in kinds:
        assert (segmenter.predict(kind).clusters == expected).all()
    kinds[-1].close()


def test_a_list_of_images_gives_a_list_of_results() -> None:
    segmenter = Segmenter.of(Brightness(), experiment())
    images = [photo(40, 30), np.asarray(photo(33, 50, seed=1))]
    results = segmenter.predict(images)
    assert isinstance(results, list)
    for image, result in zip(images, results, strict=True):
        assert (result.clusters == segmenter.predict(image).clusters).all()
    assert segmenter.predict(()) == []


@pytest.mark.parametrize(
    "wrong",
    [None, 7, {"image": 1}, iter(()), object(), StringIO("text")],
    ids=["None", "number", "dictionary", "iterator", "object", "text"],
)
def test_what_is_no_image_is_a_data_error_that_says_what_is_one(wrong: Any) -> None:
    segmenter = Segmenter.of(Brightness(), experiment())
    with pytest.raises(DataError, match="Expected"):
        segmenter.predict(wrong)
    with pytest.raises(DataError, match="Expected"):
        segmenter.predict([wrong])


@pytest.mark.parametrize(
    "wrong", [None, 7, "a.jpg", b"PNG", Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8)],
    ids=["None", "number", "path", "bytes", "Pillow", "array"],
)  # fmt: skip
def test_one_image_where_several_are_expected_is_a_data_error(wrong: Any) -> None:
    with pytest.raises(DataError, match="Expected several images"):
        list(Segmenter.of(Brightness(), experiment()).predict_all(wrong))
    if not isinstance(wrong, str):
        with pytest.raises(DataError, match="Expected several images"):
            Segmenter(**TINY).fit(wrong, **QUIET)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(5, 5, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 5, 5, dtype=torch.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_its_shape(wrong: np.ndarray | Tensor) -> None:
    with pytest.raises(DataError, match=r"of uint8, found (ndarray|Tensor) of"):
        Segmenter.of(Brightness(), experiment()).predict(wrong)


def test_a_file_that_is_no_image_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(UnreadableImage):
        Segmenter.of(Brightness(), experiment()).predict(tmp_path / "a.jpg")


def test_several_images_go_through_the_network_together_and_come_back_as_one_by_one() -> None:
    photos = [photo(40, 40), photo(50, 33, seed=1), photo(40, 40, seed=2)]
    for options in ({}, {"with_probs": True}):
        predictor = Brightness()
        segmenter = Segmenter.of(predictor, experiment(short_side=0, window=0))
        together = list(segmenter.predict_all([photos[0], photos[2], photos[1]], **options))
        assert [size[0] for size in predictor.sizes] == [4, 2]  # with their mirror images
        for image, result in zip([photos[0], photos[2], photos[1]], together, strict=True):
            alone = segmenter.predict(image, **options)
            assert result.image == image
            assert (result.clusters == alone.clusters).all()
            assert (result.probs is None) == (alone.probs is None)


def test_bright_and_dark_halves_are_told_apart() -> None:
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, 30:] = 255
    clusters = Segmenter.of(Brightness(), experiment()).predict(array).clusters
    assert (clusters[:, :25] == 0).all()
    assert (clusters[:, 35:] == 1).all()


def test_probabilities_come_only_when_asked_for_and_agree_with_the_clusters() -> None:
    segmenter = Segmenter.of(some_network(), experiment())
    assert segmenter.predict(photo(50, 40)).probs is None
    result = segmenter.predict(photo(50, 40), with_probs=True)
    assert result.probs is not None
    assert result.probs.shape == (4, 40, 50)
    assert torch.allclose(result.probs.sum(0), torch.ones(40, 50), atol=1e-5)
    assert (result.probs.argmax(0).numpy() == result.clusters).all()
    assert (segmenter.predict(photo(50, 40)).clusters == result.clusters).all()


def test_the_result_names_and_colours_the_clusters() -> None:
    result = Segmenter.of(Brightness(), experiment()).predict(photo(20, 20))
    assert result.names == ("cluster 0", "cluster 1", "cluster 2")
    assert (result.colours == palette(3)).all()
    solid = np.asarray(result.overlay(opacity=1.0))
    assert (solid == result.colours[result.clusters]).all()


def test_the_network_computes_in_the_precision_of_the_experiment() -> None:
    for precision, expected in (("fp32", False), ("bf16", True)):
        predictor = Brightness()
        Segmenter.of(predictor, experiment(precision=precision)).predict(photo(20, 20))
        assert set(predictor.autocast) == {expected}


def test_a_segmenter_is_a_predictor_and_sets_its_network_to_evaluation() -> None:
    network = some_network().train()
    segmenter = Segmenter.of(network, experiment())
    assert isinstance(segmenter, Predictor)
    assert not network.training


def test_a_saved_segmenter_needs_two_files_and_predicts_the_same(tmp_path: Path) -> None:
    segmenter = Segmenter.of(some_network(seed=3), experiment())
    segmenter.save(tmp_path / "new" / "run")
    assert {p.name for p in (tmp_path / "new" / "run").iterdir()} == {
        "model.json",
        "model.safetensors",
    }
    moved = (tmp_path / "new" / "run").rename(tmp_path / "moved")
    torch.manual_seed(99)
    loaded = Segmenter.load(moved, device="cpu")
    assert loaded.experiment == segmenter.experiment
    before, after = (s.predict(photo(70, 50), with_probs=True) for s in (segmenter, loaded))
    assert before.probs is not None
    assert after.probs is not None
    assert torch.equal(before.probs, after.probs)


def test_saving_twice_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    Segmenter.load(saved, device="cpu").save(tmp_path)
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_a_crash_while_saving_leaves_no_model_of_two_halves(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: object) -> None:
        raise KeyboardInterrupt

    segmenter = Segmenter.of(some_network(seed=1), experiment())
    monkeypatch.setattr("iddc.modelfile.write_atomic", fail)
    with pytest.raises(KeyboardInterrupt):
        segmenter.save(model)
    with pytest.raises(DataError, match="No model"):
        Segmenter.load(model, device="cpu")


def test_a_predictor_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Only a Network can be saved, found Brightness"):
        Segmenter.of(Brightness(), experiment()).save(tmp_path)


def test_a_folder_without_a_model_is_a_data_error_that_says_what_it_should_hold(
    tmp_path: Path,
) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=r"No model in .*model\.json and model\.safetensors"):
            Segmenter.load(folder, device="cpu")


def test_a_model_of_the_future_is_refused_with_the_version_to_install(model: Path) -> None:
    edit(model / "model.json", format_version=99, iddc="7.2", surprise=True)
    with pytest.raises(DataError, match=rf"format 99.*iddc {__version__}.*Install iddc 7\.2"):
        Segmenter.load(model, device="cpu")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", '{"name": "other program"}', "\x00\xff", '{"format_version": 1}'],
)
def test_a_model_json_of_another_program_is_a_data_error(model: Path, text: str) -> None:
    (model / "model.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"model\.json"):
        Segmenter.load(model, device="cpu")


def test_an_unknown_field_of_the_experiment_is_named(model: Path) -> None:
    edit(model / "model.json", experiment={"num_cluster": 3})
    with pytest.raises(DataError, match=r"num-cluster"):
        Segmenter.load(model, device="cpu")


def test_tensors_that_do_not_fit_are_listed(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    weight = tensors.pop("head.weight")
    tensors["head.bias"] = torch.zeros(9)
    tensors["other"] = weight.clone()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(DataError) as caught:
        Segmenter.load(model, device="cpu")
    text = str(caught.value)
    assert "head.weight is missing" in text
    assert "other is unknown" in text
    assert "head.bias is (9,) instead of (4,)" in text


@pytest.mark.parametrize("damage", ["cut", "gone", "pickle"])
def test_a_damaged_weights_file_is_a_data_error(model: Path, damage: str) -> None:
    path = model / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        torch.save({"head.bias": torch.zeros(4)}, path)
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        Segmenter.load(model, device="cpu")


def test_a_wrong_device_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown device 'gpu'"):
        Segmenter.load(tmp_path / "missing", device="gpu")


# Training through the class ---------------------------------------------------------------------


def test_the_example_in_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(sys.modules[Segmenter.__module__])
    assert result.attempted
    assert not result.failed


def test_the_constructor_takes_a_recipe_and_changes_of_it_and_reads_nothing() -> None:
    changed = Segmenter(5, recipe="cityscapes-vitb8", seed=3, objective={"penalty": "log"})
    recipe = Segmenter(recipe="cityscapes-vitb8").experiment
    objective = recipe.objective.model_copy(update={"penalty": "log"})
    update = {"num_clusters": 5, "seed": 3, "objective": objective}
    assert changed.experiment == recipe.model_copy(update=update)
    assert Segmenter().experiment.num_clusters == 27


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "folders"}, "Unknown recipe 'folders'. Known: folder, "),
        ({"num_clusters": 1}, "Segmenter: num_clusters: expected greater"),
        ({"num_cluster": 4}, "unknown option num_cluster; perhaps you meant num_clusters"),
        ({"views": {"crop": 64}}, "unknown option views.crop"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_read(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Segmenter(**options)
    assert sentence in str(caught.value)


def test_what_needs_training_says_so_before_it() -> None:
    untrained = Segmenter(**TINY)
    for use in (
        lambda: untrained.predict(photo(8, 8)),
        lambda: untrained.rename({0: "sky"}),
        lambda: untrained.save("model"),
        lambda: untrained.num_clusters,
    ):
        with pytest.raises(ConfigError, match=r"not trained\. Call fit\(IMAGES\) first"):
            use()
    assert not Path("model").exists()


def test_fit_trains_as_the_function_of_the_command_does(photos: Path, tmp_path: Path) -> None:
    trained = Segmenter(**TINY)
    assert trained.fit(photos, tmp_path / "run", **QUIET) is trained
    with Run.start(tmp_path / "other", trained.experiment, source="photos") as run:
        fit(find_images(photos).files, trained.experiment, run, Runtime(device="cpu", workers=0))
    assert Run.open(tmp_path / "run").experiment == trained.experiment
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run.path / name).read_bytes()
    expected = Segmenter.load(run.path, device="cpu").predict(photo(50, 40)).clusters
    assert (trained.predict(photo(50, 40)).clusters == expected).all()


class Pairs(torch.utils.data.Dataset[Any]):
    """A data set of torch, of images and labels that nobody may look at."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        return self.images[index], object()


@pytest.mark.parametrize(
    "kind", ["arrays", "generator", "array", "tensor", "data set", "bytes", "dictionaries"]
)
def test_fit_learns_the_same_from_a_folder_and_from_images_in_memory(
    photos: Path, kind: str
) -> None:
    expected = Segmenter(**TINY).fit(photos, **QUIET).predict(photo(50, 40)).clusters
    images = [photo(80, 70, seed=index) for index in range(4)]
    stacked = np.stack([np.asarray(image) for image in images])
    given: Any = {
        "arrays": list(stacked),
        "generator": (image for image in images),
        "array": stacked,
        "tensor": torch.tensor(stacked).permute(0, 3, 1, 2),
        "data set": Pairs(images),
        "bytes": [(photos / f"{index}.png").read_bytes() for index in range(4)],
        "dictionaries": [{"image": image, "label": None} for image in images],
    }[kind]
    found = Segmenter(**TINY).fit(given, **QUIET).predict(photo(50, 40)).clusters
    assert (found == expected).all()


def test_an_image_in_memory_that_is_none_is_named_by_its_number() -> None:
    images = [photo(80, 70), np.zeros((5, 5), np.float32)]
    with pytest.raises(DataError, match=r"Image 1: Expected an image .* found ndarray of float32"):
        Segmenter(**TINY).fit(images, **QUIET)


def test_fit_on_one_image_says_that_it_needs_two() -> None:
    with pytest.raises(DataError, match="needs at least 2"):
        Segmenter(**TINY).fit([photo(80, 70)], **QUIET)


def test_fit_without_a_folder_keeps_nothing_on_disk(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {*tmp_path.rglob("*")}
    Segmenter(**TINY).fit(photos, **QUIET)
    assert {*tmp_path.rglob("*")} == before


def test_fit_takes_paths_and_lists_those_it_cannot_read_by_them(
    photos: Path, tmp_path: Path
) -> None:
    (photos / "3.png").write_text("no image")
    paths = sorted(map(str, photos.iterdir()))
    run = tmp_path / "run"
    Segmenter(**TINY).fit(paths, run, max_unreadable=0.5, **QUIET)
    assert (run / "skipped.csv").read_text().splitlines()[1].startswith(f"{photos / '3.png'},")
    with pytest.raises(DataError, match="1 of 4 images cannot be read"):
        Segmenter(**TINY).fit(paths, **QUIET)


def test_a_second_fit_forgets_the_names_of_the_first(photos: Path) -> None:
    trained = Segmenter(**TINY).fit(photos, **QUIET)
    trained.rename({0: "sky"})
    assert trained.labels.names[0] == "sky"
    assert trained.fit(photos, **QUIET).labels.names[0] == "cluster 0"


def test_a_run_that_was_interrupted_goes_on_in_its_folder(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Segmenter(**TINY).fit(photos, tmp_path / "whole", **QUIET)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("iddc.learning.log.StepLog.write", stopped)
        with pytest.raises(KeyboardInterrupt):
            Segmenter(**TINY).fit(photos, tmp_path / "run", checkpoint_every=1, **QUIET)
    resumed = Segmenter(**TINY).fit(photos, tmp_path / "run", **QUIET)
    assert (resumed.predict(photo(9, 9)).clusters == whole.predict(photo(9, 9)).clusters).all()
    with pytest.raises(ConfigError, match="holds a finished run"):
        resumed.fit(photos, tmp_path / "run", **QUIET)


def test_progress_and_the_backbone_that_auto_became_are_told_on_stderr(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("iddc.segmenter.resolve", lambda _: "untrained:test_vit")
    trained = Segmenter(**TINY | {"backbone": "auto"})
    trained.fit(photos, device="cpu", workers=0)
    assert trained.experiment.backbone == "untrained:test_vit"
    error = capsys.readouterr().err
    assert "backbone auto: untrained:test_vit" in error
    assert "100%" in error
    trained.fit(photos, **QUIET)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"worker": 1}, "fit: unknown option worker; perhaps you meant workers"),
    ],
)
def test_fit_refuses_wrong_options_before_it_reads_or_writes(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        Segmenter(**TINY).fit(tmp_path / "missing", tmp_path / "run", **options)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (
            "Try --training.precision fp32 or a lower --training.learning-rate, with --overwrite.",
            "Try training.precision fp32 or a lower training.learning_rate, with another `out`.",
        ),
        ("a lower --consensus.learning-rate", "a lower options.learning_rate"),
        ("give --nodata 0 or --micro-batch-size 2", "give reading.nodata 0 or micro_batch_size 2"),
        ("set training.precision to fp32 in a --config.", "set training.precision to fp32."),
        ("`iddc label RUN --set 3=CLASS`", "`iddc label RUN --set 3=CLASS`"),
    ],
)
def test_errors_name_keywords_of_python(options: str, keywords: str) -> None:
    assert in_python(options) == keywords


def test_a_fit_that_fails_names_keywords_of_python(photos: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (photos / name).write_bytes(b"no image")
    segmenter = Segmenter(2, backbone="untrained:test_vit")
    with pytest.raises(DataError, match=r"allowed by max_unreadable: "):
        segmenter.fit(photos, tmp_path / "run", progress=False, max_unreadable=0.1)
