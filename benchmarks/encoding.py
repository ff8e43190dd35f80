"""What SAE encoding with pooling costs beyond its own matrix product, and how much memory it takes.

    product      the product of a chunk of tokens with the encoder alone, in the precision of the Top-K
    fac_ray      exact native Top-K of the same tokens, and the maximum over the tokens of each sample
    torch_topk   the same through the product in float32, `torch.topk`, and the maxima
    product_float32, jumprelu, dense     the product in float32; with JumpReLU or ReLU of all features, and the maxima

    python benchmarks/encoding.py --json encoding.json
    python benchmarks/encoding.py --d-model 4096
    python benchmarks/encoding.py --d-model 4096 --device cuda

The ways take turns chunk by chunk, so that what else runs on the machine slows all of them; a figure is the median of
its chunks, a ratio the median of the chunks' ratios. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from stopwatch import count_cpu_time, timed
from torch import Tensor
from torch.nn import functional

from fac_ray.features.extractor import STRETCH_NUMBERS
from fac_ray.features.peaks import Peaks, dense_peaks, sparse_peaks
from fac_ray.features.sae import SparseAutoencoder
from fac_ray.features.topk import TopKProduct

TOKENS_OF_A_SAMPLE = 128
JUMP = 3.1
"""Threshold of JumpReLU, in standard deviations of the pre-activations: about one feature in a thousand is above it."""

PRODUCT_OF = {
    "fac_ray": "product",
    "torch_topk": "product",
    "jumprelu": "product_float32",
    "dense": "product_float32",
}
"""What each way is compared with."""


class Sizes(NamedTuple):
    """Of an SAE, and where it runs."""

    d_model: int
    d_sae: int
    k: int
    device: str


class Encoding:
    """An SAE with random weights, and the ways to the peaks of some tokens."""

    def __init__(self, d_model: int, d_sae: int, k: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        W_enc = torch.randn(d_model, d_sae, generator=generator) / d_model**0.5
        b_enc = 0.1 * torch.randn(d_sae, generator=generator)
        self.device, self.k, self.d_sae, self.d_model = device, k, d_sae, d_model
        b_in = 0.1 * torch.randn(d_model, generator=generator)
        self.sae = SparseAutoencoder(W_enc, b_enc, b_in, k=k).to(device)
        threshold = torch.full((d_sae,), JUMP)
        self.jumprelu_sae = SparseAutoencoder(W_enc, b_enc, b_in, threshold=threshold).to(device)
        self.chunk_tokens = max(1, STRETCH_NUMBERS["cuda" if device.startswith("cuda") else "cpu"] // d_sae)
        """As many as the extractor encodes at once."""
        self.dtype = torch.bfloat16 if TopKProduct.pays(self.sae.W_enc, k) else torch.float32
        """Of the product that the SAE runs."""
        self._weights, self._bias = self.sae.W_enc.t().contiguous().to(self.dtype), self.sae.b_enc.to(self.dtype)

    def tokens(self, num: int, seed: int = 1) -> Tensor:
        """Residual streams, rounded as a language model in bfloat16 gives them."""
        x = torch.randn(num, self.d_model, generator=torch.Generator().manual_seed(seed))
        return x.bfloat16().float().to(self.device)

    def product(self, x: Tensor) -> Tensor:
        """The product alone, as the SAE runs it: in bfloat16 where that finds the candidates, else in float32."""
        return functional.linear(x.to(self.dtype), self._weights, self._bias)

    def fac_ray(self, x: Tensor) -> list[Peaks]:
        """Top-K and pooling, as the extractor does for one chunk."""
        return list(sparse_peaks(*self.sae.top_k(x), self.bounds(x), self.d_sae))

    def torch_topk(self, x: Tensor) -> list[Peaks]:
        """The same through a selection over the whole width."""
        values, feature_ids = self.product_float32(x - self.sae.b_in).topk(self.k)
        return list(sparse_peaks(values.relu(), feature_ids, self.bounds(x), self.d_sae))

    def product_float32(self, x: Tensor) -> Tensor:
        """The product alone, in float32."""
        return torch.addmm(self.sae.b_enc, x, self.sae.W_enc)

    def jumprelu(self, x: Tensor) -> list[Peaks]:
        """Native activations of a JumpReLU SAE, and pooling."""
        return list(dense_peaks(self.jumprelu_sae.encode(x, "native"), self.bounds(x)))

    def dense(self, x: Tensor) -> list[Peaks]:
        """ReLU of every pre-activation, and pooling."""
        return list(dense_peaks(self.sae.encode(x, "dense"), self.bounds(x)))

    def bounds(self, x: Tensor) -> list[int]:
        """Where the samples of a chunk start, and its end."""
        return [*range(0, len(x), TOKENS_OF_A_SAMPLE), len(x)]


# ---- time ----


def measure_times(encoding: Encoding, num_chunks: int) -> dict[str, float]:
    """Seconds of each way for one chunk, and its ratio to the product alone."""
    ways = ("product", "product_float32", *PRODUCT_OF)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for chunk in range(num_chunks + 1):
        x = encoding.tokens(encoding.chunk_tokens, seed=chunk)
        for name in ways:
            seconds[name].append(timed(partial(getattr(encoding, name), x)))
    found = {f"{name}_s": statistics.median(values[1:]) for name, values in seconds.items()}  # the first one warms up
    for name, product in PRODUCT_OF.items():
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds[product][1:], strict=True)]
        found[f"{name}_over_{product}"] = statistics.median(ratios)
    found["operations_per_s_of_product"] = (
        2 * encoding.chunk_tokens * encoding.d_model * encoding.d_sae / found["product_s"]
    )
    return found


# ---- equal results ----


def max_abs_difference(encoding: Encoding) -> float:
    """Between the maxima of `fac_ray` and `torch_topk` over one chunk, features that only one of them has included."""
    x = encoding.tokens(encoding.chunk_tokens, seed=7)
    difference = 0.0
    for a, b in zip(encoding.fac_ray(x), encoding.torch_topk(x), strict=True):
        scores = torch.zeros(2, encoding.d_sae)
        for row, peaks in zip(scores, (a, b), strict=True):
            row[torch.from_numpy(peaks.feature_ids)] = torch.from_numpy(peaks.activations)
        difference = max(difference, float((scores[0] - scores[1]).abs().max()))
    return difference


# ---- memory ----


def measure_memory(sizes: Sizes, chunks: Sequence[int]) -> dict[str, int]:
    """Bytes that encoding takes at its peak, beyond weights and the residual stream, by the number of tokens."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for num_chunks in chunks:
        with spawn.Pool(1) as pool:
            num_tokens, num_bytes = pool.apply(_peak_bytes, (sizes, num_chunks))
        found[f"{num_tokens} tokens"] = num_bytes
    return found


def _peak_bytes(sizes: Sizes, num_chunks: int) -> tuple[int, int]:
    """(tokens, bytes) in this process, which must not have encoded anything yet."""
    encoding = Encoding(*sizes)
    encoding.fac_ray(encoding.tokens(1))
    x = encoding.tokens(num_chunks * encoding.chunk_tokens)
    before = _held_bytes(sizes.device, reset=True)
    for chunk in x.split(encoding.chunk_tokens):
        encoding.fac_ray(chunk)
    return len(x), _held_bytes(sizes.device, reset=False) - before


def _held_bytes(device: str, reset: bool) -> int:
    """Bytes held now (`reset`), or at the peak since then."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())
    if reset:
        # 5: start the peak again from what is held now (Linux, proc(5))
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    [peak_kib] = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return 1024 * int(peak_kib)


# ---- the report ----


def main() -> None:
    """Measure, print, and write the figures where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--num-chunks", type=int, default=12, help="rounds; each runs every way on one chunk of tokens")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cpu-time", action="store_true", help="one thread and its processor time, on a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        count_cpu_time()
    sizes = Sizes(options.d_model, options.d_sae, options.k, options.device)
    memory = measure_memory(sizes, chunks=(1, 4, 16))
    encoding = Encoding(*sizes)
    figures = {
        **sizes._asdict(),
        "dtype_of_product": str(encoding.dtype).removeprefix("torch."),
        "chunk_tokens": encoding.chunk_tokens,
        "chunk_bytes_in_float32": 4 * encoding.chunk_tokens * encoding.d_sae,
        "threads": torch.get_num_threads(),
        **measure_times(encoding, options.num_chunks),
        "max_abs_difference": max_abs_difference(encoding),
        "peak_bytes": memory,
    }
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
