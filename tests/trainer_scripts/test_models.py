import pytest
import torch
from models import usable_positions
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    MPNetConfig,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from modeling_grassmann import GrassmannConfig, GrassmannPluckerConfig


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
GRASSMANN = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "reduced_size": 4, "vocab_size": 50}


def build(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


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


def test_model_without_a_position_table_reads_texts_of_any_length():
    assert usable_positions(build(GrassmannConfig(max_position_embeddings=None, **GRASSMANN))) is None
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    assert usable_positions(build(t5)) is None
