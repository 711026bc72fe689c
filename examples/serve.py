"""An HTTP server that segments photos, several at once.

    pip install 'iddc[label]'
    python examples/serve.py runs/photos --port 8000
    curl --data-binary @street.jpg http://127.0.0.1:8000/segment > mask.png
    curl http://127.0.0.1:8000/classes

Photos that arrive within a few milliseconds of each other go through the network together. A
client gets 503 where too many are waiting, and 422 for what is no image.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image

from iddc import IddcError, Segmenter

MOST_BYTES = 50_000_000
"""The largest photo, as it is sent."""


@dataclass
class Waiting:
    """A photo, and the promise of its mask."""

    photo: bytes
    mask: asyncio.Future[bytes]


class Batcher:
    """Gathers photos for a moment, and segments them together in one thread."""

    def __init__(
        self, segmenter: Segmenter, *, most: int = 8, seconds: float = 0.02, queue: int = 64
    ) -> None:
        self.segmenter = segmenter
        self.most = most
        self.seconds = seconds
        self.sizes: list[int] = []
        """How many photos each of the last batches had."""
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue(queue)

    async def segment(self, photo: bytes) -> bytes:
        """The mask of a photo, once its batch is done."""
        item = Waiting(photo, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            raise HTTPException(503, "too many photos are waiting", {"Retry-After": "1"}) from None
        return await item.mask

    async def run(self) -> None:
        """Work until it is cancelled."""
        while True:
            batch = [await self._queue.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    while len(batch) < self.most:
                        batch.append(await self._queue.get())
            self.sizes = [*self.sizes[-99:], len(batch)]
            results = await asyncio.to_thread(self._masks, [item.photo for item in batch])
            for item, result in zip(batch, results, strict=True):
                if item.mask.cancelled():  # its client has gone
                    continue
                if isinstance(result, bytes):
                    item.mask.set_result(result)
                else:
                    item.mask.set_exception(result)

    def _masks(self, photos: list[bytes]) -> list[bytes | Exception]:
        """A PNG of class ids for each photo, or why there is none. One bad photo harms no other."""
        try:
            return [*map(_png, self.segmenter.predict_all(photos))]
        except IddcError:
            return [self._alone(photo) for photo in photos]
        except Exception as error:  # the server goes on
            return [error] * len(photos)

    def _alone(self, photo: bytes) -> bytes | Exception:
        try:
            return _png(self.segmenter.predict(photo))
        except IddcError as error:
            return HTTPException(422, str(error))


def _png(result: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(result.classes).save(data, "PNG")
    return data.getvalue()


def make_app(segmenter: Segmenter, **batching: Any) -> FastAPI:
    """The server of a segmenter.

    Args:
        segmenter: What segments.
        batching: Arguments of `Batcher`.
    """
    batcher = Batcher(segmenter, **batching)

    @contextlib.asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="iddc", lifespan=working)
    app.state.batcher = batcher

    @app.post("/segment")
    async def segment(request: Request) -> Response:
        photo = b""
        async for part in request.stream():
            photo += part
            if len(photo) > MOST_BYTES:
                raise HTTPException(413, f"a photo may have {MOST_BYTES:,} bytes")
        return Response(await batcher.segment(photo), media_type="image/png")

    @app.get("/classes")
    def classes() -> list[str]:
        return list(segmenter.labels.classes.names)

    return app


def main() -> None:
    """Serve a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="the most photos at once")
    args = parser.parse_args()
    app = make_app(Segmenter.load(args.run, args.device), most=args.batch)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
