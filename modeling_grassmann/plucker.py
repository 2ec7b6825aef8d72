# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""The Plücker mixer of Causal Grassmann models (arXiv 2512.19428), in plain PyTorch and without Transformers.

A token's reduced vector :math:`z_t` and an earlier token's :math:`z_{t-\Delta}` span a plane, a point on the Grassmann
manifold Gr(2, r). Its Plücker coordinates are the wedge product

.. math:: (z_t \wedge z_{t-\Delta})_{ij} = z_{t,i} z_{t-\Delta,j} - z_{t,j} z_{t-\Delta,i}, \qquad i < j,

a vector of length :math:`P = r(r-1)/2`, scaled to unit norm. The mixer projects these coordinates back to the hidden
size, averages them over the offsets and gates them into the hidden state.

[`plucker_features`] computes the projected average in one of three ways that give the same result:

- `"naive"` follows the paper line by line: one wedge, one norm and one projection per token *and offset*.
- `"torch"` is the exact collapse. The wedge is bilinear and all pairs of a token share its first factor. With
  :math:`\hat z = z / \|z\|` and :math:`y^\perp = y - \langle \hat z, y \rangle \hat z` one has
  :math:`z \wedge y = z \wedge y^\perp` and :math:`\|z \wedge y\| = \|z\| \|y^\perp\|`, so that the normalised plane is
  :math:`\hat z \wedge \hat y^\perp` and the average over offsets moves inside:
  :math:`\hat z_t \wedge \mathrm{mean}_\Delta\, \hat y^\perp_\Delta`. One wedge and one projection per token are left,
  and the norm of a wedge costs O(r) instead of O(r²).
- `"triton"` is the collapse in fused GPU kernels, in `plucker_triton.py`.

Two rules hold in all:

- **Pairs.** `(t, t - Δ)` is a pair only if both tokens are real and their positions differ by exactly Δ. That one rule
  makes left padding, right padding and packed sequences exact.
- **Degenerate pairs.** Parallel vectors span no plane. A pair with a zero vector, or with
  :math:`\|y^\perp\| \le \epsilon \|y\|`, contributes an exactly zero wedge and an exactly zero gradient, and still
  counts as a pair. (Dividing by a clamped norm instead turns rounding noise into features of unit size.)
"""

import os
import warnings

import torch
from torch import nn
from torch.nn import functional as F


try:
    from .plucker_triton import plucker_features_triton, plucker_mixer_triton, why_not_triton
except ImportError:
    plucker_features_triton = None

# Names the backend of every mixer that leaves the choice open.
BACKEND_VARIABLE = "GRASSMANN_BACKEND"

# The position of a token that takes part in no pair, such as padding: it differs from no position by an offset.
NO_POSITION = -(2**31)


def num_plucker_coordinates(reduced_size: int) -> int:
    """Number of Plücker coordinates of a plane in R^r: `r (r - 1) / 2`."""
    return reduced_size * (reduced_size - 1) // 2


def wedge(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Plücker coordinates `z_i y_j - z_j y_i`, `i < j`, of the plane of `z` and `y`: `(..., r)` -> `(..., P)`."""
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], offset=1, device=z.device)
    return z[..., i] * y[..., j] - z[..., j] * y[..., i]


def halves(vectors: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Split the `r` entries of dimension 1 in two halves, these again, and so on to single entries: `(H, r, n)` -> a pair
    of `(H, G, s, n)` for each of about log2(r) levels, the first and the second halves of its `G` groups. Any two
    entries are on different sides exactly once, so that views alone find all pairs. Odd groups get one zero more.
    """
    levels, groups = [], vectors[:, None]
    while groups.shape[2] > 1:
        if groups.shape[2] % 2 == 1:
            groups = F.pad(groups, (0, 0, 0, 1))
        groups = groups.unflatten(2, (2, -1))  # (H, G, 2, s, n)
        levels.append(groups.unbind(2))
        groups = groups.flatten(1, 2)  # (H, 2G, s, n)
    return levels


def wedge_of_halves(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """
    [`wedge`] in another order, that of [`halves`], and with zeros for entries that are none: `(H, r, n)` ->
    `(H, Q, n)`. No gather, whose backward is a scatter-add, runs over the `n` tokens, which stay contiguous.
    """
    levels = [
        z_i[:, :, :, None] * y_j[:, :, None] - y_i[:, :, :, None] * z_j[:, :, None]  # (H, G, s, s, n)
        for (z_i, z_j), (y_i, y_j) in zip(halves(z), halves(y))
    ]
    return torch.cat([level.flatten(1, 3) for level in levels], dim=1)


def columns_of_halves(weight: torch.Tensor, num_heads: int, reduced_size: int) -> torch.Tensor:
    """Columns of a projection of [`wedge`] in the order of [`wedge_of_halves`]: `(d, H * P)` -> `(d, H * Q)`."""
    index = torch.arange(reduced_size, device=weight.device)
    # The place of (i, j) in `torch.triu_indices`. Any will do where there is no such entry and the coordinate is zero.
    levels = [
        (i * (2 * reduced_size - 1 - i) // 2 - i - 1)[:, :, :, None] + j[:, :, None]  # (1, G, s, s, 1)
        for i, j in halves(index[None, :, None])
    ]
    columns = torch.cat([level.flatten() for level in levels]).clamp(min=0)
    return weight.unflatten(-1, (num_heads, -1))[..., columns].flatten(1)  # (d, H, Q) -> (d, H * Q)


def shift(source: torch.Tensor, delta: int, query_length: int) -> torch.Tensor:
    """
    The neighbour at distance `delta` of each of the last `query_length` entries along dimension 1: `(B, S, ...)` ->
    `(B, T, ...)`. Entries without a neighbour hold an arbitrary one: [`is_pair`] tells them.
    """
    return torch.roll(source, delta, dims=1)[:, source.shape[1] - query_length :]


def is_pair(positions: torch.Tensor, delta: int, query_length: int) -> torch.Tensor:
    """
    Whether each of the last `query_length` tokens forms a pair with its neighbour at distance `delta`.

    Args:
        positions (`torch.Tensor` of shape `(B, S)`): position of each token in its sequence, [`NO_POSITION`] for none.
        delta (`int`): positive for a neighbour in the past, negative for one in the future.

    Returns:
        boolean `torch.Tensor` of shape `(B, T)`.
    """
    length = positions.shape[1]
    neighbour = torch.arange(length - query_length, length, device=positions.device) - delta
    queries, neighbours = positions[:, length - query_length :], shift(positions, delta, query_length)
    real = (queries != NO_POSITION) & (neighbours != NO_POSITION)
    return real & (queries - neighbours == delta) & (neighbour >= 0) & (neighbour < length)


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch_size: int, name: str) -> None:
    """
    Raises:
        ValueError: if these cannot be the boundaries of sequences in one row, as far as shapes tell.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"`{name}` must hold integers, the start of each sequence and the end of the last one, in shape "
            f"(num_sequences + 1,). Got {cu_seqlens.dtype} in shape {tuple(cu_seqlens.shape)}."
        )
    if batch_size != 1:
        raise ValueError(f"`{name}` needs a batch of one row, in which all sequences lie. Got {batch_size} rows.")


def positions_from_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """
    Position of each token of a packed row in its sequence.

    Args:
        cu_seqlens (integer `torch.Tensor` of shape `(num_sequences + 1,)`):
            Start of each sequence, from 0, and end of the last one. Tokens behind it are one more sequence.
        length (`int`): of the row.

    Returns:
        `torch.LongTensor` of shape `(1, length)`.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    cu_seqlens = cu_seqlens.long()
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return (tokens - cu_seqlens[sequence.clamp(min=0)])[None]


def separate_sequences(positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """
    Move the positions `(1, T)` of each sequence of a packed row so far away that it forms no pair with another one.
    Those of the last one stay, so that decoding may go on from it.
    """
    tokens = torch.arange(positions.shape[1], device=positions.device)[None]
    starts = tokens - positions_from_cu_seqlens(cu_seqlens, positions.shape[1])
    return positions + (starts - starts[:, -1:]) * 2**32


def positions_with_boundaries(
    positions: torch.Tensor | None, cu_seqlens: torch.Tensor, hidden_states: torch.Tensor
) -> torch.Tensor:
    """
    Positions `(1, T)` for a mixer of packed tokens `(1, T, d)`, which are those given, or count from each boundary.

    Raises:
        ValueError: if these cannot be boundaries.
    """
    check_cu_seqlens(cu_seqlens, hidden_states.shape[0], "cu_seqlens")
    if positions is None:
        return positions_from_cu_seqlens(cu_seqlens, hidden_states.shape[1])
    return separate_sequences(positions, cu_seqlens)


def plucker_features_naive(query, source, weight, bias, offsets, positions, offset_weights, eps) -> torch.Tensor:
    """[`plucker_features`], one offset after the other as the paper writes it: the reference for other backends."""
    total, count = 0.0, 0
    for index, delta in enumerate(offsets):
        past = shift(source, delta, query.shape[1])
        pair = is_pair(positions, delta, query.shape[1])[..., None]  # (B, T, 1)
        planes = wedge(query, past)  # (B, T, H, P)
        square = planes.square().sum(-1, keepdim=True)
        # ‖z ∧ y‖ = ‖z‖ ‖y⊥‖, so this compares ‖y⊥‖ with eps ‖y‖.
        spans = square > eps**2 * query.square().sum(-1, keepdim=True) * past.square().sum(-1, keepdim=True)
        planes = torch.where(spans, planes * torch.where(spans, square, 1).rsqrt(), 0)
        if offset_weights is not None:
            planes = planes * offset_weights[:, index, None]
        features = F.linear(planes.flatten(-2).to(weight.dtype), weight, bias)  # (B, T, d)
        total = total + torch.where(pair, features, 0)
        count = count + pair
    return total / count.clamp(min=1)


def unit(vectors: torch.Tensor, above: torch.Tensor | float = 0.0, where: torch.Tensor | None = None) -> torch.Tensor:
    """
    Scale `(..., r)` to unit norm `where` the squared norm is `above` a bound, both `(..., 1)`, and to exact zeros with
    zero gradients elsewhere.
    """
    square = vectors.square().sum(-1, keepdim=True)
    nonzero = square > above if where is None else where & (square > above)
    return torch.where(nonzero, vectors * torch.where(nonzero, square, 1).rsqrt(), 0)


def unit_tangent(direction: torch.Tensor, neighbour: torch.Tensor, pair: torch.Tensor, eps: float) -> torch.Tensor:
    """
    Unit vector perpendicular to `direction` in its plane with `neighbour`; zeros where there is no pair or no plane.

    Args:
        direction (`torch.Tensor` of shape `(..., r)`): of unit norm, or zero.
        neighbour (`torch.Tensor` of shape `(..., r)`): the vectors that span planes with it.
        pair (boolean `torch.Tensor` of shape `(..., 1)`): which of them count.
        eps (`float`): sine of the angle up to which two vectors count as parallel.

    Returns:
        `torch.Tensor` of shape `(..., r)`.
    """
    perpendicular = neighbour - (direction * neighbour).sum(-1, keepdim=True) * direction
    # ‖z ∧ y‖ = ‖z‖ ‖y⊥‖, and `direction` has unit norm.
    return unit(perpendicular, eps**2 * neighbour.square().sum(-1, keepdim=True), pair)


def project_planes(direction, tangent, weight, bias, has_pair) -> torch.Tensor:
    """
    `W (direction ∧ tangent) + b`, without bias where a token has no pair: what is left to do after the collapse.

    Args:
        direction, tangent (`torch.Tensor` of shape `(B, T, H, r)`): both factors of the wedge.
        weight (`torch.Tensor` of shape `(d, H * P)`), bias (`torch.Tensor` of shape `(d,)`, *optional*): `W`, `b`.
        has_pair (boolean `torch.Tensor` of shape `(B, T, 1)`): whether a token has a pair.

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.
    """
    num_heads, reduced_size = direction.shape[2:]
    if direction.shape[1] == 1:
        # In a decoding step, bringing the weight in order would cost more than everything else.
        i, j = torch.triu_indices(reduced_size, reduced_size, offset=1, device=direction.device)
        outer = direction[..., :, None] * tangent[..., None, :]  # (B, 1, H, r, r)
        coordinates = (outer - outer.mT)[..., i, j].flatten(2)  # (B, 1, H * P)
        features = F.linear(coordinates.to(weight.dtype), weight)
    else:
        z, y = (vectors.flatten(0, 1).permute(1, 2, 0).contiguous() for vectors in (direction, tangent))  # (H, r, n)
        coordinates = wedge_of_halves(z, y).flatten(0, 1).t()  # (H, Q, n) -> (n, H * Q)
        features = F.linear(coordinates.to(weight.dtype), columns_of_halves(weight, num_heads, reduced_size))
        features = features.unflatten(0, direction.shape[:2])
    return features if bias is None else features + bias * has_pair


def stack_neighbours(source, positions, offsets: list[int], query_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The neighbours of the last `query_length` tokens, for each offset: `(B, S, H, r)` -> `(B, T, len(offsets), H, r)`;
    and which of them form pairs, `(B, T, len(offsets))`, by the rule of [`is_pair`].
    """
    past_length = source.shape[1] - query_length
    if not torch.compiler.is_compiling():
        # Farther than any token, an offset finds none, and needs no more padding. Compiled code is for all lengths.
        offsets = [max(-source.shape[1], min(delta, source.shape[1])) for delta in offsets]
    padding = (max(max(offsets) - past_length, 0), max(-min(offsets), 0))
    if any(padding):
        source = F.pad(source, (0, 0, 0, 0, *padding))
        positions = F.pad(positions, padding, value=NO_POSITION)
    # The place where a token's sequence begins: the same for two tokens whose positions differ as their places do.
    start = positions - torch.arange(positions.shape[1], device=positions.device)
    first = past_length + padding[0]

    def take(tensor: torch.Tensor, delta: int) -> torch.Tensor:
        return tensor.narrow(1, first - delta, query_length)

    pair = torch.stack([take(start, delta) for delta in offsets], dim=2) == take(start, 0)[..., None]
    return torch.stack([take(source, delta) for delta in offsets], dim=2), pair


def plucker_features_collapsed(query, source, weight, bias, offsets, positions, offset_weights, eps) -> torch.Tensor:
    """[`plucker_features`] by the exact collapse: one wedge and one projection per token."""
    direction = unit(query)  # (B, T, H, r)
    past, pair = stack_neighbours(source, positions, offsets, query.shape[1])
    tangents = unit_tangent(direction[:, :, None], past, pair[..., None, None], eps)  # (B, T, len(offsets), H, r)
    if offset_weights is not None:
        tangents = tangents * offset_weights.t()[..., None]
    count = pair.sum(-1, keepdim=True)  # (B, T, 1)
    tangent = tangents.sum(2) / count.clamp(min=1)[..., None]
    return project_planes(direction, tangent, weight, bias, count > 0)


BACKENDS = {
    "naive": plucker_features_naive,
    "torch": plucker_features_collapsed,
    "triton": plucker_features_triton,
}


def asked_backend(backend: str) -> str:
    """
    The backend that is asked for, or for `"auto"` what the environment variable `GRASSMANN_BACKEND` names.

    Raises:
        ValueError: for an unknown one.
    """
    asked = os.environ.get(BACKEND_VARIABLE, "auto") if backend == "auto" else backend
    if asked not in ("auto", *BACKENDS):
        source = "`backend`" if backend != "auto" else f"The environment variable {BACKEND_VARIABLE}"
        raise ValueError(f"{source} must be one of {['auto', *BACKENDS]}, got {asked!r}.")
    return asked


def triton_or_torch(asked: str, reason: str | None, is_faster: bool) -> str:
    """
    `"triton"` if it can serve and either it is `asked` for, or `"auto"` is and it `is_faster`; else `"torch"`, with a
    warning if `"triton"` was asked for. `reason` says why it cannot serve; `None` if it can.
    """
    if reason is None and (asked == "triton" or is_faster):
        return "triton"
    # Nobody who left the choice open needs to hear of it. Python shows a warning of one place and text once.
    if asked == "triton" and not torch.compiler.is_compiling():
        warnings.warn(f'The backend "triton" cannot serve: {reason}. "torch" does instead.', stacklevel=3)
    return "torch"


def choose_backend(backend: str, tensor: torch.Tensor, reduced_size: int) -> str:
    """
    The backend that will serve.

    Args:
        backend (`str`): a key of `BACKENDS`, or `"auto"`: what the environment variable `GRASSMANN_BACKEND` names, or
            else `"triton"` on a GPU where it can serve, and `"torch"` where it cannot and for single tokens, as in
            decoding, for which launches cost more than they save.
        tensor (`torch.Tensor` of shape `(B, T, ...)`): what is to be mixed; its device, type and length matter.
        reduced_size (`int`): `r`.

    Raises:
        ValueError: for an unknown backend.
    """
    asked = asked_backend(backend)
    if asked in ("naive", "torch"):
        return asked
    reason = "Triton is not installed" if plucker_features_triton is None else why_not_triton(tensor, reduced_size)
    return triton_or_torch(asked, reason, tensor.is_cuda and tensor.shape[1] > 1)


def plucker_features(
    query: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: list[int],
    positions: torch.Tensor | None = None,
    offset_weights: torch.Tensor | None = None,
    eps: float = 1e-3,
    backend: str = "auto",
) -> torch.Tensor:
    r"""
    Projected Plücker coordinates of each token's planes, averaged over its offsets (arXiv 2512.19428):
    :math:`g_t = \mathrm{mean}_{\Delta}\,(W \hat p^\Delta_t + b)` over the offsets at which the token has a pair, and
    exactly zero, without bias, where it has none.

    Args:
        query (`torch.Tensor` of shape `(B, T, H, r)`):
            Reduced vectors of the tokens, `H` heads of size `r`. Norms are computed in float32 or better.
        source (`torch.Tensor` of shape `(B, S, H, r)`):
            Reduced vectors of their neighbours, `S >= T`: the last `T` belong to the tokens themselves, those before
            them come from a decoding state. The paper's mixer uses `query` itself.
        weight (`torch.Tensor` of shape `(d, H * P)`):
            Projection of the Plücker coordinates, head by head, each in the order of `torch.triu_indices`.
        bias (`torch.Tensor` of shape `(d,)`, *optional*):
            Bias of the projection.
        offsets (`list[int]`):
            Distances Δ to the neighbours; a negative one looks ahead.
        positions (integer `torch.Tensor` of shape `(B, S)` or `(1, S)`, *optional*):
            Position of each source token in its sequence, [`NO_POSITION`] for padding. By default one sequence a row.
        offset_weights (`torch.Tensor` of shape `(H, len(offsets))`, *optional*):
            Factors of the unit planes inside the average.
        eps (`float`, *optional*, defaults to 1e-3):
            Sine of the angle up to which two vectors count as parallel.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"naive"` (reference), `"torch"` (exact collapse), `"triton"` (fused kernels) or `"auto"`: see
            [`choose_backend`].

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.

    Raises:
        ValueError: for an unknown backend, or shapes that do not fit together.
    """
    num_heads, reduced_size = query.shape[2:]
    backend = choose_backend(backend, query, reduced_size)
    if weight.shape[1] != num_heads * num_plucker_coordinates(reduced_size):
        raise ValueError(
            f"`weight` must have {num_heads} x {num_plucker_coordinates(reduced_size)} columns for {num_heads} "
            f"head(s) of size {reduced_size}, got shape {tuple(weight.shape)}."
        )
    if source.shape[2:] != query.shape[2:] or source.shape[1] < query.shape[1]:
        raise ValueError(
            f"`source` must be (batch, length >= {query.shape[1]}, {num_heads}, {reduced_size}) to go with `query` "
            f"{tuple(query.shape)}, got {tuple(source.shape)}."
        )
    if positions is None:
        positions = torch.arange(source.shape[1], device=source.device)[None]
    if backend == "triton":
        return plucker_features_triton(query, source, weight, bias, offsets, positions, offset_weights, eps)
    accurate = torch.promote_types(query.dtype, torch.float32)
    # The geometry stays in float32 under autocast too; only the projection runs in the reduced precision.
    query, source = query.to(accurate), source.to(accurate)
    if offset_weights is not None:
        offset_weights = offset_weights.to(accurate)
    return BACKENDS[backend](query, source, weight, bias, offsets, positions, offset_weights, eps)


def window_pair_weights(window_size: int, num_heads: int, pair_sharing: str) -> torch.Tensor:
    """
    Which mixing head takes which pair of a window's tokens, and with which sign it reaches either of them.

    The plane of a pair is `z_i ∧ z_j` with `i < j`, for both of its tokens; seen from `j` it is `-(z_j ∧ z_i)`.

    Args:
        window_size (`int`): `W`.
        num_heads (`int`): `H`.
        pair_sharing (`str`): `"distance"`: a head takes the pairs at every H-th distance; `"enumeration"`: every H-th
            pair in the order of `torch.triu_indices`.

    Returns:
        `torch.Tensor` of shape `(H, W, W)`, antisymmetric in the last two dimensions: 1, -1 and, where the head does
        not have the pair, 0.
    """
    i, j = torch.triu_indices(window_size, window_size, offset=1)
    head = (j - i - 1 if pair_sharing == "distance" else torch.arange(i.shape[0])) % num_heads
    weights = torch.zeros(num_heads, window_size, window_size)
    weights[head, i, j] = 1.0
    weights[head, j, i] = -1.0
    return weights


def window_sums_by_window(
    reduced: torch.Tensor,
    direction: torch.Tensor,
    pair_weights: torch.Tensor,
    real: torch.Tensor,
    front: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The unit tangents of each token's pairs, summed with their weights, over the windows of which the first starts
    `front` places before the first token. Arguments are those of [`plucker_window_features`].

    Returns:
        Sums of shape `(B, T, H, r)` and numbers of pairs of shape `(B, T, 1)`.
    """
    length, window_size = reduced.shape[1], pair_weights.shape[-1]
    if front + length < window_size:
        # One window, of which only these places hold tokens: the cost of the others is quadratic.
        pair_weights = pair_weights[:, front : front + length, front : front + length]
        front, window_size = 0, length
    padding = (front, -(front + length) % window_size)
    z, z_hat = (
        F.pad(vectors, (0, 0, 0, 0, *padding)).unflatten(1, (-1, window_size)) for vectors in (reduced, direction)
    )  # (B, N, W, H, r)
    inside = F.pad(real, padding).unflatten(1, (-1, window_size))  # (B, N, W)
    other = ~torch.eye(window_size, dtype=torch.bool, device=reduced.device)
    pair = inside[..., :, None] & inside[..., None, :] & other  # (B, N, W, W)
    tangents = unit_tangent(z_hat[:, :, :, None], z[:, :, None], pair[..., None, None], eps)  # (B, N, W, W, H, r)
    tangents = torch.einsum("bnijhr,hij->bnihr", tangents, pair_weights.to(tangents.dtype))
    count = pair.sum(-1).flatten(1, 2)[:, front : front + length, None]  # (B, N, W) -> (B, T, 1)
    return tangents.flatten(1, 2)[:, front : front + length], count  # (B, N, W, H, r) -> (B, T, H, r)


def window_sums_by_token(
    reduced: torch.Tensor,
    direction: torch.Tensor,
    pair_weights: torch.Tensor,
    real: torch.Tensor,
    front: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`window_sums_by_window`] with a gather in the place of views, whose shapes hold for every length."""
    length, window_size = reduced.shape[1], pair_weights.shape[-1]
    token = torch.arange(length, device=reduced.device)
    place = (token + front) % window_size
    neighbour = (token - place)[:, None] + torch.arange(window_size, device=reduced.device)  # (T, W)
    other = (neighbour != token[:, None]) & (neighbour >= 0) & (neighbour < length)
    neighbour = neighbour.clamp(0, length - 1)
    pair = real[:, :, None] & real[:, neighbour] & other  # (B, T, W)
    tangents = unit_tangent(direction[:, :, None], reduced[:, neighbour], pair[..., None, None], eps)
    weights = pair_weights.to(tangents.dtype)[:, place].permute(1, 2, 0)[..., None]  # (T, W, H, 1)
    return (tangents * weights).sum(2), pair.sum(-1, keepdim=True)  # (B, T, W, H, r) -> (B, T, H, r)


def plucker_window_features(
    reduced: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pair_weights: torch.Tensor,
    real: torch.Tensor,
    window_stride: int,
    eps: float = 1e-3,
) -> torch.Tensor:
    r"""
    [`plucker_features`] with other pairs: each token with all others of its windows, ahead and behind. It is the mean
    over these pairs of :math:`\pm W_h \hat p + b`, with the head `h` that takes the pair, by the exact collapse.

    Windows of `W` tokens start at every multiple of `window_stride`, and before the first token as long as they reach
    it, so that every token lies in `W / window_stride` windows. Pairs count once for each window they share.

    Args:
        reduced (`torch.Tensor` of shape `(B, T, H, r)`):
            Reduced vectors of the tokens, `H` heads of size `r`. Norms are computed in float32 or better.
        weight (`torch.Tensor` of shape `(d, H * P)`), bias (`torch.Tensor` of shape `(d,)`, *optional*):
            As in [`plucker_features`].
        pair_weights (`torch.Tensor` of shape `(H, W, W)`):
            Factors of the unit planes `z_i ∧ z_j`, seen from `i`: [`window_pair_weights`].
        real (boolean `torch.Tensor` of shape `(B, T)`):
            Which tokens are no padding.
        window_stride (`int`):
            A divisor of `W`.
        eps (`float`, *optional*, defaults to 1e-3):
            Sine of the angle up to which two vectors count as parallel.

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.
    """
    window_size = pair_weights.shape[-1]
    reduced = reduced.to(torch.promote_types(reduced.dtype, torch.float32))
    direction = unit(reduced)  # (B, T, H, r)
    tangent, count = 0.0, 0
    # Exported programs serve all lengths, and the number of windows is no fixed function of them.
    window_sums = window_sums_by_token if torch.compiler.is_exporting() else window_sums_by_window
    for front in range(0, window_size, window_stride):
        tangents, pairs = window_sums(reduced, direction, pair_weights, real, front, eps)
        tangent, count = tangent + tangents, count + pairs
    tangent = tangent / count.clamp(min=1)[..., None]
    return project_planes(direction, tangent, weight, bias, count > 0)


class PluckerProjection(nn.Module):
    """
    Parameters of [`plucker_features`]. Not an `nn.Linear`: the Plücker coordinates that it would be applied to are
    never formed.

    Args:
        hidden_size (`int`): `d`.
        reduced_size (`int`): `r`, at least 2.
        num_offsets (`int`): number of offsets.
        num_heads (`int`, *optional*, defaults to 1): `H`.
        learned_offset_weights (`bool`, *optional*, defaults to `False`): one factor per head and offset, 1 at first.
        eps (`float`, *optional*, defaults to 1e-3): sine of the angle up to which two vectors count as parallel.
    """

    def __init__(
        self,
        hidden_size: int,
        reduced_size: int,
        num_offsets: int,
        num_heads: int = 1,
        learned_offset_weights: bool = False,
        eps: float = 1e-3,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, num_heads * num_plucker_coordinates(reduced_size)))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.offset_weights = nn.Parameter(torch.empty(num_heads, num_offsets)) if learned_offset_weights else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)
        if self.offset_weights is not None:
            nn.init.ones_(self.offset_weights)

    def forward(
        self,
        query: torch.Tensor,
        source: torch.Tensor,
        offsets: list[int],
        positions: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        return plucker_features(
            query, source, self.weight, self.bias, offsets, positions, self.offset_weights, self.eps, backend
        )

    def extra_repr(self) -> str:
        return f"plucker_coordinates={self.weight.shape[1]}, hidden_size={self.weight.shape[0]}, eps={self.eps}"


def are_plain(*layers: nn.Module | None) -> bool:
    """Whether layers are no more than their parameters: no adapter, quantised weight or hook takes part."""
    for layer in layers:
        if layer is None:
            continue
        own = type(layer) in (nn.Linear, nn.LayerNorm, PluckerProjection)
        if not own or type(layer.weight) not in (torch.Tensor, nn.Parameter):
            return False
        hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
        if any(hooks) or "forward" in vars(layer):
            return False
    return True


def gated_mix(hidden_states: torch.Tensor, features: torch.Tensor, gate_proj: nn.Linear) -> torch.Tensor:
    """`α h + (1 - α) g` with `α = σ(W_gate [h; g] + b)`, all of shape `(B, T, d)`."""
    gate = torch.sigmoid(gate_proj(torch.cat([hidden_states, features], dim=-1)))
    # In fewer passes over memory than as it is written above.
    return features + gate * (hidden_states - features)


class PluckerMixer(nn.Module):
    r"""
    The paper's mixing layer (arXiv 2512.19428), usable on its own:

    .. math:: z = W_{red} h + b, \quad \alpha = \sigma(W_{gate} [h; g] + b), \quad
              \mathrm{LayerNorm}(\alpha h + (1 - \alpha) g)

    with `g` from [`plucker_features`].

    Args:
        hidden_size (`int`): `d`.
        reduced_size (`int`): `r`, the dimension in which planes are spanned, at least 2.
        offsets (`list[int]`): distances to the neighbours, each at least 1.
        is_causal (`bool`, *optional*, defaults to `True`): `False` also pairs each token with those ahead of it.
        num_heads (`int`, *optional*, defaults to 1): independent sets of planes, each of size `r`.
        learned_offset_weights (`bool`, *optional*, defaults to `False`): see [`PluckerProjection`].
        separate_past_projection (`bool`, *optional*, defaults to `False`): reduce neighbours by a projection of
            their own instead of `W_red`.
        out_proj (`bool`, *optional*, defaults to `False`): a linear map between the gate and the norm.
        plucker_eps (`float`, *optional*, defaults to 1e-3): sine of the angle up to which two vectors are parallel.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): of the LayerNorm.
        layer_idx (`int`, *optional*): index of this layer's entry in a decoding state.
        backend (`str`, *optional*, defaults to `"auto"`): what computes the features, see [`plucker_features`].

    Example:

    ```python
    >>> import torch
    >>> from modeling_grassmann import PluckerMixer

    >>> mixer = PluckerMixer(hidden_size=64, reduced_size=8, offsets=[1, 2, 4])
    >>> mixer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    ```
    """

    def __init__(
        self,
        hidden_size: int,
        reduced_size: int,
        offsets: list[int],
        is_causal: bool = True,
        num_heads: int = 1,
        learned_offset_weights: bool = False,
        separate_past_projection: bool = False,
        out_proj: bool = False,
        plucker_eps: float = 1e-3,
        layer_norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if reduced_size < 2:
            raise ValueError(
                f"`reduced_size` must be at least 2, since a plane needs two dimensions, got {reduced_size}."
            )
        if not offsets or min(offsets) < 1:
            raise ValueError(f"`offsets` must be a non-empty list of integers from 1, got {offsets}.")
        self.layer_idx = layer_idx
        self.num_heads = num_heads
        self.window = max(offsets)
        self.offsets = list(offsets) if is_causal else [sign * offset for offset in offsets for sign in (1, -1)]
        self.backend = backend

        self.reduce = nn.Linear(hidden_size, num_heads * reduced_size)
        self.reduce_past = nn.Linear(hidden_size, num_heads * reduced_size) if separate_past_projection else None
        self.plucker_proj = PluckerProjection(
            hidden_size, reduced_size, len(self.offsets), num_heads, learned_offset_weights, plucker_eps
        )
        self.gate_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size) if out_proj else None
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        past_key_values=None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): the tokens.
            positions (integer `torch.Tensor` of shape `(B, T)`, *optional*): position of each token in its sequence,
                [`NO_POSITION`] for padding.
            past_key_values (*optional*): a decoding state with an `update` method like that of a Transformers `Cache`;
                needs `positions` or `cu_seqlens`.
            cu_seqlens (integer `torch.Tensor` of shape `(num_sequences + 1,)`, *optional*): where the sequences of a
                packed row begin, and where the last one ends; needs `B = 1`. No pair crosses a boundary.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`.
        """
        if cu_seqlens is not None:
            positions = positions_with_boundaries(positions, cu_seqlens, hidden_states)
        backend = choose_backend(self.backend, hidden_states, self.reduce.out_features // self.num_heads)
        layers = self.reduce, self.reduce_past, self.plucker_proj, self.gate_proj, self.norm
        if backend == "triton" and past_key_values is None and self.out_proj is None and are_plain(*layers):
            if positions is None:
                positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
            return plucker_mixer_triton(hidden_states, self, positions)
        query = self.reduce(hidden_states)  # (B, T, H * r)
        source = query if self.reduce_past is None else self.reduce_past(hidden_states)
        if past_key_values is not None:
            source, positions = past_key_values.update(source, positions, self.layer_idx, window=self.window)
        shared = source is query
        query = query.unflatten(-1, (self.num_heads, -1))  # (B, T, H, r)
        source = query if shared else source.unflatten(-1, (self.num_heads, -1))  # (B, S, H, r)

        features = self.plucker_proj(query, source, self.offsets, positions, backend)  # (B, T, d)
        mixed = gated_mix(hidden_states, features, self.gate_proj)
        if self.out_proj is not None:
            mixed = self.out_proj(mixed)
        return self.norm(mixed)


class PluckerWindowMixer(nn.Module):
    r"""
    [`PluckerMixer`] over windows: each token is paired with all others of its windows, and mixing heads share out the
    pairs. The paper's classification head is made of such layers.

    Args:
        hidden_size (`int`): `d`.
        reduced_size (`int`): size of the reduced vectors, over all heads; each head has planes in R^(size / heads).
        window_size (`int`): number of tokens in a window.
        window_stride (`int`): distance between the starts of windows, a divisor of `window_size`.
        num_heads (`int`, *optional*, defaults to 1): heads that share out the pairs.
        pair_sharing (`str`, *optional*, defaults to `"distance"`): how they do, see [`window_pair_weights`].
        plucker_eps (`float`, *optional*, defaults to 1e-3): sine of the angle up to which two vectors are parallel.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): of the LayerNorm.
    """

    def __init__(
        self,
        hidden_size: int,
        reduced_size: int,
        window_size: int,
        window_stride: int,
        num_heads: int = 1,
        pair_sharing: str = "distance",
        plucker_eps: float = 1e-3,
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__()
        if window_size < 2 or window_size % window_stride != 0:
            raise ValueError(
                f"`window_size` must be at least 2 and a multiple of `window_stride` ({window_stride}), got "
                f"{window_size}."
            )
        if reduced_size % num_heads != 0 or reduced_size < 2 * num_heads:
            raise ValueError(
                f"`reduced_size` must be a multiple of `num_heads` ({num_heads}), with at least 2 dimensions a head, "
                f"got {reduced_size}."
            )
        self.window_size = window_size
        self.window_stride = window_stride
        self.num_heads = num_heads
        self.pair_sharing = pair_sharing
        self.reduce = nn.Linear(hidden_size, reduced_size)
        self.plucker_proj = PluckerProjection(
            hidden_size, reduced_size // num_heads, num_offsets=0, num_heads=num_heads, eps=plucker_eps
        )
        self.gate_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.register_buffer(
            "pair_weights", window_pair_weights(window_size, num_heads, pair_sharing), persistent=False
        )

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): the tokens.
            real (boolean `torch.Tensor` of shape `(B, T)`): which of them are no padding.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`.
        """
        reduced = self.reduce(hidden_states).unflatten(-1, (self.num_heads, -1))  # (B, T, H, r)
        features = plucker_window_features(
            reduced,
            self.plucker_proj.weight,
            self.plucker_proj.bias,
            self.pair_weights,
            real,
            self.window_stride,
            self.plucker_proj.eps,
        )
        return self.norm(gated_mix(hidden_states, features, self.gate_proj))
