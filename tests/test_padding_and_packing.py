# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""A batch gives, row by row, what each row gives alone, however its rows are laid out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from modeling_grassmann import GrassmannForSequenceClassification, GrassmannModel, PluckerMixer
from modeling_grassmann.plucker import positions_from_cu_seqlens


# The shortest row is shorter than most offsets, the longest has room for all of them.
LENGTHS = (1, 3, 20, 7)
SIDES = ("left", "right")


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def is_causal(request, flavour):
    if not request.param and "memory" in flavour.get("mixer_types", ""):
        pytest.skip("a memory is of the past: there are no bidirectional ones")
    return request.param


@pytest.fixture(scope="module")
def make_model(make_model):
    """In float64: how float32 rounds depends on the shape of a batch and on the processor."""

    def make(*args, **overrides):
        return make_model(*args, **overrides).double()

    return make


def assert_equal(actual, expected):
    """Up to rounding. Losses of language models are in float32, whatever the model is."""
    torch.testing.assert_close(actual, expected, atol=1e-5 if actual.dtype == torch.float32 else 1e-10, rtol=0)


def make_rows(lengths, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 100, (length,), generator=generator) for length in lengths]


def pad(rows, side, fill=0, mask_dtype=torch.long, extra=0):
    """Padded ids and mask; `fill` is the padding id, or a function that draws ids."""
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), fill) if isinstance(fill, int) else fill(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=mask_dtype)
    for index, row in enumerate(rows):
        real = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[index, real], mask[index, real] = row, 1
    return ids, mask


def pack(rows):
    """One row that holds all of them, with positions that start anew."""
    return torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_hidden_states_of_padded_rows_are_those_of_each_row_alone(side, mask_dtype, is_causal, make_model, flavour):
    model, rows = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows(LENGTHS)
    ids, mask = pad(rows, side, mask_dtype=mask_dtype, extra=2)
    hidden_states = model(ids, attention_mask=mask).last_hidden_state
    for row, states, real in zip(rows, hidden_states, mask.bool(), strict=True):
        assert_equal(states[real], model(row[None]).last_hidden_state[0])


def test_hidden_states_of_packed_rows_are_those_of_each_row_alone(is_causal, make_model, flavour):
    model, rows = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows(LENGTHS)
    ids, position_ids = pack(rows)
    hidden_states = model(ids, position_ids=position_ids).last_hidden_state[0]
    for row, states in zip(rows, hidden_states.split(LENGTHS), strict=True):
        assert_equal(states, model(row[None]).last_hidden_state[0])


def test_packed_rows_may_be_padded_too(make_model, flavour):
    model, rows = make_model(GrassmannModel, **flavour), make_rows(LENGTHS)
    ids, position_ids = pack(rows)
    ids, position_ids = (torch.nn.functional.pad(tensor, (3, 4)) for tensor in (ids, position_ids))
    mask = torch.nn.functional.pad(torch.ones(1, sum(LENGTHS), dtype=torch.long), (3, 4))
    hidden_states = model(ids, attention_mask=mask, position_ids=position_ids).last_hidden_state[0, 3:-4]
    for row, states in zip(rows, hidden_states.split(LENGTHS), strict=True):
        assert_equal(states, model(row[None]).last_hidden_state[0])


@pytest.mark.parametrize("side", SIDES)
def test_padding_forms_no_pair_even_where_given_positions_run_on_through_it(side, is_causal, make_model, flavour):
    # Positions that are derived from the mask stand still in padding, and so would not show a missing mask.
    model, rows = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows(LENGTHS)
    ids, mask = pad(rows, side, fill=lambda *shape: torch.randint(0, 100, shape), extra=2)
    position_ids = torch.arange(ids.shape[1])[None]
    hidden_states = model(ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    for row, states, real in zip(rows, hidden_states, mask.bool(), strict=True):
        alone = model(row[None], position_ids=position_ids[:, real]).last_hidden_state[0]
        assert_equal(states[real], alone)


def test_a_packed_row_may_begin_inside_a_sequence(is_causal, make_model, flavour):
    # The positions at its two ends fit together, but its ends are no neighbours.
    model, ids = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows([18])[0][None]
    position_ids = torch.cat([torch.arange(9, 18), torch.arange(9)])[None]
    hidden_states = model(ids, position_ids=position_ids).last_hidden_state
    for piece in (slice(9), slice(9, 18)):
        alone = model(ids[:, piece], position_ids=position_ids[:, piece]).last_hidden_state
        assert_equal(hidden_states[:, piece], alone)


def logits_and_loss_alone(model, rows):
    """Logits of each row by itself, and the mean loss over all their predicted tokens, in float32 as Transformers'."""
    logits = [model(row[None]).logits[0] for row in rows]
    terms = [
        torch.nn.functional.cross_entropy(row_logits[:-1], row[1:], reduction="none")
        for row_logits, row in zip(logits, rows, strict=True)
    ]
    return logits, torch.cat(terms).mean().float()


@pytest.mark.parametrize("side", SIDES)
def test_language_model_logits_and_loss_of_padded_rows_are_those_of_each_row_alone(side, make_model, flavour):
    model, rows = make_model(**flavour), make_rows(LENGTHS)
    ids, mask = pad(rows, side)
    # On the left, the first real token of a row would otherwise be predicted from padding.
    first = mask.cumsum(1) == 1
    labels = ids.masked_fill((mask == 0) | first, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    logits, loss = logits_and_loss_alone(model, rows)
    for actual, expected, real in zip(output.logits, logits, mask.bool(), strict=True):
        assert_equal(actual[real], expected)
    assert_equal(output.loss, loss)


def test_language_model_logits_and_loss_of_a_flattened_batch_are_those_of_each_row_alone(make_model, flavour):
    model, rows = make_model(**flavour), make_rows(LENGTHS)
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    output = model(**batch)
    logits, loss = logits_and_loss_alone(model, rows)
    assert_equal(output.logits[0], torch.cat(logits))
    assert_equal(output.loss, loss)


# Boundaries of packed rows: `cu_seqlens`


def boundaries(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_boundaries_give_each_row_and_every_gradient_what_it_gives_alone(
    is_causal, dtype, with_positions, make_model, flavour
):
    model, rows = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows(LENGTHS)
    ids, position_ids = pack(rows)
    position_ids = position_ids if with_positions else None
    packed = model(ids, position_ids=position_ids, cu_seq_lens_q=boundaries(LENGTHS, dtype)).last_hidden_state[0]
    alone = torch.cat([model(row[None]).last_hidden_state[0] for row in rows])
    assert_equal(packed, alone)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    expected = gradients(model, (alone * weights).sum())
    for name, gradient in gradients(model, (packed * weights).sum()).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-9)


def test_no_pair_crosses_a_boundary_where_given_positions_run_on(is_causal, make_model, flavour):
    model, rows = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows(LENGTHS)
    ids, position_ids = torch.cat(rows)[None], torch.arange(sum(LENGTHS))[None]
    hidden_states = model(ids, position_ids=position_ids, cu_seq_lens_q=boundaries(LENGTHS)).last_hidden_state[0]
    joined = model(ids, position_ids=position_ids).last_hidden_state[0]
    pieces = (tensor.split(LENGTHS, dim=-1) for tensor in (ids, position_ids))
    for row, positions, states in zip(*pieces, hidden_states.split(LENGTHS)):
        assert_equal(states, model(row, position_ids=positions).last_hidden_state[0])
    assert (hidden_states - joined).abs().max() > 0.01


@pytest.mark.parametrize("return_position_ids", [True, False])
def test_loss_and_logits_of_the_collators_boundaries_are_those_of_each_row_alone(
    return_position_ids, make_model, flavour
):
    model, rows = make_model(**flavour), make_rows(LENGTHS)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=return_position_ids)
    batch = collator([{"input_ids": row.tolist()} for row in rows])
    assert ("position_ids" in batch) == return_position_ids
    assert batch["cu_seq_lens_q"].tolist() == boundaries(LENGTHS).tolist()
    output = model(**batch)
    logits, loss = logits_and_loss_alone(model, rows)
    assert_equal(output.logits[0], torch.cat(logits))
    assert_equal(output.loss, loss)


def test_boundaries_of_padded_length_leave_no_trace(make_model, flavour):
    # As kept at one shape for a compiled model: empty sequences, and tokens behind the last one.
    model, rows = make_model(GrassmannModel, **flavour), make_rows(LENGTHS)
    ids = torch.cat([*rows, torch.zeros(9, dtype=torch.long)])[None]
    cu_seqlens = boundaries([0, *LENGTHS, 0, 0])
    hidden_states = model(ids, cu_seq_lens_q=cu_seqlens).last_hidden_state[0, :-9]
    assert_equal(hidden_states, torch.cat([model(row[None]).last_hidden_state[0] for row in rows]))


def test_decoding_goes_on_from_the_last_packed_row(make_model, flavour):
    model, rows = make_model(**flavour), make_rows(LENGTHS)
    ids, position_ids = pack(rows)
    more = make_rows([5], seed=4)[0]
    expected = model(torch.cat([rows[-1], more])[None]).logits[:, -5:]
    for given_positions in (None, position_ids):
        output = model(ids, position_ids=given_positions, cu_seq_lens_q=boundaries(LENGTHS), use_cache=True)
        logits = model(more[None], past_key_values=output.past_key_values).logits
        assert_equal(logits, expected)


@pytest.mark.parametrize("with_positions", [True, False])
def test_a_mixer_takes_boundaries_too(with_positions):
    torch.manual_seed(0)
    mixer = PluckerMixer(hidden_size=16, reduced_size=4, offsets=[1, 2, 5])
    rows = torch.randn(sum(LENGTHS), 16).split(LENGTHS)
    # They run on, so that the boundaries alone separate the rows.
    positions = torch.arange(sum(LENGTHS))[None] if with_positions else None
    mixed = mixer(torch.cat(rows)[None], positions, cu_seqlens=boundaries(LENGTHS))[0]
    for row, states in zip(rows, mixed.split(LENGTHS), strict=True):
        assert_equal(states, mixer(row[None])[0])


@pytest.mark.parametrize(
    ("cu_seqlens", "rows", "message"),
    [
        (boundaries([3, 4]), 2, "needs a batch of one row, in which all sequences lie. Got 2 rows."),
        (boundaries([3, 4])[None], 1, r"must hold integers, .* Got torch.int32 in shape \(1, 3\)"),
        (torch.tensor([7]), 1, r"must hold integers, .* Got torch.int64 in shape \(1,\)"),
        (torch.tensor([0.0, 7.0]), 1, r"must hold integers, .* Got torch.float32 in shape \(2,\)"),
    ],
)
def test_impossible_boundaries_are_refused_by_name(cu_seqlens, rows, message, make_model, make_ids):
    with pytest.raises(ValueError, match=f"`cu_seq_lens_q` {message}"):
        make_model()(make_ids(rows, 7), cu_seq_lens_q=cu_seqlens)
    with pytest.raises(ValueError, match=f"`cu_seqlens` {message}"):
        PluckerMixer(8, 4, [1])(torch.zeros(rows, 7, 8), cu_seqlens=cu_seqlens)


def test_a_packed_sequence_that_is_longer_than_the_position_table_is_refused(make_model, make_ids):
    model, ids = make_model(max_position_embeddings=8), make_ids(1, 20)
    assert model(ids, cu_seq_lens_q=boundaries([8, 5, 7]), max_length_q=8).logits.shape[1] == 20
    with pytest.raises(ValueError, match="A sequence of 9 tokens is longer than the position table"):
        model(ids, cu_seq_lens_q=boundaries([4, 9, 7]), max_length_q=9)


def test_one_graph_serves_all_boundaries_of_one_number(make_model, make_ids):
    torch._dynamo.reset()
    model, ids = make_model(GrassmannModel, use_cache=False), make_ids(1, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    position_ids = torch.arange(20)[None]
    for positions in ({}, {"position_ids": position_ids}):
        for step, lengths in enumerate(([3, 4, 13], [9, 1, 10])):
            cu_seqlens = boundaries(lengths)
            expected = model(ids, cu_seq_lens_q=cu_seqlens, max_length_q=13, **positions).last_hidden_state
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                actual = compiled(ids, cu_seq_lens_q=cu_seqlens, max_length_q=13, **positions).last_hidden_state
            assert_equal(actual, expected)
    torch._dynamo.reset()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), rest=st.integers(0, 3))
def test_positions_count_from_the_last_boundary(lengths, rest):
    expected = [position for length in [*lengths, rest] for position in range(length)]
    positions = positions_from_cu_seqlens(boundaries(lengths), sum(lengths) + rest)
    assert positions.dtype == torch.long
    assert positions.tolist() == [expected]


@pytest.mark.parametrize("side", SIDES)
def test_class_logits_of_padded_rows_are_those_of_each_row_alone(side, is_causal, make_model, flavour):
    model = make_model(GrassmannForSequenceClassification, num_labels=3, is_causal=is_causal, **flavour)
    rows = make_rows(LENGTHS)
    ids, mask = pad(rows, side, extra=2)
    logits = model(ids, attention_mask=mask).logits
    assert_equal(logits, torch.cat([model(row[None]).logits for row in rows]))
    # Otherwise a head that ignores its input would pass.
    assert logits.std(0).min() > 0.01


@pytest.mark.parametrize("side", SIDES)
def test_the_content_of_padding_does_not_matter(side, is_causal, make_model, flavour):
    model, rows = make_model(GrassmannModel, is_causal=is_causal, **flavour), make_rows(LENGTHS)
    ids, mask = pad(rows, side, extra=3)
    noise, _ = pad(rows, side, fill=lambda *shape: torch.randint(0, 100, shape), extra=3)
    assert not torch.equal(ids, noise)
    real = mask.bool()
    expected = model(ids, attention_mask=mask).last_hidden_state[real]
    assert torch.equal(model(noise, attention_mask=mask).last_hidden_state[real], expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    offsets=st.one_of(
        st.lists(st.integers(1, 9), min_size=1, max_size=3),
        st.tuples(*[st.lists(st.integers(1, 9), min_size=1, max_size=3)] * 2).map(list),
    ),
    layout=st.sampled_from(["left", "right", "packed"]),
    extra=st.integers(0, 5),
    is_causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_layout_of_any_rows_gives_what_each_row_gives_alone(
    make_model, lengths, offsets, layout, extra, is_causal, seed
):
    model = make_model(GrassmannModel, num_hidden_layers=2, offsets=offsets, is_causal=is_causal, seed=seed)
    rows = make_rows(lengths, seed)
    expected = torch.cat([model(row[None]).last_hidden_state[0] for row in rows])
    if layout == "packed":
        ids, position_ids = pack(rows)
        actual = model(ids, position_ids=position_ids).last_hidden_state[0]
    else:
        ids, mask = pad(rows, layout, fill=lambda *shape: torch.randint(0, 100, shape), extra=extra)
        actual = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert_equal(actual, expected)
