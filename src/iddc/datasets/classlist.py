"""The classes of a labelled data set, as a list beside it names them, with their colours if it has.

`classes.txt` has one class a line; line i, from 0, is id i. A line may also give the colour that
pictures of the labels show: `road 128 64 128`, `road,128,64,128`, `128 64 128 road` or
`road #804080`. `labelmap.txt` is CVAT's list, `road:128,64,128::`; CamVid's label_colors.txt and
class_dict.csv are read alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

from iddc.errors import DataError, counted
from iddc.images import listed
from iddc.metrics import IGNORE

LISTS = ("classes.txt", "labelmap.txt", "label_colors.txt", "class_dict.csv")
"""The files that are looked for, the first one counts."""
CVAT_LIST = "labelmap.txt"
"""CVAT's, whose black row means pixels without an annotation."""
IGNORED_NAME = "ignore"
"""A row of this name in a list with colours: its pixels are ignored."""

T = TypeVar("T", bound=Hashable)
Rgb = tuple[int, int, int]
BLACK: Rgb = (0, 0, 0)
VOC_BORDER: Rgb = (224, 224, 192)
"""The colour of Pascal VOC's index 255, the border between objects, which nobody scores."""

_TRIPLE = r"(?P<r>\d{1,3})[\s,;]+(?P<g>\d{1,3})[\s,;]+(?P<b>\d{1,3})"
_COLOURED = (
    re.compile(rf"(?P<name>[^:]+):{_TRIPLE}:[^:]*:[^:]*"),  # CVAT: parts and actions follow
    re.compile(rf"(?P<name>.+?)[\s,;:=]+[\[(]?{_TRIPLE}[\])]?"),
    re.compile(rf"[\[(]?{_TRIPLE}[\])]?[\s,;:=]+(?P<name>.+)"),
)
_HEX = (
    re.compile(r"(?P<name>.+?)[\s,;:=]+#(?P<hex>[0-9a-fA-F]{6})"),
    re.compile(r"#(?P<hex>[0-9a-fA-F]{6})[\s,;:=]+(?P<name>.+)"),
)
_HEADER = re.compile(r"(?i)name[\s,;]+r(ed)?[\s,;]+g(reen)?[\s,;]+b(lue)?")


@dataclass(frozen=True)
class ClassList:
    """The names of classes, and the colours that pictures of labels give them, if a list has any.

    Attributes:
        names: One per class; the id is the position.
        colours: RGB of each class, or nothing.
        ignored: Colours of pixels that belong to no class.
        source: The file, for messages.
    """

    names: tuple[str, ...]
    colours: tuple[Rgb, ...] = ()
    ignored: frozenset[Rgb] = frozenset()
    source: str = ""

    @property
    def all_grey(self) -> bool:
        """Whether grey pictures of labels can show its colours: black and white, for example."""
        return bool(self.colours) and all(len({*colour}) == 1 for colour in self.colours)

    def ids_of(self, rgb: UInt8[np.ndarray, "H W 3"]) -> UInt16[np.ndarray, "H W"]:
        """The id of the class whose colour each pixel has, `IGNORE` for ignored colours.

        Raises:
            DataError: A pixel has another colour.
        """
        keys, ids = self._table
        found = _packed(rgb)
        position = np.searchsorted(keys, found).clip(max=len(keys) - 1)
        strange = keys[position] != found
        if strange.any():
            colours, counts = np.unique(found[strange], return_counts=True)
            most = np.argsort(-counts, kind="stable")
            shown = [
                f"{_written(int(colours[i]))} ({counted(int(counts[i]), 'pixel')})" for i in most
            ]
            raise DataError(
                f"{self.source} gives no class the colour {listed(shown)}. Add a line for each, "
                f"or one named {IGNORED_NAME} for pixels that are not scored; colours of no class "
                "at the borders of regions come from smoothing or JPEG, which labels must not have."
            )
        result: np.ndarray = ids[position]
        return result

    @cached_property
    def _table(self) -> tuple[Int64[np.ndarray, " n"], UInt16[np.ndarray, " n"]]:
        rows = [*self.colours, *sorted(self.ignored)]
        keys = _packed(np.array(rows, np.uint8).reshape(-1, 1, 3)).ravel()
        ids = np.array([*range(len(self.colours)), *[IGNORE] * len(self.ignored)], np.uint16)
        order = np.argsort(keys)
        return keys[order], ids[order]


def find_class_list(*folders: Path) -> ClassList | None:
    """Read the list of the first of some folders that has one.

    Raises:
        DataError: It is empty, no UTF-8 text, or names a class or a colour twice.
    """
    for folder in folders:
        for name in LISTS:
            if (folder / name).is_file():
                return read_class_list((folder / name).read_bytes(), folder / name)
    return None


def read_class_list(data: bytes, path: Path, background: str | None = None) -> ClassList:
    """Read a list of classes.

    Args:
        data: Its bytes.
        path: Where it is; the name says whether it is CVAT's.
        background: The name of a class for CVAT's pixels without an annotation, else ignored.

    Raises:
        DataError: It is empty, no UTF-8 text, or names a class or a colour twice.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text.") from error
    lines = [line.strip() for line in text.strip().splitlines()]
    if not lines:
        raise DataError(f"{path} is empty. Expected one class name per line, or no file.")
    if "" in lines:
        raise DataError(
            f"{path}: line {lines.index('') + 1} is empty. A class is its line, counted from 0, so "
            "every line before the last one has a name."
        )
    rows = _coloured(lines, path)
    if not rows:
        _refuse_twice(lines, lambda name: name, path)
        return ClassList(tuple(lines), source=str(path))
    cvat = path.name == CVAT_LIST
    ignored = {colour for name, colour in rows if name == IGNORED_NAME}
    classes = [(name, colour) for name, colour in rows if name != IGNORED_NAME]
    if cvat:
        # CVAT paints what nobody annotated black, whether or not its list has a row for that.
        classes = [(name, colour) for name, colour in classes if colour != BLACK]
        if background is None:
            ignored |= {BLACK}
        else:
            classes = [(background, BLACK), *classes]
    colours = [colour for _, colour in classes]
    if VOC_BORDER not in colours:
        ignored |= {VOC_BORDER}
    _refuse_twice([name for name, _ in classes], lambda name: name, path)
    _refuse_twice([*colours, *ignored], _hex, path)
    if not classes:
        raise DataError(f"{path} names no class but {listed(name for name, _ in rows)}.")
    return ClassList(
        tuple(name for name, _ in classes), tuple(colours), frozenset(ignored), str(path)
    )


def _coloured(lines: list[str], path: Path) -> list[tuple[str, Rgb]]:
    """The name and the colour of each line, if all lines have one; nothing if none has."""
    found: list[tuple[str, Rgb] | None] = []
    for line in lines:
        row = _row(line)
        comment = line.startswith("#") and not any(form.fullmatch(line) for form in _HEX)
        if row is None and (comment or _HEADER.fullmatch(line)):
            continue
        found.append(row)
    rows = [row for row in found if row]
    if len(rows) == len(found) or not rows:
        return rows
    plain = next(line for line in lines if _row(line) is None and not line.startswith("#"))
    raise DataError(
        f"{path}: {len(rows)} lines name a colour, such as {_hex(rows[0][1])}, and {plain!r} names "
        "none. Give each line one (NAME R G B), or none of them."
    )


def _row(line: str) -> tuple[str, Rgb] | None:
    for form in _HEX:
        if match := form.fullmatch(line):
            red, green, blue = bytes.fromhex(match["hex"])
            return match["name"].strip(), (red, green, blue)
    for form in _COLOURED:
        if match := form.fullmatch(line):
            red, green, blue = (int(match[channel]) for channel in "rgb")
            if max(red, green, blue) <= 255:
                return match["name"].strip(), (red, green, blue)
    return None


def _refuse_twice(items: list[T], write: Callable[[T], str], path: Path) -> None:
    twice = sorted(write(item) for item, count in Counter(items).items() if count > 1)
    if twice:
        raise DataError(f"{path} names {listed(twice)} twice. Give each class its own.")


def _packed(rgb: UInt8[np.ndarray, "H W 3"]) -> Int64[np.ndarray, "H W"]:
    """One number per colour."""
    wide = rgb.astype(np.int64)
    packed: np.ndarray = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return packed


def _hex(colour: Rgb) -> str:
    return f"#{bytes(colour).hex()}"


def _written(packed: int) -> str:
    return f"#{packed:06x}"
