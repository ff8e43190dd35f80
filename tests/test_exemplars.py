"""The strongest samples of each feature, whatever the parts, and spans that hold the peak."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fac_ray.coverage import exemplars
from fac_ray.coverage.exemplars import ExemplarsFold, TopExemplars, span_of, strengths, strongest, weakest_equal
from fac_ray.schema import ACTIVATIONS

D_SAE = 4


def table_of(rows):
    records = [
        {
            "sample_id": sample_id,
            "feature_ids": sorted(features),
            "activations": [features[i] for i in sorted(features)],
            "peak_start": [10 * i for i in sorted(features)],
            "peak_end": [10 * i + 3 for i in sorted(features)],
            "num_tokens": 1,
            "truncated": False,
            "error": None,
        }
        for sample_id, features in rows
    ]
    return pa.Table.from_pylist(records, ACTIVATIONS)


def top_of(rows, num_kept=2):
    return TopExemplars.from_rows(table_of(rows), num_kept, D_SAE)


def brute_force(rows, num_kept=2):
    strongest = []
    for feature in range(D_SAE):
        pairs = [(-features[feature], sample_id) for sample_id, features in rows if feature in features]
        strongest += [(feature, -minus, sample_id) for minus, sample_id in sorted(pairs)[:num_kept]]
    return strongest


def listed(top):
    return list(zip(*(top.rows[name].to_pylist() for name in ("feature_id", "activation", "sample_id")), strict=True))


rows = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.dictionaries(st.integers(0, D_SAE - 1), st.sampled_from([0.25, 0.5, 1.0, 3.0])),
    max_size=8,
).map(lambda d: list(d.items()))


@settings(max_examples=80, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_the_top_equals_a_sorted_list_for_every_order_and_partition(rows, random):
    expected = brute_force(rows)
    random.shuffle(rows)
    cut = random.randint(0, len(rows))
    parts = [top_of(rows[:cut]), top_of(rows[cut:]), TopExemplars.empty(2)]
    assert listed(top_of(rows)) == expected
    assert listed(parts[0].merge(parts[1])) == expected
    assert listed(TopExemplars.merge_all(parts[::-1])) == expected


@settings(max_examples=80, deadline=None)
@given(rows, st.integers(1, 4), st.integers(0, 9))
def test_folding_rows_a_few_at_a_time_equals_a_sorted_list(rows, num_at_once, min_waiting):
    fold = ExemplarsFold(2, D_SAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exemplars, "MIN_WAITING", min_waiting)  # merges come early, late or not before the end
        for first in range(0, len(rows), num_at_once):
            fold.fold(table_of(rows[first : first + num_at_once]))
    assert listed(fold.result()) == brute_force(rows)


def test_many_pairs_of_a_wide_dictionary_equal_a_sorted_list():
    # ids above 2^16 and keys above 2^32 take three passes of 16 bits
    random = np.random.default_rng(0)
    ids, d_sae = np.sort(random.choice(200_000, 50, replace=False)), 200_000
    rows = [
        (f"{sample:02x}" * 16, {int(i): float(a) for i, a in zip(ids, random.choice([0.5, 1, 2, 3], 50), strict=True)})
        for sample in random.permutation(60)
    ]
    fold = ExemplarsFold(3, d_sae)
    for first in range(0, 60, 7):
        fold.fold(table_of(rows[first : first + 7]))
    expected = [
        (int(feature), -minus, sample)
        for feature in ids
        for minus, sample in sorted((-features[feature], sample) for sample, features in rows)[:3]
    ]
    assert listed(fold.result()) == expected


def test_equal_activations_go_to_the_smaller_sample_id():
    assert listed(top_of([("b", {1: 1.0}), ("c", {1: 2.0}), ("a", {1: 1.0})])) == [(1, 2.0, "c"), (1, 1.0, "a")]


def test_activations_that_differ_in_their_last_bits_are_equals():
    # a bfloat16 has 8 significant bits: near 1 its neighbours are 1/128 apart, and 1 + 1/300 is nearer to 1
    assert listed(top_of([("b", {1: 1 + 1 / 300}), ("a", {1: 1.0})], num_kept=1)) == [(1, 1.0, "a")]
    assert listed(top_of([("b", {1: 1 + 1 / 200}), ("a", {1: 1.0})], num_kept=1)) == [(1, pytest.approx(1.005), "b")]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2.0**90, width=32))
@example(0.0)
@example(1 + 1 / 256)  # halfway between two bfloat16
def test_the_weakest_equal_is_the_smallest_float_of_its_strength(activation):
    weakest = weakest_equal(np.array([activation], np.float32))
    assert weakest <= np.float32(activation)
    assert strengths(weakest) == strengths(np.array([activation], np.float32))
    below = np.nextafter(weakest, np.float32(-1))
    assert weakest == 0 or strengths(below) < strengths(weakest)


def test_rows_with_more_columns_are_ordered_by_the_same_rule():
    made = [(2, 1.0, "a", "w"), (1, 1.0, "b", "x"), (1, 1 + 1 / 300, "c", "y"), (1, 3.0, "d", "z")]
    rows = pa.table(dict(zip(("feature_id", "activation", "sample_id", "span"), zip(*made, strict=True), strict=True)))
    rows = rows.set_column(1, "activation", rows["activation"].cast(pa.float32()))
    assert strongest(rows, len(rows))["span"].to_pylist() == ["z", "x", "y", "w"]
    assert strongest(rows, 2)["span"].to_pylist() == ["z", "x", "w"]


def test_peaks_stay_with_their_pairs_and_survive_bytes():
    top = TopExemplars.from_bytes(2, top_of([("a", {0: 1.0, 3: 2.0}), ("b", {3: 3.0})]).to_bytes())
    assert top.rows.to_pylist()[1:] == [
        {"feature_id": 3, "activation": 3.0, "sample_id": "b", "peak_start": 30, "peak_end": 33},
        {"feature_id": 3, "activation": 2.0, "sample_id": "a", "peak_start": 30, "peak_end": 33},
    ]


def test_tops_of_different_depth_do_not_merge():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        top_of([]).merge(top_of([], num_kept=3))


TEXT = "one two three four five six seven"


@pytest.mark.parametrize(
    ("peak", "num_words", "span"),
    [
        ("four", 1, "four"),
        ("four", 3, "three four five"),
        ("four", 4, "three four five six"),
        (" four", 3, "three four five"),
        ("one", 3, "one two three"),
        ("seven", 3, "five six seven"),
        ("ou", 3, "three four five"),  # a part of a word brings the whole word
        ("our five s", 1, "four five six"),  # a long peak is never cut
        (TEXT, 2, TEXT),
        ("four", 99, TEXT),
    ],
)
def test_a_span_is_the_words_around_the_peak(peak, num_words, span):
    start = TEXT.index(peak)
    assert span_of(TEXT, start, start + len(peak), num_words) == span


def test_a_peak_between_words_has_the_words_on_both_sides():
    assert span_of("one two\n\nthree four", 7, 9, 2) == "two\n\nthree"


def test_a_run_without_spaces_does_not_make_a_span_without_end():
    assert 0 < len(span_of("x" * 100_000, 50_000, 50_001, 4)) <= 4 * 41
    assert span_of(" " * 1000, 5, 6, 4) == ""


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\u4e2d", max_size=300), st.integers(0, 300), st.integers(0, 60), st.integers(1, 6))
@example("a " * 2000, 2000, 1, 3)
def test_a_span_holds_the_characters_of_the_peak_and_is_cut_from_the_text(text, start, length, num_words):
    start = min(start, len(text))
    end = min(start + length, len(text))
    span = span_of(text, start, end, num_words)
    assert span in text
    assert text[start:end].strip() in span
    long_enough = max(num_words, len(text[start:end].split()) + 2)
    assert len(span.split()) <= long_enough
