"""The samples that cover most: lazy equals naive greedy, near the optimum, and the same for every partition."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_ray.artifacts import read_table, write_table
from fac_ray.config import config_from_tree
from fac_ray.coverage.counts import UNLABELLED, CorpusCoverage, FeatureCounts
from fac_ray.coverage.reduction import load_coverage, save_coverage
from fac_ray.decisions.greedy import (
    CANDIDATES,
    Limit,
    best_cover,
    best_gains,
    candidates_of,
    distinct_candidates,
    guaranteed_fraction,
    lazy_greedy,
    optimum_bound,
    value_of,
)
from fac_ray.decisions.pool import Pool, feature_weights
from fac_ray.decisions.selection import select_samples
from fac_ray.progress import Progress
from fac_ray.schema import ACTIVATIONS, FEATURES, SAMPLES, content_id

D_SAE = 8
THRESHOLD = 0.5
TINY = settings(max_examples=60, deadline=None)

samples_of = st.lists(st.tuples(st.integers(1, 6), st.sets(st.integers(0, D_SAE - 1))), min_size=1, max_size=9)
weights_of = st.lists(st.integers(0, 5), min_size=D_SAE, max_size=D_SAE).map(lambda w: np.array(w, np.int64))


def pool_of(samples):
    """CANDIDATES of (num_tokens, features) pairs, named a, b, c ..."""
    rows = [
        {"sample_id": chr(97 + i), "num_tokens": tokens, "feature_ids": sorted(features)}
        for i, (tokens, features) in enumerate(samples)
    ]
    return pa.Table.from_pylist(rows, CANDIDATES)


def value(samples, chosen, weights):
    return sum(int(weights[i]) for i in set().union(*(samples[at][1] for at in chosen), set()))


def naive_greedy(samples, weights, limit, per_token=False):
    """Ids of the samples taken, by looking at every sample in every step."""
    chosen = []
    while limit.num_samples is None or len(chosen) < limit.num_samples:
        room = math.inf if limit.num_tokens is None else limit.num_tokens - sum(samples[at][0] for at in chosen)
        before = value(samples, chosen, weights)
        scored = []
        for at, (tokens, _) in enumerate(samples):
            gain = value(samples, [*chosen, at], weights) - before
            if gain > 0 and tokens <= room:
                scored.append((-gain / tokens if per_token else -gain, tokens, chr(97 + at), at))
        if not scored:
            break
        chosen.append(min(scored)[-1])
    return [chr(97 + at) for at in chosen]


def optimum(samples, weights, limit):
    """The best value of any set within the limit, by looking at all of them."""
    sizes = range(len(samples) + 1 if limit.num_samples is None else min(limit.num_samples, len(samples)) + 1)
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(samples)), size) for size in sizes)
    fits = (s for s in sets if limit.num_tokens is None or sum(samples[at][0] for at in s) <= limit.num_tokens)
    return max(value(samples, chosen, weights) for chosen in fits)


@TINY
@given(samples_of, weights_of, st.integers(1, 5), st.booleans(), st.randoms())
def test_lazy_greedy_takes_what_naive_greedy_takes_whatever_the_order(samples, weights, k, per_token, random):
    rows = pool_of(samples).to_pylist()
    random.shuffle(rows)
    candidates = distinct_candidates(pa.Table.from_pylist(rows, CANDIDATES))
    for limit in (Limit(k), Limit(None, 2 * k), Limit(k, 3 * k)):
        picks = lazy_greedy(candidates, weights, limit, per_token)
        taken = [candidates["sample_id"][pick.row].as_py() for pick in picks]
        assert taken == naive_greedy(samples, weights, limit, per_token)
        assert value_of(picks) == value(samples, [ord(name) - 97 for name in taken], weights)


@TINY
@given(samples_of, weights_of, st.integers(1, 4))
def test_the_cover_keeps_its_guarantee_and_the_bound_holds_the_optimum(samples, weights, k):
    candidates = distinct_candidates(pool_of(samples))
    for limit in (Limit(k), Limit(None, 3 * k), Limit(k, 2 * k)):
        picks = best_cover(candidates, weights, limit)
        found, best = value_of(picks), optimum(samples, weights, limit)
        assert found >= (guaranteed_fraction(limit, 1) or 0) * best
        left = weights.copy()
        for pick in picks:
            left[candidates["feature_ids"][pick.row].as_py()] = 0
        assert optimum_bound(found, best_gains(candidates, left, limit), left, limit) >= best - 1e-9


@TINY
@given(samples_of, weights_of, st.integers(1, 4), st.integers(0, 9))
def test_partitions_that_are_searched_on_their_own_keep_theirs(samples, weights, k, cut):
    limit, candidates = Limit(k), pool_of(samples)
    parts = [distinct_candidates(part) for part in (candidates.slice(0, cut), candidates.slice(cut))]
    picked = [(part, best_cover(part, weights, limit)) for part in parts]
    union = distinct_candidates(
        pa.concat_tables(part.take(pa.array([p.row for p in picks], pa.int64())) for part, picks in picked)
    )
    found = max(value_of(picks) for picks in (best_cover(union, weights, limit), *(picks for _, picks in picked)))
    assert found >= guaranteed_fraction(limit, 2) * optimum(samples, weights, limit) - 1e-9


@TINY
@given(samples_of, samples_of, weights_of, st.integers(1, 3))
def test_what_the_bound_needs_of_a_pool_is_among_what_it_needs_of_its_parts(first, second, weights, k):
    both = pa.concat_tables([pool_of(first), pool_of(second)])
    for limit in (Limit(k), Limit(None, 2 * k), Limit(k, 2 * k)):
        parts = [best_gains(pool_of(part), weights, limit) for part in (first, second)]
        whole = optimum_bound(0, best_gains(both, weights, limit), weights, limit)
        assert optimum_bound(0, np.concatenate(parts, axis=1), weights, limit) == pytest.approx(whole)


def test_of_equal_gains_the_shorter_and_then_the_smaller_id_is_taken():
    # b and c add as much as a; b and c are shorter; then a still adds 0, d adds 4
    samples = [(5, {0, 1}), (3, {1, 2}), (3, {0, 2}), (9, {3})]
    candidates = distinct_candidates(pool_of(samples))
    picks = lazy_greedy(candidates, np.ones(D_SAE, np.int64), Limit(9))
    assert [candidates["sample_id"][p.row].as_py() for p in picks] == ["b", "c", "d"]
    assert [p.gain for p in picks] == [2, 1, 1]


def test_guarantees_are_those_of_the_literature():
    assert guaranteed_fraction(Limit(10), 1) == pytest.approx(0.632, abs=1e-3)
    assert guaranteed_fraction(Limit(None, 10), 1) == pytest.approx(0.316, abs=1e-3)
    assert guaranteed_fraction(Limit(10), 4) == pytest.approx(0.158, abs=1e-3)
    assert guaranteed_fraction(Limit(2), 4) == 0.5
    assert guaranteed_fraction(Limit(10, 10), 1) is None


def test_candidates_have_the_active_features_that_count():
    rows = pa.Table.from_pylist(
        [
            {"sample_id": "a", "feature_ids": [0, 1, 2], "activations": [0.5, 0.6, 9.0], "num_tokens": 3},
            {"sample_id": "b", "feature_ids": [], "activations": [], "num_tokens": 0, "error": "no pooled token"},
            {"sample_id": "c", "feature_ids": [2], "activations": [1.0], "num_tokens": 2},
        ],
        ACTIVATIONS,
    )
    found = candidates_of(rows, np.array([1, 1, 0]), THRESHOLD).to_pylist()
    assert [(row["sample_id"], row["feature_ids"]) for row in found] == [("a", [1]), ("c", [])]


def test_a_feature_is_worth_one_or_its_effect_or_nothing():
    features = pa.Table.from_pylist(
        [
            {"feature_id": i, "relevant": relevant, "effect": effect}
            for i, (relevant, effect) in enumerate([(True, 2.5), (False, 9.0), (True, -1.0)])
        ],
        FEATURES,
    )
    unit = 1 << 20
    assert feature_weights(features, "relevant", 3).tolist() == [unit, 0, unit]
    assert feature_weights(features, "effect", 3).tolist() == [5 * unit // 2, 0, 0]
    assert feature_weights(None, "all", 3).tolist() == [unit] * 3


# ---- the stage, on a corpus whose rows lie in a varying number of parts ----


def run_folder(folder, num_parts, **selection):
    """A run with a measured corpus `pool` of 40 samples and a `seed` that has feature 0."""
    rng = np.random.default_rng(3)
    texts = [f"text {i} " + "word " * int(rng.integers(1, 9)) for i in range(40)]
    ids = [content_id(text) for text in texts]
    features = [sorted({int(i) for i in rng.geometric(0.3, size=3) - 1 if i < D_SAE}) for _ in texts]
    samples = [
        {"sample_id": i, "content_id": i, "text": t, "source_file": "f", "source_row": n}
        for n, (i, t) in enumerate(zip(ids, texts, strict=True))
    ]
    rows = [
        {"sample_id": i, "feature_ids": f, "activations": [1.0] * len(f), "num_tokens": len(t.split())}
        for i, f, t in zip(ids, features, texts, strict=True)
    ]
    for at in range(num_parts):
        part = pa.Table.from_pylist(rows[at::num_parts], ACTIVATIONS)
        write_table(folder / "activations" / "pool" / f"{at}.parquet", part)
        write_table(
            folder / "samples" / "pool" / f"{at}.parquet", pa.Table.from_pylist(samples[at::num_parts], SAMPLES)
        )
    for name, some in (("pool", rows), ("seed", [{**rows[0], "feature_ids": [0], "activations": [1.0]}])):
        table = pa.Table.from_pylist(some, ACTIVATIONS)
        labels = np.full(len(table), UNLABELLED)
        counts = FeatureCounts.from_rows(table, labels, (THRESHOLD,), THRESHOLD, D_SAE)
        save_coverage(folder / "coverage" / name, CorpusCoverage.from_counts(counts))
    tree = {
        "name": "hand-made",
        "model": {"path": "m", "hook_layer": 1},
        "sae": {"path": "s"},
        "corpora": {"pool": {"path": "a"}, "seed": {"path": "b"}},
        "measure": {"threshold": THRESHOLD, "thresholds": []},
        "selection": {"weights": "all", **selection},
        "run": {"folder": str(folder)},
    }
    return config_from_tree(tree), rows


def select(config):
    output, progress = config.folder / "selection" / "pool", Progress.silent()
    output.mkdir(parents=True)
    coverage, base = (load_coverage(config.folder / "coverage" / name) for name in ("pool", "seed"))
    covered = base.active(THRESHOLD) if config.selection.base else None
    places = [config.folder / kind / "pool" for kind in ("activations", "samples")]
    pool = Pool(*places, coverage, THRESHOLD, feature_weights(None, "all", D_SAE), covered)
    select_samples(config, "pool", pool, output, progress)
    assert progress.count == 40
    return json.loads((output / "selection.json").read_text()), read_table(output / "selected.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ray_cluster):
    assert ray_cluster.is_initialized()
    config, rows = run_folder(tmp_path_factory.mktemp("whole"), 1, num_samples=3)
    return *select(config), rows


@pytest.mark.parametrize("num_parts", [2, 7])
def test_an_exact_search_does_not_depend_on_the_parts(tmp_path, whole, num_parts):
    facts, selected, _ = whole
    config, _ = run_folder(tmp_path, num_parts, num_samples=3)
    assert select(config) == (facts, selected)


def test_selected_rows_carry_their_sample_and_what_they_add(whole):
    facts, selected, rows = whole
    chosen, by_id = selected.to_pylist(), {row["sample_id"]: row for row in rows}
    seen: set[int] = set()
    for rank, row in enumerate(chosen):
        new = set(by_id[row["sample_id"]]["feature_ids"]) - seen
        assert (row["rank"], set(row["new_features"]), row["gain"]) == (rank, new, len(new))
        assert content_id(row["text"]) == row["sample_id"]
        assert row["num_tokens"] == len(row["text"].split())
        seen |= new
    assert facts["methods"][0]["gain"] == len(seen)
    assert facts["methods"][0]["coverage"] == len(seen) / D_SAE
    assert facts["certified_fraction"] >= facts["guaranteed_fraction"]


def test_other_ways_are_counted_at_the_same_size_and_the_same_tokens(whole):
    facts, selected, rows = whole
    methods = {(one["method"], one["equal"]): one for one in facts["methods"]}
    subsets = itertools.combinations([set(row["feature_ids"]) for row in rows], len(selected))
    mean = np.mean([len(set().union(*subset)) for subset in subsets])
    assert methods["random", "samples"]["gain"] == pytest.approx(mean)
    longest = sorted(rows, key=lambda row: (-row["num_tokens"], row["sample_id"]))
    first = longest[: len(selected)]
    assert methods["longest first", "samples"]["gain"] == len(set().union(*(row["feature_ids"] for row in first)))
    num_tokens, within = methods["selected", None]["num_tokens"], []
    while sum(row["num_tokens"] for row in [*within, longest[len(within)]]) <= num_tokens:
        within.append(longest[len(within)])
    assert methods["longest first", "tokens"]["num_samples"] == len(within)
    assert methods["longest first", "tokens"]["gain"] == len(set().union(*(row["feature_ids"] for row in within)))
    assert methods["whole corpus", None]["gain"] == len(set().union(*(row["feature_ids"] for row in rows)))


@pytest.mark.usefixtures("ray_cluster")
def test_partitions_are_searched_and_the_result_is_certified(tmp_path, whole):
    config, _ = run_folder(tmp_path, 6, num_samples=3, num_partitions=3)
    facts, selected = select(config)
    assert (facts["num_partitions"], len(selected)) == (3, 3)
    assert facts["methods"][0]["gain"] >= facts["guaranteed_fraction"] * whole[0]["methods"][0]["gain"]
    assert facts["certified_fraction"] >= facts["guaranteed_fraction"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_the_base_has_is_not_selected_again_and_the_search_ends_when_nothing_adds(tmp_path):
    facts, selected = select(run_folder(tmp_path, 2, num_samples=40, base="seed")[0])
    assert 0 not in {i for row in selected["new_features"].to_pylist() for i in row}
    assert min(selected["gain"].to_pylist()) > 0
    assert facts["methods"][0]["coverage"] == facts["methods"][-1]["coverage"]
    assert facts["weight_base"] == 1
    page = (tmp_path / "selection" / "pool" / "selection.md").read_text()
    assert f"40 samples were asked for; after {len(selected)}, no other adds a feature" in page


@pytest.mark.usefixtures("ray_cluster")
def test_a_budget_holds_and_one_that_fits_no_sample_is_refused(tmp_path):
    _, selected = select(run_folder(tmp_path / "a", 2, budget_tokens=12)[0])
    assert 0 < sum(selected["num_tokens"].to_pylist()) <= 12
    lines = (tmp_path / "a" / "selection" / "pool" / "selected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == selected.to_pylist()
    with pytest.raises(ValueError, match="budget_tokens = 1"):
        select(run_folder(tmp_path / "b", 2, budget_tokens=1)[0])
