# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""The pairs of the Grassmann memory in fused Triton kernels, forward and backward, without Transformers.

[`memory_pairs_triton`] computes, inside of each chunk of a row, the sum of `grassmann_memory.py` over pairs of tokens,

.. math:: o_t = \sum_{s \le t} A_{ts} v_s, \qquad A_{ts} = D_{ts} f(S_{ts}), \qquad S_{ts} = \langle x_t, y_s \rangle,

where `x` and `y` are the coordinates of planes, `f` is a square or nothing, and the decay `D` is zero between
sequences. One chunk as long as the row is the whole memory. It is attention without softmax, in which no `(T, T)`
tensor exists, in either direction.

- [`coordinates_kernel`] makes the coordinates of frames, and [`coordinates_backward_kernel`] takes gradients back;
- [`decays_kernel`] sums log decays inside of blocks of tokens;
- [`pairs_kernel`] is the sum, [`query_backward_kernel`] and [`key_backward_kernel`] are its gradients;
- [`decays_backward_kernel`] is the gradient of log decays.

**Decays.** With sums :math:`c_t` of log decays from the beginning of its block to a token, a token of a block sees one
of an earlier block through three factors that are at most one: :math:`e^{c_t}`, the whole decay of the blocks between,
and the decay from `s` to the end of its block. A start of a sequence on the way makes one of them zero. The last one,
or its root if `f` is a square, is in a second copy of the coordinates of `s`. The first one multiplies the sum, and a
block on the way what was summed before it. For gradients of `s` it is the other way round: the first is in a second
copy of the coordinates of `t`, the last one multiplies the sum. So the pairs of two blocks need no decay and no mask,
only sums that are never positive are exponentiated, and none of them is a difference of large numbers. Inside of a
block the decay is :math:`e^{c_t - c_s}`, where `c` is kept in two float32 numbers. Blocks that are forgotten, through
decay or through the start of a sequence, are not visited.

**Gradients.** With :math:`\bar A_{ts} = \langle \bar o_t, v_s \rangle`, those of `v`, `x` and `y` are
:math:`A^\top \bar o`, :math:`\bar S y` and :math:`\bar S^\top x`, where :math:`\bar S = D \odot f'(S) \odot \bar A`.
A log decay of step `u` is in `D_ts` with :math:`s < u \le t`, so that its gradient is the sum of
:math:`A_{ts} \bar A_{ts}` over these pairs. That is the sum over :math:`t \ge u` of
:math:`\sum_s A_{ts} \bar A_{ts} - \sum_s A_{st} \bar A_{st}`, as pairs that lie behind `u` altogether come in both
terms; these two are :math:`\langle \bar o_t, o_t \rangle` and :math:`\langle v_t, \bar v_t \rangle`. They are summed
here before anything is rounded, without the pairs :math:`s = t`, which would cancel.

Sums have a fixed order: the same inputs give the same bits.
"""

import math
import operator
import re

import torch

from .plucker_triton import DTYPES, INTERPRETED, ceil_div, on_own_device, unit_stride


# Optional packages are imported inside of `try`: Transformers demands what it finds elsewhere in a file that travels
# with a checkpoint. `grassmann_memory.py` does without this file where there is no Triton.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


MAX_COORDINATES = 160
MAX_VALUE_SIZE = 128
# Those of `grassmann_memory.py`, which imports this file.
MIN_LOG_DECAY = -100.0
# What 2^16 tokens behind these log decays add, e^-28 or e^-19 of each, is less than the rounding of one token, in
# float32 and in half precisions.
FORGOTTEN = tl.constexpr(-28.0)
FORGOTTEN_HALF = tl.constexpr(-19.0)
# Operators are named after the module, so that code that travels with a checkpoint never meets the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def locate(program, num_blocks, num_heads, num_chunks, chunk_size, length):
    """
    Of the programs of all blocks of all heads' chunks: block, number of head and chunk, row, head, the chunk's first
    token and its number of tokens.
    """
    block = program % num_blocks
    sequence = program // num_blocks
    head = sequence % num_heads
    chunk = sequence // num_heads % num_chunks
    row = sequence // (num_heads * num_chunks)
    first = chunk * chunk_size
    return block, sequence.to(tl.int64), row.to(tl.int64), head, first, tl.minimum(chunk_size, length - first)


@triton.jit
def longest_first(num_blocks, num_heads, LAST_BLOCK_FIRST: tl.constexpr):
    """
    The program of [`locate`] whose turn it is. Long sums come first, so that short ones fill up the end: last heads
    remember for longest, as they are initialised.
    """
    program = tl.program_id(0)
    block = program % num_blocks
    if LAST_BLOCK_FIRST:
        block = num_blocks - 1 - block
    num_chunks = tl.num_programs(0) // (num_blocks * num_heads)  # of all rows
    chunk = program // num_blocks % num_chunks
    head = num_heads - 1 - program // (num_blocks * num_chunks)
    return (chunk * num_heads + head) * num_blocks + block


@triton.jit
def load_segments(pointers, mask):
    """Number of the sequence of each token, and whether it is real: padding has the complement of its number."""
    number = tl.load(pointers, mask=mask, other=-1)
    return tl.where(number < 0, -1 - number, number), number >= 0


@triton.jit
def load_real(segment, token, inside, segment_token, SEGMENTS: tl.constexpr):
    """Which tokens are real."""
    real = inside
    if SEGMENTS:
        _, real = load_segments(segment + token * segment_token, inside)
    return real


@triton.jit
def load_real_block(segment, block, segment_token, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens of a block that lies inside of a chunk are real; `None` if all are."""
    real = None
    if SEGMENTS:
        real = tl.load(segment + (block * BLOCK + tl.arange(0, BLOCK)) * segment_token) >= 0
    return real


@triton.jit
def load_rows(pointers, width, real, WIDTH: tl.constexpr):
    """The first numbers of rows, zeros where they are not real; all are if `real` is `None`: `(BLOCK, WIDTH)`."""
    column = tl.arange(0, WIDTH)
    pointers = pointers[:, None] + column[None, :]
    if real is None and width == WIDTH:
        rows = tl.load(pointers)
    elif real is None:
        rows = tl.load(pointers, mask=(column < width)[None, :], other=0.0)
    elif width == WIDTH:
        rows = tl.load(pointers, mask=real[:, None], other=0.0)
    else:
        rows = tl.load(pointers, mask=real[:, None] & (column < width)[None, :], other=0.0)
    return rows


@triton.jit
def load_values(row, block, real, stride, dv: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr):
    """Values of a block of tokens, or their gradients: `(BLOCK, BLOCK_V)`."""
    pointers = row + (block * BLOCK).to(tl.int64) * stride + tl.arange(0, BLOCK) * stride
    return load_rows(pointers, dv, real, BLOCK_V)


@triton.jit
def load_coordinates(row, block, inside, C1: tl.constexpr, C2: tl.constexpr, BLOCK: tl.constexpr):
    """Coordinates of a block of tokens, a power of two of them and one more: `(BLOCK, C1)` and `(BLOCK, C2)`."""
    pointers = row + block * (BLOCK * (C1 + C2)) + tl.arange(0, BLOCK) * (C1 + C2)
    first = load_rows(pointers, C1, inside, C1)
    second = first
    if C2 > 0:
        second = load_rows(pointers + C1, C2, inside, C2)
    return first, second


@triton.jit
def inner_products(x1, x2, y1, y2, C2: tl.constexpr, PRECISION: tl.constexpr):
    """Of all pairs of rows."""
    products = tl.dot(x1, tl.trans(y1), input_precision=PRECISION)
    if C2 > 0:
        products = tl.dot(x2, tl.trans(y2), products, input_precision=PRECISION)
    return products


@triton.jit
def multiply_add(a, y1, y2, total1, total2, C2: tl.constexpr, PRECISION: tl.constexpr):
    """Add `a @ y` to totals."""
    total1 = tl.dot(a, y1, total1, input_precision=PRECISION)
    if C2 > 0:
        total2 = tl.dot(a, y2, total2, input_precision=PRECISION)
    return total1, total2


@triton.jit
def store_coordinates(row, token, inside, first, second, C1: tl.constexpr, C2: tl.constexpr):
    pointers = row + token[:, None] * (C1 + C2)
    dtype = row.dtype.element_ty
    tl.store(pointers + tl.arange(0, C1)[None, :], first.to(dtype), mask=inside[:, None])
    if C2 > 0:
        tl.store(pointers + C1 + tl.arange(0, C2)[None, :], second.to(dtype), mask=inside[:, None])


@triton.jit
def split_columns(tile, SIZE: tl.constexpr):
    """The columns of `(BLOCK, SIZE)`, a power of two of them: a tuple of `(BLOCK,)`."""
    if SIZE == 1:
        columns = (tl.reshape(tile, (tile.shape[0],)),)
    else:
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], SIZE // 2, 2)))
        even, odd = split_columns(even, SIZE // 2), split_columns(odd, SIZE // 2)
        columns = ()
        for i in tl.static_range(SIZE // 2):
            columns += (even[i], odd[i])
    return columns


@triton.jit
def join_columns(columns, SIZE: tl.constexpr):
    """The inverse of [`split_columns`], for at least two columns."""
    if SIZE == 2:
        tile = tl.join(columns[0], columns[1])
    else:
        even, odd = (), ()
        for i in tl.static_range(0, SIZE, 2):
            even += (columns[i],)
            odd += (columns[i + 1],)
        tile = tl.join(join_columns(even, SIZE // 2), join_columns(odd, SIZE // 2))
        tile = tl.reshape(tile, (tile.shape[0], SIZE))
    return tile


@triton.jit
def load_columns(pointer, offsets, real, SIZE: tl.constexpr, PART: tl.constexpr):
    """
    The columns of rows in float32, zeros where these are not real. Each thread loads a row, `PART` numbers at once:
    rows begin at multiples of them.
    """
    offsets = tl.multiple_of(offsets[:, None], (PART, PART))
    columns = ()
    for start in tl.static_range(0, SIZE, PART):
        column = start + tl.arange(0, PART)
        mask = real[:, None] & (column < SIZE)[None, :]
        tile = tl.load(pointer + offsets + column[None, :], mask=mask, other=0.0)
        columns += split_columns(tile.to(tl.float32), PART)
    return columns


@triton.jit
def store_columns(pointers, columns, inside, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """
    Rows of `SIZE` columns, filled up with zeros: 64 bytes of each thread's row at once, which threads exchange. Those
    side by side then store whole sectors of memory, in up to a quarter of the time that a row's own thread takes.
    """
    dtype = pointers.dtype.element_ty
    PART: tl.constexpr = 512 // dtype.primitive_bitwidth
    for start in tl.static_range(0, WIDTH, PART):
        part = ()
        for i in tl.static_range(start, start + PART):
            part += ((columns[i] if i < SIZE else tl.zeros_like(columns[0])).to(dtype),)
        column = start + tl.arange(0, PART)
        mask = inside[:, None] & (column < WIDTH)[None, :]
        tl.store(pointers[:, None] + column[None, :], join_columns(part, PART), mask=mask)


@triton.constexpr_function
def pair_column(i, j, r, kind):
    """The place of two entries' coordinate: squares come first, if at all, and pairs in lexicographic order."""
    if i == j:
        return i
    i, j = min(i, j), max(i, j)
    return (r if kind == "projection" else 0) + i * (2 * r - i - 1) // 2 + j - i - 1


@triton.jit
def coordinates_kernel(
    frames, segment, decays, coordinates, num_blocks, num_heads, num_chunks, chunk_size, length,
    frames_row, frames_token, frames_head, frames_vector, segment_row, segment_token,
    KIND: tl.constexpr, SQUARED: tl.constexpr, SEGMENTS: tl.constexpr,
    r: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """
    Coordinates of frames in the order of `grassmann_memory.py`, zeros for padding: `(B * N * H, c, WIDTH)`. Behind
    them the same times decays `(B * N * H, c)`, if there are any, or times their roots where similarities are squared.
    A thread makes those of a token.
    """
    block, sequence, row, head, first, size = locate(
        tl.program_id(0), num_blocks, num_heads, num_chunks, chunk_size, length
    )
    token = block * BLOCK + tl.arange(0, BLOCK)
    if SEGMENTS:
        segment += row * segment_row + first * segment_token
    real = load_real(segment, token, token < size, segment_token, SEGMENTS)
    offsets = row * frames_row + head * frames_head + (first + token).to(tl.int64) * frames_token
    a = load_columns(frames, offsets, real, r, PART)
    if KIND == "inner":
        columns = a
    else:
        b = load_columns(frames, offsets + frames_vector, real, r, PART)
        columns = ()
        if KIND == "projection":
            for i in tl.static_range(r):
                columns += (a[i] * a[i] + b[i] * b[i],)
        for i in tl.static_range(r):
            for j in tl.static_range(i + 1, r):
                if KIND == "wedge":
                    columns += (a[i] * b[j] - a[j] * b[i],)
                else:
                    columns += ((a[i] * a[j] + b[i] * b[j]) * 1.4142135623730951,)
    inside = token < chunk_size
    pointers = coordinates + (sequence * chunk_size + token) * WIDTH
    store_columns(pointers, columns, inside, C, WIDTH)
    if decays is not None:
        decay = tl.load(decays + sequence * chunk_size + token, mask=inside, other=0.0)
        if SQUARED:
            decay = tl.sqrt(decay)
        decayed = ()
        for i in tl.static_range(C):
            decayed += (columns[i] * decay,)
        stride = (tl.num_programs(0) // num_blocks).to(tl.int64) * chunk_size
        store_columns(pointers + stride * WIDTH, decayed, inside, C, WIDTH)


@triton.jit
def coordinates_backward_kernel(
    frames, segment, grad_coordinates, grad_frames, num_blocks, num_heads, num_chunks, chunk_size, length,
    frames_row, frames_token, frames_head, frames_vector, segment_row, segment_token,
    KIND: tl.constexpr, SEGMENTS: tl.constexpr, r: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients of frames, `(B, T, H, m, r)`: each entry gathers what it gets from the coordinates of its pairs."""
    block, sequence, row, head, first, size = locate(
        tl.program_id(0), num_blocks, num_heads, num_chunks, chunk_size, length
    )
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    if SEGMENTS:
        segment += row * segment_row + first * segment_token
    real = load_real(segment, token, inside, segment_token, SEGMENTS)
    GRAD_PART: tl.constexpr = 128 // grad_coordinates.dtype.element_ty.primitive_bitwidth
    # Whole parts, of which the rest is not used.
    LOADED: tl.constexpr = triton.cdiv(C, GRAD_PART) * GRAD_PART
    g = load_columns(grad_coordinates, (sequence * chunk_size + token) * WIDTH, real, LOADED, GRAD_PART)
    if KIND == "inner":
        grad = g
    else:
        offsets = row * frames_row + head * frames_head + (first + token).to(tl.int64) * frames_token
        a = load_columns(frames, offsets, real, r, PART)
        b = load_columns(frames, offsets + frames_vector, real, r, PART)
        grad_a, grad_b = (), ()
        for i in tl.static_range(r):
            total_a, total_b = tl.zeros_like(a[0]), tl.zeros_like(a[0])
            for j in tl.static_range(r):
                if KIND == "projection":
                    g_ij = g[pair_column(i, j, r, KIND)] * (2.0 if i == j else 1.4142135623730951)
                    total_a += g_ij * a[j]
                    total_b += g_ij * b[j]
                elif i < j:
                    total_a += g[pair_column(i, j, r, KIND)] * b[j]
                    total_b -= g[pair_column(i, j, r, KIND)] * a[j]
                elif i > j:
                    total_a -= g[pair_column(i, j, r, KIND)] * b[j]
                    total_b += g[pair_column(i, j, r, KIND)] * a[j]
            grad_a += (total_a,)
            grad_b += (total_b,)
        grad = grad_a + grad_b
    SIZE: tl.constexpr = r if KIND == "inner" else 2 * r
    result = grad_frames + ((row * length + first + token) * num_heads + head) * SIZE
    store_columns(result, grad, inside, SIZE, SIZE)


@triton.jit
def decays_kernel(
    log_decay, segment, decays, num_blocks, num_heads, num_chunks, chunk_size, length,
    decay_row, decay_token, decay_head, segment_row, segment_token,
    MIN_LOG_DECAY: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    For each token, `(5, B * N * H, c)`: the sum of log decays from the beginning of its block in two float32 numbers,
    the decay from before its block, that to the end of it, and the sum of the whole block.
    """
    block, sequence, row, head, first, size = locate(
        tl.program_id(0), num_blocks, num_heads, num_chunks, chunk_size, length
    )
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    pointers = log_decay + row * decay_row + head * decay_head + (first + token).to(tl.int64) * decay_token
    step = tl.maximum(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), MIN_LOG_DECAY)
    # The first token of a chunk follows none.
    counts = inside & (token > 0)
    number = tl.zeros([BLOCK], tl.int32)
    if SEGMENTS:
        segment += row * segment_row + first * segment_token
        number, real = load_segments(segment + token * segment_token, inside)
        previous, _ = load_segments(segment + (token - 1) * segment_token, counts)
        counts &= real & (number == previous)
    step = tl.where(counts, step, 0.0).to(tl.float64)
    until = tl.cumsum(step)
    total = tl.sum(step)
    high = until.to(tl.float32)
    entering = tl.exp(high)
    leaving = tl.exp((total - until).to(tl.float32))
    total = total.to(tl.float32)
    if SEGMENTS:
        follows = (block > 0) & (block * BLOCK < size)
        before, _ = load_segments(segment + (block * BLOCK - 1) * segment_token, follows)
        last, _ = load_segments(segment + (tl.minimum(block * BLOCK + BLOCK, size) - 1) * segment_token, size > 0)
        entering = tl.where(follows & (number == before), entering, 0.0)
        leaving = tl.where(number == last, leaving, 0.0)
        total = tl.where((block == 0) | (last == before), total, -float("inf"))
    stride = (tl.num_programs(0) // num_blocks).to(tl.int64) * chunk_size
    pointers = decays + sequence * chunk_size + token
    inside = token < chunk_size
    tl.store(pointers, high, mask=inside)
    tl.store(pointers + stride, (until - high.to(tl.float64)).to(tl.float32), mask=inside)
    tl.store(pointers + 2 * stride, entering, mask=inside)
    tl.store(pointers + 3 * stride, leaving, mask=inside)
    tl.store(pointers + 4 * stride, tl.zeros([BLOCK], tl.float32) + total, mask=inside)


@triton.jit
def is_remembered(log_decay, dtype: tl.constexpr):
    """Whether something of this decay matters to sums in this type."""
    return log_decay >= (FORGOTTEN if dtype == tl.float32 else FORGOTTEN_HALF)


@triton.jit
def count_earlier(totals, block, size, dtype: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks before this one it has not forgotten; none for one that is empty."""
    step = tl.arange(0, NUM_BLOCKS)
    exists = (step < block) & (block * BLOCK < size)
    # The decay between two blocks is that of the ones in between.
    between = tl.load(totals + (block - step) * BLOCK, mask=exists & (step > 0), other=0.0)
    return tl.sum((exists & is_remembered(tl.cumsum(between), dtype)).to(tl.int32))


@triton.jit
def count_later(totals, block, size, dtype: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks behind this one have not forgotten it, without those that are empty."""
    step = tl.arange(0, NUM_BLOCKS)
    exists = step < tl.cdiv(size, BLOCK) - 1 - block
    between = tl.load(totals + (block + step) * BLOCK, mask=exists & (step > 0), other=0.0)
    return tl.sum((exists & is_remembered(tl.cumsum(between), dtype)).to(tl.int32))


@triton.jit
def decay_inside(
    decays, segment, token, inside, stride, segment_token,
    SEGMENTS: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`D_ts` for the tokens of one block, `t` first, or `s` first if `TRANSPOSED`; and where `s < t`."""
    high = tl.load(decays + token, mask=inside, other=0.0)
    low = tl.load(decays + stride + token, mask=inside, other=0.0)
    place = tl.arange(0, BLOCK)
    if TRANSPOSED:
        exponent = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        seen = (place[:, None] <= place[None, :]) & inside[None, :]
        before = place[:, None] < place[None, :]
    else:
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        seen = (place[None, :] <= place[:, None]) & inside[:, None]
        before = place[None, :] < place[:, None]
    if SEGMENTS:
        number, _ = load_segments(segment + token * segment_token, inside)
        seen &= number[:, None] == number[None, :]
    return tl.exp(tl.where(seen, exponent, -float("inf"))), before


@triton.jit
def pairs_kernel(
    query, key, decayed_key, values, decays, segment, output, num_blocks, num_heads, num_chunks, chunk_size, length,
    values_row, values_token, values_head, segment_row, segment_token,
    SQUARED: tl.constexpr, SEGMENTS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, dv: tl.constexpr,
    SIMILARITY: tl.constexpr, PRECISION: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`Σ D_ts f(S_ts) v_s` for a block of tokens `t`."""
    program = longest_first(num_blocks, num_heads, LAST_BLOCK_FIRST=True)
    block, sequence, row, head, first, size = locate(program, num_blocks, num_heads, num_chunks, chunk_size, length)
    place = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_V)
    stride = (tl.num_programs(0) // num_blocks).to(tl.int64) * chunk_size
    decays += sequence * chunk_size
    totals = decays + 4 * stride
    coordinates = sequence * chunk_size * (C1 + C2)
    values += row * values_row + head * values_head + first.to(tl.int64) * values_token
    if SEGMENTS:
        segment += row * segment_row + first * segment_token

    token = block * BLOCK + place
    inside = token < size
    x1, x2 = load_coordinates(query + coordinates, block, inside, C1, C2, BLOCK)
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    if NUM_BLOCKS > 1:
        passed = 0.0
        earlier = count_earlier(totals, block, size, values.dtype.element_ty, NUM_BLOCKS, BLOCK)
        for step in tl.range(0, earlier):
            other = block - earlier + step
            real = load_real_block(segment, other, segment_token, SEGMENTS, BLOCK)
            y1, y2 = load_coordinates(decayed_key + coordinates, other, None, C1, C2, BLOCK)
            v = load_values(values, other, real, values_token, dv, BLOCK, BLOCK_V)
            s = inner_products(x1, x2, y1, y2, C2, SIMILARITY)
            if SQUARED:
                s *= s
            total *= tl.exp(passed)
            passed = tl.load(totals + (other + 1) * BLOCK)
            total = tl.dot(s.to(v.dtype), v, total, input_precision=PRECISION)
        total *= tl.load(decays + 2 * stride + token, mask=inside, other=0.0)[:, None]

    decay, _ = decay_inside(decays, segment, token, inside, stride, segment_token, SEGMENTS, False, BLOCK)
    real = load_real(segment, token, inside, segment_token, SEGMENTS)
    y1, y2 = load_coordinates(key + coordinates, block, inside, C1, C2, BLOCK)
    v = load_values(values, block, real, values_token, dv, BLOCK, BLOCK_V)
    s = inner_products(x1, x2, y1, y2, C2, SIMILARITY)
    if SQUARED:
        s *= s
    total = tl.dot((s * decay).to(v.dtype), v, total, input_precision=PRECISION)
    pointers = output + ((row * length + first + token) * num_heads + head)[:, None] * dv + channel[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=inside[:, None] & (channel < dv)[None, :])


@triton.jit
def query_backward_kernel(
    query, key, decayed_key, rounded_key, values, decays, segment, grad, grad_query, sums, block_sums,
    num_blocks, num_heads, num_chunks, chunk_size, length,
    values_row, values_token, values_head, segment_row, segment_token,
    SQUARED: tl.constexpr, SEGMENTS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, dv: tl.constexpr,
    SIMILARITY: tl.constexpr, PRECISION: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """For a block of tokens `t`: the gradient of `x_t`, sums of `A_ts` times its gradient over `s < t`, their sum."""
    program = longest_first(num_blocks, num_heads, LAST_BLOCK_FIRST=True)
    block, sequence, row, head, first, size = locate(program, num_blocks, num_heads, num_chunks, chunk_size, length)
    place = tl.arange(0, BLOCK)
    stride = (tl.num_programs(0) // num_blocks).to(tl.int64) * chunk_size
    decays += sequence * chunk_size
    totals = decays + 4 * stride
    coordinates = sequence * chunk_size * (C1 + C2)
    values += row * values_row + head * values_head + first.to(tl.int64) * values_token
    if SEGMENTS:
        segment += row * segment_row + first * segment_token

    token = block * BLOCK + place
    inside = token < size
    real = load_real(segment, token, inside, segment_token, SEGMENTS)
    x1, x2 = load_coordinates(query + coordinates, block, inside, C1, C2, BLOCK)
    grad += ((row * length + first) * num_heads + head) * dv
    do = load_values(grad, block, real, num_heads * dv, dv, BLOCK, BLOCK_V)
    total1 = tl.zeros([BLOCK, C1], tl.float32)
    total2 = tl.zeros([BLOCK, C2 if C2 > 0 else 1], tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    if NUM_BLOCKS > 1:
        passed = 0.0
        earlier = count_earlier(totals, block, size, values.dtype.element_ty, NUM_BLOCKS, BLOCK)
        for step in tl.range(0, earlier):
            other = block - earlier + step
            real_source = load_real_block(segment, other, segment_token, SEGMENTS, BLOCK)
            y1, y2 = load_coordinates(decayed_key + coordinates, other, None, C1, C2, BLOCK)
            v = load_values(values, other, real_source, values_token, dv, BLOCK, BLOCK_V)
            s = inner_products(x1, x2, y1, y2, C2, SIMILARITY)
            ds = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if SQUARED:
                ds *= s
            kept = tl.exp(passed)
            passed = tl.load(totals + (other + 1) * BLOCK)
            row_sum = row_sum * kept + tl.sum(ds * s, axis=1)
            if rounded_key is not None:
                y1, y2 = load_coordinates(rounded_key + coordinates, other, None, C1, C2, BLOCK)
            total1, total2 = multiply_add(ds.to(v.dtype), y1, y2, total1 * kept, total2 * kept, C2, PRECISION)
        entering = tl.load(decays + 2 * stride + token, mask=inside, other=0.0)
        total1 *= entering[:, None]
        total2 *= entering[:, None]
        row_sum *= entering

    decay, before = decay_inside(decays, segment, token, inside, stride, segment_token, SEGMENTS, False, BLOCK)
    y1, y2 = load_coordinates(key + coordinates, block, inside, C1, C2, BLOCK)
    # Early: where these take the shared memory of values that are no longer needed, with another layout, the assembler
    # of CUDA 12.8 reads 32 columns of them from a wrong address (Hopper).
    rounded1, rounded2 = y1.to(do.dtype), y2.to(do.dtype)
    v = load_values(values, block, real, values_token, dv, BLOCK, BLOCK_V)
    s = inner_products(x1, x2, y1, y2, C2, SIMILARITY)
    ds = tl.dot(do, tl.trans(v), input_precision=PRECISION) * decay
    if SQUARED:
        ds *= s
    row_sum += tl.sum(tl.where(before, ds * s, 0.0), axis=1)
    total1, total2 = multiply_add(ds.to(v.dtype), rounded1, rounded2, total1, total2, C2, PRECISION)
    if SQUARED:
        total1 *= 2.0
        total2 *= 2.0
    store_coordinates(grad_query + coordinates, token, inside, total1, total2, C1, C2)
    tl.store(sums + sequence * chunk_size + token, row_sum, mask=inside)
    tl.store(block_sums + sequence * num_blocks + block, tl.sum(row_sum))


@triton.jit
def key_backward_kernel(
    query, decayed_query, rounded_query, key, values, decays, segment, grad, grad_key, grad_values, sums, block_sums,
    num_blocks, num_heads, num_chunks, chunk_size, length,
    values_row, values_token, values_head, segment_row, segment_token,
    SQUARED: tl.constexpr, SEGMENTS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, dv: tl.constexpr,
    SIMILARITY: tl.constexpr, PRECISION: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """For a block of tokens `s`: the gradients of `y_s` and `v_s`, the sums of [`query_backward_kernel`] over `t`."""
    program = longest_first(num_blocks, num_heads, LAST_BLOCK_FIRST=False)
    block, sequence, row, head, first, size = locate(program, num_blocks, num_heads, num_chunks, chunk_size, length)
    place = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_V)
    stride = (tl.num_programs(0) // num_blocks).to(tl.int64) * chunk_size
    decays += sequence * chunk_size
    totals = decays + 4 * stride
    coordinates = sequence * chunk_size * (C1 + C2)
    values += row * values_row + head * values_head + first.to(tl.int64) * values_token
    grad += ((row * length + first) * num_heads + head) * dv
    if SEGMENTS:
        segment += row * segment_row + first * segment_token

    token = block * BLOCK + place
    inside = token < size
    real = load_real(segment, token, inside, segment_token, SEGMENTS)
    y1, y2 = load_coordinates(key + coordinates, block, inside, C1, C2, BLOCK)
    v = load_values(values, block, real, values_token, dv, BLOCK, BLOCK_V)
    total1 = tl.zeros([BLOCK, C1], tl.float32)
    total2 = tl.zeros([BLOCK, C2 if C2 > 0 else 1], tl.float32)
    total_v = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    column_sum = tl.zeros([BLOCK], tl.float32)
    if NUM_BLOCKS > 1:
        passed = 0.0
        later = count_later(totals, block, size, values.dtype.element_ty, NUM_BLOCKS, BLOCK)
        for step in tl.range(0, later):
            other = block + later - step
            reader = other * BLOCK + place
            exists = reader < size
            real_reader = load_real(segment, reader, exists, segment_token, SEGMENTS)
            x1, x2 = load_coordinates(decayed_query + coordinates, other, exists, C1, C2, BLOCK)
            do = load_values(grad, other, real_reader, num_heads * dv, dv, BLOCK, BLOCK_V)
            s = inner_products(y1, y2, x1, x2, C2, SIMILARITY)
            ds = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            a = s
            if SQUARED:
                ds *= s
                a *= s
            kept = tl.exp(passed)
            passed = tl.load(totals + (other - 1) * BLOCK)
            column_sum = column_sum * kept + tl.sum(ds * s, axis=1)
            total_v = tl.dot(a.to(v.dtype), do, total_v * kept, input_precision=PRECISION)
            if rounded_query is not None:
                x1, x2 = load_coordinates(rounded_query + coordinates, other, exists, C1, C2, BLOCK)
            total1, total2 = multiply_add(ds.to(v.dtype), x1, x2, total1 * kept, total2 * kept, C2, PRECISION)
        leaving = tl.load(decays + 3 * stride + token, mask=inside, other=0.0)
        total_v *= leaving[:, None]
        total1 *= leaving[:, None]
        total2 *= leaving[:, None]
        column_sum *= leaving

    decay, before = decay_inside(decays, segment, token, inside, stride, segment_token, SEGMENTS, True, BLOCK)
    x1, x2 = load_coordinates(query + coordinates, block, inside, C1, C2, BLOCK)
    # As in `query_backward_kernel`.
    rounded1, rounded2 = x1.to(v.dtype), x2.to(v.dtype)
    do = load_values(grad, block, real, num_heads * dv, dv, BLOCK, BLOCK_V)
    s = inner_products(y1, y2, x1, x2, C2, SIMILARITY)
    ds = tl.dot(v, tl.trans(do), input_precision=PRECISION) * decay
    a = s * decay
    if SQUARED:
        ds *= s
        a *= s
    column_sum += tl.sum(tl.where(before, ds * s, 0.0), axis=1)
    total_v = tl.dot(a.to(v.dtype), do, total_v, input_precision=PRECISION)
    total1, total2 = multiply_add(ds.to(v.dtype), rounded1, rounded2, total1, total2, C2, PRECISION)
    if SQUARED:
        total1 *= 2.0
        total2 *= 2.0
    store_coordinates(grad_key + coordinates, token, inside, total1, total2, C1, C2)
    pointers = grad_values + ((row * length + first + token) * num_heads + head)[:, None] * dv + channel[None, :]
    tl.store(pointers, total_v.to(grad_values.dtype.element_ty), mask=inside[:, None] & (channel < dv)[None, :])
    tl.store(sums + sequence * chunk_size + token, column_sum, mask=inside)
    tl.store(block_sums + sequence * num_blocks + block, tl.sum(column_sum))


@triton.jit
def decays_backward_kernel(
    log_decay, segment, sums, block_sums, grad_decay, num_blocks, num_heads, num_chunks, chunk_size, length,
    decay_row, decay_token, decay_head, segment_row, segment_token,
    MIN_LOG_DECAY: tl.constexpr, SEGMENTS: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the sums for queries less those for keys, the sum over this and all later tokens of a chunk: `(B, T, H)`."""
    block, sequence, row, head, first, size = locate(
        tl.program_id(0), num_blocks, num_heads, num_chunks, chunk_size, length
    )
    num_sequences = (tl.num_programs(0) // num_blocks).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    pointers = sums + sequence * chunk_size + token
    difference = tl.load(pointers, mask=inside, other=0.0)
    difference -= tl.load(pointers + num_sequences * chunk_size, mask=inside, other=0.0)
    other = tl.arange(0, NUM_BLOCKS)
    pointers = block_sums + sequence * num_blocks + other
    mask = (other > block) & (other < num_blocks)
    later = tl.load(pointers, mask=mask, other=0.0)
    later -= tl.load(pointers + num_sequences * num_blocks, mask=mask, other=0.0)
    result = tl.cumsum(difference, reverse=True) + tl.sum(later)

    pointers = log_decay + row * decay_row + head * decay_head + (first + token).to(tl.int64) * decay_token
    counts = inside & (token > 0) & (tl.load(pointers, mask=inside, other=0.0).to(tl.float32) >= MIN_LOG_DECAY)
    if SEGMENTS:
        segment += row * segment_row + first * segment_token
        number, real = load_segments(segment + token * segment_token, inside)
        previous, _ = load_segments(segment + (token - 1) * segment_token, inside & (token > 0))
        counts &= real & (number == previous)
    pointers = grad_decay + (row * length + first + token) * num_heads + head
    tl.store(pointers, tl.where(counts, result, 0.0).to(grad_decay.dtype.element_ty), mask=inside)


# What coordinates are made of frames, and whether the similarity is the square of their inner product.
KERNELS = {
    "plucker": ("wedge", False),
    "binet_cauchy": ("wedge", True),
    "projection": ("projection", False),
    "inner": ("inner", False),
    "inner_squared": ("inner", True),
}


def num_coordinates(kernel: str, reduced_size: int) -> int:
    """Of frames in R^r."""
    # The size of a dimension may be a symbol in compiled code, which this makes a number.
    reduced_size = operator.index(reduced_size)
    return {
        "inner": reduced_size,
        "wedge": reduced_size * (reduced_size - 1) // 2,
        "projection": reduced_size * (reduced_size + 1) // 2,
    }[KERNELS[kernel][0]]


def why_not_triton(values: torch.Tensor, kernel: str, reduced_size: int) -> str | None:
    """Why the kernels cannot take values like these, and frames of this size; `None` if they can."""
    if not (values.is_cuda or INTERPRETED):
        return f"its kernels run on CUDA devices, and the tensors are on {values.device.type!r}"
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    if values.dtype not in DTYPES:
        return f"its kernels compute in bfloat16, float16 or float32, and the values are {values.dtype}"
    if values.dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter cannot multiply bfloat16"
    if num_coordinates(kernel, reduced_size) > MAX_COORDINATES:
        return f"its kernels take up to {MAX_COORDINATES} coordinates, got {num_coordinates(kernel, reduced_size)}"
    if values.shape[-1] > MAX_VALUE_SIZE:
        return f"its kernels take values up to a size of {MAX_VALUE_SIZE}, got {values.shape[-1]}"
    if values.is_cuda and torch.cuda.get_device_capability(values.device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or later"
    return None


def count_chunks(length: int, chunk_size: int) -> int:
    """Chunks in a row. Compiled code need not divide symbols where there is one."""
    return 1 if chunk_size >= length else ceil_div(length, chunk_size)


def split_coordinates(size: int) -> tuple[int, int]:
    """
    Two powers of two from 32 that cover a number of coordinates most closely; the second may be zero. Products of two
    halves need fewer registers at a time than those of 128 coordinates.
    """
    # On Hopper, products with 16 columns of bfloat16 made of float16 read past them (Triton 3.6).
    half = max(triton.next_power_of_2(size) // 2, 16)
    rest = max(triton.next_power_of_2(max(size - half, 1)), 32)
    return (half, rest) if rest < half or half == 64 else (2 * half, 0)


def coordinates_width(kernel: str, r: int) -> int:
    """Coordinates of frames in R^r, filled up with zeros."""
    return sum(split_coordinates(num_coordinates(kernel, r)))


def coordinates_options(kernel: str, frames: torch.Tensor, chunk_size: int) -> tuple[dict[str, int | str], int]:
    """What both kernels of coordinates are compiled for, and their blocks of tokens in a chunk: a thread for each."""
    r, num_warps = frames.shape[-1], 4
    options = {
        "KIND": KERNELS[kernel][0], "r": r, "C": num_coordinates(kernel, r), "WIDTH": coordinates_width(kernel, r),
        # Numbers that are loaded at once: 16 bytes, if vectors begin at multiples of them.
        "BLOCK": 32 * num_warps, "PART": math.gcd(16 // frames.element_size(), *frames.stride()[:4]),
        "num_warps": num_warps,
    }  # fmt: skip
    return options, ceil_div(chunk_size, options["BLOCK"])


def coordinate_dtype(kernel: str, dtype: torch.dtype) -> torch.dtype:
    """
    The type of coordinates that go with values in `dtype`: that one, but float16 for frames beside bfloat16. Theirs
    are at most √2, where float16 has three bits more, which squares of similarities need.
    """
    return torch.float16 if dtype == torch.bfloat16 and KERNELS[kernel][0] != "inner" else dtype


def dot_precision(dtype: torch.dtype) -> str:
    """
    How products of float32 are computed for values in `dtype`: to float32's rounding by three products of tensor
    cores, unless one is enough, next to half precisions or because PyTorch's own matrix products use it too.
    """
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def block_size(dtype: torch.dtype) -> int:
    """Tokens in a block of pairs, of queries as of keys, for values in `dtype`."""
    return 32 if dtype == torch.float32 else 64


def launch_options(query: torch.Tensor, values: torch.Tensor, kernel: str, name: str) -> dict[str, int]:
    """Warps, stages and registers of a kernel of pairs, as measured on an H200."""
    width, dv = coordinates_width(kernel, query.shape[-1]), max(triton.next_power_of_2(values.shape[-1]), 32)
    if values.dtype == torch.float32 or dv > 64:
        # Two parts of coordinates need more registers.
        return {"num_warps": 8 if name != "pairs" and width > 64 else 4, "num_stages": 2}
    # As many tokens are loaded ahead as registers and shared memory are left for.
    columns = width + dv
    ahead = {"pairs": width <= 96, "query_backward": columns < 128, "key_backward": columns <= 128}[name]
    options = {"num_warps": 8 if name != "pairs" and width > 128 else 4, "num_stages": 3 if ahead else 2}
    fits = columns <= {"pairs": 0, "query_backward": 128, "key_backward": 64}[name]
    if fits and (not values.is_cuda or torch.cuda.get_device_capability(values.device) == (9, 0)):
        # A third block of tokens at a time on each multiprocessor. Other GPUs need more registers for the same.
        options["maxnreg"] = 168
    return options


def empty_intermediates(query, values, kernel, chunk_size):
    """Memory for what [`coordinates_kernel`] makes of queries and of keys, and for what [`decays_kernel`] gives."""
    num_sequences = values.shape[0] * count_chunks(values.shape[1], chunk_size) * values.shape[2]
    width = coordinates_width(kernel, query.shape[-1])
    dtype = coordinate_dtype(kernel, values.dtype)
    return (
        values.new_empty(2, num_sequences, chunk_size, width, dtype=dtype),
        values.new_empty(2, num_sequences, chunk_size, width, dtype=dtype),
        values.new_empty(5, num_sequences, chunk_size, dtype=torch.float32),
    )


def segment_strides(segment: torch.Tensor | None, batch: int) -> tuple[int, int]:
    return (0, 0) if segment is None else segment.expand(batch, -1).stride()


def pairs_options(query, values, segment, kernel, num_blocks):
    """What all three kernels of pairs are compiled for."""
    c1, c2 = split_coordinates(num_coordinates(kernel, query.shape[-1]))
    precision = dot_precision(values.dtype)
    return {
        "SQUARED": KERNELS[kernel][1], "SEGMENTS": segment is not None, "C1": c1, "C2": c2, "dv": values.shape[-1],
        "SIMILARITY": precision, "PRECISION": precision, "NUM_BLOCKS": triton.next_power_of_2(num_blocks),
        "BLOCK": block_size(values.dtype), "BLOCK_V": max(16, triton.next_power_of_2(values.shape[-1])),
    }  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::prefix_sums", mutates_args=())
@on_own_device
def prefix_sums_op(x: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """
    Sums up to each place of the last dimension, or from each place on. An operator of its own, as PyTorch 2.11 fails
    to compile sums for a GPU together with what they are sums of, and long ones alone.
    """
    x = x.contiguous()
    return x.flip(-1).cumsum(-1, dtype=x.dtype).flip(-1) if reverse else x.cumsum(-1, dtype=x.dtype)


@prefix_sums_op.register_fake
def _(x, reverse=False):
    return x.new_empty(x.shape)


def save_direction(ctx, inputs, output):
    ctx.reverse = inputs[1]


def prefix_sums_backward(ctx, grad):
    return prefix_sums_op(grad, not ctx.reverse), None


prefix_sums_op.register_autograd(prefix_sums_backward, setup_context=save_direction)


@torch.library.custom_op(f"{NAMESPACE}::memory_pairs", mutates_args=())
@on_own_device
def memory_pairs_op(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    segment: torch.Tensor | None,
    kernel: str,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`memory_pairs_triton`], and what its backward starts from: see [`empty_intermediates`]."""
    batch, length, num_heads = query.shape[:3]
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    intermediates = empty_intermediates(query, values, kernel, chunk_size)
    if output.numel() == 0:
        return output, *intermediates
    values, strides = unit_stride(values), segment_strides(segment, batch)
    query_coordinates, key_coordinates, decays = intermediates
    num_sequences, num_chunks = decays.shape[1], count_chunks(length, chunk_size)
    block = block_size(values.dtype)
    num_blocks = ceil_div(chunk_size, block)
    grid, sizes = (num_blocks * num_sequences,), (num_blocks, num_heads, num_chunks, chunk_size, length)
    decays_kernel[grid](
        log_decay, segment, decays, *sizes, *log_decay.stride(), *strides,
        MIN_LOG_DECAY=MIN_LOG_DECAY, SEGMENTS=segment is not None, BLOCK=block, num_warps=2,
    )  # fmt: skip
    # A query is entered through its block's beginning, a key leaves through its end.
    for frames, decay, coordinates in ((query, decays[2], query_coordinates), (key, decays[3], key_coordinates)):
        frames = unit_stride(frames)
        options, blocks = coordinates_options(kernel, frames, chunk_size)
        coordinates_kernel[(blocks * num_sequences,)](
            frames, segment, decay, coordinates, blocks, num_heads, num_chunks, chunk_size, length,
            *frames.stride()[:4], *strides,
            SQUARED=KERNELS[kernel][1], SEGMENTS=segment is not None, **options,
        )  # fmt: skip
    pairs_kernel[grid](
        query_coordinates[0], *key_coordinates, values, decays, segment, output,
        *sizes, *values.stride()[:3], *strides,
        **pairs_options(query, values, segment, kernel, num_blocks),
        **launch_options(query, values, kernel, "pairs"),
    )  # fmt: skip
    return output, *intermediates


@memory_pairs_op.register_fake
def _(query, key, values, log_decay, segment, kernel, chunk_size):
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    return output, *empty_intermediates(query, values, kernel, chunk_size)


@torch.library.custom_op(f"{NAMESPACE}::memory_pairs_backward", mutates_args=())
@on_own_device
def memory_pairs_backward_op(
    grad: torch.Tensor,
    query_coordinates: torch.Tensor,
    key_coordinates: torch.Tensor,
    decays: torch.Tensor,
    rounded_query: torch.Tensor | None,
    rounded_key: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    segment: torch.Tensor | None,
    kernel: str,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Gradients of the first four arguments of [`memory_pairs_op`]. Rounded coordinates are those times decays, in the
    type of values if it is another one.
    """
    batch, length, num_heads = query.shape[:3]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, values, log_decay)]
    if grad.numel() == 0:
        return tuple(gradient.zero_() for gradient in grads)
    num_sequences, num_chunks = decays.shape[1], count_chunks(length, chunk_size)
    block = block_size(values.dtype)
    num_blocks = ceil_div(chunk_size, block)
    grad, values, strides = grad.contiguous(), unit_stride(values), segment_strides(segment, batch)
    # Of queries, then of keys.
    grad_coordinates = torch.empty_like(query_coordinates, dtype=grad.dtype)
    sums = grad.new_empty(2, num_sequences, chunk_size, dtype=torch.float32)
    block_sums = grad.new_empty(2, num_sequences, num_blocks, dtype=torch.float32)
    grid = (num_blocks * num_sequences,)
    sizes = (num_blocks, num_heads, num_chunks, chunk_size, length)
    options = pairs_options(query, values, segment, kernel, num_blocks)
    inputs = (values, decays, segment, grad)
    query_backward_kernel[grid](
        query_coordinates[0], *key_coordinates, rounded_key, *inputs, grad_coordinates[0], sums[0], block_sums[0],
        *sizes, *values.stride()[:3], *strides,
        **options, **launch_options(query, values, kernel, "query_backward"),
    )  # fmt: skip
    key_backward_kernel[grid](
        *query_coordinates, rounded_query, key_coordinates[0], *inputs,
        grad_coordinates[1], grads[2], sums[1], block_sums[1],
        *sizes, *values.stride()[:3], *strides,
        **options, **launch_options(query, values, kernel, "key_backward"),
    )  # fmt: skip
    decays_backward_kernel[grid](
        log_decay, segment, sums, block_sums, grads[3], *sizes, *log_decay.stride(), *strides,
        MIN_LOG_DECAY=MIN_LOG_DECAY, SEGMENTS=segment is not None, NUM_BLOCKS=options["NUM_BLOCKS"], BLOCK=block,
        num_warps=2,
    )  # fmt: skip
    for frames, grad_frames, of_coordinates in zip((query, key), grads, grad_coordinates):
        frames = unit_stride(frames)
        options, blocks = coordinates_options(kernel, frames, chunk_size)
        coordinates_backward_kernel[(blocks * num_sequences,)](
            frames, segment, of_coordinates, grad_frames, blocks, num_heads, num_chunks, chunk_size, length,
            *frames.stride()[:4], *strides,
            SEGMENTS=segment is not None, **options,
        )  # fmt: skip
    return tuple(grads)


@memory_pairs_backward_op.register_fake
def _(grad, query_coordinates, key_coordinates, decays, rounded_query, rounded_key, query, key, values, log_decay, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, values, log_decay))


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.kernel, ctx.chunk_size = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def pairs_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    *coordinates, decays, query, key, values, log_decay, segment = ctx.saved_tensors
    # Products with gradients take coordinates in the type of values. Those that are loaded ahead would be rounded in
    # registers and stored again. Here compiled code does it in a third of the time that PyTorch takes.
    rounded = (None if x.dtype == values.dtype else x[1].to(values.dtype) for x in coordinates)
    inputs = (query, key, values, log_decay, segment)
    grads = memory_pairs_backward_op(grad, *coordinates, decays, *rounded, *inputs, ctx.kernel, ctx.chunk_size)
    return *grads, None, None, None


memory_pairs_op.register_autograd(pairs_backward, setup_context=save_for_backward)


def memory_pairs_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    segment: torch.Tensor | None,
    kernel: str,
    chunk_size: int,
) -> torch.Tensor:
    """
    The sum of [`grassmann_memory.grassmann_memory`] over the pairs of tokens inside of each chunk.

    Products are in the type of `values`, similarities of planes in at least ten bits: [`coordinate_dtype`].

    Args:
        query, key (`torch.Tensor` of shape `(B, T, H, m, r)`): frames.
        values (`torch.Tensor` of shape `(B, T, H, dv)`): what is read.
        log_decay (`torch.Tensor` of shape `(B, T, H)`): not positive; what padding and first tokens hold is not used.
        segment (`torch.IntTensor` of shape `(B, T)` or `(1, T)`, *optional*):
            Number `n` of the sequence of each token, never falling along a row, and `-1 - n` for padding. By default
            each row is one sequence.
        kernel (`str`): a key of `KERNELS`.
        chunk_size (`int`): tokens in a chunk; `T` for the whole sum.

    Returns:
        `torch.Tensor` of shape `(B, T, H, dv)`.
    """
    if key.dtype != query.dtype:
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    chunk_size = min(chunk_size, query.shape[1])
    output, *_ = memory_pairs_op(query, key, values, log_decay, segment, kernel, chunk_size)
    return output
