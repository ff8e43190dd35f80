"""A run goes on where it stopped, and a changed config redoes what depends on the change and nothing else."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_llama import save_authors_sae, save_llama

from fac_ray import pipeline
from fac_ray.activations import measuring as activations
from fac_ray.artifacts import MARKER
from fac_ray.config import ConfigError, config_from_tree

WORDS = ["bread", "dough", "moon", "fox", "dog", "cat", "lazy", "quick", "small", "please", "tell", "rest", "bake"]
TIMES = ("started_at", "stages", "config")
"""Keys of a report that hold times, or the folder."""
SUMS = ("mean_cosine_distance", "vendi_score")


def text_of(number: int) -> str:
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 4 + number % 9))


def write_rows(path: Path, numbers: range) -> None:
    rows = [{"text": text_of(n), "label": str(int(n % 3 == 0)), "other": str(int(n % 2 == 0))} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A run on a random model: every feature counts as relevant, so that there are gaps."""
    root = tmp_path_factory.mktemp("pipeline")
    write_rows(root / "anchor.jsonl", range(400))
    write_rows(root / "seed.jsonl", range(400, 404))
    corpora = {name: {"path": str(root / f"{name}.jsonl"), "label": "label"} for name in ("anchor", "seed")}
    return {
        "name": "tiny",
        "model": {"path": str(save_llama(root / "model")), "hook_layer": 2},
        "sae": {"path": str(save_authors_sae(root / "sae.pth", d_sae=512))},
        "corpora": corpora,
        "relevance": {"max_q_value": 1.0, "min_effect": -100, "min_samples": 1},
        "synthesis": None,
        "training": None,
        "run": {"folder": str(root / "run"), "max_rejected_fraction": 0.5},
    }


@pytest.fixture(scope="module")
def finished(tree, ray_cluster):
    """The report of an undisturbed run."""
    assert ray_cluster.is_initialized()
    return pipeline.run(config_from_tree(tree))


def written(tree) -> dict[str, str]:
    """When each stage of the run was finished."""
    root = Path(tree["run"]["folder"])
    return {str(p.parent.relative_to(root)): p.read_text() for p in root.rglob(MARKER)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in after if after[stage] != before.get(stage)}


def numbers(report: dict) -> dict:
    """What must not depend on interruptions, every figure of it to the last bit: all that follows from counts.

    A text's activations depend in their last bits on the texts beside it, and two choices follow them (docs/faults.md):
    which of equally strong samples are exemplars, and the k-means clusters behind the cluster entropy. Sums of
    activations agree to the digits that are reported.
    """
    found = json.loads(json.dumps({key: value for key, value in report.items() if key not in TIMES}))
    for corpus in found["corpora"].values():
        corpus.pop("tokens_per_s", None)
    for gap in found.get("gaps", ()):
        gap["exemplars"] = bool(gap["exemplars"])
    for measures in found.get("diversity", {}).values():
        for one in (measures, measures["at_sample"]):
            one.pop("cluster_entropy")
            for name in SUMS:
                one[name] = Approximately(one[name])
    return found


class Approximately(float):
    """A sum of activations, equal to another one if both agree to the six digits that a report holds."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=2e-5)

    __hash__ = None


def test_a_run_without_synthesis_ends_at_its_gaps(tree, finished):
    folder = Path(tree["run"]["folder"])
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(finished))
    assert finished["corpora"]["anchor"]["num_samples"] == 400
    assert finished["corpora"]["anchor"]["num_rejected"] == 1
    assert finished["missing_features"] > 0
    assert finished["fac"]["seed"] == finished["covered_features"] / finished["reachable_features"]
    assert "http" not in (folder / "report.html").read_text().split("<body")[0]


def test_a_finished_run_runs_nothing_again(tree, finished):
    before = written(tree)
    assert numbers(pipeline.run(config_from_tree(tree))) == numbers(finished)
    assert changed(before, written(tree)) == set()


def test_a_new_threshold_or_label_runs_no_model(tree, finished):
    before = written(tree)
    pipeline.run(config_from_tree(tree, ("measure.threshold=0.5", "corpora.anchor.label=other")))
    redone = changed(before, written(tree))
    assert {"samples/anchor", "coverage/anchor", "coverage/seed", "relevance", "gaps"} <= redone
    assert not {stage for stage in redone if stage.startswith("activations/")}
    assert numbers(pipeline.run(config_from_tree(tree))) == numbers(finished)


def test_a_killed_command_goes_on_and_ends_in_the_same_numbers(tree, finished, tmp_path):
    interrupted = {**tree, "run": {**tree["run"], "folder": str(tmp_path / "run")}}
    (tmp_path / "run.yaml").write_text(json.dumps(interrupted))
    command = [sys.executable, "-m", "fac_ray.cli", "gaps", "--config", str(tmp_path / "run.yaml")]
    killed = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anchor = tmp_path / "run" / "samples" / "anchor" / MARKER
    while not anchor.exists():
        assert killed.poll() is None, "the command ended before it had read a corpus"
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)  # the command and every worker of its own cluster
    killed.wait()
    kept = anchor.read_text()
    assert numbers(pipeline.gaps(config_from_tree(interrupted))) == numbers(finished)
    assert anchor.read_text() == kept


def test_the_last_bits_of_activations_change_no_number(tree, finished, tmp_path, monkeypatch):
    """As batches of another size would: the noise is three times what these texts have in float32."""

    class Noisy(activations.Extraction):
        def measure(self, samples: pa.Table) -> pa.Table:
            rows = super().measure(samples)
            lists = rows["activations"].combine_chunks()
            noise = 1 + 3e-6 * np.random.default_rng(0).uniform(-1, 1, len(lists.values))
            values = pa.array((lists.values.to_numpy() * noise).astype(np.float32))
            noisy = pa.ListArray.from_arrays(lists.offsets, values)
            return rows.set_column(rows.schema.get_field_index("activations"), rows.schema.field("activations"), noisy)

    monkeypatch.setattr(activations, "Extraction", Noisy)
    assert numbers(pipeline.run(config_from_tree(tree, (f"run.folder={tmp_path / 'run'}",)))) == numbers(finished)


@pytest.mark.usefixtures("finished")
def test_two_processes_cannot_work_on_one_run(tree):
    with (Path(tree["run"]["folder"]) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process"):
            pipeline.report(config_from_tree(tree))


@pytest.mark.usefixtures("ray_cluster")
def test_a_stage_without_its_section_or_corpus_says_what_to_add(tree, tmp_path):
    folder = f"run.folder={tmp_path}"
    with pytest.raises(ConfigError, match="synthesis"):
        pipeline.synthesize(config_from_tree(tree, (folder,)))
    only_seed = {**tree, "corpora": {"seed": tree["corpora"]["seed"]}}
    with pytest.raises(ConfigError, match="anchor"):
        pipeline.gaps(config_from_tree(only_seed, (folder,)))
    with pytest.raises(ConfigError, match="no run here yet"):
        pipeline.report(config_from_tree(tree, (f"run.folder={tmp_path / 'none'}",)))
