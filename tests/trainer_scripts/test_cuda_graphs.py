import json

import pytest
import run_clm
import torch
from cuda_graphs import WARMUP_STEPS


NO_DROPOUT = '--config_overrides={"hidden_dropout": 0.0, "embedding_dropout": 0.0, "norm_placement": "pre", %s}'
MODELS = {
    "plucker": '"offsets": [1, 2]',
    "memory": '"mixer_types": "memory", "memory_reduced_size": 4, "max_position_embeddings": null',
}


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_replayed_steps_train_as_eager_ones_do(model, compiled, tiny_run, tmp_path):
    """Over three epochs, whose last batches have another shape, with an evaluation after each.

    At a small learning rate: planes of tiny models are steep, and differences by rounding grow from step to step. With
    ten times this one, a change of weights by 1e-7 of them becomes one of losses by 1e-3.
    """
    arguments = [argument for argument in tiny_run if argument != "--use_cpu" and "config_overrides" not in argument]
    arguments += [NO_DROPOUT % MODELS[model], "--do_train", "--do_eval", "--eval_strategy=epoch", "--logging_steps=1"]
    arguments += ["--num_train_epochs=3", "--save_strategy=no", "--report_to=none", "--learning_rate=1e-5"]
    arguments += [f"--torch_compile={compiled}"]
    run_clm.main([*arguments, f"--output_dir={tmp_path / 'eager'}"])
    run_clm.main([*arguments, f"--output_dir={tmp_path / 'graphs'}", "--cuda_graphs"])
    expected, actual = (losses(tmp_path / name) for name in ("eager", "graphs"))
    assert len(expected) > 3 * WARMUP_STEPS
    assert actual == pytest.approx(expected, rel=2e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_differs_from_replay_to_replay(tiny_run, tmp_path):
    """With a learning rate of zero, nothing else changes the loss of one and the same batch."""
    arguments = [argument for argument in tiny_run if argument not in ("--use_cpu", "--learning_rate=5e-3")]
    arguments += ["--do_train", "--learning_rate=0", "--max_train_samples=8", "--max_steps=12", "--logging_steps=1"]
    run_clm.main([*arguments, "--save_strategy=no", "--report_to=none", f"--output_dir={tmp_path}", "--cuda_graphs"])
    assert len(set(losses(tmp_path)[WARMUP_STEPS:])) == 12 - WARMUP_STEPS


def test_without_a_gpu_graphs_are_refused(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_clm.main([*tiny_run, "--do_train", f"--output_dir={tmp_path}", "--cuda_graphs"])
    assert "cuda_graphs needs a CUDA device; this run uses 'cpu'" in capsys.readouterr().err
