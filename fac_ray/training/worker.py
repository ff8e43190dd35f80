"""What each Ray Train worker does: the unfinished fits of a plan, one after the other, all workers together.

Arms come in as Parquet files in the plan's folder; each fit's held-out scores and metrics go out into a folder of its
own, whose marker is written last. So workers that are killed start again and go on with the fit they were at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.collective
import torch
import torch.distributed
from jaxtyping import Float, Int

from fac_ray.artifacts import Stage, read_table, write_json, write_table
from fac_ray.config import TrainingConfig
from fac_ray.evaluation.metrics import average_precision
from fac_ray.training.batches import encode, epoch_batches, pad, padding_id, pieces, scoring_batches
from fac_ray.training.engine import prepare_process, start_engine, training_dtype

SCORING_BATCH = 64
"""Samples of one forward pass when the held-out corpus is scored."""
MAX_LOSSES = 50
"""Points of a loss curve."""


class Fit(NamedTuple):
    """One model: an arm, the seed of its head and order, and the fingerprint of everything it depends on."""

    arm: str
    seed: int
    identity: str

    def stage(self, folder: Path) -> Stage:
        """The fit's folder, `<arm>-seed<k>`."""
        return Stage(folder / f"{self.arm}-seed{self.seed}", self.identity)


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know; the rows lie in `folder`/arms."""

    folder: Path
    fits: tuple[Fit, ...]
    model: str
    """Absolute folder or hub id."""
    hub_options: dict[str, Any]
    training: TrainingConfig

    def rows(self, name: str) -> pa.Table:
        """An arm, or `heldout`."""
        return read_table(self.folder / "arms" / f"{name}.parquet")


class Encoded(NamedTuple):
    """A table of samples, tokenised."""

    sample_ids: list[str]
    token_ids: list[list[int]]
    labels: Int[np.ndarray, " N"]

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each."""
        return np.array([len(row) for row in self.token_ids])


def run_fits(loop_config: dict[str, Any]) -> None:
    """Ray Train's loop of one worker: every fit of `loop_config["plan"]` that is not finished; reports after each."""
    device = prepare_process()
    plan = _with_dtype(loop_config["plan"], device)
    tokenizer = _tokenizer(plan)
    heldout = _encoded(plan, "heldout", tokenizer)
    unfinished = [fit for fit in plan.fits if not fit.stage(plan.folder).finished]
    for fit in ray.train.collective.broadcast_from_rank_zero(unfinished):
        metrics = _run_fit(plan, fit, _encoded(plan, fit.arm, tokenizer), heldout, padding_id(tokenizer), device)
        ray.train.report({key: metrics[key] for key in ("arm", "seed", "auprc")})


def _with_dtype(plan: Plan, device: torch.device) -> Plan:
    """The plan with its dtype decided, the same for all workers."""
    dtype = ray.train.collective.broadcast_from_rank_zero(training_dtype(plan.training.dtype, device))
    return replace(plan, training=plan.training.model_copy(update={"dtype": dtype}))


def _run_fit(plan: Plan, fit: Fit, arm: Encoded, heldout: Encoded, fill: int, device: torch.device) -> dict[str, Any]:
    started_s = time.monotonic()
    steps = _steps(plan.training, len(arm.labels), fit.seed)
    engine = start_engine(_classifier(plan, fit.seed, fill, device), plan.training, len(steps))
    losses = _train(engine, arm, steps, fill, device)
    scores = _score(engine, heldout, fill, device)
    engine.destroy()
    metrics = {
        "arm": fit.arm,
        "seed": fit.seed,
        "auprc": average_precision(heldout.labels, scores),
        "num_samples": len(arm.labels),
        "num_positive": int(arm.labels.sum()),
        "num_heldout": len(heldout.labels),
        "num_steps": len(steps),
        "dtype": plan.training.dtype,
        "loss": losses,
        "seconds": round(time.monotonic() - started_s, 3),
    }
    if ray.train.get_context().get_world_rank() == 0:
        _write(fit.stage(plan.folder), metrics, heldout, scores)
    return metrics


def _tokenizer(plan: Plan) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(plan.model, **plan.hub_options)


def _classifier(plan: Plan, seed: int, fill: int, device: torch.device) -> torch.nn.Module:
    """The model with a fresh head; the same head for the same seed, whatever the arm."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        plan.model,
        num_labels=1,
        dtype=getattr(torch, plan.training.dtype),
        attn_implementation="eager" if device.type == "cpu" else "sdpa",  # on a CPU the fused one is slower to train
        **plan.hub_options,
    )
    model.config.pad_token_id = fill
    _keep_scores_exact(model)
    return model


def _keep_scores_exact(model: torch.nn.Module) -> None:
    """Let the last layer compute in float32: in bfloat16 close scores become equal, and their order is the metric."""

    def exact(head: Any, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    heads[-1].register_forward_hook(exact)


def _encoded(plan: Plan, name: str, tokenizer: Any) -> Encoded:
    rows = plan.rows(name)
    token_ids = encode(tokenizer, rows["text"].to_pylist(), plan.training.max_tokens)
    return Encoded(rows["sample_id"].to_pylist(), token_ids, rows["label"].to_numpy())


def _steps(training: TrainingConfig, num_samples: int, seed: int) -> Int[np.ndarray, "steps batch_size"]:
    """Rows of every optimizer step, over all workers."""
    epochs = range(training.epochs)
    return np.concatenate([epoch_batches(num_samples, training.batch_size, seed, epoch) for epoch in epochs])


def _train(
    engine: Any, arm: Encoded, steps: Int[np.ndarray, "steps batch_size"], fill: int, device: torch.device
) -> list[float]:
    """One optimizer step for each row of `steps`, of which this worker takes its share; returns the loss curve."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    losses, lengths = torch.zeros(len(steps), device=device), arm.lengths
    engine.train()
    for step, rows in enumerate(steps):
        loss = _loss(engine, arm, pieces(lengths, rows[rank::num_workers]), fill, device)
        engine.backward(loss)
        engine.step()
        losses[step] = loss.detach()
    torch.distributed.all_reduce(losses)
    curve = losses.cpu().numpy() / num_workers
    return [round(float(span.mean()), 5) for span in np.array_split(curve, min(MAX_LOSSES, len(curve)))]


def _loss(
    engine: Any, arm: Encoded, parts: list[Int[np.ndarray, " piece"]], fill: int, device: torch.device
) -> Float[torch.Tensor, ""]:
    """Mean binary cross-entropy over the rows of all parts, each a forward pass of its own."""
    labels = torch.tensor(arm.labels[np.concatenate(parts)], dtype=torch.float32, device=device)
    logits = torch.cat([_logits(engine, arm, part, fill, device) for part in parts])
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)


@torch.no_grad()
def _score(engine: Any, heldout: Encoded, fill: int, device: torch.device) -> Float[np.ndarray, " N"]:
    """Log odds of being positive for each held-out row; each worker scores its share and gets all of them."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    engine.eval()
    batches = scoring_batches(heldout.lengths, SCORING_BATCH, rank, num_workers)
    mine = [(rows, _logits(engine, heldout, rows, fill, device).cpu().numpy()) for rows in batches]
    shares: list[Any] = [None] * num_workers
    torch.distributed.all_gather_object(shares, mine)
    scores = np.empty(len(heldout.labels), np.float32)
    for rows, values in (batch for share in shares for batch in share):
        scores[rows] = values
    return scores


def _logits(
    engine: Any, samples: Encoded, rows: Int[np.ndarray, " batch"], fill: int, device: torch.device
) -> torch.Tensor:
    token_ids, mask = pad([samples.token_ids[row] for row in rows], fill)
    return engine(input_ids=token_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, 0].float()


def _write(stage: Stage, metrics: dict[str, Any], heldout: Encoded, scores: Float[np.ndarray, " N"]) -> None:
    folder = stage.begin()
    columns = {"sample_id": heldout.sample_ids, "label": heldout.labels, "score": scores}
    write_table(folder / "scores.parquet", pa.table(columns))
    write_json(folder / "metrics.json", metrics)
    stage.finish(auprc=metrics["auprc"])
