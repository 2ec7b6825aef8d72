# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""One exported program, of `torch.export` or in ONNX, serves every batch size and length, padding included."""

import pytest
import torch
from torch.export import Dim

from modeling_grassmann import GrassmannForSequenceClassification


MAX_LENGTH = 64
# Batch size and length: a single token, lengths below and at offsets and window sizes, and the position table's end.
SIZES = [(1, 1), (1, 7), (3, 2), (2, 8), (5, 33), (2, MAX_LENGTH)]
CLASSIFIERS = {
    "last": {},
    "first": {"classifier_pooling": "first"},
    "bidirectional": {"is_causal": False},
}
HEADS = {
    "grassmann": {"head_type": "grassmann"},
    "overlapping_windows": {"head_type": "grassmann", "window_size": 8, "window_stride": 4},
    "two_tokens_a_window": {"head_type": "grassmann", "window_size": 2, "window_stride": 2, "norm_placement": "pre"},
    "transformer": {"head_type": "transformer"},
    "linear": {"head_type": "linear"},
}


def make_inputs(make_ids, batch_size, length, side):
    """Rows of several lengths, the first of them without padding."""
    ids = make_ids(batch_size, length)
    real = torch.arange(length) < (length - 3 * torch.arange(batch_size)[:, None]).clamp(min=1)
    mask = (real.flip(1) if side == "left" else real).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def dynamic_shapes(inputs):
    """The batch and the length of each input may change; the length up to the end of the position table."""
    sizes = {0: Dim("batch"), 1: Dim("length", max=MAX_LENGTH)}
    return dict.fromkeys(inputs, sizes)


@torch.no_grad()
def check_exported(model, make_ids, folder, exact=True):
    # The state is no output of the program, then.
    model.config.use_cache = False
    example = make_inputs(make_ids, 2, 16, "left")
    program = torch.export.export(model, (), kwargs=example, dynamic_shapes=dynamic_shapes(example))
    torch.export.save(program, folder / "model.pt2")
    exported = torch.export.load(folder / "model.pt2").module()
    for batch_size, length in SIZES:
        for side in ("left", "right"):
            inputs = make_inputs(make_ids, batch_size, length, side)
            tolerance = {"rtol": 0, "atol": 0 if exact else 1e-6}
            torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, **tolerance)


def check_onnx(model, make_ids, folder):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"export to ONNX needs {package}")
    import onnxruntime

    model.config.use_cache = False
    example = make_inputs(make_ids, 2, 16, "left")
    torch.onnx.export(
        model,
        (),
        folder / "model.onnx",
        kwargs=example,
        dynamic_shapes=dynamic_shapes(example),
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    for batch_size, length in SIZES:
        for side in ("left", "right"):
            inputs = make_inputs(make_ids, batch_size, length, side)
            [logits] = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
            with torch.no_grad():
                expected = model(**inputs).logits
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)


def some_slow(cases, fast):
    """All cases, of which only the `fast` ones run by default: a conversion to ONNX takes seconds."""
    marks = {name: () if name in fast else pytest.mark.slow for name in cases}
    return [pytest.param(fields, id=name, marks=marks[name]) for name, fields in cases.items()]


# torch.export


def test_an_exported_language_model_gives_the_eager_logits_to_the_bit_at_every_size(
    make_model, make_ids, tmp_path, flavour
):
    check_exported(make_model(**flavour), make_ids, tmp_path)


def test_a_language_model_is_exported_without_a_mask_too(make_model, make_ids):
    model = make_model(num_hidden_layers=1, offsets=[[1, 3]], use_cache=False)
    example = {"input_ids": make_ids(2, 16)}
    program = torch.export.export(model, (), kwargs=example, dynamic_shapes=dynamic_shapes(example))
    exported = program.module()
    for size in SIZES:
        ids = make_ids(*size)
        assert torch.equal(exported(input_ids=ids).logits, model(ids).logits)


@pytest.mark.parametrize("fields", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_an_exported_classifier_gives_the_eager_logits_to_the_bit_at_every_size(
    fields, make_model, make_ids, tmp_path
):
    fields = {"num_hidden_layers": 1, "offsets": [[1, 3]], **fields}
    check_exported(make_model(GrassmannForSequenceClassification, **fields), make_ids, tmp_path)


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS.keys())
def test_an_exported_classifier_on_a_backbone_gives_the_eager_logits_at_every_size(
    fields, make_classifier, make_ids, tmp_path
):
    # The exported program sums a window's pairs in another order.
    exact = fields["head_type"] != "grassmann"
    check_exported(make_classifier("bert", **{"num_hidden_layers": 1, **fields}), make_ids, tmp_path, exact)


# ONNX


def test_onnx_runtime_gives_the_logits_of_a_language_model_at_every_size(make_model, make_ids, tmp_path):
    fields = {"num_plucker_heads": 3, "learned_offset_weights": True, "separate_past_projection": True}
    check_onnx(make_model(num_hidden_layers=2, offsets=[[1, 2], [7]], **fields), make_ids, tmp_path)


@pytest.mark.slow
def test_onnx_runtime_gives_the_logits_of_every_language_model_at_every_size(make_model, make_ids, tmp_path, flavour):
    if "memory" in flavour.get("mixer_types", ""):
        pytest.skip("ONNX has no running maximum, by which a memory finds where sequences begin")
    check_onnx(make_model(**flavour), make_ids, tmp_path)


@pytest.mark.parametrize("fields", some_slow(CLASSIFIERS, fast=["bidirectional"]))
def test_onnx_runtime_gives_the_logits_of_a_classifier_at_every_size(fields, make_model, make_ids, tmp_path):
    fields = {"num_hidden_layers": 1, "offsets": [[1, 3]], **fields}
    check_onnx(make_model(GrassmannForSequenceClassification, **fields), make_ids, tmp_path)


@pytest.mark.parametrize("fields", some_slow(HEADS, fast=["overlapping_windows"]))
def test_onnx_runtime_gives_the_logits_of_a_classifier_on_a_backbone_at_every_size(
    fields, make_classifier, make_ids, tmp_path
):
    check_onnx(make_classifier("distilbert", **{"num_hidden_layers": 1, **fields}), make_ids, tmp_path)
