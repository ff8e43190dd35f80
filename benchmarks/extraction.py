"""Tokens per second of feature extraction on shape M, beside other ways to the same numbers and the machine's limit.

    authors_procedure   one text at a time, float32, the whole model with a hook, dense encode, maximum over tokens
    padded_saelens      padded batches of 32, the whole model with a hook, SAELens's own encode; bfloat16
    fac_ray             the extractor; bfloat16
    limit               needed operations over the measured rate of matrix products; bfloat16

bfloat16 where the machine multiplies it faster than float32, else float32. Rounds alternate between the ways, so that
what else runs on the machine slows all of them; a figure is the median of its rounds, a ratio that of the rounds'
ratios. The slow ways take every n-th chat.

    python benchmarks/extraction.py --json extraction.json
    python benchmarks/extraction.py --device cuda --shape llama-3.1-8b
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from shapes import CHATS, SHAPES, Shape, as_samples, load_whole_model, read_chats, save_model, save_sae
from stopwatch import Stopwatch, count_cpu_time, timed
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

import fac_ray.features.extractor
from fac_ray.config import MeasureConfig, ModelConfig, SaeConfig
from fac_ray.features.chat import TokenizedSample, tokenize, windows
from fac_ray.features.extractor import FeatureExtractor, SampleFeatures
from fac_ray.features.headers import shared_header

AUTHORS_CHATS, PADDED_CHATS, PADDED_BATCH = 12, 32, 32
"""Chats of a round; evenly spaced among all, so that their lengths are alike."""
RATE_TOKENS = 2048
"""Rows of the products whose rate counts as the machine's."""


class Work(NamedTuple):
    """What is measured: the chats, and their tokens as the extractor reads them."""

    samples: list
    tokenized: list[TokenizedSample]
    model: Path
    sae: Path
    shape: Shape
    device: str

    def tokens(self) -> int:
        """Tokens of all chats, without padding."""
        return sum(len(sample.token_ids) for sample in self.tokenized)

    def every(self, num: int) -> Work:
        """About `num` of the chats, evenly spaced."""
        step = max(1, len(self.samples) // num)
        return self._replace(samples=self.samples[::step][:num], tokenized=self.tokenized[::step][:num])


def prepare(folder: Path, shape: Shape, device: str, num_chats: int) -> Work:
    """Write model and SAE of the shape to the folder, and tokenize the chats."""
    chats = read_chats(CHATS, num_chats)
    model, sae = save_model(folder / "model", shape, chats), save_sae(folder / "sae", shape)
    tokenizer, measure = PreTrainedTokenizerFast.from_pretrained(model), MeasureConfig().resolved()
    samples = as_samples(chats)
    return Work(samples, [tokenize(tokenizer, *sample, measure) for sample in samples], model, sae, shape, device)


def extractor(work: Work, dtype: torch.dtype, **switches: str) -> FeatureExtractor:
    """The project's own."""
    name = str(dtype).removeprefix("torch.")
    model = ModelConfig.model_validate({"path": str(work.model), "hook_layer": work.shape.hook_layer, "dtype": name})
    measure = MeasureConfig.model_validate(switches)
    return FeatureExtractor(model, SaeConfig(path=str(work.sae)), measure, device=work.device)


# ---- the other ways: each gives, text by text, the maximum over the pooled tokens of every feature ----


@contextmanager
def hooked(model: Any, hook_layer: int) -> Iterator[list[Tensor]]:
    """A list that holds the residual stream after the hook's block when the model has run."""
    kept: list[Tensor] = []
    block = model.model.layers[hook_layer - 1]
    handle = block.register_forward_hook(
        lambda _block, _inputs, output: kept.append(output if isinstance(output, Tensor) else output[0])
    )
    try:
        yield kept
    finally:
        handle.remove()


@torch.inference_mode()
def authors_procedure(work: Work, model: Any, sae: Any) -> list[Tensor]:
    """One text at a time; ReLU of every pre-activation."""
    found = []
    for sample in work.tokenized:
        with hooked(model, work.shape.hook_layer) as kept:
            model(input_ids=torch.from_numpy(sample.token_ids)[None].to(work.device))
        h = (kept[0][0] - sae.b_dec) @ sae.W_enc + sae.b_enc
        found.append(h.relu()[torch.from_numpy(sample.pooled).to(work.device)].max(dim=0).values.cpu())
    return found


@torch.inference_mode()
def padded_saelens(work: Work, model: Any, sae: Any) -> list[Tensor]:
    """Padded batches in the order of the file."""
    found = []
    for first in range(0, len(work.tokenized), PADDED_BATCH):
        batch = work.tokenized[first : first + PADDED_BATCH]
        longest = max(len(sample.token_ids) for sample in batch)
        token_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, pooled = torch.zeros_like(token_ids), torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, sample in enumerate(batch):
            num_tokens = len(sample.token_ids)
            token_ids[row, :num_tokens] = torch.from_numpy(sample.token_ids)
            mask[row, :num_tokens] = 1
            pooled[row, :num_tokens] = torch.from_numpy(sample.pooled)
        with hooked(model, work.shape.hook_layer) as kept:
            model(input_ids=token_ids.to(work.device), attention_mask=mask.to(work.device))
        features = sae.encode(kept[0])
        found += list(features.masked_fill(~pooled[..., None].to(work.device), 0).amax(dim=1).float().cpu())
    return found


def whole_model(work: Work, dtype: torch.dtype) -> Any:
    """All blocks and the head."""
    model: Any = load_whole_model(work.model, dtype)  # else the type checker wants a model where `to` takes a device
    return model.to(work.device)


def saelens(work: Work, dtype: torch.dtype) -> torch.nn.Module:
    """The SAE as SAELens loads it."""
    from sae_lens import SAE

    return SAE.load_from_disk(str(work.sae), device=work.device, dtype=str(dtype).removeprefix("torch.")).eval()


# ---- the limit ----


def matrix_rate(work: Work, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of the large products that the extraction needs: of an MLP and of an SAE."""
    width, inner = work.shape.d_model, work.shape.d_mlp
    products = ((width, inner), (inner, width), (width, work.shape.d_sae))
    return max(_product_rate(*sizes, dtype, work.device) for sizes in products)


@torch.inference_mode()
def _product_rate(width: int, num_columns: int, dtype: torch.dtype, device: str, repeats: int = 3) -> float:
    x = torch.randn(RATE_TOKENS, width, device=device).to(dtype)
    weight = torch.randn(num_columns, width, device=device).to(dtype)
    times = [timed(lambda: functional.linear(x, weight)) for _ in range(repeats + 1)]
    return 2 * RATE_TOKENS * width * num_columns / statistics.median(times[1:])


def needed_operations(shape: Shape, tokenized: Sequence[TokenizedSample]) -> float:
    """Multiplications and additions of the matrices up to the hook for every token, of causal attention, and of the
    encoder for every pooled token. The first tokens that all chats share, and none pools, are needed once."""
    lengths = np.array([len(sample.token_ids) for sample in tokenized], dtype=float)
    whole = [window for sample in tokenized for window in windows(sample, len(sample.token_ids), None)]
    num_shared = len(shared_header(whole))
    num_saved = num_shared * (len(tokenized) - 1)
    blocks = 2 * shape.hook_layer * shape.block_weights * (lengths.sum() - num_saved)
    pairs = (lengths * (lengths + 1) / 2).sum() - num_saved * (num_shared + 1) / 2
    attention = 4 * shape.hook_layer * shape.d_model * pairs
    encoder = 2 * shape.d_model * shape.d_sae * sum(int(sample.pooled.sum()) for sample in tokenized)
    return float(blocks + attention + encoder)


# ---- measuring ----


def measure_rates(work: Work, dtype: torch.dtype, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each way, by round."""
    authors, padded = work.every(AUTHORS_CHATS), work.every(PADDED_CHATS)
    whole, whole_fast = whole_model(work, torch.float32), whole_model(work, dtype)
    sae, sae_fast, ours = saelens(work, torch.float32), saelens(work, dtype), extractor(work, dtype)
    ways: dict[str, tuple[Work, Callable[[], object]]] = {
        "authors_procedure": (authors, lambda: authors_procedure(authors, whole, sae)),
        "padded_saelens": (padded, lambda: padded_saelens(padded, whole_fast, sae_fast)),
        "fac_ray": (work, lambda: ours.extract(work.samples)),
    }
    ours.extract(work.samples[:4])
    rates: dict[str, list[float]] = {name: [] for name in (*ways, "limit")}
    operations = needed_operations(work.shape, work.tokenized)
    for _ in range(repeats):
        limits = [matrix_rate(work, dtype)]
        for name, (part, run) in ways.items():
            rates[name].append(part.tokens() / timed(run))
            limits.append(matrix_rate(work, dtype))
        rates["limit"].append(work.tokens() * statistics.median(limits) / operations)
    return rates


def stages(work: Work, dtype: torch.dtype) -> dict[str, float]:
    """Share of each stage in the time of one extraction on one thread, as each lane runs."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = extractor(work, dtype)
    ours.extract(work.samples[:4])
    watch = Stopwatch()
    watch.time(fac_ray.features.extractor, "tokenize", "tokenize")
    watch.time(ours.backbone, "residual", "backbone: norms, rotations, gates, sums")
    watch.time(ours.sae, "top_k", "Top-K")
    watch.time(fac_ray.features.extractor, "sparse_peaks", "pooling")
    watch.time(functional, "scaled_dot_product_attention", "backbone: attention")
    for owner, product in ((functional, "linear"), (torch, "addmm")):
        watch.time(owner, product, {"Top-K": "SAE product", "backbone": "backbone: matrix products"})
    with watch:
        ours.extract(work.samples)
    torch.set_num_threads(num_threads)
    return watch.shares(rest="rest")


# ---- equal results ----


def differences(work: Work, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """How far the extractor's activations are from those of the other ways, at equal precision."""
    work = work.every(AUTHORS_CHATS)
    whole, sae = whole_model(work, torch.float32), saelens(work, torch.float32)
    exact = padded_saelens(work, whole, sae)
    found = {
        "float32, authors_procedure": _difference(
            authors_procedure(work, whole, sae),
            extractor(work, torch.float32, activation="dense").extract(work.samples),
        ),
        "float32, padded_saelens": _difference(exact, extractor(work, torch.float32).extract(work.samples)),
    }
    if dtype != torch.float32:
        whole, sae = whole_model(work, dtype), saelens(work, dtype)
        ours, padded = extractor(work, dtype).extract(work.samples), padded_saelens(work, whole, sae)
        found["bfloat16, padded_saelens"] = _difference(padded, ours)
        found["fac_ray in bfloat16 from float32"] = _difference(exact, ours)
        found["padded_saelens in bfloat16 from float32"] = _difference(exact, padded)
    return found


def _difference(expected: Sequence[Tensor], found: Sequence[SampleFeatures] | Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute difference, and the same over the features that both have above 0, which rounding near the
    last of the Top-K does not decide; with the share of the features that both have."""
    a, b = torch.stack(list(expected)), torch.stack([_dense(one, len(expected[0])) for one in found])
    both, either = (a > 0) & (b > 0), (a > 0) | (b > 0)
    return {
        "max_abs_difference": float((a - b).abs().max()),
        "max_abs_difference_of_common": float((a - b)[both].abs().max()),
        "mean_abs_difference_of_common": float((a - b)[both].abs().mean()),
        "common_fraction": float(both.sum() / either.sum()),
        "largest_activation": float(a.max()),
    }


def _dense(features: SampleFeatures | Tensor, d_sae: int) -> Tensor:
    if isinstance(features, Tensor):
        return features
    scores = torch.zeros(d_sae)
    scores[torch.from_numpy(features.feature_ids).long()] = torch.from_numpy(features.activations)
    return scores


# ---- the report ----


def report(work: Work, repeats: int) -> dict:
    """All figures."""
    dtype = fast_dtype(work.device)
    by_round = measure_rates(work, dtype, repeats)
    rates = {name: statistics.median(values) for name, values in by_round.items()}
    compared = differences(work, dtype)
    ratios = {
        name: [ours / other for ours, other in zip(by_round["fac_ray"], by_round[name], strict=True)]
        for name in rates
        if name != "fac_ray"
    }
    return {
        "tokens_per_s": rates,
        "tokens_per_s_by_round": by_round,
        "fac_ray_over": {name: statistics.median(values) for name, values in ratios.items()},
        "max_abs_difference": max(
            compared[f"float32, {way}"]["max_abs_difference"] for way in ("authors_procedure", "padded_saelens")
        ),
        "differences": compared,
        "stage_fractions": stages(work, dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if work.device == "cuda" else "cpu",
        "num_chats": len(work.samples),
        "num_tokens": work.tokens(),
        "num_pooled_tokens": sum(int(sample.pooled.sum()) for sample in work.tokenized),
        "chats_of_a_round": {
            "authors_procedure": AUTHORS_CHATS,
            "padded_saelens": PADDED_CHATS,
            "fac_ray": len(work.samples),
        },
        "threads": torch.get_num_threads(),
    }


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU and where the processor has instructions for it."""
    capabilities = torch.cpu.get_capabilities()
    fast = device == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def main() -> None:
    """Measure, print, and write the figures where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--num-chats", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every way once")
    parser.add_argument("--shape", choices=SHAPES, default="m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="one thread and its processor time, on a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        count_cpu_time()
    with tempfile.TemporaryDirectory() as folder:
        figures = report(
            prepare(Path(folder), SHAPES[options.shape], options.device, options.num_chats), options.repeats
        )
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
