"""The samples of a corpus that together cover most: its stored activations come in, ranked samples go out. On Ray Data.

Tasks read some activation parts each and hand on the samples that differ; one greedy search over those is exact, and
does not depend on the partition. Where they would not fit into memory, each partition is searched on its own first and
what they found is searched together (GreeDi, Mirzasoleiman et al. 2013). A second pass finds how far the optimum could
lie above the result, and what the longest samples would have given. No model runs here.

    selection/<corpus>/  selected.parquet  selected.jsonl  selection.json  selection.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.ipc
import pyarrow.parquet as pq
import ray
from jaxtyping import Int

from fac_ray.artifacts import parquet_files, write_json, write_table, write_text
from fac_ray.config import RunConfig
from fac_ray.decisions.greedy import (
    CANDIDATES,
    Limit,
    Pick,
    best_cover,
    best_gains,
    candidates_of,
    distinct_candidates,
    guaranteed_fraction,
    in_order,
    optimum_bound,
    value_of,
)
from fac_ray.decisions.pages import PAGE_ROWS, selection_page
from fac_ray.decisions.pool import WEIGHT_UNIT, Pool
from fac_ray.schema import ACTIVATIONS, SAMPLES, require_columns

if TYPE_CHECKING:
    from fac_ray.progress import Progress

MAX_PAIRS = 200_000_000
"""(sample, feature) pairs that one search holds in memory: 12 bytes each."""
MAX_TASKS = 256

SELECTED = pa.schema(
    [
        *SAMPLES,
        ("rank", pa.int32()),  # 0 was taken first
        ("gain", pa.float64()),  # weight of the features that it added
        ("new_features", pa.list_(pa.int32())),  # those features, ascending
        ("num_tokens", pa.int32()),  # pooled tokens
    ]
)


def select_samples(config: RunConfig, name: str, pool: Pool, output_folder: Path, progress: Progress) -> dict[str, int]:
    """Write the selected samples of a measured corpus and how they compare; returns their number and their tokens.

    The progress counts samples.

    Raises:
        FileNotFoundError: a folder holds no Parquet file.
        ValueError: the corpus has no feature that counts and is not covered already, or no such sample fits.
    """
    selection = config.selection
    limit = Limit(selection.num_samples, selection.budget_tokens)
    if not pool.reach.any():
        raise ValueError(f"selection: corpus {name} has no feature that counts and is not covered already")
    num_pairs = int(pool.coverage.counts(pool.threshold)[pool.left > 0].sum())
    partitions = _read_pool(pool, limit, selection.num_partitions or -(-num_pairs // MAX_PAIRS), progress)
    candidates, picks = _search(partitions, pool.left, limit)
    if not picks:
        raise ValueError(
            f"selection.budget_tokens = {limit.num_tokens}: every sample that adds a feature holds more tokens"
        )
    selected = _selected_rows(pool, candidates, picks)
    facts = {
        "run": config.name,
        "corpus": name,
        "threshold": pool.threshold,
        "preset": config.measure.preset,
        "weights": selection.weights,
        "base": selection.base,
        **_facts(pool, selected, limit, len(partitions)),
    }
    write_table(output_folder / "selected.parquet", selected)
    lines = (json.dumps(row, ensure_ascii=False) for row in selected.to_pylist())
    write_text(output_folder / "selected.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(output_folder / "selection.md", selection_page(facts, selected, PAGE_ROWS))
    write_json(output_folder / "selection.json", facts)
    return {"num_selected": len(selected), "num_selected_tokens": facts["methods"][0]["num_tokens"]}


def _read_pool(pool: Pool, limit: Limit, num_partitions: int, progress: Progress) -> list[pa.Table]:
    """The candidates of each partition: all that differ if there is one, else those that its own search takes."""
    paths = _activation_parts(pool)
    num_groups = min(len(paths), MAX_TASKS if num_partitions == 1 else num_partitions)
    search = limit if num_partitions > 1 else None
    task = partial(_read_candidates, left=ray.put(pool.left), threshold=pool.threshold, search=search)
    found = []
    for row in _map_groups(paths, num_groups, task):
        progress.advance(row["num_rows"])
        found.append((row["group"], _from_bytes(row["candidates"])))
    tables = [table for _, table in sorted(found, key=lambda one: one[0])]
    return tables if search else [distinct_candidates(pa.concat_tables(tables))]


def _read_candidates(batch: pa.Table, left: ray.ObjectRef, threshold: float, search: Limit | None) -> pa.Table:
    """The candidates in the activation parts that a batch names."""
    weights = ray.get(left)
    num_rows, tables = 0, [CANDIDATES.empty_table()]
    for rows in _read_parts(batch):
        num_rows += len(rows)
        tables.append(distinct_candidates(candidates_of(rows, weights, threshold)))
    candidates = distinct_candidates(pa.concat_tables(tables))
    if search is not None:
        candidates = candidates.take(pa.array([p.row for p in best_cover(candidates, weights, search)], pa.int64()))
    cell = pa.array([_to_bytes(candidates)], pa.large_binary())
    return pa.table({"group": batch["group"], "num_rows": [num_rows], "candidates": cell})


def _search(
    partitions: Sequence[pa.Table], left: Int[np.ndarray, " d_sae"], limit: Limit
) -> tuple[pa.Table, list[Pick]]:
    """The best cover of the union; with several partitions, of the union or of one of them, whichever is worth most."""
    union = distinct_candidates(pa.concat_tables(partitions))
    tables = [union] if len(partitions) == 1 else [union, *map(in_order, partitions)]
    searched = [(table, best_cover(table, left, limit)) for table in tables]
    return max(searched, key=lambda one: value_of(one[1]))


def _selected_rows(pool: Pool, candidates: pa.Table, picks: Sequence[Pick]) -> pa.Table:
    """SELECTED rows in the order of taking."""
    taken = candidates.take(pa.array([pick.row for pick in picks], pa.int64()))
    ids, left, new_features = taken["sample_id"], pool.left.copy(), []
    for features in taken["feature_ids"].to_pylist():
        new_features.append([i for i in features if left[i] > 0])
        left[features] = 0
    columns = {
        "sample_id": ids,
        "rank": pa.array(range(len(picks)), pa.int32()),
        "gain": pa.array([pick.gain / WEIGHT_UNIT for pick in picks], pa.float64()),
        "new_features": pa.array(new_features, pa.list_(pa.int32())),
        "num_tokens": taken["num_tokens"],
    }
    paths = [str(path) for path in parquet_files(pool.samples)]
    texts = ds.dataset(paths, schema=SAMPLES).to_table(filter=ds.field("sample_id").isin(ids.combine_chunks()))
    at = pc.index_in(ids, value_set=texts["sample_id"].combine_chunks())
    texts = texts.take(at)
    return require_columns(
        pa.table({**{name: texts[name] for name in SAMPLES.names}, **columns}), SELECTED, str(pool.samples)
    )


def _facts(pool: Pool, selected: pa.Table, limit: Limit, num_partitions: int) -> dict[str, Any]:
    """What was taken, how good it is, and what else the same size or the same tokens would have given."""
    left = pool.left.copy()
    left[selected["new_features"].combine_chunks().flatten().to_numpy()] = 0
    value, num_samples, num_tokens = (
        int((pool.left - left).sum()),
        len(selected),
        pc.sum(selected["num_tokens"]).as_py(),
    )
    best, longest = _second_pass(pool, left, limit, num_samples)
    bound = optimum_bound(value, best, np.where(pool.coverage.active(pool.threshold), left, 0), limit)
    within = longest.slice(0, int((longest["num_tokens"].to_numpy().cumsum() <= num_tokens).sum()))
    share = num_tokens / pool.coverage.num_tokens
    methods = [
        pool.row("selected", None, num_samples, num_tokens, value),
        pool.random_row("samples", num_samples),
        pool.chosen_row("longest first", "samples", longest),
        pool.random_row("tokens", round(pool.coverage.num_samples * share)),
        pool.chosen_row("longest first", "tokens", within),
        pool.row("whole corpus", None, pool.coverage.num_samples, pool.coverage.num_tokens, int(pool.reach.sum())),
    ]
    return {
        "limit": limit._asdict(),
        "num_partitions": num_partitions,
        "guaranteed_fraction": guaranteed_fraction(limit, num_partitions),
        "certified_fraction": value / bound,
        "weight_total": int(pool.weights.sum()) / WEIGHT_UNIT,
        "weight_base": pool.base_weight / WEIGHT_UNIT,
        "methods": methods,
    }


def _second_pass(
    pool: Pool, left: Int[np.ndarray, " d_sae"], limit: Limit, num_longest: int
) -> tuple[Int[np.ndarray, "2 n"], pa.Table]:
    """Over all samples: what `optimum_bound` needs after the selection, and the longest samples, longest first."""
    paths = _activation_parts(pool)
    weights = ray.put((pool.left, left))
    task = partial(_read_rest, weights=weights, threshold=pool.threshold, limit=limit, num_longest=num_longest)
    rows = list(_map_groups(paths, min(len(paths), MAX_TASKS), task))
    best = np.concatenate([np.frombuffer(row["best"], np.int64).reshape(2, -1) for row in rows], axis=1)
    return best, _longest(pa.concat_tables(_from_bytes(row["longest"]) for row in rows), num_longest)


def _read_rest(batch: pa.Table, weights: ray.ObjectRef, threshold: float, limit: Limit, num_longest: int) -> pa.Table:
    """The same over the activation parts that a batch names."""
    before, after = ray.get(weights)
    best, longest = [np.zeros((2, 0), np.int64)], CANDIDATES.empty_table()
    for rows in _read_parts(batch):
        candidates = candidates_of(rows, before, threshold)
        best.append(best_gains(candidates, after, limit))
        longest = _longest(pa.concat_tables([longest, candidates]), num_longest)
    cells = {"best": np.concatenate(best, axis=1).tobytes(), "longest": _to_bytes(longest)}
    return pa.table({name: pa.array([cell], pa.large_binary()) for name, cell in cells.items()})


def _longest(candidates: pa.Table, num: int) -> pa.Table:
    return candidates.sort_by([("num_tokens", "descending"), ("sample_id", "ascending")]).slice(0, num)


def _activation_parts(pool: Pool) -> list[Path]:
    paths = parquet_files(pool.activations)
    if not paths:
        raise FileNotFoundError(f"{pool.activations}: no Parquet file here")
    return paths


def _read_parts(batch: pa.Table) -> Iterator[pa.Table]:
    for path in json.loads(batch["paths"][0].as_py()):
        yield require_columns(pq.read_table(path), ACTIVATIONS, path)


def _map_groups(
    paths: Sequence[Path], num_groups: int, function: Callable[[pa.Table], pa.Table]
) -> Iterator[dict[str, Any]]:
    """The rows of `function` over neighbouring paths in groups of about equal number, a task each, as they finish."""
    groups = np.array_split([str(path.resolve()) for path in paths], num_groups)
    items = [{"group": number, "paths": json.dumps(group.tolist())} for number, group in enumerate(groups)]
    dataset = ray.data.from_items(items, override_num_blocks=num_groups)
    yield from dataset.map_batches(function, batch_size=1, batch_format="pyarrow").iter_rows()


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
