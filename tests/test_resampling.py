"""Bootstrap and permutations against the enumeration of all of them, and against corpora that are really redrawn."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_array

from fac_ray.artifacts import write_table
from fac_ray.schema import ACTIVATIONS
from fac_ray.statistics.resampling import bootstrap_coverage, incidence, permutation_test
from fac_ray.statistics.resampling_reduction import difference_test, read_incidence, resample_coverage
from fac_ray.statistics.richness import Z_95

SAMPLES = np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]], bool)


def share(rows):
    return rows.any(axis=0).mean()


def activation_rows(rows, ids):
    columns = {name: [None] * len(rows) for name in ACTIVATIONS.names}
    columns |= {"sample_id": ids, "num_tokens": [1] * len(rows)}
    columns |= {"feature_ids": [sorted(row or {}) for row in rows], "error": [None if row else "bad" for row in rows]}
    columns["activations"] = [[row[i] for i in sorted(row)] if row else [] for row in rows]
    return pa.table(columns, schema=ACTIVATIONS)


def test_the_design_effect_is_that_of_all_possible_draws():
    """All 4^4 draws with replacement of the four samples; the features are in 3, 1, 1, 1 and 0 of them.

    Independent: absent with (1/4)^4 once and (3/4)^4 thrice. Chao2: 4 + 3/4 * 3, at most 5: the closed form is
    sqrt(4 * (1 - 4/5)) / 5.
    """
    shares = [share(SAMPLES[list(draw)]) for draw in itertools.product(range(4), repeat=4)]
    independent = np.sqrt(sum(q * (1 - q) for q in (1 / 256, *[81 / 256] * 3))) / 5
    found = bootstrap_coverage(csr_array(SAMPLES), seed=3, num_replicates=20_000)
    assert found.coverage == 4 / 5
    assert found.design_effect == pytest.approx(np.std(shares) / independent, rel=0.02)
    assert found.std == pytest.approx(found.design_effect * np.sqrt(0.8) / 5)
    assert (found.low, found.high) == (pytest.approx(0.8 - Z_95 * found.std), 1)
    assert found == bootstrap_coverage(csr_array(SAMPLES), seed=3, num_replicates=20_000)
    assert found != bootstrap_coverage(csr_array(SAMPLES), seed=4, num_replicates=20_000)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("rate", [0.3, 1.0, 4.5])
def test_the_standard_error_is_that_of_redrawn_corpora_even_where_features_come_together(block, rate):
    """Blocks of features share their samples; a feature is in `rate` of 150 samples on average."""
    rng = np.random.default_rng(0)
    corpora = np.repeat(rng.random((300, 150, 400 // block)) < rate / 150, block, axis=2)
    truth = corpora.any(axis=1).mean(axis=1).std()
    found = np.mean([bootstrap_coverage(csr_array(one), 0, 200).std for one in corpora[:15]])
    assert 0.7 * truth < found < 1.3 * truth


def test_a_corpus_that_always_has_everything_has_no_error():
    found = bootstrap_coverage(csr_array(np.ones((5, 3), bool)), num_replicates=50)
    assert found == (1, 0, 1, 1, 1, 50)
    with pytest.raises(ValueError, match="got 0 and 3"):
        bootstrap_coverage(csr_array((0, 3), dtype=bool))


def test_few_divisions_are_all_taken():
    """All 15 ways to take 2 of 6 samples, by hand; scipy gives twice the smaller tail."""
    first, second = np.array([[1, 1, 1], [0, 1, 1]], bool), np.eye(3, dtype=bool)[[0, 0, 0, 0]]
    pooled = np.concatenate([first, second])
    differences = []
    for chosen in itertools.combinations(range(6), 2):
        others = [i for i in range(6) if i not in chosen]
        differences.append(share(pooled[list(chosen)]) - share(pooled[others]))
    observed = share(first) - share(second)
    tails = [np.mean(np.array(differences) >= observed - 1e-12), np.mean(np.array(differences) <= observed + 1e-12)]
    found = permutation_test(csr_array(first), csr_array(second))
    assert found.difference == pytest.approx(2 / 3)
    assert found.num_permutations == 15
    assert found.null_mean == pytest.approx(np.mean(differences))
    assert found.p_value == pytest.approx(min(1, 2 * min(tails)))


def test_a_random_p_value_counts_the_corpora_themselves_as_one_division():
    """The two corpora share no feature and nothing random comes near: 2 (0 + 1) / (199 + 1)."""
    first, second = np.zeros((60, 40), bool), np.zeros((60, 40), bool)
    first[:, 0], second[np.arange(60), np.arange(60) % 39 + 1] = True, True
    found = permutation_test(csr_array(first), csr_array(second), num_permutations=199)
    assert (found.num_permutations, found.p_value) == (199, pytest.approx(0.01))


def test_a_random_part_of_a_corpus_is_not_told_apart_however_small():
    rng = np.random.default_rng(1)
    p_values = []
    for seed in range(60):
        samples = csr_array(rng.random((90, 50)) < 0.03)
        p_values.append(permutation_test(samples[:15], samples[15:], seed, 99).p_value)
    assert np.mean(np.array(p_values) <= 0.1) <= 0.2
    assert np.mean(p_values) > 0.4


def test_incidence_keeps_the_selected_features_of_measured_samples_above_the_threshold():
    rows = activation_rows([{0: 2.0, 2: 0.5}, None, {1: 3.0, 2: 1.5, 3: 9.0}], ["a", "b", "c"])
    found = incidence(rows, np.array([True, False, True, True]), 1.0)
    assert found.toarray().tolist() == [[True, False, False], [False, True, True]]


@pytest.mark.usefixtures("ray_cluster")
def test_the_draws_do_not_depend_on_the_parts(tmp_path):
    rng = np.random.default_rng(2)
    rows = [{int(i): 1.0 for i in rng.choice(6, 2, replace=False)} for _ in range(12)]
    ids = [f"s{i:02d}" for i in range(12)]
    for name, num_parts in (("one", 1), ("many", 5)):
        for part in range(num_parts):
            mine = range(part, 12, num_parts)
            table = activation_rows([rows[i] for i in mine], [ids[i] for i in mine])
            write_table(tmp_path / name / f"{part}.parquet", table)
    everything = np.ones(6, bool)
    one, many = (read_incidence([tmp_path / name], everything, 0.0).toarray() for name in ("one", "many"))
    assert one.tolist() == many.tolist() == [[i in row for i in range(6)] for row in rows]


@pytest.mark.usefixtures("ray_cluster")
def test_each_pair_of_corpora_is_tested_over_its_own_features(tmp_path):
    """Relevant 0 1 2 3; the anchor has 0 1 2, the seed 0 and 3: missing are 1 2, of which only targeted has one."""
    corpora = {
        "anchor": [{0: 1.0, 1: 1.0}, {2: 1.0}, {4: 1.0}],
        "seed": [{0: 1.0}, {3: 1.0}],
        "targeted": [{1: 1.0}, {1: 2.0}],
        "untargeted": [{4: 1.0}, {4: 2.0}],
        "single": [{1: 1.0}],
    }
    for name, rows in corpora.items():
        write_table(tmp_path / name / "part.parquet", activation_rows(rows, [f"{name}{i}" for i in range(len(rows))]))
    relevant, anchor, seed = np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 1], bool), np.eye(5, dtype=bool)[0]
    result = resample_coverage({name: tmp_path / name for name in corpora}, relevant, anchor, seed, 0.0, 0)
    assert {name: one["coverage"] for name, one in result["bootstrap"].items()} == pytest.approx(
        {"seed": 1 / 3, "seed+untargeted": 1 / 3, "seed+targeted": 2 / 3}
    )
    first, second = result["permutation"]
    assert (first["first"], first["second"], first["features"], first["num_features"]) == (
        "seed",
        "anchor",
        "relevant",
        4,
    )
    assert first["difference"] == pytest.approx(2 / 4 - 3 / 4)
    assert (second["first"], second["features"], second["num_features"]) == ("targeted", "missing", 1)
    assert second["difference"] == 1
    untested = {"targeted": tmp_path / "single", "untargeted": tmp_path / "targeted"}
    assert resample_coverage(untested, relevant, anchor, seed, 0.0, 0) == {"bootstrap": {}, "permutation": []}
    alone = resample_coverage({name: tmp_path / name for name in ("anchor", "seed")}, relevant, anchor, seed, 0.0, 0)
    assert set(alone["bootstrap"]) == {"seed"}


@pytest.mark.usefixtures("ray_cluster")
def test_large_corpora_are_divided_fewer_times_and_never_fewer_than_the_least(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    for name in ("one", "other"):
        rows = [{int(i): 1.0 for i in rng.choice(6, 2, replace=False)} for _ in range(20)]
        write_table(tmp_path / name / "part.parquet", activation_rows(rows, [f"{name}{i}" for i in range(20)]))
    # 40 samples with two features each: 80 pairs are read in each division
    for most, expected in ((80 * 10_000, 1000), (80 * 500, 500), (80, 199)):
        monkeypatch.setattr("fac_ray.statistics.resampling_reduction.MAX_DRAWN_PAIRS", most)
        found = difference_test(tmp_path / "one", tmp_path / "other", np.ones(6, bool), 0.0, 0)
        assert found is not None
        assert found["num_permutations"] == expected
