"""The sampling error of FAC: activations come in, bootstrap intervals and permutation tests go out. On Ray.

Tasks read the activations; only the features that FAC counts are kept, so the incidences of a million samples take some
hundred megabytes, and the driver draws from them. Their rows are in the order of the sample ids, so that a seed means
the same draws whatever the parts are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from jaxtyping import Bool
from scipy.sparse import csr_array, vstack

from fac_ray.artifacts import parquet_files
from fac_ray.schema import ACTIVATIONS, require_columns
from fac_ray.statistics.resampling import NUM_REPLICATES, bootstrap_coverage, incidence, permutation_test

MAX_TASKS = 64
MIN_PERMUTATIONS = 199
MAX_DRAWN_PAIRS = 20_000_000_000
"""(sample, feature) pairs that the permutations of one test read together, about a minute. Corpora that would need more
are divided fewer times, `MIN_PERMUTATIONS` at least."""
POOLS = {"seed": ("seed",), "seed+untargeted": ("seed", "untargeted"), "seed+targeted": ("seed", "targeted")}


def resample_coverage(
    folders: Mapping[str, Path],
    relevant: Bool[np.ndarray, " d_sae"],
    anchor: Bool[np.ndarray, " d_sae"],
    seed_corpus: Bool[np.ndarray, " d_sae"],
    threshold: float,
    seed: int,
) -> dict[str, Any]:
    """The sections `bootstrap` and `permutation` of a report.

    `folders`: activations of `anchor`, `seed` and, if there are any, `targeted` and `untargeted`. `anchor`,
    `seed_corpus`: the features that are active in them. Bootstrapped is FAC over the relevant features that the anchor
    reaches. Tested is the seed against the anchor over all relevant features, and targeted against untargeted samples
    over the missing ones; features that neither corpus has say nothing and are left out.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
    """
    target = relevant & anchor
    pools = {label: names for label, names in POOLS.items() if target.any() and set(names) <= set(folders)}
    bootstrap = {
        label: bootstrap_coverage(read_incidence([folders[name] for name in names], target, threshold), seed)._asdict()
        for label, names in pools.items()
    }
    pairs = [("seed", "anchor", "relevant", relevant), ("targeted", "untargeted", "missing", target & ~seed_corpus)]
    permutation = []
    for first, second, kind, features in pairs:
        if {first, second} <= set(folders):
            found = difference_test(folders[first], folders[second], features, threshold, seed)
            if found is not None:
                permutation.append({"first": first, "second": second, "features": kind, **found})
    return {"bootstrap": bootstrap, "permutation": permutation}


def difference_test(
    first: Path, second: Path, features: Bool[np.ndarray, " d_sae"], threshold: float, seed: int
) -> dict[str, Any] | None:
    """`permutation_test` of two corpora's activations over those of the features that either has, and their number.

    None where neither has one, as features that no corpus has say nothing, or where one has fewer than two samples.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
    """
    mine, others = (read_incidence([folder], features, threshold) for folder in (first, second))
    reached = np.flatnonzero(np.asarray(mine.sum(axis=0)) + np.asarray(others.sum(axis=0)))
    if not len(reached) or min(mine.shape[0], others.shape[0]) < 2:
        return None
    drawable = MAX_DRAWN_PAIRS // (mine.nnz + others.nnz)
    num_permutations = max(MIN_PERMUTATIONS, min(NUM_REPLICATES, drawable))
    found = permutation_test(mine[:, reached], others[:, reached], seed, num_permutations)
    return {"num_features": len(reached), **found._asdict()}


def read_incidence(
    folders: Sequence[Path], features: Bool[np.ndarray, " d_sae"], threshold: float
) -> Bool[csr_array, "samples features"]:
    """`incidence` of all measured samples of some corpora together, one row each.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
        ValueError: the activations were measured with another SAE.
    """
    paths = [str(path.resolve()) for folder in folders for path in _require_parts(folder)]
    groups = [paths[start::MAX_TASKS] for start in range(min(len(paths), MAX_TASKS))]
    read = ray.remote(_read_parts)
    parts = ray.get([read.remote(group, features, threshold) for group in groups])
    ids = pa.concat_arrays([ids for ids, _ in parts])
    return csr_array(vstack([matrix for _, matrix in parts]))[pc.sort_indices(ids).to_numpy()]


def _read_parts(
    paths: list[str], features: Bool[np.ndarray, " d_sae"], threshold: float
) -> tuple[pa.StringArray, Bool[csr_array, "samples features"]]:
    """Sample ids and incidence of some activation parts."""
    rows = pa.concat_tables([require_columns(pq.read_table(path), ACTIVATIONS, path) for path in paths])
    measured = rows.filter(pc.is_null(rows["error"]))
    return measured["sample_id"].combine_chunks(), incidence(measured, features, threshold)


def _require_parts(folder: Path) -> list[Path]:
    paths = parquet_files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: no Parquet file here")
    return paths
