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

[`gated_norm_triton`] is the rest of the mixer, from the gate to the LayerNorm. The backward starts from the reduced
vectors again, so that no tensor with P or |W| r numbers a token ever exists. Sums over tokens have a fixed order: the
same inputs give the same bits.
"""

import math
import re

import torch


# Optional packages are imported inside of `try`: Transformers demands what it finds elsewhere in a file that travels
# with a checkpoint. `plucker.py` does without this file where there is no Triton.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


MAX_REDUCED_SIZE = 128
# That of `plucker.py`, which imports this file.
NO_POSITION = -(2**31)
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
    tl.store(direction + rows, z_hat, mask=in_vector)
    tl.store(tangent + rows, mean * inverse[:, None], mask=in_vector)
    if head == 0:
        tl.store(inverse_count + token, tl.where(count > 0, inverse, 0.0), mask=real)


@triton.jit
def pack_kernel(
    weight, packed, hidden_size, padded_size, weight_row,
    r: tl.constexpr, R_PADDED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns `A_ij` of antisymmetric matrices, one row a pair: `(d, H * P)` -> `(H, r / J, r, J, d)`, padded."""
    block = tl.program_id(0)
    i = block % R_PADDED
    j = block // R_PADDED % (R_PADDED // BLOCK_J) * BLOCK_J + tl.arange(0, BLOCK_J)
    head = block // (R_PADDED * (R_PADDED // BLOCK_J))
    first, second = tl.minimum(i, j), tl.maximum(i, j)
    coordinate = head * (r * (r - 1) // 2) + first * (2 * r - first - 1) // 2 + second - first - 1
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = ((second < r) & (i != j))[:, None] & (channel < hidden_size)[None, :]
    w = tl.load(weight + channel[None, :].to(tl.int64) * weight_row + coordinate[:, None], mask=exists, other=0.0)
    w = tl.where((i < j)[:, None], w, -w)
    rows = (block * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
    pointers = packed + rows[:, None] * padded_size + channel[None, :]
    tl.store(pointers, w.to(packed.dtype.element_ty), mask=(channel < padded_size)[None, :])


@triton.jit
def project_kernel(
    direction, tangent, packed, bias, inverse_count, features, num_tokens,
    hidden_size: tl.constexpr, padded_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R_PADDED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    stride = tl.zeros([], tl.int64) + num_tokens
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = token < num_tokens
    dtype = packed.dtype.element_ty
    slot = tl.arange(0, BLOCK_J)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for head in range(H):
        z_head = direction + head * r * stride + token
        m_head = tangent + head * r * stride + token
        for block in tl.static_range(R_PADDED // BLOCK_J):
            j = block * BLOCK_J + slot
            in_block = real[:, None] & (j < r)[None, :]
            z_j = tl.load(z_head[:, None] + j[None, :] * stride, mask=in_block, other=0.0)
            m_j = tl.load(m_head[:, None] + j[None, :] * stride, mask=in_block, other=0.0)
            rows = (head * (R_PADDED // BLOCK_J) + block) * R_PADDED * BLOCK_J + slot
            w_pointers = packed + rows.to(tl.int64)[:, None] * padded_size + channel[None, :]
            # Pairs with i in an earlier block than j: their mirror images are left out, hence both terms.
            for i in range(block * BLOCK_J):
                z_i = tl.load(z_head + i * stride, mask=real, other=0.0)
                m_i = tl.load(m_head + i * stride, mask=real, other=0.0)
                w = tl.load(w_pointers + i * BLOCK_J * padded_size)
                planes = z_i[:, None] * m_j - m_i[:, None] * z_j
                total = tl.dot(planes.to(dtype), w, total, input_precision=PRECISION)
            # Pairs within the block, together with their mirror images.
            for i in range(block * BLOCK_J, min((block + 1) * BLOCK_J, r)):
                z_i = tl.load(z_head + i * stride, mask=real, other=0.0)
                w = tl.load(w_pointers + i * BLOCK_J * padded_size)
                total = tl.dot((z_i[:, None] * m_j).to(dtype), w, total, input_precision=PRECISION)
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
    hidden_size: tl.constexpr, padded_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, R_PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """With `G_ij = A_ij · grad`: `grad_tangent_j = Σ_i G_ij direction_i`, `grad_direction_j = -Σ_i G_ij tangent_i`."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    head = tl.program_id(1) // (R_PADDED // BLOCK_J)
    block = tl.program_id(1) % (R_PADDED // BLOCK_J)
    real = token < num_tokens
    channel = tl.arange(0, BLOCK_D)
    grad_pointers = grad + token[:, None] * hidden_size + channel[None, :]
    slot = tl.arange(0, BLOCK_I * BLOCK_J)
    rows = tl.program_id(1) * R_PADDED * BLOCK_J + slot
    w_pointers = packed + rows.to(tl.int64)[:, None] * padded_size + channel[None, :]
    group = tl.arange(0, BLOCK_I)
    stride = tl.zeros([], tl.int64) + num_tokens
    z_head = direction + head * r * stride + token
    m_head = tangent + head * r * stride + token
    grad_z = tl.zeros([BLOCK, BLOCK_J], tl.float32)
    grad_m = tl.zeros([BLOCK, BLOCK_J], tl.float32)
    if ONE_BLOCK:
        whole = tl.load(grad_pointers, mask=real[:, None] & (channel < hidden_size)[None, :], other=0.0)
    for start in range(0, R_PADDED, BLOCK_I):
        if ONE_BLOCK:
            w = tl.load(w_pointers + start * BLOCK_J * padded_size)
            forms = tl.dot(whole, tl.trans(w), input_precision=PRECISION)
        else:
            forms = tl.zeros([BLOCK, BLOCK_I * BLOCK_J], tl.float32)
            for first in range(0, padded_size, BLOCK_D):
                part_mask = real[:, None] & (channel < hidden_size - first)[None, :]
                part = tl.load(grad_pointers + first, mask=part_mask, other=0.0)
                w = tl.load(w_pointers + start * BLOCK_J * padded_size + first)
                forms = tl.dot(part, tl.trans(w), forms, input_precision=PRECISION)
        i = start + group
        in_group = real[:, None] & (i < r)[None, :]
        z_i = tl.load(z_head[:, None] + i[None, :] * stride, mask=in_group, other=0.0)
        m_i = tl.load(m_head[:, None] + i[None, :] * stride, mask=in_group, other=0.0)
        forms = tl.reshape(forms, [BLOCK, BLOCK_I, BLOCK_J])
        grad_m += tl.sum(forms * z_i[:, :, None], axis=1)
        grad_z -= tl.sum(forms * m_i[:, :, None], axis=1)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    in_block = real[:, None] & (j < r)[None, :]
    offsets = (token[:, None] * H + head) * r + j[None, :]
    tl.store(grad_direction + offsets, grad_z, mask=in_block)
    tl.store(grad_tangent + offsets, grad_m, mask=in_block)


@triton.jit
def weight_backward_kernel(
    grad, direction, tangent, inverse_count, grad_weight, grad_bias, num_tokens,
    hidden_size: tl.constexpr, H: tl.constexpr, r: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split's part of the sum over tokens of `planes gradᵀ`: `(splits, d, H * P)`."""
    P: tl.constexpr = r * (r - 1) // 2
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = row < H * P
    head = row // P
    coordinate = row % P
    # The pair (i, j) that stands at this place in the order of `torch.triu_indices`: float32 is off by one at most.
    i = ((2 * r - 1 - tl.sqrt(((2 * r - 1) * (2 * r - 1) - 8 * coordinate).to(tl.float32))) / 2).to(tl.int32)
    i = tl.where(i * (2 * r - i - 1) // 2 > coordinate, i - 1, i)
    i = tl.where((i + 1) * (2 * r - i - 2) // 2 <= coordinate, i + 1, i)
    j = coordinate - i * (2 * r - i - 1) // 2 + i + 1
    i_row = (head * r + i).to(tl.int64)[:, None] * num_tokens
    j_row = (head * r + j).to(tl.int64)[:, None] * num_tokens

    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    total_bias = tl.zeros([BLOCK_D], tl.float32)
    for step in range(STEPS):
        token = ((split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        real = token < num_tokens
        known = exists[:, None] & real[None, :]
        z_i = tl.load(direction + i_row + token[None, :], mask=known, other=0.0)
        z_j = tl.load(direction + j_row + token[None, :], mask=known, other=0.0)
        m_i = tl.load(tangent + i_row + token[None, :], mask=known, other=0.0)
        m_j = tl.load(tangent + j_row + token[None, :], mask=known, other=0.0)
        in_grad = real[:, None] & (channel < hidden_size)[None, :]
        part = tl.load(grad + token[:, None] * hidden_size + channel[None, :], mask=in_grad, other=0.0)
        planes = (z_i * m_j - z_j * m_i).to(part.dtype)
        total = tl.dot(planes, part, total, input_precision=PRECISION)
        if BIAS:
            has_pair = tl.load(inverse_count + token, mask=real, other=0.0) > 0
            total_bias += tl.sum(tl.where(has_pair[:, None], part.to(tl.float32), 0.0), axis=0)
    pointers = grad_weight + (split * hidden_size + channel[None, :]).to(tl.int64) * (H * P) + row[:, None]
    tl.store(pointers, total, mask=exists[:, None] & (channel < hidden_size)[None, :])
    if BIAS and tl.program_id(0) == 0:
        tl.store(grad_bias + split * hidden_size + channel, total_bias, mask=channel < hidden_size)


@triton.jit
def tangents_backward_kernel(
    query, source, positions, offset_weights, inverse_count, grad_direction, grad_tangent,
    grad_query, grad_source, grad_offset_weights, num_places, length, source_length, eps,
    query_batch, query_token, query_head, source_batch, source_token, source_head, position_batch, position_token,
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
        grad_perpendicular = (grad_mean - along[:, None] * unit) * (factor * inverse_perpendicular)[:, None]
        across = tl.sum(grad_perpendicular * z_hat, axis=1)
        grad_z_hat -= inner[:, None] * grad_perpendicular + across[:, None] * past
        if WEIGHTED:
            sums = grad_offset_weights + (tl.program_id(0) * H + head) * len(OFFSETS) + offset
            tl.store(sums, tl.sum(along, axis=0))

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
        reader_grad *= (factor * reader_inverse)[:, None]
        unit, _, inverse_perpendicular = unit_tangent(reader_hat, y, pair, eps)
        along = tl.sum(reader_grad * unit, axis=1)
        grad_perpendicular = (reader_grad - along[:, None] * unit) * inverse_perpendicular[:, None]
        across = tl.sum(grad_perpendicular * reader_hat, axis=1)
        grad_y += grad_perpendicular - across[:, None] * reader_hat

    radial = tl.sum(grad_z_hat * z_hat, axis=1)
    grad_z = (grad_z_hat - radial[:, None] * z_hat) * inverse_norm[:, None]
    own_vector = ((batch * length + token) * H + head) * r
    if SHARED:
        grad_z += grad_y
    else:
        pointers = grad_source + (index.to(tl.int64) * H + head)[:, None] * r + column[None, :]
        tl.store(pointers, grad_y.to(grad_source.dtype.element_ty), mask=exists[:, None] & in_vector)
    pointers = grad_query + own_vector[:, None] + column[None, :]
    tl.store(pointers, grad_z.to(grad_query.dtype.element_ty), mask=is_query[:, None] & in_vector)


@triton.jit
def mix_and_norm(logits, h, g, in_row, hidden_size, eps):
    """`α`, the normalised mixture and its inverse standard deviation: rows `(BLOCK, BLOCK_D)` in float32."""
    alpha = tl.sigmoid(logits)
    mixed = g + alpha * (h - g)
    mean = tl.sum(tl.where(in_row, mixed, 0.0), axis=1) / hidden_size
    centred = tl.where(in_row, mixed - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / hidden_size + eps)
    return alpha, centred * inverse[:, None], inverse


@triton.jit
def norm_kernel(
    logits, hidden_states, features, norm_weight, norm_bias, output, num_tokens, eps,
    hidden_size: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    in_row = (token < num_tokens)[:, None] & (channel < hidden_size)[None, :]
    places = token[:, None] * hidden_size + channel[None, :]
    a = tl.load(logits + places, mask=in_row, other=0.0).to(tl.float32)
    h = tl.load(hidden_states + places, mask=in_row, other=0.0).to(tl.float32)
    g = tl.load(features + places, mask=in_row, other=0.0).to(tl.float32)
    _, normalised, _ = mix_and_norm(a, h, g, in_row, hidden_size, eps)
    w = tl.load(norm_weight + channel, mask=channel < hidden_size, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + channel, mask=channel < hidden_size, other=0.0).to(tl.float32)
    result = normalised * w[None, :] + b[None, :]
    tl.store(output + places, result.to(output.dtype.element_ty), mask=in_row)


@triton.jit
def norm_backward_kernel(
    grad, logits, hidden_states, features, norm_weight, grad_logits, grad_hidden, grad_features, sums,
    num_tokens, eps,
    hidden_size: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients but for what goes through the gate's product; `sums` are those of weight and bias and gate bias."""
    channel = tl.arange(0, BLOCK_D)
    in_channels = channel < hidden_size
    w = tl.load(norm_weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    sum_logits = tl.zeros([BLOCK_D], tl.float32)
    for step in range(STEPS):
        token = ((tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        in_row = (token < num_tokens)[:, None] & in_channels[None, :]
        places = token[:, None] * hidden_size + channel[None, :]
        a = tl.load(logits + places, mask=in_row, other=0.0).to(tl.float32)
        h = tl.load(hidden_states + places, mask=in_row, other=0.0).to(tl.float32)
        g = tl.load(features + places, mask=in_row, other=0.0).to(tl.float32)
        dy = tl.load(grad + places, mask=in_row, other=0.0).to(tl.float32)
        alpha, normalised, inverse = mix_and_norm(a, h, g, in_row, hidden_size, eps)
        sum_weight += tl.sum(dy * normalised, axis=0)
        sum_bias += tl.sum(dy, axis=0)
        dy *= w[None, :]
        mean = tl.sum(dy, axis=1) / hidden_size
        along = tl.sum(dy * normalised, axis=1) / hidden_size
        dy = (dy - mean[:, None] - along[:, None] * normalised) * inverse[:, None]
        da = tl.where(in_row, dy * (h - g) * alpha * (1.0 - alpha), 0.0)
        sum_logits += tl.sum(da, axis=0)
        tl.store(grad_logits + places, da.to(grad_logits.dtype.element_ty), mask=in_row)
        tl.store(grad_hidden + places, (dy * alpha).to(grad_hidden.dtype.element_ty), mask=in_row)
        tl.store(grad_features + places, (dy * (1.0 - alpha)).to(grad_features.dtype.element_ty), mask=in_row)
    row = sums + tl.program_id(0) * 3 * hidden_size + channel
    tl.store(row, sum_weight, mask=in_channels)
    tl.store(row + hidden_size, sum_bias, mask=in_channels)
    tl.store(row + 2 * hidden_size, sum_logits, mask=in_channels)


@triton.jit
def gate_norm_kernel(
    hidden_states, features, gate_weight, gate_bias, norm_weight, norm_bias, logits, output,
    num_tokens, eps, hidden_size: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gate's product and [`norm_kernel`] in one, for rows that fit in one block."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    real = token < num_tokens
    in_channels = channel < hidden_size
    in_row = real[:, None] & in_channels[None, :]
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for half in tl.static_range(2):
        values = hidden_states if half == 0 else features
        w_pointers = gate_weight + channel[None, :] * (2 * hidden_size) + (half * hidden_size + k)[:, None]
        v_pointers = values + token[:, None] * hidden_size + k[None, :]
        for start in range(0, hidden_size, BLOCK_K):
            inside = k < hidden_size - start
            v = tl.load(v_pointers + start, mask=real[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_pointers + start, mask=inside[:, None] & in_channels[None, :], other=0.0)
            total = tl.dot(v, w, total, input_precision=PRECISION)
    total += tl.load(gate_bias + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    places = token[:, None] * hidden_size + channel[None, :]
    a = total.to(logits.dtype.element_ty)
    tl.store(logits + places, a, mask=in_row)
    h = tl.load(hidden_states + places, mask=in_row, other=0.0).to(tl.float32)
    g = tl.load(features + places, mask=in_row, other=0.0).to(tl.float32)
    _, normalised, _ = mix_and_norm(a.to(tl.float32), h, g, in_row, hidden_size, eps)
    w = tl.load(norm_weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + channel, mask=in_channels, other=0.0).to(tl.float32)
    result = normalised * w[None, :] + b[None, :]
    tl.store(output + places, result.to(output.dtype.element_ty), mask=in_row)


@triton.jit
def gate_norm_backward_kernel(
    grad, logits, hidden_states, features, gate_weight, norm_weight, grad_logits, grad_hidden, grad_features, sums,
    num_tokens, eps, hidden_size: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[`norm_backward_kernel`] and what goes through the gate's product in one, for rows that fit in one block."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    real = token < num_tokens
    in_channels = channel < hidden_size
    in_row = real[:, None] & in_channels[None, :]
    places = token[:, None] * hidden_size + channel[None, :]
    a = tl.load(logits + places, mask=in_row, other=0.0).to(tl.float32)
    h = tl.load(hidden_states + places, mask=in_row, other=0.0).to(tl.float32)
    g = tl.load(features + places, mask=in_row, other=0.0).to(tl.float32)
    dy = tl.load(grad + places, mask=in_row, other=0.0).to(tl.float32)
    alpha, normalised, inverse = mix_and_norm(a, h, g, in_row, hidden_size, eps)
    row = sums + tl.program_id(0) * 3 * hidden_size + channel
    tl.store(row, tl.sum(dy * normalised, axis=0), mask=in_channels)
    tl.store(row + hidden_size, tl.sum(dy, axis=0), mask=in_channels)
    dy *= tl.load(norm_weight + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(dy, axis=1) / hidden_size
    along = tl.sum(dy * normalised, axis=1) / hidden_size
    dy = (dy - mean[:, None] - along[:, None] * normalised) * inverse[:, None]
    da = tl.where(in_row, dy * (h - g) * alpha * (1.0 - alpha), 0.0)
    tl.store(row + 2 * hidden_size, tl.sum(da, axis=0), mask=in_channels)
    da = da.to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + places, da, mask=in_row)
    # Written and read again block by block: a product needs registers of its own.
    tl.store(grad_hidden + places, (dy * alpha).to(grad_hidden.dtype.element_ty), mask=in_row)
    tl.store(grad_features + places, (dy * (1.0 - alpha)).to(grad_features.dtype.element_ty), mask=in_row)
    tl.debug_barrier()
    slot = tl.arange(0, BLOCK_N)
    for half in tl.static_range(2):
        target = grad_hidden if half == 0 else grad_features
        for start in range(0, hidden_size, BLOCK_N):
            column = start + slot
            inside = column < hidden_size
            w_pointers = gate_weight + channel[:, None] * (2 * hidden_size) + (half * hidden_size + column)[None, :]
            w = tl.load(w_pointers, mask=in_channels[:, None] & inside[None, :], other=0.0)
            through_gate = tl.dot(da, w, input_precision=PRECISION)
            pointers = target + token[:, None] * hidden_size + column[None, :]
            mask = real[:, None] & inside[None, :]
            direct = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            tl.store(pointers, (direct + through_gate).to(target.dtype.element_ty), mask=mask)


def why_not_triton(vectors: torch.Tensor) -> str | None:
    """Why the kernels cannot take reduced vectors `(B, T, H, r)`; `None` if they can."""
    if not (vectors.is_cuda or triton.knobs.runtime.interpret):
        return f"its kernels run on CUDA devices, and the tensors are on {vectors.device.type!r}"
    if vectors.dtype not in DTYPES:
        return f"its kernels compute in bfloat16, float16 or float32, and the tensors are {vectors.dtype}"
    if vectors.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "Triton's interpreter cannot multiply bfloat16"
    if vectors.shape[-1] > MAX_REDUCED_SIZE:
        return f"its kernels take a `reduced_size` up to {MAX_REDUCED_SIZE}, got {vectors.shape[-1]}"
    if vectors.is_cuda and torch.cuda.get_device_capability(vectors.device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or later"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's own matrix products are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


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
    """Coordinates in a block of the antisymmetric matrices."""
    return 16 if reduced_size <= 16 else 32


def make_tangents(query, source, positions, offset_weights, offsets, eps):
    """Launch [`tangents_kernel`]: direction and tangent `(H, r, B * T)`, and one over the number of pairs `(B * T,)`."""
    batch, length, num_heads, r = query.shape
    direction, tangent = query.new_empty(2, num_heads, r, batch * length, dtype=torch.float32).unbind(0)
    inverse_count = query.new_empty(batch * length, dtype=torch.float32)
    block_r = triton.next_power_of_2(r)
    block = max(16, min(128, 4096 // block_r))
    tangents_kernel[(ceil_div(batch * length, block), num_heads)](
        query, source, positions, offset_weights, direction, tangent, inverse_count,
        batch * length, length, source.shape[1], eps,
        *query.stride()[:3], *source.stride()[:3], *positions.stride(),
        r=r, OFFSETS=tuple(offsets), NO_POSITION=NO_POSITION, WEIGHTED=offset_weights is not None,
        BLOCK=block, BLOCK_R=block_r,
    )  # fmt: skip
    return direction, tangent, inverse_count


def pack_weight(weight, num_heads, r, dtype):
    """Launch [`pack_kernel`]: the antisymmetric matrices, `(H * (r / J) * r * J, d)` with `r` and `d` padded."""
    hidden_size, block_j, block_d = weight.shape[0], pair_block(r), channel_block(weight.shape[0])
    r_padded, padded_size = ceil_div(r, block_j) * block_j, ceil_div(hidden_size, block_d) * block_d
    packed = weight.new_empty(num_heads * r_padded * r_padded, padded_size, dtype=dtype)
    pack_kernel[(packed.shape[0] // block_j, ceil_div(padded_size, block_d))](
        weight, packed, hidden_size, padded_size, weight.stride(0),
        r=r, R_PADDED=r_padded, BLOCK_J=block_j, BLOCK_D=block_d,
    )  # fmt: skip
    return packed


def unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied if its last dimension is not dense."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::plucker_features", mutates_args=())
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
) -> torch.Tensor:
    """[`plucker_features_triton`] with `source=None` for the query itself, computed and returned in `dtype`."""
    batch, length, num_heads, r = query.shape
    hidden_size, num_tokens = weight.shape[0], batch * length
    features = query.new_empty(batch, length, hidden_size, dtype=dtype)
    if features.numel() == 0:
        return features
    query, source, weight = unit_stride(query), unit_stride(query if source is None else source), unit_stride(weight)
    offset_weights = None if offset_weights is None else offset_weights.contiguous()
    positions = positions.expand(batch, -1)
    direction, tangent, inverse_count = make_tangents(query, source, positions, offset_weights, offsets, eps)
    packed = pack_weight(weight, num_heads, r, dtype)
    block, block_d = block_of(num_tokens, 128), channel_block(hidden_size)
    if num_tokens <= 64:
        # Few tokens, as in decoding: more programs with less to do each.
        block_d = min(block_d, 32)
    project_kernel[(ceil_div(num_tokens, block), ceil_div(hidden_size, block_d))](
        direction, tangent, packed, bias, inverse_count, features, num_tokens,
        hidden_size=hidden_size, padded_size=packed.shape[1], H=num_heads, r=r, R_PADDED=math.isqrt(packed.shape[0] // num_heads), BIAS=bias is not None,
        PRECISION=dot_precision(dtype), BLOCK=block, BLOCK_J=pair_block(r), BLOCK_D=block_d,
        num_warps=8 if block * block_d >= 128 * 128 else 4, num_stages=3,
    )  # fmt: skip
    return features


@plucker_features_op.register_fake
def _(query, source, weight, bias, offset_weights, positions, offsets, eps, dtype):
    return query.new_empty(query.shape[0], query.shape[1], weight.shape[0], dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::plucker_features_backward", mutates_args=())
def plucker_features_backward_op(
    grad: torch.Tensor,
    query: torch.Tensor,
    source: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset_weights: torch.Tensor | None,
    positions: torch.Tensor,
    offsets: list[int],
    eps: float,
    dtype: torch.dtype,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the five first arguments of [`plucker_features_op`]; empty where there is nothing to give."""
    grads = make_gradients(query, source, weight, bias, offset_weights, with_weight)
    if grad.numel() == 0:
        return tuple(gradient.zero_() for gradient in grads)
    grad_query, grad_source, grad_weight, grad_bias, grad_offset_weights = grads
    batch, length, num_heads, r = query.shape
    hidden_size, num_tokens = weight.shape[0], batch * length
    num_planes = weight.shape[1]
    shared = source is None
    grad = grad.to(dtype).contiguous()
    query, weight = unit_stride(query), unit_stride(weight)
    source = query if shared else unit_stride(source)
    offset_weights = None if offset_weights is None else offset_weights.contiguous()
    positions = positions.expand(batch, -1)
    precision = dot_precision(dtype)
    direction, tangent, inverse_count = make_tangents(query, source, positions, offset_weights, offsets, eps)
    packed = pack_weight(weight, num_heads, r, dtype)

    block_j, block_d = pair_block(r), channel_block(hidden_size)
    r_padded = math.isqrt(packed.shape[0] // num_heads)
    one_block = block_d >= hidden_size
    grad_direction, grad_tangent = query.new_empty(2, num_tokens, num_heads, r, dtype=torch.float32).unbind(0)
    block = block_of(num_tokens, 64)
    project_backward_kernel[(ceil_div(num_tokens, block), num_heads * (r_padded // block_j))](
        grad, direction, tangent, packed, grad_direction, grad_tangent, num_tokens,
        hidden_size=hidden_size, padded_size=packed.shape[1], H=num_heads, r=r, R_PADDED=r_padded, PRECISION=precision,
        BLOCK=block, BLOCK_I=64 // block_j, BLOCK_J=block_j, BLOCK_D=block_d if one_block else 64, ONE_BLOCK=one_block,
        num_warps=4, num_stages=2,
    )  # fmt: skip

    if with_weight:
        block_p, block = block_of(num_planes, 128), 64
        programs = ceil_div(num_planes, block_p) * ceil_div(hidden_size, block_d)
        steps = steps_per_program(num_tokens, block, 256 // programs)
        splits = ceil_div(num_tokens, steps * block)
        partial_weight = query.new_empty(splits, hidden_size, num_planes, dtype=torch.float32)
        partial_bias = query.new_empty(splits, hidden_size, dtype=torch.float32)
        weight_backward_kernel[(ceil_div(num_planes, block_p), ceil_div(hidden_size, block_d), splits)](
            grad, direction, tangent, inverse_count, partial_weight, partial_bias,
            num_tokens, hidden_size=hidden_size, H=num_heads, r=r, BIAS=bias is not None, PRECISION=precision,
            STEPS=steps, BLOCK=block, BLOCK_P=block_p, BLOCK_D=block_d,
            num_warps=8 if block_p * block_d >= 128 * 128 else 4, num_stages=2,
        )  # fmt: skip
        grad_weight.copy_(partial_weight.sum(0))
        if bias is not None:
            grad_bias.copy_(partial_bias.sum(0))

    block_r = triton.next_power_of_2(r)
    block = max(16, min(64, 2048 // block_r))
    num_places = batch * source.shape[1]
    blocks = ceil_div(num_places, block)
    sums = query.new_empty(blocks, num_heads, len(offsets) if offset_weights is not None else 0, dtype=torch.float32)
    tangents_backward_kernel[(blocks, num_heads)](
        query, source, positions, offset_weights, inverse_count, grad_direction, grad_tangent,
        grad_query, grad_source, sums, num_places, length, source.shape[1], eps,
        *query.stride()[:3], *source.stride()[:3], *positions.stride(),
        H=num_heads, r=r, OFFSETS=tuple(offsets), NO_POSITION=NO_POSITION, WEIGHTED=offset_weights is not None,
        SHARED=shared, BLOCK=block, BLOCK_R=block_r,
    )  # fmt: skip
    if offset_weights is not None:
        grad_offset_weights.copy_(sums.sum(0))
    return grad_query, grad_source, grad_weight, grad_bias, grad_offset_weights


def make_gradients(query, source, weight, bias, offset_weights, with_weight):
    """Empty tensors for the gradients, those that are not asked for without elements."""
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and needed else query.new_empty(0)
        for tensor, needed in [
            (query, True),
            (source, True),
            (weight, with_weight),
            (bias, with_weight),
            (offset_weights, True),
        ]
    )


@plucker_features_backward_op.register_fake
def _(grad, query, source, weight, bias, offset_weights, positions, offsets, eps, dtype, with_weight):
    return make_gradients(query, source, weight, bias, offset_weights, with_weight)


def save_for_plucker_backward(ctx, inputs, output):
    *tensors, ctx.offsets, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def plucker_backward(ctx, grad):
    inputs = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grads = plucker_features_backward_op(grad, *inputs, ctx.offsets, ctx.eps, ctx.dtype, with_weight)
    needed = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad)][:5]
    return *(gradient if need else None for gradient, need in zip(grads, needed)), None, None, None, None


plucker_features_op.register_autograd(plucker_backward, setup_context=save_for_plucker_backward)


def plucker_features_triton(query, source, weight, bias, offsets, positions, offset_weights, eps) -> torch.Tensor:
    """[`plucker.plucker_features`] on a GPU; under autocast the products are in its type."""
    dtype = weight.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    source = None if source is query else source
    return plucker_features_op(query, source, weight, bias, offset_weights, positions, list(offsets), eps, dtype)
