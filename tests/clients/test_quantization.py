# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights in int8, by torchao: which they are, how near the logits stay, and that the checkpoint loads again."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    TorchAoConfig,
)


torchao_quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
Int8WeightOnlyConfig, quantize_ = torchao_quantization.Int8WeightOnlyConfig, torchao_quantization.quantize_

# int8 rounds each weight by at most 1/254 of its row's largest. On the models here 2% of the logits come of it.
RELATIVE_ERROR = 0.05


def load_quantized(folder, auto_class=AutoModelForCausalLM):
    return auto_class.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def quantized_modules(model):
    """Names of the modules that hold a weight in int8."""
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return {name for name, weight in weights if getattr(weight, "qdata", torch.empty(0)).dtype == torch.int8}


def assert_near(actual, expected, bound=RELATIVE_ERROR):
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < bound


@torch.no_grad()
def test_a_model_loaded_in_int8_has_linear_layers_in_int8_and_logits_near_those_of_full_precision(
    make_model, make_ids, tmp_path, flavour
):
    model, ids = make_model(hidden_size=64, **flavour), make_ids(3, 20)
    model.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # The head, which may be the embeddings, and the projections of planes, no linear layers, stay as they are.
    assert quantized_modules(quantized) == linear - {"lm_head"}
    assert (quantized.lm_head.weight is quantized.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight)
    for layer, expected in zip(quantized.model.layers, model.model.layers, strict=True):
        if hasattr(expected.mixer, "plucker_proj"):
            assert torch.equal(layer.mixer.plucker_proj.weight, expected.mixer.plucker_proj.weight)
    # A memory squares its similarities, and with them doubles their errors, before a norm scales its output up.
    bound = 3 * RELATIVE_ERROR if model.config.mixer_types == "memory" else RELATIVE_ERROR
    assert_near(quantized(ids).logits, model(ids).logits, bound)


def test_a_model_in_int8_generates_and_its_state_gives_the_uncached_tokens(make_model, make_ids, tmp_path, flavour):
    make_model(hidden_size=64, **flavour).save_pretrained(tmp_path)
    model, prompt = load_quantized(tmp_path), make_ids(2, 7)
    options = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens = model.generate(prompt, options)
    assert tokens.shape == (2, 19)
    assert torch.equal(tokens, model.generate(prompt, options, use_cache=False))


@torch.no_grad()
def test_a_checkpoint_in_int8_is_smaller_and_loads_with_equal_logits_to_the_bit(
    make_model, make_ids, tmp_path, flavour
):
    full, int8 = tmp_path / "full", tmp_path / "int8"
    make_model(hidden_size=64, intermediate_size=256, **flavour).save_pretrained(full)
    model, ids = load_quantized(full), make_ids(3, 20)
    model.save_pretrained(int8)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (int8, full)]
    # The linear layers take a quarter; embeddings and projections of planes are most of what is left.
    assert sizes[0] < 0.5 * sizes[1]
    # The configuration says that the weights are in int8.
    loaded = AutoModelForCausalLM.from_pretrained(int8)
    assert quantized_modules(loaded) == quantized_modules(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_model_is_quantized_in_place_beside_its_tied_head(make_model, make_ids):
    model, ids = make_model(hidden_size=64), make_ids(3, 20)
    expected = model(ids).logits

    def is_inner_linear(module, name):
        return isinstance(module, torch.nn.Linear) and name != "lm_head"

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_inner_linear)
    assert len(quantized_modules(model)) == 4 * len(model.model.layers)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_near(model(ids).logits, expected)


@torch.no_grad()
def test_a_classifier_on_a_backbone_is_loaded_in_int8(head_type, make_classifier, make_ids, tmp_path):
    model, ids = make_classifier("bert", head_type=head_type), make_ids(3, 20)
    mask = (torch.arange(20) < torch.tensor([[20], [13], [5]])).long()
    model.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path, AutoModelForSequenceClassification)
    assert "backbone.encoder.layer.0.intermediate.dense" in quantized_modules(quantized)
    assert_near(quantized(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
