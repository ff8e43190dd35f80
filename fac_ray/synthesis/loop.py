"""The closed loop: missing features come in, texts that switch them on go out, and as many that were asked for without.

Attempts are rounds over all features that still need samples: step 1 asks for candidates and measures them, step 2
asks again with the strongest and the weakest of them in the prompt, and what is active and passes the gates is accepted
(paper, section 6; the rules are in `candidates.py`). Every batch is stored as it is measured. The loop itself keeps
nothing: it reads the batches that are there and makes those that are not, so it goes on wherever it was stopped.

    <folder>/candidates/attempt-000-step-1.parquet       judged candidates, one file for each batch (CANDIDATES)
    <folder>/candidates/parts/...-chunk-0000.parquet     measured chunks of a batch that is not judged yet
    <folder>/targeted.parquet  untargeted.parquet        accepted samples (SYNTHETIC)
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fac_ray.artifacts import parquet_files, read_table, write_table
from fac_ray.config import RunConfig
from fac_ray.progress import Progress
from fac_ray.schema import CANDIDATES, GAPS, SYNTHETIC, content_id, require_columns
from fac_ray.synthesis.candidates import (
    Request,
    Row,
    Rules,
    Target,
    candidate_row,
    first_requests,
    judge_attempt,
    judge_untargeted,
    normalised,
    rules_of,
    second_requests,
    text_key,
    untargeted_requests,
)
from fac_ray.synthesis.engines import Produce, engine_pool
from fac_ray.tasks import TaskCard

logger = logging.getLogger(__name__)

CHUNK_REQUESTS = 2000
"""Most requests of a chunk: what is lost when a run is killed, and what is repeated when an actor dies."""


def synthesize(
    config: RunConfig, gaps: pa.Table, seed_samples: pa.Table, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write `targeted.parquet` and `untargeted.parquet` for the missing features of GAPS; a stopped call goes on.

    `seed_samples` are the SAMPLES rows of the seed corpus: their texts are duplicates, and the positive ones are the
    examples of the untargeted arm. Returns num_features, num_filled (features with `samples_per_feature` accepted
    samples), num_accepted, num_rejected, rejected_by_reason and num_requests, all of the targeted arm, and
    num_untargeted. `progress` counts candidates. With no gap, nothing is started.

    Raises:
        ConfigError: no synthesis section, an unknown card, or a harmful one without `synthesis.allow_harmful`.
        ValueError: a column is missing, a gap has no exemplar, or the seed corpus has no sample.
        RuntimeError: an engine could not be started or kept alive.
    """
    rules = rules_of(config)
    targets = _targets(gaps, rules)
    examples = _examples(seed_samples, config.relevance.positive, rules) if targets else []
    with engine_pool(config) as produce:
        loop = Loop(rules, folder, progress, produce)
        return close_gaps(loop, targets, seed_samples["text"].to_pylist(), examples)


class Loop(NamedTuple):
    """What every step of the loop needs."""

    rules: Rules
    folder: Path
    progress: Progress
    produce: Produce


def close_gaps(
    loop: Loop, targets: Sequence[Target], seed_texts: Sequence[str], examples: Sequence[str]
) -> dict[str, Any]:
    """`synthesize` with a given way to produce replies; `examples` are shown to the untargeted arm. Facts as there."""
    seed_keys = {text_key(text) for text in seed_texts}
    candidates = fill_features(loop, targets, seed_keys)
    accepted = _accepted(candidates)
    untargeted = _accepted(fill_untargeted(loop, len(accepted), len(candidates), examples, seed_keys))
    write_table(loop.folder / "targeted.parquet", _synthetic(accepted, loop.rules.card))
    write_table(loop.folder / "untargeted.parquet", _synthetic(untargeted, loop.rules.card))
    return _facts(loop.rules, targets, candidates, len(untargeted))


# ---- the targeted arm ----


def fill_features(loop: Loop, targets: Sequence[Target], seed_keys: set[str]) -> list[Row]:
    """All judged candidates of all attempts. A feature is asked for until it has `samples_per_feature` accepted
    samples or `max_attempts` attempts are over."""
    candidates: list[Row] = []
    missing = {target.feature_id: loop.rules.synthesis.samples_per_feature for target in targets}
    seen = set(seed_keys)
    for attempt in range(loop.rules.synthesis.max_attempts):
        pending = [target for target in targets if missing[target.feature_id] > 0]
        if attempt > 0 and not pending:
            break
        judged = _attempt(loop, attempt, pending, missing, seen)
        for row in _accepted(judged):
            missing[row["feature_id"]] -= 1
        candidates += judged
        _log_attempt(attempt, judged, missing)
    return candidates


def _attempt(loop: Loop, attempt: int, pending: Sequence[Target], missing: dict[int, int], seen: set[str]) -> list[Row]:
    """One round over the pending features: both steps, judged in the order of the features' rank. Accepted texts
    are added to `seen`."""
    names = f"attempt-{attempt:03d}-step-1", f"attempt-{attempt:03d}-step-2"
    first = _batch(loop, names[0], [r for target in pending for r in first_requests(target, attempt, loop.rules)])
    by_feature = _by_feature(first)
    second = _batch(
        loop,
        names[1],
        [
            request
            for target in pending
            for request in second_requests(target, attempt, by_feature[target.feature_id], loop.rules)
        ],
    )
    by_feature = _by_feature([*first, *second])
    judged = []
    for target in pending:
        rows = by_feature[target.feature_id]
        verdicts = judge_attempt(target, rows, missing[target.feature_id], seen, loop.rules)
        seen |= {text_key(row["text"]) for row in _accepted(verdicts)}
        judged += verdicts
    for step, name in enumerate(names, start=1):
        _seal(loop.folder, name, [row for row in judged if row["step"] == step])
    return judged


def _by_feature(rows: Sequence[Row]) -> dict[int, list[Row]]:
    grouped: dict[int, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["feature_id"], []).append(row)
    return grouped


# ---- the untargeted arm ----


def fill_untargeted(loop: Loop, num: int, max_requests: int, examples: Sequence[str], seed_keys: set[str]) -> list[Row]:
    """All judged candidates of the control: rounds until `num` are accepted, with `max_requests` requests at most."""
    candidates: list[Row] = []
    missing, attempt, seen = num, 0, set(seed_keys)
    while missing > 0 and len(candidates) < max_requests:
        name = f"untargeted-{attempt:03d}"
        num_requests = min(missing + missing // 4 + 4, max_requests - len(candidates))
        rows = _batch(loop, name, untargeted_requests(examples, attempt, num_requests, loop.rules))
        judged = judge_untargeted(rows, missing, seen, examples, loop.rules)
        _seal(loop.folder, name, judged)
        seen |= {text_key(row["text"]) for row in _accepted(judged)}
        missing -= len(_accepted(judged))
        candidates += judged
        attempt += 1
    if missing > 0:
        logger.warning("untargeted: %d of %d samples after %d requests", num - missing, num, len(candidates))
    return candidates


# ---- batches on disk ----


def _batch(loop: Loop, name: str, requests: Sequence[Request]) -> list[Row]:
    """One row for each request, in the same order: read where it is stored, else produced and stored by chunks."""
    folder = loop.folder / "candidates"
    stored = {row["candidate_id"]: row for row in _stored_rows(folder, name)}
    chunks = [chunk for chunk in _chunks(loop, requests) if any(r.candidate_id not in stored for r in chunk)]
    loop.progress.advance(len(requests) - sum(map(len, chunks)))
    if chunks:
        logger.info("%s: %d requests, %d of them to be made", name, len(requests), sum(map(len, chunks)))
    for index, replies in loop.produce(chunks) if chunks else ():
        pairs = zip(chunks[index], replies, strict=True)
        rows = [candidate_row(request, reply, loop.rules.generator) for request, reply in pairs]
        part = folder / "parts" / f"{name}-chunk-{rows[0]['candidate_id'][:12]}.parquet"
        write_table(part, pa.Table.from_pylist(rows, schema=CANDIDATES))
        stored |= {row["candidate_id"]: row for row in rows}
        loop.progress.advance(len(rows))
    return [stored[request.candidate_id] for request in requests]


def _chunks(loop: Loop, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """Chunks that keep every generator busy; which requests share one does not depend on what is stored."""
    size = max(1, min(CHUNK_REQUESTS, math.ceil(len(requests) / loop.rules.synthesis.num_actors)))
    return (requests[start : start + size] for start in range(0, len(requests), size))


def _stored_rows(folder: Path, name: str) -> list[Row]:
    paths = [*parquet_files(folder / f"{name}.parquet"), *sorted((folder / "parts").glob(f"{name}-chunk-*.parquet"))]
    return [row for path in paths for row in read_table(path).to_pylist()]


def _seal(folder: Path, name: str, judged: Sequence[Row]) -> None:
    """Write the judged batch as one file; then its chunks are not needed any more."""
    path = folder / "candidates" / f"{name}.parquet"
    table = pa.Table.from_pylist(list(judged), schema=CANDIDATES)
    if not path.is_file() or not read_table(path).equals(table):
        write_table(path, table)
    for part in (folder / "candidates" / "parts").glob(f"{name}-chunk-*.parquet"):
        part.unlink()


# ---- what comes in and what goes out ----


def _targets(gaps: pa.Table, rules: Rules) -> list[Target]:
    rows = require_columns(gaps, GAPS, "gaps").sort_by("rank").to_pylist()[: rules.synthesis.max_features]
    if bare := [row["feature_id"] for row in rows if not row["exemplars"]]:
        raise ValueError(f"gaps: features {bare[:10]} have no exemplar, so nothing can be asked for")
    return [Target(row["feature_id"], tuple(row["exemplars"]), row["explanation"] or "") for row in rows]


def _examples(seed_samples: pa.Table, positive: Sequence[str], rules: Rules) -> list[str]:
    """Texts of the positive seed samples, or of all where none has a positive label, cut at the card's `max_words`."""
    labelled = seed_samples.filter(pc.is_in(seed_samples["label"], pa.array(positive, pa.string())))
    chosen = (labelled if labelled.num_rows else seed_samples).sort_by("sample_id")
    if chosen.num_rows == 0:
        raise ValueError("seed: it has no sample that could be an example for the untargeted arm")
    words = [normalised(text).split(" ")[: rules.card.max_words] for text in chosen["text"].to_pylist()]
    return [" ".join(text) for text in words]


def _accepted(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "accepted"]


def _synthetic(accepted: Sequence[Row], card: TaskCard) -> pa.Table:
    rows = [
        {
            **{name: row[name] for name in SYNTHETIC.names if name in row},
            "sample_id": row["candidate_id"],
            "content_id": content_id(row["text"]),
            "label": card.label,
            "harmful": card.harmful,
        }
        for row in accepted
    ]
    return pa.Table.from_pylist(rows, schema=SYNTHETIC)


def _facts(rules: Rules, targets: Sequence[Target], candidates: Sequence[Row], num_untargeted: int) -> dict[str, Any]:
    per_feature = Counter(row["feature_id"] for row in _accepted(candidates))
    reasons = Counter(row["reason"].partition(":")[0] for row in candidates if row["status"] == "rejected")
    return {
        "num_features": len(targets),
        "num_filled": sum(n >= rules.synthesis.samples_per_feature for n in per_feature.values()),
        "num_accepted": per_feature.total(),
        "num_rejected": reasons.total(),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "num_requests": len(candidates),
        "num_untargeted": num_untargeted,
    }


def _log_attempt(attempt: int, judged: Sequence[Row], missing: dict[int, int]) -> None:
    logger.info(
        "attempt %d: %d of %d candidates accepted; %d of %d features filled",
        attempt,
        len(_accepted(judged)),
        len(judged),
        sum(num <= 0 for num in missing.values()),
        len(missing),
    )
