import pytest
import torch
from positions import position_limit, usable_positions
from test_models import GRASSMANN, SIZES, build
from transformers import BertConfig, MPNetConfig, RobertaConfig, T5Config, XLMRobertaConfig, XLNetConfig

from modeling_grassmann import GrassmannConfig, GrassmannPluckerConfig


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(max_position_embeddings=12, **SIZES),
        RobertaConfig(max_position_embeddings=12, pad_token_id=1, **SIZES),
        XLMRobertaConfig(max_position_embeddings=12, pad_token_id=3, **SIZES),
        MPNetConfig(max_position_embeddings=12, **SIZES),
        GrassmannConfig(max_position_embeddings=12, **GRASSMANN),
        GrassmannPluckerConfig(
            backbone_config=RobertaConfig(max_position_embeddings=12, pad_token_id=1, **SIZES), head_type="linear"
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_model_reads_as_many_tokens_as_it_has_usable_positions_and_no_more(config):
    model = build(config)
    positions = usable_positions(model)
    ids = torch.full((1, positions + 1), 7)
    with torch.inference_mode():
        assert model(input_ids=ids[:, 1:]).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=ids)


@pytest.mark.parametrize(
    "config",
    [
        GrassmannConfig(max_position_embeddings=None, **GRASSMANN),
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50),
        XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=50),
    ],
    ids=lambda config: config.model_type,
)
def test_model_without_a_position_table_reads_texts_of_any_length(config):
    model = build(config)
    assert usable_positions(model) is None and position_limit(model) is None
