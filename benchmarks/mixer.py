"""Time and memory of the Plücker mixer: the reference that follows the paper against the exact collapse.

    python benchmarks/mixer.py
    python benchmarks/mixer.py --device cuda --dtype bfloat16 --batch_size 64 --output mixer.json

Both backends run with the same weights and inputs in one process and take turns, so that drift of the machine hits
both. Before anything is timed, their outputs and gradients must agree.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from modeling_grassmann import PluckerMixer


BACKENDS = ("naive", "torch")


@dataclass
class BenchmarkArguments:
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
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "Where to run; auto takes the GPU if there is one."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads, by default PyTorch's own choice."})
    repeats: int = field(default=20, metadata={"help": "Timed runs of each backend and pass."})
    warmup: int = field(default=3, metadata={"help": "Runs before them."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the results to."})

    def __post_init__(self):
        for name in ("batch_size", "length", "hidden_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but PyTorch finds no GPU")


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


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """Time of one call; on a GPU until its work is done."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


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
            samples = torch.tensor(times[name][backend], dtype=torch.double)
            low, median, high = samples.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)).tolist()
            results[name][backend] = {
                "median_ms": median,
                "iqr_ms": high - low,
                "ns_per_token": median * 1e6 / tokens,
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    lines.insert(1, ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def environment(device: str) -> dict[str, Any]:
    """Commit of this file's checkout (None outside of one), device, CPU threads and version of PyTorch."""
    return {
        "commit": git_commit(),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def git_commit() -> str | None:
    """Commit of the checkout that holds this file, with `-dirty` after it if tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("-dirty" if changes else "")


def cpu_name() -> str:
    """Model of the CPU, as far as the operating system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(BenchmarkArguments, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.threads:
            torch.set_num_threads(args.threads)
        passes = build_passes(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")

    record = {**environment(args.device), **asdict(args)}
    # Where the results go is no part of them, and the threads in use are already there.
    del record["output"], record["threads"]
    for name, value in record.items():
        print(f"{name}: {value}")

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
    if args.output:
        try:
            Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            parser.exit(2, f"error: cannot write {args.output}: {error.strerror}\n")


if __name__ == "__main__":
    main()
