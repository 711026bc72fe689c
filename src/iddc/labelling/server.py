"""The server of the page: one run, this machine only, and only for who knows the token.

No request names a file: the page, the samples and labels.json are all there is. Every edit says
which state of the labels it was made from, and is refused if that is no longer the present one, so
that of two browsers, or a browser and a command line, none takes the other's names away.
"""

# No postponed annotations: FastAPI reads the types of routes, which wrappers hide as text.
import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from shlex import quote
from threading import Lock
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from iddc.errors import ConfigError, IddcError, SetupError
from iddc.labelling.samples import TILE, Sample, find_examples, shares
from iddc.masks import IGNORED, LABELS, Labels, cluster_names, edit_labels, read_labels
from iddc.masks.ids import encode
from iddc.masks.labels import MAX_NAME
from iddc.runs import Run

HOST = "127.0.0.1"
MAX_BODY = 1_000_000
"""The longest request, in bytes: an edit of some thousand clusters."""
MAX_CONNECTIONS = 100
"""How many connections are held at once. For one more, the one that is silent longest goes."""
MAX_SILENCE = 20.0
"""Seconds for a request to arrive in full, counted from its connection or the answer before."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}
_PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


class Stale(ConfigError):
    """An edit was made from labels that somebody has changed since."""


class _Seen(BaseModel):
    """What every change says: which state of the labels it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str


class _Edit(_Seen):
    """Names and colours by cluster, as `Labels.edit` takes them."""

    names: dict[int, str] = {}
    colours: dict[int, str] = {}


Asked = TypeVar("Asked", bound=_Seen)


class _Bounded(H11Protocol):
    """One connection among few: whoever sends nothing holds no place for long."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        # Of many that come at once, each must end another: one that is ended stays listed a while.
        connections: set[Any] = {*self.connections} - {self}
        others = [other for other in connections if not other.transport.is_closing()]
        if len(others) >= MAX_CONNECTIONS:
            min(others, key=lambda other: other.silent_since).transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline:
            self._deadline.cancel()

    def _await_request(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        self.silent_since = self.loop.time()
        self._deadline = self.loop.call_later(MAX_SILENCE, self._expire)

    def _expire(self) -> None:
        cycle = self.cycle
        if cycle and not cycle.response_complete and not cycle.more_body:
            self._await_request()  # it has asked, and waits for us
        else:
            self.transport.abort()


class _Once(logging.Filter):
    """Lets each message through once: a server that lacks files would repeat one for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage().partition("\n")[0]
        new = text not in self._told and len(self._told) < 100
        self._told.add(text)
        return new


_ONCE = _Once()


def listen(port: int) -> socket.socket:
    """Take a port of this machine, which no other machine reaches; 0: a free one.

    Raises:
        ConfigError: There is no such port.
        SetupError: Another program has it, or it may not be used.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: expected 0 to 65535, found {port}.")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SetupError(
            f"Port {port} cannot be used: {reason}. Choose another, or leave --port out."
        ) from error


def make_server(app: FastAPI) -> uvicorn.Server:
    """What answers for the page; `run(sockets=[...])` ends with KeyboardInterrupt at Ctrl-C."""
    config = uvicorn.Config(
        app,
        http=_Bounded,
        backlog=MAX_CONNECTIONS,  # also how many are accepted before others are heard
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(_ONCE)
    server = uvicorn.Server(config)
    app.state.stop = partial(setattr, server, "should_exit", True)
    return server


def make_app(
    run: Path,
    num_clusters: int,
    samples: Sequence[Sample],
    token: str,
    more: Callable[[], Sequence[Sample]] | None = None,
) -> FastAPI:
    """The page of a run at /TOKEN/, with what it reads and sends.

    Args:
        run: The folder whose labels.json is edited.
        num_clusters: K of its model.
        samples: The images to show; without any, clusters can still be named.
        token: Without it, every request is answered with 403.
        more: Gives further images to show; none when there are no more.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    # The page and its images are in memory before the first request.
    page = files("iddc.labelling") / "page"
    contents = {name: (page / (name or "page.html")).read_bytes() for name in _PAGE}
    shown = [*samples]
    facts = _facts(run, num_clusters, shown, more=more is not None)
    images = [encode(sample.image, ".jpg") for sample in shown]
    adding = Lock()
    refuse_another_model = partial(
        Run(run).refuse_another_model, Run(run).stamp, "End `iddc label` and start it anew."
    )

    def change(asked: _Seen, edit: Callable[[Labels], Labels]) -> Response:
        def checked(labels: Labels) -> Labels:
            refuse_another_model()
            if _version(labels) != asked.version:
                raise Stale(
                    "The names were changed in another window or on the command line. Your change "
                    "is not saved: look at the present names, and make it again."
                )
            return edit(labels)

        refuse_another_model()  # or we would wait for a training that holds the lock
        return _state(edit_labels(run, num_clusters, checked))

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        given, slash, rest = request.scope["path"].removeprefix("/").partition("/")
        if slash and secrets.compare_digest(given.encode(), token.encode()):
            request.scope["path"] = f"/{rest}"
            response = await call_next(request)
        else:
            response = Response("Open the address that iddc label has printed.", 403)
        response.headers.update(_HEADERS)
        return response

    # The last one added is the first one asked: no other name leads here (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.exception_handler(IddcError)
    def failed(_: Request, error: IddcError) -> Response:
        status = 409 if isinstance(error, Stale) else 422 if isinstance(error, ConfigError) else 503
        return _json({"error": str(error)}, status)

    @app.get("/facts")
    def get_facts() -> Response:
        return _json(facts)

    @app.get("/labels")
    def get_labels() -> Response:
        refuse_another_model()
        return _state(read_labels(run, num_clusters))

    @app.post("/edit")
    def edit(body: Annotated[bytes, Depends(_body)]) -> Response:
        asked = _parsed(_Edit, body)
        return change(asked, lambda labels: labels.edit(asked.names, asked.colours))

    @app.post("/undo")
    def undo(body: Annotated[bytes, Depends(_body)]) -> Response:
        return change(_parsed(_Seen, body), Labels.undo)

    @app.post("/more")
    def show_more() -> Response:
        """Add images to those that are shown. The page is loaded again after it."""
        with adding:
            found = more() if more else ()
            images.extend(encode(sample.image, ".jpg") for sample in found)
            shown.extend(found)
            facts.update(_facts(run, num_clusters, shown, more=bool(found)))
        return _json({"added": len(found)})

    @app.post("/done")
    def done() -> Response:
        """End the server, after this answer."""
        app.state.stop()
        return _json({})

    @app.get("/images/{index}")
    def get_image(index: int) -> Response:
        return Response(_item(images, index), media_type="image/jpeg")

    @app.get("/clusters/{index}")
    def get_clusters(index: int) -> Response:
        """Two bytes a pixel, the low one first. Browsers may alter the pixels of an image."""
        ids = _item(shown, index).clusters.astype("<u2").tobytes()
        return Response(ids, media_type="application/octet-stream")

    @app.get("/{name}")
    def get_page(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        return Response(contents[name], media_type=_PAGE[name])

    @app.get("/")
    def get_start() -> Response:
        return get_page("")

    return app


def _facts(
    run: Path, num_clusters: int, samples: Sequence[Sample], *, more: bool
) -> dict[str, Any]:
    """What changes only when images are added."""
    return {
        "run": run.resolve().name,
        "file": str(run / LABELS),
        "next": f"iddc predict {quote(str(run))} IMAGES --out DIR",
        "ignore": IGNORED,
        "max_name": MAX_NAME,
        "numbers": cluster_names(num_clusters),
        "samples": [
            {"name": sample.name, "width": sample.image.width, "height": sample.image.height}
            for sample in samples
        ],
        "shares": shares(samples, num_clusters).tolist(),
        "more": more,
        "tile": TILE,
        "examples": find_examples(samples, num_clusters),
    }


def _state(labels: Labels) -> Response:
    """The labels as the page shows them, one entry per cluster."""
    coloured = {labels.id2label[cluster] for cluster in labels.colours}
    return _json(
        {
            "version": _version(labels),
            "names": labels.names,
            "colours": [f"#{bytes(colour).hex()}" for colour in labels.cluster_colours],
            "chosen": [name in coloured for name in labels.names],
            "classes": len(labels.classes.names),
            "undo": bool(labels.history),
        }
    )


def _version(labels: Labels) -> str:
    return sha256(labels.model_dump_json().encode()).hexdigest()


def _json(record: Any, status: int = 200) -> Response:
    # Starlette's own writes UTF-8, which a file name may not be.
    return Response(json.dumps(record), status, media_type="application/json")


async def _body(request: Request) -> bytes:
    """The body of a request, refused as soon as it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413)
    return bytes(body)


def _parsed(kind: type[Asked], body: bytes) -> Asked:
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        fields = ", ".join(kind.model_fields)
        raise ConfigError(f"Expected a JSON object with {fields}, as the page sends it.") from None


Item = TypeVar("Item")


def _item(items: Sequence[Item], index: int) -> Item:
    if not 0 <= index < len(items):
        raise HTTPException(404)
    return items[index]
