import json
import math
import shutil
from itertools import chain

import pytest
import run_clm
import torch
import yaml
from checkpoints import is_complete
from text_data import BlockCollator, DataArguments, cut_into_blocks, load_blocks, load_texts
from training import RunTrainer, check_optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, TrainingArguments


def independent_perplexity(folder, path, block_size):
    """Perplexity in float64, block by block and token by token, from the file and the saved model alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    ids = [i for line in path.read_text().splitlines(keepends=True) for i in tokenizer.encode(line)]
    nll, tokens = 0.0, 0
    for start in range(0, len(ids), block_size):
        block = torch.tensor(ids[start : start + block_size])
        with torch.inference_mode():
            probabilities = model(block[None]).logits[0].softmax(dim=-1)
        for i in range(1, len(block)):
            nll -= math.log(probabilities[i - 1, block[i]])
            tokens += 1
    return math.exp(nll / tokens), tokens


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_run, run_python):
    """Output folder of a tiny run through the launcher of Accelerate."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    process = run_python(
        *["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file=configuration/accelerate/cpu.yaml"],
        *["trainer_scripts/run_clm.py", *tiny_run, f"--output_dir={folder}"],
        *["--do_train", "--do_eval", "--do_predict", "--num_train_epochs=2", "--logging_steps=5", "--seed=3"],
        *["--eval_strategy=epoch", "--save_strategy=epoch", "--save_total_limit=1", "--load_best_model_at_end"],
        *["--metric_for_best_model=perplexity", "--greater_is_better=false", "--report_to=tensorboard"],
    )
    assert process.returncode == 0, process.stderr
    return folder


def test_reported_perplexities_are_those_of_the_saved_model(trained, text_files):
    metrics = json.loads((trained / "metrics.json").read_text())
    for key, split in [("eval", "validation"), ("test", "test")]:
        perplexity, tokens = independent_perplexity(trained, text_files[split], 16)
        assert metrics[f"{key}_perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert metrics[f"{key}_tokens"] == tokens
        assert metrics[f"{key}_loss"] == pytest.approx(math.log(metrics[f"{key}_perplexity"]))


def test_run_learned_and_left_its_records(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["eval_perplexity"] < 100
    assert metrics["best_epoch"] in (1.0, 2.0)
    assert metrics["seed"] == 3
    assert metrics["parameters"] == AutoModelForCausalLM.from_pretrained(trained).num_parameters()
    assert {"python", "torch", "transformers", "accelerate", "modeling_grassmann"} == metrics["versions"].keys()
    assert {"train_loss", "device", "git_commit", "wall_time_seconds"} <= metrics.keys()
    assert list(trained.rglob("events.out.tfevents.*"))
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry][:2] == [5, 10]
    assert any("eval_perplexity" in entry for entry in log)
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["seed"] == 3
    assert recipe["config_overrides"]["hidden_size"] == 16


def test_two_processes_report_the_perplexity_of_the_model_they_save(tiny_run, text_files, tmp_path, run_python):
    process = run_python(
        *["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "trainer_scripts/run_clm.py"],
        *[*tiny_run, "--do_train", "--do_eval", "--max_steps=5", "--save_steps=5", "--ddp_backend=gloo"],
        *["--per_device_eval_batch_size=3", "--report_to=none", f"--output_dir={tmp_path}"],
    )
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    perplexity, tokens = independent_perplexity(tmp_path, text_files["validation"], 16)
    assert metrics["eval_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert metrics["eval_tokens"] == tokens
    assert metrics["device"].startswith("2 x ")
    assert is_complete(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "rng_state_1.pth").unlink()
    assert not is_complete(tmp_path / "checkpoint-5")


def test_best_checkpoint_has_the_lowest_perplexity(tiny_run, tmp_path):
    # Without greater_is_better, which the Trainer would guess wrongly.
    options = ["--do_train", "--do_eval", "--max_steps=4", "--eval_strategy=steps", "--eval_steps=2", "--save_steps=2"]
    best = ["--load_best_model_at_end", "--metric_for_best_model=perplexity", "--report_to=none"]
    run_clm.main([*tiny_run, *options, *best, f"--output_dir={tmp_path / 'out'}"])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    lowest = min(entry["eval_perplexity"] for entry in log if "eval_perplexity" in entry)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["eval_perplexity"] == lowest
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache


def test_text_files_are_read_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("text\nNA\nnull\nthe cat\n")
    (tmp_path / "a.TXT").write_bytes("\ufeffthe cat\n".encode())
    for name, rows in [("a.csv", ["NA", "null", "the cat"]), ("a.TXT", ["the cat\n"])]:
        args = DataArguments(test_file=str(tmp_path / name))
        assert load_texts(args)["test"]["text"][:] == rows


def test_tokenizer_ids_are_in_the_saved_configuration(trained):
    config = AutoModelForCausalLM.from_pretrained(trained).config
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_evaluation_alone_gives_the_same_perplexity(trained, text_files, tmp_path):
    argv = [f"--model_name_or_path={trained}", f"--validation_file={text_files['validation']}", "--do_eval"]
    options = ["--block_size=16", "--per_device_eval_batch_size=3", "--use_cpu", "--report_to=none"]
    run_clm.main([*argv, *options, f"--output_dir={tmp_path / 'eval'}"])
    # One that was interrupted before its metrics may be begun anew.
    (tmp_path / "eval" / "metrics.json").unlink()
    run_clm.main([*argv, *options, f"--output_dir={tmp_path / 'eval'}"])
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (trained, tmp_path / "eval"))
    assert after["eval_perplexity"] == pytest.approx(before["eval_perplexity"], rel=1e-6)
    assert "train_loss" not in after
    # The model lies where it was: nothing here is to be described, or drawn as a training.
    names = {path.name for path in (tmp_path / "eval").iterdir()}
    assert names == {"all_results.json", "eval_results.json", "log.jsonl", "metrics.json", "recipe.yaml"}


def test_evaluation_into_the_folder_of_a_run_is_refused(trained, text_files, tmp_path, capsys):
    argv = [f"--model_name_or_path={trained}", f"--validation_file={text_files['validation']}", "--do_eval"]
    # One that was interrupted has no metrics yet, and early on nothing but a recipe.
    interrupted = shutil.copytree(trained, tmp_path / "interrupted")
    (interrupted / "metrics.json").unlink()
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(interrupted / "recipe.yaml", early)
    records = [(interrupted / name).read_text() for name in ("recipe.yaml", "log.jsonl")]
    for folder in (trained, interrupted, early):
        with pytest.raises(SystemExit) as exit:
            run_clm.main([*argv, "--use_cpu", f"--output_dir={folder}"])
        assert exit.value.code == 2
        assert f"output_dir={folder} holds the record of another run" in capsys.readouterr().err
    assert [(interrupted / name).read_text() for name in ("recipe.yaml", "log.jsonl")] == records
    assert [path.name for path in early.iterdir()] == ["recipe.yaml"]
    assert (early / "recipe.yaml").read_text() == records[0]


@pytest.mark.parametrize(("keep_last", "lengths"), [(False, [4, 4]), (True, [4, 4, 3])])
def test_blocks_hold_every_token_once_and_in_order(keep_last, lengths):
    blocks = cut_into_blocks(torch.arange(11).numpy(), 4, keep_last)
    assert [len(row) for row in blocks["input_ids"]] == lengths
    assert [*chain(*blocks["input_ids"])] == list(range(sum(lengths)))
    assert blocks["labels"][:] == blocks["input_ids"][:]


def test_last_block_of_a_single_token_is_dropped():
    assert len(cut_into_blocks(torch.arange(9).numpy(), 4, keep_last=True)) == 2


def test_blocks_run_across_rows_and_placeholders_become_unknown_tokens(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = tmp_path / "a.txt"
    path.write_text("the cat\n\n<unk> sees the dog\n" * 30)
    args = DataArguments(train_file=str(path), unk_placeholder="<unk>", validation_split_percentage=50)
    texts = load_texts(args)
    assert [len(texts[split]) for split in ("train", "validation")] == [45, 45]
    blocks = load_blocks(texts, ["train"], tokenizer, 8, args)["train"]
    ids = tokenizer("".join(texts["train"]["text"]).replace("<unk>", tokenizer.unk_token))["input_ids"]
    assert [*chain(*blocks["input_ids"])] == ids[: len(ids) // 8 * 8]
    assert tokenizer.unk_token_id in ids


def test_run_on_wikitext(data_dir, tmp_path):
    recipe = "configuration/wikitext2/grassmann_6l_post.yaml"
    sizes = ['--config_overrides={"hidden_size": 16, "intermediate_size": 32, "reduced_size": 4}', "--block_size=64"]
    limits = ["--max_train_samples=20", "--max_eval_samples=4", "--num_train_epochs=1", "--bf16=false", "--use_cpu"]
    run_clm.main([recipe, *sizes, *limits, "--per_device_train_batch_size=4", f"--output_dir={tmp_path / 'out'}"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_tokens"] == metrics["test_tokens"] == 4 * 63
    assert metrics["eval_perplexity"] < 40_000


@pytest.mark.parametrize(("name", "content"), [("baseline.json", "{"), ("../baselines.yaml", "- a")])
def test_what_a_card_cannot_be_made_of_does_not_cost_the_metrics(name, content, tiny_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(content)
    run_clm.main([*tiny_run, "--do_train", "--max_steps=1", "--report_to=none", f"--output_dir={folder}"])
    assert json.loads((folder / "metrics.json").read_text())["folders"] == []
    assert not (folder / "README.md").exists()


def test_blocks_leave_out_the_positions_that_roberta_reserves(tiny_run, tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 20, "is_decoder": True, "pad_token_id": 1}
    arguments = [
        argument for argument in tiny_run if not argument.startswith(("--model_type", "--config_", "--block"))
    ]
    arguments += ["--model_type=roberta", f"--config_overrides={json.dumps(sizes)}", "--do_train", "--do_eval"]
    arguments += ["--max_steps=1", "--save_strategy=no", "--report_to=none"]
    run_clm.main([*arguments, f"--output_dir={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["block_size"] == 18
    with pytest.raises(SystemExit):
        run_clm.main([*arguments, "--block_size=19", f"--output_dir={tmp_path / 'longer'}"])
    assert "block_size=19 exceeds the 18 positions of the model" in capsys.readouterr().err


@pytest.mark.parametrize("lengths, has_mask", [((3, 3), False), ((3, 2), True)])
def test_only_padded_batches_have_a_mask(tokenizer_folder, lengths, has_mask):
    collator = BlockCollator(AutoTokenizer.from_pretrained(tokenizer_folder))
    batch = collator([{"input_ids": [5] * length, "labels": [5] * length} for length in lengths])
    assert ("attention_mask" in batch) == has_mask
    assert batch["labels"].tolist() == [[5] * length + [-100] * (3 - length) for length in lengths]


def test_a_decoding_state_is_no_prediction_even_if_the_configuration_does_not_say_so(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT2Config, "keys_to_ignore_at_inference", [], raising=False)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    arguments = [argument for argument in tiny_run if not argument.startswith(("--model_type", "--config_"))]
    arguments += ["--model_type=gpt2", f"--config_overrides={json.dumps(sizes)}", "--do_eval", "--do_predict"]
    # The Trainer turns the state off for as long as it trains.
    arguments += ["--do_train", "--max_steps=1", "--save_strategy=no"]
    run_clm.main([*arguments, "--report_to=none", f"--output_dir={tmp_path}"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_tokens"] > 0 and metrics["test_tokens"] > 0


class HookedTrainer(RunTrainer):
    """Its optimizer leaves hooks on the parameters, as LOMO and layerwise ones do."""

    def create_optimizer(self, model=None):
        for parameter in (model or self.model).parameters():
            parameter.register_hook(lambda gradient: gradient)
        return super().create_optimizer(model)


def test_an_optimizer_that_is_made_to_try_it_leaves_no_trace(tmp_path, monkeypatch):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes))
    args = TrainingArguments(str(tmp_path / "out"), do_train=True, use_cpu=True, report_to="none")
    trainer = RunTrainer(model, args)
    state = torch.get_rng_state()
    check_optimizer(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.optimizer is None and trainer.lr_scheduler is None

    # Some may want to see weights.
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *args, **kwargs: torch.empty(1, device="meta").item())
    check_optimizer(trainer)
    assert trainer.optimizer is None
    monkeypatch.undo()

    trainer = HookedTrainer(model, args)
    check_optimizer(trainer)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
