"""SAELens' trainer, set up from a config, with checkpoints from which it goes on as if it had never stopped.

A checkpoint is what SAELens writes (weights, optimizer, schedules, counts) and what the next batches depend on: the
shuffle buffer, torch's random numbers and the position in the stream. It appears whole, by a rename, or not at all.

    checkpoints/<step>/  cfg.json  sae_weights.safetensors  trainer_state.pt  activation_scaler.json      (SAELens)
                         stream.safetensors  stream.json
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fac_ray.config import ModelConfig, SaeTrainingConfig
from fac_ray.sae_training.mixing import BufferState, MixingBuffer, Position

NUM_NORM_BATCHES = 8
"""Batches whose mean norm scales the activations to sqrt(d_model); the scale ends up in the weights."""


def make_trainer(training: SaeTrainingConfig, model: ModelConfig, d_model: int, device: str) -> Any:
    """A `SAETrainer` over an SAE with fresh weights; seeds torch. It has no data of its own."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(training.seed)
    num_steps = training.num_steps
    cfg = SAETrainerConfig(
        total_training_samples=num_steps * training.batch_tokens,
        train_batch_size_samples=training.batch_tokens,
        lr=training.learning_rate,
        lr_end=training.learning_rate,
        adam_beta2=training.adam_beta2,
        lr_warm_up_steps=num_steps // 20 if num_steps >= 40 else 0,
        lr_decay_steps=num_steps // 4,
        device=device,
        autocast=True,  # matrix products in bfloat16, sums in float32
        dead_feature_window=training.dead_steps,
        feature_sampling_window=num_steps + 1,  # one window: its figures are for a log that nobody reads
        n_batches_for_norm_estimate=NUM_NORM_BATCHES,
    )
    return SAETrainer(cfg=cfg, sae=_fresh_sae(training, model, d_model, device), data_provider=iter(()))


def train_steps(trainer: Any, buffer: MixingBuffer) -> Iterator[int]:
    """SAELens' `fit` as an iterator: after each optimizer step the number of tokens so far.

    At its end the weights take raw activations: the scale and the decoder's norms are folded in.
    """
    scaler = trainer.activation_scaler
    if scaler.scaling_factor is None:
        scaler.estimate_scaling_factor(trainer.sae.cfg.d_in, buffer, NUM_NORM_BATCHES)
    while trainer.n_training_samples < trainer.cfg.total_training_samples:
        trainer.step(next(buffer))
        trainer.n_training_steps += 1
        yield trainer.n_training_samples
    trainer.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    trainer.sae.fold_W_dec_norm()
    trainer.set_final_sae_metadata()


def save_checkpoint(folder: Path, trainer: Any, state: BufferState, seconds: float) -> None:
    """Write a checkpoint and remove the older ones. `seconds`: time spent on training so far."""
    part, whole = folder / ".part", folder / f"{trainer.n_training_steps:09d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    trainer.sae.save_model(part)
    trainer.save_trainer_state(part)
    tensors = {"serving": state.serving, "kept": state.kept, "random": torch.get_rng_state()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "stream.safetensors")
    counts = {"position": state.position, "num_skipped": state.num_skipped, "seconds": seconds}
    (part / "stream.json").write_text(json.dumps(counts))
    older = _checkpoints(folder)
    if whole not in older:
        os.rename(part, whole)
    for checkpoint in older:
        if checkpoint != whole:
            shutil.rmtree(checkpoint)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a training to go on with."""
    return bool(_checkpoints(folder))


def load_stream_state(folder: Path) -> tuple[BufferState, float]:
    """What the next batches depend on, at the newest checkpoint, and the seconds spent before it."""
    checkpoint = _checkpoints(folder)[-1]
    tensors, counts = load_file(checkpoint / "stream.safetensors"), json.loads((checkpoint / "stream.json").read_text())
    state = BufferState(tensors["serving"], tensors["kept"], Position(*counts["position"]), counts["num_skipped"])
    return state, counts["seconds"]


def restore_trainer(folder: Path, trainer: Any) -> None:
    """Bring a new trainer, and torch's random numbers, to the newest checkpoint."""
    checkpoint = _checkpoints(folder)[-1]
    trainer.sae.load_weights_from_checkpoint(checkpoint)
    trainer.load_trainer_state(checkpoint)
    torch.set_rng_state(load_file(checkpoint / "stream.safetensors")["random"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _fresh_sae(training: SaeTrainingConfig, model: ModelConfig, d_model: int, device: str) -> Any:
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    make, make_config = get_sae_training_class(training.architecture.replace("-", ""))
    metadata = SAEMetadata(model_name=Path(model.path).name, hook_name=f"blocks.{model.hook_layer - 1}.hook_resid_post")
    return make(
        make_config(
            d_in=d_model,
            d_sae=training.d_sae,
            device=device,
            normalize_activations="expected_average_only_in",
            decoder_init_norm=training.decoder_init_norm,
            metadata=metadata,
            **_sparsity(training),
        )
    )


def _sparsity(training: SaeTrainingConfig) -> dict[str, Any]:
    """SAELens' settings of how many features may be active; a loss for it sets in over a quarter of the steps."""
    num_warmup = training.num_steps // 4
    match training.architecture:
        case "topk" | "batch-topk":
            return training.sparsity
        case "jumprelu":
            return {
                "jumprelu_sparsity_loss_mode": "quadratic",
                "target_l0": float(training.sparsity["k"]),
                "l0_warm_up_steps": num_warmup,
            }
        case _:
            return {**training.sparsity, "l1_warm_up_steps": num_warmup}
