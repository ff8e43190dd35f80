"""A measured corpus has each sample once, as the extractor alone would measure it, however often the run was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import wait_for_session
from tiny_llama import save_authors_sae, save_llama

from fac_ray.activations import measuring as stage
from fac_ray.activations.measuring import Pool, extract_activations, plan_pool
from fac_ray.activations.parts import PENDING, committed_ids, committed_totals
from fac_ray.artifacts import parquet_files, read_table, write_json, write_table
from fac_ray.config import ConfigError, RunConfig, config_from_tree
from fac_ray.progress import Progress
from fac_ray.schema import ACTIVATIONS, SAMPLES, content_id, sample_id

NUM_SAMPLES = 500
BAD = 5
"""Row whose text is blank."""


def a_row(index):
    text, messages = f"the moon jumps over {index} dogs " * (1 + index % 9), None
    if index % 10 == 3:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"bread {index}"}]
        text += f"\n\nbread {index}"
    text = "  " if index == BAD else text
    content = content_id(text, messages)
    return {
        "sample_id": sample_id("corpus.jsonl", index, content),
        "content_id": content,
        "text": text,
        "messages": messages,
        "label": None,
        "source_file": "corpus.jsonl",
        "source_row": index,
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A run's config and a folder with samples in two parts; row `BAD` cannot be measured."""
    root = tmp_path_factory.mktemp("activations")
    rows = [a_row(index) for index in range(NUM_SAMPLES)]
    write_table(root / "samples" / "a.parquet", pa.Table.from_pylist(rows[:300], schema=SAMPLES))
    write_table(root / "samples" / "b.parquet", pa.Table.from_pylist(rows[300:], schema=SAMPLES))
    tree = {
        "name": "test",
        "model": {"path": str(save_llama(root / "model")), "hook_layer": 2},
        "sae": {"path": str(save_authors_sae(root / "sae.pth"))},
        "corpora": {"a": {"path": "corpus.jsonl"}},
    }
    write_json(root / "config.json", tree)
    return config_from_tree(tree), root


@pytest.fixture(scope="module")
def measured(corpus, ray_cluster, tmp_path_factory):
    """The corpus measured without interruption: (facts, folder, progress)."""
    config, root = corpus
    folder, progress = tmp_path_factory.mktemp("measured"), Progress.silent()
    context = ray_cluster.data.DataContext.get_current()
    facts = extract_activations(root / "samples", folder, config, progress)
    assert ray_cluster.data.DataContext.get_current() is context
    assert context.checkpoint_config is None
    return facts, folder, progress


def by_sample(folder):
    """All rows, sorted by id: parts are in no order."""
    return read_table(folder).sort_by("sample_id")


def assert_same_rows(found: pa.Table, expected: pa.Table) -> None:
    """Equal but for the rounding that depends on which texts went through the model together."""
    for name in ("sample_id", "feature_ids", "num_tokens", "truncated", "error"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    activations = zip(found["activations"].to_pylist(), expected["activations"].to_pylist(), strict=True)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in activations)


def test_every_sample_has_one_row_as_the_extractor_measures_it(corpus, measured):
    from fac_ray.features.extractor import FeatureExtractor

    config, root = corpus
    facts, folder, progress = measured
    extractor = FeatureExtractor(config.model, config.sae, config.measure, device="cpu")
    samples = read_table(root / "samples")
    assert by_sample(folder).schema.equals(ACTIVATIONS)
    assert_same_rows(by_sample(folder), extractor.extract_table(samples).sort_by("sample_id"))
    assert facts["num_samples"] == progress.count == NUM_SAMPLES
    assert facts["num_tokens"] == sum(by_sample(folder)["num_tokens"].to_pylist())
    assert (facts["num_errors"], facts["num_truncated"]) == (1, 0)
    assert facts["tokens_per_s"] > 0


def test_a_row_that_cannot_be_measured_says_why_and_stops_nothing(measured):
    _, folder, _ = measured
    rows = {row["sample_id"]: row for row in read_table(folder).to_pylist()}
    bad = rows[a_row(BAD)["sample_id"]]
    assert (bad["error"], bad["feature_ids"], bad["num_tokens"]) == ("the text is empty", [], 0)
    assert len(rows) == NUM_SAMPLES


def test_a_finished_corpus_is_not_measured_again(corpus, measured):
    config, root = corpus
    facts, folder, _ = measured
    again = extract_activations(root / "samples", folder, config, Progress.silent())
    assert again == facts | {"tokens_per_s": 0.0}


DRIVER = """
import sys
from pathlib import Path
import ray
from fac_ray.activations.measuring import extract_activations
from fac_ray.config import load_config
from fac_ray.progress import Progress

if __name__ == "__main__":
    root, folder, temporary = map(Path, sys.argv[1:])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(temporary))
    extract_activations(root / "samples", folder, load_config(root / "config.json"), Progress.silent())
"""


@pytest.mark.timeout(600)  # three Ray starts and executions
def test_a_run_whose_driver_is_killed_goes_on_and_ends_with_the_same_rows(corpus, measured, short_folder, tmp_path):
    config, root = corpus
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, root, tmp_path, short_folder], start_new_session=True)
    try:
        while len(committed_ids(tmp_path)) < 2:
            assert driver.poll() is None, "the driver ended before its second part"
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_for_session(driver.pid)
    interrupt_last_part(tmp_path)
    assert 0 < committed_totals(tmp_path).num_samples < NUM_SAMPLES
    facts = extract_activations(root / "samples", tmp_path, config, Progress.silent())
    assert facts["num_samples"] == NUM_SAMPLES
    assert_same_rows(by_sample(tmp_path), by_sample(measured[1]))


def interrupt_last_part(folder: Path) -> None:
    """Put a part back to what a kill in the middle of its writing leaves: its ids pending, its file cut."""
    [*_, ids] = committed_ids(folder)
    [part] = folder.glob(ids.stem + "*")
    before, lost = committed_totals(folder).num_samples, pq.read_metadata(part).num_rows
    ids.rename(ids.with_name(ids.stem + PENDING))
    part.write_bytes(part.read_bytes()[:100])
    assert committed_totals(folder).num_samples == before - lost


@pytest.mark.usefixtures("ray_cluster")
def test_a_config_error_of_an_actor_is_a_config_error_of_the_run(corpus, tmp_path):
    config, root = corpus
    wrong: RunConfig = config.model_copy(update={"model": config.model.model_copy(update={"hook_layer": 9})})
    with pytest.raises(ConfigError, match=r"^model\.hook_layer 9: .* 3 blocks"):
        extract_activations(root / "samples", tmp_path, wrong, Progress.silent())


def test_a_plan_that_could_not_be_resumed_is_an_error(ray_cluster, tmp_path):
    with stage._checkpointed(tmp_path), pytest.raises(UserWarning, match="checkpointing"):
        ray_cluster.data.range(3).materialize()


def test_a_folder_without_samples_is_refused(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        extract_activations(tmp_path, tmp_path / "out", corpus[0], Progress.silent())


@pytest.mark.parametrize(
    ("num_actors", "num_blocks", "cluster", "num_nodes", "pool"),
    [
        # one node that Ray was told has more CPUs than its two: the two count
        (None, 9, {"CPU": 8.0}, 1, Pool(1, 0.0, 1.0, 2)),
        (3, 9, {"CPU": 8.0}, 1, Pool(3, 0.0, 1.0, 1)),
        # two CPUs in all: the tasks around the pool need both
        (None, 9, {"CPU": 2.0}, 1, Pool(1, 0.0, 0.0, 2)),
        # several nodes
        (None, 99, {"CPU": 64.0}, 4, Pool(32, 0.0, 1.0, 2)),
        (None, 5, {"CPU": 64.0}, 4, Pool(5, 0.0, 1.0, 12)),
        # GPUs: one actor each, or as many as are asked for, sharing them
        (None, 99, {"CPU": 64.0, "GPU": 8.0}, 2, Pool(8, 1.0, 1.0, None)),
        (2, 99, {"CPU": 64.0, "GPU": 8.0}, 2, Pool(2, 1.0, 1.0, None)),
        (3, 99, {"CPU": 4.0, "GPU": 1.0}, 1, Pool(3, 0.3333, 0.3333, None)),
    ],
)
def test_the_pool_fits_the_cluster(num_actors, num_blocks, cluster, num_nodes, pool):
    assert plan_pool(num_actors, num_blocks, cluster, num_nodes, cores=2) == pool


def test_a_cluster_of_one_cpu_is_refused():
    with pytest.raises(ConfigError, match="has 1 CPU; the extraction needs 2"):
        plan_pool(None, 1, {"CPU": 1.0}, 1, cores=1)


def test_parts_are_counted_only_when_their_ids_are_committed(tmp_path):
    assert committed_totals(tmp_path).num_samples == 0
    assert parquet_files(tmp_path) == []
