"""Files of annotation tools as data sets: what we write, and what other programs write."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as cocomask

from iddc.datasets import open_dataset
from iddc.datasets.regions import (
    from_brush_rle,
    from_coco_rle,
    from_ellipse,
    from_polygons,
)
from iddc.errors import ConfigError, DataError
from iddc.masks import Classes, coco, cvat, labelstudio, palette

pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning:pycocotools")

NUM = 5
IDS = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([*range(NUM), 255]),
)
REGIONS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
CLASSES = Classes(
    tuple(f"class {index}" for index in range(NUM)), palette(NUM), np.arange(NUM, dtype=np.uint8)
)
MASK = np.array([[0, 0, 1, 255], [2, 2, 1, 4]], np.uint8)


def photos(folder: Path, ids: dict[str, np.ndarray]) -> Path:
    for name, mask in ids.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", mask.shape[::-1], "green").save(folder / name)
    return folder


def written(folder: Path, ids: dict[str, np.ndarray], form: str) -> Path:
    """What `iddc predict` writes of these masks."""
    names = [PurePosixPath(name) for name in ids]
    for name, mask in zip(names, ids.values(), strict=True):
        if form == "cvat":
            pictures = {
                cvat.CLASS: cvat.class_mask(mask, CLASSES),
                cvat.OBJECT: cvat.object_mask(mask),
            }
            for kind, picture in pictures.items():
                path = folder / "parts" / kind / name.with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            continue
        if form == "labelstudio":
            part = labelstudio.task(f"photos/{name}", mask, CLASSES.names)
        else:
            shape = {"coco": coco.as_rle, "coco-polygons": coco.as_polygons}[form]
            part = coco.describe_image(str(name), mask, NUM, shape)
        path = folder / "parts" / name.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    module = {"cvat": cvat, "labelstudio": labelstudio}.get(form, coco)
    target = folder / ("cvat.zip" if form == "cvat" else f"{form}.json")
    module.assemble(target, folder / "parts", names, CLASSES)
    return target


# What we write is read back


@pytest.mark.parametrize("form", ["coco", "coco-polygons", "cvat", "labelstudio"])
@settings(max_examples=8)
@given(first=IDS, second=IDS)
def test_masks_that_we_write_are_read_back_pixel_by_pixel(
    first: np.ndarray, second: np.ndarray, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first.flat[: min(NUM, first.size)] = np.arange(min(NUM, first.size))
    folder = tmp_path_factory.mktemp("set")
    ids = {"a.jpg": first, "b c/ü #1.png": second}
    images = photos(folder / "photos", ids)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES.names))
    dataset = open_dataset("folder", written(folder, ids, form), "val", images=images)
    assert dataset.class_names == CLASSES.names
    assert len(dataset) == 2
    for sample in (dataset[0], dataset[1]):
        assert np.array_equal(sample.label, ids[sample.name])


@pytest.mark.parametrize("form", ["coco", "cvat", "labelstudio"])
def test_images_are_those_that_the_folder_of_masks_names(tmp_path: Path, form: str) -> None:
    ids = {"a.png": MASK}
    images = photos(tmp_path / "elsewhere/photos", ids)
    path = written(tmp_path / "masks", ids, form)
    (tmp_path / "masks/png").mkdir()
    Image.fromarray(MASK).save(tmp_path / "masks/png/a.png")  # must not be taken for the photo
    (tmp_path / "masks/predictions.json").write_text(json.dumps({"images": str(images)}))
    sample = open_dataset("folder", path, "val")[0]
    assert sample.image.getpixel((0, 0)) == (0, 128, 0)
    (tmp_path / "masks/predictions.json").write_text("{}")
    with pytest.raises(DataError, match="--images"):
        open_dataset("folder", path, "val")


def test_unusual_names_keep_their_masks_in_a_cvat_zip(tmp_path: Path) -> None:
    ids = {"a b/x\ny.jpg": MASK, "100%41.jpg": MASK[:, ::-1].copy()}
    images = photos(tmp_path / "photos", ids)
    dataset = open_dataset("folder", written(tmp_path, ids, "cvat"), "val", images=images)
    labels = {sample.name: sample.label for sample in (dataset[0], dataset[1])}
    assert all(np.array_equal(labels[name], mask) for name, mask in ids.items())


# COCO, by pycocotools


@given(REGIONS)
def test_run_lengths_of_pycocotools_are_read(region: np.ndarray) -> None:
    rle = cocomask.encode(np.asfortranarray(region, np.uint8))
    text = {"size": list(region.shape), "counts": rle["counts"].decode()}
    assert np.array_equal(from_coco_rle(text, *region.shape), region)
    runs = [len(list(run)) for run in _runs(region.T.ravel())]
    assert np.array_equal(
        from_coco_rle({"size": list(region.shape), "counts": runs}, *region.shape), region
    )


@pytest.mark.parametrize("counts", ["p1", "/1", "P", "1" * 20])
def test_text_that_is_no_run_lengths_is_refused(counts: str) -> None:
    # The characters after and before the 64 that are used; a number without an end; too many runs.
    with pytest.raises(DataError, match="run lengths"):
        from_coco_rle({"size": [1, 1], "counts": counts}, 1, 1)


def _runs(flat: np.ndarray) -> list[list[bool]]:
    """Runs of equal values, the first of zeros."""
    runs: list[list[bool]] = [[]]
    for value in flat.tolist():
        if value != (len(runs) % 2 == 0):
            runs.append([])
        runs[-1].append(value)
    return runs


def coco_json(path: Path, segmentations: list[Any], size: tuple[int, int] = (4, 2)) -> Path:
    record = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": size[0], "height": size[1]}],
        "categories": [{"id": 90, "name": "tree"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": c, "segmentation": s, "bbox": [0, 0, 1, 1]}
            for i, (c, s) in enumerate(segmentations)
        ],
    }
    path.write_text(json.dumps(record))
    photos(path.parent, {"a.jpg": np.zeros(size[::-1])})
    return path


def test_categories_are_classes_by_their_ids_and_the_last_region_counts(tmp_path: Path) -> None:
    left = [[0, 0, 2, 0, 2, 2, 0, 2]]
    middle = [[1, 0, 3, 0, 3, 2, 1, 2]]
    path = coco_json(tmp_path / "coco.json", [(90, left), (3, middle)])
    dataset = open_dataset("folder", path, "val")
    assert dataset.class_names == ("car", "tree")
    assert dataset[0].label.tolist() == [[1, 0, 0, 255]] * 2


def test_pixels_without_annotation_are_a_class_if_it_has_a_name(tmp_path: Path) -> None:
    path = coco_json(tmp_path / "coco.json", [(90, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    dataset = open_dataset("folder", path, "val", background="ground")
    assert dataset.class_names == ("ground", "car", "tree")
    assert dataset[0].label.tolist() == [[2, 2, 0, 0]] * 2


def test_several_polygons_of_a_region_are_joined(tmp_path: Path) -> None:
    parts = [[0, 0, 1, 0, 1, 2, 0, 2], [3, 0, 4, 0, 4, 2, 3, 2]]
    path = coco_json(tmp_path / "coco.json", [(3, parts)])
    assert open_dataset("folder", path, "val")[0].label.tolist() == [[0, 255, 255, 0]] * 2


def test_a_zip_of_cvat_with_coco_and_images_is_read(tmp_path: Path) -> None:
    path = coco_json(tmp_path / "instances_default.json", [(3, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.write(path, "annotations/instances_default.json")
        archive.write(tmp_path / "a.jpg", "images/default/a.jpg")
    sample = open_dataset("folder", tmp_path / "task.zip", "val")[0]
    assert sample.label.tolist() == [[0, 0, 255, 255]] * 2


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [4, 2], "counts": [8]}, r"size \[4, 2\].*\[2, 4\]"),
        ({"size": [2, 4], "counts": [9]}, "do not add up to the 8 pixels"),
        ({"size": [2, 4], "counts": [10**12]}, "do not add up"),
        ({"size": [2, 4], "counts": "8P"}, "do not add up|cut short"),
        ({"size": [2, 4], "counts": "\u00e9"}, "characters of another kind"),
        ([[0, 0, 1, 1]], "three or more corners"),
        ([[0, 0, 40, 0, 1, 1]], "far outside"),
        ([[0, 0, 1e9, 0, 1, 1]], "far outside"),
        ([[0, 0, None, 0, 1, 1]], "three or more corners"),
    ],
)
def test_a_region_that_cannot_be_is_an_error_that_names_its_image(
    tmp_path: Path, segmentation: Any, message: str
) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, segmentation)])
    with pytest.raises(DataError, match=rf"a\.jpg in .*coco\.json: .*{message}"):
        open_dataset("folder", path, "val")[0]


@pytest.mark.parametrize(("field", "found"), [("category_id", 55), ("image_id", 66)])
def test_a_region_of_an_image_or_a_category_that_is_not_listed_is_an_error(
    tmp_path: Path, field: str, found: int
) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, [[0, 0, 2, 0, 2, 2, 0, 2]])] * 2)
    record = json.loads(path.read_text())
    record["annotations"][1][field] = found
    path.write_text(json.dumps(record))
    message = rf"annotates images or categories that it does not list: {found}\."
    with pytest.raises(DataError, match=message):
        open_dataset("folder", path, "val")


@pytest.mark.parametrize("twice", [{"id": 3, "name": "sky"}, {"id": 5, "name": "car"}])
def test_two_categories_of_one_name_or_id_are_an_error(
    tmp_path: Path, twice: dict[str, Any]
) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    record = json.loads(path.read_text())
    record["categories"].append(twice)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="several categories of one name or id"):
        open_dataset("folder", path, "val")


def test_an_image_of_another_size_than_annotated_is_an_error(tmp_path: Path) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    photos(tmp_path, {"a.jpg": np.zeros((3, 4))})
    with pytest.raises(DataError, match=r"4 x 2 pixels, .* is 4 x 3"):
        open_dataset("folder", path, "val")[0]


def test_boxes_are_no_regions(tmp_path: Path) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, [])])
    with pytest.raises(DataError, match=r"boxes only \(1\)"):
        open_dataset("folder", path, "val")
    path = coco_json(tmp_path / "coco.json", [(3, []), (3, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    (note,) = open_dataset("folder", path, "val").notes  # type: ignore[attr-defined]
    assert "1 annotations are boxes" in note


def test_images_that_are_missing_or_cannot_be_told_apart_are_errors(tmp_path: Path) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"No image in"):
        open_dataset("folder", path, "val")
    photos(tmp_path, {"x/b.jpg": np.zeros((2, 4))})
    with pytest.raises(DataError, match=r"1 of 1 images .* a\.jpg\. Give .*--images"):
        open_dataset("folder", path, "val")
    photos(tmp_path, {"x/a.jpg": np.zeros((2, 4)), "y/a.jpg": np.zeros((2, 4))})
    with pytest.raises(DataError, match=r"Several images may be a\.jpg"):
        open_dataset("folder", path, "val")
    assert len(open_dataset("folder", path, "val", images=tmp_path / "x")) == 1


def test_an_image_in_another_folder_of_the_same_name_is_not_taken(tmp_path: Path) -> None:
    path = coco_json(tmp_path / "coco.json", [(3, [[0, 0, 2, 0, 2, 2, 0, 2]])])
    record = json.loads(path.read_text())
    record["images"][0]["file_name"] = "north/a.jpg"
    path.write_text(json.dumps(record))
    (tmp_path / "a.jpg").unlink()
    photos(tmp_path / "set", {"south/a.jpg": np.zeros((2, 4)), "south/b.jpg": np.zeros((2, 4))})
    photos(tmp_path / "set", {"west/c.jpg": np.zeros((2, 4))})
    with pytest.raises(DataError, match=r"north/a\.jpg"):
        open_dataset("folder", path, "val", images=tmp_path / "set")


# CVAT, as its own exporter writes


def test_an_export_of_cvat_with_its_images_is_read(tmp_path: Path) -> None:
    colours = np.array([[[0, 0, 0], [250, 50, 83], [250, 50, 83], [52, 209, 183]]] * 2, np.uint8)
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.writestr(
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:250,50,83::\n"
            "tree:52,209,183::\n",
        )
        archive.writestr("ImageSets/Segmentation/default.txt", "frames/a\n")
        for kind in ("SegmentationClass", "SegmentationObject"):
            data = BytesIO()
            Image.fromarray(colours).save(data, "PNG")
            archive.writestr(f"{kind}/frames/a.png", data.getvalue())
        data = BytesIO()
        Image.new("RGB", (4, 2), "blue").save(data, "PNG")
        archive.writestr("JPEGImages/frames/a.png", data.getvalue())
    dataset = open_dataset("folder", tmp_path / "task.zip", "val")
    assert dataset.class_names == ("road", "tree")
    assert dataset[0].label.tolist() == [[255, 0, 0, 1]] * 2
    assert dataset[0].image.getpixel((0, 0)) == (0, 0, 255)
    named = open_dataset("folder", tmp_path / "task.zip", "val", background="rest")
    assert named.class_names == ("rest", "road", "tree")
    assert named[0].label.tolist() == [[0, 1, 1, 2]] * 2


def test_a_zip_of_another_format_of_cvat_says_which_to_export(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.writestr("annotations.xml", "<annotations/>")
    with pytest.raises(DataError, match=r"Segmentation mask 1\.1.*annotations\.xml"):
        open_dataset("folder", tmp_path / "task.zip", "val")


# Label Studio, as it exports


def task(image: str, results: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    for result in results:
        result.setdefault("original_width", 4)
        result.setdefault("original_height", 2)
    return {"id": 1, "data": {"image": image}, "annotations": [{"result": results}], **more}


def polygon(name: str, points: list[list[float]]) -> dict[str, Any]:
    return {"type": "polygonlabels", "value": {"points": points, "polygonlabels": [name]}}


LEFT = [[0, 0], [50, 0], [50, 100], [0, 100]]


def tasks(folder: Path, *items: dict[str, Any]) -> Path:
    photos(folder, {"photos/a.jpg": np.zeros((2, 4))})
    (folder / "project-1.json").write_text(json.dumps(items))
    return folder / "project-1.json"


@pytest.mark.parametrize(
    "image",
    [
        "/data/local-files/?d=photos/a.jpg",
        "/data/local-files/?d=%2Fmnt%2Fphotos%2Fa.jpg",
        "/data/upload/3/1a2b3c4d-a.jpg",
        "https://example.org/photos/a.jpg?size=4",
        "s3://bucket/photos/a.jpg",
        "photos/a.jpg",
    ],
)
def test_images_are_found_wherever_label_studio_had_them(tmp_path: Path, image: str) -> None:
    path = tasks(tmp_path, task(image, [polygon("road", LEFT)]))
    (tmp_path / "photos/b.jpg").write_bytes((tmp_path / "photos/a.jpg").read_bytes())
    sample = open_dataset("folder", path, "val")[0]
    assert sample.name.endswith("a.jpg")
    assert sample.label.tolist() == [[0, 0, 255, 255]] * 2


def test_a_correction_counts_and_not_what_was_predicted_or_cancelled(tmp_path: Path) -> None:
    item = task(
        "photos/a.jpg",
        [polygon("road", LEFT)],
        predictions=[{"result": [polygon("sky", LEFT)]}],
    )
    item["annotations"].insert(0, {"result": [polygon("tree", LEFT)]})
    item["annotations"].append({"result": [polygon("car", LEFT)], "was_cancelled": True})
    dataset = open_dataset("folder", tasks(tmp_path, item), "val")
    assert dataset.class_names == ("road",)


def test_rectangles_and_ellipses_are_regions_and_choices_are_not(tmp_path: Path) -> None:
    box = {"x": 75, "y": 0, "width": 25, "height": 100, "rotation": 0, "rectanglelabels": ["car"]}
    disk = {"x": 25, "y": 50, "radiusX": 25, "radiusY": 50, "rotation": 0, "ellipselabels": ["sun"]}
    path = tasks(
        tmp_path,
        task(
            "photos/a.jpg",
            [
                {"type": "rectanglelabels", "value": box},
                {"type": "ellipselabels", "value": disk},
                {"type": "choices", "value": {"choices": ["day"]}},
            ],
        ),
    )
    dataset = open_dataset("folder", path, "val")
    assert dataset.class_names == ("car", "sun")
    assert dataset[0].label.tolist() == [[1, 1, 255, 0]] * 2
    assert "choices (1)" in dataset.notes[0]  # type: ignore[attr-defined]


def test_a_box_is_turned_clockwise_about_its_first_corner(tmp_path: Path) -> None:
    # A box of 2 x 1 pixels whose first corner is at (2, 0), turned by 90 degrees: it covers
    # x from 1 to 2 and y from 0 to 2.
    box = {"x": 50, "y": 0, "width": 50, "height": 50, "rotation": 90, "rectanglelabels": ["car"]}
    path = tasks(tmp_path, task("photos/a.jpg", [{"type": "rectanglelabels", "value": box}]))
    assert open_dataset("folder", path, "val")[0].label.tolist() == [[255, 0, 255, 255]] * 2


def test_the_short_format_and_other_json_say_what_to_export(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"image": "a.jpg", "label": []}]')
    with pytest.raises(DataError, match="format JSON, but shorter"):
        open_dataset("folder", path, "val")
    for others in ("", ', "version": "5.0"'):
        path.write_text(f'{{"shapes": [], "imagePath": "a.jpg"{others}}}')
        with pytest.raises(DataError, match="LabelMe"):
            open_dataset("folder", path, "val")
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"neither COCO .* nor Label Studio"):
        open_dataset("folder", path, "val")
    path.write_text("no json")
    with pytest.raises(DataError, match=r"a\.json is no JSON"):
        open_dataset("folder", path, "val")


@given(REGIONS)
def test_the_brush_is_read_with_runs_and_with_single_values(region: np.ndarray) -> None:
    # By the rules of thi.ng/rle-pack, with other widths than ours and every second run as values.
    values = np.repeat(region.ravel() * 200, 4).tolist()
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{w - 1:04b}" for w in (1, 2, 5, 9))
    position = 0
    while position < len(values):
        run = 1
        while position + run < len(values) and values[position + run] == values[position]:
            run += 1
        if position % 3 and run < 512:
            bits += f"1{3:02b}{run - 1:09b}{values[position]:08b}"
        else:
            run = min(run, 4)
            bits += f"0{1:02b}{run - 1:02b}" + f"{values[position]:08b}" * run
        position += run
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert np.array_equal(from_brush_rle(data, *region.shape), region)


@pytest.mark.parametrize(
    ("data", "message"),
    [([0, 0, 0, 4], "cut short|not of the"), ([255] * 4, "not of the 1 pixels"), ("x", "bytes")],
)
def test_a_damaged_brush_is_an_error(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_brush_rle(data, 1, 1)


def test_an_ellipse_holds_the_pixels_whose_centres_lie_in_it() -> None:
    # Half a pixel from the middle row it reaches 2 (1 - (0.5 / 1.2)^2)^0.5 = 1.82 to each side.
    region = from_ellipse((3.0, 2.0), (2.0, 1.2), 0.0, 4, 6)
    assert region.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert np.array_equal(from_ellipse((2.0, 3.0), (2.0, 1.2), 90.0, 6, 4), region.T)


def test_no_polygon_is_an_empty_region() -> None:
    assert not from_polygons([], 2, 3).any()


# Options


def test_options_of_annotations_are_refused_for_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--images is for a file of annotations"):
        open_dataset("folder", tmp_path, "val", images=tmp_path)
    with pytest.raises(ConfigError, match="--background is for a file of annotations"):
        open_dataset("folder", tmp_path, "val", background="rest")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="--binary is for a folder"):
        open_dataset("folder", tmp_path / "a.json", "val", binary=True)
