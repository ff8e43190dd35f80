"""Which features a corpus switches on, counted: ACTIVATIONS rows come in, per-feature counts and shares go out.

The counts form a commutative monoid: `FeatureCounts.merge` is associative and commutative, `FeatureCounts.empty` is
its identity, so any split of a corpus into parts, folded in any order, gives the same numbers. `CountsFold` keys the
parts, so that one that arrives twice changes nothing. numpy and pyarrow only.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Shaped

UNLABELLED, NEGATIVE, POSITIVE = -1, 0, 1


def is_active(activations: Shaped[np.ndarray, "*n"], threshold: float) -> Bool[np.ndarray, "*n"]:
    """Whether each activation counts as active: `activation > threshold`, strictly (paper, section 4).

    Every decision of this kind in the library is made here. Both sides are compared as float32, the type in which
    activations are stored, so that 0.1 means the same number everywhere.
    """
    return np.asarray(activations, np.float32) > np.float32(threshold)


def coverage_fraction(active: Bool[np.ndarray, " d_sae"], target: Bool[np.ndarray, " d_sae"]) -> float:
    """FAC: share of the target features that are active, |active AND target| / |target|, in [0, 1].

    The target is `relevant AND active(anchor)`; the paper's ratio (section 4) with the intersection as numerator, so
    that it cannot exceed 1.

    Raises:
        ValueError: `target` selects no feature.
    """
    num_target = int(target.sum())
    if num_target == 0:
        raise ValueError("the target selects no feature, so its coverage is undefined; see the relevance criteria")
    return int((active & target).sum()) / num_target


def missing_coverage_fraction(
    added: Bool[np.ndarray, " d_sae"], seed: Bool[np.ndarray, " d_sae"], target: Bool[np.ndarray, " d_sae"]
) -> float | None:
    """`fac_missing`: share of the target features missing in the seed that added data switches on, in [0, 1].

    |added AND missing| / |missing| with missing = target AND NOT seed; very probably what the paper's tables report.
    None where the seed misses nothing.
    """
    missing = target & ~seed
    return coverage_fraction(added, missing) if missing.any() else None


class SparseRows(NamedTuple):
    """The (sample, feature) pairs of some ACTIVATIONS rows, flat."""

    row: Int[np.ndarray, " pairs"]
    feature_ids: Int[np.ndarray, " pairs"]
    activations: Float[np.ndarray, " pairs"]


def sparse_rows(rows: pa.Table, d_sae: int) -> SparseRows:
    """The pairs of ACTIVATIONS rows, in row order.

    Raises:
        ValueError: a row's lists differ in length, or a feature_id lies outside [0, d_sae).
    """
    lengths = pc.fill_null(pc.list_value_length(rows["feature_ids"]), 0).to_numpy()
    ids = flat_values(rows, "feature_ids")
    activations = flat_values(rows, "activations")
    if len(ids) != len(activations):
        raise ValueError(f"activations: {len(ids)} feature_ids stand beside {len(activations)} activations")
    if len(ids) and (ids.min() < 0 or ids.max() >= d_sae):
        raise ValueError(
            f"activations: feature_ids run from {ids.min()} to {ids.max()}, but the SAE has d_sae = {d_sae}; "
            "these rows were measured with another SAE"
        )
    return SparseRows(np.repeat(np.arange(len(rows)), lengths), ids, activations)


def flat_values(rows: pa.Table, column: str) -> Shaped[np.ndarray, " pairs"]:
    """The values of a list column, one row's after the other's."""
    return pc.list_flatten(rows[column]).to_numpy()


@dataclass(frozen=True)
class FeatureCounts:
    """How often each feature is active in some rows; merged with another's, in those of both.

    Rows whose `error` is set were not measured: they count in `num_errors` alone.
    """

    thresholds: tuple[float, ...]
    """Grid, ascending."""
    threshold: float
    """The one at which labelled rows are counted."""
    num_samples: Int[np.ndarray, "thresholds d_sae"]
    """Rows in which a feature is active, for each threshold of the grid."""
    max_activation: Float[np.ndarray, " d_sae"]
    """Largest activation, >= 0."""
    labelled: Int[np.ndarray, " d_sae"]
    """Labelled rows in which a feature is active at `threshold`."""
    positive: Int[np.ndarray, " d_sae"]
    """Positive rows in which a feature is active at `threshold`."""
    num_rows: int = 0
    num_tokens: int = 0
    num_labelled_rows: int = 0
    num_positive_rows: int = 0
    num_errors: int = 0

    @classmethod
    def empty(cls, thresholds: Sequence[float], threshold: float, d_sae: int) -> FeatureCounts:
        """The identity of `merge`: the counts of no rows."""
        counts, labelled, positive = (np.zeros(shape, np.int64) for shape in ((len(thresholds), d_sae), d_sae, d_sae))
        return cls(tuple(thresholds), threshold, counts, np.zeros(d_sae, np.float32), labelled, positive)

    @classmethod
    def from_rows(
        cls,
        rows: pa.Table,
        labels: Int[np.ndarray, " rows"],
        thresholds: Sequence[float],
        threshold: float,
        d_sae: int,
    ) -> FeatureCounts:
        """Counts of ACTIVATIONS rows with distinct features in each; `labels`: POSITIVE, NEGATIVE or UNLABELLED.

        Raises:
            ValueError: the lists do not fit together, or a feature_id lies outside [0, d_sae).
        """
        counter = FeatureCounter(thresholds, threshold, d_sae)
        counter.count(rows, labels)
        return counter.result()

    def merge(self, other: FeatureCounts) -> FeatureCounts:
        """Counts of the rows of both: sums, and the larger of the maxima.

        Raises:
            ValueError: the two were counted on another grid or another SAE.
        """
        mine, theirs = (self.thresholds, self.threshold), (other.thresholds, other.threshold)
        if mine != theirs or self.num_samples.shape != other.num_samples.shape:
            raise ValueError(
                f"counts on {mine} with shape {self.num_samples.shape} do not merge with "
                f"counts on {theirs} with shape {other.num_samples.shape}"
            )
        summed = [f.name for f in fields(self) if f.name not in ("thresholds", "threshold", "max_activation")]
        return FeatureCounts(
            self.thresholds,
            self.threshold,
            max_activation=np.maximum(self.max_activation, other.max_activation),
            **{name: getattr(self, name) + getattr(other, name) for name in summed},
        )

    def to_bytes(self) -> bytes:
        """The counts as an `.npz` without pickled objects."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> FeatureCounts:
        """What `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            values = {f.name: arrays[f.name] for f in fields(cls)}
        scalars = {name: value.item() for name, value in values.items() if value.ndim == 0}
        return cls(**{**values, **scalars, "thresholds": tuple(values["thresholds"].tolist())})


class FeatureCounter:
    """The counts of many ACTIVATIONS rows, some rows at a time: what a row costs does not depend on d_sae.

    A pair's level is the number of thresholds that it exceeds. One cell for each feature and level counts the pairs,
    and `result` sums the levels up: a pair above the third threshold is above the first two as well.
    """

    def __init__(self, thresholds: Sequence[float], threshold: float, d_sae: int) -> None:
        self._counts = FeatureCounts.empty(thresholds, threshold, d_sae)  # all but the grid, which stands in the cells
        self._cells = np.zeros(d_sae * (len(thresholds) + 1), np.int64)

    def count(self, rows: pa.Table, labels: Int[np.ndarray, " rows"]) -> None:
        """Add rows with distinct features in each; `labels`: POSITIVE, NEGATIVE or UNLABELLED.

        Raises:
            ValueError: the lists do not fit together, or a feature_id lies outside [0, d_sae).
        """
        old, num_errors = self._counts, len(rows) - rows["error"].null_count
        if num_errors:
            measured = pc.is_null(rows["error"])
            rows, labels = rows.filter(measured), labels[measured.to_numpy()]
        pairs = sparse_rows(rows, len(old.max_activation))
        self._count_levels(pairs)
        np.maximum.at(old.max_activation, pairs.feature_ids, pairs.activations)
        self._count_labels(pairs, labels)
        self._counts = replace(
            old,
            num_rows=old.num_rows + len(rows),
            num_tokens=old.num_tokens + int(pc.sum(rows["num_tokens"]).as_py() or 0),
            num_labelled_rows=old.num_labelled_rows + int(np.count_nonzero(labels != UNLABELLED)),
            num_positive_rows=old.num_positive_rows + int(np.count_nonzero(labels == POSITIVE)),
            num_errors=old.num_errors + num_errors,
        )

    def result(self) -> FeatureCounts:
        """The counts of all rows so far."""
        levels = self._cells.reshape(len(self._counts.max_activation), -1)
        at_least = levels[:, ::-1].cumsum(axis=1)[:, ::-1]
        return replace(
            self._counts,
            num_samples=np.ascontiguousarray(at_least[:, 1:].T),
            max_activation=self._counts.max_activation.copy(),
            labelled=self._counts.labelled.copy(),
            positive=self._counts.positive.copy(),
        )

    def _count_levels(self, pairs: SparseRows) -> None:
        level = np.zeros(len(pairs.feature_ids), np.uint8)
        for threshold in self._counts.thresholds:
            level += is_active(pairs.activations, threshold)
        cells = np.multiply(pairs.feature_ids, len(self._counts.thresholds) + 1, dtype=np.int64)
        cells += level
        self._cells += np.bincount(cells, minlength=len(self._cells))

    def _count_labels(self, pairs: SparseRows, labels: Int[np.ndarray, " rows"]) -> None:
        if (labels == UNLABELLED).all():
            return
        of_pair = labels[pairs.row]
        at = np.flatnonzero(is_active(pairs.activations, self._counts.threshold) & (of_pair != UNLABELLED))
        ids, d_sae = pairs.feature_ids[at], len(self._counts.labelled)
        np.add(self._counts.labelled, np.bincount(ids, minlength=d_sae), out=self._counts.labelled)
        positive = ids[of_pair[at] == POSITIVE]
        np.add(self._counts.positive, np.bincount(positive, minlength=d_sae), out=self._counts.positive)


class CountsFold:
    """The counts of keyed parts; a part that is folded again changes nothing."""

    def __init__(self, empty: FeatureCounts) -> None:
        self.total = empty
        self._parts: set[str] = set()

    def fold(self, part_id: str, counts: FeatureCounts) -> bool:
        """Add the counts of a part; returns False, and changes nothing, if that part is already in."""
        if part_id in self._parts:
            return False
        self.total = self.total.merge(counts)
        self._parts.add(part_id)
        return True


@dataclass(frozen=True)
class CorpusCoverage:
    """What one corpus switches on: the finished counts, as relevance, gaps, statistics and reports read them."""

    thresholds: tuple[float, ...]
    """Grid, ascending."""
    threshold: float
    """The one at which labelled samples were counted: `measure.threshold` of the reduction."""
    num_samples_active: Int[np.ndarray, "thresholds d_sae"]
    """Samples in which a feature is active, for each threshold of the grid."""
    max_activation: Float[np.ndarray, " d_sae"]
    num_samples: int
    """Measured samples; those with an error are not among them."""
    num_tokens: int
    """Pooled tokens."""
    num_errors: int
    """Samples that could not be measured."""
    num_labelled: int
    num_positive: int
    labelled_active: Int[np.ndarray, " d_sae"]
    """Labelled samples in which a feature is active at `threshold`."""
    positive_active: Int[np.ndarray, " d_sae"]
    """Positive samples in which a feature is active at `threshold`."""

    @classmethod
    def from_counts(cls, counts: FeatureCounts) -> CorpusCoverage:
        """The record of a corpus whose parts are all merged."""
        return cls(
            counts.thresholds,
            counts.threshold,
            counts.num_samples,
            counts.max_activation,
            counts.num_rows,
            counts.num_tokens,
            counts.num_errors,
            counts.num_labelled_rows,
            counts.num_positive_rows,
            counts.labelled,
            counts.positive,
        )

    @property
    def d_sae(self) -> int:
        return self.num_samples_active.shape[1]

    def counts(self, threshold: float) -> Int[np.ndarray, " d_sae"]:
        """Number of samples in which each feature is active at a threshold of the grid.

        Raises:
            ValueError: the threshold was not counted.
        """
        if threshold not in self.thresholds:
            raise ValueError(
                f"threshold {threshold} was not counted; the grid is {self.thresholds}. "
                "Add it to measure.thresholds and reduce again (the model does not run again)"
            )
        return self.num_samples_active[self.thresholds.index(threshold)]

    def active(self, threshold: float) -> Bool[np.ndarray, " d_sae"]:
        """Features that are active in at least one sample at a threshold of the grid.

        Raises:
            ValueError: the threshold was not counted.
        """
        return self.counts(threshold) > 0
