"""What a classifier answered on a split, row by row and as a confusion matrix."""

import json
import logging
import os

import numpy as np
from arguments import UserError
from checkpoints import write_atomically
from datasets import Dataset
from metrics import Classification
from run_records import new_figure, save_figure
from transformers.trainer_utils import PredictionOutput


logger = logging.getLogger(__name__)


def write_outcomes(folder: str, split: str, output: PredictionOutput, label_names: list[str]) -> None:
    """Write `outcomes_<split>.json`, `confusion_matrix_<split>.json` and, with matplotlib, its picture.

    Args:
        folder: where to write.
        split: name of the split.
        output: logits and ids of the classes of all rows, in the order of the data.
        label_names: names of the classes in the order of their ids.
    """
    result = Classification().compute(predictions=output.predictions.astype(float), references=output.label_ids)
    matrix = result["confusion_matrix"]
    # One line a key: thousands of lines with one number each would be of no use.
    outcomes = {
        "labels": label_names,
        "references": output.label_ids.tolist(),
        "predictions": output.predictions.argmax(axis=1).tolist(),
    }
    write_lines(os.path.join(folder, f"outcomes_{split}.json"), outcomes)
    path = os.path.join(folder, f"confusion_matrix_{split}")
    write_lines(f"{path}.json", {"labels": label_names, "matrix": matrix})
    try:
        draw_confusion_matrix(f"{path}.png", np.array(matrix), label_names)
    except UserError as error:
        # The training is done; a picture must not cost it.
        logger.warning("No picture of the confusion matrix: %s", error)


def write_lines(path: str, value: dict[str, list]) -> None:
    """Write a JSON object, one key a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    write_atomically(path, "{" + ",\n ".join(lines) + "}\n")


def draw_confusion_matrix(path: str, matrix: np.ndarray, label_names: list[str]) -> None:
    """
    Args:
        path: the PNG to write.
        matrix: numbers of rows, (references, predictions).
        label_names: names of the classes in the order of their ids.

    Raises:
        UserError: if matplotlib is missing or the file cannot be written.
    """
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    size = 2.5 + 0.9 * len(label_names)
    figure = new_figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.ndindex(matrix.shape):
        share = shares[row, column]
        text = f"{matrix[row, column]}\n{share:.1%}"
        axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.5 else "black")
    axes.set_xticks(range(len(label_names)), label_names, rotation=45, ha="right")
    axes.set_yticks(range(len(label_names)), label_names)
    axes.set(xlabel="prediction", ylabel="label")
    save_figure(figure, path)


def write_predictions(path: str, pairs: Dataset, output: PredictionOutput, label_names: list[str]) -> None:
    """Write one JSON object a row: its number in the source, its texts, its label, and what the model says.

    Args:
        path: the file to write.
        pairs: the rows of the split, as in `pair_data.Pairs`.
        output: logits and ids of the classes of these rows.
        label_names: names of the classes in the order of their ids.
    """
    logits = output.predictions.astype(float)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    lines = []
    for pair, reference, row in zip(pairs, output.label_ids, probabilities):
        line = {
            "index": pair["index"],
            "premise": pair["premise"],
            "hypothesis": pair["hypothesis"],
            "label": label_names[reference],
            "prediction": label_names[row.argmax()],
            "probabilities": dict(zip(label_names, row.tolist())),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))
