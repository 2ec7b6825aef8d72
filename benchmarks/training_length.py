"""Training of a whole model, against a Llama of its size: tokens a second, memory, and the longest context that fits.

    python benchmarks/training_length.py --output training.json --plot training.png
    python benchmarks/training_length.py --sizes 13M --lengths 1024 16384 --dynamic
    python benchmarks/training_length.py --sizes 13M --lengths 1024 --longest_seconds 120
    python benchmarks/training_length.py --from_json training.json --plot training.png

A step is forward, loss, backward and an update by fused AdamW, under bfloat16 autocast with weights of float32. Each
step has the same number of tokens, in rows of one length; both models take turns, `--steps` in a row each, as training
does not wait for the GPU after a step. They have the same vocabulary, tied
embeddings, no dropout and, within 1%, equally many parameters; Llama has heads of 64, SwiGLU, rotary positions and
SDPA with its own causal flag. Both bodies are compiled, for each length alone or, with `--dynamic`, once with symbolic
sizes; with `--graphs` they run as CUDA graphs, so that no model waits for Python. Both losses are one function of this
package, Liger's fused linear cross-entropy on a GPU, which is not compiled and never forms all logits.

`--longest_seconds` looks for the longest context after that: one sequence, doubled until memory ends or the next step
would take longer than what is left.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peers import (
    MODELS,
    SIZES,
    compilation_facts,
    forward_flops,
    is_measured,
    make_grassmann,
    make_llama,
    or_dash,
    ratio_rows,
    tensor_bytes,
)
from plots import COLOURS, log_axes, new_figure, save
from timing import (
    SweepArguments,
    check_known,
    free_memory,
    markdown,
    median_and_iqr,
    reason,
    run_sweep,
    take_turns,
)
from transformers import PreTrainedModel

from modeling_grassmann.loss_grassmann import fused_causal_lm_loss


TARGETS = {
    "13M": {256: 1.0, 1024: 1.1, 16384: 4.0, 65536: 10.0},
    "110M": {256: 1.0, 1024: 1.1, 16384: 2.5, 65536: 6.0},
}


@dataclass
class TrainingArguments(SweepArguments):
    """Sizes, lengths and how to run them."""

    sizes: list[str] = field(default_factory=lambda: ["13M", "110M"], metadata={"help": "Sizes of the models."})
    lengths: list[int] = field(
        default_factory=lambda: [256, 1024, 4096, 16384, 65536], metadata={"help": "Tokens per sequence."}
    )
    tokens: int = field(default=65536, metadata={"help": "Tokens per step; a longer sequence is a step of its own."})
    steps: int = field(default=4, metadata={"help": "Steps in a row that are timed together."})
    compile: bool = field(default=True, metadata={"help": "Whether to compile the models' bodies."})
    dynamic: bool = field(default=False, metadata={"help": "Compile once with symbolic sizes: quick, less fast."})
    graphs: bool = field(
        default=False, metadata={"help": "Replay CUDA graphs of the compiled bodies: no waiting for Python."}
    )
    loss: Literal["auto", "fused", "logits"] = field(
        default="auto", metadata={"help": "With or without all logits; auto is the fused loss on a GPU."}
    )
    longest_seconds: float = field(
        default=0.0, metadata={"help": "Seconds for each model to look for its longest context; 0 leaves it out."}
    )
    longest_from: int = field(default=131072, metadata={"help": "The first length of that search."})

    POSITIVE = ("repeats", "tokens", "steps", "longest_from")

    def __post_init__(self):
        super().__post_init__()
        check_known("sizes", self.sizes, SIZES)
        if self.graphs and (self.dynamic or not self.compile):
            raise ValueError("graphs needs compiled bodies and one shape each: leave out dynamic, and keep compile")
        if self.loss == "auto":
            self.loss = "fused" if self.device == "cuda" else "logits"


def make_models(size: str, args: TrainingArguments) -> dict[str, PreTrainedModel]:
    """Both models, ready for training."""
    grassmann = make_grassmann(size, use_cache=False)
    models = {"grassmann": grassmann, "llama": make_llama(grassmann, "sdpa_causal", 2**20, use_cache=False)}
    for model in models.values():
        model.to(args.device).train()
        if args.compile:
            mode = "reduce-overhead" if args.graphs else None
            model.model.compile(dynamic=None if args.dynamic else False, mode=mode)
    return models


def make_step(model: PreTrainedModel, input_ids: torch.Tensor, args: TrainingArguments) -> Callable[[], torch.Tensor]:
    """A training step. The optimizer's state is made in the first call, and belongs to the function."""
    # The update's cost does not depend on its size, and a small one keeps random weights from diverging.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> torch.Tensor:
        if args.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(args.device, dtype=torch.bfloat16):
            if args.loss == "fused":
                hidden_states = model.model(input_ids=input_ids).last_hidden_state
                # Not Liger's own patch of Llama, whose chunks are smaller and slower.
                loss = fused_causal_lm_loss(hidden_states, model.lm_head, labels=input_ids)
            else:
                loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step.optimizer = optimizer
    return step


def peak_bytes(model: PreTrainedModel, step: Callable[[], Any], args: TrainingArguments) -> int | None:
    """Largest memory of a step with the model's weights and optimizer's state, without what else is on the GPU."""
    if args.device != "cuda" or args.graphs:
        # The memory of graphs is taken once and not seen to be used by their replays.
        return None
    states = [state for states in step.optimizer.state.values() for state in states.values()]
    others = torch.cuda.memory_allocated() - tensor_bytes([*model.parameters(), *filter(torch.is_tensor, states)])
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - others


def random_ids(model: PreTrainedModel, batch_size: int, length: int, args: TrainingArguments) -> torch.Tensor:
    input_ids = torch.randint(model.config.vocab_size, (batch_size, length), device=args.device)  # (B, T)
    if args.compile and args.dynamic:
        torch._dynamo.maybe_mark_dynamic(input_ids, (0, 1))
    return input_ids


def measure(args: TrainingArguments, record: dict[str, Any]) -> Iterator[None]:
    torch._dynamo.config.recompile_limit = 64
    record["models"], record["rows"], record["longest"] = {}, [], []
    for size in args.sizes:
        models = make_models(size, args)
        for name, model in models.items():
            facts = ("hidden_size", "num_hidden_layers", "intermediate_size")
            record["models"][f"{name} {size}"] = {
                "parameters": model.num_parameters(),
                **{fact: getattr(model.config, fact) for fact in facts},
                **({"reduced_size": model.config.reduced_size} if name == "grassmann" else {}),
            }
        print(record["models"], flush=True)
        for length in args.lengths:
            if args.is_over():
                record["stopped"] = f"after {args.time_limit:g} s, before {size} at a length of {length}"
                return
            record["rows"] += measure_length(args, size, models, length)
            print("\n".join(describe(row) for row in record["rows"][-len(MODELS) :]), flush=True)
            yield
        if args.longest_seconds:
            for name in MODELS:
                # Alone on the device, and last: what runs out of memory may leave it in disorder.
                models = None
                free_memory(args.device)
                for row in longest_context(args, size, name):
                    record["longest"].append(row)
                    print(describe(row), flush=True)
                    yield
        del models
        free_memory(args.device)


def measure_length(
    args: TrainingArguments, size: str, models: dict[str, PreTrainedModel], length: int
) -> list[dict[str, Any]]:
    """One row for each model."""
    batch_size = max(args.tokens // length, 1)
    if not args.dynamic:
        torch._dynamo.reset()
    rows, steps = {}, {}
    for name, model in models.items():
        row = rows[name] = {"size": size, "model": name, "length": length, "batch_size": batch_size}
        row["flops_per_token"] = 3 * forward_flops(model.config, length)
        step = make_step(model, random_ids(model, batch_size, length, args), args)
        try:
            begin = time.monotonic()
            with compilation_facts(row):
                step()
            row["first_step_seconds"] = time.monotonic() - begin
            for _ in range(args.warmup):
                step()
            row["peak_bytes"] = peak_bytes(model, step, args)
            steps[name] = step
        except Exception as error:
            row["failed"] = reason(error)
            model.zero_grad()
            free_memory(args.device)
    if steps:
        runs = {name: lambda step=step: [step() for _ in range(args.steps)] for name, step in steps.items()}
        times, failures = take_turns(runs, args)
        for name, failed in failures.items():
            rows[name]["failed"] = failed
        for name, samples in times.items():
            rows[name] |= median_and_iqr([sample / args.steps for sample in samples])
            rows[name]["tokens_per_second"] = batch_size * length / rows[name]["median_ms"] * 1e3
    return list(rows.values())


def longest_context(args: TrainingArguments, size: str, name: str) -> Iterator[dict[str, Any]]:
    """A row for each length of one sequence, twice the one before, until memory or time ends."""
    torch._dynamo.reset()
    model = make_models(size, args)[name]
    if args.compile:
        # One compilation for all lengths.
        model.model.compile(dynamic=True)
    deadline = time.monotonic() + args.longest_seconds
    length, seconds = args.longest_from, None
    while True:
        row = {"size": size, "model": name, "length": length}
        if seconds is not None:
            # From the step before, by the operations of both; each length has a step that is not timed before.
            growth = 2 * forward_flops(model.config, length) / forward_flops(model.config, length // 2)
            if time.monotonic() + 2 * growth * seconds > deadline:
                yield row | {"failed": f"a step would take about {growth * seconds:.0f} s"}
                return
        step = make_step(model, random_ids(model, 1, length, args), args)
        try:
            step()
            begin = time.monotonic()
            row["peak_bytes"] = peak_bytes(model, step, args)
            if row["peak_bytes"] is None:
                step()
            seconds = row["step_seconds"] = time.monotonic() - begin
        except Exception as error:
            yield row | {"failed": reason(error)}
            return
        yield row
        del step
        length *= 2


def describe(row: dict[str, Any]) -> str:
    figure = row.get("failed") or " ".join(
        f"{name}={row[name]:,.4g}" for name in ("tokens_per_second", "step_seconds", "peak_bytes") if row.get(name)
    )
    return f"{row['size']} {row['model']:<9} {row['length']:>8} {figure}"


def ratios(record: dict[str, Any]) -> dict[str, dict[int, tuple[float, float]]]:
    """Size -> length -> ratio of tokens a second to Llama's, ratio of Llama's operations a token to ours."""
    found = {}
    for (size, length), models in ratio_rows(record["rows"], ("size", "length")):
        if is_measured(models, "tokens_per_second"):
            grassmann, llama = (models[name] for name in MODELS)
            ratio = grassmann["tokens_per_second"] / llama["tokens_per_second"]
            found.setdefault(size, {})[length] = (ratio, llama["flops_per_token"] / grassmann["flops_per_token"])
    return found


def table(record: dict[str, Any]) -> str:
    """Tokens a second, memory and their ratios by size and length; the longest contexts; what did not run."""
    measured = ratios(record)
    header = ["size", "length", "grassmann tokens/s", "llama tokens/s", "ratio", "of operations", "target"]
    rows = [[*header, "grassmann GiB", "llama GiB"]]
    for (size, length), models in ratio_rows(record["rows"], ("size", "length")):
        speeds = [or_dash(lambda row: f"{row['tokens_per_second']:,.0f}", models.get(name)) for name in MODELS]
        ratio = [f"{value:.2f}x" for value in measured.get(size, {}).get(length, ())] or ["—", "—"]
        target = TARGETS.get(size, {}).get(length)
        rows.append([size, f"{length:,}", *speeds, *ratio, f"{target:g}x" if target else "", *memory(models)])
    sections = [markdown(rows, left=1)]

    rows = [["size", "longest context", "grassmann s/step", "llama s/step", "grassmann GiB", "llama GiB"]]
    for (size, length), models in ratio_rows(record["longest"], ("size", "length")):
        seconds = [or_dash(lambda row: f"{row['step_seconds']:.2f}", models.get(name)) for name in MODELS]
        rows.append([size, f"{length:,}", *seconds, *memory(models)])
    if len(rows) > 1:
        sections.append(markdown(rows, left=1))
    failed = [row for row in [*record["rows"], *record["longest"]] if "failed" in row]
    notes = [f"- {row['model']} {row['size']} at {row['length']:,}: {row['failed']}" for row in failed]
    sections.append("\n".join(notes))
    parameters = [f"{name} has {facts['parameters']:,} parameters" for name, facts in record["models"].items()]
    sections.append(f"{'; '.join(parameters)}.")
    if "stopped" in record:
        sections.append(f"Stopped {record['stopped']}.")
    return "\n\n".join(filter(None, sections))


def memory(models: dict[str, dict]) -> list[str]:
    """Cells of both models' largest memory."""
    rows = [models.get(name) for name in MODELS]
    return [f"{row['peak_bytes'] / 2**30:.2f}" if row and row.get("peak_bytes") else "—" for row in rows]


def draw(record: dict[str, Any], path: str) -> None:
    """Ratio of tokens a second against length, with that of operations and the targets."""
    measured = ratios(record)
    figure, axes = new_figure(max(len(measured), 1))
    for axis, (size, by_length) in zip(axes, measured.items()):
        lengths = sorted(by_length)
        speed, operations = ([by_length[length][index] for length in lengths] for index in (0, 1))
        axis.plot(lengths, speed, "o-", color=COLOURS[0], label="tokens a second")
        axis.plot(lengths, operations, "--", color=COLOURS[1], label="operations a token, inverted")
        targets = TARGETS.get(size, {})
        if targets:
            axis.plot(list(targets), list(targets.values()), "_", color="black", markersize=14, label="target")
        axis.axhline(1, color="black", linewidth=0.8)
        log_axes(axis, [*lengths, *targets], "length (tokens)", "Grassmann / Llama", f"Training, {size}")
    figure.suptitle(record["device_name"])
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    run_sweep(TrainingArguments, measure, table, draw, argv)


if __name__ == "__main__":
    main()
