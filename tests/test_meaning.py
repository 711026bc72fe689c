"""Numbers of a file and the colours that are seen; oracles: tifffile, rasterio, imagecodecs, numpy.

Each test writes numbers that are known, so that the colours can be computed by hand.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio.enums import ColorInterp

from iddc.config import ReadingConfig
from iddc.errors import UnreadableImage
from iddc.images import ImageFile, expand_pages, open_image, open_picture, settle, survey
from iddc.images.meaning import _as_stored, known_span, measured_span

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

RAMP = np.tile(np.arange(256), (8, 1))
"""Every grey value; what a file of it must show, whatever its numbers."""
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)


def tif(path: Path, values: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, values, **options)
    return path


def geotiff(path: Path, bands: np.ndarray, **options: Any) -> Path:
    count, height, width = bands.shape
    colours = options.pop("colorinterp", None)
    names = options.pop("names", None)
    shape = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
        file.write(bands)
        if colours:
            file.colorinterp = colours
        if names:
            file.descriptions = names
    return path


def grey(path: Path, reading: ReadingConfig | None = None) -> np.ndarray:
    pixels = np.asarray(open_image(path, reading=reading or ReadingConfig())).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def seen(path: Path, **options: Any) -> np.ndarray:
    return np.asarray(open_image(path, reading=ReadingConfig(**options)))


def by_hand(values: np.ndarray, low: float, high: float) -> np.ndarray:
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)


# depth


def test_12_bits_in_16_are_seen_over_their_whole_range(tmp_path: Path) -> None:
    values = (RAMP * 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.array_equal(grey(tmp_path / "a.tif"), by_hand(values, 0, 4095))


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_packed_samples_have_the_range_of_their_bits(bits: int, tmp_path: Path) -> None:
    values = RNG.integers(0, 2 ** (bits - 1), (8, 256)).astype(np.uint16)  # no pixel is bright
    path = tif(tmp_path / "a.tif", values, bitspersample=bits)
    assert np.array_equal(grey(path), by_hand(values, 0, 2**bits - 1))


def test_the_largest_value_that_a_tiff_states_gives_its_depth(tmp_path: Path) -> None:
    values = RNG.integers(0, 1000, (8, 256)).astype(np.uint16)
    path = tif(tmp_path / "a.tif", values, extratags=[(281, "H", 1, 4000, True)])
    assert np.array_equal(grey(path), by_hand(values, 0, 4095))


def png(values: np.ndarray, significant: int) -> bytes:
    data = imagecodecs.png_encode(values)
    chunk = b"sBIT" + bytes([significant] * (1 if values.ndim == 2 else values.shape[2]))
    at = 8 + 25  # after the signature and IHDR
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return bytes(data[:at]) + packed + bytes(data[at:])


@pytest.mark.parametrize("shape", [(8, 256), (8, 256, 3)])
def test_the_significant_bits_of_a_png_give_its_depth(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = RNG.integers(0, 1500, shape).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png(values, 12))
    expected = by_hand(values, 0, 4095)
    found = np.asarray(open_image(tmp_path / "a.png"))
    assert np.array_equal(found if values.ndim == 3 else found[..., 0], expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_bit_of_a_png_of_16_bits_counts(channels: int, tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (40, 30, channels)).astype(np.uint16) + 1024
    if channels in (2, 4):
        values[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values.squeeze()))
    colours = values[..., : channels - (channels % 2 == 0)]
    found = seen(tmp_path / "a.png", range=(1024, 1279))
    assert np.array_equal(found, np.broadcast_to(by_hand(colours, 1024, 1279), (40, 30, 3)))


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 3)])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_jpeg_2000_has_the_range_of_its_bits(
    shape: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    values = RNG.integers(0, 2**bits, shape).astype(np.uint16)
    options = {"level": 0, "reversible": True, "codecformat": "jp2", "bitspersample": bits}
    (tmp_path / "a.jp2").write_bytes(imagecodecs.jpeg2k_encode(values, **options))
    found = seen(tmp_path / "a.jp2")
    expected = by_hand(values, 0, 2**bits - 1)
    assert np.array_equal(found if values.ndim == 3 else found[..., 0], expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("top", [1000, 4095])
def test_the_largest_value_of_a_ppm_becomes_white(channels: int, top: int, tmp_path: Path) -> None:
    values = RNG.integers(0, top // 2, (40, 30, channels)).astype(np.uint16)
    header = f"P{5 if channels == 1 else 6}\n# a remark\n30 40\n{top}\n"
    data = header.encode() + values.astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(data + data)  # more images may follow
    found = np.asarray(open_image(tmp_path / "a.ppm"))
    assert np.array_equal(found, np.broadcast_to(by_hand(values, 0, top), (40, 30, 3)))


def test_one_pixel_beyond_1_costs_no_grey_level(tmp_path: Path) -> None:
    values = (RAMP / 255).astype(np.float32)
    expected = by_hand(values, 0, 1)
    values[3, 7] = 1.01
    expected[3, 7] = 255
    assert np.array_equal(grey(tif(tmp_path / "a.tif", values)), expected)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int16", "uint16", "int32"])
def test_heights_of_300_to_700_m_take_all_grey_levels(kind: str, tmp_path: Path) -> None:
    values = np.linspace(300, 700, 2048).reshape(8, 256).astype(kind)
    found = grey(tif(tmp_path / "a.tif", values))
    assert (found.min(), found.max()) == (0, 255)
    assert np.abs(found - by_hand(values, 300, 700)).max() <= 1


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint32", "uint64", "float64"])
def test_numbers_of_every_type_keep_their_order(kind: str, tmp_path: Path) -> None:
    values = (RAMP / 255 * 200 - (0 if kind[0] == "u" else 100)).astype(kind)
    found = grey(tif(tmp_path / "a.tif", values))
    assert np.corrcoef(found.ravel(), values.ravel())[0, 1] > 0.999
    assert (found.min(), found.max()) == (0, 255)


def test_a_constant_image_is_black_and_one_without_a_number_white(tmp_path: Path) -> None:
    assert (grey(tif(tmp_path / "a.tif", np.full((4, 5), 7.0, np.float32))) == 0).all()
    nothing = open_picture(tif(tmp_path / "b.tif", np.full((4, 5), np.nan, np.float32)))
    assert (np.asarray(nothing.image) == 255).all()
    assert nothing.valid is not None
    assert not nothing.valid.any()


# no data


@pytest.mark.parametrize("mark", [-3.4e38, np.nan, np.inf, -9999.0])
def test_pixels_without_data_take_no_part_in_the_range(mark: float, tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0, 0] = mark
    path = tmp_path / "c.tif"
    Image.fromarray(values).save(path, tiffinfo={42113: str(mark)})
    picture = open_picture(path)
    expected = by_hand(RAMP, 0, 255)
    expected[0, 0] = 255
    assert np.array_equal(np.asarray(picture.image)[..., 0], expected)
    assert picture.valid is not None
    assert np.argwhere(~picture.valid).tolist() == [[0, 0]]


def test_of_colours_all_bands_must_be_the_mark_of_no_data(tmp_path: Path) -> None:
    values = RGB.copy()
    values[values == 7] = 8
    values[0, :2] = 7
    values[1, 0] = (7, 200, 7)
    path = geotiff(tmp_path / "a.tif", values.transpose(2, 0, 1), nodata=7)
    picture = open_picture(path)
    with rasterio.open(path) as file:
        mask = file.dataset_mask() != 0
    assert picture.valid is not None
    assert np.array_equal(picture.valid, mask)
    assert np.array_equal(np.asarray(picture.image)[mask], values[mask])


def test_a_mask_inside_the_file_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    mask = RNG.integers(0, 2, (40, 30)).astype(bool)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", count=3, dtype="uint8", height=40, width=30
        ) as file,
    ):
        file.write(RGB.transpose(2, 0, 1))
        file.write_mask(mask)
    picture = open_picture(path)
    assert picture.valid is not None
    assert np.array_equal(picture.valid, mask)
    assert np.array_equal(np.asarray(picture.image)[mask], RGB[mask])


# photometric interpretation and samples


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_white_is_zero_is_obeyed(kind: str, tmp_path: Path) -> None:
    values = (RAMP * {"uint8": 1, "uint16": 257, "float32": 1 / 255}[kind]).astype(kind)
    assert np.array_equal(
        grey(tif(tmp_path / "a.tif", values, photometric="miniswhite")), 255 - RAMP
    )


@pytest.mark.parametrize("interleave", ["band", "pixel"])
@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "zstd"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_colours_are_read_in_every_layout_of_a_tiff(
    interleave: str, compress: str, tiled: bool, kind: str, tmp_path: Path
) -> None:
    values = RGB.astype(kind) * (257 if kind == "uint16" else 1)
    block = {"tiled": True, "blockxsize": 16, "blockysize": 16} if tiled else {"blockysize": 7}
    options = {"photometric": "RGB", "interleave": interleave, "compress": compress, **block}
    path = geotiff(tmp_path / "a.tif", values.transpose(2, 0, 1), **options)
    assert np.array_equal(seen(path), RGB)


@pytest.mark.parametrize(
    "options",
    [
        {"bigtiff": True},
        {"byteorder": ">"},
        {"predictor": 2, "compression": "deflate"},
        {"rowsperstrip": 3},
        {"tile": (16, 16), "compression": "lzma"},
    ],
    ids=str,
)
def test_16_bits_are_read_in_every_kind_of_tiff(options: dict[str, Any], tmp_path: Path) -> None:
    path = tif(tmp_path / "a.tif", RGB.astype(np.uint16) * 257, photometric="rgb", **options)
    assert np.array_equal(seen(path), RGB)


def test_bits_are_black_and_white(tmp_path: Path) -> None:
    values = RNG.integers(0, 2, (40, 30)).astype(bool)
    Image.fromarray(values).save(tmp_path / "a.tif", compression="group4")
    assert np.array_equal(grey(tmp_path / "a.tif"), values * 255)
    path = tif(tmp_path / "b.tif", values, photometric="miniswhite")
    assert np.array_equal(grey(path), 255 - values * 255)


def test_a_palette_of_a_tiff_becomes_its_colours(tmp_path: Path) -> None:
    palette = RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    indices = RNG.integers(0, 256, (8, 9)).astype(np.uint8)
    path = tif(tmp_path / "a.tif", indices, photometric="palette", colormap=palette)
    assert np.array_equal(seen(path), (palette // 257).T[indices])


def test_a_jpeg_in_a_tiff_is_the_photo(tmp_path: Path) -> None:
    photo = np.tile(np.linspace(0, 255, 64), (64, 1)).astype(np.uint8)
    photo = np.stack([photo, photo.T, 255 - photo], axis=2)
    path = geotiff(
        tmp_path / "a.tif", photo.transpose(2, 0, 1), compress="jpeg", photometric="YCBCR"
    )
    with rasterio.open(path) as file:
        expected = file.read().transpose(1, 2, 0).astype(int)
    difference = np.abs(seen(path).astype(int) - expected)
    assert (difference.mean() < 1, difference.max() <= 8) == (True, True)  # colours are smoothed


@pytest.mark.parametrize("code", [32803, 34892, 8, 32844])
def test_colours_that_are_none_of_a_photo_are_refused_by_name(code: int, tmp_path: Path) -> None:
    path = tif(tmp_path / "a.tif", RAMP.astype(np.uint16), photometric="minisblack")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<HHI", 262, 3, 1))
    data[at + 8 : at + 10] = struct.pack("<H", code)
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"its pixels are .*convert it to RGB"):
        open_image(path)


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="no real numbers"):
        open_image(tif(tmp_path / "a.tif", RAMP.astype(np.complex64)))


def test_the_orientation_of_a_tiff_of_16_bits_is_applied(tmp_path: Path) -> None:
    values = RGB[..., 0].astype(np.uint16) * 257
    path = tif(tmp_path / "a.tif", values, extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(grey(path), np.rot90(RGB[..., 0], -1))


# bands


def test_near_infrared_that_is_tagged_as_alpha_masks_nothing(tmp_path: Path) -> None:
    infrared = RNG.integers(0, 200, (40, 30, 1), dtype=np.uint8)
    naip = np.concatenate([RGB, infrared], axis=2)
    path = geotiff(tmp_path / "a.tif", naip.transpose(2, 0, 1))
    picture = open_picture(path)
    assert np.array_equal(np.asarray(picture.image), RGB)
    assert picture.valid is None


def test_an_alpha_of_zeros_is_no_mask(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    assert np.array_equal(seen(tmp_path / "a.png"), RGB)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_transparent_pixels_are_white_and_hold_no_data(name: str, tmp_path: Path) -> None:
    alpha = RNG.integers(0, 2, (40, 30), dtype=np.uint8) * 255
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.valid is not None
    assert np.array_equal(picture.valid, alpha == 255)
    assert np.array_equal(np.asarray(picture.image), np.where(alpha[..., None] > 0, RGB, 255))


@pytest.mark.parametrize(
    ("kind", "opaque"),
    [
        ("uint8", 255), ("uint16", 255), ("uint16", 4095), ("uint16", 65535),
        ("float32", 1), ("float32", 255), ("float32", 65535),
    ],
)  # fmt: skip
def test_the_largest_of_the_usual_values_of_alpha_is_opaque(
    kind: str, opaque: int, tmp_path: Path
) -> None:
    shown = np.indices((40, 30))[0] % 2
    values = np.dstack([RGB, shown * opaque]).astype(kind)
    tif(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    found = seen(tmp_path / "a.tif", range=(0, 255))
    assert np.array_equal(found, np.where(shown[..., None] > 0, RGB, 255))


@pytest.mark.parametrize("reading", [{"range": "file"}, {"range": (100, 200)}])
def test_files_of_8_bits_show_all_their_values_whatever_range_is_given(
    reading: dict[str, Any], tmp_path: Path
) -> None:
    tif(tmp_path / "a.tif", RAMP.astype(np.uint8))
    assert np.array_equal(grey(tmp_path / "a.tif", ReadingConfig(**reading)), RAMP)
    layouts = survey([ImageFile(tmp_path / "a.tif", PurePosixPath("a.tif"))]).layouts
    assert known_span(layouts[0], ReadingConfig(**reading)) == (0, 255)


@pytest.mark.parametrize(("count", "kind"), [(13, "uint16"), (5, "uint8"), (5, "float32")])
def test_many_bands_need_a_choice_and_the_error_says_what_was_found(
    count: int, kind: str, tmp_path: Path
) -> None:
    values = RNG.integers(0, 256, (count, 40, 30)).astype(kind)
    path = geotiff(tmp_path / "a.tif", values, photometric="MINISBLACK")
    with pytest.raises(UnreadableImage, match=f"it has {count} bands of {kind}.*--bands"):
        open_image(path)
    assert np.array_equal(
        seen(path, bands=(4, 3, 2), range=(0, 255)), values[[3, 2, 1]].transpose(1, 2, 0)
    )
    assert np.array_equal(grey(path, ReadingConfig(bands=(5,), range=(0, 255))), values[4])
    with pytest.raises(UnreadableImage, match=f"asks for band {count + 1}, and it has {count}"):
        seen(path, bands=(count + 1,))


def test_colours_of_floats_are_read(tmp_path: Path) -> None:
    path = tif(tmp_path / "a.tif", (RGB / 255).astype(np.float32), photometric="rgb")
    assert np.array_equal(seen(path), RGB)


def test_bands_that_are_called_blue_green_and_red_are_seen_as_these(tmp_path: Path) -> None:
    names = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    path = geotiff(tmp_path / "a.tif", RGB[..., ::-1].transpose(2, 0, 1), colorinterp=names)
    assert np.array_equal(seen(path), RGB)


def test_a_band_of_which_gdal_says_nothing_is_no_colour(tmp_path: Path) -> None:
    values = np.dstack([RNG.integers(0, 256, (40, 30)), RGB[..., ::-1]]).astype(np.uint8)
    items = [
        f'<Item name="COLORINTERP" sample="{sample}" role="colorinterp">{colour}</Item>'
        for sample, colour in enumerate(("Blue", "Green", "Red"), start=1)
    ]
    text = f"<GDALMetadata>{''.join(items)}</GDALMetadata>"
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    path = tif(tmp_path / "a.tif", values, extratags=[(42112, 2, 0, text, True)], **options)
    assert np.array_equal(seen(path), RGB)


def test_bands_of_a_model_are_found_by_their_names(tmp_path: Path) -> None:
    bands = RNG.integers(0, 256, (4, 40, 30), dtype=np.uint8)
    first = geotiff(
        tmp_path / "a.tif", bands, photometric="MINISBLACK", names=("B2", "B3", "B4", "B8")
    )
    other = geotiff(
        tmp_path / "b.tif", bands[::-1], photometric="MINISBLACK", names=("B8", "B4", "B3", "B2")
    )
    files = [ImageFile(first, PurePosixPath("a.tif"))]
    wanted = ReadingConfig(bands=(3, 2, 1))
    model, _ = settle(files, survey(files, wanted).layouts, wanted)
    assert model.band_names == ("B2", "B3", "B4", "B8")
    expected = bands[[2, 1, 0]].transpose(1, 2, 0)
    for path in (first, other):
        assert np.array_equal(np.asarray(open_image(path, reading=model)), expected)
    lacking = geotiff(
        tmp_path / "c.tif", bands[:3], photometric="MINISBLACK", names=("x", "y", "z")
    )
    with pytest.raises(UnreadableImage, match=r"\(x, y, z\); the model was trained on B4, B3, B2"):
        open_image(lacking, reading=model)


# pages


def stack(path: Path, axes: str, shape: tuple[int, ...], **options: Any) -> np.ndarray:
    values = np.arange(np.prod(shape[:-2])).reshape(*shape[:-2], 1, 1) * np.ones(shape[-2:])
    values = values.astype(np.uint8)
    tifffile.imwrite(path, values, metadata={"axes": axes}, **options)
    return values


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}, {}], ids=str)
def test_planes_of_a_stack_are_images_of_their_own(options: dict[str, Any], tmp_path: Path) -> None:
    values = stack(tmp_path / "a.tif", "TZYX", (2, 3, 8, 9), photometric="minisblack", **options)
    assert grey(tmp_path / "a.tif").tolist() == values[0, 0].tolist()
    files = [ImageFile(tmp_path / "a.tif", PurePosixPath("b/a.tif"))]
    assert survey(files).layouts[0].pages == 6
    pages = expand_pages(files, ReadingConfig(pages="all"))
    assert [str(page.name) for page in pages] == [f"b/a#{n:04}.tif" for n in range(1, 7)]
    found = [np.asarray(open_image(page))[0, 0, 0] for page in pages]
    assert found == [0, 1, 2, 3, 4, 5]
    some = expand_pages(files, ReadingConfig(pages=(2, 5, 9)))
    assert [str(page.name) for page in some] == ["b/a#0002.tif", "b/a#0005.tif"]


@pytest.mark.parametrize("axes", ["TCYX", "CTYX"])
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_channels_are_bands_and_no_pages(axes: str, kind: str, tmp_path: Path) -> None:
    if kind == "imagej" and axes == "CTYX":
        pytest.skip("ImageJ has one order of axes")
    shape = (2, 3, 8, 9) if axes == "TCYX" else (3, 2, 8, 9)
    values = stack(tmp_path / "a.tif", axes, shape, photometric="minisblack", **{kind: True})
    values = values if axes == "TCYX" else values.swapaxes(0, 1)
    pages = expand_pages(
        [ImageFile(tmp_path / "a.tif", PurePosixPath("a.tif"))], ReadingConfig(pages="all")
    )
    found = [np.asarray(open_image(page))[0, 0].tolist() for page in pages]
    assert found == values[:, :, 0, 0].tolist()


def test_a_stack_with_one_directory_for_all_planes_is_read(tmp_path: Path) -> None:
    planes = RNG.integers(0, 65536, (4, 8, 9)).astype(">u2")
    about = "ImageJ=1.11a\nreading=4\nslices=4\n"
    buffer = BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=">") as writer:
        writer.write(planes[0], description=about, metadata=None, software=None)
    (tmp_path / "a.tif").write_bytes(buffer.getvalue() + planes[1:].tobytes())
    files = [ImageFile(tmp_path / "a.tif", PurePosixPath("a.tif"))]
    pages = expand_pages(files, ReadingConfig(pages="all"))
    found = [np.asarray(open_image(p, reading=ReadingConfig(range=(0, 65535)))) for p in pages]
    assert np.array_equal(np.stack(found)[..., 0], by_hand(planes, 0, 65535))


@pytest.mark.parametrize("flag", [0, 1])
def test_a_thumbnail_in_front_is_not_the_image(flag: int, tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.zeros((10, 15), np.uint8), subfiletype=flag)
        writer.write(np.full((80, 120), 9, np.uint8))
        writer.write(np.full((40, 60), 7, np.uint8), subfiletype=flag)
    assert (grey(tmp_path / "a.tif") == 9).all()
    files = [ImageFile(tmp_path / "a.tif", PurePosixPath("a.tif"))]
    found = survey(files)
    assert (found.layouts[0].pages, found.layouts[0].size) == (1, (120, 80))
    assert "page 2 is read, as those before it are reduced copies" in found.notes[0]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_frames_of_an_animation_are_pages(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    files = [ImageFile(tmp_path / name, PurePosixPath(name))]
    assert survey(files).notes[0].startswith("1 files have 3 pages, of which the first is read")
    pages = expand_pages(files, ReadingConfig(pages="all"))
    found = [open_image(page).getpixel((0, 0)) for page in pages]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


# one range for all


def test_two_images_of_a_set_keep_their_relative_brightness(tmp_path: Path) -> None:
    dark, light = (RAMP * 4).astype(np.uint16), (RAMP * 16).astype(np.uint16)
    files = [
        ImageFile(tif(tmp_path / name, values), PurePosixPath(name))
        for name, values in (("dark.tif", dark), ("light.tif", light))
    ]
    found, notes = settle(files, survey(files).layouts, ReadingConfig())
    assert found.measured == {"uint16": (0, 4095)}
    assert notes == ("16-bit images: 0..4095 is shown as 0..255",)
    assert np.array_equal(grey(tmp_path / "dark.tif", found), by_hand(dark, 0, 4095))
    own = ReadingConfig(range="file")
    settled, remarks = settle(files, survey(files, own).layouts, own)
    assert (settled.measured, remarks) == ({}, ())
    assert grey(tmp_path / "dark.tif", own).max() == 254  # 1020 of 1023


def test_photos_of_8_bits_are_not_opened_for_their_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    files = [ImageFile(tmp_path / "a.jpg", PurePosixPath("a.jpg"))]
    layouts = survey(files).layouts
    (tmp_path / "a.jpg").unlink()
    assert settle(files, layouts, ReadingConfig()) == (ReadingConfig(kinds=("uint8 rgb",)), ())


def test_an_alpha_that_is_no_mask_in_one_file_is_none_in_all(tmp_path: Path) -> None:
    masks = {"a.png": RNG.integers(1, 255, (40, 30)), "b.png": np.indices((40, 30))[0] % 2 * 255}
    for name, alpha in masks.items():
        Image.fromarray(np.dstack([RGB, alpha.astype(np.uint8)])).save(tmp_path / name)
    files = [ImageFile(tmp_path / name, PurePosixPath(name)) for name in masks]
    found, notes = settle(files, survey(files).layouts, ReadingConfig())
    assert found.alpha == "ignore"
    assert "alpha channels mask no pixel of these images" in notes[0]
    assert np.array_equal(np.asarray(open_image(files[1], reading=found)), RGB)


def test_values_that_nearly_fill_a_round_range_have_it() -> None:
    """Up to 1 for floating point, else of 8 to 16 or 32 bits."""
    assert measured_span(np.linspace(0, 0.999, 1000, dtype=np.float32), "float32") == (0, 1)
    assert measured_span(np.arange(65500, dtype=np.uint16), "uint16") == (0, 65535)
    assert measured_span(np.arange(131000, dtype=np.uint32), "uint32")[1] < 131000


def test_a_mark_is_compared_as_the_file_holds_it() -> None:
    assert _as_stored(0.1, np.dtype("float32")) == float(np.float32(0.1)) != 0.1
    assert _as_stored(-9999.0, np.dtype("uint8")) == -9999
