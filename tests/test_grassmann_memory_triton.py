# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused kernels of the memory against the naive sum in float64.

Where there is no GPU, Triton's interpreter runs them on the CPU: `conftest.py` turns it on. Memory that an operator
leaves unwritten is NaN in every test.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_grassmann.grassmann_memory import (
    KERNELS,
    grassmann_memory_naive,
    grassmann_memory_recurrent,
    orthonormalise,
    sequence_starts,
)
from modeling_grassmann.plucker import NO_POSITION


pytest.importorskip("triton", reason="needs Triton")
from modeling_grassmann import grassmann_memory_triton as kernels


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NAMES = ["output", "query", "key", "values", "log_decay"]
# The unit roundoff of each type, times what sums lose.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Triton's interpreter cannot multiply bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(kernel="binet_cauchy", length=17, batch=2, heads=2, r=5, dv=3, dtype=torch.float32, decay=0.3, seed=0):
    """Frames, values in `dtype` and log decays, from almost none to almost all: leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    frames = [draw(batch, length, heads, KERNELS[kernel].num_vectors, r) for _ in range(2)]
    if KERNELS[kernel].num_vectors == 2:
        frames = [orthonormalise(vectors) for vectors in frames]
    values = draw(batch, length, heads, dv).to(dtype)
    log_decay = -draw(batch, length, heads).mul(1.5).exp().mul(decay)
    return [tensor.to(DEVICE).requires_grad_() for tensor in (*frames, values, log_decay)]


def packed_positions(*lengths):
    """Positions of sequences of these lengths, one behind the other; a negative length is padding."""
    return [p for n in lengths for p in (range(n) if n > 0 else [NO_POSITION] * -n)]


def make_segment(positions):
    """Numbers of sequences, as the kernels take them: `(B, T)`."""
    if positions is None:
        return None
    real, starts, _ = sequence_starts(positions, torch.full(positions.shape[:1], NO_POSITION))
    number = starts.cumsum(1)
    return torch.where(real, number, -1 - number).int().to(DEVICE)


def draw_cotangent(output, seed=1):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.device, output.dtype)


def outputs_and_gradients(inputs, positions=None, kernel="binet_cauchy", chunk_size=None, cotangent=None):
    chunk_size = chunk_size or inputs[0].shape[1]
    output = kernels.memory_pairs_triton(*inputs, make_segment(positions), kernel, chunk_size)
    cotangent = draw_cotangent(output) if cotangent is None else cotangent
    return [output, *torch.autograd.grad(output, inputs, cotangent)]


def reference(inputs, positions=None, kernel="binet_cauchy", evaluate=grassmann_memory_naive):
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in inputs]
    output = evaluate(*exact, positions, kernel=kernel)
    cotangent = draw_cotangent(output.to(inputs[2].dtype)).double()
    return [output, *torch.autograd.grad(output, exact, cotangent)]


def assert_close(actual, expected, inputs, tolerance=None):
    tolerance = tolerance or TOLERANCES[inputs[2].dtype]
    for name, a, b, leaf in zip(NAMES, actual, expected, [inputs[2], *inputs], strict=True):
        assert a.shape == b.shape and a.dtype == leaf.dtype, name
        # A single token has no decay. Written so that NaN fails too.
        assert (a.cpu().double() - b).norm() <= tolerance * max(b.norm().item(), 1e-3), name


# Together they have each kernel, one and several blocks of tokens, and every way of splitting coordinates in two.
CASES = {
    "one_token": {"length": 1, "r": 2, "dv": 1},
    "two_tokens": {"length": 2, "r": 3},
    "plucker": {"kernel": "plucker", "length": 130, "r": 6, "dv": 5},
    "binet_cauchy": {"length": 130, "r": 8, "dv": 32},
    "projection": {"kernel": "projection", "length": 130, "r": 7, "dv": 16, "batch": 1},
    "inner": {"kernel": "inner", "length": 130, "r": 5, "batch": 1},
    "inner_squared": {"kernel": "inner_squared", "length": 130, "r": 16, "dv": 7},
    "odd": {"kernel": "projection", "length": 17, "r": 5, "heads": 3},
    "short_of_a_block": {"length": 63, "r": 4, "dv": 17},
    "one_block": {"length": 64, "r": 10, "batch": 1},
    "wide": {"length": 65, "r": 12, "batch": 1, "heads": 1},
    "wide_values": {"length": 200, "r": 8, "dv": 64, "batch": 1},
    "widest_values": {"length": 130, "r": 5, "dv": 128, "batch": 1, "heads": 1},
    "widest": {"length": 70, "r": 16, "dv": 128, "batch": 1, "heads": 1},
    "widest_projection": {"kernel": "projection", "length": 20, "r": 16, "batch": 1, "heads": 1},
    "few_coordinates": {"length": 300, "r": 4, "dv": 32, "batch": 4 if ON_GPU else 1, "heads": 6 if ON_GPU else 2},
    "many_blocks": {"length": 400, "r": 4, "batch": 1, "heads": 1, "decay": 0.02},
    "forgotten_blocks": {"length": 400, "r": 4, "batch": 1, "heads": 1, "decay": 5.0},
}
# Every case in every type on a GPU; in the interpreter a third of them in float16.
CASES_AND_TYPES = [
    pytest.param(case, dtype, id=f"{name}-{dtype}")
    for index, (name, case) in enumerate(CASES.items())
    for dtype in DTYPES
    if ON_GPU or dtype == torch.float32 or index % 3 == 0
]


@pytest.mark.parametrize("case, dtype", CASES_AND_TYPES)
def test_output_and_every_gradient_equal_the_sum_in_float64(case, dtype):
    inputs, kernel = make_inputs(**case, dtype=dtype), case.get("kernel", "binet_cauchy")
    assert_close(outputs_and_gradients(inputs, kernel=kernel), reference(inputs, kernel=kernel), inputs)


LAYOUTS = {
    "padding on both sides": [packed_positions(-70, 60), packed_positions(120, -10)],
    "packing": [packed_positions(64, 1, 65), packed_positions(20, 40, 70)],
    "everything": [packed_positions(-3, 30, -40, 50, -7), [*range(50), *[NO_POSITION] * 20, *range(50, 110)]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_padding_and_packing_equal_the_sum_in_float64(layout):
    inputs, positions = make_inputs(length=130, dv=8), torch.tensor(layout)
    expected = reference(inputs, positions)
    with torch.no_grad():
        for leaf in inputs:
            leaf[positions == NO_POSITION] = math.nan
    actual = outputs_and_gradients(inputs, positions)
    assert_close(actual, expected, inputs)
    # Exactly nothing, whatever padding holds.
    assert not any(result[positions == NO_POSITION].any() for result in actual)


def test_sequences_of_a_row_see_nothing_of_each_other():
    inputs = make_inputs(length=330, batch=1, heads=1, decay=0.001)
    positions = torch.tensor([packed_positions(130, 70, 130)])
    segment = make_segment(positions)
    whole = kernels.memory_pairs_triton(*inputs, segment, "binet_cauchy", 330)
    query, key, values, log_decay = (leaf.detach().clone() for leaf in inputs)
    key[:, :130] = key[:, :130].flip(1)
    values[:, :130] *= 1e20
    changed = kernels.memory_pairs_triton(query, key, values, log_decay, segment, "binet_cauchy", 330)
    assert torch.equal(changed[:, 130:], whole[:, 130:])
    assert not torch.isclose(changed[:, :130], whole[:, :130]).any()


@pytest.mark.parametrize("length, chunk_size", [(70, 16), (130, 64), (150, 70), (17, 5)])
def test_chunks_are_sequences_of_their_own(length, chunk_size):
    inputs = make_inputs(length=length, decay=0.05)
    positions = torch.arange(length)[None] % chunk_size
    actual = outputs_and_gradients(inputs, chunk_size=chunk_size)
    assert_close(actual, reference(inputs, positions), inputs)


def test_chunks_and_sequences_meet():
    inputs = make_inputs(length=150, decay=0.05)
    positions = torch.tensor([packed_positions(-20, 130), packed_positions(90, 60)])
    actual = outputs_and_gradients(inputs, positions, chunk_size=70)
    # A sequence that a chunk begins in the middle of begins anew.
    anew = positions.clone()
    for begin in (70, 140):
        anew[:, begin:] = torch.where(anew[:, begin:] < 0, anew[:, begin:], anew[:, begin:] + 1000 * begin)
    assert_close(actual, reference(inputs, anew), inputs)


@settings(max_examples=60 if ON_GPU else 6, deadline=None)
@given(st.data())
def test_any_problem_gives_the_sum_in_output_and_every_gradient(data):
    length, kernel = data.draw(st.integers(1, 150)), data.draw(st.sampled_from(list(KERNELS)))
    inputs = make_inputs(
        kernel,
        length,
        heads=data.draw(st.integers(1, 2)),
        r=data.draw(st.integers(2, 9)),
        dv=data.draw(st.integers(1, 20)),
        decay=data.draw(st.sampled_from([1e-3, 0.1, 3.0])),
        seed=data.draw(st.integers(0, 1000)),
    )
    rows = []
    for _ in range(2):
        starts = data.draw(st.lists(st.integers(0, length), max_size=3))
        row = [i - max((s for s in starts if s <= i), default=0) for i in range(length)]
        padding = data.draw(st.sets(st.integers(0, length - 1), max_size=4))
        rows.append([NO_POSITION if i in padding else p for i, p in enumerate(row)])
    positions = torch.tensor(rows)
    actual = outputs_and_gradients(inputs, positions, kernel)
    assert_close(actual, reference(inputs, positions, kernel), inputs, tolerance=3e-5)


def test_strong_decays_cost_later_tokens_no_digits():
    # Sums of these log decays reach -3,000 in a block, where the distance between numbers in float32 is 0.0002.
    inputs = make_inputs(length=330, batch=1, heads=1)
    with torch.no_grad():
        inputs[3][:, ::2] = -99.7
        inputs[3][:, 1::2] = -0.1 * inputs[3][:, 1::2].cos()
    expected = reference(inputs, evaluate=lambda *args, **options: grassmann_memory_recurrent(*args, **options)[0])
    assert_close(outputs_and_gradients(inputs), expected, inputs, tolerance=2e-6)


@pytest.mark.parametrize("decay", [0.0, -1e5, -math.inf])
def test_without_decay_it_is_a_plain_sum_and_with_all_decay_only_the_token_itself(decay):
    query, key, values, log_decay = make_inputs(length=130, batch=1)
    log_decay = torch.full_like(log_decay, decay).requires_grad_()
    output, *gradients = outputs_and_gradients([query, key, values, log_decay])
    similarity = torch.linalg.det(torch.einsum("bthir,bshjr->bhtsij", query, key).double()).square()
    seen = torch.ones(130, 130).tril() if decay == 0 else torch.eye(130)
    expected = torch.einsum("bhts,bshd->bthd", similarity * seen.to(DEVICE), values.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert decay == 0 or not gradients[-1].any()


def test_no_token_sees_the_future():
    inputs = [leaf.detach() for leaf in make_inputs(length=150, batch=1, decay=0.01)]
    expected = kernels.memory_pairs_triton(*inputs, None, "binet_cauchy", 150)
    for t in (0, 15, 63, 64, 140):
        other = [torch.cat([leaf[:, : t + 1], leaf[:, t + 1 :].flip(1)], dim=1) for leaf in inputs]
        actual = kernels.memory_pairs_triton(*other, None, "binet_cauchy", 150)
        assert torch.equal(actual[:, : t + 1], expected[:, : t + 1])
        assert not torch.isclose(actual[:, t + 1], expected[:, t + 1]).all()


def test_coordinates_of_half_precision_values_have_more_bits_than_bfloat16():
    # Similar planes: what tells them apart is small beside their coordinates.
    inputs = make_inputs(length=64, r=8, dv=16, dtype=torch.float16)
    near = orthonormalise(inputs[0].detach() + 0.02 * inputs[1].detach())
    inputs[1] = near.requires_grad_()
    rounded = [leaf.detach().bfloat16().float().requires_grad_() for leaf in inputs[:2]] + inputs[2:]
    expected = reference(inputs)

    def error(inputs):
        return (outputs_and_gradients(inputs)[0].cpu().double() - expected[0]).norm() / expected[0].norm()

    assert error(inputs) < 5e-4 < 1.5e-3 < error(rounded)


def test_vectors_without_planes_may_have_any_length():
    inputs = [leaf.detach() for leaf in make_inputs("inner")]
    expected = kernels.memory_pairs_triton(*inputs, None, "inner", 17)
    inputs[0], inputs[1] = inputs[0] * 2**-30, inputs[1] * 2**30
    assert torch.equal(kernels.memory_pairs_triton(*inputs, None, "inner", 17), expected)


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
    inputs, positions = make_inputs(length=70, dtype=dtype), torch.tensor([packed_positions(30, 40)] * 2)
    expected = outputs_and_gradients(inputs, positions)
    orders = [(1, 4, 3, 0, 2), (2, 1, 0, 4, 3), (3, 2, 1, 0), (2, 0, 1)]
    other = [strided(leaf, *order) for leaf, order in zip(inputs, orders)]
    cotangent = strided(draw_cotangent(expected[0]), 3, 1, 0, 2)
    segment = strided(make_segment(positions), 1, 0)
    output = kernels.memory_pairs_triton(*other, segment, "binet_cauchy", 70)
    for name, a, b in zip(NAMES, [output, *torch.autograd.grad(output, other, cotangent)], expected):
        assert torch.equal(a, b), name
    # One row of numbers for all rows, and a cotangent that is one number in memory.
    one = kernels.memory_pairs_triton(*inputs, make_segment(positions)[:1], "binet_cauchy", 70)
    assert torch.equal(one, expected[0])
    ones = torch.ones_like(output)
    results = [
        outputs_and_gradients(inputs, positions, cotangent=x) for x in (ones, ones[:1, :1, :1, :1].expand_as(ones))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["binet_cauchy", "projection", "inner"])
def test_frames_of_any_type_may_begin_anywhere_in_memory(kernel, dtype):
    inputs = make_inputs(kernel, length=20, r=8)
    with torch.no_grad():
        inputs[0].copy_(inputs[0].to(dtype)), inputs[1].copy_(inputs[1].to(dtype))
    expected = outputs_and_gradients(inputs, kernel=kernel)
    frames = []
    for leaf in inputs[:2]:
        memory = leaf.new_empty(leaf.numel() + 1, dtype=dtype)
        frames.append(memory[1:].view_as(leaf).copy_(leaf.detach()).requires_grad_())
    actual = outputs_and_gradients([*frames, *inputs[2:]], kernel=kernel)
    # On a GPU, code for other addresses may round otherwise.
    tolerance = 1e-6 if inputs[0].is_cuda and dtype == torch.float32 else 0
    for name, a, b in zip(NAMES, actual, expected):
        assert (a.double() - b.to(a.dtype).double()).norm() <= tolerance * b.double().norm(), name


@pytest.mark.parametrize("wanted", range(4), ids=NAMES[1:])
def test_each_gradient_is_the_same_when_no_other_is_wanted(wanted):
    inputs = make_inputs()
    expected = outputs_and_gradients(inputs)[wanted + 1]
    for index, leaf in enumerate(inputs):
        leaf.requires_grad_(index == wanted)
    output = kernels.memory_pairs_triton(*inputs, None, "binet_cauchy", 17)
    (gradient,) = torch.autograd.grad(output, [inputs[wanted]], draw_cotangent(output))
    assert torch.equal(gradient, expected)


def test_results_are_the_same_bits_from_run_to_run():
    inputs = make_inputs(length=2047 if ON_GPU else 130, r=8, dv=32, decay=0.01)
    first = outputs_and_gradients(inputs)
    for _ in range(10 if ON_GPU else 1):
        for name, a, b in zip(NAMES, outputs_and_gradients(inputs), first):
            assert torch.equal(a, b), name


def test_a_batch_without_rows_gives_an_output_without_rows():
    inputs = [leaf.detach()[:0].requires_grad_() for leaf in make_inputs()]
    assert [result.shape[0] for result in outputs_and_gradients(inputs)] == [0] * 5


def test_what_the_kernels_cannot_serve_has_a_reason():
    values = make_inputs()[2]
    assert kernels.why_not_triton(values, "binet_cauchy", 16) is None
    assert kernels.why_not_triton(values, "projection", 16) is None
    assert "float64" in kernels.why_not_triton(values.double(), "binet_cauchy", 8)
    assert "190" in kernels.why_not_triton(values, "binet_cauchy", 20)
    assert "129" in kernels.why_not_triton(values.new_zeros(1, 1, 1, 129), "binet_cauchy", 8)


class CustomOperators(TorchDispatchMode):
    """Calls of operators that are not PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace not in ("aten", "prim", "prims"):
            self.calls.append((operator, args))
        return operator(*args, **kwargs or {})


def detached(value, requires_grad):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())


@pytest.mark.parametrize("kernel, dtype", [("binet_cauchy", torch.float32), ("inner", torch.float16)], ids=str)
def test_operators_keep_what_they_promise_to_pytorch(kernel, dtype):
    """Schema, registration of the gradient, shapes on fake tensors, and what becomes of them under compilation."""
    # Every check computes both again, which takes the interpreter long.
    inputs = make_inputs(kernel, length=5, batch=1, heads=1, dtype=dtype)
    positions = torch.tensor([packed_positions(-1, 2, 2)]) if kernel == "inner" else None
    with CustomOperators() as operators:
        outputs_and_gradients(inputs, positions, kernel, chunk_size=5 if kernel == "inner" else 3)
    assert len(operators.calls) == 2, "one in each direction"
    for (operator, args), differentiable in zip(operators.calls, [True, False]):
        opcheck(operator, tuple(detached(value, differentiable) for value in args))
    # With rounded coordinates, as beside bfloat16, in which the interpreter cannot compute.
    operator, args = operators.calls[1]
    rounded = (coordinates[1].to(dtype) for coordinates in args[1:3])
    opcheck(operator, tuple(detached(value, False) for value in (*args[:4], *rounded, *args[6:])))


def test_compilation_sees_one_node_in_each_direction_that_serves_all_lengths():
    nodes = {"forward": [], "backward": []}

    def record(direction):
        def compiler(graph, inputs):
            calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
            nodes[direction].append([call for call in calls if getattr(call, "namespace", "aten") != "aten"])
            return graph.forward

        return compiler

    def function(query, key, values, log_decay, segment):
        return kernels.memory_pairs_triton(query, key, values, log_decay, segment, "projection", query.shape[1])

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for length in (20, 80):
        inputs = make_inputs("projection", length)
        positions = torch.tensor([packed_positions(8, length - 8), packed_positions(-4, length - 4)])
        output = compiled(*inputs, make_segment(positions))
        actual = [output, *torch.autograd.grad(output, inputs, draw_cotangent(output))]
        for name, a, b in zip(NAMES, actual, outputs_and_gradients(inputs, positions, "projection")):
            assert torch.equal(a, b), name
    assert {direction: [len(calls) for calls in graphs] for direction, graphs in nodes.items()} == {
        "forward": [1],
        "backward": [1],
    }


def test_an_exported_program_holds_the_operator():
    class Pairs(torch.nn.Module):
        forward = staticmethod(partial(kernels.memory_pairs_triton, segment=None, kernel="plucker", chunk_size=16))

    inputs = tuple(leaf.detach() for leaf in make_inputs("plucker", 20))
    program = torch.export.export(Pairs(), inputs)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert any(getattr(call, "namespace", "aten") != "aten" for call in calls)
    assert torch.equal(program.module()(*inputs), Pairs()(*inputs))


@pytest.mark.parametrize("reverse", [False, True])
def test_prefix_sums_are_the_plain_ones(reverse):
    """Of rows that lie apart in memory, too, with their gradient, and of integers."""
    x = torch.randn(5, 3, 7, dtype=torch.float64, device=DEVICE).movedim(0, -1).requires_grad_()
    expected = x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)
    torch.testing.assert_close(kernels.prefix_sums_op(x, reverse), expected)
    assert torch.autograd.gradcheck(lambda x: kernels.prefix_sums_op(x, reverse), x)
    opcheck(kernels.prefix_sums_op, (x, reverse))
    assert kernels.prefix_sums_op(torch.ones(3, dtype=torch.int32, device=DEVICE), reverse).dtype == torch.int32
