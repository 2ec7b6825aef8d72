import pytest
import torch
from arguments import UserError
from models import ModelArguments, add_dropout, usable_positions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
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


def tiny_llama():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("place, times", [("embed_tokens", 1), ("self_attn.o_proj", 2), ("mlp.down_proj", 2)])
def test_added_dropout_is_where_grassmann_models_have_it(place, times, monkeypatch):
    model, ids, seen, made = tiny_llama(), torch.randint(50, (2, 9)), [], []
    for name, module in model.named_modules():
        if name.endswith(place):
            module.register_forward_hook(lambda module, args, output: made.append(output))
    add_dropout(model, 0.999)
    drop = torch.nn.functional.dropout

    def spy(tensor, p, training):
        seen.append((tensor, training))
        return drop(tensor, p, training)

    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    model.train()(ids)
    assert len(made) == times and len(seen) == 1 + 3 * 2
    assert all(training for _, training in seen)
    assert all(any(tensor is output for tensor, _ in seen) for output in made)
    # Those left are inside of the feed-forward networks.
    assert [tensor.shape[-1] for tensor, _ in seen].count(SIZES["intermediate_size"] * 2) == 2


def test_a_model_with_added_dropout_is_the_plain_model_when_it_does_not_train(tmp_path):
    model, ids = tiny_llama().eval(), torch.randint(50, (2, 9))
    expected = model(ids).logits
    add_dropout(model, 0.5)
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(model.train()(ids).logits, expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


def test_dropout_is_not_added_where_it_has_no_place():
    with pytest.raises(UserError, match="GrassmannForCausalLM has dropout of its own"):
        add_dropout(AutoModelForCausalLM.from_config(GrassmannConfig(**GRASSMANN)), 0.1)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    with pytest.raises(UserError, match="BertForSequenceClassification is not laid out like Llama"):
        add_dropout(build(config), 0.1)
    with pytest.raises(UserError, match=r"added_dropout=1.0 must be at least 0 and less than 1"):
        ModelArguments(model_type="llama", added_dropout=1.0)
