# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from test_modeling_grassmann import COMPILER, check_compiled, gradients
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_grassmann import (
    GrassmannForSequenceClassification,
    GrassmannPluckerConfig,
    GrassmannPluckerForSequenceClassification,
    plucker_window_features,
)


LENGTHS = [17, 1, 9, 4]


def pad_right(rows, fill=None, extra=0):
    length = max(len(row) for row in rows) + extra
    ids = torch.zeros(len(rows), length, dtype=torch.long) if fill is None else fill(len(rows), length)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def plucker_features_of(model, **inputs):
    """The Plücker features inside each mixer of the head."""
    features = []

    def record(mixer, args):
        hidden_states, real = args
        reduced = mixer.reduce(hidden_states).unflatten(-1, (mixer.num_heads, -1))
        projection = mixer.plucker_proj
        # Without bias: the planes alone.
        features.append(
            plucker_window_features(
                reduced, projection.weight, None, mixer.pair_weights, real, mixer.window_stride, projection.eps
            )
        )

    hooks = [layer.mixer.register_forward_pre_hook(record) for layer in model.head.layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return features


# Saving and loading


def test_a_saved_classifier_loads_with_equal_logits_to_the_bit(
    backbone, head_type, make_classifier, make_ids, tmp_path
):
    model = make_classifier(backbone, head_type=head_type)
    model.save_pretrained(tmp_path)
    weights = [path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")]
    assert weights == ["model.safetensors"]

    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GrassmannPluckerForSequenceClassification
    assert not any(info.values()), info
    assert loaded.num_labels == 3
    assert not loaded.training
    ids, mask = pad_right([make_ids(12, seed=1), make_ids(7, seed=2)])
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_classifiers_load_in_another_process_without_network_and_without_the_backbones_folder(
    make_backbone, make_ids, tmp_path
):
    ids, mask = pad_right([make_ids(12, seed=1), make_ids(7, seed=2)])
    expected = {}
    for name, head_type in [("distilbert", "grassmann"), ("bert", "transformer"), ("grassmann", "linear")]:
        make_backbone(name).save_pretrained(tmp_path / "backbone")
        model = GrassmannPluckerForSequenceClassification.from_backbone(
            tmp_path / "backbone", head_type=head_type, hidden_size=16, num_labels=3
        )
        model.save_pretrained(tmp_path / name)
        shutil.rmtree(tmp_path / "backbone")
        expected[name] = model(ids, attention_mask=mask).logits.detach()
    torch.save({"ids": ids, "mask": mask, "expected": expected}, tmp_path / "expected.pt")
    program = f"""
import socket
def refuse(*args): raise AssertionError("no network")
socket.socket.connect = refuse
import torch
from transformers import AutoModelForSequenceClassification
import modeling_grassmann
torch.set_num_threads(1)
saved = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
for name, logits in saved["expected"].items():
    model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r} + "/" + name)
    assert torch.equal(model(saved["ids"], attention_mask=saved["mask"]).logits, logits), name
print("equal")
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def test_the_saved_configuration_holds_that_of_the_backbone(backbone, make_classifier, tmp_path):
    model = make_classifier(backbone, window_size=4, window_stride=2, id2label={0: "yes", 1: "no", 2: "maybe"})
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "grassmann_plucker"
    assert saved["backbone_config"]["model_type"] == model.backbone.config.model_type
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is GrassmannPluckerConfig
    assert type(config.backbone_config) is type(model.backbone.config)
    assert config.backbone_config.hidden_size == 16
    assert (config.window_size, config.window_stride, config.id2label[2]) == (4, 2, "maybe")


def test_a_pretrained_backbone_keeps_its_weights_and_its_attention(backbone, head_type, make_backbone, tmp_path):
    original = make_backbone(backbone)
    expected = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    implementation = original.config._attn_implementation
    original.save_pretrained(tmp_path)
    for source in (original, tmp_path):
        model = GrassmannPluckerForSequenceClassification.from_backbone(source, head_type=head_type, hidden_size=16)
        kept = model.backbone.state_dict()
        assert expected.keys() - kept.keys() <= {
            "pooler.dense.weight",
            "pooler.dense.bias",
            "pooler.weight",
            "pooler.bias",
        }
        assert kept.keys() <= expected.keys()
        for name, tensor in kept.items():
            assert torch.equal(tensor, expected[name]), name
        assert not model.training and not model.backbone.training
        assert model.backbone.config._attn_implementation == implementation


def test_a_pooler_is_dropped(make_backbone):
    backbone = make_backbone("bert")
    assert any("pooler" in name for name, _ in backbone.named_parameters())
    model = GrassmannPluckerForSequenceClassification.from_backbone(backbone)
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_weights_stored_in_half_precision_load_in_float32_unless_another_type_is_named(make_backbone, tmp_path):
    make_backbone().half().save_pretrained(tmp_path / "half")

    def dtypes(model):
        return {parameter.dtype for parameter in model.parameters()}

    from_backbone = GrassmannPluckerForSequenceClassification.from_backbone
    model = from_backbone(tmp_path / "half")
    assert dtypes(model) == {torch.float32}
    model.save_pretrained(tmp_path / "saved")
    assert dtypes(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")) == {torch.float32}
    assert dtypes(from_backbone(tmp_path / "half", backbone_kwargs={"dtype": torch.bfloat16})) == {torch.bfloat16}


def test_a_classifier_loads_and_runs_in_bfloat16(head_type, make_classifier, make_ids, tmp_path):
    model = make_classifier(head_type=head_type)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = make_ids(8, 12)
    logits, expected = loaded(ids).logits, model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_loads_the_same_model(device_map, head_type, make_classifier, make_ids, tmp_path):
    model = make_classifier(head_type=head_type)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map=device_map)
    ids = make_ids(2, 12)
    # "auto" may find an accelerator, whose sums are ordered differently.
    torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


@pytest.mark.parametrize("name", ["bert", "grassmann"])
def test_no_layer_of_head_or_backbone_is_split_over_devices(name, make_classifier):
    for head_type, layer in [("grassmann", "GrassmannBlock"), ("transformer", "TransformerLayer")]:
        model = make_classifier(name, head_type=head_type)
        assert {layer, *model.backbone._no_split_modules} <= set(model._no_split_modules)


def through_a_file(model):
    """As `torch.save` of a whole model does, or a process that is started with one."""
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copier", [copy.deepcopy, through_a_file])
def test_a_copied_classifier_gives_equal_logits(copier, make_classifier, make_ids):
    model, ids = make_classifier(), make_ids(2, 9)
    assert torch.equal(copier(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2", "grassmann"])
def test_embeddings_are_those_of_the_backbone_and_load_after_they_were_resized(name, make_classifier, tmp_path):
    model = make_classifier(name)
    assert model.get_input_embeddings() is model.backbone.get_input_embeddings()
    model.resize_token_embeddings(109)
    assert model.backbone.get_input_embeddings().weight.shape[0] == 109
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.arange(95, 109)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_backbone_whose_embeddings_were_resized_keeps_them(make_backbone):
    backbone = make_backbone("bert")
    backbone.resize_token_embeddings(109)
    expected = backbone.get_input_embeddings().weight.clone()
    model = GrassmannPluckerForSequenceClassification.from_backbone(backbone)
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert model.config.backbone_config.vocab_size == 109


def test_initial_weights_of_the_head_have_the_configured_standard_deviation(head_type, make_backbone):
    torch.manual_seed(0)
    model = GrassmannPluckerForSequenceClassification.from_backbone(
        make_backbone("bert", hidden_size=64), head_type=head_type, initializer_range=0.07, hidden_size=64
    )
    for name, parameter in [*model.head.named_parameters(), *model.classifier.named_parameters("classifier")]:
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "in_proj" not in name:
            assert parameter.std().item() == pytest.approx(0.07, rel=0.15), name


# What is refused


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "t5",
            {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
            "T5Model is an encoder-decoder",
        ),
        ("vit", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "ViTModel is `pixel_values`"),
        (
            "clip",
            {
                part: {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
                for part in ("text_config", "vision_config")
            },
            "CLIPConfig has no `hidden_size`",
        ),
    ],
    ids=["t5", "vit", "clip"],
)
def test_what_is_no_text_encoder_is_refused(model_type, fields, message, tmp_path):
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(ValueError, match=f"`backbone` must be a text encoder.*{message}"):
        GrassmannPluckerForSequenceClassification(GrassmannPluckerConfig(backbone_config=config))
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`backbone` must be a text encoder.*{message}"):
        GrassmannPluckerForSequenceClassification.from_backbone(tmp_path)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (BertForMaskedLM, BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        (T5EncoderModel, T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
    ],
    ids=["masked_lm", "t5_encoder"],
)
def test_a_model_that_the_backbones_configuration_does_not_name_is_refused(model_class, config):
    # A saved classifier could not make it again.
    with pytest.raises(ValueError, match=f"`backbone`.*{model_class.__name__}"):
        GrassmannPluckerForSequenceClassification.from_backbone(model_class(config))


def test_a_backbone_that_only_its_own_code_knows_is_refused(make_backbone):
    # The saved classifier would not load.
    backbone = make_backbone()
    backbone.config.model_type = "from_elsewhere"
    with pytest.raises(ValueError, match=r"`backbone` is of the type 'from_elsewhere'.*AutoConfig\.register"):
        GrassmannPluckerForSequenceClassification.from_backbone(backbone)


def test_an_unknown_field_is_refused_with_its_nearest_names(make_backbone):
    with pytest.raises(ValueError, match=r"`windowsize` is no field.*window_size"):
        GrassmannPluckerForSequenceClassification.from_backbone(make_backbone(), windowsize=4)
    with pytest.raises(ValueError, match="`backbone_config` is no field"):
        GrassmannPluckerForSequenceClassification.from_backbone(make_backbone(), backbone_config={})


def test_an_impossible_value_is_refused_when_building_and_when_loading(make_backbone, make_classifier, tmp_path):
    with pytest.raises(StrictDataclassError, match="`pooling` must be one of first, last, mean, got 'max'"):
        GrassmannPluckerForSequenceClassification.from_backbone(make_backbone(), pooling="max")
    make_classifier().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"`window_stride` must divide `window_size` \(8\).*got 3"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, window_stride=3)


def test_a_mask_that_is_not_two_dimensional_is_refused(make_classifier, make_ids):
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(batch, length\).*\(1, 1, 4, 4\)"):
        make_classifier()(make_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


# Outputs


def test_inputs_that_the_backbone_does_not_know_are_left_out(make_classifier, make_ids):
    ids, types = make_ids(2, 9), torch.arange(9).expand(2, 9) // 5
    for name in ("distilbert", "grassmann"):
        model = make_classifier(name)
        assert torch.equal(model(ids, token_type_ids=types).logits, model(ids).logits)
    model = make_classifier("bert")
    assert not torch.allclose(model(ids, token_type_ids=types).logits, model(ids).logits, atol=1e-3)


def test_embeddings_give_what_their_ids_give(backbone, make_classifier, make_ids):
    if backbone == "roberta":
        backbone = "bert"  # RoBERTa counts positions by its padding id, which embeddings do not show.
    model, ids = make_classifier(backbone), make_ids(2, 9)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)


def test_hidden_states_and_attentions_are_the_backbones_and_a_tuple_holds_the_same(
    backbone, make_classifier, make_ids
):
    model, ids = make_classifier(backbone), make_ids(2, 9)
    output = model(ids, output_hidden_states=True)
    expected = model.backbone(ids, output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(expected)
    for a, b in zip(output.hidden_states, expected, strict=True):
        assert torch.equal(a, b)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(expected)
    assert model(ids, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    plain = model(ids, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1
    assert torch.equal(plain[0], model(ids).logits)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_the_linear_head_classifies_the_pooled_tokens(pooling, make_classifier, make_ids):
    model = make_classifier(head_type="linear", pooling=pooling)
    ids, mask = pad_right([make_ids(9, seed=1), make_ids(5, seed=2)])
    logits = model(ids, attention_mask=mask).logits
    for row, length in enumerate((9, 5)):
        hidden_states = model.backbone(ids, attention_mask=mask).last_hidden_state[row, :length]
        pooled = {"mean": hidden_states.mean(0), "first": hidden_states[0], "last": hidden_states[-1]}[pooling]
        torch.testing.assert_close(logits[row], model.classifier(pooled))


@pytest.mark.parametrize("norm_placement", ["post", "pre"])
def test_the_head_is_the_papers(norm_placement, make_classifier, make_ids):
    model, ids = make_classifier(norm_placement=norm_placement), make_ids(2, 9)
    head, real = model.head, torch.ones(2, 9, dtype=torch.bool)
    hidden_states = head.projection(model.backbone(ids).last_hidden_state)
    for layer in head.layers:
        mlp = [layer.mlp.up_proj, F.gelu, layer.mlp.down_proj]
        x = hidden_states if norm_placement == "post" else layer.mixer_norm(hidden_states)
        mixed = layer.mixer(x, real)
        hidden_states = mixed if norm_placement == "post" else hidden_states + mixed
        x = hidden_states if norm_placement == "post" else layer.mlp_norm(hidden_states)
        for step in mlp:
            x = step(x)
        hidden_states = hidden_states + x
        if norm_placement == "post":
            hidden_states = layer.mlp_norm(hidden_states)
    if norm_placement == "pre":
        hidden_states = head.norm(hidden_states)
    torch.testing.assert_close(model(ids).logits, model.classifier(hidden_states.mean(1)))


# Padding


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_logits_of_padded_rows_are_those_of_each_row_alone(backbone, head_type, pooling, make_classifier, make_ids):
    model = make_classifier(backbone, head_type=head_type, pooling=pooling, window_size=4, window_stride=2)
    rows = [make_ids(length, seed=length) for length in LENGTHS]
    ids, mask = pad_right(rows, extra=3)
    logits = model(ids, attention_mask=mask).logits
    alone = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(logits, alone, rtol=0, atol=3e-6)
    # Otherwise a head that ignores its input would pass.
    assert logits.std(0).min() > 0.01

    noise, _ = pad_right(rows, fill=lambda *shape: torch.randint(2, 100, shape), extra=3)
    assert torch.equal(model(noise, attention_mask=mask).logits, logits)
    other_neighbours = ids.clone()
    other_neighbours[0] = ids[0].flip(0)
    assert torch.equal(model(other_neighbours, attention_mask=mask).logits[1:], logits[1:])


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("norm_placement", ["post", "pre"])
def test_the_head_sees_real_tokens_alone_wherever_the_padding_is(head_type, norm_placement, pooling, make_classifier):
    head = make_classifier(
        head_type=head_type, norm_placement=norm_placement, pooling=pooling, window_size=4, window_stride=2
    ).head
    rows = [torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in (9, 5, 1)]
    expected = torch.cat([head(row[None], torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    generator = torch.Generator().manual_seed(0)
    places = {
        "right": lambda length: torch.arange(length),
        "left": lambda length: torch.arange(13 - length, 13),
        "holes": lambda length: torch.randperm(13, generator=generator)[:length].sort().values,
    }
    for place in places.values():
        for garbage in (0.0, 1e4, -1e4):
            hidden_states, real = torch.full((3, 13, 16), garbage), torch.zeros(3, 13, dtype=torch.bool)
            for index, row in enumerate(rows):
                where = place(len(row))
                hidden_states[index, where] = row
                real[index, where] = True
            actual = head(hidden_states, real)
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm_placement", ["post", "pre"])
@pytest.mark.parametrize("head_type", ["pooled_gated", "pooled_transformer"])
def test_a_pooled_head_sees_the_mean_of_the_real_tokens_alone(head_type, norm_placement, make_classifier, tmp_path):
    model = make_classifier(head_type=head_type, norm_placement=norm_placement)
    model.save_pretrained(tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path).head
    hidden_states = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) < torch.tensor([[9], [4]])
    expected = torch.cat([row[mask].mean(0, keepdim=True) for row, mask in zip(hidden_states, real)])[:, None]
    actual = head(hidden_states, real)
    torch.testing.assert_close(actual, model.head(expected, torch.ones(2, 1, dtype=torch.bool)), rtol=0, atol=2e-6)
    assert (actual[0] - actual[1]).abs().max() > 0.1


def test_a_pooled_gate_mixes_in_the_constant_that_planes_of_equal_vectors_leave(make_classifier):
    mixer = make_classifier(head_type="pooled_gated").head.layers[0].mixer
    hidden_states = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    # Features of z ∧ z are the bias of their projection.
    features = F.linear(torch.zeros(3, 1, 6), torch.randn(16, 6), mixer.feature)
    gate = torch.sigmoid(mixer.gate_proj(torch.cat([hidden_states, features], dim=-1)))
    expected = mixer.norm(hidden_states + gate * hidden_states + (1 - gate) * features)
    actual = mixer(hidden_states, torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_padding_is_exact_without_gradients_too(hidden_act, make_classifier, make_ids):
    # PyTorch's encoder layers have a fused path of their own for inference.
    model = make_classifier(head_type="transformer", hidden_act=hidden_act)
    rows = [make_ids(length, seed=length) for length in LENGTHS]
    ids, mask = pad_right(rows, extra=3)
    expected = model(ids, attention_mask=mask).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-6)


# What the logits depend on


def test_plucker_features_are_not_zero_and_differ_between_texts(backbone, make_classifier, make_ids):
    model = make_classifier(backbone)
    first, second = (plucker_features_of(model, input_ids=make_ids(1, 20, seed=seed)) for seed in (1, 2))
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert (a.abs().amax(-1) > 1e-3).all(), "every token has a plane"
        assert (a - b).norm() > 0.1 * a.norm()


def test_logits_depend_on_the_order_of_tokens_and_of_texts(backbone, head_type, make_classifier, make_ids):
    model, ids = make_classifier(backbone, head_type=head_type), make_ids(1, 20)
    swapped = ids.clone()
    swapped[0, [13, 15]] = ids[0, [15, 13]]
    exchanged = torch.cat([ids[:, 10:], ids[:, :10]], dim=1)
    for other in (swapped, exchanged):
        assert (model(other).logits - model(ids).logits).abs().max() > 1e-4


@pytest.mark.parametrize("sharing", ["distance", "enumeration"])
@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("places", [(13, 14), (8, 15), (5, 13)], ids=str)
def test_the_plucker_head_itself_sees_the_order_of_tokens(places, stride, sharing, make_classifier):
    options = {"window_stride": stride, "pair_sharing": sharing}
    hidden_states = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0))
    swapped = hidden_states.clone()
    swapped[:, list(places)] = hidden_states[:, list(reversed(places))]
    real = torch.ones(1, 20, dtype=torch.bool)

    def change(**fields):
        head = make_classifier(**options, **fields).head
        return (head(swapped, real) - head(hidden_states, real)).abs().max()

    assert change() > 1e-3
    # A mean over tokens alone could not tell: it is the planes that do.
    assert change(use_plucker_features=False) < 1e-6
    assert change(head_type="linear") < 1e-6


@pytest.mark.parametrize(
    ("window_size", "stride", "reached"),
    [(8, 8, range(8, 16)), (4, 4, range(8, 12)), (4, 2, range(6, 12)), (4, 1, range(6, 13)), (2, 1, range(8, 11))],
)
def test_a_token_reaches_exactly_those_of_its_windows(window_size, stride, reached, make_classifier):
    def changed(**fields):
        head = make_classifier(num_hidden_layers=1, window_size=window_size, window_stride=stride, **fields).head
        outputs = []
        hook = head.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
        hidden_states = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            head(hidden_states, torch.ones(1, 21, dtype=torch.bool))
            hidden_states = hidden_states.clone()
            hidden_states[0, 9] += 1.0
        hook.remove()
        difference = (outputs[1] - outputs[0]).abs().amax(-1)[0]
        return set(difference.nonzero().flatten().tolist())

    assert changed() == set(reached)
    assert changed(use_plucker_features=False) == {9}


def test_logits_change_without_plucker_features(make_classifier, make_ids):
    model = make_classifier()
    ablated = make_classifier(use_plucker_features=False)
    shared = {name: tensor for name, tensor in model.state_dict().items() if name in ablated.state_dict()}
    assert shared.keys() == ablated.state_dict().keys() and len(shared) < len(model.state_dict())
    ablated.load_state_dict(shared)
    ids = make_ids(2, 12)
    assert (ablated(ids).logits - model(ids).logits).abs().max() > 1e-2


# Training


@pytest.mark.parametrize("fields", [{}, {"norm_placement": "pre"}, {"use_plucker_features": False}], ids=str)
def test_every_parameter_receives_a_gradient(backbone, head_type, fields, make_classifier, make_ids):
    model = make_classifier(backbone, head_type=head_type, **fields).train()
    labels = torch.arange(8) % 3
    largest = {
        name: gradient.abs().max()
        for name, gradient in gradients(model, input_ids=make_ids(8, 30), labels=labels).items()
    }
    assert {"classifier.weight", "classifier.bias"} < largest.keys()
    for name, value in largest.items():
        # Attention does not depend on the bias of its keys, but for rounding.
        if not name.endswith(("key.bias", "k_lin.bias")):
            assert value.isfinite() and value > 1e-7, name


def test_the_loss_is_the_cross_entropy_divided_by_the_items_of_the_whole_batch(head_type, make_classifier, make_ids):
    model, ids, labels = make_classifier(head_type=head_type), make_ids(4, 9), torch.tensor([0, 2, 1, 2])
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    total = F.cross_entropy(output.logits, labels, reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss, total / 10)


def test_regression_and_several_labels_have_their_losses(make_classifier, make_ids):
    ids, targets = make_ids(4, 9), torch.tensor([0.5, -1.0, 2.0, 0.0])
    output = make_classifier(num_labels=1)(ids, labels=targets)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], targets))
    targets = (torch.arange(12).view(4, 3) % 2).float()
    output = make_classifier(num_labels=3, problem_type="multi_label_classification")(ids, labels=targets)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, targets))


@pytest.mark.parametrize("reloaded", [False, True], ids=["new", "reloaded"])
def test_a_frozen_backbone_is_left_as_it_is(reloaded, head_type, make_backbone, make_ids, tmp_path):
    model = GrassmannPluckerForSequenceClassification.from_backbone(
        make_backbone(dropout=0.5, attention_dropout=0.5),
        freeze_backbone=True,
        head_type=head_type,
        hidden_size=16,
        hidden_dropout=0.0,
    )
    if reloaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("backbone.") for name in trained)

    model.train()
    ids, labels = make_ids(4, 9), torch.tensor([0, 1, 1, 0])
    assert torch.equal(model(ids).logits, model(ids).logits), "no dropout in the backbone"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) is name.startswith("backbone."), name


def test_a_frozen_backbone_may_be_thawed_when_loading(make_classifier, tmp_path):
    make_classifier(freeze_backbone=True).save_pretrained(tmp_path)
    thawed = AutoModelForSequenceClassification.from_pretrained(tmp_path, freeze_backbone=False)
    assert all(parameter.requires_grad for parameter in thawed.parameters())
    assert thawed.train().backbone.training


def test_the_dropout_of_the_head_acts_in_training_only(head_type, make_classifier, make_ids):
    model, ids = make_classifier(head_type=head_type, hidden_dropout=0.5, freeze_backbone=True), make_ids(2, 12)
    assert torch.equal(model(ids).logits, make_classifier(head_type=head_type)(ids).logits)
    model.train()
    assert model.head.training and not model.backbone.training
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=0.01)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("freeze", [False, True], ids=["whole", "frozen"])
def test_gradient_checkpointing_changes_no_gradient(backbone, freeze, use_reentrant, make_classifier, make_ids):
    model = make_classifier(backbone, freeze_backbone=freeze).train()
    ids, mask = pad_right([make_ids(12, seed=1), make_ids(7, seed=2)])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.head.layers)
    for name, gradient in gradients(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize(
    "model_class", [GrassmannPluckerForSequenceClassification, GrassmannForSequenceClassification]
)
def test_accumulated_gradients_train_as_the_whole_batch_does(
    model_class, make_classifier, make_model, make_ids, tmp_path
):
    data = [{"input_ids": make_ids(9, seed=index), "labels": torch.tensor(index % 3)} for index in range(16)]

    def train(batch_size, accumulation):
        if model_class is GrassmannPluckerForSequenceClassification:
            model = make_classifier()
        else:
            model = make_model(GrassmannForSequenceClassification, num_labels=3)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = train(8, 1)
    accumulated, accumulated_losses = train(2, 4)
    assert accumulated_losses == pytest.approx(losses, rel=1e-4)
    for (name, parameter), expected in zip(accumulated.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)


# Tools around the model


@pytest.fixture
def padded_inputs(make_ids):
    ids, mask = pad_right([make_ids(12, seed=1), make_ids(7, seed=2)])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}


@pytest.mark.parametrize("name", ["distilbert", "grassmann"])
def test_every_head_is_traced_without_a_graph_break(name, head_type, make_classifier, padded_inputs):
    check_compiled(make_classifier(name, head_type=head_type, num_hidden_layers=1), padded_inputs, "eager")


def test_autograd_traces_the_plucker_head(make_classifier, padded_inputs):
    check_compiled(make_classifier("grassmann", num_hidden_layers=1), padded_inputs, "aot_eager")


@pytest.mark.slow
def test_a_compiled_classifier_gives_eager_outputs_and_gradients(make_classifier, padded_inputs):
    check_compiled(make_classifier("grassmann", num_hidden_layers=1), padded_inputs, COMPILER)


def test_float64_gives_the_logits_of_float32_to_rounding(backbone, head_type, make_classifier, make_ids):
    model, ids = make_classifier(backbone, head_type=head_type), make_ids(2, 12)
    expected = model(ids).logits
    logits = model.double()(ids).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected.double(), rtol=0, atol=1e-4)


def make_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "is", "not", "sleeping", "the", "street", "dog", "runs"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.mark.parametrize("name", ["distilbert", "bert", "grassmann"])
def test_the_text_classification_pipeline_gives_each_pair_of_a_batch_what_it_gets_alone(
    name, make_classifier, tmp_path
):
    labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
    model, tokenizer = make_classifier(name, id2label=labels), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = pipeline("text-classification", model=str(tmp_path), top_k=None, device="cpu")
    pairs = [
        {"text": "a man is sleeping the street", "text_pair": "a man is not sleeping"},
        {"text": "a dog runs", "text_pair": "the man is not the street"},
        {"text": "the dog", "text_pair": "runs"},
    ]
    together = classifier(pairs, batch_size=3)
    for pair, batched in zip(pairs, together, strict=True):
        encoded = tokenizer(pair["text"], pair["text_pair"], return_tensors="pt")
        expected = model(**encoded).logits.softmax(-1)[0]
        for scores in (batched, classifier(pair)):
            scores = {entry["label"]: entry["score"] for entry in scores}
            assert [scores[label] for label in labels.values()] == pytest.approx(expected.tolist(), abs=1e-6)
