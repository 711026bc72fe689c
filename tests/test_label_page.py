"""The page of `iddc label`: who may ask, what may be edited, what it shows, and in a browser."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path, PurePosixPath
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from iddc.backbones import untrained_backbone
from iddc.cli import main
from iddc.config import Experiment, PredictionConfig, TrainingConfig, ViewsConfig
from iddc.images import ImageFile
from iddc.labelling import server as serving
from iddc.labelling.samples import (
    Example,
    Sample,
    find_examples,
    predict_samples,
    reduced,
    shares,
    spread,
)
from iddc.labelling.server import MAX_BODY, _Once, listen, make_app, make_server
from iddc.masks import LABELS, Labels, read_labels
from iddc.network import Network
from iddc.progress import Progress
from iddc.segmenter import Segmenter

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

K = 4
TOKEN = "token"
ODD = """<img src=x onerror="document.title='bad'"> & 'sky'"""


class Client:
    """Asks a page, over one connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection = HTTPConnection("127.0.0.1", port, timeout=30)

    def raw(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        self.connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = self.connection.getresponse()
        return answer.status, answer.read()

    def ask(self, path: str, record: object = None) -> tuple[int, Any]:
        body = None if record is None else json.dumps(record).encode()
        status, answer = self.raw(f"/{TOKEN}/{path}", body)
        return status, json.loads(answer)

    def labels(self) -> Any:
        return self.ask("labels")[1]

    def edit(self, **edit: Any) -> tuple[int, Any]:
        return self.ask("edit", {"version": self.labels()["version"], **edit})

    def close(self) -> None:
        self.connection.close()


@contextmanager
def served(run: Path, samples: Sequence[Sample] = (), num_clusters: int = K) -> Iterator[int]:
    """Serve the page of a run, and give its port."""
    server = make_server(make_app(run, num_clusters, samples, TOKEN))
    with listen(0) as listening:
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder that counts as a run of K clusters, without a network."""
    return empty_run(tmp_path / "run")


def empty_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({"network": {"num_clusters": K}}))
    return folder


def scene() -> Sample:
    """Cluster 0 on the left, 1 on the right, 2 in a small square; 3 nowhere."""
    clusters = np.zeros((256, 512), np.uint8)
    clusters[:, 256:] = 1
    clusters[96:112, 96:112] = 2
    return Sample("scene.png", Image.new("RGB", (512, 256), "gray"), clusters)


@pytest.fixture
def client(run: Path) -> Iterator[Client]:
    with served(run, [scene()]) as port, closing(Client(port)) as asking:
        yield asking


# Who may ask --------------------------------------------------------------------------------------

ROUTES = ("", "page.css", "page.js", "facts", "labels", "images/0", "clusters/0")


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_is_answered_without_the_token(client: Client, route: str) -> None:
    status, answer = client.raw(f"/{TOKEN}/{route}")
    assert status == 200
    assert answer
    for path in (
        f"/{route}",
        f"/{TOKEN}x/{route}",
        f"/{TOKEN[:-1]}/{route}",
        f"//{route}",
        "/%C3%A9/",
    ):
        status, answer = client.raw(path)
        assert status == 403
        assert b"iddc label has printed" in answer


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "[", "", "0.0.0.0"])
def test_no_other_name_of_this_machine_is_answered(client: Client, host: str) -> None:
    assert client.raw(f"/{TOKEN}/labels", headers={"Host": host})[0] == 400


def test_the_machine_may_be_called_localhost(client: Client) -> None:
    host = {"Host": f"localhost:{client.port}"}
    assert client.raw(f"/{TOKEN}/labels", headers=host)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("../model.json", "..%2fmodel.json", "%2e%2e/model.json", "clusters/../../model.json"),
        *("model.json", "labels.json", "page.html", "/etc/passwd", "%00"),
        *("images/1", "images/-1", "images/x", "clusters/1"),
    ],
)
def test_no_path_leads_to_a_file(client: Client, path: str) -> None:
    status, answer = client.raw(f"/{TOKEN}/{path}")
    assert status in {403, 404, 422}
    assert b"num_clusters" not in answer


def test_a_page_may_load_nothing_from_elsewhere_and_tells_nobody_its_address(
    client: Client,
) -> None:
    client.connection.request("GET", f"/{TOKEN}/")
    answer = client.connection.getresponse()
    answer.read()
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert set(policy) == {
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    }  # fmt: skip
    assert answer.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("path", [f"/{TOKEN}/", f"/{TOKEN}/images/0", f"/{TOKEN}/nothing", "/no/"])
def test_no_answer_is_kept_guessed_at_or_shown_by_another_site(client: Client, path: str) -> None:
    client.connection.request("GET", path)
    answer = client.connection.getresponse()
    answer.read()
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


# Edits --------------------------------------------------------------------------------------------


def test_an_edit_is_on_disk_when_it_is_answered(client: Client, run: Path) -> None:
    status, state = client.edit(names={3: "sky", 0: "sky", 1: "ignore"}, colours={3: "#010203"})
    assert status == 200
    assert state["names"] == ["sky", "ignore", "cluster 2", "sky"]
    assert state["colours"][::3] == ["#010203"] * 2
    assert state["chosen"] == [True, False, False, True]
    assert (state["classes"], state["undo"]) == (2, True)
    assert read_labels(run, K).names == ("sky", "ignore", "cluster 2", "sky")
    assert client.labels() == state


def test_edits_are_undone_one_by_one(client: Client, run: Path) -> None:
    _, first = client.edit(names={0: "sky"})
    client.edit(names={1: "sea"})
    assert client.ask("undo", {"version": client.labels()["version"]})[1] == first
    _, state = client.ask("undo", {"version": first["version"]})
    assert not state["undo"]
    assert read_labels(run, K) == Labels.numbered(K)
    status, answer = client.ask("undo", {"version": state["version"]})
    assert status == 422
    assert "no edit" in answer["error"]


def test_an_edit_of_labels_that_changed_since_is_refused(client: Client, run: Path) -> None:
    old = client.labels()["version"]
    assert main(["label", str(run), "--set", "0=sky"]) == 0
    before = (run / LABELS).read_bytes()
    for path, edit in (("edit", {"names": {0: "sea"}}), ("undo", {})):
        status, answer = client.ask(path, {"version": old, **edit})
        assert status == 409
        assert "not saved" in answer["error"]
    assert (run / LABELS).read_bytes() == before
    assert client.edit(names={0: "sea"})[0] == 200


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"names": {9: "sky"}}, "No cluster 9"),
        ({"names": {0: "two\nlines"}}, "one line"),
        ({"names": {0: "x" * 101}}, "1 to 100"),
        ({"names": dict.fromkeys(range(K), "ignore")}, "no class is left"),
        ({"colours": {0: "red"}}, "#87ceeb"),
        ({"names": ["sky"]}, "JSON object"),
        ({"surprise": 1}, "JSON object"),
    ],
)
def test_a_wrong_edit_is_a_sentence_and_changes_nothing(
    client: Client, run: Path, edit: dict[str, Any], sentence: str
) -> None:
    status, answer = client.edit(**edit)
    assert status == 422
    assert sentence in answer["error"]
    assert not (run / LABELS).exists()


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[" * 10_000, b"\xff", b'"\\ud800"'])
def test_what_is_no_json_object_is_refused(client: Client, body: bytes) -> None:
    assert client.raw(f"/{TOKEN}/edit", body)[0] == 422


def test_a_long_request_is_refused_however_it_is_sent(client: Client, run: Path) -> None:
    body = json.dumps({"version": client.labels()["version"], "names": {}}).encode()
    longest = body.ljust(MAX_BODY)
    assert client.raw(f"/{TOKEN}/edit", longest)[0] == 200
    assert client.raw(f"/{TOKEN}/edit", longest + b" ")[0] == 413
    client.close()
    client.connection.request("POST", f"/{TOKEN}/edit", iter([longest, b" "]))
    assert client.connection.getresponse().status == 413


def test_odd_names_stay_text(client: Client, run: Path) -> None:
    assert client.edit(names={0: ODD})[1]["names"][0] == ODD
    assert read_labels(run, K).names[0] == ODD


def test_a_full_disk_is_a_sentence_and_changes_nothing(
    client: Client, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.edit(names={0: "sky"})
    before = (run / LABELS).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, answer = client.edit(names={0: "sea"})
    assert status == 503
    assert "the disk is full" in answer["error"]
    assert (run / LABELS).read_bytes() == before
    assert [path.name for path in run.glob(".iddc-*")] == []


def test_names_are_not_given_to_a_model_that_was_trained_anew(client: Client, run: Path) -> None:
    version = client.labels()["version"]
    (run / "new").write_bytes((run / "model.json").read_bytes())
    (run / "new").rename(run / "model.json")
    for status, answer in (
        client.ask("edit", {"version": version, "names": {0: "sky"}}),
        client.ask("labels"),
    ):
        assert status == 503
        assert "trained again" in answer["error"]
    (run / "model.json").unlink()
    assert client.ask("labels")[0] == 503
    assert not (run / LABELS).exists()


MANY = settings(max_examples=max(60, settings().max_examples))
"""A request takes a few hundredths of a second; `make soak` tries 2,000."""
TEXT = st.sampled_from(["sky", "ignore", "", " ", "cluster 1", ODD, "a\nb", "#00ff00"]) | st.text()
PLACES = st.integers(-1, K).map(str) | st.text(max_size=3) | st.just("9" * 4500)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
EDITS = st.fixed_dictionaries(
    {},
    optional={
        "version": st.none() | JSON,  # None: the present one
        "names": st.dictionaries(PLACES, TEXT, max_size=4) | JSON,
        "colours": st.dictionaries(PLACES, TEXT, max_size=4) | JSON,
        "other": JSON,
    },
)


@MANY
@given(
    path=st.sampled_from(["edit", "undo"]) | st.text("abc/.%2e", max_size=8),
    record=EDITS | JSON,
    fresh=st.booleans(),
)
def test_whatever_is_asked_is_answered_and_leaves_good_labels(
    fuzzed: Client, fuzzed_run: Path, path: str, record: Any, fresh: bool
) -> None:
    before = read_labels(fuzzed_run, K)
    if fresh and isinstance(record, dict):
        record = {**record, "version": fuzzed.labels()["version"]}
    status, _ = fuzzed.raw(f"/{TOKEN}/{path}", json.dumps(record).encode())
    assert status < 500
    after = read_labels(fuzzed_run, K)
    assert status == 200 or after == before


@given(body=st.binary(max_size=200))
def test_any_bytes_are_answered(fuzzed: Client, body: bytes) -> None:
    assert fuzzed.raw(f"/{TOKEN}/edit", body)[0] == 422


LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Old versions of Starlette leave a stream in memory open when somebody hangs up."""
LINES = st.sampled_from(
    [
        b"GET /token/labels HTTP/1.1",
        b"GET /token/labels HTTP/9.9",
        b"GET http://127.0.0.1/token/labels HTTP/1.1",
        b"GET //token//labels HTTP/1.1",
        b"GET /token/%2e%2e%2fmodel.json HTTP/1.1",
        b"POST /token/edit HTTP/1.1",
        b"POST /token/undo HTTP/1.1",
        b"CONNECT elsewhere:80 HTTP/1.1",
        b"Host: 127.0.0.1",
        b"Host: elsewhere",
        b"Content-Length: 5",
        b"Content-Length: -1",
        b"Content-Length: " + b"9" * 30,
        b"Transfer-Encoding: chunked",
        b"Upgrade: websocket",
        b"Connection: close",
        b" folded",
        b"A: " + b"a" * 70_000,
        b"",
        b"5",
        b"ffffffffffffffff",
        b"{}",
        b"\0\xff",
    ]
)
BYTES = st.lists(LINES | st.binary(max_size=12), max_size=8).map(b"\r\n".join) | st.binary()


@LEFT_OPEN
@MANY
@given(sent=BYTES, waits=st.booleans())
def test_what_is_no_request_harms_nothing(
    fuzzed: Client, fuzzed_run: Path, sent: bytes, waits: bool
) -> None:
    before = read_labels(fuzzed_run, K)
    with closing(socket.create_connection(("127.0.0.1", fuzzed.port), timeout=30)) as connection:
        answer = b""
        with suppress(OSError):  # it may hang up while we talk
            connection.sendall(sent)
            if waits:
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    answer += part
    assert not re.search(rb"^HTTP/1.1 5", answer, re.MULTILINE)
    assert b"num_clusters" not in answer  # of model.json
    assert fuzzed.ask("labels")[0] == 200
    assert read_labels(fuzzed_run, K) == before
    gc.collect(0)


@pytest.fixture(scope="module")
def fuzzed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return empty_run(tmp_path_factory.mktemp("fuzzed") / "run")


@pytest.fixture(scope="module")
def fuzzed(fuzzed_run: Path) -> Iterator[Client]:
    with served(fuzzed_run) as port, closing(Client(port)) as asking:
        yield asking


def insist(port: int, edits: Iterable[tuple[int, str]]) -> int:
    """Give clusters names, each again as long as somebody else was faster; how often in all."""
    asked = 0
    with closing(Client(port)) as asking:
        for cluster, name in edits:
            status = 409
            while status == 409:
                status, _ = asking.edit(names={cluster: name})
                asked += 1
            assert status == 200
    return asked


def test_of_edits_by_clients_at_the_same_time_none_is_lost_or_torn(run: Path) -> None:
    num, clients = 24, 4
    names = [f"name {index}" for index in range(num)]
    with served(run, num_clusters=num) as port, ThreadPoolExecutor(clients) as pool:
        works = [
            pool.submit(insist, port, [*enumerate(names)][first::clients])
            for first in range(clients)
        ]
        edits = 0
        while not all(work.done() for work in works):
            labels = read_labels(run, num)  # whole at every moment
            assert len(labels.history) >= edits
            edits = len(labels.history)
        for work in works:
            work.result()
    labels = read_labels(run, num)
    assert labels.names == tuple(names)
    assert len(labels.history) == num


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count open files")
def test_no_file_stays_open_after_requests(client: Client) -> None:
    def ask_all() -> None:
        for route in ROUTES:
            client.raw(f"/{TOKEN}/{route}")
        client.raw(f"/{TOKEN}/edit", b"no json")
        client.raw("/no-token/labels")
        client.edit(names={0: "sky" if client.labels()["names"][0] == "sea" else "sea"})

    ask_all()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        ask_all()
    assert len(os.listdir("/proc/self/fd")) <= before


@LEFT_OPEN
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count open files")
def test_connections_that_stop_in_the_middle_cost_nobody_else(client: Client) -> None:
    client.labels()
    before = len(os.listdir("/proc/self/fd"))
    head = b"POST /token/edit HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\n{"
    for cut in (0, 30, len(head)):
        stopped = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(50)]
        for connection in stopped:
            connection.sendall(head[:cut])
        assert client.edit(names={0: f"after {cut}"})[0] == 200  # while all of them wait
        for connection in stopped:
            connection.close()
    late = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < late:
        client.labels()
    assert len(os.listdir("/proc/self/fd")) <= before
    gc.collect()


def test_a_thousand_silent_connections_lock_nobody_out_and_fill_no_terminal(
    run: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"needs 2,000 open files in one process, and ulimit -Hn is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with (
            (tmp_path / "said").open("wb") as said,
            process_of(run, files=1024, stderr=said) as (process, port),
            ExitStack() as silent,
        ):
            for _ in range(1100):
                silent.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            with closing(Client(port)) as owner:
                assert owner.edit(names={0: "sky"})[0] == 200
            assert process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "said").stat().st_size < 10_000
    assert read_labels(run, K).names[0] == "sky"


def test_of_connections_that_come_all_at_once_few_are_held(run: Path) -> None:
    with process_of(run) as (process, port), ExitStack() as silent:
        for _ in range(5):
            process.send_signal(signal.SIGSTOP)  # so that it finds them waiting, all together
            for _ in range(serving.MAX_CONNECTIONS):
                address = ("127.0.0.1", port)
                silent.enter_context(socket.create_connection(address, timeout=10))
            process.send_signal(signal.SIGCONT)
            settled(process.pid)
        assert settled(process.pid) < serving.MAX_CONNECTIONS + 50


@LEFT_OPEN
@pytest.mark.parametrize("sent", [b"", b"GET /token/labels HTTP/1.1\r\n"])
def test_who_asks_nothing_is_hung_up_on(
    run: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_SILENCE", 0.2)
    with served(run) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        silent.sendall(sent)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


SERVE = """
import resource
import sys
from pathlib import Path
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
from iddc.labelling.server import listen, make_app, make_server
with listen(0) as listening:
    print(listening.getsockname()[1], flush=True)
    make_server(make_app(Path(sys.argv[1]), 4, (), "token")).run(sockets=[listening])
"""


@contextmanager
def process_of(
    run: Path, *, files: int | None = None, stderr: Any = None
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Serve the page of a run in a process, which is killed at the end; and its port."""
    command = [sys.executable, "-c", SERVE, str(run), *([str(files)] if files else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_server_killed_while_edits_run_leaves_whole_labels(run: Path) -> None:
    with process_of(run) as (process, port), closing(Client(port)) as asking:
        asking.labels()
        killer = Timer(0.5, process.kill)
        killer.start()
        with pytest.raises((OSError, HTTPException)):  # noqa: PT012
            for edit in count():
                assert asking.edit(names={0: f"name {edit}"})[0] == 200
        killer.join()
    # What was answered is there; the edit after it may be.
    assert read_labels(run, K).names[0] in {f"name {edit - 1}", f"name {edit}"}


def settled(pid: int) -> int:
    """How many files a process has open: the fewest in a second, for a client that just left."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.05)
    return min(counts)


@pytest.mark.soak
def test_memory_and_open_files_of_the_page_are_flat_under_parallel_clients(
    run: Path, record_property: Any
) -> None:
    def edits(cluster: int, num: int) -> Iterator[tuple[int, str]]:
        return ((cluster, f"name {cluster} {index}") for index in range(num))

    with process_of(run) as (process, port), ThreadPoolExecutor(K) as pool:
        asked, seen = 0, []
        for num in (100, 500, 500):
            asked += sum(pool.map(insist, [port] * K, [edits(own, num) for own in range(K)]))
            status = Path(f"/proc/{process.pid}/status").read_text()
            seen.append((int(status.split("VmRSS:")[1].split()[0]) // 1024, settled(process.pid)))
    record_property("did", f"{asked:,} edits by {K} clients; MB and open files: {seen}")
    assert read_labels(run, K).names == tuple(f"name {own} 499" for own in range(K))
    assert seen[-1][0] - seen[0][0] < 10
    assert seen[-1][1] <= seen[0][1]


# Samples ------------------------------------------------------------------------------------------


class Red:
    """The cluster of a pixel is its red value."""

    num_clusters = K

    def probs(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(images[:, 0].long(), K).permute(0, 3, 1, 2).float()


def experiment() -> Experiment:
    return Experiment(
        num_clusters=K,
        views=ViewsConfig(short_side=48),
        prediction=PredictionConfig(window=0, flip=False),
        training=TrainingConfig(precision="fp32"),
    )


def test_a_hundred_different_messages_of_the_server_are_shown_each_once() -> None:
    once = _Once()
    lines = [f"{number} is missing\n{place}" for place in "ab" for number in range(101)]
    records = [logging.LogRecord("asyncio", logging.ERROR, "", 0, line, (), None) for line in lines]
    assert [once.filter(record) for record in records] == [True] * 100 + [False] * 102


def test_samples_are_spread_over_the_images_and_unreadable_ones_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for index in range(30):
        path = tmp_path / f"{index:02}.png"
        Image.new("RGB", (6, 4), (index % K, 0, 0)).save(path)
        files.append(ImageFile(path, PurePosixPath(path.name)))
    (tmp_path / "05.png").write_bytes(b"no image")
    told: list[str] = []

    class Told(Progress):
        def update(self, done: int, where: str, text: str = "", left: float | None = None) -> None:
            told.append(f"{done}: {where}, {text}")

    found = predict_samples(Segmenter.of(Red(), experiment()).predict, files, Told())
    assert [told[0], told[-1]] == ["1: sample 1/12, 00.png", "12: sample 12/12, 27.png"]
    assert [sample.name for sample in found] == [
        f"{index:02}.png" for index in (0, 2, 7, 10, 12, 15, 17, 20, 22, 25, 27)
    ]
    assert all((sample.clusters == int(sample.name[:2]) % K).all() for sample in found)
    assert "05.png: not an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "shown"), [((1536, 768), (768, 384)), ((60, 40), (60, 40)), ((5000, 1), (768, 1))]
)
def test_a_sample_is_reduced_to_the_size_of_the_page(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    clusters = np.tile(np.array([0, 1000], np.uint16), (size[1], size[0] // 2))
    sample = reduced("a.jpg", Image.new("RGB", size), clusters)
    assert sample.image.size == shown
    assert sample.clusters.shape == shown[::-1]
    assert set(np.unique(sample.clusters)) <= {0, 1000}


def test_shares_are_of_all_pixels_and_zero_where_a_cluster_never_occurs() -> None:
    small = 256 / (256 * 512)
    assert shares([scene()], K).tolist() == [0.5 - small, 0.5, small, 0]
    assert shares([], K).tolist() == [0] * K


def test_examples_lie_where_a_cluster_fills_most_and_in_the_middle_if_it_is_small() -> None:
    zero, one, two, none = find_examples([scene(), scene()], K)
    assert two == [Example(0, 32, 32), Example(1, 32, 32)]  # pixels 96 to 111 of 32 to 159
    assert {example.left for example in one} == {256}
    assert {example.sample for example in zero} == {0, 1}
    assert none == []


def test_examples_of_an_image_smaller_than_they_are_begin_at_its_corner() -> None:
    clusters = np.array([[0, 1], [1, 1]], np.uint8)
    sample = Sample("tiny.png", Image.new("RGB", (2, 2)), clusters)
    assert find_examples([sample], 2) == [[Example(0, 0, 0)], [Example(0, 0, 0)]]


def test_the_page_gets_the_cluster_of_every_pixel(client: Client) -> None:
    _, ids = client.raw(f"/{TOKEN}/clusters/0")
    assert (np.frombuffer(ids, "<u2").reshape(256, 512) == scene().clusters).all()
    _, facts = client.ask("facts")
    assert facts["samples"] == [{"name": "scene.png", "width": 512, "height": 256}]
    assert facts["shares"][3] == 0
    assert facts["examples"][3] == []


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with a small network, and beside it the images that it says it was trained on."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(3):
        pixels = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST)
        image.save(tmp_path / "photos" / f"{index}.png")
    options: dict[str, int | float | bool | str] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = untrained_backbone("vit_tiny_patch16_224", options=options)
    folder = tmp_path / "run"
    Segmenter.of(Network(backbone, "linear", K), experiment()).save(folder)
    source = json.dumps({"images": {"source": str(tmp_path / "photos"), "limit": None}})
    (folder / "config.yaml").write_text(source)
    return folder


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Servers end at once, as by Ctrl-C; gives the samples of their pages."""
    shown: list[Any] = []

    class Server:
        def run(self, sockets: object) -> None:
            raise KeyboardInterrupt

    def make_app_too(run: Path, num_clusters: int, samples: Any, *others: Any) -> Any:
        shown.append(samples)
        return make_app(run, num_clusters, samples, *others)

    monkeypatch.setattr(serving, "make_app", make_app_too)
    monkeypatch.setattr(serving, "make_server", lambda app: Server())
    return shown


def test_label_opens_the_address_that_it_prints_where_there_is_a_screen(
    trained: Path,
    interrupted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    assert main(["label", str(trained)]) == 0
    address, _, end = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{40,}/    Ctrl-C ends it", address)
    assert opened == [address.split()[0]]
    assert f"{trained / LABELS}: 4 classes of 4 clusters" in end
    assert f"next: iddc predict {trained} IMAGES" in end
    assert [sample.name for sample in interrupted[0]] == ["0.png", "1.png", "2.png"]
    assert main(["label", str(trained), "--no-open"]) == 0
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert main(["label", str(trained)]) == 0
    assert len(opened) == 1


def test_label_without_the_images_of_the_run_takes_others_or_none(
    trained: Path, interrupted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = trained.parent / "photos"
    photos.rename(trained.parent / "moved")
    assert main(["label", str(trained), "--no-open"]) == 0
    assert "--images" in capsys.readouterr().err
    moved = str(trained.parent / "moved")
    assert main(["label", str(trained), "--no-open", "--images", moved]) == 0
    assert [len(samples) for samples in interrupted] == [0, 3]
    assert main(["label", str(trained), "--no-open", "--images", str(photos)]) == 3


def test_label_says_which_extra_is_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "iddc.labelling.server")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["label", str(run)]) == 4
    assert "pip install 'iddc[label]'" in capsys.readouterr().err


def test_a_port_in_use_is_a_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert main(["label", str(run), "--port", str(port)]) == 4
        assert f"Port {port} cannot be used: address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "70000"], "expected 0 to 65535"),
        (["--set", "0=sky", "--no-open"], "are for the page"),
        (["--list", "--port", "80"], "are for the page"),
    ],
)
def test_options_that_cannot_be_are_a_sentence(
    run: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", str(run), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (run / LABELS).exists()


def test_damaged_labels_are_said_before_a_page_opens(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / LABELS).write_text("{")
    assert main(["label", str(run)]) == 3
    assert LABELS in capsys.readouterr().err


def test_ctrl_c_ends_the_page_well(trained: Path) -> None:
    command = [sys.executable, "-m", "iddc", "label", str(trained), "--no-open"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    with process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/(.*)/", address).groups()  # type: ignore[union-attr]
        with closing(Client(int(port))) as asking:
            assert asking.raw(f"/{token}/labels")[0] == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"next: iddc predict {trained}" in out
    assert "Traceback" not in err


# In a browser -------------------------------------------------------------------------------------


class Page:
    """The page in a browser, as a person uses it."""

    def __init__(self, browser: Chrome, port: int) -> None:
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/{TOKEN}/")
        self.wait("'ready' in document.body.dataset")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 30
        while not self.browser.execute_script(f"return Boolean({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def row(self, cluster: int, part: str = "") -> Any:
        return self.one(f'li[data-cluster="{cluster}"] {part}')

    def keys(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def name(self, cluster: int, name: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.row(cluster, ".name")
        box.clear()
        box.send_keys(name, Keys.ENTER)
        self.wait(f"state.names[{cluster}] === {json.dumps(name)}")

    def painted(self, x: int, y: int) -> list[int]:
        """The pixel of the mask over the first sample."""
        self.wait("!waiting && !frame")
        script = f"return [...samples[0].context.getImageData({x}, {y}, 1, 1).data]"
        found: list[int] = self.browser.execute_script(script)
        return found


def test_two_clusters_named_and_merged_in_a_browser_are_in_the_masks(
    browser: Chrome, trained: Path
) -> None:
    segmenter = Segmenter.load(trained, device="cpu")
    photos = trained.parent / "photos"
    files = [ImageFile(path, PurePosixPath(path.name)) for path in sorted(photos.iterdir())]
    with served(trained, predict_samples(segmenter.predict, files, Progress())) as port:
        page = Page(browser, port)
        page.name(1, "sky")
        page.name(3, "street")
        page.name(2, "sky")
        assert "one class with 1" in page.row(2, ".about").text
        browser.refresh()
        page.wait("'ready' in document.body.dataset")
        values = [page.row(cluster, ".name").get_property("value") for cluster in range(K)]
        assert values == ["", "sky", "sky", "street"]
    out = trained.parent / "masks"
    assert main(["predict", str(trained), str(photos), "--out", str(out)]) == 0
    assert (out / "classes.txt").read_text().splitlines() == ["cluster 0", "sky", "street"]


def test_the_masks_change_at_once_and_undo_brings_them_back(browser: Chrome, run: Path) -> None:
    with served(run, [scene()]) as port:
        page = Page(browser, port)
        left, right = page.painted(10, 10), page.painted(500, 10)
        assert left[:3] != right[:3]
        page.name(1, "ground")
        page.name(0, "ground")
        page.one("h1").click()
        page.browser.execute_script("document.activeElement.blur()")
        assert page.painted(10, 10) == page.painted(500, 10)
        page.row(1, ".ignore").click()
        page.wait("ignored(1)")
        page.browser.execute_script("document.activeElement.blur(); hovered = null; paint()")
        assert page.painted(500, 10)[3] == 0
        for _ in range(3):
            before = page.browser.execute_script("return state.version")
            page.one("#undo").click()
            page.wait(f"state.version !== {json.dumps(before)}")
        page.browser.execute_script("document.activeElement.blur(); hovered = null; paint()")
        assert (page.painted(10, 10), page.painted(500, 10)) == (left, right)
        assert not page.one("#undo").is_enabled()


def test_all_can_be_done_with_keys(browser: Chrome, run: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    with served(run, [scene()]) as port:
        page = Page(browser, port)
        page.keys("/", "2", Keys.ENTER)  # find, and name what was found
        page.keys("lamp", Keys.ENTER)
        page.wait("state.names[2] === 'lamp'")
        assert page.one("#find").get_property("value") == ""  # or the others stayed hidden
        assert page.browser.execute_script("return document.activeElement.className") == "name"
        page.keys(Keys.ESCAPE)  # the next one is offered; leave it as it is
        page.keys("/", Keys.TAB)  # the order
        page.keys(Keys.TAB)  # the current cluster, and no other
        assert page.browser.execute_script("return document.activeElement.dataset.cluster") == "3"
        page.keys(Keys.HOME)
        page.keys(Keys.SPACE)
        page.keys(Keys.ARROW_DOWN)
        page.keys(Keys.SPACE)
        page.one("#one").send_keys("ground", Keys.ENTER)
        page.wait("state.names[0] === 'ground' && state.names[1] === 'ground'")
        page.row(3, ".name").click()
        page.keys("no", Keys.ESCAPE)
        page.keys("i")
        page.wait("ignored(3)")
        page.keys("u")
        page.wait("!ignored(3)")
    assert read_labels(run, K).names == ("ground", "ground", "lamp", "cluster 3")


def test_a_click_on_an_image_goes_to_the_cluster_there(browser: Chrome, run: Path) -> None:
    from selenium.webdriver import ActionChains

    with served(run, [scene()]) as port:
        page = Page(browser, port)
        canvas = page.one("#samples canvas")
        ActionChains(browser).move_to_element_with_offset(canvas, 20, 0).click().perform()
        page.keys("ground")
        assert page.row(1, ".name").get_property("value") == "ground"


def test_the_current_class_has_an_outline_and_the_rest_is_dark(browser: Chrome, run: Path) -> None:
    with served(run, [scene()]) as port:
        page = Page(browser, port)
        page.row(1, ".name").send_keys("ground")
        left, edge, right = (page.painted(x, 10) for x in (10, 255, 500))
        assert edge == [255, 255, 255, 255]
        assert right[3] < left[3]
        page.one("#spotlight").click()
        assert page.painted(255, 10) == page.painted(10, 10)


def test_the_second_of_two_browsers_is_told_and_loses_only_its_last_edit(
    browser: Chrome, run: Path
) -> None:
    with served(run) as port, closing(Client(port)) as other:
        page = Page(browser, port)
        assert "There are no images" in page.one("#none").text
        page.row(1, ".name").send_keys("sea")
        other.edit(names={0: "sky"})
        page.keys("\n")
        page.wait("!$('problem').hidden")
        assert "not saved" in page.one("#problem").text
        page.wait("state.names[0] === 'sky'")
        assert page.row(0, ".name").get_property("value") == "sky"
        assert page.row(1, ".name").get_property("value") == ""
        page.name(1, "sea")
        assert page.one("#problem").get_property("hidden")
        browser.get_log("browser")  # it has the refused request
    assert read_labels(run, K).names[:2] == ("sky", "sea")


def test_edits_that_wait_behind_a_refused_one_take_no_name_of_others_away(
    browser: Chrome, run: Path
) -> None:
    with served(run) as port, closing(Client(port)) as other:
        page = Page(browser, port)
        other.edit(names={0: "sky"})
        # All are made before the first is answered, on a screen that does not show "sky".
        browser.execute_script("rename([1], 'sea'); rename([0], 'road'); rename([2], 'tree')")
        page.wait("!waiting")
        assert page.row(0, ".name").get_property("value") == "sky"
        assert page.one("#problem").text.endswith("which are not saved: 2.")
        browser.get_log("browser")  # it has the refused request
        page.name(1, "sea")  # now that it is seen
        assert page.one("#problem").get_property("hidden")
    assert read_labels(run, K).names == ("sky", "sea", "cluster 2", "cluster 3")


def test_edits_that_wait_behind_a_wrong_name_are_saved(browser: Chrome, run: Path) -> None:
    with served(run) as port:
        page = Page(browser, port)
        browser.execute_script("rename([1], '\u200b'); rename([0], 'road')")
        page.wait("!waiting")
        assert "printable" in page.one("#problem").text
        browser.get_log("browser")
    assert read_labels(run, K).names[:2] == ("road", "cluster 1")


def test_an_edit_before_a_refresh_that_brings_other_names_is_told_and_dropped(
    browser: Chrome, run: Path
) -> None:
    with served(run) as port, closing(Client(port)) as other:
        page = Page(browser, port)
        other.edit(names={0: "sky"})
        browser.execute_script("refresh(); rename([0], 'road')")
        page.wait("!waiting && state.names[0] === 'sky'")
        assert "in another window" in page.one("#problem").text
    assert read_labels(run, K).names[0] == "sky"


SLOW = """
const asked = window.fetch, gate = new Promise((answer) => { window.answer = answer; });
window.fetch = async (path, options) => {
  if (path === "labels") await gate;
  return asked(path, options);
};
"""


@pytest.mark.parametrize("then", ["Enter", "Escape"])
def test_what_is_being_typed_stays_when_another_tab_names_the_cluster(
    browser: Chrome, run: Path, then: str
) -> None:
    from selenium.webdriver.common.keys import Keys

    with served(run) as port:
        page = Page(browser, port)
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        Page(browser, port).name(0, "sky")
        browser.close()
        browser.switch_to.window(first)
        browser.execute_script(SLOW)  # one comes back, and types before the names are there
        browser.execute_script("window.dispatchEvent(new Event('focus'))")
        page.row(0, ".name").click()
        page.keys("roa")
        browser.execute_script("answer()")
        page.wait("state.names[0] === 'sky'")
        assert page.row(0, ".name").get_property("value") == "roa"
        assert "named sky elsewhere" in page.one("#problem").text
        page.keys("d", Keys.ENTER if then == "Enter" else Keys.ESCAPE)
        name = "road" if then == "Enter" else "sky"
        page.wait(f"state.names[0] === '{name}' && rows[0].name.value === '{name}'")
    assert read_labels(run, K).names[0] == name


def test_a_page_shows_what_others_changed_when_one_comes_back_to_it(
    browser: Chrome, run: Path
) -> None:
    with served(run) as port:
        page = Page(browser, port)
        assert main(["label", str(run), "--set", "0=sky"]) == 0
        browser.execute_script("window.dispatchEvent(new Event('focus'))")
        page.wait("state.names[0] === 'sky'")
        assert page.row(0, ".name").get_property("value") == "sky"


def test_names_are_text_in_the_page_and_refused_ones_a_sentence(browser: Chrome, run: Path) -> None:
    with served(run, [scene()]) as port:
        page = Page(browser, port)
        page.name(0, ODD)
        page.name(1, ODD)
        assert page.row(0, ".name").get_property("value") == ODD
        assert page.one("#names option").get_property("value") == ODD
        assert page.browser.title == "run · iddc label"
        assert "in no sample" in page.row(3, ".about").text
        page.row(2, ".name").send_keys("\u200b\n")
        page.wait("!$('problem').hidden")
        assert "printable" in page.one("#problem").text
        browser.get_log("browser")


def test_the_page_fits_and_keeps_nobody_out(
    browser: Chrome, run: Path, screen: str, check_page: Callable[[str], None]
) -> None:
    with served(run, [scene()]) as port:
        Page(browser, port)
        check_page("label")
        ignore = 'document.querySelector("li .ignore").getBoundingClientRect().right'
        assert browser.execute_script(f"return {ignore}") <= int(screen.partition("-")[2])


def test_find_hides_nothing_any_more_once_a_cluster_is_found(browser: Chrome, run: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    with served(run, [scene()]) as port:
        page = Page(browser, port)
        page.keys("/", "2")
        hidden = "[...document.querySelectorAll('#clusters li')].filter((li) => li.hidden).length"
        assert browser.execute_script(f"return {hidden}") == K - 1
        page.keys(Keys.ENTER)
        assert browser.execute_script(f"return {hidden}") == 0
        page.keys("lamp", Keys.ENTER)
        page.wait("state.names[2] === 'lamp'")
        page.one("#find").send_keys("lamp", Keys.ESCAPE)
        assert browser.execute_script(f"return {hidden}") == 0


def test_redo_writes_what_undo_took_until_something_else_is_changed(
    browser: Chrome, run: Path
) -> None:
    with served(run, [scene()]) as port:
        page = Page(browser, port)
        page.name(1, "sea")
        page.name(0, "sky")
        for name in ("sky", "sea"):
            page.one("#undo").click()
            page.wait(f"!state.names.includes('{name}')")
        for name in ("sea", "sky"):
            page.one("#redo").click()
            page.wait(f"state.names.includes('{name}') && !waiting")
        assert not page.one("#redo").is_enabled()
        page.one("#undo").click()
        page.wait("!state.names.includes('sky') && !$('redo').disabled")
        page.name(3, "road")
        assert not page.one("#redo").is_enabled()
    assert read_labels(run, K).names == ("cluster 0", "sea", "cluster 2", "road")


def test_done_ends_the_server_and_says_what_is_next(browser: Chrome, run: Path) -> None:
    server = make_server(make_app(run, K, [scene()], TOKEN))
    with listen(0) as listening:
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        page = Page(browser, listening.getsockname()[1])
        page.name(0, "sky")
        page.one("#done").click()
        page.wait("!$('ended').hidden")
        thread.join(30)
        assert not thread.is_alive()
    assert f"iddc predict {run}" in page.one("#ended").text
    assert read_labels(run, K).names[0] == "sky"


def test_more_images_come_on_demand_until_there_are_none(browser: Chrome, run: Path) -> None:
    further = iter([[scene()]])
    server = make_server(make_app(run, K, [scene()], TOKEN, lambda: next(further, ())))
    with listen(0) as listening:
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        page = Page(browser, listening.getsockname()[1])
        for shown in (2, 2):
            page.one("#more").click()
            page.wait(f"'ready' in document.body.dataset && facts.samples.length === {shown}")
            page.wait("!$('more').disabled")
        page.wait("$('more').hidden")
        browser.get("about:blank")  # the page still fetches pictures; it goes before the server
        server.should_exit = True
        thread.join()


@given(st.integers(0, 60))
def test_dozens_of_images_hold_each_image_once(num_files: int) -> None:
    dozens = [*spread(num_files)]
    assert sorted(number for dozen in dozens for number in dozen) == [*range(num_files)]
    assert all(len(dozen) == 12 for dozen in dozens[:-1])


def test_a_thousand_clusters_are_quick_to_edit(browser: Chrome, run: Path) -> None:
    clusters = (np.arange(256 * 512).reshape(256, 512) // 140).astype(np.uint16)
    sample = Sample("many.png", Image.new("RGB", (512, 256)), clusters)
    with served(run, [sample], num_clusters=1000) as port:
        page = Page(browser, port)
        page.name(999, "last")
        shown = "const start = performance.now(); show(state); paint(); return performance.now() - "
        assert page.browser.execute_script(f"{shown} start") < 1000
        tabbable = "return document.querySelectorAll('li [tabindex=\"0\"]').length"
        assert page.browser.execute_script(tabbable) == 5
