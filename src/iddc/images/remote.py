"""Images in object stores and on web servers, read through fsspec. Nothing is copied to a disk."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from iddc.errors import DataError, SetupError, UnreadableImage, needs_extra
from iddc.images.files import MAX_BYTES, ImageFile

SCHEMES = frozenset({"s3", "gs", "http", "https"})
"""What an address begins with, before `://`."""
_MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket"})
"""What Amazon's library calls what is not there."""
_PAUSES = (0.5, 2.0)
"""Seconds before each further attempt to read an image: servers refuse now and then."""


@dataclass(frozen=True)
class RemoteImage(ImageFile):
    """An image at an address; `path` is its name alone."""

    url: str = ""

    def __str__(self) -> str:
        return f"{self.url}#{self.page + 1}" if self.page else self.url

    @property
    def inside(self) -> str:
        """The path that other programs see."""
        return self.url

    def open(self) -> BufferedIOBase:
        """Fetch the encoded image into memory.

        Raises:
            UnreadableImage: It is too large, or the server does not give it in three attempts.
        """
        try:
            return BytesIO(_fetched(self))
        except UnreadableImage:
            raise
        except Exception as error:  # every library has errors of its own
            raise UnreadableImage(self, why(error)) from error

    def size(self) -> int:
        """The bytes of the encoded image."""
        system, path = open_system(self.url)
        return int(system.size(path) or len(self.read_bytes()))


def address_of(source: Path | str) -> str | None:
    """The address that a source was given as; None: it is a path.

    A `Path` of `s3://bucket/a` has one slash after the colon.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    found = re.fullmatch(r"([a-z0-9]+):/{1,2}([^/].*)", text)
    if found and found[1] in SCHEMES:
        return f"{found[1]}://{found[2]}"
    return None


def open_system(url: str) -> tuple[Any, str]:
    """What fsspec reads an address with, and the path of the address in it.

    Raises:
        SetupError: The package for this kind of address is missing.
    """
    scheme = url.partition("://")[0]
    with needs_extra("cloud", f"Reading {scheme}:// needs a package of fsspec's"):
        core: Any = import_module("fsspec.core")
        # A new one in every process: connections do not survive a fork, and fsspec knows that.
        system, path = core.url_to_fs(url)
    return system, path


def list_below(url: str) -> list[str]:
    """The addresses of all files below one, relative to it and in order; of a file: none.

    Raises:
        DataError: There is nothing at the address.
        SetupError: The server refuses, or does not answer; or a package is missing.
    """
    system, path = open_system(url)
    try:
        info = system.info(path)
        root = path.rstrip("/") + "/"
        found = system.find(root if info["type"] == "directory" or _is_page(info) else path)
    except Exception as error:
        raise _refusal(url, error) from error
    return [name[len(root) :] for name in found if name.startswith(root) and name != root]


def why(error: BaseException) -> str:
    """The innermost reason of an error, in one line."""
    *_, error = _chain(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, one after the other."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _is_missing(error: BaseException) -> bool:
    """Whether an error says that nothing is there, whichever library says it."""

    def says_so(link: BaseException) -> bool:
        response = getattr(link, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        status = getattr(link, "status", None)
        return isinstance(link, FileNotFoundError) or status == 404 or code in _MISSING

    return all(map(says_so, _chain(error)))


def _is_page(info: dict[str, Any]) -> bool:
    """Whether a web server gives a page with links here, as for a folder."""
    return str(info.get("mimetype", "")).startswith("text/html")


def _refusal(url: str, error: Exception) -> DataError | SetupError:
    reason = why(error)
    if _is_missing(error):
        return DataError(f"Nothing is at {url} ({reason}). Expected a folder of images, or one.")
    return SetupError(
        f"Cannot read {url} ({reason}). Check the address, the network and the rights of this "
        "machine; credentials are taken from where the tools of the provider keep them."
    )


def _fetched(file: RemoteImage) -> bytes:
    system, path = open_system(file.url)
    for pause in (*_PAUSES, None):
        try:
            size = system.info(path).get("size") or 0
            if size > MAX_BYTES:
                raise UnreadableImage(file, f"larger than {MAX_BYTES // 10**9} GB")
            return bytes(system.cat_file(path))
        except (UnreadableImage, PermissionError):
            raise
        except Exception as error:
            if pause is None or _is_missing(error):
                raise
            time.sleep(pause)
    raise AssertionError
