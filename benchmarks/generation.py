"""Prefill and decoding of a whole model, against a Llama of its size with a static cache of keys and values.

    python benchmarks/generation.py --output generation.json --plot generation.png
    python benchmarks/generation.py --sizes 110M --contexts 65536 --batch_sizes 64
    python benchmarks/generation.py --from_json generation.json --plot generation.png

Weights are bfloat16. Decoding is greedy, one token after the other, with a `StaticCache`, in one of three forms:

- `compiled` as `generate` compiles it, in the mode `reduce-overhead`: CUDA graphs behind checks of a call's tensors;
- replays of one CUDA `graph` of a compiled step, as servers do: the GPU's time, which no host keeps waiting;
- `plain` calls, at batch 1.

Llama's cache has exactly the context's length, holds random keys and values, and its last places are being filled; the
Grassmann model's state comes from a prefill of random tokens of that length. A time is that of a token: a few steps
that do not wait for each other, divided by their number.

With a static cache, Transformers gives SDPA a mask, which rules its flash kernels out. `--attention sdpa_causal` takes
the mask away: the cache is full but for the tokens to come, so this is the fastest that the same Llama could be.

Prefill is one plain call over the whole context, with an empty dynamic cache and logits of the last token alone. Where
a batch does not fit, half of it is tried, and so on; the record says which.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

import torch
from peers import (
    MODELS,
    SIZES,
    compilation_facts,
    is_measured,
    make_grassmann,
    make_llama,
    or_dash,
    ratio_rows,
    tensor_bytes,
)
from plots import COLOURS, log_axes, new_figure, save
from timing import (
    CAPTURE_CALLS,
    SweepArguments,
    capture,
    check_known,
    free_memory,
    markdown,
    median_and_iqr,
    milliseconds,
    reason,
    run_sweep,
)
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from modeling_grassmann.cache_grassmann import CACHE_NAME


# (context, batch size) -> least ratio of Llama's time a token to ours.
TARGETS = {(65536, 64): 3.0}
PREFILL_REPEATS = 3
# Forms of decoding, and how each is drawn.
FORMS = {"compiled": "o-", "graph": "s--", "plain": "o:"}


@dataclass
class GenerationArguments(SweepArguments):
    """Sizes, contexts and batch sizes."""

    sizes: list[str] = field(default_factory=lambda: ["13M"], metadata={"help": f"Of {', '.join(SIZES)}."})
    contexts: list[int] = field(
        default_factory=lambda: [1024, 8192, 65536], metadata={"help": "Tokens before those that are generated."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 64], metadata={"help": "Sequences."})
    steps: int = field(default=8, metadata={"help": "Decoding steps of each timed run."})
    attention: Literal["sdpa", "sdpa_causal"] = field(
        default="sdpa",
        metadata={
            "help": "Llama's attention: as `generate` runs it, or without the mask of a cache that is not full."
        },
    )
    forms: list[str] = field(
        default_factory=lambda: ["compiled", "plain"], metadata={"help": f"Of {', '.join(FORMS)}."}
    )
    prefill: bool = field(default=True, metadata={"help": "Whether to time the prefill."})
    prefill_tokens: int = field(
        default=65536, metadata={"help": "Tokens of a call when the Grassmann model's state is made."}
    )

    POSITIVE = ("repeats", "steps", "prefill_tokens")

    def __post_init__(self):
        super().__post_init__()
        check_known("sizes", self.sizes, SIZES)
        check_known("forms", self.forms, FORMS)
        if "graph" in self.forms and self.device != "cuda":
            raise ValueError(f"graph is a form of decoding on a GPU, got the device {self.device}")
        if min(self.contexts) <= self.decoded:
            raise ValueError(f"contexts must be more than the {self.decoded} decoded tokens, got {min(self.contexts)}")

    @property
    def decoded(self) -> int:
        """Number of tokens that are decoded in one row."""
        return (self.warmup_runs + self.repeats) * self.steps + CAPTURE_CALLS * ("graph" in self.forms)

    @property
    def warmup_runs(self) -> int:
        # CUDA graphs are warmed up in one call and recorded in the next.
        return max(self.warmup, 1)

    def forms_of(self, batch_size: int) -> list[str]:
        """Plain calls wait for Python whatever the batch: they are timed at the smallest, or where nothing else is."""
        return [form for form in self.forms if form != "plain" or batch_size == 1 or self.forms == ["plain"]]


def make_models(size: str, args: GenerationArguments) -> dict[str, PreTrainedModel]:
    grassmann = make_grassmann(size)
    models = {"grassmann": grassmann, "llama": make_llama(grassmann, args.attention, max(args.contexts))}
    return {name: model.to(args.device, torch.bfloat16).eval() for name, model in models.items()}


def random_ids(model: PreTrainedModel, batch_size: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch_size, length), device=model.device)  # (B, T)


def filled_cache(model: PreTrainedModel, batch_size: int, context: int, args: GenerationArguments) -> Cache:
    """The state of a model after as many tokens as leave room in the context for those to be decoded."""
    config, seen = model.config, context - args.decoded
    cache = StaticCache(config=config, max_cache_len=context)
    if config.model_type == "llama":
        cache.early_initialization(
            batch_size, config.num_key_value_heads, config.head_dim, dtype=model.dtype, device=model.device
        )
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(seen)
        return cache
    chunk = max(args.prefill_tokens // batch_size, 1)
    for start in range(0, seen, chunk):
        model.model(random_ids(model, batch_size, min(chunk, seen - start)), use_cache=True, **{CACHE_NAME: cache})
    return cache


def state_bytes(cache: Cache) -> int:
    # A memory has more than keys and values.
    return tensor_bytes(
        getattr(layer, name) for layer in cache.layers for name in getattr(layer, "STATE", ("keys", "values"))
    )


def make_decoding(
    model: PreTrainedModel, cache: Cache, batch_size: int, start: int, form: str, steps: int
) -> Callable[[], torch.Tensor]:
    """A function that decodes some tokens, each from the one before."""
    mode = "reduce-overhead" if form == "compiled" else None
    forward = model if form == "plain" else torch.compile(model.__call__, mode=mode, dynamic=False)
    tokens = random_ids(model, batch_size, 1)
    position_ids = torch.full_like(tokens, start)

    def step() -> None:
        if form == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        outputs = forward(input_ids=tokens, position_ids=position_ids, use_cache=True, **{CACHE_NAME: cache})
        tokens.copy_(outputs.logits[:, -1].argmax(-1, keepdim=True))
        position_ids.add_(1)

    one_token = capture(step) if form == "graph" else step

    def decode() -> torch.Tensor:
        for _ in range(steps):
            one_token()
        return tokens

    return decode


@torch.no_grad()
def measure_decoding(
    model: PreTrainedModel, batch_size: int, context: int, form: str, args: GenerationArguments
) -> dict[str, Any]:
    """Time a token and size of the state; or the reason why there is none."""
    # What was compiled for the row before may keep its cache alive.
    torch._dynamo.reset()
    free_memory(args.device)
    row = {}
    try:
        cache = filled_cache(model, batch_size, context, args)
        row["state_bytes"] = state_bytes(cache)
        with compilation_facts(row):
            decode = make_decoding(model, cache, batch_size, context - args.decoded, form, args.steps)
            for _ in range(args.warmup_runs):
                decode()
            times = [milliseconds(decode, args.device) for _ in range(args.repeats)]
        row |= median_and_iqr([time / args.steps for time in times])
    except Exception as error:
        row["failed"] = reason(error)
    return row


@torch.no_grad()
def measure_prefill(
    model: PreTrainedModel, batch_size: int, context: int, args: GenerationArguments
) -> dict[str, Any]:
    """Time of a call over the whole context, of the largest part of the batch that fits."""

    def prefill() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        return model(input_ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits

    torch._dynamo.reset()
    while batch_size >= 1:
        free_memory(args.device)
        input_ids = random_ids(model, batch_size, context)
        try:
            prefill()
            times = [milliseconds(prefill, args.device) for _ in range(PREFILL_REPEATS)]
        except torch.OutOfMemoryError:
            batch_size //= 2
            continue
        except Exception as error:
            return {"prefill_failed": reason(error)}
        median = median_and_iqr(times)
        return {
            "prefill_batch_size": batch_size,
            "prefill_ms": median["median_ms"],
            "prefill_iqr_ms": median["iqr_ms"],
            "prefill_ns_per_token": median["median_ms"] * 1e6 / (batch_size * context),
        }
    return {"prefill_failed": "does not fit in memory"}


def measure(args: GenerationArguments, record: dict[str, Any]) -> Iterator[None]:
    record["parameters"], record["rows"] = {}, []
    for size in args.sizes:
        models = make_models(size, args)
        record["parameters"] |= {f"{name} {size}": model.num_parameters() for name, model in models.items()}
        print(record["parameters"], flush=True)
        for batch_size in args.batch_sizes:
            for context in args.contexts:
                forms = args.forms_of(batch_size)
                for form in forms:
                    for name, model in models.items():
                        if args.is_over():
                            record["stopped"] = f"after {args.time_limit:g} s, before a context of {context}"
                            return
                        row = {"size": size, "model": name, "batch_size": batch_size, "context": context}
                        row["form"] = form
                        row |= measure_decoding(model, batch_size, context, form, args)
                        # Prefill is never compiled, and so measured once.
                        if args.prefill and form == forms[0]:
                            row |= measure_prefill(model, batch_size, context, args)
                        record["rows"].append(row)
                        print(describe(row), flush=True)
                        yield
        del models, model
        torch._dynamo.reset()
        free_memory(args.device)


def describe(row: dict[str, Any]) -> str:
    figure = row.get("failed") or f"{row['median_ms']:.3f} ms per token"
    prefill = f", prefill {row['prefill_ms']:.1f} ms" if "prefill_ms" in row else ""
    shape = f"batch {row['batch_size']} context {row['context']}"
    return f"{row['size']} {row['model']:<9} {shape} {row['form']}: {figure}{prefill}"


def table(record: dict[str, Any]) -> str:
    """Time a token, state and prefill by size, batch and context; flatness in the context; what did not run."""
    header = ["size", "batch", "context", "decoding", "grassmann ms/token", "llama ms/token", "ratio", "target"]
    decoding = [[*header, "grassmann state MiB", "llama state MiB"]]
    prefill = [["size", "batch", "context", "grassmann prefill ms", "llama prefill ms", "ratio per token"]]
    for key, models in ratio_rows(record["rows"], ("size", "batch_size", "context", "form")):
        size, batch_size, context, form = key
        times = [or_dash(lambda row: f"{row['median_ms']:.3f}", models.get(name)) for name in MODELS]
        target = TARGETS.get((context, batch_size)) if form != "plain" else None
        state = [f"{row['state_bytes'] / 2**20:.3f}" if "state_bytes" in row else "—" for row in by_model(models)]
        cells = [size, str(batch_size), f"{context:,}", form]
        goal = f"{target:g}x" if target else ""
        decoding.append([*cells, *times, ratio(models, "median_ms"), goal, *state])
        if any("prefill_ms" in row for row in models.values()):
            calls = [prefill_cell(row, batch_size) for row in by_model(models)]
            prefill.append([*cells[:3], *calls, ratio(models, "prefill_ns_per_token")])
    sections = [markdown(decoding, left=1)]
    for (size, batch_size, form), spread in flatness(record).items():
        sections.append(
            f"{size}, batch {batch_size}, {form}: the slowest context takes the Grassmann model {spread:.2f} times as "
            "long a token as the fastest."
        )
    if len(prefill) > 1:
        sections.append(markdown(prefill, left=1))
    notes = [
        f"- {row['model']} {row['size']}, batch {row['batch_size']}, context {row['context']:,}: "
        f"{shorten(row[key], 80)}"
        for row in record["rows"]
        for key in ("failed", "prefill_failed")
        if key in row
    ]
    # What was compiled without CUDA graphs is not what was meant to be measured.
    notes += [
        f"- {row['model']} {row['size']}, batch {row['batch_size']}, context {row['context']:,}: without CUDA graphs"
        for row in record["rows"]
        if row.get("cudagraph_skips") and record["device"] == "cuda"
    ]
    sections.append("\n".join(notes))
    parameters = [f"{name} has {count:,} parameters" for name, count in record["parameters"].items()]
    sections.append(f"{'; '.join(parameters)}.")
    if "stopped" in record:
        sections.append(f"Stopped {record['stopped']}.")
    return "\n\n".join(filter(None, sections))


def by_model(models: dict[str, dict]) -> list[dict[str, Any]]:
    return [models.get(name, {}) for name in MODELS]


def ratio(models: dict[str, dict], figure: str) -> str:
    """How many times our time Llama takes."""
    if not is_measured(models, figure):
        return "—"
    grassmann, llama = (row[figure] for row in by_model(models))
    return f"{llama / grassmann:.2f}x"


def prefill_cell(row: dict[str, Any], batch_size: int) -> str:
    if "prefill_ms" not in row:
        return "—"
    part = row["prefill_batch_size"]
    return f"{row['prefill_ms']:.1f}" + (f" (batch {part})" if part != batch_size else "")


def flatness(record: dict[str, Any]) -> dict[tuple[str, int, str], float]:
    """(size, batch size, form) -> longest time a token over the shortest, among contexts, except in plain calls."""
    times = {}
    for row in record["rows"]:
        if row["model"] == "grassmann" and row["form"] != "plain" and "failed" not in row:
            times.setdefault((row["size"], row["batch_size"], row["form"]), []).append(row["median_ms"])
    return {key: max(values) / min(values) for key, values in times.items() if len(values) > 1}


def draw(record: dict[str, Any], path: str) -> None:
    """Time a token against context, one pair of axes for each batch size that a run came to compare."""
    groups = sorted({(row["size"], row["batch_size"]) for row in record["rows"] if row["model"] == "llama"})
    figure, axes = new_figure(max(len(groups), 1))
    for axis, (size, batch_size) in zip(axes, groups):
        rows = [row for row in record["rows"] if (row["size"], row["batch_size"]) == (size, batch_size)]
        for name, colour in zip(MODELS, COLOURS):
            for form, style in FORMS.items():
                points = sorted(
                    (row["context"], row["median_ms"])
                    for row in rows
                    if row["model"] == name and row["form"] == form and "failed" not in row
                )
                if points:
                    axis.plot(*zip(*points), style, color=colour, label=f"{name}, {form}")
        for name, row in ((row["model"], row) for row in rows if row["form"] == "compiled" and "failed" not in row):
            target = TARGETS.get((row["context"], batch_size))
            if target and name == "llama":
                axis.plot(row["context"], row["median_ms"] / target, "_", color="black", markersize=14, label="target")
        log_axes(
            axis, [row["context"] for row in rows], "context (tokens)", "ms per token", f"{size}, batch {batch_size}"
        )
    figure.suptitle(f"Decoding, {record['device_name']}")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    run_sweep(GenerationArguments, measure, table, draw, argv)


if __name__ == "__main__":
    main()
