"""The frames of a video, decoded by the ffmpeg on PATH, one at a time.

ffmpeg runs as a program of its own: wheels that hold its libraries bundle codecs under the GPL.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from tempfile import TemporaryFile
from typing import IO

from PIL import Image

from iddc.errors import DataError, SetupError, one_line
from iddc.images import MAX_PIXELS

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv")
"""What marks a video; ffmpeg says which of them it can read."""
CONTAINERS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,asf"
"""What ffmpeg may take it for. Others are lists of files and addresses, which it would open."""
MAX_FRAME = 150_000_000
"""The largest frame that ffmpeg may decode, in pixels: 16K."""


def is_video(path: Path) -> bool:
    """Whether a path is taken for a video, by its suffix."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def frames(path: Path, note: Callable[[str], object] | None = None) -> Iterator[Image.Image]:
    """Decode every frame of the first video track: RGB, upright, in order; memory stays flat.

    Where the size changes, ffmpeg resizes to that of the first frame.

    ffmpeg ends with the iterator. It may read this file only, so that a video that is a list of
    files or addresses opens none of them.

    Args:
        path: The video.
        note: Told what ffmpeg says of a video that it can read in part: frames may be missing.

    Raises:
        SetupError: There is no ffmpeg on PATH.
        DataError: ffmpeg cannot read the video, or not to its end; earlier frames were given.
    """
    program = which("ffmpeg")
    if program is None:
        raise SetupError(
            f"{path} is a video, and there is no ffmpeg on PATH to read it. Install ffmpeg 5.1 or "
            "newer, or give a folder of frames."
        )
    command = [program, "-nostdin", "-v", "error", "-protocol_whitelist", "file"]
    command += ["-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_FRAME)]
    command += ["-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    # As PPM each frame says its size: no need to know the rotation.
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with TemporaryFile() as said, _running(command, said) as process:
        assert process.stdout is not None
        count = 0
        while (frame := _read_ppm(process.stdout, path)) is not None:
            yield frame
            count += 1
        failed = process.wait() or not count
        said.seek(0)
        lines = said.read(10_000).decode(errors="replace").strip().splitlines()
        if failed:
            raise DataError(
                f"ffmpeg cannot read {path}{f' beyond {count:,} frames' if count else ''}: "
                f"{lines[-1] if lines else 'it gave no frame'}."
            )
        if lines and note:
            note(one_line(f"note: {path} may lack frames, ffmpeg says: {lines[-1]}"))


@contextmanager
def _running(command: list[str], said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output is read; it is stopped where nobody reads on."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=said,
        process_group=0,  # Ctrl-C is for us: else a video would seem to be damaged
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _read_ppm(stream: IO[bytes], path: Path) -> Image.Image | None:
    """The next image of a stream of PPMs, or None at its end."""
    kind, size, _depth = (stream.readline(100).split() for _ in range(3))
    if not kind:
        return None
    width, height = map(int, size) if kind == [b"P6"] and len(size) == 2 else (0, 0)
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(f"ffmpeg gave no frame of {path} that can be read: {kind}, {size}.")
    pixels = stream.read(width * height * 3)
    if len(pixels) < width * height * 3:
        raise DataError(f"ffmpeg stopped in the middle of a frame of {path}.")
    return Image.frombytes("RGB", (width, height), pixels)
