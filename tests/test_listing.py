"""Sources of millions of images: little memory, and headers that are read when they are needed."""

from __future__ import annotations

import os
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iddc.config import ReadingConfig, ViewsConfig
from iddc.errors import DataError, UnreadableImage
from iddc.images import (
    FoundImages,
    ImageFile,
    collect,
    find_images,
    open_image,
    refuse_many,
    sample,
)
from iddc.images.listing import Listing, Texts, without
from iddc.manifest import MANIFEST, find_listed, kept
from iddc.views import ViewDataset

NAMES = ["a.png", "b/c.png", "b/ü x.jpg", "d.png", "e.png"]


def listing() -> Listing:
    return Listing(Path("photos"), Texts.of(NAMES), renamed={3: "other.png"})


def files() -> list[ImageFile]:
    names = [*NAMES[:3], "other.png", *NAMES[4:]]
    return [
        ImageFile(Path("photos", path), PurePosixPath(name))
        for path, name in zip(NAMES, names, strict=True)
    ]


def photo(path: Path, kind: str = "L", value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if kind == "I;16" else np.uint8
    pixels = np.arange(12 * 10, dtype=dtype).reshape(10, 12) + dtype(value)
    Image.fromarray(pixels).save(path)
    return path


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=()))))
def test_packed_texts_come_back_as_they_were(texts: list[str]) -> None:
    packed = Texts.of(texts)
    assert [*packed] == texts
    assert [packed[index] for index in range(len(packed))] == texts


@given(
    st.builds(
        slice,
        *[st.none() | st.integers(-7, 7)] * 2,
        st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]),
    )
)
def test_a_slice_of_a_listing_has_the_images_of_a_slice_of_a_list(cut: slice) -> None:
    assert [*listing()[cut]] == files()[cut]
    assert [*listing()[cut].names()] == [str(file.name) for file in files()[cut]]


@pytest.mark.parametrize("left_out", [[], [0], [1, 3], [0, 1, 2, 3, 4]])
def test_images_that_are_left_out_of_a_listing_are_those_of_a_list(left_out: list[int]) -> None:
    assert [*without(listing(), left_out)] == [*without(files(), left_out)]
    assert len(without(listing(), left_out)) == 5 - len(left_out)


def test_an_image_of_a_listing_that_is_not_there_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        listing()[5]


def test_a_hundred_thousand_images_take_less_than_four_megabytes() -> None:
    tracemalloc.start()
    kept = Listing(Path("photos"), Texts.of(f"{i // 1000:03}/{i:06}.jpg" for i in range(100_000)))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(kept[99_999].name) == "099/099999.jpg"
    assert size < 4e6


def test_a_folder_is_sorted_by_the_parts_of_paths(tmp_path: Path) -> None:
    names = ["a-b.png", "a/c.png", "a/d/e.png", "a/z.png", "b.png", "a.d/f.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found = [str(file.name) for file in find_images(tmp_path, include_masks=True).files]
    assert found == sorted(names, key=lambda name: PurePosixPath(name).parts)


# Headers


def test_the_sample_is_spread_evenly_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.images.check.SURVEYED", 4)
    assert sample(files() * 2) == [0, 2, 5, 7]  # 10 * i / 4
    assert sample(files()[:3]) == [0, 1, 2]


@pytest.fixture
def three_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers of 3 images are read before they are used: 0, 3 and 6 of 9."""
    monkeypatch.setattr("iddc.images.check.SURVEYED", 3)
    monkeypatch.setattr("iddc.images.measure.SURVEYED", 3)


@pytest.mark.usefixtures("three_sampled")
def test_of_many_images_those_of_the_sample_alone_are_opened_first(tmp_path: Path) -> None:
    for index in range(9):
        photo(tmp_path / f"{index}.png")
    for index in (3, 4):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    found = collect(find_images(tmp_path).files, ReadingConfig(), max_unreadable=0.5)
    assert [str(item.file.name) for item in found.skipped] == ["3.png"]
    assert [str(file.name) for file in found.files] == [f"{i}.png" for i in range(9) if i != 3]
    assert "the headers of 3 of 9 images were read, evenly spread" in found.notes[0]


@pytest.mark.usefixtures("three_sampled")
def test_an_image_whose_kind_of_values_the_sample_lacks_is_left_out_with_the_reason(
    tmp_path: Path,
) -> None:
    for index in range(9):
        photo(tmp_path / f"{index}.png", "I;16" if index == 4 else "L")
    found = collect(find_images(tmp_path).files, ReadingConfig(), max_unreadable=0.5)
    views = ViewDataset(found.files, ViewsConfig(short_side=0), 0, found.reading)
    assert "its values are uint16, and no image whose header" in (views[0, 4].reason or "")
    assert views[0, 5].reason is None


@pytest.mark.usefixtures("three_sampled")
def test_the_range_of_the_sample_is_that_of_all_images(tmp_path: Path) -> None:
    for index in range(9):
        photo(tmp_path / f"{index}.png", "I;16", 100 * (index + 1))
    found = collect(find_images(tmp_path).files, ReadingConfig(), max_unreadable=0.5)
    # Of 120 values of each of the images 0, 3 and 6, from 100 and 700 on; 0.1 and 99.9 percent.
    assert found.reading.measured == {"uint16": (100, 819)}
    views = ViewDataset(found.files, ViewsConfig(short_side=0), 0, found.reading)
    assert [views[0, index].reason for index in range(9)] == [None] * 9


@pytest.mark.parametrize(("unreadable", "refused"), [(100, False), (138, False), (139, True)])
def test_a_sample_is_refused_beyond_four_standard_errors(unreadable: int, refused: bool) -> None:
    # 5 % of 2000 are 100, and 4 * sqrt(2000 * 0.05 * 0.95) = 38.99.
    reasons = {str(index): "damaged" for index in range(unreadable)}
    if not refused:
        refuse_many(reasons, 2000, 0.05, sampled=True)
        return
    with pytest.raises(DataError, match="139 of 2000 sampled images cannot be read"):
        refuse_many(reasons, 2000, 0.05, "sampled images", sampled=True)


def test_where_none_may_be_unreadable_one_in_the_sample_is_refused() -> None:
    with pytest.raises(DataError):
        refuse_many({"a": "damaged"}, 2000, 0.0, sampled=True)


# The manifest


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of photos whose manifest is in the folder `run` beside it."""
    monkeypatch.setattr("iddc.manifest.LARGE", 3)
    for name in ("a.png", "a.jpg", "b/c.png", "labels/c.png"):
        photo(tmp_path / "photos" / name)
    keep(tmp_path / "photos", tmp_path / "run")
    return tmp_path / "photos"


def keep(source: Path, run: Path, limit: int | None = None) -> None:
    run.mkdir(exist_ok=True)
    with kept(find_images(source, limit=limit), source, run, limit=limit, include_masks=False):
        until = time.monotonic() + 60
        while not (run / MANIFEST).exists() and time.monotonic() < until:
            time.sleep(0.01)


def forbid_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> FoundImages:
        raise AssertionError("listed again")

    monkeypatch.setattr("iddc.manifest.find_images", refuse)


def test_a_manifest_gives_the_images_and_the_remarks_without_listing(
    remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = find_images(remembered)
    forbid_listing(monkeypatch)
    found = find_listed(remembered, remembered.parent / "run")
    assert [*found.files] == [*listed.files]
    assert found.notes == listed.notes
    assert found.files[0].read_bytes() == (remembered / "a.jpg").read_bytes()


def add_a_photo(photos: Path) -> None:
    photo(photos / "b/d.png")


def remove_a_photo(photos: Path) -> None:
    (photos / "b/c.png").unlink()


def add_a_folder(photos: Path) -> None:
    photo(photos / "z/d.png")


def damage_the_manifest(photos: Path) -> None:
    path = photos.parent / "run" / MANIFEST
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("change", [add_a_photo, remove_a_photo, add_a_folder, damage_the_manifest])
def test_what_is_not_as_it_was_is_listed_again(
    change: Callable[[Path], None], remembered: Path
) -> None:
    change(remembered)
    found = find_listed(remembered, remembered.parent / "run")
    assert [*found.files] == [*find_images(remembered).files]


def test_another_request_is_listed_again(remembered: Path) -> None:
    run = remembered.parent / "run"
    assert len(find_listed(remembered, run, limit=1).files) == 1
    assert len(find_listed(remembered, run, include_masks=True).files) == 4


def test_an_image_that_changed_under_the_manifest_is_left_out_with_the_reason(
    remembered: Path,
) -> None:
    photo(remembered / "b/c.png", value=7)
    first, _, last = find_listed(remembered, remembered.parent / "run").files
    assert first.read_bytes()
    with pytest.raises(UnreadableImage, match=r"c\.png: changed since the collection was listed"):
        last.read_bytes()


def test_a_collection_with_a_time_of_the_far_future_has_a_manifest_too(
    remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong clock writes any year; nanoseconds of 64 bits end in 2262."""
    os.utime(remembered / "a.jpg", (0, 10_000_000_000))
    if (remembered / "a.jpg").stat().st_mtime_ns < 2**63:
        pytest.skip("this file system keeps no such time")
    run = remembered.parent / "far"
    keep(remembered, run)
    forbid_listing(monkeypatch)
    assert find_listed(remembered, run).files[0].read_bytes()


def test_a_zip_that_was_written_anew_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iddc.manifest.LARGE", 1)
    source = tmp_path / "photos.zip"
    for name in ("a.png", "b.png"):
        with zipfile.ZipFile(source, "w") as archive:
            archive.write(photo(tmp_path / name), name)
        found = find_listed(source, tmp_path / "run").files
        assert [str(file.name) for file in found] == [name]
        assert open_image(found[0]).size == (12, 10)
        keep(source, tmp_path / "run")


def test_a_small_collection_has_no_manifest(tmp_path: Path) -> None:
    photo(tmp_path / "photos/a.png")
    found = find_images(tmp_path / "photos")
    with kept(found, tmp_path / "photos", tmp_path, limit=None, include_masks=False):
        pass
    assert not (tmp_path / MANIFEST).exists()
