"""The k largest of each row, exactly, without a selection over the whole row, and without its product in float32.

A row is cut into blocks. The k-th largest of the blocks' maxima is no larger than the row's k-th largest value, since
k blocks hold a number that large. So every one of the k largest is at least that, and few others are: one pass that
reads the row, and a selection among a few candidates. A row of few blocks is left to `torch.topk`.

`TopKProduct` takes the candidates from a product in bfloat16, with a bound on its rounding errors, and computes these
alone in float32:

    |x . w - x' . w'| <= |x - x'| |w| + |x'| |w - w'|        x', w': rounded to bfloat16 (Cauchy and Schwarz)
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int, Shaped
from torch import Tensor
from torch.nn import functional

BLOCK = 64
"""Numbers of a block."""
MAX_BLOCKS = 256
"""Blocks of a row that are looked into; where more could hold one of the k largest, the whole row is sorted."""
MIN_BLOCKS_PER_K = 4
"""With fewer blocks for each of the k values than that, blocks tell too little, and the row is selected from."""

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""Largest relative error of rounding one number."""


class Candidates(NamedTuple):
    """Positions in some rows, by row and then by position; C in all."""

    row: Int[Tensor, " C"]
    position: Int[Tensor, " C"]
    bounds: Int[Tensor, " N_plus_1"]
    """Row r has the candidates from bounds[r] to bounds[r + 1]."""


def top_k(rows: Float[Tensor, "N d"], k: int) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """(values, positions) of the k largest numbers of each row, descending; of equals the first come first.

    NaN counts as larger than any number. `torch.topk` gives the same values, and decides arbitrarily between equals.
    """
    if not _blocks_tell(rows.shape[1], k):
        return _selected_top_k(rows, k)
    maxima = _block_maxima(rows)
    floor = maxima.topk(k, dim=1).values[:, -1]
    candidates, whole = _candidates(rows, maxima, floor)
    values, positions = _select(rows[candidates.row, candidates.position], candidates, k)
    if whole.any():
        values[whole], positions[whole] = _sorted_top_k(rows[whole], k)
    return values, positions


class TopKProduct:
    """The k largest of each row of `x @ W_enc + b_enc` in float32, found through a product in bfloat16."""

    def __init__(self, W_enc: Float32[Tensor, "d_model d_sae"], b_enc: Float32[Tensor, " d_sae"], k: int) -> None:
        """`W_enc` is kept as it is if its columns are contiguous, else copied."""
        self.k, self.b_enc = k, b_enc
        self.by_feature = W_enc.t().contiguous()
        self._rounded, self._rounded_bias = self.by_feature.bfloat16(), b_enc.bfloat16()
        self._largest_norm = self.by_feature.norm(dim=1).max()
        self._largest_error = (self.by_feature - self._rounded).norm(dim=1).max()
        self._bias_error = (b_enc - self._rounded_bias).abs().max()
        with warnings.catch_warnings():  # torch says once in a process that CSR tensors are in beta
            warnings.filterwarnings("ignore", message=".*CSR.*beta")
            torch.zeros(1, 1).to_sparse_csr()

    @staticmethod
    def pays(W_enc: Float32[Tensor, "d_model d_sae"], k: int) -> bool:
        """Whether the machine multiplies bfloat16 matrices faster than float32, and blocks tell enough.

        On a GPU the candidates' own product has no kernel of the needed kind, so a GPU takes the plain way.
        """
        fast = W_enc.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        return bool(fast) and _blocks_tell(W_enc.shape[1], k)

    def __call__(self, x: Float32[Tensor, "N d_model"]) -> tuple[Float32[Tensor, "N k"], Int[Tensor, "N k"]]:
        """(values, positions), descending, of equals the first first; what `top_k` gives for the whole product."""
        rounded = x.bfloat16()
        rows = functional.linear(rounded, self._rounded, self._rounded_bias)
        maxima = _positive_block_maxima(rows).float()
        floor = self._floor(x, rounded.float(), maxima)
        if not (floor > 0).all():
            maxima = _block_maxima(rows).float()
            floor = self._floor(x, rounded.float(), maxima)
        candidates, whole = _candidates(rows, maxima, floor)
        values, positions = _select(self._values(x, candidates), candidates, self.k)
        if whole.any():
            product = torch.addmm(self.b_enc, x[whole], self.by_feature.t())
            values[whole], positions[whole] = _sorted_top_k(product, self.k)
        return values, positions

    def _floor(
        self,
        x: Float32[Tensor, "N d_model"],
        rounded: Float32[Tensor, "N d_model"],
        maxima: Float32[Tensor, "N blocks"],
    ) -> Float32[Tensor, " N"]:
        """What a rounded value must reach to be one of the k largest in float32, if the blocks hold `maxima`.

        Rounding of the operands, of the sums and, in proportion to itself, of the result.
        """
        kth = maxima.topk(self.k, dim=1).values[:, -1]
        norm = rounded.norm(dim=1)
        operands = (x - rounded).norm(dim=1) * self._largest_norm + norm * self._largest_error
        sums = 2 * x.shape[1] * UNIT_ROUNDOFF[torch.float32] * (x.norm(dim=1) + norm) * self._largest_norm
        error = operands + sums + self._bias_error
        relative = 2 * UNIT_ROUNDOFF[torch.bfloat16]  # twice: the sum without and with the bias
        least = kth - error - relative * kth.abs()
        return least - error - relative * least.abs()

    def _values(self, x: Float32[Tensor, "N d_model"], candidates: Candidates) -> Float32[Tensor, " C"]:
        zeros = torch.zeros(len(candidates.position))
        pattern = torch.sparse_csr_tensor(
            candidates.bounds, candidates.position, zeros, (len(x), len(self.b_enc)), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(pattern, x, self.by_feature.t(), beta=0.0).values()
        return products + self.b_enc[candidates.position]


def _blocks_tell(width: int, k: int) -> bool:
    return width % BLOCK == 0 and width // BLOCK >= MIN_BLOCKS_PER_K * k


def _block_maxima(rows: Shaped[Tensor, "N d"]) -> Shaped[Tensor, "N blocks"]:
    return rows.view(len(rows), -1, BLOCK).amax(dim=-1)


def _positive_block_maxima(rows: BFloat16[Tensor, "N d"]) -> BFloat16[Tensor, "N blocks"]:
    """Maxima of the blocks that hold a number above 0; of others some number below or equal.

    By the bits as integers, six times as fast: in that order the positive numbers stand as they do by value, above the
    negative ones.
    """
    return _block_maxima(rows.view(torch.int16)).view(torch.bfloat16)


def _candidates(
    rows: Float[Tensor, "N d"], maxima: Float[Tensor, "N blocks"], floor: Float[Tensor, " N"]
) -> tuple[Candidates, Bool[Tensor, " N"]]:
    """Where rows are not below their floor, and the rows without candidates, of which all has to be looked at."""
    reached = ~(maxima < floor[:, None])
    whole = (reached.sum(dim=1) > MAX_BLOCKS) | ~floor.isfinite()
    row, block = (reached & ~whole[:, None]).nonzero(as_tuple=True)
    inside = rows.view(-1, BLOCK)[row * maxima.shape[1] + block]
    pair, offset = (~(inside < floor[row, None])).nonzero(as_tuple=True)
    row, position = row[pair], block[pair] * BLOCK + offset
    counts = torch.bincount(row, minlength=len(rows))
    return Candidates(row, position, functional.pad(counts.cumsum(dim=0), (1, 0))), whole


def _select(
    values: Float[Tensor, " C"], candidates: Candidates, k: int
) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The k largest candidates of each row; rows without candidates hold nothing of meaning."""
    row, position, bounds = candidates
    width = max(k, int(bounds.diff().max())) if len(bounds) > 1 else k
    column = torch.arange(len(row), device=row.device) - bounds[row]
    table = values.new_full((len(bounds) - 1, width), -math.inf).index_put((row, column), values)
    largest = table.sort(dim=1, descending=True, stable=True)
    places = position.new_zeros(table.shape).index_put((row, column), position)
    return largest.values[:, :k].contiguous(), places.gather(1, largest.indices[:, :k])


def _selected_top_k(rows: Float[Tensor, "N d"], k: int) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """By torch's selection; rows whose next value is not below the k-th one are sorted."""
    found = rows.topk(min(k + 1, rows.shape[1]), dim=1)
    ascending = found.indices[:, :k].sort(dim=1).values
    values, order = rows.gather(1, ascending).sort(dim=1, descending=True, stable=True)
    positions = ascending.gather(1, order)
    unclear = ~(found.values[:, k - 1 : -1] > found.values[:, k:]).all(dim=1)
    if unclear.any():
        values[unclear], positions[unclear] = _sorted_top_k(rows[unclear], k)
    return values, positions


def _sorted_top_k(rows: Float[Tensor, "N d"], k: int) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    values, positions = rows.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), positions[:, :k].contiguous()
