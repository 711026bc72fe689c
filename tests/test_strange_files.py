"""Files of kinds that people own: read right, or refused with the reason, or said.

Each case writes a file with one library and says what must be seen. What is expected comes from the
numbers that were written, or from another library that reads the file (Pillow, imagecodecs,
rasterio, tifffile).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePosixPath

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image, ImageCms, ImageOps
from rasterio.enums import Resampling

from iddc.config import ReadingConfig
from iddc.errors import DataError, UnreadableImage
from iddc.images import ImageFile, find_images, open_picture, settle, survey

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (48, 40), dtype=np.uint8)
RGB = RNG.integers(0, 256, (48, 40, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(40), np.arange(48)), -1) * 5
SMOOTH = np.dstack([SMOOTH, 255 - SMOOTH[..., 0]]).astype(np.uint8)
U16 = RNG.integers(0, 65536, (48, 40)).astype(np.uint16)
C16 = RNG.integers(0, 65536, (48, 40, 3)).astype(np.uint16)
U16[0, 0], U16[0, 1], C16[0, 0], C16[0, 1] = 0, 65535, 0, 65535


def by_hand(values: np.ndarray, low: float, high: float) -> np.ndarray:
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def chunk(name: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc


def png(values: np.ndarray, *extra: bytes, bits: int | None = None) -> bytes:
    """A PNG written by hand: grey, grey with alpha, RGB or RGBA, of 8, 16 or fewer bits."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    depth = bits or 8 * values.dtype.itemsize
    if depth < 8:
        flat = values[..., None] >> np.arange(depth)[::-1] & 1
        rows = np.packbits(flat.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        rows = values.astype(values.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    data = BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def tif(values: np.ndarray, **options: object) -> bytes:
    data = BytesIO()
    tifffile.imwrite(data, values, **options)
    return data.getvalue()


def geotiff(bands: np.ndarray, **options: object) -> bytes:
    size = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", dtype=bands.dtype, **size, **options) as file:
            file.write(bands)
        return bytes(memory.read())


def pixels(data: bytes) -> np.ndarray:
    """What Pillow sees."""
    return np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[274] = orientation
    return found


def bmp(values: np.ndarray, *, top_down: bool = False, bits: int = 24) -> bytes:
    """A BMP by hand: rows from the bottom up, or from the top down."""
    height, width = values.shape[:2]
    rows = values if top_down else values[::-1]
    body = rows[..., ::-1] if bits == 24 else rows[..., [2, 1, 0, 3]]
    data = b"".join(row.tobytes().ljust(-(-row.size // 4) * 4, b"\0") for row in body)
    header = struct.pack(
        "<IiiHHIIiiII",
        40,
        width,
        -height if top_down else height,
        1,
        bits,
        0,
        len(data),
        0,
        0,
        0,
        0,
    )
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def rle_bmp() -> tuple[bytes, np.ndarray]:
    """A BMP of run lengths: each row one value of a grey palette."""
    values = np.repeat((np.arange(48) * 5).astype(np.uint8)[:, None], 40, 1)
    data = b"".join(bytes([40, row[0], 0, 0]) for row in values[::-1]) + b"\0\1"
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, 40, 48, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 54 + len(palette)
    whole = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data
    return whole, values


def icc() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def transparent(values: np.ndarray, hidden: tuple[int, ...]) -> np.ndarray:
    shown = values.copy()
    shown[(values == np.array(hidden)).all(-1)] = 255
    return shown


SUB_BYTE = RNG.integers(0, 256, (48, 40), dtype=np.uint8)
FEW = RNG.integers(0, 4, (48, 40, 3)).astype(np.uint8) * 60
BOOLS = RNG.integers(0, 2, (48, 40)).astype(bool)
CMYK = RNG.integers(0, 256, (48, 40, 4), dtype=np.uint8)
ALPHA = np.where(RNG.random((48, 40)) < 0.3, 0, 255).astype(np.uint8)
PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
FLOATS = RNG.random((48, 40)).astype(np.float32)
FLOATS[0, :2] = 0, 1
SIGNED = RNG.integers(-2000, 2000, (48, 40)).astype(np.int16)
BIG = (RNG.random((48, 40)) * (2**32 - 1)).astype(np.uint32)
GREY1 = np.where(ALPHA > 0, GREY, 255)

Case = tuple[Callable[[], bytes], Callable[[bytes], np.ndarray]]


def is_(expected: np.ndarray) -> Callable[[bytes], np.ndarray]:
    return lambda _: expected if expected.ndim == 3 else three(expected)


READ: dict[str, Case] = {
    "16 bits with sBIT 10.png": (
        lambda: png(U16 >> 6, chunk(b"sBIT", b"\x0a")),
        is_(by_hand(U16 >> 6, 0, 1023)),
    ),
    "16 bits with sBIT 16.png": (
        lambda: png(U16, chunk(b"sBIT", b"\x10")),
        is_(by_hand(U16, 0, 65535)),
    ),
    "8 bits with sBIT 5.png": (lambda: png(GREY, chunk(b"sBIT", b"\x05")), is_(GREY)),
    "grey and alpha of 16 bits.png": (
        lambda: png(np.dstack([U16, ALPHA.astype(np.uint16) * 257])),
        is_(np.where(ALPHA > 0, by_hand(U16, 0, 65535), 255).astype(np.uint8)),
    ),
    "RGBA of 16 bits.png": (
        lambda: png(np.dstack([C16, ALPHA.astype(np.uint16) * 257])),
        is_(np.where(ALPHA[..., None] > 0, by_hand(C16, 0, 65535), 255).astype(np.uint8)),
    ),
    "tRNS of a grey.png": (
        lambda: png(FEW[..., 0], chunk(b"tRNS", struct.pack(">H", 60))),
        is_(np.where(FEW[..., 0] == 60, 255, FEW[..., 0]).astype(np.uint8)),
    ),
    "tRNS of RGB.png": (
        lambda: png(FEW, chunk(b"tRNS", struct.pack(">HHH", 60, 0, 120))),
        is_(transparent(FEW, (60, 0, 120))),
    ),
    "tRNS of a grey of 16 bits.png": (
        lambda: png(FEW[..., 0].astype(np.uint16) * 257, chunk(b"tRNS", struct.pack(">H", 15420))),
        is_(np.where(FEW[..., 0] == 60, 255, by_hand(FEW[..., 0], 0, 180)).astype(np.uint8)),
    ),
    "gamma.png": (lambda: png(RGB, chunk(b"gAMA", struct.pack(">I", 100000))), is_(RGB)),
    "ICC.png": (lambda: saved(Image.fromarray(RGB), "PNG", icc_profile=icc()), is_(RGB)),
    "EXIF.png": (
        lambda: saved(Image.fromarray(RGB), "PNG", exif=exif(6)),
        is_(np.rot90(RGB, -1)),
    ),
    "EXIF of 16 bits.png": (
        lambda: png(U16, chunk(b"eXIf", exif(8).tobytes()[6:])),
        is_(by_hand(np.rot90(U16), 0, 65535)),
    ),
    **{
        f"{bits} bits.png": (
            lambda bits=bits: png(SUB_BYTE >> (8 - bits), bits=bits),
            lambda data, bits=bits: by_hand(
                three(np.asarray(imagecodecs.png_decode(data)).reshape(48, 40)), 0, 255
            ),
        )
        for bits in (1, 2, 4)
    },
    "palette with tRNS.png": (
        lambda: saved(
            Image.fromarray(RGB).quantize(16), "PNG", transparency=bytes([0] * 3 + [255] * 13)
        ),
        lambda data: np.asarray(
            Image.alpha_composite(
                Image.new("RGBA", (40, 48), "white"), Image.open(BytesIO(data)).convert("RGBA")
            ).convert("RGB")
        ),
    ),
    "interlaced.png": (
        lambda: saved(Image.fromarray(RGB), "PNG", interlace=1),
        is_(RGB),
    ),
    "animated with a default image.png": (
        lambda: saved(
            Image.fromarray(RGB),
            "PNG",
            save_all=True,
            default_image=True,
            append_images=[Image.new("RGB", (40, 48), "red")],
        ),
        is_(RGB),
    ),
    "CMYK.jpg": (
        lambda: saved(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=100),
        pixels,
    ),
    "grey.jpg": (lambda: saved(Image.fromarray(GREY), "JPEG"), pixels),
    "progressive.JPG": (
        lambda: saved(Image.fromarray(SMOOTH), "JPEG", progressive=True),
        pixels,
    ),
    "EXIF.jpg": (
        lambda: saved(Image.fromarray(SMOOTH), "JPEG", exif=exif(5)),
        pixels,
    ),
    "EXIF.webp": (
        lambda: saved(Image.fromarray(RGB), "WEBP", lossless=True, exif=exif(3)),
        is_(RGB[::-1, ::-1]),
    ),
    "alpha.webp": (
        lambda: saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True),
        is_(np.where(ALPHA[..., None] > 0, RGB, 255).astype(np.uint8)),
    ),
    "ICC.jpg": (
        lambda: saved(Image.fromarray(SMOOTH), "JPEG", icc_profile=icc()),
        pixels,
    ),
    "transparent.gif": (
        lambda: saved(Image.fromarray(GREY).quantize(8), "GIF", transparency=0),
        lambda data: np.asarray(
            Image.alpha_composite(
                Image.new("RGBA", (40, 48), "white"), Image.open(BytesIO(data)).convert("RGBA")
            ).convert("RGB")
        ),
    ),
    "bottom up.bmp": (lambda: bmp(RGB), is_(RGB)),
    "top down.bmp": (lambda: bmp(RGB, top_down=True), is_(RGB)),
    "run lengths.bmp": (lambda: rle_bmp()[0], is_(rle_bmp()[1])),
    "32 bits without alpha.bmp": (
        lambda: bmp(np.dstack([RGB, np.zeros_like(GREY)]), bits=32),
        is_(RGB),
    ),
    "1 bit.bmp": (lambda: saved(Image.fromarray(BOOLS), "BMP"), is_(BOOLS.astype(np.uint8) * 255)),
    "maxval 1023.pgm": (
        lambda: b"P5 40 48 1023\n" + (U16 >> 6).astype(">u2").tobytes(),
        is_(by_hand(U16 >> 6, 0, 1023)),
    ),
    "maxval 15.pgm": (
        lambda: b"P5 40 48 15\n" + (GREY >> 4).tobytes(),
        is_(by_hand(GREY >> 4, 0, 15)),
    ),
    "plain.ppm": (
        lambda: b"P3 40 48 255\n" + " ".join(map(str, RGB.ravel())).encode(),
        is_(RGB),
    ),
    "plain of 16 bits.pgm": (
        lambda: b"P2 40 48 4095\n" + " ".join(map(str, (U16 >> 4).ravel())).encode(),
        is_(by_hand(U16 >> 4, 0, 4095)),
    ),
    "12 bits.jp2": (
        lambda: imagecodecs.jpeg2k_encode(
            U16 >> 4, level=0, reversible=True, codecformat="jp2", bitspersample=12
        ),
        is_(by_hand(U16 >> 4, 0, 4095)),
    ),
    "photo.avif": (
        lambda: saved(Image.fromarray(SMOOTH), "AVIF", quality=90),
        pixels,
    ),
    "palette.tif": (
        lambda: tif(GREY, photometric="palette", colormap=PALETTE.T.astype(np.uint16) * 257),
        is_(PALETTE[GREY]),
    ),
    "palette of 16 bits in 8.tif": (
        lambda: tif(GREY, photometric="palette", colormap=PALETTE.T.astype(np.uint16)),
        is_(PALETTE[GREY]),
    ),
    "CMYK.tif": (
        lambda: tif(CMYK, photometric="separated"),
        is_(np.asarray(Image.fromarray(CMYK, "CMYK").convert("RGB"))),
    ),
    "YCbCr with subsampling.tif": (
        lambda: geotiff(
            np.repeat(np.repeat(SMOOTH[::2, ::2], 2, 0), 2, 1).transpose(2, 0, 1),
            compress="jpeg",
            photometric="YCBCR",
            jpeg_quality=100,
        ),
        pixels,
    ),
    "JPEG.tif": (
        lambda: geotiff(GREY[None], compress="jpeg"),
        lambda data: three(rasterio.MemoryFile(data).open().read(1)),
    ),
    **{
        f"{packed} {predictor}.tif": (
            lambda p=packed, n=predictor: geotiff(
                (C16 if n != 3 else FLOATS[..., None].repeat(3, 2)).transpose(2, 0, 1),
                compress=p,
                predictor=n,
                photometric="RGB",
            ),
            is_(by_hand(C16, 0, 65535) if predictor != 3 else three(by_hand(FLOATS, 0, 1))),
        )
        for packed in ("lzw", "deflate", "zstd")
        for predictor in (1, 2, 3)
    },
    "BigTIFF.tif": (lambda: tif(U16, bigtiff=True), is_(by_hand(U16, 0, 65535))),
    "BigTIFF big endian.TIF": (
        lambda: tif(C16, bigtiff=True, byteorder=">", photometric="rgb"),
        is_(by_hand(C16, 0, 65535)),
    ),
    "tiles.tiff": (lambda: tif(RGB, tile=(16, 16), photometric="rgb"), is_(RGB)),
    "float16.tif": (
        lambda: tif(FLOATS.astype(np.float16)),
        is_(by_hand(FLOATS.astype(np.float16), 0, 1)),
    ),
    "float64.tif": (lambda: tif(FLOATS.astype(np.float64)), is_(by_hand(FLOATS, 0, 1))),
    "uint32.tif": (lambda: tif(BIG), is_(by_hand(BIG, 0, 2**32 - 1))),
    "bits, black is 0.tif": (
        lambda: tif(BOOLS, photometric="minisblack"),
        is_(BOOLS.astype(np.uint8) * 255),
    ),
    "bits, white is 0.tif": (
        lambda: tif(BOOLS, photometric="miniswhite"),
        is_((~BOOLS).astype(np.uint8) * 255),
    ),
    "group 4.tif": (
        lambda: saved(Image.fromarray(BOOLS), "TIFF", compression="group4"),
        is_(BOOLS.astype(np.uint8) * 255),
    ),
    "10 bits of a DNG-like grey.tif": (
        lambda: tif(U16 >> 6, bitspersample=10),
        is_(by_hand(U16 >> 6, 0, 1023)),
    ),
    "14 bits.tif": (lambda: tif(U16 >> 2, bitspersample=14), is_(by_hand(U16 >> 2, 0, 16383))),
    "RGB and an unspecified sample.tif": (
        lambda: tif(np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unspecified"]),
        is_(RGB),
    ),
    "RGB and two more.tif": (
        lambda: tif(
            np.dstack([RGB, GREY, GREY]), photometric="rgb", extrasamples=["unspecified"] * 2
        ),
        is_(RGB),
    ),
    "premultiplied alpha.tif": (
        lambda: tif(
            np.dstack([np.where(ALPHA[..., None] > 0, RGB, 0), ALPHA]).astype(np.uint8),
            photometric="rgb",
            extrasamples=["assocalpha"],
        ),
        is_(np.where(ALPHA[..., None] > 0, RGB, 255).astype(np.uint8)),
    ),
    "grey with alpha.tif": (
        lambda: tif(
            np.dstack([GREY, ALPHA]),
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=["unassalpha"],
        ),
        is_(GREY1.astype(np.uint8)),
    ),
    **{
        f"orientation {turn}.tif": (
            lambda turn=turn: tif(RGB, photometric="rgb", extratags=[(274, "H", 1, turn, True)]),
            lambda _, turn=turn: pixels(saved(Image.fromarray(RGB), "PNG", exif=exif(turn))),
        )
        for turn in (2, 4, 5, 7)
    },
    "COG.tif": (
        lambda: overviews(np.kron(RGB, np.ones((16, 16, 1), np.uint8))),
        is_(np.kron(RGB, np.ones((16, 16, 1), np.uint8))),
    ),
    "OME channels in pages.ome.tif": (
        lambda: tif(
            RGB.transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"}, ome=True
        ),
        is_(RGB),
    ),
    "ImageJ channels.tif": (
        lambda: tif(RGB.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"}),
        is_(RGB),
    ),
    "a PNG called.jpg": (lambda: saved(Image.fromarray(RGB), "PNG"), is_(RGB)),
    "a TIFF called.png": (lambda: tif(U16), is_(by_hand(U16, 0, 65535))),
    "a BMP called.jpeg": (lambda: bmp(RGB), is_(RGB)),
}


def overviews(rgb: np.ndarray) -> bytes:
    """A cloud-optimised GeoTIFF, with reduced copies in further pages."""
    with rasterio.MemoryFile() as memory:
        bands = rgb.transpose(2, 0, 1)
        size = {"count": 3, "height": bands.shape[1], "width": bands.shape[2]}
        tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128}
        with memory.open(driver="GTiff", dtype="uint8", photometric="RGB", **size, **tiles) as file:
            file.write(bands)
            file.build_overviews([2, 4], Resampling.average)
        return bytes(memory.read())


@pytest.mark.parametrize("name", READ)
def test_a_strange_file_is_read_right(name: str, tmp_path: Path) -> None:
    write, expected = READ[name]
    data = write()
    (tmp_path / name).write_bytes(data)
    found = np.asarray(open_picture(tmp_path / name, reading=ReadingConfig()).image).astype(int)
    wanted = expected(data).astype(int)
    assert found.shape == wanted.shape
    most = 2 if "YCbCr" in name else 1 if "lossy" in name else 0
    # A range found in a sample of random numbers may end a little before the largest one.
    if any(word in name for word in ("16 bits", "uint32", "float", "lzw", "zstd", "deflate")):
        most = 1
    assert np.abs(found - wanted).max() <= most


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a.tif": (lambda: tif(np.zeros((8, 9), np.complex64)), "no real numbers"),
    "lab.tif": (
        lambda: saved(Image.fromarray(RGB).convert("LAB"), "TIFF"),
        r"its pixels are colours in L\*a\*b\*; convert it to RGB",
    ),
    "empty.png": (lambda: b"", "the file is empty"),
    "empty.tif": (lambda: b"", "the file is empty"),
    "cut.png": (lambda: png(RGB)[:-900], "damaged or cut short|truncated"),
    "cut.jpg": (
        lambda: saved(Image.fromarray(RGB), "JPEG")[:900],
        "damaged or cut short|truncated",
    ),
    "cut.tif": (lambda: tif(RGB, photometric="rgb")[:900], "damaged or cut short"),
    "text.jpg": (lambda: b"<html>Not found</html>", "not an image in a known format"),
    "pdf.png": (lambda: b"%PDF-1.4\n", "a PDF.*convert"),
    "dicom.jpg": (lambda: b"\0" * 128 + b"DICM" + b"\0" * 99, "DICOM.*convert"),
    "nifti.tif": (lambda: struct.pack("<i", 348) + b"\0" * 340 + b"n+1\0", "NIfTI.*convert"),
    "array.png": (lambda: npy(RGB), "NumPy array.*convert"),
    "hdf5.tif": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "HDF5.*convert"),
    "heic.jpg": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0" + b"\0" * 99, "HEIC.*convert"),
    "jxl.png": (lambda: b"\xff\x0a" + b"\0" * 99, "JPEG XL.*convert"),
    "jxl box.png": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 99, "JPEG XL.*convert"),
    "raw.jpg": (lambda: b"FUJIFILMCCD-RAW " + b"\0" * 99, "raw.*convert"),
    "exr.png": (lambda: b"v/1\x01" + b"\0" * 99, "OpenEXR.*convert"),
    "psd.jpg": (lambda: b"8BPS\0\x01" + b"\0" * 99, "Photoshop.*convert"),
    "svg.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG.*convert"),
    "pfm.pgm": (lambda: b"PF\n4 4\n-1.0\n" + b"\0" * 192, "PFM.*convert"),
    "three bands of floats.tif": (
        lambda: geotiff(np.zeros((2, 8, 9), np.float32)),
        "it has 2 bands of float32, and does not say",
    ),
}


def npy(values: np.ndarray) -> bytes:
    data = BytesIO()
    np.save(data, values)
    return data.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    write, reason = REFUSED[name]
    (tmp_path / name).write_bytes(write())
    with pytest.raises(UnreadableImage, match=reason):
        open_picture(tmp_path / name, reading=ReadingConfig())
    # A header may not show damage, but nothing is read as something else.
    found = survey([ImageFile(tmp_path / name, PurePosixPath(name))])
    if "cut" not in name:
        assert [item.reason for item in found.skipped]


def test_files_that_are_no_photos_are_not_taken_for_any(tmp_path: Path) -> None:
    for name in ("a.jpg", "B.JPG", "ü ñ 写真.png", "e\u0301.png", "emoji 🏔.webp", "..dots.bmp"):
        Image.fromarray(SMOOTH).save(tmp_path / name)
    for name in (".hidden.jpg", "._a.jpg", "Thumbs.db", ".DS_Store", "notes.txt", "a.jpg.part"):
        (tmp_path / name).write_bytes(b"no photo")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._b.jpg").write_bytes(b"no photo")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = find_images(tmp_path)
    names = {str(file.name) for file in found.files}
    assert {"B.JPG", "ü ñ 写真.png", "e\u0301.png", "emoji 🏔.webp", "link.jpg"} <= names
    assert not {".hidden.jpg", "._a.jpg", "__MACOSX/._b.jpg", "a.jpg.part"} & names
    assert any("files of other kinds" in note for note in found.notes)
    skipped = survey(found.files).skipped
    assert [str(item.file.name) for item in skipped] == ["broken.jpg"]


def test_a_zip_in_a_zip_is_said(tmp_path: Path) -> None:
    inner = BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.png", saved(Image.fromarray(RGB), "PNG"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("inner.zip", inner.getvalue())
        archive.writestr("a.png", saved(Image.fromarray(RGB), "PNG"))
    found = find_images(tmp_path / "a.zip")
    assert [str(file.name) for file in found.files] == ["a.png"]
    assert any(".zip (1)" in note for note in found.notes)


@pytest.mark.parametrize(
    "where",
    [
        "annotations/{}.png",
        "seg/{}.png",
        "mask/{}.png",
        "gtFine/{}.png",
        "labels_png/{}.png",
        "Annotations/{}.png",
        "instances/{}.png",
        "images/{}_label.tif",
        "images/{}-mask.png",
        "images/{}_gt.png",
        "masks_jpg/{}.jpg",
        "SegmentationClassRaw/{}.png",
        "y/{}.png",
        "Ground Truth/{}.png",
        "GT/{}.tif",
        "semantic/{}.png",
        "train_labels/{}.tif",
    ],
)
def test_masks_beside_photos_are_left_out_wherever_they_lie(where: str, tmp_path: Path) -> None:
    inside = where.startswith("images/")
    for number in range(6):
        rng = np.random.default_rng(number)
        photo = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((80, 96))
        regions = Image.fromarray(rng.integers(0, 3, (6, 5), dtype=np.uint8))
        mask = regions.resize((80, 96), Image.Resampling.NEAREST)
        if where.endswith("jpg"):
            mask = mask.point(lambda value: value * 100)
        (tmp_path / ("images" if inside else "photos")).mkdir(exist_ok=True)
        photo.save(tmp_path / ("images" if inside else "photos") / f"{number:03}.jpg")
        path = tmp_path / where.format(f"{number:03}")
        path.parent.mkdir(exist_ok=True, parents=True)
        mask.save(path)
    found = find_images(tmp_path)
    assert {file.name.suffix for file in found.files} == {".jpg"}
    assert len(found.files) == 6
    assert any("masks and labels not read as photos (6)" in note for note in found.notes)


# Undeclared marks of missing data


def heights(mark: float, rows: int) -> np.ndarray:
    values = np.random.default_rng(0).uniform(300, 700, (48, 40)).astype(np.float32)
    values[:rows] = mark
    return values


@pytest.mark.parametrize(
    ("mark", "rows", "missing"),
    [(-9999, 5, 5), (-32768, 5, 5), (-1e10, 5, 5), (9.96921e36, 5, 5), (0, 5, 0), (290, 5, 0)],
)
def test_numbers_far_from_all_others_mark_missing_data(
    mark: float, rows: int, missing: int, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", heights(mark, rows))
    picture = open_picture(tmp_path / "a.tif", reading=ReadingConfig())
    gap = np.zeros((48, 40), bool) if picture.valid is None else ~picture.valid
    assert gap.sum() == 40 * missing
    assert not missing or gap[:missing].all()
    kept = open_picture(tmp_path / "a.tif", reading=ReadingConfig(nodata="file"))
    assert kept.valid is None or mark > 1e30


def test_one_pixel_with_the_usual_mark_is_enough_and_other_numbers_are_numbers(
    tmp_path: Path,
) -> None:
    values = heights(0, 0)
    values[3, 4] = -9999
    tifffile.imwrite(tmp_path / "a.tif", values)
    picture = open_picture(tmp_path / "a.tif", reading=ReadingConfig())
    assert picture.valid is not None
    assert np.argwhere(~picture.valid).tolist() == [[3, 4]]
    whole = np.random.default_rng(0).integers(-32768, 32768, (48, 40)).astype(np.int16)
    whole[:2] = -32768
    tifffile.imwrite(tmp_path / "b.tif", whole)
    assert open_picture(tmp_path / "b.tif", reading=ReadingConfig()).valid is None


def test_a_mark_that_one_file_shows_holds_for_all_and_is_said(tmp_path: Path) -> None:
    for name, rows in (("a.tif", 9), ("b.tif", 0)):
        values = heights(-1e10, rows)
        values[40, 7] = -1e10  # in b too rare to be known by itself
        tifffile.imwrite(tmp_path / name, values)
    files = find_images(tmp_path).files
    reading, notes = settle(files, survey(files).layouts, ReadingConfig())
    assert reading.marks == {"float32": (-1e10,)}
    assert any("-1e+10 is far from all other numbers" in note for note in notes)
    low, high = reading.measured["float32"]
    assert 300 <= low < high <= 700
    picture = open_picture(files[1], reading=reading)
    assert picture.valid is not None
    assert np.argwhere(~picture.valid).tolist() == [[40, 7]]


def test_a_number_of_the_user_marks_pixels_where_all_bands_have_it(tmp_path: Path) -> None:
    values = RGB.copy()
    values[:3] = 0
    values[5, 5] = (0, 0, 9)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png", reading=ReadingConfig(nodata=0.0))
    assert picture.valid is not None
    assert np.array_equal(~picture.valid, (values == 0).all(-1))


def test_black_borders_of_16_bits_are_asked_about(tmp_path: Path) -> None:
    values = U16.copy()
    values[:9] = 0
    tifffile.imwrite(tmp_path / "a.tif", values)
    files = find_images(tmp_path).files
    _, notes = settle(files, survey(files).layouts, ReadingConfig())
    assert any("give --nodata 0" in note for note in notes)


def test_an_image_of_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError):
        find_images(tmp_path)
