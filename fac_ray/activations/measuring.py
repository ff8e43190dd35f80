"""A corpus is measured: SAMPLES parts come in, ACTIVATIONS parts go out, on Ray Data.

    read -> blocks of some hundred samples -> pool of actors, each with the language model and the SAE -> write

Ray Data commits the `sample_id`s of each part after the part is whole. A run that was interrupted, whatever the way,
goes on with the samples that are not committed: no row twice, none lost. So does a corpus that has got more files; the
rows of samples that it has lost are removed. A sample that kills its process is set aside (`quarantine`).

    activations/<corpus>/  <part>.parquet ...  _checkpoint/ (committed ids)  _tries/ (while it is measured)
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.checkpoint import CheckpointConfig

from fac_ray.activations.parts import (
    CHECKPOINT_FOLDER,
    Totals,
    committed_errors,
    committed_ids,
    committed_totals,
    unmeasured_parts,
)
from fac_ray.activations.quarantine import forget_ends, measure_guarded
from fac_ray.artifacts import parquet_files
from fac_ray.config import ConfigError, MeasureConfig, ModelConfig, RunConfig, SaeConfig

if TYPE_CHECKING:
    from fac_ray.progress import Progress

TRIES_FOLDER = "_tries"
"""Where the actors note what they are about to measure."""

MAX_BLOCK_SAMPLES, MIN_BLOCK_SAMPLES = 1024, 128
"""Samples of a part, which is what an interruption costs each actor. An actor gets them at once, to group them by
length: with little padding, chats make batches of 1,600 tokens out of 1,024 samples, of 760 out of 128, of 570 out of
64 on a CPU; on a GPU, which needs larger ones, of 3,600, 1,900 and 1,300."""
BLOCKS_PER_ACTOR = 8
"""Parts that a small corpus is cut into for each actor, so that all of them have work to the end."""

PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": {
        f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("feature_ids", "activations", "peak_start", "peak_end")
    },
}
"""How parts are written. Numbers that seldom recur gain nothing from a dictionary; with their first bytes together,
then their second ones, and so on, parts are a quarter smaller and are read a third faster."""

SPARE_CPUS = 3
"""CPUs that a pool leaves to the tasks around it: one reads, one drops what is committed, one writes."""
WAIT_FOR_CAPACITY_S = 24 * 3600
"""How long a run may stand still, because a cluster that waits for GPUs does."""
POLL_S = 0.5

logger = logging.getLogger(__name__)


class Extraction:
    """The feature extractor as an actor of a pool: SAMPLES batches in, ACTIVATIONS batches out."""

    def __init__(
        self, model: dict[str, Any], sae: dict[str, Any], measure: dict[str, Any], num_threads: int | None, tries: Path
    ) -> None:
        """Load model and SAE from dumped configs; `num_threads` of the CPU, None: as torch decides; `tries`: the
        folder for notes of what is being measured."""
        import torch

        from fac_ray.features.extractor import FeatureExtractor

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._tries, self._unusable = tries, ""
        try:
            self._extractor = FeatureExtractor(ModelConfig(**model), SaeConfig(**sae), MeasureConfig(**measure))
        except ConfigError as error:  # raised from here it would make Ray start the actor again and again
            self._unusable = str(error)

    def __call__(self, samples: pa.Table) -> pa.Table:
        if self._unusable:
            raise ConfigError(self._unusable)
        return measure_guarded(samples, self.measure, self._tries)

    def measure(self, samples: pa.Table) -> pa.Table:
        """One ACTIVATIONS row for each sample."""
        import torch

        try:
            return self._extractor.extract_table(samples)
        except torch.AcceleratorError:
            logger.exception("the device fails every later call of this process; a new process goes on")
            os._exit(1)


class Pool(NamedTuple):
    """How many extraction actors run and what each of them takes."""

    num_actors: int
    num_gpus: float
    num_cpus: float
    num_threads: int | None
    """CPU threads of one actor; None on a GPU."""


def extract_activations(
    samples_folder: Path, output_folder: Path, config: RunConfig, progress: Progress
) -> dict[str, Any]:
    """Measure every sample that is not measured yet; returns num_samples, num_tokens, num_sinks, num_errors,
    num_truncated and tokens_per_s (of this attempt). The progress counts committed samples. All workers must see both
    folders.

    Raises:
        FileNotFoundError: `samples_folder` holds no Parquet file.
        ConfigError: model, SAE and switches do not fit together, or the cluster has too few CPUs.
        RuntimeError: the rows that were written are not as many as the samples, or more than
            `run.max_rejected_fraction` of the samples could not be measured.
        OSError: the folder cannot be written.
    """
    sources = parquet_files(samples_folder.resolve())
    if not sources:
        raise FileNotFoundError(f"{samples_folder}: no Parquet file here")
    num_samples = sum(pq.read_metadata(path).num_rows for path in sources)
    output_folder = output_folder.resolve()
    unmeasured = unmeasured_parts(output_folder, sources)
    before, started_s = committed_totals(output_folder), time.monotonic()
    if unmeasured:
        forget_ends(output_folder / TRIES_FOLDER)
        with _following(output_folder, progress):
            _run(unmeasured, output_folder, config)
    totals, seconds = committed_totals(output_folder), time.monotonic() - started_s
    progress.set(totals.num_samples)
    if totals.num_samples != num_samples:
        raise RuntimeError(
            f"{output_folder}: {totals.num_samples} rows were written for {num_samples} samples; "
            + ("run again to go on" if totals.num_samples < num_samples else "remove the folder and run again")
        )
    _check_errors(output_folder, totals, config.run.max_rejected_fraction)
    shutil.rmtree(output_folder / TRIES_FOLDER, ignore_errors=True)
    return {**totals._asdict(), "tokens_per_s": round((totals.num_tokens - before.num_tokens) / max(seconds, 1e-3), 1)}


def plan_pool(
    num_actors: int | None, num_blocks: int, cluster: Mapping[str, float], num_nodes: int, cores: int
) -> Pool:
    """The pool for a cluster of those resources; never more actors than blocks of samples.

    By default one actor for each GPU, or where there is none for every two CPUs. `cores`: CPUs of this machine, which
    count on a cluster of one node, because there Ray may have been told of more. More actors than GPUs share them.

    Raises:
        ConfigError: the cluster has one CPU, which a resumed run would wait for for ever.
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    if cpus < 2:
        raise ConfigError(f"the Ray cluster has {cpus:g} CPU; the extraction needs 2 (`ray start --num-cpus 2`)")
    real_cpus = min(cpus, cores) if num_nodes == 1 else cpus
    actors = min(num_actors or max(1, int(gpus or real_cpus // 2)), max(1, num_blocks))
    num_cpus = min(1.0, _floor(max(0.0, cpus - SPARE_CPUS) / actors))
    if gpus:
        return Pool(actors, min(1.0, _floor(gpus / actors)), num_cpus, None)
    return Pool(actors, 0.0, num_cpus, max(1, int(real_cpus // actors)))


def _check_errors(output_folder: Path, totals: Totals, limit_fraction: float) -> None:
    if totals.num_errors <= limit_fraction * totals.num_samples:
        return
    common = ", ".join(f"{reason} ({num})" for reason, num in committed_errors(output_folder).most_common(3))
    raise RuntimeError(
        f"{output_folder}: {totals.num_errors} of {totals.num_samples} samples could not be measured; "
        f"run.max_rejected_fraction allows {limit_fraction:g} of them. Most common: {common}. Allow more, or change "
        "what is wrong, remove the folder and run again"
    )


def _run(parts: list[tuple[Path, int]], output_folder: Path, config: RunConfig) -> None:
    """Measure what is not measured in parts of samples, each with the number of such samples."""
    num_samples = sum(num for _, num in parts)
    most = max(1, math.ceil(num_samples / MIN_BLOCK_SAMPLES))
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    pool = plan_pool(config.measure.num_actors, most, ray.cluster_resources(), num_nodes, os.cpu_count() or 1)
    block_samples = math.ceil(num_samples / (pool.num_actors * BLOCKS_PER_ACTOR))
    block_samples = max(MIN_BLOCK_SAMPLES, min(MAX_BLOCK_SAMPLES, block_samples))
    with _checkpointed(output_folder), _config_errors():
        samples = ray.data.read_parquet(
            [str(path) for path, _ in parts],
            columns=["sample_id", "text", "messages"],
            concurrency=min(len(parts), pool.num_actors + 1),  # a reader feeds many actors, and is a process more
        )
        samples.repartition(target_num_rows_per_block=block_samples).map_batches(
            Extraction,
            fn_constructor_kwargs={
                "model": config.model.model_dump(),
                "sae": config.sae.model_dump(),
                "measure": config.measure.model_dump(),
                "num_threads": pool.num_threads,
                "tries": output_folder / TRIES_FOLDER,
            },
            batch_size=block_samples,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.num_actors, max_concurrent_calls_per_actor=2),
            num_gpus=pool.num_gpus,
            num_cpus=pool.num_cpus,
            udf_modifying_row_count=False,
        ).write_parquet(str(output_folder), mode=ray.data.SaveMode.APPEND, **PARQUET)


@contextmanager
def _checkpointed(output_folder: Path) -> Iterator[None]:
    """Datasets that are made and written inside the block commit their rows, or fail; the process's own context stays
    as it is."""
    checkpoint = CheckpointConfig(
        id_column="sample_id",
        checkpoint_path=str(output_folder / CHECKPOINT_FOLDER),
        delete_checkpoint_on_success=False,  # an interruption before the stage is marked as finished must find it
    )
    # each of these takes a CPU, and a small cluster has none to give away
    checkpoint.checkpoint_actor_pool_max_size = max(1, min(10, int(ray.cluster_resources()["CPU"] // 8)))
    context = ray.data.DataContext.get_current().copy()
    context.checkpoint_config = checkpoint
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = WAIT_FOR_CAPACITY_S
    context.use_datasource_v2 = False  # it starts actors that read footers, which costs more than our few parts do
    context.max_consecutive_actor_init_deaths = 3  # a machine may go away, or its memory
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*support checkpointing.*")
        yield


@contextmanager
def _config_errors() -> Iterator[None]:
    """A ConfigError of an actor as itself, not as the failed task around it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, ConfigError):
            raise
        raise ConfigError(str(error.cause)) from error


@contextmanager
def _following(output_folder: Path, progress: Progress) -> Iterator[None]:
    """Inside the block the progress shows how many samples are committed."""
    stop = threading.Event()

    def follow() -> None:
        counted: dict[Path, int] = {}
        while not stop.wait(POLL_S):
            for ids in committed_ids(output_folder):
                if ids not in counted:
                    counted[ids] = pq.read_metadata(ids).num_rows
            progress.set(sum(counted.values()))

    follower = threading.Thread(target=follow, name="activations-progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def _floor(value: float) -> float:
    """Ray counts fractions of a resource in steps of 1/10,000."""
    return math.floor(value * 1e4) / 1e4
