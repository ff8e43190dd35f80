"""The report's numbers, worked out by hand for eight features, and what its page may and must hold.

Activations of the corpora (sample: feature=activation), threshold 0, grid 0 and 1, relevant features 0 to 5:

    anchor      0=2.0 1=0.5 | 1=3.0 2=1.5 | 3=0.4 6=1.0 | 0=0.2 4=2.5      reaches 0 1 2 3 4 of the relevant ones
    seed        0=1.0 6=2.0 | 1=0.3 | 0=0.7 5=1.0                          covers 0 1 (5 is not in the anchor)
    targeted    2=1.2 | 3=0.6 7=1.0                                        switches on 2 3 of the missing 2 3 4
    untargeted  3=0.2 | 0=1.0                                              switches on 3
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fac_ray.artifacts import MARKER, Stage, write_json, write_table
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.coverage.counts import UNLABELLED, CorpusCoverage, FeatureCounts
from fac_ray.coverage.reduction import save_coverage
from fac_ray.report import build_report, render_report
from fac_ray.report.charts import Part, Series, axis_ticks, dot_chart, element, line_chart, stacked_bar
from fac_ray.report.numbers import plain
from fac_ray.report.page import MEASURES, diversity_rows, drawn_samples, rarefaction_chart, tone_of
from fac_ray.report.words import clip, duration, marked, percent
from fac_ray.schema import ACTIVATIONS, CANDIDATES, FEATURES, GAPS, SAMPLES, SYNTHETIC, content_id

D_SAE = 8
ROWS = {
    "anchor": [{0: 2.0, 1: 0.5}, {1: 3.0, 2: 1.5}, {3: 0.4, 6: 1.0}, {0: 0.2, 4: 2.5}],
    "seed": [{0: 1.0, 6: 2.0}, {1: 0.3}, {0: 0.7, 5: 1.0}],
    "targeted": [{2: 1.2}, {3: 0.6, 7: 1.0}],
    "untargeted": [{3: 0.2}, {0: 1.0}],
}
TEXTS = ["Please send the refund <b>today</b>.", "The parcel went to my old address."]
BAND = ("low", "expected_features", "high")
HOSTILE = "<script>alert('hello')</script> where is my parcel"


def config_of(folder: Path) -> RunConfig:
    corpora = {name: {"path": f"{name}.jsonl"} for name in ("anchor", "seed")}
    return config_from_tree(
        {
            "name": "parcels",
            "model": {"path": "a-model", "hook_layer": 1},
            "sae": {"path": "an-sae"},
            "corpora": corpora,
            "measure": {"thresholds": [0.0, 1.0]},
            "run": {"folder": str(folder)},
        }
    )


def finish(folder: Path, tables: dict[str, pa.Table] | None = None, **facts) -> None:
    """A finished stage with these Parquet files and facts."""
    stage = Stage(folder, "a-fingerprint")
    stage.begin()
    for name, table in (tables or {}).items():
        write_table(folder / f"{name}.parquet", table)
    stage.finish(**facts)


def write_corpus(folder: Path, name: str) -> None:
    """A measured corpus of ten tokens a sample; in every text, characters 7 to 11 are the peak token."""
    texts = TEXTS if name == "targeted" else [f"{name} text {i}" for i in range(len(ROWS[name]))]
    ids = [f"{name}-{i}" for i in range(len(texts))]
    rows = ROWS[name]
    samples = {name: [None] * len(ids) for name in SAMPLES.names}
    samples |= {"sample_id": ids, "content_id": [content_id(text) for text in texts], "text": texts}
    activations = pa.table(
        {
            "sample_id": ids,
            "feature_ids": [sorted(row) for row in rows],
            "activations": [[row[i] for i in sorted(row)] for row in rows],
            "peak_start": [[7] * len(row) for row in rows],
            "peak_end": [[11] * len(row) for row in rows],
            "num_tokens": [10] * len(ids),
            "num_sinks": [0] * len(ids),
            "truncated": [False] * len(ids),
            "error": [None] * len(ids),
        },
        schema=ACTIVATIONS,
    )
    labels = np.full(len(ids), UNLABELLED, np.int8)
    counts = FeatureCounts.from_rows(activations, labels, (0.0, 1.0), 0.0, D_SAE)
    table = {"part": pa.table(samples, schema=SAMPLES)}
    facts = {"num_rows": len(ids) + 1, "num_samples": len(ids), "num_rejected": 1, "num_duplicates": 0}
    finish(folder / "samples" / name, table, **facts)
    finish(folder / "activations" / name, {"part": activations}, num_sinks=2, num_errors=0, num_truncated=0)
    finish(folder / "coverage" / name)
    save_coverage(folder / "coverage" / name, CorpusCoverage.from_counts(counts))


def write_gaps(folder: Path) -> None:
    relevant = [feature < 6 for feature in range(D_SAE)]
    features = {name: [None] * D_SAE for name in FEATURES.names}
    features |= {"feature_id": range(D_SAE), "relevant": relevant, "effect": [0.5 * i for i in range(D_SAE)]}
    gaps = {
        "feature_id": [3, 4, 2],
        "rank": [1, 2, 0],
        "score": [0.2, float("nan"), 0.3],
        "anchor_fraction": [0.25, 0.25, 0.25],
        "explanation": ["", "", ""],
        "exemplars": [["my old address"], [HOSTILE], ["the refund"]],
    }
    finish(folder / "relevance", {"features": pa.table(features, schema=FEATURES)})
    finish(folder / "gaps", {"gaps": pa.table(gaps, schema=GAPS)})


def write_synthesis(folder: Path) -> None:
    """Features 2 and 3 are filled in their first and second attempt; 4 is given up after two; one control text."""
    outcomes = [
        (2, 1, 0, 0.4, "scored", None),
        (2, 2, 0, 1.2, "accepted", None),
        (3, 1, 0, 0.0, "rejected", "feature inactive"),
        (3, 2, 1, 0.6, "accepted", None),
        (4, 1, 0, None, "rejected", "generation error: time is over"),
        (4, 1, 1, 0.0, "rejected", "feature inactive"),
        (None, None, 0, None, "accepted", None),
    ]
    columns = ("feature_id", "step", "attempt", "activation", "status", "reason")
    candidates = {name: [None] * len(outcomes) for name in CANDIDATES.names}
    candidates |= dict(zip(columns, map(list, zip(*outcomes, strict=True)), strict=True))
    candidates |= {"candidate_id": [f"c{i}" for i in range(len(outcomes))], "text": ["a text"] * len(outcomes)}
    targeted = {name: [None] * 2 for name in SYNTHETIC.names}
    targeted |= {"sample_id": ["c1", "c3"], "content_id": [content_id(text) for text in TEXTS], "text": TEXTS}
    targeted |= {"feature_id": [2, 3], "activation": [1.2, 0.6], "attempt": [0, 1]}
    finish(folder / "synthesis", {"targeted": pa.table(targeted, schema=SYNTHETIC)}, num_accepted=2)
    write_table(folder / "synthesis" / "candidates" / "part.parquet", pa.table(candidates, schema=CANDIDATES))


def write_evaluation(folder: Path) -> None:
    def spread(values: list[float]) -> dict:
        return {"mean": sum(values) / len(values), "std": 0.01, "values": values}

    arms = {
        "seed": {"auprc": spread([0.61, 0.63]), "seeds": [0, 1], "num_samples": 40},
        "targeted": {"auprc": spread([0.81, 0.83]), "seeds": [0, 1], "num_samples": 40},
    }
    comparison = {"arm": "targeted", "baseline": "seed", "seeds": [0, 1], "difference": spread([0.2, 0.2])}
    comparison |= {"interval": [0.15, 0.25], "confidence": 0.95, "num_replicates": 1000}
    finish(folder / "evaluation")
    finish(folder / "truth")
    write_json(folder / "evaluation" / "arms.json", {"arms": arms, "comparisons": [comparison]})
    write_json(folder / "truth" / "truth.json", {"precision": 0.75, "recall": 0.5, "withheld": 4})


def write_extras(folder: Path) -> None:
    """Diversity of two corpora, of which the seed is more diverse by every measure, and what resampling found."""
    finish(folder / "resampling")
    bootstrap = {"coverage": 0.4, "std": 0.1, "low": 0.2, "high": 0.6, "design_effect": 1.5, "num_replicates": 1000}
    test = {"first": "seed", "second": "anchor", "features": "relevant", "num_features": 6}
    test |= {"difference": -0.25, "null_mean": -0.05, "p_value": 0.01, "num_permutations": 999}
    write_json(folder / "resampling" / "resampling.json", {"bootstrap": {"seed": bootstrap}, "permutation": [test]})
    for name, value in (("anchor", 0.25), ("seed", 0.5)):
        numbers = {measure.key: value for measure in MEASURES}
        numbers["self_bleu_4"] = 1 - value
        numbers["pos_distinct_2"] = None
        finish(folder / "diversity" / name)
        sizes = {"sample_size": 3, "num_samples": 4}
        write_json(folder / "diversity" / name / "diversity.json", {**sizes, **numbers, "at_sample": numbers})


@pytest.fixture
def run(tmp_path):
    """A whole finished run."""
    for name in ROWS:
        write_corpus(tmp_path, name)
    write_gaps(tmp_path)
    write_synthesis(tmp_path)
    write_evaluation(tmp_path)
    write_extras(tmp_path)
    machine = {"cores": 2, "memory_bytes": 4 * 2**30}
    manifest = {"started_at": "2026-01-02T03:04:05Z", "versions": {"fac-ray": "0.1.0"}, "machine": machine}
    write_json(tmp_path / "manifest.json", manifest)
    return tmp_path


class Page(HTMLParser):
    """Tags that are open, every tag with its attributes, and all text outside of style."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


# ---- the numbers ----


def test_fac_counts_the_relevant_features_that_the_anchor_reaches(run):
    report = build_report(run, config_of(run))
    assert report["fac"] == {"anchor": 1.0, "seed": 2 / 5, "untargeted": 3 / 5, "final": 4 / 5}
    assert (report["relevant_features"], report["reachable_features"], report["missing_features"]) == (6, 5, 3)
    assert (report["covered_features"], report["switched_on_features"]) == (2, 2)
    assert (report["fac_missing"], report["fac_missing_untargeted"]) == (2 / 3, 1 / 3)
    assert (report["threshold"], report["preset"], report["measure"]["tokens"]) == (0.0, "corrected", "content")


def test_the_sweep_counts_strictly_above_each_threshold(run):
    """Above 1: anchor 0 1 2 4, seed only 6 (feature 0 is exactly 1), targeted 2."""
    low, high = build_report(run, config_of(run))["sweep"]
    assert (low["fac_seed"], low["fac_missing"], low["active_features"]["anchor"]) == (2 / 5, 2 / 3, 6)
    assert high["threshold"] == 1.0
    assert (high["reachable"], high["covered"], high["missing"]) == (4, 0, 4)
    assert (high["fac_seed"], high["fac_untargeted"], high["fac_final"], high["fac_missing"]) == (0, 0, 1 / 4, 1 / 4)


def test_rarefaction_compares_corpora_at_equal_size(run):
    """One anchor sample shows (2 + 2 + 1 + 1 + 1) / 4 features; three show 2 + 3 * 3/4 of the 5. The seed has 3."""
    numbers = build_report(run, config_of(run))["rarefaction"]
    curve = numbers["curves"]["anchor"]
    expected = dict(zip(curve["num_samples"], curve["expected_features"], strict=True))
    assert {size: expected[size] for size in range(5)} == pytest.approx(
        {0: 0, 1: 1.75, 2: 19 / 6, 3: 4.25, 4: 5}, abs=1e-4
    )
    assert (curve["num_samples"][-1], curve["measured_samples"], expected[8]) == (8, 4, 5)
    assert all(low <= mean <= high for low, mean, high in zip(*(curve[key] for key in BAND), strict=True))
    pooled = numbers["curves"]["seed+targeted"]
    assert pooled["expected_features"][pooled["num_samples"].index(5)] == pytest.approx(4)
    matched = numbers["matched"]
    assert (matched["num_samples"], matched["num_tokens"]) == (3, 30)
    assert matched["at_samples"]["anchor"] == pytest.approx(4.25 / 5)
    assert matched["at_samples"]["seed"] == matched["at_tokens"]["seed"] == pytest.approx(2 / 5)


def test_every_fac_comes_with_its_interval_its_unseen_and_its_null(run):
    report = build_report(run, config_of(run))
    assert set(report["fac_interval"]) == {"seed", "seed+targeted", "seed+untargeted"}
    low, high = report["fac_interval"]["seed"]
    assert low <= report["fac"]["seed"] <= high
    assert report["unseen"]["seed"]["observed"] == 2
    assert report["random_feature_null"]["seed"]["num_sets"] == 1000


def test_diversity_and_resampling_are_reported_as_they_were_found(run):
    report = build_report(run, config_of(run))
    assert list(report["diversity"]) == ["anchor", "seed"]
    assert report["diversity"]["seed"]["at_sample"]["distinct_1"] == 0.5
    assert report["bootstrap"]["seed"]["design_effect"] == 1.5
    assert report["permutation"][0]["p_value"] == 0.01
    text = " ".join(Page(render_report(report)).text.split())
    assert "Seed less anchor: \N{MINUS SIGN}0.250 of the 6 relevant features that either has" in text
    assert "20 % to 60 %" in text
    assert "3 random samples of each corpus" in text


def test_the_most_diverse_corpus_is_named_by_the_direction_of_each_measure(run):
    """Self-BLEU is lower for the seed, all else higher; lengths have no direction; a measure of nothing has no row."""
    rows = diversity_rows(build_report(run, config_of(run))["diversity"])
    most = {measure.key: name for measure, _, name in rows}
    assert "pos_distinct_2" not in most
    assert most.pop("mean_words") is None
    assert set(most.values()) == {"seed"}
    same = diversity_rows({name: dict.fromkeys(most, 0.5) | {"mean_words": 1, "pos_distinct_2": 1} for name in "ab"})
    assert {name for _, _, name in same} == {None}


def test_samples_of_different_size_are_said_to_tilt_the_comparison(run):
    report = build_report(run, config_of(run))
    report["diversity"]["seed"]["sample_size"] = 2
    text = " ".join(Page(render_report(report)).text.split())
    assert "differ in size" in text
    assert "Random samples of each corpus (3, 2)" in text


def test_a_gap_carries_what_was_tried_and_what_filled_it(run):
    first, second, third = build_report(run, config_of(run))["gaps"]
    assert [gap["feature_id"] for gap in (first, second, third)] == [2, 3, 4]
    assert [gap["status"] for gap in (first, second, third)] == ["filled", "filled", "exhausted"]
    assert [gap["attempts"] for gap in (first, second, third)] == [1, 2, 2]
    assert [gap["switched_on"] for gap in (first, second, third)] == [True, True, False]
    assert (first["effect"], first["anchor_fraction"], first["exemplars"]) == (1.0, 0.25, ["the refund"])
    (sample,) = first["samples"]
    assert (sample["text"], sample["activation"], sample["peak"]) == (TEXTS[0], pytest.approx(1.2), [7, 11])
    assert third["samples"] == []


def test_candidates_are_counted_by_outcome_and_errors_by_kind(run):
    candidates = build_report(run, config_of(run))["candidates"]
    assert (candidates["total"], candidates["accepted"], candidates["rejected"], candidates["scored"]) == (6, 2, 3, 1)
    assert candidates["by_reason"] == {"feature inactive": 2, "generation error": 1}
    assert candidates["untargeted"] == {"total": 1, "accepted": 1, "rejected": 0, "scored": 0, "by_reason": {}}


def test_corpora_stages_and_machine_are_on_record(run):
    report = build_report(run, config_of(run))
    anchor = report["corpora"]["anchor"]
    assert (anchor["num_samples"], anchor["num_rejected"], anchor["num_tokens"], anchor["mean_tokens"]) == (
        4,
        1,
        40,
        10,
    )
    assert anchor["num_sinks"] == 2
    assert list(report["corpora"]) == ["anchor", "seed", "targeted", "untargeted"]
    assert all(stage["seconds"] >= 0 for stage in report["stages"].values())
    assert report["versions"] == {"fac-ray": "0.1.0"}
    assert report["arms"]["seed"]["auprc"]["values"] == [0.61, 0.63]
    assert report["truth"]["recall"] == 0.5


def test_numbers_that_are_not_defined_are_none(run):
    """A gap's score is NaN in the table; JSON knows no NaN."""
    report = build_report(run, config_of(run))
    assert report["gaps"][2]["score"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert plain({1: [np.float32("inf"), np.int64(2), (0.5,)]}) == {"1": [None, 2, [0.5]]}


def test_a_seed_without_gaps_has_nothing_to_switch_on(tmp_path):
    """Anchor and seed alike: FAC 1, no missing feature, and no share of nothing."""
    for name in ("anchor", "seed"):
        write_corpus(tmp_path, name)
    write_gaps(tmp_path)
    save_coverage(tmp_path / "coverage" / "seed", _coverage_of("anchor"))
    write_table(tmp_path / "gaps" / "gaps.parquet", GAPS.empty_table())
    report = build_report(tmp_path, config_of(tmp_path))
    assert (report["fac"]["seed"], report["missing_features"], report["fac_missing"], report["gaps"]) == (
        1,
        0,
        None,
        [],
    )
    assert "covers every relevant feature" in Page(render_report(report)).text


def test_synthesis_that_accepted_nothing_leaves_the_seed_as_it_was(run):
    """Coverage of an earlier synthesis still lies in the run folder; it does not count."""
    for stage in ("samples", "activations", "coverage"):
        marker = run / stage / "targeted" / MARKER
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"needs": {"../../synthesis": "an-earlier-one"}}))
    finish(run / "synthesis", num_accepted=0)
    report = build_report(run, config_of(run))
    assert (report["fac"]["final"], report["fac_missing"], report["switched_on_features"]) == (2 / 5, 0, 0)
    assert "no sample was accepted" in Page(render_report(report)).text


def test_coverage_that_was_counted_on_another_grid_is_left_out(run):
    other = config_of(run).model_copy(update={"measure": config_of(run).measure.model_copy(update={"threshold": 3.0})})
    assert "fac" not in build_report(run, other)


def _coverage_of(name: str) -> CorpusCoverage:
    rows = ROWS[name]
    counts = np.array([[sum(row.get(f, 0) > t for row in rows) for f in range(D_SAE)] for t in (0, 1)])
    tops = np.array([max(row.get(f, 0) for row in rows) for f in range(D_SAE)], np.float32)
    zeros = np.zeros(D_SAE, np.int64)
    return CorpusCoverage((0.0, 1.0), 0.0, counts, tops, len(rows), 10 * len(rows), 0, 0, 0, zeros, zeros)


# ---- the page ----


def test_the_page_says_in_words_and_numbers_what_the_run_found(run):
    text = " ".join(Page(render_report(build_report(run, config_of(run)))).text.split())
    assert (
        "The seed covers 40 % of the 5 relevant features the anchor reaches; 3 are missing; "
        "synthesis switched on 2 of them."
    ) in text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "3 samples, 30 tokens" in text
    assert "+0.200" in text


def test_every_tag_is_closed_and_nothing_is_loaded_from_anywhere(run):
    html = render_report(build_report(run, config_of(run)))
    page = Page(html)
    assert page.open == []
    loading = [(tag, key) for tag, attributes in page.tags for key in attributes if key in ("src", "href", "srcset")]
    assert loading == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", html)


def test_texts_of_models_and_data_cannot_become_markup(run):
    html = render_report(build_report(run, config_of(run)))
    assert "<script" not in html
    assert HOSTILE in Page(html).text
    assert "send the refund &lt;b&gt;" not in html  # the peak token splits it
    assert "&lt;b&gt;today&lt;/b&gt;" in html
    assert ("Please <mark>send</mark> the refund") in html


def test_every_chart_has_a_name_and_every_table_a_caption(run):
    page = Page(render_report(build_report(run, config_of(run))))
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(charts) > 5
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") > 4
    assert names.count("h1") == 1


@pytest.mark.parametrize("stopped_after", ["nothing", "samples", "measure", "gaps", "synthesis"])
def test_a_run_that_stopped_early_has_a_page_of_what_it_finished(tmp_path, stopped_after):
    if stopped_after != "nothing":
        for name in ("anchor", "seed"):
            write_corpus(tmp_path, name)
    if stopped_after == "samples":
        for stage in ("activations", "coverage"):
            for name in ("anchor", "seed"):
                (tmp_path / stage / name / "_SUCCESS.json").unlink()
    if stopped_after in ("gaps", "synthesis"):
        write_gaps(tmp_path)
    if stopped_after == "synthesis":
        write_synthesis(tmp_path)
    report = build_report(tmp_path, config_of(tmp_path))
    page = Page(render_report(report))
    assert page.open == []
    assert ("fac" in report) == (stopped_after in ("gaps", "synthesis"))
    assert ("sweep" in report) == (stopped_after not in ("nothing", "samples"))
    assert ("Missing features" in page.text) == ("gaps" in report)
    assert ("Filled by" in page.text) == (stopped_after == "synthesis")
    assert "arms" not in report


def test_measure_alone_counts_active_features(tmp_path):
    for name in ("anchor", "seed"):
        write_corpus(tmp_path, name)
    report = build_report(tmp_path, config_of(tmp_path))
    assert report["rarefaction"]["counted"] == "all"
    assert report["corpora"]["seed"]["num_active_features"] == 4
    assert "Of 8 features, active at threshold 0: anchor 6, seed 4." in Page(render_report(report)).text


def test_a_page_of_many_gaps_stays_small(run):
    report = build_report(run, config_of(run))
    report["gaps"] = [report["gaps"][0] | {"rank": rank} for rank in range(5000)]
    html = render_report(report)
    assert len(html) < 2_000_000
    assert "4,600 further ones in report.json" in Page(html).text


# ---- the charts and words ----


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 38, [0, 10, 20, 30, 40]),
        (0.61, 0.83, [0.6, 0.65, 0.7, 0.75, 0.8, 0.85]),
        (0, 0, [0, 0.2]),
        (-3, 4, [-4, -2, 0, 2, 4]),
    ],
)
def test_axis_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert axis_ticks(low, high) == ticks


def test_axis_ticks_refuse_what_has_no_order():
    with pytest.raises(ValueError, match="finite low <= high"):
        axis_ticks(1, float("nan"))


def test_a_line_chart_draws_to_scale_and_names_every_value():
    """y runs from 244 (0) up to 12 (1) and x from 56 (0) to 462 (4): the middle of both is 259, 128."""
    svg = line_chart([Series("seed", "seed", [0, 2, 4], [0, 0.5, 1], ["a", "b", "c"])], "a <chart>", "x", "y", y_high=1)
    assert 'points="56,244 259,128 462,12"' in svg
    assert [f"<title>seed: {note}</title>" in svg for note in "abc"] == [True] * 3
    assert 'aria-label="a &lt;chart&gt;"' in svg


def test_a_line_goes_on_thin_where_it_is_extrapolated_and_has_its_band():
    """The band of the middle point, 0.25 to 0.75, lies at 186 and 70 on the drawing."""
    band = [(0, 0), (0.25, 0.75), (0.5, 1)]
    svg = line_chart(
        [Series("seed", "seed", [0, 2, 4], [0, 0.5, 1], ["a", "b", "c"], band, 2)], "t", "x", "y", y_high=1
    )
    assert 'points="56,244 259,128" class="line"' in svg
    assert 'points="259,128 462,12" class="line beyond"' in svg
    assert 'points="56,244 259,70 462,12 462,128 259,186 56,244" class="spread"' in svg


def test_a_dot_chart_names_every_value_and_its_spread():
    svg = dot_chart([Series("seed", "seed", [0.6, 0.7], [], ["0.600", "0.700"])], [0.65], [0.05], "AUPRC", "AUPRC")
    assert "<title>seed: 0.600</title>" in svg
    assert "<title>seed: 0.700</title>" in svg
    assert "<title>seed: mean 0.650</title>" in svg
    assert "<title>seed: standard deviation 0.050</title>" in svg


def test_one_training_seed_has_no_standard_deviation():
    assert "standard deviation" not in dot_chart(
        [Series("seed", "seed", [0.6], [], ["0.600"])], [0.6], [None], "t", "x"
    )


def test_a_much_larger_corpus_is_drawn_to_twice_the_second_largest():
    assert [drawn_samples(sizes) for sizes in ([4000, 640, 660], [900, 640], [500])] == [1320, 900, 500]


def test_a_curve_that_goes_on_is_drawn_to_the_edge():
    # at 30 of the larger corpus's 40 samples, half way from 20 to 40: (5 + 9) / 2
    curve = {"num_samples": [0, 20, 40], "measured_samples": 40, "expected_features": [0, 5, 9]}
    large = curve | {"low": [0, 4, 8], "high": [0, 6, 10]}
    small = {key: [0, 3, 4] for key in BAND} | {"num_samples": [0, 15, 30], "measured_samples": 15}
    curves = {"counted": "all", "curves": {"anchor": large, "seed": small}}
    svg = rarefaction_chart({"rarefaction": curves})["svg"]
    assert "7.0 features (6.0 to 8.0) in 30 samples" in svg
    assert "in 40 samples" not in svg


def test_every_corpus_of_a_chart_has_its_own_tone():
    names = ["anchor", "seed", "background", "heldout"]
    assert [tone_of(name, names) for name in names] == ["anchor", "seed", "other0", "other1"]


def test_a_stacked_bar_divides_its_width_by_value():
    svg = stacked_bar([Part("a", "seed", 1), Part("none", "missing", 0), Part("b", "targeted", 3)], "parts")
    assert re.findall(r'x="([\d.]+)"', svg) == ["0.0", "250.0"]
    assert re.findall(r'width="([\d.]+)"', svg) == ["250.0", "750.0"]


def test_svg_text_and_attributes_are_escaped():
    assert element("text", "<a>", class_='"b"', stroke_width=2) == (
        '<text class="&#34;b&#34;" stroke-width="2">&lt;a&gt;</text>'
    )


def test_words_do_not_round_a_little_to_nothing():
    thin = "\N{NARROW NO-BREAK SPACE}"
    shares = [0, 0.0004, 0.534, 0.9996, 1, None]
    expected = [f"0{thin}%", f"<1{thin}%", f"53{thin}%", f">99{thin}%", f"100{thin}%", "\N{EN DASH}"]
    assert [percent(value) for value in shares] == expected
    assert [duration(s) for s in (0.25, 133, 3720)] == ["0.2 s", "2 min 13 s", "1 h 2 min"]


def test_a_long_text_is_cut_and_its_peak_stays_marked_only_where_it_is_shown():
    assert clip("x" * 10, 4) == "xxx\N{HORIZONTAL ELLIPSIS}"
    assert marked("a<b c", [2, 3]) == "a&lt;<mark>b</mark> c"
    assert "<mark>" not in marked("x" * 2000, [1500, 1503])
    assert len(marked("x" * 2000, [0, 1])) < 650
