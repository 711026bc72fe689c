"""The example server: masks over HTTP, several at once, and one bad photo among good ones."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import uvicorn
from PIL import Image

from iddc import Segmenter
from tiny import photo

PATH = Path(__file__).parents[1] / "examples" / "serve.py"


@pytest.fixture(scope="module")
def serve() -> Any:
    spec = importlib.util.spec_from_file_location("serve", PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def segmenter(model: Path) -> Segmenter:
    return Segmenter.load(model, device="cpu")


@dataclass(frozen=True)
class Client:
    """Asks a server that runs."""

    port: int
    app: Any

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, str, bytes]:
        """The status, the kind and the bytes of an answer."""
        address = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urlopen(Request(address, body), timeout=60) as answer:
                return answer.status, answer.headers["content-type"], answer.read()
        except HTTPError as error:
            with error:
                return error.code, "", error.read()


@pytest.fixture
def client(serve: Any, segmenter: Segmenter) -> Iterator[Client]:
    app = serve.make_app(segmenter, most=4, seconds=0.5)
    options: dict[str, Any] = {"log_level": "warning", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port=0, **options))
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Client(server.servers[0].sockets[0].getsockname()[1], app)
    server.should_exit = True
    thread.join()


def png(seed: int) -> bytes:
    data = io.BytesIO()
    photo(seed).save(data, "PNG")
    return data.getvalue()


def test_a_photo_comes_back_as_its_mask(client: Client, segmenter: Segmenter) -> None:
    status, kind, body = client.ask("/segment", png(1))
    assert (status, kind) == (200, "image/png")
    with Image.open(io.BytesIO(body)) as mask:
        assert (np.asarray(mask) == segmenter.predict(photo(1)).classes).all()
    names = json.loads(client.ask("/classes")[2])
    assert names == list(segmenter.labels.classes.names)


def test_photos_that_come_together_are_segmented_together(
    client: Client, segmenter: Segmenter
) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda seed: client.ask("/segment", png(seed)), range(4))]
    for seed, (_, _, body) in enumerate(answers):
        with Image.open(io.BytesIO(body)) as mask:
            assert (np.asarray(mask) == segmenter.predict(photo(seed)).classes).all()
    assert max(client.app.state.batcher.sizes) > 1


def test_what_is_no_image_is_refused_and_harms_no_other(client: Client) -> None:
    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.map(lambda body: client.ask("/segment", body), [png(2), b"no image"])
    assert (good[0], bad[0]) == (200, 422)
    assert client.ask("/segment", png(3))[0] == 200


def test_more_photos_than_can_wait_are_told_to_come_again(serve: Any, segmenter: Segmenter) -> None:
    import asyncio

    from fastapi import HTTPException

    async def crowd() -> list[Any]:
        batcher = serve.Batcher(segmenter, queue=1)  # nobody works on it
        first = asyncio.create_task(batcher.segment(b"a"))
        await asyncio.sleep(0)
        second = await asyncio.gather(batcher.segment(b"b"), return_exceptions=True)
        first.cancel()
        return second

    (refused,) = asyncio.run(crowd())
    assert isinstance(refused, HTTPException)
    assert refused.status_code == 503
