# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""The decoding step of the Grassmann memory in one Triton kernel, without Transformers.

[`memory_step`] writes a token into the state of squared similarities, and reads it:
:math:`S' = a S + \varphi(K) v^\top` and :math:`o = S'^\top \varphi(Q)`, where the features φ are
`grassmann_memory.Products` of two coordinates each. They are made in registers, so that the state is read and written
once, and nothing else is as large.
"""

import re

import torch

from .grassmann_memory_triton import KERNELS
from .plucker_triton import ceil_div


# As in `grassmann_memory_triton.py`.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


# Features and channels of a state that a program holds at a time.
BLOCK, BLOCK_V = 128, 16
NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def coordinate(frame, i, j, inside, r: tl.constexpr, KIND: tl.constexpr):
    """The coordinate that entries `i` and `j` of a plane's vectors make, or entry `i` of a vector."""
    result = tl.load(frame + i, mask=inside, other=0.0)
    if KIND == "wedge":
        result *= tl.load(frame + r + j, mask=inside, other=0.0)
        result -= tl.load(frame + j, mask=inside, other=0.0) * tl.load(frame + r + i, mask=inside, other=0.0)
    return result


@triton.jit
def products(frame, entries, weight, feature, F: tl.constexpr, r: tl.constexpr, KIND: tl.constexpr):
    """Weighted products of two coordinates, zeros where there is no such feature: `(BLOCK,)`."""
    inside = (feature >= 0) & (feature < F)
    i = tl.load(entries + feature, mask=inside, other=0)
    j = tl.load(entries + F + feature, mask=inside, other=0)
    k = tl.load(entries + 2 * F + feature, mask=inside, other=0)
    m = tl.load(entries + 3 * F + feature, mask=inside, other=0)
    first = coordinate(frame, i, j, inside, r, KIND)
    second = coordinate(frame, k, m, inside, r, KIND)
    return first * second * tl.load(weight + feature, mask=inside, other=0.0)


@triton.jit
def features(
    frame, entries, weight, feature, OVERLAP: tl.constexpr, F: tl.constexpr, r: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    result = products(frame, entries, weight, feature, F, r, KIND)
    if OVERLAP > 0:
        before = tl.where((feature >= F - OVERLAP) & (feature < F), feature - OVERLAP, -1)
        result += 0.5773502691896258 * products(frame, entries, weight, before, F, r, KIND)
    return result


@triton.jit
def step_kernel(
    query, key, values, factor, memory, entries, weight, output, new_memory,
    OVERLAP: tl.constexpr, F: tl.constexpr, r: tl.constexpr, dv: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One head's state of one row, for some channels."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    VECTORS: tl.constexpr = 2 if KIND == "wedge" else 1
    query += sequence * (VECTORS * r)
    key += sequence * (VECTORS * r)
    v = tl.load(values + sequence * dv + channel, mask=channel < dv, other=0.0)
    a = tl.load(factor + sequence)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, F, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        written = features(key, entries, weight, feature, OVERLAP, F, r, KIND)
        read = features(query, entries, weight, feature, OVERLAP, F, r, KIND)
        place = (sequence * F + feature)[:, None] * dv + channel[None, :]
        mask = (feature < F)[:, None] & (channel < dv)[None, :]
        state = a * tl.load(memory + place, mask=mask, other=0.0) + written[:, None] * v[None, :]
        tl.store(new_memory + place, state, mask=mask)
        total += tl.sum(read[:, None] * state, axis=0)
    tl.store(output + sequence * dv + channel, total, mask=channel < dv)


@torch.library.custom_op(f"{NAMESPACE}::memory_step", mutates_args=())
def memory_step(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    factor: torch.Tensor,
    memory: torch.Tensor,
    entries: torch.Tensor,
    weight: torch.Tensor,
    overlap: int,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Write a token and read the state that it leaves, without gradients; all tensors but `entries` in float32.

    Args:
        query, key (`torch.Tensor` of shape `(B, H, m, r)`): frames, zeros where nothing is written.
        values (`torch.Tensor` of shape `(B, H, dv)`): what is written.
        factor (`torch.Tensor` of shape `(B, H)`): what the state is multiplied by.
        memory (`torch.Tensor` of shape `(B, H, F, dv)`): the state.
        entries (`torch.IntTensor` of shape `(4, F)`): entries of frames in the two factors of each product.
        weight (`torch.Tensor` of shape `(F,)`), overlap (`int`): see `grassmann_memory.Products`.
        kernel (`str`): the name of a kernel that is a square.

    Returns:
        What is read, `(B, H, dv)`, and the new state.
    """
    batch, num_heads, num_features, value_size = memory.shape
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    new_memory = torch.empty_like(memory, memory_format=torch.contiguous_format)
    if memory.numel():
        step_kernel[(batch * num_heads, ceil_div(value_size, BLOCK_V))](
            query.contiguous(), key.contiguous(), values.contiguous(), factor.contiguous(), memory.contiguous(),
            entries, weight, output, new_memory, OVERLAP=overlap, F=num_features, r=query.shape[-1], dv=value_size,
            KIND=KERNELS[kernel][0], BLOCK=BLOCK, BLOCK_V=BLOCK_V,
        )  # fmt: skip
    return output, new_memory


@memory_step.register_fake
def _(query, key, values, factor, memory, entries, weight, overlap, kernel):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (values, memory))
