"""Work spread over the processes of a Ray cluster, each of which has a model of its own.

What a process does may be done twice, so one that dies costs the work that it had at the time.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from iddc.errors import ConfigError, IddcError, SetupError, counted, needs_extra

ATTEMPTS = 3
"""So often an item is tried whose process dies, and so often a process may die as it starts."""
_PATIENCE = 25
"""Seconds in which a cluster answers."""
T = TypeVar("T")
M = TypeVar("M")
R = TypeVar("R")


@dataclass(frozen=True)
class Helpers(Generic[M]):
    """Processes of a Ray cluster that work for this one, one for each core or GPU.

    Each machine sees the same files under the same paths.
    """

    address: str
    """HOST:PORT of the cluster; auto: the one that this machine is of; empty: one of this machine's
    cores, which ends with the work."""
    load: Callable[[], M]
    """Makes what a process needs for all of its work, such as a model."""
    gpu: bool = False
    """Whether each process gets a GPU, if the cluster has any."""

    def spread(
        self, work: Callable[[M, Sequence[T]], R], items: Sequence[T], size: int
    ) -> Iterator[tuple[Sequence[T], R | None]]:
        """Do some items at a time.

        Args:
            work: What is done. It may be called again for the same items.
            items: What it is done with.
            size: How many items are done at a time.

        Yields:
            Items and what `work` gave for them, in the order in which they are done. None: each of
            `ATTEMPTS` processes died that had this one item.

        Raises:
            ConfigError: The address has another form.
            SetupError: Ray is missing, the cluster does not answer, or no process starts.
            IddcError: `load` or `work` raised it.
        """
        with _connected(self.address) as ray:
            yield from _Spread(ray, self, work).results(items, size)


def ended_processes(number: int, names: str) -> str:
    """The sentence on images for which `spread` gave None; what the reader can do follows it."""
    images = counted(number, "image")
    return f"{images} ended each of the {ATTEMPTS} processes that had them: {names}."


class _Spread:
    """Some work, in a cluster that is connected."""

    def __init__(self, ray: Any, helpers: Helpers[Any], work: Callable[..., Any]) -> None:
        self.ray = ray
        self.needs = "GPU" if helpers.gpu and ray.cluster_resources().get("GPU") else "CPU"
        resources = {"num_cpus": 1, "num_gpus": int(self.needs == "GPU")}
        self.process = ray.remote(max_restarts=0, **resources)(_Process)
        self.load, self.work = ray.put((os.getcwd(), helpers.load)), ray.put(work)
        self.failed_starts = 0

    def results(self, items: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], Any]]:
        waiting = deque(_Part(items[at : at + size]) for at in range(0, len(items), size))
        running: dict[Any, tuple[Any, _Part | None]] = {}
        """The process of each call that is not done, and what it works on; None: it loads."""
        while parts := len(waiting) + sum(part is not None for _, part in running.values()):
            # Asked again each time, since machines may join.
            most = int(self.ray.cluster_resources().get(self.needs, 0)) or 1
            while len(running) < min(most, parts):
                process = self.process.remote()
                running[process.load.remote(self.load)] = process, None
            (call,), _ = self.ray.wait([*running], num_returns=1)
            process, part = running.pop(call)
            try:
                result = self.ray.get(call)
            except self.ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, IddcError) else error) from None
            except self.ray.exceptions.RayError as error:  # the process or its machine is gone
                if part is None and self.failed_starts + 1 == ATTEMPTS:
                    raise SetupError(
                        f"--ray: {ATTEMPTS} processes died while they loaded the model. The last "
                        f"one: {str(error).splitlines()[-1]}"
                    ) from None
                if part is None:
                    self.failed_starts += 1
                elif len(part.items) == 1 and part.deaths + 1 == ATTEMPTS:
                    yield part.items, None
                else:
                    waiting.extend(part.singles())
                continue
            self.failed_starts = 0
            if waiting:  # else the process is not needed any more, and Ray ends it
                following = waiting.popleft()
                running[process.work.remote(self.work, following.items)] = process, following
            if part is not None:
                yield part.items, result


@dataclass(frozen=True)
class _Part:
    """What a process does at a time."""

    items: Sequence[Any]
    deaths: int = 0
    """How many processes died that had it."""

    def singles(self) -> Iterator[_Part]:
        """Each item alone, to find the one that a process died of."""
        for at in range(len(self.items)):
            yield _Part(self.items[at : at + 1], self.deaths + 1)


class _Process:
    """What a process of the cluster does."""

    def load(self, given: tuple[str, Callable[[], Any]]) -> None:
        folder, load = given
        try:
            os.chdir(folder)  # relative paths mean the same
        except OSError as error:
            raise SetupError(
                f"--ray: {os.uname().nodename} has no folder {folder} ({error.strerror}). All "
                "machines of the cluster must see the same files under the same paths."
            ) from None
        self.model = load()

    def work(self, work: Callable[[Any, Any], Any], items: Any) -> Any:
        return work(self.model, items)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster until the end."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it tells its makers
    if not address:  # else Ray writes such a secret of a cluster to the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with needs_extra("ray", "--ray needs Ray"):
        ray: Any = import_module("ray")
    if address:
        _ask(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    hears = signal.getsignal(signal.SIGTERM)
    # Sockets have short names only, so the folder is not below a TMPDIR of any length.
    with TemporaryDirectory(prefix="iddc-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        local = {"include_dashboard": False, "_temp_dir": folder}
        try:
            ray.init(address or "local", **quiet, **({} if address else local))
        except (Exception, SystemExit) as error:
            raise SetupError(f"--ray: Ray does not start. {error}") from error
        finally:
            signal.signal(signal.SIGTERM, hears)  # Ray puts its own in place
        try:
            yield ray
        finally:
            ray.shutdown()


def _ask(address: str) -> None:
    """Refuse an address where no cluster is: Ray itself would try for minutes, and exit."""
    if address != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
        raise ConfigError(f"--ray: expected HOST:PORT or auto, found {address!r}.")
    words = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    words += [] if address == "auto" else ["--address", address]
    try:
        answer = subprocess.run(words, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_PATIENCE} s"
    else:
        if not answer.returncode:
            return
        reason = (answer.stderr.decode(errors="replace").splitlines() or ["no reason given"])[-1]
    raise SetupError(
        f"--ray: no Ray cluster at {address} ({reason}). Start one with `ray start --head`, or "
        "give --ray alone for a cluster on this machine."
    )
