"""How far a stage is: counts come in, one updating line (terminal) or a line every few seconds (log) goes to stderr.

A job's log is read long after and often over a slow link, so without a terminal the lines are few, whole and plain.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 5.0
STANDING_INTERVAL_S = 30.0
"""Time between lines of a log while the count stands still."""


class Progress:
    """A counter that says how far it is; any thread may advance it.

    Use:
        with Progress("activations/anchor", total=4000) as progress:
            progress.advance(64)
    """

    def __init__(
        self, name: str, total: int | None = None, unit: str = "samples", stream: TextIO | None = None
    ) -> None:
        """`total`: the count at which the work is done, None if unknown; `stream`: None for stderr."""
        self.name, self.total, self.unit = name, total, unit
        self.count = self._shown_count = 0
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._started_s = self._shown_s = time.monotonic()

    @classmethod
    def silent(cls) -> Progress:
        """A counter that shows nothing."""
        progress = cls("silent")
        progress._stream = None
        return progress

    def __enter__(self) -> Progress:
        with self._lock:
            self._started_s = self._shown_s = time.monotonic()
            if self._terminal:
                self._show(self._state())
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._show(self._closing(stopped=error_type is not None), last=True)

    def advance(self, num: int = 1) -> None:
        """Count `num` more units."""
        self._move(lambda count: count + num)

    def set(self, count: int) -> None:
        """Count exactly `count` units in all."""
        self._move(lambda _: count)

    def _move(self, step: Callable[[int], int]) -> None:
        with self._lock:
            self.count = step(self.count)
            if time.monotonic() - self._shown_s >= self._interval_s():
                self._show(self._state())

    def _interval_s(self) -> float:
        if self._terminal:
            return TERMINAL_INTERVAL_S
        return STANDING_INTERVAL_S if self.count == self._shown_count else LOG_INTERVAL_S

    def _show(self, line: str, last: bool = False) -> None:
        if self._stream is None:
            return
        self._shown_s, self._shown_count = time.monotonic(), self.count
        start, end = ("\r\x1b[2K", "\n" if last else "") if self._terminal else ("", "\n")
        self._stream.write(f"{start}{line}{end}")
        self._stream.flush()

    def _state(self) -> str:
        elapsed_s = time.monotonic() - self._started_s
        rate = self.count / elapsed_s if elapsed_s > 0 else 0.0
        if self.total is None:
            return f"{self.name}: {self.count:,} {self.unit}, {format_rate(rate)}"
        done = f"{self.count:,} of {self.total:,} {self.unit}"
        left = f", {format_seconds(max(0, self.total - self.count) / rate)} left" if rate > 0 else ""
        return f"{self.name}: {done}, {format_rate(rate)}{left}"

    def _closing(self, stopped: bool) -> str:
        elapsed_s = time.monotonic() - self._started_s
        rate = self.count / elapsed_s if elapsed_s > 0 else 0.0
        verb = "stopped at" if stopped else "done,"
        return f"{self.name}: {verb} {self.count:,} {self.unit} in {format_seconds(elapsed_s)}, {format_rate(rate)}"


def format_rate(rate: float) -> str:
    """Units per second, with a decimal place only where it matters: 0.42/s, 7.3/s, 1,204/s."""
    digits = 0 if rate >= 100 else 1 if rate >= 1 else 2
    return f"{rate:,.{digits}f}/s"


def format_seconds(seconds: float) -> str:
    """A duration as people say it: 0.4 s, 42 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
