# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, DistilBertConfig

from modeling_grassmann import GrassmannConfig, GrassmannPluckerConfig


def test_the_defaults_are_the_head_of_the_paper_on_distilbert():
    config = GrassmannPluckerConfig()
    assert type(config.backbone_config) is DistilBertConfig
    assert (config.backbone_config.n_layers, config.backbone_config.hidden_size) == (6, 768)
    assert (config.head_type, config.hidden_size, config.num_hidden_layers, config.num_heads) == (
        "grassmann",
        256,
        2,
        4,
    )
    assert (config.intermediate_size, config.hidden_dropout, config.reduced_size) == (512, 0.1, 64)
    assert (config.window_size, config.window_stride) == (8, 8)
    assert (config.pooling, config.use_plucker_features, config.freeze_backbone) == ("mean", True, False)


def test_every_field_is_documented():
    for name in GrassmannPluckerConfig.__annotations__:
        if name not in ("model_type", "sub_configs"):
            assert f"\n        {name} (" in GrassmannPluckerConfig.__doc__, name


@pytest.mark.parametrize(
    "backbone_config",
    [
        None,
        {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2},
        BertConfig(hidden_size=32, num_attention_heads=2),
        GrassmannConfig(hidden_size=32, is_causal=False),
    ],
    ids=["default", "fields", "bert", "grassmann"],
)
def test_a_saved_configuration_loads_unchanged(backbone_config, tmp_path):
    config = GrassmannPluckerConfig(
        backbone_config=backbone_config,
        num_labels=3,
        window_size=6,
        window_stride=2,
        pair_sharing="enumeration",
        freeze_backbone=True,
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "grassmann_plucker"
    assert saved["backbone_config"]["model_type"] == config.backbone_config.model_type
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GrassmannPluckerConfig
    assert type(loaded.backbone_config) is type(config.backbone_config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.num_labels == 3


def test_fields_of_a_backbone_make_its_configuration():
    config = GrassmannPluckerConfig(backbone_config={"model_type": "gpt2", "n_embd": 48})
    assert config.backbone_config.model_type == "gpt2"
    assert config.backbone_config.hidden_size == 48


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_backbone_keeps_its_attention_unless_another_is_asked_for(implementation):
    backbone_config = BertConfig(attn_implementation=implementation)
    config = GrassmannPluckerConfig(backbone_config=backbone_config)
    assert config.backbone_config._attn_implementation == implementation
    asked = GrassmannPluckerConfig(backbone_config=backbone_config, attn_implementation="flex_attention")
    assert asked.backbone_config._attn_implementation == "flex_attention"


def test_a_backbone_of_no_or_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"`backbone_config` must name the `model_type`"):
        GrassmannPluckerConfig(backbone_config={"hidden_size": 16})
    with pytest.raises(ValueError, match="nonexistent"):
        GrassmannPluckerConfig(backbone_config={"model_type": "nonexistent"})


@pytest.mark.parametrize(
    "fields",
    [
        {"head_type": "linear", "reduced_size": 7},
        {"head_type": "transformer", "reduced_size": 7},
        {"head_type": "grassmann", "hidden_size": 30},
        {"window_size": 12, "window_stride": 1},
        {"num_heads": 32, "reduced_size": 64},
    ],
    ids=str,
)
def test_a_head_is_held_to_its_own_fields_alone(fields):
    GrassmannPluckerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_type": "mlp"}, ["`head_type`", "grassmann, transformer, linear, pooled_gated", "got 'mlp'"]),
        ({"pair_sharing": "random"}, ["`pair_sharing`", "distance, enumeration", "got 'random'"]),
        ({"norm_placement": "middle"}, ["`norm_placement`", "post, pre", "got 'middle'"]),
        ({"pooling": "max"}, ["`pooling`", "first, last, mean", "got 'max'"]),
        ({"hidden_act": "gleu"}, ["`hidden_act`", "'gelu'", "got 'gleu'"]),
        ({"hidden_size": 0}, ["`hidden_size`", "at least 1", "got 0"]),
        ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "at least 1", "got 0"]),
        ({"num_heads": 0}, ["`num_heads`", "at least 1", "got 0"]),
        ({"intermediate_size": -1}, ["`intermediate_size`", "at least 1", "got -1"]),
        ({"window_stride": 0}, ["`window_stride`", "at least 1", "got 0"]),
        ({"window_size": 1, "window_stride": 1}, ["`window_size`", "at least 2", "got 1"]),
        ({"window_size": 0}, ["`window_size`", "at least 2", "got 0"]),
        ({"window_stride": 3}, ["`window_stride`", "divide `window_size` (8)", "got 3"]),
        ({"window_stride": 16}, ["`window_stride`", "divide `window_size` (8)", "got 16"]),
        ({"reduced_size": 66}, ["`reduced_size`", "multiple of `num_heads` (4)", "got 66"]),
        ({"reduced_size": 4}, ["`reduced_size`", "at least 2 dimensions a head", "got 4"]),
        ({"reduced_size": 0}, ["`reduced_size`", "at least 2 dimensions a head", "got 0"]),
        (
            {"head_type": "transformer", "hidden_size": 30},
            ["`hidden_size`", "multiple of `num_heads` (4)", "got 30"],
        ),
        ({"hidden_dropout": 1.0}, ["`hidden_dropout`", "at least 0 and less than 1", "got 1.0"]),
        ({"hidden_dropout": -0.1}, ["`hidden_dropout`", "at least 0 and less than 1", "got -0.1"]),
        ({"plucker_eps": 0.0}, ["`plucker_eps`", "greater than 0 and less than 1", "got 0.0"]),
        ({"plucker_eps": 1.0}, ["`plucker_eps`", "greater than 0 and less than 1", "got 1.0"]),
        ({"initializer_range": -0.1}, ["`initializer_range`", "at least 0", "got -0.1"]),
        ({"layer_norm_eps": -1e-5}, ["`layer_norm_eps`", "at least 0", "got -1e-05"]),
        ({"window_size": 8.0}, ["'window_size'", "expected int", "8.0"]),
        ({"freeze_backbone": "yes"}, ["'freeze_backbone'", "expected bool", "'yes'"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "refused",
)
def test_an_impossible_value_is_refused_with_field_value_and_what_is_allowed(fields, message):
    with pytest.raises(StrictDataclassError) as error:
        GrassmannPluckerConfig(**fields)
    for part in message:
        assert part in str(error.value)
