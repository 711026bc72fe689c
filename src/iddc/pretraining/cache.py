"""Photos decoded once, into one file of pixels that every process maps into its memory."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from iddc.canvas import working_size
from iddc.config import ReadingConfig
from iddc.errors import SetupError, UnreadableImage
from iddc.gaps import NO_DATA, fill_pixels
from iddc.images import AS_STORED, FORMATS, ImageFile, open_picture, quiet_pillow
from iddc.progress import SILENT, Progress
from iddc.runs import disk_errors, write_atomic

_PIXELS, _INDEX = "pixels.u8", "index.npz"
_SAMPLE = 500
"""How many headers are read to estimate the size."""
_AT_ONCE = 256
"""Images that wait in memory to be written."""


class ImageCache:
    """The images of a cache: `photos[i]` is RGB, uint8, "H W 3".

    Attributes:
        sizes: Height and width of each.
        sources: Which source each comes from.
        failures: Index of each file that is not in the cache, and the reason.
    """

    def __init__(self, folder: Path) -> None:
        with (folder / _INDEX).open("rb") as file, np.load(file) as index:
            self.digest = str(index["digest"])
            self.sizes: Float64[np.ndarray, "n 2"] = index["sizes"]
            self.sources: Int64[np.ndarray, " n"] = index["sources"]
            self.failures = list(
                zip(index["failed"].tolist(), index["reasons"].tolist(), strict=True)
            )
        self._ends = np.cumsum(3 * self.sizes.prod(1).astype(np.int64))
        size = int(self._ends[-1]) if len(self) else 0
        if (folder / _PIXELS).stat().st_size != size:
            raise ValueError("the pixels are not those of the index")
        # Copy on write, as torch knows no tensor that cannot be written. An empty file has no map.
        pixels = np.memmap(folder / _PIXELS, np.uint8, "c") if size else np.empty(0, np.uint8)
        self._pixels: UInt8[Tensor, " n"] = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> UInt8[Tensor, "H W 3"]:
        height, width = (int(side) for side in self.sizes[index])
        end = int(self._ends[index])
        return self._pixels[end - 3 * height * width : end].view(height, width, 3)


def find_cache(folder: Path, digest: str) -> ImageCache | None:
    """The photos of a complete cache of these files, if there is one."""
    try:
        photos = ImageCache(folder)
    except Exception:  # a damaged archive makes zipfile and numpy raise almost anything
        return None  # it is only a cache: it is made again
    return photos if photos.digest == digest else None


def fill_cache(
    sources: Sequence[Sequence[ImageFile]],
    folder: Path,
    digest: str,
    *,
    short_side: int,
    min_side: int,
    threads: int,
    check: Callable[[], None],
    reading: ReadingConfig = AS_STORED,
    progress: Progress = SILENT,
) -> ImageCache:
    """Decode all files into a cache. Gaps without data are cut off, or filled from around them.

    Args:
        sources: The files of each source.
        folder: Where the cache is made.
        digest: What tells these files from others.
        short_side: Larger images are reduced to this shorter side, in pixels.
        min_side: Images with a shorter side are left out.
        reading: How the numbers in files become colours.
        threads: How many decode.
        check: Called now and then; may raise to stop.
        progress: Shows how far the work is, and the size before anything is written.

    Raises:
        SetupError: The disk has no room, or cannot be written.
    """
    # Whether there is room is known before hours of decoding.
    files = [file for source in sources for file in source]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _INDEX).unlink(missing_ok=True)
        (folder / _PIXELS).unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    needed = estimated_bytes(files, short_side)
    size = f"about {needed / 1e9:.2g} GB" if needed >= 1e8 else f"about {needed / 1e6:.2g} MB"
    if needed > free:
        raise SetupError(
            f"The decoded images take {size} in {folder}, where {free / 1e9:.2g} GB are free. Free "
            "some space, or give a smaller --short-side."
        )
    progress.note(f"decoding {len(files):,} images once, {size} in {folder}")

    def decoded(file: ImageFile) -> UInt8[np.ndarray, "H W 3"] | str:
        try:
            picture = open_picture(file, short_side, reading, settled=True)
        except UnreadableImage as error:
            return error.reason
        image = picture.image
        if picture.valid is not None:  # no crop may show what holds no data
            if not picture.valid.any():
                return NO_DATA
            image = Image.fromarray(fill_pixels(np.asarray(image), picture.valid))
        if min(image.size) < min_side:
            return f"{image.width} x {image.height} pixels, smaller than --min-side {min_side}"
        reduced = working_size(image.size, short_side)
        if reduced != image.size:
            image = image.resize(reduced, Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.asarray(image)

    # Pixels are written as they come, in the order of the files.
    sizes, kept, failed, reasons = [], [], [], []
    with (
        progress.job(len(files)),
        disk_errors(folder / _PIXELS),
        (folder / _PIXELS).open("wb") as pixels,
        ThreadPoolExecutor(threads) as pool,
    ):
        for start in range(0, len(files), _AT_ONCE):
            check()
            some = pool.map(decoded, files[start : start + _AT_ONCE])
            for number, result in enumerate(some, start):
                if isinstance(result, str):
                    failed.append(number)
                    reasons.append(result)
                else:
                    sizes.append(result.shape[:2])
                    kept.append(number)
                    pixels.write(result.data)
            progress.update(min(start + _AT_ONCE, len(files)), "decoding")
    # The index comes last: without it there is no cache.
    bounds = list(accumulate(len(source) for source in sources))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        digest=np.array(digest),
        sizes=np.array(sizes, np.float64).reshape(-1, 2),
        sources=np.searchsorted(bounds, kept, side="right").astype(np.int64),
        failed=np.array(failed, np.int64),
        reasons=np.array(reasons, np.str_),
    )
    write_atomic(folder / _INDEX, buffer.getbuffer())
    return ImageCache(folder)


def estimated_bytes(files: Sequence[ImageFile], short_side: int) -> int:
    """About how large a cache is, from the headers of some of the files."""
    some = files[:: max(1, len(files) // _SAMPLE)]
    total = 0
    for file in some:
        try:
            with quiet_pillow, file.open() as stream:
                size = Image.open(cast("IO[bytes]", stream), formats=tuple(FORMATS)).size
        except Exception:  # whatever Pillow raises: it is left out when it is decoded
            continue
        width, height = working_size(size, short_side)
        total += 3 * width * height
    return total * len(files) // max(1, len(some))
