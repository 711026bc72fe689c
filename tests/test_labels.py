"""Names of clusters: edited, undone, kept, refused, used by segmenter, evaluation and label."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from iddc.backbones import untrained_backbone
from iddc.cli import COMMANDS, main
from iddc.cli.label import Label
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.datasets import Sample
from iddc.errors import ConfigError, DataError
from iddc.evaluation import SEEN, EvalProtocol, evaluate, match_by_name
from iddc.masks import LABELS, Labels, edit_labels, palette, read_labels, write_labels
from iddc.masks.labels import MAX_HISTORY, MAX_NAME
from iddc.metrics import UNMATCHED
from iddc.network import Network
from iddc.segmenter import Segmenter

K = 4
NAMES = st.sampled_from(["sky", "road", "ignore", "", "cluster 1"])
EDITS = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, K - 1), NAMES, max_size=3),
        st.dictionaries(st.integers(0, K - 1), st.sampled_from(["", "#87ceeb", "#FF0000"])),
    ),
    max_size=5,
)


def some_labels() -> Labels:
    """Clusters 0 and 2 are sky, 1 is ignored, 3 has no name."""
    return Labels.numbered(K).edit({0: "sky", 2: "sky", 1: "ignore"})


# Names, classes, colours --------------------------------------------------------------------------


def test_before_anybody_names_them_every_cluster_is_a_class_of_its_own() -> None:
    labels = Labels.numbered(3)
    assert labels.names == labels.classes.names == ("cluster 0", "cluster 1", "cluster 2")
    assert labels.classes.of_cluster.tolist() == [0, 1, 2]
    assert (labels.classes.colours == palette(3)).all()
    assert (labels.cluster_colours == palette(3)).all()


def test_clusters_of_one_name_are_one_class_in_the_order_of_the_lowest() -> None:
    labels = Labels.numbered(5).edit({4: "road", 0: "sky", 3: "sky", 2: "ignore"})
    assert labels.names == ("sky", "cluster 1", "ignore", "sky", "road")
    classes = labels.classes
    assert classes.names == ("sky", "cluster 1", "road")
    assert classes.of_cluster.tolist() == [0, 1, 255, 0, 2]
    assert (classes.colours == palette(5)[[0, 1, 4]]).all()
    assert (labels.cluster_colours == [*palette(5)[:2], [0, 0, 0], *palette(5)[[0, 4]]]).all()


@pytest.mark.parametrize(
    ("clusters", "ignored", "dtype"),
    [(256, 0, np.uint8), (256, 1, np.uint8), (257, 1, np.uint16), (300, 0, np.uint16)],
)
def test_classes_take_8_bits_as_long_as_the_ignored_value_is_free(
    clusters: int, ignored: int, dtype: type
) -> None:
    labels = Labels.numbered(clusters).edit(dict.fromkeys(range(ignored), "ignore"))
    of_cluster = labels.classes.of_cluster
    assert of_cluster.dtype == dtype
    assert (of_cluster[:ignored] == np.iinfo(dtype).max).all()
    assert of_cluster[ignored:].tolist() == list(range(clusters - ignored))


def test_a_name_may_be_that_of_a_cluster_without_name_and_joins_it() -> None:
    assert Labels.numbered(3).edit({2: "cluster 0"}).classes.of_cluster.tolist() == [0, 1, 0]


def test_an_empty_name_gives_a_cluster_its_number_back() -> None:
    assert some_labels().edit({0: " ", 1: ""}).names == (
        "cluster 0",
        "cluster 1",
        "sky",
        "cluster 3",
    )


def test_a_colour_is_that_of_the_whole_class_until_it_is_taken_back() -> None:
    labels = some_labels().edit(colours={2: "#87CEEB"})
    assert labels.classes.colours[0].tolist() == [0x87, 0xCE, 0xEB]
    assert labels.edit({2: ""}).cluster_colours[[0, 2]].tolist() == [[0x87, 0xCE, 0xEB]] * 2
    assert (labels.edit(colours={0: ""}).classes.colours == palette(K)[[0, 3]]).all()


def test_a_class_that_is_merged_keeps_the_colour_that_somebody_chose() -> None:
    labels = Labels.numbered(K).edit(colours={3: "#010203"}).edit({1: "sea", 3: "sea"})
    assert labels.classes.colours[1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    ["a\nb", "\x1b[31mred", "a\x00", "x" * (MAX_NAME + 1), "\u202egnp", "\ud800", "a\u2028b"],
    ids=["newline", "escape", "nul", "huge", "right to left", "surrogate", "line separator"],
)
def test_names_that_are_no_line_of_text_are_refused_without_being_printed_raw(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 100 printable characters") as caught:
        Labels.numbered(K).edit({0: name})
    assert name not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name",
    ['"', "'; DROP TABLE", "<script>alert(1)</script>", "../../etc/passwd", "a=b", "空 é", "-"],
)
def test_any_other_name_is_kept_letter_by_letter(name: str, tmp_path: Path) -> None:
    write_labels(tmp_path, Labels.numbered(K).edit({0: name}))
    assert read_labels(tmp_path, K).names[0] == name


def test_two_spellings_of_one_letter_are_one_name() -> None:
    assert len(Labels.numbered(2).edit({0: "e\u0301", 1: "\u00e9"}).classes.names) == 1


@pytest.mark.parametrize(
    ("names", "colours", "sentence"),
    [
        ({4: "sky"}, {}, "No cluster 4: this model has the clusters 0 to 3"),
        ({}, {-1: "#000000"}, "No cluster -1"),
        ({}, {0: "blue"}, "a colour looks like #87ceeb, found 'blue'"),
        ({}, {0: "#12345"}, "found '#12345'"),
        (dict.fromkeys(range(4), "ignore"), {}, "no class is left"),
    ],
)
def test_a_wrong_edit_is_a_sentence(
    names: dict[int, str], colours: dict[int, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Labels.numbered(4).edit(names, colours)


# Undo ---------------------------------------------------------------------------------------------


@given(EDITS)
def test_undo_goes_back_through_every_state(
    edits: list[tuple[dict[int, str], dict[int, str]]],
) -> None:
    states = [Labels.numbered(K)]
    for names, colours in edits:
        try:
            after = states[-1].edit(names, colours)
        except ConfigError:  # every cluster would be ignored
            continue
        if after == states[-1]:  # an edit that changes nothing is none to undo
            continue
        states.append(after)
    labels = Labels.model_validate_json(states[-1].model_dump_json())
    for state in reversed(states):
        assert labels == state
        if state is not states[0]:
            labels = labels.undo()
    with pytest.raises(ConfigError, match="no edit of the labels to undo"):
        labels.undo()


def test_the_last_hundred_edits_are_kept() -> None:
    labels = Labels.numbered(K)
    for index in range(MAX_HISTORY + 5):
        labels = labels.edit({0: f"name {index}"})
    assert len(labels.history) == MAX_HISTORY
    for _ in range(MAX_HISTORY):
        labels = labels.undo()
    assert labels.names[0] == "name 4"


# The file -----------------------------------------------------------------------------------------


def test_without_a_file_clusters_have_numbers(tmp_path: Path) -> None:
    assert read_labels(tmp_path, K) == Labels.numbered(K)


def test_the_file_names_every_cluster_as_transformers_does(tmp_path: Path) -> None:
    write_labels(tmp_path, some_labels())
    record = json.loads((tmp_path / LABELS).read_text())
    assert record["id2label"] == {"0": "sky", "1": "ignore", "2": "sky", "3": "cluster 3"}
    assert record["format_version"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "Repair it"),
        ('{"format_version": 99, "id2label": {}}', "format 99.*newer iddc"),
        ('{"id2label": {"0": "a", "1": "b"}}', "names 2 clusters, but the model has 4"),
        ('{"id2label": {"0": "a", "2": "b"}}', "must name every cluster"),
        ('{"id2label": {"0": "a\\nb", "1": "", "2": "", "3": ""}}', "printable"),
        ('{"id2label": {"0": "a"}, "surprise": 1}', "surprise"),
        ('{"id2label": {"0": "a"}, "colours": {"7": "#000000"}}', "belongs to no cluster"),
        (
            '{"id2label": {"0": "a"}, "history": [{"id2label": {"9": "b"}}]}',
            "belongs to no cluster",
        ),
    ],
)
def test_a_file_that_is_not_ours_is_a_data_error(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / LABELS).write_text(text)
    with pytest.raises(DataError, match=rf"labels\.json.*{sentence}"):
        read_labels(tmp_path, K)


def test_a_file_of_names_is_not_read_without_end(tmp_path: Path) -> None:
    with (tmp_path / LABELS).open("wb") as file:
        file.truncate(60_000_000)
    with pytest.raises(DataError, match="too large"):
        read_labels(tmp_path, K)


def test_an_edit_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    edit_labels(tmp_path, K, lambda labels: labels.edit({0: "sky"}))
    before = (tmp_path / LABELS).read_bytes()
    with pytest.raises(ConfigError):
        edit_labels(tmp_path, K, lambda labels: labels.edit({9: "sky"}))
    assert (tmp_path / LABELS).read_bytes() == before


def test_an_edit_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    edit_labels(tmp_path, K, lambda labels: labels.edit({0: "cluster 0"}))
    assert not (tmp_path / LABELS).exists()


def test_of_edits_at_the_same_time_none_is_lost(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for index in range(16):
            change = {index: f"name {index}"}
            pool.submit(edit_labels, tmp_path, 16, lambda labels, c=change: labels.edit(c))
    assert read_labels(tmp_path, 16).names == tuple(f"name {index}" for index in range(16))


# The segmenter ------------------------------------------------------------------------------------


class Red:
    """The cluster of a pixel is its red value."""

    num_clusters = K

    def probs(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(images[:, 0].long(), K).permute(0, 3, 1, 2).float()


def experiment() -> Experiment:
    return Experiment(
        num_clusters=K,
        views=ViewsConfig(short_side=48),
        prediction=PredictionConfig(window=0, flip=False),
        training=TrainingConfig(precision="fp32"),
    )


def reds(ids: list[list[int]]) -> Image.Image:
    red = np.array(ids, np.uint8)
    return Image.fromarray(np.stack([red, red, red], axis=2))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a model of K clusters."""
    torch.manual_seed(0)
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = untrained_backbone("vit_tiny_patch16_224", options=options)
    Segmenter.of(Network(backbone, "linear", K), experiment()).save(tmp_path / "run")
    return tmp_path / "run"


def test_a_renamed_segmenter_gives_classes_and_keeps_clusters() -> None:
    segmenter = Segmenter.of(Red(), experiment())
    segmenter.rename({0: "sky", 2: "sky", 1: "ignore"})
    result = segmenter.predict(reds([[0, 1], [2, 3]]))
    assert result.clusters.tolist() == [[0, 1], [2, 3]]
    assert result.names == ("sky", "ignore", "sky", "cluster 3")
    assert result.classes.tolist() == [[0, 255], [0, 1]]
    shown = np.asarray(result.overlay(opacity=1.0))
    assert shown[0, 0].tolist() == shown[1, 0].tolist() == palette(K)[0].tolist()
    assert shown[0, 1].tolist() == [1, 1, 1]


def test_names_are_saved_and_loaded_with_the_model(run: Path) -> None:
    segmenter = Segmenter.load(run, device="cpu")
    segmenter.rename({3: "sky"})
    segmenter.save(run)
    loaded = Segmenter.load(run, device="cpu")
    assert loaded.labels == segmenter.labels
    assert loaded.labels.names[3] == "sky"


def test_saving_a_model_without_names_takes_those_of_an_earlier_one_away(run: Path) -> None:
    write_labels(run, some_labels())
    named = Segmenter.load(run, device="cpu")
    Segmenter.of(named.network, named.experiment).save(run)
    assert sorted(path.name for path in run.iterdir()) == ["model.json", "model.safetensors"]


# Scores by name -----------------------------------------------------------------------------------


@dataclass
class Scene:
    """One labelled image of three classes."""

    name = "scene"
    num_classes = 3
    class_names = ("sky", "road", "sea")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> Sample:
        label = np.array([[0, 0, 0, 1], [0, 1, 1, 255]], np.uint8)
        return Sample(reds([[0, 0, 2, 3], [1, 1, 3, 3]]), label, "scene.png")


AS_IS = EvalProtocol(PredictionConfig(window=0, flip=False))


def test_clusters_are_scored_as_the_classes_that_they_are_named_after(tmp_path: Path) -> None:
    segmenter = Segmenter.of(Red(), experiment())
    segmenter.rename({0: "sky", 2: "sky", 1: "ignore", 3: "road"})
    result = evaluate(segmenter, Scene(), AS_IS, by_name=True, save_masks=tmp_path)
    # Of 7 labelled pixels, sky is right at 3 of 4, road at 2 of 3, and ignored ones are wrong.
    assert result.by_name is not None
    assert result.by_name.matching == (0, UNMATCHED, 0, 1)
    assert result.by_name.accuracy == 5 / 7
    assert result.by_name.iou == (3 / 4, 2 / 3, None)
    assert result.by_name.miou == (3 / 4 + 2 / 3) / 2
    with Image.open(tmp_path / "scene.png") as panel:
        assert (np.asarray(panel)[0, 8:11] == palette(3)[0]).all()  # one colour for merged ones


def test_scores_by_name_stand_beside_the_others_and_say_that_somebody_looked() -> None:
    segmenter = Segmenter.of(Red(), experiment())
    plain = evaluate(segmenter, Scene(), AS_IS)
    segmenter.rename({0: "sky", 2: "sky", 3: "road"})
    both = evaluate(segmenter, Scene(), AS_IS, by_name=True)
    assert both.scores == plain.scores
    record = both.as_dict()
    assert {**record, "by_name": None} == {**plain.as_dict(), "by_name": None}
    assert record["by_name"]["note"] == SEEN
    assert "person" in SEEN
    assert record["by_name"]["matching"] == ["sky", None, "sky", "road"]


def test_where_no_name_is_that_of_a_class_there_is_nothing_to_score() -> None:
    with pytest.raises(DataError, match=r"No cluster.*Clusters: cluster 0.*Classes: Sky, ignore"):
        match_by_name(some_labels().edit({0: "", 2: ""}), ("Sky", "ignore"))


# iddc label ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "label", Label)


def test_label_names_merges_and_ignores_from_the_command_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", str(run), "--set", "3=sky", "0=sky", "1=ignore"]) == 0
    assert "2 classes of 4 clusters, 1 ignored" in capsys.readouterr().out
    assert read_labels(run, K).names == ("sky", "ignore", "cluster 2", "sky")
    assert main(["label", str(run), "--colour", "0=#010203", "--set", "2=a=b c"]) == 0
    capsys.readouterr()
    assert main(["label", str(run), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["0", "sky", "#010203"],
        ["1", "ignore", "#000000"],
        ["2", "a=b", "c", f"#{bytes(palette(K)[2]).hex()}"],
        ["3", "sky", "#010203"],
    ]


def test_label_undoes_and_prints_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", str(run), "--set", "3=sky"]) == 0
    assert main(["label", str(run), "--set", "3=sea"]) == 0
    capsys.readouterr()
    assert main(["label", str(run), "--undo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id2label"]["3"] == "sky"
    assert main(["label", str(run), "--undo"]) == 0
    assert main(["label", str(run), "--undo"]) == 2
    assert "no edit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--set", "sky"], 2, "expected words such as 3=sky, found 'sky'"),
        (["--set", "-1=sky"], 2, "--set"),
        (["--set", "4=sky"], 2, "No cluster 4"),
        (["--set", "1=a", "01=b"], 2, "cluster 1 is given twice"),
        (["--colour", "1=blue"], 2, "a colour looks like"),
        (["--undo", "--set", "1=a"], 2, "--undo"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_changes_nothing(
    options: list[str], code: int, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", str(run), *options]) == code
    assert sentence in capsys.readouterr().err
    assert not (run / LABELS).exists()


@pytest.mark.parametrize("clusters", [10**12, 0, "4", None])
def test_a_model_that_does_not_say_how_many_clusters_it_has_is_exit_3(
    clusters: object, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "model.json").read_text())
    record["network"]["num_clusters"] = clusters
    (run / "model.json").write_text(json.dumps(record))
    assert main(["label", str(run)]) == 3
    (run / "model.json").write_text("{")
    assert main(["label", str(run)]) == 3
    assert capsys.readouterr().err.count("does not say how many clusters") == 2


def test_label_needs_a_finished_run(tmp_path: Path) -> None:
    assert main(["label", str(tmp_path), "--set", "1=a"]) == 3
    assert list(tmp_path.iterdir()) == []


def test_evaluation_by_name_is_printed_and_kept_beside_the_score_by_matching(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    reds([[9, 90] * 16] * 32).save(tmp_path / "data/images/a.png")
    Image.new("L", (32, 32), 1).save(tmp_path / "data/labels/a.png")
    (tmp_path / "data/classes.txt").write_text("up\ndown\n")
    argv = ["evaluate", str(run), "--data", str(tmp_path / "data"), "--matching", "names"]
    assert main(argv) == 3
    assert "No cluster has the name of a class" in capsys.readouterr().err
    assert main(["label", str(run), "--set", "0=down", "1=down", "2=down", "3=down"]) == 0
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert SEEN in output
    assert "by name" in output.splitlines()[1]
    (entry,) = json.loads((run / "scores.json").read_text())["scores"]
    assert entry["by_name"]["accuracy"] == 1
    assert entry["accuracy"] <= 1
    assert entry["by_name"]["note"] == SEEN
