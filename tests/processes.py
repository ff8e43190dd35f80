"""The processes of a command that a test has started in a session of its own, and ended."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path


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
