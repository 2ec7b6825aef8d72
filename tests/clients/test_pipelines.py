# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Pipelines give what the model itself gives, from nothing but a folder with model and tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast, pipeline

from modeling_grassmann import GrassmannForSequenceClassification, GrassmannModel


WORDS = ["[PAD]", "[UNK]", "a", "man", "is", "not", "sleeping", "the", "street", "dog", "runs"]
TEXTS = ["a man is not sleeping the street", "the dog", "runs", "a dog runs the street is sleeping not a man"]
LABELS = {0: "entailment", 1: "neutral", 2: "contradiction"}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(params=["causal", "bidirectional", "head_on_bert", "head_on_grassmann"])
def classifier(request, make_model, make_classifier):
    if request.param.startswith("head_on_"):
        return make_classifier(request.param.removeprefix("head_on_"), id2label=LABELS)
    is_causal = request.param == "causal"
    return make_model(GrassmannForSequenceClassification, is_causal=is_causal, id2label=LABELS)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits_alone(model, tokenizer, texts=TEXTS):
    """Logits of each text, each in a batch of its own."""
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def scores_by_label(entries):
    assert sorted(entry["label"] for entry in entries) == sorted(LABELS.values())
    scores = {entry["label"]: entry["score"] for entry in entries}
    return [scores[label] for label in LABELS.values()]


FUNCTIONS = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "none": lambda logits: logits,
}


def test_text_classification_gives_the_models_scores_in_any_batch(classifier, tokenizer, tmp_path):
    classify = pipeline("text-classification", model=save(classifier, tokenizer, tmp_path), device="cpu")
    logits = logits_alone(classifier, tokenizer)
    for batch_size in (1, 2, 4):
        for name, function in FUNCTIONS.items():
            outputs = classify(TEXTS, batch_size=batch_size, top_k=None, function_to_apply=name)
            scores = torch.tensor([scores_by_label(entries) for entries in outputs])
            torch.testing.assert_close(scores, function(logits), rtol=0, atol=1e-5)


def test_text_classification_names_the_likeliest_class(classifier, tokenizer, tmp_path):
    classify = pipeline("text-classification", model=save(classifier, tokenizer, tmp_path), device="cpu")
    best, index = logits_alone(classifier, tokenizer).softmax(-1).max(-1)
    outputs = classify(TEXTS, batch_size=4)
    assert [output["label"] for output in outputs] == [LABELS[i] for i in index.tolist()]
    assert [output["score"] for output in outputs] == pytest.approx(best.tolist(), abs=1e-6)
    assert [len(entries) for entries in classify(TEXTS, top_k=2)] == [2] * len(TEXTS)


def test_text_classification_loads_a_type_and_a_device_map(classifier, tokenizer, tmp_path):
    folder = save(classifier, tokenizer, tmp_path)
    classify = pipeline("text-classification", model=folder, device_map="cpu", dtype=torch.bfloat16)
    assert classify.model.dtype == torch.bfloat16
    outputs = classify(TEXTS, batch_size=4, top_k=None, function_to_apply="none")
    scores = torch.tensor([scores_by_label(entries) for entries in outputs])
    # bfloat16 has 8 bits; in every layer one of them may be lost.
    expected = logits_alone(classifier, tokenizer)
    assert 0 < (scores - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_feature_extraction_gives_the_models_hidden_states(padding_side, make_model, tokenizer, tmp_path, flavour):
    # In float64: how float32 rounds depends on the processor, on a batch's shape and on where weights lie in memory.
    model = make_model(GrassmannModel, **flavour).double()
    folder = save(model, tokenizer, tmp_path)
    assert isinstance(AutoModel.from_pretrained(folder), GrassmannModel)
    extract = pipeline("feature-extraction", model=folder, device="cpu", dtype=torch.float64)
    extract.tokenizer.padding_side = padding_side
    together = extract(TEXTS, batch_size=4, return_tensors=True)
    for text, features in zip(TEXTS, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids).last_hidden_state
        torch.testing.assert_close(extract(text, return_tensors=True), expected, rtol=0, atol=1e-10)
        # A batch is returned with its padding.
        real = slice(-ids.shape[1], None) if padding_side == "left" else slice(ids.shape[1])
        torch.testing.assert_close(features[:, real], expected, rtol=0, atol=1e-10)


def test_text_generation_from_a_folder_gives_the_models_tokens(make_model, tokenizer, tmp_path):
    model = make_model()
    generate = pipeline("text-generation", model=save(model, tokenizer, tmp_path), device="cpu")
    outputs = generate(TEXTS, batch_size=4, max_new_tokens=8, do_sample=False, return_tensors=True)
    for text, [output] in zip(TEXTS, outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert output["generated_token_ids"][-8:] == expected
