# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does, with DDP and with FSDP2, on the CPU through gloo."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_clm
import run_nli
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, merge_fsdp_weights
from checkpoints import is_complete, last_complete_checkpoint
from corpus import train_tokenizer
from entailment_pairs import build_tokenizer
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_grassmann import GrassmannForSequenceClassification


REPOSITORY = Path(__file__).parents[1]
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port=0"]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
    "multi_cpu": [*ACCELERATE, "--config_file=configuration/accelerate/multi_cpu.yaml"],
    "fsdp2": [*ACCELERATE, "--config_file=configuration/accelerate/fsdp2.yaml"],
}

# Runs a script as it is, and records what Accelerate made of the launch.
SCRIPT = """
import json, os, runpy, sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

make_state = AcceleratorState.__init__


def make_state_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    # Accelerate takes note of FSDP on GPUs and the like alone. What it does then works on the CPU as well.
    make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = make_state_with_fsdp
folder, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
state = AcceleratorState()
facts = [state.distributed_type.value, state.num_processes, state.device.type]
with open(os.path.join(folder, f"process_{state.process_index}.json"), "w") as file:
    json.dump(facts, file)
"""

# Shards models with PyTorch alone, gives each process half of the rows, and saves loss, gradients and weights.
SHARDS = """
import json
import sys

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

import modeling_grassmann

folder = sys.argv[1]
distributed.init_process_group("gloo")
mesh = distributed.init_device_mesh("cpu", (2,))
for name, inputs in torch.load(f"{folder}/inputs.pt", weights_only=True).items():
    config = json.load(open(f"{folder}/{name}_model/config.json"))
    model = getattr(modeling_grassmann, config["architectures"][0]).from_pretrained(f"{folder}/{name}_model")
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**{key: rows.chunk(2)[mesh.get_rank()] for key, rows in inputs.items()}).loss
    loss.backward()
    distributed.all_reduce(loss.detach())
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{name}")
    if mesh.get_rank() == 0:
        torch.save((loss.detach() / 2, gradients), f"{folder}/{name}.pt")
distributed.destroy_process_group()
"""

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "reduced_size": 4, "offsets": [1, 2]}
# Random numbers of two processes are others than those of one.
NO_DROPOUT = {"hidden_dropout": 0.0, "embedding_dropout": 0.0}
SCHEDULE = ["--do_train", "--do_eval", "--max_steps=9", "--logging_steps=1", "--save_steps=3", "--eval_steps=3"]
SCHEDULE += ["--eval_strategy=steps", "--use_cpu", "--report_to=none", "--disable_tqdm=true"]


def launch(launcher, script, argv, folder):
    """Run a training script in two processes, and return what the processes say that they are."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    command = [*LAUNCHERS[launcher], folder / "script.py", folder, f"trainer_scripts/{script}.py", *argv]
    run_python(command)
    return [json.loads((folder / f"process_{rank}.json").read_text()) for rank in range(2)]


def run_python(arguments):
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "trainer_scripts"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder, *names):
    """What was logged in every step and every evaluation."""
    names = names or ("loss", "grad_norm", "learning_rate", "head_learning_rate", "eval_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in read_log(folder) if entry["step"]]


def assert_same_curve(folder, expected):
    actual, expected = curve(folder), curve(expected)
    assert len(actual) == len(expected) > 9
    for index, (entry, expected_entry) in enumerate(zip(actual, expected)):
        assert entry.keys() == expected_entry.keys()
        # The same sums in another order. How fast their rounding grows while the loss rises again is the processor's.
        rel = 1e-4 if index < 8 else 1e-3
        for name, value in entry.items():
            assert value == pytest.approx(expected_entry[name], rel=rel), (index, name)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Arguments of a run, and the folder of what one process did with it."""
    folder = tmp_path_factory.mktemp("language_model")
    generator = random.Random(0)
    words = [*"acdefghijlm", "cat", "dog", "sees", "follows", "small", "house", "and"]
    for split, lines in [("train", 200), ("validation", 41)]:
        sentences = [" ".join(generator.choices(words, k=generator.randint(3, 9))) for _ in range(lines)]
        (folder / f"{split}.txt").write_text(" .\n".join(sentences))
    train_tokenizer((folder / "train.txt").read_text().splitlines(), 300).save_pretrained(folder / "tokenizer")
    overrides = json.dumps(SIZES | NO_DROPOUT | {"max_position_embeddings": 16})
    argv = ["--model_type=grassmann", f"--config_overrides={overrides}", f"--tokenizer_name={folder / 'tokenizer'}"]
    argv += [f"--train_file={folder / 'train.txt'}", f"--validation_file={folder / 'validation.txt'}"]
    argv += ["--block_size=16", "--per_device_eval_batch_size=4"]
    # The loss falls and rises again, so that neither the first nor the last checkpoint is the best.
    argv += ["--learning_rate=0.3", "--lr_scheduler_type=constant_with_warmup", "--warmup_steps=9"]
    argv += [*SCHEDULE, "--load_best_model_at_end"]
    run_clm.main([*argv, "--per_device_train_batch_size=8", f"--output_dir={folder / 'one'}"])
    return argv, folder / "one"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, make_model):
    """The same for a new head on a frozen backbone, whose two learning rates differ."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "backbone")
    make_model(vocab_size=len(tokenizer), hidden_size=16, is_causal=True).save_pretrained(folder / "backbone")
    head = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 16, "reduced_size": 8}
    head |= {"window_size": 4, "window_stride": 4, "hidden_dropout": 0.0}
    argv = [f"--backbone_name_or_path={folder / 'backbone'}", f"--config_overrides={json.dumps(head)}"]
    argv += ["--dataset_name=entailment_pairs", "--max_length=16", "--max_train_samples=200", "--max_eval_samples=41"]
    argv += [*SCHEDULE, "--learning_rate=1e-3", "--head_learning_rate=1e-2"]
    run_nli.main([*argv, "--per_device_train_batch_size=8", f"--output_dir={folder / 'one'}"])
    return argv, folder / "one"


@pytest.fixture(scope="module")
def sharded(language_model, tmp_path_factory):
    """Folder of the language model's run under FSDP2."""
    argv, _ = language_model
    folder = tmp_path_factory.mktemp("sharded")
    facts = launch("fsdp2", "run_clm", [*argv, "--per_device_train_batch_size=4", f"--output_dir={folder}"], folder)
    assert facts == [["FSDP", 2, "cpu"]] * 2
    return folder


# Distributed data parallel


def test_two_processes_train_a_language_model_as_one_does_and_one_goes_on_with_it(language_model, tmp_path):
    argv, one = language_model
    two = tmp_path / "two"
    facts = launch("torchrun", "run_clm", [*argv, "--per_device_train_batch_size=4", f"--output_dir={two}"], two)
    assert facts == [["MULTI_CPU", 2, "cpu"]] * 2
    assert_same_curve(two, one)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (two, one)]
    assert [entry["device"][:4] for entry in metrics] == ["2 x ", "1 x "]
    # Written once, not by each process.
    assert [entry["step"] for entry in read_log(two) if "loss" in entry] == list(range(1, 10))

    shutil.copytree(two / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    options = ["--per_device_train_batch_size=8", "--resume_from_checkpoint=true"]
    run_clm.main([*argv, *options, f"--output_dir={tmp_path / 'resumed'}"])
    assert_same_curve(tmp_path / "resumed", one)


def test_two_processes_of_accelerate_train_a_classifier_as_one_does(classifier, tmp_path):
    argv, one = classifier
    argv = [*argv, "--per_device_train_batch_size=4", f"--output_dir={tmp_path}"]
    assert launch("multi_cpu", "run_nli", argv, tmp_path) == [["MULTI_CPU", 2, "cpu"]] * 2
    assert_same_curve(tmp_path, one)
    outcomes = [json.loads((folder / "outcomes_validation.json").read_text()) for folder in (tmp_path, one)]
    assert outcomes[0] == outcomes[1]


# Fully sharded data parallel


def test_sharded_models_have_the_loss_the_gradients_and_the_weights_of_whole_ones(
    make_model, make_classifier, make_ids, tmp_path
):
    ids = make_ids(4, 9)
    labels = torch.tensor([0, 2, 1, 1])
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7], [2]])).long()
    pairs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    cases = {
        "tied": (make_model(), {"input_ids": ids, "labels": ids}),
        "untied": (make_model(tie_word_embeddings=False), {"input_ids": ids, "labels": ids}),
        "classifier": (make_model(GrassmannForSequenceClassification, num_labels=3), pairs),
        "grassmann_head": (make_classifier("grassmann"), pairs),
        "transformer_head": (make_classifier("bert", head_type="transformer"), pairs),
    }
    for name, (model, _) in cases.items():
        model.save_pretrained(tmp_path / f"{name}_model")
    torch.save({name: inputs for name, (_, inputs) in cases.items()}, tmp_path / "inputs.pt")
    (tmp_path / "shards.py").write_text(SHARDS)
    run_python([*LAUNCHERS["torchrun"], tmp_path / "shards.py", tmp_path])

    for name, (model, inputs) in cases.items():
        loss, gradients = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        expected = model(**inputs).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), msg=name)
        for key, parameter in model.named_parameters():
            # Sums over rows in another order.
            torch.testing.assert_close(gradients[key], parameter.grad, atol=1e-5, rtol=1e-4, msg=f"{name} {key}")
        dcp_to_torch_save(tmp_path / name, tmp_path / "merged.pt")
        logits = model(**inputs).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True)["model"])
        assert torch.equal(model(**inputs).logits, logits), name


def test_fsdp_finds_every_layer_that_a_classifier_names(backbone, head_type, make_classifier):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    # Raises an error if it does not find one.
    plugin.set_auto_wrap_policy(make_classifier(backbone, head_type=head_type))
    expected = {"grassmann": {"GrassmannBlock"}, "transformer": {"TransformerLayer"}, "linear": set()}[head_type]
    assert expected <= {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}


def test_a_sharded_language_model_trains_as_a_whole_one_does(sharded, language_model):
    _, one = language_model
    assert_same_curve(sharded, one)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (sharded, one)]
    assert metrics[0]["device"].startswith("2 x ")
    assert metrics[0]["parameters"] == metrics[1]["parameters"]


def test_the_best_sharded_model_is_loaded_in_the_end_and_saved_whole(sharded, language_model, tmp_path):
    losses = [entry["eval_loss"] for entry in read_log(sharded) if "eval_loss" in entry]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    # Known when it is saved, not only when the next one is: it could be the last.
    for folder in (sharded / "checkpoint-6", sharded):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"] or "").name == "checkpoint-6"
    best = json.loads((sharded / "metrics.json").read_text())["eval_loss"]
    assert best == pytest.approx(losses[1], rel=1e-6)

    argv, _ = language_model
    data = [argument for argument in argv if argument.startswith(("--validation_file", "--block_size", "--use_cpu"))]
    options = [f"--model_name_or_path={sharded}", "--do_eval", "--report_to=none", f"--output_dir={tmp_path}"]
    run_clm.main([*data, *options])
    assert json.loads((tmp_path / "metrics.json").read_text())["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_a_sharded_checkpoint_is_merged_into_the_model_that_was_saved(sharded, tmp_path, make_ids):
    assert not list(sharded.glob("checkpoint-*/*.safetensors"))
    merge_fsdp_weights(sharded / "checkpoint-6" / "pytorch_model_fsdp_0", tmp_path)
    shutil.copy(sharded / "config.json", tmp_path)
    merged, saved = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path, sharded))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged(make_ids(2, 9)).logits, saved(make_ids(2, 9)).logits)


@pytest.mark.slow
def test_a_sharded_run_resumes_from_its_last_whole_checkpoint_to_the_same_numbers(sharded, language_model, tmp_path):
    argv, _ = language_model
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(sharded / name, tmp_path / name)
    (tmp_path / "checkpoint-6" / "optimizer_0" / ".metadata").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    argv = [*argv, "--per_device_train_batch_size=4", f"--output_dir={tmp_path}", "--resume_from_checkpoint=true"]
    assert launch("fsdp2", "run_clm", argv, tmp_path) == [["FSDP", 2, "cpu"]] * 2
    # To the bit: the same processes add in the same order.
    assert curve(tmp_path) == curve(sharded)
    assert_equal_weights(tmp_path, sharded)


def assert_equal_weights(folder, expected):
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, cut], ids=["missing", "cut"])
@pytest.mark.parametrize("part", ["pytorch_model_fsdp_0", "optimizer_0"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_sharded_checkpoint_is_not_complete(part, name, damage, sharded, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(sharded / "checkpoint-3", folder)
    assert is_complete(folder)
    damage(folder / part / name)
    assert not is_complete(folder)


@pytest.mark.parametrize("name", ["optimizer_0", "scheduler.pt", "rng_state_1.pth", "trainer_state.json"])
def test_a_sharded_checkpoint_needs_all_that_the_trainer_reads(name, sharded, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(sharded / "checkpoint-3", folder)
    (folder / name).rename(tmp_path / name)
    assert not is_complete(folder)


@pytest.mark.slow
def test_a_sharded_head_with_its_own_learning_rate_trains_as_a_whole_one_does(classifier, tmp_path):
    argv, one = classifier
    argv = [*argv, "--per_device_train_batch_size=4", f"--output_dir={tmp_path}"]
    assert launch("fsdp2", "run_nli", argv, tmp_path) == [["FSDP", 2, "cpu"]] * 2
    assert_same_curve(tmp_path, one)
    rates = curve(tmp_path, "learning_rate", "head_learning_rate")[0]
    assert rates == {"learning_rate": 1e-3, "head_learning_rate": 1e-2}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 3
