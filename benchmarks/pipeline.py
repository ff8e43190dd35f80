"""What Ray costs: the extraction pipeline beside the bare extractor, on the same samples, cores and threads.

    python benchmarks/pipeline.py [--chats N] [--messages N] [--width 512] [--rounds 2] [--json FILE]

Four ways in turn, some rounds of them: the bare extractor in this process, all samples in one call; the pipeline with
one actor that has one thread; with one that has as many as the extractor; with two actors that share the threads.
The rate of the pipeline is that of its steady state: from the moment when as many parts are committed as there are
actors, to the last commit. What comes before (Ray's workers, loading model and SAE in every actor, the first parts) is
its start-up, reported apart, as is the start of Ray itself. Beside each rate per second of the clock stands the rate
per second of CPU, all processes together: on a machine that others use, the clock measures them too.

The rows of the ways are compared: ids, tokens and errors are equal, activations within the rounding of another batch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a Ray of this benchmark alone, on the loopback interface

import click
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from shapes import CHATS, SHAPE_M, Shape, as_samples, read_chats, sample_row, save_model, save_sae

from fac_ray.activations import measuring
from fac_ray.activations.measuring import Pool, extract_activations
from fac_ray.activations.parts import committed_ids
from fac_ray.artifacts import read_table, write_json, write_table
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.progress import Progress
from fac_ray.schema import SAMPLES

POOLS: dict[str, tuple[int, int | None]] = {"one_thread": (1, 1), "one_actor": (1, None), "two_actors": (2, None)}
"""Actors, and threads of each; None: as the pipeline plans it."""
WARM_UP_SAMPLES = 128
CLOCK_INTERVAL_S = 0.2
MIN_CHATS = 1024
"""Eight parts of 128; a part is committed at once, and only those after each actor's first are timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=1024)
    parser.add_argument("--messages", type=int, help="cut chats to their first messages; default: whole chats")
    parser.add_argument("--width", type=int, default=SHAPE_M.d_model // 2, help="d_model; shape M has 1024")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.chats < MIN_CHATS:
        parser.error(
            f"--chats {arguments.chats}: at least {MIN_CHATS}, so that a steady state has parts to be timed by"
        )
    with tempfile.TemporaryDirectory(prefix="fr", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        config = write_world(
            Path(temporary), arguments.chats, arguments.messages, shape_of(arguments.width), arguments.dtype
        )
        runs = measure(Path(temporary), config, arguments.rounds)
    report = {
        "shape": shape_of(arguments.width)._asdict(),
        "dtype": arguments.dtype,
        "num_chats": arguments.chats,
        "num_messages": arguments.messages,
        **runs,
    }
    click.echo(json.dumps(report, indent=2))
    if arguments.json:
        write_json(arguments.json, report)


def measure(folder: Path, config: RunConfig, num_rounds: int) -> dict[str, Any]:
    """Rates of the three ways, `num_rounds` times in turn, and their ratios."""
    samples = read_table(folder / "samples")
    extractor = FeatureExtractor(config.model, config.sae, config.measure, device="cpu")
    extractor.extract_table(samples.slice(0, WARM_UP_SAMPLES))
    started_s = time.monotonic()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder / "ray"),
    )
    ray_start_s = time.monotonic() - started_s
    ray.data.DataContext.get_current().enable_progress_bars = False
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("bare", *POOLS)}
    for number in range(num_rounds):
        bare, expected = run_bare(extractor, samples)
        runs["bare"].append(bare)
        click.echo(f"bare: {bare}", err=True)
        for name, pool in POOLS.items():
            output = folder / f"{name}-{number}"
            runs[name].append({**run_pipeline(folder, output, config, *pool), **difference(output, expected)})
            click.echo(f"{name}: {runs[name][-1]}", err=True)
    ray.shutdown()
    return {
        "threads": torch.get_num_threads(),
        "ray_start_s": round(ray_start_s, 1),
        "runs": runs,
        "ratios": ratios(runs),
    }


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds, by the clock and by CPU seconds."""
    found = {}
    for kind in ("tokens_per_s", "tokens_per_cpu_s"):
        middle = {name: float(np.median([run[kind] for run in each])) for name, each in runs.items()}
        for name in POOLS:
            found[f"{name}_over_bare_{kind}"] = round(middle[name] / middle["bare"], 3)
        found[f"two_actors_over_one_thread_{kind}"] = round(middle["two_actors"] / middle["one_thread"], 3)
    return found


def run_bare(extractor: FeatureExtractor, samples: pa.Table) -> tuple[dict[str, Any], pa.Table]:
    """The extractor alone: its rates and its rows."""
    clock, cpu = time.monotonic(), time.process_time()
    rows = extractor.extract_table(samples)
    num_tokens = sum(rows["num_tokens"].to_pylist())
    wall_s, cpu_s = time.monotonic() - clock, time.process_time() - cpu
    rates = {"tokens_per_s": round(num_tokens / wall_s, 1), "tokens_per_cpu_s": round(num_tokens / cpu_s, 1)}
    return {"num_tokens": num_tokens, "wall_s": round(wall_s, 1), **rates}, rows


def run_pipeline(
    folder: Path, output: Path, config: RunConfig, num_actors: int, num_threads: int | None
) -> dict[str, Any]:
    """The pipeline from stored samples to committed parts: its start-up and the rates after it; `num_threads` of each
    actor, None: as the pipeline plans it."""
    measure = config.measure.model_copy(update={"num_actors": num_actors})
    planned = None if num_threads is None else Pool(num_actors, 0.0, 1.0, num_threads)
    started_s = time.time()
    with CpuClock() as clock, planned_pool(planned):
        facts = extract_activations(
            folder / "samples", output, config.model_copy(update={"measure": measure}), Progress.silent()
        )
    commits = sorted((ids.stat().st_mtime, ids.stem) for ids in committed_ids(output))
    first_s, last_s = commits[num_actors - 1][0], commits[-1][0]
    num_tokens = facts["num_tokens"] - sum(tokens_of(output, name) for _, name in commits[:num_actors])
    return {
        "num_tokens": facts["num_tokens"],
        "num_parts": len(commits),
        "wall_s": round(last_s - started_s, 1),
        "start_up_s": round(first_s - started_s, 1),
        "steady_tokens": num_tokens,
        "tokens_per_s": round(num_tokens / (last_s - first_s), 1),
        "tokens_per_cpu_s": round(num_tokens / (clock.cpu_s_at(last_s) - clock.cpu_s_at(first_s)), 1),
    }


@contextmanager
def planned_pool(pool: Pool | None) -> Iterator[None]:
    """Inside the block the pipeline takes this pool, if there is one, instead of what it would plan."""
    plan = measuring.plan_pool
    if pool is not None:
        measuring.plan_pool = lambda *_: pool
    try:
        yield
    finally:
        measuring.plan_pool = plan


def tokens_of(output: Path, name: str) -> int:
    """Tokens of the committed part of that name."""
    [part] = output.glob(f"{name}-*.parquet")
    return sum(pq.read_table(part, columns=["num_tokens"])["num_tokens"].to_pylist())


class CpuClock:
    """CPU seconds of this process and all that it started, as a function of time, while the block runs."""

    def __enter__(self) -> CpuClock:
        self._times: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_s_at(self, time_s: float) -> float:
        """CPU seconds at a time of the block, between samples on a straight line."""
        at, cpu_s = zip(*self._times, strict=True)
        return float(np.interp(time_s, at, cpu_s))

    def _follow(self) -> None:
        seconds: dict[tuple[int, float], float] = {}  # of each process, also of those that have ended
        while not self._stop.wait(CLOCK_INTERVAL_S):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    seconds[process.pid, process.create_time()] = times.user + times.system
            self._times.append((time.time(), sum(seconds.values())))


def difference(output: Path, expected: pa.Table) -> dict[str, Any]:
    """How the pipeline's rows differ from the extractor's: whether samples, tokens and errors are equal, the largest
    difference of an activation, and the share of (sample, feature) pairs that only one of the two has. Batches differ
    in shape, and a matrix product of another shape rounds otherwise."""
    found, expected = read_table(output).sort_by("sample_id"), expected.sort_by("sample_id")
    largest, num_unequal, num_pairs = 0.0, 0, 0
    columns = [table[name].to_pylist() for name in ("feature_ids", "activations") for table in (found, expected)]
    for found_ids, expected_ids, found_values, expected_values in zip(*columns, strict=True):
        mine = dict(zip(found_ids, found_values, strict=True))
        theirs = dict(zip(expected_ids, expected_values, strict=True))
        both = mine.keys() & theirs.keys()
        largest = max([largest, *(abs(mine[i] - theirs[i]) for i in both)])
        num_unequal += len(mine.keys() ^ theirs.keys())
        num_pairs += len(theirs)
    return {
        "same_samples_tokens_errors": all(
            found[name].to_pylist() == expected[name].to_pylist() for name in ("sample_id", "num_tokens", "error")
        ),
        "max_abs_difference": round(largest, 6),
        "unequal_pairs_fraction": round(num_unequal / num_pairs, 6),
    }


def shape_of(width: int) -> Shape:
    """Shape M, or a narrower one of the same proportions and heads."""
    part = SHAPE_M.d_model // width
    return SHAPE_M._replace(
        d_model=width,
        d_mlp=SHAPE_M.d_mlp // part,
        num_heads=SHAPE_M.num_heads // part,
        num_kv_heads=max(1, SHAPE_M.num_kv_heads // part),
        d_sae=SHAPE_M.d_sae // part,
    )


def write_world(folder: Path, num_chats: int, num_messages: int | None, shape: Shape, dtype: str) -> RunConfig:
    """Write model, SAE and samples; returns the config that names them."""
    chats = [chat[:num_messages] for chat in read_chats(CHATS, num_chats)]
    save_model(folder / "model", shape, chats)
    save_sae(folder / "sae", shape)
    rows = [sample_row(text, messages, row) for row, (text, messages) in enumerate(as_samples(chats))]
    write_table(folder / "samples" / "chats.parquet", pa.Table.from_pylist(rows, SAMPLES))
    return config_from_tree(
        {
            "name": "pipeline",
            "model": {"path": str(folder / "model"), "hook_layer": shape.hook_layer, "dtype": dtype},
            "sae": {"path": str(folder / "sae")},
            "corpora": {"chats": {"path": "chats.jsonl"}},
        }
    )


if __name__ == "__main__":
    main()
