import numpy as np
import pytest
from bigram import KneserNeyBigram, bigram_perplexity, pairs


V = 12


@pytest.fixture
def blocks():
    """Rows of a Markov chain over all tokens but the last."""
    generator = np.random.default_rng(0)
    transitions = generator.dirichlet(np.full(V - 1, 0.2), size=V - 1)
    rows = np.zeros((60, 16), dtype=np.int64)
    for i in range(1, 16):
        rows[:, i] = [generator.choice(V - 1, p=transitions[token]) for token in rows[:, i - 1]]
    return rows


def test_probabilities_sum_to_one_after_every_token(blocks):
    bigram = KneserNeyBigram(blocks, V)
    for previous in range(V):
        probabilities = bigram.probability(np.full(V, previous), np.arange(V))
        assert probabilities.sum() == pytest.approx(1)
        assert (probabilities > 0).all()


def test_bigram_beats_unigram(blocks):
    train, evaluation = blocks[:40], blocks[40:]
    unigram = (np.bincount(train.ravel(), minlength=V) + 1) / (train.size + V)
    unigram_perplexity = np.exp(-np.log(unigram[evaluation[:, 1:]]).mean())
    assert bigram_perplexity(train, evaluation, V) < 0.7 * unigram_perplexity


def test_probabilities_follow_the_formula_by_hand():
    # Pairs: 0-1 twice, 0-2 and 1-2 once; so n1 = 2, n2 = 1 and d = 2 / 4.
    bigram = KneserNeyBigram([np.array([0, 1]), np.array([0, 1, 2]), np.array([0, 2])], 3)
    q2 = (2 - 0.5) / 3 + 0.5 * 2 / 3 / 3
    assert bigram.probability(np.array([0]), np.array([2])) == pytest.approx((1 - 0.5) / 3 + 0.5 * 2 / 3 * q2)


def test_pairs_stay_within_their_row():
    previous, following = pairs([[1, 2, 3], [4], [5, 6]])
    assert previous.tolist() == [1, 2, 5]
    assert following.tolist() == [2, 3, 6]


def test_rows_without_pairs_are_refused(blocks):
    with pytest.raises(ValueError):
        KneserNeyBigram([[1]], V)
    with pytest.raises(ValueError):
        KneserNeyBigram(blocks, V).perplexity([[1]])
