"""What the benchmarks share: their arguments, the time of a call, and the record of a run."""

import json
import os
import platform
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from plots import can_draw
from transformers import HfArgumentParser


PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "liger-kernel")
# Calls of a function before a CUDA graph of it is made, in which it compiles and allocates what stays.
CAPTURE_CALLS = 2


@dataclass
class TimingArguments:
    """Device and number of repeats."""

    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "Where to run; auto takes the GPU if there is one."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads, by default PyTorch's own choice."})
    repeats: int = field(default=20, metadata={"help": "Timed runs of each candidate and pass."})
    warmup: int = field(default=3, metadata={"help": "Runs before them."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the results to."})

    POSITIVE: ClassVar[tuple[str, ...]] = ("repeats",)

    def __post_init__(self):
        for name in self.POSITIVE:
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


@dataclass
class SweepArguments(TimingArguments):
    """Arguments of a benchmark that measures row after row."""

    seconds: float = field(
        default=1.0, metadata={"help": "Time after which a function has been timed often enough, from three runs up."}
    )
    time_limit: float | None = field(
        default=None, metadata={"help": "Seconds after which no further row is begun; by default there is no limit."}
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file to draw the results to."})
    from_json: str | None = field(
        default=None, metadata={"help": "Show and draw the results in this file, and measure nothing."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.start = time.monotonic()

    def is_over(self) -> bool:
        return self.time_limit is not None and time.monotonic() - self.start > self.time_limit


def check_known(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: if one of the values of an argument is not known.
    """
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} must be of {', '.join(known)}, got {unknown[0]}")


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


def take_turns(
    functions: dict[Any, Callable[[], Any]], args: SweepArguments
) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """
    Times in ms of functions that take turns, each going first in turn, so that drift of the machine hits all; and why
    there are none of those that failed.
    """
    names, times, failures = list(functions), {name: [] for name in functions}, {}
    for repeat in range(args.repeats if names else 0):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            # A slow one needs no more than the median of three.
            if name in failures or (len(times[name]) >= 3 and sum(times[name]) >= args.seconds * 1e3):
                continue
            try:
                times[name].append(milliseconds(functions[name], args.device))
            except Exception as error:
                failures[name] = reason(error)
                free_memory(args.device)
    return {name: values for name, values in times.items() if name not in failures}, failures


def capture(function: Callable[[], Any]) -> Callable[[], None]:
    """
    A CUDA graph of one call, as a function that replays it: the device's time without that of the launches. Before, it
    is called `CAPTURE_CALLS` times.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    # What the graph reads and writes lives as long as the graph, the function's own tensors among it.
    def replay(function=function, results=results) -> None:
        graph.replay()

    return replay


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in memory"
    text = " ".join(str(error).split())[:300]
    return text if type(error) is RuntimeError else f"{type(error).__name__}: {text}"


def free_memory(device: str) -> None:
    if device == "cuda":
        # What an error left half done must not be charged to the next row.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def median_and_iqr(times: list[float]) -> dict[str, float]:
    """Median and interquartile range of times in ms."""
    samples = torch.tensor(times, dtype=torch.double)
    low, median, high = samples.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)).tolist()
    return {"median_ms": median, "iqr_ms": high - low}


def markdown(rows: list[list[str]], left: int) -> str:
    """A Markdown table of a header and its rows, aligned; the first `left` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    lines.insert(1, ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def start_record(args: TimingArguments, **facts: Any) -> dict[str, Any]:
    """Print and return what a benchmark ran on: environment, arguments, and `facts` of its own."""
    record = {**environment(args.device), **asdict(args), **facts}
    # Where the results go is no part of them, and the threads in use are already there.
    for name in ("output", "threads", "plot", "from_json"):
        record.pop(name, None)
    for name, value in record.items():
        print(f"{name}: {value}")
    return record


def write_record(record: dict[str, Any], output: str | None, parser: ArgumentParser) -> None:
    if output:
        try:
            # In two steps, so that a run that is killed leaves the rows before.
            Path(f"{output}.part").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            os.replace(f"{output}.part", output)
        except OSError as error:
            parser.exit(2, f"error: cannot write {output}: {error.strerror}\n")


def run_sweep(
    arguments: type[SweepArguments],
    measure: Callable[[SweepArguments, dict[str, Any]], Iterator[None]],
    table: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], str], None],
    argv: list[str] | None,
) -> None:
    """
    Command line of a benchmark of many rows: measure, or read a record; print its tables; draw its picture.

    Args:
        measure: adds rows to a record, and yields after each of them, so that it is written down.
        table: renders a record as Markdown.
        draw: draws a record to a PNG file.
    """
    parser = HfArgumentParser(arguments, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.plot:
            can_draw()
        record = json.loads(Path(args.from_json).read_text(encoding="utf-8")) if args.from_json else None
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    if record is None:
        if args.threads:
            torch.set_num_threads(args.threads)
        record = start_record(args)
        # A file that cannot be written is found before an hour of measuring.
        write_record(record, args.output, parser)
        for _ in measure(args, record):
            write_record(record, args.output, parser)
        # Once more with what follows the last row, such as why there is none after it.
        write_record(record, args.output, parser)
    print("\n" + table(record))
    if args.plot:
        try:
            draw(record, args.plot)
        except OSError as error:
            parser.exit(2, f"error: cannot write {args.plot}: {error.strerror}\n")


def environment(device: str) -> dict[str, Any]:
    """Commit of this file's checkout (None outside of one), device, CPU threads and versions (None if missing)."""
    facts = {
        "commit": git_commit(),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu_threads": torch.get_num_threads(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts | {"torch": torch.__version__}


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
