"""Command line of the training scripts: a YAML recipe, flags that override it, and one-line errors.

Every script is called as `python script.py [recipe.yaml] [--flag value ...]`. The recipe's keys and the flags are the
field names of the script's dataclasses.
"""

import difflib
import functools
import json
import logging
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


logger = logging.getLogger(__name__)

# (Hub id, configuration name) -> folder below GRASSMANN_DATA_DIR
LOCAL_COPIES = {
    ("Salesforce/wikitext", "wikitext-2-v1"): "wikitext-2",
    ("stanfordnlp/snli", None): "snli",
    ("google-bert/bert-base-uncased", None): "tokenizers/bert-base-uncased",
    ("openai-community/gpt2", None): "tokenizers/gpt2",
}


class UserError(Exception):
    """A mistake in the command line, a recipe or the data. Its message tells the user what to change."""


def exits_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's `main`: a `UserError` becomes the line `error: ...` on stderr and exit code 2, and
    an interrupt by the keyboard one line and exit code 130."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            # All processes of a distributed run meet the same mistake; one line is enough.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("error:", " ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper


def closest(name: object, allowed: Iterable[str]) -> str:
    """End of an error message about an unknown `name`: the allowed names closest to it."""
    name, allowed = str(name), sorted(allowed)
    matches = difflib.get_close_matches(name, allowed, n=3) or difflib.get_close_matches(name, allowed, n=3, cutoff=0)
    return f"did you mean {' or '.join(matches)}?"


def split_extra(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """A command line, by default that of the process, before and after its first `--`."""
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    return argv[:end], argv[end + 1 :]


def parse(dataclass_types: Iterable[type], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Parse `[recipe.yaml] [--flag value ...]` into one instance of each dataclass; flags override the recipe.

    A key set to null in the recipe keeps its default. Mappings are written as such in a recipe, and as JSON in a flag.
    A dataclass may name in `REPLACES` which keys of a recipe a flag replaces besides its own, since they are
    alternatives.

    Args:
        dataclass_types: the dataclasses, as for `HfArgumentParser`.
        argv: the arguments without the script's name. Defaults to `sys.argv[1:]`.

    Raises:
        UserError: if the recipe is missing or not a mapping, a name is unknown, a value has the wrong type, or a file
            or a package is missing that it needs.
    """
    parser, hints, flags = _prepare(dataclass_types, argv)
    # First of all, as a misspelled name is often the reason why another one seems to be missing.
    unknown = parser.parse_known_args(flags)[1]
    if unknown:
        if not unknown[0].startswith("-"):
            raise UserError(f"{unknown[0]} does not belong to a flag; a recipe comes first, before all flags")
        name = unknown[0].partition("=")[0].lstrip("-")
        raise UserError(f"unknown argument {unknown[0]}: {closest(name, hints)}")
    try:
        return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except ImportError as error:
        raise UserError(f"an argument needs a package that is not installed: {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def resolve(dataclass_types: Iterable[type], argv: list[str] | None = None) -> dict[str, Any]:
    """The recipe that a command line amounts to: all values that it or its recipe gives, access tokens left out.

    Takes what `parse` takes, and raises what it raises except for errors about values that exclude each other.
    """
    parser, hints, flags = _prepare(dataclass_types, argv)
    for action in parser._actions:
        action.default = SUPPRESS
    recipe = {}
    for name, value in vars(parser.parse_known_args(flags)[0]).items():
        if not name.endswith("_token"):
            is_json = isinstance(value, str) and value.startswith("{") and _accepts(hints[name], dict)
            recipe[name] = json.loads(value) if is_json else value
    return recipe


def _prepare(dataclass_types: Iterable[type], argv: list[str] | None) -> tuple["_Parser", dict[str, Any], list[str]]:
    """The parser, the type hints of all names, and the flags of the recipe followed by those of the command line."""
    flags = list(sys.argv[1:] if argv is None else argv)
    hints = {}
    for dataclass_type in dataclass_types:
        type_hints = get_type_hints(dataclass_type)
        hints.update({field.name: type_hints[field.name] for field in fields(dataclass_type) if field.init})
    parser = _Parser(dataclass_types, allow_abbrev=False)
    for action in parser._actions:
        # HfArgumentParser reads `str | list[str]` as one string.
        if _accepts(hints.get(action.dest), list):
            action.nargs = "+"

    if flags and not flags[0].startswith("-"):
        parser.recipe, *flags = flags
        parser.overridden = {flag.partition("=")[0] for flag in flags}
        replaced = {}
        for dataclass_type in dataclass_types:
            for name, others in getattr(dataclass_type, "REPLACES", {}).items():
                replaced.update(dict.fromkeys(others, name) if f"--{name}" in parser.overridden else {})
        # A flag of its own overrides the recipe anyway.
        replaced = {name: flag for name, flag in replaced.items() if f"--{name}" not in parser.overridden}
        # Of repeated flags the last one holds.
        flags = _recipe_to_flags(parser.recipe, hints, replaced) + flags
    return parser, hints, flags


class _Parser(HfArgumentParser):
    recipe: str | None = None
    overridden: frozenset[str] = frozenset()

    def error(self, message: str) -> None:
        flag = re.match(r"argument (--\w+)", message)
        from_recipe = self.recipe and flag and flag.group(1) not in self.overridden
        raise UserError(f"{self.recipe}: {message}" if from_recipe else message)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as the number it is in YAML 1.2, and refuses keys that are given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; messages call it `what`.

    Raises:
        UserError: if it cannot be read or holds no mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the {what} {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"the {what} {path} must be a mapping `name: value`, not a {type(content).__name__}")
    return content


def _accepts(hint: Any, container: type) -> bool:
    """Whether the type hint is, or is a union with, `container` (list or dict)."""
    return container in (hint, get_origin(hint)) or any(_accepts(member, container) for member in get_args(hint))


def _recipe_to_flags(path: str, hints: dict[str, Any], replaced: dict[str, str]) -> list[str]:
    """The recipe without the keys of `replaced`, whose values are the flags in their place."""
    recipe = read_yaml(path, "recipe")

    flags = []
    for name, value in recipe.items():
        if name not in hints:
            raise UserError(f"{path}: unknown key {name}: {closest(name, hints)}")
        for container in (list, dict):
            if isinstance(value, container) and not _accepts(hints[name], container):
                raise UserError(f"{path}: {name} takes a single value, not a {container.__name__}: {value}")
        if value is None:
            continue
        if name in replaced:
            # Of another new model, what the recipe changes in its own would be missed in silence.
            if isinstance(value, dict) and replaced[name] != "model_name_or_path":
                _warn_once(f"{path}: --{replaced[name]} also takes the place of {name}: {json.dumps(value)}")
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            # `--name=value` also carries values that start with a dash, such as -1e-3.
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def local_copy(name: str, config_name: str | None = None) -> str | None:
    """Folder below GRASSMANN_DATA_DIR that holds the Hub data set or tokenizer `name`, for machines without the Hub.

    Data sets are folders of `train.parquet`, `validation.parquet` and `test.parquet`; tokenizers are saved tokenizers.

    Returns:
        the folder, or None where the variable is not set or has no copy of `name`.

    Raises:
        UserError: if GRASSMANN_DATA_DIR is not a folder.
    """
    root = os.environ.get("GRASSMANN_DATA_DIR")
    if not root:
        return None
    if not os.path.isdir(root):
        raise UserError(f"GRASSMANN_DATA_DIR={root} is not a folder: correct it, or unset it to use the Hub")
    folder = LOCAL_COPIES.get((name, config_name))
    if folder is None or not os.path.isdir(os.path.join(root, folder)):
        return None
    path = os.path.join(root, folder)
    _log_once(f"{name}: using the copy in {path}")
    return path


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


@functools.cache
def _warn_once(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning(message)
