from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iddc.errors import DataError, UnreadableImage
from iddc.images import (
    MAX_PIXELS,
    SUFFIXES,
    ImageFile,
    ahead,
    check_images,
    find_images,
    lookahead,
    open_image,
    quiet_pillow,
    to_rgb,
)


def save(path: Path, size: tuple[int, int] = (8, 6), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def names(source: Path) -> list[str]:
    return [str(file.name) for file in find_images(source).files]


def numbered(path: Path, mode: str, values: np.ndarray) -> Path:
    Image.frombytes(mode, values.shape[::-1], values.tobytes()).save(path)
    return path


NOISE = np.random.default_rng(0).integers(0, 256, size=(40, 60, 3), dtype=np.uint8)


# find_images


def test_a_folder_is_read_with_its_subfolders_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/b/c.jpeg", "ä ö/über uns.webp"):
        save(tmp_path / name)
    assert names(tmp_path) == ["a/b/c.jpeg", "a/z.JPG", "b.png", "ä ö/über uns.webp"]


def test_every_suffix_is_recognised_in_lower_and_upper_case(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        (tmp_path / f"low{suffix[1:]}{suffix}").touch()
        (tmp_path / f"up{suffix[1:]}{suffix.upper()}").touch()
    assert len(names(tmp_path)) == 2 * len(SUFFIXES)


def test_hidden_files_and_folders_are_not_read(tmp_path: Path) -> None:
    for name in ("a.png", ".a.png", ".trash/b.png", "__MACOSX/c.png"):
        save(tmp_path / name)
    assert names(tmp_path) == ["a.png"]


def test_label_folders_are_not_read_and_a_note_says_so(tmp_path: Path) -> None:
    for name in ("train/images/a.png", "train/labels/a.png", "gtFine/b/c.png", "gtFine/d.png"):
        save(tmp_path / name)
    found = find_images(tmp_path)
    assert [str(file.name) for file in found.files] == ["train/images/a.png"]
    assert found.notes == (
        "masks and labels not read as photos (3): gtFine (2), train/labels (1); --include-masks "
        "reads them too",
    )


def test_a_folder_that_holds_images_is_read_only_there(tmp_path: Path) -> None:
    for name in ("images/x/a.png", "preview.png"):
        save(tmp_path / name)
    found = find_images(tmp_path)
    assert [str(file.name) for file in found.files] == ["x/a.png"]
    assert found.files[0].path == tmp_path / "images/x/a.png"
    assert found.notes == (f"reads only images/ of {tmp_path}",)


def test_files_of_other_kinds_are_counted_in_a_note(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "README"):
        (tmp_path / name).touch()
    assert find_images(tmp_path).notes == ("files of other kinds: .heic (2), without suffix (1)",)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    save(tmp_path / "photos/a.png")
    (tmp_path / "photos/again").symlink_to(tmp_path / "photos", target_is_directory=True)
    found = find_images(tmp_path / "photos")
    assert [str(file.name) for file in found.files] == ["a.png"]
    assert "read already" in found.notes[0]


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "disk/a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert names(tmp_path / "photos") == ["linked/a.png"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_in_place(tmp_path: Path, compression: int) -> None:
    data = encoded(Image.fromarray(NOISE), "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        for name in ("b/ü x.png", "a.png", "__MACOSX/b/._a.png", ".h.png", "labels/a.png", "t.txt"):
            archive.writestr(name, data)
    found = find_images(tmp_path / "a.zip")
    assert [str(file.name) for file in found.files] == ["a.png", "b/ü x.png"]
    assert [str(file) for file in found.files] == [
        f"{tmp_path}/a.zip!a.png",
        f"{tmp_path}/a.zip!b/ü x.png",
    ]
    assert found.files[1].read_bytes() == data
    assert np.array_equal(np.asarray(open_image(found.files[1])), NOISE)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.zip"]


def test_a_zip_written_anew_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for colour in ("red", "blue"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("padding", b"x" * 100 * len(colour))
            archive.writestr("a.png", encoded(Image.new("RGB", (1, 1), colour), "PNG"))
        pixel = open_image(find_images(path).files[0]).getpixel((0, 0))
        os.utime(path, ns=(0, 0))
    assert pixel == (0, 0, 255)


def test_a_member_of_a_zip_gets_a_name_inside_the_output_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("../../up.png", "/etc/root.png", "C:\\Users\\win.png"):
            archive.writestr(name, b"")
    assert names(tmp_path / "a.zip") == ["Users/win.png", "etc/root.png", "up.png"]


@pytest.mark.parametrize(
    ("members", "found", "notes"),
    [
        (["images", "a.png"], ["a.png"], ("files of other kinds: without suffix (1)",)),
        (["images", "images/a.png", "b.png"], ["a.png"], ("reads only images/ of {path}",)),
    ],
)
def test_only_a_folder_that_is_called_images_is_read_alone(
    members: list[str], found: list[str], notes: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, b"")
    assert names(path) == found
    assert find_images(path).notes == tuple(note.format(path=path) for note in notes)


def test_names_in_a_zip_that_are_utf8_without_saying_so_are_read_as_such(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (1, 1), "red"), "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("xx/yy.png", data)
        archive.writestr("\u00fc.png", data)  # Python says that this is UTF-8
    # As Info-ZIP and macOS write it: the bytes of UTF-8, and no flag.
    raw = (tmp_path / "a.zip").read_bytes().replace(b"xx/yy.png", "\u00fc/\u00e9.png".encode())
    (tmp_path / "a.zip").write_bytes(raw)
    found = find_images(tmp_path / "a.zip")
    assert [str(file.name) for file in found.files] == ["\u00fc/\u00e9.png", "\u00fc.png"]
    assert str(found.files[0]).endswith("!\u00fc/\u00e9.png")
    assert open_image(found.files[0]).getpixel((0, 0)) == (255, 0, 0)


def test_a_list_keeps_its_order_and_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    for name in ("photos/b b.png", "photos/a.png"):
        save(tmp_path / name)
    listed = tmp_path / "list.txt"
    listed.write_text("\ufeffphotos/b b.png\r\n\n  photos/a.png \nphotos/../photos/a.png\n")
    found = find_images(listed)
    assert [str(file.name) for file in found.files] == ["photos/b b.png", "photos/a.png"]
    assert found.notes == (f"{listed} repeats paths (1)",)
    assert open_image(found.files[0]).size == (8, 6)


def test_paths_outside_the_folder_of_the_list_are_named_below_their_common_folder(
    tmp_path: Path,
) -> None:
    first, second = save(tmp_path / "disk/a/x.png"), save(tmp_path / "disk/b/x.png")
    (tmp_path / "lists").mkdir()
    listed = tmp_path / "lists/all.txt"
    listed.write_text(f"{first}\n../disk/b/x.png\n")
    found = find_images(listed)
    assert [str(file.name) for file in found.files] == ["a/x.png", "b/x.png"]
    assert found.files[1].path.samefile(second)


def test_one_image_is_a_source(tmp_path: Path) -> None:
    assert names(save(tmp_path / "a b.png")) == ["a b.png"]


def test_a_limit_takes_the_first_images_and_changes_no_name(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.png"):
        save(tmp_path / name)
    every = find_images(tmp_path).files
    assert [str(file.name) for file in every] == ["a_jpg.jpg", "a_png.png", "b.png"]
    assert find_images(tmp_path, limit=1).files == every[:1]


@given(
    st.lists(st.sampled_from(["a", "a_png", "a_png_", "b/a", "../a", "b/../a", "/a"]), unique=True),
    st.lists(st.sampled_from([".png", ".jpg", ".tar.png"]), min_size=1, unique=True),
)
def test_names_are_safe_and_distinct_without_suffix(stems: list[str], suffixes: list[str]) -> None:
    members = [stem + suffix for stem in ["c", *stems] for suffix in suffixes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, b"")
        found = [file.name for file in find_images(path).files]
    assert len({name.with_suffix("") for name in found}) == len(found)
    assert not any(name.is_absolute() or ".." in name.parts for name in found)
    assert {name.suffix for name in found} == {Path(member).suffix for member in members}


def test_a_missing_source_is_an_error_that_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file or folder: .*nowhere\. Expected a folder"):
        find_images(tmp_path / "nowhere")


def test_a_folder_without_images_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no file"):
        find_images(tmp_path)
    (tmp_path / "a.heic").touch()
    save(tmp_path / "labels/a.png")
    with pytest.raises(DataError, match=r"labels \(1\); .*; files of other kinds: \.heic \(1\)"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK no zip", "not a zip that can be read"),
        ("a.txt", b"", "lists no path"),
        ("a.txt", b"b.png\nc.png\n", "None of the 2 paths .* exists; the first .*b.png"),
        ("a.pth", b"\x80\x02\xff\x00", "neither a folder, a zip"),
        ("a.bin", b"\0\0\0", "neither a folder, a zip"),
    ],
)
def test_a_file_that_is_no_source_is_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_images(tmp_path / name)


# open_image: less than the whole


@pytest.mark.parametrize(("needed", "size"), [(0, 1200), (300, 300), (301, 600), (2000, 1200)])
def test_a_jpeg_comes_reduced_but_never_below_what_is_needed(
    needed: int, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (1600, 1200)).save(path)
    assert open_image(path, needed).size == (size * 4 // 3, size)


def test_other_formats_come_whole(tmp_path: Path) -> None:
    Image.new("RGB", (800, 600)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", 100).size == (800, 600)


# open_image: what cannot be read


TRUNCATED = {
    kind: encoded(Image.fromarray(NOISE), kind)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000")
}


@pytest.mark.parametrize("kind", TRUNCATED)
def test_a_truncated_file_is_unreadable(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(TRUNCATED[kind][: len(TRUNCATED[kind]) // 2])
    with pytest.raises(UnreadableImage, match=r"a\.jpg: (damaged or cut short|not an image)"):
        open_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"I am a text file named .jpg", r"not an image in a known format \(JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (TRUNCATED["JPEG"][:300] + bytes(500), "damaged or cut short|not an image"),
        (png_header(8, 8), "damaged or cut short"),
        (png_header(25_000, 20_001), "claims more than 500 megapixels"),
        (png_header(2**31 - 1, 2**31 - 1), "claims more than 500 megapixels"),
    ],
)
def test_a_file_that_is_no_image_is_unreadable_with_a_plain_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "ein bild ü.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"ein bild ü\.jpg: ({reason})"):
        open_image(path)


def test_a_missing_file_and_a_folder_are_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"a\.jpg: no such file or directory"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage, match=": is a directory"):
        open_image(tmp_path)


@given(st.binary(max_size=40), st.integers(0, 2**20))
def test_damage_anywhere_gives_an_image_or_unreadable(noise: bytes, place: int) -> None:
    for data in TRUNCATED.values():
        start = place % len(data)
        damaged = data[:start] + noise + data[start + len(noise) :]
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(damaged)
            with contextlib.suppress(UnreadableImage):
                assert open_image(Path(file.name)).mode == "RGB"


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("kind", ["bits", "grey", "deep"])
def test_packed_tiffs_are_the_same_without_imagecodecs_or_say_what_they_need(
    kind: str, white: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile.tifffile")
    path = tmp_path / "a.tif"
    if kind == "bits":
        shown = NOISE[..., 0] > 127
        Image.fromarray(shown).save(path, compression="group4", tiffinfo={262: 1 - white})
        shown = shown * np.uint8(255)
    else:
        values = NOISE[..., 0].astype(np.uint16 if kind == "deep" else np.uint8)
        name = "minisblack" if white else "miniswhite"
        tifffile.imwrite(path, values, photometric=name, compression="lzw")
        shown = NOISE[..., 0] if white else 255 - NOISE[..., 0]
    if kind != "deep":
        assert np.array_equal(np.asarray(open_image(path))[..., 0], shown)
    # What tifffile has where imagecodecs is not installed.
    monkeypatch.setattr(tifffile, "imagecodecs", import_module("tifffile._imagecodecs"))
    monkeypatch.setattr(tifffile.TIFF.DECOMPRESSORS, "_codecs", {1: lambda data, *_, **__: data})
    if kind == "deep":
        with pytest.raises(UnreadableImage, match=r"uint16 packed by LZW need imagecodecs: inst"):
            open_image(path)
    else:
        assert np.array_equal(np.asarray(open_image(path))[..., 0], shown)


def test_a_damaged_member_of_a_zip_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", TRUNCATED["PNG"])
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"a\.zip!a\.png: damaged or cut short \(Bad CRC"):
        open_image(find_images(path).files[0])


def test_an_encrypted_member_of_a_zip_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", TRUNCATED["PNG"])
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match="encrypted"):
        open_image(find_images(path).files[0])


# open_image: what is not RGB, 8 bit, upright


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_a_red_image_is_red_in_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(encoded(Image.new("RGB", (16, 16), (255, 0, 0)), kind))
    pixels = np.asarray(open_image(path)).astype(int)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - (255, 0, 0)).max() <= 4


OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
YCBCR = pytest.param(
    "YCbCr", marks=pytest.mark.skipif(OLD_PILLOW, reason="Pillow < 13 reads none as TIFF")
)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", YCBCR, "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    # 0 is black in all of them but CMYK, where it is white.
    Image.new(mode, (3, 2)).save(tmp_path / "a.tif")
    image = open_image(tmp_path / "a.tif")
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_cmyk_ink_becomes_its_colour(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    pixels = np.asarray(open_image(tmp_path / "a.jpg")).astype(int)
    assert np.abs(pixels - (255, 0, 0)).max() <= 4


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    image.save(tmp_path / "b.png", transparency=b"\x00\xff")
    assert np.asarray(open_image(tmp_path / "b.png")).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_a_palette_with_alpha_is_laid_over_white() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), (1, 255))
    assert np.asarray(to_rgb(image)).tolist() == [[[255] * 3, [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_transparent_pixels_become_white_and_half_transparent_ones_half(mode: str) -> None:
    alpha = Image.fromarray(np.array([[0, 255, 128]], np.uint8))
    image = Image.new("RGBA", (3, 1), (100, 100, 100))
    image.putalpha(alpha)
    if mode in {"LA", "La"}:
        image = image.convert("LA")
    if mode in {"La", "RGBa"}:
        image = image.convert(mode)
    expected = [255, 100, 100 * 128 / 255 + 255 * 127 / 255]
    assert np.abs(np.asarray(to_rgb(image))[0] - np.array(expected)[:, None]).max() <= 1


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(9, 9, 9))
    assert np.asarray(open_image(tmp_path / "a.png")).tolist() == [[[1, 2, 3], [255] * 3]]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_divided_by_257(tmp_path: Path, suffix: str) -> None:
    values = (257 * np.arange(256, dtype=np.uint16)).reshape(16, 16)
    path = numbered(tmp_path / f"a{suffix}", "I;16", values)
    assert np.array_equal(np.asarray(open_image(path))[..., 0], values // 257)


def test_big_endian_16_bit_grey_is_divided_by_257() -> None:
    values = (257 * np.arange(256)).reshape(16, 16).astype(">u2")
    image = Image.frombytes("I;16B", (16, 16), values.tobytes())
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], values // 257)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.2, 1], [0, 51, 255]),
        ([0, 51, 254.8], [0, 51, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([0, 40_000, 80_000], [0, 128, 255]),
        ([-3, -3, -3], [0, 0, 0]),
        ([np.nan, np.inf, 0.5, 1, 0], [255, 255, 128, 255, 0]),
    ],
)
def test_float_grey_is_read_by_the_round_range_that_it_fills_or_its_own(
    tmp_path: Path, values: list[float], expected: list[int]
) -> None:
    path = numbered(tmp_path / "a.tif", "F", np.array([values], np.float32))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == expected


def test_integers_beyond_16_bits_are_stretched_and_not_clipped(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.tif", "I", np.array([[0, 400_000, 2_000_000]], np.int32))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 51, 255]


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
"""What a stored image becomes, by EXIF orientation (CIPA DC-008, Orientation)."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    options = {"lossless": True} if kind == "WEBP" else {}
    path.write_bytes(encoded(Image.fromarray(NOISE), kind, exif=exif, **options))
    assert np.array_equal(np.asarray(open_image(path)), UPRIGHT[orientation](NOISE))


def test_a_pillow_image_of_the_user_is_turned_like_its_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.fromarray(NOISE), "JPEG", exif=exif))
    with Image.open(path) as image:
        turned = to_rgb(image)
        assert image.size == (60, 40)
    assert turned.size == (40, 60)
    assert np.array_equal(np.asarray(turned), np.asarray(open_image(path)))
    assert np.array_equal(np.asarray(to_rgb(turned)), np.asarray(turned))


def test_damaged_metadata_costs_neither_the_photo_nor_a_warning(tmp_path: Path) -> None:
    tag = struct.pack("<HHII", 0x0112, 3, 9999, 9999)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.fromarray(NOISE), "JPEG", exif=exif))
    assert open_image(path).size == (60, 40)
    with pytest.warns(UserWarning, match="Tag data|Truncated"), Image.open(path) as image:
        assert 0x0112 not in image.getexif()  # so it is damaged indeed


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    for name in ("a.gif", "a.webp"):
        assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_of_one_pixel_opens(tmp_path: Path) -> None:
    assert open_image(save(tmp_path / "a.png", size=(1, 1))).size == (1, 1)


# check_images


def image_files(*paths: Path) -> list[ImageFile]:
    return [ImageFile(path, PurePosixPath(path.name)) for path in paths]


def test_headers_are_checked_in_order_and_each_failure_has_its_reason(tmp_path: Path) -> None:
    files = image_files(*(save(tmp_path / f"{i}.png") for i in range(20)))
    files[7].path.write_bytes(b"")
    files[3].path.write_text("hello")
    good, skipped = check_images(files, max_unreadable=0.1)
    assert good == [file for i, file in enumerate(files) if i not in {3, 7}]
    assert [item.file for item in skipped] == [files[3], files[7]]
    assert skipped[0].reason.startswith("not an image")
    assert skipped[1].reason == "the file is empty"


def test_one_unreadable_image_too_many_is_an_error_that_names_it(tmp_path: Path) -> None:
    files = image_files(*(save(tmp_path / f"{i}.png") for i in range(20)))
    files[7].path.write_bytes(b"")
    check_images(files, max_unreadable=0.05)
    with pytest.raises(
        DataError, match=r"1 of 20 images .* 4% .*7\.png \(the file is empty\)\. Repair"
    ):
        check_images(files, max_unreadable=0.04)


def test_the_check_accepts_500_megapixels_and_refuses_more(tmp_path: Path) -> None:
    files = image_files(tmp_path / "a.png", tmp_path / "b.png")
    files[0].path.write_bytes(png_header(25_000, 20_000))
    files[1].path.write_bytes(png_header(25_000, 20_001))
    assert MAX_PIXELS == 25_000 * 20_000
    good, skipped = check_images(files, max_unreadable=1.0)
    assert good == files[:1]
    assert skipped[0].reason == "claims more than 500 megapixels"


def test_the_check_reads_members_of_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(50):
            archive.writestr(f"{i:02}.png", TRUNCATED["PNG"] if i else b"")
    good, skipped = check_images(find_images(tmp_path / "a.zip").files, max_unreadable=0.5)
    assert (len(good), len(skipped)) == (49, 1)


def test_settings_of_pillow_and_warnings_are_put_back_after_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 47)
    filters = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [open_image(path) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with quiet_pillow:
        assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS // 2
    assert Image.MAX_IMAGE_PIXELS == 47
    assert filters == list(warnings.filters)


@pytest.mark.parametrize(
    ("min_side", "size"),
    [(0, (1600, 1200)), (700, (1600, 1200)), (600, (800, 600)), (200, (400, 300)), (9, (200, 150))],
)
def test_a_jpeg_much_larger_than_needed_comes_reduced(
    min_side: int, size: tuple[int, int], tmp_path: Path
) -> None:
    down, across = np.mgrid[:1200, :1600] / 100
    waves = [np.sin(down), np.cos(across), np.sin(down + across)]
    whole = Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=2)).astype(np.uint8))
    whole.save(tmp_path / "a.jpg", quality=95)
    whole.save(tmp_path / "a.png", compress_level=1)
    found = open_image(tmp_path / "a.jpg", min_side)
    assert found.size == size
    expected = np.asarray(whole.resize(size, Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(found) - expected).mean() < 2
    assert open_image(tmp_path / "a.png", min_side).size == (1600, 1200)


def test_real_photos_open(shared_data: Path) -> None:
    found = find_images(shared_data / "camvid" / "val", limit=20)
    assert len(found.files) == 20
    assert {open_image(file).size for file in found.files} == {(480, 360)}


def test_photos_in_a_zip_open(shared_data: Path) -> None:
    found = find_images(shared_data / "pretrain" / "photos-00.zip", limit=20)
    assert all(max(np.asarray(open_image(file)).shape) > 64 for file in found.files)


@pytest.mark.parametrize("workers", [-1, 0, 3])
def test_results_come_in_order_while_threads_work_a_few_items_ahead(workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    for done, (item, result) in enumerate(ahead(lambda x: x * x, items(), workers), start=1):
        assert (item, result) == (done - 1, item * item)
        assert len(taken) <= done + 2 * 8
    assert done == 100


def test_no_further_item_is_taken_while_those_that_wait_hold_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookahead, "AHEAD", 10)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    for done, _ in enumerate(ahead(lambda x: x, items(), 8, nbytes=lambda *_: 4), start=1):
        assert len(taken) <= done + 2  # two that wait hold 8, a third one makes 12
    huge = ahead(lambda x: x, items(), 8, nbytes=lambda *_: 99)
    for done, _ in enumerate(huge, start=1):
        assert len(taken) == 20 + done


def test_a_result_counts_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "AHEAD", 10)
    asked: list[int | None] = []

    def nbytes(item: int, result: int | None) -> int:
        asked.append(result)
        return 0 if result is None else 99

    assert [result for _, result in ahead(lambda x: -x, range(9), 1, nbytes=nbytes)] == [
        *range(0, -9, -1)
    ]
    assert {*asked} - {None}


def test_what_a_thread_raises_comes_in_its_place() -> None:
    found = ahead(lambda x: 1 // x, [1, 0, 1])
    assert next(found) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(found)
