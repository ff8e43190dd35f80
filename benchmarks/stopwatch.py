"""The time of a run, and where it goes: each moment counts for the innermost of the timed functions that is running."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_clock = time.perf_counter


def count_cpu_time() -> None:
    """From now on one thread, and its processor time instead of time: for a machine that others keep busy."""
    global _clock
    _clock = time.process_time
    torch.set_num_threads(1)


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    _wait()
    start = _clock()
    run()
    _wait()
    return _clock() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Times functions while it is entered (`with watch:`), and puts them back afterwards."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0
        self._replaced: list[tuple[Any, str, Callable]] = []

    def time(self, owner: Any, attribute: str, name: str | dict[str, str]) -> None:
        """Time `owner.attribute` as `name`; a dict gives the name by the start of what is running around it."""
        function = getattr(owner, attribute)

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._enter(name if isinstance(name, str) else self._inside(name))
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        self._replaced.append((owner, attribute, function))
        setattr(owner, attribute, measured)

    def shares(self, rest: str) -> dict[str, float]:
        """Share of each name in all the time, in [0, 1]; `rest`: of what has none."""
        total = sum(self._seconds.values())
        shares = {name or rest: seconds / total for name, seconds in self._seconds.items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def __enter__(self) -> Stopwatch:
        self._since = _clock()
        return self

    def __exit__(self, *_: object) -> None:
        self._count("")
        for owner, attribute, function in reversed(self._replaced):
            setattr(owner, attribute, function)

    def _inside(self, names: dict[str, str]) -> str:
        around = self._running[-1] if self._running else ""
        return next((name for start, name in names.items() if around.startswith(start)), around)

    def _enter(self, name: str) -> None:
        self._count(self._running[-1] if self._running else "")
        self._running.append(name)

    def _leave(self) -> None:
        self._count(self._running.pop())

    def _count(self, name: str) -> None:
        now = _clock()
        self._seconds[name] += now - self._since
        self._since = now
