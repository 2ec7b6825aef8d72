"""Every mistake ends before training starts: one line on stderr, exit code 2, and no output folder."""

import importlib.util
import json

import datasets
import pytest
import run_clm
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def failure(argv, output_dir, capsys, main=run_clm.main):
    with pytest.raises(SystemExit) as exit:
        main([*map(str, argv), f"--output_dir={output_dir}"])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not output_dir.exists()
    return lines[0]


def check_command_line(run_python, script, argv, output_dir, words):
    process = run_python(f"trainer_scripts/{script}", *argv, f"--output_dir={output_dir}")
    assert process.returncode == 2
    # Other packages may have something to say when they are imported.
    assert "Traceback" not in process.stderr
    line = process.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(word in line for word in words)
    assert not output_dir.exists()


def test_command_line_prints_one_line_and_exits_with_2(tmp_path, run_python):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_type: gpt2\nlearning_rat: 1e-3\n")
    words = [str(recipe), "learning_rat", "learning_rate"]
    check_command_line(run_python, "run_clm.py", [recipe], tmp_path / "out", words)


def test_missing_data_file(tmp_path, capsys):
    argv = ["--model_type=gpt2", "--tokenizer_name=x", "--train_file=missing.txt", "--do_train", "--use_cpu"]
    assert "missing.txt" in failure(argv, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["empty"]),
        ("zeros.txt", b"text\0more", ["not text"]),
        ("latin.txt", "Größe\n".encode("latin-1") * 100, ["cannot read", "utf-8"]),
        ("image.txt", bytes(range(1, 256)) * 20, ["cannot read", "utf-8"]),
        ("broken.json", b'{"text": ', ["cannot read"]),
        ("fake.parquet", b"not a table", ["cannot read"]),
        ("page.html", b"<p>", [".html", ".txt"]),
        ("short.txt", b"one two\n", ["tokens", "block_size=16"]),
        ("column.csv", b"txt,label\na,1\n", ["no column text", "txt"]),
        ("numbers.csv", b"text\n1\n2\n", ["int64", "not text"]),
    ],
)
def test_unusable_data_file(name, content, words, tmp_path, tiny_run, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    argv = [argument for argument in tiny_run if "_file=" not in argument]
    message = failure([*argv, f"--train_file={path}", "--do_train"], tmp_path / "out", capsys)
    assert all(word in message for word in [str(path), *words]), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--block_size=17"], ["block_size=17", "16 positions"]),
        (['--config_overrides={"hidden_siz": 8}'], ["hidden_siz", "hidden_size"]),
        (['--config_overrides={"hidden_size": "wide"}'], ["hidden_size"]),
        (['--config_overrides={"vocab_size": 10}'], ["vocab_size=10"]),
        (["--resume_from_checkpoint=nowhere"], ["nowhere", "checkpoint"]),
        (["--tokenizer_name=./nowhere"], ["tokenizer", "nowhere"]),
        (["--model_type=grasman"], ["grasman"]),
        (["--tokenizer_name=tests/nowhere"], ["tokenizer_name=tests/nowhere", "no such folder"]),
        (["--dataloader_drop_last"], ["dataloader_drop_last", "whole"]),
        (["--num_train_epochs=0"], ["num_train_epochs=0", "more than 0"]),
        (["--per_device_train_batch_size=0"], ["per_device_train_batch_size=0", "at least 1"]),
        (["--metric_for_best_model=accuracy"], ["metric_for_best_model=accuracy", "perplexity"]),
        (["--report_to=mlflow"], ["cannot set up the training", "mlflow"]),
        (["--load_best_model_at_end", "--eval_strategy=epoch", "--save_strategy=steps"], ["load_best_model_at_end"]),
        (["--num_train_epochs=inf"], ["num_train_epochs=inf", "finite"]),
        (["--learning_rate=-1"], ["learning_rate=-1.0", "at least 0"]),
        (["--learning_rate=nan"], ["learning_rate=nan", "at least 0"]),
        (["--weight_decay=-1"], ["weight_decay=-1.0", "at least 0"]),
        (["--adam_beta2=1.5"], ["adam_beta2=1.5", "less than 1"]),
        (["--dataloader_num_workers=-1"], ["dataloader_num_workers=-1", "at least 0"]),
        (["--dataloader_persistent_workers"], ["dataloader_persistent_workers", "dataloader_num_workers"]),
        (["--dataloader_num_workers=1", "--dataloader_prefetch_factor=0"], ["dataloader_prefetch_factor=0"]),
        (["--eval_accumulation_steps=0"], ["eval_accumulation_steps=0", "at least 1"]),
        (["--seed=-1"], ["seed=-1", "from 0 to 2**32 - 1"]),
        (["--lr_scheduler_type=cosine_with_min_lr"], ["lr_scheduler_type=cosine_with_min_lr", "min_lr"]),
        (['--lr_scheduler_kwargs={"foo": 1}'], ["lr_scheduler_type=linear", "lr_scheduler_kwargs={'foo': 1}"]),
        (["--optim_args=foo"], ["cannot set up optim=adamw"]),
        (["--accelerator_config=nowhere.json"], ["nowhere.json"]),
        (["--neftune_noise_alpha=-1"], ["neftune_noise_alpha=-1.0", "at least 0"]),
    ],
)
def test_impossible_arguments(changes, words, tmp_path, tiny_run, capsys):
    message = failure([*tiny_run, "--do_train", *changes], tmp_path / "out", capsys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("package", "changes", "words"),
    [
        ("bitsandbytes", ["--optim=adamw_8bit"], ["optim=adamw_8bit", "bitsandbytes"]),
        ("galore_torch", ["--optim=galore_adamw"], ["optim=galore_adamw", "galore"]),
        ("galore_torch", ["--optim=galore_adamw_layerwise"], ["optim=galore_adamw_layerwise", "galore"]),
    ],
)
def test_optimizers_whose_package_is_not_installed(package, changes, words, tmp_path, tiny_run, capsys):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    message = failure([*tiny_run, "--do_train", *changes], tmp_path / "out", capsys)
    assert all(word in message for word in words), message


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed(tmp_path, tiny_run, run_python):
    # In a process of its own: Transformers remembers a configuration, even if it cannot be made.
    argv = [*tiny_run, "--do_train", "--deepspeed=x.json"]
    check_command_line(run_python, "run_clm.py", argv, tmp_path / "out", ["not installed", "deepspeed"])


def test_output_folder_that_is_a_file(tmp_path, tiny_run, capsys):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(SystemExit):
        run_clm.main([*tiny_run, "--do_train", f"--output_dir={path}"])
    assert f"{path} is not a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}


@pytest.mark.parametrize(
    ("model_type", "sizes", "name"), [("bert", BERT, "BertLMHeadModel"), ("xlnet", XLNET, "XLNetLMHeadModel")]
)
def test_encoder_is_not_trained_as_a_causal_model(model_type, sizes, name, tmp_path, tiny_run, capsys):
    argv = [argument for argument in tiny_run if not argument.startswith("--block_size")]
    encoder = [f"--model_type={model_type}", f"--config_overrides={json.dumps(sizes)}"]
    message = failure([*argv, "--do_train", *encoder], tmp_path / "out", capsys)
    assert f"{name} is not causal" in message


def test_labels_are_not_smoothed_that_the_trainer_does_not_shift(tmp_path, tiny_run, capsys, monkeypatch):
    # Models that other packages register are not in the Trainer's list.
    monkeypatch.delitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "grassmann")
    argv = [*tiny_run, "--do_train", "--label_smoothing_factor=0.1"]
    message = failure(argv, tmp_path / "out", capsys)
    assert "label_smoothing_factor=0.1 must be 0 for GrassmannForCausalLM" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can train in bfloat16")
def test_bfloat16_without_gpu_says_what_to_do(tmp_path, tiny_run, capsys):
    argv = [argument for argument in tiny_run if argument != "--use_cpu"]
    assert "use_cpu" in failure([*argv, "--do_train", "--bf16"], tmp_path / "out", capsys)


def test_nothing_to_do_and_missing_split(tmp_path, tiny_run, capsys):
    assert "do_train" in failure(tiny_run, tmp_path / "out", capsys)
    argv = [argument for argument in tiny_run if "--test_file" not in argument]
    assert "no test data" in failure([*argv, "--do_predict"], tmp_path / "out", capsys)
    message = failure([*tiny_run, "--do_eval", "--push_to_hub"], tmp_path / "out", capsys)
    assert "push_to_hub needs do_train" in message and "publish.py" in message


def test_placeholder_without_unknown_token(tmp_path, tiny_run, tokenizer_folder, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    argv = [*tiny_run, "--do_train", f"--tokenizer_name={folder}", "--unk_placeholder=<unk>"]
    assert "<unk>" in failure(argv, tmp_path / "out", capsys)


def test_second_run_into_the_same_folder_is_refused(tmp_path, tiny_run, capsys):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    with pytest.raises(SystemExit):
        run_clm.main([*tiny_run, "--do_train", f"--output_dir={tmp_path}"])
    assert "resume_from_checkpoint=true" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
