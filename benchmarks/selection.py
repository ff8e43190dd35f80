"""`fac-ray select` at scale: a synthetic pool of activations in, time and memory of the whole selection out.

Features are as common as in the embedded run: a few in many samples, most in few (a power law), some hundred relevant.
No model runs. The pool is searched as a whole and in partitions; what each adds stands beside its time.

    python benchmarks/selection.py --num-samples 100000 --k 500 --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from fac_ray.artifacts import write_json, write_table
from fac_ray.config import config_from_tree
from fac_ray.coverage.counts import UNLABELLED, CorpusCoverage, FeatureCounts
from fac_ray.decisions.pool import WEIGHT_UNIT, Pool
from fac_ray.decisions.selection import select_samples
from fac_ray.progress import Progress
from fac_ray.schema import ACTIVATIONS, SAMPLES

D_SAE = 65_536
NUM_RELEVANT = 4_000
FEATURES_PER_SAMPLE = 120
THRESHOLD = 0.5
PART_SAMPLES = 5_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-samples", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=500)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fr", dir="/tmp") as folder:
        pool = write_pool(Path(folder), given.num_samples)
        ray.init(include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        found = [measure(Path(folder), pool, given.k, partitions) for partitions in (1, given.partitions)]
        ray.shutdown()
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    if given.json is not None:
        write_json(given.json, found)


def write_pool(folder: Path, num_samples: int) -> Pool:
    """Activations, samples and coverage of random samples whose features follow a power law."""
    rng = np.random.default_rng(0)
    chance = (np.arange(D_SAE) + 20.0) ** -1.1
    cumulative = np.cumsum(chance / chance.sum())
    counts = FeatureCounts.empty((THRESHOLD,), THRESHOLD, D_SAE)
    for start in range(0, num_samples, PART_SAMPLES):
        names = [f"{start + i:032x}" for i in range(min(PART_SAMPLES, num_samples - start))]
        lengths = rng.poisson(FEATURES_PER_SAMPLE, len(names))
        drawn = np.split(np.searchsorted(cumulative, rng.random(lengths.sum())), lengths.cumsum()[:-1])
        ids = [np.unique(np.minimum(one, D_SAE - 1)) for one in drawn]
        rows = activation_rows(names, ids, rng)
        counts = counts.merge(
            FeatureCounts.from_rows(rows, np.full(len(rows), UNLABELLED), (THRESHOLD,), THRESHOLD, D_SAE)
        )
        write_table(folder / "activations" / f"{start:09d}.parquet", rows)
        write_table(folder / "samples" / f"{start:09d}.parquet", sample_rows(names))
    weights = np.zeros(D_SAE, np.int64)
    weights[rng.choice(D_SAE, NUM_RELEVANT, replace=False)] = WEIGHT_UNIT
    return Pool(folder / "activations", folder / "samples", CorpusCoverage.from_counts(counts), THRESHOLD, weights)


def activation_rows(names: list[str], ids: list[np.ndarray], rng: np.random.Generator) -> pa.Table:
    lists = pa.array([one.astype(np.int32) for one in ids], pa.list_(pa.int32()))
    values = [rng.random(len(one), np.float32) + np.float32(0.25) for one in ids]
    columns = {
        "sample_id": pa.array(names),
        "feature_ids": lists,
        "activations": pa.array(values, pa.list_(pa.float32())),
        "num_tokens": pa.array(rng.integers(20, 400, len(names)), pa.int32()),
    }
    return pa.table(
        {f.name: columns.get(f.name, pa.nulls(len(names), f.type)) for f in ACTIVATIONS}, schema=ACTIVATIONS
    )


def sample_rows(names: list[str]) -> pa.Table:
    columns = {name: pa.array(names) for name in ("sample_id", "content_id", "text", "source_file")}
    return pa.table({f.name: columns.get(f.name, pa.nulls(len(names), f.type)) for f in SAMPLES}, schema=SAMPLES)


def measure(folder: Path, pool: Pool, k: int, num_partitions: int) -> dict[str, Any]:
    """One selection: seconds, the highest memory of driver and workers, and what it added."""
    tree = {
        "name": "pool",
        "model": {"path": "none", "hook_layer": 1},
        "sae": {"path": "none"},
        "corpora": {"pool": {"path": "none"}},
        "measure": {"threshold": THRESHOLD},
        "selection": {"num_samples": k, "num_partitions": num_partitions},
    }
    output = folder / f"selection-{num_partitions}"
    output.mkdir()
    with Progress.silent() as progress, PeakMemory() as memory:
        start = time.perf_counter()
        facts = select_samples(config_from_tree(tree), "pool", pool, output, progress)
        seconds = time.perf_counter() - start
    chosen = json.loads((output / "selection.json").read_text())
    return {
        "num_samples": pool.coverage.num_samples,
        "num_relevant_pairs": int(pool.coverage.counts(THRESHOLD)[pool.weights > 0].sum()),
        "num_partitions": num_partitions,
        "seconds": round(seconds, 1),
        "driver_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "all_processes_peak_mb": round(memory.peak_bytes / 2**20),
        **facts,
        "added": chosen["methods"][0]["gain"],
        "certified_fraction": chosen["certified_fraction"],
        "added_by_random_samples": chosen["methods"][1]["gain"],
        "added_by_longest_samples": chosen["methods"][2]["gain"],
    }


class PeakMemory:
    """Highest sum of private memory over this process and the workers of its cluster while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, sum(map(private_bytes, processes_below(os.getpid()))))


def processes_below(root: int) -> set[int]:
    """The process and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found, added = {root}, {root}
    while added:
        added = {process for process, parent in parents.items() if parent in added} - found
        found |= added
    return found


def private_bytes(process: int) -> int:
    """Resident memory that is not shared with other processes, such as the object store's."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * PAGE_BYTES


if __name__ == "__main__":
    main()
