import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import run_nli
import torch
from arguments import parse
from checkpoints import checkpoints
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline


NAMES = {"E": "entailment", "N": "neutral", "C": "contradiction"}
EPOCHS = ["--eval_strategy=epoch", "--save_strategy=epoch", "--logging_steps=5", "--save_total_limit=1"]
BEST = ["--load_best_model_at_end", "--metric_for_best_model=accuracy"]


def read_json(path):
    return json.loads(Path(path).read_text())


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def labelled(path):
    """(number in the file, premise, hypothesis, name of the label) of the rows that have a label."""
    rows = enumerate(csv.DictReader(path.open()))
    return [(i, row["premise"], row["hypothesis"], NAMES[row["label"]]) for i, row in rows if row["label"] != "-"]


def independent_outcomes(folder, rows):
    """Probabilities of the saved model in float64, one pair at a time and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().double()
    outcomes = []
    for _, premise, hypothesis, _ in rows:
        with torch.inference_mode():
            logits = model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits[0]
        probabilities = zip(model.config.id2label.values(), logits.softmax(dim=-1).tolist())
        outcomes.append(dict(probabilities))
    return outcomes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_classifier, run_python):
    """Output folder of a tiny run through the launcher of Accelerate."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    process = run_python(
        *["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file=configuration/accelerate/cpu.yaml"],
        *["trainer_scripts/run_nli.py", *tiny_classifier, *EPOCHS, *BEST, f"--output_dir={folder}", "--seed=3"],
        *["--do_train", "--do_eval", "--do_predict", "--num_train_epochs=4", "--write_predictions"],
        *["--train_sampling_strategy=group_by_length", "--label_smoothing_factor=0.1", "--report_to=tensorboard"],
    )
    assert process.returncode == 0, process.stderr
    (folder / "stdout").write_text(process.stdout)
    return folder


@pytest.mark.parametrize(("prefix", "split"), [("eval", "validation"), ("test", "test")])
def test_reported_metrics_are_those_of_the_saved_model(trained, pair_files, prefix, split):
    rows = labelled(pair_files[split])
    outcomes = independent_outcomes(trained, rows)
    answers = [max(probabilities, key=probabilities.get) for probabilities in outcomes]
    metrics = read_json(trained / "metrics.json")
    correct = sum(answer == label for answer, (*_, label) in zip(answers, rows))
    assert metrics[f"{prefix}_accuracy"] == correct / len(rows)
    loss = -sum(math.log(probabilities[label]) for probabilities, (*_, label) in zip(outcomes, rows)) / len(rows)
    assert metrics[f"{prefix}_loss"] == pytest.approx(loss, rel=1e-4)
    confusion = read_json(trained / f"confusion_matrix_{split}.json")
    assert sorted(confusion["labels"]) == sorted(NAMES.values())
    for row, label in zip(confusion["matrix"], confusion["labels"]):
        of_class = [answer for answer, (*_, other) in zip(answers, rows) if other == label]
        assert row == [of_class.count(name) for name in confusion["labels"]]
        assert metrics[f"{prefix}_accuracy_{label}"] == of_class.count(label) / len(of_class)
    assert (trained / f"confusion_matrix_{split}.png").stat().st_size > 1000


@pytest.mark.parametrize("split", ["validation", "test"])
def test_outcomes_and_predictions_follow_the_order_of_the_data(trained, pair_files, split):
    rows = labelled(pair_files[split])
    outcomes = read_json(trained / f"outcomes_{split}.json")
    assert [outcomes["labels"][i] for i in outcomes["references"]] == [label for *_, label in rows]
    predictions = read_lines(trained / f"predictions_{split}.jsonl")
    assert [outcomes["labels"][i] for i in outcomes["predictions"]] == [line["prediction"] for line in predictions]
    found = [tuple(line[name] for name in ("index", "premise", "hypothesis", "label")) for line in predictions]
    assert found == rows
    for line, expected in zip(predictions, independent_outcomes(trained, rows)):
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["probabilities"] == pytest.approx(expected, abs=1e-4)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)


def test_run_learned_and_left_its_records(trained, pair_files):
    metrics = read_json(trained / "metrics.json")
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    head = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert metrics["eval_accuracy"] > 0.7
    assert metrics["parameters"] == metrics["trainable_parameters"] == model.num_parameters()
    assert metrics["head_parameters"] == head
    rows = {"train": (135, 15), "eval": (37, 4), "test": (27, 3)}
    for prefix, (labelled_rows, unlabelled) in rows.items():
        assert (metrics[f"{prefix}_rows"], metrics[f"{prefix}_unlabelled"]) == (labelled_rows, unlabelled)
        assert metrics[f"{prefix}_truncated"] == 0
    assert metrics["max_length"] is None
    assert {"train_loss", "device", "git_commit", "wall_time_seconds", "versions"} <= metrics.keys()
    assert "15 rows without a label were left out" in (trained / "stdout").read_text()
    assert list(trained.rglob("events.out.tfevents.*"))


def test_best_epoch_is_that_of_the_highest_accuracy_and_its_model_is_kept(trained):
    evaluations = [entry for entry in read_lines(trained / "log.jsonl") if "eval_accuracy" in entry]
    best = max(evaluations[:-1], key=lambda entry: entry["eval_accuracy"])
    metrics = read_json(trained / "metrics.json")
    assert len(evaluations) == 5
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["eval_accuracy"] == best["eval_accuracy"]


def test_log_has_the_rates_of_backbone_and_head(trained):
    steps = [entry for entry in read_lines(trained / "log.jsonl") if "loss" in entry]
    assert steps[0]["learning_rate"] == pytest.approx(5e-3, rel=0.1)
    for entry in steps:
        assert entry["head_learning_rate"] == pytest.approx(2 * entry["learning_rate"])
    assert steps[-1]["learning_rate"] < 0.1 * steps[0]["learning_rate"]


def test_rate_of_the_head_is_logged_where_that_of_the_backbone_is_0(tiny_classifier, tmp_path):
    schedule = ["--learning_rate=0", "--max_steps=4", "--logging_steps=1", "--save_strategy=no"]
    run_nli.main([*tiny_classifier, *schedule, "--do_train", f"--output_dir={tmp_path / 'out'}"])
    steps = [entry for entry in read_lines(tmp_path / "out" / "log.jsonl") if "loss" in entry]
    assert [entry["learning_rate"] for entry in steps] == [0] * 4
    assert [entry["head_learning_rate"] for entry in steps] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_rate_of_the_head_is_logged_from_the_first_step_of_a_warm_up(tiny_classifier, tmp_path):
    schedule = ["--warmup_steps=2", "--max_steps=4", "--logging_steps=1", "--save_strategy=no"]
    run_nli.main([*tiny_classifier, *schedule, "--do_train", f"--output_dir={tmp_path / 'out'}"])
    steps = [entry for entry in read_lines(tmp_path / "out" / "log.jsonl") if "loss" in entry]
    assert [entry["head_learning_rate"] for entry in steps] == pytest.approx([0, 5e-3, 1e-2, 5e-3])


def test_backbone_of_the_command_line_brings_its_tokenizer(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_type: bert\ntokenizer_name: b\noutput_dir: {tmp_path}\n")
    assert parse(run_nli.ARGUMENTS, [str(recipe), "--backbone_name_or_path=x"])[0].tokenizer == "x"
    argv = [str(recipe), "--backbone_name_or_path=x", "--tokenizer_name=y"]
    assert parse(run_nli.ARGUMENTS, argv)[0].tokenizer == "y"


def test_optimizer_has_every_weight_once_at_the_rate_of_its_part(backbone, tmp_path):
    config_fields = {"head_type": "linear", "num_labels": 3}
    model = run_nli.GrassmannPluckerForSequenceClassification.from_backbone(backbone, **config_fields)
    args = run_nli.ClassifierTrainingArguments(
        str(tmp_path), use_cpu=True, learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1, report_to="none"
    )
    trainer = run_nli.ClassifierTrainer(model=model, args=args)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    groups = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups) == len([*model.parameters()])
    for name, parameter in model.named_parameters():
        decay = 0.0 if "bias" in name or "LayerNorm" in name else 0.1
        assert groups[id(parameter)] == (1e-3 if name.startswith("backbone.") else 1e-2, decay), name


def test_frozen_backbone_stays_as_it_is_and_the_head_does_not(tiny_classifier, backbone, tmp_path):
    overrides = '--config_overrides={"freeze_backbone": true, "head_type": "linear"}'
    argv = [*tiny_classifier, overrides, "--do_train", "--max_steps=3", "--save_strategy=no"]
    run_nli.main([*argv, f"--output_dir={tmp_path / 'out'}"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    before = AutoModel.from_pretrained(backbone).state_dict()
    after = model.backbone.state_dict()
    assert after and all(torch.equal(after[name], before[name]) for name in after)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["trainable_parameters"] == metrics["head_parameters"] == 3 * 17
    assert model.classifier.bias.abs().max() > 0.005


def history(folder):
    """The log without what depends on the clock, and without the summary of the training."""
    entries = [entry for entry in read_lines(Path(folder) / "log.jsonl") if "train_runtime" not in entry]
    clock = ("runtime", "per_second", "preparation_time")
    return [{key: value for key, value in entry.items() if not key.endswith(clock)} for entry in entries]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_classifier):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    schedule = ["--num_train_epochs=2", "--logging_steps=1", "--save_steps=7", "--eval_steps=7"]
    argv = [*tiny_classifier, *schedule, *BEST, "--do_train", "--do_eval", "--eval_strategy=steps"]
    run_nli.main([*argv, f"--output_dir={folder}"])
    return argv, folder


def test_interrupted_run_resumes_to_the_same_numbers(uninterrupted, tmp_path):
    argv, folder = uninterrupted
    for checkpoint in checkpoints(folder)[-3:]:
        shutil.copytree(checkpoint, tmp_path / "out" / Path(checkpoint).name)
    # The newest one was being written when the run ended.
    newest = Path(checkpoints(tmp_path / "out")[0])
    (newest / "optimizer.pt").unlink()
    run_nli.main([*argv, f"--output_dir={tmp_path / 'out'}", "--resume_from_checkpoint=true"])
    assert history(tmp_path / "out") == history(folder)
    before, after = (read_json(path / "metrics.json") for path in (folder, tmp_path / "out"))
    for name in ("eval_accuracy", "eval_loss", "best_epoch"):
        assert after[name] == before[name]
    assert after["train_loss"] == pytest.approx(before["train_loss"])


def test_finished_run_stays_as_it_is(uninterrupted, tmp_path):
    argv, folder = uninterrupted
    shutil.copytree(folder, tmp_path / "out")
    # With this schedule, another step would change the weights.
    options = ["--lr_scheduler_type=constant", "--resume_from_checkpoint=true"]
    run_nli.main([*argv, *options, f"--output_dir={tmp_path / 'out'}"])
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "out")]
    assert weights[0] == weights[1]
    assert (
        read_json(tmp_path / "out" / "metrics.json")["eval_accuracy"]
        == read_json(folder / "metrics.json")["eval_accuracy"]
    )


def test_evaluation_alone_gives_the_same_numbers_in_any_order_of_the_classes(trained, pair_files, tmp_path):
    argv = [f"--model_name_or_path={trained}", f"--validation_file={pair_files['validation']}", "--do_eval"]
    # The classes of the data come in another order than those of the model, and are matched by name.
    mapping = '--label_mapping={"C": "contradiction", "N": "neutral", "E": "entailment"}'
    options = ["--per_device_eval_batch_size=3", "--use_cpu", "--report_to=none", "--disable_tqdm=true"]
    run_nli.main([*argv, mapping, *options, f"--output_dir={tmp_path / 'out'}"])
    before, after = (read_json(folder / "metrics.json") for folder in (trained, tmp_path / "out"))
    for name, value in before.items():
        if name.startswith("eval_accuracy"):
            assert after[name] == value
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    assert "train_loss" not in after and "test_accuracy" not in after
    found = [read_json(folder / "outcomes_validation.json") for folder in (trained, tmp_path / "out")]
    assert found[0] == found[1]


def test_recipe_of_a_run_repeats_it(trained, tmp_path):
    argv = [str(trained / "recipe.yaml"), f"--output_dir={tmp_path / 'again'}", "--report_to=none"]
    run_nli.main(argv)
    assert history(tmp_path / "again") == history(trained)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GRASSMANN = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "reduced_size": 4, "offsets": [1]}


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("bert", TINY | {"max_position_embeddings": 20}),
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}),
        ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}),
        ("grassmann", GRASSMANN),
        ("grassmann", GRASSMANN | {"is_causal": False, "max_position_embeddings": None}),
        ("grassmann_plucker", {"head_type": "linear", "backbone_config": {"model_type": "bert", **TINY}}),
        ("grassmann_plucker", {"head_type": "linear", "backbone_config": {"model_type": "grassmann", **GRASSMANN}}),
    ],
)
def test_new_models_train_and_know_the_classes(model_type, overrides, pair_data, pair_tokenizer, tmp_path):
    model = [f"--model_type={model_type}", f"--config_overrides={json.dumps(overrides)}"]
    argv = [*model, *pair_data, f"--tokenizer_name={pair_tokenizer}", "--do_train", "--do_eval", "--max_steps=2"]
    run_nli.main([*argv, "--save_strategy=no", f"--output_dir={tmp_path / 'out'}"])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    encoder = getattr(config, "backbone_config", config)
    assert (encoder.vocab_size, encoder.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    assert list(config.id2label.values()) == list(NAMES.values())
    assert (metrics["head_parameters"] is None) == (model_type != "grassmann_plucker")
    classify = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    assert classify({"text": "the cat", "text_pair": "yes the cat"})["label"] in NAMES.values()


def test_embedded_pairs_are_the_default_and_bring_a_tokenizer(tmp_path):
    model = ["--model_type=grassmann", f"--config_overrides={json.dumps(GRASSMANN)}", "--use_cpu", "--report_to=none"]
    sizes = ["--max_train_samples=8", "--max_eval_samples=6", "--num_train_epochs=1", "--disable_tqdm=true"]
    run_nli.main([*model, *sizes, "--do_train", "--do_eval", "--do_predict", f"--output_dir={tmp_path / 'out'}"])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert [metrics[f"{prefix}_rows"] for prefix in ("train", "eval", "test")] == [8, 6, 6]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("sparrows") == ["sparrows"]


def test_run_warns_once_where_the_tokenizer_does_not_separate_the_texts(
    tiny_classifier, pair_tokenizer, tmp_path, caplog
):
    tokenizer = AutoTokenizer.from_pretrained(pair_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    argv = [*tiny_classifier, f"--tokenizer_name={tmp_path / 'tokenizer'}", "--do_train", "--do_eval", "--max_steps=1"]
    run_nli.main([*argv, "--save_strategy=no", f"--output_dir={tmp_path / 'out'}"])
    assert sum("run together" in message for message in caplog.messages) == 1


def test_longer_pairs_are_cut_and_counted(tiny_classifier, pair_files, tmp_path):
    rows = labelled(pair_files["validation"])
    expected = sum(len(f"{premise} {hypothesis}".split()) + 3 > 12 for _, premise, hypothesis, _ in rows)
    argv = [*tiny_classifier, "--max_length=12", "--do_train", "--do_eval", "--max_steps=1", "--save_strategy=no"]
    run_nli.main([*argv, f"--output_dir={tmp_path / 'out'}"])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["max_length"] == 12
    assert 0 < metrics["eval_truncated"] == expected < metrics["eval_rows"]


def test_run_without_matplotlib_ends_without_pictures(trained, pair_files, tmp_path, run_python):
    script = "import sys; sys.modules['matplotlib'] = None; import run_nli; run_nli.main(sys.argv[1:])"
    argv = [f"--model_name_or_path={trained}", f"--test_file={pair_files['test']}", "--do_predict", "--use_cpu"]
    mapping = f"--label_mapping={json.dumps(NAMES)}"
    process = run_python("-c", script, *argv, mapping, "--report_to=none", f"--output_dir={tmp_path / 'out'}")
    assert process.returncode == 0, process.stderr
    assert "modeling-grassmann[reports]" in process.stdout
    assert (tmp_path / "out" / "confusion_matrix_test.json").exists()
    assert not (tmp_path / "out" / "confusion_matrix_test.png").exists()


def test_two_processes_report_the_accuracy_of_the_model_they_save(tiny_classifier, pair_files, tmp_path, run_python):
    process = run_python(
        *["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "trainer_scripts/run_nli.py"],
        *[*tiny_classifier, "--do_train", "--do_eval", "--max_steps=5", "--save_strategy=no", "--ddp_backend=gloo"],
        *["--per_device_eval_batch_size=3", "--train_sampling_strategy=group_by_length", f"--output_dir={tmp_path}"],
    )
    assert process.returncode == 0, process.stderr
    rows = labelled(pair_files["validation"])
    answers = [max(outcome, key=outcome.get) for outcome in independent_outcomes(tmp_path, rows)]
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["eval_accuracy"] == sum(a == label for a, (*_, label) in zip(answers, rows)) / len(rows)
    outcomes = read_json(tmp_path / "outcomes_validation.json")
    assert [outcomes["labels"][i] for i in outcomes["predictions"]] == answers


def test_run_on_snli(data_dir, tmp_path):
    sizes = ['--config_overrides={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}']
    limits = ["--max_train_samples=20", "--max_eval_samples=8", "--num_train_epochs=1", "--bf16=false", "--use_cpu"]
    recipe = "configuration/snli/grassmann_scratch.yaml"
    run_nli.main([recipe, *sizes, *limits, "--per_device_train_batch_size=4", f"--output_dir={tmp_path / 'out'}"])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["eval_rows"] == metrics["test_rows"] == 8
    assert 0 <= metrics["test_accuracy"] <= 1
