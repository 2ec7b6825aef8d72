# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""What memories remember whose similarity is a square, in fused Triton kernels, without Transformers.

Where the similarity is :math:`\langle x_t, y_s \rangle^2`, what the tokens of a chunk write is the tensor
:math:`S_{ij} = \sum_s y_{s,i}\, y_{s,j}\, v_s`, from which a token reads
:math:`\sum_{ij} x_{t,i}\, x_{t,j}\, S_{ij}`. `grassmann_memory.py` keeps the fewest features that will do. Here all
products of coordinates are made, but in registers, where they cost no memory: three kernels are both directions of
both.

- [`write_kernel`] gives `S` of coordinates and values, and the gradient of `S` from those of what was read;
- [`read_kernel`] reads, and gives the gradient of values from that of `S`;
- [`coordinates_grad_kernel`] gives the gradients of either's coordinates: as `S` is symmetric,
  :math:`2 \sum_j \langle u_t, S_{ij} \rangle x_{t,j}`, where `u` is the value or the gradient of what was read.

Sums have a fixed order: the same inputs give the same bits.
"""

import re

import torch

from .grassmann_memory_triton import (
    coordinate_dtype,
    coordinates_backward_kernel,
    coordinates_kernel,
    coordinates_options,
    coordinates_width,
    dot_precision,
)
from .plucker_triton import ceil_div, on_own_device, unit_stride


# As in `grassmann_memory_triton.py`.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def load_tokens(pointers, token, inside, width, column, mask):
    """Some columns of rows of tokens: `(BLOCK, columns)`."""
    return tl.load(
        pointers + token[:, None] * width + column[None, :], mask=inside[:, None] & mask[None, :], other=0.0
    )


@triton.jit
def products(some, all, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr):
    """Of some coordinates with all: `(BLOCK, GROUP)` and `(BLOCK, BLOCK_C)` -> `(BLOCK, GROUP * BLOCK_C)`."""
    result = some.to(tl.float32)[:, :, None] * all.to(tl.float32)[:, None, :]
    return tl.reshape(result.to(dtype), (BLOCK, GROUP * BLOCK_C))


@triton.jit
def state_pointers(
    states, sequence, num_heads, num_chunks, group, channel,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, dv: tl.constexpr,
):  # fmt: skip
    """Pointers to a group's part of a state, `(GROUP * BLOCK_C, BLOCK_V)`, and which of them are of the state."""
    head = sequence % num_heads
    chunk = sequence // num_heads % num_chunks
    row = sequence // (num_heads * num_chunks)
    states += ((row * num_heads + head) * num_chunks + chunk).to(tl.int64) * (WIDTH * WIDTH * dv)
    product = tl.arange(0, GROUP * BLOCK_C)
    j = product % BLOCK_C
    place = (group * GROUP + product // BLOCK_C) * WIDTH + j
    return states + place[:, None] * dv + channel[None, :], (j < WIDTH)[:, None] & (channel < dv)[None, :]


@triton.jit
def token_pointers(
    tokens, sequence, num_heads, num_chunks, tokens_row, tokens_head, tokens_chunk,
):  # fmt: skip
    """Pointer to the first token of a chunk in a tensor of shape `(B, H, N, c, dv)`."""
    head = sequence % num_heads
    chunk = sequence // num_heads % num_chunks
    row = sequence // (num_heads * num_chunks)
    return tokens + row.to(tl.int64) * tokens_row + head * tokens_head + chunk.to(tl.int64) * tokens_chunk


@triton.jit
def write_kernel(
    coordinates, values, states, num_heads, num_chunks, chunk_size,
    values_row, values_head, values_chunk, values_token,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, dv: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`Σ_s y_i y_j v_s` over the tokens of a chunk, for some `i` and all `j`."""
    group = tl.program_id(0) % (WIDTH // GROUP)
    sequence = tl.program_id(0) // (WIDTH // GROUP)
    values = token_pointers(values, sequence, num_heads, num_chunks, values_row, values_head, values_chunk)
    coordinates += sequence.to(tl.int64) * chunk_size * WIDTH
    column = tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_V)
    some = group * GROUP + tl.arange(0, GROUP)
    total = tl.zeros([GROUP * BLOCK_C, BLOCK_V], tl.float32)
    for start in tl.range(0, chunk_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < chunk_size
        y = load_tokens(coordinates, token, inside, WIDTH, column, column < WIDTH)
        y_some = load_tokens(coordinates, token, inside, WIDTH, some, some < WIDTH)
        v = load_tokens(values, token, inside, values_token, channel, channel < dv)
        y_y = products(y_some, y, BLOCK, GROUP, BLOCK_C, v.dtype)
        total = tl.dot(tl.trans(y_y), v, total, input_precision=PRECISION)
    pointers, mask = state_pointers(states, sequence, num_heads, num_chunks, group, channel, WIDTH, GROUP, BLOCK_C, dv)
    tl.store(pointers, total, mask=mask)


@triton.jit
def read_kernel(
    coordinates, states, output, num_blocks, num_heads, num_chunks, chunk_size,
    output_row, output_head, output_chunk, output_token,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, dv: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`Σ_ij x_i x_j S_ij` for a block of tokens."""
    block = tl.program_id(0) % num_blocks
    sequence = tl.program_id(0) // num_blocks
    output = token_pointers(output, sequence, num_heads, num_chunks, output_row, output_head, output_chunk)
    coordinates += sequence.to(tl.int64) * chunk_size * WIDTH
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < chunk_size
    column = tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_V)
    x = load_tokens(coordinates, token, inside, WIDTH, column, column < WIDTH)
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for group in tl.range(0, WIDTH // GROUP):
        some = group * GROUP + tl.arange(0, GROUP)
        x_some = load_tokens(coordinates, token, inside, WIDTH, some, some < WIDTH)
        pointers, mask = state_pointers(
            states, sequence, num_heads, num_chunks, group, channel, WIDTH, GROUP, BLOCK_C, dv
        )
        s = tl.load(pointers, mask=mask, other=0.0).to(dtype)
        total = tl.dot(products(x_some, x, BLOCK, GROUP, BLOCK_C, dtype), s, total, input_precision=PRECISION)
    pointers = output + token[:, None] * output_token + channel[None, :]
    tl.store(pointers, total, mask=inside[:, None] & (channel < dv)[None, :])


@triton.jit
def coordinates_grad_kernel(
    coordinates, vectors, states, grad, num_blocks, num_heads, num_chunks, chunk_size,
    vectors_row, vectors_head, vectors_chunk, vectors_token,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, dv: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`2 Σ_j ⟨u, S_ij⟩ x_j` for a block of tokens."""
    block = tl.program_id(0) % num_blocks
    sequence = tl.program_id(0) // num_blocks
    vectors = token_pointers(vectors, sequence, num_heads, num_chunks, vectors_row, vectors_head, vectors_chunk)
    coordinates += sequence.to(tl.int64) * chunk_size * WIDTH
    grad += sequence.to(tl.int64) * chunk_size * WIDTH
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < chunk_size
    column = tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_V)
    x = load_tokens(coordinates, token, inside, WIDTH, column, column < WIDTH).to(tl.float32)
    u = load_tokens(vectors, token, inside, vectors_token, channel, channel < dv)
    for group in tl.range(0, WIDTH // GROUP):
        pointers, mask = state_pointers(
            states, sequence, num_heads, num_chunks, group, channel, WIDTH, GROUP, BLOCK_C, dv
        )
        s = tl.load(pointers, mask=mask, other=0.0).to(u.dtype)
        inner = tl.reshape(tl.dot(u, tl.trans(s), input_precision=PRECISION), (BLOCK, GROUP, BLOCK_C))
        result = 2.0 * tl.sum(inner * x[:, None, :], axis=2)
        some = group * GROUP + tl.arange(0, GROUP)
        pointers = grad + token[:, None] * WIDTH + some[None, :]
        tl.store(pointers, result.to(grad.dtype.element_ty), mask=inside[:, None])


def launch(values_dtype: torch.dtype, kernel: str, r: int, value_size: int) -> dict[str, int | str]:
    """What all three kernels are compiled for."""
    width = coordinates_width(kernel, r)
    block_c = triton.next_power_of_2(width)
    # As many products at a time as registers hold.
    group = max(1, (128 if values_dtype == torch.float32 else 256) // block_c)
    return {
        "WIDTH": width, "GROUP": group, "BLOCK_C": block_c, "dv": value_size,
        "BLOCK_V": max(32, triton.next_power_of_2(value_size)), "BLOCK": 32 if values_dtype == torch.float32 else 64,
        "PRECISION": dot_precision(values_dtype),
    }  # fmt: skip


def make_coordinates(frames: torch.Tensor, dtype: torch.dtype, kernel: str, chunk_size: int) -> torch.Tensor:
    """Coordinates of frames `(B, T, H, m, r)` for values in `dtype`: `(B * N * H, c, WIDTH)`."""
    batch, length, num_heads, _, r = frames.shape
    num_chunks, width = ceil_div(length, chunk_size), coordinates_width(kernel, r)
    coordinates = frames.new_empty(
        batch * num_chunks * num_heads, chunk_size, width, dtype=coordinate_dtype(kernel, dtype)
    )
    frames = unit_stride(frames)
    options, blocks = coordinates_options(kernel, frames, chunk_size)
    coordinates_kernel[(blocks * coordinates.shape[0],)](
        frames, None, None, coordinates, blocks, num_heads, num_chunks, chunk_size, length,
        *frames.stride()[:4], 0, 0,
        SQUARED=False, SEGMENTS=False, **options,
    )  # fmt: skip
    return coordinates


@torch.library.custom_op(f"{NAMESPACE}::write_states", mutates_args=())
@on_own_device
def write_states(frames: torch.Tensor, values: torch.Tensor, kernel: str) -> torch.Tensor:
    """
    What the tokens of each chunk write.

    Args:
        frames (`torch.Tensor` of shape `(B, T, H, m, r)`): those of keys, zeros where nothing is written.
        values (`torch.Tensor` of shape `(B, H, N, c, dv)`): values, in the type in which products are computed.
        kernel (`str`): the name of a kernel that is a square.

    Returns:
        float32 `torch.Tensor` of shape `(B, H, N, W, W, dv)`, see [`coordinates_width`].
    """
    batch, num_heads, num_chunks, chunk_size, value_size = values.shape
    options = launch(values.dtype, kernel, frames.shape[-1], value_size)
    width = options["WIDTH"]
    states = values.new_empty(batch, num_heads, num_chunks, width, width, value_size, dtype=torch.float32)
    if states.numel():
        values = unit_stride(values)
        coordinates = make_coordinates(frames, values.dtype, kernel, chunk_size)
        write_kernel[(coordinates.shape[0] * (width // options["GROUP"]),)](
            coordinates, values, states, num_heads, num_chunks, chunk_size, *values.stride()[:4], **options
        )
    return states


@write_states.register_fake
def _(frames, values, kernel):
    width = coordinates_width(kernel, frames.shape[-1])
    return values.new_empty(*values.shape[:3], width, width, values.shape[-1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::read_states", mutates_args=())
@on_own_device
def read_states(
    frames: torch.Tensor, states: torch.Tensor, kernel: str, chunk_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """
    What the tokens of each chunk read.

    Args:
        frames (`torch.Tensor` of shape `(B, T, H, m, r)`): those of queries.
        states (`torch.Tensor` of shape `(B, H, N, W, W, dv)`): one for each chunk, symmetric.
        kernel (`str`): the name of a kernel that is a square.
        chunk_size (`int`): `c`, tokens in a chunk.
        dtype (`torch.dtype`): the type in which products are computed.

    Returns:
        float32 `torch.Tensor` of shape `(B, H, N, c, dv)`.
    """
    num_heads, num_chunks, *_, value_size = states.shape[1:]
    output = states.new_empty(*states.shape[:3], chunk_size, value_size, dtype=torch.float32)
    if output.numel():
        options = launch(dtype, kernel, frames.shape[-1], value_size)
        coordinates = make_coordinates(frames, dtype, kernel, chunk_size)
        num_blocks = ceil_div(chunk_size, options["BLOCK"])
        read_kernel[(num_blocks * coordinates.shape[0],)](
            coordinates, states.contiguous(), output, num_blocks, num_heads, num_chunks, chunk_size,
            *output.stride()[:4], **options, dtype=TYPES[dtype],
        )  # fmt: skip
    return output


@read_states.register_fake
def _(frames, states, kernel, chunk_size, dtype):
    return states.new_empty(*states.shape[:3], chunk_size, states.shape[-1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::frames_grad", mutates_args=())
@on_own_device
def frames_grad(frames: torch.Tensor, vectors: torch.Tensor, states: torch.Tensor, kernel: str) -> torch.Tensor:
    """
    Gradient of frames, `(B, T, H, m, r)`, from symmetric states and what stands for `u` at the top of this file,
    `(B, H, N, c, dv)`: values, or gradients of what was read.
    """
    length, num_heads, _, r = frames.shape[1:]
    num_chunks, chunk_size, value_size = vectors.shape[2:]
    result = torch.empty_like(frames, memory_format=torch.contiguous_format)
    if result.numel() == 0 or value_size == 0:
        return result.zero_()
    options = launch(vectors.dtype, kernel, r, value_size)
    coordinates = make_coordinates(frames, vectors.dtype, kernel, chunk_size)
    num_blocks = ceil_div(chunk_size, options["BLOCK"])
    grad = torch.empty_like(coordinates, dtype=vectors.dtype)
    frames, vectors = unit_stride(frames), unit_stride(vectors)
    coordinates_grad_kernel[(num_blocks * coordinates.shape[0],)](
        coordinates, vectors, states.contiguous(), grad, num_blocks, num_heads, num_chunks, chunk_size,
        *vectors.stride()[:4], **options,
    )  # fmt: skip
    backward_options, blocks = coordinates_options(kernel, frames, chunk_size)
    coordinates_backward_kernel[(blocks * coordinates.shape[0],)](
        frames, None, grad, result, blocks, num_heads, num_chunks, chunk_size, length, *frames.stride()[:4], 0, 0,
        SEGMENTS=False, **backward_options,
    )  # fmt: skip
    return result


@frames_grad.register_fake
def _(frames, vectors, states, kernel):
    return torch.empty_like(frames, memory_format=torch.contiguous_format)


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def save_write(ctx, inputs, output):
    frames, values, ctx.kernel = inputs
    ctx.save_for_backward(frames, values)


def write_backward(ctx, grad):
    frames, values = ctx.saved_tensors
    grad_values = read_states(frames, grad, ctx.kernel, values.shape[3], values.dtype).to(values.dtype)
    return frames_grad(frames, values, grad, ctx.kernel), grad_values, None


write_states.register_autograd(write_backward, setup_context=save_write)


def save_read(ctx, inputs, output):
    frames, states, ctx.kernel, _, ctx.dtype = inputs
    ctx.save_for_backward(frames, states)


def read_backward(ctx, grad):
    frames, states = ctx.saved_tensors
    grad = grad.to(ctx.dtype)
    return frames_grad(frames, grad, states, ctx.kernel), write_states(frames, grad, ctx.kernel), None, None, None


read_states.register_autograd(read_backward, setup_context=save_read)
