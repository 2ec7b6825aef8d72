# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiled training and generation compile once and not once per step, also where lengths change."""

import copy

import pytest
import torch
from transformers import CompileConfig, Trainer, TrainingArguments

from modeling_grassmann import GrassmannForSequenceClassification


# Traces backward passes as every compiler does, but needs no C++ compiler.
BACKEND = "aot_eager"
# Shorter and longer than before, odd, and below the offsets.
LENGTHS = [16, 24, 9, 33, 8, 3, 2, 50]
COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_task(make_model, make_classifier):
    def make(name):
        """A model in training mode, and what makes the labels of its ids."""
        # Transformers' loss would find the type of the problem in the first step, and write it into the configuration.
        fields = {"problem_type": "single_label_classification", "num_labels": 3}
        if name == "head":
            return make_classifier("grassmann", num_hidden_layers=1, **fields).train(), lambda ids: ids[:, 0] % 3
        fields |= {"num_hidden_layers": 1, "offsets": [[1, 3]], "use_cache": False}
        if name == "classifier":
            return make_model(GrassmannForSequenceClassification, **fields).train(), lambda ids: ids[:, 0] % 3
        return make_model(**fields).train(), lambda ids: ids

    return make


def make_batches(make_ids, make_labels, lengths):
    for step, length in enumerate(lengths):
        ids = make_ids(2, length, seed=step)
        mask = (torch.arange(length) >= torch.tensor([[0], [length // 3]])).long()
        yield {"input_ids": ids, "attention_mask": mask, "labels": make_labels(ids)}


def train(model, batches, forward, stance="default"):
    """Losses of a training loop; from the second step on it runs under a stance of the compiler."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step, batch in enumerate(batches):
        with torch.compiler.set_stance("default" if step == 0 else stance):
            loss = forward(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_one_graph(model, batches):
    reference = copy.deepcopy(model)
    expected = train(reference, batches, reference)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    assert train(model, batches, compiled, "fail_on_recompile") == pytest.approx(expected, rel=1e-5)
    assert COUNTERS["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["language_model", "classifier", "head"])
def test_a_training_loop_compiles_in_its_first_step_alone(name, make_task, make_ids):
    model, make_labels = make_task(name)
    check_one_graph(model, list(make_batches(make_ids, make_labels, [16] * 5)))


@pytest.mark.parametrize("name", ["language_model", "classifier"])
def test_one_graph_trains_on_batches_of_every_length(name, make_task, make_ids):
    model, make_labels = make_task(name)
    batches = list(make_batches(make_ids, make_labels, LENGTHS))
    for value in batches[0].values():
        if value.dim() == 2:
            torch._dynamo.mark_dynamic(value, 1, min=2, max=64)
    check_one_graph(model, batches)


@pytest.mark.slow
def test_one_graph_trains_the_head_on_batches_of_every_number_of_whole_windows(make_task, make_ids):
    model, make_labels = make_task("head")
    # From two windows of 8 tokens on, as a collator makes them with `pad_to_multiple_of=8`.
    batches = list(make_batches(make_ids, make_labels, [16, 24, 40, 32, 64]))
    for batch in batches:
        for name in ("input_ids", "attention_mask"):
            torch._dynamo.maybe_mark_dynamic(batch[name], 1)
    check_one_graph(model, batches)


def test_trainer_compiles_once(make_model, make_ids, tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in make_ids(24, 12)]

    def losses(model, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    fields = {"num_hidden_layers": 1, "offsets": [[1, 3]]}
    expected = losses(make_model(**fields))
    compiled = losses(make_model(**fields), torch_compile=True, torch_compile_backend=BACKEND)
    assert len(compiled) == 6
    assert compiled == pytest.approx(expected, rel=1e-3)
    assert COUNTERS["stats"]["unique_graphs"] == 1


def test_compiled_generation_does_not_compile_again_for_another_prompt(make_model, make_ids):
    model = make_model(num_hidden_layers=1, offsets=[[1, 3]])
    # Transformers compiles on accelerators only, unless told otherwise.
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    options = {"do_sample": False, "pad_token_id": 0}
    for length, max_new_tokens in ((5, 6), (9, 6), (2, 12), (30, 20)):
        prompt = make_ids(2, length, seed=length)
        expected = model.generate(prompt, use_cache=False, max_new_tokens=max_new_tokens, **options)
        tokens = model.generate(
            prompt,
            cache_implementation="static",
            compile_config=compile_config,
            max_new_tokens=max_new_tokens,
            **options,
        )
        assert torch.equal(tokens, expected)
    assert COUNTERS["stats"]["unique_graphs"] == 1
