"""Check that a run of `run_nli.py` learned to compare sentences, and show what its model says.

    python trainer_scripts/quickstart_nli.py OUTPUT_DIR

Loads the saved model in this new process, has a pipeline answer the test pairs, and compares its accuracy with that of
a logistic regression on bags of words. Exits with code 1 if the model is right about less than 90% of the pairs, or if
the bags of words suffice for more than 45%, so that there was nothing to learn from the sentences' structure.
"""

import json
import sys
from pathlib import Path

import datasets
import transformers
from arguments import UserError, exits_on_user_error, parse
from bag_of_words import bag_of_words_accuracy
from checkpoints import write_json
from model_card import load_record, write_card
from pair_data import load_pairs
from run_nli import ARGUMENTS
from transformers import pipeline


BASELINE = "logistic regression on bags of words"
LEAST_ACCURACY = 0.90
MOST_BAG_OF_WORDS = 0.45
# Rows of the test split that the pipeline answers at most.
ROWS = 2_000
EXAMPLES = 6


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise UserError("usage: quickstart_nli.py OUTPUT_DIR, the output_dir of a run of run_nli.py")
    folder = Path(argv[0])
    for name in ("recipe.yaml", "metrics.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: train a model there with run_nli.py first")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if "test_accuracy" not in metrics:
        raise UserError(f"{folder}/metrics.json has no test_accuracy: train with do_predict")

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    _, data_args, _ = parse(ARGUMENTS, [str(folder / "recipe.yaml")])
    pairs = load_pairs(data_args, ["train", "test"])
    bag_of_words = bag_of_words_accuracy(pairs.splits["train"], pairs.splits["test"])

    # It loads the model with AutoModelForSequenceClassification.
    classifier = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    cut = {"truncation": "longest_first", "max_length": data_args.max_length} if data_args.max_length else {}
    rows = pairs.splits["test"].select(range(min(ROWS, len(pairs.splits["test"])))).to_list()
    inputs = [{"text": row["premise"], "text_pair": row["hypothesis"]} for row in rows]
    answers = classifier(inputs, batch_size=100, **cut)
    labels = [pairs.label_names[row["label"]] for row in rows]
    # The most probable class comes first.
    correct = sum(answer[0]["label"] == label for answer, label in zip(answers, labels))
    accuracy = correct / len(rows)

    print(f"Test accuracy over {metrics['test_rows']} pairs; chance is {1 / len(pairs.label_names):.1%}:")
    name = type(classifier.model).__name__
    print(f"  {name:<48}{metrics['test_accuracy']:>7.1%}   ({metrics['parameters'] / 1e6:.2f}M parameters)")
    print(f"  {'the same, loaded from disk, first ' + str(len(rows)) + ' pairs':<48}{accuracy:>7.1%}")
    print(f"  {BASELINE:<48}{bag_of_words:>7.1%}")
    write_json(folder / "baseline.json", {"name": BASELINE, "test_accuracy": bag_of_words})
    write_card(folder, load_record(folder), repo_id=folder.as_posix())

    for row, answer, label in list(zip(rows, answers, labels))[:EXAMPLES]:
        probabilities = ", ".join(f"{item['label']} {item['score']:.1%}" for item in answer)
        print(f"\n  premise:    {row['premise']}\n  hypothesis: {row['hypothesis']}\n  {label}; said: {probabilities}")

    failures = []
    if accuracy < LEAST_ACCURACY:
        failures.append(
            f"The model is right about {accuracy:.1%} of the pairs, less than {LEAST_ACCURACY:.0%}. Train it for"
            " longer."
        )
    if bag_of_words > MOST_BAG_OF_WORDS:
        failures.append(
            f"Bags of words suffice for {bag_of_words:.1%} of the pairs, more than {MOST_BAG_OF_WORDS:.0%}: the pairs"
            " do not show that a model compares sentences."
        )
    if failures:
        print("", *failures, sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
