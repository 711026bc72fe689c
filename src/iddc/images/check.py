"""Sort out the files that are no images, from their headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from iddc.errors import DataError
from iddc.images.decode import explain, open_header, quiet_pillow
from iddc.images.files import ImageFile
from iddc.images.find import listed

_CHECK_THREADS = 8


@dataclass(frozen=True)
class Skipped:
    """An image that is left out, and why, in plain words."""

    file: ImageFile
    reason: str


def check_images(
    files: Sequence[ImageFile], *, max_unreadable: float
) -> tuple[list[ImageFile], list[Skipped]]:
    """Sort out the files that are no images by reading every header, without decoding pixels.

    Damage after the header shows only in `open_image`.

    Args:
        files: What to check. Order is kept.
        max_unreadable: The share of unreadable files that is accepted, in [0, 1].

    Raises:
        DataError: The share of unreadable files exceeds `max_unreadable`.
    """

    def problem(file: ImageFile) -> str | None:
        try:
            with file.open() as stream:
                open_header(file, stream)
        except Exception as error:
            return explain(error)
        return None

    # Threads hide the latency of network file systems; parsing itself holds the interpreter lock.
    with quiet_pillow, ThreadPoolExecutor(_CHECK_THREADS) as pool:
        problems = list(pool.map(problem, files))
    pairs = list(zip(files, problems, strict=True))
    readable = [file for file, reason in pairs if reason is None]
    skipped = [Skipped(file, reason) for file, reason in pairs if reason is not None]
    refuse_many({str(item.file): item.reason for item in skipped}, len(files), max_unreadable)
    return readable, skipped


def refuse_many(
    reasons: Mapping[str, str], total: int, max_unreadable: float, kind: str = "images"
) -> None:
    """Raise if too many images cannot be read: then the user should know before the result is used.

    Args:
        reasons: The name of each unreadable image, and why it is.
        total: The number of all images, unreadable ones too.
        max_unreadable: The share of unreadable ones that is accepted, in [0, 1].
        kind: What the images are called in the message.

    Raises:
        DataError: There are more.
    """
    if len(reasons) > max_unreadable * total:
        raise DataError(
            f"{len(reasons)} of {total} {kind} cannot be read, more than the "
            f"{100 * max_unreadable:g}% allowed by --max-unreadable: "
            f"{listed(f'{name} ({reason})' for name, reason in reasons.items())}. "
            "Repair or remove them, or allow a larger share."
        )
