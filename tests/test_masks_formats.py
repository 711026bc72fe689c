"""What each format holds, decoded by other means: pycocotools, Pillow, loops over the rules."""

from __future__ import annotations

import csv
import json
import tracemalloc
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as cocomask
from pycocotools.coco import COCO

from iddc.errors import ConfigError
from iddc.masks import (
    FORMATS,
    Classes,
    Labels,
    coco,
    cvat,
    labelme,
    labelstudio,
    palette,
    shares,
    yolo,
)
from iddc.masks.formats import Origin
from iddc.masks.polygons import trace

pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning:pycocotools")

HOSTILE = ['"', "</script><b>&amp;", "a\nb", "../../etc/passwd", "a:b", "#c", "é 一", "background"]
"""Names that a file must hold as text. Labels refuse the third; formats do not rely on it."""
NUM = 5
ORIGIN = Origin("a.jpg", "photos/a.jpg")

IDS = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([*range(NUM), 255]),
)
REGIONS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))


def some_classes(names: list[str] | None = None, num: int = NUM) -> Classes:
    names = names or [f"class {index}" for index in range(num)]
    return Classes(tuple(names), palette(len(names)), np.arange(len(names), dtype=np.uint8))


@dataclass
class Result:
    """One segmented image, without a model."""

    clusters: np.ndarray
    labels: Labels
    probs: Any = None
    valid: Any = None

    @property
    def image(self) -> Image.Image:
        return Image.new("RGB", self.clusters.shape[::-1], (90, 90, 90))

    @property
    def classes(self) -> np.ndarray:
        return self.labels.classes.of_cluster[self.clusters]


# COCO ---------------------------------------------------------------------------------------------


def slow_rle(counts: str, height: int, width: int) -> np.ndarray:
    """COCO's compressed run lengths by its rules: 5 bits a character, deltas to two runs before."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value = shift = 0
        more = True
        while more:
            code = ord(counts[position]) - 48
            position += 1
            value |= (code & 31) << shift
            shift += 5
            more = bool(code & 32)
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    flat = [index % 2 for index, run in enumerate(runs) for _ in range(run)]
    return np.array(flat, bool).reshape(width, height).T


def slow_fill(polygon: list[int], height: int, width: int) -> np.ndarray:
    """A pixel is inside if a ray from its centre to the right crosses an odd number of edges."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    inside = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
                if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
                    inside[row, column] ^= True
    return inside


@given(REGIONS)
def test_the_run_lengths_of_coco_hold_the_region(region: np.ndarray) -> None:
    rle = coco.as_rle(region)
    assert rle["size"] == list(region.shape)
    assert (slow_rle(rle["counts"], *region.shape) == region).all()


@given(REGIONS)
def test_polygons_cover_exactly_the_region_for_pycocotools_and_by_the_even_odd_rule(
    region: np.ndarray,
) -> None:
    polygons = coco.as_polygons(region)
    filled = np.zeros_like(region)
    for polygon in polygons:
        part = slow_fill(polygon, *region.shape)
        assert not (filled & part).any()
        filled |= part
    assert (filled == region).all()
    if polygons:
        rle = cocomask.merge(cocomask.frPyObjects(polygons, *region.shape))
        assert (cocomask.decode(rle) == region).all()


def test_a_ring_is_one_polygon_that_leaves_its_hole_open() -> None:
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    (polygon,) = trace(ring)
    x, y = polygon.T
    assert (x.min(), x.max(), y.min(), y.max()) == (0, 3, 0, 3)
    following_x, following_y = np.roll(x, -1), np.roll(y, -1)
    assert abs((x * following_y - following_x * y).sum()) / 2 == 8
    assert {(1, 1), (2, 1), (1, 2), (2, 2)} <= set(map(tuple, polygon.tolist()))


def test_a_rectangle_has_four_corners() -> None:
    region = np.zeros((5, 6), bool)
    region[1:4, 2:6] = True
    (polygon,) = trace(region)
    assert sorted(map(tuple, polygon.tolist())) == [(2, 1), (2, 4), (6, 1), (6, 4)]


def coco_of(tmp_path: Path, ids: list[np.ndarray], classes: Classes, form: str) -> Path:
    segmentation = {"coco": coco.as_rle, "coco-polygons": coco.as_polygons}[form]
    names = [PurePosixPath(f"a/{index}.jpg") for index in range(len(ids))]
    (tmp_path / "parts" / "a").mkdir(parents=True, exist_ok=True)
    for name, mask in zip(names, ids, strict=True):
        part = coco.describe_image(str(name), mask, len(classes.names), segmentation)
        (tmp_path / "parts" / name.with_suffix(".json")).write_bytes(part)
    coco.assemble(tmp_path / "coco.json", tmp_path / "parts", names, classes)
    return tmp_path / "coco.json"


@pytest.mark.parametrize("form", ["coco", "coco-polygons"])
@given(ids=st.lists(IDS, max_size=3))
def test_pycocotools_reads_every_class_of_every_image(
    ids: list[np.ndarray], form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = coco_of(tmp_path_factory.mktemp("coco"), ids, some_classes(HOSTILE[:NUM]), form)
    api = COCO()
    api.dataset = json.loads(path.read_bytes())
    api.createIndex()
    assert [category["name"] for category in api.loadCats(api.getCatIds())] == HOSTILE[:NUM]
    for image_id, mask in enumerate(ids, start=1):
        (image,) = api.loadImgs(image_id)
        assert image["file_name"] == f"a/{image_id - 1}.jpg"
        assert (image["height"], image["width"]) == mask.shape
        found = np.full(mask.shape, 255)
        for annotation in api.imgToAnns[image_id]:
            region = api.annToMask(annotation) == 1
            assert (found[region] == 255).all()
            found[region] = annotation["category_id"] - 1
            assert annotation["area"] == region.sum()
            assert annotation["bbox"] == cocomask.toBbox(api.annToRLE(annotation)).tolist()
            assert annotation["iscrowd"] == 0
        assert (found == mask).all()
    numbers = [annotation["id"] for annotation in api.dataset["annotations"]]
    assert numbers == list(range(1, len(numbers) + 1))


# CVAT ---------------------------------------------------------------------------------------------


def voc_colour(index: int) -> tuple[int, int, int]:
    """Pascal VOC's colour map, bit by bit."""
    colour = [0, 0, 0]
    for place in range(8):
        bit = index >> place & 1
        colour[place % 3] |= bit << (7 - place // 3)
    return colour[0], colour[1], colour[2]


def read_cvat(path: Path) -> tuple[dict[tuple[int, ...], str], dict[str, tuple[Any, Any]]]:
    """The labels by colour, and the two RGB masks of every listed image, as the reader does it."""
    with zipfile.ZipFile(path) as archive:
        labels: dict[tuple[int, ...], str] = {}
        for line in archive.read("labelmap.txt").decode().splitlines():
            if line.strip() and not line.strip().startswith("#"):
                name, colour, parts, actions = line.strip().split(":")
                assert (parts, actions) == ("", "")
                assert name not in labels.values()
                labels[tuple(map(int, colour.split(",")))] = name
        listed = archive.read("ImageSets/Segmentation/default.txt").decode().splitlines()
        masks = {
            stem: tuple(
                np.asarray(Image.open(BytesIO(archive.read(f"{folder}/{stem}.png"))).convert("RGB"))
                for folder in ("SegmentationClass", "SegmentationObject")
            )
            for stem in listed
        }
        assert len(archive.namelist()) == 2 + 2 * len(listed)
    return labels, masks


def cvat_of(folder: Path, ids: list[np.ndarray], classes: Classes, name: str = "a/{}.jpg") -> Path:
    names = [PurePosixPath(name.format(index)) for index in range(len(ids))]
    for image, mask in zip(names, ids, strict=True):
        for kind, picture in (
            (cvat.CLASS, cvat.class_mask(mask, classes)),
            (cvat.OBJECT, cvat.object_mask(mask)),
        ):
            path = folder / "parts" / kind / image.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    cvat.assemble(folder / "cvat.zip", folder / "parts", names, classes)
    return folder / "cvat.zip"


@given(ids=st.lists(IDS, max_size=3))
def test_a_reader_of_cvat_masks_finds_every_class_and_no_ignored_pixel(
    ids: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    classes = some_classes()
    labels, masks = read_cvat(cvat_of(tmp_path_factory.mktemp("cvat"), ids, classes))
    assert list(labels.values()) == ["background", *classes.names]
    assert list(masks) == [f"a/{index}" for index in range(len(ids))]
    instance = {voc_colour(index): index for index in range(256)}
    for mask, (colours, objects) in zip(ids, masks.values(), strict=True):
        found = np.full(mask.shape, 255)
        for row, column in np.ndindex(*mask.shape):
            name = labels[tuple(colours[row, column].tolist())]
            # The reader makes an annotation of every object but number 0.
            if instance[tuple(objects[row, column].tolist())]:
                found[row, column] = classes.names.index(name)
        assert (found == mask).all()


def test_the_labels_for_a_cvat_task_are_those_of_the_labelmap(tmp_path: Path) -> None:
    classes = some_classes(HOSTILE)
    labels, _ = read_cvat(cvat_of(tmp_path, [], classes))
    wanted = json.loads((tmp_path / "cvat-labels.json").read_text())
    assert [label["name"] for label in wanted] == list(labels.values())[1:]
    assert [tuple(bytes.fromhex(label["color"][1:])) for label in wanted] == list(labels)[1:]
    assert all(label["attributes"] == [] for label in wanted)


def test_names_that_a_labelmap_cannot_hold_are_changed_and_stay_different() -> None:
    names = ["a:b", "a_b", "#x", "a\nb", "background", 'q"<b>', "x#"]
    assert cvat.label_names(names) == [
        *("background_", "a_b", "a_b_", "_x", "a_b__", "background", 'q"<b>', "x#")
    ]


def test_names_of_images_that_a_list_cannot_hold_are_written_by_their_codes(tmp_path: Path) -> None:
    ids = [np.zeros((1, 1), np.uint8)]
    _, masks = read_cvat(cvat_of(tmp_path, ids, some_classes(), "x\ny\udcff é/{}.jpg"))
    assert list(masks) == ["x%0Ay%FF é/0"]


@pytest.mark.parametrize(
    ("name", "line"),
    [("#7.png", "%237"), ("a#7.png", "a#7"), (" a .png", "%20a%20"), ("#a/#b.png", "%23a/#b")],
)
def test_names_that_the_list_would_lose_are_written_by_their_codes(
    tmp_path: Path, name: str, line: str
) -> None:
    # The reader strips a line, and skips one that is empty or begins with #.
    _, masks = read_cvat(cvat_of(tmp_path, [np.zeros((1, 1), np.uint8)], some_classes(), name))
    assert list(masks) == [line] == [line.strip()]
    assert not line.startswith("#")


def test_members_of_the_zip_can_be_read_by_everybody_and_have_no_date(tmp_path: Path) -> None:
    with zipfile.ZipFile(cvat_of(tmp_path, [np.zeros((1, 1), np.uint8)], some_classes())) as zipped:
        assert {info.external_attr >> 16 for info in zipped.infolist()} == {0o644}
        assert {info.date_time[0] for info in zipped.infolist()} == {1980}


def test_cvat_holds_255_classes_of_different_colours_and_refuses_the_rest() -> None:
    cvat.check(some_classes(num=255))
    with pytest.raises(ConfigError, match=r"at most 255 classes, found 256.*Merge"):
        cvat.check(some_classes(num=256))
    for index, owner in ((0, "'class 0'"), (None, "pixels without a class")):
        colours = palette(3)
        colours[2] = 0 if index is None else colours[index]
        classes = Classes(("class 0", "class 1", "class 2"), colours, np.arange(3, dtype=np.uint8))
        with pytest.raises(ConfigError, match=f"'class 2' has that of .*{owner}"):
            cvat.check(classes)


# Label Studio -------------------------------------------------------------------------------------


def slow_brush(data: list[int], height: int, width: int) -> np.ndarray:
    """The brush's run lengths by the rules of thi.ng/rle-pack; alpha is the mask."""
    bits = "".join(f"{byte:08b}" for byte in data)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    size = read(32)
    word = read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < size:
        repeated = read(1)
        length = read(widths[read(2)]) + 1
        if repeated:
            values += [read(word)] * length
        else:
            values += [read(word) for _ in range(length)]
    assert len(values) == size
    assert len(bits) - position < 8
    picture = np.array(values).reshape(height, width, 4)
    assert (picture == picture[:, :, :1]).all()
    assert set(values) <= {0, 255}
    return picture[:, :, 3] == 255


@given(REGIONS)
def test_the_run_lengths_of_the_brush_hold_the_region(region: np.ndarray) -> None:
    assert (slow_brush(labelstudio.brush_rle(region), *region.shape) == region).all()


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 64, 65, 16383, 16384, 16385, 32768, 40000])
def test_runs_of_every_length_survive(pixels: int) -> None:
    region = np.zeros((1, pixels + 3), bool)
    region[0, 1 : pixels + 1] = True
    assert (slow_brush(labelstudio.brush_rle(region), 1, pixels + 3) == region).all()


def test_the_run_lengths_of_the_brush_are_those_of_the_rules_by_hand() -> None:
    # 8 bytes; words of 8 bits; widths 3, 4, 8, 16; a run of 4 zeros, a run of 4 times 255.
    bits = f"{8:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    bits += "1" + "00" + "011" + "00000000" + "1" + "00" + "011" + "11111111" + "0" * 7
    expected = [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]
    assert labelstudio.brush_rle(np.array([[False, True]])) == expected


@given(ids=st.lists(IDS, max_size=3))
def test_tasks_hold_every_class_of_every_image(
    ids: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, classes = tmp_path_factory.mktemp("ls"), some_classes(HOSTILE[:NUM])
    names = [PurePosixPath(f"{index}.jpg") for index in range(len(ids))]
    for name, mask in zip(names, ids, strict=True):
        part = labelstudio.task(f"a b/{name}", mask, classes.names)
        (folder / name.with_suffix(".json")).write_bytes(part)
    labelstudio.assemble(folder / "labelstudio.json", folder, names, classes)
    tasks = json.loads((folder / "labelstudio.json").read_bytes())
    assert len(tasks) == len(ids)
    for name, mask, task in zip(names, ids, tasks, strict=True):
        assert task["data"]["image"] == f"/data/local-files/?d=a%20b/{name}"
        (prediction,) = task["predictions"]
        found = np.full(mask.shape, 255)
        for result in prediction["result"]:
            assert (result["original_height"], result["original_width"]) == mask.shape
            assert (result["type"], result["value"]["format"]) == ("brushlabels", "rle")
            (label,) = result["value"]["brushlabels"]
            found[slow_brush(result["value"]["rle"], *mask.shape)] = classes.names.index(label)
        assert (found == mask).all()
        assert len({result["id"] for result in prediction["result"]}) == len(prediction["result"])


def test_the_labelling_configuration_names_every_class_as_text(tmp_path: Path) -> None:
    names = [name for name in HOSTILE if name.isprintable()]
    labelstudio.assemble(tmp_path / "labelstudio.json", tmp_path, [], some_classes(names))
    view = ElementTree.parse(tmp_path / "labelstudio.xml").getroot()
    assert [label.get("value") for label in view.iter("Label")] == names
    colours = [bytes.fromhex(label.get("background", "")[1:]) for label in view.iter("Label")]
    assert [[*colour] for colour in colours] == palette(len(names)).tolist()
    (brush,), (image,) = view.iter("BrushLabels"), view.iter("Image")
    assert (brush.get("name"), brush.get("toName")) == ("label", image.get("name"))


# YOLO and LabelMe ---------------------------------------------------------------------------------


def filled(polygons: list[tuple[Any, int]], shape: tuple[int, int]) -> np.ndarray:
    """The class of every pixel that pycocotools finds in a polygon; 255 elsewhere."""
    ids = np.full(shape, 255, np.uint8)
    for corners, index in polygons:
        flat = [np.asarray(corners, float).ravel().tolist()]
        inside = cocomask.decode(cocomask.merge(cocomask.frPyObjects(flat, *shape))) == 1
        assert (ids[inside] == 255).all()
        ids[inside] = index
    return ids


@given(IDS)
def test_yolo_labels_cover_exactly_the_pixels_of_each_class(ids: np.ndarray) -> None:
    height, width = ids.shape
    polygons = []
    for line in yolo.describe_image(ids, NUM).decode().splitlines():
        index, *numbers = line.split()
        corners = np.array(numbers, float).reshape(-1, 2)
        assert ((corners >= 0) & (corners <= 1)).all()
        polygons.append((np.rint(corners * [width, height]), int(index)))
    assert (filled(polygons, ids.shape) == ids).all()


@given(IDS)
def test_labelme_shapes_cover_exactly_the_pixels_of_each_class(ids: np.ndarray) -> None:
    names = HOSTILE[:NUM]
    record = json.loads(labelme.describe_image("/photos/a.jpg", ids, names))
    assert (record["imageHeight"], record["imageWidth"]) == ids.shape
    assert (record["imagePath"], record["imageData"]) == ("/photos/a.jpg", None)
    shapes = [(shape["points"], names.index(shape["label"])) for shape in record["shapes"]]
    assert {shape["shape_type"] for shape in record["shapes"]} <= {"polygon"}
    assert (filled(shapes, ids.shape) == ids).all()


def test_the_names_of_yolo_are_read_by_a_yaml_parser_as_they_are(tmp_path: Path) -> None:
    yolo.assemble(tmp_path / "data.yaml", tmp_path, [], some_classes(HOSTILE))
    names = yaml.safe_load((tmp_path / "data.yaml").read_text("utf-8"))["names"]
    assert names == dict(enumerate(HOSTILE))


# Tables of shares ---------------------------------------------------------------------------------


def test_tables_say_how_much_of_each_image_and_folder_a_class_covers(tmp_path: Path) -> None:
    masks = {
        "north/a.jpg": [[0, 0, 1, 255]],
        "north/b.jpg": [[0, 0], [0, 0]],
        "c.jpg": [[1]],
    }
    for name, ids in masks.items():
        target = tmp_path / "parts" / PurePosixPath(name).with_suffix(".json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(shares.describe_image(name, shares.count_pixels(np.array(ids), 2)))
    classes = some_classes(["sky, or so", 'a "b"'])
    shares.assemble(
        tmp_path / "shares.csv", tmp_path / "parts", [*map(PurePosixPath, masks)], classes
    )
    with (tmp_path / "shares.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("north/a.jpg", "sky, or so", "2", "0.500000", ""),
        ("north/a.jpg", 'a "b"', "1", "0.250000", ""),
        ("north/a.jpg", "ignore", "1", "0.250000", ""),
        ("north/b.jpg", "sky, or so", "4", "1.000000", ""),
        ("north/b.jpg", 'a "b"', "0", "0.000000", ""),
        ("c.jpg", "sky, or so", "0", "0.000000", ""),
        ("c.jpg", 'a "b"', "1", "1.000000", ""),
    ]
    with (tmp_path / "shares-by-folder.csv").open(newline="") as file:
        folders = [tuple(row.values()) for row in csv.DictReader(file)]
    assert folders == [
        (".", "1", "sky, or so", "0", "0.000000", ""),
        (".", "1", 'a "b"', "1", "1.000000", ""),
        ("north", "2", "sky, or so", "6", "0.750000", ""),
        ("north", "2", 'a "b"', "1", "0.125000", ""),
        ("north", "2", "ignore", "1", "0.125000", ""),
    ]


# The rest, and all together -----------------------------------------------------------------------


def test_probabilities_come_with_the_clusters_and_their_names_and_need_no_pickle() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), (3, 2)).transpose(2, 0, 1)
    labels = Labels.numbered(4).edit({1: '"<b>', 2: "ignore"})
    result = Result(probs.argmax(0).astype(np.uint8), labels, probs.astype(np.float32))
    (encode,) = FORMATS["npz"].files.values()
    with np.load(BytesIO(encode(ORIGIN, result))) as file:
        assert file["probs"].dtype == np.float16
        assert np.abs(file["probs"] - probs).max() < 5e-4
        assert (file["clusters"] == result.clusters).all()
        assert file["names"].tolist() == ["cluster 0", '"<b>', "ignore", "cluster 3"]


@pytest.mark.parametrize("form", ["png", "palette"])
def test_images_of_ids_hold_merged_classes_and_255_for_ignored_pixels(form: str) -> None:
    labels = Labels.numbered(4).edit({0: "sky", 2: "sky", 1: "ignore"})
    result = Result(np.array([[0, 1], [2, 3]], np.uint8), labels)
    (encode,) = FORMATS[form].files.values()
    with Image.open(BytesIO(encode(ORIGIN, result))) as image:
        assert np.asarray(image).tolist() == [[0, 255], [0, 1]]


def test_an_overlay_shows_one_colour_for_merged_clusters_and_none_for_ignored_ones() -> None:
    labels = Labels.numbered(4).edit({0: "sky", 2: "sky", 1: "ignore"})
    result = Result(np.array([[0, 1], [2, 3]], np.uint8), labels)
    (encode,) = FORMATS["overlay"].files.values()
    with Image.open(BytesIO(encode(ORIGIN, result))) as image:
        (first, ignored), (second, other) = np.asarray(image).tolist()
    assert first == second != other
    assert ignored == [90, 90, 90]


def test_of_1000_clusters_palette_and_cvat_say_no_and_ids_take_16_bits() -> None:
    labels = Labels.numbered(1000)
    result = Result(np.array([[0, 999]], np.uint16), labels)
    for form in ("palette", "cvat"):
        check = FORMATS[form].check
        assert check is not None
        with pytest.raises(ConfigError, match="found 1000"):
            check(labels.classes)
        check(labels.edit(dict.fromkeys(range(200, 1000), "rest")).classes)
    (encode,) = FORMATS["png"].files.values()
    with Image.open(BytesIO(encode(ORIGIN, result))) as image:
        assert np.asarray(image).tolist() == [[0, 999]]
    image_part = json.loads(next(iter(FORMATS["coco"].files.values()))(ORIGIN, result))
    assert [a["category_id"] for a in image_part["annotations"]] == [1, 1000]


def test_256_classes_fit_a_palette_only_without_ignored_ones() -> None:
    check = FORMATS["palette"].check
    assert check is not None
    check(Labels.numbered(256).classes)
    with pytest.raises(ConfigError, match="found 256"):
        check(Labels.numbered(257).edit({0: "ignore"}).classes)


@pytest.mark.parametrize("form", ["coco", "labelstudio", "cvat"])
def test_putting_many_images_together_takes_the_memory_of_few(form: str, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, NUM, (24, 24), np.uint8)
    result, peaks = Result(ids, Labels.numbered(NUM)), []
    what, size, classes = FORMATS[form], 0, some_classes()
    assert what.assemble is not None
    for key, encode in what.files.items():
        data = encode(ORIGIN, result)
        for index in range(400):
            path = (tmp_path / key / str(index)).with_suffix(what.suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            size += len(data)
    for count in (4, 400):
        names = [PurePosixPath(f"{index}.jpg") for index in range(count)]
        tracemalloc.start()
        what.assemble(tmp_path / what.whole, tmp_path / "parts" / form, names, classes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A zip keeps its table of contents, some hundred bytes a member.
    assert peaks[1] - peaks[0] < size / 4 + (400 * 2 * 700 if form == "cvat" else 0)
