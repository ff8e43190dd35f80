"""The whole way from text to report, one stage after the other.

Each public function brings a run to one point of the way and does first whatever is missing before it; a stage whose
fingerprint is already finished in the run folder is skipped. So an interrupted run goes on where it stopped, and a
changed config redoes only what depends on the change.

    measure     samples -> activations -> coverage, for every corpus of the config
                (every command adds the diversity of what is measured, and intervals and tests where there are gaps)
    gaps        + relevant features of the task, and those that the seed misses
    synthesize  + texts that switch the missing features on, measured like any other corpus
    train       + a classifier on each arm of the experiment
    evaluate    + the arms compared on the held-out corpus
    report      report.json and report.html of whatever is finished

`compare`, `select` and `check` answer a question about what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fac_ray.artifacts import Stage, read_table, write_json, write_text
from fac_ray.config import ConfigError, RunConfig
from fac_ray.decisions.questions import require_check, require_comparison, require_selection
from fac_ray.run_folder import opened_run
from fac_ray.stages.description import describe
from fac_ray.stages.experiment import evaluation_stage, synthesis_stage, training_stage
from fac_ray.stages.measurement import coverage_stage, gaps_stage, relevance_stage, selection_stage


def run(config: RunConfig) -> dict[str, Any]:
    """Everything the config asks for; returns what `report.json` holds."""
    with opened_run(config):
        _measure(config)
        if {"anchor", "seed"} <= set(config.corpora):
            gaps_stage(config)
            if config.synthesis is not None:
                synthesis_stage(config)
                if config.training is not None:
                    evaluation_stage(config)
        describe(config)
        return _report(config)


def measure(config: RunConfig) -> dict[str, Any]:
    """Coverage of every corpus; returns what `report.json` holds."""
    with opened_run(config):
        _measure(config)
        describe(config)
        return _report(config)


def gaps(config: RunConfig) -> dict[str, Any]:
    """The relevant features that the anchor reaches and the seed misses; returns what `report.json` holds."""
    with opened_run(config):
        gaps_stage(config)
        describe(config)
        return _report(config)


def synthesize(config: RunConfig) -> dict[str, Any]:
    """Accepted samples for the missing features; returns what `report.json` holds."""
    with opened_run(config):
        synthesis_stage(config)
        describe(config)
        return _report(config)


def train(config: RunConfig) -> dict[str, Any]:
    """A model for each arm and seed, with its held-out scores; returns what `report.json` holds."""
    with opened_run(config):
        training_stage(config)
        return _report(config)


def evaluate(config: RunConfig) -> dict[str, Any]:
    """The arms compared; returns what `report.json` holds."""
    with opened_run(config):
        evaluation_stage(config)
        return _report(config)


def report(config: RunConfig) -> dict[str, Any]:
    """`report.json` and `report.html` of what is finished; runs no stage."""
    if not (config.folder / "config.json").is_file():
        raise ConfigError(f"{config.folder}: no run here yet; `fac-ray run` makes one")
    with opened_run(config):
        return _report(config)


def compare(config: RunConfig, corpora: Sequence[str], all_features: bool = False) -> dict[str, Any]:
    """Two or more corpora side by side, of this run or `RUN:corpus`; returns what `compare.json` holds."""
    from fac_ray.decisions.comparison import compare_corpora

    require_comparison(config, corpora)
    with opened_run(config):
        for name in corpora:
            if name in config.corpora:
                coverage_stage(config, name, config.corpora[name])
        anchor = config.corpora.get("anchor")
        told = anchor is not None and (anchor.label is not None or "background" in config.corpora)
        features = (
            read_table(relevance_stage(config).folder / "features.parquet") if told and not all_features else None
        )
        return compare_corpora(config, corpora, features)


def select(config: RunConfig, corpus: str) -> dict[str, Any]:
    """The samples of a corpus that together cover most; returns what `selection.json` holds."""
    require_selection(config, corpus)
    with opened_run(config):
        return json.loads((selection_stage(config, corpus).folder / "selection.json").read_text())


def check(config: RunConfig) -> dict[str, Any]:
    """Whether the seed keeps the rules of the config's section `check`; returns what `check.json` holds."""
    from fac_ray.decisions.check import check_seed, open_baseline

    require_check(config)
    with opened_run(config):
        gaps_stage(config)
        return check_seed(config, open_baseline(config))


def _measure(config: RunConfig) -> dict[str, Stage]:
    return {name: coverage_stage(config, name, corpus) for name, corpus in config.corpora.items()}


def _report(config: RunConfig) -> dict[str, Any]:
    from fac_ray.report import build_report, render_report

    facts = build_report(config.folder, config)
    write_json(config.folder / "report.json", facts)
    write_text(config.folder / "report.html", render_report(facts))
    return facts
