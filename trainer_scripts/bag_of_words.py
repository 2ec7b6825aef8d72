"""Logistic regression on bags of words: the bar that a model of sentence pairs has to clear."""

from arguments import UserError
from datasets import Dataset


try:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
except ImportError:
    LogisticRegression = None

# Scikit-learn's own pattern drops words of one letter and what follows an apostrophe.
_WORD = r"\w+(?:'\w+)?"


def bag_of_words_accuracy(
    train: Dataset,
    test: Dataset,
    columns: tuple[str, ...] = ("premise", "hypothesis"),
    label_column: str = "label",
    max_iter: int = 200,
) -> float:
    """Accuracy on `test` of a logistic regression on word counts fitted on `train`.

    Each text column has counts of its own for all of its words in `train`, so the classifier knows which words stand
    in the premise and which in the hypothesis, but not their order. It has scikit-learn's default L2 penalty.

    Args:
        train: rows to fit on; those with a negative label, which stands for none, are left out.
        test: rows to count the correct answers on, with the same exception.
        columns: columns of text. `("hypothesis",)` shows what the hypothesis gives away alone.
        label_column: column of the class ids.
        max_iter: most iterations of the fit.

    Returns:
        share of correct answers.

    Raises:
        UserError: if scikit-learn is not installed, if rows with labels are missing, or if `train` has but one label.
    """
    if LogisticRegression is None:
        raise UserError("the bag of words needs scikit-learn: pip install scikit-learn, or the extra reports")
    rows = {}
    for name, data in (("train", train), ("test", test)):
        labels = data[label_column][:]
        kept = [i for i, label in enumerate(labels) if label is not None and label >= 0]
        if not kept:
            raise UserError(f"the bag of words needs {name} rows with a label")
        data = data.select(kept)
        rows[name] = {column: data[column][:] for column in columns}, data[label_column][:]
    (train_texts, train_labels), (test_texts, test_labels) = rows["train"], rows["test"]
    if len(set(train_labels)) < 2:
        raise UserError("the bag of words needs train rows of at least two labels")

    train_bags, test_bags = [], []
    for column in columns:
        vectorizer = CountVectorizer(token_pattern=_WORD)
        train_bags.append(vectorizer.fit_transform(train_texts[column]))
        test_bags.append(vectorizer.transform(test_texts[column]))
    classifier = LogisticRegression(max_iter=max_iter).fit(hstack(train_bags).tocsr(), train_labels)
    return float(classifier.score(hstack(test_bags).tocsr(), test_labels))
