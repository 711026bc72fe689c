"""Tell masks and labels from photos: by the names of folders and files, and by a look at a few.

Public data sets keep labels beside their photos, under some dozen names. A name alone decides only
where no photo has it (`labels`, `gtFine`, ...). Elsewhere some files are opened: `with_mask` may
hold photos of people. What is left out is always said.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import PurePosixPath
from typing import IO, Literal, TypeVar, cast

import numpy as np
from PIL import Image

from iddc.images.decode import quiet_pillow
from iddc.images.files import FORMATS, ImageFile
from iddc.images.listing import name_at, names_of

LABEL_FOLDERS = frozenset(
    {"labels", "annotations", "gtfine", "gtcoarse", "groundtruth", "stuffthingmaps"}
    | {"segmentationclass", "segmentationobject", "labelstr", "labelsts", "labelsval"}
)
"""Folders that never hold photos, in lower case and without signs between the letters."""
_WORDS = frozenset(
    {"mask", "masks", "label", "labels", "labelids", "labelmap", "labelmaps", "gt", "gts"}
    | {"groundtruth", "annotation", "annotations", "annot", "annots", "anno", "annos"}
    | {"segmentation", "segmentations", "seg", "segs", "trimap", "trimaps", "matte", "mattes"}
    | {"stuffthingmaps", "panoptic"}
)
"""Words in the name of a folder that may hold masks."""
_PHOTO_WORDS = frozenset({"image", "images", "img", "imgs", "photo", "photos", "jpegimages", "rgb"})
"""Words of a folder inside such a folder that holds its photos."""
_SUFFIX = re.compile(
    r"(?P<stem>.+?)[_\-. ]+(cp[_\-]?)?(?P<word>masks?|seg|segmentations?|labels?|label_?ids|"
    r"label_?train_?ids|gt|ground_?truth|annotations?|anno|annot|matte|trimap)([_\-]?\d+)?",
    re.IGNORECASE,
)
_PREFIX = re.compile(
    r"(?P<word>masks?|seg|segmentation|labels?|gt|ground_?truth)[_\-. ]*(?P<stem>\d+)",
    re.IGNORECASE,
)
_BESIDE_ITS_PHOTO = re.compile(
    r"(?P<stem>.+?)_(?P<word>l|color|parts|instance_?ids|instances?|binary|polygons)([_\-]?\d+)?",
    re.IGNORECASE,
)
"""Ends of names that mark a label only where the photo without them is in the same folder."""
_LOSSLESS = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif"})
_CHANNEL = re.compile(r"(_0000|_leftimg8bit|_image|_img|_rgb|_sat)$")
"""What names of photos have and those of their labels lack, as in nnU-Net and Cityscapes."""
_SAMPLES = 5
"""How many files of a group are looked at."""
_ROWS = 256
"""How many rows of an image are looked at."""
_FEW = 8
"""So many values or fewer are those of a mask, whatever their pattern."""
_LARGEST = 10**8
"""Images of more pixels are not opened for a look."""

_MAYBE = re.compile("mask|seg|label|gt|truth|anno|matte|trimap|_l|_color|_part|_inst|_bin|_poly")
"""What a name has at least that one of the patterns above takes."""

T = TypeVar("T")
Look = Literal["label", "photo", "unclear"]


@dataclass
class Sorted:
    """What a source holds, sorted.

    Attributes:
        left_out: The indices of masks and labels, in order.
        masks: How many files of each folder or pattern are left out.
        kept: How many files of folders or patterns are photos by their look, despite their names.
    """

    left_out: list[int] = field(default_factory=list)
    masks: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


def sort_out(files: Sequence[ImageFile]) -> Sorted:
    """Sort the image files of a folder or a zip into photos and masks.

    Only files whose names or stems ask for it cost more than a look at their names.

    Args:
        files: All of them, named by their paths in it.
    """
    result = Sorted()
    groups: dict[str, list[int]] = defaultdict(list)
    sure: dict[str, bool] = {}
    # By name: a file belongs to the folder or to the pattern that marks it.
    folders = dict.fromkeys(name.rpartition("/")[0] for name in names_of(files))
    shared = _shared_parts(folders)
    of_folder = {name: _folder_group(PurePosixPath(name), shared) for name in folders}
    named: list[tuple[int, PurePosixPath]] = []
    for index, name in enumerate(names_of(files)):
        folder, _, last = name.rpartition("/")
        if group := of_folder[folder]:
            groups[group[0]].append(index)
            sure[group[0]] = sure.get(group[0], False) or group[1]
        elif _MAYBE.search(last.lower()):
            named.append((index, PurePosixPath(name)))
    partners = _partners(files, [name for _, name in named])
    for index, path in named:
        if found := _name_group(path, partners):
            groups[found[0]].append(index)
            sure[found[0]] = sure.get(found[0], False) or found[1]
    left_out: set[int] = set()
    for group_name, members in sorted(groups.items(), key=lambda item: item[1][0]):
        if _never_photos(group_name) and sure[group_name]:
            looks = {"label"}
        else:
            looks = {look(files[index]) for index in _spread(members)}
        # Without a photo that goes with it, a name is not enough.
        if looks == {"photo"} or not (sure[group_name] or looks == {"label"}):
            result.kept[group_name] += len(members)
        else:
            result.masks[group_name] += len(members)
            left_out.update(members)
    # By content: pictures of few values that share their stems with photos.
    for index in _twins(files, left_out):
        twin = files[index].name
        result.masks[f"{_where(twin)}*{twin.suffix} of few values, named like photos"] += 1
        left_out.add(index)
    result.left_out = sorted(left_out)
    return result


def look(file: ImageFile) -> Look:
    """Judge a picture by a part of its pixels: piecewise constant as a label, or like a photo.

    A label has few values, or some hundred in areas of one value; a photo has colours, many of
    them, and neighbours that differ. A grey photo and a soft mask are unclear.
    """
    try:
        with (
            quiet_pillow,
            Image.open(BytesIO(file.read_bytes()), formats=tuple(FORMATS)) as image,
        ):
            if image.width * image.height > _LARGEST:
                return "unclear"
            if image.mode not in ("1", "L", "P", "RGB") and not image.mode.startswith(("I", "F")):
                return _judge(np.asarray(image.convert("RGB")))
            return _judge(np.asarray(image))
    except Exception:  # what cannot be read is judged by its name alone
        return "unclear"


def _judge(pixels: np.ndarray) -> Look:
    pixels = pixels[:: max(1, len(pixels) // _ROWS)]
    colourful = False
    if pixels.ndim == 3:
        wide = pixels.astype(np.int64)
        colourful = bool((wide != wide[..., :1]).any())
        pixels = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    values, counts = np.unique(pixels, return_counts=True)
    if len(values) <= _FEW:
        return "label"
    left, right = pixels[:, :-1], pixels[:, 1:]
    background = values[counts.argmax()]
    inner = (left != background) | (right != background)
    equal = float((left == right)[inner].mean()) if inner.any() else 1.0
    if len(values) <= 256 and equal >= 0.6:
        return "label"
    if colourful and len(values) > min(256, pixels.size // 4) and equal < 0.6:
        return "photo"
    return "unclear"


def _folder_group(folder: PurePosixPath, shared: int) -> tuple[str, bool] | None:
    """The innermost folder that may hold masks, and whether its name is enough beside photos."""
    parts = folder.parts
    for depth in reversed(range(len(parts))):
        path = "/".join(parts[: depth + 1])
        if _squeezed(parts[depth]) in LABEL_FOLDERS:
            return path, True
        words = _words(parts[depth])
        if words & _PHOTO_WORDS and not words & _WORDS:
            return None
        if words & _WORDS or any(word.endswith("annot") for word in words):
            return path, depth >= shared
    return None


def _name_group(
    name: PurePosixPath, partners: Mapping[str, Sequence[str]]
) -> tuple[str, bool] | None:
    """The pattern of a name that may be a mask's, and whether there is a photo it goes with."""
    stem = name.stem
    if not _MAYBE.search(stem.lower()):
        return None
    if match := _SUFFIX.fullmatch(stem) or _PREFIX.fullmatch(stem):
        end = match.re is _SUFFIX
        other = match["stem"].lower()
        paired = end and any(found != str(name) for found in partners.get(other, ()))
        word = match["word"].lower()
        pattern = f"*_{word}" if end else f"{word}*"
        return f"{_where(name)}{pattern}{name.suffix}", paired
    if match := _BESIDE_ITS_PHOTO.fullmatch(stem):
        others = (other for other in partners.get(match["stem"].lower(), ()) if other != str(name))
        beside = {other.rpartition("/")[0] for other in others}
        if name.suffix.lower() in _LOSSLESS and _folder(name) in beside:
            return f"{_where(name)}*_{match['word']}{name.suffix}", True
    return None


def _twins(files: Sequence[ImageFile], left_out: Container[int]) -> list[int]:
    """Pictures of few values that have the stem of a photo, in another folder or another format."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, name in enumerate(names_of(files)):
        if index not in left_out:
            groups[name.rpartition("/")[0], os.path.splitext(name)[1].lower()].append(index)
    if not any(suffix in _LOSSLESS for _, suffix in groups):
        return []
    # The stems of millions are compared by numbers: few of them, or none, have a partner.
    numbers = np.zeros(len(files), np.int64)
    for members in groups.values():
        numbers[members] = [hash(key) for key in _keys(files, members)]
    every, counts = np.unique(
        numbers[np.concatenate([*groups.values()])] if groups else numbers, return_counts=True
    )
    common = set(every[counts > 1].tolist())
    keys: dict[int, str] = {}
    by_stem: dict[str, list[int]] = defaultdict(list)
    for members in groups.values():
        if common.isdisjoint(numbers[members].tolist()):
            continue
        for index, key in zip(members, _keys(files, members), strict=True):
            if int(numbers[index]) in common:
                keys[index] = key
                by_stem[key].append(index)

    def is_twin(index: int) -> bool:
        others = [files[other] for other in by_stem[keys[index]] if other != index]
        return _is_twin(files[index], others)

    found: list[int] = []
    for (folder, suffix), members in groups.items():
        if suffix not in _LOSSLESS:
            continue
        paired = [index for index in members if index in keys and len(by_stem[keys[index]]) > 1]
        judged = [is_twin(index) for index in _spread(paired)]
        if not any(judged):
            continue
        if all(judged):
            mostly = 10 * len(paired) >= 9 * len(members)
            found += members if mostly and folder else paired
        else:
            found += [index for index in paired if is_twin(index)]
    return found


def _keys(files: Sequence[ImageFile], members: Sequence[int]) -> list[str]:
    """What files of one folder and suffix may have in common with others."""
    return _own_parts([_key(_stem(name_at(files, index))) for index in members])


def _own_parts(stems: Sequence[str]) -> list[str]:
    """Stems without the words that all of a folder begin and end with: 21 of 21_manual1."""
    if len(stems) < 2:
        return [*stems]
    before, after = _shared_words(stems), _shared_words([stem[::-1] for stem in stems])
    return [stem[before : len(stem) - after] or stem for stem in stems]


def _shared_words(names: Sequence[str]) -> int:
    """How long the words are that all names begin with, with the sign that ends the last one."""
    first, last = min(names), max(names)  # what these two share, all share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    start = re.match(r".*[\W_]", first[:same])
    return len(start[0]) if start else 0


def _is_twin(file: ImageFile, others: Sequence[ImageFile]) -> bool:
    """Whether a picture looks like a label, and a photo of its size does not."""
    size = _size(file)
    if size is None or _too_rich(file, size) or look(file) != "label":
        return False
    return any(_size(other) == size and look(other) != "label" for other in others)


def _too_rich(file: ImageFile, size: tuple[int, int]) -> bool:
    """Whether a PNG takes more bytes than a label would, so that nobody needs to decode it."""
    if file.member is not None or file.name.suffix.lower() != ".png" or size[0] < 100:
        return False
    return file.size() > size[0] * size[1]


@lru_cache(maxsize=4096)
def _size(file: ImageFile) -> tuple[int, int] | None:
    """The sides of a picture, the shorter one first, as photos may be turned."""
    try:
        with quiet_pillow, file.open() as stream:
            image = Image.open(cast("IO[bytes]", stream), formats=tuple(FORMATS))
            short, long = sorted(image.size)
            return short, long
    except Exception:
        return None


def _spread(items: Sequence[T]) -> list[T]:
    """A few items from all parts of a sequence."""
    if len(items) <= _SAMPLES:
        return [*items]
    return [items[index * (len(items) - 1) // (_SAMPLES - 1)] for index in range(_SAMPLES)]


def _partners(files: Sequence[ImageFile], masks: Sequence[PurePosixPath]) -> dict[str, list[str]]:
    """The names of the files that masks may go with, by the stem that both have."""
    wanted: set[str] = set()
    for name in masks:
        for pattern in (_SUFFIX, _PREFIX, _BESIDE_ITS_PHOTO):
            if match := pattern.fullmatch(name.stem):
                wanted.add(match["stem"].lower())
    result: dict[str, list[str]] = defaultdict(list)
    if wanted:
        for text in names_of(files):
            key = _key(_stem(text))
            if key in wanted:
                result[key].append(text)
    return result


def _stem(name: str) -> str:
    return os.path.splitext(name.rpartition("/")[2])[0]


def _key(stem: str) -> str:
    """What a photo and its label have in common."""
    return _CHANNEL.sub("", stem.lower())


def _shared_parts(folders: Iterable[str]) -> int:
    """How many folders all files have in common, which say nothing of a single one."""
    parents = [PurePosixPath(folder).parts for folder in folders]
    if not parents:
        return 0
    first, last = min(parents), max(parents)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )


def _folder(name: PurePosixPath) -> str:
    return str(name.parent) if name.parent.parts else ""


def _never_photos(group: str) -> bool:
    return _squeezed(group.rpartition("/")[2]) in LABEL_FOLDERS


def _squeezed(name: str) -> str:
    return re.sub(r"[\W_]|(?<=stuffthingmaps).*", "", name.lower())


def _words(name: str) -> set[str]:
    """The words of a name, in lower case, also where only capitals part them."""
    apart = re.findall(r"[^\W\d_]+", name.lower())
    camel = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    words = {*apart, *camel}
    return words | ({"groundtruth"} if {"ground", "truth"} <= words else set())


def _where(name: PurePosixPath) -> str:
    return f"{name.parent}/" if name.parent.parts else ""
