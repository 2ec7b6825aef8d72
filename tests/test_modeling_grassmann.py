# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import modeling_grassmann
from modeling_grassmann import GrassmannForCausalLM, GrassmannForSequenceClassification, GrassmannModel
from modeling_grassmann.cache_grassmann import CACHE_NAME


MODEL_CLASSES = {
    AutoModel: GrassmannModel,
    AutoModelForCausalLM: GrassmannForCausalLM,
    AutoModelForSequenceClassification: GrassmannForSequenceClassification,
}
# Inductor needs a C++ compiler; everything that Dynamo may refuse shows without one, too.
COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


# Auto classes, saving and loading


@pytest.mark.parametrize(("auto_class", "model_class"), MODEL_CLASSES.items())
def test_auto_classes_build_the_model_of_the_configuration(auto_class, model_class, make_config):
    assert type(auto_class.from_config(make_config())) is model_class


@pytest.mark.parametrize(("auto_class", "model_class"), MODEL_CLASSES.items())
def test_a_saved_model_loads_as_safetensors_with_equal_outputs_to_the_bit(
    auto_class, model_class, make_model, make_ids, flavour, tmp_path
):
    model = make_model(model_class, **flavour)
    model.save_pretrained(tmp_path)
    weights = [path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")]
    assert weights == ["model.safetensors"]

    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(info.values()), info
    ids = make_ids(2, 12)
    assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_the_code_of_a_checkpoint_lies_in_its_folder_and_one_above_for_the_trainer(make_model, tmp_path):
    package = Path(modeling_grassmann.__file__).parent
    modules = {"cache_grassmann.py", "checkpoint_grassmann.py", "configuration_grassmann.py", "modeling_grassmann.py"}
    modules |= {"frames_triton.py", "grassmann_memory.py", "grassmann_memory_triton.py", "loss_grassmann.py"}
    modules |= {"memory_mixer.py", "memory_states_triton.py", "memory_step_triton.py", "plucker.py"}
    modules |= {"plucker_triton.py"}
    model = make_model()
    for name, above in (("checkpoint-best", False), ("checkpoint-10", True)):
        model.save_pretrained(tmp_path / name / name)
        for folder, present in ((tmp_path / name / name, True), (tmp_path / name, above)):
            assert {path.name for path in folder.glob("*.py")} == (modules if present else set())
        assert all(
            (tmp_path / name / name / module).read_bytes() == (package / module).read_bytes() for module in modules
        )


def test_a_sharded_checkpoint_loads_with_equal_logits(make_model, make_ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = make_ids(2, 12)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_loads_the_same_model(device_map, make_model, make_ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    ids = make_ids(2, 12)
    # "auto" may find an accelerator, whose sums are ordered differently.
    torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


def test_a_model_loads_and_runs_in_bfloat16(make_model, make_ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = make_ids(2, 12)
    logits, expected = loaded(ids).logits, model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"norm_placement": "Pre"}, '`norm_placement` must be "post" or "pre", got \'Pre\''),
        ({"num_hidden_layers": 2}, r"`offsets` must hold one list per layer \(2"),
    ],
    ids=str,
)
def test_an_impossible_override_is_refused_when_loading(override, message, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_after_loading_exactly_when_configured(tied, make_model, tmp_path):
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_a_classifier_loads_the_body_of_a_language_model(make_model, tmp_path):
    language_model = make_model()
    language_model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    for name, parameter in language_model.model.named_parameters():
        assert torch.equal(parameter, classifier.model.get_parameter(name)), name


def test_initial_weights_have_the_configured_standard_deviation_and_zero_biases(make_config):
    torch.manual_seed(0)
    config = make_config(
        hidden_size=64, reduced_size=16, initializer_range=0.07, learned_offset_weights=True, mixer_out_proj=True
    )
    model = GrassmannForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("offset_weights") or ("norm" in name and name.endswith("weight")):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.07, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.01, name
    assert any("plucker_proj.weight" in name for name, _ in model.named_parameters())


# Outputs


def test_the_loss_is_the_shifted_cross_entropy_over_labelled_tokens(make_model, make_ids):
    model, ids = make_model(), make_ids(3, 10)
    labels = ids.clone()
    labels[0, :4] = labels[2, 7:] = -100
    output = model(ids, labels=labels)

    log_probs = output.logits.log_softmax(-1)
    terms = [
        -log_probs[row, t, labels[row, t + 1]] for row in range(3) for t in range(9) if labels[row, t + 1] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    # Gradient accumulation divides by the number of labels in all micro-batches.
    torch.testing.assert_close(
        model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, torch.stack(terms).sum() / 50
    )


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 9])], ids=str)
def test_logits_to_keep_selects_positions(keep, make_model, make_ids):
    model, ids = make_model(), make_ids(2, 10)
    expected = model(ids).logits
    expected = expected[:, -keep:] if isinstance(keep, int) else expected[:, keep]
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


@pytest.mark.parametrize("model_class", MODEL_CLASSES.values())
def test_hidden_states_are_those_of_the_embeddings_and_of_every_layer(model_class, make_model, make_ids):
    model, ids = make_model(model_class), make_ids(2, 10)
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    base = model if model_class is GrassmannModel else model.model
    assert len(hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(hidden_states[0], base.embed_tokens(ids) + base.embed_positions.weight[:10])
    positions = torch.arange(10).expand(2, 10)
    for before, after, layer in zip(hidden_states[:-2], hidden_states[1:-1], base.layers[:-1], strict=True):
        torch.testing.assert_close(layer(before, positions), after)
    # As in other models, the last entry is what the head sees.
    torch.testing.assert_close(hidden_states[-1], base(ids).last_hidden_state)


@pytest.mark.parametrize("model_class", MODEL_CLASSES.values())
def test_a_tuple_holds_what_the_named_output_holds(model_class, make_model, make_ids):
    model, ids = make_model(model_class), make_ids(2, 10)
    named, plain = model(ids, use_cache=False), model(ids, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1
    assert torch.equal(plain[0], named[0])


@pytest.mark.parametrize("model_class", [GrassmannModel, GrassmannForCausalLM])
def test_embeddings_give_what_their_ids_give(model_class, make_model, make_ids):
    model, ids = make_model(model_class), make_ids(2, 10)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings)[0], model(ids)[0])
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeddings)


def test_generation_starts_from_embeddings(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 10)
    embeddings = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=8, do_sample=False)[:, 10:])
    # The position table holds 64, and the last token is returned without being read.
    with pytest.raises(ValueError, match=r"65 tokens.*`max_position_embeddings` is 64"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=56, do_sample=False)


# Which tokens a token depends on


def changed_outputs(model, ids, position):
    """Indices of the outputs that change with the token at `position`."""
    other = ids.clone()
    other[0, position] = ids[0, position] % 99 + 1
    difference = (model(other)[0] - model(ids)[0]).abs().amax(-1)[0]
    return set(torch.nonzero(difference).flatten().tolist())


@pytest.mark.parametrize("norm_placement", ["post", "pre"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("offsets", [[[3]], [[2, 7]], [[1], [2], [4]], [[5], [1, 3]]], ids=str)
def test_a_token_reaches_exactly_the_sums_of_offsets(offsets, is_causal, norm_placement, make_model, make_ids):
    model = make_model(
        GrassmannModel,
        num_hidden_layers=len(offsets),
        offsets=offsets,
        is_causal=is_causal,
        norm_placement=norm_placement,
    )
    length, position = 40, 18
    reached = {position}
    for layer in offsets:
        signed = layer if is_causal else [sign * offset for offset in layer for sign in (1, -1)]
        reached |= {start + offset for start in reached for offset in signed}
    assert changed_outputs(model, make_ids(1, length), position) == {t for t in reached if 0 <= t < length}


def test_no_logit_depends_on_a_later_token(make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(1, 20)
    for position in range(20):
        changed = changed_outputs(model, ids, position)
        assert position in changed
        assert min(changed) == position


def test_a_bidirectional_model_refuses_what_needs_causality(make_config, make_model, make_ids):
    with pytest.raises(ValueError, match=r"`is_causal` must be True.*got False"):
        GrassmannForCausalLM(make_config(is_causal=False))
    cache = make_model()(make_ids(1, 3)).past_key_values
    model = make_model(GrassmannModel, is_causal=False)
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` needs `is_causal=True`"):
        model(make_ids(1, 3), past_key_values=cache)
    assert model(make_ids(1, 3), use_cache=True).past_key_values is None


# Lengths and masks


def test_a_sequence_longer_than_the_position_table_is_refused_by_message(make_model, make_ids):
    model = make_model(max_position_embeddings=16)
    assert model(make_ids(1, 16)).logits.shape[1] == 16
    for inputs in ({}, {"attention_mask": torch.ones(1, 17, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"17 tokens.*`max_position_embeddings` is 16"):
            model(make_ids(1, 17), **inputs)


def test_decoding_by_hand_past_the_position_table_is_refused_by_message(make_model, make_ids):
    model = make_model(max_position_embeddings=16)
    cache = model(make_ids(1, 16)).past_key_values
    with pytest.raises(ValueError, match=r"17 tokens.*`max_position_embeddings` is 16"):
        model(make_ids(1, 1), past_key_values=cache)


def test_padding_does_not_count_against_the_position_table(make_model, make_ids):
    model, row = make_model(max_position_embeddings=16), make_ids(1, 10)
    ids, mask = F.pad(row, (20, 0)), F.pad(torch.ones_like(row), (20, 0))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 20:], model(row).logits)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(generated[:, 20:], model.generate(row, max_new_tokens=7, do_sample=False))


@pytest.mark.parametrize("columns", [7, 14])
def test_a_mask_of_another_length_than_the_tokens_is_refused(columns, make_model, make_ids):
    with pytest.raises(ValueError, match=rf"`attention_mask`.* 10 tokens.*\(2, {columns}\)"):
        make_model()(make_ids(2, 10), attention_mask=torch.ones(2, columns))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_past_the_position_table_is_refused_by_message(use_cache, make_model, make_ids):
    model, ids = make_model(max_position_embeddings=16), make_ids(2, 10)
    # The last token is returned without being read.
    assert model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=use_cache).shape == (2, 17)
    with pytest.raises(ValueError, match=r"17 tokens.*`max_position_embeddings` is 16"):
        model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache)


def test_packed_sequences_may_be_longer_together_than_the_position_table(make_model, make_ids):
    model, ids = make_model(max_position_embeddings=16), make_ids(1, 36)
    logits = model(ids, position_ids=torch.arange(12).repeat(3)[None]).logits
    torch.testing.assert_close(logits.view(3, 12, -1), model(ids.view(3, 12)).logits)


def test_rows_of_no_tokens_have_no_logits_and_change_no_state(make_model, make_ids, flavour):
    model, ids, none = make_model(**flavour), make_ids(2, 9), make_ids(2, 0)
    outputs = model(none, use_cache=True)
    assert outputs.logits.shape == (2, 0, model.config.vocab_size)
    logits = []
    for tokens in (ids[:, :4], none, ids[:, 4:5], none, ids[:, 5:]):
        outputs = model(tokens, past_key_values=outputs.past_key_values)
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits)


def test_a_model_without_positions_takes_any_length_and_does_not_see_where_it_is(make_model, make_ids):
    model, ids = make_model(max_position_embeddings=None), make_ids(1, 300)
    # The offsets 1, 2 and 4 reach seven tokens back.
    torch.testing.assert_close(model(ids).logits[:, 107:], model(ids[:, 100:]).logits[:, 7:])


def test_a_mask_that_is_not_two_dimensional_is_refused(make_model, make_ids):
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(batch, length\).*\(1, 1, 4, 4\)"):
        make_model()(make_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


def test_a_classification_batch_without_padding_id_is_refused(make_model, make_ids):
    model = make_model(GrassmannForSequenceClassification, pad_token_id=None, num_labels=3)
    assert model(make_ids(1, 4)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"`pad_token_id` must be .* batch of 2 rows, got None"):
        model(make_ids(2, 4))


def test_the_mask_says_which_token_is_classified(make_model, make_ids):
    model = make_model(GrassmannForSequenceClassification, num_labels=3)
    ids = make_ids(2, 9)
    # A real token with the padding id, and padding with another.
    ids[0, 5] = model.config.pad_token_id
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).long()
    expected = torch.cat([model(ids[:1, :6], attention_mask=mask[:1, :6]).logits, model(ids[1:]).logits])
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected)


def test_the_classification_loss_is_the_cross_entropy_of_the_last_token(make_model, make_ids):
    model, ids = make_model(GrassmannForSequenceClassification, num_labels=3), make_ids(4, 9)
    labels = torch.tensor([0, 2, 1, 2])
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.logits, model.score(model.model(ids).last_hidden_state[:, -1]))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    total = F.cross_entropy(output.logits, labels, reduction="sum")
    # Gradient accumulation divides by the number of rows in all micro-batches.
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss, total / 10)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", [None, "last", "first", "mean"])
def test_the_pooling_says_which_real_tokens_are_classified_on_either_side_of_padding(
    pooling, is_causal, make_model, make_ids
):
    model = make_model(
        GrassmannForSequenceClassification, num_labels=3, is_causal=is_causal, classifier_pooling=pooling
    )
    resolved = pooling or ("last" if is_causal else "mean")
    rows = [make_ids(length, seed=length) for length in (9, 1, 5)]
    expected = []
    for row in rows:
        hidden_states = model.model(row[None]).last_hidden_state[0]
        pooled = {"last": hidden_states[-1], "first": hidden_states[0], "mean": hidden_states.mean(0)}[resolved]
        expected.append(model.score(pooled))
        torch.testing.assert_close(model(row[None]).logits[0], expected[-1])
    for side in ("left", "right"):
        paddings = [(12 - len(row), 0) if side == "left" else (0, 12 - len(row)) for row in rows]
        ids = torch.stack([F.pad(row, padding) for row, padding in zip(rows, paddings)])
        mask = torch.stack([F.pad(torch.ones_like(row), padding) for row, padding in zip(rows, paddings)])
        noise = torch.where(mask.bool(), ids, 7)
        for padded in (ids, noise):
            logits = model(padded, attention_mask=mask).logits
            torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=3e-6)


def test_a_pooling_survives_saving_and_an_unknown_one_is_refused(make_model, make_ids, tmp_path):
    model = make_model(GrassmannForSequenceClassification, num_labels=3, classifier_pooling="first")
    model.save_pretrained(tmp_path)
    ids = make_ids(2, 9)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    changed = AutoModelForSequenceClassification.from_pretrained(tmp_path, classifier_pooling="mean")
    assert not torch.allclose(changed(ids).logits, model(ids).logits, atol=1e-3)
    with pytest.raises(StrictDataclassError, match=r"`classifier_pooling` must be one of .*got 'max'"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, classifier_pooling="max")


# Training


def test_a_folder_named_as_a_checkpoint_brings_no_modules_among_those_of_a_user(make_model, tmp_path, monkeypatch):
    """A Python that is started above would import them instead of the package."""
    model = make_model()
    (tmp_path / "plucker.py").write_text("mine = 1\n")
    model.save_pretrained(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "plucker.py").exists()
    assert [path.read_text() for path in tmp_path.glob("*.py")] == ["mine = 1\n"]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model.save_pretrained("checkpoint-5")
    assert not list((tmp_path / "work").glob("*.py"))


@pytest.mark.parametrize("model_class", [GrassmannForCausalLM, GrassmannForSequenceClassification])
def test_every_parameter_receives_a_gradient(model_class, make_model, make_ids, flavour):
    model, ids = make_model(model_class, **flavour).train(), make_ids(4, 64)
    labels = ids if model_class is GrassmannForCausalLM else torch.tensor([0, 1, 1, 0])
    for name, gradient in gradients(model, input_ids=ids, labels=labels).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, make_model, make_ids, flavour):
    model, ids = make_model(**flavour).train(), make_ids(2, 20)
    mask = (torch.arange(20) >= torch.tensor([[0], [5]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for name, gradient in gradients(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_gradient_checkpointing_refuses_a_state_where_layers_would_run_on_it_twice(make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(1, 9)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` cannot be used with gradient checkpointing"):
        model(ids, labels=ids, past_key_values=DynamicCache(config=model.config))
    # Without gradients nothing runs twice: samples may be drawn between steps.
    generated = model.generate(
        ids, max_new_tokens=6, do_sample=False, past_key_values=DynamicCache(config=model.config)
    )
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("field", ["hidden_dropout", "embedding_dropout"])
def test_each_dropout_acts_in_training_only(field, make_model, make_ids):
    model, ids = make_model(**{field: 0.5}), make_ids(2, 12)
    assert torch.equal(model(ids).logits, make_model()(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=0.1)


@pytest.mark.parametrize("offsets", [[[1], [2], [4]], [1, 2, 5]], ids=["one_per_layer", "flat"])
@pytest.mark.parametrize("repeats", [2, 24], ids=["pairs_of_equal_tokens", "all_tokens_equal"])
def test_parallel_neighbours_leave_outputs_and_gradients_finite_and_decoding_exact(repeats, offsets, make_model):
    # Without positions, equal tokens have parallel vectors that span no plane; dividing their wedge, which is rounding
    # noise, by its norm would make features of unit size and gradients of 1e9.
    model = make_model(max_position_embeddings=None, offsets=offsets)
    ids = torch.arange(5, 5 + 24 // repeats).repeat_interleave(repeats)[None]
    logits = model(ids).logits
    assert logits.isfinite().all()
    for name, gradient in gradients(model, input_ids=ids, labels=ids).items():
        assert gradient.isfinite().all() and gradient.abs().max() < 100, name

    cache, steps = None, []
    for token in ids[0]:
        output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, atol=1e-5, rtol=0)


def test_trainer_lowers_the_loss_and_resumes_where_it_stopped(make_model, tmp_path):
    # Each sequence counts upwards from a different token, so that the next token can be learned.
    data = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(12) + start for start in range(1, 33))]

    def train(model, **kwargs):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=20,
            save_steps=10,
            logging_steps=1,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(**kwargs)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = make_model()
    losses = train(model)
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2

    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["global_step"] == 10
    resumed = make_model(seed=7)
    assert train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-10")) == pytest.approx(losses, rel=1e-4)
    for (name, parameter), expected in zip(resumed.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)


# Tools around the model


def check_compiled(model, inputs, backend):
    expected, expected_gradients = model(**inputs), gradients(model, **inputs)
    torch._dynamo.reset()
    model.zero_grad()
    output = torch.compile(model, fullgraph=True, backend=backend)(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture
def padded_inputs(make_ids):
    ids = make_ids(2, 16)
    mask = (torch.arange(16) >= torch.tensor([[0], [5]])).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def test_every_model_is_traced_without_a_graph_break(make_model, padded_inputs, flavour):
    check_compiled(make_model(**flavour), padded_inputs, "eager")


def test_a_compiled_model_gives_eager_outputs_and_gradients(make_model, padded_inputs):
    check_compiled(make_model(num_hidden_layers=1, offsets=[1, 3]), padded_inputs, COMPILER)


def test_the_text_generation_pipeline_gives_each_prompt_of_a_batch_what_it_gets_alone(make_model):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")

    model = make_model(vocab_size=len(vocabulary))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_tensors": True}
    prompts = ["To be, or not to be", "Grass", "Two vectors span a plane"]
    together = generator(prompts, batch_size=3, **options)
    for prompt, [batched] in zip(prompts, together, strict=True):
        [alone] = generator(prompt, **options)
        assert len(alone["generated_token_ids"]) == len(prompt) + 12
        assert batched["generated_token_ids"][-12:] == alone["generated_token_ids"][-12:]
