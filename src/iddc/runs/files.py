"""Files that are complete or absent, and a lock that a dead process cannot leave behind."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from iddc.errors import ConfigError, SetupError

TEMPORARY = ".iddc-*.tmp"
"""The names of unfinished files. The final name is no part of them: it may be 255 bytes long."""

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "it is larger than this disk or your limit (ulimit -f) allows",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "you may not write there; choose another folder or change its permissions",
    errno.EPERM: "you may not write there; choose another folder or change its permissions",
    errno.ENOENT: "its folder is gone; do not move it while iddc runs",
    errno.EEXIST: "a file, or a link to nothing, has this name; choose another folder",
}

_MAX_TEXT = 50_000_000

_LOCKED: set[int] = set()


def _unlock_in_child() -> None:
    for descriptor in _LOCKED:
        os.close(descriptor)
    _LOCKED.clear()


# A forked data worker would inherit the lock, and keep it for seconds after a killed parent.
os.register_at_fork(after_in_child=_unlock_in_child)


def read_text(path: Path, most: int = _MAX_TEXT) -> str:
    """Read a file of text in UTF-8, but wait for no pipe and fill no memory.

    Args:
        path: The file.
        most: The largest size, in bytes.

    Raises:
        OSError: It cannot be read, is larger, or is no regular file.
        ValueError: It is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it is too large, {status.st_size} bytes", str(path))
    return path.read_text("utf-8")


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file so that a reader, and a crash at any moment, sees all of it or none of it.

    Text is written as UTF-8; bytes of a file name that are no UTF-8 come out as they went in.

    Raises:
        SetupError: It cannot be written: disk full, read-only, no permission.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    with open_atomic(path) as file:
        file.write(data)


def write_new(path: Path, data: str) -> bool:
    """Write a file whole unless there is one of that name, which is then left as it is.

    Of several processes that do this at once, one succeeds: the system gives the name away once.

    Returns:
        Whether it was written.

    Raises:
        SetupError: It cannot be written: disk full, read-only, no permission.
    """
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    with disk_errors(path):
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a disk without hard links: a kill may leave it cut short
                try:
                    with path.open("x", encoding="utf-8") as file:
                        file.write(data)
                except FileExistsError:
                    return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when the block ends, and is gone if it fails.

    Raises:
        SetupError: It cannot be written: disk full, read-only, no permission.
    """
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    with disk_errors(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into one sentence.

    Raises:
        SetupError: Instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, error.strerror or str(error))
        raise SetupError(f"Cannot write {path}: {cause}.") from error


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system takes it back when the process dies.

    Raises:
        ConfigError: Another process holds it, and we do not wait; the message names it.
        SetupError: The lock file cannot be written.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _LOCKED.add(descriptor)
    try:
        with disk_errors(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                raise ConfigError(
                    f"{path.parent} is in use by {holder or 'another process'}. Wait for it, stop "
                    "it, or choose another folder."
                ) from None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        if descriptor in _LOCKED:  # not in a forked child, which has closed it
            _LOCKED.remove(descriptor)
            os.close(descriptor)
