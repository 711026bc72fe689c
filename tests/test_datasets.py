from __future__ import annotations

import struct
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddc.config import DatasetName
from iddc.datasets import DATASETS, open_dataset
from iddc.datasets.folder import read_ids
from iddc.datasets.synthetic import CAR, CLASSES, ROAD, SKY, THEMES, draw_scene, write_scenes
from iddc.errors import ConfigError, DataError, UnreadableImage

LABEL = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)


def write_pair(
    folder: Path, stem: str = "a", *, label: np.ndarray = LABEL, suffix: str = ".jpg"
) -> None:
    for kind in ("images", "labels"):
        (folder / kind / stem).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), "red").save(folder / "images" / f"{stem}{suffix}")
    Image.fromarray(label).save(folder / "labels" / f"{stem}.png")


def grey_png(path: Path, ids: np.ndarray, bits: int) -> Path:
    """Write grey of 1, 2 or 4 bits, as PNG optimisers do and Pillow does not."""
    rows = [
        b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
        for row in ids.astype(np.uint8)
    ]
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)
    return path


# folder


def test_the_table_holds_every_name_of_the_configuration() -> None:
    assert set(DATASETS) == set(typing.get_args(DatasetName))


def test_an_unknown_data_set_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown data set 'ade20k'\. Known: .*folder"):
        open_dataset("ade20k", tmp_path, "val")


@pytest.mark.parametrize("where", ["val", "."])
def test_a_folder_with_or_without_splits_is_read(tmp_path: Path, where: str) -> None:
    for stem, suffix in (("b c", ".png"), ("ü/a", ".jpg")):
        write_pair(tmp_path / where, stem, suffix=suffix)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    dataset = open_dataset("folder", tmp_path, "val")
    assert len(dataset) == 2
    assert dataset.class_names == ("sky", "road", "car", "tree")
    assert dataset.num_classes == 4
    samples = [dataset[0], dataset[1]]
    assert [sample.name for sample in samples] == ["b c.png", "ü/a.jpg"]
    assert samples[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert samples[0].label.dtype == np.uint8
    assert np.array_equal(samples[0].label, LABEL)


def test_a_split_has_its_own_class_names_if_it_lists_them(tmp_path: Path) -> None:
    write_pair(tmp_path / "val")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "val/classes.txt").write_text("\ufeffx \r\ny\r\nz\r\n\r\n")
    assert open_dataset("folder", tmp_path, "val").class_names == ("x", "y", "z")


def test_without_names_there_are_as_many_classes_as_the_highest_id_says(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b", label=LABEL.clip(max=4) + np.uint8(1))
    assert open_dataset("folder", tmp_path, "val").class_names == tuple(
        f"class {i}" for i in range(6)
    )


def test_a_folder_that_is_no_data_set_is_an_error_that_says_where_it_looked(
    tmp_path: Path,
) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(
        DataError, match=rf"looked for .* in {tmp_path}/val and in {tmp_path}; found train\. Give"
    ):
        open_dataset("folder", tmp_path, "val")
    with pytest.raises(DataError, match="found no folder"):
        open_dataset("folder", tmp_path / "nowhere", "val")


def test_an_image_without_label_and_a_label_without_image_are_named(tmp_path: Path) -> None:
    for stem in "abcdefgh":
        write_pair(tmp_path, stem)
    for stem in "cdefgh":
        (tmp_path / f"labels/{stem}.png").unlink()
    with pytest.raises(DataError, match=r"images with no label .*\(6\): c, d, e, f, g, and 1 more"):
        open_dataset("folder", tmp_path, "val")
    for stem in "acdefgh":
        (tmp_path / f"images/{stem}.jpg").unlink()
    with pytest.raises(DataError, match=r"labels with no image .*\(1\): a\."):
        open_dataset("folder", tmp_path, "val")


def test_two_images_for_one_label_are_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", suffix=".jpg")
    write_pair(tmp_path, "a", suffix=".png")
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png share a stem"):
        open_dataset("folder", tmp_path, "val")


def test_a_label_of_another_size_than_its_image_is_an_error_with_both_sizes(
    tmp_path: Path,
) -> None:
    write_pair(tmp_path, label=LABEL.T.copy())
    with pytest.raises(DataError, match=r"labels/a\.png is 2 x 3 .*images/a\.jpg is 3 x 2"):
        open_dataset("folder", tmp_path, "val")[0]


def test_ids_out_of_range_are_an_error_that_lists_them(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    write_pair(tmp_path, label=np.array([[0, 7, 2], [254, 255, 1]], np.uint8))
    with pytest.raises(DataError, match=r"a\.png: class ids are 0 to 1, or 255 .* 2, 7, 254\."):
        open_dataset("folder", tmp_path, "val")[0]


def test_a_16_bit_id_that_no_byte_holds_is_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    write_pair(tmp_path, label=np.array([[0, 1, 256], [0, 0, 255]], np.uint16))
    with pytest.raises(DataError, match=r"found 256\."):
        open_dataset("folder", tmp_path, "val")[0]


def test_labels_without_any_class_are_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path, label=np.full((2, 3), 255, np.uint8))
    with pytest.raises(DataError, match=r"Every label pixel .* is 255"):
        open_dataset("folder", tmp_path, "val")


def test_more_classes_than_ids_are_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))
    with pytest.raises(DataError, match=r"256 classes .* at most 255"):
        open_dataset("folder", tmp_path, "val")


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nroad\n sky\n")
    with pytest.raises(DataError, match="names sky twice"):
        open_dataset("folder", tmp_path, "val")


def test_an_empty_list_of_classes_is_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "classes.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"classes\.txt is empty"):
        open_dataset("folder", tmp_path, "val")


def test_names_of_classes_in_another_encoding_are_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "classes.txt").write_bytes("Bürgersteig".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8 text"):
        open_dataset("folder", tmp_path, "val")


def test_a_damaged_image_is_unreadable_when_it_is_asked_for(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "images/a.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"a\.jpg: the file is empty"):
        open_dataset("folder", tmp_path, "val")[0]


# labels


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_label_in_colour_is_an_error_that_says_what_a_label_is(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a\.png has {len(mode)} channels \({mode}\)"):
        read_ids(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_label_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png is not a PNG that can be read"):
        read_ids(tmp_path / "a.png")


def test_ids_of_a_palette_are_its_indices(tmp_path: Path) -> None:
    image = Image.fromarray(LABEL).convert("P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(tmp_path / "a.png", transparency=0)
    assert np.array_equal(read_ids(tmp_path / "a.png"), LABEL)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_in_grey_are_kept(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(LABEL.astype(dtype)).save(tmp_path / "a.png")
    assert np.array_equal(read_ids(tmp_path / "a.png"), LABEL)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_in_grey_of_few_bits_are_kept(tmp_path: Path, bits: int) -> None:
    ids = np.arange(21).reshape(3, 7) % 2**bits
    assert np.array_equal(read_ids(grey_png(tmp_path / "a.png", ids, bits)), ids)


def test_a_label_beyond_the_limit_of_pillow_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(LABEL).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert np.array_equal(read_ids(tmp_path / "a.png"), LABEL)


def test_camvid_is_a_folder_data_set(shared_data: Path) -> None:
    dataset = open_dataset("folder", shared_data / "camvid", "val")
    assert len(dataset) == 101
    assert dataset.num_classes == 11
    sample = dataset[0]
    assert sample.image.size == (480, 360)
    assert sample.label.shape == (360, 480)


# synthetic


def test_scenes_are_a_folder_data_set_with_train_and_val(tmp_path: Path) -> None:
    write_scenes(tmp_path / "set", 10, seed=0, size=(80, 60))
    train, val = (open_dataset("folder", tmp_path / "set", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2)
    assert train.class_names == CLASSES
    for index in range(8):
        sample = train[index]
        assert sample.image.size == (80, 60)
        assert sample.label.max() < len(CLASSES)


def test_a_scene_depends_on_seed_and_number_only(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", 3, seed=4, size=(64, 48))
    write_scenes(tmp_path / "many", 6, seed=4, size=(64, 48))
    write_scenes(tmp_path / "other", 3, seed=5, size=(64, 48))
    few, many, other = (
        (tmp_path / name / "train/images/scene_00001.jpg").read_bytes()
        for name in ("few", "many", "other")
    )
    assert few == many != other


def test_classes_of_scenes_are_all_there_and_strongly_imbalanced() -> None:
    counts = sum(
        np.bincount(
            draw_scene(np.random.default_rng(seed), (160, 120))[1].ravel(), minlength=len(CLASSES)
        )
        for seed in range(20)
    )
    assert (counts > 0).all()
    assert counts[ROAD] > 5 * counts[CAR]


def test_the_label_of_a_scene_shows_the_sky_above_the_road() -> None:
    rows = np.indices((120, 160))[0]
    for seed in range(10):
        label = draw_scene(np.random.default_rng(seed), (160, 120))[1]
        assert rows[label == SKY].mean() < 60 < rows[label == ROAD].mean()


def test_colour_alone_does_not_tell_classes_apart() -> None:
    # Where this holds, the nearest colour to a sky is a road and not the average sky.
    skies = np.array([theme.horizon for theme in THEMES.values()], float)
    roads = np.array([theme.road for theme in THEMES.values()], float)
    to_road = np.linalg.norm(skies[:, None] - roads, axis=-1).min(axis=1)
    to_sky = np.linalg.norm(skies - skies.mean(axis=0), axis=-1)
    assert len(THEMES) >= 8
    assert (to_road < to_sky).sum() >= 3


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (400, 60)])
def test_scenes_of_any_size_are_drawn(size: tuple[int, int]) -> None:
    for seed in range(10):
        image, label = draw_scene(np.random.default_rng(seed), size)
        assert image.shape == (size[1], size[0], 3)
        assert label.shape == (size[1], size[0])
