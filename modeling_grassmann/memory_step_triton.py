# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""A decoding step of a memory layer in two Triton kernels, without Transformers.

[`memory_step`] takes one token of each row from its projections to what its heads read, and updates a decoding state
in place:

- [`token_kernel`] convolves keys, makes coordinates and decays, and moves the window of the convolution on;
- [`state_kernel`] writes the token into the state of squared similarities and reads it,
  :math:`S' = a S + \varphi(K) v^\top` and :math:`o = S'^\top \varphi(Q)`, where the features φ are
  `grassmann_memory.Products` of two coordinates each. They are made in registers, so that the state is read and
  written once, and nothing else is as large.
"""

import re

import torch

from .grassmann_memory_triton import KERNELS, num_coordinates
from .plucker_triton import NO_POSITION, ceil_div, on_own_device, unit_direction, unit_stride, unit_tangent


# As in `grassmann_memory_triton.py`.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


# Programs that have a multiprocessor of a large GPU each.
MAX_WAITING = 128
# Numbers of one vector for each head, and products of two, up to which a warp holds all of them.
MAX_VECTORS, MAX_PRODUCTS = 1024, 4096
# How much of the feature before goes into one of the overlapping features.
OVERLAPPING = tl.constexpr(3**-0.5)
NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def orthonormal(first, second, eps):
    """Frames of planes, zeros where two vectors span none: twice `(BLOCK_H, BLOCK_R)` -> the same."""
    direction, inverse = unit_direction(first)
    tangent, _, inverse_tangent = unit_tangent(direction, second, inverse > 0, eps)
    return tl.where((inverse_tangent > 0)[:, None], direction, 0.0), tangent


@triton.jit
def store_coordinates(
    coordinates, row, first, second, eps, H: tl.constexpr, r: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Coordinates of planes that vectors span, or of vectors, in the order of `grassmann_memory.py`: `(B, H, c)`."""
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_R)
    place = (row * H + head) * C
    if VECTORS == 2:
        first, second = orthonormal(first, second, eps)
        products = first[:, :, None] * second[:, None, :]
        i, j = column[:, None], column[None, :]
        place = place[:, None, None] + (i * (2 * r - i - 1) // 2 + j - i - 1)[None, :, :]
        inside = (head < H)[:, None, None] & ((i < j) & (j < r))[None, :, :]
        tl.store(coordinates + place, products - tl.trans(products, 0, 2, 1), mask=inside)
    else:
        inside = (head < H)[:, None] & (column < r)[None, :]
        tl.store(coordinates + place[:, None] + column[None, :], first, mask=inside)


@triton.jit
def token_kernel(
    query, key, decay, positions, key_conv, decay_bias, tail, tail_positions, position, coordinates, factor,
    query_stride, key_stride, decay_stride, position_stride, eps,
    H: tl.constexpr, r: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr, WINDOW: tl.constexpr,
    NO_POSITION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    One token of one row: coordinates `(2, B, H, c)` of its queries and keys, and factors `(B, H)` of states. Places of
    `tail` are read before they are written, in the order of one warp's instructions.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_R)
    WIDTH: tl.constexpr = H * VECTORS * r
    place = (head * (VECTORS * r))[:, None] + column[None, :]
    inside = (head < H)[:, None] & (column < r)[None, :]
    now = tl.load(positions + row * position_stride)
    before = tl.load(position + row)
    real = now != NO_POSITION
    tail += row * (WINDOW * WIDTH)
    tail_positions += row * WINDOW

    for vector in tl.static_range(VECTORS):
        x = tl.load(query + row * query_stride + vector * r + place, mask=inside & real, other=0.0).to(tl.float32)
        new = tl.load(key + row * key_stride + vector * r + place, mask=inside, other=0.0)
        y = new.to(tl.float32)
        if WINDOW > 0:
            y *= tl.load(key_conv + vector * r + place, mask=inside, other=0.0).to(tl.float32)
        for distance in tl.static_range(1, WINDOW + 1):
            earlier = tl.load(tail + (WINDOW - distance) * WIDTH + vector * r + place, mask=inside, other=0.0)
            weight = tl.load(key_conv + distance * WIDTH + vector * r + place, mask=inside, other=0.0).to(tl.float32)
            # Padding is further away.
            follows = now - tl.load(tail_positions + (WINDOW - distance)) == distance
            y += tl.where(follows, earlier.to(tl.float32), 0.0) * weight
        for step in tl.static_range(WINDOW):
            moved = new
            if step + 1 < WINDOW:
                moved = tl.load(tail + (step + 1) * WIDTH + vector * r + place, mask=inside, other=0.0)
            tl.store(tail + step * WIDTH + vector * r + place, moved.to(tail.dtype.element_ty), mask=inside)
        y = tl.where(real, y, 0.0)
        if vector == 0:
            query_first, query_second, key_first, key_second = x, x, y, y
        else:
            query_second, key_second = x, y
    for step in tl.static_range(WINDOW):
        moved = now
        if step + 1 < WINDOW:
            moved = tl.load(tail_positions + step + 1)
        tl.store(tail_positions + step, moved)

    store_coordinates(coordinates, row, query_first, query_second, eps, H, r, C, VECTORS, BLOCK_H, BLOCK_R)
    keys = coordinates + tl.num_programs(0).to(tl.int64) * (H * C)
    store_coordinates(keys, row, key_first, key_second, eps, H, r, C, VECTORS, BLOCK_H, BLOCK_R)

    x = tl.load(decay + row * decay_stride + head, mask=head < H, other=0.0).to(tl.float32)
    x += tl.load(decay_bias + head, mask=head < H, other=0.0).to(tl.float32)
    # e^-softplus(x), and nothing is left of another sequence; padding leaves the state as it is.
    a = tl.where(now == before + 1, 1 / (1 + tl.exp(x)), 0.0)
    tl.store(factor + row * H + head, tl.where(real, a, 1.0), mask=head < H)
    tl.store(position + row, tl.where(real, now, before))


@triton.jit
def products(query, key, entries, weight, feature, F: tl.constexpr):
    """Weighted products of two coordinates, of query and key, zeros where there is no such feature: `(BLOCK,)`."""
    inside = (feature >= 0) & (feature < F)
    i = tl.load(entries + feature, mask=inside, other=0)
    j = tl.load(entries + F + feature, mask=inside, other=0)
    scale = tl.load(weight + feature, mask=inside, other=0.0)
    return tl.load(query + i) * tl.load(query + j) * scale, tl.load(key + i) * tl.load(key + j) * scale


@triton.jit
def features(query, key, entries, weight, feature, OVERLAP: tl.constexpr, F: tl.constexpr):
    """[`products`] and what overlaps, as in `grassmann_memory.Products`: `(BLOCK,)`."""
    read, written = products(query, key, entries, weight, feature, F)
    if OVERLAP > 0:
        before = tl.where((feature >= F - OVERLAP) & (feature < F), feature - OVERLAP, -1)
        read_before, written_before = products(query, key, entries, weight, before, F)
        read += OVERLAPPING * read_before
        written += OVERLAPPING * written_before
    return read, written


@triton.jit
def state_kernel(
    coordinates, values, factor, positions, memory, entries, weight, output, values_stride, position_stride,
    OVERLAP: tl.constexpr, F: tl.constexpr, H: tl.constexpr, C: tl.constexpr, dv: tl.constexpr,
    NO_POSITION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One head's state of one row, for some channels."""
    sequence = tl.program_id(0).to(tl.int64)
    row, head = sequence // H, sequence % H
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    query = coordinates + sequence * C
    key = query + tl.num_programs(0).to(tl.int64) * C
    real = tl.load(positions + row * position_stride) != NO_POSITION
    v = tl.load(values + row * values_stride + head * dv + channel, mask=real & (channel < dv), other=0.0)
    v = v.to(tl.float32)
    a = tl.load(factor + sequence)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, F, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        read, written = features(query, key, entries, weight, feature, OVERLAP, F)
        place = memory + (sequence * F + feature)[:, None] * dv + channel[None, :]
        mask = (feature < F)[:, None] & (channel < dv)[None, :]
        state = a * tl.load(place, mask=mask, other=0.0) + written[:, None] * v[None, :]
        tl.store(place, state, mask=mask)
        total += tl.sum(read[:, None] * state, axis=0)
    tl.store(output + sequence * dv + channel, total.to(output.dtype.element_ty), mask=channel < dv)


def state_options(num_states: int, num_features: int, value_size: int) -> dict[str, int]:
    """Features and channels that a program of [`state_kernel`] holds, and its warps, as measured on an H200."""
    for channels in (8, 16):
        if num_states * ceil_div(value_size, channels) <= MAX_WAITING:
            # Each waits for memory as few times as possible.
            return {"BLOCK": min(triton.next_power_of_2(num_features), 1024), "BLOCK_V": channels, "num_warps": 8}
    return {"BLOCK": 256, "BLOCK_V": 32, "num_warps": 4}


def holds_all_heads(num_heads: int, num_vectors: int, reduced_size: int) -> bool:
    """Whether [`memory_step`] takes frames of `num_vectors` vectors in R^reduced_size, one for each head."""
    # Blocks of Triton are powers of two.
    heads, size = (1 << (number - 1).bit_length() for number in (num_heads, reduced_size))
    return heads * size <= MAX_VECTORS and (num_vectors == 1 or heads * size * size <= MAX_PRODUCTS)


@torch.library.custom_op(f"{NAMESPACE}::memory_step", mutates_args=("memory", "position", "tail", "tail_positions"))
@on_own_device
def memory_step(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    decay: torch.Tensor,
    positions: torch.Tensor,
    key_conv: torch.Tensor,
    decay_bias: torch.Tensor,
    memory: torch.Tensor,
    position: torch.Tensor,
    tail: torch.Tensor,
    tail_positions: torch.Tensor,
    entries: torch.Tensor,
    weight: torch.Tensor,
    overlap: int,
    eps: float,
    kernel: str,
) -> torch.Tensor:
    """
    Write a token and read the state that it leaves, without gradients.

    Args:
        query, key (`torch.Tensor` of shape `(B, 1, H * m * r)`): vectors that span planes, or are what is compared.
        values (`torch.Tensor` of shape `(B, 1, H, dv)`): what is written.
        decay (`torch.Tensor` of shape `(B, 1, H)`), decay_bias (`torch.Tensor` of shape `(H,)`): log decays are
            `-softplus(decay + decay_bias)`.
        positions (integer `torch.Tensor` of shape `(B, 1)`): of the tokens.
        key_conv (`torch.Tensor` of shape `(n, H * m * r)`): weights of the convolution of keys, those of the token
            first; `(0, H * m * r)` for none.
        memory (float32 `torch.Tensor` of shape `(B, H, F, dv)`), position (integer `torch.Tensor` of shape `(B,)`),
            tail (`torch.Tensor` of shape `(B, n - 1, H * m * r)`), tail_positions (integer `torch.Tensor` of shape
            `(B, n - 1)`): the state, all of it contiguous, see `cache_grassmann.MemoryCacheLayer`.
        entries (`torch.IntTensor` of shape `(2, F)`), weight (`torch.Tensor` of shape `(F,)`), overlap (`int`): see
            `grassmann_memory.FeatureEntries`.
        eps (`float`): sine of the angle up to which two vectors are parallel.
        kernel (`str`): the name of a kernel that is a square.

    Returns:
        What is read, `(B, 1, H, dv)`, in the type of `values`.
    """
    batch, num_heads, num_features, value_size = memory.shape
    kind, _ = KERNELS[kernel]
    vectors = 2 if kind == "wedge" else 1
    r = query.shape[-1] // (num_heads * vectors)
    output = values.new_empty(batch, 1, num_heads, value_size)
    if not batch:
        return output
    query, key, decay = unit_stride(query), unit_stride(key), unit_stride(decay)
    values = unit_stride(values.flatten(2))  # (B, 1, H, dv) -> (B, 1, H * dv)
    key_conv, decay_bias = key_conv.contiguous(), decay_bias.contiguous()
    size = num_coordinates(kernel, r)
    coordinates = memory.new_empty(2, batch, num_heads, size)
    factor = memory.new_empty(batch, num_heads)
    # One warp: it reads places of the window before it writes them.
    token_kernel[(batch,)](
        query, key, decay, positions, key_conv, decay_bias, tail, tail_positions, position, coordinates, factor,
        query.stride(0), key.stride(0), decay.stride(0), positions.stride(0), eps,
        H=num_heads, r=r, C=size, VECTORS=vectors, WINDOW=tail.shape[1], NO_POSITION=NO_POSITION,
        BLOCK_H=triton.next_power_of_2(num_heads), BLOCK_R=triton.next_power_of_2(r), num_warps=1,
    )  # fmt: skip
    options = state_options(batch * num_heads, num_features, value_size)
    state_kernel[(batch * num_heads, ceil_div(value_size, options["BLOCK_V"]))](
        coordinates, values, factor, positions, memory, entries, weight, output, values.stride(0), positions.stride(0),
        OVERLAP=overlap, F=num_features, H=num_heads, C=size, dv=value_size, NO_POSITION=NO_POSITION,
        **options,
    )  # fmt: skip
    return output


@memory_step.register_fake
def _(query, key, values, decay, positions, key_conv, decay_bias, memory, *state_and_options):
    return values.new_empty(values.shape[0], 1, memory.shape[1], memory.shape[3])
