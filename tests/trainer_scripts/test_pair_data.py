import json
from functools import partial

import datasets
import pytest
from arguments import UserError
from datasets import ClassLabel, Dataset
from pair_data import PairArguments, load_pairs, tokenize_pairs, warn_without_separator
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer


def load(folder, labels, rows=None, suffix="jsonl", **arguments):
    """Pairs of a training file with the given labels."""
    rows = rows or [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": label} for i, label in enumerate(labels)]
    path = folder / f"train.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path) if suffix == "parquet" else Dataset.from_list(rows).to_csv(path)
    return load_pairs(PairArguments(train_file=str(path), validation_split_percentage=1, **arguments), ["train"])


def names(pairs):
    """Name of each row's label; the first row went to the validation split."""
    return [pairs.label_names[i] for i in pairs.splits["train"]["label"]]


THREE = {"class_names": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("labels", "arguments", "expected"),
    [
        (["b", "c", "a", "b"], {}, ["c", "a", "b"]),
        ([1, 2, 0, 1], {}, ["LABEL_2", "LABEL_0", "LABEL_1"]),
        ([1, 2, 0, 1], THREE, ["c", "a", "b"]),
        ([2, 2, 0], THREE, ["c", "a"]),
        (["1", "2", "0"], THREE, ["c", "a"]),
        ([1.0, 2.0, None, 0.0], THREE, ["c", "a"]),
        (["b", "c", "a"], THREE, ["c", "a"]),
        (["E", "N", "E"], {"label_mapping": {"N": "no", "E": "yes"}}, ["no", "yes"]),
        ([7, 9, 7], {"label_mapping": '{"7": "x", "9": "y"}'}, ["y", "x"]),
        (["E", "N"], {"label_mapping": {"N": "b", "E": "a"}, **THREE}, ["b"]),
        ([True, False, True], {}, ["False", "True"]),
    ],
)
def test_labels_of_any_form_become_classes(labels, arguments, expected, tmp_path):
    assert names(load(tmp_path, labels, **arguments)) == expected


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names_given", [["True", "False"], ["true", "false"], ["TRUE", "FALSE"]])
def test_booleans_are_the_classes_that_are_named_so(names_given, suffix, tmp_path):
    pairs = load(tmp_path, [True, False, True], suffix=suffix, class_names=names_given)
    assert pairs.splits["train"]["label"][:] == [1, 0]
    mapping = dict(zip(names_given, ["yes", "no"]))
    assert names(load(tmp_path, [True, False, True], suffix=suffix, label_mapping=mapping)) == ["no", "yes"]


@pytest.mark.parametrize(
    ("labels", "suffix", "given", "unlabelled"),
    [
        (["+", "-", "+", "-", ""], "csv", ["+", "-"], 1),
        (["+", "-", "+", "-", "-1"], "jsonl", ["+", "-"], 1),
        ([1, -1, 1, -1, None], "jsonl", ["-1", "1"], 1),
        ([1.0, -1.0, 1.0, -1.0, None], "parquet", ["-1", "1"], 1),
        (["1", "-1", "1", "-1", "-"], "csv", ["-1", "1"], 1),
        (["+1", "-1", "+1", "-1"], "csv", ["-1", "+1"], 0),
        (["00", "01", "00", "01"], "csv", ["01", "00"], 0),
        (["true", "FALSE", "True", "false"], "csv", ["True", "False"], 0),
    ],
)
def test_label_that_class_names_names_is_that_class(labels, suffix, given, unlabelled, tmp_path):
    pairs = load(tmp_path, labels, suffix=suffix, class_names=given)
    expected = {"+": ["-", "+", "-"], "-1": ["-1", "1", "-1"], "01": ["01", "00", "01"]}
    expected |= {"True": ["False", "True", "False"]}
    assert [name.replace("+1", "1") for name in names(pairs)] == expected[given[0]]
    assert pairs.unlabelled == {"train": unlabelled}


def test_number_of_a_class_label_stands_for_its_name_and_no_other(tmp_path):
    rows = {"premise": ["p"] * 3, "hypothesis": ["h"] * 3, "label": [0, 1, 2]}
    table = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["1", "2", "3"]))
    table.to_parquet(tmp_path / "a.parquet")
    by_number = {"label_mapping": {"0": "a", "1": "b", "2": "c"}}
    for given, expected in [
        ({}, "123"),
        ({"class_names": ["3", "1", "2"]}, "123"),
        (THREE, "abc"),
        (by_number, "abc"),
    ]:
        pairs = load_pairs(PairArguments(test_file=str(tmp_path / "a.parquet"), **given), ["test"])
        assert "".join(pairs.label_names[i] for i in pairs.splits["test"]["label"]) == expected


def test_classes_have_the_order_that_the_recipe_gives(tmp_path):
    assert load(tmp_path, ["b", "c", "a"]).label_names == ["a", "b", "c"]
    assert load(tmp_path, ["b", "c", "a"], class_names=["c", "a", "b"]).label_names == ["c", "a", "b"]
    assert load(tmp_path, ["N", "E"], label_mapping={"N": "b", "E": "a"}).label_names == ["b", "a"]


def test_table_of_class_labels_brings_their_names(tmp_path):
    rows = {"premise": ["p"] * 4, "hypothesis": ["h"] * 4, "label": [0, -1, 1, 0]}
    Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["no", "yes"])).to_parquet(tmp_path / "a.parquet")
    pairs = load_pairs(PairArguments(test_file=str(tmp_path / "a.parquet")), ["test"])
    assert (pairs.label_names, pairs.splits["test"]["label"][:]) == (["no", "yes"], [0, 1, 0])


@pytest.mark.parametrize(
    ("labels", "suffix"),
    [
        ([0, -1, 1, 2, None, -1], "jsonl"),
        (["a", "-", "b", "c", None, ""], "jsonl"),
        ([0, -1, 1, 2, None, -1], "parquet"),
        ([0, -1, 1, 2, None, -1], "csv"),
        (["0", "-1", "1", "2", "-", ""], "csv"),
    ],
)
def test_rows_without_a_label_are_left_out_and_counted(labels, suffix, tmp_path):
    pairs = load(tmp_path, labels, suffix=suffix, **THREE)
    assert names(pairs) == ["b", "c"]
    assert pairs.splits["train"]["index"][:] == [2, 3]
    assert pairs.splits["train"]["premise"][:] == ["p2", "p3"]
    assert pairs.unlabelled == {"train": 3}


@pytest.mark.parametrize(
    ("labels", "suffix", "mapping"),
    [
        ([1, -1, 1, -1, None], "jsonl", {"-1": "no", "1": "yes"}),
        (["+", "-", "+", "-", ""], "jsonl", {"-": "no", "+": "yes"}),
        (["x", "", "x", "", "-"], "csv", {"": "no", "x": "yes"}),
        ([1, -1, 1, -1, None], "csv", {"-1": "no", "1": "yes"}),
    ],
)
def test_label_that_the_mapping_names_is_a_label(labels, suffix, mapping, tmp_path):
    pairs = load(tmp_path, labels, suffix=suffix, label_mapping=mapping)
    assert names(pairs) == ["no", "yes", "no"]
    assert pairs.unlabelled == {"train": 1}


def test_columns_are_those_that_the_recipe_names(tmp_path):
    rows = [{"hypothesis": f"p{i}", "premise": f"h{i}", "gold": i % 2, "label": "?"} for i in range(3)]
    columns = {"premise_column": "hypothesis", "hypothesis_column": "premise", "label_column": "gold"}
    row = load(tmp_path, None, rows, **columns).splits["train"][0]
    assert row == {"premise": "p1", "hypothesis": "h1", "label": 1, "index": 1}


def test_missing_validation_is_taken_from_the_first_training_rows(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"premise": str(i), "hypothesis": "h", "label": (0, 1, -1)[i % 3]} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = PairArguments(train_file=str(path), validation_split_percentage=25, max_train_samples=4)
    pairs = load_pairs(args, ["train", "validation"])
    assert pairs.splits["validation"]["index"][:] == [0, 1, 3, 4, 6]
    assert pairs.splits["train"]["index"][:] == [7, 9, 10, 12]
    assert pairs.unlabelled == {"train": 10, "validation": 0}


def test_validation_taken_from_data_sorted_by_label_is_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"premise": "p", "hypothesis": "h", "label": label} for label in "aaaaaabbbbbbcccccc"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = PairArguments(train_file=str(path), validation_split_percentage=25)
    with pytest.raises(UserError, match=r"first 4 rows of .*train.jsonl.* no row of b, c: shuffle.* validation_file"):
        load_pairs(args, ["train", "validation"])
    assert set(load_pairs(args, ["train"]).splits["train"]["label"]) == {0, 1, 2}
    args = PairArguments(train_file=str(path), validation_file=str(path), max_eval_samples=2)
    assert load_pairs(args, ["validation"]).splits["validation"]["label"][:] == [0, 0]


def test_mistakes_in_splits_that_are_not_used_do_no_harm(tmp_path):
    for split, labels in [("train", "0 1 1"), ("test", "-1 -1")]:
        rows = [{"premise": "p", "hypothesis": "h", "label": int(label)} for label in labels.split()]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = PairArguments(train_file=str(tmp_path / "train.jsonl"), test_file=str(tmp_path / "test.jsonl"))
    assert len(load_pairs(args, ["train"]).splits["train"]) == 2
    with pytest.raises(UserError, match=r"test data of .*test.jsonl are empty"):
        load_pairs(args, ["test"])


def test_tokens_are_those_of_the_pair_and_labels_those_of_the_model(tmp_path, pair_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(pair_tokenizer)
    rows = [{"premise": "the cat", "hypothesis": "yes", "label": label} for label in "bac"]
    pairs = load(tmp_path, None, rows)
    encoded = tokenize_pairs(pairs, "train", tokenizer, ["c", "b", "a"], 6, PairArguments(train_file="a.csv"))
    assert encoded["input_ids"][0] == tokenizer("the cat", "yes")["input_ids"]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert encoded["labels"][:] == [2, 0]
    assert encoded["length"][:] == [6, 6]


def test_longer_text_is_cut_first(tmp_path, pair_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(pair_tokenizer)
    rows = [{"premise": "the cat sees the dog", "hypothesis": "yes cat", "label": label} for label in "aab"]
    args = PairArguments(train_file="a.csv", max_length=7)
    encoded = tokenize_pairs(load(tmp_path, None, rows), "train", tokenizer, ["a", "b"], 20, args)
    assert tokenizer.decode(encoded["input_ids"][0]) == "[CLS] the cat [SEP] yes cat [SEP]"
    assert encoded["length"][0] == 10


def test_pair_without_a_token_is_refused(tmp_path, pair_tokenizer):
    tokenizer = partial(AutoTokenizer.from_pretrained(pair_tokenizer), add_special_tokens=False)
    rows = [{"premise": text, "hypothesis": text, "label": label} for text, label in zip(["a", "a", ""], "aba")]
    with pytest.raises(UserError, match=r"row 2 .* no token"):
        tokenize_pairs(load(tmp_path, None, rows), "train", tokenizer, ["a", "b"], 20, PairArguments("x"))


@pytest.mark.parametrize(
    ("template", "warnings"),
    [("[CLS] $A [SEP] $B:1 [SEP]:1", 0), ("$A $B:1", 1), ("[CLS] $A $B:1 [SEP]", 1)],
)
def test_tokenizer_that_runs_the_texts_together_gets_one_warning(template, warnings, pair_tokenizer, caplog):
    tokenizer = AutoTokenizer.from_pretrained(pair_tokenizer)
    single = template.replace(" [SEP] $B:1", "").replace(" $B:1", "").replace(":1", "")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    warn_without_separator(tokenizer)
    assert len(caplog.messages) == warnings
    assert all("run together" in message and "separator" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("labels", "arguments", "words"),
    [
        ([0, 1, 3, 2], THREE, ["row 2", "train data", "label 3", "3 classes", "class_names"]),
        ([0, 1, -2], THREE, ["row 2", "label -2", "3 classes"]),
        (["a", "d"], THREE, ["row 1", "label d", "a, b, c"]),
        ([0, 2, 5], {}, ["0, 2, 5", "class_names"]),
        (["a", 1], {}, ["train.jsonl"]),
        ([0.5, 1.0], THREE, ["label 0.5"]),
        ([0, 0], {}, ["two classes"]),
        (["a", "a"], {}, ["two classes", "a"]),
        (["E", "X"], {"label_mapping": {"E": "a", "N": "b"}}, ["row 1", "label X", "label_mapping"]),
        ([0, 1], {"label_mapping": {"1": "a", "2": "b"}}, ["row 0", "label 0", "label_mapping"]),
        ([["a"], ["b"]], {}, ["label", "neither"]),
        ([0, 1], {"class_names": ["a", "a"]}, ["different"]),
        ([0, 1, 2], {"class_names": ["1", "2", "3"]}, ["row 0", "label 0", "classes 1, 2, 3: name all classes"]),
        ([True, False], {"class_names": ["yes", "no"]}, ["row 0", "label True", "yes, no", "label_mapping"]),
        ([-1, -1, None], {"class_names": ["a", "b"]}, ["empty", "no row with a label"]),
    ],
)
def test_impossible_labels(labels, arguments, words, tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, labels, **arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
