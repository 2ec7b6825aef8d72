"""The kernels of states, and the memory over many chunks that is made with them, against naive sums in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_grassmann.grassmann_memory import (
    KERNELS,
    MemoryState,
    grassmann_memory,
    grassmann_memory_recurrent,
    kernel_features,
    orthonormalise,
    pack_state,
    unpack_state,
)
from modeling_grassmann.plucker import NO_POSITION


pytest.importorskip("triton", reason="needs Triton")
from modeling_grassmann.memory_states_triton import make_coordinates


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SQUARES = [("binet_cauchy", 2), ("binet_cauchy", 5), ("binet_cauchy", 8), ("inner_squared", 3), ("inner_squared", 24)]


def make_frames(kernel, *shape, r):
    frames = torch.randn(*shape, KERNELS[kernel].num_vectors, r, device=DEVICE)
    return orthonormalise(frames) if KERNELS[kernel].num_vectors == 2 else frames / frames.norm(dim=-1, keepdim=True)


def make_inputs(kernel, r, batch=2, length=37, heads=2, value_size=6, dtype=torch.float32):
    torch.manual_seed(0)
    query, key = (make_frames(kernel, batch, length, heads, r=r) for _ in range(2))
    values = torch.randn(batch, length, heads, value_size, device=DEVICE).to(dtype)
    return query, key, values, -0.3 * torch.rand(batch, length, heads, device=DEVICE)


def with_gradients(function, *inputs):
    """Outputs of a function, and gradients of all inputs, in the inputs' type."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{index}: {error:.1e}"


@pytest.mark.parametrize("r", [2, 3, 6, 8, 16])
@pytest.mark.parametrize("kernel", ["binet_cauchy", "projection", "inner"])
def test_coordinates_come_in_the_plain_order_and_zeros_behind_them_and_behind_the_row(kernel, r):
    batch, length, heads, chunk_size = 2, 21, 3, 8
    frames = make_frames(kernel, batch, length, heads, r=r)
    actual = make_coordinates(frames, torch.float32, kernel, chunk_size)
    coordinates = KERNELS[kernel].coordinates(frames.double()[..., None])[..., 0]  # (B, T, H, C)
    expected = actual.new_zeros(batch, 3, chunk_size, heads, actual.shape[-1], dtype=torch.float64)
    expected.flatten(1, 2)[:, :length, :, : coordinates.shape[-1]] = coordinates
    torch.testing.assert_close(actual.double(), expected.transpose(2, 3).flatten(0, 2), rtol=1e-6, atol=1e-6)


# Chunks that the last one does not fill, that it does, and that are longer than a block.
@pytest.mark.parametrize(
    "kernel, r, chunk_size, length",
    [(*square, 8, 21) for square in SQUARES]
    + [(*square, *sizes) for square in (("binet_cauchy", 8), ("inner_squared", 3)) for sizes in ((16, 32), (70, 80))],
)
def test_memory_over_chunks_is_the_recurrence_in_float64(kernel, r, chunk_size, length):
    """With a state before and after, and gradients of everything."""
    heads = 2 if r < 4 and length < 40 else 1
    inputs = make_inputs(kernel, r, length=length, heads=heads)
    state = torch.randn(2, heads, KERNELS[kernel].num_features(r), 6, device=DEVICE)
    last = torch.tensor([4, 0], device=DEVICE)

    def fused(*inputs):
        *tensors, memory = inputs
        output, final = grassmann_memory(
            *tensors, None, MemoryState(memory, last), kernel, chunk_size, output_final_state=True, backend="triton"
        )
        return output, final.memory

    def naive(*inputs):
        *tensors, memory = inputs
        output, final = grassmann_memory_recurrent(*tensors, None, MemoryState(memory, last), kernel)
        return output, final.memory

    expected = with_gradients(naive, *(x.double() for x in (*inputs, state)))
    assert_close(with_gradients(fused, *inputs, state), expected, 2e-5)


# Of the first row three sequences are left to the last one, that of the second row begins behind padding.
LAYOUT = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, -1, 2, 3, -1], [-1, -1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]])


@pytest.mark.parametrize("kernel, r", [("binet_cauchy", 5), ("inner_squared", 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_one_chunk_leaves_the_state_of_the_recurrence(kernel, r, packed):
    inputs = make_inputs(kernel, r, length=13, heads=1)
    positions = LAYOUT.where(LAYOUT >= 0, NO_POSITION).to(DEVICE) if packed else None
    if packed:
        for tensor in inputs:
            tensor[positions == NO_POSITION] = torch.nan

    def evaluate(function, **options):
        def state_and_reads(*inputs):
            output, state = function(*inputs, positions, None, kernel, **options)
            assert state.position.tolist() == ([3, 13] if packed else [12, 12])
            # What is read at padding means nothing.
            return state.memory, output if positions is None else output[positions != NO_POSITION]

        return state_and_reads

    options = {"chunk_size": 13, "output_final_state": True, "backend": "triton"}
    actual = with_gradients(evaluate(grassmann_memory, **options), *inputs)
    expected = with_gradients(evaluate(grassmann_memory_recurrent), *(x.double() for x in inputs))
    assert_close(actual, expected, 2e-5)


def test_a_state_keeps_its_digits_behind_many_decays():
    """Sums from the end: those from the beginning leave two or three digits to what was written last."""
    query, key, values, log_decay = make_inputs("binet_cauchy", 3, batch=1, length=200, heads=1)
    log_decay *= 200
    options = {"output_final_state": True, "chunk_size": 200, "backend": "triton"}
    _, state = grassmann_memory(query, key, values, log_decay, **options)
    _, expected = grassmann_memory_recurrent(*(x.double() for x in (query, key, values, log_decay)))
    assert_close([state.memory], [expected.memory], 1e-6)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float16, 5e-3),
        (torch.float32, 2e-5),
        pytest.param(torch.bfloat16, 4e-2, marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")),
    ],
)
def test_packed_and_padded_rows_are_those_of_the_recurrence(dtype, tolerance):
    inputs = make_inputs("binet_cauchy", 8, length=60, heads=1, dtype=dtype)
    positions = torch.cat([torch.arange(22), torch.arange(30), torch.full((8,), -1)])[None].expand(2, -1).clone()
    positions[1, :5] = -1
    positions = positions.to(DEVICE)
    real = (positions >= 0)[..., None, None]

    def fused(*inputs):
        return (torch.where(real, grassmann_memory(*inputs, positions, chunk_size=16, backend="triton")[0], 0),)

    def naive(*inputs):
        return (torch.where(real, grassmann_memory_recurrent(*inputs, positions)[0], 0),)

    expected = with_gradients(naive, *(x.double() for x in inputs))
    assert_close(with_gradients(fused, *inputs), expected, tolerance)


@pytest.mark.parametrize("kernel, r", SQUARES)
def test_a_state_is_the_same_before_and_after_packing(kernel, r):
    """For what is read: features of planes are fewer than products of coordinates."""
    with FakeTensorMode():  # whose constants must not stay
        pack_state(torch.randn(2, 3, KERNELS[kernel].num_features(r), 4, dtype=torch.float64), kernel, r)
    memory = torch.randn(2, 3, KERNELS[kernel].num_features(r), 4, dtype=torch.float64)
    packed = pack_state(memory, kernel, r)
    torch.testing.assert_close(packed, packed.transpose(2, 3))
    torch.testing.assert_close(unpack_state(packed, kernel, r), memory)
    # Both say the same to whoever reads.
    query = make_frames(kernel, 2, 9, 3, r=r).cpu().double()
    features = kernel_features(query, kernel)
    expected = torch.einsum("bthf,bhfd->bthd", features, memory)
    torch.testing.assert_close(kernels_read(query, packed, kernel), expected)


def kernels_read(query, packed, kernel):
    """`Σ_ij x_i x_j S_ij` in float64."""
    x = KERNELS[kernel].coordinates(query.double()[..., None])[..., 0]  # (B, T, H, C)
    full = x.new_zeros(*x.shape[:-1], packed.shape[2])
    full[..., : x.shape[-1]] = x
    return torch.einsum("bthi,bthj,bhijd->bthd", full, full, packed)


def test_equal_inputs_give_equal_bits():
    inputs = make_inputs("binet_cauchy", 8, batch=1, length=20)
    results = [
        with_gradients(lambda *x: (grassmann_memory(*x, chunk_size=8, backend="triton")[0],), *inputs)
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*results))
