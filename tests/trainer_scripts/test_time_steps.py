import json

import pytest
import time_steps
from transformers import TrainerControl, TrainerState, TrainingArguments


QUICK = ["--warmup=1", "--steps=2", "--repeats=3", "--", "--use_cpu", "--per_device_train_batch_size=4"]


def test_a_recipe_is_timed_and_what_cannot_run_is_said(tiny_run, tmp_path, capsys):
    flags = dict(argument.lstrip("-").split("=", 1) for argument in tiny_run if "=" in argument)
    flags["config_overrides"] = json.loads(flags["config_overrides"])
    (tmp_path / "tiny.yaml").write_text(json.dumps(flags))
    output = tmp_path / "steps.json"
    time_steps.main([str(tmp_path / "tiny.yaml"), "--modes", "eager", "graphs", f"--output={output}", *QUICK])
    eager, graphs = json.loads(output.read_text())
    assert (eager["recipe"], eager["mode"]) == ("tiny", "eager")
    assert eager["tokens_per_step"] == 4 * 16
    assert 0 < eager["seconds_per_step"] < 60 and eager["spread"] >= 0
    assert eager["git_commit"] and eager["versions"]["torch"]
    assert "cuda_graphs needs a CUDA device" in graphs["failed"] and "seconds_per_step" not in graphs
    printed = capsys.readouterr().out
    assert f"| tiny | eager | {eager['seconds_per_step'] * 1e3:.2f} |" in printed
    assert "| tiny | graphs | — | — | cuda_graphs needs a CUDA device" in printed


def test_the_clock_measures_rows_of_steps_after_the_warm_up(tmp_path, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time_steps.time, "perf_counter", lambda: float(next(now)))
    clock = time_steps.Clock(warmup=2, steps=5)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for step in range(1, 13):
        clock.on_step_end(args, TrainerState(global_step=step), TrainerControl())
    # After steps 2, 7 and 12, a second apart.
    assert clock.seconds() == [0.2, 0.2]


@pytest.mark.parametrize("flag", ["--steps=0", "--repeats=x"])
def test_numbers_must_be_positive(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        time_steps.main(["a.yaml", f"--output={tmp_path / 'steps.json'}", flag])
    assert "must be an integer of at least 1" in capsys.readouterr().err
