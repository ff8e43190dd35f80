"""The processes of a command that a test has started in a session of its own and ended, and the folder that Ray had."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def ray_folder() -> Iterator[str]:
    """A folder with a short name, for Ray's sockets; some of Ray's processes write there after Ray has ended."""
    folder = tempfile.mkdtemp(prefix="fr", dir="/tmp")
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 10
        while Path(folder).exists() and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


def wait_for_session(session: int) -> None:
    """Ray's workers notice by themselves that their driver is gone; what stays of the session is ended."""
    deadline = time.monotonic() + 120
    while any(re.match(r"ray::(?!\w+Agent)", name) for name in members(session).values()):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.2)
    end_session(session)


def end_session(session: int) -> None:
    """End whatever runs in a session."""
    for pid in members(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def members(session: int) -> dict[int, str]:
    """Process id and command of what runs in a session."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(ProcessLookupError, FileNotFoundError):
                if os.getsid(int(entry.name)) == session:
                    found[int(entry.name)] = (entry / "cmdline").read_text()
    return found
