"""Images in tars, as WebDataset keeps them: read in place."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iddc.cli import main
from iddc.errors import DataError, UnreadableImage
from iddc.images import find_images
from iddc.images.tar import TarImage


def encoded(seed: int, suffix: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, suffix)
    return data.getvalue()


def pack(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def names(source: Path) -> list[str]:
    return [str(file.name) for file in find_images(source).files]


def test_images_of_a_tar_are_its_members_in_its_order(tmp_path: Path) -> None:
    members = {"b.png": encoded(0), "b.json": b"{}", "./a/a.jpg": encoded(1, "JPEG")}
    tar = pack(tmp_path / "photos.tar", {**members, "._b.png": b"x"})
    found = find_images(tar)
    assert [str(file.name) for file in found.files] == ["b.png", "a/a.jpg"]
    assert [file.read_bytes() for file in found.files] == [members["b.png"], members["./a/a.jpg"]]
    assert [file.size() for file in found.files] == [
        len(members[n]) for n in ("b.png", "./a/a.jpg")
    ]
    assert str(found.files[0]) == f"{tar}!b.png"
    assert found.notes == ("files of other kinds: .json (1)",)


def test_images_of_several_tars_are_named_by_their_tar(tmp_path: Path) -> None:
    for shard in range(2):
        pack(tmp_path / f"data/train-{shard:03}.tar", {"0.png": encoded(shard)})
    found = find_images(tmp_path / "data").files
    assert [str(file.name) for file in found] == ["train-000/0.png", "train-001/0.png"]
    assert [file.read_bytes() for file in found] == [encoded(0), encoded(1)]


def test_tars_beside_images_are_not_read(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"0.png": encoded(0)})
    (tmp_path / "1.png").write_bytes(encoded(1))
    assert names(tmp_path) == ["1.png"]


def test_names_in_a_tar_stay_inside_the_folder_of_results(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", {"../../up.png": encoded(0), "/etc/root.png": encoded(1)})
    assert names(tar) == ["up.png", "etc/root.png"]


def test_masks_of_images_in_a_tar_are_those_of_the_files(model: Path, tmp_path: Path) -> None:
    members = {f"{index}.png": encoded(index) for index in range(2)}
    for name, data in members.items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    sources = {"here": tmp_path / "photos", "there": pack(tmp_path / "photos.tar", members)}
    for out, source in sources.items():
        assert main(["predict", str(model), str(source), "--out", str(tmp_path / out)]) == 0
    for name in members:
        there, here = (tmp_path / out / "png" / name for out in ("there", "here"))
        assert there.read_bytes() == here.read_bytes()


def test_a_tar_that_ends_in_a_file_is_exit_3(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", {"a.png": encoded(0), "b.png": encoded(1)})
    tar.write_bytes(tar.read_bytes()[: 512 + len(encoded(0)) + 2000])
    with pytest.raises(DataError, match=r"a\.tar cannot be read after 2 files: .*copy it again"):
        find_images(tar)


def test_a_tar_without_its_end_is_read_and_said(tmp_path: Path) -> None:
    data = encoded(0)
    tar = pack(tmp_path / "a.tar", {"a.png": data})
    tar.write_bytes(tar.read_bytes()[: 512 + -(-len(data) // 512) * 512])
    found = find_images(tar)
    assert found.files[0].read_bytes() == data
    assert "has no mark of its end" in found.notes[0]


def test_a_compressed_tar_is_exit_3(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", {"a.png": encoded(0)}, "w:gz")
    with pytest.raises(DataError, match="not compressed"):
        find_images(tar)


def test_a_tar_that_became_shorter_gives_unreadable_images(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", {"a.png": encoded(0)})
    (file,) = find_images(tar).files
    assert isinstance(file, TarImage)
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(UnreadableImage, match="shorter than when it was listed"):
        file.read_bytes()
