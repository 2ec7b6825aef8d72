# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""The Plücker mixer in fused Triton kernels, forward and backward, without Transformers.

[`plucker_features_triton`] computes what `plucker.plucker_features` does, by the exact collapse of that file: with
the unit vector :math:`\hat z_t` ("direction") and the average :math:`m_t` of the unit tangents towards a token's
neighbours ("tangent"), the feature is :math:`g_t = \sum_{ij} A_{ij} \hat z_{t,i} m_{t,j} + b`, where the
antisymmetric :math:`A_{ij} \in R^d` holds the columns of the projection.

- [`tangents_kernel`] writes direction and tangent, r numbers a token each;
- [`project_kernel`] is a matrix product whose left factor, Plücker coordinates, is made in registers;
- [`project_backward_kernel`] gives the gradients of direction and tangent, by the same product the other way;
- [`weight_backward_kernel`] gives the gradient of the projection, with the coordinates made in registers again;
- [`tangents_backward_kernel`] gathers what a token gets as itself and as a neighbour of others.

[`plucker_mixer_triton`] is the whole mixer, from its linear maps, which are cuBLAS's, to its LayerNorm. The backward
starts from direction and tangent, so that no tensor with P or |W| r numbers a token ever exists. Sums over tokens have
a fixed order: the same inputs give the same bits.
"""

import re
from collections.abc import Callable
from functools import lru_cache, wraps

import torch


# Optional packages are imported inside of `try`: Transformers demands what it finds elsewhere in a file that travels
# with a checkpoint. `plucker.py` does without this file where there is no Triton.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


MAX_REDUCED_SIZE = 128
# Of an H100 or H200. Sums over tokens are split among a few times as many programs, on other GPUs too, so that their
# order does not depend on the GPU.
MULTIPROCESSORS = 132
# That of `plucker.py`, which imports this file.
NO_POSITION = -(2**31)
# As Triton itself decides it, when kernels are declared.
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Operators are named after the module, so that code that travels with a checkpoint never meets the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def unit_direction(z):
    """Unit vectors, zeros for zeros, and the inverse norms: `(BLOCK, BLOCK_R)` -> the same, `(BLOCK,)`."""
    square = tl.sum(z * z, axis=1)
    inverse = tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)
    return z * inverse[:, None], inverse


@triton.jit
def unit_tangent(direction, y, pair, eps):
    """Unit tangents towards `y`, zeros without a plane, their inner products with `y`, and the inverse norms."""
    inner = tl.sum(direction * y, axis=1)
    perpendicular = y - inner[:, None] * direction
    square = tl.sum(perpendicular * perpendicular, axis=1)
    spans = pair & (square > eps * eps * tl.sum(y * y, axis=1))
    inverse = tl.where(spans, tl.rsqrt(tl.where(spans, square, 1.0)), 0.0)
    return perpendicular * inverse[:, None], inner, inverse


@triton.jit
def tangents_kernel(
    query, source, positions, offset_weights, direction, tangent, inverse_count,
    num_tokens, length, source_length, eps,
    query_batch, query_token, query_head, source_batch, source_token, source_head, position_batch, position_token,
    r: tl.constexpr, OFFSETS: tl.constexpr, NO_POSITION: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = token < num_tokens
    batch = (token // length).to(tl.int64)
    place = source_length - length + token % length

    column = tl.arange(0, BLOCK_R)
    in_vector = real[:, None] & (column < r)[None, :]
    z_pointers = query + batch * query_batch + (token % length).to(tl.int64) * query_token + head * query_head
    z = tl.load(z_pointers[:, None] + column[None, :], mask=in_vector, other=0.0).to(tl.float32)
    z_hat, _ = unit_direction(z)

    position_row = positions + batch * position_batch
    position = tl.load(position_row + place * position_token, mask=real, other=NO_POSITION)
    y_row = source + batch * source_batch + head * source_head
    mean = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(len(OFFSETS)):
        neighbour = place - OFFSETS[index]
        inside = real & (neighbour >= 0) & (neighbour < source_length) & (position != NO_POSITION)
        other = tl.load(position_row + neighbour * position_token, mask=inside, other=NO_POSITION)
        pair = inside & (other != NO_POSITION) & (position - other == OFFSETS[index])
        y_pointers = y_row + neighbour.to(tl.int64) * source_token
        y = tl.load(y_pointers[:, None] + column[None, :], mask=pair[:, None] & (column < r)[None, :], other=0.0)
        unit, _, _ = unit_tangent(z_hat, y.to(tl.float32), pair, eps)
        if WEIGHTED:
            unit *= tl.load(offset_weights + head * len(OFFSETS) + index)
        mean += unit
        count += pair.to(tl.float32)
    inverse = 1.0 / tl.maximum(count, 1.0)

    # One row a coordinate: the product reads single coordinates of many tokens.
    rows = (head * r + column)[None, :].to(tl.int64) * num_tokens + token[:, None]
    dtype = direction.dtype.element_ty
    tl.store(direction + rows, z_hat.to(dtype), mask=in_vector)
    tl.store(tangent + rows, (mean * inverse[:, None]).to(dtype), mask=in_vector)
    if head == 0:
        tl.store(inverse_count + token, tl.where(count > 0, inverse, 0.0), mask=real)
        # The only plane of two coordinates more tells whether there is a pair: the bias is its column.
        flag = tl.num_programs(1).to(tl.int64) * r * num_tokens + token
        one = tl.full([BLOCK], 1.0, dtype)
        tl.store(direction + flag, (count > 0).to(dtype), mask=real)
        tl.store(direction + flag + num_tokens, 0.0 * one, mask=real)
        tl.store(tangent + flag, 0.0 * one, mask=real)
        tl.store(tangent + flag + num_tokens, one, mask=real)


@triton.jit
def load_columns(weight, head, i, j, channel, weight_row, hidden_size, r: tl.constexpr):
    """`A_ij` for pairs `i, j` `(K,)` and channels `(D,)`, zeros for what does not exist: `(K, D)`."""
    first, second = tl.minimum(i, j), tl.maximum(i, j)
    coordinate = head * (r * (r - 1) // 2) + first * (2 * r - first - 1) // 2 + second - first - 1
    exists = ((second < r) & (first != second))[:, None] & (channel < hidden_size)[None, :]
    w = tl.load(weight + channel[None, :].to(tl.int64) * weight_row + coordinate[:, None], mask=exists, other=0.0)
    return tl.where((i < j)[:, None], w, -w)


@triton.jit
def pack_kernel(
    weight, packed, hidden_size, padded_size, weight_row,
    r: tl.constexpr, R_PADDED: tl.constexpr, CYCLIC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """
    Columns `A_ij` as rows of a matrix. `CYCLIC` takes each pair once, as `j = i + s mod r`: `(H, r / 2, R_PADDED, d)`
    over heads, `s` from 1 and `i`. Otherwise both orders are there: `(H, R_PADDED, R_PADDED, d)` over `j`'s block, `i`
    and `j` in its block.
    """
    slot = tl.arange(0, BLOCK_I)
    blocks = R_PADDED // BLOCK_I
    program = tl.program_id(0)
    if CYCLIC:
        i = program % blocks * BLOCK_I + slot
        shift = program // blocks % (r // 2) + 1
        head = program // (blocks * (r // 2))
        j = tl.where(i + shift >= r, i + shift - r, i + shift)
        # Halfway around, each pair would come twice.
        j = tl.where((i >= r) | ((2 * shift == r) & (2 * i >= r)), r, j)
    else:
        i = program % R_PADDED + tl.zeros([BLOCK_I], tl.int32)
        j = program // R_PADDED % blocks * BLOCK_I + slot
        head = program // (R_PADDED * blocks)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = load_columns(weight, head, i, j, channel, weight_row, hidden_size, r)
    pointers = packed + (program * BLOCK_I + slot).to(tl.int64)[:, None] * padded_size + channel[None, :]
    tl.store(pointers, columns.to(packed.dtype.element_ty), mask=(channel < padded_size)[None, :])


@triton.jit
def project_kernel(
    direction, tangent, packed, bias, inverse_count, features, num_tokens,
    hidden_size: tl.constexpr, padded_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R_PADDED: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`Σ A_ij (direction_i tangent_j - direction_j tangent_i)` over the pairs of a cyclic [`pack_kernel`]."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    stride = tl.zeros([], tl.int64) + num_tokens
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = token < num_tokens
    dtype = packed.dtype.element_ty
    slot = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for head in range(H):
        z_head = direction + head * r * stride + token
        m_head = tangent + head * r * stride + token
        for block in tl.static_range(R_PADDED // BLOCK_I):
            i = block * BLOCK_I + slot
            mask = real[:, None] & (i < r)[None, :]
            z_i = tl.load(z_head[:, None] + i[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
            m_i = tl.load(m_head[:, None] + i[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
            for step in range(r // 2):
                j = i + step + 1
                j = tl.where(j >= r, j - r, j)
                z_j = tl.load(z_head[:, None] + j[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
                m_j = tl.load(m_head[:, None] + j[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
                rows = ((head * (r // 2) + step) * R_PADDED + i).to(tl.int64)
                w = tl.load(packed + rows[:, None] * padded_size + channel[None, :])
                planes = (z_i * m_j - z_j * m_i).to(dtype)
                total = tl.dot(planes, w, total, input_precision=PRECISION)
    in_features = real[:, None] & (channel < hidden_size)[None, :]
    if BIAS:
        has_pair = tl.load(inverse_count + token, mask=real, other=0.0) > 0
        b = tl.load(bias + channel, mask=channel < hidden_size, other=0.0).to(tl.float32)
        total += tl.where(has_pair[:, None], b[None, :], 0.0)
    pointers = features + token[:, None] * hidden_size + channel[None, :]
    tl.store(pointers, total.to(features.dtype.element_ty), mask=in_features)


@triton.jit
def project_backward_kernel(
    grad, direction, tangent, packed, grad_direction, grad_tangent, num_tokens,
    hidden_size: tl.constexpr, padded_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With `G_ij = A_ij · grad`: `grad_tangent_j = Σ_i G_ij direction_i`, `grad_direction_j = -Σ_i G_ij tangent_i`."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    stride = tl.zeros([], tl.int64) + num_tokens
    head = tl.program_id(1) // (R_PADDED // BLOCK_I)
    block = tl.program_id(1) % (R_PADDED // BLOCK_I)
    real = token < num_tokens
    channel = tl.arange(0, BLOCK_D)
    grad_pointers = grad + token[:, None] * hidden_size + channel[None, :]
    rows = (tl.program_id(1) * R_PADDED * BLOCK_I + tl.arange(0, GROUP * BLOCK_I)).to(tl.int64)
    w_pointers = packed + rows[None, :] * padded_size + channel[:, None]
    z_head = direction + head * r * stride + token
    m_head = tangent + head * r * stride + token
    grad_z = tl.zeros([BLOCK, BLOCK_I], tl.float32)
    grad_m = tl.zeros([BLOCK, BLOCK_I], tl.float32)
    for start in range(0, R_PADDED, GROUP):
        forms = tl.zeros([BLOCK, GROUP * BLOCK_I], tl.float32)
        for first in range(0, padded_size, BLOCK_D):
            inside = (channel < hidden_size - first)[None, :]
            part = tl.load(grad_pointers + first, mask=real[:, None] & inside, other=0.0)
            w = tl.load(w_pointers + start * BLOCK_I * padded_size + first)
            forms = tl.dot(part, w, forms, input_precision=PRECISION)
        i = start + tl.arange(0, GROUP)
        mask = real[:, None] & (i < r)[None, :]
        z_i = tl.load(z_head[:, None] + i[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
        m_i = tl.load(m_head[:, None] + i[None, :] * stride, mask=mask, other=0.0).to(tl.float32)
        forms = tl.reshape(forms, [BLOCK, GROUP, BLOCK_I])
        grad_m += tl.sum(forms * z_i[:, :, None], axis=1)
        grad_z -= tl.sum(forms * m_i[:, :, None], axis=1)
    j = block * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = real[:, None] & (j < r)[None, :]
    offsets = (token[:, None] * H + head) * r + j[None, :]
    tl.store(grad_direction + offsets, grad_z, mask=mask)
    tl.store(grad_tangent + offsets, grad_m, mask=mask)


@triton.jit
def weight_backward_kernel(
    grad, direction, tangent, sums, num_tokens,
    hidden_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R_PADDED: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """
    Products of coordinates and gradient, summed over each split's tokens: `(splits, H * (r / 2) * R_PADDED, d)`. The
    last row has no pair of its own, as `i` ends at `r / 2` halfway around, and holds the gradient of the bias.
    """
    ROWS: tl.constexpr = H * (r // 2) * R_PADDED
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i = row % R_PADDED
    exists = (row < ROWS) & (i < r)
    j = i + row // R_PADDED % (r // 2) + 1
    j = tl.where(j >= r, j - r, j)
    head = row // (R_PADDED * (r // 2))
    is_bias = row == ROWS - 1
    exists |= is_bias
    i_row = tl.where(is_bias, H * r, head * r + i).to(tl.int64)[:, None] * num_tokens
    j_row = tl.where(is_bias, H * r + 1, head * r + j).to(tl.int64)[:, None] * num_tokens

    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_channels = channel < hidden_size
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for step in range(STEPS):
        token = ((split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        real = token < num_tokens
        known = exists[:, None] & real[None, :]
        z_i = tl.load(direction + i_row + token[None, :], mask=known, other=0.0).to(tl.float32)
        z_j = tl.load(direction + j_row + token[None, :], mask=known, other=0.0).to(tl.float32)
        m_i = tl.load(tangent + i_row + token[None, :], mask=known, other=0.0).to(tl.float32)
        m_j = tl.load(tangent + j_row + token[None, :], mask=known, other=0.0).to(tl.float32)
        pointers = grad + token[:, None] * hidden_size + channel[None, :]
        part = tl.load(pointers, mask=real[:, None] & in_channels[None, :], other=0.0)
        total = tl.dot((z_i * m_j - z_j * m_i).to(part.dtype), part, total, input_precision=PRECISION)
    pointers = sums + (split * ROWS + row).to(tl.int64)[:, None] * hidden_size + channel[None, :]
    tl.store(pointers, total, mask=(row < ROWS)[:, None] & in_channels[None, :])


@triton.jit
def unpack_kernel(
    sums, grad_weight, grad_bias, num_splits,
    hidden_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R_PADDED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the splits of [`weight_backward_kernel`] into the gradients of the projection `(d, H * P)` and its bias."""
    P: tl.constexpr = r * (r - 1) // 2
    ROWS: tl.constexpr = H * (r // 2) * R_PADDED
    column = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    head, coordinate = column // P, column % P
    # The pair that stands here in the order of `torch.triu_indices`: float32 is off by one at most.
    i = ((2 * r - 1 - tl.sqrt(((2 * r - 1) * (2 * r - 1) - 8 * coordinate).to(tl.float32))) / 2).to(tl.int32)
    i = tl.where(i * (2 * r - i - 1) // 2 > coordinate, i - 1, i)
    i = tl.where((i + 1) * (2 * r - i - 2) // 2 <= coordinate, i + 1, i)
    j = coordinate - i * (2 * r - i - 1) // 2 + i + 1
    # More than halfway around, the pair is counted from `j`, with the other sign.
    ahead = 2 * (j - i) <= r
    shift = tl.where(ahead, j - i, r - (j - i))
    row = (head * (r // 2) + shift - 1) * R_PADDED + tl.where(ahead, i, j)
    is_bias = column == H * P
    row = tl.where(is_bias, ROWS - 1, row)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (column <= H * P)[:, None] & (channel < hidden_size)[None, :]
    split = tl.arange(0, BLOCK_S)
    rows = (split[:, None] * ROWS + row[None, :]).to(tl.int64)
    pointers = sums + rows[:, :, None] * hidden_size + channel[None, None, :]
    total = tl.sum(tl.load(pointers, mask=(split < num_splits)[:, None, None] & mask[None, :, :], other=0.0), axis=0)
    bias_pointers = grad_bias + channel[None, :] + 0 * column[:, None]
    tl.store(bias_pointers, total.to(grad_bias.dtype.element_ty), mask=mask & is_bias[:, None])
    total = tl.where(ahead[:, None], total, -total).to(grad_weight.dtype.element_ty)
    pointers = grad_weight + channel[None, :].to(tl.int64) * (H * P) + column[:, None]
    tl.store(pointers, total, mask=mask & ~is_bias[:, None])


@triton.jit
def tangents_backward_kernel(
    query, source, positions, offset_weights, inverse_count, grad_direction, grad_tangent,
    grad_query, grad_source, grad_offset_weights, num_places, length, source_length, eps,
    query_batch, query_token, query_head, source_batch, source_token, source_head, position_batch, position_token,
    grad_query_batch, grad_query_token, grad_query_head, grad_source_batch, grad_source_token, grad_source_head,
    H: tl.constexpr, r: tl.constexpr, OFFSETS: tl.constexpr, NO_POSITION: tl.constexpr, WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_places
    batch = (index // source_length).to(tl.int64)
    place = index % source_length
    # The first source tokens come from a decoding state and are no queries.
    token = place - (source_length - length)
    is_query = exists & (token >= 0)
    column = tl.arange(0, BLOCK_R)
    in_vector = (column < r)[None, :]

    z_row = query + batch * query_batch + head * query_head
    y_row = source + batch * source_batch + head * source_head
    gradient_row = (batch * length * H + head) * r
    position_row = positions + batch * position_batch
    position = tl.load(position_row + place * position_token, mask=exists, other=NO_POSITION)
    known = exists & (position != NO_POSITION)

    z_pointers = (z_row + token.to(tl.int64) * query_token)[:, None] + column[None, :]
    z = tl.load(z_pointers, mask=is_query[:, None] & in_vector, other=0.0).to(tl.float32)
    z_hat, inverse_norm = unit_direction(z)
    own = (gradient_row + token.to(tl.int64) * H * r)[:, None] + column[None, :]
    grad_z_hat = tl.load(grad_direction + own, mask=is_query[:, None] & in_vector, other=0.0)
    grad_mean = tl.load(grad_tangent + own, mask=is_query[:, None] & in_vector, other=0.0)
    inverse = tl.load(inverse_count + batch * length + token, mask=is_query, other=0.0)
    grad_mean *= inverse[:, None]

    y = tl.load(
        (y_row + place.to(tl.int64) * source_token)[:, None] + column[None, :],
        mask=exists[:, None] & in_vector,
        other=0.0,
    ).to(tl.float32)
    grad_y = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    ratios = tl.zeros([BLOCK], tl.float32)
    for offset in tl.static_range(len(OFFSETS)):
        factor = 1.0
        if WEIGHTED:
            factor = tl.load(offset_weights + head * len(OFFSETS) + offset)

        # This token with its neighbour.
        neighbour = place - OFFSETS[offset]
        inside = is_query & known & (neighbour >= 0) & (neighbour < source_length)
        other = tl.load(position_row + neighbour * position_token, mask=inside, other=NO_POSITION)
        pair = inside & (other != NO_POSITION) & (position - other == OFFSETS[offset])
        pointers = (y_row + neighbour.to(tl.int64) * source_token)[:, None] + column[None, :]
        past = tl.load(pointers, mask=pair[:, None] & in_vector, other=0.0).to(tl.float32)
        unit, inner, inverse_perpendicular = unit_tangent(z_hat, past, pair, eps)
        along = tl.sum(grad_mean * unit, axis=1)
        # No component along the direction has to be taken out: the wedge gives none to the tangent's gradient.
        ratio = inner * factor * inverse_perpendicular
        ratios += ratio
        grad_z_hat += (ratio * along)[:, None] * unit
        if WEIGHTED:
            offset_sum = grad_offset_weights + (tl.program_id(0) * H + head) * len(OFFSETS) + offset
            # Not of `along`, which several warps hold and would write to the same place.
            tl.store(offset_sum, tl.sum(grad_mean * unit))

        # This token as the neighbour of another.
        reader = token + OFFSETS[offset]
        inside = known & (reader >= 0) & (reader < length)
        reader_place = reader + source_length - length
        other = tl.load(position_row + reader_place * position_token, mask=inside, other=NO_POSITION)
        pair = inside & (other != NO_POSITION) & (other - position == OFFSETS[offset])
        pointers = (z_row + reader.to(tl.int64) * query_token)[:, None] + column[None, :]
        reader_z = tl.load(pointers, mask=pair[:, None] & in_vector, other=0.0).to(tl.float32)
        reader_hat, _ = unit_direction(reader_z)
        pointers = grad_tangent + (gradient_row + reader.to(tl.int64) * H * r)[:, None] + column[None, :]
        reader_grad = tl.load(pointers, mask=pair[:, None] & in_vector, other=0.0)
        reader_inverse = tl.load(inverse_count + batch * length + reader, mask=pair, other=0.0)
        unit, _, inverse_perpendicular = unit_tangent(reader_hat, y, pair, eps)
        along = tl.sum(reader_grad * unit, axis=1)
        scale = factor * reader_inverse * inverse_perpendicular
        grad_y += scale[:, None] * (reader_grad - along[:, None] * unit)

    grad_z_hat -= ratios[:, None] * grad_mean
    radial = tl.sum(grad_z_hat * z_hat, axis=1)
    grad_z = (grad_z_hat - radial[:, None] * z_hat) * inverse_norm[:, None]
    if SHARED:
        grad_z += grad_y
    else:
        row = (
            grad_source + batch * grad_source_batch + place.to(tl.int64) * grad_source_token + head * grad_source_head
        )
        mask = exists[:, None] & in_vector
        tl.store(row[:, None] + column[None, :], grad_y.to(grad_source.dtype.element_ty), mask=mask)
    row = grad_query + batch * grad_query_batch + token.to(tl.int64) * grad_query_token + head * grad_query_head
    mask = is_query[:, None] & in_vector
    tl.store(row[:, None] + column[None, :], grad_z.to(grad_query.dtype.element_ty), mask=mask)


@triton.jit
def norm_kernel(
    projected, hidden_states, features, norm_weight, norm_bias, statistics, output, num_tokens, eps,
    hidden_size: tl.constexpr, PROJECTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`LayerNorm(α h + (1 - α) g)` from the logits of `α`; also the mixtures' means and inverse deviations."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    real = token < num_tokens
    in_channels = channel < hidden_size
    in_row = real[:, None] & in_channels[None, :]
    places = token[:, None] * hidden_size + channel[None, :]
    a = tl.load(projected + token[:, None] * PROJECTED + channel[None, :], mask=in_row, other=0.0).to(tl.float32)
    h = tl.load(hidden_states + places, mask=in_row, other=0.0).to(tl.float32)
    g = tl.load(features + places, mask=in_row, other=0.0).to(tl.float32)
    mixed = g + tl.sigmoid(a) * (h - g)
    mean = tl.sum(tl.where(in_row, mixed, 0.0), axis=1) / hidden_size
    centred = tl.where(in_row, mixed - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / hidden_size + eps)
    tl.store(statistics + 2 * token, mean, mask=real)
    tl.store(statistics + 2 * token + 1, inverse, mask=real)
    w = tl.load(norm_weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + channel, mask=in_channels, other=0.0).to(tl.float32)
    result = centred * inverse[:, None] * w[None, :] + b[None, :]
    tl.store(output + places, result.to(output.dtype.element_ty), mask=in_row)


@triton.jit
def norm_backward_kernel(
    grad, projected, hidden_states, features, norm_weight, statistics,
    grad_projected, grad_hidden, grad_features, sums, num_tokens, steps,
    hidden_size: tl.constexpr, PROJECTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """
    Gradients of the logits, and of `h` and `g` but for what goes through the logits. `sums` holds those of the norm's
    weight and bias and of the gate's bias, for each program's tokens.
    """
    channel = tl.arange(0, BLOCK_D)
    in_channels = channel < hidden_size
    w = tl.load(norm_weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    # Summed over rows at the end: a sum in each step would have the warps wait for each other.
    weight_total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    bias_total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    logits_total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for step in tl.range(steps, num_stages=3):
        token = ((tl.program_id(0) * steps + step) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        real = token < num_tokens
        in_row = real[:, None] & in_channels[None, :]
        places = token[:, None] * hidden_size + channel[None, :]
        logits_places = token[:, None] * PROJECTED + channel[None, :]
        a = tl.load(projected + logits_places, mask=in_row, other=0.0).to(tl.float32)
        h = tl.load(hidden_states + places, mask=in_row, other=0.0).to(tl.float32)
        g = tl.load(features + places, mask=in_row, other=0.0).to(tl.float32)
        dy = tl.load(grad + places, mask=in_row, other=0.0).to(tl.float32)
        mean = tl.load(statistics + 2 * token, mask=real, other=0.0)
        inverse = tl.load(statistics + 2 * token + 1, mask=real, other=0.0)
        alpha = tl.sigmoid(a)
        normalised = (g + alpha * (h - g) - mean[:, None]) * inverse[:, None]
        weight_total += dy * normalised
        bias_total += dy
        dy *= w[None, :]
        across = tl.sum(dy, axis=1) / hidden_size
        along = tl.sum(dy * normalised, axis=1) / hidden_size
        dy = (dy - across[:, None] - along[:, None] * normalised) * inverse[:, None]
        to_hidden = dy * alpha
        to_logits = to_hidden * (1.0 - alpha) * (h - g)
        logits_total += to_logits
        tl.store(grad_projected + logits_places, to_logits.to(grad_projected.dtype.element_ty), mask=in_row)
        tl.store(grad_hidden + places, to_hidden.to(grad_hidden.dtype.element_ty), mask=in_row)
        tl.store(grad_features + places, (dy - to_hidden).to(grad_features.dtype.element_ty), mask=in_row)
    row = sums + tl.program_id(0) * 3 * hidden_size + channel
    tl.store(row, tl.sum(weight_total, axis=0), mask=in_channels)
    tl.store(row + hidden_size, tl.sum(bias_total, axis=0), mask=in_channels)
    tl.store(row + 2 * hidden_size, tl.sum(logits_total, axis=0), mask=in_channels)


def why_not_triton(tensor: torch.Tensor, reduced_size: int) -> str | None:
    """Why the kernels cannot take tensors like this one; `None` if they can."""
    if not (tensor.is_cuda or INTERPRETED):
        return f"its kernels run on CUDA devices, and the tensors are on {tensor.device.type!r}"
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    if tensor.dtype not in DTYPES:
        return f"its kernels compute in bfloat16, float16 or float32, and the tensors are {tensor.dtype}"
    if tensor.dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter cannot multiply bfloat16"
    if reduced_size > MAX_REDUCED_SIZE:
        return f"its kernels take a `reduced_size` up to {MAX_REDUCED_SIZE}, got {reduced_size}"
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or later"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's own matrix products are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_own_device(launch: Callable) -> Callable:
    """A function that launches kernels, for tensors on any device: Triton's run on the current one."""

    @wraps(launch)
    def run(tensor, *args, **kwargs):
        if not tensor.is_cuda:
            return launch(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launch(tensor, *args, **kwargs)

    return run


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def block_of(size: int, largest: int) -> int:
    """Power of two that covers `size`, from 16, the least of a matrix product, to `largest`."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def channel_block(hidden_size: int) -> int:
    """Channels in a block: all of them up to 256, else as many as waste least."""
    if hidden_size <= 256:
        return block_of(hidden_size, 256)
    return min((256, 128), key=lambda block: ceil_div(hidden_size, block) * block)


def steps_per_program(num_tokens: int, block: int, programs: int) -> int:
    """How many blocks each program takes, a power of two, so that few sizes are compiled, for up to `programs`."""
    return triton.next_power_of_2(ceil_div(num_tokens, block * max(programs, 1)))


def pair_block(reduced_size: int) -> int:
    """Coordinates in a block of pairs."""
    return 16 if reduced_size <= 16 else 32


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


def is_small(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` need blocks of less shared memory than half precisions do on a data-centre GPU."""
    return dtype == torch.float32 or shared_memory(tensor.device) < 200 * 1024


def empty_tangents(query, dtype):
    """Memory for what [`make_tangents`] gives."""
    batch, length, num_heads, r = query.shape
    tangents = query.new_empty(2, num_heads * r + 2, batch * length, dtype=dtype)
    return tangents, query.new_empty(batch * length, dtype=torch.float32)


def make_tangents(query, source, positions, offset_weights, offsets, eps, dtype):
    """
    Launch [`tangents_kernel`]: direction and tangent `(2, H * r + 2, B * T)`, with two coordinates more that tell
    which tokens have pairs, and one over the numbers of pairs `(B * T,)`.
    """
    batch, length, num_heads, r = query.shape
    tangents, inverse_count = empty_tangents(query, dtype)
    block_r = triton.next_power_of_2(r)
    block = max(16, 1024 // block_r)
    tangents_kernel[(ceil_div(batch * length, block), num_heads)](
        query, source, positions, offset_weights, tangents[0], tangents[1], inverse_count,
        batch * length, length, source.shape[1], eps,
        *query.stride()[:3], *source.stride()[:3], *positions.stride(),
        r=r, OFFSETS=tuple(offsets), NO_POSITION=NO_POSITION, WEIGHTED=offset_weights is not None,
        BLOCK=block, BLOCK_R=block_r,
    )  # fmt: skip
    return tangents, inverse_count


def pack_weight(weight, num_heads, r, dtype, cyclic):
    """Launch [`pack_kernel`]; `r` and `d` are padded to whole blocks."""
    hidden_size, block_i, block_d = weight.shape[0], pair_block(r), channel_block(weight.shape[0])
    r_padded, padded_size = ceil_div(r, block_i) * block_i, ceil_div(hidden_size, block_d) * block_d
    packed = weight.new_empty(num_heads * (r // 2 if cyclic else r_padded) * r_padded, padded_size, dtype=dtype)
    block_d = min(64, block_d)
    pack_kernel[(packed.shape[0] // block_i, padded_size // block_d)](
        weight, packed, hidden_size, padded_size, weight.stride(0),
        r=r, R_PADDED=r_padded, CYCLIC=cyclic, BLOCK_I=block_i, BLOCK_D=block_d,
    )  # fmt: skip
    return packed


def unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied if its last dimension is not dense."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def launch_forward(query, source, weight, bias, offset_weights, positions, offsets, eps, dtype):
    """[`plucker_features_triton`], computed and returned in `dtype`, and what [`make_tangents`] made."""
    batch, length, num_heads, r = query.shape
    hidden_size, num_tokens = weight.shape[0], batch * length
    features = query.new_empty(batch, length, hidden_size, dtype=dtype)
    if features.numel() == 0:
        return features, *empty_tangents(query, dtype)
    query, source, weight, bias = map(unit_stride, (query, source, weight, bias))
    offset_weights = None if offset_weights is None else offset_weights.contiguous()
    positions = positions.expand(batch, -1)
    tangents, inverse_count = make_tangents(query, source, positions, offset_weights, offsets, eps, dtype)
    packed = pack_weight(weight, num_heads, r, dtype, cyclic=True)
    block_i, block_d = pair_block(r), channel_block(hidden_size)
    r_padded, block = ceil_div(r, block_i) * block_i, block_of(num_tokens, 64)
    if num_tokens <= 64:
        # Few tokens, as in decoding: more programs with less to do each.
        block_d = min(block_d, 32)
    project_kernel[(ceil_div(num_tokens, block), packed.shape[1] // block_d)](
        tangents[0], tangents[1], packed, bias, inverse_count, features, num_tokens,
        hidden_size=hidden_size, padded_size=packed.shape[1], H=num_heads, r=r, R_PADDED=r_padded,
        BIAS=bias is not None, PRECISION=dot_precision(dtype), BLOCK=block, BLOCK_I=block_i, BLOCK_D=block_d,
        num_warps=4, num_stages=2 if is_small(query, dtype) else 3,
    )  # fmt: skip
    return features, tangents, inverse_count


def launch_backward(
    grad, tangents, inverse_count, query, source, weight, offset_weights, positions, offsets, eps,
    grad_query, grad_source, with_weight,
):  # fmt: skip
    """
    Fill `grad_query` and, unless it is `None` because the source is the query, `grad_source`.

    Returns:
        The gradients of weight and bias, `None` without `with_weight`, and that of the offset weights, `None` without
        them.
    """
    batch, length, num_heads, r = query.shape
    hidden_size, num_tokens, dtype = weight.shape[0], batch * length, grad.dtype
    query, source, weight = map(unit_stride, (query, source, weight))
    offset_weights = None if offset_weights is None else offset_weights.contiguous()
    positions = positions.expand(batch, -1)
    precision = dot_precision(dtype)
    direction, tangent = tangents.unbind(0)
    small, block_i, block_d = is_small(query, dtype), pair_block(r), channel_block(hidden_size)
    r_padded = ceil_div(r, block_i) * block_i

    packed = pack_weight(weight, num_heads, r, dtype, cyclic=False)
    grad_direction, grad_tangent = query.new_empty(2, num_tokens, num_heads, r, dtype=torch.float32).unbind(0)
    block = block_of(num_tokens, 64 if small else 128)
    project_backward_kernel[(ceil_div(num_tokens, block), num_heads * (r_padded // block_i))](
        grad, direction, tangent, packed, grad_direction, grad_tangent, num_tokens,
        hidden_size=hidden_size, padded_size=packed.shape[1], H=num_heads, r=r, R_PADDED=r_padded, PRECISION=precision,
        BLOCK=block, GROUP=128 // block_i if small else 256 // block_i, BLOCK_I=block_i, BLOCK_D=min(64, block_d),
        num_warps=8, num_stages=2 if small else 3,
    )  # fmt: skip

    grad_weight = grad_bias = grad_offset_weights = None
    if with_weight:
        rows = num_heads * (r // 2) * r_padded
        block_p, block = block_of(rows, 64 if small else 128), 32 if small else 64
        blocks = (ceil_div(rows, block_p), ceil_div(hidden_size, block_d))
        steps = steps_per_program(num_tokens, block, MULTIPROCESSORS // (blocks[0] * blocks[1]))
        splits = ceil_div(num_tokens, steps * block)
        sums = query.new_empty(splits, rows, hidden_size, dtype=torch.float32)
        weight_backward_kernel[(*blocks, splits)](
            grad, direction, tangent, sums, num_tokens,
            hidden_size=hidden_size, H=num_heads, r=r, R_PADDED=r_padded, PRECISION=precision,
            STEPS=steps, BLOCK=block, BLOCK_P=block_p, BLOCK_D=block_d,
            num_warps=8, num_stages=2 if small else 3,
        )  # fmt: skip
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        grad_bias = weight.new_empty(hidden_size)
        # One column more, for the bias.
        unpack_kernel[(ceil_div(weight.shape[1] + 1, 4), ceil_div(hidden_size, 64))](
            sums, grad_weight, grad_bias, splits, hidden_size=hidden_size, H=num_heads, r=r, R_PADDED=r_padded,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_P=4, BLOCK_D=64,
        )  # fmt: skip

    block_r = triton.next_power_of_2(r)
    block = max(16, 1024 // block_r)
    num_places = batch * source.shape[1]
    blocks = ceil_div(num_places, block)
    shared = grad_source is None
    weight_sums = query.new_empty(blocks, num_heads, len(offsets), dtype=torch.float32)
    grad_strides = [*grad_query.stride()[:3], *(grad_query if shared else grad_source).stride()[:3]]
    tangents_backward_kernel[(blocks, num_heads)](
        query, source, positions, offset_weights, inverse_count, grad_direction, grad_tangent,
        grad_query, grad_source, weight_sums, num_places, length, source.shape[1], eps,
        *query.stride()[:3], *source.stride()[:3], *positions.stride(), *grad_strides,
        H=num_heads, r=r, OFFSETS=tuple(offsets), NO_POSITION=NO_POSITION, WEIGHTED=offset_weights is not None,
        SHARED=shared, BLOCK=block, BLOCK_R=block_r,
        # One more block on each multiprocessor is worth the few registers that go to memory.
        maxnreg=128,
    )  # fmt: skip
    if offset_weights is not None:
        grad_offset_weights = weight_sums.sum(0)
    return grad_weight, grad_bias, grad_offset_weights


def in_places(grads, arguments, needed) -> list[torch.Tensor | None]:
    """Gradients, which an operator gives without those of `None` and may end early, in the places of its arguments."""
    grads = iter(grads)
    grads = [None if argument is None else next(grads, None) for argument in arguments]
    return [gradient if need else None for gradient, need in zip(grads, needed)]


@torch.library.custom_op(f"{NAMESPACE}::plucker_features", mutates_args=())
@on_own_device
def plucker_features_op(
    query: torch.Tensor,
    source: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset_weights: torch.Tensor | None,
    positions: torch.Tensor,
    offsets: list[int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`plucker_features_triton`] with `source=None` for the query itself, computed and returned in `dtype`, and what its
    backward starts from: direction and tangent, and one over the numbers of pairs.
    """
    source = query if source is None else source
    return launch_forward(query, source, weight, bias, offset_weights, positions, offsets, eps, dtype)


@plucker_features_op.register_fake
def _(query, source, weight, bias, offset_weights, positions, offsets, eps, dtype):
    features = query.new_empty(query.shape[0], query.shape[1], weight.shape[0], dtype=dtype)
    return features, *empty_tangents(query, dtype)


@torch.library.custom_op(f"{NAMESPACE}::plucker_features_backward", mutates_args=())
@on_own_device
def plucker_features_backward_op(
    grad: torch.Tensor,
    tangents: torch.Tensor,
    inverse_count: torch.Tensor,
    query: torch.Tensor,
    source: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset_weights: torch.Tensor | None,
    positions: torch.Tensor,
    offsets: list[int],
    eps: float,
    with_weight: bool,
) -> list[torch.Tensor]:
    """
    Gradients of the first five arguments of [`plucker_features_op`], those that are not `None`; of the first two alone
    without `with_weight`.
    """
    inputs, parameters = (query, source), (weight, bias, offset_weights) if with_weight else ()
    if grad.numel() == 0:
        return [torch.zeros_like(x) for x in (*inputs, *parameters) if x is not None]
    grad_query, grad_source = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
    )
    grads = launch_backward(
        grad.contiguous(), tangents, inverse_count, query, query if source is None else source, weight, offset_weights,
        positions, offsets, eps, grad_query, grad_source, with_weight,
    )  # fmt: skip
    grads = [value.to(argument.dtype) for argument, value in zip(parameters, grads) if argument is not None]
    return [gradient for gradient in (grad_query, grad_source) if gradient is not None] + grads


@plucker_features_backward_op.register_fake
def _(grad, tangents, inverse_count, query, source, weight, bias, offset_weights, positions, *args):
    wanted = (query, source, weight, bias, offset_weights) if args[-1] else (query, source)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted if x is not None]


def save_for_features_backward(ctx, inputs, output):
    *tensors, ctx.offsets, ctx.eps, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])


def features_backward(ctx, grad, *_):
    needed, saved = ctx.needs_input_grad, ctx.saved_tensors
    grads = plucker_features_backward_op(grad, *saved, ctx.offsets, ctx.eps, any(needed[2:5]))
    # The arguments begin behind what the forward saved.
    return *in_places(grads, saved[2:7], needed), None, None, None, None


plucker_features_op.register_autograd(features_backward, setup_context=save_for_features_backward)


def compute_dtype(tensor: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The type of products: that of autocast where it is on, else that of the weight."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def plucker_features_triton(query, source, weight, bias, offsets, positions, offset_weights, eps) -> torch.Tensor:
    """[`plucker.plucker_features`] on a GPU; under autocast the products are in its type."""
    source = None if source is query else source
    dtype = compute_dtype(query, weight)
    features, *_ = plucker_features_op(
        query, source, weight, bias, offset_weights, positions, list(offsets), eps, dtype
    )
    return features


def stack(parts, dtype: torch.dtype) -> torch.Tensor:
    """Rows of linear maps or of their biases, one after the other, filled up with zeros to a multiple of eight."""
    missing = -sum(part.shape[0] for part in parts) % 8
    filling = [parts[0].new_zeros(missing, *parts[0].shape[1:])] if missing else []
    return torch.cat([*parts, *filling]).to(dtype)


def split_projected(projected, batch, hidden_size, num_heads, r, separate):
    """Views of all projections `(B * T, M)`: logits `(B * T, d)`, query and source `(B, T, H, r)`."""
    length = projected.shape[0] // max(batch, 1)
    vectors = projected.view(batch, length, projected.shape[1])[..., hidden_size:]  # (B, T, M - d)
    query = vectors[..., : num_heads * r].unflatten(-1, (num_heads, r))
    source = vectors[..., num_heads * r : 2 * num_heads * r].unflatten(-1, (num_heads, r)) if separate else query
    return projected[:, :hidden_size], query, source


@torch.library.custom_op(f"{NAMESPACE}::plucker_mixer", mutates_args=())
@on_own_device
def plucker_mixer_op(
    rows: torch.Tensor,
    maps: torch.Tensor,
    biases: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    offset_weights: torch.Tensor | None,
    gate: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    reduced_size: int,
    separate: bool,
    offsets: list[int],
    eps: float,
    norm_eps: float,
    output_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`plucker_mixer_triton`], and what its backward starts from: projections, features, direction and tangent, one over
    the numbers of pairs, and the norm's statistics.

    `rows` are the hidden states in the type of products. They get the whole gradient of the hidden states, which are
    an argument of their own for the sake of their precision. `maps` are all linear maps of them, one after the other,
    and `gate` is the gate's map of the features.
    """
    batch, length, hidden_size = rows.shape
    num_tokens, dtype = batch * length, rows.dtype
    rows, hidden_states = rows.contiguous(), hidden_states.contiguous()
    output = torch.empty_like(hidden_states, dtype=output_dtype)
    statistics = rows.new_empty(num_tokens, 2, dtype=torch.float32)
    projected = torch.addmm(biases, rows.view(num_tokens, hidden_size), maps.t())  # (B * T, M)
    logits, query, source = split_projected(projected, batch, hidden_size, num_heads, reduced_size, separate)
    features, *pairs = launch_forward(query, source, weight, bias, offset_weights, positions, offsets, eps, dtype)
    if num_tokens == 0:
        return output, projected, features, *pairs, statistics

    logits.addmm_(features.view(num_tokens, hidden_size), gate.t())
    block_d = triton.next_power_of_2(hidden_size)
    block = max(1, 2048 // block_d)
    norm_kernel[(ceil_div(num_tokens, block),)](
        projected, hidden_states, features, unit_stride(norm_weight), unit_stride(norm_bias), statistics, output,
        num_tokens, norm_eps, hidden_size=hidden_size, PROJECTED=projected.shape[1], BLOCK=block, BLOCK_D=block_d,
    )  # fmt: skip
    return output, projected, features, *pairs, statistics


@plucker_mixer_op.register_fake
def _(rows, maps, biases, weight, bias, offset_weights, gate, norm_weight, norm_bias, hidden_states, *args):
    _, num_heads, reduced_size, *_, output_dtype = args
    (batch, length, _), dtype = rows.shape, rows.dtype
    return (
        torch.empty_like(hidden_states, dtype=output_dtype, memory_format=torch.contiguous_format),
        rows.new_empty(batch * length, maps.shape[0]),
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        *empty_tangents(rows.new_empty(batch, length, num_heads, reduced_size), dtype),
        rows.new_empty(batch * length, 2, dtype=torch.float32),
    )


@torch.library.custom_op(f"{NAMESPACE}::plucker_mixer_backward", mutates_args=())
@on_own_device
def plucker_mixer_backward_op(
    grad: torch.Tensor,
    projected: torch.Tensor,
    features: torch.Tensor,
    tangents: torch.Tensor,
    inverse_count: torch.Tensor,
    statistics: torch.Tensor,
    rows: torch.Tensor,
    maps: torch.Tensor,
    biases: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    offset_weights: torch.Tensor | None,
    gate: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    reduced_size: int,
    separate: bool,
    offsets: list[int],
    eps: float,
    with_weight: bool,
) -> list[torch.Tensor]:
    """
    Gradients of the first nine arguments of [`plucker_mixer_op`], those that are not `None`; of the first alone
    without `with_weight`.
    """
    batch, length, hidden_size = rows.shape
    num_tokens = batch * length
    parameters = (maps, biases, weight, bias, offset_weights, gate, norm_weight, norm_bias) if with_weight else ()
    if num_tokens == 0:
        return [torch.zeros_like(x) for x in (rows, *parameters) if x is not None]
    flat_rows = rows.contiguous().view(num_tokens, hidden_size)  # (B, T, d) -> (B * T, d)
    flat_features = features.view(num_tokens, hidden_size)  # (B, T, d) -> (B * T, d)
    grad_projected = torch.empty_like(projected)
    used = hidden_size + (2 if separate else 1) * num_heads * reduced_size
    if used < grad_projected.shape[1]:
        grad_projected[:, used:] = 0
    sizes = (batch, hidden_size, num_heads, reduced_size, separate)
    grad_logits, grad_query, grad_source = split_projected(grad_projected, *sizes)
    _, query, source = split_projected(projected, *sizes)

    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_features = torch.empty_like(flat_features)
    block_d = triton.next_power_of_2(hidden_size)
    block, num_warps = max(1, 256 // block_d), 2 if block_d <= 512 else 4
    # Sixteen warps on each multiprocessor.
    steps = ceil_div(num_tokens, block * MULTIPROCESSORS * 16 // num_warps)
    sums = grad.new_empty(ceil_div(num_tokens, steps * block), 3, hidden_size, dtype=torch.float32)
    norm_backward_kernel[(sums.shape[0],)](
        grad.contiguous(), projected, flat_rows, features, unit_stride(norm_weight), statistics, grad_projected,
        grad_rows, grad_features, sums, num_tokens, steps,
        hidden_size=hidden_size, PROJECTED=projected.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    grad_features.addmm_(grad_logits, gate)
    grad_weight, grad_bias, grad_offset_weights = launch_backward(
        grad_features, tangents, inverse_count, query, source, weight, offset_weights, positions, offsets, eps,
        grad_query, grad_source if separate else None, with_weight,
    )  # fmt: skip
    grad_rows.view(num_tokens, hidden_size).addmm_(grad_projected, maps)
    if not with_weight:
        return [grad_rows]
    grad_norm_weight, grad_norm_bias, grad_gate_bias = sums.sum(0)
    grads = (
        grad_projected.t() @ flat_rows,
        torch.cat([grad_gate_bias, grad_projected[:, hidden_size:].sum(0, dtype=torch.float32)]),
        grad_weight,
        grad_bias,
        grad_offset_weights,
        grad_logits.t() @ flat_features,
        # Copies, since the results of an operator may share no memory.
        grad_norm_weight.to(norm_weight.dtype, copy=True),
        grad_norm_bias.to(norm_bias.dtype, copy=True),
    )
    return [grad_rows, *(value.to(argument.dtype) for argument, value in zip(parameters, grads) if value is not None)]


@plucker_mixer_backward_op.register_fake
def _(grad, projected, features, tangents, inverse_count, statistics, *args):
    wanted = args[:9] if args[-1] else args[:1]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted if x is not None]


def save_for_mixer_backward(ctx, inputs, output):
    *tensors, _, positions, ctx.num_heads, ctx.reduced_size, ctx.separate, ctx.offsets, ctx.eps, _, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors, positions)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def mixer_backward(ctx, grad, *_):
    needed = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(needed)
    saved, sizes = ctx.saved_tensors, (ctx.num_heads, ctx.reduced_size, ctx.separate)
    grads = plucker_mixer_backward_op(grad, *saved, *sizes, ctx.offsets, ctx.eps, any(needed[1:9]))
    # The arguments begin behind what the forward saved.
    return *in_places(grads, saved[5:14], needed), *[None] * 9


plucker_mixer_op.register_autograd(mixer_backward, setup_context=save_for_mixer_backward)


def plucker_mixer_triton(hidden_states, mixer, positions) -> torch.Tensor:
    """
    A [`plucker.PluckerMixer`] without output projection and decoding state, from its linear maps to its LayerNorm.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, d)`): the tokens.
        mixer (`plucker.PluckerMixer`): holds the parameters.
        positions (integer `torch.Tensor` of shape `(B, T)` or `(1, T)`): as in [`plucker.plucker_features`].

    Returns:
        `torch.Tensor` of shape `(B, T, d)`; float32 under autocast, as a LayerNorm's output is there.
    """
    projection, gate, norm = mixer.plucker_proj, mixer.gate_proj, mixer.norm
    dtype = compute_dtype(hidden_states, gate.weight)
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    gate_hidden, gate_features = gate.weight.split(hidden_states.shape[-1], dim=1)
    reductions = [mixer.reduce] if mixer.reduce_past is None else [mixer.reduce, mixer.reduce_past]
    # Casts and the stacking of weights stay outside of the operator: compilers fuse them with what is around.
    output, *_ = plucker_mixer_op(
        hidden_states.to(dtype),
        stack([gate_hidden, *(linear.weight for linear in reductions)], dtype),
        stack([gate.bias, *(linear.bias for linear in reductions)], dtype),
        projection.weight, projection.bias, projection.offset_weights, gate_features.to(dtype),
        norm.weight, norm.bias, hidden_states, positions,
        mixer.num_heads, mixer.reduce.out_features // mixer.num_heads, len(reductions) == 2,
        mixer.offsets, projection.eps, norm.eps, torch.float32 if autocast else hidden_states.dtype,
    )  # fmt: skip
    return output
