"""Training sets that differ in one thing only: corpora and synthetic samples come in, arms of equal shape go out.

Every arm has as many samples as the seed has labelled ones, and the same label in the same row, so that all arms
train for the same steps on the same label balance (docs/training.md says why samples are replaced, not added).

    seed         all labelled seed samples
    targeted     the same rows, K of the positive ones replaced by samples synthesized for missing features
    untargeted   the same rows, the same K replaced by samples synthesized without a target
    anchor       samples of the anchor, drawn to the same labels: what real data of this size can reach
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from fac_ray.schema import content_id

logger = logging.getLogger(__name__)

ARM = pa.schema(
    [
        ("sample_id", pa.string()),
        ("text", pa.string()),
        ("label", pa.int8()),  # 1: positive, belongs to the task; 0: any other label
        ("origin", pa.string()),  # seed | targeted | untargeted | anchor
    ]
)

SYNTHESIZED = ("targeted", "untargeted")


def build_arms(
    seed: pa.Table,
    anchor: pa.Table,
    targeted: pa.Table,
    untargeted: pa.Table,
    positive: Sequence[str],
    names: Sequence[str],
    seed_value: int,
    heldout: pa.Table | None = None,
) -> dict[str, pa.Table]:
    """The named arms: columns `ARM`, as many rows as the seed has labelled samples, equal label columns.

    K, the number of replaced rows, is the number of positive synthetic samples (of the smaller set, with two), or
    the number of positive seed samples where that is smaller still. The order of rows in the tables is irrelevant.

    Args:
        seed, anchor: columns of SAMPLES; rows without a label are not used.
        targeted, untargeted: columns of SYNTHETIC; rows without a positive label are not used.
        positive: the labels that mean "belongs to the task".
        names: which arms, in the order of the result; tables of other arms are not looked at.
        seed_value: seeds every draw.
        heldout: columns of SAMPLES; what has the content of one of its samples is left out before any draw.

    Raises:
        ValueError: a corpus has no labels or misses one class, or the anchor is too small for its arm.
    """
    blocked = frozenset() if heldout is None else _contents(heldout)
    base = _both_classes(_usable(seed, "seed", positive, blocked), "seed", positive)
    synthetic = {
        name: _positives(_usable(table, name, positive, blocked))
        for name, table in zip(SYNTHESIZED, (targeted, untargeted), strict=True)
        if name in names
    }
    arms = {"seed": base, **_replaced(base, synthetic, np.random.default_rng((seed_value, 0)))}
    if "anchor" in names:
        pool = _both_classes(_usable(anchor, "anchor", positive, blocked), "anchor", positive)
        arms["anchor"] = _drawn(pool, labels_of(base), np.random.default_rng((seed_value, 1)))
    return {name: arms[name] for name in names}


def labels_of(arm: pa.Table) -> Int[np.ndarray, " N"]:
    """The 0/1 labels of an arm, in row order."""
    return arm["label"].to_numpy()


def repeated_contents(rows: pa.Table, heldout: pa.Table) -> int:
    """Number of rows whose content is that of a held-out sample; both tables need a column `text`."""
    blocked = _contents(heldout)
    return sum(not blocked.isdisjoint(ids) for ids in _content_ids(rows))


def _usable(rows: pa.Table, origin: str, positive: Sequence[str], blocked: frozenset[str]) -> pa.Table:
    """The labelled rows that are not in the held-out corpus, as `ARM`, in the order of their contents."""
    content_ids = _content_ids(rows)
    fresh = pa.array([blocked.isdisjoint(ids) for ids in content_ids], pa.bool_())
    if num_repeated := rows.num_rows - pc.sum(fresh, min_count=0).as_py():
        logger.warning("%s: %d samples are also in the held-out corpus and are left out", origin, num_repeated)
    rows = rows.append_column("order", pa.array([ids[0] for ids in content_ids], pa.string()))
    rows = rows.filter(pc.and_(fresh, pc.is_valid(rows["label"])))
    rows = rows.sort_by([("order", "ascending"), ("sample_id", "ascending")])
    is_positive = pc.is_in(rows["label"], pa.array(positive, pa.string())).cast(pa.int8())
    columns = [rows["sample_id"], rows["text"], is_positive, pa.repeat(origin, rows.num_rows)]
    return pa.table(columns, schema=ARM)


def _content_ids(rows: pa.Table) -> list[tuple[str, ...]]:
    """For each row the hash of its text and, where it is known, the `content_id`, which for a chat is another."""
    by_text = [content_id(text) for text in rows["text"].to_pylist()]
    if "content_id" not in rows.column_names:
        return [(one,) for one in by_text]
    return list(zip(by_text, rows["content_id"].to_pylist(), strict=True))


def _contents(rows: pa.Table) -> frozenset[str]:
    return frozenset(one for ids in _content_ids(rows) for one in ids)


def _both_classes(rows: pa.Table, origin: str, positive: Sequence[str]) -> pa.Table:
    num_positive = int(labels_of(rows).sum())
    if rows.num_rows == 0:
        raise ValueError(
            f"{origin}: no sample has a label, and training needs them; name the column in corpora.{origin}.label"
        )
    if num_positive in (0, rows.num_rows):
        missing = "positive" if num_positive == 0 else "negative"
        raise ValueError(
            f"{origin}: none of {rows.num_rows} labelled samples is {missing}; "
            f"relevance.positive says which labels are positive, now {list(positive)}"
        )
    return rows


def _positives(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["label"], 1))


def _replaced(base: pa.Table, synthetic: dict[str, pa.Table], rng: np.random.Generator) -> dict[str, pa.Table]:
    """The base with K positive rows, the same in each arm, replaced by synthetic samples."""
    positions = np.flatnonzero(labels_of(base))
    num_replaced = min([len(positions), *(rows.num_rows for rows in synthetic.values())])
    for name, rows in synthetic.items():
        if rows.num_rows != num_replaced:
            logger.warning(
                "%s: %d of %d samples are used, the same number in every arm", name, num_replaced, rows.num_rows
            )
    positions = np.sort(rng.permutation(positions)[:num_replaced])
    return {name: _put(base, positions, _draw(rows, num_replaced, rng)) for name, rows in synthetic.items()}


def _put(base: pa.Table, positions: Int[np.ndarray, " K"], rows: pa.Table) -> pa.Table:
    order = np.arange(base.num_rows)
    order[positions] = base.num_rows + np.arange(len(positions))
    return pa.concat_tables([base, rows]).take(order)


def _drawn(pool: pa.Table, labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> pa.Table:
    """Rows of the pool, none twice, with exactly these labels in this order."""
    order = np.empty(len(labels), np.int64)
    for label, kind in ((0, "negative"), (1, "positive")):
        wanted, available = np.flatnonzero(labels == label), np.flatnonzero(labels_of(pool) == label)
        if len(available) < len(wanted):
            raise ValueError(
                f"anchor: it has {len(available)} {kind} samples, and an arm like the seed needs {len(wanted)}; "
                "give a larger anchor or leave it out of training.arms"
            )
        order[wanted] = rng.permutation(available)[: len(wanted)]
    return pool.take(order)


def _draw(rows: pa.Table, num_rows: int, rng: np.random.Generator) -> pa.Table:
    return rows.take(rng.permutation(rows.num_rows)[:num_rows])
