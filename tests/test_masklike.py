"""Photos are read and masks are not, in the layouts of public data sets, by names and by looks."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddc.images import find_images
from iddc.images.masklike import look

RNG = np.random.default_rng(0)
SIDE = 24


def photo(path: Path, seed: int = 0, *, grey: bool = False) -> None:
    """Noise over a gradient, as no mask has it."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (SIDE, SIDE) if grey else (SIDE, SIDE, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mask(path: Path, kind: str = "binary") -> None:
    """A disk of one value on the ground of another; in the manner of `kind`."""
    rows, columns = np.indices((SIDE, SIDE))
    disk = (rows - 12) ** 2 + (columns - 9) ** 2 < 50
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "binary":
        image = Image.fromarray(disk * np.uint8(255))
    elif kind == "ids":
        image = Image.fromarray(np.where(rows < 8, 3, disk).astype(np.uint8))
    elif kind == "palette":
        image = Image.fromarray(np.where(rows < 8, 3, disk).astype(np.uint8))
        image.putpalette(np.arange(768) % 251)
    elif kind == "colour":
        image = Image.fromarray(
            np.where(disk[..., None], [128, 64, 128], [70, 130, 180]).astype(np.uint8)
        )
    elif kind == "instances":
        image = Image.fromarray(((rows // 6 * 4 + columns // 6) * 1000 + disk).astype(np.uint16))
    else:  # soft: a mask whose edge has many greys
        image = Image.fromarray(
            (np.hypot(rows - 12, columns - 9).clip(0, 12) * 21).astype(np.uint8)
        )
    image.save(path)


LAYOUTS: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    "DSB2018": (
        ["stage1_train/00ae/images/00ae.png", "stage1_train/01b2/images/01b2.png"],
        [
            ("stage1_train/00ae/masks/07a9.png", "binary"),
            ("stage1_train/00ae/masks/0e54.png", "binary"),
            ("stage1_train/01b2/masks/11c3.png", "binary"),
        ],
    ),
    "Carvana": (
        ["train/0cdf5b5d0ce1_01.jpg", "train/0cdf5b5d0ce1_02.jpg"],
        [
            ("train_masks/0cdf5b5d0ce1_01_mask.gif", "binary"),
            ("train_masks/0cdf5b5d0ce1_02_mask.gif", "binary"),
        ],
    ),
    "Pascal VOC": (
        ["VOC2012/JPEGImages/2007_000032.jpg", "VOC2012/JPEGImages/2007_000033.jpg"],
        [
            ("VOC2012/SegmentationClass/2007_000032.png", "palette"),
            ("VOC2012/SegmentationObject/2007_000032.png", "palette"),
            ("VOC2012/SegmentationClassAug/2007_000033.png", "ids"),
        ],
    ),
    "MVTec AD": (
        ["bottle/train/good/000.png", "bottle/test/broken_large/000.png"],
        [("bottle/ground_truth/broken_large/000_mask.png", "binary")],
    ),
    "nnU-Net": (
        ["Dataset001/imagesTr/case_001_0000.png", "Dataset001/imagesTs/case_002_0000.png"],
        [("Dataset001/labelsTr/case_001.png", "ids"), ("Dataset001/labelsTs/case_002.png", "ids")],
    ),
    "ISIC 2018": (
        ["ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg"],
        [("ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png", "binary")],
    ),
    "ISIC in one folder": (
        ["ISIC_0000000.jpg", "ISIC_0000001.jpg"],
        [("ISIC_0000000_segmentation.png", "binary"), ("ISIC_0000001_Segmentation.png", "soft")],
    ),
    "cellpose": (
        ["train/000_img.png", "train/001.tif"],
        [("train/000_masks.png", "instances"), ("train/001_cp_masks.png", "instances")],
    ),
    "Labels in capitals": (
        ["field/Photos/a.jpg", "field/Photos/b.jpg"],
        [("field/Labels/a.png", "ids"), ("field/LABELS 2/b.png", "colour")],
    ),
    "imgs and masks": (
        ["data/imgs/a.jpg", "data/imgs/b.jpg"],
        [("data/masks/a.gif", "binary"), ("data/masks/b.gif", "soft")],
    ),
    "CamVid": (
        ["train/0001TP_006690.png", "val/0016E5_07959.png", "test/Seq05VD_f00000.png"],
        [
            ("trainannot/0001TP_006690.png", "ids"),
            ("valannot/0016E5_07959.png", "ids"),
            ("testannot/Seq05VD_f00000.png", "ids"),
        ],
    ),
    "LoveDA": (
        ["Train/Urban/images_png/1366.png", "Train/Rural/images_png/0.png"],
        [
            ("Train/Urban/masks_png/1366.png", "ids"),
            ("Train/Rural/masks_png/0.png", "ids"),
        ],
    ),
    "Inria": (
        ["AerialImageDataset/train/images/austin1.tif", "AerialImageDataset/test/images/bell1.tif"],
        [("AerialImageDataset/train/gt/austin1.tif", "binary")],
    ),
    "Cityscapes": (
        ["leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"],
        [
            ("gtFine/train/aachen/aachen_000000_000019_gtFine_color.png", "colour"),
            ("gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", "ids"),
            ("gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png", "instances"),
        ],
    ),
    "COCO-Stuff": (
        ["train2017/000000000009.jpg", "val2017/000000000139.jpg"],
        [
            ("stuffthingmaps/train2017/000000000009.png", "ids"),
            ("stuffthingmaps_trainval2017/val2017/000000000139.png", "ids"),
        ],
    ),
    "ADE20K": (
        ["training/street/ADE_train_00000001.jpg"],
        [
            ("training/street/ADE_train_00000001_seg.png", "colour"),
            ("training/street/ADE_train_00000001_parts_1.png", "colour"),
            ("annotations/training/ADE_train_00000001.png", "ids"),
        ],
    ),
    # Not among the usual names: told by what the files hold.
    "CamVid, in colour": (
        ["701_StillsRaw_full/0001TP_006690.png", "701_StillsRaw_full/0001TP_006720.png"],
        [
            ("LabeledApproved_full/0001TP_006690_L.png", "colour"),
            ("LabeledApproved_full/0001TP_006720_L.png", "colour"),
        ],
    ),
    "Kvasir-SEG": (
        ["Kvasir-SEG/images/cju0.jpg", "Kvasir-SEG/images/cju1.jpg"],
        [("Kvasir-SEG/masks/cju0.jpg", "binary"), ("Kvasir-SEG/masks/cju1.jpg", "binary")],
    ),
    "siblings with the same stems": (
        ["set/input/a.jpg", "set/input/b.jpg"],
        [("set/output/a.png", "palette"), ("set/output/b.png", "colour")],
    ),
    "one folder, two formats": (
        ["a.jpg", "b.jpg", "c.png"],
        [("a.png", "ids"), ("b.png", "palette")],
    ),
    "numbered from the front": (
        ["img/image_1.jpg", "img/image_2.jpg"],
        [("out/mask_1.png", "binary"), ("out/label-2.png", "ids")],
    ),
    "DRIVE": (
        ["training/images/21_training.tif", "training/images/22_training.tif"],
        [
            ("training/1st_manual/21_manual1.gif", "binary"),
            ("training/1st_manual/22_manual1.gif", "binary"),
            ("training/mask/21_training_mask.gif", "binary"),
        ],
    ),
}


def build(root: Path, layout: str) -> list[str]:
    photos, masks = LAYOUTS[layout]
    for index, name in enumerate(photos):
        photo(root / name, index)
    for name, kind in masks:
        mask(root / name, kind)
    return sorted(photos)


def read_names(source: Path, **options: bool) -> list[str]:
    found = find_images(source, **options)
    return sorted(file.member or file.path.relative_to(source).as_posix() for file in found.files)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_the_photos_of_a_public_layout_are_read(tmp_path: Path, layout: str) -> None:
    photos = build(tmp_path / "set", layout)
    assert read_names(tmp_path / "set") == photos
    (note,) = (note for note in find_images(tmp_path / "set").notes if "masks and labels" in note)
    assert f"not read as photos ({len(LAYOUTS[layout][1])}): " in note
    assert note.endswith("--include-masks reads them too")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_in_a_zip_below_one_top_folder(tmp_path: Path, layout: str) -> None:
    photos = build(tmp_path / "set", layout)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted((tmp_path / "set").rglob("*.*")):
            archive.write(path, f"download/{path.relative_to(tmp_path / 'set').as_posix()}")
    assert read_names(tmp_path / "set.zip") == [f"download/{name}" for name in photos]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_read_if_that_is_meant(tmp_path: Path, layout: str) -> None:
    build(tmp_path / "set", layout)
    masks = [name for name, _ in LAYOUTS[layout][1]]
    assert set(masks) <= set(read_names(tmp_path / "set", include_masks=True))


@pytest.mark.parametrize("name", ["labels/b.png", "a_color.png", "a_l.png"])
def test_a_sure_name_is_enough_where_the_look_decides_nothing(tmp_path: Path, name: str) -> None:
    photo(tmp_path / "a.jpg")
    mask(tmp_path / name, "soft")
    assert look(find_images(tmp_path / name, include_masks=True).files[0]) == "unclear"
    assert read_names(tmp_path) == ["a.jpg"]


# Photos that are not lost


@pytest.mark.parametrize(
    "names",
    [
        ["mask/1.jpg", "no mask/1.jpg"],
        ["with_mask/1.jpg", "without_mask/1.jpg"],
        ["carnival masks/1.jpg", "parade/2.jpg"],
        ["label design/a.png", "box/a.png"],
        ["selfie_mask.jpg", "selfie.jpg"],
        ["mask/1.jpg", "mask/2.jpg"],
        ["seg/a.png", "segovia/a.png"],
        ["stereo/a_L.png", "stereo/a_R.png"],
        ["a_color.png", "a.png"],
        ["gt cars/1.jpg", "suv/1.jpg"],
    ],
    ids=lambda names: names[0],
)
def test_photos_with_names_of_masks_are_read(tmp_path: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        photo(tmp_path / name, index)
    found = find_images(tmp_path)
    assert len(found.files) == len(names)
    assert not any("not read" in note for note in found.notes)


def test_photos_that_are_read_despite_their_name_are_said(tmp_path: Path) -> None:
    for index in range(3):
        photo(tmp_path / f"with_mask/{index}.jpg", index)
        photo(tmp_path / f"without/{index}.jpg", 3 + index)
    assert "named like masks, but read as photos by their look (3): with_mask (3)" in "".join(
        find_images(tmp_path).notes
    )


@pytest.mark.parametrize("suffix", [".png", ".tif", ".gif", ".jpg"])
def test_drawings_and_documents_without_a_partner_are_read(tmp_path: Path, suffix: str) -> None:
    for index in range(6):
        mask(tmp_path / f"pages/{index}{suffix}")
    assert len(find_images(tmp_path).files) == 6


def test_drawings_in_folders_of_classes_with_the_same_numbers_are_read(tmp_path: Path) -> None:
    for kind in ("cats", "dogs", "birds"):
        for index in range(4):
            mask(tmp_path / kind / f"{index:03}.png", "colour")
    assert len(find_images(tmp_path).files) == 12


@pytest.mark.parametrize("grey", [False, True])
def test_photos_in_folders_of_classes_with_the_same_numbers_are_read(
    tmp_path: Path, grey: bool
) -> None:
    for seed, kind in enumerate(("cats", "dogs", "birds")):
        for index in range(4):
            photo(tmp_path / kind / f"{index:03}.png", 10 * seed + index, grey=grey)
    assert len(find_images(tmp_path).files) == 12


def test_a_drawing_of_another_size_than_the_photo_of_its_name_is_read(tmp_path: Path) -> None:
    photo(tmp_path / "a/1.jpg")
    mask(tmp_path / "b/1.png")
    with Image.open(tmp_path / "b/1.png") as image:
        image.resize((SIDE, 2 * SIDE)).save(tmp_path / "b/1.png")
    assert len(find_images(tmp_path).files) == 2


def test_a_source_of_masks_alone_is_an_error_that_says_how_to_read_them(tmp_path: Path) -> None:
    from iddc.errors import DataError

    mask(tmp_path / "labels/a.png")
    with pytest.raises(DataError, match=r"No image.*labels \(1\); --include-masks reads them"):
        find_images(tmp_path)


def test_a_list_is_read_as_it_is_and_says_what_looks_like_a_mask(tmp_path: Path) -> None:
    photo(tmp_path / "photos/a.jpg")
    mask(tmp_path / "masks/a.png")
    (tmp_path / "list.txt").write_text("photos/a.jpg\nmasks/a.png\n")
    found = find_images(tmp_path / "list.txt")
    assert len(found.files) == 2
    assert "looks like masks or labels (1): masks (1); they are read" in found.notes[0]


# The look


@pytest.mark.parametrize("kind", ["binary", "ids", "palette", "colour", "instances"])
def test_masks_of_every_kind_look_like_labels(tmp_path: Path, kind: str) -> None:
    mask(tmp_path / "a.png", kind)
    assert look(find_images(tmp_path / "a.png").files[0]) == "label"


def test_a_mask_of_forty_regions_looks_like_a_label(tmp_path: Path) -> None:
    """More values than a photo could have by chance, each with equal neighbours."""
    regions = np.arange(40, dtype=np.uint8).reshape(5, 8).repeat(12, 0).repeat(12, 1)
    Image.fromarray(regions).save(tmp_path / "a.png")
    assert look(find_images(tmp_path / "a.png").files[0]) == "label"


@pytest.mark.parametrize(("run", "expected"), [(4, "label"), (3, "unclear")])
def test_a_label_has_three_of_five_neighbours_alike(
    run: int, expected: str, tmp_path: Path
) -> None:
    rows = np.arange(20, dtype=np.uint8)[:, None].repeat(run, 1)
    Image.fromarray(np.pad(rows, [(0, 0), (1, 1)], constant_values=255)).save(tmp_path / "a.png")
    assert look(find_images(tmp_path / "a.png").files[0]) == expected


def test_many_colours_in_runs_of_three_are_unclear(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(colours.repeat(3, 1)).save(tmp_path / "a.png")
    assert look(find_images(tmp_path / "a.png").files[0]) == "unclear"


def test_a_photo_looks_like_a_photo_and_a_grey_one_is_unclear(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", grey=True)
    (tmp_path / "c.png").write_bytes(b"no image")
    looks = [look(find_images(tmp_path / f"{stem}.png").files[0]) for stem in "abc"]
    assert looks == ["photo", "unclear", "unclear"]
