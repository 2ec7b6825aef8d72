import itertools
import random
from collections import Counter

import pytest
from datasets import concatenate_datasets
from entailment_pairs import (
    ANTONYMS,
    LABELS,
    NUMBERS,
    TREES,
    Statement,
    build_tokenizer,
    draw_pair,
    label_of,
    load_entailment_pairs,
    vocabulary,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def pairs():
    return load_entailment_pairs()


def leaves_below(noun):
    """The kinds that a noun covers. Members of an inner noun that belong to none of the nouns below are a kind too."""
    kinds = set()
    for root, branches in TREES.items():
        if noun == root:
            kinds |= {f"other {root}", *(kind for branch in branches for kind in leaves_below(branch))}
        for branch, leaves in branches.items():
            if noun == branch:
                kinds |= {f"other {branch}", *leaves}
            kinds |= {leaf for leaf in leaves if leaf == noun}
    return kinds


class Sentence:
    """A sentence read by its words alone: the cells of the world that it counts, and what it says of their number.

    A cell is a kind and a truth value for each pair of antonyms that either sentence of the pair mentions.
    """

    NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}

    def __init__(self, text):
        words = text.split()
        assert len(words) == 6
        self.noun, verb, adjective = words[3:]
        self.axis = next(i for i, pair in enumerate(ANTONYMS) if adjective in pair)
        self.side = (adjective == ANTONYMS[self.axis][0]) == (verb == "are")
        quantifier = words[:3]
        if quantifier[:2] in (["at", "least"], ["fewer", "than"]):
            bound = self.NUMBERS[quantifier[2]]
            self.holds = (lambda n: n >= bound) if quantifier[0] == "at" else (lambda n: n < bound)
        else:
            quantifier = " ".join(quantifier)
            # "All" and "not all" speak of the members without the property.
            self.side ^= quantifier in ("all of the", "not all the")
            some = {"some of the": True, "not all the": True, "none of the": False, "all of the": False}[quantifier]
            self.holds = (lambda n: n > 0) if some else (lambda n: n == 0)

    def counts(self, cell):
        kind, truths = cell
        return kind in leaves_below(self.noun) and truths[self.axis] == self.side


def brute_force_label(premise, hypothesis, most=8):
    """The label found by trying worlds.

    Cells that the same sentences count are interchangeable, so worlds differ in how many members the at most three
    sorts of counted cells have: those of one sentence, of the other, and of both. Bounds are seven at most, so more
    than eight members of a sort make no difference.
    """
    sentences = Sentence(premise), Sentence(hypothesis)
    kinds = leaves_below(sentences[0].noun) | leaves_below(sentences[1].noun)
    axes = sorted({sentence.axis for sentence in sentences})
    cells = [
        (kind, dict(zip(axes, truths)))
        for kind in kinds
        for truths in itertools.product((True, False), repeat=len(axes))
    ]
    sorts = sorted({tuple(sentence.counts(cell) for sentence in sentences) for cell in cells} - {(False, False)})
    outcomes = set()
    for sizes in itertools.product(range(most + 1), repeat=len(sorts)):
        counts = [sum(size for sort, size in zip(sorts, sizes) if sort[i]) for i in range(2)]
        outcomes.add(tuple(sentence.holds(count) for sentence, count in zip(sentences, counts)))
    assert {first for first, _ in outcomes} == {True, False}, "a premise that says nothing, or is impossible"
    if (True, False) not in outcomes:
        return "entailment"
    return "contradiction" if (True, True) not in outcomes else "neutral"


def test_labels_are_what_all_small_worlds_say(pairs):
    names = pairs["train"].features["label"].names
    for split, rows in pairs.items():
        for row in rows.select(range(300)):
            found = brute_force_label(row["premise"], row["hypothesis"])
            assert names[row["label"]] == found, (split, row)


NOUNS = [noun for root, branches in TREES.items() for noun in (root, *branches, *itertools.chain(*branches.values()))]
# Few nouns and adjectives, so that related sentences are frequent; all of a tree and one of another.
statements = st.builds(
    Statement,
    at_least=st.booleans(),
    number=st.integers(1, len(NUMBERS) + 1),
    noun=st.sampled_from(NOUNS[:8]),
    adjective=st.sampled_from([*ANTONYMS[0], ANTONYMS[1][0]]),
)


@settings(max_examples=300, deadline=None)
@given(statements, statements, st.integers(0, 2**32))
def test_label_of_any_two_statements_is_what_all_small_worlds_say(premise, hypothesis, seed):
    generator = random.Random(seed)
    assert label_of(premise, hypothesis) == brute_force_label(write(premise, generator), write(hypothesis, generator))


@given(st.sampled_from(LABELS), st.integers(0, 2**32))
def test_drawn_pairs_have_the_label_asked_for(label, seed):
    assert label_of(*draw_pair(label, random.Random(seed))) == label


FINGERPRINT = """
import hashlib
from entailment_pairs import build_tokenizer, load_entailment_pairs

pairs = load_entailment_pairs(3, 500, 50, 50)
rows = [f"{row['premise']}|{row['hypothesis']}|{row['label']}" for split in pairs.values() for row in split]
text = "\\n".join([*rows, build_tokenizer().backend_tokenizer.to_str()])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_pairs_and_tokenizer_are_the_same_in_every_process(run_python):
    outputs = [run_python("-c", FINGERPRINT) for _ in range(2)]
    assert outputs[0].stdout == outputs[1].stdout != "", outputs[0].stderr


FIRST_PAIRS = [
    ("at least four tambourines are warm", "at least three tambourines are warm", 0),
    ("at least five ferries are heavy", "fewer than three vehicles are warm", 1),
    ("fewer than four flowers are light", "at least five tulips are light", 2),
]


def test_the_first_pairs_are_the_same_in_every_version_of_python():
    rows = load_entailment_pairs(0, 3, 0, 0)["train"].to_list()
    assert [tuple(row.values()) for row in rows] == FIRST_PAIRS


def test_seeds_give_different_pairs():
    first, second = (load_entailment_pairs(seed, 30, 0, 0)["train"]["premise"][:] for seed in (0, 1))
    assert first != second


def test_sizes_are_those_asked_for_and_impossible_ones_are_refused(pairs):
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 24_000, "validation": 2_000, "test": 2_000}
    assert [len(rows) for rows in load_entailment_pairs(0, 7, 5, 0).values()] == [7, 5, 0]
    with pytest.raises(ValueError, match="at most"):
        load_entailment_pairs(train_size=10_000_000)
    with pytest.raises(ValueError, match="at least 0"):
        load_entailment_pairs(test_size=-1)


def test_no_pair_has_the_meaning_of_another(pairs):
    """Not even in other words, such as "aren't wet" for "are dry"."""
    meanings = Counter()
    for row in concatenate_datasets(list(pairs.values())):
        sentences = [Sentence(row[name]) for name in ("premise", "hypothesis")]
        meaning = [(s.noun, s.axis, s.side, *(s.holds(n) for n in range(8))) for s in sentences]
        meanings[tuple(meaning)] += 1
    assert max(meanings.values()) == 1


def test_labels_are_balanced_in_every_split_and_in_first_rows(pairs):
    for rows in pairs.values():
        assert rows.features["label"].names == ["entailment", "neutral", "contradiction"]
        for size in (100, len(rows)):
            counts = Counter(rows["label"][:size])
            assert max(counts.values()) - min(counts.values()) <= 1


def test_every_word_is_in_the_training_data_and_known_to_the_tokenizer(pairs):
    words = {
        split: {word for name in ("premise", "hypothesis") for text in rows[name] for word in text.split()}
        for split, rows in pairs.items()
    }
    assert words["train"] == set(vocabulary())
    assert words["validation"] <= words["train"] and words["test"] <= words["train"]
    assert len(vocabulary()) == len(set(vocabulary())) == len(build_tokenizer()) - 4


@pytest.mark.parametrize("column", ["premise", "hypothesis"])
def test_each_word_is_as_frequent_in_one_label_as_in_another(pairs, column):
    counts = {label: Counter() for label in range(3)}
    for row in pairs["train"]:
        counts[row["label"]].update(row[column].split())
    for word in vocabulary():
        frequencies = [counts[label][word] for label in range(3)]
        mean = sum(frequencies) / 3
        # Differences of two such counts have a standard deviation of about sqrt(2 mean).
        assert max(frequencies) - min(frequencies) < 5 * (2 * mean) ** 0.5, (word, frequencies)


def test_each_combination_of_directions_is_as_frequent_as_its_label_allows(pairs):
    """Both directions for each sentence and label; an entailment has one twice, a contradiction both."""
    generator = random.Random(0)
    directions = {label: Counter() for label in LABELS}
    for label in LABELS:
        for _ in range(4_000):
            premise, hypothesis = draw_pair(label, generator)
            directions[label][premise.at_least, hypothesis.at_least] += 1
    for label, possible in {
        "entailment": {(True, True), (False, False)},
        "contradiction": {(True, False), (False, True)},
        "neutral": set(itertools.product((True, False), repeat=2)),
    }.items():
        assert directions[label].keys() == possible
        assert all(abs(count * len(possible) / 4_000 - 1) < 0.15 for count in directions[label].values())


def test_tokenizer_writes_pairs_of_one_length_and_reloads(tmp_path, pairs):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = pairs["test"][:50]
    encoding = tokenizer(rows["premise"], rows["hypothesis"], padding=True)
    assert encoding.keys() == {"input_ids", "attention_mask"}
    assert {len(ids) for ids in encoding["input_ids"]} == {15}
    for ids, premise, hypothesis in zip(encoding["input_ids"], rows["premise"], rows["hypothesis"]):
        assert tokenizer.decode(ids) == f"[CLS] {premise} [SEP] {hypothesis} [SEP]"
    assert tokenizer.pad_token_id == 0
    assert tokenizer(["Some owls", "owls"], padding=True)["input_ids"][1][-1] == 0
    assert tokenizer.convert_ids_to_tokens(tokenizer("unicorns")["input_ids"]) == ["[CLS]", "[UNK]", "[SEP]"]
