"""The Ray that a command works on: the cluster it was submitted to, or a private one on this machine.

Ray is imported here and no earlier: how it authenticates is read once, at import.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def ray_session(verbose: bool = False) -> Iterator[None]:
    """Connected to Ray inside the block; what was started here ends with it.

    With `RAY_ADDRESS` set, as `ray job submit` does, the command joins that cluster. Otherwise it starts one for
    itself. A Ray that this process is already connected to is used as it is.

    Raises:
        ConnectionError: no cluster answers at `RAY_ADDRESS`.
    """
    if _connected():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _keep_others_out()
    import ray

    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else _logical_cpus(),
            include_dashboard=None if address else False,
            log_to_driver=verbose,
            _system_config=None if address else {"prestart_worker_first_driver": False},  # workers as they are needed
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
        _quiet_stages(verbose)
        with redirect_stdout(sys.stderr):  # what Ray tells of itself; the standard output is for results
            yield
    finally:
        ray.shutdown()


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _keep_others_out() -> None:
    """A private cluster listens on the network, and whoever reaches it may run code: only this process and its
    children know its token. A mode or token that is set in the environment stands."""
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _logical_cpus() -> int:
    """More CPUs than the machine has: Ray counts them to place work, and a pool of actors that holds every one of
    them would wait for ever for the tasks that feed it."""
    return max(8, 4 * (os.cpu_count() or 1))


def _quiet_stages(verbose: bool) -> None:
    """Stages show their own progress; Ray Data's bars and plans are for `--verbose`."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = verbose
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
