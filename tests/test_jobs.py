"""Jobs as people submit them: over the job API, to a cluster that this module starts and ends."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import end_session, ray_folder

ROOT = Path(__file__).parent.parent
END_STATES = {"SUCCEEDED", "FAILED", "STOPPED"}
REDUCED = [
    "corpora.anchor.limit=300",
    "corpora.seed.limit=100",
    "corpora.background.limit=50",
    "corpora.heldout.limit=100",
    "relevance.max_q_value=1",  # on so few samples nothing is certain: every feature that positive samples show counts
    "relevance.min_effect=-100",
    "relevance.min_samples=1",
    "synthesis.max_features=4",
    "synthesis.max_attempts=1",
    "training.arms=[seed,targeted]",
    "training.seeds=[0]",
    "training.epochs=1",
]
"""The reference run, smaller: every stage and every engine, on fewer rows."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def jobs():
    """A client of a one-node cluster with a dashboard, on the loopback only."""
    from ray.job_submission import JobSubmissionClient

    port, dashboard, agent, grpc, client = free_ports(5)
    address = f"http://127.0.0.1:{dashboard}"
    with ray_folder() as folder:
        command = (
            f"{sys.executable} -m ray.scripts.scripts start --head --block --node-ip-address=127.0.0.1 --port={port}"
            f" --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port={dashboard}"
            f" --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={grpc}"
            f" --ray-client-server-port={client} --num-cpus=8"
            f" --object-store-memory={300 << 20} --temp-dir={folder} --disable-usage-stats"
        )
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        log = (Path(folder) / "start.log").open("w")
        head = subprocess.Popen(shlex.split(command), env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield wait_for_client(JobSubmissionClient, address, head)
        finally:
            head.terminate()
            head.wait(60)
            end_session(head.pid)
            log.close()


def wait_for_client(client, address: str, head: subprocess.Popen):
    for _ in range(120):
        assert head.poll() is None, "the cluster did not start"
        try:
            return client(address)
        except (ConnectionError, RuntimeError):
            time.sleep(1)
    raise AssertionError(f"no answer from {address}")


def result_of(jobs, command: str, limit_s: float) -> tuple[str, str]:
    """Final state and log of a job that runs this command with the Python of the tests, at the root of the checkout."""
    job = submitted(jobs, f"cd {shlex.quote(str(ROOT))} && {shlex.quote(sys.executable)} {command}")
    deadline_s = time.monotonic() + limit_s
    while (state := str(jobs.get_job_status(job).value)) not in END_STATES and time.monotonic() < deadline_s:
        time.sleep(0.5)
    if state not in END_STATES:
        jobs.stop_job(job)
    return state, jobs.get_job_logs(job)


def submitted(jobs, entrypoint: str) -> str:
    """Id of the job; the agent that starts jobs comes up after the dashboard that takes them."""
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}}
    for _ in range(60):
        try:
            return jobs.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(1)
    raise AssertionError("the cluster's job agent did not start")


@pytest.mark.parametrize("job", ["run", "measure", "synthesize", "train"])
def test_a_job_takes_the_options_of_its_command(job):
    shown = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", "--help"], capture_output=True, text=True, check=True
    )
    assert f"fac-ray {job} --config" in shown.stdout
    assert "--set" in shown.stdout


def test_a_job_with_a_mistake_fails_with_one_line(jobs):
    state, log = result_of(jobs, "jobs/measure.py --config jobs/configs/toxicity-llama.yaml --set run.sed=1", 120)
    assert state == "FAILED"
    assert "run.sed" in log
    assert "Traceback" not in log


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_reference_run_goes_through_the_job_api(jobs, tmp_path):
    options = " ".join(f"--set {shlex.quote(override)}" for override in REDUCED)
    state, log = result_of(jobs, f"jobs/run.py --folder {shlex.quote(str(tmp_path))} {options}", 840)
    assert state == "SUCCEEDED", log[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: one["num_samples"] for name, one in report["corpora"].items() if name in ("anchor", "seed")} == {
        "anchor": 300,
        "seed": 100,
    }
    assert report["missing_features"] > 0
    assert report["candidates"]
    assert report["covered_features"] + report["missing_features"] == report["reachable_features"]
    assert set(report["arms"]) == {"seed", "targeted"}
    assert report["fac"]["seed"] <= report["fac"]["final"] <= report["fac"]["anchor"] == 1.0
    assert "reference: threshold" in log
    assert f"Report: {tmp_path / 'report.html'}" in log
    assert (tmp_path / "report.html").is_file()
