"""The same training by one process, by DDP and by FSDP2: whether the losses are equal, and tokens per second.

    python benchmarks/processes.py --processes 2 --output processes.json

Each run is one of `run_clm.py`, started with the launch files in `configuration/accelerate/`. For the comparison all
have the same rows in each step, float32 and no dropout; FSDP2 is also resumed from its sharded checkpoint, and that
checkpoint merged into one file and evaluated by one process. For the throughput every process has a batch of its own
size, in bfloat16. On a CPU there is no FSDP2.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from timing import environment, markdown, write_record
from transformers import HfArgumentParser


REPOSITORY = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
EXACT = {"norm_placement": "pre", "hidden_dropout": 0.0, "embedding_dropout": 0.0}
LARGE = {
    "norm_placement": "pre",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "reduced_size": 64,
}


@dataclass
class ProcessArguments:
    """Recipe, sizes and number of processes."""

    recipe: str = field(default="configuration/wikitext2/grassmann_6l_pre.yaml", metadata={"help": "What to train."})
    processes: int = field(default=2, metadata={"help": "Processes of DDP and FSDP2."})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto takes the GPUs, if any."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a step of all processes together."})
    steps: int = field(default=60, metadata={"help": "Steps of a comparison, an even number; half-way it is saved."})
    speed_batch_size: int = field(default=32, metadata={"help": "Rows of each process for the throughput."})
    speed_steps: int = field(default=300, metadata={"help": "Steps for the throughput; 0 leaves it out."})
    eval_samples: int = field(default=256, metadata={"help": "Validation blocks to evaluate."})
    timeout: int = field(default=600, metadata={"help": "Seconds that a run may take."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the results to."})

    def __post_init__(self):
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.steps < 2 or self.steps % 2:
            raise ValueError(f"steps must be even and at least 2, got {self.steps}")
        if self.processes < 2 or self.batch_size % self.processes:
            raise ValueError(
                f"batch_size must be a multiple of processes, and these at least 2, got {self.batch_size} and"
                f" {self.processes}"
            )

    @property
    def launchers(self) -> dict[str, list[str]]:
        """Name of each way to run -> the command before the script."""
        several = {"ddp": "multi_cpu"} if self.device == "cpu" else {"ddp": "multi_gpu", "fsdp2": "fsdp2"}
        one = {"one": ["env", "CUDA_VISIBLE_DEVICES=0", sys.executable]}
        return one | {
            name: [
                *LAUNCH,
                *("--num_processes", str(self.processes)),
                *("--config_file", str(REPOSITORY / "configuration" / "accelerate" / f"{file}.yaml")),
            ]
            for name, file in several.items()
        }


def train(args: ProcessArguments, launcher: list[str], folder: Path, *options: str) -> dict[str, Any]:
    """Run `run_clm.py` and read what it leaves.

    Raises:
        RuntimeError: if it fails.
    """
    script = str(REPOSITORY / "trainer_scripts" / "run_clm.py")
    command = [*launcher, script, *options, "--output_dir", str(folder)]
    command += ["--report_to", "none", "--disable_tqdm", "true"]
    command += ["--use_cpu"] if args.device == "cpu" else []
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        capture_output=True,
        text=True,
        timeout=args.timeout,
    )
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-4000:]}")
    log = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        if "--do_train" in options
        else []
    )
    steps = [entry for entry in log if "loss" in entry]
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = ("eval_loss", "parameters", "train_samples_per_second", "block_size", "device", "seed", "versions")
    return {
        "losses": [entry["loss"] for entry in steps],
        "gradient_norms": [entry["grad_norm"] for entry in steps],
        **{key: metrics[key] for key in kept if key in metrics},
    }


def compare(args: ProcessArguments, work: Path) -> dict[str, Any]:
    """The same steps in each way, the second half of FSDP2's again, and evaluations of its model by one process."""
    half = str(args.steps // 2)
    options = [args.recipe, "--config_overrides", json.dumps(EXACT), "--bf16", "false"]
    options += ["--tf32", "false"] if args.device == "cuda" else []
    options += ["--do_train", "true", "--do_eval", "true", "--do_predict", "false", "--seed", "0"]
    options += ["--max_steps", str(args.steps), "--logging_steps", "1", "--max_eval_samples", str(args.eval_samples)]
    options += ["--eval_strategy", "steps", "--eval_steps", half, "--save_strategy", "steps", "--save_steps", half]
    runs = {}
    for name, launcher in args.launchers.items():
        size = args.batch_size // (1 if name == "one" else args.processes)
        local = [*options, "--per_device_train_batch_size", str(size)]
        runs[name] = train(args, launcher, work / name, *local)
        print(f"{name}: done", flush=True)
        if name == "fsdp2":
            checkpoint = work / name / f"checkpoint-{half}"
            shutil.copytree(checkpoint, work / "fsdp2_resumed" / checkpoint.name)
            resume = ["--resume_from_checkpoint", "true"]
            runs["fsdp2_resumed"] = train(args, launcher, work / "fsdp2_resumed", *local, *resume)
            merged = work / "merged"
            shards = work / name / f"checkpoint-{args.steps}" / "pytorch_model_fsdp_0"
            merge = [*LAUNCH[:3], "merge-weights", str(shards), str(merged)]
            subprocess.run(merge, check=True, capture_output=True, timeout=args.timeout)
            for path in (work / name).glob("*.json"):
                if path.name != "metrics.json":
                    shutil.copy(path, merged)
            for model in ("merged", "fsdp2"):
                runs[f"{model}_evaluated_by_one"] = evaluate(args, work / model, work / f"{model}_evaluation")
            print("fsdp2: resumed, merged and evaluated", flush=True)
    return runs


def evaluate(args: ProcessArguments, model: Path, folder: Path) -> dict[str, Any]:
    """Evaluation of a saved model by one process, on the data of the recipe."""
    options = [args.recipe, "--model_name_or_path", str(model), "--do_train", "false", "--do_eval", "true"]
    options += ["--do_predict", "false", "--eval_strategy", "no", "--save_strategy", "no", "--bf16", "false"]
    options += ["--load_best_model_at_end", "false", "--max_eval_samples", str(args.eval_samples)]
    return train(args, args.launchers["one"], folder, *options)


def measure_speed(args: ProcessArguments, work: Path) -> dict[str, Any]:
    """Tokens per second of a larger model in each way, with the same rows for each process."""
    options = [args.recipe, "--config_overrides", json.dumps(LARGE if args.device == "cuda" else EXACT)]
    options += ["--bf16", str(args.device == "cuda"), "--max_steps", str(args.speed_steps), "--do_train", "true"]
    options += ["--per_device_train_batch_size", str(args.speed_batch_size), "--do_eval", "false"]
    options += ["--do_predict", "false", "--eval_strategy", "no", "--save_strategy", "no", "--seed", "0"]
    options += ["--load_best_model_at_end", "false"]
    runs = {}
    for name, launcher in args.launchers.items():
        runs[name] = train(args, launcher, work / f"speed_{name}", *options)
        runs[name]["tokens_per_second"] = runs[name]["train_samples_per_second"] * runs[name]["block_size"]
        print(f"{name}: {runs[name]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return runs


def largest_difference(values: list[float], others: list[float]) -> float:
    """Largest relative difference of two equally long lists."""
    return max(abs(value / other - 1) for value, other in zip(values, others, strict=True))


def table(record: dict[str, Any]) -> str:
    """The comparison and the throughput as Markdown."""
    runs, rows = record["comparison"], []
    for name, run in runs.items():
        reference = runs["fsdp2" if name.startswith(("fsdp2_", "merged")) else "one"]
        cells = ["—", "—"]
        if run["losses"] and run is not reference:
            cells = [f"{largest_difference(run[key], reference[key]):.1e}" for key in ("losses", "gradient_norms")]
        rows.append([name, run["device"], *cells, f"{run['eval_loss']:.6f}"])
    header = ["run", "device", "difference of losses", "of gradient norms", "evaluation loss"]
    text = markdown([header, *rows], left=2)
    if not record["speed"]:
        return text
    base = record["speed"]["one"]["tokens_per_second"]
    rows = []
    for name, run in record["speed"].items():
        speed = run["tokens_per_second"]
        rows.append([name, run["device"], f"{run['parameters'] / 1e6:.1f}", f"{speed:,.0f}", f"{speed / base:.2f}x"])
    header = ["run", "device", "parameters (M)", "tokens/s", "of one process's"]
    return f"{text}\n\n{markdown([header, *rows], left=2)}"


def main() -> None:
    parser = HfArgumentParser(ProcessArguments, description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    with tempfile.TemporaryDirectory() as work:
        record = {
            **environment(args.device),
            **{key: value for key, value in vars(args).items() if key != "output"},
            "comparison": compare(args, Path(work)),
            "speed": measure_speed(args, Path(work)) if args.speed_steps else {},
        }
    print(table(record))
    write_record(record, args.output, parser)


if __name__ == "__main__":
    main()
