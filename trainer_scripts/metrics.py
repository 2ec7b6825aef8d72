"""Metrics that are exact over whole evaluation sets: perplexity of language models, accuracy of classifiers."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction


class Perplexity(evaluate.Metric):
    """Perplexity from summed negative log-likelihoods: exp(sum of nats / number of predicted tokens).

    Rows may hold different numbers of tokens; each token counts once. Compute with `predictions`, the summed negative
    log-likelihood of each row in nats, and `references`, the number of predicted tokens of each row.

    Returns:
        {"perplexity", "loss" (mean nats per token), "tokens" (their number)}.

    Raises:
        ValueError: if there are no tokens at all.
    """

    def __init__(self, **kwargs):
        # No cache file: several trainings on one machine would wait for each other's lock.
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity from summed negative log-likelihoods.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float | int]:
        tokens = sum(references)
        if tokens == 0:
            raise ValueError("perplexity is undefined: the evaluation predicts no token")
        loss = math.fsum(predictions) / tokens
        # A diverged model has an infinite perplexity; that must not end the run.
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss, "tokens": tokens}


def sum_negative_log_likelihood(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits to what `Perplexity` needs, as `preprocess_logits_for_metrics` of the Trainer.

    Args:
        logits: (B, T, V), or a tuple that starts with them.
        labels: (B, T), not shifted; -100 marks positions that are not predicted.

    Returns:
        (B, 2) float32: summed negative log-likelihood in nats and number of predicted tokens of each row.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    # Row by row, so that only one row of half-precision logits is held in float32.
    rows = [
        F.cross_entropy(row[:-1].float(), targets[1:], ignore_index=-100, reduction="sum")
        for row, targets in zip(logits, labels)
    ]
    return torch.stack([torch.stack(rows), (labels[:, 1:] != -100).sum(dim=1).float()], dim=1)


def compute_perplexity(prediction: EvalPrediction) -> dict[str, float | int]:
    """`compute_metrics` of the Trainer for predictions made by `sum_negative_log_likelihood`.

    The Trainer reports the key "loss" in place of its own mean over batches, which weighs the tokens of a short last
    batch more than others. `eval_loss` is thus exactly the logarithm of `eval_perplexity`.
    """
    nll, tokens = prediction.predictions.T
    return Perplexity().compute(predictions=nll.astype("float64"), references=tokens.astype("int64"))


class Classification(evaluate.Metric):
    """Accuracy, cross-entropy and confusion matrix of a classifier, each row counted once.

    Compute with `predictions`, the logits of each row, and `references`, the id of each row's class.

    Returns:
        {"accuracy", "loss" (mean nats per row), "class_accuracy" (share of the rows of each class that are recognised,
        None for a class without rows), "confusion_matrix" (numbers of rows by reference, then by prediction)}.

    Raises:
        ValueError: if there are no rows at all.
    """

    def __init__(self, **kwargs):
        # No cache file: several trainings on one machine would wait for each other's lock.
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, cross-entropy and confusion matrix of a classifier.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, Any]:
        if len(references) == 0:
            raise ValueError("accuracy is undefined: the evaluation has no rows")
        logits, references = torch.tensor(predictions, dtype=torch.float64), torch.tensor(references)
        classes = logits.shape[1]
        predicted = logits.argmax(dim=1)
        matrix = torch.bincount(references * classes + predicted, minlength=classes**2).view(classes, classes)
        correct, rows = matrix.diag().tolist(), matrix.sum(dim=1).tolist()
        return {
            "accuracy": sum(correct) / len(references),
            "loss": F.cross_entropy(logits, references).item(),
            "class_accuracy": [right / total if total else None for right, total in zip(correct, rows)],
            "confusion_matrix": matrix.tolist(),
        }


def first_output(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` of the Trainer: the logits without what some models return beside them."""
    return logits[0] if isinstance(logits, tuple) else logits


def compute_classification(prediction: EvalPrediction, label_names: list[str]) -> dict[str, float]:
    """`compute_metrics` of the Trainer: accuracy, loss, and accuracy of each class that has rows.

    The Trainer reports the key "loss" in place of its own mean over batches, which weighs the rows of a short last
    batch more than others, and counts label smoothing.
    """
    result = Classification().compute(
        predictions=prediction.predictions.astype(np.float64), references=prediction.label_ids
    )
    metrics = {"accuracy": result["accuracy"], "loss": result["loss"]}
    for name, accuracy in zip(label_names, result["class_accuracy"]):
        if accuracy is not None:
            metrics[f"accuracy_{name}"] = accuracy
    return metrics
