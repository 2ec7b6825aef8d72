"""Interpolated Kneser-Ney bigram: the bar that a trained language model has to clear."""

from collections.abc import Iterable

import numpy as np


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram over token ids.

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d n(v) / c(v) * q(w), where n(v) counts the distinct successors of v,
    q(w) is the share of distinct pairs that end in w, and d = n1 / (n1 + 2 n2) from the numbers of pairs seen once and
    twice. q is mixed with the uniform distribution in the same way, so that no token has probability zero.

    Args:
        blocks: rows of token ids; pairs are counted within a row.
        vocab_size: number of token ids.

    Raises:
        ValueError: if no row holds two tokens.
    """

    def __init__(self, blocks: Iterable[np.ndarray], vocab_size: int):
        previous, following = pairs(blocks)
        if len(previous) == 0:
            raise ValueError("a bigram needs at least one row of two tokens")
        self.vocab_size = vocab_size
        # A sorted table of the pairs seen, keyed by v * V + w.
        self.keys, self.counts = np.unique(previous * vocab_size + following, return_counts=True)
        seen_previous, seen_following = np.divmod(self.keys, vocab_size)
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = once / (once + 2 * twice) if once and twice else 0.5

        self.totals = np.bincount(previous, minlength=vocab_size)
        self.successors = np.bincount(seen_previous, minlength=vocab_size)
        continuations = np.bincount(seen_following, minlength=vocab_size)
        reserved = self.discount * (continuations > 0).sum() / len(self.keys)
        self.continuation = np.maximum(continuations - self.discount, 0) / len(self.keys) + reserved / vocab_size

    def probability(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """p(following | previous) for two arrays of token ids of the same shape (N,); float64 of shape (N,)."""
        keys = previous * self.vocab_size + following
        index = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        counts = np.where(self.keys[index] == keys, self.counts[index], 0)
        totals = self.totals[previous]
        # After a token that was never seen as a predecessor only the continuation distribution is left.
        seen = np.maximum(totals, 1)
        direct = np.maximum(counts - self.discount, 0) / seen
        backoff = np.where(totals > 0, self.discount * self.successors[previous] / seen, 1.0)
        return direct + backoff * self.continuation[following]

    def perplexity(self, blocks: Iterable[np.ndarray]) -> float:
        """Perplexity over the pairs within each row; as for the language models, a row's first token is given.

        Raises:
            ValueError: if no row holds two tokens.
        """
        previous, following = pairs(blocks)
        if len(previous) == 0:
            raise ValueError("perplexity is undefined: no row holds two tokens")
        return float(np.exp(-np.log(self.probability(previous, following)).mean()))


def pairs(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All (previous, next) pairs within the rows, as two int64 arrays of shape (N,)."""
    rows = [np.asarray(row, dtype=np.int64) for row in blocks]
    previous = [row[:-1] for row in rows]
    following = [row[1:] for row in rows]
    empty = [np.empty(0, dtype=np.int64)]
    return np.concatenate(previous + empty), np.concatenate(following + empty)


def bigram_perplexity(train: Iterable[np.ndarray], evaluation: Iterable[np.ndarray], vocab_size: int) -> float:
    """Perplexity on the `evaluation` rows of a bigram fitted on the `train` rows; rows are arrays of token ids."""
    return KneserNeyBigram(train, vocab_size).perplexity(evaluation)
