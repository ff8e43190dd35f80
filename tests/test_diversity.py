"""Diversity measures against other implementations, brute force and hand cases; Ray's result against one process.

Published figures: the README of the package vendi-score (vertaix/Vendi-Score, revision 05fb74b). Other
implementations: nltk's sentence_bleu; the other formulas are worked out by loops over all pairs.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fac_ray.artifacts import write_table
from fac_ray.config import DiversityConfig
from fac_ray.progress import Progress
from fac_ray.schema import ACTIVATIONS, SAMPLES
from fac_ray.statistics.diversity import (
    VectorSums,
    cluster_entropy,
    mean_cosine_distance,
    pos_distinct,
    project,
    self_bleu,
    unit_vectors,
    vendi_score,
)
from fac_ray.statistics.diversity_reduction import reduce_diversity
from fac_ray.statistics.ngrams import NgramTotals, count_ngrams, merge_ngrams, words_of

TEXTS = st.lists(st.lists(st.sampled_from("abcd"), max_size=8), max_size=6)


def activation_rows(rows, first=0):
    """ACTIVATIONS of dictionaries feature -> activation; None is a sample that could not be measured."""
    filled = [row or {} for row in rows]
    columns = {name: [None] * len(rows) for name in ACTIVATIONS.names}
    columns |= {
        "sample_id": [f"s{first + i}" for i in range(len(rows))],
        "feature_ids": [sorted(row) for row in filled],
        "activations": [[row[i] for i in sorted(row)] for row in filled],
        "num_tokens": [10] * len(rows),
        "error": ["too long" if row is None else None for row in rows],
    }
    return pa.table(columns, schema=ACTIVATIONS)


def random_rows(num_rows, d_sae=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {int(i): float(rng.random() + 0.1) for i in rng.choice(d_sae, rng.integers(1, 5), replace=False)}
        for _ in range(num_rows)
    ]


# ---- words ----


def test_words_are_lower_case_runs_and_single_signs():
    assert words_of("Don't pay 20 EUR!!") == ["don", "'", "t", "pay", "20", "eur", "!", "!"]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 3))
def test_ngram_totals_are_those_of_counting_tuples(texts, length):
    counted = Counter(ngram for words in texts for ngram in zip(*(words[i:] for i in range(length)), strict=False))
    totals = NgramTotals.of(count_ngrams(texts, length))
    assert (totals.num_ngrams, totals.num_distinct) == (counted.total(), len(counted))
    if counted:
        shares = [count / counted.total() for count in counted.values()]
        assert totals.distinct_fraction == len(counted) / counted.total()
        assert totals.entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
    else:
        assert totals.distinct_fraction is totals.entropy is None


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 5))
def test_counts_of_parts_merge_to_those_of_the_whole_and_buckets_split_them(first, second, num_buckets):
    whole = count_ngrams(first + second, 2)
    merged = merge_ngrams([count_ngrams(second, 2), count_ngrams(first, 2)])
    assert merged.hashes.tolist() == whole.hashes.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    total = NgramTotals(0, 0, 0.0)
    for number in range(num_buckets):
        total = total.add(NgramTotals.of(whole.bucket(number, num_buckets)))
    assert total == pytest.approx(NgramTotals.of(whole))


def test_ngrams_do_not_cross_texts():
    # "a b" and "c d" hold 2 pairs; as one text they would hold 3
    assert NgramTotals.of(count_ngrams([["a", "b"], ["c", "d"]], 2)).num_ngrams == 2


# ---- Self-BLEU ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=9), min_size=2, max_size=6))
def test_self_bleu_is_the_mean_of_nltks_sentence_bleu(texts):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    smooth = bleu.SmoothingFunction().method1
    expected = [
        bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smooth) for i, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_self_bleu_of_copies_is_one_and_of_strangers_zero():
    assert self_bleu([list("abcde")] * 3) == pytest.approx(1.0)
    assert self_bleu([list("abcde"), list("fghij")]) == 0.0
    assert self_bleu([list("abcde")]) is None


# ---- tags ----


def test_pos_distinct_counts_pairs_of_tags():
    # tagged DT NN VBD twice: pairs DT-NN, NN-VBD, twice each
    assert pos_distinct(["The dog barked", "The cat jumped"]) == pytest.approx(2 / 4)
    assert pos_distinct(["Hello", ""]) is None


# ---- vectors ----


def test_vendi_score_gives_the_published_figures():
    """README of vendi-score: exp(-|a - b|) over 0 0 10 10 20 20 is 2.9999 and the matrix 2.1573, both cut off there."""
    samples = np.array([0, 0, 10, 10, 20, 20])
    pairs = np.exp(-np.abs(samples[:, None] - samples))
    matrix = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert [math.floor(1e4 * vendi_score(gram)) / 1e4 for gram in (pairs, matrix)] == [2.9999, 2.1573]


def test_the_dual_form_is_the_score_of_the_pairs():
    vectors = unit_vectors(activation_rows(random_rows(40)), 12)
    sums = VectorSums.of(activation_rows(random_rows(40)), 12, 12)
    assert sums.vendi_score() == pytest.approx(vendi_score((vectors @ vectors.T).toarray()))
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.ones((7, 7))) == pytest.approx(1)
    assert vendi_score(np.zeros((0, 0))) is None


def test_the_mean_cosine_distance_is_that_of_all_pairs():
    rows = random_rows(20)
    vectors = unit_vectors(activation_rows(rows), 12)
    dense = vectors.toarray()
    pairs = [1 - a @ b for a, b in itertools.combinations(dense, 2)]
    assert mean_cosine_distance(dense.sum(axis=0), 20) == pytest.approx(np.mean(pairs))
    assert VectorSums.of(activation_rows(rows), 12, 4).mean_cosine_distance() == pytest.approx(np.mean(pairs))
    assert mean_cosine_distance(dense[0], 1) is None


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=8), st.lists(st.floats(0.5, 2), min_size=2, max_size=40))
def test_rows_that_differ_by_rounding_have_a_mean_cosine_distance_of_zero(values, lengths):
    rows = np.outer(lengths, values).astype(np.float32).astype(float)
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert mean_cosine_distance(directions.sum(axis=0), len(rows)) == 0.0


def test_samples_without_activations_have_no_direction():
    vectors = unit_vectors(activation_rows([{0: 3.0, 1: 4.0}, None, {}, {1: 2.0}]), 2)
    assert vectors.toarray() == pytest.approx(np.array([[0.6, 0.8], [0.0, 1.0]]))


def test_sums_of_parts_merge_to_those_of_the_whole():
    rows = random_rows(30)
    whole = VectorSums.of(activation_rows(rows), 12, 12)
    parts = [VectorSums.of(activation_rows(rows[i::3]), 12, 12) for i in (2, 0, 1)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged[:3] == whole[:3]
    assert merged.direction_sum == pytest.approx(whole.direction_sum)
    assert merged.outer_sum == pytest.approx(whole.outer_sum)


def test_a_projection_keeps_lengths_and_nearly_the_angles():
    rng = np.random.default_rng(0)
    rows = [{int(i): 1.0 for i in rng.choice(5000, 40, replace=False)} for _ in range(60)]
    vectors = unit_vectors(activation_rows(rows), 5000)
    narrow = project(vectors, 1024)
    assert narrow.shape == (60, 1024)
    assert np.sqrt(narrow.power(2).sum(axis=1)) == pytest.approx(np.ones(60))
    error = ((narrow @ narrow.T) - (vectors @ vectors.T)).toarray()
    assert np.abs(error).std() < 2 / math.sqrt(1024)
    assert project(vectors[:, :1024], 1024).shape == (60, 1024)


def test_cluster_entropy_says_how_evenly_a_corpus_fills_the_references_clusters():
    reference = csr_array(np.repeat(np.eye(4), 5, axis=0))
    assert cluster_entropy(reference, reference, 4, 0) == pytest.approx(math.log(4))
    narrow = csr_array(np.repeat(np.eye(4)[:2], [3, 1], axis=0))  # shares 3/4 and 1/4 of two clusters
    assert cluster_entropy(narrow, reference, 4, 0) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert cluster_entropy(narrow, reference[:2], 16, 0) == 0
    assert cluster_entropy(narrow[:0], reference, 4, 0) is None


# ---- on Ray ----


def write_corpus(folder, texts, rows, num_parts):
    for part in range(num_parts):
        mine = range(part, len(texts), num_parts)
        samples = {name: [None] * len(mine) for name in SAMPLES.names}
        samples |= {"sample_id": [f"s{i}" for i in mine], "text": [texts[i] for i in mine]}
        write_table(folder / "samples" / f"{part}.parquet", pa.table(samples, schema=SAMPLES))
        activations = activation_rows([rows[i] for i in mine])
        ids = pa.array([f"s{i}" for i in mine])
        write_table(folder / "activations" / f"{part}.parquet", activations.set_column(0, "sample_id", ids))


def measured(folder, num_parts, seed=0, reference=None, size=20):
    words = ["the", "old", "dog", "barks", "at", "small", "cats", "and", "birds", "sing"]
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(60)]
    write_corpus(folder, texts, [*random_rows(59), None], num_parts)
    config = DiversityConfig(sample_size=size, num_clusters=3, gram_width=16)
    where = (folder / "samples", folder / "activations", folder / "diversity")
    facts = reduce_diversity(*where, config, 12, seed, reference, Progress.silent())
    return texts, facts, json.loads((folder / "diversity" / "diversity.json").read_text())


@pytest.mark.usefixtures("ray_cluster")
def test_the_result_is_that_of_one_process_whatever_the_parts(tmp_path):
    texts, facts, result = measured(tmp_path / "one", 1)
    assert facts == {"num_samples": 60, "sample_size": 20}
    assert measured(tmp_path / "many", 7)[2] == result
    bigrams = NgramTotals.of(count_ngrams([words_of(text) for text in texts], 2))
    assert result["distinct_2"] == pytest.approx(bigrams.distinct_fraction, rel=1e-5)
    assert result["bigram_entropy"] == pytest.approx(bigrams.entropy, rel=1e-5)
    assert result["num_words"] == sum(len(text.split()) for text in texts)
    assert (result["num_vectors"], result["mean_tokens"]) == (59, 10)
    vectors = unit_vectors(activation_rows(random_rows(59)), 12)
    assert result["vendi_score"] == pytest.approx(vendi_score((vectors @ vectors.T).toarray()), rel=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_the_sample_follows_the_seed_and_a_sample_of_all_gives_the_corpus(tmp_path):
    _, _, result = measured(tmp_path / "a", 3)
    other = measured(tmp_path / "b", 3, seed=1)[2]
    assert other["at_sample"] != result["at_sample"]
    assert other["distinct_1"] == result["distinct_1"]
    whole = measured(tmp_path / "c", 3, size=100)[2]
    assert whole["sample_size"] == 60
    for name in ("distinct_1", "bigram_entropy", "mean_cosine_distance", "vendi_score", "self_bleu_4"):
        assert whole["at_sample"][name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_clusters_are_those_of_the_reference(tmp_path):
    _, _, own = measured(tmp_path / "a", 2)
    _, _, result = measured(tmp_path / "b", 2, reference=("a", tmp_path / "a" / "diversity"))
    assert (own["clusters_of"], result["clusters_of"]) == (None, "a")
    assert result["cluster_entropy"] == own["cluster_entropy"]  # the same corpus, in its own clusters


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_without_rows_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        reduce_diversity(tmp_path, tmp_path, tmp_path, DiversityConfig(), 12, 0, None, Progress.silent())
