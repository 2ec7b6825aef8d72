import pytest
import torch
from arguments import UserError
from models import ModelArguments, add_dropout, load_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_grassmann import GrassmannConfig


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
GRASSMANN = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "reduced_size": 4, "vocab_size": 50}


class Vocabulary:
    """What `load_config` asks of a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id = 0, None, None

    def __len__(self):
        return 50


def build(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


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


def fake_package(name, folder, monkeypatch, text):
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def test_models_of_a_package_are_known_once_it_is_imported(tmp_path, monkeypatch):
    fake_package(
        "package_of_models",
        tmp_path,
        monkeypatch,
        "from transformers import AutoConfig, GPT2Config\n"
        "class PackagedConfig(GPT2Config):\n    model_type = 'packaged'\n"
        "AutoConfig.register('packaged', PackagedConfig, exist_ok=True)\n",
    )
    with pytest.raises(UserError, match="packaged"):
        load_config(ModelArguments(model_type="packaged"), Vocabulary())
    args = ModelArguments(model_type="packaged", import_packages=["package_of_models"])
    assert load_config(args, Vocabulary()).model_type == "packaged"


def test_a_package_that_is_missing_or_broken_is_named(tmp_path, monkeypatch):
    args = ModelArguments(model_type="gpt2", import_packages=["broken_package"])
    with pytest.raises(UserError, match="import_packages: cannot import broken_package: No module named"):
        load_config(args, Vocabulary())
    fake_package("broken_package", tmp_path, monkeypatch, "import torch.there_is_no_such_module")
    with pytest.raises(UserError, match=r"cannot import broken_package: No module named 'torch\.there_is"):
        load_config(args, Vocabulary())
