import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics import (
    Classification,
    Perplexity,
    compute_classification,
    compute_perplexity,
    sum_negative_log_likelihood,
)
from transformers import EvalPrediction


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 2**16))
def test_perplexity_equals_brute_force_over_ragged_batches(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    outputs, log_probabilities = [], []
    for lengths in batches:
        logits = 3 * torch.randn(len(lengths), 10, 7, generator=generator)
        labels = torch.full((len(lengths), 10), -100)
        for row, length in enumerate(lengths):
            labels[row, : length + 1] = torch.randint(7, (length + 1,), generator=generator)
            for i in range(length):
                distribution = torch.softmax(logits[row, i].double(), dim=-1)
                log_probabilities.append(float(distribution[labels[row, i + 1]].log()))
        outputs.append(sum_negative_log_likelihood((logits, "other outputs"), labels))
    result = compute_perplexity(EvalPrediction(torch.cat(outputs).numpy(), label_ids=None))
    assert result["tokens"] == len(log_probabilities)
    assert result["perplexity"] == pytest.approx(np.exp(-np.mean(log_probabilities)), rel=1e-5)
    assert result["loss"] == pytest.approx(np.log(result["perplexity"]))


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(2, 200, 11).bfloat16()
    labels = torch.randint(11, (2, 200))
    exact = sum_negative_log_likelihood(logits.double(), labels)
    assert torch.allclose(sum_negative_log_likelihood(logits, labels), exact.float(), rtol=1e-5)


def test_evaluation_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token"):
        Perplexity().compute(predictions=[0.0], references=[0])


def test_diverged_model_has_infinite_perplexity():
    assert Perplexity().compute(predictions=[1e6], references=[1])["perplexity"] == np.inf


def test_two_metrics_can_be_filled_at_once():
    first, second = Perplexity(), Perplexity()
    first.add_batch(predictions=[1.0], references=[1])
    second.add_batch(predictions=[4.0], references=[2])
    assert first.compute()["loss"] == 1.0
    assert second.compute()["loss"] == 2.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 2**16))
def test_classification_equals_a_count_by_hand(references, seed):
    logits = np.random.default_rng(seed).normal(scale=3, size=(len(references), 4))
    result = Classification().compute(predictions=logits, references=references)
    matrix, correct, nats = [[0] * 4 for _ in range(4)], 0, 0.0
    for row, reference in zip(logits, references):
        answer = max(range(4), key=lambda i: row[i])
        matrix[reference][answer] += 1
        correct += answer == reference
        nats -= np.log(np.exp(row[reference]) / np.exp(row).sum())
    assert result["confusion_matrix"] == matrix
    assert result["accuracy"] == correct / len(references)
    assert result["loss"] == pytest.approx(nats / len(references))
    for i, accuracy in enumerate(result["class_accuracy"]):
        rows = references.count(i)
        assert accuracy == (matrix[i][i] / rows if rows else None)


def test_trainer_gets_the_accuracy_of_each_class_that_has_rows():
    logits = np.array([[2.0, 1, 0], [2, 1, 0], [0, 1, 2]], dtype=np.float32)
    metrics = compute_classification(EvalPrediction(logits, np.array([0, 2, 2])), ["yes", "perhaps", "no"])
    assert metrics.keys() == {"accuracy", "loss", "accuracy_yes", "accuracy_no"}
    assert (metrics["accuracy"], metrics["accuracy_yes"], metrics["accuracy_no"]) == (2 / 3, 1, 0.5)


def test_classification_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        Classification().compute(predictions=[], references=[])
