"""Colours that differ, and images of ids as another program reads them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from iddc.errors import SetupError
from iddc.masks import cluster_names, overlay, palette, write_ids, write_image
from iddc.masks.colours import VISIONS, _oklab, legend
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
    assert distance[:27].min() >= 38


def linear(colours: np.ndarray) -> np.ndarray:
    """sRGB of 8 bits as light, by IEC 61966-2-1."""
    rows = (colours / 255).tolist()
    return np.array(
        [[v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in row] for row in rows]
    )


def cielab(light: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear sRGB, white D65, by the formulas of CIE 15."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750]]
    to_xyz += [[0.0193339, 0.1191920, 0.9503041]]
    xyz = light.clip(0, 1) @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


def as_a_dichromat_sees(light: np.ndarray, vision: str) -> np.ndarray:
    """Red-green blindness by Vienot, Brettel and Mollon (1999), blue by Brettel et al. (1997).

    Neither is what `colours.py` uses (Machado et al., 2009).
    """
    cones = np.array(
        [
            [17.8824, 43.5161, 4.11935],
            [3.45565, 27.1554, 3.86714],
            [0.0299566, 0.184309, 1.46709],
        ]
    )
    lost = {
        "protanopia": [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]],
        "deuteranopia": [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]],
    }
    if vision in lost:
        return light @ (np.linalg.inv(cones) @ lost[vision] @ cones).T
    if vision == "tritanopia":  # two half planes, in linear sRGB (as tabulated by libDaltonLens)
        above = [[1.01277, 0.13548, -0.14826], [-0.01243, 0.86812, 0.14431]]
        above += [[0.07589, 0.80500, 0.11911]]
        below = [[0.93678, 0.18979, -0.12657], [0.06154, 0.81526, 0.12320]]
        below += [[-0.37562, 1.12767, 0.24796]]
        side = light @ np.array([0.03901, -0.02788, -0.01113])
        return np.where(side[:, None] >= 0, light @ np.array(above).T, light @ np.array(below).T)
    return light


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """Linear sRGB of colours in OKLab, by the inverse matrices that Ottosson (2020) prints."""
    to_cones = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728]]
    to_cones += [[1, -0.0894841775, -1.2914855480]]
    to_rgb = [[4.0767416621, -3.3077115913, 0.2309699292]]
    to_rgb += [[-1.2684380046, 2.6097574011, -0.3413193965]]
    to_rgb += [[-0.0041960863, -0.7034186147, 1.7076147010]]
    return (lab @ np.array(to_cones).T) ** 3 @ np.array(to_rgb).T


def test_distances_of_colours_are_taken_in_oklab() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    rgb[:12] = np.arange(12)[:, None]  # the dark end of sRGB is a line
    assert from_oklab(_oklab(rgb, np.eye(3))) == pytest.approx(linear(rgb), abs=1e-6)


@pytest.mark.parametrize("vision", VISIONS)
def test_people_with_any_vision_see_grey_as_grey(vision: str) -> None:
    greys = np.repeat(np.arange(0, 256, 15, dtype=np.uint8)[:, None], 3, axis=1)
    seen = _oklab(greys, np.array(VISIONS[vision]))
    assert seen[:, 0] == pytest.approx(np.cbrt(linear(greys)[:, 0]), abs=1e-4)
    assert seen[:, 1:] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("num", [8, 12, 20])
def test_the_next_colour_is_the_one_farthest_from_all_before(num: int) -> None:
    """Looked for one by one among all calm colours, as each vision sees them."""

    def seen(colours: np.ndarray) -> np.ndarray:
        return np.stack([_oklab(colours, np.array(vision)) for vision in VISIONS.values()])

    neutral = np.array([[0] * 3, [128] * 3, [255] * 3], np.uint8)
    before = seen(np.concatenate([neutral, palette(num - 1)]))
    everything = seen(palette(3000))
    away = [
        np.linalg.norm(everything - before[:, [index]], axis=2).min(0)
        for index in range(before.shape[1])
    ]
    assert int(np.stack(away).min(0).argmax()) == num - 1


def test_colours_after_the_first_are_neither_dark_nor_light_nor_glaring() -> None:
    lightness, a, b = _oklab(palette(3000)[7:], np.eye(3)).T
    assert (lightness.min(), lightness.max()) == pytest.approx((0.35, 0.9), abs=0.01)
    assert np.hypot(a, b).max() == pytest.approx(0.22, abs=0.005)


@pytest.mark.parametrize("vision", ["normal", "protanopia", "deuteranopia", "tritanopia"])
@pytest.mark.parametrize(("num", "least"), [(12, 10), (18, 10), (27, 8)])
def test_no_two_colours_look_alike_to_people_with_any_vision(
    vision: str, num: int, least: float
) -> None:
    # A distance of 2.3 in CIE Lab is just noticeable. The palette before had 1.5 here.
    seen = cielab(as_a_dichromat_sees(linear(palette(num)), vision))
    apart = np.linalg.norm(seen[:, None] - seen, axis=2) + 1e3 * np.eye(num)
    assert apart.min() > least


def test_the_first_colours_are_those_of_okabe_and_ito() -> None:
    # Color Universal Design, 2008: orange, sky blue, bluish green, yellow, blue, vermilion, reddish
    # purple. The eighth, black, is for ignored pixels.
    table = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)]
    table += [(0, 114, 178), (213, 94, 0), (204, 121, 167)]
    assert palette(7).tolist() == [[*colour] for colour in table]


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


def test_a_legend_is_as_wide_as_its_longest_name_and_as_high_as_all() -> None:
    colours, names = np.array([[255, 0, 0], [0, 128, 0]], np.uint8), ("a", "a <long> name")
    root = ElementTree.fromstring(legend(names, colours))
    below = root.iter("{http://www.w3.org/2000/svg}text")
    assert [text.text for text in below] == ["0 · a", "1 · a <long> name"]
    boxes = root.iter("{http://www.w3.org/2000/svg}rect")
    assert [box.get("fill") for box in boxes] == ["white", "#ff0000", "#008000"]
    # Text begins at 36; 10 a letter is more than any letter of 14 takes.
    assert int(root.attrib["width"]) >= 36 + 10 * len("1 · a <long> name")
    assert int(root.attrib["height"]) >= 2 * 22


def test_images_are_written_with_their_folders_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "ü" / "mask.png"
    write_image(path, Image.new("RGB", (2, 2)))
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="Cannot write"):
        write_image(tmp_path / "file" / "mask.png", Image.new("RGB", (2, 2)))
