"""Which checkpoint of an interrupted run is safe to resume, and a log of the run that survives the interruption."""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


# What the Trainer calls the model under FSDP: a folder of shards, or one file with `FULL_STATE_DICT`.
FSDP_SHARDS = "pytorch_model_fsdp_0"
FSDP_WEIGHTS = "pytorch_model_fsdp.bin"


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
    deleted may lack any file. Hence each file is looked at. Under FSDP, weights and optimizer are folders of shards,
    or with `FULL_STATE_DICT` files of other names. Checkpoints without optimizer (`save_only_model`) and those of
    DeepSpeed do not count.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        processes = state.get("stateful_callbacks", {}).get("RunLog", {}).get("attributes", {}).get("processes", 1)
        archives = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
        archives.append("scheduler.pt")
        if (folder / FSDP_SHARDS).exists():
            complete = all(_shards_are_complete(folder / name) for name in (FSDP_SHARDS, "optimizer_0"))
        elif (folder / FSDP_WEIGHTS).exists():
            complete, archives = True, [*archives, FSDP_WEIGHTS, "optimizer.bin"]
        else:
            complete, archives = _weights_are_complete(folder), [*archives, "optimizer.pt"]
        return complete and all(_archive_is_complete(folder / name) for name in archives)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def best_checkpoint(folder: str | os.PathLike) -> str | None:
    """Folder of the best checkpoint, as the complete checkpoint `folder` knows it; None if there is none.

    The state names it with the path that the run had then. One of that name beside `folder` counts before it, so that
    a run can be moved, or copied.
    """
    best = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    if best is None:
        return None
    beside = Path(folder).parent / Path(best).name
    return next((str(path) for path in (beside, best) if os.path.isdir(path)), None)


def is_of_fsdp(folder: str | os.PathLike) -> bool:
    """Whether the checkpoint was written under FSDP, which alone can resume it."""
    return any((Path(folder) / name).exists() for name in (FSDP_SHARDS, FSDP_WEIGHTS))


def _shards_are_complete(folder: Path) -> bool:
    """Whether the files are there, and whole, that the metadata of `torch.distributed.checkpoint` name.

    The metadata are written last. They are a pickle, which could run any code when loaded, so that names are searched
    in its bytes; the sizes in it are not compared.
    """
    metadata = (folder / ".metadata").read_bytes()
    names = {name.decode() for name in re.findall(rb"__\d+_\d+\.distcp", metadata)}
    # A pickle ends with a full stop.
    return metadata.endswith(b".") and bool(names) and all(_archive_is_complete(folder / name) for name in names)


def _archive_is_complete(path: Path) -> bool:
    """torch.save writes a zip archive; one, or several in a row, end with the 22 bytes of an archive's directory."""
    with open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)
        return file.read(4) == b"PK\x05\x06"


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


class KeepBest(TrainerCallback):
    """Of a run that is resumed in another folder, the best checkpoint so far, which the Trainer takes for gone.

    Args:
        resumed: the checkpoint that it is resumed from.
    """

    def __init__(self, resumed: str):
        self.resumed = resumed

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = best_checkpoint(self.resumed)


class RunLog(TrainerCallback):
    """Keeps `log.jsonl` in the output folder equal to the Trainer's log history, one JSON object a line.

    The history is part of every checkpoint, so a resumed run goes on with the log of the run it resumes.
    """

    in_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True
        # Tells `is_complete` how many random states a checkpoint of this run has.
        state.stateful_callbacks["RunLog"] = {"args": {}, "attributes": {"processes": args.world_size}}

    def on_train_end(self, args, state, control, **kwargs):
        self.in_training = False

    def on_evaluate(self, args, state, control, **kwargs):
        # The Trainer notes the best checkpoint before it saves it, and only if its folder exists. With shards of FSDP
        # it does not yet, or only for some processes, and in the end they would load a worse model, or none.
        if self.in_training and control.should_save:
            os.makedirs(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"), exist_ok=True)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            write_atomically(os.path.join(args.output_dir, "log.jsonl"), lines)
