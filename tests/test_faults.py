"""What breaks while a corpus is measured changes no number, or ends in an error that says what to do.

Every fault here is a real one: processes are killed, nodes leave, texts end the process that measures them, a disk is
full, files are cut.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from processes import end_session, wait_for_session
from test_pipeline import numbers, text_of
from tiny_llama import save_authors_sae, save_llama

from fac_ray import pipeline
from fac_ray.activations import measuring as stage
from fac_ray.activations import quarantine
from fac_ray.activations.measuring import Extraction, extract_activations
from fac_ray.artifacts import MARKER, parquet_files, read_table, storing, write_table
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.progress import Progress
from fac_ray.schema import SAMPLES, content_id, sample_id

NUM_SAMPLES = 320
ROOT = Path(__file__).parent.parent


def a_row(number: int, text: str | None = None) -> dict:
    text = f"{text_of(number)} {number}" if text is None else text
    content = content_id(text)
    ids = {"sample_id": sample_id("f", number, content), "content_id": content}
    return {**ids, "text": text, "messages": None, "label": None, "source_file": "f", "source_row": number}


def write_samples(folder: Path, texts: dict[int, str] | None = None) -> Path:
    """NUM_SAMPLES samples in five parts, some of them with given texts."""
    rows = [a_row(number, (texts or {}).get(number)) for number in range(NUM_SAMPLES)]
    for first in range(0, NUM_SAMPLES, NUM_SAMPLES // 5):
        part = pa.Table.from_pylist(rows[first : first + NUM_SAMPLES // 5], schema=SAMPLES)
        write_table(folder / f"{first:03d}.parquet", part)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    lines = [json.dumps({"text": f"{text_of(n)} {n}", "label": str(n % 2)}) for n in range(150)]
    (root / "a.jsonl").write_text("\n".join(lines) + "\nnot json\n")
    return {
        "name": "faults",
        "model": {"path": str(save_llama(root / "model")), "hook_layer": 2},
        "sae": {"path": str(save_authors_sae(root / "sae.pth"))},
        "corpora": {"a": {"path": str(root / "a.jsonl"), "label": "label"}},
        "run": {"folder": str(root / "run"), "max_rejected_fraction": 0.05},
    }


@pytest.fixture(scope="module")
def config(tree) -> RunConfig:
    return config_from_tree(tree)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"))


def extract(samples: Path, folder: Path, config: RunConfig) -> dict[str, dict]:
    """sample_id -> row, after the samples are measured into the folder."""
    facts = extract_activations(samples, folder, config, Progress.silent())
    rows = read_table(folder).to_pylist()
    assert facts["num_samples"] == len(rows)
    return {row["sample_id"]: row for row in rows}


@pytest.fixture(scope="module")
def undisturbed(samples, config, ray_cluster, tmp_path_factory):
    assert ray_cluster.is_initialized()
    return extract(samples, tmp_path_factory.mktemp("undisturbed"), config)


def assert_same(found: dict[str, dict], expected: dict[str, dict]) -> None:
    """Equal rows, but for the rounding that depends on which texts went through the model together."""
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key] == {**row, "activations": pytest.approx(row["activations"], rel=1e-5)}


# ---- a process dies ----


def test_an_actor_that_is_killed_in_the_middle_of_a_block_changes_no_row(
    samples, config, undisturbed, tmp_path, monkeypatch
):
    killed = tmp_path / "killed"

    class KilledOnce(Extraction):
        def measure(self, samples: pa.Table) -> pa.Table:
            rows = super().measure(samples)
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return rows

    monkeypatch.setattr(stage, "Extraction", KilledOnce)
    assert_same(extract(samples, tmp_path / "out", config), undisturbed)
    assert killed.exists()


POISON = "this text ends the process that measures it"
BROKEN = "this text makes the measuring fail"


@pytest.fixture
def poisoned(monkeypatch):
    """Actors that fail on some texts, as a crash in native code and as an exception do; they load the model when they
    need it, so that a death costs little."""
    poison, broken = POISON, BROKEN

    class Poisoned(Extraction):
        def __init__(self, **arguments: object) -> None:
            self._arguments = arguments
            self._tries, self._unusable = arguments["tries"], ""

        def measure(self, samples: pa.Table) -> pa.Table:
            texts = samples["text"].to_pylist()
            if poison in texts:
                os.abort()
            if broken in texts:
                raise ZeroDivisionError(broken)
            if not hasattr(self, "_extractor"):
                super().__init__(**self._arguments)
            return super().measure(samples)

    monkeypatch.setattr(stage, "Extraction", Poisoned)


@pytest.mark.usefixtures("poisoned")
def test_a_sample_that_ends_its_process_is_set_aside_and_all_others_are_measured(config, undisturbed, tmp_path):
    bad = {7: POISON, 9: POISON, 200: BROKEN}
    rows = extract(write_samples(tmp_path / "samples", bad), tmp_path / "out", config)
    ids = {number: a_row(number, text)["sample_id"] for number, text in bad.items()}
    assert {key for key, row in rows.items() if row["error"]} == set(ids.values())
    assert rows[ids[7]]["error"] == rows[ids[9]]["error"] == "the process that measured it died, 2 times of 2"
    assert rows[ids[200]]["error"] == f"ZeroDivisionError: {BROKEN}"
    assert len(rows) == NUM_SAMPLES
    assert rows[ids[7]]["feature_ids"] == rows[ids[7]]["activations"] == []
    others = {key: row for key, row in rows.items() if not row["error"]}
    originals = {a_row(number)["sample_id"] for number in bad}
    assert_same(others, {key: row for key, row in undisturbed.items() if key not in originals})
    assert not (tmp_path / "out" / stage.TRIES_FOLDER).exists()


@pytest.mark.usefixtures("poisoned", "ray_cluster")
def test_more_failures_than_the_config_allows_are_an_error_with_the_reasons(config, tmp_path):
    broken = write_samples(tmp_path / "samples", dict.fromkeys(range(0, NUM_SAMPLES, 10), BROKEN))
    with pytest.raises(RuntimeError, match=r"32 of 320 samples.*allows 0\.05.*ZeroDivisionError.*\(32\)"):
        extract_activations(broken, tmp_path / "out", config, Progress.silent())


def test_a_sample_that_fails_alone_and_one_that_fails_with_all_are_told_apart(tmp_path):
    samples = pa.Table.from_pylist([a_row(number) for number in range(4)], schema=SAMPLES)

    def fail(_: pa.Table) -> pa.Table:
        raise ZeroDivisionError("always")

    with pytest.raises(ZeroDivisionError):
        quarantine.measure_guarded(samples, fail, tmp_path)
    [row] = quarantine.measure_guarded(samples.slice(0, 1), fail, tmp_path).to_pylist()
    assert row["error"] == "ZeroDivisionError: always"


def test_a_machine_on_which_everything_dies_ends_in_an_error(tmp_path):
    for number in range(quarantine.MAX_KILLERS + 1):
        (tmp_path / f"sample-{a_row(number)['sample_id']}").write_text("((")
    samples = pa.Table.from_pylist([a_row(0)], schema=SAMPLES)
    (tmp_path / f"batch-{quarantine.hash_of(a_row(0)['sample_id'])}").write_text("((")
    with pytest.raises(RuntimeError, match="more than 100 samples killed the process"):
        quarantine.measure_guarded(samples, lambda rows: rows, tmp_path)


def test_a_process_that_dies_after_measuring_ends_in_an_error_too(tmp_path):
    """As where the rows do not fit into memory a second time: no text is to blame, and Ray would go on without end."""
    samples = pa.Table.from_pylist([a_row(number) for number in range(3)], schema=SAMPLES)
    for _ in range(quarantine.MAX_REPEATS):
        quarantine.measure_guarded(samples, lambda rows: rows, tmp_path)
    with pytest.raises(RuntimeError, match=r"3 samples ended their process 0 times, and were measured 10 times"):
        quarantine.measure_guarded(samples, lambda rows: rows, tmp_path)
    quarantine.forget_ends(tmp_path)  # the next attempt
    assert quarantine.measure_guarded(samples, lambda rows: rows, tmp_path) is samples
    [note] = tmp_path.iterdir()
    note.write_text("(" * 11)  # two of its own and two of each sample are 8; two more may be anyone's
    with pytest.raises(RuntimeError, match=r"ended their process 11 times"):
        quarantine.measure_guarded(samples, lambda rows: rows, tmp_path)


# ---- a node leaves ----

CLUSTER_DRIVER = """
import sys, threading, time
from pathlib import Path
import ray, ray._common.utils, ray._private.utils
from ray.cluster_utils import Cluster
from fac_ray.activations import measuring as activations
from fac_ray.config import load_config
from fac_ray.activations.parts import committed_ids
from fac_ray.progress import Progress

samples, folder, config, temporary = map(Path, sys.argv[1:])
removed = temporary / "removed"

class Waiting(activations.Extraction):
    num_batches = 0

    def measure(self, samples):
        if self.num_batches and not removed.exists():  # it has work, and waits in the middle of it for the fault
            (temporary / f"waiting-{ray.get_runtime_context().get_node_id()}").touch()
            while not removed.exists():
                time.sleep(0.05)
        self.num_batches += 1
        return super().measure(samples)

activations.Extraction = Waiting
ray._private.utils.write_ray_address = lambda *_, **__: None  # no other process may find this cluster
ray._common.utils.reset_ray_address = lambda *_, **__: None
health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
          "health_check_failure_threshold": 2}
node = {"object_store_memory": 150 << 20}
cluster = Cluster(initialize_head=True, head_node_args={
    **node, "num_cpus": 0, "include_dashboard": False, "temp_dir": str(temporary), "_system_config": health})
nodes = [cluster.add_node(num_cpus=4, **node) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)

def remove_a_working_node():
    while not (waiting := list(temporary.glob("waiting-*"))):
        time.sleep(0.01)
    deadline = time.monotonic() + 10
    while not committed_ids(folder) and time.monotonic() < deadline:  # better if there is a part to keep
        time.sleep(0.01)
    [victim] = [node for node in nodes if waiting[0].name == f"waiting-{node.node_id}"]
    cluster.remove_node(victim, allow_graceful=False)
    removed.touch()

remover = threading.Thread(target=remove_a_working_node, daemon=True)
remover.start()
activations.extract_activations(samples, folder, load_config(config), Progress.silent())
remover.join()
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_leaves_changes_no_row(samples, tree, undisturbed, tmp_path, short_folder):
    (tmp_path / "config.yaml").write_text(json.dumps({**tree, "measure": {"num_actors": 2}}))
    command = [sys.executable, "-c", CLUSTER_DRIVER, samples, tmp_path / "out", tmp_path / "config.yaml", short_folder]
    driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        assert driver.wait(timeout=240) == 0
    finally:
        end_session(driver.pid)
    assert Path(short_folder, "removed").exists()
    rows = read_table(tmp_path / "out").to_pylist()
    assert len(rows) == NUM_SAMPLES
    assert_same({row["sample_id"]: row for row in rows}, undisturbed)


# ---- the command is killed ----


def measure(config: RunConfig) -> dict:
    """The numbers of a run, in which each of the 151 lines is a sample or rejected, and each sample has one row."""
    report = pipeline.measure(config)
    samples, rejected, rows = (
        read_table(config.folder / kind / "a") for kind in ("samples", "rejected", "activations")
    )
    assert (len(samples), len(rejected)) == (150, 1)
    assert sorted(samples["source_row"].to_pylist() + rejected["source_row"].to_pylist()) == list(range(151))
    assert sorted(rows["sample_id"].to_pylist()) == sorted(samples["sample_id"].to_pylist())
    [facts] = report["corpora"].values()
    assert facts["num_samples"] + facts["num_rejected"] == facts["num_rows"] == 151
    return numbers(report)


@pytest.fixture(scope="module")
def measured(tree, ray_cluster) -> dict:
    """The numbers of an undisturbed run."""
    assert ray_cluster.is_initialized()
    return measure(config_from_tree(tree))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_driver_that_is_killed_at_a_random_moment_goes_on_to_the_same_numbers(tree, measured, tmp_path, seed):
    (tmp_path / "run.yaml").write_text(json.dumps({**tree, "run": {**tree["run"], "folder": str(tmp_path / "run")}}))
    command = [sys.executable, "-m", "fac_ray.cli", "measure", "--config", str(tmp_path / "run.yaml")]
    driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    moment = random.Random(seed)
    num_files = moment.randrange(4, 17)  # of about 20 that an undisturbed run writes
    while driver.poll() is None and sum(1 for _ in (tmp_path / "run").rglob("*.*")) < num_files:
        time.sleep(0.01)
    time.sleep(moment.uniform(0, 0.2))
    assert driver.poll() is None, "the command ended before its moment"
    driver.kill()
    driver.wait()
    wait_for_session(driver.pid)
    assert measure(config_from_tree(json.loads((tmp_path / "run.yaml").read_text()))) == measured


# ---- the storage fails ----


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """An empty file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_disk_is_an_error_that_says_so_and_loses_nothing(tree, measured, small_disk):
    config = config_from_tree(tree, (f"run.folder={small_disk / 'run'}",))
    for size, failing in (("28k", "samples/a"), ("64k", "activations/a")):
        remount(small_disk, f"size={size}")
        with pytest.raises(OSError, match=rf"run/{failing}: cannot be written \(No space left.*same command goes on"):
            pipeline.measure(config)
    remount(small_disk, "size=50m")
    assert measure(config) == measured


@pytest.mark.usefixtures("measured")
def test_a_folder_that_is_read_only_is_an_error_that_names_it(tree, small_disk):
    remount(small_disk, "ro")
    with pytest.raises(OSError, match=r"disk/run: cannot be written \(Read-only file system\).*another run.folder"):
        pipeline.measure(config_from_tree(tree, (f"run.folder={small_disk / 'run'}",)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run: cannot be written \(Not a directory\).*another run.folder"):
        pipeline.measure(config_from_tree(tree, (f"run.folder={tmp_path / 'file' / 'run'}",)))


LIMIT = resource.RLIMIT_FSIZE
"""What a file may grow to, which a process may lower for itself without any privilege."""


def test_an_actor_that_may_write_nothing_ends_the_run_with_an_error_and_loses_nothing(
    tree, measured, tmp_path, monkeypatch
):
    config, limit = config_from_tree(tree, (f"run.folder={tmp_path / 'run'}",)), LIMIT

    class Limited(Extraction):
        def __call__(self, samples: pa.Table) -> pa.Table:
            soft, hard = resource.getrlimit(limit)
            resource.setrlimit(limit, (0, hard))
            try:
                return super().__call__(samples)
            finally:
                resource.setrlimit(limit, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(stage, "Extraction", Limited)
        with pytest.raises(OSError, match=r"run/activations/a: cannot be written \(File too large\).*goes on from it"):
            pipeline.measure(config)
    assert measure(config) == measured


def test_a_file_that_there_is_no_room_for_leaves_the_old_one_and_no_other(tmp_path):
    old = pa.table({"a": [1]})
    write_table(tmp_path / "t.parquet", old)
    soft, hard = resource.getrlimit(LIMIT)
    resource.setrlimit(LIMIT, (0, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(File too large\)"), storing(tmp_path):
            write_table(tmp_path / "t.parquet", pa.table({"a": [2]}))
    finally:
        resource.setrlimit(LIMIT, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    assert read_table(tmp_path) == old


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("kind", "harm"),
    [("activations", cut), ("samples", cut), ("samples", Path.unlink), ("rejected", cut), ("rejected", Path.unlink)],
)
def test_a_part_that_is_cut_or_lost_is_made_again(tree, measured, kind, harm):
    folder = Path(tree["run"]["folder"]) / kind / "a"
    before = rows_of(folder)
    harm(parquet_files(folder)[0])
    assert measure(config_from_tree(tree)) == measured
    assert rows_of(folder) == before


def rows_of(folder: Path) -> list[dict]:
    """All rows but their activations, which are equal to rounding only, in the order of their first column."""
    rows = read_table(folder)
    kept = [name for name in rows.column_names if name != "activations"]
    return rows.select(kept).sort_by(kept[0]).to_pylist()


def blank(part: Path) -> None:
    """Zeros over the first column."""
    raw = part.read_bytes()
    part.write_bytes(raw[:4] + bytes(200) + raw[204:])


def flip_a_bit_of_the_footer(part: Path) -> None:
    """In the length of the footer, the four bytes before the last four."""
    raw = bytearray(part.read_bytes())
    raw[-6] ^= 1
    part.write_bytes(raw)


@pytest.mark.parametrize(
    ("kind", "harm"),
    [("samples", blank), ("samples", flip_a_bit_of_the_footer), ("activations", flip_a_bit_of_the_footer)],
)
def test_a_part_whose_bytes_are_changed_is_named_and_made_again_when_removed(tree, measured, kind, harm):
    [part, *_] = parquet_files(Path(tree["run"]["folder"]) / kind / "a")
    harm(part)  # of the same size, so it is noticed when it is read
    with pytest.raises(ValueError, match=rf"{part.name}: a damaged Parquet file.*remove this file and run"):
        pipeline.measure(config_from_tree(tree, ("measure.threshold=0.25",)))
    part.unlink()
    assert measure(config_from_tree(tree)) == measured


def test_a_damaged_part_of_samples_is_named_when_it_is_to_be_measured(tree, measured):
    folder = Path(tree["run"]["folder"])
    (folder / "activations" / "a" / MARKER).unlink()  # as if the run had been interrupted
    [part] = parquet_files(folder / "samples" / "a")
    flip_a_bit_of_the_footer(part)
    with pytest.raises(ValueError, match=rf"{part.name}: a damaged Parquet file.*remove this file and run"):
        pipeline.measure(config_from_tree(tree))
    part.unlink()
    assert measure(config_from_tree(tree)) == measured


# ---- another config ----


def test_rows_of_two_configs_are_never_mixed(tree, measured, tmp_path):
    folder = Path(tree["run"]["folder"])
    (folder / "activations" / "a" / MARKER).unlink()  # as if the run had been interrupted
    parquet_files(folder / "activations" / "a")[0].unlink()
    changed = ("measure.tokens=all", "measure.max_tokens=16")
    found = measure(config_from_tree(tree, changed))
    assert found == measure(config_from_tree(tree, (*changed, f"run.folder={tmp_path / 'fresh'}")))
    assert found["corpora"] != measured["corpora"]
