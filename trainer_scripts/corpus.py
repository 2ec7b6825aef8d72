"""The embedded corpus: documentation text of the Python standard library of the running interpreter.

Docstrings and comment lines of the library's modules are plain English about programming and come with Python, so a
model can be trained with no download. Texts, their order and the split depend only on the interpreter's version.
"""

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable
from pathlib import Path

from arguments import UserError
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"

# Besides other people's packages and the tests: the codecs, which are a hundred copies of the same sentences.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_NOT_PROSE = re.compile(r"#!|#.*coding[:=]\s*[-\w.]+|[\W_]*$")


def load_stdlib_docs() -> DatasetDict:
    """Documents of the standard library, one per source file, in the order of their paths.

    Returns:
        a `DatasetDict` with the splits `train` and `validation` (about a tenth of the files) and the column `text`.

    Raises:
        UserError: if the interpreter ships no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = {"train": [], "validation": []}
    seen = set()
    for name in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and (text := documentation(root / name)) and text not in seen:
            # A text in both splits would be a question with its answer.
            seen.add(text)
            documents[split_of(name.as_posix())].append(text)
    if not all(documents.values()):
        raise UserError(
            f"the embedded corpus is empty, since {root} holds no documented .py files: use a Python with the sources"
            " of its standard library, or name other data with dataset_name or train_file"
        )
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in documents.items()})


def split_of(name: str) -> str:
    """`validation` for a tenth of all names, chosen by a hash that is the same in every process, else `train`."""
    return "validation" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"


def documentation(path: Path) -> str:
    """Docstrings and comment lines of a source file in the order of its lines, separated by empty lines.

    Empty where there are none, and for a file that is not valid Python, such as a template.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            # Old modules hold invalid escapes; they are not the reader's concern.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""

    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    passages = [
        (node.body[0].lineno, docstring)
        for node in ast.walk(tree)
        if isinstance(node, documented) and (docstring := ast.get_docstring(node))
    ]

    last_line = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # Remarks behind code, such as those of the codecs' tables, say nothing without it.
        behind_code = token.line[: token.start[1]].strip()
        if token.type != tokenize.COMMENT or behind_code or _NOT_PROSE.match(token.string):
            continue
        line, text = token.start[0], token.string.lstrip("#").removeprefix(" ").rstrip()
        if last_line is not None and line == last_line + 1:
            text = f"{passages.pop()[1]}\n{text}"
        passages.append((line, text))
        last_line = line
    return "\n\n".join(text for _, text in sorted(passages)) + "\n" if passages else ""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts always give the same tokenizer.

    `<|endoftext|>` is its only special token and serves as bos, eos, pad and unk, as in GPT-2. Bytes leave nothing
    unknown, so no text is ever mapped to it.

    Args:
        texts: the training split only.
        vocab_size: number of tokens, of which 257 are the bytes and `<|endoftext|>`.

    Raises:
        UserError: if `vocab_size` is below 257.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"vocab_size={vocab_size} is too small: the {len(alphabet)} bytes and {END_OF_TEXT} need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )
