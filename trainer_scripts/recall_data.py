"""The embedded tasks of recall: sequences whose answers stand earlier in the same sequence, and nowhere else.

`recall` is multi-query associative recall: pairs of a key and a value, and behind them, among noise, some of the keys
again. What follows a repeated key is its value:

    k3 v7 k0 v2 k9 v7 n4 n1 k9 [v7] n5 n5 k3 [v7] n2

`copying` is induction: after a gap of noise, a segment is repeated, and its first token tells what the others are:

    n1 k3 k0 k9 n4 n1 n2 k3 [k0] [k9] n8

Tokens in brackets are the answers, the only ones with a label. No key stands twice among the pairs or in a segment, so
each answer follows from the context. A segment is counted by its pairs of neighbours, of which it has one fewer than
tokens. Keys, values and noise are different tokens. All draws are independent and, but for distances, uniform; those
are about as frequent from 2 to 3 as from 4 to 7, 8 to 15 and so on.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from arguments import UserError
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


TASKS = ("recall", "copying")
SPLITS = ("train", "validation", "test")
NO_LABEL = -100


@dataclass
class RecallArguments:
    """Which sequences to train and evaluate on."""

    task: str = field(
        default="recall", metadata={"help": "Values of earlier keys, or a repeated segment.", "choices": list(TASKS)}
    )
    num_pairs: list[int] = field(
        default_factory=lambda: [4, 8, 16],
        metadata={"help": "Numbers of pairs in the sequences of training and validation, all equally frequent."},
    )
    length: int = field(default=128, metadata={"help": "Tokens in a sequence of training and validation."})
    test_num_pairs: list[int] | None = field(
        default=None, metadata={"help": "Numbers of pairs to test. Defaults to num_pairs."}
    )
    test_lengths: list[int] | None = field(
        default=None, metadata={"help": "Lengths to test each of them at, where they fit. Defaults to length."}
    )
    vocab_size: int = field(
        default=256, metadata={"help": "Number of tokens: one half keys, one quarter values, one quarter noise."}
    )
    train_size: int = field(default=64_000, metadata={"help": "Number of training sequences."})
    validation_size: int = field(default=1_024, metadata={"help": "Number of validation sequences."})
    test_size: int = field(
        default=256, metadata={"help": "Number of test sequences for each number of pairs and each length."}
    )
    generator_seed: int = field(default=0, metadata={"help": "Seed of the sequences."})

    def __post_init__(self):
        self.test_num_pairs = self.test_num_pairs or self.num_pairs
        self.test_lengths = self.test_lengths or [self.length]
        for name in ("num_pairs", "test_num_pairs", "test_lengths"):
            if min(getattr(self, name)) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be numbers from 1")
        for name, least in [("vocab_size", 8), ("train_size", 1), ("validation_size", 1), ("test_size", 1)]:
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.generator_seed < 2**32:
            raise UserError(f"generator_seed={self.generator_seed} must be from 0 to {2**32 - 1}")
        if self.vocab_size % 4:
            raise UserError(f"vocab_size={self.vocab_size} must be a multiple of 4: half keys, a quarter values")
        most = max(*self.num_pairs, *self.test_num_pairs)
        keys = self.vocab_size // 2
        if most + (self.task == "copying") > keys:
            raise UserError(f"{most} pairs need more than the {keys} keys of vocab_size={self.vocab_size}")
        least = least_length(self.task, max(self.num_pairs))
        if self.length < least:
            raise UserError(f"length={self.length} is too short for {max(self.num_pairs)} pairs: they need {least}")
        if not self.test_sizes:
            raise UserError(f"test_num_pairs={self.test_num_pairs} fit into none of test_lengths={self.test_lengths}")

    @property
    def test_sizes(self) -> list[tuple[int, int]]:
        """Numbers of pairs and lengths of the test sequences."""
        pairs, lengths = sorted(set(self.test_num_pairs)), sorted(set(self.test_lengths))
        return [
            (number, length) for length in lengths for number in pairs if least_length(self.task, number) <= length
        ]

    @property
    def chance(self) -> float:
        """Accuracy of who knows which tokens can be answers and nothing else."""
        return 1 / (self.vocab_size // (4 if self.task == "recall" else 2))


class Sequences(NamedTuple):
    """Sequences of one length, each array of shape (N, T).

    Attributes:
        input_ids: token ids.
        labels: the same where they are answers, else -100.
        distances: where there is an answer, tokens from a key to its repetition, or of the gap; else 0.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    distances: np.ndarray

    def dataset(self) -> Dataset:
        """`input_ids` and `labels` as the Trainer takes them."""
        rows, length = self.input_ids.shape
        ends = pa.array(np.arange(rows + 1) * length, pa.int32())
        columns = {name: pa.array(getattr(self, name).ravel(), pa.int64()) for name in ("input_ids", "labels")}
        table = pa.table({name: pa.ListArray.from_arrays(ends, column) for name, column in columns.items()})
        return Dataset(table).with_format("numpy")


def num_queries(num_pairs: int) -> int:
    """Half of the keys are asked for: which half, nothing tells before."""
    return (num_pairs + 1) // 2


def least_length(task: str, num_pairs: int) -> int:
    """Tokens that a sequence of that many pairs needs."""
    if task == "recall":
        return 2 * num_pairs + 2 * num_queries(num_pairs)
    return 2 * (num_pairs + 1) + 1


def draw_sequences(
    task: str, num_pairs: int, length: int, rows: int, vocab_size: int, generator: np.random.RandomState
) -> Sequences:
    """Sequences of a task; `RandomState` promises the same numbers in every version of NumPy."""
    keys, noise = vocab_size // 2, vocab_size // 4
    input_ids = vocab_size - noise + generator.randint(noise, size=(rows, length))  # (N, T)
    # So many different keys a row.
    count = num_pairs + (task == "copying")
    drawn = generator.random_sample((rows, keys)).argsort(axis=1, kind="stable")[:, :count]  # (N, P)
    labels, distances = np.full((rows, length), NO_LABEL), np.zeros((rows, length), dtype=np.int64)
    row = np.arange(rows)[:, None]
    if task == "recall":
        values = keys + generator.randint(vocab_size // 4, size=(rows, num_pairs))  # (N, P)
        input_ids[:, 0 : 2 * num_pairs : 2], input_ids[:, 1 : 2 * num_pairs : 2] = drawn, values
        asked = generator.random_sample((rows, num_pairs)).argsort(axis=1, kind="stable")[:, : num_queries(num_pairs)]
        # Places of two tokens behind the pairs, the i-th about 1 / i as probable as the first: the smallest of
        # exponential variables with these rates are a draw without replacement.
        places = length // 2 - num_pairs
        waits = -np.log1p(-generator.random_sample((rows, places))) * np.arange(1, places + 1)
        chosen = waits.argsort(axis=1, kind="stable")[:, : num_queries(num_pairs)]
        question = 2 * (num_pairs + chosen)  # (N, Q)
        input_ids[row, question], input_ids[row, question + 1] = drawn[row, asked], values[row, asked]
        answer, distance = question + 1, question - 2 * asked
    else:
        longest = length - 2 * count
        gap = np.floor((longest + 1) ** generator.random_sample((rows, 1))).astype(np.int64)  # (N, 1)
        start = np.floor((longest - gap + 1) * generator.random_sample((rows, 1))).astype(np.int64)
        first = start + np.arange(count)
        input_ids[row, first], input_ids[row, first + count + gap] = drawn, drawn
        answer, distance = (first + count + gap)[:, 1:], gap
    labels[row, answer] = input_ids[row, answer]
    distances[row, answer] = distance
    return Sequences(input_ids, labels, distances)


def load_sequences(args: RecallArguments, split: str, num_pairs: list[int], length: int, rows: int) -> Sequences:
    """Sequences of a split, an equal number for each number of pairs up to the remainder.

    The same arguments give the same sequences in every process; each split, number of pairs and length has random
    numbers of its own.
    """
    parts = []
    for index, number in enumerate(num_pairs):
        generator = np.random.RandomState([args.generator_seed, SPLITS.index(split), number, length])
        share = rows // len(num_pairs) + (index < rows % len(num_pairs))
        parts.append(draw_sequences(args.task, number, length, share, args.vocab_size, generator))
    return Sequences(*(np.concatenate(arrays) for arrays in zip(*parts)))


def check_held_out(training: Sequences, others: Sequences, split: str) -> None:
    """
    Raises:
        UserError: if some of the others are sequences of the training, too.
    """
    if training.input_ids.shape[1] != others.input_ids.shape[1]:
        return
    seen = {row.tobytes() for row in training.input_ids}
    shared = sum(row.tobytes() in seen for row in others.input_ids)
    if shared:
        raise UserError(
            f"{shared} {split} sequences are training sequences, too: there are too few different ones of this kind;"
            " choose a larger vocab_size, length or num_pairs, or a smaller train_size"
        )


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Tokenizer of the tasks' words: `k0`, `k1`, ... for keys, then `v0`, ... for values, then `n0`, ... for noise."""
    counts = {"k": vocab_size // 2, "v": vocab_size // 4, "n": vocab_size // 4}
    words = [f"{kind}{i}" for kind, count in counts.items() for i in range(count)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="n0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # All rows are of one length; what evaluates saved models wants a token to pad with.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="n0", model_input_names=["input_ids", "attention_mask"]
    )
