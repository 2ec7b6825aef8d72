# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from modeling_grassmann import GrassmannConfig


PRESETS = Path(__file__).parents[1] / "configuration" / "models"


def count_parameters(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def test_the_defaults_are_the_six_layer_model_of_the_paper():
    config = GrassmannConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (6, 256, 1024)
    assert (config.reduced_size, config.vocab_size, config.norm_placement) == (32, 30522, "post")
    assert config.layer_offsets == [[1], [2], [4], [8], [12], [16]]
    assert config.is_causal and config.tie_word_embeddings


@pytest.mark.parametrize(
    ("num_layers", "offsets"),
    [
        (1, [1]),
        (2, [1, 8]),
        (3, [1, 4, 12]),
        (4, [1, 2, 8, 12]),
        (7, [1, 1, 2, 4, 8, 12, 16]),
        (12, [1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16]),
    ],
)
def test_the_offsets_of_the_paper_are_spread_over_any_number_of_layers(num_layers, offsets):
    config = GrassmannConfig(num_hidden_layers=num_layers)
    assert config.layer_offsets == [[offset] for offset in offsets]
    assert len(config.layer_types) == num_layers


def test_flat_offsets_are_given_to_every_layer(make_config):
    assert make_config(offsets=[3, 1]).layer_offsets == [[3, 1]] * 3


def test_a_saved_configuration_loads_unchanged(make_config, flavour, tmp_path):
    config = make_config(**flavour, eos_token_id=[2, 3], num_labels=5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GrassmannConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.layer_offsets == config.layer_offsets


def test_every_preset_holds_only_fields_that_the_configuration_knows():
    paths = sorted(PRESETS.glob("grassmann-*/config.json"))
    assert paths
    for path in paths:
        fields, _ = GrassmannConfig.get_config_dict(path.parent)
        unknown = fields.keys() - GrassmannConfig().to_dict().keys() - {"_commit_hash"}
        assert not unknown, f"{path}: {unknown}"
        assert AutoConfig.from_pretrained(path.parent).num_hidden_layers == fields["num_hidden_layers"]


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("grassmann-6l", {"max_position_embeddings": 128}, 12_607_168),
        ("grassmann-6l", {"max_position_embeddings": 128, "mixer_out_proj": True}, 13_001_920),
        ("grassmann-12l", {"max_position_embeddings": 128, "mixer_out_proj": True}, 18_156_928),
        ("grassmann-alphaxiv-6l", {"max_position_embeddings": 128}, 12_610_240),
        ("grassmann-arledge-6l", {}, 17_695_168),
        # Within 0.1% of StableLM's 12,563,456 and 17,312,768.
        ("grassmann-memory-13m", {}, 12_556_388),
        ("grassmann-memory-18m", {}, 17_298_632),
        ("grassmann-memory-110m", {}, 113_466_528),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(preset, overrides, expected):
    assert count_parameters(AutoConfig.from_pretrained(PRESETS / preset, **overrides)) == expected


def test_the_transformer_that_the_presets_are_compared_with_has_its_published_number_of_parameters():
    config = GPT2Config(vocab_size=50257, n_positions=256, n_embd=256, n_layer=6, n_head=4, n_inner=1024)
    assert count_parameters(config) == 17_670_400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduced_size": 1}, ["`reduced_size`", "at least 2", "got 1"]),
        ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "at least 1", "got 0"]),
        ({"num_hidden_layers": -2}, ["`num_hidden_layers`", "at least 1", "got -2"]),
        ({"vocab_size": 0}, ["`vocab_size`", "at least 1", "got 0"]),
        ({"hidden_size": 0}, ["`hidden_size`", "at least 1", "got 0"]),
        ({"intermediate_size": -1}, ["`intermediate_size`", "at least 1", "got -1"]),
        ({"num_plucker_heads": 0}, ["`num_plucker_heads`", "at least 1", "got 0"]),
        ({"max_position_embeddings": 0}, ["`max_position_embeddings`", "at least 1", "got 0"]),
        ({"offsets": [1, 0]}, ["`offsets`", "from 1", "got [1, 0]"]),
        ({"offsets": [-3]}, ["`offsets`", "from 1", "got [-3]"]),
        ({"offsets": []}, ["`offsets`", "non-empty", "got []"]),
        ({"offsets": [[1], []], "num_hidden_layers": 2}, ["`offsets`", "non-empty", "got [[1], []]"]),
        ({"offsets": [[1], [2]]}, ["`offsets`", "one list per layer (6", "got 2 lists: [[1], [2]]"]),
        ({"norm_placement": "middle"}, ["`norm_placement`", '"post" or "pre"', "got 'middle'"]),
        ({"hidden_act": "gleu"}, ["`hidden_act`", "'gelu'", "'silu'", "got 'gleu'"]),
        ({"hidden_dropout": 1.5}, ["`hidden_dropout`", "at least 0 and less than 1", "got 1.5"]),
        ({"embedding_dropout": -0.1}, ["`embedding_dropout`", "at least 0 and less than 1", "got -0.1"]),
        ({"plucker_eps": 1.0}, ["`plucker_eps`", "greater than 0 and less than 1", "got 1.0"]),
        ({"plucker_eps": 0.0}, ["`plucker_eps`", "greater than 0 and less than 1", "got 0.0"]),
        ({"initializer_range": -0.1}, ["`initializer_range`", "at least 0", "got -0.1"]),
        ({"hidden_size": "256"}, ["'hidden_size'", "expected int", "'256'"]),
        ({"num_hidden_layers": 6.0}, ["'num_hidden_layers'", "expected int", "6.0"]),
        ({"offsets": [1.5]}, ["'offsets'", "list[int]", "[1.5]"]),
        ({"offsets": [1, [2]]}, ["'offsets'", "list[list[int]]", "[1, [2]]"]),
        ({"is_causal": "no"}, ["'is_causal'", "expected bool", "'no'"]),
        ({"mixer_types": "attention"}, ["`mixer_types`", "['plucker', 'memory']", "got 'attention'"]),
        ({"mixer_types": ["plucker", "memory"]}, ["`mixer_types`", "each of the 6 layers", "got 2"]),
        ({"mixer_types": []}, ["`mixer_types`", "each of the 6 layers", "got 0"]),
        ({"mixer_types": "memory"}, ["`norm_placement`", '"pre"', "Got 'post'"]),
        ({"mixer_types": "memory", "norm_placement": "pre", "is_causal": False}, ["`is_causal`", "must be True"]),
        ({"memory_kernel": "cosine"}, ["`memory_kernel`", "'binet_cauchy'", "got 'cosine'"]),
        ({"memory_reduced_size": 1}, ["`memory_reduced_size`", "at least 2", "got 1"]),
        ({"num_memory_heads": 0}, ["`num_memory_heads`", "at least 1", "got 0"]),
        ({"memory_value_size": -4}, ["`memory_value_size`", "at least 1", "got -4"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "refused",
)
def test_an_impossible_value_is_refused_with_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(StrictDataclassError) as error:
        GrassmannConfig(**fields)
    for part in message:
        assert part in str(error.value)
