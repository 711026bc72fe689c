"""The published data sets: what their ids mean, which images they have, and where they are found.

The tables are stated here once more, in the form in which the field writes them.
"""

from __future__ import annotations

import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from torch import Tensor

from iddc.config import DatasetName, Experiment, TrainingConfig
from iddc.datasets import DATASETS, LabelledImages, Sample, open_dataset, potsdam, train_images
from iddc.datasets.cocostuff import read_list
from iddc.datasets.fake import write_fake
from iddc.datasets.published import FAKE, Published
from iddc.errors import ConfigError, DataError, UnreadableImage
from iddc.evaluation import PROTOCOLS, evaluate
from iddc.images import check_images, find_images, open_image
from iddc.metrics import IGNORE
from iddc.segmenter import Segmenter

PUBLISHED: list[DatasetName] = ["cityscapes", "cocostuff27", "cocostuff171", "potsdam3"]

CITYSCAPES = """
0 unlabeled, 1 ego vehicle, 2 rectification border, 3 out of roi, 4 static, 5 dynamic, 6 ground,
7 road, 8 sidewalk, 9 parking, 10 rail track, 11 building, 12 wall, 13 fence, 14 guard rail,
15 bridge, 16 tunnel, 17 pole, 18 polegroup, 19 traffic light, 20 traffic sign, 21 vegetation,
22 terrain, 23 sky, 24 person, 25 rider, 26 car, 27 truck, 28 bus, 29 caravan, 30 trailer, 31 train,
32 motorcycle, 33 bicycle
"""
THINGS = """
0-0:9 1-8:11 9-14:8 15-24:7 25-32:6 33-42:10 43-50:5 51-60:2 61-70:3 71-76:0 77-82:1 83-90:4
"""
STUFF = """
91:17 92:17 93:22 94:20 95:20 96:22 97:15 98:25 99:16 100:13 101:12 102:12 103:17 104:17 105:23
106:15 107:15 108:17 109:15 110:21 111:15 112:25 113:13 114:13 115:13 116:13 117:13 118:22 119:26
120:14 121:14 122:15 123:22 124:21 125:21 126:24 127:20 128:22 129:15 130:17 131:16 132:15 133:22
134:24 135:21 136:17 137:25 138:16 139:21 140:17 141:22 142:16 143:21 144:21 145:25 146:21 147:26
148:21 149:24 150:20 151:17 152:14 153:21 154:26 155:15 156:23 157:20 158:21 159:24 160:15 161:24
162:22 163:25 164:15 165:20 166:17 167:17 168:22 169:14 170:18 171:18 172:18 173:18 174:18 175:18
176:18 177:26 178:26 179:19 180:19 181:24
"""
NAMES_27 = """
electronic, appliance, food, furniture, indoor, kitchen, accessory, animal, outdoor, person, sports,
vehicle, ceiling, floor, food-stuff, furniture-stuff, rawmaterial, textile, wall, window, building,
ground, plant, sky, solid, structural, water
"""
ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def expected_classes(name: DatasetName) -> dict[int, int]:
    """The class of each id, IGNORE included."""
    if name == "cityscapes":
        return {i: i - 7 if i >= 7 else IGNORE for i in range(34)} | {255: IGNORE}
    if name == "potsdam3":
        return {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2, 255: IGNORE}
    if name == "cocostuff171":
        present = [i for i in range(182) if i not in ABSENT]
        return {i: present.index(i) for i in present} | {255: IGNORE}
    found = {255: IGNORE}
    for first, last, coarse in re.findall(r"(\d+)-(\d+):(\d+)", THINGS):
        found |= dict.fromkeys(range(int(first), int(last) + 1), int(coarse))
    return found | {int(i): int(coarse) for i, coarse in re.findall(r"(\d+):(\d+)", STUFF)}


def published(name: DatasetName) -> Published:
    dataset = DATASETS[name]
    assert isinstance(dataset, Published)
    return dataset


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fake copy of each, not to be changed."""
    root = tmp_path_factory.mktemp("fakes")
    for name in PUBLISHED:
        write_fake(name, root / name, count=3)
    return root


@pytest.fixture
def copy(fakes: Path, tmp_path: Path) -> Callable[[DatasetName], Path]:
    """A fake copy to change."""

    def copied(name: DatasetName) -> Path:
        return Path(shutil.copytree(fakes / name, tmp_path / name))

    return copied


def first_label(root: Path, name: DatasetName) -> Path:
    """The label of the first sample of val."""
    dataset = open_dataset(name, root, "val")
    pattern = {"cityscapes": "gtFine/val/**/*.png", "potsdam3": "gt/1.mat"}
    stem = Path(dataset[0].name).stem.removesuffix("_leftImg8bit")
    (found,) = [
        path
        for path in root.glob(pattern.get(name, "annotations/val2017/*.png"))
        if path.name.startswith(stem)
    ]
    return found


def write_label(path: Path, ids: np.ndarray) -> None:
    if path.suffix == ".mat":
        savemat(path, {"gt": ids.astype(np.int32)})
    else:
        Image.fromarray(ids.astype(np.uint8)).save(path)


def read_label(path: Path) -> np.ndarray:
    if path.suffix == ".mat":
        return loadmat(path)["gt"]
    with Image.open(path) as image:
        return np.array(image)


# What ids mean, and how many images there are


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_id_of_a_label_becomes_the_class_that_the_field_gives_it(
    name: DatasetName, copy: Callable[[DatasetName], Path]
) -> None:
    expected, path = expected_classes(name), first_label(root := copy(name), name)
    ids = read_label(path)
    known = sorted(expected)
    ids.flat[: len(known)] = known
    write_label(path, ids)
    found = open_dataset(name, root, "val")[0].label
    assert [int(value) for value in found.flat[: len(known)]] == [expected[i] for i in known]


@pytest.mark.parametrize(
    ("name", "last"), [("cityscapes", 33), ("cocostuff171", 181), ("potsdam3", 5)]
)
def test_any_id_outside_the_table_is_an_error_that_names_the_file_and_the_ids(
    name: DatasetName, last: int, copy: Callable[[DatasetName], Path]
) -> None:
    path = first_label(root := copy(name), name)
    write_label(path, np.full(read_label(path).shape, last + 1))
    with pytest.raises(
        DataError, match=rf"{re.escape(str(path))}: .*; found {last + 1}\."
    ) as found:
        open_dataset(name, root, "val")[0]
    assert f"-{last}, 255" in str(found.value)
    assert found.value.exit_code == 3


def test_an_id_that_no_image_of_coco_has_is_outside_the_171_but_not_the_27(
    copy: Callable[[DatasetName], Path],
) -> None:
    root = copy("cocostuff27")
    for path in root.glob("annotations/val2017/*.png"):
        write_label(path, np.full(read_label(path).shape, 11))
    assert np.unique(open_dataset("cocostuff27", root, "val")[0].label).tolist() == [8]  # outdoor
    with pytest.raises(DataError, match=r"are 0-10, 12-24, 26-27, .*-181, 255; found 11\."):
        open_dataset("cocostuff171", root, "val")[0]


def test_a_negative_id_is_outside_the_table(copy: Callable[[DatasetName], Path]) -> None:
    path = first_label(root := copy("potsdam3"), "potsdam3")
    write_label(path, np.full((200, 200), -1))
    with pytest.raises(DataError, match="the ids of Potsdam-3 are 0-5, 255; found"):
        open_dataset("potsdam3", root, "val")[0]


def test_cityscapes_calls_its_classes_as_its_labels_are_called() -> None:
    ids = dict(entry.strip().split(" ", 1) for entry in CITYSCAPES.replace("\n", " ").split(","))
    assert published("cityscapes").class_names == tuple(ids[str(i)] for i in range(7, 34))


def test_coco_stuff_27_has_the_names_of_the_field() -> None:
    expected = tuple(name.strip() for name in NAMES_27.split(","))
    assert published("cocostuff27").class_names == expected


def test_coco_stuff_171_has_80_things_before_91_stuff() -> None:
    names = published("cocostuff171").class_names
    assert len(set(names)) == 171
    assert (names[0], names[79], names[80], names[170]) == (
        "person",
        "toothbrush",
        "banner",
        "wood",
    )
    assert list(names[80:]) == sorted(names[80:])  # as COCO-Stuff orders its stuff
    assert not {"street sign", "hat", "shoe", "eye glasses", "plate", "mirror"} & set(names)
    assert not {"window", "desk", "door", "blender", "hair brush"} & set(names)


@pytest.mark.parametrize(
    ("name", "train", "val", "classes"),
    [
        ("cityscapes", 2975, 500, 27),
        ("cocostuff27", 49629, 2175, 27),
        ("cocostuff171", 118287, 5000, 171),  # the paper's 117,266 and 1,021 without an object
        ("potsdam3", 15 * 15 * 24 - 855, 855, 3),
    ],
)
def test_a_data_set_has_its_published_size(
    name: DatasetName, train: int, val: int, classes: int
) -> None:
    dataset = published(name)
    assert dict(dataset.counts) == {"train": train, "val": val}
    assert len(dataset.class_names) == classes
    scored = set(dataset.classes.values()) - {IGNORE}
    assert scored == set(range(classes))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_lists_of_coco_stuff_27_are_whole(split: str) -> None:
    names = read_list(Path(), split)
    assert len(names) == len(set(names)) == published("cocostuff27").counts[split]
    assert all(re.fullmatch(r"\d{12}", name) for name in names)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_lists_of_coco_stuff_27_are_those_of_the_field(split: str, shared_data: Path) -> None:
    given = (shared_data / "lists" / f"cocostuff27_{split}.txt").read_text().split()
    assert read_list(Path(), split) == given


# Where they are found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cityscapes",
            [
                "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
                "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
                "leftImg8bit/val/lindau/lindau_000001_000019_leftImg8bit.png",
            ],
        ),
        (
            "cocostuff27",
            [
                "images/train2017/000000000025.jpg",
                "annotations/train2017/000000000025.png",
                "images/val2017/000000000724.jpg",
            ],
        ),
        ("potsdam3", ["imgs/0.mat", "gt/0.mat", "labelled_train.txt", "labelled_test.txt"]),
    ],
)
def test_a_fake_copy_has_the_true_names(
    name: DatasetName, expected: list[str], fakes: Path
) -> None:
    assert [path for path in expected if not (fakes / name / path).is_file()] == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_fake_copy_is_read_as_the_data_set(name: DatasetName, split: str, fakes: Path) -> None:
    dataset: LabelledImages = open_dataset(name, fakes / name, split)
    assert dataset.name == name
    assert dataset.num_classes == len(dataset.class_names)
    assert len(dataset) == (4 if name == "cocostuff171" else 3)
    for sample in (dataset[index] for index in range(len(dataset))):
        assert sample.image.mode == "RGB"
        assert sample.label.shape == (sample.image.height, sample.image.width)
        scored = set(np.unique(sample.label).tolist())
        assert IGNORE in scored
        assert len(scored) >= 3


def test_a_fake_folder_is_a_folder_data_set(tmp_path: Path) -> None:
    write_fake("folder", tmp_path, count=2)
    assert len(open_dataset("folder", tmp_path, "val")) == 2
    assert len(train_images("folder", tmp_path)) == 8


@pytest.mark.parametrize(
    ("name", "sky", "road"),
    [
        ("cityscapes", "sky", "road"),
        ("cocostuff27", "sky", "ground"),
        ("cocostuff171", "sky-other", "road"),
        ("potsdam3", "buildings and clutter", "roads and cars"),
    ],
)
def test_the_labels_of_a_fake_copy_show_the_sky_above_the_road(
    name: DatasetName, sky: str, road: str, fakes: Path
) -> None:
    dataset = open_dataset(name, fakes / name, "val")
    labels = np.stack([dataset[index].label for index in range(3)])
    rows = np.indices(labels.shape)[1]
    above, below = (rows[labels == dataset.class_names.index(c)].mean() for c in (sky, road))
    assert above < labels.shape[1] / 2 < below


def in_zips(name: DatasetName, root: Path) -> None:
    """Pack a fake copy as the data set is distributed, and remove the folders."""
    packs = {
        "cityscapes": {
            "leftImg8bit_trainvaltest.zip": {"leftImg8bit": "leftImg8bit"},
            "gtFine_trainvaltest.zip": {"gtFine": "gtFine"},
        },
        "cocostuff27": {
            "train2017.zip": {"images/train2017": "train2017"},
            "val2017.zip": {"images/val2017": "val2017"},
            "stuffthingmaps_trainval2017.zip": {"annotations": ""},
        },
    }
    for archive, folders in packs[name].items():
        with zipfile.ZipFile(root / archive, "w") as opened:
            opened.writestr("README", "")
            for folder, inside in folders.items():
                for path in sorted((root / folder).rglob("*")):  # with entries of folders
                    opened.write(path, Path(inside, path.relative_to(root / folder)).as_posix())
    for folder in ("leftImg8bit", "gtFine", "images", "annotations"):
        shutil.rmtree(root / folder, ignore_errors=True)


def assert_same_data(name: DatasetName, one: Path, other: Path) -> None:
    for split in ("train", "val"):
        first, second = (open_dataset(name, root, split) for root in (one, other))
        assert len(first) == len(second) > 0
        for index in range(len(first)):
            a, b = first[index], second[index]
            assert a.name == b.name
            assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
            assert np.array_equal(a.label, b.label)
    firsts, seconds = (train_images(name, root) for root in (one, other))
    assert [file.name for file in firsts] == [file.name for file in seconds]
    assert [file.read_bytes() for file in firsts] == [file.read_bytes() for file in seconds]


@pytest.mark.parametrize("name", ["cityscapes", "cocostuff27"])
def test_zips_as_downloaded_give_the_same_data(
    name: DatasetName, fakes: Path, copy: Callable[[DatasetName], Path]
) -> None:
    in_zips(name, root := copy(name))
    assert not [path for path in root.iterdir() if path.is_dir()]
    assert_same_data(name, fakes / name, root)


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("cityscapes", {"leftImg8bit": "leftImg8bit_trainvaltest/leftImg8bit"}),
        ("cityscapes", {"gtFine": "gtFine_trainvaltest/gtFine"}),
        ("cocostuff27", {"images/train2017": "train2017", "images/val2017": "val2017"}),
        ("cocostuff27", {"annotations": "stuffthingmaps"}),
        ("cocostuff27", {"annotations": "stuffthingmaps_trainval2017"}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(value.values()),
)
def test_every_usual_way_to_unpack_gives_the_same_data(
    name: DatasetName,
    moves: dict[str, str],
    fakes: Path,
    copy: Callable[[DatasetName], Path],
) -> None:
    root = copy(name)
    for old, new in moves.items():
        (root / new).parent.mkdir(exist_ok=True)
        (root / old).rename(root / new)
    assert_same_data(name, fakes / name, root)


@pytest.mark.parametrize("name", ["cityscapes", "cocostuff27"])
def test_what_other_tools_leave_beside_the_files_is_not_read(
    name: DatasetName, fakes: Path, copy: Callable[[DatasetName], Path]
) -> None:
    root = copy(name)
    for path in [path for path in root.rglob("*.*") if path.is_file() and path.name != FAKE]:
        hidden = path.with_name(f"._{path.name}")
        hidden.write_bytes(b"")
        stem = path.name.removesuffix("_labelIds.png").removesuffix(".png")
        path.with_name(f"{stem}_labelTrainIds.png").write_bytes(b"")
        path.with_name(f"{stem}_color.png").write_bytes(b"")
        path.with_name("index.html").write_bytes(b"")
    assert_same_data(name, fakes / name, root)


def test_a_city_that_is_a_link_is_read(
    fakes: Path, copy: Callable[[DatasetName], Path], tmp_path: Path
) -> None:
    root = copy("cityscapes")
    (root / "leftImg8bit/train/aachen").rename(tmp_path / "elsewhere")
    (root / "leftImg8bit/train/aachen").symlink_to(tmp_path / "elsewhere")
    assert_same_data("cityscapes", fakes / "cityscapes", root)


# What is trained on


def test_training_takes_the_train_split_and_nothing_else(fakes: Path) -> None:
    names = {
        name: [str(file.name) for file in train_images(name, fakes / name)] for name in PUBLISHED
    }
    assert names == {
        "cityscapes": [
            "aachen/aachen_000000_000019_leftImg8bit.png",
            "aachen/aachen_000002_000019_leftImg8bit.png",
            "bochum/bochum_000001_000019_leftImg8bit.png",
        ],
        "cocostuff27": ["000000000025.jpg", "000000000030.jpg", "000000000042.jpg"],
        "cocostuff171": [
            "000000000025.jpg",
            "000000000026.jpg",
            "000000000030.jpg",
            "000000000042.jpg",
        ],
        "potsdam3": ["0.mat", "2.mat", "4.mat"],
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_to_train_on_are_found_and_opened_without_labels(
    name: DatasetName, copy: Callable[[DatasetName], Path]
) -> None:
    root = copy(name)
    for folder in ("gtFine", "annotations", "gt"):
        shutil.rmtree(root / folder, ignore_errors=True)
    files = train_images(name, root)
    assert check_images(files, max_unreadable=0.0) == (list(files), [])
    assert open_image(files[0]).mode == "RGB"
    assert pickle.loads(pickle.dumps(files)) == files  # for the processes that decode


def test_a_folder_is_trained_on_its_train_images_or_on_all(tmp_path: Path) -> None:
    for path in ("train/images/a.png", "train/labels/a.png", "val/images/b.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    assert [str(file.name) for file in train_images("folder", tmp_path)] == ["a.png"]
    assert train_images("folder", tmp_path / "val") == find_images(tmp_path / "val").files


def test_a_tile_is_read_in_red_green_and_blue(fakes: Path) -> None:
    tile = train_images("potsdam3", fakes / "potsdam3")[0]
    stored = loadmat(fakes / "potsdam3/imgs/0.mat")["img"]
    assert stored.shape == (200, 200, 4)
    assert np.array_equal(np.asarray(open_image(tile)), stored[..., :3])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (1, 1)])
def test_arrays_of_a_matlab_file_are_those_that_scipy_wrote(
    shape: tuple[int, ...], kind: str, packed: bool, tmp_path: Path
) -> None:
    array = (np.arange(np.prod(shape)).reshape(shape) * 3).astype(kind)
    arrays = {"a_longer_name": {"x": np.ones(3), "y": ["a", [1]]}, "text": "of no use", "gt": array}
    savemat(tmp_path / "a.mat", arrays, do_compression=packed)
    found = potsdam.read_matlab((tmp_path / "a.mat").read_bytes(), "gt")
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_a_matlab_file_of_a_machine_with_the_other_byte_order_is_read(tmp_path: Path) -> None:
    def element(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    values = np.array([[1, 258], [-3, 4]], ">i2")
    parts = [(6, struct.pack(">II", 10, 0)), (5, struct.pack(">ii", 2, 2)), (1, b"gt")]
    matrix = b"".join(element(*part) for part in [*parts, (3, values.tobytes("F"))])
    data = b"MATLAB 5.0".ljust(124) + struct.pack(">HH", 0x0100, 0x4D49) + element(14, matrix)
    assert np.array_equal(potsdam.read_matlab(data, "gt"), values)
    assert np.array_equal(loadmat(BytesIO(data))["gt"], values)


# Bad input


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("cityscapes", r"\*_leftImg8bit\.png in leftImg8bit/val, .*zip!leftImg8bit/val"),
        ("cocostuff27", r"\*\.jpg in images/val2017, val2017, val2017\.zip!val2017"),
        ("cocostuff171", r"\*\.jpg in images/val2017, val2017, val2017\.zip!val2017"),
        ("potsdam3", r"\*\.mat in imgs"),
    ],
)
def test_a_wrong_root_is_an_error_that_says_what_was_looked_for_and_where(
    name: DatasetName, looked_for: str, tmp_path: Path
) -> None:
    title = published(name).title
    with pytest.raises(
        DataError,
        match=rf"No images of {title} \(val\) in {tmp_path}: .*{looked_for}; found nothing",
    ) as found:
        open_dataset(name, tmp_path, "val")
    assert found.value.exit_code == 3
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"; found data\. Give the folder"):
        train_images(name, tmp_path)
    with pytest.raises(DataError, match="; found nothing"):
        train_images(name, tmp_path / "not there")


@pytest.mark.parametrize(
    ("name", "folder", "looked_for"),
    [
        ("cityscapes", "gtFine", r"\*_gtFine_labelIds\.png in gtFine/val, .*gtFine/val"),
        ("cocostuff171", "annotations", r"annotations/val2017, .*maps_trainval2017\.zip!val2017"),
        ("potsdam3", "gt", r"\*\.mat in gt"),
    ],
)
def test_labels_that_are_not_unpacked_are_an_error_that_says_so(
    name: DatasetName, folder: str, looked_for: str, copy: Callable[[DatasetName], Path]
) -> None:
    root = copy(name)
    shutil.rmtree(root / folder)
    with pytest.raises(DataError, match=rf"No labels of .* \(val\) in .*: .*{looked_for}"):
        open_dataset(name, root, "val")


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_image_without_label_is_an_error_that_names_the_label(
    name: DatasetName, copy: Callable[[DatasetName], Path]
) -> None:
    path = first_label(root := copy(name), name)
    path.unlink()
    with pytest.raises(
        DataError, match=rf"1 of \d images .* have no label: expected {re.escape(str(path))}\."
    ):
        open_dataset(name, root, "val")


def test_fewer_images_than_published_are_an_error_with_both_numbers(
    copy: Callable[[DatasetName], Path],
) -> None:
    (root := copy("cityscapes")).joinpath(FAKE).unlink()
    with pytest.raises(
        DataError, match=rf"{root}/leftImg8bit/train has 3 images; Cityscapes \(train\) has 2,975\."
    ):
        train_images("cityscapes", root)


def test_as_many_images_as_published_are_a_whole_split(
    copy: Callable[[DatasetName], Path],
) -> None:
    (root := copy("cityscapes")).joinpath(FAKE).unlink()
    small = replace(published("cityscapes"), counts={"train": 3, "val": 3})
    assert len(small(root, "val")) == 3


def test_an_image_of_the_list_that_is_missing_is_named(
    copy: Callable[[DatasetName], Path],
) -> None:
    (root := copy("cocostuff27")).joinpath(FAKE).unlink()
    with pytest.raises(
        DataError,
        match=rf"2,172 of the 2,175 images in the list of COCO-Stuff-27 \(val\) are missing: "
        rf"expected {root}/images/val2017/000000000872\.jpg\.",
    ):
        open_dataset("cocostuff27", root, "val")


def test_a_missing_list_of_potsdam_is_an_error_that_names_it(
    copy: Callable[[DatasetName], Path],
) -> None:
    (root := copy("potsdam3")).joinpath("labelled_test.txt").unlink()
    with pytest.raises(DataError, match=r"Cannot read .*labelled_test\.txt, .* Potsdam-3, val: No"):
        open_dataset("potsdam3", root, "val")


def test_an_unknown_split_is_an_error_that_lists_the_known(fakes: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Cityscapes has no split 'test'\. Known: train, val\."
    ) as found:
        open_dataset("cityscapes", fakes / "cityscapes", "test")
    assert found.value.exit_code == 2


@pytest.mark.parametrize("name", ["cityscapes", "cocostuff27"])
def test_a_label_in_colour_is_an_error_that_names_it(
    name: DatasetName, copy: Callable[[DatasetName], Path]
) -> None:
    path = first_label(root := copy(name), name)
    with Image.open(path) as label:
        Image.new("RGB", label.size, "red").save(path)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} has 3 channels \(RGB\) with 1"):
        open_dataset(name, root, "val")[0]


def test_a_label_in_colour_inside_a_zip_is_named_with_its_member(
    copy: Callable[[DatasetName], Path],
) -> None:
    path = first_label(root := copy("cityscapes"), "cityscapes")
    with Image.open(path) as label:
        Image.new("RGB", label.size, "red").save(path)
    in_zips("cityscapes", root)
    with pytest.raises(DataError, match=r"trainvaltest\.zip!gtFine/val/.*labelIds\.png has 3 chan"):
        open_dataset("cityscapes", root, "val")[0]


def test_a_label_of_another_size_than_its_image_is_an_error_with_both(
    copy: Callable[[DatasetName], Path],
) -> None:
    path = first_label(root := copy("cityscapes"), "cityscapes")
    write_label(path, np.zeros((48, 96)))
    with pytest.raises(DataError, match=r"labelIds\.png is 96 x 48 pixels, .* is 192 x 96\."):
        open_dataset("cityscapes", root, "val")[0]


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut short"])
def test_a_zip_that_is_cut_short_is_an_error_that_names_it(
    content: bytes, copy: Callable[[DatasetName], Path]
) -> None:
    in_zips("cocostuff27", root := copy("cocostuff27"))
    (root / "train2017.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"train2017\.zip is not a zip that can be read .* again\."):
        train_images("cocostuff27", root)


@pytest.mark.parametrize("damage", ["no Matlab file", "another variable"])
def test_a_damaged_tile_is_an_error_that_says_what_was_expected(
    damage: str, copy: Callable[[DatasetName], Path]
) -> None:
    root = copy("potsdam3")
    for folder in ("imgs", "gt"):
        if damage == "no Matlab file":
            (root / folder / "1.mat").write_bytes(b"tile")
        else:
            savemat(root / folder / "1.mat", {"x": np.zeros(3)})
    expected = "1.mat: expected a Matlab file with the array"
    with pytest.raises(UnreadableImage, match=rf"imgs/{expected} img"):
        open_dataset("potsdam3", root, "val")[0]
    shutil.copy(root / "imgs/3.mat", root / "imgs/1.mat")
    with pytest.raises(DataError, match=rf"gt/{expected} gt"):
        open_dataset("potsdam3", root, "val")[0]


# The protocol of Table 3


def test_the_centre_crop_of_cityscapes_is_its_central_1024_reduced_to_320() -> None:
    rows, columns = np.indices((1024, 2048))
    image = np.stack([rows // 8, columns // 8, rows % 8 * 8 + columns % 8], axis=2).astype(np.uint8)
    seen: list[np.ndarray] = []

    class Looking:
        num_clusters = 2

        def probs(self, images: Tensor) -> Tensor:
            seen.append(images[0].permute(1, 2, 0).long().numpy())
            return torch.ones(len(images), 2, 20, 20)

    @dataclass
    class OneImage:
        name: str = "one"
        num_classes: int = 1
        class_names: tuple[str, ...] = ("any",)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Sample:
            return Sample(Image.fromarray(image), np.zeros((1024, 2048), np.uint8), "a")

    segmenter = Segmenter.of(Looking(), Experiment(training=TrainingConfig(precision="fp32")))
    evaluation = evaluate(segmenter, OneImage(), PROTOCOLS["stego-center-crop"])
    assert evaluation.confusion.counts.sum() == 320 * 320
    red, green, blue = np.moveaxis(seen[0], 2, 0)  # the first view is the one not mirrored
    centres = (np.arange(320) + 0.5) * 1024 / 320
    # Where a centre lies between two pixels, either is the nearest.
    assert np.abs(red * 8 + blue // 8 + 0.5 - centres[:, None]).max() <= 0.5
    assert np.abs(green * 8 + blue % 8 + 0.5 - 512 - centres).max() <= 0.5
