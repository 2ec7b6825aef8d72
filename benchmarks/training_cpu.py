"""Training and decoding on a CPU: Grassmann models against a Llama of their size, and GPT-2 beside them in decoding.

    python benchmarks/training_cpu.py --threads 2
    python benchmarks/training_cpu.py --dropout 0.1 --output training_cpu.json

A training step is forward and backward of the body, without embedding and vocabulary head, in float32. It is not
compiled unless asked for. Decoding calls the whole model with one token after the other and a dynamic cache, as
`generate` does, and begins each time at the same context. The models take turns, so that drift of the machine hits
all.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peers import SIZES, make_grassmann, make_llama
from timing import TimingArguments, check_known, markdown, median_and_iqr, milliseconds, start_record, write_record
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedModel

from modeling_grassmann.cache_grassmann import CACHE_NAME


OFFSETS = [1, 2, 4, 8, 12, 16]
# The greatest part of Llama's time that a training step should take.
TARGET = 0.9


@dataclass
class TrainingArguments(TimingArguments):
    """Shapes and number of repeats."""

    device: Literal["cpu"] = field(default="cpu", metadata={"help": "Where to run."})
    size: str = field(default="13M", metadata={"help": f"Size of the models, of {', '.join(SIZES)}."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a training step."})
    length: int = field(default=512, metadata={"help": "Tokens of each of them."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the Grassmann models; Llama's body has none."})
    compile: bool = field(default=False, metadata={"help": "Whether to compile the training step."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Sequences to decode together."})
    contexts: list[int] = field(
        default_factory=lambda: [64, 512], metadata={"help": "Tokens before those that are decoded."}
    )
    steps: int = field(default=16, metadata={"help": "Tokens to decode in each timed run."})

    POSITIVE = ("batch_size", "length", "repeats", "steps")

    def __post_init__(self):
        super().__post_init__()
        check_known("size", [self.size], SIZES)
        for name in ("batch_sizes", "contexts"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(getattr(self, name))}")


def make_models(args: TrainingArguments) -> dict[str, PreTrainedModel]:
    one, six = (make_grassmann(args.size, hidden_dropout=args.dropout, offsets=offsets) for offsets in (None, OFFSETS))
    longest = max(args.length, max(args.contexts) + args.steps)
    config = GPT2Config(
        vocab_size=one.config.vocab_size,
        n_positions=longest,
        n_embd=one.config.hidden_size,
        n_layer=one.config.num_hidden_layers,
        n_head=max(one.config.hidden_size // 64, 1),
        bos_token_id=None,
        eos_token_id=None,
    )
    return {
        "llama": make_llama(one, "sdpa_causal", longest),
        "grassmann, six offsets a layer": six,
        "grassmann, one offset a layer": one,
        "gpt2": GPT2LMHeadModel(config),
    }


def training(model: PreTrainedModel, args: TrainingArguments) -> Callable[[], Callable]:
    """A function that makes the training step to be timed: forward and backward of the body."""
    body = torch.compile(model.model) if args.compile else model.model
    shape = (args.batch_size, args.length, model.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    # As if from an embedding.
    inputs.requires_grad_()

    def step() -> None:
        model.train()
        body(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(gradient)
        model.zero_grad()
        inputs.grad = None

    return lambda: step


@torch.no_grad()
def decoding(model: PreTrainedModel, batch_size: int, context: int, steps: int) -> Callable[[], Callable]:
    """A function that copies the state after the context, and makes the decoding to be timed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, context), generator=generator)  # (B, T)
    state = DynamicCache(config=model.config)
    model.eval()
    first = model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: state}).logits.argmax(-1)  # (B, 1)

    def prepare() -> Callable[[], torch.Tensor]:
        model.eval()
        cache = copy.deepcopy(state)

        @torch.no_grad()
        def decode() -> torch.Tensor:
            tokens = [first]
            for position in range(context, context + steps):
                position_ids = torch.full_like(first, position)
                outputs = model(tokens[-1], position_ids=position_ids, use_cache=True, **{CACHE_NAME: cache})
                tokens.append(outputs.logits[:, -1:].argmax(-1))
            return torch.cat(tokens, dim=1)

        return decode

    return prepare


def measure(prepares: dict[str, Callable[[], Callable]], args: TrainingArguments) -> dict[str, dict[str, float]]:
    """Median and interquartile range of the time in ms, and its part of Llama's, by model."""
    for _ in range(args.warmup):
        for prepare in prepares.values():
            prepare()()
    names, times = list(prepares), {name: [] for name in prepares}
    for repeat in range(args.repeats):
        # Each model goes first in turn.
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(milliseconds(prepares[name](), args.device))
    results = {name: median_and_iqr(samples) for name, samples in times.items()}
    for row in results.values():
        row["of_llama"] = row["median_ms"] / results["llama"]["median_ms"]
    return results


def measure_all(models: dict[str, PreTrainedModel], args: TrainingArguments) -> list[dict[str, Any]]:
    """A row for each model and pass; times of decoding are those of one token of all sequences."""
    steps = {name: training(model, args) for name, model in models.items() if name != "gpt2"}
    facts = {"pass": "training", "batch_size": args.batch_size, "length": args.length}
    rows = [facts | {"model": name} | row for name, row in measure(steps, args).items()]
    for batch_size in args.batch_sizes:
        for context in args.contexts:
            steps = {name: decoding(model, batch_size, context, args.steps) for name, model in models.items()}
            facts = {"pass": "decoding", "batch_size": batch_size, "length": context}
            for name, row in measure(steps, args).items():
                row |= {figure: row[figure] / args.steps for figure in ("median_ms", "iqr_ms")}
                rows.append(facts | {"model": name} | row)
    return rows


def table(record: dict[str, Any]) -> str:
    lines = [["pass", "model", "batch", "length", "median ms", "IQR ms", "of llama's", "target"]]
    for row in record["rows"]:
        target = f"{TARGET:g}" if row["pass"] == "training" and row["model"].startswith("grassmann") else ""
        cells = [row["pass"], row["model"], str(row["batch_size"]), str(row["length"])]
        lines.append([*cells, f"{row['median_ms']:.2f}", f"{row['iqr_ms']:.2f}", f"{row['of_llama']:.2f}", target])
    return markdown(lines, left=2)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.threads:
            torch.set_num_threads(args.threads)
        models = make_models(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    record = start_record(args, parameters={name: model.num_parameters() for name, model in models.items()})
    record["rows"] = measure_all(models, args)
    print("\n" + table(record))
    write_record(record, args.output, parser)


if __name__ == "__main__":
    main()
