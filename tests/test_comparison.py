"""Corpora side by side, on sets of features that are written out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from measured_run import features_of, write_run
from scipy.stats import fisher_exact

from fac_ray.decisions.comparison import compare_corpora, overlap
from fac_ray.decisions.pages import comparison_page
from fac_ray.decisions.questions import comparison_folder, require_comparison

RELEVANT = {0, 1, 2, 3}
CORPORA = {
    "anchor": [{0, 1}, {1, 2}, {0, 2, 5}, {1}],  # of the relevant: 0, 1, 2
    "seed": [{0, 4}, {0}],  # 0
    "extra": [{0, 3}, {3, 5}, {1}],  # 0, 1, 3; the anchor does not reach 3
}


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def config(tmp_path):
    return write_run(tmp_path / "run", CORPORA, RELEVANT)


def compare(config, *names):
    require_comparison(config, names)
    return compare_corpora(config, names, features_of(RELEVANT, 6))


def test_each_feature_that_one_corpus_alone_has_stands_with_its_spans(config):
    facts = compare(config, "anchor", "seed", "extra")
    # anchor alone: 2, in 2 of its 4 samples and none of the 5 others; extra alone: 3, in 2 of 3 and none of 6
    assert facts["only"]["anchor"] == [
        {"feature_id": 2, "num_samples": 2, "p_value": pytest.approx(6 / 36), "exemplars": ["anchor shows 2"]}
    ]
    assert facts["only"]["seed"] == []
    (row,) = facts["only"]["extra"]
    assert (row["feature_id"], row["exemplars"]) == (3, ["extra shows 3"])
    assert row["p_value"] == pytest.approx(fisher_exact([[2, 0], [1, 6]], alternative="greater").pvalue)


def test_fac_is_relative_to_the_anchor_at_own_and_at_equal_size(config):
    facts = compare(config, "anchor", "seed", "extra")
    corpora = facts["corpora"]
    assert (facts["coverage_is"], facts["num_counted"], facts["num_target"]) == ("fac", 4, 3)
    assert [corpora[name]["coverage"] for name in CORPORA] == [1, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    # two of the anchor's four samples, features in 2, 3 and 2 of them: absent with 1/6, 0 and 1/6
    assert facts["matched"] == {"num_samples": 2, "num_tokens": 20}
    assert corpora["anchor"]["coverage_at_samples"] == pytest.approx((5 / 6 + 1 + 5 / 6) / 3)
    assert corpora["seed"]["coverage_at_tokens"] == pytest.approx(1 / 3)
    assert [corpora[name]["num_counted_features"] for name in CORPORA] == [3, 1, 3]
    assert [corpora[name]["num_active_features"] for name in CORPORA] == [4, 2, 4]


def test_without_relevance_every_feature_counts_and_the_union_is_the_whole(config):
    facts = compare_corpora(config, ("seed", "extra"), None)
    assert (facts["coverage_is"], facts["num_target"]) == ("share of the union", 5)
    assert facts["corpora"]["seed"]["coverage"] == pytest.approx(2 / 5)
    assert [row["feature_id"] for row in facts["only"]["seed"]] == [4]
    assert "share" in comparison_page(facts, 5)


def test_overlap_counts_what_two_corpora_share():
    active = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    found = overlap(active)
    assert found["shared"] == [[3, 2, 0], [2, 3, 0], [0, 0, 0]]
    assert found["jaccard"] == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, None]]


def test_the_order_of_the_corpora_changes_no_number(config):
    forth, back = compare(config, "anchor", "seed", "extra"), compare(config, "extra", "seed", "anchor")
    assert forth["corpora"] == back["corpora"]
    assert forth["only"] == back["only"]


def test_what_is_returned_is_written_and_the_page_shows_as_much_as_asked(config):
    facts = compare(config, "anchor", "seed")
    folder = comparison_folder(config, ("anchor", "seed"))
    assert json.loads((folder / "compare.json").read_text()) == facts
    page = (folder / "compare.md").read_text()
    assert "`anchor shows 2`" in page
    assert "not active here" not in page
    # anchor alone: 1 and 2
    assert "and 1 more." in comparison_page(facts, 1)
    assert "anchor shows 2" not in comparison_page(facts, 1)


def test_a_corpus_of_another_run_is_compared_if_it_was_measured_in_the_same_way(config, tmp_path):
    write_run(tmp_path / "other", {"seed": [{1}, {2}]}, RELEVANT)
    theirs = f"{tmp_path / 'other'}:seed"
    facts = compare(config, "seed", theirs)
    assert facts["corpora"][theirs]["coverage"] == pytest.approx(2 / 3)
    assert [row["feature_id"] for row in facts["only"][theirs]] == [1, 2]


def test_a_corpus_without_a_measured_sample_is_refused(tmp_path):
    config = write_run(tmp_path / "run", {**CORPORA, "empty": []}, RELEVANT)
    with pytest.raises(ValueError, match="empty: no sample of this corpus could be measured"):
        compare(config, "anchor", "empty")


def test_the_difference_of_each_pair_is_tested_on_the_features_that_either_has(config):
    facts = compare(config, "anchor", "seed", "extra")
    assert [(one["first"], one["second"]) for one in facts["differences"]] == [
        ("anchor", "seed"),
        ("anchor", "extra"),
        ("seed", "extra"),
    ]
    # Seed and extra have 0, 1 and 3 of the counted: 1/3 less 3/3. Their samples {0} {0} and {0,3} {3} {1} can be dealt
    # out as 2 and 3 in ten ways; a difference of -2/3 or less comes with {0} {0} alone, one of ten
    test = facts["differences"][2]
    assert (test["num_features"], test["num_permutations"]) == (3, 10)
    assert test["difference"] == pytest.approx(-2 / 3)
    assert test["p_value"] == pytest.approx(2 / 10)
    assert "| seed - extra " in comparison_page(facts, 5)
