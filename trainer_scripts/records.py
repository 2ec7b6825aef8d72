"""Facts about a run that `metrics.json` records beside the metrics themselves."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import TrainingArguments

import modeling_grassmann


def environment(args: TrainingArguments) -> dict[str, Any]:
    """Versions, device and commit of a run, for `metrics.json`."""
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    else:
        device = platform.processor() or platform.machine()
    return {
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "modeling_grassmann": modeling_grassmann.__version__,
        },
        "device": f"{args.world_size} x {device}",
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Commit of the checkout that holds this file, with `-dirty` after it if files differ; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def mean_logged_loss(log_history: list[dict[str, float]]) -> float | None:
    """Mean of the logged training losses over the steps of a whole run, resumed or not; None if none was logged."""
    total, last_step = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last_step)
            last_step = entry["step"]
    return total / last_step if last_step else None


def best_epoch(log_history: list[dict[str, float]], metric: str, greater_is_better: bool) -> float | None:
    """Epoch of the best validation that was logged, the first of equals; None if there was no evaluation.

    Args:
        log_history: the Trainer's log history.
        metric: name of the metric, without `eval_`.
        greater_is_better: whether more of it is better.
    """
    evaluations = [entry for entry in log_history if f"eval_{metric}" in entry]
    best = max if greater_is_better else min
    return best(evaluations, key=lambda entry: entry[f"eval_{metric}"])["epoch"] if evaluations else None
