"""Ctrl-C, SIGTERM and the end of the terminal as a request, heard at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Remembers SIGINT, SIGTERM or SIGHUP while it is open; `signum` is 0 until one comes.

    SIGHUP stays ignored where it is: `nohup` asks for that.

    A second Ctrl-C stops at once, unless torchrun started several processes: it sends each signal
    on to them, so that they hear the first one twice.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self.signum = 0
        self._alone = alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler or signal.SIG_DFL)

    def _hear(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signum and signum == signal.SIGINT and self._alone:
            raise KeyboardInterrupt
        self.signum = signum
