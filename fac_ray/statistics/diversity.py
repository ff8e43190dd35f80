"""Diversity measures that stand beside FAC: texts and activation rows come in, one number for each measure goes out.

Lexical measures read words, part-of-speech ones tags, semantic ones the direction of a sample's vector: its row of SAE
activations with Euclidean length 1. None of them knows the task. docs/diversity.md says what each means and which way
is more diverse. `VectorSums` is a mergeable accumulator; the other functions take a sample of the corpus.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from sklearn.random_projection import SparseRandomProjection

from fac_ray.config import DiversityConfig
from fac_ray.coverage.counts import sparse_rows
from fac_ray.statistics.ngrams import NgramTotals, count_ngrams, words_of

BLEU_LENGTHS = (1, 2, 3, 4)
SMOOTHING = 0.1
"""Matches counted where there is none, so that one missing 4-gram does not make a BLEU of 0."""
DIGITS = 6
"""Significant digits of a result; the order in which parts are added shows only beyond them."""
SAME_DIRECTION = 1e-9
"""Largest mean cosine distance that is taken for rounding, which is of either sign: rows of one direction whose
activations are off by 1e-5 of themselves, more than batches change them, are 1e-10 apart."""


def corpus_measures(unigrams: NgramTotals, bigrams: NgramTotals, vectors: VectorSums) -> dict[str, float | None]:
    """The measures that are exact for a corpus of any size."""
    return _rounded(
        _lexical_measures(unigrams, bigrams)
        | {"mean_cosine_distance": vectors.mean_cosine_distance(), "vendi_score": vectors.vendi_score()}
    )


def sample_measures(
    texts: Sequence[str], vectors: csr_array, reference: csr_array, config: DiversityConfig, seed: int
) -> dict[str, float | None]:
    """Every measure, of a sample alone: comparable between corpora whose samples are equally large.

    `vectors`, `reference`: unit rows of the sample, and of the sample whose clusters are used.
    """
    words = [words_of(text) for text in texts]
    totals = [NgramTotals.of(count_ngrams(words, length)) for length in (1, 2)]
    return _rounded(
        {
            "mean_words": sum(map(len, words)) / len(words) if words else None,
            **_lexical_measures(*totals),
            "self_bleu_4": self_bleu(words),
            "pos_distinct_2": None if config.pos_language is None else pos_distinct(texts),
            "mean_cosine_distance": mean_cosine_distance(np.asarray(vectors.sum(axis=0)), vectors.shape[0]),
            "cluster_entropy": cluster_entropy(vectors, reference, config.num_clusters, seed),
            "vendi_score": vendi_score((vectors @ vectors.T).toarray()),
        }
    )


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Self-BLEU-4: mean over the texts of BLEU-4 against all others as references, in [0, 1]; high is uniform.

    Zhu et al. 2018 (Texygen). BLEU is that of Papineni et al. 2002 for one sentence, with equal weights, the closest
    reference length and `SMOOTHING` for orders without a match. None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    grams = [[_ngrams(words, length) for words in texts] for length in BLEU_LENGTHS]
    best = [_best_two(counts) for counts in grams]
    lengths = Counter(len(words) for words in texts)
    return sum(
        _bleu(i, [counts[i] for counts in grams], best, len(words), lengths) for i, words in enumerate(texts)
    ) / len(texts)


def pos_distinct(texts: Sequence[str]) -> float | None:
    """POS Distinct-2: distinct pairs of neighbouring part-of-speech tags / all such pairs, in (0, 1]; English.

    Penn Treebank tags by TextBlob's rule-based tagger, whose lexicon comes with the package. None without a pair.
    """
    from textblob.en import tag  # loads a lexicon of 1.2 MB

    tags = [[name for _, name in tag(text)] for text in texts]
    return NgramTotals.of(count_ngrams(tags, 2)).distinct_fraction


def unit_vectors(rows: pa.Table, d_sae: int) -> csr_array:
    """The directions of ACTIVATIONS rows, one row each: activations divided by their Euclidean length.

    A row without activations (not measured, or nothing active) has no direction and is left out.
    """
    pairs = sparse_rows(rows, d_sae)
    lengths = np.sqrt(np.bincount(pairs.row, weights=pairs.activations.astype(float) ** 2, minlength=len(rows)))
    place = np.cumsum(lengths > 0, dtype=np.int32) - 1
    values = pairs.activations / lengths[pairs.row]
    indices = (place[pairs.row], pairs.feature_ids.astype(np.int32))  # scikit-learn takes no 64-bit indices
    return csr_array((values, indices), shape=(int((lengths > 0).sum()), d_sae))


def mean_cosine_distance(direction_sum: Float[np.ndarray, " d_sae"], num_vectors: int) -> float | None:
    """Mean over all pairs of 1 - cosine, in [0, 1] for activations (they are >= 0): 1 - (|sum u|^2 - n) / (n (n - 1)).

    0 up to `SAME_DIRECTION`. None for fewer than two vectors.
    """
    if num_vectors < 2:
        return None
    distance = 1 - (float(direction_sum @ direction_sum) - num_vectors) / (num_vectors * (num_vectors - 1))
    return 0.0 if distance <= SAME_DIRECTION else distance


def vendi_score(gram: Float[np.ndarray, "n n"], num_vectors: int | None = None) -> float | None:
    """Vendi score: exp(-sum l ln l) over the eigenvalues l of the Gram matrix / n, in [1, n] (Friedman and Dieng 2023).

    The effective number of different vectors. `gram`: inner products of n unit vectors or, in dual form, the d x d sum
    of their outer products with `num_vectors` = n, which has the same eigenvalues above 0. None without a vector.
    """
    num = len(gram) if num_vectors is None else num_vectors
    if num == 0:
        return None
    eigenvalues = np.linalg.eigvalsh(gram / num)
    positive = eigenvalues[eigenvalues > 0]
    return math.exp(-float(positive @ np.log(positive)))


def cluster_entropy(vectors: csr_array, reference: csr_array, num_clusters: int, seed: int) -> float | None:
    """-sum p ln p over the shares of the vectors in k-means clusters of the reference, in [0, ln clusters] nats.

    Clusters of one reference, so that corpora are told apart by what they hold (as in Han et al. 2022); of fewer
    reference vectors than clusters, each is one. None without a vector or a reference.
    """
    if not vectors.shape[0] or not reference.shape[0]:
        return None
    clusters = KMeans(min(num_clusters, reference.shape[0]), n_init=3, random_state=seed).fit(reference)
    shares = np.bincount(clusters.predict(vectors)) / vectors.shape[0]
    return -float(sum(share * math.log(share) for share in shares if share))


class VectorSums(NamedTuple):
    """Sums over unit vectors that the mean cosine distance and the Vendi score of any corpus follow from."""

    num_rows: int
    num_tokens: int
    num_vectors: int
    """Rows with a direction."""
    direction_sum: Float[np.ndarray, " d_sae"]
    outer_sum: Float[np.ndarray, "width width"]
    """Sum of outer products u u^T, of the projected vectors where d_sae is larger than the width."""

    @classmethod
    def of(cls, rows: pa.Table, d_sae: int, width: int) -> VectorSums:
        """Sums over ACTIVATIONS rows, in `width` dimensions at most."""
        vectors = unit_vectors(rows, d_sae)
        narrow = project(vectors, width).toarray()
        return cls(
            len(rows),
            int(np.sum(rows["num_tokens"].to_numpy())),
            vectors.shape[0],
            np.asarray(vectors.sum(axis=0)),
            narrow.T @ narrow,
        )

    def merge(self, other: VectorSums) -> VectorSums:
        """Sums over the rows of both."""
        return VectorSums(
            self.num_rows + other.num_rows,
            self.num_tokens + other.num_tokens,
            self.num_vectors + other.num_vectors,
            self.direction_sum + other.direction_sum,
            self.outer_sum + other.outer_sum,
        )

    def mean_cosine_distance(self) -> float | None:
        """`mean_cosine_distance` over all pairs of the corpus; exact, whatever the width."""
        return mean_cosine_distance(self.direction_sum, self.num_vectors)

    def vendi_score(self) -> float | None:
        """`vendi_score` in dual form; at most the width."""
        return vendi_score(self.outer_sum, self.num_vectors)


def project(vectors: csr_array, width: int) -> csr_array:
    """Unit vectors in at most `width` dimensions; those that are not wider stay as they are.

    A sparse random projection, the same everywhere (Li et al. 2006, seed 0), keeps inner products to within about
    1 / sqrt(width); the lengths are set to 1 again.
    """
    d_sae = vectors.shape[1]
    if d_sae <= width or not vectors.shape[0]:
        return vectors[:, :width]
    matrix = SparseRandomProjection(width, random_state=0).fit(csr_array((1, d_sae))).components_
    narrow = csr_array(vectors @ matrix.T)
    lengths = np.sqrt(np.asarray(narrow.power(2).sum(axis=1)))
    return csr_array(narrow / np.maximum(lengths, np.finfo(float).tiny)[:, None])


def _lexical_measures(unigrams: NgramTotals, bigrams: NgramTotals) -> dict[str, float | None]:
    return {
        "distinct_1": unigrams.distinct_fraction,
        "distinct_2": bigrams.distinct_fraction,
        "unigram_entropy": unigrams.entropy,
        "bigram_entropy": bigrams.entropy,
    }


def _ngrams(words: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[place:] for place in range(length)), strict=False))


def _best_two(counts: Sequence[Counter[Any]]) -> dict[Any, tuple[int, int, int]]:
    """Of each n-gram the largest count in one text, that text, and the largest count in another one."""
    best: dict[Any, tuple[int, int, int]] = {}
    for text, one in enumerate(counts):
        for ngram, count in one.items():
            first, holder, second = best.get(ngram, (0, -1, 0))
            if count > first:
                best[ngram] = (count, text, first)
            elif count > second:
                best[ngram] = (first, holder, count)
    return best


def _bleu(
    text: int,
    counts: Sequence[Counter[Any]],
    best: Sequence[dict[Any, tuple[int, int, int]]],
    length: int,
    lengths: Counter[int],
) -> float:
    """BLEU-4 of a text against all others."""
    precisions = []
    for one, most in zip(counts, best, strict=True):
        clipped = sum(min(count, most[ngram][2 if most[ngram][1] == text else 0]) for ngram, count in one.items())
        precisions.append((clipped or SMOOTHING) / max(one.total(), 1))
        if clipped == 0 and one is counts[0]:
            return 0.0
    others = (other for other, num in lengths.items() if other != length or num > 1)
    closest = min(others, key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > closest else math.exp(1 - closest / length)
    return brevity * math.exp(sum(map(math.log, precisions)) / len(precisions))


def _rounded(measures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else float(f"{value:.{DIGITS}g}") for name, value in measures.items()}
