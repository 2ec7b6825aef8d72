import json

import numpy as np
import pytest
import report_recall
import run_recall
import torch
import yaml
from conftest import REPOSITORY
from recall_data import NO_LABEL, RecallArguments, load_sequences
from test_resume import history
from transformers import AutoModelForCausalLM


RECIPES = sorted((REPOSITORY / "configuration/recall").glob("*.yaml"))
STABLELM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_dropout": 0.0,
    # Learns in a third of the steps that it takes from smaller weights.
    "initializer_range": 0.1,
}
TINY_TASK = ["--vocab_size=16", "--num_pairs", "3", "--length=16", "--validation_size=100", "--test_size=50"]
QUIET = ["--use_cpu", "--report_to=none", "--disable_tqdm=true"]
STABLELM_RUN = ["--model_type=stablelm", f"--config_overrides={json.dumps(STABLELM)}", *TINY_TASK, *QUIET]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, run_python):
    """Output folder of a Transformer that has learnt to copy three tokens, tested beyond that too."""
    folder = tmp_path_factory.mktemp("recall") / "learnt"
    process = run_python(
        *["trainer_scripts/run_recall.py", *STABLELM_RUN, "--task=copying", "--train_size=32000", "--max_steps=300"],
        *[
            "--per_device_train_batch_size=64",
            "--learning_rate=5e-3",
            "--adam_beta2=0.95",
            "--warmup_steps=20",
            "--lr_scheduler_type=constant_with_warmup",
        ],
        *["--do_train", "--do_eval", "--do_predict", "--save_strategy=no", "--test_num_pairs", "2", "3", "5"],
        *["--test_lengths", "8", "16", "32", f"--output_dir={folder}"],
    )
    assert process.returncode == 0, process.stderr
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_model_that_has_learnt_the_task_is_accurate(learnt):
    metrics = read(learnt, "metrics.json")
    assert metrics["eval_accuracy"] > 0.95
    assert metrics["test_accuracy_3_pairs_16_tokens"] > 0.95
    assert metrics["parameters"] == AutoModelForCausalLM.from_pretrained(learnt).num_parameters()


def test_reported_accuracies_are_those_of_the_saved_model(learnt):
    """Sequence by sequence and answer by answer."""
    record, model = read(learnt, "recall.json"), AutoModelForCausalLM.from_pretrained(learnt).eval()
    args = RecallArguments(task="copying", vocab_size=16, num_pairs=[3], length=16)
    # Five pairs need 13 tokens.
    sizes = [(2, 8), (2, 16), (3, 16), (5, 16), (2, 32), (3, 32), (5, 32)]
    assert [(cell["num_pairs"], cell["length"]) for cell in record["cells"]] == sizes
    assert record["chance"] == 1 / 8
    for cell in record["cells"]:
        sequences = load_sequences(args, "test", [cell["num_pairs"]], cell["length"], 50)
        correct, ranges = [], {}
        for ids, labels, distances in zip(*sequences):
            with torch.inference_mode():
                predicted = model(torch.tensor(ids[None])).logits[0].argmax(dim=-1)
            for i in np.nonzero(labels != NO_LABEL)[0]:
                correct.append(float(predicted[i - 1] == labels[i]))
                ranges.setdefault(int(distances[i]).bit_length() - 1, []).append(correct[-1])
        assert cell["answers"] == len(correct) == 50 * cell["num_pairs"]
        assert cell["accuracy"] == pytest.approx(np.mean(correct))
        by_distance = {entry["first"]: (entry["last"], entry["count"], entry["mean"]) for entry in cell["by_distance"]}
        expected = {2**k: (2 ** (k + 1) - 1, len(hits), pytest.approx(np.mean(hits))) for k, hits in ranges.items()}
        assert by_distance == expected


@pytest.mark.parametrize("task", ["recall", "copying"])
def test_new_model_is_no_better_than_chance(task, tmp_path):
    overrides = STABLELM | {"tie_word_embeddings": False}
    argv = [*STABLELM_RUN, f"--config_overrides={json.dumps(overrides)}", f"--task={task}", "--test_size=1000"]
    run_recall.main([*argv, "--do_predict", f"--output_dir={tmp_path / 'out'}"])
    record = read(tmp_path / "out", "recall.json")
    (cell,) = record["cells"]
    assert record["chance"] == (1 / 4 if task == "recall" else 1 / 8)
    # It does not even know which tokens can be answers.
    assert 0 < cell["accuracy"] < record["chance"]
    assert cell["loss"] == pytest.approx(np.log(16), rel=0.2)


def test_lengths_beyond_a_position_table_are_reported(tmp_path):
    overrides = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = ["--model_type=gpt2", f"--config_overrides={json.dumps(overrides)}", *TINY_TASK, *QUIET, "--do_predict"]
    folder = tmp_path / "gpt2"
    run_recall.main([*model, "--test_lengths", "16", "32", f"--output_dir={folder}"])
    short, long = read(folder, "recall.json")["cells"]
    assert "accuracy" in short
    assert long == {"num_pairs": 3, "length": 32, "refused": "its position table ends at 16 tokens"}


def test_interrupted_run_resumes_to_the_same_losses(tmp_path):
    schedule = ["--do_train", "--do_eval", "--do_predict", "--train_size=64", "--num_train_epochs=2"]
    schedule += ["--per_device_train_batch_size=8", "--save_steps=5", "--logging_steps=1"]
    argv = [*STABLELM_RUN, *schedule]
    run_recall.main([*argv, f"--output_dir={tmp_path / 'whole'}"])
    run_recall.main([*argv, f"--output_dir={tmp_path / 'resumed'}"])
    for name in ("checkpoint-15", "checkpoint-16"):
        (tmp_path / "resumed" / name / "trainer_state.json").unlink()
    run_recall.main([*argv, f"--output_dir={tmp_path / 'resumed'}", "--resume_from_checkpoint=true"])
    logs = [[entry["loss"] for entry in history(tmp_path / name) if "loss" in entry] for name in ("whole", "resumed")]
    assert len(logs[0]) == 16 and logs[0] == logs[1]
    whole, resumed = (read(tmp_path / name, "recall.json") for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, tmp_path, monkeypatch):
    if recipe.stem == "gla" and not torch.cuda.is_available():
        pytest.skip("the kernels of flash-linear-attention need a GPU")
    monkeypatch.chdir(REPOSITORY)
    sizes = ["--train_size=16", "--validation_size=8", "--test_size=4", "--per_device_train_batch_size=8"]
    run_recall.main([str(recipe), *sizes, *QUIET, "--test_lengths", "128", "256", f"--output_dir={tmp_path / 'out'}"])
    record = read(tmp_path / "out", "recall.json")
    assert len(record["cells"]) == 10 and all("accuracy" in cell for cell in record["cells"])
    assert (tmp_path / "out" / "recipe.yaml").exists() and (tmp_path / "out" / "log.jsonl").exists()


def test_models_of_the_recipes_are_of_one_size():
    pytest.importorskip("fla", reason="flash-linear-attention is missing: the extra `bench`")
    sizes = {}
    for recipe in RECIPES:
        model_args, data_args, _ = run_recall.parse(run_recall.ARGUMENTS, [str(recipe), "--use_cpu"])
        config = run_recall.load_config(model_args, run_recall.build_tokenizer(data_args.vocab_size))
        with torch.device("meta"):
            sizes[recipe.stem] = AutoModelForCausalLM.from_config(config).num_parameters()
    assert len(sizes) == 6
    assert list(sizes.values()) == pytest.approx([sizes["stablelm"]] * 6, rel=0.01)


def test_recipes_differ_only_in_the_model_and_the_output_folder():
    recipes = [yaml.safe_load(path.read_text()) for path in RECIPES]
    for recipe in recipes:
        for name in ("model_type", "config_overrides", "import_packages", "output_dir"):
            recipe.pop(name, None)
        assert recipe == recipes[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--num_pairs", "9"], ["9 pairs", "8 keys", "vocab_size=16"]),
        (["--num_pairs", "8", "--task=copying"], ["8 pairs", "8 keys"]),
        (["--length=9"], ["length=9", "too short", "10"]),
        (["--length=64"], ["length=64", "position table ends at 16"]),
        (["--num_pairs", "0"], ["num_pairs=[0]"]),
        (["--test_lengths", "4"], ["test_lengths=[4]"]),
        (["--vocab_size=18"], ["vocab_size=18", "multiple of 4"]),
        (["--train_size=0"], ["train_size=0"]),
        (["--task=recal"], ["recal"]),
        (["--generator_seed=-1"], ["generator_seed=-1"]),
        (
            ["--num_pairs", "1", "--length=4", "--vocab_size=8", "--train_size=5000"],
            ["training sequences", "vocab_size"],
        ),
        (["--do_train=false", "--do_eval=false"], ["nothing to do"]),
        (["--metric_for_best_model=perplexity"], ["perplexity", "accuracy"]),
    ],
)
def test_mistakes_end_before_the_training(changes, words, tmp_path, capsys):
    overrides = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = ["--model_type=gpt2", f"--config_overrides={json.dumps(overrides)}", *TINY_TASK, *QUIET]
    with pytest.raises(SystemExit) as exit:
        run_recall.main([*model, "--do_train", "--do_eval", *changes, f"--output_dir={tmp_path / 'out'}"])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "out").exists()


def test_vocabulary_may_be_smaller_than_the_texts_that_test_causality(tmp_path):
    task = ["--vocab_size=8", "--num_pairs", "2", "--length=16", "--validation_size=50", "--train_size=50"]
    model = ["--model_type=stablelm", f"--config_overrides={json.dumps(STABLELM)}"]
    run_recall.main([*model, *task, *QUIET, "--do_train", "--max_steps=1", f"--output_dir={tmp_path / 'out'}"])
    assert read(tmp_path / "out", "metrics.json")["parameters"] > 0


def test_report_shows_the_figures_of_the_records(learnt, tmp_path):
    overrides = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    other = [*TINY_TASK, *QUIET, "--task=copying", "--do_train", "--max_steps=1", "--train_size=8", "--do_predict"]
    model = ["--model_type=gpt2", f"--config_overrides={json.dumps(overrides)}"]
    lengths = ["--test_num_pairs", "2", "3", "5", "--test_lengths", "8", "16", "32"]
    run_recall.main([*model, *other, *lengths, f"--output_dir={tmp_path / 'gpt2'}"])
    report_recall.main([str(learnt), str(tmp_path / "gpt2"), "--output", str(tmp_path / "recall")])
    text = (tmp_path / "recall.md").read_text()
    cells = [f"{100 * cell['accuracy']:.1f}" for cell in read(learnt, "recall.json")["cells"]]
    assert f"| {' | '.join(cells)} |" in text
    assert "- gpt2, 32 tokens: its position table ends at 16 tokens." in text
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_report_pools_answers_not_cells():
    entry = {"first": 4, "last": 7, "mean": 1.0, "count": 30}
    cells = [
        {"num_pairs": 2, "length": 8, "accuracy": 1.0, "answers": 30, "by_distance": [entry]},
        {
            "num_pairs": 2,
            "length": 16,
            "accuracy": 0.0,
            "answers": 10,
            "by_distance": [entry | {"mean": 0.0, "count": 10}],
        },
        {"num_pairs": 4, "length": 8, "accuracy": 0.5, "answers": 8, "by_distance": [entry]},
        {"num_pairs": 2, "length": 32, "refused": "it is too long"},
    ]
    record = {"trained": {"num_pairs": [2], "length": 8}, "cells": cells}
    assert report_recall.accuracies(record, "num_pairs") == {2: 1.0, 4: 0.5}
    assert report_recall.accuracies(record, "distance") == {4: 0.75}
