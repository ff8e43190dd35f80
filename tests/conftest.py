"""One Ray cluster for the whole test run; everything else is made in the test that needs it."""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # before the first import of ray, in this process and its children
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest
from processes import ray_folder


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with more logical CPUs than cores, so that actor pools and tasks never starve each other."""
    import ray

    with ray_folder() as folder:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=400 << 20,
            _temp_dir=folder,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


@pytest.fixture
def short_folder():
    """A folder for a Ray that the test starts in a process of its own."""
    with ray_folder() as folder:
        yield folder


@pytest.fixture
def set_torch_threads():
    """`torch.set_num_threads`, undone after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
