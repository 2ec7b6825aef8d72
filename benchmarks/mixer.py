"""Time and memory of the Plücker mixer: the reference that follows the paper against the exact collapse.

    python benchmarks/mixer.py
    python benchmarks/mixer.py --device cuda --dtype bfloat16 --batch_size 64 --output mixer.json

Both backends run with the same weights and inputs in one process and take turns, so that drift of the machine hits
both. Before anything is timed, their outputs and gradients must agree.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from timing import TimingArguments, markdown, median_and_iqr, milliseconds, start_record, write_record
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from modeling_grassmann import PluckerMixer


BACKENDS = ("naive", "torch")


@dataclass
class BenchmarkArguments(TimingArguments):
    """Shapes, device and number of repeats."""

    batch_size: int = field(default=16, metadata={"help": "Sequences."})
    length: int = field(default=256, metadata={"help": "Tokens per sequence."})
    hidden_size: int = field(default=256, metadata={"help": "Size of a token's hidden state."})
    reduced_size: int = field(default=32, metadata={"help": "Dimension in which planes are spanned."})
    offsets: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 12, 16], metadata={"help": "Distances to the neighbours, in tokens."}
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of weights and inputs."}
    )

    POSITIVE = ("batch_size", "length", "hidden_size", "repeats")


def build_passes(args: BenchmarkArguments) -> dict[str, dict[str, Callable[[], list[torch.Tensor]]]]:
    """The functions to measure, by pass and backend.

    `forward` runs without autograd and returns the output; `forward+backward` returns the output and the gradients of
    the input and of every parameter.

    Raises:
        ValueError: if a size or an offset is impossible.
    """
    torch.manual_seed(0)
    mixer = PluckerMixer(args.hidden_size, args.reduced_size, args.offsets)
    shape = (args.batch_size, args.length, args.hidden_size)
    target = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    mixer.to(**target)
    hidden_states = torch.randn(shape).to(**target).requires_grad_()
    output_gradient = torch.randn(shape).to(**target)
    inputs = [hidden_states, *mixer.parameters()]

    def forward(backend: str) -> list[torch.Tensor]:
        mixer.backend = backend
        with torch.no_grad():
            return [mixer(hidden_states)]

    def forward_backward(backend: str) -> list[torch.Tensor]:
        mixer.backend = backend
        output = mixer(hidden_states)
        return [output, *torch.autograd.grad(output, inputs, output_gradient)]

    def of_backends(function: Callable) -> dict[str, Callable[[], list[torch.Tensor]]]:
        return {backend: lambda backend=backend: function(backend) for backend in BACKENDS}

    return {"forward": of_backends(forward), "forward+backward": of_backends(forward_backward)}


def relative_error(results: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Largest ‖x - x_ref‖ / ‖x_ref‖ over pairs of tensors, in Frobenius norm; NaN if any value is NaN."""
    errors = []
    for result, expected in zip(results, reference, strict=True):
        difference = (result.detach().double() - expected.detach().double()).norm()
        # Where no token has a neighbour, some gradients are exactly zero.
        errors.append(difference / expected.detach().double().norm().clamp(min=torch.finfo(torch.double).tiny))
    return torch.stack(errors).max().item()


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """
    Largest number of bytes of tensors, among those that a call of `function` allocates, that are alive at one time.

    Weights and inputs existed before and do not count; temporaries inside operators, tensors saved for the backward,
    gradients and the result do. On a CPU every allocation of PyTorch is traced, so the number is exact and does not
    depend on what else the process holds; on a GPU the caching allocator counts, which rounds up to 512 bytes.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library reads this when it starts; it writes lines of its own to stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    if not events:
        return 0
    # What an earlier profile saw allocated is part of the total until it is freed.
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - before


def measure(passes: dict[str, dict[str, Callable]], args: BenchmarkArguments) -> dict[str, dict[str, dict]]:
    """Median and interquartile range of the time in ms, ns per token and peak bytes, by pass and backend."""
    for _ in range(args.warmup):
        for functions in passes.values():
            for function in functions.values():
                function()
    times = {name: {backend: [] for backend in BACKENDS} for name in passes}
    for repeat in range(args.repeats):
        for name, functions in passes.items():
            # Each backend goes first every other time.
            for backend in BACKENDS[:: -1 if repeat % 2 else 1]:
                times[name][backend].append(milliseconds(functions[backend], args.device))

    tokens = args.batch_size * args.length
    results = {name: {} for name in passes}
    for name, functions in passes.items():
        for backend in BACKENDS:
            row = median_and_iqr(times[name][backend])
            results[name][backend] = {
                **row,
                "ns_per_token": row["median_ms"] * 1e6 / tokens,
                "peak_bytes": peak_memory(functions[backend], args.device),
            }
        naive, collapsed = (results[name][backend] for backend in BACKENDS)
        results[name]["naive/torch"] = {
            key: naive[key] / collapsed[key] for key in ("median_ms", "ns_per_token", "peak_bytes")
        }
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    """The results as a Markdown table; the rows `naive/torch` hold ratios."""
    rows = [["pass", "backend", "median ms", "IQR ms", "ns per token", "peak MiB"]]
    for name, backends in results.items():
        for backend, row in backends.items():
            if backend in BACKENDS:
                values = [row["median_ms"], row["iqr_ms"], row["ns_per_token"], row["peak_bytes"] / 2**20]
                cells = [f"{value:.2f}" for value in values]
            else:
                cells = [f"{row['median_ms']:.2f}x", "", f"{row['ns_per_token']:.2f}x", f"{row['peak_bytes']:.2f}x"]
            rows.append([name, backend, *cells])
    return markdown(rows, left=2)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(BenchmarkArguments, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.threads:
            torch.set_num_threads(args.threads)
        passes = build_passes(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")

    record = start_record(args)
    naive, collapsed = (function() for function in passes["forward+backward"].values())
    record["relative_error"] = relative_error(collapsed, naive)
    tolerance = torch.finfo(getattr(torch, args.dtype)).eps ** 0.5
    print(f"relative error of output and gradients: {record['relative_error']:.1e} (at most {tolerance:.1e})\n")
    # Written so that NaN fails too.
    if not record["relative_error"] <= tolerance:
        sys.exit("error: the backends disagree, so their times cannot be compared")
    del naive, collapsed

    record["results"] = measure(passes, args)
    print(table(record["results"]))
    write_record(record, args.output, parser)


if __name__ == "__main__":
    main()
