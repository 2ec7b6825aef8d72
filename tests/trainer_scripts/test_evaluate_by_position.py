import json
import math
import re

import evaluate_by_position
import numpy as np
import pytest
import report_by_position
import run_clm
import torch
from hypothesis import given
from hypothesis import strategies as st
from positions import mean_by_distance, position_limit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


MODELS = {
    "memory": {
        "model_type": "grassmann",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "mixer_types": "memory",
        "norm_placement": "pre",
        "memory_reduced_size": 4,
        "num_memory_heads": 2,
        "memory_value_size": 4,
        "max_position_embeddings": None,
    },
    "plucker": {
        "model_type": "grassmann",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "reduced_size": 4,
        "max_position_embeddings": 32,
    },
    "stablelm": {
        "model_type": "stablelm",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
}
QUIET = ["--use_cpu", "--report_to=none", "--disable_tqdm=true"]


def make_model(name, vocab_size):
    torch.manual_seed(0)
    fields = dict(MODELS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), vocab_size=vocab_size, initializer_range=0.5, **fields)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer_folder):
    """Folders of tiny models, whose weights are large enough to make tokens before matter."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    folders = {name: tmp_path_factory.mktemp("saved") / name for name in MODELS}
    for name, folder in folders.items():
        make_model(name, len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folders["memory"] / "metrics.json").write_text('{"eval_loss": 1.0, "seed": 3, "git_commit": "abc"}')
    return folders


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, saved, text_files, run_python):
    """Output folder of an evaluation of all of them, with blocks that exceed two position tables."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    process = run_python(
        *["trainer_scripts/evaluate_by_position.py", "--models", *saved.values(), f"--test_file={text_files['test']}"],
        *["--block_sizes", "32", "7", "100", "--tokens_per_batch=100", *QUIET, f"--output_dir={folder}"],
    )
    assert process.returncode == 0, process.stderr
    return folder


def find_block(folder, name, block_size):
    record = json.loads((folder / "by_position.json").read_text())
    model = next(model for model in record["models"] if model["name"] == name)
    return next(block for block in model["blocks"] if block["block_size"] == block_size)


def test_an_evaluation_names_the_training_of_each_model(evaluated):
    models = json.loads((evaluated / "by_position.json").read_text())["models"]
    trainings = {model["name"]: model["training"] for model in models}
    assert trainings == {name: {} for name in MODELS} | {"memory": {"seed": 3, "git_commit": "abc"}}


def token_losses(folder, path, block_size):
    """(tokens before, loss) of each token, block by block in float64, from the file and the saved model alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    ids = [i for line in path.read_text().splitlines(keepends=True) for i in tokenizer.encode(line)]
    losses = []
    for start in range(0, len(ids), block_size):
        block = torch.tensor(ids[start : start + block_size])
        with torch.inference_mode():
            probabilities = model(block[None]).logits[0].softmax(dim=-1)
        losses += [(i, -math.log(probabilities[i - 1, block[i]])) for i in range(1, len(block))]
    return losses


@pytest.mark.parametrize(("name", "block_size"), [("memory", 100), ("plucker", 32), ("stablelm", 100), ("gpt2", 7)])
def test_losses_by_position_are_those_of_the_saved_model(name, block_size, evaluated, saved, text_files):
    block = find_block(evaluated, name, block_size)
    losses = token_losses(saved[name], text_files["test"], block_size)
    firsts = [2**k for k in range(7) if 2**k < block_size]
    assert [entry["first"] for entry in block["by_position"]] == firsts
    for entry in block["by_position"]:
        inside = [loss for before, loss in losses if entry["first"] <= before <= entry["last"]]
        assert entry["count"] == len(inside) > 0
        assert entry["mean"] == pytest.approx(np.mean(inside), rel=1e-5)
    # Tokens before change what the model predicts, or this would prove little.
    assert np.ptp([entry["mean"] for entry in block["by_position"]]) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_losses_by_position_average_to_the_evaluation_of_run_clm(name, evaluated, saved, text_files, tmp_path):
    argv = [f"--model_name_or_path={saved[name]}", f"--test_file={text_files['test']}", "--do_predict"]
    options = ["--block_size=32", "--per_device_eval_batch_size=3", *QUIET]
    run_clm.main([*argv, *options, f"--output_dir={tmp_path / 'out'}"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    block = find_block(evaluated, name, 32)
    counts, means = zip(*((entry["count"], entry["mean"]) for entry in block["by_position"]))
    assert block["tokens"] == sum(counts) == metrics["test_tokens"]
    assert block["loss"] == pytest.approx(np.average(means, weights=counts), rel=1e-9)
    assert block["loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)
    assert block["perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)


@pytest.mark.parametrize("name", ["plucker", "gpt2"])
def test_position_table_that_is_too_short_is_reported(name, evaluated):
    refused = find_block(evaluated, name, 100)
    assert refused == {"block_size": 100, "refused": "its position table ends at 32 tokens"}
    assert "perplexity" in find_block(evaluated, name, 32)
    assert (
        f"- {name} in blocks of 100: its position table ends at 32 tokens."
        in (evaluated / "by_position.md").read_text()
    )


@pytest.mark.parametrize(("name", "limit"), [("memory", None), ("plucker", 32), ("stablelm", None), ("gpt2", 32)])
def test_limit_is_the_length_from_which_on_a_model_fails(name, limit):
    model = make_model(name, 20)
    assert position_limit(model) == limit
    model(torch.zeros(1, limit or 100, dtype=torch.long))
    if limit:
        with pytest.raises((IndexError, ValueError)):
            model(torch.zeros(1, limit + 1, dtype=torch.long))


def test_report_shows_what_was_measured(evaluated):
    text = (evaluated / "by_position.md").read_text()
    totals = [f"{find_block(evaluated, 'stablelm', size)['perplexity']:.2f}" for size in (7, 32, 100)]
    assert re.search(rf"\| stablelm \| 0\.\d\d \| {' | '.join(totals)} \|".replace(" | ", r" \| "), text)
    rows = [find_block(evaluated, name, 100)["by_position"][3] for name in ("memory", "stablelm")]
    memory, stablelm = (f"{math.exp(row['mean']):.2f}" for row in rows)
    assert f"| 8 to 15 | {rows[0]['count']:,} | {memory} | — | {stablelm} | — |" in text
    assert (evaluated / "by_position.png").read_bytes().startswith(b"\x89PNG")


def test_report_joins_evaluations_of_the_same_data(saved, text_files, evaluated, tmp_path, capsys):
    records = []
    for name, file in [("memory", "test"), ("gpt2", "test"), ("stablelm", "validation")]:
        folder = tmp_path / name
        argv = ["--models", str(saved[name]), f"--test_file={text_files[file]}", "--block_sizes", "16"]
        evaluate_by_position.main([*argv, *QUIET, f"--output_dir={folder}"])
        records.append(str(folder / "by_position.json"))
    report_by_position.main([*records[:2], "--output", str(tmp_path / "docs" / "length")])
    text = (tmp_path / "docs" / "length.md").read_text()
    assert "| tokens before | predictions | memory | gpt2 |" in text
    for wrong, word in [(records, "different data"), ([records[0], records[0]], "two models are named memory")]:
        with pytest.raises(SystemExit):
            report_by_position.main([*wrong, "--output", str(tmp_path / "wrong")])
        assert word in capsys.readouterr().err
    assert not (tmp_path / "wrong.md").exists()


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(-5, 5)), max_size=60))
def test_each_value_counts_in_the_range_of_its_distance(pairs):
    distances, values = np.array([d for d, _ in pairs], dtype=int), np.array([v for _, v in pairs])
    means = mean_by_distance(distances, values)
    assert sum(entry["count"] for entry in means) == len(pairs)
    for entry in means:
        inside = [value for distance, value in pairs if entry["first"] <= distance <= entry["last"]]
        assert entry["count"] == len(inside)
        assert entry["mean"] == pytest.approx(np.mean(inside), abs=1e-12)
        assert entry["last"] == 2 * entry["first"] - 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--block_size=16"], ["block_size", "block_sizes"]),
        (["--block_sizes", "1"], ["block_sizes=[1]", "at least 2"]),
        (["--do_train"], ["do_train"]),
        (["--max_eval_samples=3"], ["max_eval_samples"]),
        (["--split=validation"], ["no validation data"]),
        (["--split=train"], ["train"]),
        (["--dataloader_drop_last=true"], ["dataloader_drop_last", "must be false", "whole"]),
        (["--prediction_loss_only=true"], ["prediction_loss_only", "must be false", "whole"]),
        (["--batch_eval_metrics=true"], ["batch_eval_metrics", "must be false", "whole"]),
        (["--eval_do_concat_batches=false"], ["eval_do_concat_batches true", "whole"]),
        (["--models", "nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_mistakes_end_before_the_evaluation(changes, words, saved, text_files, tmp_path, capsys):
    argv = ["--models", str(saved["gpt2"]), f"--test_file={text_files['test']}", *QUIET]
    with pytest.raises(SystemExit) as exit:
        evaluate_by_position.main([*argv, *changes, f"--output_dir={tmp_path / 'out'}"])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "out").exists()


def test_models_with_other_tokens_are_not_compared(saved, text_files, tmp_path, capsys):
    from corpus import train_tokenizer

    other = tmp_path / "other"
    tokenizer = train_tokenizer(["another text"] * 3, 260)
    make_model("gpt2", len(tokenizer)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    argv = ["--models", str(saved["gpt2"]), str(other), f"--test_file={text_files['test']}", *QUIET]
    with pytest.raises(SystemExit):
        evaluate_by_position.main([*argv, f"--output_dir={tmp_path / 'out'}"])
    assert "other tokens than" in capsys.readouterr().err


def test_an_evaluation_is_not_overwritten(saved, text_files, evaluated, capsys):
    argv = ["--models", str(saved["gpt2"]), f"--test_file={text_files['test']}", *QUIET]
    with pytest.raises(SystemExit):
        evaluate_by_position.main([*argv, f"--output_dir={evaluated}"])
    assert "choose another output_dir" in capsys.readouterr().err
