"""The verdict on a seed, on sets of features that are written out.

The target is {0, 1, 2, 3}: relevant and active in the anchor.
"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from measured_run import write_run

from fac_ray import pipeline
from fac_ray.cli import main
from fac_ray.decisions.check import check_seed, open_baseline
from fac_ray.decisions.pages import check_page
from fac_ray.decisions.questions import require_check

TARGET = {0, 1, 2, 3}
ANCHOR = [TARGET, {5}]


def run_of(folder, seed, **rules):
    return write_run(folder, {"anchor": ANCHOR, "seed": seed}, TARGET, check=rules)


def verdict(tmp_path, seed, baseline=None, **rules):
    """The check of a seed, against another if one is given."""
    if baseline is not None:
        run_of(tmp_path / "main", baseline)
        rules["baseline"] = str(tmp_path / "main")
    config = run_of(tmp_path / "change", seed, **rules)
    require_check(config)
    return check_seed(config, open_baseline(config))


@pytest.mark.parametrize(("min_fac", "passed"), [(0.5, True), (0.75, True), (0.76, False)])
def test_a_seed_passes_if_its_fac_reaches_the_limit(tmp_path, min_fac, passed):
    facts = verdict(tmp_path, [{0, 1}, {2}], min_fac=min_fac)
    assert facts["rules"] == [{"rule": "min_fac", "value": 0.75, "limit": min_fac, "passed": passed}]
    assert facts["passed"] is passed
    assert "lost" not in facts


def test_the_baseline_is_compared_at_the_size_of_the_smaller_seed(tmp_path):
    # This seed at one of its two samples: (1/2 + 1/2 + 1/2 + 0) / 4 = 0.375; the baseline's one sample: 0.5
    facts = verdict(tmp_path, [{0, 1}, {2}], baseline=[{0, 3}])
    (rule,) = facts["rules"]
    assert (facts["matched_samples"], facts["seed"]["fac"], facts["baseline"]["fac"]) == (1, 0.75, 0.5)
    assert (rule["value"], rule["passed"]) == (pytest.approx(0.125), False)
    assert verdict(tmp_path / "lenient", [{0, 1}, {2}], baseline=[{0, 3}], max_drop=0.125)["passed"]


def test_lost_and_gained_features_stand_with_spans_of_the_seed_that_has_them(tmp_path):
    facts = verdict(tmp_path, [{0, 1, 5}, {2, 1}], baseline=[{0, 3, 4}])
    assert facts["lost"] == [{"feature_id": 3, "num_samples": 1, "exemplars": ["seed shows 3"]}]
    assert [(row["feature_id"], row["num_samples"]) for row in facts["gained"]] == [(1, 2), (2, 1)]


def test_an_equal_seed_loses_nothing_and_every_rule_is_judged(tmp_path):
    facts = verdict(tmp_path, [{0, 1}], baseline=[{0, 1}], min_fac=0.9, max_drop=0)
    assert [(rule["rule"], rule["passed"]) for rule in facts["rules"]] == [("min_fac", False), ("max_drop", True)]
    assert not facts["passed"]
    assert (facts["lost"], facts["gained"]) == ([], [])


def test_the_page_says_pass_or_fail_for_each_rule_and_shows_what_was_lost(tmp_path):
    facts = verdict(tmp_path, [{0, 1}], baseline=[{0, 3}], min_fac=0.9)
    page = check_page(facts, 5)
    assert page.startswith("## Coverage check: FAIL\n")
    assert [line.rsplit("|", 2)[1].strip() for line in page.splitlines()[4:6]] == ["FAIL", "PASS"]
    assert "`seed shows 3`" in page
    assert (tmp_path / "change" / "check" / "check.md").read_text() == page
    assert json.loads((tmp_path / "change" / "check" / "check.json").read_text()) == facts


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Runs the command on a measured run, with the stages before the check taken as done."""
    config = run_of(tmp_path / "run", [{0, 1}])
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    monkeypatch.setattr("fac_ray.pipeline.gaps_stage", lambda _: None)
    return lambda *arguments: CliRunner().invoke(main, ["check", "--config", str(path), *arguments])


@pytest.mark.usefixtures("ray_cluster")
def test_the_exit_code_is_the_verdict(checked, tmp_path):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    passed = checked("--min-fac", "0.5", "--summary", str(summary))
    assert passed.exit_code == 0, passed.output
    assert "Coverage check: PASS" in passed.output
    failed = checked("--min-fac", "0.6", "--summary", str(summary))
    assert failed.exit_code == 1
    assert summary.read_text().startswith("before\n## Coverage check: PASS")
    assert "## Coverage check: FAIL" in summary.read_text()


def test_what_could_not_be_checked_is_not_a_failed_rule(checked, monkeypatch):
    for arguments in (["--min-fac", "1.5"], ["--min-fac", "half"], ["--set", "chek.min_fac=1"]):
        assert checked(*arguments).exit_code == 2

    def fails(_):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(pipeline, "check", fails)
    monkeypatch.setattr("fac_ray.session._connected", lambda: True)
    result = checked("--min-fac", "0.5")
    assert result.exit_code == 2
    assert "the disk is gone" in result.stderr
