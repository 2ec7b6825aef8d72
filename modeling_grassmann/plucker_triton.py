# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The Plücker mixer in fused Triton kernels, forward and backward."""

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def why_not_triton(vectors: torch.Tensor) -> str | None:
    if triton is None:
        return "Triton is not installed"
    return "not written yet"


def plucker_features_triton(query, source, weight, bias, offsets, positions, offset_weights, eps) -> torch.Tensor:
    raise NotImplementedError
