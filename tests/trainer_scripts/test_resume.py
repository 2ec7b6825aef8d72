"""A run that is killed, at any moment, resumes to exactly the losses of a run that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_clm
import torch
import yaml
from checkpoints import checkpoints, is_complete, is_of_fsdp, last_complete_checkpoint
from torch.distributed import checkpoint


# Kills its own process with SIGKILL: either at a step between two saves, or when half of the optimizer's file, the
# one that follows the weights, has been written.
KILLED_RUN = """
import os, signal, sys
import run_clm
import torch
from transformers import Trainer, TrainerCallback

moment, step, *argv = sys.argv[1:]
save = torch.save


class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if moment == "training" and state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)


def save_half(value, path):
    save(value, path)
    if moment == "saving" and str(path).endswith(f"checkpoint-{step}/optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = save_half
run_clm.RunLog = type("RunLog", (run_clm.RunLog, Killer), {})
run_clm.main(argv)
"""

SCHEDULE = ["--do_train", "--do_eval", "--num_train_epochs=3", "--logging_steps=1", "--save_steps=7", "--eval_steps=7"]
SCHEDULE += ["--eval_strategy=steps", "--report_to=none", "--save_total_limit=2"]

QUIET = {"cwd": Path(__file__).parents[2], "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def history(folder):
    """The log without what depends on the clock."""
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    clock = ("runtime", "per_second", "preparation_time")
    return [{key: value for key, value in entry.items() if not key.endswith(clock)} for entry in entries]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_run, run_python):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = run_python("trainer_scripts/run_clm.py", *tiny_run, *SCHEDULE, f"--output_dir={folder}")
    assert process.returncode == 0, process.stderr
    return folder


def test_run_killed_while_training_and_again_while_saving_loses_nothing(uninterrupted, tmp_path, tiny_run, run_python):
    argv = [*tiny_run, *SCHEDULE, f"--output_dir={tmp_path}", "--resume_from_checkpoint=true"]
    assert run_python("-c", KILLED_RUN, "training", 17, *argv).returncode == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-14")
    assert run_python("-c", KILLED_RUN, "saving", 28, *argv).returncode == -signal.SIGKILL
    assert checkpoints(tmp_path)[0] == str(tmp_path / "checkpoint-28")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-21")

    process = run_python("trainer_scripts/run_clm.py", *argv)
    assert process.returncode == 0, process.stderr
    assert [line for line in process.stdout.splitlines() if "checkpoint-28" in line and "incomplete" in line]
    resumed, expected = history(tmp_path), history(uninterrupted)
    # The summary of the training counts only the steps since the last start.
    losses = [[entry for entry in log if "train_loss" not in entry] for log in (resumed, expected)]
    assert losses[0] == losses[1]
    assert len([entry for entry in losses[0] if "loss" in entry]) == losses[0][-1]["step"] > 28

    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, uninterrupted)]
    for name in ("eval_perplexity", "best_epoch"):
        assert metrics[0][name] == metrics[1][name]
    assert metrics[0]["train_loss"] == pytest.approx(metrics[1]["train_loss"])


def newest_step(folder):
    return max([int(Path(path).name.partition("-")[2]) for path in checkpoints(folder)], default=0)


@pytest.mark.slow
def test_run_killed_at_random_moments_of_saving_loses_nothing(tmp_path, tiny_run, run_python):
    # Every step saves, so that most of the time is spent on it.
    schedule = ["--do_train", "--max_steps=60", "--logging_steps=1", "--save_steps=1", "--save_total_limit=3"]
    argv = ["trainer_scripts/run_clm.py", *tiny_run, *schedule, "--report_to=none", "--disable_tqdm=true"]
    expected = tmp_path / "uninterrupted"
    assert run_python(*argv, f"--output_dir={expected}").returncode == 0
    folder = tmp_path / "killed"
    folder.mkdir()
    argv += [f"--output_dir={folder}", "--resume_from_checkpoint=true"]
    generator = random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    step = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, *argv], env=environment, **QUIET)
        # After a few more steps, a random time after the folder of a new checkpoint has appeared.
        step += generator.randint(2, 8)
        while process.poll() is None and newest_step(folder) < step:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        step = newest_step(folder)
    assert run_python(*argv).returncode == 0
    losses = [[entry for entry in history(path) if "loss" in entry] for path in (folder, expected)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, expected)]
    assert weights[0] == weights[1]


def test_finished_run_stays_as_it_is(uninterrupted, tmp_path, tiny_run):
    shutil.copytree(uninterrupted, tmp_path / "out")
    # With this schedule, another step would change the weights.
    argv = [*tiny_run, *SCHEDULE, f"--output_dir={tmp_path / 'out'}", "--lr_scheduler_type=constant"]
    run_clm.main([*argv, "--resume_from_checkpoint=true"])
    names = sorted(path.name for path in uninterrupted.glob("checkpoint-*"))
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == names
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (uninterrupted, tmp_path / "out"))
    for name in ("eval_perplexity", "best_epoch", "epoch"):
        assert after[name] == before[name]
    assert after["train_loss"] == pytest.approx(before["train_loss"])
    weights = [(folder / "model.safetensors").read_bytes() for folder in (uninterrupted, tmp_path / "out")]
    assert weights[0] == weights[1]


def moved_run(uninterrupted, folder):
    """A copy of the run, whose best checkpoint is the older one of its two, at a path that is no longer there."""
    shutil.copytree(uninterrupted, folder)
    newest, best = checkpoints(folder)
    for saved in (newest, best):
        path = Path(saved) / "trainer_state.json"
        state = json.loads(path.read_text())
        # No later loss is less.
        state |= {"best_model_checkpoint": f"gone/{Path(best).name}", "best_metric": -1.0}
        path.write_text(json.dumps(state))
    return newest, best


@pytest.mark.parametrize("finished", [True, False])
def test_run_whose_folder_was_moved_ends_with_its_best_checkpoint(finished, uninterrupted, tmp_path, tiny_run):
    newest, best = moved_run(uninterrupted, tmp_path / "out")
    expected = Path(best, "model.safetensors").read_bytes()
    assert Path(newest, "model.safetensors").read_bytes() != expected
    if not finished:
        shutil.rmtree(newest)
    argv = [*tiny_run, *SCHEDULE, "--load_best_model_at_end", f"--output_dir={tmp_path / 'out'}"]
    run_clm.main([*argv, "--resume_from_checkpoint=true"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert checkpoints(tmp_path / "out") == [newest, best]


def test_finished_run_without_its_best_checkpoint_is_refused(uninterrupted, tmp_path, tiny_run, capsys):
    newest, best = moved_run(uninterrupted, tmp_path / "out")
    shutil.rmtree(best)
    argv = [*tiny_run, *SCHEDULE, f"--output_dir={tmp_path / 'out'}", "--resume_from_checkpoint=true"]
    with pytest.raises(SystemExit) as exit:
        run_clm.main([*argv, "--load_best_model_at_end"])
    assert exit.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in ["error: ", f"gone/{Path(best).name}", newest, "load_best_model_at_end=false"])
    run_clm.main(argv)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_damaged_checkpoint_is_not_complete(uninterrupted, tmp_path, name, damage):
    newest, older = checkpoints(uninterrupted)
    for folder in (newest, older):
        shutil.copytree(folder, tmp_path / Path(folder).name)
    newest, older = tmp_path / Path(newest).name, tmp_path / Path(older).name
    assert last_complete_checkpoint(tmp_path) == str(newest)
    damage(newest / name)
    assert not is_complete(newest)
    assert last_complete_checkpoint(tmp_path) == str(older)
    damage(older / name)
    assert last_complete_checkpoint(tmp_path) is None


def test_checkpoint_of_several_processes_needs_the_random_state_of_each(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints(uninterrupted)[0], folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RunLog"]["attributes"]["processes"] == 1
    state["stateful_callbacks"]["RunLog"]["attributes"]["processes"] = 2
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert not is_complete(folder)
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert is_complete(folder)


def test_sharded_checkpoint_needs_every_shard(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints(uninterrupted)[0], folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not is_complete(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert is_complete(folder)


def save_whole(folder):
    """Model and optimizer as FSDP saves them with `FULL_STATE_DICT`."""
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.save({"weight": torch.ones(3)}, folder / name)


def save_shards(folder):
    """The same with `SHARDED_STATE_DICT`, by one process."""
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        checkpoint.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=folder / name, no_dist=True)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize(
    "save, name",
    [
        (save_whole, "pytorch_model_fsdp.bin"),
        (save_whole, "optimizer.bin"),
        (save_whole, "scheduler.pt"),
        (save_shards, "pytorch_model_fsdp_0/.metadata"),
        (save_shards, "pytorch_model_fsdp_0/__0_0.distcp"),
        (save_shards, "optimizer_0/.metadata"),
        (save_shards, "optimizer_0/__0_0.distcp"),
        (save_shards, "scheduler.pt"),
    ],
)
def test_checkpoint_of_fsdp_needs_every_file(uninterrupted, tmp_path, save, name, damage):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints(uninterrupted)[0], folder)
    assert not is_of_fsdp(folder)
    for left_out in ("model.safetensors", "optimizer.pt"):
        (folder / left_out).unlink()
    save(folder)
    assert is_of_fsdp(folder)
    assert is_complete(folder)
    damage(folder / name)
    assert not is_complete(folder)


def test_metadata_of_shards_are_not_unpickled(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints(uninterrupted)[0], folder)
    save_shards(folder)
    # Loading this pickle makes a folder.
    trap = b"cos\nmkdir\n(S'" + bytes(tmp_path / "made") + b"'\nS'__0_0.distcp'\ntR."
    (folder / "optimizer_0" / ".metadata").write_bytes(trap)
    assert is_complete(folder)
    assert not (tmp_path / "made").exists()


def test_newest_checkpoint_is_the_one_with_the_largest_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other-11"):
        (tmp_path / name).mkdir()
    assert [Path(folder).name for folder in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_recipe_of_a_run_repeats_it(uninterrupted, tmp_path):
    run_clm.main([str(uninterrupted / "recipe.yaml"), f"--output_dir={tmp_path / 'again'}"])
    assert yaml.safe_load((uninterrupted / "recipe.yaml").read_text())["logging_steps"] == 1
    assert history(tmp_path / "again") == history(uninterrupted)
