# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""A damaged checkpoint is refused with a message that names the file, and nothing in a checkpoint is ever executed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import run_clm
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from modeling_grassmann import (
    GrassmannForCausalLM,
    GrassmannForSequenceClassification,
    GrassmannModel,
)


KINDS = ("lm", "classifier", "plucker")
AUTO_CLASSES = {
    "lm": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "plucker": AutoModelForSequenceClassification,
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "offsets": [[1], [2]], "intermediate_size": 24}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, make_model, make_classifier):
    """A folder with sound checkpoints, by kind."""
    folder = tmp_path_factory.mktemp("sound")
    make_model(GrassmannForCausalLM, **SMALL).save_pretrained(folder / "lm")
    make_model(GrassmannForSequenceClassification, **SMALL, num_labels=3).save_pretrained(folder / "classifier")
    make_classifier("bert").save_pretrained(folder / "plucker")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(sound, kind, tmp_path):
    """A copy of a sound checkpoint, to damage."""
    return Path(shutil.copytree(sound / kind, tmp_path / kind))


def load(kind, folder, **kwargs):
    return AUTO_CLASSES[kind].from_pretrained(folder, **kwargs)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def split_header(content):
    """A safetensors file is 8 bytes of header size, the header, and the data."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_header(header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def with_header(change):
    """A change of a file's bytes that changes its header."""

    def changed(content):
        header, data = split_header(content)
        names = sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
        return join_header(change(header, names) or header, data)

    return changed


def overlap(header, names):
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def beyond_the_end(header, names):
    header[names[-1]]["data_offsets"][1] += 4


def huge_shape(header, names):
    header[names[0]]["shape"] = [10**18, 10**18]


def stored_as(dtype):
    def change(header, names):
        header[names[0]]["dtype"] = dtype

    return with_header(change)


DAMAGE = {
    "empty": lambda content: b"",
    "three bytes": lambda content: content[:3],
    "size alone": lambda content: content[:8],
    "half a header": lambda content: content[:200],
    "no data": lambda content: content[: len(content) - len(split_header(content)[1])],
    "half of it": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "trailing garbage": lambda content: content + b"garbage" * 100,
    "random bytes": lambda content: (
        torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    ),
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 26304\n",
    "header larger than the file": lambda content: len(content).to_bytes(8, "little") + content[8:],
    "header of 2^62 bytes": lambda content: (2**62).to_bytes(8, "little") + content[8:],
    "header that is a list": with_header(lambda header, names: b"[1, 2]"),
    "header that is no text": with_header(lambda header, names: b"\xff\xfe{}"),
    "header without tensors": with_header(lambda header, names: b"{}"),
    "overlapping offsets": with_header(overlap),
    "offset beyond the end": with_header(beyond_the_end),
    "huge shape": with_header(huge_shape),
    "wider type": stored_as("F64"),
    "narrower type": stored_as("F16"),
    "unknown type": stored_as("F33"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_name(kind, folder, damage):
    content = (folder / WEIGHTS).read_bytes()
    assert split_header(content)[0].keys() > {"__metadata__"}
    (folder / WEIGHTS).write_bytes(damage(content))
    with pytest.raises(OSError) as error:
        load(kind, folder)
    assert f"{folder / WEIGHTS} is truncated or damaged" in str(error.value)
    assert "download it again, or load another checkpoint" in str(error.value)


def test_a_file_cut_anywhere_is_refused(sound, tmp_path):
    folder = Path(shutil.copytree(sound / "lm", tmp_path / "lm"))
    content = (folder / WEIGHTS).read_bytes()
    for length in range(0, len(content), 997):
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(OSError, match="is truncated or damaged"):
            load("lm", folder)


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_weights_stored_as_integers_are_refused(kind, folder, dtype):
    # As many bytes as before, so that the file itself is sound.
    (folder / WEIGHTS).write_bytes(stored_as(dtype)((folder / WEIGHTS).read_bytes()))
    with pytest.raises(RuntimeError, match=rf"{folder} .* is stored as {dtype}, not as floating-point"):
        load(kind, folder)


def test_weights_stored_in_another_floating_point_type_load(kind, folder, sound):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    loaded = load(kind, folder, dtype=torch.float32).state_dict()
    for name, tensor in load(kind, sound / kind, dtype=torch.float32).state_dict().items():
        assert torch.equal(loaded[name], tensor.bfloat16().float())


def test_missing_weights_are_named(kind, folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=f"no file named {WEIGHTS} found in directory {folder}"):
        load(kind, folder)


def test_weights_of_another_model_are_refused(kind, folder):
    save_file({"transformer.wte.weight": torch.ones(4, 2)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RuntimeError) as error:
        load(kind, folder)
    for part in (str(folder), "not in the file: ", "not in the model: transformer.wte.weight", "saved together"):
        assert part in str(error.value)


def shard(folder, files=SHARDS):
    """Spread the weights over two files. Returns the content of the index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_load(kind, folder, sound):
    shard(folder)
    loaded = load(kind, folder).state_dict()
    for name, tensor in load(kind, sound / kind).state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_a_missing_shard_is_named(kind, folder):
    shard(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(OSError, match=f"{folder / SHARDS[1]}, which .* names, is missing. Copy or download it again"):
        load(kind, folder)


def test_a_truncated_shard_is_named(kind, folder):
    shard(folder)
    os.truncate(folder / SHARDS[1], 1000)
    with pytest.raises(OSError, match=f"{folder / SHARDS[1]} is truncated or damaged"):
        load(kind, folder)


def test_a_shard_that_holds_fewer_weights_than_the_index_says_is_refused(kind, folder):
    shard(folder)
    tensors = load_file(folder / SHARDS[1])
    removed = sorted(tensors)[0]
    del tensors[removed]
    save_file(tensors, folder / SHARDS[1], metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"not in the file: {removed}"):
        load(kind, folder)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "null", "3", "[1]", "{}", '{"metadata": {}}', '{"metadata": {}, "weight_map": ["a"]}'),
        *('{"metadata": {}, "weight_map": {}}', '{"metadata": {}, "weight_map": {"a": 3}}'),
        *('{"metadata": {}, "weight_map": {"a": ["b"]}}', '{"weight_map": {"a": "b.safetensors"}}'),
        '{"metadata": [], "weight_map": {"a": "b.safetensors"}}',
        "\ud800",
    ],
)
def test_a_broken_index_is_refused_by_name(kind, folder, content):
    shard(folder)
    (folder / INDEX).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(OSError, match=f"{folder / INDEX} is not an index of weights. Copy or download it again"):
        load(kind, folder)


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_an_index_that_names_a_file_outside_of_its_folder_is_refused(kind, folder, absolute):
    outside = str(folder.parent / "outside.safetensors") if absolute else "../outside.safetensors"
    shard(folder, [SHARDS[0], outside])
    assert (folder.parent / "outside.safetensors").exists()
    with pytest.raises(OSError, match=f"{folder / INDEX} names {outside}, which is not in its folder"):
        load(kind, folder)


def test_an_index_beside_a_single_file_is_not_looked_at(kind, folder):
    """As in Transformers: a folder may hold one that an earlier, larger model has left."""
    (folder / INDEX).write_text("{")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    load(kind, folder)


OTHER_SHAPES = {
    "fewer layers": ({"num_hidden_layers": 1, "offsets": [[1]]}, "not in the model: .*layers.1.*"),
    "more layers": ({"num_hidden_layers": 3, "offsets": [[1], [2], [4]]}, "not in the file: .*layers.2.*"),
    "wider": ({"hidden_size": 32}, r"has shape \(.*16.*\) in the file, \(.*32.*\) in the model"),
    "narrower": ({"hidden_size": 8}, r"has shape \(.*16.*\) in the file, \(.*8.*\) in the model"),
}


@pytest.mark.parametrize(("fields", "message"), OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_weights_that_do_not_fit_the_configuration_are_refused_unless_asked_for(kind, folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(RuntimeError, match=f"{folder} .*{message}.*ignore_mismatched_sizes=True"):
        load(kind, folder)
    model = load(kind, folder, ignore_mismatched_sizes=True)
    assert model.config.num_hidden_layers == fields.get("num_hidden_layers", 2)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["lm", "classifier"], indirect=True)
def test_a_position_table_that_the_file_lacks_is_refused_before_it_is_made(kind, folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.embed_positions.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, max_position_embeddings=2**50)  # 64 PiB: trying to allocate it raises another error
    with pytest.raises(RuntimeError, match=r"not in the file: model\.embed_positions\.weight"):
        load(kind, folder)


def test_a_table_larger_than_the_one_in_the_file_is_refused_before_it_is_made(kind, folder):
    fields = {"vocab_size": 2**50}
    if kind == "plucker":
        config = json.loads((folder / "config.json").read_text())
        fields = {"backbone_config": config["backbone_config"] | fields}
    change_config(folder, **fields)
    with pytest.raises(
        RuntimeError,
        match=rf"(embed_tokens|word_embeddings).weight has shape \(100, 16\) in the file, \({2**50}, 16\) in the",
    ):
        load(kind, folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_of_another_task_loads_all_but_its_output_layer(make_model, tmp_path, tied):
    lm = make_model(GrassmannForCausalLM, **SMALL, tie_word_embeddings=tied)
    classifier = make_model(GrassmannForSequenceClassification, **SMALL, num_labels=3, tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path / "lm")
    classifier.save_pretrained(tmp_path / "classifier")
    for source, folder in ((lm, tmp_path / "lm"), (classifier, tmp_path / "classifier")):
        for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel):
            loaded, info = auto_class.from_pretrained(folder, output_loading_info=True)
            base = loaded if isinstance(loaded, GrassmannModel) else loaded.model
            assert all(torch.equal(base.state_dict()[key], value) for key, value in source.model.state_dict().items())
            assert info["missing_keys"] <= {"lm_head.weight", "score.weight"}
            assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_another_number_of_labels_is_refused_unless_asked_for(make_model, make_classifier, tmp_path):
    make_model(GrassmannForSequenceClassification, **SMALL, num_labels=3).save_pretrained(tmp_path / "classifier")
    make_classifier("bert").save_pretrained(tmp_path / "plucker")
    for kind, layer in (("classifier", "score"), ("plucker", "classifier")):
        with pytest.raises(RuntimeError, match=rf"{layer}.* has shape \(3.*\) in the file, \(7.*\) in the model"):
            load(kind, tmp_path / kind, num_labels=7)
        model = load(kind, tmp_path / kind, num_labels=7, ignore_mismatched_sizes=True)
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json' is not a valid JSON file"),
        ("{", "config.json' is not a valid JSON file"),
        ("\ud800", "config.json' is not a valid JSON file"),
        # Depends on the version of Transformers.
        ("[1, 2]", "Unrecognized model in|list indices"),
        ("{}", "Should have a `model_type` key in its config.json"),
        (None, "Should have a `model_type` key in its config.json"),
        # Transformers itself looks for a key without asking whether there can be one.
        ("null", "NoneType"),
        ("3", "int"),
    ],
)
def test_a_broken_configuration_is_refused(kind, folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises((OSError, ValueError, TypeError), match=message):
        load(kind, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 99}, "`format_version` is 99, .*pip install --upgrade modeling-grassmann"),
        ({"format_version": None}, "'format_version' expected int, got NoneType"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' expected int, got NoneType"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"num_labels": 2**21, "id2label": None, "label2id": None}, f"`num_labels` must be .*, got {2**21}"),
        ({"num_labels": 0, "id2label": None, "label2id": None}, "`num_labels` must be from 1 .*, got 0"),
    ],
    ids=str,
)
def test_an_impossible_field_of_a_saved_configuration_is_refused(kind, folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        load(kind, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 2**16, "window_stride": 2**16}, "`window_size` must be at most 2048, got 65536"),
        ({"backbone_config": {"model_type": "bert", "num_hidden_layers": 1025}}, "`num_hidden_layers` of .* at most"),
        ({"backbone_config": {"model_type": "distilbert", "n_layers": 1025}}, "`n_layers` of .* at most"),
        ({"backbone_config": {"model_type": "bert", "num_labels": 2**21}}, "`num_labels` must be .*, got 2"),
        ({"backbone_config": {"model_type": "grassmann_plucker"}}, "must be that of a text encoder"),
        ({"backbone_config": {"model_type": "nope"}}, "nope"),
        ({"backbone_config": {}}, "must name the `model_type`"),
    ],
    ids=str,
)
def test_an_impossible_backbone_or_window_is_refused(sound, tmp_path, fields, message):
    folder = Path(shutil.copytree(sound / "plucker", tmp_path / "plucker"))
    change_config(folder, **fields)
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        load("plucker", folder)


@pytest.mark.parametrize(("code", "message"), [(True, "trust_remote_code=True"), (False, "model type `grassman`")])
def test_an_unknown_model_type_is_refused(kind, folder, code, message):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "grassman"}
    if not code:
        del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(kind, folder)


@pytest.mark.parametrize("token", [100, 2**40, -1])
def test_a_token_that_the_model_does_not_know_is_named(make_model, token):
    """What a tokenizer of another model leads to."""
    for model in (
        make_model(GrassmannForCausalLM),
        make_model(GrassmannForSequenceClassification),
        make_model(GrassmannModel),
    ):
        with pytest.raises(ValueError, match=f"`input_ids` holds {token}, but the model knows 0 to 99.*tokenizer"):
            model(torch.tensor([[1, 2], [3, token]]))
        model(torch.tensor([[0, 99]]))


def test_a_position_that_the_model_does_not_have_is_named(make_model):
    model, ids = make_model(GrassmannForCausalLM), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"`position_ids` holds 64, but the model knows 0 to 63.*Shorten"):
        model(ids, position_ids=torch.tensor([[63, 64]]))
    model(ids, position_ids=torch.tensor([[62, 63]]))


class Malicious:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "executed"


def pickles(trace):
    """A malicious pickle, as it is and as torch.save writes it."""
    plain = pickle.dumps(Malicious(trace))
    torch.save({"model": Malicious(trace)}, trace.with_name("archive"))
    return plain, trace.with_name("archive").read_bytes()


# Files that the one or the other version of a library has read as a pickle, or might.
PICKLE_FILES = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"]
PICKLE_FILES += ["adapter_model.bin", "tokenizer.pkl", "vocab.pkl", "vocab.bin", "tokenizer.bin", "spiece.model"]
PICKLE_FILES += [
    "tokenizer.model",
    "generation_config.pkl",
    "model.pt",
    "model.pth",
    "model.ckpt",
    "flax_model.msgpack",
]
PICKLE_FILES += ["tf_model.h5", "pytorch_model-00001-of-00001.bin"]


def test_the_pickles_are_malicious(trace):
    plain, _ = pickles(trace)
    pickle.loads(plain).close()
    assert trace.exists()
    trace.unlink()
    torch.load(trace.with_name("archive"), weights_only=False)["model"].close()
    assert trace.exists()


def save_tokenizer(folder):
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize("form", ["pickle", "archive"])
def test_pickles_beside_the_weights_are_not_executed(kind, folder, trace, form):
    content = pickles(trace)[form == "archive"]
    save_tokenizer(folder)
    for name in PICKLE_FILES:
        (folder / name).write_bytes(content)
    load(kind, folder)
    AutoConfig.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    if kind == "lm":
        pipeline("text-generation", model=str(folder))("a b", max_new_tokens=2)
    else:
        pipeline("text-classification", model=str(folder))("a b")
    assert not trace.exists()


@pytest.mark.parametrize("form", ["pickle", "archive"])
@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"use_safetensors": None}], ids=str)
def test_pickles_instead_of_the_weights_are_not_executed(kind, folder, trace, form, options):
    content = pickles(trace)[form == "archive"]
    (folder / WEIGHTS).unlink()
    for name in PICKLE_FILES:
        (folder / name).write_bytes(content)
    with pytest.raises((OSError, pickle.UnpicklingError)) as error:
        load(kind, folder, **options)
    asked = options.get("use_safetensors") is False
    assert ("Weights only load failed" if asked else "safetensors") in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("form", ["pickle", "archive"])
@pytest.mark.parametrize("place", ["model.safetensors", "index", "transformers_weights", "tokenizer"])
def test_pickles_under_another_name_are_not_executed(kind, folder, trace, form, place):
    content = pickles(trace)[form == "archive"]
    if place == "index":
        shard(folder)
        (folder / "weights.bin").write_bytes(content)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "weights.bin"}}))
    elif place == "transformers_weights":
        (folder / "adapter_model.bin").write_bytes(content)
        change_config(folder, transformers_weights="adapter_model.bin")
    elif place == "tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json"):
            (folder / name).write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            AutoTokenizer.from_pretrained(folder)
    else:
        (folder / WEIGHTS).write_bytes(content)
    if place != "tokenizer":
        with pytest.raises((OSError, pickle.UnpicklingError)):
            load(kind, folder)
    assert not trace.exists()


def test_tensors_in_a_pickle_load_when_they_are_asked_for(kind, folder, sound):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    loaded = load(kind, folder, use_safetensors=False).state_dict()
    for name, tensor in load(kind, sound / kind).state_dict().items():
        assert torch.equal(loaded[name], tensor)


@pytest.fixture
def run_arguments(sound, tmp_path):
    """Arguments of a run of a few steps that goes on with a saved model."""
    model = Path(shutil.copytree(sound / "lm", tmp_path / "model"))
    save_tokenizer(model)
    (tmp_path / "text.txt").write_text("a b a a b b\n" * 40)
    arguments = [f"--model_name_or_path={model}", f"--train_file={tmp_path / 'text.txt'}", "--block_size=8"]
    arguments += [f"--output_dir={tmp_path / 'run'}", "--do_train", "--save_steps=1", "--max_steps=2", "--use_cpu"]
    return [*arguments, "--report_to=none", "--disable_tqdm=true"]


def test_a_script_executes_no_pickle_beside_the_weights(run_arguments, tmp_path, trace):
    _, archive = pickles(trace)
    for name in PICKLE_FILES:
        (tmp_path / "model" / name).write_bytes(archive)
    run_clm.main(run_arguments)
    assert not trace.exists()


def test_a_resumed_run_executes_no_pickle_of_the_checkpoint(run_arguments, tmp_path, trace):
    plain, archive = pickles(trace)
    run_clm.main(run_arguments)
    run, saved = tmp_path / "run", tmp_path / "saved"
    shutil.rmtree(run / "checkpoint-2")
    shutil.copytree(run, saved)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree(run)
        shutil.copytree(saved, run)
        (run / "checkpoint-1" / name).write_bytes(archive)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            run_clm.main([*run_arguments, "--resume_from_checkpoint=true"])
        assert not trace.exists(), name
    # A plain pickle is not what torch.save writes: the checkpoint counts as incomplete, and the run starts anew.
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        (run / "checkpoint-1" / name).write_bytes(plain)
    run_clm.main([*run_arguments, "--resume_from_checkpoint=true"])
    assert not trace.exists()
