"""Images at addresses: a web server on this machine, and fsspec's store in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from iddc.cli import main
from iddc.errors import DataError, SetupError, UnreadableImage
from iddc.images import address_of, find_images, open_image

pytest.importorskip("aiohttp", reason="the extra `cloud` is not installed")
fsspec: Any = pytest.importorskip("fsspec", reason="the extra `cloud` is not installed")


class Server(SimpleHTTPRequestHandler):
    """Serves a folder; refuses /private, and /flaky twice for each file."""

    asked: ClassVar[Counter[str]] = Counter()

    def send_head(self) -> Any:
        if self.path.startswith("/private"):
            return self.send_error(403, "Forbidden")
        if "/flaky/" in self.path and self.path.endswith(".png") and self.command == "GET":
            self.asked[self.path] += 1
            if self.asked[self.path] <= 2:
                return self.send_error(503, "Busy")
        return super().send_head()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    Server.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/a b/c.jpg", "s3://bucket/a b/c.jpg"),
        ("https://host:8000/photos", "https://host:8000/photos"),
        ("gs://bucket", "gs://bucket"),
        ("photos/a.jpg", None),
        ("/data/s3:/a", None),
        ("C:/photos", None),
        ("file:///data", None),
    ],
)
def test_an_address_is_known_also_as_a_path(given: str, address: str | None) -> None:
    assert address_of(given) == address
    assert address_of(Path(given)) == address


def test_a_folder_of_a_web_server_is_read_like_a_folder(site: tuple[Path, str]) -> None:
    folder, url = site
    for index, name in enumerate(("a.png", "b/c d.png", "b/e.jpg", ".hidden/f.png")):
        photo(folder / "photos" / name, index)
    photo(folder / "photos/labels/a.png")
    (folder / "photos/readme.txt").touch()
    found = find_images(Path(f"{url}/photos"))
    assert [str(file) for file in found.files] == [
        f"{url}/photos/{name}" for name in ("a.png", "b/c%20d.png", "b/e.jpg")
    ]
    local = find_images(folder / "photos")
    assert [note.partition("(")[0] for note in found.notes] == [
        note.partition("(")[0] for note in local.notes
    ]
    for remote, file in zip(found.files, local.files, strict=True):
        assert remote.read_bytes() == file.read_bytes()
        assert remote.size() == file.size()


def test_one_image_at_an_address_is_a_source(site: tuple[Path, str]) -> None:
    folder, url = site
    photo(folder / "a.png")
    (file,) = find_images(Path(f"{url}/a.png")).files
    assert str(file.name) == "a.png"
    assert np.array_equal(open_image(file), Image.open(folder / "a.png"))


def test_a_store_of_objects_is_read_like_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iddc.images.remote.SCHEMES", {"memory"})
    store = fsspec.filesystem("memory")
    for name in ("images/b/a.png", "images/b.png", "preview.png"):
        store.pipe_file(f"/bucket/{name}", name.encode())
    found = find_images(Path("memory://bucket"))
    assert [str(file.name) for file in found.files] == ["b/a.png", "b.png"]
    assert found.files[0].read_bytes() == b"images/b/a.png"
    assert found.notes == ("reads only images/ of memory://bucket",)
    store.rm("/bucket", recursive=True)


def test_masks_of_images_at_an_address_are_those_of_the_files(
    model: Path, site: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = site
    for index in range(2):
        photo(folder / f"photos/b/{index}.png", index)
    for source, out in ((f"{url}/photos", "there"), (str(folder / "photos"), "here")):
        assert main(["predict", str(model), source, "--out", str(tmp_path / out)]) == 0
    here = sorted((tmp_path / "here/png").rglob("*.png"))
    assert len(here) == 2
    for path in here:
        there = tmp_path / "there/png" / path.relative_to(tmp_path / "here/png")
        assert there.read_bytes() == path.read_bytes()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that speaks S3 on this machine, and a client of Amazon's own library for it."""
    moto: Any = pytest.importorskip("moto.server", reason="moto, which tests alone use, is missing")
    pytest.importorskip("s3fs", reason="the extra `cloud` is not installed")
    boto3: Any = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    settings |= {"ACCESS_KEY_ID": "tests", "SECRET_ACCESS_KEY": "tests"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="tiles")
    yield client
    server.stop()


def test_masks_of_images_in_a_bucket_are_those_of_the_files(
    model: Path, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, name in enumerate(("a.png", "b/c d+e.png", "b/ä.png")):
        path = photo(tmp_path / "photos" / name, index)
        bucket.put_object(Bucket="tiles", Key=f"photos/{name}", Body=path.read_bytes())
    bucket.put_object(Bucket="tiles", Key="photos/labels/a.png", Body=b"")
    found = find_images(Path("s3://tiles/photos")).files
    assert [str(file) for file in found] == [
        f"s3://tiles/photos/{name}" for name in ("a.png", "b/c d+e.png", "b/ä.png")
    ]
    for source, out in (("s3://tiles/photos", "there"), (str(tmp_path / "photos"), "here")):
        assert main(["predict", str(model), source, "--out", str(tmp_path / out)]) == 0
    here = sorted((tmp_path / "here/png").rglob("*.png"))
    assert len(here) == 3
    for path in here:
        there = tmp_path / "there/png" / path.relative_to(tmp_path / "here/png")
        assert there.read_bytes() == path.read_bytes()
    capsys.readouterr()
    for address in ("s3://tiles/nothing", "s3://no-such-bucket/photos"):
        assert main(["check", address]) == 3
        assert f"Nothing is at {address}" in capsys.readouterr().err


def test_a_raster_at_an_address_is_listed_with_what_to_do(
    model: Path, site: tuple[Path, str], tmp_path: Path
) -> None:
    rasterio = pytest.importorskip("rasterio")
    folder, url = site
    (folder / "scans").mkdir()
    size = {"count": 3, "height": 40, "width": 50, "dtype": "uint8", "crs": "EPSG:32632"}
    size["transform"] = rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)
    with rasterio.open(folder / "scans/a.tif", "w", "GTiff", **size) as raster:
        raster.write(np.random.default_rng(0).integers(0, 256, (3, 40, 50), np.uint8))
    out = tmp_path / "masks"
    words = ["--out", str(out), "--formats", "geotiff", "--device", "cpu"]
    assert main(["predict", str(model), f"{url}/scans", *words]) == 3
    assert "copy the file here" in (out / "skipped.csv").read_text()


def test_images_at_an_address_are_swept(site: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = site
    for index in range(3):
        photo(folder / f"photos/{index}.png", index)
    words = "-k 2 3 --seeds 1 --backbone untrained:test_vit --views.short-side 0 --device cpu"
    for source, out in ((f"{url}/photos", "there"), (str(folder / "photos"), "here")):
        assert main(["sweep", source, "--out", str(tmp_path / out), *words.split()]) == 0
    there, here = ((tmp_path / out / "sweep.json").read_text() for out in ("there", "here"))
    assert there == here
    assert not (tmp_path / "there/embeddings.safetensors").exists()  # they may change unseen


def test_a_server_that_is_busy_is_asked_again(
    site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = site
    photo(folder / "flaky/a.png")
    monkeypatch.setattr("iddc.images.remote._PAUSES", (0.0, 0.0))
    (file,) = find_images(Path(f"{url}/flaky"), include_masks=True).files
    assert file.read_bytes() == (folder / "flaky/a.png").read_bytes()


def test_an_image_that_is_gone_is_unreadable(site: tuple[Path, str]) -> None:
    folder, url = site
    photo(folder / "photos/a.png")
    (file,) = find_images(Path(f"{url}/photos")).files
    (folder / "photos/a.png").unlink()
    with pytest.raises(UnreadableImage, match=r"photos/a\.png: .*not found|FileNotFound"):
        file.read_bytes()


def test_a_server_that_refuses_is_exit_4(site: tuple[Path, str]) -> None:
    with pytest.raises(SetupError, match=r"Cannot read .*/private \(.*403.*rights"):
        find_images(Path(f"{site[1]}/private"))


def test_a_server_that_does_not_answer_is_exit_4() -> None:
    with pytest.raises(SetupError, match=r"Cannot read http://127.0.0.1:9/photos"):
        find_images(Path("http://127.0.0.1:9/photos"))


def test_an_address_where_nothing_is_is_exit_3(site: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=r"Nothing is at .*/nowhere"):
        find_images(Path(f"{site[1]}/nowhere"))


def test_without_its_package_an_address_is_exit_4(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(SetupError, match=r"pip install 'iddc\[cloud\]'"):
        find_images(Path("s3://bucket/photos"))
