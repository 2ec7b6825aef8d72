"""What the benchmarks share: their arguments, the time of a call, and the record of a run."""

import json
import platform
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch


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
    del record["output"], record["threads"]
    for name, value in record.items():
        print(f"{name}: {value}")
    return record


def write_record(record: dict[str, Any], output: str | None, parser: ArgumentParser) -> None:
    if output:
        try:
            Path(output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            parser.exit(2, f"error: cannot write {output}: {error.strerror}\n")


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
