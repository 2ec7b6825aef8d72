# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""PEFT adapts, trains, saves, loads and merges the models as it does any other."""

import copy
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from modeling_grassmann import GrassmannForSequenceClassification
from modeling_grassmann.cache_grassmann import CACHE_NAME


peft = pytest.importorskip("peft", reason="PEFT is not installed")

# Every linear layer of the blocks. Names that a configuration has no layer for do no harm.
LINEAR_LAYERS = ["reduce", "reduce_past", "gate_proj", "out_proj", "up_proj", "down_proj"]
LINEAR_LAYERS += ["query_proj", "key_proj", "value_proj", "decay_proj"]
LABELS = torch.tensor([0, 2, 1, 0])


def assert_close(actual, expected):
    """Equal but for the order of operations: the models are float64."""
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def adapt(model, task_type="CAUSAL_LM", **fields):
    """The model in float64 with an adapter that matters: PEFT's own initial adapter changes nothing."""
    config = peft.LoraConfig(task_type=task_type, r=2, **({"target_modules": "all-linear"} | fields))
    adapted = peft.get_peft_model(model.double(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=generator)
    return adapted.eval()


def train(model, rows, labels, folder, **arguments):
    """Three steps of Trainer, which then saves the adapter."""
    dataset = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    arguments = TrainingArguments(
        folder, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True, **arguments
    )
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    trainer.save_model(folder)
    return model.eval()


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_all_adapters_count(model, output):
    """Each adapter changes what `output` gives and gets a gradient from it: no weight is used behind its back."""
    expected = output(model)
    expected.square().sum().backward()
    parameters = trainable(model)
    assert parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert_matter(model, output)


def assert_matter(model, output):
    """Without any one of its adapters, `output` gives something else."""
    expected = output(model)
    parameters = {name: parameter for name, parameter in trainable(model).items() if "lora_B" in name}
    assert parameters
    for name, parameter in parameters.items():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            assert not torch.allclose(output(model), expected, atol=1e-8, rtol=0), name
            parameter.copy_(saved)


@pytest.fixture(scope="module")
def make_sequence_classifier(make_model, make_classifier):
    """Function that makes a classifier: a Grassmann model, or a head of some type on a BERT."""

    def make(head_type=None, seed=0):
        if head_type is None:
            return make_model(GrassmannForSequenceClassification, num_labels=3, seed=seed)
        return make_classifier("bert", head_type=head_type, seed=seed)

    return make


def test_the_list_of_linear_layers_and_all_linear_adapt_the_same_layers(make_model, flavour):
    expected = {name for name, module in make_model(**flavour).named_modules() if isinstance(module, nn.Linear)}
    for target_modules in (LINEAR_LAYERS, "all-linear"):
        model = adapt(make_model(**flavour), target_modules=target_modules)
        assert set(model.targeted_module_names) == expected - {"lm_head"}


def test_every_adapter_of_a_language_model_counts(make_model, make_ids, flavour):
    ids = make_ids(2, 12)
    assert_all_adapters_count(adapt(make_model(**flavour)), lambda model: model(ids).logits)


@pytest.mark.parametrize("head_type", [None, "grassmann", "linear"])
def test_every_adapter_of_a_classifier_counts(head_type, make_sequence_classifier, make_ids):
    ids = make_ids(4, 12)
    model = adapt(make_sequence_classifier(head_type), "SEQ_CLS")
    assert_all_adapters_count(model, lambda model: model(ids).logits)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_adapters_of_a_transformer_heads_feed_forward_network_count(activation, make_classifier, make_ids):
    """PyTorch's own fused layer would read the weights and leave the adapters out."""
    ids = make_ids(4, 12)
    head = {"head_type": "transformer", "hidden_act": activation, "hidden_dropout": 0.0}
    model = adapt(make_classifier("bert", **head), "SEQ_CLS", target_modules=["linear1", "linear2"])
    with torch.no_grad():
        assert_matter(model, lambda model: model(ids).logits)


def test_the_plucker_projection_is_adapted_as_a_parameter(make_model, make_ids):
    ids = make_ids(2, 12)
    # It is no linear layer, and so not among all of them.
    assert not any("plucker_proj" in name for name in trainable(adapt(make_model())))
    model = adapt(make_model(), target_modules=None, target_parameters=["plucker_proj.weight"])
    assert len(trainable(model)) == 2 * model.config.num_hidden_layers
    assert_all_adapters_count(model, lambda model: model(ids).logits)
    expected = model(ids).logits
    assert_close(model.merge_and_unload()(ids).logits, expected)


@pytest.fixture(scope="module")
def trained(make_model, make_ids, tmp_path_factory):
    """A language model on disk, and what training made of an adapter to it."""
    folder = tmp_path_factory.mktemp("peft")
    make_model().double().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    rows = make_ids(4, 12)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=LINEAR_LAYERS))
    before = model.eval()(rows).logits
    train(model, rows, rows, folder / "adapter")
    logits = model(rows).logits
    return SimpleNamespace(
        base=folder / "base", adapter=folder / "adapter", rows=rows, model=model, before=before, logits=logits
    )


def test_training_changes_the_adapter_and_not_the_model_under_it(trained):
    assert not torch.allclose(trained.logits, trained.before, atol=1e-4)
    with trained.model.disable_adapter():
        assert torch.equal(trained.model(trained.rows).logits, trained.before)


@pytest.mark.parametrize("loader", ["PeftModel", "AutoPeftModelForCausalLM"])
def test_a_trained_adapter_gives_the_same_logits_after_loading(loader, trained):
    if loader == "PeftModel":
        base = AutoModelForCausalLM.from_pretrained(trained.base)
        loaded = peft.PeftModel.from_pretrained(base, trained.adapter)
    else:
        # Finds the model by the adapter's own record of it.
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(trained.adapter)
    assert torch.equal(loaded.eval()(trained.rows).logits, trained.logits)


def test_a_merged_model_gives_the_same_logits_also_after_saving_and_loading(trained, tmp_path):
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(trained.adapter).merge_and_unload()
    logits = merged(trained.rows).logits
    assert_close(logits, trained.logits)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(merged)
    assert torch.equal(loaded(trained.rows).logits, logits)


def test_tied_embeddings_stay_tied(trained):
    for model in (trained.model.get_base_model(), copy.deepcopy(trained.model).merge_and_unload()):
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_leaves_the_gradients_of_an_adapter_as_they_are(use_reentrant, make_model, make_ids):
    ids, gradients = make_ids(2, 12), []
    for checkpointing in (False, True):
        model = adapt(make_model()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            # Reentrant checkpointing gives gradients only to layers whose input needs one, whatever else is frozen.
            model.enable_input_require_grads()
            assert model.get_base_model().model.gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected)


def test_trainer_checkpoints_gradients_of_an_adapter(make_model, make_ids, tmp_path):
    rows = make_ids(4, 12)
    model = adapt(make_model())
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    train(model, rows, rows, tmp_path, gradient_checkpointing=True)
    for name, parameter in trainable(model).items():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.skipif(
    CACHE_NAME == "cache" and Version(peft.__version__) <= Version("0.21.2"),
    reason="PEFT up to 0.21.2 knows no `cache`: it puts the prompts of a Llama, too, before every token",
)
@pytest.mark.parametrize("padding", [0, 3])
def test_generation_behind_tuned_prompts_gives_the_uncached_logits(padding, make_model, make_ids, flavour):
    """PEFT puts tokens of its own before the prompt, and one column for each before every mask."""
    fields = {"num_virtual_tokens": 3, "num_attention_heads": 1, "num_layers": 1, "token_dim": 32}
    model = make_model(**flavour).double()
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", **fields)).eval()
    mask = (torch.arange(8) >= torch.tensor([[0], [padding]])).long()
    ids = make_ids(2, 8) * mask
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    generated = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, **options)
    whole_mask = torch.nn.functional.pad(mask, (0, 5), value=1)
    for step, logits in enumerate(generated.logits):
        seen = slice(None, 8 + step)
        expected = adapted(input_ids=generated.sequences[:, seen], attention_mask=whole_mask[:, seen]).logits[:, -1]
        torch.testing.assert_close(logits, expected.float())


def test_cached_generation_with_an_adapter_gives_the_uncached_tokens(make_model, make_ids):
    model, ids = adapt(make_model()), make_ids(3, 9)
    mask = torch.ones_like(ids)
    # Rows of 9, 4 and 1 tokens, padded on the left.
    mask[1, :5] = mask[2, :8] = 0
    ids = ids.masked_fill(mask == 0, 0)

    def generate(**kwargs):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )

    cached, uncached = generate(use_cache=True), generate(use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits))
    with model.disable_adapter():
        assert not torch.equal(cached.sequences, generate(use_cache=True).sequences)


@pytest.mark.parametrize("head_type", [None, "grassmann", "transformer", "linear"])
def test_a_trained_classifier_gives_the_same_logits_after_loading(
    head_type, make_sequence_classifier, make_ids, tmp_path
):
    make_sequence_classifier(head_type).double().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    rows = make_ids(4, 12)
    # The head on a backbone is trained whole, as new weights should be. A linear head has none of its own.
    modules_to_save = ["head"] if head_type in ("grassmann", "transformer") else None
    model = adapt(base, "SEQ_CLS", modules_to_save=modules_to_save)
    weights = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    classifier = "classifier" if head_type else "score"
    assert any(f"{classifier}.modules_to_save" in name for name in weights)
    train(model, rows, LABELS, tmp_path / "adapter")
    for name, parameter in trainable(model).items():
        assert not torch.equal(parameter, weights[name]), name
    logits = model(rows).logits

    loaded = [
        peft.PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ),
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
    ]
    for other in loaded:
        assert torch.equal(other.eval()(rows).logits, logits)

    merged = loaded[0].merge_and_unload()
    assert_close(merged(rows).logits, logits)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(rows).logits, merged(rows).logits)


@pytest.mark.parametrize("head_type", ["grassmann", "transformer"])
def test_an_adapter_with_the_whole_head_needs_nothing_else_but_the_backbone(
    head_type, make_sequence_classifier, make_ids, tmp_path
):
    ids = make_ids(4, 12)
    model = adapt(make_sequence_classifier(head_type), "SEQ_CLS", modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    other = make_sequence_classifier(head_type, seed=5).double()
    other.backbone.load_state_dict(make_sequence_classifier(head_type).backbone.state_dict())
    assert not torch.allclose(other.head.projection.weight, model.get_base_model().head.projection.weight)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
