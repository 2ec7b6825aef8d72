# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""Orthonormal frames of planes in fused Triton kernels, forward and backward, without Transformers.

[`orthonormalise_triton`] computes what `grassmann_memory.orthonormalise` does: from two vectors `a` and `b` the unit
vectors :math:`d = a / \|a\|` and :math:`t = p / \|p\|`, where :math:`p = b - \langle d, b \rangle d`. Each number is
read and written once, where sums over a few neighbouring numbers in compiled code take several times as long.

**Gradients.** With :math:`\bar p = (\bar t - \langle \bar t, t \rangle t) / \|p\|`, those of `b` and `d` are
:math:`\bar p - \langle d, \bar p \rangle d` and
:math:`\bar d - \langle d, b \rangle \bar p - \langle d, \bar p \rangle b`; the one of `a` is the part of the latter
that is perpendicular to `d`, over :math:`\|a\|`.
"""

import re

import torch

from .plucker_triton import ceil_div, on_own_device, unit_direction, unit_tangent


# Optional packages are imported inside of `try`: Transformers demands what it finds elsewhere in a file that travels
# with a checkpoint. `grassmann_memory.py` does without this file where there is no Triton.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise


# Numbers of each of the two vectors that a program holds.
BLOCK_SIZE = 2048
# Operators are named after the module, so that code that travels with a checkpoint never meets the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)


@triton.jit
def load_pairs(vectors, plane, num_planes, num_heads, stride, r: tl.constexpr, BLOCK_R: tl.constexpr):
    """Two vectors for each plane of a block, from tokens of some stride: `(BLOCK, BLOCK_R)`."""
    column = tl.arange(0, BLOCK_R)
    pointers = vectors + (plane // num_heads).to(tl.int64) * stride + plane % num_heads * (2 * r)
    pointers = pointers[:, None] + column[None, :]
    mask = (plane < num_planes)[:, None] & (column < r)[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + r, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(vectors, plane, num_planes, first, second, r: tl.constexpr, BLOCK_R: tl.constexpr):
    column = tl.arange(0, BLOCK_R)
    pointers = vectors + plane.to(tl.int64)[:, None] * (2 * r) + column[None, :]
    mask = (plane < num_planes)[:, None] & (column < r)[None, :]
    tl.store(pointers, first.to(vectors.dtype.element_ty), mask=mask)
    tl.store(pointers + r, second.to(vectors.dtype.element_ty), mask=mask)


@triton.jit
def frames_kernel(
    vectors, frames, num_planes, num_heads, stride, eps, r: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Frames of planes, zeros where two vectors span none: `(N, H, 2, r)`."""
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = load_pairs(vectors, plane, num_planes, num_heads, stride, r, BLOCK_R)
    direction, inverse = unit_direction(first)
    tangent, _, inverse_tangent = unit_tangent(direction, second, inverse > 0, eps)
    direction = tl.where((inverse_tangent > 0)[:, None], direction, 0.0)
    store_pairs(frames, plane, num_planes, direction, tangent, r, BLOCK_R)


@triton.jit
def frames_backward_kernel(
    vectors, grad_frames, grad_vectors, num_planes, num_heads, stride, eps,
    r: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of vectors, `(N, H, 2, r)`."""
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = load_pairs(vectors, plane, num_planes, num_heads, stride, r, BLOCK_R)
    grad_direction, grad_tangent = load_pairs(
        grad_frames, plane, num_planes, num_heads, num_heads * (2 * r), r, BLOCK_R
    )
    direction, inverse = unit_direction(first)
    tangent, inner, inverse_tangent = unit_tangent(direction, second, inverse > 0, eps)
    spans = (inverse_tangent > 0)[:, None]
    along = tl.sum(grad_tangent * tangent, axis=1)
    grad_perpendicular = (grad_tangent - along[:, None] * tangent) * inverse_tangent[:, None]
    along = tl.sum(direction * grad_perpendicular, axis=1)
    grad_second = grad_perpendicular - along[:, None] * direction
    grad_direction -= inner[:, None] * grad_perpendicular + along[:, None] * second
    along = tl.sum(direction * grad_direction, axis=1)
    grad_first = (grad_direction - along[:, None] * direction) * inverse[:, None]
    grad_first, grad_second = tl.where(spans, grad_first, 0.0), tl.where(spans, grad_second, 0.0)
    store_pairs(grad_vectors, plane, num_planes, grad_first, grad_second, r, BLOCK_R)


def by_token(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors as `(N, H, 2, r)`, without a copy where only the first dimension has a stride of its own."""
    vectors = vectors.reshape(-1, *vectors.shape[-3:]) if vectors.dim() > 2 else vectors[None, None]
    return vectors if vectors[:1].is_contiguous() else vectors.contiguous()


def launch(vectors: torch.Tensor) -> tuple[tuple[int], list[int], dict[str, int]]:
    """Grid, sizes and what both kernels are compiled for, of vectors from [`by_token`]."""
    num_tokens, num_heads, _, r = vectors.shape
    block_r = triton.next_power_of_2(r)
    block = max(1, BLOCK_SIZE // block_r)
    num_planes = num_tokens * num_heads
    sizes = [num_planes, num_heads, vectors.stride(0)]
    return (ceil_div(num_planes, block),), sizes, {"r": r, "BLOCK": block, "BLOCK_R": block_r}


@torch.library.custom_op(f"{NAMESPACE}::frames", mutates_args=())
@on_own_device
def frames_op(vectors: torch.Tensor, eps: float) -> torch.Tensor:
    """[`orthonormalise_triton`]."""
    frames = torch.empty_like(vectors, dtype=torch.float32, memory_format=torch.contiguous_format)
    if frames.numel():
        vectors = by_token(vectors)
        grid, sizes, options = launch(vectors)
        frames_kernel[grid](vectors, frames, *sizes, eps, **options)
    return frames


@frames_op.register_fake
def _(vectors, eps):
    return torch.empty_like(vectors, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::frames_backward", mutates_args=())
@on_own_device
def frames_backward_op(grad: torch.Tensor, vectors: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient of the vectors of [`frames_op`], in their type."""
    result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    if result.numel():
        vectors = by_token(vectors)
        grid, sizes, options = launch(vectors)
        frames_backward_kernel[grid](vectors, grad.contiguous(), result, *sizes, eps, **options)
    return result


@frames_backward_op.register_fake
def _(grad, vectors, eps):
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def save_for_backward(ctx, inputs, output):
    vectors, ctx.eps = inputs
    ctx.save_for_backward(vectors)


def frames_backward(ctx, grad):
    return frames_backward_op(grad, *ctx.saved_tensors, ctx.eps), None


frames_op.register_autograd(frames_backward, setup_context=save_for_backward)


def orthonormalise_triton(vectors: torch.Tensor, eps: float) -> torch.Tensor:
    """
    Orthonormal frames of planes, exact zeros with zero gradients where two vectors span none.

    Args:
        vectors (`torch.Tensor` of shape `(..., 2, r)`): two vectors for each plane, in bfloat16, float16 or float32.
        eps (`float`): sine of the angle up to which two vectors count as parallel.

    Returns:
        float32 `torch.Tensor` of shape `(..., 2, r)`.
    """
    return frames_op(vectors, eps)
