import numpy as np
import pytest
from arguments import UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from recall_data import (
    NO_LABEL,
    TASKS,
    RecallArguments,
    build_tokenizer,
    check_held_out,
    draw_sequences,
    least_length,
    load_sequences,
    num_queries,
)


VOCAB_SIZE = 64
KEYS, VALUES, NOISE = range(32), range(32, 48), range(48, 64)
SIZES = st.tuples(st.integers(1, 24), st.integers(0, 60), st.integers(0, 2**32 - 1))


def draw(task, size, rows=5):
    num_pairs, more, seed = size
    length = least_length(task, num_pairs) + more
    return draw_sequences(task, num_pairs, length, rows, VOCAB_SIZE, np.random.RandomState(seed))


def answers(sequences, row):
    """(place, token, distance) of each answer of a row."""
    places = np.nonzero(sequences.labels[row] != NO_LABEL)[0]
    return [(int(i), int(sequences.labels[row, i]), int(sequences.distances[row, i])) for i in places]


@settings(deadline=None, max_examples=40)
@given(SIZES)
def test_values_follow_the_only_pair_with_their_key(size):
    num_pairs = size[0]
    sequences = draw("recall", size)
    for row, ids in enumerate(sequences.input_ids.tolist()):
        keys, values = ids[: 2 * num_pairs : 2], ids[1 : 2 * num_pairs : 2]
        assert len(set(keys)) == num_pairs and set(keys) <= set(KEYS) and set(values) <= set(VALUES)
        asked = answers(sequences, row)
        assert len(asked) == num_queries(num_pairs)
        for place, token, distance in asked:
            question = place - 1
            assert question >= 2 * num_pairs and ids[place] == token
            pair = keys.index(ids[question])
            assert values[pair] == token
            assert distance == question - 2 * pair
        # Behind the pairs, all but the questions and their answers is noise, and no key is asked for twice.
        questions = {place - 1 for place, _, _ in asked}
        assert len({ids[question] for question in questions}) == len(asked)
        others = set(range(2 * num_pairs, len(ids))) - questions - {place for place, _, _ in asked}
        assert {ids[place] for place in others} <= set(NOISE)


@settings(deadline=None, max_examples=40)
@given(SIZES)
def test_copies_repeat_the_segment_behind_a_gap_of_noise(size):
    count = size[0] + 1
    sequences = draw("copying", size)
    for row, ids in enumerate(sequences.input_ids.tolist()):
        places = [place for place, token in enumerate(ids) if token in KEYS]
        first, copy = places[:count], places[count:]
        assert len({ids[place] for place in first}) == count
        assert [ids[place] for place in first] == [ids[place] for place in copy]
        assert first == list(range(first[0], first[0] + count)) and copy == list(range(copy[0], copy[0] + count))
        assert {ids[place] for place in range(len(ids)) if place not in places} <= set(NOISE)
        gap = copy[0] - first[-1] - 1
        assert answers(sequences, row) == [(place, ids[place], gap) for place in copy[1:]]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(TASKS), SIZES)
def test_labels_and_distances_stand_at_answers_only(task, size):
    input_ids, labels, distances = draw(task, size)
    answered = labels != NO_LABEL
    assert (labels[answered] == input_ids[answered]).all()
    assert (distances[~answered] == 0).all() and (distances[answered] > 0).all()
    assert distances.max() < input_ids.shape[1]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(TASKS), SIZES)
def test_equal_seeds_give_equal_sequences_and_others_do_not(task, size):
    once, again = draw(task, size), draw(task, size)
    other = draw(task, (*size[:2], (size[2] + 1) % 2**32))
    assert all((a == b).all() for a, b in zip(once, again))
    # Copying has at least 32 segments of two tokens for each of the rows.
    assert (once.input_ids != other.input_ids).any()


def test_sequences_stay_the_same_for_ever():
    recall = draw_sequences("recall", 3, 12, 1, 16, np.random.RandomState(0))
    copying = draw_sequences("copying", 2, 12, 1, 16, np.random.RandomState(0))
    assert recall.input_ids.tolist() == [[3, 9, 0, 8, 5, 9, 0, 8, 13, 15, 3, 9]]
    assert copying.input_ids.tolist() == [[3, 0, 5, 12, 3, 0, 5, 15, 13, 15, 13, 14]]


@pytest.mark.parametrize("task", TASKS)
def test_all_distances_are_asked_for(task):
    distances = draw_sequences(task, 4, 512, 2000, VOCAB_SIZE, np.random.RandomState(0)).distances
    counts = [((distances >= 2**k) & (distances < 2 ** (k + 1))).sum() for k in range(3, 9)]
    assert min(counts) > 0.5 * max(counts)
    # From the first pair to the last place, or from a segment at the beginning to one at the end.
    distances = draw_sequences(task, 4, 24, 2000, VOCAB_SIZE, np.random.RandomState(0)).distances
    assert distances.max() == (22 if task == "recall" else 24 - 2 * 5)


def test_every_key_value_and_question_is_equally_probable():
    num_pairs, rows = 6, 20_000
    sequences = draw_sequences("recall", num_pairs, 40, rows, 32, np.random.RandomState(0))
    for column, count in [(0, 16), (2 * num_pairs - 2, 16), (1, 8)]:
        frequencies = np.bincount(sequences.input_ids[:, column]) / rows
        assert frequencies[frequencies > 0] == pytest.approx(np.full(count, 1 / count), rel=0.1)
    row, place = np.nonzero(sequences.labels != NO_LABEL)
    pair = (place - 1 - sequences.distances[row, place]) // 2
    assert np.bincount(pair) / rows == pytest.approx(np.full(num_pairs, 0.5), rel=0.05)


def test_splits_and_sizes_share_no_sequence():
    args = RecallArguments(num_pairs=[2, 3], length=16, train_size=501, vocab_size=32)
    train = load_sequences(args, "train", args.num_pairs, args.length, args.train_size)
    assert len(train.input_ids) == 501
    # Equally many of each number of pairs, up to the remainder.
    assert np.bincount((train.labels != NO_LABEL).sum(axis=1)).tolist() == [0, 251, 250]
    for split in ("validation", "test"):
        check_held_out(train, load_sequences(args, split, args.num_pairs, args.length, 500), split)
    shared = train._replace(input_ids=train.input_ids[7:9])
    with pytest.raises(UserError, match="2 test sequences are training sequences"):
        check_held_out(train, shared, "test")


def test_dataset_holds_the_sequences():
    sequences = draw("recall", (3, 4, 0))
    rows = sequences.dataset()
    assert rows.column_names == ["input_ids", "labels"]
    assert (rows[:]["input_ids"] == sequences.input_ids).all() and (rows[:]["labels"] == sequences.labels).all()


def test_tokenizer_names_the_kinds_of_tokens():
    tokenizer = build_tokenizer(16)
    assert len(tokenizer) == 16
    ids = draw_sequences("recall", 2, 8, 1, 16, np.random.RandomState(0)).input_ids[0].tolist()
    words = tokenizer.decode(ids).split()
    assert [word[0] for word in words[:4]] == ["k", "v", "k", "v"]
    assert tokenizer(" ".join(words))["input_ids"] == ids
