"""Colours that differ, and images of ids as another program reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddc.errors import SetupError
from iddc.masks import cluster_names, overlay, palette, write_ids, write_image
from iddc.masks.ids import with_palette


def test_clusters_are_named_by_number() -> None:
    assert cluster_names(3) == ("cluster 0", "cluster 1", "cluster 2")


@pytest.mark.parametrize("num", [1, 27, 256, 1000])
def test_colours_are_all_different_and_none_is_black_white_or_grey(num: int) -> None:
    colours = palette(num)
    assert colours.shape == (num, 3)
    assert len(np.unique(colours, axis=0)) == num
    neutral = np.array([[v, v, v] for v in (0, 128, 255)])
    distance = np.abs(colours.astype(int)[:, None] - neutral).max(2).min(1)
    assert distance.min() > 0
    assert distance[:30].min() >= 45


def test_the_first_thirty_colours_differ_clearly_in_some_channel() -> None:
    colours = palette(30).astype(int)
    apart = np.abs(colours[:, None] - colours).max(2) + 255 * np.eye(30, dtype=int)
    assert apart.min() >= 45


def test_a_longer_palette_begins_with_the_shorter_one() -> None:
    assert (palette(40)[:11] == palette(11)).all()


def test_more_clusters_than_colours_repeat_them() -> None:
    colours = palette(65535)
    assert colours.shape == (65535, 3)
    assert len(np.unique(colours, axis=0)) > 3000


@pytest.mark.parametrize(
    ("dtype", "highest", "mode"), [(np.uint8, 255, "L"), (np.uint16, 65534, "I;16")]
)
def test_ids_are_read_back_by_pillow_as_they_were(
    tmp_path: Path, dtype: type, highest: int, mode: str
) -> None:
    clusters = np.array([[0, 1, 2], [3, highest, 5]], dtype)
    write_ids(tmp_path / "ids.png", clusters)
    with Image.open(tmp_path / "ids.png") as image:
        assert image.format == "PNG"
        assert image.mode in {mode, "I"}  # Pillow 10 reads 16 bits as 32
        assert np.asarray(image).tolist() == clusters.tolist()


def test_a_png_states_the_bits_of_its_ids_in_its_header(tmp_path: Path) -> None:
    # Byte 24 of a PNG is the bit depth, byte 25 the colour type: 0 grey, 3 palette.
    clusters = np.zeros((2, 3), np.uint8)
    write_ids(tmp_path / "8.png", clusters)
    write_ids(tmp_path / "16.png", clusters.astype(np.uint16))
    write_image(tmp_path / "p.png", with_palette(clusters, palette(5)))
    headers = [tuple((tmp_path / name).read_bytes()[24:26]) for name in ("8.png", "16.png")]
    assert headers == [(8, 0), (16, 0)]
    assert tuple((tmp_path / "p.png").read_bytes()[24:26]) == (8, 3)


def test_a_palette_png_holds_ids_and_shows_colours_and_black_for_ids_without(
    tmp_path: Path,
) -> None:
    ids, colours = np.array([[0, 4], [2, 255]], np.uint8), palette(5)
    write_image(tmp_path / "mask.png", with_palette(ids, colours))
    with Image.open(tmp_path / "mask.png") as image:
        assert np.asarray(image).tolist() == ids.tolist()
        shown = [[colours[0].tolist(), colours[4].tolist()], [colours[2].tolist(), [0, 0, 0]]]
        assert np.asarray(image.convert("RGB")).tolist() == shown


def test_an_overlay_mixes_image_and_colour_by_opacity() -> None:
    image = Image.new("RGB", (2, 1), (100, 100, 100))
    colours = np.array([[200, 0, 100], [0, 0, 0]], np.uint8)
    clusters = np.array([[0, 1]], np.uint8)
    mixed = np.asarray(overlay(image, clusters, colours))
    assert np.abs(mixed.astype(int) - [[[150, 50, 100], [50, 50, 50]]]).max() <= 1
    assert np.asarray(overlay(image, clusters, colours, opacity=0.0)).tolist() == [[[100] * 3] * 2]
    assert np.asarray(overlay(image, clusters, colours, opacity=1.0)).tolist() == [colours.tolist()]


def test_an_overlay_leaves_pixels_without_a_colour_as_they_are() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    mixed = overlay(image, np.array([[255, 0]], np.uint8), palette(1), opacity=1.0)
    assert np.asarray(mixed).tolist() == [[[10, 20, 30], palette(1)[0].tolist()]]


def test_images_are_written_with_their_folders_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "ü" / "mask.png"
    write_image(path, Image.new("RGB", (2, 2)))
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="Cannot write"):
        write_image(tmp_path / "file" / "mask.png", Image.new("RGB", (2, 2)))
