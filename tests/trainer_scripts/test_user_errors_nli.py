"""Every mistake ends before training starts: one line on stderr, exit code 2, and no output folder."""

import json

import datasets
import pytest
import run_nli
from test_user_errors import check_command_line
from test_user_errors import failure as failure_of
from transformers import AutoTokenizer, T5Config, T5Model


def failure(argv, output_dir, capsys):
    return failure_of(argv, output_dir, capsys, run_nli.main)


def test_command_line_prints_one_line_and_exits_with_2(tmp_path, run_python):
    argv = ["--model_type=bert", "--label_nam=x"]
    check_command_line(run_python, "run_nli.py", argv, tmp_path / "out", ["label_nam", "label_names"])


def test_missing_data_file(tmp_path, capsys):
    argv = ["--model_type=bert", "--train_file=missing.csv", "--do_train", "--use_cpu"]
    assert "missing.csv" in failure(argv, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", "", ["empty"]),
        ("pairs.txt", "a b", [".txt", ".parquet"]),
        ("broken.json", '{"premise": ', ["cannot read"]),
        ("column.csv", "premise,hypotesis,label\na,b,E\n", ["no column hypothesis", "hypotesis"]),
        ("label.csv", "premise,hypothesis,gold_label\na,b,E\n", ["no column label", "gold_label"]),
        ("numbers.csv", "premise,hypothesis,label\n1,a,E\n2,b,C\n", ["premise", "int64", "not text"]),
        ("range.csv", "premise,hypothesis,label\na,b,E\na,b,X\n", ["row 1", "label X", "label_mapping"]),
        (
            "null.jsonl",
            '{"premise": "a", "hypothesis": "b", "label": "E"}\n{"premise": "a", "hypothesis": null, "label": "C"}\n',
            ["row 1", "no text", "hypothesis"],
        ),
        ("none.csv", "premise,hypothesis,label\na,b,-\na,b,\n", ["train data", "empty", "no row with a label"]),
        (
            "long.csv",
            "premise,hypothesis,label\na,b,E\na,b,-\nthe cat,b,E\n" + "a," + "the " * 30 + ",E\n",
            ["row 3", "train data", "34 tokens", "20 positions", "max_length"],
        ),
    ],
)
def test_unusable_data_file(name, content, words, tmp_path, tiny_classifier, capsys):
    path = tmp_path / name
    path.write_text(content)
    argv = [argument for argument in tiny_classifier if "_file=" not in argument]
    message = failure([*argv, f"--train_file={path}", "--do_train"], tmp_path / "out", capsys)
    assert all(word in message for word in [str(path), *words]), message


def without(argv, *names):
    return [argument for argument in argv if not argument.startswith(tuple(f"--{name}=" for name in names))]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--max_length=21"], ["max_length=21", "20 positions"]),
        (["--max_length=4"], ["max_length=4", "at least 5", "3 special tokens"]),
        (["--head_learning_rate=0"], ["head_learning_rate=0", "more than 0"]),
        (["--metric_for_best_model=perplexity"], ["metric_for_best_model=perplexity", "loss, accuracy"]),
        (["--metric_for_best_model=accuracy_neutral"], ["cannot choose the best model", "loss, accuracy"]),
        (["--dataloader_drop_last"], ["dataloader_drop_last", "whole"]),
        (["--eval_do_concat_batches=false"], ["eval_do_concat_batches true", "whole"]),
        (["--remove_unused_columns=false"], ["remove_unused_columns"]),
        (["--adam_beta1=-0.1"], ["adam_beta1=-0.1", "less than 1"]),
        (["--eval_accumulation_steps=0"], ["eval_accumulation_steps=0", "at least 1"]),
        (['--lr_scheduler_kwargs={"foo": 1}'], ["lr_scheduler_type=linear", "lr_scheduler_kwargs={'foo': 1}"]),
        (["--model_type=bert"], ["exactly one", "backbone_name_or_path"]),
        (['--config_overrides={"head_typ": "linear"}'], ["head_typ", "head_type"]),
        (['--config_overrides={"head_type": "square"}'], ["head_type", "linear", "square"]),
        (['--config_overrides={"num_labels": 3}'], ["num_labels", "class_names"]),
        (['--config_overrides={"problem_type": "regression"}'], ["problem_type", "one of the classes"]),
        (
            ['--config_overrides={"backbone_config": {"model_type": "bert"}}'],
            ["backbone_config follows from backbone_name_or_path", "model_type=grassmann_plucker"],
        ),
        (["--backbone_name_or_path=./nowhere"], ["nowhere", "no such folder"]),
        (["--class_names", "entailment", "neutral", "contradicton"], ["contradiction", "contradicton"]),
        (["--label_mapping=E"], ["label_mapping=E", "not JSON"]),
        (["--hypothesis_column=premise"], ["premise_column", "must differ"]),
        (['--label_mapping={"E": "yes", "C": "no"}'], ["label N", "label_mapping"]),
    ],
)
def test_impossible_arguments(changes, words, tmp_path, tiny_classifier, capsys):
    message = failure([*tiny_classifier, "--do_train", *changes], tmp_path / "out", capsys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"model_type": "bert"}, ["BertForSequenceClassification has no backbone"]),
        ({"model_type": "grassmann_plucker", "config_overrides": {"backbone_config": 3}}, ["backbone_config"]),
        (
            {"model_type": "grassmann_plucker", "config_overrides": {"backbone_config": {"hidden_siz": 3}}},
            ["hidden_siz", "hidden_size"],
        ),
        (
            {"model_type": "grassmann_plucker", "config_overrides": {"backbone_config": {"model_type": "brt"}}},
            ["brt"],
        ),
    ],
)
def test_models_that_cannot_be_built(model, words, tmp_path, tiny_classifier, backbone, capsys):
    argv = without(tiny_classifier, "backbone_name_or_path", "config_overrides")
    flags = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in model.items()]
    message = failure([*argv, *flags, f"--tokenizer_name={backbone}", "--do_train"], tmp_path / "out", capsys)
    assert all(word in message for word in words), message


def test_unsuitable_backbones(tmp_path, tiny_classifier, backbone, pair_tokenizer, capsys):
    tokenizer = f"--tokenizer_name={pair_tokenizer}"
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    capsys.readouterr()
    argv = [*without(tiny_classifier, "backbone_name_or_path"), tokenizer, "--do_train"]
    message = failure([*argv, f"--backbone_name_or_path={tmp_path / 't5'}"], tmp_path / "out", capsys)
    assert f"cannot put a head on {tmp_path / 't5'}" in message and "encoder" in message
    message = failure([*argv, f"--backbone_name_or_path={pair_tokenizer}"], tmp_path / "out", capsys)
    assert f"cannot put a head on {pair_tokenizer}" in message
    larger = AutoTokenizer.from_pretrained(pair_tokenizer)
    larger.add_tokens(["more"])
    larger.save_pretrained(tmp_path / "larger")
    changes = [f"--backbone_name_or_path={backbone}", f"--tokenizer_name={tmp_path / 'larger'}"]
    assert "vocab_size" in failure([*argv, *changes], tmp_path / "out", capsys)


def test_saved_models_that_are_no_classifiers_of_the_data(tmp_path, pair_data, backbone, capsys):
    argv = [*pair_data, "--do_eval"]
    message = failure([*argv, f"--model_name_or_path={backbone}"], tmp_path / "out", capsys)
    assert all(word in message for word in ["LABEL_0, LABEL_1", "entailment, neutral", "class_names"]), message
    config = json.loads((backbone / "config.json").read_text())
    config["id2label"] = {0: "neutral", 1: "contradiction", 2: "entailment"}
    for path in backbone.iterdir():
        (tmp_path / "saved" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    message = failure([*argv, f"--model_name_or_path={tmp_path / 'saved'}"], tmp_path / "out", capsys)
    assert all(word in message for word in ["no saved classifier", "classifier.", "backbone_name_or_path"]), message


def test_missing_tokenizer_and_tokenizer_without_padding(tmp_path, pair_data, pair_tokenizer, capsys):
    argv = [*pair_data, "--model_type=bert", "--do_train"]
    assert "tokenizer_name is missing" in failure(argv, tmp_path / "out", capsys)
    tokenizer = AutoTokenizer.from_pretrained(pair_tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    message = failure([*argv, f"--tokenizer_name={tmp_path / 'tokenizer'}"], tmp_path / "out", capsys)
    assert "neither a pad nor an eos token" in message


def test_nothing_to_do_missing_split_and_folder_of_another_run(tmp_path, tiny_classifier, capsys):
    assert "do_train" in failure(tiny_classifier, tmp_path / "out", capsys)
    message = failure([*without(tiny_classifier, "test_file"), "--do_predict"], tmp_path / "out", capsys)
    assert "no test data" in message
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(SystemExit):
        run_nli.main([*tiny_classifier, "--do_train", f"--output_dir={tmp_path}"])
    assert "resume_from_checkpoint=true" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
