# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Trainer's own machinery works on the models: accumulation, checkpointing, resuming, stopping, search, reports."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import train_tokenizer
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_grassmann import GrassmannForSequenceClassification


REPOSITORY = Path(__file__).parents[2]


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = model.named_parameters()
        self.found = {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}


class Losses(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.found[state.global_step] = logs["loss"]


class Scripted(TrainerCallback):
    """Replaces the loss of each evaluation in turn, before callbacks that come later see it."""

    def __init__(self, losses):
        self.losses = iter(losses)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = next(self.losses)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that pads with 0; the rows are ids already."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0})), pad_token="[PAD]")


@pytest.fixture
def language_data(make_ids, tokenizer):
    """Rows of 2 to 13 tokens, so that each batch has another number of tokens to predict, and their collator."""
    rows = [make_ids(length, seed=length).tolist() for length in (13, 2, 7, 3, 11, 4, 2)]
    # The text that an answer follows is not learned.
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in rows]
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels)]
    return data, DataCollatorForTokenClassification(tokenizer)


@pytest.fixture
def class_data(make_ids, tokenizer):
    data = [
        {"input_ids": make_ids(length, seed=length).tolist(), "labels": length % 3}
        for length in (13, 2, 7, 3, 11, 4, 5)
    ]
    return data, DataCollatorWithPadding(tokenizer)


@pytest.fixture
def make_case(make_model, make_classifier, language_data, class_data):
    """Function that makes a model of each kind in float64, the data it learns, and their collator."""

    def make(name, seed=0, **overrides):
        if name == "language_model":
            return make_model(seed=seed, **overrides).double(), *language_data
        if name == "classifier":
            model = make_model(GrassmannForSequenceClassification, seed, num_labels=3, pad_token_id=0, **overrides)
            return model.double(), *class_data
        return make_classifier(name, seed, **overrides).double(), *class_data

    return make


CASES = ["language_model", "classifier", "distilbert", "grassmann"]


def make_trainer(case, folder, callbacks=(), model_init=None, **options):
    model, data, collator = case
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0,
    }
    arguments = TrainingArguments(**(arguments | options))
    return Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=data,
        eval_dataset=data,
        model_init=model_init,
        callbacks=list(callbacks),
    )


def gradients_of_a_step(case, folder, **options):
    gradients = Gradients()
    trainer = make_trainer(case, folder, [gradients], max_steps=1, **options)
    trainer.train()
    return gradients.found, trainer.state.log_history[0]["loss"]


# Gradients


def test_label_smoothing_smooths_the_next_tokens(make_case, tmp_path):
    """Trainer shifts labels itself then, in models that it knows as language models."""
    losses = []
    for factor in (0.0, 1e-9):
        trainer = make_trainer(make_case("language_model"), tmp_path, label_smoothing_factor=factor)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_accumulated_gradients_of_unequal_batches_are_those_of_all_rows_together(name, make_case, tmp_path):
    # Seven rows in batches of 2, 2, 2 and 1: neither rows nor tokens are equally many.
    expected, loss = gradients_of_a_step(make_case(name), tmp_path, per_device_train_batch_size=7)
    accumulated, accumulated_loss = gradients_of_a_step(
        make_case(name), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert accumulated.keys() == expected.keys()
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    for key, gradient in accumulated.items():
        # Sums in another order; the losses are computed in float32, whatever the model's type.
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_of_trainer_changes_no_gradient(name, make_case, tmp_path):
    # With dropout, whose random numbers have to be repeated.
    dropout = {"hidden_dropout": 0.2}
    expected, _ = gradients_of_a_step(make_case(name, **dropout), tmp_path, seed=3)
    case = make_case(name, **dropout)
    found, _ = gradients_of_a_step(case, tmp_path, seed=3, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in case[0].modules())
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert torch.equal(gradient, expected[key]), key


def test_gradient_checkpointing_of_a_frozen_backbone_leaves_the_head_its_gradients(make_case, tmp_path):
    expected, _ = gradients_of_a_step(make_case("distilbert", freeze_backbone=True), tmp_path)
    found, _ = gradients_of_a_step(
        make_case("distilbert", freeze_backbone=True), tmp_path, gradient_checkpointing=True
    )
    assert found.keys() == expected.keys()
    assert not any(key.startswith("backbone") for key in found)
    for key, gradient in found.items():
        assert torch.equal(gradient, expected[key]), key


# Resuming and stopping


@pytest.mark.parametrize("name", ["language_model", "distilbert"])
def test_a_resumed_training_has_the_losses_and_weights_of_an_uninterrupted_one_to_the_bit(name, make_case, tmp_path):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2}
    # With dropout, which the checkpoint's random state has to repeat.
    dropout = {"hidden_dropout": 0.2}
    model, *data = make_case(name, **dropout)
    losses = Losses()
    make_trainer((model, *data), tmp_path, [losses], **options).train()
    # Other weights, which the checkpoint replaces.
    resumed, *_ = make_case(name, seed=7, **dropout)
    resumed_losses = Losses()
    trainer = make_trainer((resumed, *data), tmp_path, [resumed_losses], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed_losses.found == {step: loss for step, loss in losses.found.items() if step > 4}
    for (key, parameter), expected in zip(resumed.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected), key


def test_early_stopping_ends_the_training_and_the_best_model_is_loaded(make_case, tmp_path):
    model, *data = make_case("language_model")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 40}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    callbacks = [Scripted([3.0, 1.0, 2.0, 2.0]), EarlyStoppingCallback(early_stopping_patience=2)]
    trainer = make_trainer((model, *data), tmp_path, callbacks, **options)
    trainer.train()
    # The second evaluation was the best, and the third and fourth were not better.
    assert trainer.state.global_step == 8
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    best = type(model).from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float64)
    last = type(model).from_pretrained(tmp_path / "checkpoint-8", dtype=torch.float64)
    assert not torch.equal(best.lm_head.weight, last.lm_head.weight)
    for (key, parameter), expected in zip(trainer.model.named_parameters(), best.parameters(), strict=True):
        assert torch.equal(parameter, expected), key


# Search and reports


@pytest.mark.parametrize("name", ["language_model", "distilbert"])
def test_a_search_with_optuna_finds_the_better_learning_rate(name, make_case, tmp_path):
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
    _, *data = make_case(name)
    trainer = make_trainer((None, *data), tmp_path, max_steps=10, model_init=lambda: make_case(name)[0])
    losses = []
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-6, 1e-2])},
        compute_objective=lambda metrics: losses.append(metrics["eval_loss"]) or losses[-1],
        direction="minimize",
        backend="optuna",
        n_trials=2,
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-6, 1e-2]}, seed=0),
    )
    # Of two rates, the one that learns: each trial begins with a new model.
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert best.objective == min(losses) < 0.9 * max(losses)


def read_tensorboard(folder):
    """The losses in the event files below a folder, by step."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    file = next(Path(folder).rglob("events.out.tfevents.*"))
    events = event_accumulator.EventAccumulator(str(file.parent)).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def read_wandb(folder):
    """The losses in the file of an offline run below a folder, by step.

    The file is a log of LevelDB: 7 bytes that name its kind, then blocks of 32 KiB with pieces of records; each piece
    has a checksum of 4 bytes, its length in 2, and 1 that is 1 or 4 if the record ends with it.
    """
    record_type = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="W&B is not installed").Record
    content = next(Path(folder).rglob("run-*.wandb")).read_bytes()
    losses, position, record = {}, 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            items = record_type.FromString(record).history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            if "train/loss" in values:
                losses[values["train/global_step"]] = values["train/loss"]
            record = b""
    return losses


def logged(folder):
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def test_a_script_reports_its_losses_to_tensorboard_and_to_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    generator = random.Random(0)
    lines = [" ".join(generator.choices(["cat", "dog", "sees", "a", "the"], k=9)) for _ in range(40)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    train_tokenizer(lines, 300).save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "reduced_size": 4, "offsets": [1]}
    sizes["max_position_embeddings"] = 16
    process = subprocess.run(
        [
            *[sys.executable, "trainer_scripts/run_clm.py", "--model_type=grassmann", "--use_cpu", "--do_train"],
            *[f"--train_file={tmp_path / 'train.txt'}", f"--tokenizer_name={tmp_path / 'tokenizer'}"],
            *[f"--config_overrides={json.dumps(sizes)}", "--block_size=16", "--max_steps=4", "--logging_steps=1"],
            *["--save_strategy=no", f"--output_dir={tmp_path / 'out'}", "--report_to", "tensorboard", "wandb"],
        ],
        cwd=REPOSITORY,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    losses = logged(tmp_path / "out")
    assert list(losses) == [1, 2, 3, 4]
    # Event files hold float32.
    assert read_tensorboard(tmp_path / "out") == pytest.approx(losses, rel=1e-6)
    assert read_wandb(tmp_path) == losses
