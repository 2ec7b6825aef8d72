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

from .plucker_triton import ceil_div, unit_direction, unit_tangent


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
def load_pairs(vectors, num_planes, r: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Two vectors for each plane of a block, `(BLOCK, BLOCK_R)`; where they lie in the tensor, and what is inside."""
    plane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_R)
    place = plane.to(tl.int64)[:, None] * (2 * r) + column[None, :]
    inside = (plane < num_planes)[:, None] & (column < r)[None, :]
    first = tl.load(vectors + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(vectors + place + r, mask=inside, other=0.0).to(tl.float32)
    return first, second, place, inside


@triton.jit
def frames_kernel(
    vectors, frames, num_planes, eps, r: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Frames of planes, zeros where two vectors span none: `(N, 2, r)`."""
    first, second, place, inside = load_pairs(vectors, num_planes, r, BLOCK, BLOCK_R)
    direction, inverse = unit_direction(first)
    tangent, _, inverse_tangent = unit_tangent(direction, second, inverse > 0, eps)
    tl.store(frames + place, tl.where((inverse_tangent > 0)[:, None], direction, 0.0), mask=inside)
    tl.store(frames + place + r, tangent, mask=inside)


@triton.jit
def frames_backward_kernel(
    vectors, grad_frames, grad_vectors, num_planes, eps, r: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Gradients of vectors, `(N, 2, r)`."""
    first, second, place, inside = load_pairs(vectors, num_planes, r, BLOCK, BLOCK_R)
    grad_direction, grad_tangent, _, _ = load_pairs(grad_frames, num_planes, r, BLOCK, BLOCK_R)
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
    dtype = grad_vectors.dtype.element_ty
    tl.store(grad_vectors + place, tl.where(spans, grad_first, 0.0).to(dtype), mask=inside)
    tl.store(grad_vectors + place + r, tl.where(spans, grad_second, 0.0).to(dtype), mask=inside)


def launch(vectors: torch.Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, number of planes, and what both kernels are compiled for."""
    r = vectors.shape[-1]
    block_r = triton.next_power_of_2(r)
    block = max(1, BLOCK_SIZE // block_r)
    num_planes = vectors.numel() // (2 * r)
    return (ceil_div(num_planes, block),), num_planes, {"r": r, "BLOCK": block, "BLOCK_R": block_r}


@torch.library.custom_op(f"{NAMESPACE}::frames", mutates_args=())
def frames_op(vectors: torch.Tensor, eps: float) -> torch.Tensor:
    """[`orthonormalise_triton`]."""
    frames = torch.empty_like(vectors, dtype=torch.float32, memory_format=torch.contiguous_format)
    if frames.numel():
        grid, num_planes, options = launch(vectors)
        frames_kernel[grid](vectors.contiguous(), frames, num_planes, eps, **options)
    return frames


@frames_op.register_fake
def _(vectors, eps):
    return torch.empty_like(vectors, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::frames_backward", mutates_args=())
def frames_backward_op(grad: torch.Tensor, vectors: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient of the vectors of [`frames_op`], in their type."""
    result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    if result.numel():
        grid, num_planes, options = launch(vectors)
        frames_backward_kernel[grid](vectors.contiguous(), grad.contiguous(), result, num_planes, eps, **options)
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
