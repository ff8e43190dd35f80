"""One classifier for each arm and seed: arms and a held-out corpus come in, a folder with scores for each fit goes out.

All fits run in one Ray Train job whose workers go through them together, so the start of the workers is paid once
and a killed worker costs the fit it was at, not those before it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
from ray.train.torch import TorchTrainer

import fac_ray
from fac_ray.artifacts import fingerprint, write_table
from fac_ray.config import ConfigError, RunConfig, TrainingConfig
from fac_ray.progress import Progress
from fac_ray.training.arms import labels_of, repeated_contents
from fac_ray.training.worker import Fit, Plan, run_fits

MAX_FAILURES = 2
"""Worker deaths after which the training gives up; each restarts all workers at the first unfinished fit."""


def train_arms(
    config: RunConfig, arms: dict[str, pa.Table], heldout: pa.Table, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Fit a classifier on each arm with each of `training.seeds` and score the held-out corpus with it.

    Writes `folder`/<arm>-seed<k>/ with scores.parquet (sample_id, label 0/1, score: log odds of being positive) and
    metrics.json (auprc, loss curve, sizes, seconds); fits that are finished already, with the same arm, held-out
    corpus, model and settings, are skipped. `folder` must be seen by all workers.

    Returns:
        Facts: num_fits, num_skipped, num_workers, gpu, and for each arm num_samples, num_positive, origins.

    Raises:
        ConfigError: `training.batch_size` is not a multiple of `training.num_workers`, or there is no such model.
        ValueError: the held-out corpus has no labels or one class only, or an arm holds one of its contents.
        RuntimeError: the workers failed for good.
    """
    training = _checked(config.training)
    rows = _labelled_heldout(heldout, config)
    _refuse_leaks(arms, rows)
    plan = _plan(config, training, arms, rows, Path(folder).absolute())
    for name, table in {**arms, "heldout": rows}.items():
        write_table(plan.folder / "arms" / f"{name}.parquet", table)
    num_skipped = sum(fit.stage(plan.folder).finished for fit in plan.fits)
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    if num_skipped < len(plan.fits):
        with _counted(plan, progress):
            _fit(plan, use_gpu)
    return {
        "num_fits": len(plan.fits),
        "num_skipped": num_skipped,
        "num_workers": training.num_workers,
        "gpu": use_gpu,
        "arms": {name: _arm_facts(arm) for name, arm in arms.items()},
    }


def _checked(training: TrainingConfig | None) -> TrainingConfig:
    if training is None:
        raise ConfigError("training: the config says null; give the section (it may be empty: {})")
    if training.batch_size % training.num_workers:
        raise ConfigError(
            f"training.batch_size: {training.batch_size} cannot be shared equally by {training.num_workers} workers; "
            "give a multiple of training.num_workers"
        )
    return training


def _labelled_heldout(heldout: pa.Table, config: RunConfig) -> pa.Table:
    """Columns sample_id, text, label 0/1 of the held-out rows that have a label."""
    name = config.evaluation.heldout
    rows = heldout.filter(pc.is_valid(heldout["label"]))
    positive = pc.is_in(rows["label"], pa.array(config.relevance.positive, pa.string())).cast(pa.int8())
    if rows.num_rows == 0:
        raise ValueError(
            f"{name}: no sample has a label, and scoring needs them; name the column in corpora.{name}.label"
        )
    if len(pc.unique(positive)) < 2:
        raise ValueError(
            f"{name}: its {rows.num_rows} labelled samples are of one class; "
            f"relevance.positive says which labels are positive, now {list(config.relevance.positive)}"
        )
    return pa.table({"sample_id": rows["sample_id"], "text": rows["text"], "label": positive})


def _refuse_leaks(arms: dict[str, pa.Table], heldout: pa.Table) -> None:
    for name, arm in arms.items():
        if num_repeated := repeated_contents(arm, heldout):
            raise ValueError(
                f"arm {name}: {num_repeated} samples have the text of a held-out one; give build_arms the held-out rows"
            )


def _plan(
    config: RunConfig, training: TrainingConfig, arms: dict[str, pa.Table], heldout: pa.Table, folder: Path
) -> Plan:
    model, hub_options = _model(config, training)
    common = {
        "version": fac_ray.__version__,
        "heldout": _content(heldout),
        "model": [model, hub_options],
        "training": training.model_dump(exclude={"arms", "seeds"}),
    }
    fits = tuple(
        Fit(name, seed, fingerprint(**common, arm=_content(arm), seed=seed))
        for seed in training.seeds
        for name, arm in arms.items()
    )
    return Plan(folder, fits, model, hub_options, training)


def _model(config: RunConfig, training: TrainingConfig) -> tuple[str, dict[str, Any]]:
    """Where the model is and how it is loaded; its settings are read here, because workers would try three times."""
    from transformers import AutoConfig

    given = training.model or config.model.path
    path = Path(given).expanduser()
    source = str(path.absolute()) if path.is_dir() else given
    options = {
        "revision": (config.model.revision if training.model is None else None) or "main",
        "trust_remote_code": config.model.trust_remote_code,
    }
    try:
        AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        key = "model.path" if training.model is None else "training.model"
        raise ConfigError(f"{key} {given!r}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return source, options


def _content(rows: pa.Table) -> str:
    return fingerprint(rows=rows.select(["sample_id", "text", "label"]).to_pylist())


def _fit(plan: Plan, use_gpu: bool) -> None:
    """Run the workers until every fit of the plan is finished."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # a busy or growing cluster takes minutes
    storage = plan.folder / "ray"
    shutil.rmtree(storage, ignore_errors=True)
    trainer = TorchTrainer(
        run_fits,
        train_loop_config={"plan": plan},
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.training.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": int(use_gpu)}
        ),
        run_config=ray.train.RunConfig(
            name="fits",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"training failed: {_reason(error)}") from error
    shutil.rmtree(storage)


def _reason(error: Exception) -> str:
    """The last line of the first worker's error, which names its type."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, first = min(failures.items())
    return f"worker {rank}: {str(first).strip().splitlines()[-1]}"


@contextmanager
def _counted(plan: Plan, progress: Progress) -> Iterator[None]:
    """Show the number of finished fits while the workers, which are other processes, go through them."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            progress.set(sum(fit.stage(plan.folder).finished for fit in plan.fits))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        progress.set(sum(fit.stage(plan.folder).finished for fit in plan.fits))


def _arm_facts(arm: pa.Table) -> dict[str, Any]:
    return {
        "num_samples": arm.num_rows,
        "num_positive": int(labels_of(arm).sum()),
        "origins": dict(Counter(arm["origin"].to_pylist())),
    }
