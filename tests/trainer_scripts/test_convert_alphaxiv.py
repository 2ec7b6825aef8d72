"""A converted checkpoint computes what the reproduction does, restated here in plain PyTorch on the stored weights."""

import math
import os
import re
import sys

import convert_alphaxiv
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    GPT2LMHeadModel,
)

from modeling_grassmann import GrassmannForCausalLM, GrassmannPluckerForSequenceClassification


HIDDEN, REDUCED, INTERMEDIATE, VOCABULARY, POSITIONS, LAYERS = 16, 4, 24, 50, 24, 2
OFFSETS = [1, 2, 4, 8, 12, 16]
# DistilBERT's own sizes; 12 heads are the published default.
BACKBONE = {"vocab_size": VOCABULARY, "dim": 24, "n_layers": 2, "n_heads": 12, "hidden_dim": 20}
BACKBONE |= {"max_position_embeddings": POSITIONS}
MODELS = ["grassmann_lm", "transformer_lm", "grassmann_snli", "transformer_snli"]


def randomise(weights):
    """Weights of which every one matters, norms and biases included, drawn anew for each name."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.is_floating_point():
            values = torch.randn(weight.shape, generator=generator)
            is_norm = weight.dim() == 1 and name.endswith("weight")
            weights[name] = 1 + 0.3 * values if is_norm else 0.3 * values
    return weights


def linear(name, inputs, outputs):
    return {f"{name}.weight": torch.zeros(outputs, inputs), f"{name}.bias": torch.zeros(outputs)}


def norm(name):
    return {f"{name}.weight": torch.zeros(HIDDEN), f"{name}.bias": torch.zeros(HIDDEN)}


def pairs(name):
    """The stored enumeration of pairs i < j."""
    i, j = zip(*[(i, j) for i in range(REDUCED) for j in range(i + 1, REDUCED)])
    return {f"{name}.idx_i": torch.tensor(i), f"{name}.idx_j": torch.tensor(j)}


def feed_forward(name):
    return linear(f"{name}.0", HIDDEN, INTERMEDIATE) | linear(f"{name}.3", INTERMEDIATE, HIDDEN)


def make_language_model(kind):
    weights = {"token_embedding.weight": torch.zeros(VOCABULARY, HIDDEN)}
    weights |= {"position_embedding.weight": torch.zeros(POSITIONS, HIDDEN)} | norm("ln_f")
    for block in (f"blocks.{i}" for i in range(LAYERS)):
        weights |= norm(f"{block}.ln1") | norm(f"{block}.ln2") | feed_forward(f"{block}.ffn")
        if kind == "grassmann_lm":
            weights |= linear(f"{block}.grassmann.W_red", HIDDEN, REDUCED)
            weights |= linear(f"{block}.grassmann.W_plu", REDUCED * (REDUCED - 1) // 2, HIDDEN)
            weights |= linear(f"{block}.grassmann.W_gate", 2 * HIDDEN, HIDDEN)
            weights |= norm(f"{block}.grassmann.layer_norm") | pairs(f"{block}.grassmann.plucker")
        else:
            weights |= linear(f"{block}.qkv_proj", HIDDEN, 3 * HIDDEN) | linear(f"{block}.out_proj", HIDDEN, HIDDEN)
    weights = randomise(weights)
    return weights | {"lm_head.weight": weights["token_embedding.weight"].clone()}


def make_encoder():
    """PyTorch's own encoder, as the reproduction makes it."""
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, INTERMEDIATE, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()


def make_classifier(kind):
    backbone = DistilBertModel(DistilBertConfig(**BACKBONE))
    weights = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    weights |= linear("head.input_projection", 24, HIDDEN) | linear("head.classifier", HIDDEN, 3)
    if kind == "transformer_snli":
        encoder = make_encoder().state_dict()
        return randomise(weights | {f"head.transformer1.{name}": weight for name, weight in encoder.items()})
    for layer in (f"head.mixing_layers.{i}" for i in range(LAYERS)):
        weights |= linear(f"{layer}.to_reduced", HIDDEN, REDUCED) | pairs(f"{layer}.plucker_encoder")
        weights |= linear(f"{layer}.from_plucker", REDUCED * (REDUCED - 1) // 2, HIDDEN)
        weights |= linear(f"{layer}.gate.0", 2 * HIDDEN, HIDDEN) | feed_forward(f"{layer}.ffn")
        weights |= norm(f"{layer}.ln1") | norm(f"{layer}.ln2")
    return randomise(weights)


def make_weights(kind):
    return make_language_model(kind) if kind.endswith("lm") else make_classifier(kind)


def write(path, weights, prefix="_orig_mod."):
    stored = {prefix + name: weight for name, weight in weights.items()}
    torch.save({"epoch": 7, "model_state_dict": stored, "optimizer_state_dict": {}, "val_loss": 5.5}, path)
    return path


def convert(tmp_path, weights, *options, prefix="_orig_mod."):
    """The folder that a checkpoint with these weights is converted to."""
    path = write(tmp_path / "best.pt", weights, prefix)
    convert_alphaxiv.main([str(path), str(tmp_path / "out"), *options])
    return tmp_path / "out"


class Published:
    """What the reproduction computes from the weights of a checkpoint, without dropout."""

    def __init__(self, weights, dtype=torch.float32):
        self.weights = {
            name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()
        }

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].t() + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def feed_forward(self, name, x):
        x = self.linear(f"{name}.0", x)
        return self.linear(f"{name}.3", x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))

    def planes(self, name, z, y):
        i, j = self.weights[f"{name}.idx_i"], self.weights[f"{name}.idx_j"]
        p = z[..., i] * y[..., j] - z[..., j] * y[..., i]
        return p / p.norm(dim=-1, keepdim=True).clamp(min=1e-8)

    def grassmann(self, name, x, offsets):
        z, features = self.linear(f"{name}.W_red", x), torch.zeros_like(x)
        for t in range(x.shape[1]):
            past = [t - offset for offset in offsets if offset <= t]
            for s in past:
                plane = self.planes(f"{name}.plucker", z[:, t], z[:, s])
                features[:, t] += self.linear(f"{name}.W_plu", plane) / len(past)
        gate = torch.sigmoid(self.linear(f"{name}.W_gate", torch.cat([x, features], dim=-1)))
        return self.norm(f"{name}.layer_norm", gate * x + (1 - gate) * features)

    def attention(self, name, x, num_heads):
        length, size = x.shape[1], HIDDEN // num_heads
        qkv = self.linear(f"{name}.qkv_proj", x).reshape(-1, length, 3, num_heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, size) each
        scores = (q @ k.mT) / math.sqrt(size)
        future = torch.ones(length, length).triu(1).bool()
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.linear(f"{name}.out_proj", mixed.transpose(1, 2).reshape(x.shape))

    def language_model(self, ids, mix):
        """Logits (B, T, V); `mix(name of a block, normalised hidden states)` is its mixer."""
        embedding = self.weights["token_embedding.weight"]
        x = embedding[ids] + self.weights["position_embedding.weight"][: ids.shape[1]]
        for block in (f"blocks.{i}" for i in range(LAYERS)):
            x = x + mix(block, self.norm(f"{block}.ln1", x))
            x = x + self.feed_forward(f"{block}.ffn", self.norm(f"{block}.ln2", x))
        return self.norm("ln_f", x) @ self.weights["lm_head.weight"].t()

    def grassmann_lm(self, ids, offsets=OFFSETS):
        return self.language_model(ids, lambda block, x: self.grassmann(f"{block}.grassmann", x, offsets))

    def transformer_lm(self, ids, num_heads=4):
        return self.language_model(ids, lambda block, x: self.attention(block, x, num_heads))

    def part(self, prefix):
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}

    def pooled(self, ids, mask, num_heads):
        """The projected mean of the backbone's real tokens, (B, d)."""
        backbone = DistilBertModel(DistilBertConfig(**BACKBONE | {"n_heads": num_heads})).eval()
        backbone.load_state_dict(self.part("backbone."))
        tokens = backbone(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return self.linear("head.input_projection", tokens.sum(1) / mask.sum(1, keepdim=True))

    def grassmann_snli(self, ids, mask, num_heads=12):
        x = self.pooled(ids, mask, num_heads)
        for layer in (f"head.mixing_layers.{i}" for i in range(LAYERS)):
            z = self.linear(f"{layer}.to_reduced", x)
            g = self.linear(f"{layer}.from_plucker", self.planes(f"{layer}.plucker_encoder", z, z))
            gate = torch.sigmoid(self.linear(f"{layer}.gate.0", torch.cat([x, g], dim=-1)))
            x = self.norm(f"{layer}.ln1", x + gate * x + (1 - gate) * g)
            x = self.norm(f"{layer}.ln2", x + self.feed_forward(f"{layer}.ffn", x))
        return self.linear("head.classifier", x)

    def transformer_snli(self, ids, mask, num_heads=12):
        encoder = make_encoder()
        encoder.load_state_dict(self.part("head.transformer1."))
        return self.linear("head.classifier", encoder(self.pooled(ids, mask, num_heads)[:, None])[:, 0])


def make_ids(rows=2, length=20):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def check_logits(actual, expected):
    """Equal to 1e-5, and not because nothing depends on the tokens."""
    assert (actual - expected).abs().max() < 1e-5
    assert expected.flatten(0, -2).std(0).min() > 1e-2


# What is computed


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
@pytest.mark.parametrize(("options", "offsets"), [([], OFFSETS), (["--offsets", "3", "1"], [1, 3])])
@torch.no_grad()
def test_the_grassmann_language_model_has_the_logits_of_the_reproduction(options, offsets, prefix, tmp_path):
    weights = make_weights("grassmann_lm")
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path, weights, *options, prefix=prefix))
    assert type(model) is GrassmannForCausalLM
    ids = make_ids()
    check_logits(model(ids).logits, Published(weights).grassmann_lm(ids, offsets))


@torch.no_grad()
def test_planes_of_nearly_parallel_vectors_count_as_in_the_reproduction(tmp_path):
    weights = make_weights("grassmann_lm")
    # With such a bias all reduced vectors point almost the same way, 1e-4 apart.
    for name in (f"blocks.{i}.grassmann.W_red.bias" for i in range(LAYERS)):
        weights[name] = torch.full((REDUCED,), 1e4)
    ids = make_ids()
    folder = convert(tmp_path, weights)
    # In float64, as float32 has few digits left for these angles.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    check_logits(model(ids).logits, Published(weights, torch.float64).grassmann_lm(ids))


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
@pytest.mark.parametrize(("options", "num_heads"), [([], 4), (["--num_heads", "2"], 2)])
@torch.no_grad()
def test_the_transformer_language_model_has_the_logits_of_the_reproduction(options, num_heads, prefix, tmp_path):
    weights = make_weights("transformer_lm")
    model = AutoModelForCausalLM.from_pretrained(convert(tmp_path, weights, *options, prefix=prefix))
    assert type(model) is GPT2LMHeadModel
    ids = make_ids()
    check_logits(model(ids).logits, Published(weights).transformer_lm(ids, num_heads))


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
@pytest.mark.parametrize(("options", "num_heads"), [([], 12), (["--backbone_heads", "3"], 3)])
@pytest.mark.parametrize("kind", ["grassmann_snli", "transformer_snli"])
@torch.no_grad()
def test_classifiers_have_the_logits_of_the_reproduction(kind, options, num_heads, prefix, tmp_path):
    weights = make_weights(kind)
    model = AutoModelForSequenceClassification.from_pretrained(convert(tmp_path, weights, *options, prefix=prefix))
    assert type(model) is GrassmannPluckerForSequenceClassification
    ids, mask = make_ids(rows=4), torch.ones(4, 20, dtype=torch.long)
    for row, length in enumerate([20, 13, 2, 7]):
        mask[row, length:] = 0
    expected = getattr(Published(weights), kind)(ids, mask, num_heads)
    check_logits(model(ids, attention_mask=mask).logits, expected)
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_the_head_without_a_grassmann_feature_is_announced(tmp_path, capsys):
    convert(tmp_path, make_weights("grassmann_snli"))
    # Two layers of 4 · 16 + 4 for to_reduced, 16 · 6 for from_plucker.
    assert re.search(r"^warning: .*z ∧ z is zero.* 328 parameters", capsys.readouterr().out, re.M)


# What is written


@pytest.mark.parametrize(("kind", "millions"), [("grassmann_lm", "12.61"), ("transformer_lm", "12.59")])
def test_a_model_of_the_published_sizes_has_the_published_number_of_parameters(
    kind, millions, tmp_path, monkeypatch, capsys
):
    sizes = {"HIDDEN": 256, "REDUCED": 32, "INTERMEDIATE": 1024, "VOCABULARY": 30522, "POSITIONS": 128, "LAYERS": 6}
    for name, size in sizes.items():
        monkeypatch.setattr(sys.modules[__name__], name, size)
    convert(tmp_path, make_weights(kind))
    count = re.search(r"with ([\d,]+) parameters", capsys.readouterr().out)[1]
    assert f"{int(count.replace(',', '')) / 1e6:.2f}" == millions


@pytest.mark.parametrize("kind", MODELS)
def test_the_folder_is_complete_and_its_size_is_told(kind, tmp_path, tokenizer_folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    weights = make_weights(kind)
    embedding = "token_embedding.weight" if kind.endswith("lm") else "backbone.embeddings.word_embeddings.weight"
    weights[embedding] = torch.randn(len(tokenizer), weights[embedding].shape[1])
    if kind.endswith("lm"):
        weights["lm_head.weight"] = weights[embedding]
    folder = convert(tmp_path, weights, "--tokenizer", str(tokenizer_folder))
    auto_class = AutoModelForCausalLM if kind.endswith("lm") else AutoModelForSequenceClassification
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids == tokenizer("the cat").input_ids
    config = AutoConfig.from_pretrained(folder)
    assert getattr(config, "backbone_config", config).pad_token_id == tokenizer.pad_token_id
    if kind.endswith("lm"):
        assert config.eos_token_id == tokenizer.eos_token_id
    output = capsys.readouterr().out
    assert f"{folder}: {type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters" in output
    assert all(name in output for name in names)


def test_the_command_line_converts_in_a_process_of_its_own(tmp_path, run_python):
    path = write(tmp_path / "best.pt", make_weights("grassmann_lm"))
    done = run_python("trainer_scripts/convert_alphaxiv.py", path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "GrassmannForCausalLM with" in done.stdout
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is GrassmannForCausalLM


# What is refused


def failure(tmp_path, capsys, *options, path=None):
    """The line that ends a conversion, which leaves nothing behind."""
    with pytest.raises(SystemExit) as exit:
        convert_alphaxiv.main([str(path or tmp_path / "best.pt"), str(tmp_path / "out"), *options])
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not (tmp_path / "out").exists()
    return lines[0]


@pytest.mark.parametrize("kind", MODELS)
def test_any_missing_weight_is_refused_by_name(kind, tmp_path, capsys):
    weights = make_weights(kind)
    for name in weights:
        write(tmp_path / "best.pt", {other: weight for other, weight in weights.items() if other != name})
        assert re.search(rf"lacks {re.escape(name)}$", failure(tmp_path, capsys)), name


@pytest.mark.parametrize("kind", MODELS)
def test_any_misshapen_weight_is_refused_by_name(kind, tmp_path, capsys):
    weights = make_weights(kind)
    for name, weight in weights.items():
        write(tmp_path / "best.pt", weights | {name: weight[None]})
        message = failure(tmp_path, capsys)
        assert f"{name} has shape {(1, *weight.shape)}" in message, message
    # One row too many, but for tables of any length. Where a size is inferred from the weight, others do not fit it.
    for name, weight in weights.items():
        if "position_embedding" in name or "word_embeddings" in name:
            continue
        write(tmp_path / "best.pt", weights | {name: torch.cat([weight, weight[:1]])})
        assert re.search(r"has shape|make no model", failure(tmp_path, capsys)), name


@pytest.mark.parametrize("kind", MODELS)
def test_an_extra_weight_is_refused_by_name(kind, tmp_path, capsys):
    write(tmp_path / "best.pt", make_weights(kind) | {"blocks.0.grassmann_2.bias": torch.zeros(3)})
    assert "holds blocks.0.grassmann_2.bias, which" in failure(tmp_path, capsys)


@pytest.mark.parametrize("kind", ["grassmann_lm", "transformer_lm"])
def test_an_output_layer_other_than_the_embedding_is_refused(kind, tmp_path, capsys):
    weights = make_weights(kind)
    weights["lm_head.weight"][3, 2] += 1e-3
    write(tmp_path / "best.pt", weights)
    assert "lm_head.weight differs from token_embedding.weight" in failure(tmp_path, capsys)


@pytest.mark.parametrize("name", ["blocks.1.grassmann.plucker.idx_j", "head.mixing_layers.1.plucker_encoder.idx_i"])
def test_another_order_of_plucker_coordinates_is_refused(name, tmp_path, capsys):
    weights = make_weights("grassmann_lm" if name.startswith("blocks") else "grassmann_snli")
    weights[name] = weights[name].flip(0)
    write(tmp_path / "best.pt", weights)
    assert f"{name} is not the enumeration of i < j" in failure(tmp_path, capsys)


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, capsys):
    weights = make_weights("transformer_lm")
    write(tmp_path / "best.pt", weights | {"ln_f.bias": torch.zeros(HIDDEN, dtype=torch.int8)})
    assert "ln_f.bias holds torch.int8" in failure(tmp_path, capsys)
    write(tmp_path / "best.pt", weights | {"ln_f.bias": [0.0] * HIDDEN})
    assert "ln_f.bias is no tensor" in failure(tmp_path, capsys)


def test_a_weight_with_and_without_the_prefix_is_refused(tmp_path, capsys):
    weights = make_weights("transformer_lm")
    write(tmp_path / "best.pt", weights | {"_orig_mod.ln_f.bias": weights["ln_f.bias"]}, prefix="")
    assert "holds ln_f.bias twice" in failure(tmp_path, capsys)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"no checkpoint", "cannot be read"),
        (None, "there is no such file"),
        ({"epoch": 3}, "has no model_state_dict"),
        ([1, 2], "has no model_state_dict"),
        ({"model_state_dict": {}}, "has no model_state_dict"),
        ({"model_state_dict": {"wte.weight": torch.zeros(3, 2)}}, "is none of the reproduction's models"),
    ],
    ids=["empty", "text", "missing", "no_weights", "list", "empty_weights", "another_model"],
)
def test_a_file_without_such_a_model_is_refused(content, words, tmp_path, capsys):
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = failure(tmp_path, capsys)
    assert f"{path}: {words}" in message, message


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    stored = {"model_state_dict": make_weights("transformer_lm"), "val_loss": RunsCode(tmp_path / "ran")}
    torch.save(stored, tmp_path / "best.pt")
    assert "cannot be read (UnpicklingError)" in failure(tmp_path, capsys)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_refused(tmp_path, capsys):
    path = write(tmp_path / "best.pt", make_weights("grassmann_lm"))
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be read" in failure(tmp_path, capsys)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("transformer_lm", ["--offsets", "1"], "--offsets is not for this model"),
        ("grassmann_lm", ["--num_heads", "4"], "--num_heads is not for this model"),
        ("grassmann_lm", ["--backbone_heads", "4"], "--backbone_heads is not for this model"),
        ("grassmann_snli", ["--num_heads", "4"], "--num_heads is not for this model"),
        ("grassmann_lm", ["--offsets", "0"], "argument --offsets: 0 must be an integer of at least 1"),
        ("grassmann_lm", ["--offsets", "1", "x"], "argument --offsets: x must be an integer of at least 1"),
        ("grassmann_lm", ["--offsets", "2000000"], "make no model"),
        ("transformer_lm", ["--num_heads", "3"], "make no model"),
        ("transformer_snli", ["--num_heads", "3"], "make no model"),
        ("transformer_snli", ["--backbone_heads", "5"], "make no model"),
        ("transformer_lm", ["--tokenizer", "./nowhere"], "there is no such folder"),
    ],
)
def test_options_that_do_not_apply_are_refused(kind, options, words, tmp_path, capsys):
    write(tmp_path / "best.pt", make_weights(kind))
    message = failure(tmp_path, capsys, *options)
    assert words in message, message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer_folder, capsys):
    write(tmp_path / "best.pt", make_weights("grassmann_lm"))
    assert "vocab_size=50 is smaller" in failure(tmp_path, capsys, "--tokenizer", str(tokenizer_folder))


@pytest.mark.parametrize("is_file", [True, False])
def test_nothing_is_overwritten(is_file, tmp_path, capsys):
    path, out = write(tmp_path / "best.pt", make_weights("grassmann_lm")), tmp_path / "out"
    kept = out if is_file else out / "notes.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    with pytest.raises(SystemExit) as exit:
        convert_alphaxiv.main([str(path), str(out)])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {out} is there already: name a new or an empty folder\n"
    assert kept.read_text() == "kept"
    assert is_file or [file.name for file in out.iterdir()] == ["notes.txt"]
