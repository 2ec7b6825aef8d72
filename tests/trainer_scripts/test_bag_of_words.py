import bag_of_words
import pytest
from arguments import UserError
from bag_of_words import bag_of_words_accuracy
from datasets import Dataset
from entailment_pairs import load_entailment_pairs


def rows(*pairs):
    return Dataset.from_list([dict(zip(("premise", "hypothesis", "label"), pair)) for pair in pairs])


@pytest.mark.parametrize("seed", range(3))
def test_bags_of_words_do_not_tell_the_labels_of_the_embedded_pairs(seed):
    pairs = load_entailment_pairs(seed)
    assert bag_of_words_accuracy(pairs["train"], pairs["test"]) <= 0.40


def test_a_word_that_tells_the_label_is_found():
    train = rows(*[("a man", "nobody sleeps", 2), ("a man", "he sleeps", 0)] * 20)
    assert bag_of_words_accuracy(train, rows(("a dog", "nobody eats", 2), ("a dog", "he eats", 0))) == 1


def test_the_same_word_counts_apart_in_premise_and_hypothesis():
    train = rows(*[("not", "it", 0), ("it", "not", 1)] * 20)
    assert bag_of_words_accuracy(train, train) == 1


def test_short_words_and_contractions_are_words():
    train = rows(*[("I", "x is", 0), ("a", "x isn't", 1)] * 20)
    for column in ("premise", "hypothesis"):
        assert bag_of_words_accuracy(train, train, columns=(column,)) == 1


def test_rows_without_a_label_are_left_out():
    train = rows(*[("yes", "x", 0), ("no", "x", 1), ("no", "x", -1)] * 20)
    assert bag_of_words_accuracy(train, rows(("yes", "x", 0), ("yes", "x", -1))) == 1


def test_data_without_labels_and_a_missing_package_are_refused(monkeypatch):
    train = rows(("yes", "x", 0), ("no", "x", 1))
    with pytest.raises(UserError, match="test rows with a label"):
        bag_of_words_accuracy(train, rows(("yes", "x", -1)))
    with pytest.raises(UserError, match="two labels"):
        bag_of_words_accuracy(rows(("yes", "x", 0)), train)
    monkeypatch.setattr(bag_of_words, "LogisticRegression", None)
    with pytest.raises(UserError, match="needs scikit-learn: pip install"):
        bag_of_words_accuracy(train, train)
