# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused kernels against the naive reference in float64.

Where there is no GPU, Triton's interpreter runs them on the CPU: `conftest.py` turns it on. Memory that an operator
leaves unwritten is NaN in every test.
"""

import copy
import math
import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_grassmann import GrassmannForSequenceClassification, PluckerMixer, plucker, plucker_features, wedge
from modeling_grassmann.plucker import NO_POSITION, choose_backend, num_plucker_coordinates


pytest.importorskip("triton", reason="needs Triton")

BACKEND = "triton"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The unit roundoff of each type, times what a sum over P coordinates of size one may lose.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Triton's interpreter cannot multiply bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# Pairs that are nearer to parallel count as degenerate: bounds what float32 may lose, and is seen to do so.
EPS = 0.1

pytestmark = [
    # A backend that falls back to another would compare that other with itself.
    pytest.mark.filterwarnings("error:The backend"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
]
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_positions(kind, batch, total):
    """Positions of each kind: `(B, S)`, or None."""
    row = torch.arange(total)
    if kind is None:
        return None
    positions = row.repeat(batch, 1)
    if kind == "padded":
        # Left, right and no padding in turn.
        positions[0::3, : total // 3] = NO_POSITION
        positions[1::3, total - total // 4 :] = NO_POSITION
    if kind == "packed":
        start = max(1, total * 2 // 5)
        positions = torch.where(row < start, positions, positions - start)
        positions[-1, total - total // 5 :] = NO_POSITION
    return positions.to(DEVICE)


def make_problem(
    length=17,
    batch=2,
    past=0,
    heads=1,
    r=5,
    hidden=7,
    offsets=(1, 3),
    source="same",
    bias=True,
    weighted=False,
    positions=None,
    dtype=torch.float32,
    seed=0,
):
    """Arguments of [`plucker_features`].

    `source` says what neighbours are: `"same"`, the tensor of the queries itself; `"copy"`, another one with equal
    values at the end; `"separate"`, unrelated ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def leaf(tensor):
        return tensor.to(DEVICE, dtype).requires_grad_()

    def vectors(tokens):
        # Of similar lengths, so that no gradient is dominated by one short vector.
        return F.normalize(draw(batch, tokens, heads, r), dim=-1) * draw(batch, tokens, heads, 1).sigmoid().add(0.5)

    neighbours = vectors(past + length)
    query = leaf(neighbours[:, past:])
    if source == "separate":
        neighbours = vectors(past + length)
    return {
        "query": query,
        "source": query if source == "same" else leaf(neighbours),
        "weight": leaf(draw(hidden, heads * num_plucker_coordinates(r))),
        "bias": leaf(draw(hidden)) if bias else None,
        "offsets": list(offsets),
        "positions": make_positions(positions, batch, past + length),
        "offset_weights": leaf(draw(heads, len(offsets))) if weighted else None,
    }


def tensors_of(problem):
    tensors = {name: value for name, value in problem.items() if isinstance(value, torch.Tensor)}
    if problem["source"] is problem["query"]:
        del tensors["source"]
    return tensors


def leaves_of(problem):
    return {name: tensor for name, tensor in tensors_of(problem).items() if tensor.requires_grad}


def moved(problem, device, dtype=None):
    """The same numbers elsewhere, or in another type."""
    other = dict(problem)
    for name, tensor in tensors_of(problem).items():
        other[name] = tensor.detach().to(device, dtype if tensor.is_floating_point() else None)
        other[name].requires_grad_(tensor.requires_grad)
    if problem["source"] is problem["query"]:
        other["source"] = other["query"]
    return other


def in_float64(problem):
    return moved(problem, "cpu", torch.float64)


def draw_cotangent(output, seed=1):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.device, output.dtype)


def outputs_and_gradients(problem, backend, cotangent=None, eps=EPS):
    output = plucker_features(**problem, eps=eps, backend=backend)
    if cotangent is None:
        cotangent = draw_cotangent(output)
    leaves = leaves_of(problem)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output), materialize_grads=True)
    return {"output": output, **dict(zip(leaves, gradients))}


def assert_equals_reference(problem, tolerance=None, cotangent=None, eps=EPS):
    exactly = in_float64(problem)
    actual = outputs_and_gradients(problem, BACKEND, cotangent, eps)
    if cotangent is None:
        # As drawn for the output's type: rounded to it.
        cotangent = draw_cotangent(actual["output"])
    cotangent = cotangent.double().cpu()
    expected = outputs_and_gradients(exactly, "naive", cotangent, eps)
    dtype = problem["query"].dtype
    tolerance = tolerance or TOLERANCES[dtype]
    # A gradient may vanish where what arrives does not, as it does for all planes in R^2.
    arriving = (cotangent @ exactly["weight"]).norm() / problem["query"].shape[-1] ** 0.5
    for name, reference in expected.items():
        value = actual[name]
        assert value.dtype == (problem["weight"].dtype if name == "output" else problem[name].dtype), name
        assert value.shape == reference.shape, name
        scale = reference.norm()
        if name in ("query", "source", "offset_weights"):
            scale = torch.maximum(scale, arriving)
        # Written so that NaN fails too.
        assert (value.cpu().double() - reference).norm() <= tolerance * scale, name


# Together they have each value of each argument, and each argument together with the others.
CASES = {
    "one_token": {"length": 1, "r": 2, "offsets": (1,), "weighted": True},
    "two_tokens": {"length": 2, "r": 3, "hidden": 24, "offsets": (1, -1), "bias": False},
    "odd_length": {"length": 17, "r": 5, "heads": 2, "offsets": (1, 16), "positions": "padded", "weighted": True},
    "r2_heads": {
        "length": 17,
        "batch": 3,
        "r": 2,
        "heads": 4,
        "hidden": 24,
        "offsets": (2, 1),
        "positions": "packed",
    },
    "paper": {"length": 63, "r": 32, "hidden": 24, "offsets": (1, 2, 4, 8, 12, 16)},
    "packed": {
        "length": 63,
        "r": 8,
        "heads": 4,
        "offsets": (1, 2, 16),
        "positions": "packed",
        "weighted": True,
        "source": "copy",
    },
    "long": {"length": 1000, "batch": 1, "r": 5, "hidden": 24, "offsets": (1, 16, 130), "positions": "packed"},
    "ahead": {
        "length": 131,
        "r": 3,
        "heads": 2,
        "offsets": (1, -1, 130, -130),
        "positions": "padded",
        "weighted": True,
    },
    "only_ahead": {"length": 40, "r": 8, "offsets": (-2,), "source": "separate", "bias": False},
    "wide": {"length": 17, "r": 8, "hidden": 300, "offsets": (1, 4), "positions": "padded"},
    "paper_width": {"length": 9, "r": 16, "hidden": 256, "offsets": (1, 2), "heads": 2, "weighted": True},
    "r20": {"length": 33, "r": 20, "heads": 2, "hidden": 24, "offsets": (1, 3), "positions": "packed"},
    "r33": {"length": 33, "r": 33, "offsets": (1, 2), "source": "separate", "weighted": True},
    "r64": {"length": 9, "batch": 1, "r": 64, "offsets": (1,), "bias": False},
    "r128": {"length": 5, "batch": 1, "r": 128, "offsets": (1, 2), "weighted": True},
    "separate_past": {
        "length": 63,
        "batch": 3,
        "r": 5,
        "heads": 2,
        "source": "separate",
        "positions": "padded",
        "offsets": (1, 16),
    },
    "decoding_step": {
        "length": 1,
        "batch": 5,
        "past": 16,
        "r": 16,
        "heads": 2,
        "source": "copy",
        "offsets": (1, 16),
        "weighted": True,
    },
    "decoding_step_padded": {
        "length": 1,
        "batch": 3,
        "past": 12,
        "r": 5,
        "source": "copy",
        "positions": "padded",
        "offsets": (1, 12),
    },
    "chunk": {"length": 5, "past": 130, "r": 3, "source": "separate", "positions": "packed", "offsets": (1, 16, 130)},
    "chunk_ahead": {
        "length": 20,
        "past": 7,
        "r": 8,
        "hidden": 24,
        "source": "copy",
        "offsets": (-3, 9),
        "weighted": True,
    },
    "offset_twice": {"length": 17, "r": 5, "offsets": (2, 2), "weighted": True},
    "longer_than_an_offset_by_one": {"length": 131, "batch": 1, "r": 2, "offsets": (130,)},
}


# Every case in every type on a GPU; in the interpreter, which takes a second for each, a third of them in float16.
CASES_AND_TYPES = [
    pytest.param(case, dtype, id=f"{name}-{dtype}", marks=pytest.mark.slow if name == "r128" and not ON_GPU else ())
    for index, (name, case) in enumerate(CASES.items())
    for dtype in DTYPES
    if ON_GPU or dtype == torch.float32 or index % 3 == 0
]


@pytest.mark.parametrize("case, dtype", CASES_AND_TYPES)
def test_output_and_every_gradient_equal_the_reference_in_float64(case, dtype):
    assert_equals_reference(make_problem(**case, dtype=dtype))


@pytest.mark.gpu
@only_on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, r, hidden", [(1, 32, 256), (2, 16, 300), (1, 128, 64), (4, 33, 768), (1, 2, 7)])
def test_output_and_every_gradient_equal_the_reference_at_full_size(heads, r, hidden, dtype):
    offsets = (1, 2, 4, 8, 12, 16, 130, -1)
    sizes = {
        "length": 2047,
        "batch": 3,
        "r": r,
        "heads": heads,
        "hidden": hidden,
        "offsets": offsets,
        "positions": "packed",
    }
    assert_equals_reference(make_problem(**sizes, source="separate", weighted=True, dtype=dtype))
    assert_equals_reference(make_problem(**sizes, dtype=dtype, seed=1))


@st.composite
def problems(draw):
    length, past, batch = draw(st.integers(1, 24)), draw(st.integers(0, 8)), draw(st.integers(1, 3))
    magnitudes = draw(st.lists(st.integers(1, 28), min_size=1, max_size=3))
    problem = make_problem(
        length,
        batch,
        past,
        heads=draw(st.integers(1, 3)),
        r=draw(st.integers(2, 12)),
        hidden=draw(st.integers(1, 40)),
        offsets=[draw(st.sampled_from([1, -1])) * magnitude for magnitude in magnitudes],
        source=draw(st.sampled_from(["separate", "copy"] if past else ["separate", "copy", "same"])),
        bias=draw(st.booleans()),
        weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )
    # Any integers make valid positions: padding, several packed sequences, gaps, repetitions.
    total = past + length
    rows = []
    for _ in range(draw(st.sampled_from([1, batch]))):
        starts = draw(st.lists(st.integers(0, total), max_size=3))
        row = [i - max((s for s in starts if s <= i), default=0) for i in range(total)]
        padding = draw(st.sets(st.integers(0, total - 1), max_size=4))
        rows.append([NO_POSITION if i in padding else p for i, p in enumerate(row)])
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return problem | {"positions": torch.tensor(rows, dtype=dtype, device=DEVICE)}


def nearest_to_threshold(problem):
    """How near the sine of any pair is to `EPS`, relatively."""
    nearest = math.inf
    query, source = problem["query"].detach().double().cpu(), problem["source"].detach().double().cpu()
    for delta in problem["offsets"]:
        past = plucker.shift(source, delta, query.shape[1])
        sine = wedge(query, past).norm(dim=-1) / (query.norm(dim=-1) * past.norm(dim=-1))
        nearest = min(nearest, (sine / EPS - 1).abs().min().item())
    return nearest


@settings(max_examples=200 if ON_GPU else 10, deadline=None)
@given(problems())
def test_any_problem_gives_the_reference_in_output_and_every_gradient(problem):
    # Next to the threshold, rounding decides whether a pair counts.
    assume(nearest_to_threshold(problem) > 1e-3)
    assert_equals_reference(problem, tolerance=5e-5)


def test_memory_that_nothing_writes_is_nan_here():
    assert torch.empty(3, device=DEVICE).isnan().all()


def strided(tensor, *order):
    """The same values in memory in another order, and with gaps."""
    inverse = [order.index(dimension) for dimension in range(len(order))]
    spread = tensor.detach().permute(order).contiguous().repeat_interleave(2, -1)[..., ::2].permute(inverse)
    assert torch.equal(spread, tensor) and not spread.is_contiguous()
    return spread.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype):
    problem = make_problem(length=17, r=6, heads=2, hidden=9, source="separate", positions="packed", dtype=dtype)
    expected = outputs_and_gradients(problem, BACKEND)

    layouts = {"query": (0, 3, 2, 1), "source": (2, 1, 0, 3), "weight": (1, 0), "bias": (0,), "positions": (1, 0)}
    other = problem | {name: strided(problem[name], *order) for name, order in layouts.items()}
    cotangent = strided(draw_cotangent(expected["output"]), 2, 1, 0)
    for name, value in outputs_and_gradients(other, BACKEND, cotangent).items():
        assert torch.equal(value, expected[name]), name


def test_a_query_and_a_source_cut_from_one_tensor_give_its_gradient():
    # As a fused projection would make them; the source reaches further back.
    both = torch.randn(2, 20, 2, 2, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    weight, results = make_problem(heads=2)["weight"].detach(), []
    for backend, tensor in [(BACKEND, both), ("naive", both.detach().double().cpu().requires_grad_())]:
        query, source = tensor[:, 3:, :, 0], tensor[:, :, :, 1]
        output = plucker_features(query, source, weight.to(tensor), None, [1, 4], eps=EPS, backend=backend)
        (gradient,) = torch.autograd.grad(output, tensor, draw_cotangent(output))
        results.append((output.double().cpu(), gradient.double().cpu()))
    for actual, expected in zip(*results):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_a_constant_cotangent_that_is_one_number_in_memory_gives_the_same_gradients():
    problem = make_problem(hidden=24)
    ones = torch.ones(2, 17, 24, device=DEVICE)
    expected = outputs_and_gradients(problem, BACKEND, ones)
    # What `output.sum().backward()` sends.
    for name, value in outputs_and_gradients(problem, BACKEND, ones[:1, :1, :1].expand(2, 17, 24)).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("wanted", ["query", "source", "weight", "bias", "offset_weights"])
def test_each_gradient_is_the_same_when_no_other_is_wanted(wanted):
    problem = make_problem(heads=2, source="separate", weighted=True)
    expected = outputs_and_gradients(problem, BACKEND)[wanted]
    for name, leaf in leaves_of(problem).items():
        leaf.requires_grad_(name == wanted)
    (gradient,) = (value for name, value in outputs_and_gradients(problem, BACKEND).items() if name != "output")
    assert torch.equal(gradient, expected)


def test_results_are_the_same_bits_from_run_to_run():
    length = 2047 if ON_GPU else 63
    problem = make_problem(length, r=16, hidden=24, heads=2, offsets=(1, 2, 16), source="separate", weighted=True)
    first = outputs_and_gradients(problem, BACKEND)
    for _ in range(10 if ON_GPU else 1):
        for name, value in outputs_and_gradients(problem, BACKEND).items():
            assert torch.equal(value, first[name]), name


def test_each_row_of_a_batch_has_the_bits_it_has_in_another_batch():
    problem = make_problem(length=40, batch=4, r=8, hidden=24, positions="padded") | {"bias": None}
    with torch.no_grad():
        whole = plucker_features(**problem, backend=BACKEND)
        vectors = problem["query"][2:3]
        alone = problem | {"query": vectors, "source": vectors, "positions": problem["positions"][2:3]}
        torch.testing.assert_close(plucker_features(**alone, backend=BACKEND)[0], whole[2], rtol=1e-5, atol=1e-5)


class ReferenceWithKernelGradients(torch.autograd.Function):
    """The naive function in float64 with the gradients of the kernels, so that `gradcheck` has both in its units."""

    @staticmethod
    def forward(ctx, backend, options, *leaves):
        ctx.save_for_backward(*leaves)
        ctx.backend, ctx.options = backend, options
        return plucker_features(*leaves[:4], offset_weights=leaves[4], **options, backend="naive")

    @staticmethod
    def backward(ctx, cotangent):
        leaves = [leaf.detach().float().to(DEVICE).requires_grad_() for leaf in ctx.saved_tensors]
        options = ctx.options | {"positions": ctx.options["positions"].to(DEVICE)}
        with torch.enable_grad():
            output = plucker_features(*leaves[:4], offset_weights=leaves[4], **options, backend=ctx.backend)
            gradients = torch.autograd.grad(output, leaves, cotangent.to(output), materialize_grads=True)
        return None, None, *(gradient.double().cpu() for gradient in gradients)


def test_gradients_are_those_of_finite_differences():
    problem = make_problem(length=3, batch=1, past=2, heads=2, r=3, hidden=2, source="separate", weighted=True)
    # float32 numbers, so that the kernels see the same ones.
    leaves = [value.detach().double().cpu().requires_grad_() for value in leaves_of(problem).values()]
    options = {"offsets": [1, 2], "positions": torch.tensor([[0, 1, NO_POSITION, 3, 4]]), "eps": EPS}
    function = partial(ReferenceWithKernelGradients.apply, BACKEND, options)
    assert torch.autograd.gradcheck(function, leaves, atol=1e-4, rtol=1e-4, check_undefined_grad=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["identical", "opposite", "zero query", "zero neighbour", "nearly parallel"])
def test_degenerate_pair_gives_zero_wedge_and_zero_gradient_and_still_counts(kind, dtype):
    if kind == "nearly parallel" and dtype != torch.float32:
        pytest.skip("no two different vectors of this type are that near to parallel")
    problem = make_problem(length=2, batch=1, r=4, dtype=dtype)
    weight, bias = problem["weight"], problem["bias"]
    z = problem["query"][0, 0].detach()
    other = torch.tensor([0.3, -1.0, 0.2, 0.7], device=DEVICE, dtype=dtype)
    last = {
        "identical": z,
        "opposite": -2 * z,
        "zero query": 0 * z,
        "zero neighbour": z,
        "nearly parallel": z + 5e-4 * z.norm() / other.norm() * other,
    }[kind]
    first = 0 * z if kind == "zero neighbour" else z
    source = torch.stack([first, last])[None].clone().requires_grad_()
    output = plucker_features(source, source, weight, bias, [1], eps=1e-3, backend=BACKEND)
    assert torch.equal(output[0, 0], torch.zeros_like(bias)), "no neighbour: no bias either"
    assert torch.equal(output[0, 1], bias)
    gradients = torch.autograd.grad(output.sum(), [source, weight])
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_pair_counts_as_a_plane_from_the_sine_eps_on():
    weight, bias = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    for factor, expected in [(0.99, 0.0), (1.01, -1.0)]:
        angle = math.asin(1e-3 * factor)
        pair = torch.tensor([[1.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]], device=DEVICE)[None, :, None]
        output = plucker_features(pair, pair, weight, bias, [1], backend=BACKEND)
        assert output[0, 1].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_tokens_give_finite_features_and_bounded_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(1, 1, 1, 32, generator=generator)
    # Equal up to rounding: what a clamped norm turns into features of unit size and gradients of 1e9.
    noise = torch.finfo(dtype).eps * torch.randn(1, 40, 1, 32, generator=generator)
    source = (token + (noise if dtype == torch.float32 else 0)).expand(1, 40, 1, 32).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(8, num_plucker_coordinates(32), generator=generator).to(DEVICE, dtype)
    output = plucker_features(source, source, weight, None, [1, 2, 4], backend=BACKEND)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), source)
    assert output.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() < 10


@pytest.mark.parametrize("scale", [3e-4, 300.0], ids=str)
def test_squares_of_float16_vectors_neither_overflow_nor_vanish(scale):
    problem = make_problem(r=16, dtype=torch.float16)
    scaled = problem | {"query": (scale * problem["query"]).detach()}
    scaled["source"] = scaled["query"]
    # The rounding of small numbers is the reference's too.
    expected = plucker_features(**in_float64(scaled), eps=EPS, backend="naive")
    actual = plucker_features(**scaled, eps=EPS, backend=BACKEND).double().cpu()
    assert (actual - expected).norm() <= TOLERANCES[torch.float16] * expected.norm()


@pytest.mark.parametrize("length", [1, 2, 4])
def test_sequence_shorter_than_every_offset_gives_exact_zeros(length):
    problem = make_problem(length, offsets=(4, 9, -5), source="separate", weighted=True)
    for name, value in outputs_and_gradients(problem, BACKEND).items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_what_padding_holds_reaches_no_real_token():
    problem = make_problem(length=8, batch=1, source="copy")
    problem["positions"] = torch.tensor([[NO_POSITION, NO_POSITION, 0, 1, 2, 3, 4, NO_POSITION]], device=DEVICE)
    clean = plucker_features(**problem, backend=BACKEND)
    dirty = {name: problem[name].detach().clone() for name in ("query", "source")}
    for vectors in dirty.values():
        vectors[:, [0, 1, 7]] = float("nan")
    assert torch.equal(plucker_features(**problem | dirty, backend=BACKEND)[:, 2:7], clean[:, 2:7])


def test_a_batch_without_rows_gives_an_output_without_rows():
    problem = make_problem()
    empty = problem["query"][:0]
    output = plucker_features(**problem | {"query": empty, "source": empty}, backend=BACKEND)
    assert output.shape == (0, 17, 7)
    (gradient,) = torch.autograd.grad(output.sum(), problem["weight"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


# Types that mixed precision combines: of vectors, and of the projection.
@pytest.mark.parametrize("projection", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
def test_vectors_and_projection_of_different_types_give_the_types_of_the_other_backend(vectors, projection):
    problem = make_problem(r=8, hidden=24, dtype=vectors, weighted=True)
    for name in ("weight", "bias"):
        problem[name] = problem[name].detach().to(projection).requires_grad_()
    other = outputs_and_gradients(problem, "torch")
    exactly = outputs_and_gradients(in_float64(problem), "naive", draw_cotangent(other["output"]).double().cpu())
    tolerance = max(TOLERANCES[vectors], TOLERANCES[projection])
    for name, value in outputs_and_gradients(problem, BACKEND).items():
        assert value.dtype == other[name].dtype, name
        assert (value.cpu().double() - exactly[name]).norm() <= tolerance * exactly[name].norm(), name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_keeps_the_geometry_in_float32(dtype):
    torch.manual_seed(0)
    mixer = PluckerMixer(32, 8, [1, 2], backend=BACKEND).to(DEVICE)
    hidden_states = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=dtype, enabled=enabled):
            output = mixer(hidden_states)
        results.append(
            [output, *torch.autograd.grad(output, list(mixer.parameters()), draw_cotangent(output.float()).to(output))]
        )
    for expected, actual in zip(*results):
        assert actual.dtype == torch.float32 and (actual - expected).norm() <= 3e-2 * expected.norm()


def test_every_switch_of_tf32_is_understood():
    # Each in a process of its own, as PyTorch refuses some of them together.
    program = """
import os
import sys
import torch
from modeling_grassmann import PluckerMixer
for switch in sys.argv[1:]:
    child = os.fork()
    if not child:
        break
    assert os.waitpid(child, 0)[1] == 0, switch
else:
    sys.exit()
exec(switch)
device = "cuda" if torch.cuda.is_available() else "cpu"
PluckerMixer(16, 4, [1, 2], backend="triton").to(device)(torch.randn(2, 5, 16, device=device)).sum().backward()
"""
    switches = [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
    ]
    done = subprocess.run([sys.executable, "-c", program, *switches], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class CustomOperators(TorchDispatchMode):
    """Calls of operators that are not PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace not in ("aten", "prim", "prims"):
            self.calls.append((operator, args, kwargs or {}))
        return operator(*args, **kwargs or {})


def custom_operators(function):
    with CustomOperators() as operators:
        function()
    return operators.calls


def detached(value, requires_grad):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())


def check_operators(calls):
    """Of calls of an operator and of its backward."""
    for (operator, args, kwargs), differentiable in zip(calls, [True, False]):
        kwargs = {name: detached(value, differentiable) for name, value in kwargs.items()}
        opcheck(operator, tuple(detached(value, differentiable) for value in args), kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("source", ["same", "separate"])
def test_operators_keep_what_they_promise_to_pytorch(source, dtype):
    """Schema, registration of the gradient, shapes on fake tensors, and what becomes of them under compilation."""
    problem = make_problem(length=9, r=4, heads=2, source=source, weighted=source == "separate", dtype=dtype)
    forward = custom_operators(lambda: plucker_features(**problem, backend=BACKEND))
    both = custom_operators(lambda: outputs_and_gradients(problem, BACKEND))
    assert len(forward) == 1 and len(both) == 2
    check_operators(both)


def test_compilation_sees_one_node_in_each_direction():
    nodes = {"forward": [], "backward": []}

    def record(direction):
        def compiler(graph, inputs):
            calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
            nodes[direction].append([call for call in calls if getattr(call, "namespace", "aten") != "aten"])
            return graph.forward

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    compiled = torch.compile(partial(plucker_features, backend=BACKEND), fullgraph=True, backend=backend)
    problem = make_problem(r=8, positions="padded", weighted=True)
    expected = outputs_and_gradients(problem, BACKEND, eps=1e-3)
    output = compiled(**problem)
    leaves = leaves_of(problem)
    gradients = torch.autograd.grad(output, list(leaves.values()), draw_cotangent(output))
    for name, actual in zip(expected, [output, *gradients]):
        assert torch.equal(actual, expected[name]), name
    assert [len(calls) for calls in nodes["forward"]] == [1]
    assert [len(calls) for calls in nodes["backward"]] == [1]


def test_a_compiled_mixer_serves_other_lengths_without_being_compiled_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    mixer = PluckerMixer(24, 6, [1, 3], backend=BACKEND).to(DEVICE)
    compiled = torch.compile(mixer, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for length in (9, 17, 30):
        hidden_states = torch.randn(2, length, 24, device=DEVICE)
        torch.testing.assert_close(compiled(hidden_states), mixer(hidden_states))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_an_exported_mixer_holds_the_operator_and_serves_other_lengths():
    mixer = PluckerMixer(24, 6, [1, 3], backend=BACKEND).to(DEVICE).eval()
    example, other = (torch.randn(2, length, 24, device=DEVICE) for length in (9, 30))
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(mixer, (example,), dynamic_shapes=({1: length},))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert any(getattr(call, "namespace", "aten") != "aten" for call in calls)
    torch.testing.assert_close(program.module()(other), mixer(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_without_memory_give_shape_and_type(dtype):
    problem = make_problem(length=9, hidden=24, dtype=dtype, weighted=True, positions="padded")
    expected = plucker_features(**problem, backend=BACKEND)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in problem.items()
        }
        output = plucker_features(**fake, backend=BACKEND)
    assert output.shape == expected.shape and output.dtype == expected.dtype
    assert output.device == expected.device and output.stride() == expected.stride()


def test_a_problem_the_kernels_cannot_serve_falls_back_with_one_warning_that_says_why():
    exactly = moved(make_problem(), DEVICE, torch.float64)
    too_large = make_problem(length=3, r=130, hidden=2)
    for problem, why in [(exactly, "float64"), (too_large, "130")]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            outputs = [plucker_features(**problem, backend="triton") for _ in range(2)]
        # CUDA's matrix products may warn as well, of what the fixture above asks for.
        messages = [str(warning.message) for warning in caught if "cannot serve" in str(warning.message)]
        assert len(messages) == 1 and why in messages[0] and '"torch"' in messages[0]
        for output in outputs:
            assert torch.equal(output, plucker_features(**problem, backend="torch"))


def test_a_problem_the_kernels_cannot_serve_falls_back_in_silence_where_the_choice_was_open(monkeypatch):
    monkeypatch.delenv("GRASSMANN_BACKEND", raising=False)
    problem = in_float64(make_problem())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = plucker_features(**problem, backend="auto")
    assert torch.equal(output, plucker_features(**problem, backend="torch"))


def test_cpu_without_the_interpreter_falls_back_with_one_warning_if_asked_and_else_in_silence():
    program = """
import warnings
import torch
from modeling_grassmann import PluckerMixer
caught = []
warnings.showwarning = lambda message, *rest: caught.append(str(message))
mixer, hidden_states = PluckerMixer(16, 4, [1, 2]), torch.randn(2, 5, 16)
outputs = []
for backend in ("torch", "auto", "triton", "triton"):
    mixer.backend = backend
    outputs.append(mixer(hidden_states))
    print(backend, len([message for message in caught if "The backend" in message]))
assert all(output.equal(outputs[0]) for output in outputs)
print(caught[-1])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.pop("GRASSMANN_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == ["torch 0", "auto 0", "triton 1", "triton 1"]
    assert '"triton" cannot serve' in done.stdout and '"torch"' in done.stdout


def test_auto_takes_the_kernels_on_a_gpu_and_never_the_interpreter(monkeypatch):
    monkeypatch.delenv("GRASSMANN_BACKEND", raising=False)
    assert choose_backend("auto", torch.zeros(2, 30, 256, device=DEVICE), 32) == ("triton" if ON_GPU else "torch")


def test_environment_variable_decides_where_the_configuration_leaves_it_open(make_model, make_ids, monkeypatch):
    def uses_kernels(model):
        return bool(custom_operators(lambda: model.to(DEVICE)(make_ids(2, 9).to(DEVICE))))

    open_choice, no_kernels = make_model(), make_model(mixer_backend="torch")
    monkeypatch.setenv("GRASSMANN_BACKEND", "triton")
    assert uses_kernels(open_choice)
    assert not uses_kernels(no_kernels)
    monkeypatch.setenv("GRASSMANN_BACKEND", "torch")
    assert not uses_kernels(open_choice)
    assert uses_kernels(make_model(mixer_backend="triton"))
    monkeypatch.setenv("GRASSMANN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"GRASSMANN_BACKEND must be one of .*, got 'cuda'"):
        open_choice(make_ids(2, 9).to(DEVICE))


def with_backends(make_model, **overrides):
    """The same model twice: with plain PyTorch and with the kernels."""
    return [make_model(**overrides, mixer_backend=backend).to(DEVICE) for backend in ("torch", BACKEND)]


def loss_and_gradients(model, **inputs):
    loss = model(**inputs).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def assert_same_training(models, **inputs):
    expected, actual = (loss_and_gradients(model, **inputs) for model in models)
    for (name, _), a, b in zip([("loss", None), *models[0].named_parameters()], actual, expected):
        assert (a is None) == (b is None), name
        assert b is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-7, name


def test_a_model_has_the_same_loss_and_gradients(make_model, make_ids, flavour):
    ids = make_ids(2, 21).to(DEVICE)
    mask = (torch.arange(21) >= torch.tensor([[0], [6]])).long().to(DEVICE)
    labels = ids.masked_fill(mask == 0, -100)
    assert_same_training(with_backends(make_model, **flavour), input_ids=ids, attention_mask=mask, labels=labels)


def test_an_encoder_has_the_same_loss_and_gradients(make_model, make_ids):
    sizes = {"is_causal": False, "offsets": [[1, 2], [3], [2, 7]], "num_labels": 3}
    ids, labels = make_ids(2, 21).to(DEVICE), torch.tensor([0, 2], device=DEVICE)
    models = with_backends(make_model, model_class=GrassmannForSequenceClassification, pad_token_id=0, **sizes)
    assert_same_training(models, input_ids=ids, labels=labels)


def test_packed_rows_have_the_same_loss_and_gradients(make_model, make_ids):
    ids, position_ids = make_ids(1, 30), torch.cat([torch.arange(n) for n in (1, 3, 19, 7)])[None]
    inputs = {"input_ids": ids.to(DEVICE), "position_ids": position_ids.to(DEVICE), "labels": ids.to(DEVICE)}
    assert_same_training(with_backends(make_model), **inputs)


def test_gradient_checkpointing_changes_no_gradient(make_model, make_ids):
    ids = make_ids(2, 21).to(DEVICE)
    models = [make_model(mixer_backend=BACKEND).to(DEVICE).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    assert_same_training(models, input_ids=ids, labels=ids)


WAYS_TO_GENERATE = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("options", WAYS_TO_GENERATE.values(), ids=WAYS_TO_GENERATE)
def test_every_way_to_generate_gives_the_same_tokens(options, make_model, make_ids):
    # More tokens than the widest offset reaches over, and few: the interpreter takes a second for a token.
    sizes = {"num_hidden_layers": 2, "offsets": [[1], [2, 3]], "reduced_size": 3, "num_plucker_heads": 2}
    models, rows = with_backends(make_model, **sizes), 1 if "prompt_lookup_num_tokens" in options else 2
    ids = make_ids(rows, 6).to(DEVICE)
    mask = (torch.arange(6) >= torch.tensor([[0], [4]])[:rows]).long().to(DEVICE)
    tokens = 20 if ON_GPU else 4
    fixed = {"attention_mask": mask, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    expected, actual = (model.generate(ids, **fixed, **options) for model in models)
    assert torch.equal(actual, expected)


def test_assisted_generation_gives_the_same_tokens(make_model, make_ids):
    sizes = {"num_hidden_layers": 1, "offsets": [[1, 2]], "reduced_size": 3}
    assistant, ids = make_model(seed=1, **sizes).to(DEVICE), make_ids(1, 6).to(DEVICE)
    options = {"assistant_model": assistant, "max_new_tokens": 20 if ON_GPU else 4, "do_sample": False}
    expected, actual = (model.generate(ids, **options) for model in with_backends(make_model, **sizes))
    assert torch.equal(actual, expected)


def test_cached_logits_are_the_uncached_ones(make_model, make_ids):
    model, ids = make_model(mixer_backend=BACKEND, offsets=[[1], [2, 5], [4]]).to(DEVICE), make_ids(2, 20).to(DEVICE)
    with torch.no_grad():
        expected, cache, logits = model(ids).logits, None, []
        for chunk in ids.split([6, 1, 1, 9, 3], dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
@only_on_gpu
def test_tensors_of_more_than_2_31_numbers_are_addressed():
    hidden, length = 4096, 2**19 + 129
    problem = make_problem(length, 1, r=4, hidden=hidden, offsets=(1, 64), dtype=torch.bfloat16)
    last = 500
    tail = problem | {"query": problem["query"][:, -last:], "source": problem["source"][:, -last - 64 :]}
    cotangent = torch.zeros(1, length, hidden, device=DEVICE, dtype=torch.bfloat16)
    cotangent[:, -last:] = draw_cotangent(cotangent[:, -last:])
    output = plucker_features(**problem, backend=BACKEND)
    expected = plucker_features(**tail, backend="torch")
    assert (output[:, -last:] - expected).norm() <= 2e-2 * expected.norm()
    leaves = [problem["query"], problem["weight"]]
    for actual, reference in zip(
        torch.autograd.grad(output, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent[:, -last:])
    ):
        assert (actual - reference).norm() <= 2e-2 * reference.norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are():
    problem = make_problem()
    expected = outputs_and_gradients(problem, BACKEND)
    elsewhere = moved(problem, "cuda:1")
    for name, value in outputs_and_gradients(elsewhere, BACKEND).items():
        assert value.device == torch.device("cuda:1") and torch.equal(value.to("cuda:0"), expected[name]), name


def make_mixer(hidden=24, dtype=torch.float32, seed=0, **options):
    """A mixer whose every part matters: biases and weights of offsets are random, features as large as their input."""
    torch.manual_seed(seed)
    mixer = PluckerMixer(hidden, **({"reduced_size": 5, "offsets": [1, 3], "plucker_eps": EPS} | options))
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if name == "plucker_proj.weight" else 0.2)
    return mixer.to(DEVICE, dtype)


def make_hidden_states(mixer, length=17, batch=2, seed=1):
    shape = (batch, length, mixer.norm.normalized_shape[0])
    hidden_states = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return hidden_states.to(DEVICE, mixer.norm.weight.dtype).requires_grad_()


def mixer_and_gradients(mixer, hidden_states, backend, positions=None, cotangent=None):
    mixer.backend = backend
    output = mixer(hidden_states, positions)
    cotangent = draw_cotangent(output) if cotangent is None else cotangent.to(output)
    leaves = {"hidden_states": hidden_states, **dict(mixer.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return {"output": output, **dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), cotangent)))}


def assert_mixer_equals_reference(mixer, hidden_states, positions=None, tolerance=None):
    dtype = hidden_states.dtype
    tolerance = tolerance or 2 * TOLERANCES[dtype]
    actual = mixer_and_gradients(mixer, hidden_states, BACKEND, positions)
    exactly = copy.deepcopy(mixer).double().cpu(), hidden_states.detach().double().cpu().requires_grad_()
    positions = None if positions is None else positions.cpu()
    cotangent = draw_cotangent(actual["output"]).double().cpu()
    expected = mixer_and_gradients(*exactly, "naive", positions, cotangent)
    for name, reference in expected.items():
        value = actual[name]
        assert value.dtype == dtype and value.shape == reference.shape, name
        assert (value.cpu().double() - reference).norm() <= tolerance * reference.norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [16, 24, 100, 256, 384, 768])
def test_a_mixer_and_every_gradient_equal_the_reference_in_float64(hidden, dtype):
    for length, batch in [(17, 2), (2, 1), *([(2047, 3)] if ON_GPU else [])]:
        mixer = make_mixer(hidden, dtype)
        assert_mixer_equals_reference(mixer, make_hidden_states(mixer, length, batch))


MIXERS = {
    "heads": {"num_heads": 2, "reduced_size": 3},
    "separate_past": {"separate_past_projection": True, "num_heads": 2},
    "offset_weights": {"learned_offset_weights": True, "offsets": [1, 2, 5]},
    "ahead": {"is_causal": False},
    "everything": {
        "num_heads": 3,
        "separate_past_projection": True,
        "learned_offset_weights": True,
        "is_causal": False,
        "reduced_size": 6,
    },
    "out_proj": {"out_proj": True},
}


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_every_kind_of_mixer_and_every_gradient_equal_the_reference_in_float64(options, kind):
    mixer = make_mixer(**options)
    assert_mixer_equals_reference(mixer, make_hidden_states(mixer, batch=3), make_positions(kind, 3, 17))


@settings(max_examples=200 if ON_GPU else 8, deadline=None)
@given(st.integers(5, 80), st.integers(2, 6), st.integers(2, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_a_mixer_of_any_size_equals_the_reference_in_float64(hidden, r, length, batch, seed):
    mixer = make_mixer(hidden, reduced_size=r, seed=seed)
    hidden_states = make_hidden_states(mixer, length, batch, seed)
    with torch.no_grad():
        z = mixer.reduce(hidden_states)[:, :, None]
    # Next to the threshold, rounding decides whether a pair counts.
    assume(nearest_to_threshold({"query": z, "source": z, "offsets": [1, 3]}) > 1e-3)
    # Planes of R^2 have gradients of zero, which no relative error fits.
    assume(r > 2 and z.norm(dim=-1).min() > 0.1)
    assert_mixer_equals_reference(mixer, hidden_states, tolerance=1e-4)


def test_gates_that_are_wide_open_or_shut_give_the_reference():
    mixer = make_mixer()
    with torch.no_grad():
        mixer.gate_proj.bias.copy_((torch.arange(24, device=DEVICE) % 3 - 1.0) * 200)
    assert_mixer_equals_reference(mixer, make_hidden_states(mixer))


def test_a_mixer_of_equal_numbers_gives_the_bias_of_its_norm():
    mixer = make_mixer()
    hidden_states = torch.full((2, 17, 24), 3.0, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        # Equal tokens span no plane: the features are this bias, and the mixture is 3 wherever the gate stands.
        mixer.plucker_proj.bias.fill_(3.0)
    results = mixer_and_gradients(mixer, hidden_states, BACKEND)
    torch.testing.assert_close(results["output"][:, 1:], mixer.norm.bias.expand(2, 16, 24), rtol=0, atol=1e-3)
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing_in_a_mixer(dtype):
    mixer = make_mixer(dtype=dtype, separate_past_projection=True, learned_offset_weights=True, num_heads=2)
    hidden_states, positions = make_hidden_states(mixer), make_positions("packed", 2, 17)
    expected = mixer_and_gradients(mixer, hidden_states, BACKEND, positions)
    for module in mixer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(strided(parameter, *reversed(range(parameter.dim())))))
    spread = strided(hidden_states, 2, 1, 0)
    cotangent = strided(draw_cotangent(expected["output"]), 2, 1, 0)
    for name, value in mixer_and_gradients(mixer, spread, BACKEND, strided(positions, 1, 0), cotangent).items():
        # Matrix products of cuBLAS round differently for other strides.
        error = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error <= 4 * torch.finfo(dtype).eps, name


PARAMETERS = [name for name, _ in make_mixer(**MIXERS["everything"]).named_parameters()]


@pytest.mark.parametrize("wanted", ["hidden_states", *PARAMETERS])
def test_each_gradient_of_a_mixer_is_the_same_when_no_other_is_wanted(wanted):
    mixer = make_mixer(**MIXERS["everything"])
    hidden_states = make_hidden_states(mixer)
    expected = mixer_and_gradients(mixer, hidden_states, BACKEND)[wanted]
    for name, leaf in [("hidden_states", hidden_states), *mixer.named_parameters()]:
        leaf.requires_grad_(name == wanted)
    assert torch.equal(mixer_and_gradients(mixer, hidden_states, BACKEND)[wanted], expected)


def test_a_mixer_gives_the_same_bits_from_run_to_run():
    mixer = make_mixer(256 if ON_GPU else 24, **MIXERS["everything"])
    hidden_states = make_hidden_states(mixer, 2047 if ON_GPU else 63)
    first = mixer_and_gradients(mixer, hidden_states, BACKEND)
    for _ in range(10 if ON_GPU else 1):
        for name, value in mixer_and_gradients(mixer, hidden_states, BACKEND).items():
            assert torch.equal(value, first[name]), name


def test_a_batch_without_rows_goes_through_a_mixer():
    mixer = make_mixer()
    results = mixer_and_gradients(mixer, make_hidden_states(mixer, batch=0), BACKEND)
    assert results["output"].shape == (0, 17, 24)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


@pytest.mark.parametrize("options", [{}, MIXERS["everything"], {"hidden": 384}], ids=["plain", "everything", "wide"])
def test_operators_of_a_mixer_keep_what_they_promise_to_pytorch(options):
    mixer = make_mixer(**options)
    calls = custom_operators(lambda: mixer_and_gradients(mixer, make_hidden_states(mixer, 3, batch=1), BACKEND))
    assert len(calls) == 2, "one in each direction"
    check_operators(calls)


def test_hooks_and_other_layers_take_part():
    hidden_states = torch.randn(2, 9, 24, device=DEVICE)
    for name in ("reduce", "reduce_past", "plucker_proj", "gate_proj", "norm"):
        mixer, calls = make_mixer(separate_past_projection=True), []
        mixer.backend = BACKEND
        getattr(mixer, name).register_forward_hook(lambda *arguments, calls=calls: calls.append(arguments))
        mixer(hidden_states)
        assert len(calls) == 1, name
    mixer.gate_proj = nn.Sequential(mixer.gate_proj, nn.Tanh())
    expected = copy.deepcopy(mixer)
    expected.backend = "torch"
    torch.testing.assert_close(mixer(hidden_states), expected(hidden_states))
