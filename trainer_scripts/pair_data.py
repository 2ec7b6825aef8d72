"""Pairs of sentences with labels: load them, bring their labels into one form, tokenise them."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from arguments import UserError, closest
from data_files import (
    SPLITS,
    DataFileArguments,
    check_column,
    check_split,
    check_text_column,
    load_splits,
    map_batches,
    with_validation,
)
from datasets import ClassLabel, Dataset, Value
from entailment_pairs import load_entailment_pairs
from models import mapping
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

EMBEDDED = "entailment_pairs"
# Labels that mean that there is none, unless a class is named so.
NO_LABEL = {"", "-", "-1"}
INTEGER = re.compile(r"\s*([+-]?\d+)(\.0*)?\s*")


@dataclass
class PairArguments(DataFileArguments):
    """Which pairs to train and evaluate on, where their columns are, and what their labels mean.

    The embedded data, `entailment_pairs`, are sentences whose relation follows from their meaning.
    """

    EMBEDDED: ClassVar[str] = EMBEDDED
    SUFFIXES: ClassVar[tuple[str, ...]] = ("parquet", "csv", "json", "jsonl")

    premise_column: str = field(default="premise", metadata={"help": "Column of the first texts."})
    hypothesis_column: str = field(default="hypothesis", metadata={"help": "Column of the second texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels: texts, integers or booleans."})
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the classes in the order of their ids. Defaults to those that the data set brings, or to"
            " the labels themselves in alphabetical order."
        },
    )
    label_mapping: dict | str | None = field(
        default=None,
        metadata={
            "help": "Name of the class that each value in the label column stands for; JSON on the command line."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens to which longer pairs are cut, from the longer text first. By default none are cut, and"
            " all must fit into the model."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.label_mapping = mapping("label_mapping", self.label_mapping)
        columns = (self.premise_column, self.hypothesis_column, self.label_column)
        if len(set(columns)) < 3:
            raise UserError(f"premise_column, hypothesis_column and label_column must differ: {', '.join(columns)}")
        if self.label_mapping and self.class_names:
            for value, name in self.label_mapping.items():
                if name not in self.class_names:
                    raise UserError(f"label_mapping: {value} is mapped to {name}: {closest(name, self.class_names)}")
        self.check_least("max_length", 1)


@dataclass
class Pairs:
    """Labelled pairs.

    Attributes:
        splits: data sets of the columns `premise`, `hypothesis`, `label` (id of the class) and `index` (number of the
            row in the source, counted from 0).
        label_names: names of the classes in the order of their ids.
        unlabelled: number of rows of each split that were left out because they have no label.
    """

    splits: dict[str, Dataset]
    label_names: list[str]
    unlabelled: dict[str, int]


def load_pairs(args: PairArguments, splits: list[str]) -> Pairs:
    """Load the given splits; a missing `validation` is taken from the first rows of `train`.

    Rows with the label -1, `-` or none at all are left out, unless `class_names` or `label_mapping` names it.

    Raises:
        UserError: if data cannot be found or read, a column is missing or of the wrong kind, a text is missing, a
            label is impossible, a split has no labelled rows, or a validation split taken from `train` lacks a class.
    """
    # As text, in which +1, 01 or TRUE are still as the file has them, and as names may be given.
    data = load_splits(args, load_entailment_pairs, csv={"converters": {args.label_column: str}})
    data = {split: data[split] for split in SPLITS if split in data}
    for split, rows in data.items():
        check_column(rows, args.label_column, args.source(split))
        if not isinstance(rows.features[args.label_column], (ClassLabel, Value)):
            raise UserError(
                f"column {args.label_column} of {args.source(split)} holds {rows.features[args.label_column]}, neither"
                " text nor integers"
            )
    labels = {split: read_labels(rows, args) for split, rows in data.items()}
    names = class_names(args, data, labels)

    pairs, unlabelled = {}, dict.fromkeys(splits, 0)
    for split, rows in data.items():
        if split in splits or (split == "train" and "validation" not in data):
            pairs[split] = _labelled(rows, label_ids(labels[split], names, split, args), split, args)
            unlabelled[split] = len(rows) - len(pairs[split])
    pairs = with_validation(pairs, args.validation_split_percentage)
    for split in splits:
        check_split(split, pairs)
        if len(pairs[split]) == 0:
            raise UserError(f"the {split} data of {args.source(split)} are empty: they hold no row with a label")
    if "validation" in splits and "validation" not in data:
        _check_classes(pairs, names, args)
    for split in splits:
        if (limit := args.limit(split)) is not None:
            pairs[split] = pairs[split].select(range(min(limit, len(pairs[split]))))
    return Pairs({split: pairs[split] for split in splits}, names, {split: unlabelled[split] for split in splits})


def read_labels(rows: Dataset, args: PairArguments) -> list[Any]:
    """What the column of labels holds, with the data set's own names in place of numbers, unless others are given."""
    labels, feature = rows[args.label_column][:], rows.features[args.label_column]
    if not isinstance(feature, ClassLabel):
        return labels
    known = args.label_mapping or args.class_names or feature.names
    names = dict(enumerate(feature.names)) if {*feature.names} <= {*known} else {}
    return [names.get(label, label) for label in labels]


def spellings(value: Any) -> list[str]:
    """The ways to write a label: as the data have it first, and in its plainest form last. None of an empty cell."""
    # Tables also mark what is missing by NaN.
    if value is None or value != value:
        return []
    text = str(value)
    if text.lower() in ("true", "false"):
        return [text, text.lower(), text.upper(), text.capitalize()]
    # Tables store integers as floats where some are missing.
    number = INTEGER.fullmatch(text)
    return [text, str(int(number.group(1)))] if number else [text]


def is_missing(spelled: list[str]) -> bool:
    """Whether a label that no class is named after means that there is none."""
    return not spelled or not NO_LABEL.isdisjoint(spelled)


def class_names(args: PairArguments, data: Mapping[str, Dataset], labels: Mapping[str, list[Any]]) -> list[str]:
    """Names of the classes in the order of their ids: those given, those of the data set, or the labels themselves.

    Raises:
        UserError: if they cannot be told, or are fewer than two.
    """
    features = [rows.features[args.label_column] for rows in data.values()]
    spelled = [spellings(value) for value in set().union(*labels.values())]
    values = {texts[-1] for texts in spelled if not is_missing(texts)}
    if args.class_names:
        names = args.class_names
    elif args.label_mapping:
        names = list(dict.fromkeys(args.label_mapping.values()))
    elif features and isinstance(features[0], ClassLabel):
        names = features[0].names
    elif not any(INTEGER.fullmatch(value) for value in values):
        names = sorted(values)
    elif values == {str(i) for i in range(len(values))}:
        names = [f"LABEL_{i}" for i in range(len(values))]
    else:
        found = ", ".join(sorted(values)[:10])
        raise UserError(
            f"column {args.label_column} holds the labels {found}, which are not 0, 1, 2, ...: name the classes in the"
            " order of their ids with class_names, or map labels to names with label_mapping"
        )
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"names of classes must be different texts, not {', '.join(map(str, names))}")
    if len(names) < 2:
        raise UserError(f"a classifier needs at least two classes, the data have {len(names)}: {', '.join(names)}")
    return list(names)


def ids_by_label(names: list[str], label_mapping: Mapping[str, str] | None) -> dict[str, int]:
    """The class that each label stands for: by `label_mapping`, or else by the name of a class, or else by its id."""
    if label_mapping:
        return {label: names.index(name) for label, name in label_mapping.items()}
    ids = {name: i for i, name in enumerate(names)}
    # Where names are numbers, a number that is no name is a mistake and no id.
    if not any(INTEGER.fullmatch(name) for name in names):
        ids.update({str(i): i for i in range(len(names))})
    return ids


def label_ids(labels: list[Any], names: list[str], split: str, args: PairArguments) -> list[int | None]:
    """Id of each label's class; None where there is no label.

    Raises:
        UserError: if a label is none of the classes.
    """
    known, ids = ids_by_label(names, args.label_mapping), {}
    for row, value in enumerate(labels):
        if value in ids:
            continue
        spelled = spellings(value)
        text = next((text for text in spelled if text in known), None)
        if text is None and not is_missing(spelled):
            where = f"row {row} (counted from 0) of the {split} data of {args.source(split)} has the label {value}"
            if args.label_mapping:
                raise UserError(f"{where}, which is not in label_mapping: {closest(value, args.label_mapping)}")
            by_id = f", nor an id from 0 to {len(names) - 1}" if len(known) > len(names) else ""
            raise UserError(
                f"{where}, which is none of the {len(names)} classes {', '.join(names)}{by_id}: name all classes with"
                " class_names, or map labels to names with label_mapping"
            )
        ids[value] = known.get(text)
    return [ids[value] for value in labels]


def _labelled(rows: Dataset, ids: list[int | None], split: str, args: PairArguments) -> Dataset:
    """The rows that have a label, with the columns of `Pairs`."""
    columns = {args.premise_column: "premise", args.hypothesis_column: "hypothesis"}
    for column in columns:
        check_text_column(rows, column, args.source(split))
    rows = rows.select_columns(list(columns)).rename_columns(columns)
    rows = rows.add_column("label", [-1 if i is None else i for i in ids]).add_column("index", range(len(ids)))
    if None in ids:
        rows = rows.select([row for row, i in enumerate(ids) if i is not None])
    for column, name in columns.items():
        texts = rows[name][:]
        if None in texts:
            row = rows["index"][texts.index(None)]
            raise UserError(
                f"row {row} (counted from 0) of the {split} data of {args.source(split)} has no text in the column"
                f" {column}"
            )
    return rows


def _check_classes(pairs: Mapping[str, Dataset], names: list[str], args: PairArguments) -> None:
    """
    Raises:
        UserError: if the validation split, the first rows of `train`, lacks a class of the rest.
    """
    if missing := {*pairs["train"]["label"][:]} - {*pairs["validation"]["label"][:]}:
        raise UserError(
            f"the first {len(pairs['validation'])} rows of {args.source('train')}, which become validation data, have"
            f" no row of {', '.join(names[i] for i in sorted(missing))}: shuffle the rows if they are sorted by label,"
            " name a validation_file, or raise validation_split_percentage"
        )


def warn_without_separator(tokenizer: PreTrainedTokenizerBase) -> None:
    """Log a warning if nothing tells the model where the premise ends and the hypothesis begins."""
    if tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False):
        logger.warning(
            "%s puts no special token between the two texts: premise and hypothesis run together. End every premise"
            " with a separator in the data, or name a tokenizer that separates them with tokenizer_name",
            type(tokenizer).__name__,
        )


def check_max_length(args: PairArguments, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
    """
    Args:
        args: the arguments with `max_length`.
        tokenizer: the model's tokenizer.
        positions: number of tokens that the model has positions for; None if it takes any number.

    Raises:
        UserError: if `max_length` exceeds the model's positions, or leaves no room for text.
    """
    if args.max_length is None:
        return
    if positions is not None and args.max_length > positions:
        raise UserError(f"max_length={args.max_length} exceeds the {positions} positions of the model")
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if args.max_length < least:
        raise UserError(
            f"max_length={args.max_length} must be at least {least}: the tokenizer adds {least - 2} special tokens"
        )


def tokenize_pairs(
    pairs: Pairs,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    label_names: list[str],
    positions: int | None,
    args: PairArguments,
) -> Dataset:
    """The rows of a split as inputs of a model.

    Args:
        pairs: the pairs.
        split: which of their splits.
        tokenizer: the model's tokenizer.
        label_names: the classes in the order of the model's ids.
        positions: number of tokens that the model has positions for; None if it takes any number.
        args: the arguments with `max_length`.

    Returns:
        a data set with the tokenizer's columns, `labels`, and `length`, the tokens of a pair before it was cut.

    Raises:
        UserError: if a pair has no token, or more than the model has positions for and `max_length` is not set.
    """
    max_length = args.max_length
    ids = [label_names.index(name) for name in pairs.label_names]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = batch["premise"], batch["hypothesis"]
        encoding = tokenizer(*texts, verbose=False)
        lengths = [len(row) for row in encoding["input_ids"]]
        if max_length is not None and max(lengths) > max_length:
            encoding = tokenizer(*texts, truncation="longest_first", max_length=max_length, verbose=False)
        return {**encoding, "labels": [ids[label] for label in batch["label"]], "length": lengths}

    rows = pairs.splits[split]
    encoded = map_batches(rows, encode, args)
    lengths = np.array(encoded["length"][:])
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    where = f"of the {split} data of {args.source(split)}"
    if max_length is None and positions is not None and lengths[longest] > positions:
        raise UserError(
            f"row {rows[longest]['index']} (counted from 0) {where} has {lengths[longest]} tokens, more than the"
            f" {positions} positions of the model: set max_length to cut longer pairs"
        )
    if lengths[shortest] == 0:
        raise UserError(f"row {rows[shortest]['index']} (counted from 0) {where} has no token: both texts are empty")
    return encoded
