"""The Grassmann memory: kernels against principal angles, features against kernels, evaluations against the sum."""

import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_grassmann import grassmann_memory as memory
from modeling_grassmann.grassmann_memory import (
    KERNELS,
    MemoryState,
    grassmann_memory,
    grassmann_memory_naive,
    grassmann_memory_recurrent,
    kernel_features,
    orthonormalise,
)
from modeling_grassmann.plucker import NO_POSITION, wedge


PLANE_KERNELS = ["plucker", "binet_cauchy", "projection"]
NAMES = ["output", "query", "key", "values", "log_decay"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def frames_of(vectors, eps=1e-6):
    """Frames of the planes that pairs of vectors span; single vectors as they are."""
    return orthonormalise(vectors, eps) if vectors.shape[-2] == 2 else vectors


def gram(query, key):
    """Gram matrices of all pairs: `(n, m, r)` and `(k, m, r)` -> `(n, k, m, m)`."""
    return torch.einsum("nir,kjr->nkij", query, key)


def make_inputs(kernel="binet_cauchy", batch=2, length=9, heads=2, r=4, dv=3, dtype=torch.float64, seed=0):
    """Vectors for queries and keys, values and log decays: leaves, in the order of [`grassmann_memory`]."""
    vectors = KERNELS[kernel].num_vectors
    query, key = (normal(batch, length, heads, vectors, r, seed=2 * seed + i, dtype=dtype) for i in range(2))
    values = normal(batch, length, heads, dv, seed=seed + 50, dtype=dtype)
    # Decays from almost none to almost all.
    log_decay = -normal(batch, length, heads, seed=seed + 70).mul(1.5).exp().mul(0.3).to(dtype)
    return [tensor.requires_grad_() for tensor in (query, key, values, log_decay)]


def naive(query, key, values, log_decay, positions=None, kernel="binet_cauchy"):
    return grassmann_memory_naive(frames_of(query), frames_of(key), values, log_decay, positions, kernel)


def recurrent(query, key, values, log_decay, positions=None, kernel="binet_cauchy"):
    return grassmann_memory_recurrent(frames_of(query), frames_of(key), values, log_decay, positions, kernel=kernel)[0]


def chunked(chunk_size):
    def evaluate(query, key, values, log_decay, positions=None, kernel="binet_cauchy"):
        return grassmann_memory(
            frames_of(query), frames_of(key), values, log_decay, positions, kernel=kernel, chunk_size=chunk_size
        )[0]

    return evaluate


EVALUATIONS = {"recurrent": recurrent, "quadratic": chunked(10**6), "default": chunked(None)}
EVALUATIONS |= {f"chunks of {size}": chunked(size) for size in (1, 5, 16, 64)}


def outputs_and_gradients(evaluate, inputs, positions=None, kernel="binet_cauchy"):
    output = evaluate(*inputs, positions, kernel)
    return [output, *torch.autograd.grad(output, inputs, normal(*output.shape, seed=9, dtype=output.dtype))]


def assert_all_close(actual, expected, names=NAMES, tolerance=1e-10):
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1.0), name


def packed_positions(*lengths):
    """Positions of sequences of these lengths, one behind the other; a negative length is padding."""
    return [p for n in lengths for p in (range(n) if n > 0 else [NO_POSITION] * -n)]


# Planes, kernels and features


@pytest.mark.parametrize("r", [2, 3, 8])
def test_frames_are_orthonormal_and_span_the_plane_of_the_vectors(r):
    vectors = normal(5, 7, 2, r)
    frames = orthonormalise(vectors)
    torch.testing.assert_close(frames @ frames.mT, torch.eye(2, dtype=torch.float64).expand(5, 7, 2, 2))
    projector = torch.linalg.pinv(vectors) @ vectors
    torch.testing.assert_close(frames.mT @ frames, projector)
    # With its orientation.
    assert (torch.linalg.det(frames @ vectors.mT) > 0).all()


@pytest.mark.parametrize("r", [2, 3, 4, 7])
def test_kernels_are_their_functions_of_the_principal_angles(r):
    query, key = orthonormalise(normal(6, 2, r)), orthonormalise(normal(5, 2, r, seed=1))
    cosines = torch.linalg.svdvals(torch.einsum("nir,kjr->nkij", query, key))
    first, second = cosines.unbind(-1)
    expected = {
        "plucker": first * second,
        "binet_cauchy": first**2 * second**2,
        "projection": first**2 + second**2,
    }
    for kernel, value in expected.items():
        similarity = KERNELS[kernel].of_gram(gram(query, key))
        torch.testing.assert_close(similarity.abs() if kernel == "plucker" else similarity, value)


def test_kernels_without_planes_are_inner_products():
    query, key = normal(6, 1, 5), normal(4, 1, 5, seed=1)
    products = query[:, 0] @ key[:, 0].mT
    torch.testing.assert_close(KERNELS["inner"].of_gram(gram(query, key)), products)
    torch.testing.assert_close(KERNELS["inner_squared"].of_gram(gram(query, key)), products**2)


@pytest.mark.parametrize("kernel", PLANE_KERNELS)
def test_kernels_depend_on_the_plane_alone(kernel):
    vectors, basis = normal(20, 2, 6), normal(20, 2, 2, seed=1)
    features = kernel_features(orthonormalise(vectors), kernel)
    # The Plücker kernel knows an orientation too, which a change of basis with a negative determinant turns round.
    sign = torch.linalg.det(basis).sign()[:, None] if kernel == "plucker" else 1.0
    assert torch.linalg.det(basis).min() < 0 < torch.linalg.det(basis).max()
    torch.testing.assert_close(kernel_features(orthonormalise(basis @ vectors), kernel), sign * features)
    moved = vectors + torch.tensor([[[0.0] * 6, [1.0] * 6]])
    assert (kernel_features(orthonormalise(moved), kernel) - features).norm(dim=-1).min() > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("r", range(2, 10))
def test_inner_products_of_features_are_the_kernel(kernel, r):
    vectors = KERNELS[kernel].num_vectors
    query, key = frames_of(normal(9, vectors, r)), frames_of(normal(8, vectors, r, seed=1))
    features = kernel_features(query, kernel) @ kernel_features(key, kernel).mT
    torch.testing.assert_close(features, KERNELS[kernel].of_gram(gram(query, key)), rtol=1e-10, atol=1e-12)


def test_numbers_of_features_are_those_of_the_literature():
    expected = {
        "plucker": {4: 6, 6: 15, 8: 28, 16: 120},
        "binet_cauchy": {4: 20, 6: 105, 8: 336, 16: 5440},
        "projection": {4: 10, 6: 21, 8: 36, 16: 136},
        "inner": {4: 4, 6: 6, 8: 8, 16: 16},
        "inner_squared": {4: 10, 6: 21, 8: 36, 16: 136},
    }
    for kernel, counts in expected.items():
        for r, count in counts.items():
            features = kernel_features(normal(1, KERNELS[kernel].num_vectors, r), kernel)
            assert features.shape == (1, count) and KERNELS[kernel].num_features(r) == count


@pytest.mark.parametrize("kernel, rank", [("plucker", 10), ("binet_cauchy", 50), ("projection", 15), ("inner", 5)])
def test_gram_matrices_are_positive_semi_definite_and_no_feature_is_spare(kernel, rank):
    frames = frames_of(normal(80, KERNELS[kernel].num_vectors, 5))
    similarity = KERNELS[kernel].of_gram(gram(frames, frames))
    torch.testing.assert_close(similarity, similarity.mT)
    eigenvalues = torch.linalg.eigvalsh(similarity)
    assert eigenvalues[0] > -1e-12
    # As many dimensions as features: no smaller number of features can give this kernel.
    assert (eigenvalues > 1e-6).sum() == rank == KERNELS[kernel].num_features(5)


def test_plucker_features_are_the_wedge_of_the_frame():
    frames = orthonormalise(normal(7, 2, 6))
    torch.testing.assert_close(kernel_features(frames, "plucker"), wedge(frames[:, 0], frames[:, 1]))


# Degenerate planes


def degenerate_vectors(kind):
    z, other = normal(4), torch.tensor([0.3, -1.0, 0.2, 0.7], dtype=torch.float64)
    return {
        "zero": torch.stack([0 * z, 0 * z]),
        "zero first": torch.stack([0 * z, z]),
        "zero second": torch.stack([z, 0 * z]),
        "equal": torch.stack([z, z]),
        "opposite": torch.stack([z, -3 * z]),
        "nearly parallel": torch.stack([z, z + 5e-4 * z.norm() / other.norm() * other]),
    }[kind]


KINDS = ["zero", "zero first", "zero second", "equal", "opposite", "nearly parallel"]


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_plane_is_the_zero_frame_with_zero_gradient(kind):
    vectors = degenerate_vectors(kind).requires_grad_()
    frame = orthonormalise(vectors)
    assert torch.equal(frame, torch.zeros(2, 4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(frame.sum(), vectors)
    assert torch.equal(gradient, torch.zeros(2, 4, dtype=torch.float64))


def test_two_vectors_span_a_plane_from_the_sine_eps_on():
    for factor, spans in [(0.99, False), (1.01, True)]:
        angle = math.asin(1e-3 * factor)
        vectors = torch.tensor([[2.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]], dtype=torch.float64)
        expected = torch.eye(2, dtype=torch.float64) * spans
        torch.testing.assert_close(orthonormalise(vectors), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", PLANE_KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_planes_are_similar_to_nothing(kernel, kind):
    query, key, values, log_decay = make_inputs(kernel, length=20)
    with torch.no_grad():
        query[0, 7], key[0, 11] = degenerate_vectors(kind), degenerate_vectors(kind)
        skipped = values.clone()
        skipped[0, 11] = 0
    for evaluate in (naive, recurrent, chunked(20), chunked(6)):

        def at_default_eps(query, key, *rest, evaluate=evaluate):
            return evaluate(orthonormalise(query), orthonormalise(key), *rest)

        results = outputs_and_gradients(at_default_eps, [query, key, values, log_decay], kernel=kernel)
        output, query_gradient, key_gradient, *_ = results
        assert all(result.isfinite().all() for result in results)
        assert torch.equal(output[0, 7], torch.zeros_like(output[0, 7]))
        assert not query_gradient[0, 7].any() and not key_gradient[0, 11].any()
        assert query_gradient[0, 8].any() and key_gradient[0, 10].any()
        expected = at_default_eps(query, key, skipped, log_decay, None, kernel)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_planes_of_equal_tokens_give_no_noise(dtype):
    # Equal up to rounding: what a clamped norm turns into frames of noise and gradients of 1e9.
    token = normal(1, 1, 8)
    vectors = (token * (1 + torch.finfo(dtype).eps * normal(40, 2, 8, seed=1) / 2)).to(dtype).requires_grad_()
    frames = orthonormalise(vectors, eps=1e-3 if dtype == torch.float32 else 2e-2)
    (gradient,) = torch.autograd.grad(frames.sum(), vectors)
    assert not frames.any() and not gradient.any()


# Evaluations


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [1, 2, 17, 63, 130])
def test_evaluations_equal_the_sum_in_outputs_and_every_gradient(kernel, length):
    inputs = make_inputs(kernel, length=length)
    expected = outputs_and_gradients(naive, inputs, kernel=kernel)
    for evaluate in EVALUATIONS.values():
        assert_all_close(outputs_and_gradients(evaluate, inputs, kernel=kernel), expected)


def test_rows_of_no_tokens_are_read_as_such():
    for evaluate in (naive, *EVALUATIONS.values()):
        assert evaluate(*make_inputs(length=0)).shape == (2, 0, 2, 3)


def test_naive_is_the_sum_written_out():
    query, key, values, log_decay = make_inputs(length=6, batch=1, heads=1)
    actual = naive(query, key, values, log_decay)[0, :, 0]
    q, k, v, a = (tensor[0, :, 0] for tensor in (frames_of(query), frames_of(key), values, log_decay.exp()))
    for t in range(6):
        expected = torch.zeros(3, dtype=torch.float64)
        for s in range(t + 1):
            decay = math.prod(a[i].item() for i in range(s + 1, t + 1))
            expected = expected + decay * torch.linalg.det(q[t] @ k[s].mT) ** 2 * v[s]
        torch.testing.assert_close(actual[t], expected)


def test_states_of_many_chunks_are_computed_in_groups_of_groups():
    length = memory.CHUNKS_PER_GROUP**2 + 19
    inputs = make_inputs(length=length, batch=1, heads=2, dv=2)
    positions = torch.tensor([packed_positions(100, -3, 40, length - 143)])
    expected = outputs_and_gradients(recurrent, inputs, positions)
    assert_all_close(outputs_and_gradients(chunked(1), inputs, positions), expected)


@pytest.mark.parametrize("length", [5, 40])
def test_gradients_are_those_of_finite_differences(length):
    query, key, values, log_decay = make_inputs(length=length, batch=1, heads=1, r=4, dv=1)
    positions = torch.tensor([packed_positions(2, -1, length - 3)]) + 3
    state = normal(1, 1, 20, 1, seed=5).requires_grad_()

    def function(query, key, values, log_decay, state):
        state = MemoryState(state, torch.tensor([2]))
        query, key = orthonormalise(query), orthonormalise(key)
        output, state = grassmann_memory(
            query, key, values, log_decay, positions, state, chunk_size=4, output_final_state=True
        )
        return output, state.memory

    fast = length > 5  # In one random direction, instead of in all.
    assert torch.autograd.gradcheck(function, [query, key, values, log_decay, state], fast_mode=fast)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_features_are_those_of_finite_differences(kernel):
    vectors = normal(3, KERNELS[kernel].num_vectors, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda vectors: kernel_features(frames_of(vectors), kernel), [vectors])


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_no_token_sees_the_future(evaluate):
    inputs = [leaf.detach() for leaf in make_inputs(length=70)]
    expected = evaluate(*inputs)
    for t in (0, 4, 15, 16, 33, 64):
        other = [torch.cat([leaf[:, : t + 1], 3 * leaf[:, t + 1 :].flip(-1) - 1], dim=1) for leaf in inputs]
        actual = evaluate(*other)
        assert torch.equal(actual[:, : t + 1], expected[:, : t + 1])
        assert not torch.isclose(actual[:, t + 1], expected[:, t + 1]).all()


@pytest.mark.parametrize("evaluate", [naive, *EVALUATIONS.values()], ids=["naive", *EVALUATIONS])
def test_without_decay_it_is_a_plain_sum_and_with_all_decay_only_the_token_itself(evaluate):
    query, key, values, log_decay = make_inputs(length=35)
    q, k = frames_of(query), frames_of(key)
    similarity = torch.linalg.det(torch.einsum("bthir,bshjr->bhtsij", q, k)).square()
    for decay, seen in [(0.0, torch.ones(35, 35).tril()), (-math.inf, torch.eye(35)), (-1e5, torch.eye(35))]:
        log_decay = torch.full_like(log_decay, decay).requires_grad_()
        actual = outputs_and_gradients(evaluate, [query, key, values, log_decay])
        assert all(result.isfinite().all() for result in actual)
        expected = torch.einsum("bhts,bshd->bthd", similarity * seen, values)
        torch.testing.assert_close(actual[0], expected, rtol=1e-10, atol=1e-12)


# The unit roundoff of each type, times what sums lose.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_low_precision_equals_the_float64_reference_to_rounding(kernel, dtype, tolerance):
    inputs = make_inputs(kernel, length=130, r=6, dtype=dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    positions = torch.tensor([packed_positions(-5, 125), packed_positions(60, 70)])
    expected = outputs_and_gradients(naive, exact, positions, kernel)
    for evaluate in (recurrent, chunked(130), chunked(16), chunked(1)):
        actual = outputs_and_gradients(evaluate, inputs, positions, kernel)
        for name, a, b in zip(NAMES, actual, expected):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("chunk_size", [1000, 64, 3])
def test_strong_decays_cost_later_tokens_no_digits(chunk_size):
    # Sums of these log decays reach -50,000, where the distance between numbers in float32 is 0.004.
    query, key, values, log_decay = make_inputs(length=1000, batch=1, heads=1, dtype=torch.float32)
    log_decay = log_decay.detach().clone()
    log_decay[:, ::2] = -99.7
    log_decay[:, 1::2] = -0.1 * log_decay[:, 1::2].cos()
    inputs = [query, key, values, log_decay.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    expected = outputs_and_gradients(recurrent, exact)
    for name, a, b in zip(NAMES, outputs_and_gradients(chunked(chunk_size), inputs), expected):
        assert (a - b).norm() <= 1e-5 * b.norm(), name


def test_autocast_keeps_the_geometry_in_float32():
    inputs = make_inputs(length=70, dtype=torch.float32)
    for evaluate in (recurrent, chunked(70), chunked(16)):
        expected = evaluate(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(evaluate(*inputs), expected)


# Positions and states


@st.composite
def rows(draw, length):
    """Positions of a row: sequences, which may begin anywhere, with padding between, before, behind and inside."""
    starts = draw(st.lists(st.integers(0, length), max_size=3))
    first = draw(st.integers(0, 5))
    padding = draw(st.sets(st.integers(0, length - 1), max_size=4))
    row, position = [], first
    for i in range(length):
        position = 0 if i in starts else position
        row.append(NO_POSITION if i in padding else position)
        position += i not in padding
    return row


@st.composite
def problems(draw):
    length, kernel = draw(st.integers(1, 24)), draw(st.sampled_from(list(KERNELS)))
    inputs = make_inputs(kernel, length=length, r=draw(st.integers(2, 6)), seed=draw(st.integers(0, 1000)))
    return inputs, torch.tensor([draw(rows(length)), draw(rows(length))]), kernel


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 9))
def test_evaluations_agree_on_any_positions(problem, chunk_size):
    inputs, positions, kernel = problem
    expected = outputs_and_gradients(naive, inputs, positions, kernel)
    for evaluate in (recurrent, chunked(100), chunked(chunk_size)):
        assert_all_close(outputs_and_gradients(evaluate, inputs, positions, kernel), expected)


def in_calls(inputs, positions, kernel, sizes, chunk_sizes, state=None):
    """Output and final state of one call after the other; a chunk size of 0 means the recurrence."""
    query, key, values, log_decay = inputs
    query, key = frames_of(query), frames_of(key)
    outputs, begin = [], 0
    for size, chunk_size in zip(sizes, chunk_sizes):
        q, k, v, x = (tensor[:, begin : begin + size] for tensor in (query, key, values, log_decay))
        p = None if positions is None else positions[:, begin : begin + size]
        if chunk_size == 0:
            output, state = grassmann_memory_recurrent(q, k, v, x, p, state, kernel)
        else:
            output, state = grassmann_memory(q, k, v, x, p, state, kernel, chunk_size, output_final_state=True)
        outputs.append(output)
        begin += size
    return torch.cat(outputs, dim=1), state


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_calls_split_anywhere_equal_one_call(problem, data):
    inputs, positions, kernel = problem
    if data.draw(st.booleans()):
        positions = None
    length = inputs[0].shape[1]
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    sizes = [end - begin for begin, end in pairwise(cuts)]
    chunk_sizes = data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    features = KERNELS[kernel].num_features(inputs[0].shape[-1])
    first = normal(2, 2, features, 3, seed=3).requires_grad_()
    # The first row goes on from the state; the second may, if its first position says so.
    state = MemoryState(first, torch.tensor([-1 if positions is None else positions[0].clamp(min=0)[0] - 1, 3]))

    def results(sizes, chunk_sizes):
        output, final = in_calls(inputs, positions, kernel, sizes, chunk_sizes, state)
        cotangents = [normal(*output.shape, seed=1), normal(*first.shape, seed=2)]
        gradients = torch.autograd.grad([output, final.memory], [*inputs, first], cotangents, materialize_grads=True)
        return [output, *gradients, final.memory, final.position.double()]

    expected = results([length], [0])
    assert_all_close(results(sizes, chunk_sizes), expected, [*NAMES, "initial state", "final state", "position"])


LAYOUTS = {
    "left padding": (-7, 33),
    "right padding": (33, -7),
    "padding inside": (12, -9, 19),
    "packing": (11, 21, 8),
    "single tokens": (1, 1, 1, 37),
    "packing and padding": (-3, 9, -2, 14, -1, 10, -1),
}


@pytest.mark.parametrize("kernel", ["binet_cauchy", "inner_squared"])
@pytest.mark.parametrize("evaluate", [naive, *EVALUATIONS.values()], ids=["naive", *EVALUATIONS])
def test_each_sequence_of_a_row_gives_what_it_gives_alone(evaluate, kernel):
    inputs = make_inputs(kernel, batch=len(LAYOUTS), length=40)
    positions = torch.tensor([packed_positions(*layout) for layout in LAYOUTS.values()])
    # Padding inside a sequence is skipped.
    positions[2, 21:] += 12
    dirty = [leaf.detach().clone() for leaf in inputs]
    for leaf in dirty:
        leaf[positions == NO_POSITION] = math.nan
    # Padding may hold anything. (The frame of what is no number is zero, and has no gradient that is one.)
    dirty = [leaf.requires_grad_() for leaf in (frames_of(dirty[0]), frames_of(dirty[1]), *dirty[2:])]
    output, *gradients = outputs_and_gradients(evaluate, dirty, positions, kernel)
    cotangent = normal(*output.shape, seed=9)
    assert not output[positions == NO_POSITION].any()
    assert not any(gradient[positions == NO_POSITION].any() for gradient in gradients)
    # Nor has the decay of a first token anything to forget.
    assert not gradients[3][positions == 0].any() and gradients[3][positions == 5].all()
    for row, place in enumerate(positions):
        starts = [i for i, p in enumerate(place.tolist()) if p == 0] + [40]
        for begin, end in pairwise(starts):
            tokens = [i for i in range(begin, end) if place[i] != NO_POSITION]
            alone = [leaf.detach()[row : row + 1, tokens].requires_grad_() for leaf in dirty]
            expected = evaluate(*alone, None, kernel)
            torch.testing.assert_close(output[row, tokens], expected[0], rtol=1e-10, atol=1e-12)
            expected = torch.autograd.grad(expected, alone, cotangent[row : row + 1, tokens])
            for gradient, value in zip(gradients, expected):
                torch.testing.assert_close(gradient[row, tokens], value[0], rtol=1e-9, atol=1e-11)


def test_final_state_holds_the_position_of_the_last_real_token():
    positions = torch.tensor([packed_positions(4, -3), packed_positions(-7), packed_positions(3, 4)])
    query, key, values, log_decay = make_inputs(batch=3, length=7)
    before = torch.tensor([NO_POSITION, 5, NO_POSITION])
    state = MemoryState(torch.zeros(3, 2, 20, 3, dtype=torch.float64), before)
    for chunk_sizes in ([0], [3], [7]):
        for sizes in ([7], [2, 5]):
            _, final = in_calls(
                [query, key, values, log_decay], positions, "binet_cauchy", sizes, 2 * chunk_sizes, state
            )
            assert final.position.tolist() == [3, 5, 3]
            # Padding alone leaves the state as it was.
            assert not final.memory[1].any() and final.memory[0].any()


def test_a_single_token_is_a_step_of_the_recurrence():
    inputs = make_inputs(length=6)
    expected, state = in_calls(inputs, None, "binet_cauchy", [6], [6])
    query, key = frames_of(inputs[0]), frames_of(inputs[1])
    outputs, step = [], None
    for t in range(6):
        token = [tensor[:, t : t + 1] for tensor in (query, key, *inputs[2:])]
        output, step = grassmann_memory(*token, initial_state=step, output_final_state=True)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected)
    torch.testing.assert_close(step, state)
    assert grassmann_memory(*token)[1] is None


# What the code does with memory, tracers, compilers and mistakes


def test_features_are_not_kept_for_the_backward_pass():
    query, key, values, log_decay = make_inputs(length=128, r=12, dv=4, dtype=torch.float32)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = grassmann_memory(frames_of(query), frames_of(key), values, log_decay, chunk_size=32)
    features = 2 * 128 * 2 * KERNELS["binet_cauchy"].num_features(12) * 4
    assert sum(saved.values()) < features
    output.sum().backward()


@pytest.mark.parametrize("kernel", ["binet_cauchy", "inner_squared"])
def test_features_are_computed_piece_by_piece(kernel, monkeypatch):
    inputs = make_inputs(kernel, length=130, r=5)
    expected = outputs_and_gradients(chunked(16), inputs, kernel=kernel)
    each = 16 * KERNELS[kernel].num_features(5)
    sizes = []
    add_overlap = memory.add_overlap

    def record(features, *arguments, **options):
        sizes.append(features.numel())
        return add_overlap(features, *arguments, **options)

    monkeypatch.setattr(memory, "add_overlap", record)
    for maximum, largest in [(5 * each, 5 * each), (each // 2, each)]:
        sizes.clear()
        monkeypatch.setattr(memory, "MAX_FEATURES", maximum)
        assert_all_close(outputs_and_gradients(chunked(16), inputs, kernel=kernel), expected)
        assert max(sizes) == largest


def test_no_gather_or_scatter_over_coordinates_is_in_the_backward_pass():
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    for kernel in KERNELS:
        inputs = make_inputs(kernel, length=40)
        with Record():
            outputs_and_gradients(chunked(16), inputs, torch.tensor([packed_positions(-3, 37)] * 2), kernel)
    assert "aten.bmm.default" in names
    assert not any(word in name for name in names for word in ("scatter", "index_put", "index_add", "index_copy"))


def test_constants_that_tracers_and_inference_make_do_not_stay():
    inputs = make_inputs(length=20)
    expected = outputs_and_gradients(chunked(5), inputs)
    for context in (FakeTensorMode(), torch.inference_mode(), torch.device("meta")):
        memory._MADE_ONCE.clear()
        with context:
            chunked(5)(*(torch.ones(leaf.shape, dtype=leaf.dtype) for leaf in inputs))
        assert_all_close(outputs_and_gradients(chunked(5), inputs), expected)


def from_vectors(query, key, values, log_decay, positions, state, position):
    """All that compiled code has to do with the memory."""
    query, key = orthonormalise(query), orthonormalise(key)
    output, state = grassmann_memory(
        query, key, values, log_decay, positions, MemoryState(state, position), chunk_size=8, output_final_state=True
    )
    return output, state.memory, state.position


def assert_same_results(compiled, length, dynamic=False, tolerance=1e-10):
    inputs = make_inputs(length=length)
    positions = torch.tensor([packed_positions(-2, length - 2), packed_positions(length)])
    positions[1] += 5
    if dynamic:
        for tensor in (*inputs, positions):
            torch._dynamo.mark_dynamic(tensor, 1)
    inputs.append(normal(2, 2, 20, 3).requires_grad_())
    results = []
    for function in (compiled, from_vectors):
        output, final, position = function(*inputs[:4], positions, inputs[4], torch.tensor([3, 4]))
        gradients = torch.autograd.grad(output.sin().sum() + final.cos().sum(), inputs)
        results.append([output, *gradients, final, position.double()])
    assert_all_close(*results, [*NAMES, "initial state", "final state", "position"], tolerance)


def test_one_graph_serves_all_lengths():
    memory._MADE_ONCE.clear()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(from_vectors, fullgraph=True, backend=counter)
    for length in (37, 43):
        assert_same_results(compiled, length, dynamic=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_features_compile_for_all_shapes(kernel):
    memory._MADE_ONCE.clear()
    torch._dynamo.reset()

    def function(vectors):
        return kernel_features(frames_of(vectors), kernel)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for shape in [(3, 4, 5), (4, 3, 6)]:
        batch, length, r = shape
        vectors = normal(batch, length, KERNELS[kernel].num_vectors, r).requires_grad_()
        results = []
        for evaluate in (compiled, function):
            features = evaluate(vectors)
            results.append([features, *torch.autograd.grad(features.sin().sum(), [vectors])])
        assert_all_close(*results, ["features", "vectors"])


def test_graphs_of_forward_and_backward_pass_give_the_same():
    memory._MADE_ONCE.clear()
    torch._dynamo.reset()
    assert_same_results(torch.compile(from_vectors, fullgraph=True, backend="aot_eager"), 37)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_code_gives_the_same():
    """It compiles C++ for half a minute."""
    torch._dynamo.reset()
    assert_same_results(torch.compile(from_vectors, fullgraph=True), 37)


def test_autocast_does_not_reach_into_a_graph():
    torch._dynamo.reset()
    inputs = make_inputs(length=20, dtype=torch.float32)
    evaluate = chunked(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.compile(evaluate, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, evaluate(*inputs), rtol=1e-5, atol=1e-6)


def test_memory_file_works_without_transformers(tmp_path):
    # With the mixer and its kernels beside it, as a package of three files.
    for name in ("grassmann_memory.py", "plucker.py", "plucker_triton.py"):
        shutil.copy(Path(memory.__file__).with_name(name), tmp_path)
    program = f"""
import sys
sys.modules["transformers"] = None
sys.path.insert(0, {str(tmp_path.parent)!r})
import torch
from {tmp_path.name}.grassmann_memory import grassmann_memory, orthonormalise
query, key = orthonormalise(torch.randn(2, 1, 200, 3, 2, 4))
print(grassmann_memory(query, key, torch.randn(1, 200, 3, 5), -torch.rand(1, 200, 3))[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 200, 3, 5])" in done.stdout


def test_impossible_arguments_are_refused_by_name():
    query, key, values, log_decay = make_inputs()
    with pytest.raises(ValueError, match=r"`kernel` must be one of \['plucker', .*got 'det'"):
        grassmann_memory(query, key, values, log_decay, kernel="det")
    with pytest.raises(ValueError, match=r"must be \(batch, length, heads, 1, r >= 1\) for the kernel 'inner'"):
        grassmann_memory(query, key, values, log_decay, kernel="inner")
    with pytest.raises(ValueError, match=r"r >= 2\)"):
        grassmann_memory_naive(query[..., :1], key[..., :1], values, log_decay)
    with pytest.raises(ValueError, match=r"`query` and `key` must be .*got \(2, 9, 2, 2, 4\) and \(2, 8, 2, 2, 4\)"):
        grassmann_memory(query, key[:, 1:], values, log_decay)
    with pytest.raises(ValueError, match=r"`values` and `log_decay` must be .* and \(2, 9, 2\)"):
        grassmann_memory(query, key, values, log_decay[..., None])
    with pytest.raises(ValueError, match=r"`positions` must be \(2, 9\), got \(9,\)"):
        grassmann_memory_recurrent(query, key, values, log_decay, torch.arange(9))
    state = MemoryState(torch.zeros(2, 2, 20, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`initial_state` must hold shapes \(2, 2, 6, 3\) and \(2,\)"):
        grassmann_memory(query, key, values, log_decay, initial_state=state, kernel="plucker")
