"""What a matrix of trainings holds: its YAML file, its cells, and the run of a script that each of them stands for."""

import argparse
import importlib
import itertools
import json
import os
import re
import string
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from arguments import UserError, closest, read_yaml, resolve
from checkpoints import checkpoints, last_complete_checkpoint
from model_card import read_mapping
from models import find
from run_records import parse_json, read


SCRIPTS = Path(__file__).parent
TASK_SCRIPTS = ("run_clm", "run_nli")
# Arguments that the matrix gives to each cell, and those of them that say where a run is, not what it is.
OWN = ("output_dir", "seed", "do_train", "resume_from_checkpoint")
PLACES = ("output_dir", "resume_from_checkpoint")


@dataclass
class Model:
    """How a model of a task is trained: a recipe, and arguments that take the place of the recipe's."""

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """A script and the models that it trains, at each of the depths and block sizes if there are any."""

    script: str
    models: dict[str, Model]
    depths: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Matrix:
    """Content of the YAML file."""

    output_dir: str
    tasks: dict[str, Task]
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class Cell:
    """A model of a task at one depth, block size and seed.

    Attributes:
        depth: None where the task has no depths; so with `block`.
        flags: the overrides as arguments of the script.
    """

    task: str
    model: str
    depth: int | None
    block: int | None
    seed: int
    script: str
    recipe: str
    flags: list[str]
    output_dir: Path

    @property
    def group(self) -> str:
        """The name without the seed."""
        depth = [] if self.depth is None else [f"{self.depth}l"]
        block = [] if self.block is None else [f"L{self.block}"]
        return "_".join([self.task, self.model, *depth, *block])

    @property
    def name(self) -> str:
        return f"{self.group}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name


@dataclass
class Run:
    """The training or an evaluation of a cell.

    Attributes:
        mode: `train` or `eval`.
        folder: its output_dir.
        argv: arguments of the script.
        places: those of them that may change without making another run of it.
    """

    cell: Cell
    mode: str
    folder: Path
    argv: list[str]
    places: tuple[str, ...] = PLACES

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(SCRIPTS / f"{self.cell.script}.py"), *self.argv]

    @property
    def log(self) -> Path:
        return self.folder / f"{self.mode}.log"


def load_matrix(path: str) -> Matrix:
    """
    Raises:
        UserError: if the file cannot be read, a key is unknown or missing, or a value is of the wrong kind.
    """
    matrix = build(Matrix, read_yaml(path, "matrix"), path)
    check_numbers(matrix.seeds, 0, f"{path}: seeds")
    if not matrix.seeds:
        raise UserError(f"{path}: seeds is empty")
    for name in matrix.tasks:
        where = f"{path}: tasks: {name}"
        task = matrix.tasks[name] = build(Task, matrix.tasks[name], where)
        if task.script not in TASK_SCRIPTS:
            raise UserError(f"{where}: script {task.script}: {closest(task.script, TASK_SCRIPTS)}")
        check_numbers(task.depths, 1, f"{where}: depths")
        check_numbers(task.blocks, 1, f"{where}: blocks")
        task.models = {model: build(Model, task.models[model], f"{where}: models: {model}") for model in task.models}
        for part in (name, *task.models):
            if not re.fullmatch(r"\w[\w.-]*", str(part)):
                raise UserError(f"{where}: {part} cannot be part of a folder's name: use letters, digits, _, - and .")
    return matrix


def build(kind: type, content: Any, where: str) -> Any:
    """Instance of a dataclass from the mapping that a file holds at `where`.

    Raises:
        UserError: if it is not a mapping, a key is unknown or missing, or a value is of the wrong kind.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a mapping `name: value`, not {content!r}")
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key}: {closest(key, hints)}")
        wanted = get_origin(hints[key]) or hints[key]
        if not isinstance(value, wanted):
            word = {dict: "a mapping", list: "a list", str: "text"}[wanted]
            raise UserError(f"{where}: {key} must be {word}, not {value!r}")
    for item in fields(kind):
        if item.default is MISSING and item.default_factory is MISSING and not content.get(item.name):
            raise UserError(f"{where}: {item.name} is missing")
    return kind(**content)


def check_numbers(values: list, least: int, where: str) -> None:
    """Raise a UserError if the values are not different integers of at least `least`."""
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{where}: {value!r} must be an integer of at least {least}")
        if values.count(value) > 1:
            raise UserError(f"{where}: {value} is given twice")


def make_cells(matrix: Matrix, source: str, output_dir: Path, seeds: list[int]) -> list[Cell]:
    """All cells of the matrix that the file `source` holds, seed by seed.

    Raises:
        UserError: if a recipe is missing, overrides are impossible, or two cells have one name or are one run.
    """
    cells = []
    for seed, (name, task) in itertools.product(seeds, matrix.tasks.items()):
        for model, depth, block in itertools.product(task.models, task.depths or [None], task.blocks or [None]):
            where = f"{source}: tasks: {name}: models: {model}"
            point = {key: value for key, value in (("depth", depth), ("block", block)) if value is not None}
            flags = to_flags(fill({**task.overrides, **task.models[model].overrides}, point, where), where)
            check_flags(flags, task.script, where)
            recipe = find_recipe(task.models[model].recipe, where)
            cells.append(Cell(name, model, depth, block, seed, task.script, recipe, flags, output_dir))
    names, runs = set(), {}
    for cell in cells:
        if cell.name in names:
            raise UserError(f"{source}: two cells are named {cell.name}: rename a task or a model")
        run = (cell.script, cell.recipe, *cell.flags, cell.seed)
        if run in runs:
            raise UserError(
                f"{source}: {runs[run]} and {cell.name} would be one and the same run: write $depth or $block where"
                " their overrides differ"
            )
        names.add(cell.name)
        runs[run] = cell.name
    return cells


def choose(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line chooses. Tasks without depths, or without blocks, are not narrowed by them.

    Raises:
        UserError: if it names what they do not have.
    """
    for attribute in ("task", "model", "depth", "block"):
        wanted = getattr(args, f"{attribute}s")
        if wanted is None:
            continue
        allowed = {getattr(cell, attribute) for cell in cells} - {None}
        for value in wanted:
            if not allowed:
                raise UserError(f"--{attribute}s {value}: the tasks that are chosen have no {attribute}s")
            if value not in allowed:
                raise UserError(f"--{attribute}s {value}: {closest(value, map(str, allowed))}")
        cells = [cell for cell in cells if getattr(cell, attribute) in (None, *wanted)]
    return cells


def find_recipe(name: str, where: str) -> str:
    """The recipe of that name, here or in this repository."""
    for path in (Path(name), SCRIPTS.parent / name):
        if path.is_file():
            return str(path)
    raise UserError(f"{where}: there is no recipe {name}")


def fill(value: Any, point: dict[str, int], where: str) -> Any:
    """The overrides, or a part of them, with the values of a cell in place of $depth and $block.

    Raises:
        UserError: if another name follows a $.
    """
    if isinstance(value, dict):
        return {name: fill(member, point, where) for name, member in value.items()}
    if isinstance(value, list):
        return [fill(member, point, where) for member in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    try:
        text = string.Template(value).substitute(point)
    except (KeyError, ValueError) as error:
        allowed = " or ".join(f"${name}" for name in point) or "no name"
        raise UserError(f"{where}: {value}: here, it can be {allowed}; $$ stands for $ itself") from error
    # A number stays a number.
    return int(text) if text.isdecimal() else text


def to_flags(overrides: dict[str, Any], where: str) -> list[str]:
    flags = []
    for name, value in overrides.items():
        if value is None:
            raise UserError(f"{where}: the override {name} has no value")
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def flag_name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def check_flags(flags: list[str], script: str, where: str) -> None:
    """
    Raises:
        UserError: if one is no argument of the script, or is the matrix's own.
    """
    types = importlib.import_module(script).ARGUMENTS
    names = {item.name for kind in types for item in fields(kind) if item.init}
    for flag in flags:
        name = flag_name(flag)
        if not flag.startswith("--"):
            continue
        if name in OWN:
            raise UserError(f"{where}: {name} belongs to each cell alone: use --output_dir, --seeds or --mode instead")
        if name not in names and name.removeprefix("no_") not in names:
            raise UserError(f"{where}: {script}.py has no argument {name}: {closest(name, names)}")


def check_extra(extra: list[str], cells: list[Cell]) -> None:
    """Raise a UserError if what follows `--` is not for the script of every cell."""
    if extra and not extra[0].startswith("--"):
        raise UserError(f"after --, {extra[0]} does not belong to a flag")
    if "model_name_or_path" in map(flag_name, extra):
        raise UserError("after --, model_name_or_path would give every cell one model: name it with --checkpoint")
    for script in dict.fromkeys(cell.script for cell in cells):
        check_flags(extra, script, "after --")


def training(cell: Cell, extra: list[str]) -> Run:
    own = [f"--seed={cell.seed}", f"--output_dir={cell.folder}", "--do_train=true", "--resume_from_checkpoint=true"]
    return Run(cell, "train", cell.folder, [cell.recipe, *cell.flags, *extra, *own])


def evaluation(cell: Cell, extra: list[str], checkpoint: str) -> Run:
    """The evaluation of a model with the data and the batches of a cell.

    Args:
        checkpoint: `newest`, `saved` or `checkpoint-N` in the cell's folder, or else a folder or id on the Hub.

    Raises:
        UserError: if the cell has no such checkpoint.
    """
    model, places = find_checkpoint(cell, checkpoint), (*PLACES, "model_name_or_path")
    if model is None:
        model, places = find("--checkpoint", checkpoint), PLACES
        label = re.sub(r"[^\w.-]+", "_", checkpoint)
    else:
        label = "saved" if model == cell.folder else model.name
    argument_types = importlib.import_module(cell.script).ARGUMENTS
    replaced = {"model_name_or_path", *argument_types[0].REPLACES["model_name_or_path"]}
    own = [f"--seed={cell.seed}", f"--model_name_or_path={model}", "--do_train=false"]
    folder = cell.folder / f"{cell.group}_at_{label}_seed{cell.seed}"
    if os.path.isdir(model) and not any(Path(model).glob("tokenizer*")):
        # Converted weights may have come alone.
        trained = resolve(argument_types, training(cell, extra).argv)
        if name := trained.get("tokenizer_name") or trained.get("backbone_name_or_path"):
            own.append(f"--tokenizer_name={name}")
    argv = [cell.recipe, *without([*cell.flags, *extra], replaced), *own, f"--output_dir={folder}"]
    return Run(cell, "eval", folder, argv, places)


def find_checkpoint(cell: Cell, checkpoint: str) -> Path | None:
    """The folder of a cell's own checkpoint; None if the name is not that of one.

    Raises:
        UserError: if the cell does not have it.
    """
    saved = cell.folder if (cell.folder / "config.json").is_file() else None
    if checkpoint == "newest":
        newest = last_complete_checkpoint(cell.folder)
        found = Path(newest) if newest else saved
    elif checkpoint == "saved":
        found = saved
    elif re.fullmatch(r"checkpoint-\d+", checkpoint):
        found = next((Path(folder) for folder in checkpoints(cell.folder) if Path(folder).name == checkpoint), None)
    else:
        return None
    if found is None:
        there = ", ".join(Path(folder).name for folder in checkpoints(cell.folder)) or "none"
        wanted = "complete checkpoint" if checkpoint == "newest" else f"{checkpoint} model"
        raise UserError(f"{cell.folder} has no {wanted}: train the cell first; its checkpoints: {there}")
    return found


def without(flags: list[str], names: set[str]) -> list[str]:
    """The flags, with their values, but those of the given names."""
    kept, keep = [], True
    for flag in flags:
        if flag.startswith("--"):
            keep = flag_name(flag) not in names
        kept += [flag] if keep else []
    return kept


def is_finished(run: Run) -> bool:
    """Whether the folder of a run holds its complete record, which scripts write last of all.

    Raises:
        UserError: if the folder holds a record, or checkpoints, of other arguments, or a broken record, or if an
            argument or the recipe is impossible.
    """
    arguments = resolve(importlib.import_module(run.cell.script).ARGUMENTS, run.argv)
    metrics = run.folder / "metrics.json"
    if not metrics.exists() and not checkpoints(run.folder):
        return False
    recorded = read_mapping(run.folder / "recipe.yaml")
    # As YAML reads what the script writes.
    arguments = yaml.safe_load(yaml.safe_dump(arguments))
    names = [name for name in {**recorded, **arguments} if name not in run.places]
    changed = [
        f"{name} is {recorded.get(name, 'not given')} there and would be {arguments.get(name, 'not given')}"
        for name in names
        if recorded.get(name) != arguments.get(name)
    ]
    if changed:
        raise UserError(
            f"{run.folder} holds a run of other arguments: {'; '.join(changed)}. Remove the folder, or choose another"
            " --output_dir"
        )
    if metrics.exists():
        parse_json(read(metrics), str(metrics))
    return metrics.exists()


def finished_cells(cells: list[Cell], extra: list[str]) -> list[Cell]:
    """The cells whose training is complete.

    Raises:
        UserError: if arguments are impossible, or folders hold runs of others, which are neither kept nor replaced.
    """
    finished, errors = [], {}
    for cell in cells:
        try:
            if is_finished(training(cell, extra)):
                finished.append(cell)
        except UserError as error:
            errors[cell.name] = str(error)
    if errors:
        (first, message), *others = errors.items()
        more = f". The same with {', '.join(name for name, _ in others)}" if others else ""
        raise UserError(f"{first}: {message}{more}")
    return finished
