"""Train a causal language model to look things up in its context, and measure how much of it and how far back it can.

    python trainer_scripts/run_recall.py configuration/recall/grassmann_memory.yaml --seed 1
    python trainer_scripts/run_recall.py configuration/recall/stablelm.yaml --task copying --output_dir runs/copying

`recall_data.py` describes the tasks, whose sequences are generated. Works under `accelerate launch` and `torchrun` as
well. All names of `TrainingArguments` are arguments.
"""

import logging
import os
import time
from typing import Any

import numpy as np
import torch
from arguments import UserError, exits_on_user_error, parse
from checkpoints import RunLog, write_json
from models import ModelArguments, load_config, load_model, load_tokenizer
from positions import beyond_positions, mean_by_distance, position_limit
from recall_data import NO_LABEL, RecallArguments, Sequences, build_tokenizer, check_held_out, load_sequences
from run_clm import check_causality, check_label_smoothing
from torch.nn import functional as F
from training import (
    RunTrainer,
    check_training_arguments,
    checkpoint_to_resume,
    finish,
    make_trainer,
    place,
    report,
    setup_logging,
    train,
    wanted_splits,
    write_recipe,
)
from transformers import AutoModelForCausalLM, EvalPrediction, TrainingArguments, default_data_collator, set_seed


logger = logging.getLogger(__name__)

ARGUMENTS = (ModelArguments, RecallArguments, TrainingArguments)
# What is measured, and whether more of it is better.
METRICS = {"loss": False, "accuracy": True}


def score_answers(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` of the Trainer.

    Args:
        logits: (B, T, V), or a tuple that starts with them.
        labels: (B, T), not shifted.

    Returns:
        (B, T, 2) float32: of each answer its negative log-likelihood in nats, and 1 if it is the most probable token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    scores = torch.zeros(*labels.shape, 2, device=logits.device)
    answered = labels[:, 1:] != NO_LABEL
    logits, answers = logits[:, :-1][answered].float(), labels[:, 1:][answered]  # (A, V) and (A,)
    nll = F.cross_entropy(logits, answers, reduction="none")
    scores[:, 1:][answered] = torch.stack([nll, (logits.argmax(dim=-1) == answers).float()], dim=-1)
    return scores


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the Trainer: mean loss in nats and accuracy, each answer counted once."""
    loss, correct = prediction.predictions[prediction.label_ids != NO_LABEL].mean(axis=0, dtype=np.float64)
    return {"loss": float(loss), "accuracy": float(correct)}


def test(trainer: RunTrainer, args: RecallArguments, training: Sequences | None) -> list[dict[str, Any]]:
    """Accuracy for each number of pairs and each length, and within them by distance.

    Lengths for which the model has no positions are listed with the reason, and without figures.

    Raises:
        UserError: if a test sequence is a training sequence.
    """
    limit, cells = position_limit(trainer.model), []
    for num_pairs, length in args.test_sizes:
        cell: dict[str, Any] = {"num_pairs": num_pairs, "length": length}
        if reason := beyond_positions(length, limit):
            logger.warning("%d pairs in %d tokens: %s", num_pairs, length, reason)
            cells.append({**cell, "refused": reason})
            continue
        sequences = load_sequences(args, "test", [num_pairs], length, args.test_size)
        if training is not None:
            check_held_out(training, sequences, "test")
        output = trainer.predict(sequences.dataset(), metric_key_prefix="test")
        answered = sequences.labels != NO_LABEL
        correct = output.predictions[..., 1][answered]
        cell |= {name: output.metrics[f"test_{name}"] for name in METRICS}
        cell["answers"] = int(answered.sum())
        cell["by_distance"] = mean_by_distance(sequences.distances[answered], correct)
        logger.info("%d pairs in %d tokens: accuracy %.4f", num_pairs, length, cell["accuracy"])
        cells.append(cell)
    return cells


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    start = time.time()
    model_args, data_args, training_args = parse(ARGUMENTS, argv)
    splits = wanted_splits(training_args)
    check_training_arguments(training_args, METRICS)
    setup_logging(training_args)
    resumed = checkpoint_to_resume(training_args)

    tokenizer = load_tokenizer(model_args, lambda: build_tokenizer(data_args.vocab_size))
    if len(tokenizer) != data_args.vocab_size:
        raise UserError(f"vocab_size={data_args.vocab_size} is not the {len(tokenizer)} tokens of the tokenizer")
    config = load_config(model_args, tokenizer)
    # Before the construction, so that the seed also decides the initial weights.
    set_seed(training_args.seed)
    model = load_model(model_args, AutoModelForCausalLM, config)
    place(model, training_args)
    if reason := beyond_positions(data_args.length, position_limit(model)):
        raise UserError(f"length={data_args.length} is too long for {type(model).__name__}: {reason}")
    check_causality(model, min(data_args.length, 8))
    check_label_smoothing(model, training_args)
    use_cache = getattr(model.config, "use_cache", None)
    logger.info("%s with %.3fM parameters", type(model).__name__, model.num_parameters() / 1e6)

    sequences = {
        split: load_sequences(data_args, split, data_args.num_pairs, data_args.length, rows)
        for split, rows in [("train", data_args.train_size), ("validation", data_args.validation_size)]
        if split in splits
    }
    if len(sequences) == 2:
        check_held_out(*sequences.values(), "validation")
    trainer = make_trainer(
        RunTrainer,
        model=model,
        args=training_args,
        train_dataset=sequences["train"].dataset() if "train" in sequences else None,
        eval_dataset=sequences["validation"].dataset() if "validation" in sequences else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_accuracy,
        preprocess_logits_for_metrics=score_answers,
        callbacks=[RunLog()],
    )
    write_recipe(trainer, ARGUMENTS, argv)

    results: dict[str, Any] = {}
    if training_args.do_train:
        metric = (training_args.metric_for_best_model or "accuracy").removeprefix("eval_")
        results.update(train(trainer, resumed, use_cache, metric, METRICS[metric]))
    if training_args.do_eval:
        results.update(report(trainer, "eval", trainer.evaluate()))
    if training_args.do_predict:
        cells = test(trainer, data_args, sequences.get("train"))
        measured = {
            f"test_accuracy_{cell['num_pairs']}_pairs_{cell['length']}_tokens": cell["accuracy"]
            for cell in cells
            if "accuracy" in cell
        }
        results.update(report(trainer, "test", measured))
        if trainer.is_world_process_zero():
            trained = {"num_pairs": sorted(set(data_args.num_pairs)), "length": data_args.length}
            facts = {"task": data_args.task, "chance": data_args.chance, "trained": trained}
            write_json(os.path.join(training_args.output_dir, "recall.json"), {**facts, "cells": cells})

    finish(trainer, {**results, "parameters": model.num_parameters()}, start)


if __name__ == "__main__":
    main()
