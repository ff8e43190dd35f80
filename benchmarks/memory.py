"""Whether the memory of a run depends on the size of its corpus: chats are measured and reduced on a private Ray.

    python benchmarks/memory.py [--sizes 2000 20000] [--json FILE]

Each size has a process of its own. While it runs, the memory of that driver and of everything it started (actors,
workers, raylet with the object store, Ray's own services) is sampled. The figure is the proportional set size, in
which a page that several processes share, as those of the object store, counts once; a sum of resident sizes would
count it for each. The chats are the same 2,000 again and again, with ids of their own, so that the longest text, on
which a batch's memory depends, is the same for every size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a Ray of this benchmark alone, on the loopback interface

import click
import psutil
import pyarrow as pa
import ray

from fac_ray.activations.measuring import extract_activations
from fac_ray.artifacts import write_json, write_table
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.coverage.reduction import reduce_coverage
from fac_ray.progress import Progress
from fac_ray.schema import SAMPLES, Message

MODEL = Path(__file__).parents[2] / "shared/models/stories260K"
HOOK_LAYER, D_MODEL, D_SAE, K = 3, 64, 2048, 8
NUM_CHATS, NUM_MESSAGES, NUM_CHARACTERS = 2000, 2, 150
"""Different chats; each is cut to its first messages, and these to their first characters."""
PART_ROWS = 2000
INTERVAL_S = 0.25
NUM_LARGEST = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        run_once(arguments.folder, arguments.measure)
        return
    report = compare(arguments.sizes)
    click.echo(json.dumps(report, indent=2))
    if arguments.json:
        write_json(arguments.json, report)


def compare(sizes: Sequence[int]) -> dict[str, Any]:
    """Peak memory of each size, and by how much that of the last exceeds that of the first."""
    from shapes import Shape, save_sae  # not above: what a driver does not need, its memory shall not hold

    with tempfile.TemporaryDirectory(prefix="fr", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        save_sae(Path(temporary) / "sae", Shape(d_model=D_MODEL, d_sae=D_SAE, k=K))
        for size in sizes:
            write_samples(Path(temporary) / f"{size}/samples", size)
        peaks = {str(size): watch(Path(temporary), size) for size in sizes}
    first, last = peaks[str(sizes[0])], peaks[str(sizes[-1])]
    kinds = ("driver_mib", "actors_and_tasks_mib", "services_mib", "total_mib")
    growth = {name: round(last[name] / first[name] - 1, 3) for name in kinds}
    return {"peaks": peaks, "growth_fraction": growth}


def watch(folder: Path, size: int) -> dict[str, Any]:
    """Run one size in a process of its own; returns the largest memory of each kind of process and of all together,
    and what the last was made of."""
    command = [sys.executable, __file__, "--measure", str(size), "--folder", str(folder)]
    started_s, peaks, at_peak = time.monotonic(), Counter[str](), Counter[str]()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            by_title = sample_memory(process.pid)
            sizes = by_kind(by_title)
            if sizes["total"] > peaks["total"]:
                at_peak = by_title
            peaks |= sizes  # the larger of the two, each
            time.sleep(INTERVAL_S)
    if process.returncode:
        raise SystemExit(f"the run of {size} chats failed")
    facts = json.loads((folder / f"{size}/facts.json").read_text())
    seconds = round(time.monotonic() - started_s, 1)
    mib = {f"{name}_mib": round(num / 2**20, 1) for name, num in peaks.items()}
    largest = {title: round(num / 2**20, 1) for title, num in at_peak.most_common(NUM_LARGEST)}
    return {**mib, "at_peak_mib": largest, "wall_s": seconds, **facts}


def sample_memory(driver: int) -> Counter[str]:
    """Proportional set size in bytes of the driver and of all that it started, by what a process calls itself and how
    many call themselves so."""
    sizes, nums = Counter[str](), Counter[str]()
    try:
        processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        return sizes
    for process in processes:
        try:
            size, name = process.memory_full_info().pss, " ".join(process.cmdline()).strip()
        except psutil.Error:  # it has ended meanwhile
            continue
        title = "driver" if process.pid == driver else name if name.startswith("ray::") else "services"
        sizes[title] += size
        nums[title] += 1
    return Counter({f"{nums[title]} x {title}": size for title, size in sizes.items()})


def by_kind(by_title: Counter[str]) -> Counter[str]:
    """The same of the driver, of actors and tasks, of Ray's services, and of all together."""
    sizes = Counter[str]()
    for title, size in by_title.items():
        sizes["actors_and_tasks" if " x ray::" in title else title.split(" x ")[1]] += size
    return sizes + Counter(total=sizes.total())


def run_once(folder: Path, size: int) -> None:
    """Measure and reduce `size` chats."""
    corpus = folder / str(size)
    config = run_config(folder)
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=400 << 20,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(corpus / "ray"),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    measured = extract_activations(corpus / "samples", corpus / "activations", config, Progress.silent())
    reduced = reduce_coverage(
        corpus / "activations", corpus / "samples", corpus / "coverage", config.measure, D_SAE, (), Progress.silent()
    )
    write_json(corpus / "facts.json", {**measured, "num_active_features": reduced["num_active_features"]})
    ray.shutdown()


def run_config(folder: Path) -> RunConfig:
    """One actor, so that every size has the same processes."""
    return config_from_tree(
        {
            "name": "memory",
            "model": {"path": str(MODEL), "hook_layer": HOOK_LAYER},
            "sae": {"path": str(folder / "sae")},
            "measure": {"num_actors": 1},
            "corpora": {"chats": {"path": "chats.jsonl"}},
        }
    )


def write_samples(folder: Path, size: int) -> None:
    """Write SAMPLES parts: the chats, cut, in turn until there are enough."""
    from shapes import CHATS, as_samples, read_chats, sample_row

    chats = as_samples([cut(chat) for chat in read_chats(CHATS, NUM_CHATS)])
    for first in range(0, size, PART_ROWS):
        rows = [sample_row(*chats[row % len(chats)], row) for row in range(first, min(first + PART_ROWS, size))]
        write_table(folder / f"{first:06d}.parquet", pa.Table.from_pylist(rows, SAMPLES))


def cut(chat: list[Message]) -> list[Message]:
    """The start of a chat."""
    return [Message(role=m["role"], content=m["content"][:NUM_CHARACTERS] or ".") for m in chat[:NUM_MESSAGES]]


if __name__ == "__main__":
    main()
