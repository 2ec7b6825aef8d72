"""Where the data of a training script come from: the Hub, files of the user's, or data that the script brings."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from arguments import UserError, closest, local_copy
from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError


SPLITS = ("train", "validation", "test")

_READERS = {"txt": "text", "parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv"}


@dataclass
class DataFileArguments:
    """Which data to train and evaluate on.

    Attributes:
        EMBEDDED: name of the data that the script brings, used when no others are named.
        SUFFIXES: suffixes of the data files that the script reads.
    """

    EMBEDDED: ClassVar[str]
    SUFFIXES: ClassVar[tuple[str, ...]] = tuple(_READERS)
    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        "dataset_name": ("dataset_config_name", "train_file", "validation_file", "test_file"),
        "train_file": ("dataset_name", "dataset_config_name", "validation_file", "test_file"),
        "validation_file": ("dataset_name", "dataset_config_name"),
        "test_file": ("dataset_name", "dataset_config_name"),
    }

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the Hub, or the name of the data that this script brings, which are the default when"
            " no data are named."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: .parquet, .json(l), .csv, ..."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Test data, in the same formats."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training rows that become validation where the data have none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training samples to keep."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of validation samples, and of test samples, to keep."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenisation."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again even if the result is cached."})

    def __post_init__(self):
        if self.dataset_name is not None and any(self.files.values()):
            raise UserError("name the data either with dataset_name or with train_file, validation_file, test_file")
        if self.dataset_name is None and not any(self.files.values()):
            self.dataset_name = self.EMBEDDED
        if not 0 < self.validation_split_percentage < 100:
            raise UserError(f"validation_split_percentage={self.validation_split_percentage} must be within 1 and 99")
        self.check_least("max_train_samples", 1)
        self.check_least("max_eval_samples", 1)

    def check_least(self, name: str, least: int) -> None:
        """
        Raises:
            UserError: if the argument is given and less than `least`.
        """
        value = getattr(self, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}")

    @property
    def files(self) -> dict[str, str | None]:
        """File of each split."""
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}

    def source(self, split: str) -> str:
        """The file or data set that a split comes from, for messages."""
        # Validation data without a file are taken from the training data.
        return self.files[split] or self.dataset_name or self.train_file

    def limit(self, split: str) -> int | None:
        """Number of samples of a split to keep; None keeps all."""
        return self.max_train_samples if split == "train" else self.max_eval_samples


def load_splits(
    args: DataFileArguments, load_embedded: Callable[[], Mapping[str, Dataset]], **options: Mapping[str, Any]
) -> dict[str, Dataset]:
    """All splits that the data have, by name.

    Args:
        args: the arguments that name the data.
        load_embedded: loads the data that the script brings.
        options: for each suffix of a file, options of its reader.

    Raises:
        UserError: if the data cannot be found or read.
    """
    if any(args.files.values()):
        return {split: _load_file(path, args.SUFFIXES, options) for split, path in args.files.items() if path}
    return dict(load_embedded() if args.dataset_name == args.EMBEDDED else _load_dataset(args))


def check_text_column(rows: Dataset, column: str, source: str) -> None:
    """
    Raises:
        UserError: if the rows have no such column, or it does not hold text.
    """
    check_column(rows, column, source)
    if rows.features[column] not in (Value("string"), Value("large_string")):
        raise UserError(f"column {column} of {source} holds {rows.features[column]}, not text")


def check_column(rows: Dataset, column: str, source: str) -> None:
    """
    Raises:
        UserError: if the rows have no such column.
    """
    if column not in rows.column_names:
        raise UserError(f"{source} has no column {column}: {closest(column, rows.column_names)}")


def check_split(split: str, splits: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: if the data have no such split.
    """
    if split not in splits:
        raise UserError(
            f"there are no {split} data: the data have the splits {', '.join(splits)}. Name a {split}_file, or data"
            " with that split"
        )


def with_validation(splits: dict[str, Dataset], percentage: int) -> dict[str, Dataset]:
    """The splits, with the first rows of `train` as `validation` where there is none."""
    if "validation" in splits or "train" not in splits or len(splits["train"]) < 2:
        return splits
    rows = splits["train"]
    cut = max(1, len(rows) * percentage // 100)
    return {**splits, "train": rows.select(range(cut, len(rows))), "validation": rows.select(range(cut))}


def map_batches(
    rows: Dataset, encode: Callable[[dict[str, list]], dict[str, list]], args: DataFileArguments
) -> Dataset:
    """The rows with the columns that `encode`, a tokenisation of batches, makes in the place of their own."""
    return rows.map(
        encode,
        batched=True,
        num_proc=args.preprocessing_num_workers,
        remove_columns=rows.column_names,
        load_from_cache_file=not args.overwrite_cache,
        desc="Tokenising",
    )


def _load_file(path: str, suffixes: tuple[str, ...], options: Mapping[str, Mapping[str, Any]]) -> Dataset:
    if not os.path.isfile(path):
        raise UserError(f"data file {path} {'is a folder' if os.path.isdir(path) else 'does not exist'}")
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in suffixes:
        raise UserError(f"{path}: the suffix .{suffix} is unknown; data files end in .{', .'.join(suffixes)}")
    if os.path.getsize(path) == 0:
        raise UserError(f"data file {path} is empty")
    if suffix != "parquet":
        with open(path, "rb") as file:
            # Binary data may well be valid UTF-8; text holds no zero bytes.
            if b"\0" in file.read(1 << 20):
                raise UserError(f"data file {path} is not text: it holds zero bytes")
    # Words such as NA and None are text.
    reader_options = {"keep_default_na": False} if suffix == "csv" else {}
    reader_options.update(options.get(suffix, {}))
    try:
        return load_dataset(_READERS[suffix], data_files=path, split="train", **reader_options)
    except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as {_READERS[suffix]}: {error.__cause__ or error}") from error


def _load_dataset(args: DataFileArguments) -> Mapping[str, Dataset]:
    name, config_name = args.dataset_name, args.dataset_config_name
    try:
        if folder := local_copy(name, config_name):
            files = {split: f"{folder}/{split}.parquet" for split in SPLITS}
            return load_dataset(
                "parquet", data_files={split: path for split, path in files.items() if os.path.exists(path)}
            )
        return load_dataset(name, config_name)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(f"cannot load the data set {name} ({config_name}): {error}") from error
