"""One classifier and its optimizer under DeepSpeed ZeRO: a model goes in, an engine that steps it comes out.

The process group is Ray Train's own. Without a GPU nothing is compiled at run time, so no compiler is needed.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from fac_ray.config import TrainingConfig


def prepare_process() -> torch.device:
    """The worker's device, with DeepSpeed told of it and the cores of the node shared out. Comes before all else."""
    import ray.train
    import ray.train.torch

    num_local_workers = ray.train.get_context().get_local_world_size()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = str(num_local_workers)
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, by g++, at every start
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_workers))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()  # else each fit reports that its head is new
    transformers_logging.disable_progress_bar()
    return ray.train.torch.get_device()


def training_dtype(given: str, device: torch.device) -> str:
    """`float32` or `bfloat16`; for `auto` the faster one on this device. Without its instructions bfloat16 crawls."""
    if given != "auto":
        return given
    capable = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if capable else "float32"


def start_engine(model: torch.nn.Module, training: TrainingConfig, num_steps: int) -> Any:
    """A DeepSpeed engine over the model: AdamW, linear warmup and decay over `num_steps`, gradients clipped at 1."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(
            _parameter_groups(model, training.weight_decay), lr=training.learning_rate, fused=True
        ),
        lr_scheduler=lambda optimizer: _schedule(optimizer, num_steps, training.warmup_fraction),
        config=deepspeed_config(training, sum(p.numel() for p in model.parameters())),
        dist_init_required=False,
    )
    return engine


def deepspeed_config(training: TrainingConfig, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, for a dtype that is decided. Its default buckets would reserve gigabytes."""
    bucket = min(num_parameters, 500_000_000)
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // training.num_workers,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": training.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }


def learning_rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the peak learning rate at a 0-based step: up over `num_warmup` steps, then down to 0 at `num_steps`."""
    falling = (num_steps - step) / max(1, num_steps - num_warmup)
    return max(0.0, min((step + 1) / num_warmup, falling, 1.0))


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases and norms, which have one dimension, without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _schedule(optimizer: Any, num_steps: int, warmup_fraction: float) -> torch.optim.lr_scheduler.LambdaLR:
    num_warmup = max(1, round(num_steps * warmup_fraction))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps, num_warmup))
