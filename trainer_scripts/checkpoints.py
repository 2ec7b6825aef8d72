"""Which checkpoint of an interrupted run is safe to resume, and a log of the run that survives the interruption."""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Newest folder `checkpoint-N` in `output_dir` that was written to its end; None if there is none."""
    return next((folder for folder in checkpoints(output_dir) if is_complete(folder)), None)


def checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """Folders `checkpoint-N` in `output_dir`, complete or not, newest (largest N) first."""
    found = [
        folder for folder in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)
    ]
    return [str(folder) for folder in sorted(found, key=lambda folder: -int(folder.name.partition("-")[2]))]


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether every file that the Trainer needs to resume from the folder is there and was written to its end.

    The main process of the Trainer writes weights, optimizer, scheduler, its random state and, last of all,
    `trainer_state.json`. The other processes write their random states with no barrier after it, so the state file
    alone proves nothing about them; `RunLog` stores in it how many there are. An older checkpoint that was being
    deleted may lack any file. Hence each file is looked at. Checkpoints without optimizer (`save_only_model`) and the
    sharded ones of FSDP and DeepSpeed do not count.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        processes = state.get("stateful_callbacks", {}).get("RunLog", {}).get("attributes", {}).get("processes", 1)
        random_states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
        return _weights_are_complete(folder) and all(
            # torch.save writes a zip archive, whose directory is at the end of the file.
            zipfile.is_zipfile(folder / name)
            for name in ["optimizer.pt", "scheduler.pt", *random_states]
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _weights_are_complete(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(_safetensors_is_complete(folder / name) for name in names)


def _safetensors_is_complete(path: Path) -> bool:
    """A safetensors file is 8 bytes of header size, the JSON header with the tensors' extents, and their data."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > path.stat().st_size:
            return False
        header = json.loads(file.read(header_size))
    extents = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + header_size + max(extents, default=0)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that a crash leaves the old or the new content, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


class RunLog(TrainerCallback):
    """Keeps `log.jsonl` in the output folder equal to the Trainer's log history, one JSON object a line.

    The history is part of every checkpoint, so a resumed run goes on with the log of the run it resumes.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        # Tells `is_complete` how many random states a checkpoint of this run has.
        state.stateful_callbacks["RunLog"] = {"args": {}, "attributes": {"processes": args.world_size}}

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            write_atomically(os.path.join(args.output_dir, "log.jsonl"), lines)
