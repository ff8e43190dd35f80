"""The k largest of a row are those of a full sort, equals by position, however few candidates were looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.features.sae import SparseAutoencoder
from fac_ray.features.topk import BLOCK, TopKProduct, _block_maxima, _candidates, _positive_block_maxima, top_k

WIDE = 4096
"""64 blocks: enough for blocks to tell something about up to 16 values."""


def by_sorting(rows, k):
    """Descending by value, then ascending by position, NaN first: numpy, row by row."""
    values = rows.double().numpy()
    missing = np.isnan(values)
    numbers = np.where(missing, 0, values)
    order = [np.lexsort((np.arange(rows.shape[1]), -row, ~nan)) for row, nan in zip(numbers, missing, strict=True)]
    return torch.from_numpy(np.stack(order)[:, :k])


def assert_top_k(rows, k):
    values, positions = top_k(rows, k)
    expected = by_sorting(rows, k)
    assert torch.equal(positions, expected)
    torch.testing.assert_close(values, rows.gather(1, expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [7, 48, 1000, WIDE, WIDE + 1])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_the_largest_are_those_of_a_full_sort(width, k):
    assert_top_k(torch.randn(9, width, generator=torch.Generator().manual_seed(width)), k)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 40), k=st.integers(1, 16))
def test_of_equals_the_first_come_first(seed, levels, k):
    """Few distinct numbers: ties within blocks, between blocks, and across the whole row (levels = 1)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(levels, (4, WIDE), generator=generator).float() - 2
    assert_top_k(rows, k)
    assert_top_k(rows[:, :40], k)  # no blocks


def test_many_more_values_than_blocks():
    assert_top_k(torch.randn(3, WIDE), WIDE // BLOCK + 9)
    assert_top_k(torch.randn(3, 128), 128)


def test_not_a_number_is_the_largest_and_infinities_are_numbers():
    rows = torch.randn(5, WIDE)
    rows[0, 77] = rows[1, ::7] = float("nan")
    rows[2, 5], rows[3, 5] = float("inf"), float("-inf")
    rows[4] = float("-inf")
    assert_top_k(rows, 9)
    assert_top_k(rows[:, :100], 9)  # no blocks
    assert_top_k(rows[:, :100], 100)


def test_few_candidates_are_looked_at():
    rows = torch.randn(64, 16 * WIDE, generator=torch.Generator().manual_seed(0))
    maxima = _block_maxima(rows)
    candidates, whole = _candidates(rows, maxima, maxima.topk(20, dim=1).values[:, -1])
    assert not whole.any()
    assert len(candidates.row) < 64 * 30


def weights(d_model=96, d_sae=WIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_model, d_sae, generator=generator)
    return W_enc, torch.randn(d_sae, generator=generator), torch.randn(50, d_model, generator=generator)


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_product_found_through_bfloat16_is_that_of_float32(k, scale):
    W_enc, b_enc, x = weights()
    values, positions = TopKProduct(W_enc, b_enc, k)(x * scale)
    expected = torch.addmm(b_enc, x * scale, W_enc).topk(k)
    torch.testing.assert_close(values, expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(positions, expected.indices)


def test_rounding_that_hides_the_largest_is_seen_through():
    """1.0 and 1.001 are one number in bfloat16 (steps of 2^-7 = 0.0078): weights that differ by less are told apart.

    Feature 64j has the weight 1 + j / 10,000 on the one input, all others have 0: the largest four are j = 63 .. 60.
    """
    W_enc = torch.zeros(1, WIDE)
    W_enc[0, ::BLOCK] = 1 + torch.arange(WIDE // BLOCK) / 10_000
    assert W_enc.bfloat16().unique().numel() < 5
    values, positions = TopKProduct(W_enc, torch.zeros(WIDE), 4)(torch.ones(1, 1))
    assert positions.tolist() == [[63 * BLOCK, 62 * BLOCK, 61 * BLOCK, 60 * BLOCK]]
    torch.testing.assert_close(values, torch.tensor([[1.0063, 1.0062, 1.0061, 1.0060]]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_true_value_falls_below_the_bound(seed):
    """Inputs with a few large numbers, as residual streams have, and features of very different norms."""
    W_enc, b_enc, x = weights(seed=seed)
    x[:, :2] *= 100
    W_enc *= torch.logspace(-2, 1, WIDE)
    h = torch.addmm(b_enc, x, W_enc)
    values, _ = TopKProduct(W_enc, b_enc, 8)(x)
    torch.testing.assert_close(values, h.topk(8).values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [-100.0, -25.0, 0.0])
def test_values_below_zero_are_ordered_as_those_above(bias):
    """By bits as integers -2 stands above -1; rows of which few blocks, or none, hold a number above 0."""
    W_enc, b_enc, x = weights()
    values, positions = TopKProduct(W_enc, b_enc + bias, 16)(x)
    expected = torch.addmm(b_enc + bias, x, W_enc).topk(16)
    assert (bias == 0) == bool((expected.values > 1).all())
    torch.testing.assert_close(values, expected.values, rtol=1e-5, atol=1e-4)
    assert torch.equal(positions, expected.indices)


def test_bits_as_integers_give_the_maxima_above_zero():
    rows = torch.randn(20, WIDE, generator=torch.Generator().manual_seed(3)).bfloat16()
    rows[5:10] = -rows[5:10].abs()
    rows[10:, ::7] = 0
    rows[10:12] = -0.0
    exact, found = _block_maxima(rows), _positive_block_maxima(rows)
    assert torch.equal(found[exact > 0], exact[exact > 0])
    assert (found[exact <= 0] <= exact[exact <= 0]).all()


def test_an_input_that_is_not_finite_spoils_its_own_row_alone():
    W_enc, b_enc, x = weights()
    product = TopKProduct(W_enc, b_enc, 4)
    clean = product(x)
    x[3, 0], x[5, 1] = float("nan"), float("inf")
    values, positions = product(x)
    assert not values[[3, 5]].isfinite().all(dim=1).any()
    kept = [i for i in range(len(x)) if i not in (3, 5)]
    assert torch.equal(positions[kept], clean[1][kept])
    assert torch.equal(values[kept], clean[0][kept])


def test_fewer_positive_values_than_k_are_filled_up_with_zeros():
    """Only features 0 and 64 are ever positive; the SAE gives the other k - 2 as 0."""
    W_enc, b_enc = torch.zeros(2, WIDE), torch.full((WIDE,), -1.0)
    W_enc[:, 0], W_enc[:, 64] = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    sae = SparseAutoencoder(W_enc, b_enc, torch.zeros(2), k=5)
    values, feature_ids = sae.top_k(torch.ones(1, 2))
    assert values.tolist() == [[2.0, 1.0, 0.0, 0.0, 0.0]]
    assert feature_ids[0, :2].tolist() == [64, 0]


def test_the_sparse_and_the_dense_way_of_an_sae_agree():
    W_enc, b_enc, x = weights()
    sae = SparseAutoencoder(W_enc, b_enc, torch.zeros(96), k=16)
    values, feature_ids = sae.top_k(x)
    dense = torch.zeros(len(x), WIDE).scatter(1, feature_ids, values)
    torch.testing.assert_close(dense, sae.encode(x, "native"), rtol=1e-5, atol=1e-5)
