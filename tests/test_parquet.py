"""Images in Parquet files, as data sets of Hugging Face have them."""

from __future__ import annotations

import pickle
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddc.cli import main
from iddc.errors import DataError, SetupError, UnreadableImage
from iddc.images import find_images, open_image
from iddc.images.parquet import _cells

pyarrow: Any = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
parquet: Any = pytest.importorskip("pyarrow.parquet")


def encoded(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    data = BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def cells(count: int, first: int = 0, **paths: str) -> list[dict[str, Any]]:
    """What Hugging Face keeps of an image: its bytes and the name of its file."""
    return [
        {"bytes": encoded(first + i), "path": paths.get(f"p{i}", f"photo-{first + i}.png")}
        for i in range(count)
    ]


def write(path: Path, columns: dict[str, Any], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def names(source: Path) -> list[str]:
    return [str(file.name) for file in find_images(source).files]


def test_images_are_the_cells_in_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = cells(5)
    path = write(tmp_path / "train.parquet", {"label": [*range(5)], "image": rows})
    files = find_images(path).files
    assert [str(file.name) for file in files] == [row["path"] for row in rows]
    assert [file.read_bytes() for file in files] == [row["bytes"] for row in rows]
    assert files[4].read_bytes() == rows[4]["bytes"]  # also out of order
    assert files[0].read_bytes() == rows[0]["bytes"]
    assert [file.size() for file in files] == [len(row["bytes"]) for row in rows]
    assert str(files[3]) == f"{path}!photo-3.png"
    assert pickle.loads(pickle.dumps(files[3])).read_bytes() == rows[3]["bytes"]


def test_pixels_are_those_that_another_library_reads(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="polars, which tests alone use, is missing")
    # Written by pyarrow, read by both.
    path = write(tmp_path / "a.parquet", {"image": cells(5)})
    theirs = polars.read_parquet(path)["image"].to_list()
    for file, cell in zip(find_images(path).files, theirs, strict=True):
        assert str(file.name) == cell["path"]
        assert np.array_equal(open_image(file), Image.open(BytesIO(cell["bytes"])))
    # Written by the other library.
    frame = polars.DataFrame({"img": [encoded(7, "JPEG"), encoded(8, "JPEG")], "label": ["a", "b"]})
    frame.write_parquet(tmp_path / "b.parquet")
    files = find_images(tmp_path / "b.parquet").files
    assert [str(file.name) for file in files] == ["000000000", "000000001"]
    for file, seed in zip(files, (7, 8), strict=True):
        assert np.array_equal(open_image(file), Image.open(BytesIO(encoded(seed, "JPEG"))))


def test_several_files_name_their_images(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / f"data/train-{shard}.parquet", {"image": cells(2, 2 * shard)})
    files = find_images(tmp_path / "data").files
    assert [str(file.name) for file in files] == [
        *("train-0/photo-0.png", "train-0/photo-1.png", "train-1/photo-2.png"),
        "train-1/photo-3.png",
    ]
    assert [file.read_bytes() for file in files] == [encoded(seed) for seed in range(4)]


def test_rows_are_numbered_where_paths_do_not_tell_them_apart(tmp_path: Path) -> None:
    same = write(tmp_path / "same.parquet", {"image": cells(3, p2="photo-0.png")})
    assert names(same) == ["000000000", "000000001", "000000002"]
    none = [{"bytes": encoded(0), "path": None}]
    assert names(write(tmp_path / "none.parquet", {"image": none})) == ["000000000"]
    some = write(tmp_path / "some.parquet", {"image": [*cells(1), *none]})
    assert names(some) == ["000000000", "000000001"]


def test_names_stay_inside_the_folder_of_results(tmp_path: Path) -> None:
    rows = cells(2, p0="../../up.png", p1="/etc/root.png")
    assert names(write(tmp_path / "a.parquet", {"image": rows})) == ["up.png", "etc/root.png"]


def test_parquet_beside_images_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": cells(1)})
    (tmp_path / "1.png").write_bytes(encoded(1))
    assert names(tmp_path) == ["1.png"]


def test_of_several_columns_the_one_called_image_is_read(tmp_path: Path) -> None:
    columns = {"annotation": cells(1, 5), "image": cells(1)}
    (file,) = find_images(write(tmp_path / "a.parquet", columns)).files
    assert file.read_bytes() == encoded(0)
    columns["photo"] = columns.pop("image")
    with pytest.raises(DataError, match="found several: annotation, photo"):
        find_images(write(tmp_path / "b.parquet", columns))
    with pytest.raises(DataError, match="found columns label, text"):
        find_images(write(tmp_path / "c.parquet", {"label": [1], "text": ["a"]}))


def test_masks_are_those_of_the_files(model: Path, tmp_path: Path) -> None:
    rows = cells(5)
    (tmp_path / "photos").mkdir()
    for row in rows:
        (tmp_path / "photos" / row["path"]).write_bytes(row["bytes"])
    sources = {"here": tmp_path / "photos", "there": write(tmp_path / "a.parquet", {"image": rows})}
    for out, source in sources.items():
        assert main(["predict", str(model), str(source), "--out", str(tmp_path / out)]) == 0
    for row in rows:
        there, here = (tmp_path / out / "png" / row["path"] for out in ("there", "here"))
        assert there.read_bytes() == here.read_bytes()


def test_each_row_group_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells(6)}, group=3)
    _cells.cache_clear()
    for file in find_images(path).files:
        file.read_bytes()
    assert (_cells.cache_info().misses, _cells.cache_info().hits) == (2, 4)


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_file_that_is_cut_is_exit_3(
    kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells(4)})
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert main(["check", str(path)]) == 3
    assert "cannot be read as Parquet" in capsys.readouterr().err


def test_a_file_whose_middle_is_damaged_gives_unreadable_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells(4)})
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)  # the first row group; the footer stays
    path.write_bytes(data)
    files = find_images(path).files
    with pytest.raises(UnreadableImage, match="its row group cannot be read"):
        files[0].read_bytes()
    assert files[3].read_bytes() == encoded(3)


def test_an_empty_cell_and_a_group_that_is_too_large_are_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*cells(1), {"bytes": None, "path": "gone.png"}]
    files = find_images(write(tmp_path / "a.parquet", {"image": rows})).files
    with pytest.raises(UnreadableImage, match="holds no bytes"):
        files[1].read_bytes()
    _cells.cache_clear()
    monkeypatch.setattr("iddc.images.parquet.MAX_BYTES", 1000)
    with pytest.raises(UnreadableImage, match=r"read: it has .* GB, .* fewer rows in a group$"):
        files[0].read_bytes()


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"image": cells(1)})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SetupError, match=r"pip install 'iddc\[parquet\]'"):
        find_images(path)
