# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness scores and generates with the models exactly what they give themselves."""

import json
import os
import subprocess
import sys

import pytest
import torch
from corpus import train_tokenizer
from transformers import AutoModelForCausalLM


lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
cli_evaluate = pytest.importorskip("lm_eval.__main__").cli_evaluate
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

# Contexts and choices of many lengths, so that every batch has padding.
QUESTIONS = [
    {"question": "a cat sees", "choices": ["a dog", "the dog that sees the house"], "answer": 0},
    {"question": "the small dog that follows the cat is not", "choices": ["a house", "no", "in"], "answer": 2},
    {"question": "who", "choices": ["the cat", "nobody at all but the dog", "sees"], "answer": 1},
    {"question": "houses see nothing, and that is all there is to", "choices": ["see", "follow"], "answer": 0},
    {"question": "dogs follow", "choices": ["cats", "houses", "dogs"], "answer": 0},
]
TEXTS = [
    "the cat sees a house, and the dog sees the cat that sees the house behind the other house, and no other cat",
    "a small dog",
    "dogs see cats; cats see houses; houses see nothing at all, and that is all that there is to see for a dog",
]
LENGTH = 24  # less than the tokens of two of the texts
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
"""
PERPLEXITY = """
task: perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATION = """
task: generation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: ""
generation_kwargs: {until: ["a"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, *(row["question"] for row in QUESTIONS)], 280)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"questions": QUESTIONS, "texts": [{"text": text} for text in TEXTS]}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task, data in [
        ("choices", CHOICES, "questions"),
        ("perplexity", PERPLEXITY, "texts"),
        ("generation", GENERATION, "questions"),
    ]:
        files = f"dataset_kwargs: {{data_files: {{test: {folder / data}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{task}dataset_path: json\n{files}test_split: test\n")
    return folder


@pytest.fixture(scope="module")
def make_checkpoint(make_model, tokenizer, tmp_path_factory):
    """Function that saves a model, in float64, with its tokenizer."""

    def make(**overrides):
        folder = tmp_path_factory.mktemp("checkpoint")
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        model = make_model(vocab_size=len(tokenizer), **(special | overrides)).double()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


def evaluate(task, folder, tasks, batch_size=4, **model_args):
    """Metrics, and what the model answered to each row."""
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", **model_args},
        tasks=[task],
        batch_size=batch_size,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return results["results"][task], [sample["filtered_resps"] for sample in samples]


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """Log-probability of the continuation, and whether greedy decoding would give it."""
    ids = torch.tensor(context + continuation)
    log_probabilities = model(ids[None, :-1]).logits[0, len(context) - 1 :].log_softmax(-1)
    total = log_probabilities.gather(1, ids[len(context) :, None]).sum().item()
    return total, log_probabilities.argmax(-1).tolist() == continuation


def expected_choices(model, tokenizer):
    answers = []
    for row in QUESTIONS:
        context = tokenizer(row["question"]).input_ids
        answers.append([])
        for choice in row["choices"]:
            ids = tokenizer(f"{row['question']} {choice}").input_ids
            assert ids[: len(context)] == context
            answers[-1].append(log_likelihood(model, context, ids[len(context) :]))
    return answers


def assert_same_choices(actual, expected):
    for actual_row, expected_row in zip(actual, expected, strict=True):
        for (actual_total, actual_greedy), (total, greedy) in zip(actual_row, expected_row, strict=True):
            assert actual_total == pytest.approx(total, abs=1e-8)
            assert actual_greedy == greedy


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_of_choices_are_the_models_own(batch_size, make_checkpoint, flavour, tokenizer, tasks):
    folder = make_checkpoint(**flavour)
    metrics, answers = evaluate("choices", folder, tasks, batch_size)
    expected = expected_choices(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    assert_same_choices(answers, expected)
    best = [max(range(len(row)), key=lambda index: row[index][0]) for row in expected]
    right = [index == row["answer"] for index, row in zip(best, QUESTIONS, strict=True)]
    assert metrics["acc,none"] == pytest.approx(sum(right) / len(right))


def windows(ids, prefix, length):
    """Disjoint pieces that cover the text, each with its context; the last has as much context as fits."""
    ids = [prefix, *ids]
    for start in range(1, len(ids), length):
        stop = min(start + length, len(ids))
        context = start - 1 if stop - start == length else max(0, stop - length - 1)
        yield ids[context:start], ids[start:stop]


@pytest.mark.parametrize("positions", [LENGTH, 64, None])
def test_the_log_likelihood_of_a_text_longer_than_the_position_table_is_that_of_its_windows(
    positions, make_checkpoint, tokenizer, tasks
):
    folder = make_checkpoint(max_position_embeddings=positions)
    metrics, answers = evaluate("perplexity", folder, tasks)
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for text, (answer,) in zip(TEXTS, answers, strict=True):
        ids = tokenizer(text).input_ids
        # Without a table, the whole text is one window.
        pieces = list(windows(ids, tokenizer.bos_token_id, positions or 2048))
        assert (len(pieces) > 1) == (positions is not None and len(ids) > positions)
        expected = sum(log_likelihood(model, *piece)[0] for piece in pieces)
        assert answer == pytest.approx(expected, abs=1e-8)
        total += expected
    assert max(len(tokenizer(text).input_ids) for text in TEXTS) > LENGTH
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert metrics["bits_per_byte,none"] == pytest.approx(-total / num_bytes / torch.log(torch.tensor(2.0)).item())


def test_the_maximum_length_is_that_of_the_position_table_and_may_be_set_where_there_is_none(make_checkpoint):
    with_table, without = make_checkpoint(), make_checkpoint(max_position_embeddings=None)
    assert HFLM(str(with_table), device="cpu").max_length == 64
    assert HFLM(str(without), device="cpu").max_length == 2048
    assert HFLM(str(without), device="cpu", max_length=5000).max_length == 5000


@pytest.mark.parametrize("positions", [64, None], ids=["position_table", "no_positions"])
def test_generations_of_a_padded_batch_are_those_of_each_row_alone(positions, make_checkpoint, tokenizer, tasks):
    folder = make_checkpoint(max_position_embeddings=positions)
    _, answers = evaluate("generation", folder, tasks)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for row in QUESTIONS:
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append([text.partition("a")[0]])
    assert answers == expected
    assert len({text for (text,) in expected}) > 1


def test_an_adapter_is_evaluated_by_name(checkpoint, tokenizer, tasks, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path)
    _, answers = evaluate("choices", checkpoint, tasks, peft=str(tmp_path))
    assert_same_choices(answers, expected_choices(adapted, tokenizer))


def run_command(arguments, monkeypatch):
    """`python -c "import modeling_grassmann; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"`"""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    cli_evaluate()


def run_command_with_the_checkpoints_own_code(arguments, folder):
    """A process that does not import the package: the checkpoint brings its code along."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-m", "lm_eval", *arguments]
    result = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((folder / "modules").rglob("modeling_grassmann.py"))


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_the_command_line_gives_the_models_own_log_likelihoods(
    trust_remote_code, checkpoint, tokenizer, tasks, tmp_path, monkeypatch
):
    arguments = ["--model=hf", f"--model_args=pretrained={checkpoint},trust_remote_code={trust_remote_code}"]
    arguments += ["--tasks=choices", f"--include_path={tasks}", "--batch_size=4", "--device=cpu"]
    arguments += [f"--output_path={tmp_path}", "--log_samples"]
    if trust_remote_code:
        run_command_with_the_checkpoints_own_code(arguments, tmp_path)
    else:
        run_command(arguments, monkeypatch)
    (file,) = tmp_path.rglob("samples_choices_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    # Numbers are stored as text.
    answers = [[(float(total), str(greedy) == "True") for total, greedy in row["filtered_resps"]] for row in rows]
    assert_same_choices(answers, expected_choices(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer))
