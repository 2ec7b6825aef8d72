"""Text for causal language modelling: load it, tokenise it, cut it into blocks."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from arguments import UserError, closest, local_copy
from corpus import load_stdlib_docs
from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase


EMBEDDED_CORPUS = "stdlib_docs"
SPLITS = ("train", "validation", "test")

_READERS = {"txt": "text", "parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv"}


@dataclass
class DataArguments:
    """Which texts to train and evaluate on, and how they are cut into blocks."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        "dataset_name": ("dataset_config_name", "train_file", "validation_file", "test_file"),
        "train_file": ("dataset_name", "dataset_config_name", "validation_file", "test_file"),
        "validation_file": ("dataset_name", "dataset_config_name"),
        "test_file": ("dataset_name", "dataset_config_name"),
    }

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the Hub, or `stdlib_docs` for the documentation of Python's standard library, which"
            " is the default when no data are named."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "Training text: .txt, .parquet, .json(l), .csv."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Test text, in the same formats."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training rows that become validation where the data have none."}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per block. Defaults to the model's number of positions, at most 1024."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training blocks to keep."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of validation blocks, and of test blocks, to keep."}
    )
    unk_placeholder: str | None = field(
        default=None, metadata={"help": "Text, such as <unk> in WikiText, that stands for the unknown token."}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "Size of the tokenizer that is trained on the embedded corpus."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Whether to keep line breaks of .txt files."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenisation."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again even if the result is cached."})

    def __post_init__(self):
        if self.dataset_name is not None and any(self.files.values()):
            raise UserError("name the data either with dataset_name or with train_file, validation_file, test_file")
        if self.dataset_name is None and not any(self.files.values()):
            self.dataset_name = EMBEDDED_CORPUS
        if not 0 < self.validation_split_percentage < 100:
            raise UserError(f"validation_split_percentage={self.validation_split_percentage} must be within 1 and 99")
        for name, least in [("block_size", 2), ("max_train_samples", 1), ("max_eval_samples", 1)]:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")

    @property
    def files(self) -> dict[str, str | None]:
        """File of each split."""
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}


def load_texts(args: DataArguments) -> DatasetDict:
    """Load all splits that the data have; a missing `validation` is taken from the first rows of `train`.

    Returns:
        a `DatasetDict` with some of the splits `train`, `validation`, `test`, each with the text column alone.

    Raises:
        UserError: if data cannot be found or read, or have no column of text of the given name.
    """
    if any(args.files.values()):
        texts = {split: _load_file(path, args) for split, path in args.files.items() if path}
    elif args.dataset_name == EMBEDDED_CORPUS:
        texts = load_stdlib_docs()
    else:
        texts = _load_dataset(args)

    for split, rows in texts.items():
        source = args.files.get(split) or args.dataset_name
        if args.text_column not in rows.column_names:
            raise UserError(
                f"{source} has no column {args.text_column}: {closest(args.text_column, rows.column_names)}"
            )
        if rows.features[args.text_column] not in (Value("string"), Value("large_string")):
            raise UserError(f"column {args.text_column} of {source} holds {rows.features[args.text_column]}, not text")

    if "validation" not in texts and "train" in texts and len(texts["train"]) > 1:
        rows = texts["train"]
        cut = max(1, len(rows) * args.validation_split_percentage // 100)
        texts = {**texts, "validation": rows.select(range(cut)), "train": rows.select(range(cut, len(rows)))}
    return DatasetDict({split: texts[split].select_columns(args.text_column) for split in SPLITS if split in texts})


def _load_file(path: str, args: DataArguments) -> Dataset:
    if not os.path.isfile(path):
        raise UserError(f"data file {path} {'is a folder' if os.path.isdir(path) else 'does not exist'}")
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in _READERS:
        raise UserError(f"{path}: the suffix .{suffix} is unknown; data files end in .{', .'.join(_READERS)}")
    if os.path.getsize(path) == 0:
        raise UserError(f"data file {path} is empty")
    if suffix != "parquet":
        with open(path, "rb") as file:
            # Binary data may well be valid UTF-8; text holds no zero bytes.
            if b"\0" in file.read(1 << 20):
                raise UserError(f"data file {path} is not text: it holds zero bytes")
    options = {
        # A byte order mark is no text.
        "txt": {"keep_linebreaks": args.keep_linebreaks, "encoding": "utf-8-sig"},
        # Words such as NA and None are text.
        "csv": {"keep_default_na": False},
    }.get(suffix, {})
    try:
        return load_dataset(_READERS[suffix], data_files=path, split="train", **options)
    except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as {_READERS[suffix]}: {error.__cause__ or error}") from error


def _load_dataset(args: DataArguments) -> DatasetDict:
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


def tokenize(texts: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> np.ndarray:
    """Token ids of all rows in order, with no special tokens in between; int64 of shape (N,).

    Raises:
        UserError: if `unk_placeholder` is given and the tokenizer has no unknown token.
    """
    placeholder, unk_token = args.unk_placeholder, tokenizer.unk_token
    if placeholder and unk_token is None:
        raise UserError(f"unk_placeholder={placeholder} is given, but the tokenizer has no unknown token")

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        rows = [row or "" for row in batch[args.text_column]]
        if placeholder:
            rows = [row.replace(placeholder, unk_token) for row in rows]
        # Rows may be longer than the model's context; they are cut into blocks later.
        encoding = tokenizer(rows, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": encoding["input_ids"]}

    encoded = texts.map(
        encode,
        batched=True,
        num_proc=args.preprocessing_num_workers,
        remove_columns=texts.column_names,
        load_from_cache_file=not args.overwrite_cache,
        desc="Tokenising",
    )
    if len(encoded) == 0:
        return np.empty(0, dtype=np.int64)
    return pc.list_flatten(encoded.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)


def cut_into_blocks(tokens: np.ndarray, block_size: int, keep_last: bool) -> Dataset:
    """Cut (N,) token ids into non-overlapping blocks.

    Args:
        tokens: int64 of shape (N,).
        block_size: tokens per block.
        keep_last: whether to keep the shorter last block, if it has a token to predict.

    Returns:
        a data set with the columns `input_ids` and `labels`, which are equal: the models shift labels themselves.
    """
    ends = list(range(0, len(tokens) + 1, block_size))
    if keep_last and len(tokens) - ends[-1] >= 2:
        ends.append(len(tokens))
    blocks = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(tokens[: ends[-1]], pa.int64()))
    return Dataset(pa.table({"input_ids": blocks, "labels": blocks}))


def load_blocks(
    texts: DatasetDict, splits: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, args: DataArguments
) -> dict[str, Dataset]:
    """Blocks of the given splits; training drops the shorter last block, evaluation keeps it.

    Raises:
        UserError: if a split is missing, holds no token, or is too short.
    """
    blocks = {}
    for split in splits:
        if split not in texts:
            raise UserError(
                f"there are no {split} data: the data have the splits {', '.join(texts)}. Name a {split}_file, or data"
                " with that split"
            )
        tokens = tokenize(texts[split], tokenizer, args)
        source = args.files[split] or args.dataset_name
        if len(tokens) == 0:
            raise UserError(f"the {split} data of {source} are empty: they hold no token")
        rows = cut_into_blocks(tokens, block_size, keep_last=split != "train")
        if len(rows) == 0:
            least = f"one block of block_size={block_size}" if split == "train" else "the 2 that an evaluation needs"
            raise UserError(f"the {split} data of {source} hold {len(tokens)} tokens, fewer than {least}")
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        blocks[split] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return blocks
