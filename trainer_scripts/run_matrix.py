"""Run every cell of a matrix of tasks, models, depths, block sizes and seeds, each as a process of its own.

    python trainer_scripts/run_matrix.py configuration/matrix/published.yaml --seeds 0 1 2 --jobs_per_gpu 2
    python trainer_scripts/run_matrix.py configuration/matrix/published.yaml --mode eval --checkpoint checkpoint-1000
    python trainer_scripts/run_matrix.py configuration/matrix/published.yaml --jobs 2 -- --max_steps 10 --use_cpu

A cell is a run of `run_clm.py` or `run_nli.py` in a folder `<task>_<model>_<depth>l_L<block>_seed<N>` below
`output_dir`, with its log in `train.log`. The same command goes on where it was interrupted: finished cells stay as
they are, the others continue from their newest checkpoints. `--mode eval` evaluates a checkpoint of each cell, in a
folder `<task>_<model>_<depth>l_L<block>_at_<checkpoint>_seed<N>` inside of the cell's. What follows `--` goes to every
cell. A cell that fails does not stop the others; then the exit code is 1.
"""

import argparse
import fcntl
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import UserError, exits_on_user_error, split_extra
from matrix import (
    Cell,
    Run,
    check_extra,
    check_numbers,
    choose,
    evaluation,
    finished_cells,
    is_finished,
    load_matrix,
    make_cells,
    training,
)
from run_records import RecordsParser, positive


MODES = {"train": ["train"], "eval": ["eval"], "both": ["train", "eval"]}
# How cells are stopped: as Ctrl-C does, and those that are still there after GRACE seconds by the next, and so on.
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
GRACE = 60.0
POLL = 0.1


@dataclass
class Child:
    """The process of a run.

    Attributes:
        gpu: what it sees as CUDA_VISIBLE_DEVICES.
        offset: size of the log before it.
    """

    run: Run
    process: subprocess.Popen
    gpu: str
    offset: int
    start: float


def launch(run: Run, gpu: str, threads: int | None) -> Child:
    """Start a run as a process whose output is appended to the run's log.

    Args:
        gpu: the only GPU that it may see; none if empty.
        threads: for its computations on the CPU; None leaves that to PyTorch.

    Raises:
        UserError: if another process is at it.
        OSError: if the log cannot be written.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if threads is not None:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    with open(run.log, "ab") as log:
        try:
            # The process inherits the lock and keeps it to its end, even if it outlives this one.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is at it: {run.log} is locked") from error
        except OSError:
            # Some file systems have no locks.
            pass
        offset = log.tell()
        log.write(f"$ {shlex.join(run.command)}\n".encode())
        log.flush()
        # In a session of its own, as Ctrl-C would otherwise reach it before this process can say how it ends.
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(run.command, env=env, **options)
    return Child(run, process, gpu, offset, time.monotonic())


def last_error(child: Child) -> str:
    """Why a process failed: the signal that ended it, or the last line of its output that names an error, if any."""
    if child.process.returncode < 0:
        return f"ended by {signal.Signals(-child.process.returncode).name}"
    with open(child.run.log, "rb") as file:
        file.seek(child.offset)
        lines = file.read().decode(errors="replace").splitlines()
    lines = [line.strip() for line in lines[1:] if line.strip()]
    errors = [line for line in lines if re.match(r"(error|[\w.]*(Error|Exception|Interrupt))(: |$)", line)]
    return (errors or lines or [f"exit code {child.process.returncode}, and no output"])[-1]


def send(child: Child, number: signal.Signals) -> None:
    """Send a signal to a process and its helpers; it may have ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


class Scheduler:
    """Runs cells side by side, as many as there are slots.

    Args:
        cells: the cells.
        modes: what to run of each, one after the other.
        plan: gives the run of a cell in a mode; may raise a `UserError`.
        slots: for each cell that may run at a time, the GPU that it sees.

    Attributes:
        failed: by name of a cell, why it failed.
        interrupted: when it was, on the monotonic clock; None if it was not.
    """

    def __init__(self, cells: list[Cell], modes: list[str], plan: Callable[[Cell, str], Run], slots: list[str]):
        self.modes, self.plan, self.slots = modes, plan, deque(slots)
        on_cpu = len(slots) > 1 and not any(slots)
        self.threads = max(1, (os.cpu_count() or 1) // len(slots)) if on_cpu else None
        self.children: list[Child] = []
        self.done, self.failed = 0, {}
        self.interrupted: float | None = None
        self.signals_sent = 0
        self.waiting = deque((cell, modes[0]) for cell in cells)

    def run(self) -> None:
        """Run all cells, or until a signal interrupts, which stops those that are running."""
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What is ignored from the outset, as under nohup, stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                handlers[number] = signal.signal(number, self._interrupt)
        try:
            while self.children or (self.waiting and self.interrupted is None):
                while self.waiting and self.slots and self.interrupted is None:
                    self._start(*self.waiting.popleft())
                if self.interrupted is not None:
                    self._stop()
                time.sleep(POLL)
                for child in self.children.copy():
                    if child.process.poll() is not None:
                        self._end(child)
        finally:
            # There are some only after an exception, such as that of a closed pipe.
            for child in self.children:
                send(child, signal.SIGTERM)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: Any) -> None:
        # It may come between any two instructions, so that it only takes note.
        if self.interrupted is None:
            self.interrupted = time.monotonic()

    def _start(self, cell: Cell, mode: str) -> None:
        try:
            run = self.plan(cell, mode)
            if is_finished(run):
                self._settle(cell, mode, "finished before")
                return
            child = launch(run, self.slots[0], self.threads)
        except (UserError, OSError) as error:
            self.failed[cell.name] = str(error)
            self._say(cell, mode, f"FAILED: {error}")
            return
        self.slots.popleft()
        self.children.append(child)
        self._say(cell, mode, f"started{f' on GPU {child.gpu}' if child.gpu else ''}, log in {run.log}")

    def _end(self, child: Child) -> None:
        run, code = child.run, child.process.returncode
        self.children.remove(child)
        self.slots.append(child.gpu)
        try:
            error = None if code == 0 and is_finished(run) else last_error(child)
            if code == 0 and error is not None:
                error = f"{run.cell.script}.py ended without metrics.json: {error}"
        except (UserError, OSError) as problem:
            error = str(problem)
        if error is None:
            self._settle(run.cell, run.mode, f"finished after {time.monotonic() - child.start:.0f} s")
        elif self.interrupted is not None:
            self.waiting.appendleft((run.cell, run.mode))
            self._say(run.cell, run.mode, "stopped")
        else:
            self.failed[run.cell.name] = f"{error} (log in {run.log})"
            self._say(run.cell, run.mode, f"FAILED: {error}")

    def _settle(self, cell: Cell, mode: str, message: str) -> None:
        """A mode of a cell is complete: the next one comes first."""
        left = self.modes[self.modes.index(mode) + 1 :]
        if left:
            self.waiting.appendleft((cell, left[0]))
        else:
            self.done += 1
        self._say(cell, mode, message)

    def _stop(self) -> None:
        """Send the signals that are due."""
        due = int((time.monotonic() - self.interrupted) // GRACE) + 1
        for number in STOP[self.signals_sent : due]:
            print(f"stopping the {len(self.children)} that run ({number.name})", flush=True)
            for child in self.children:
                send(child, number)
            self.signals_sent += 1

    def _say(self, cell: Cell, mode: str, message: str) -> None:
        print(f"[{self.state()}] {cell.name}, {mode}: {message}", flush=True)

    def state(self) -> str:
        running = f"{len(self.children)} running, " if self.children else ""
        return f"{self.done} done, {len(self.failed)} failed, {running}{len(self.waiting)} left"


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, each by its name in CUDA_VISIBLE_DEVICES."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = re.split(r"\s*,\s*", named.strip()) if named else [str(index) for index in range(count)]
    return names[:count]


def make_slots(args: argparse.Namespace) -> list[str]:
    """For each cell that may run at a time, the GPU that it sees; empty on the CPU.

    Raises:
        UserError: if the arguments ask for a GPU that is not there, or for GPUs and none.
    """
    on_gpus = args.gpus is not None or args.jobs_per_gpu is not None
    if args.jobs is not None:
        if on_gpus:
            raise UserError("--jobs is the number of cells at a time without GPUs; on GPUs, it is --jobs_per_gpu")
        return [""] * args.jobs
    gpus = visible_gpus()
    if not gpus:
        if on_gpus:
            raise UserError("--gpus and --jobs_per_gpu: there is no GPU here; --jobs runs several cells on the CPU")
        return [""]
    for gpu in args.gpus or []:
        if gpu not in gpus:
            raise UserError(f"--gpus {gpu}: there is no such GPU here, only {', '.join(gpus)}")
    return list(dict.fromkeys(args.gpus or gpus)) * (args.jobs_per_gpu or 1)


def print_commands(
    cells: list[Cell], modes: list[str], plan: Callable[[Cell, str], Run], finished: list[Cell]
) -> None:
    for cell, mode in itertools.product(cells, modes):
        print(f"# {cell.name}, {mode}")
        if mode == "eval" and "train" in modes and cell not in finished:
            print("# when it is trained")
            continue
        try:
            run = plan(cell, mode)
            print("# finished before" if is_finished(run) else shlex.join(run.command))
        except UserError as error:
            print(f"# {error}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = RecordsParser(__doc__)
    parser.add_argument("matrix", help="YAML file of the matrix.")
    parser.add_argument("--tasks", nargs="+", help="Only these tasks.")
    parser.add_argument("--models", nargs="+", help="Only these models.")
    parser.add_argument("--depths", nargs="+", type=int, help="Only these depths, of tasks that have depths.")
    parser.add_argument("--blocks", nargs="+", type=int, help="Only these block sizes, of tasks that have them.")
    parser.add_argument("--seeds", nargs="+", type=int, help="Seeds, if not those of the matrix.")
    parser.add_argument("--output_dir", help="Folder of the cells, if not that of the matrix.")
    parser.add_argument("--mode", choices=MODES, default="train", help="train, eval, or both one after the other.")
    parser.add_argument(
        "--checkpoint",
        help="What to evaluate of each cell: newest, its newest checkpoint or, without checkpoints, its saved model"
        " (the default), saved, or checkpoint-N. For a single cell, also any folder or id on the Hub.",
    )
    parser.add_argument("--gpus", nargs="+", help="GPUs to use, as in CUDA_VISIBLE_DEVICES. Defaults to all.")
    parser.add_argument("--jobs_per_gpu", type=positive, help="Cells that share a GPU. Defaults to 1.")
    parser.add_argument("--jobs", type=positive, help="Cells at a time without GPUs. Defaults to 1.")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands and run nothing.")
    args = parser.parse_args(argv)
    if args.checkpoint and args.mode == "train":
        raise UserError("--checkpoint says what to evaluate: add --mode eval")
    return args


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    argv, extra = split_extra(argv)
    args = parse_arguments(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start the matrix as one process, with python: it starts the processes of the cells")
    slots = make_slots(args)
    matrix = load_matrix(args.matrix)
    if args.seeds is not None:
        check_numbers(args.seeds, 0, "--seeds")
    output_dir = Path(args.output_dir or matrix.output_dir)
    cells = choose(make_cells(matrix, args.matrix, output_dir, args.seeds or matrix.seeds), args)
    check_extra(extra, cells)
    modes, checkpoint = MODES[args.mode], args.checkpoint or "newest"
    if not re.fullmatch(r"newest|saved|checkpoint-\d+", checkpoint) and (len(cells) > 1 or args.mode == "both"):
        raise UserError(
            f"--checkpoint {checkpoint} is one model, for --mode eval of one cell, but {len(cells)} are chosen: choose"
            " with --tasks, --models, --depths, --blocks and --seeds"
        )

    def plan(cell: Cell, mode: str) -> Run:
        return training(cell, extra) if mode == "train" else evaluation(cell, extra, checkpoint)

    # Mistakes in recipes and values show here, before anything runs.
    finished = finished_cells(cells, extra) if "train" in modes else []
    if args.dry_run:
        print_commands(cells, modes, plan, finished)
        return
    trained = f", {len(finished)} of them trained before" if "train" in modes else ""
    print(f"{len(cells)} cells{trained}, up to {len(slots)} at a time", flush=True)
    # Those that are finished come first, so that they soon count as done.
    scheduler = Scheduler(sorted(cells, key=lambda cell: cell not in finished), modes, plan, slots)
    scheduler.run()
    print(scheduler.state())
    for name, reason in scheduler.failed.items():
        print(f"failed: {name}: {reason}")
    if scheduler.interrupted is not None:
        print("the same command goes on from here", flush=True)
        raise KeyboardInterrupt
    if scheduler.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
