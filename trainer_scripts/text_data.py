"""Text for causal language modelling: load it, tokenise it, cut it into blocks."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from arguments import UserError
from corpus import load_stdlib_docs
from data_files import (
    SPLITS,
    DataFileArguments,
    check_split,
    check_text_column,
    load_splits,
    map_batches,
    with_validation,
)
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase


EMBEDDED_CORPUS = "stdlib_docs"


@dataclass
class DataArguments(DataFileArguments):
    """Which texts to train and evaluate on, and how they are cut into blocks.

    The embedded corpus, `stdlib_docs`, is the documentation of Python's standard library. Samples are blocks.
    """

    EMBEDDED: ClassVar[str] = EMBEDDED_CORPUS

    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per block. Defaults to the model's number of positions, at most 1024."},
    )
    unk_placeholder: str | None = field(
        default=None, metadata={"help": "Text, such as <unk> in WikiText, that stands for the unknown token."}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "Size of the tokenizer that is trained on the embedded corpus."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Whether to keep line breaks of .txt files."})

    def __post_init__(self):
        super().__post_init__()
        self.check_least("block_size", 2)


def load_texts(args: DataArguments) -> DatasetDict:
    """Load all splits that the data have; a missing `validation` is taken from the first rows of `train`.

    Returns:
        a `DatasetDict` with some of the splits `train`, `validation`, `test`, each with the text column alone.

    Raises:
        UserError: if data cannot be found or read, or have no column of text of the given name.
    """
    # A byte order mark is no text.
    texts = load_splits(args, load_stdlib_docs, txt={"keep_linebreaks": args.keep_linebreaks, "encoding": "utf-8-sig"})
    for split, rows in texts.items():
        check_text_column(rows, args.text_column, args.source(split))
    texts = with_validation(texts, args.validation_split_percentage)
    return DatasetDict({split: texts[split].select_columns(args.text_column) for split in SPLITS if split in texts})


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

    encoded = map_batches(texts, encode, args)
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
        check_split(split, texts)
        tokens = tokenize(texts[split], tokenizer, args)
        source = args.source(split)
        if len(tokens) == 0:
            raise UserError(f"the {split} data of {source} are empty: they hold no token")
        rows = cut_into_blocks(tokens, block_size, keep_last=split != "train")
        if len(rows) == 0:
            least = f"one block of block_size={block_size}" if split == "train" else "the 2 that an evaluation needs"
            raise UserError(f"the {split} data of {source} hold {len(tokens)} tokens, fewer than {least}")
        limit = args.limit(split)
        blocks[split] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return blocks


class BlockCollator(DataCollatorForTokenClassification):
    """The collator without a mask where no row is padded: models have faster ways without one."""

    def torch_call(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(features)
        if "attention_mask" in batch and batch["attention_mask"].all():
            del batch["attention_mask"]
        return batch
