"""Measure what a training step of recipes of `run_clm.py` takes, alone on the device.

    python trainer_scripts/time_steps.py configuration/wikitext2_memory/*.yaml --output steps.json
    python trainer_scripts/time_steps.py configuration/wikitext2_memory/gla.yaml --modes graphs --output gla.json

Each recipe is trained on random tokens with its own model, batches and optimizer, in each of the ways that its model
allows: with `--cuda_graphs`, with `--torch_compile`, with both, or with neither. The time is that of `--steps` steps
in a row, with all that the Trainer does between them, and the median of `--repeats` such rows. Records of trainings
that shared a device do not say what a step takes; `report.py --step_times steps.json` draws their curves over this
time. What follows `--` goes to every training, such as `-- --per_device_train_batch_size 64`.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import run_clm
import torch
from arguments import UserError, exits_on_user_error, parse, split_extra
from checkpoints import write_json
from cuda_graphs import GraphTrainer, check_graph_arguments
from models import load_config, load_model, load_tokenizer
from records import environment
from run_records import MISSING, RecordsParser, positive, table_head
from text_data import BlockCollator, cut_into_blocks
from training import RunTrainer, make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed


# Ways to run a step -> whether with `--cuda_graphs`, and whether with `--torch_compile`.
MODES = {"both": (True, True), "graphs": (True, False), "compile": (False, True), "eager": (False, False)}
FLAGS = ["--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false", "--report_to=none"]
FLAGS += ["--disable_tqdm=true"]


class Clock(TrainerCallback):
    """Takes the time at which rows of `steps` steps end on the device, after the first `warmup` steps."""

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.steps, self.ends = warmup, steps, []

    def on_step_end(self, args, state, control, **kwargs):
        after = state.global_step - self.warmup
        if after >= 0 and after % self.steps == 0:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of one step, row by row."""
        return [(end - start) / self.steps for start, end in zip(self.ends, self.ends[1:])]


def measure(recipe: str, mode: str, args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """What a step of a recipe takes.

    Args:
        recipe: its file.
        mode: one of `MODES`.
        args: numbers of steps.
        extra: further arguments of `run_clm.py`.

    Raises:
        UserError: if the recipe, or this way to run it, is impossible.
    """
    graphs, compiled = MODES[mode]
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--max_steps={args.warmup + args.steps * args.repeats}", f"--output_dir={folder}"]
        own += [f"--cuda_graphs={graphs}", f"--torch_compile={compiled}"]
        arguments = parse(run_clm.ARGUMENTS, [recipe, *FLAGS, *extra, *own])
        model_args, data_args, training_args, _ = arguments
        if graphs:
            check_graph_arguments(training_args)
        tokenizer = load_tokenizer(model_args, None)
        config = load_config(model_args, tokenizer)
        set_seed(training_args.seed)
        model = load_model(model_args, AutoModelForCausalLM, config)
        block_size = run_clm.choose_block_size(data_args, model)
        # A few batches, again and again.
        tokens = torch.randint(len(tokenizer), (8 * training_args.train_batch_size * block_size,))
        clock = Clock(args.warmup, args.steps)
        trainer = make_trainer(
            GraphTrainer if graphs else RunTrainer,
            model=model,
            args=training_args,
            train_dataset=cut_into_blocks(tokens.numpy(), block_size, keep_last=False),
            data_collator=BlockCollator(tokenizer),
            callbacks=[clock],
        )
        on_gpu = training_args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = clock.seconds()
    return {
        "parameters": model.num_parameters(),
        "tokens_per_step": training_args.train_batch_size * training_args.gradient_accumulation_steps * block_size,
        "seconds_per_step": statistics.median(seconds),
        "spread": max(seconds) - min(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **environment(training_args),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = table_head(["recipe", "way", "ms a step", "spread (ms)", "tokens a second"])
    for row in rows:
        cells = [row["recipe"], row["mode"], MISSING, MISSING, row.get("failed", "")]
        if "failed" not in row:
            speed = row["tokens_per_step"] / row["seconds_per_step"]
            cells[2:] = [f"{row['seconds_per_step'] * 1e3:.2f}", f"{row['spread'] * 1e3:.2f}", f"{speed:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = RecordsParser(__doc__)
    parser.add_argument("recipes", nargs="+", help="recipes of run_clm.py")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="ways to run a step")
    parser.add_argument("--warmup", type=positive, default=30, help="steps before the first that is timed")
    parser.add_argument("--steps", type=positive, default=50, help="steps in a row")
    parser.add_argument("--repeats", type=positive, default=5, help="rows of steps")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds after which none is begun")
    argv, extra = split_extra(argv)
    args = parser.parse_args(argv)

    start, rows = time.monotonic(), []
    for recipe in args.recipes:
        for mode in args.modes:
            if time.monotonic() - start > args.time_limit:
                print(f"{recipe}, {mode}: not measured, the time is over", flush=True)
                continue
            row = {"recipe": Path(recipe).stem, "mode": mode}
            try:
                row |= measure(recipe, mode, args, extra)
            except (RuntimeError, UserError) as error:
                # Not every model can be recorded or compiled; the others are measured all the same.
                row["failed"] = " ".join(str(error).split())[:300]
            rows.append(row)
            # Even if the next one ends all.
            write_json(args.output, rows)
            torch.compiler.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(table(rows))


if __name__ == "__main__":
    main()
