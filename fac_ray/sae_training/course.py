"""The course of a training, from a config to the finished SAE folder.

The calling process reads the corpora and shows the progress; one Ray task holds the trainer, on a GPU where there is
one, and draws its batches from the pool of backbones.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import ray

from fac_ray import __version__
from fac_ray.artifacts import Stage, fingerprint
from fac_ray.config import ConfigError, RunConfig
from fac_ray.corpus.sources import source_fingerprint
from fac_ray.progress import Progress
from fac_ray.sae_training.card import write_card
from fac_ray.sae_training.figures import measure_sae
from fac_ray.sae_training.mixing import Block, BufferState, MixingBuffer, Position
from fac_ray.sae_training.stream import Pool, plan_stream, residual_blocks
from fac_ray.sae_training.texts import Texts, groups_of_a_reading, held_back_rows, write_texts
from fac_ray.sae_training.trainer import (
    NUM_NORM_BATCHES,
    has_checkpoint,
    load_stream_state,
    make_trainer,
    restore_trainer,
    save_checkpoint,
    train_steps,
)

NUM_REPORTS = 200
"""How often the trainer says how far it is."""

PATIENCE_S = 60.0
"""How long a trainer waits for the one of a killed command to end."""


def train_sae(config: RunConfig) -> dict[str, Any]:
    """The card of the SAE at `sae.path`, which is trained unless it is there already; see docs/sae-training.md.

    Needs a Ray that is connected; all its nodes must see the run folder and `sae.path`.

    Raises:
        ConfigError: the model or a corpus cannot be read, or something else lies at `sae.path`.
        ValueError: there are too few usable texts.
        RuntimeError: another process is training in the run folder.
    """
    folder, work = Path(config.sae.path).expanduser().resolve(), config.folder.resolve() / "sae_training"
    identity = _identity(config)
    if (card := _card_of(folder)) is not None and card["fingerprint"] == identity:
        return card
    if folder.exists():
        raise ConfigError(
            f"sae.path {config.sae.path}: something is here already, and not the SAE of this config; "
            "move it away or name another folder"
        )
    work.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work.parent / ".sae_training.lock"):
        Stage(work, identity).begin(keep_partial=True)
        texts = write_texts(config, work)
        with Progress("sae training", total=_total_tokens(config), unit="tokens") as progress:
            for num_tokens in _remote_training(config, texts, work, folder, identity):
                progress.set(num_tokens)
        shutil.rmtree(work / "checkpoints")
    card = _card_of(folder)
    assert card is not None
    return card


def _remote_training(config: RunConfig, texts: Path, work: Path, folder: Path, identity: str) -> Iterator[int]:
    gpus = ray.cluster_resources().get("GPU", 0.0)
    trainer_gpus = 1.0 if gpus >= 2 else gpus / 2
    pool = plan_stream(config, trainer_gpus)
    training: Any = ray.remote(num_returns="streaming", max_retries=0, num_gpus=trainer_gpus, num_cpus=1)(_training)
    for report in training.remote(config.model_dump(mode="json"), texts, work, folder, identity, pool):
        yield ray.get(report)


def _training(tree: dict[str, Any], texts: Path, work: Path, folder: Path, identity: str, pool: Pool) -> Iterator[int]:
    """In the trainer's process: from the last checkpoint to the finished folder. Yields the tokens trained on."""
    import torch

    config, started_s = RunConfig.model_validate(tree), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # the other half is for the backbones
    training, checkpoints, length = config.sae_training, work / "checkpoints", len(Texts(texts))
    with _locked(work / ".trainer.lock", PATIENCE_S):
        state, seconds = load_stream_state(checkpoints) if has_checkpoint(checkpoints) else (None, 0.0)
        started_s -= seconds
        wanted = training.num_tokens + NUM_NORM_BATCHES * training.batch_tokens + training.buffer_tokens
        with closing(residual_blocks(config, texts, pool, state.position if state else Position(), wanted)) as stream:
            trainer, buffer = _continued(config, stream, checkpoints, state, device)
            yield from _steps(config, checkpoints, trainer, buffer, started_s)
        facts = {
            "num_steps": trainer.n_training_steps,
            "num_texts": length,
            "num_readings": round(buffer.state.position.group / groups_of_a_reading(length), 3),
            "num_skipped": buffer.state.num_skipped,
            "seconds": round(time.monotonic() - started_s, 1),
        }
        _publish(config, trainer.sae, texts, folder, {"fingerprint": identity, "training": facts})


def _continued(
    config: RunConfig, stream: Iterator[Block], checkpoints: Path, state: BufferState | None, device: str
) -> tuple[Any, MixingBuffer]:
    """The trainer and its buffer: at the last checkpoint, whose state is given, or new ones."""
    training = config.sae_training
    if state is not None:
        d_model = state.kept.shape[1]
    else:
        first = next(stream)
        d_model, stream = first.residual.shape[1], chain([first], stream)
    trainer = make_trainer(training, config.model, d_model, device)
    if state is not None:
        restore_trainer(checkpoints, trainer)
    return trainer, MixingBuffer(stream, training.buffer_tokens, training.batch_tokens, state)


def _steps(config: RunConfig, checkpoints: Path, trainer: Any, buffer: MixingBuffer, started_s: float) -> Iterator[int]:
    """The steps of the training, with a checkpoint from time to time and one at the end."""
    training = config.sae_training
    report_steps = max(1, training.num_steps // NUM_REPORTS)
    for num_tokens in train_steps(trainer, buffer):
        before = num_tokens - training.batch_tokens
        due = num_tokens // training.checkpoint_tokens > before // training.checkpoint_tokens
        if due or num_tokens == _total_tokens(config):
            save_checkpoint(checkpoints, trainer, buffer.state, time.monotonic() - started_s)
        if trainer.n_training_steps % report_steps == 0:
            yield num_tokens


def _publish(config: RunConfig, sae: Any, texts: Path, folder: Path, card: dict[str, Any]) -> None:
    """The SAE and its card, complete, at `sae.path` by a rename."""
    from sae_lens import SAE

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    sae.save_inference_model(part)
    device, lines = str(sae.device), Texts(texts)
    held_back = [lines[row] for row in held_back_rows(len(lines))]
    figures = measure_sae(SAE.load_from_disk(part, device=device), config.model, held_back, device)
    described = {
        "model": {"name": Path(config.model.path).name, "hook_layer": config.model.hook_layer},
        "figures": figures,
        "recipe": _recipe(config),
        "corpora": {name: corpus.path for name, corpus in config.corpora.items()},
    }
    write_card(part, card | described)
    os.rename(part, folder)


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The settings on which the weights depend, with defaults filled in and without what the architecture lacks."""
    training = config.sae_training
    settings = training.model_dump(mode="json", exclude={"num_actors", "checkpoint_tokens", "k", "l1_coefficient"})
    return settings | training.sparsity


def _total_tokens(config: RunConfig) -> int:
    return config.sae_training.num_steps * config.sae_training.batch_tokens


def _identity(config: RunConfig) -> str:
    """Hash of all that the weights depend on: the texts, the model's files and the recipe."""
    model = Path(config.model.path)
    files = sorted(path for path in model.rglob("*") if path.is_file()) if model.is_dir() else []
    return fingerprint(
        stage="sae_training",
        version=__version__,
        model=[config.model.model_dump(), [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]],
        corpora={name: source_fingerprint(corpus) for name, corpus in config.corpora.items()},
        max_rejected_fraction=config.run.max_rejected_fraction,
        recipe=_recipe(config),
    )


def _card_of(folder: Path) -> dict[str, Any] | None:
    path = folder / "card.json"
    return json.loads(path.read_text()) if path.is_file() else None


@contextmanager
def _locked(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Holds a lock that ends with its process, however it ends.

    Raises:
        RuntimeError: another process holds it for longer than the patience.
    """
    deadline_s = time.monotonic() + patience_s
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline_s:
                    raise RuntimeError(
                        f"{path.parent}: another process is training here; wait for it or end it"
                    ) from error
                time.sleep(0.2)
        yield
