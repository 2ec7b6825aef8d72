import hashlib
import inspect

import pytest
from arguments import UserError
from corpus import documentation, load_stdlib_docs, split_of, train_tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def corpus():
    return load_stdlib_docs()


def fingerprint(corpus):
    texts = [text for split in ("train", "validation") for text in corpus[split]["text"]]
    vocabulary = train_tokenizer(corpus["train"]["text"], 400).backend_tokenizer.to_str()
    return hashlib.sha256("\0".join([*texts, vocabulary]).encode()).hexdigest()


def test_corpus_and_tokenizer_are_the_same_in_every_process(corpus, run_python):
    program = "import hashlib\nfrom corpus import load_stdlib_docs, train_tokenizer\n"
    program += f"{inspect.getsource(fingerprint)}\nprint(fingerprint(load_stdlib_docs()))"
    other = run_python("-c", program)
    assert other.stdout.strip() == fingerprint(corpus), other.stderr


def test_splits_are_disjoint_and_one_tenth_is_validation(corpus):
    train, validation = set(corpus["train"]["text"]), set(corpus["validation"]["text"])
    assert not train & validation
    assert 0.05 < len(validation) / (len(train) + len(validation)) < 0.15
    assert {split_of(f"{i}.py") for i in range(100)} == {"train", "validation"}


def test_corpus_holds_prose_of_a_useful_amount(corpus):
    assert sum(map(len, corpus["train"]["text"])) > 1_000_000
    assert "This module provides" in "".join(corpus["train"]["text"])


def test_documentation_is_docstrings_and_comment_lines_in_order(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '#!/usr/bin/python\n# -*- coding: utf-8 -*-\n"""The module."""\n\n# ------\n# First line,\n# second line.\n'
        'class A:\n    """The class.\n\n    More.\n    """\n    x = 1  # behind code\n    s = "# no comment"\n'
    )
    assert documentation(source) == "The module.\n\nFirst line,\nsecond line.\n\nThe class.\n\nMore.\n"
    source.write_text("def broken(:\n")
    assert documentation(source) == ""


def test_tokenizer_round_trips_any_text_and_reloads(tmp_path, corpus):
    tokenizer = train_tokenizer(corpus["validation"]["text"], 500)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["Return the number of items.\n", "  naïve Größe 戦場 \t🙂 .", "a  b , c"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reloaded(text, add_special_tokens=False)["input_ids"] == ids
        assert reloaded.decode(ids) == text
    assert len(reloaded) == 500
    assert reloaded.eos_token == reloaded.bos_token == reloaded.pad_token == reloaded.unk_token == "<|endoftext|>"


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size=200"):
        train_tokenizer(["text"], 200)
