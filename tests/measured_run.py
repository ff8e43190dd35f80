"""A run folder with measured corpora, written by hand: each sample is the set of features that it switches on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fac_ray.artifacts import MARKER, write_json, write_table
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.coverage.counts import UNLABELLED, CorpusCoverage, FeatureCounts
from fac_ray.coverage.reduction import save_coverage
from fac_ray.schema import ACTIVATIONS, EXEMPLARS, FEATURES

THRESHOLD = 0.5


def write_run(
    folder: Path,
    corpora: Mapping[str, Sequence[set[int]]],
    relevant: set[int],
    d_sae: int = 6,
    **sections: Any,
) -> RunConfig:
    """Write the run and return its config. Feature i is active at 1 + i; its span in corpus c is "c shows i"."""
    tree = {
        "name": folder.name,
        "model": {"path": "m", "hook_layer": 1},
        "sae": {"path": "s"},
        "corpora": {name: {"path": name, "label": "label"} for name in corpora},
        "measure": {"threshold": THRESHOLD, "thresholds": []},
        **sections,
        "run": {"folder": str(folder)},
    }
    config = config_from_tree(tree)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    write_json(folder / "manifest.json", {"model": {"digest": "1" * 32}, "sae": {"digest": "2" * 32}})
    for name, samples in corpora.items():
        write_measured(folder, name, samples, d_sae)
    write_table(folder / "relevance" / "features.parquet", features_of(relevant, d_sae))
    return config


def features_of(relevant: set[int], d_sae: int) -> pa.Table:
    """FEATURES rows in which exactly these features are relevant."""
    rows = [{"feature_id": i, "relevant": i in relevant, "method": "statistical", "effect": 2.0} for i in range(d_sae)]
    return pa.Table.from_pylist(rows, FEATURES)


def write_measured(folder: Path, name: str, samples: Sequence[set[int]], d_sae: int) -> None:
    """Write a corpus's activations and its finished coverage; every sample has ten pooled tokens."""
    rows = [
        {
            "sample_id": str(n),
            "feature_ids": sorted(ids),
            "activations": [1.0 + i for i in sorted(ids)],
            "num_tokens": 10,
        }
        for n, ids in enumerate(samples)
    ]
    table = pa.Table.from_pylist(rows, ACTIVATIONS)
    write_table(folder / "activations" / name / "part.parquet", table)
    coverage = folder / "coverage" / name
    counts = FeatureCounts.from_rows(table, np.full(len(table), UNLABELLED), (THRESHOLD,), THRESHOLD, d_sae)
    save_coverage(coverage, CorpusCoverage.from_counts(counts))
    spans = [
        {"feature_id": i, "rank": rank, "sample_id": "0", "activation": activation, "span": span}
        for i in sorted(set().union(*samples, set()))
        for rank, (activation, span) in enumerate([(1.0 + i, f"{name} shows {i}"), (THRESHOLD, "not active here")])
    ]
    write_table(coverage / "exemplars.parquet", pa.Table.from_pylist(spans, EXEMPLARS))
    write_json(coverage / MARKER, {"fingerprint": name, "needs": {}, "facts": {}})
