# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""The Plücker mixer of Causal Grassmann models (arXiv 2512.19428), in plain PyTorch and without Transformers.

A token's reduced vector :math:`z_t` and an earlier token's :math:`z_{t-\Delta}` span a plane, a point on the Grassmann
manifold Gr(2, r). Its Plücker coordinates are the wedge product

.. math:: (z_t \wedge z_{t-\Delta})_{ij} = z_{t,i} z_{t-\Delta,j} - z_{t,j} z_{t-\Delta,i}, \qquad i < j,

a vector of length :math:`P = r(r-1)/2`, scaled to unit norm. The mixer projects these coordinates back to the hidden
size, averages them over the offsets and gates them into the hidden state.

[`plucker_features`] computes the projected average in one of two ways that give the same result:

- `"naive"` follows the paper line by line: one wedge, one norm and one projection per token *and offset*.
- `"torch"` is the exact collapse. The wedge is bilinear and all pairs of a token share its first factor. With
  :math:`\hat z = z / \|z\|` and :math:`y^\perp = y - \langle \hat z, y \rangle \hat z` one has
  :math:`z \wedge y = z \wedge y^\perp` and :math:`\|z \wedge y\| = \|z\| \|y^\perp\|`, so that the normalised plane is
  :math:`\hat z \wedge \hat y^\perp` and the average over offsets moves inside:
  :math:`\hat z_t \wedge \mathrm{mean}_\Delta\, \hat y^\perp_\Delta`. One wedge and one projection per token are left,
  and the norm of a wedge costs O(r) instead of O(r²).

Two rules hold in both:

- **Pairs.** `(t, t - Δ)` is a pair only if both tokens are real and their positions differ by exactly Δ. That one rule
  makes left padding, right padding and packed sequences exact.
- **Degenerate pairs.** Parallel vectors span no plane. A pair with a zero vector, or with
  :math:`\|y^\perp\| \le \epsilon \|y\|`, contributes an exactly zero wedge and an exactly zero gradient, and still
  counts as a pair. (Dividing by a clamped norm instead turns rounding noise into features of unit size.)
"""

import torch
from torch import nn
from torch.nn import functional as F


# The position of a token that takes part in no pair, such as padding: it differs from no position by an offset.
NO_POSITION = -(2**31)


def num_plucker_coordinates(reduced_size: int) -> int:
    """Number of Plücker coordinates of a plane in R^r: `r (r - 1) / 2`."""
    return reduced_size * (reduced_size - 1) // 2


def wedge(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Plücker coordinates `z_i y_j - z_j y_i`, `i < j`, of the plane of `z` and `y`: `(..., r)` -> `(..., P)`."""
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], offset=1, device=z.device)
    return z[..., i] * y[..., j] - z[..., j] * y[..., i]


def antisymmetric_matrices(weight: torch.Tensor, num_heads: int, reduced_size: int) -> torch.Tensor:
    """
    Rewrite a projection of Plücker coordinates as bilinear forms: `A[i, j] = w_ij = -A[j, i]`, so that
    `zᵀ A y = Σ_{i<j} w_ij (z ∧ y)_ij`. Only this small tensor is indexed, so that no gather, whose backward is a
    scatter-add, runs over tokens.

    Args:
        weight (`torch.Tensor` of shape `(hidden_size, num_heads * P)`): the projection.

    Returns:
        `torch.Tensor` of shape `(hidden_size, num_heads * r * r)`.
    """
    i, j = torch.triu_indices(reduced_size, reduced_size, offset=1, device=weight.device)
    weight = weight.unflatten(-1, (num_heads, -1))  # (d, H, P)
    matrices = weight.new_zeros(*weight.shape[:-1], reduced_size, reduced_size)  # (d, H, r, r)
    matrices[..., i, j] = weight
    matrices[..., j, i] = -weight
    return matrices.flatten(1)  # (d, H * r * r)


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


def plucker_features_collapsed(query, source, weight, bias, offsets, positions, offset_weights, eps) -> torch.Tensor:
    """[`plucker_features`] by the exact collapse: one wedge and one projection per token."""
    num_heads, reduced_size = query.shape[2:]
    square = query.square().sum(-1, keepdim=True)
    nonzero = square > 0
    direction = query * torch.where(nonzero, square, 1).rsqrt()  # (B, T, H, r)
    tangent, count = 0.0, 0
    for index, delta in enumerate(offsets):
        past = shift(source, delta, query.shape[1])
        pair = is_pair(positions, delta, query.shape[1])[..., None]  # (B, T, 1)
        perpendicular = past - (direction * past).sum(-1, keepdim=True) * direction
        square = perpendicular.square().sum(-1, keepdim=True)
        spans = pair[..., None] & nonzero & (square > eps**2 * past.square().sum(-1, keepdim=True))
        unit = torch.where(spans, perpendicular * torch.where(spans, square, 1).rsqrt(), 0)
        if offset_weights is not None:
            unit = unit * offset_weights[:, index, None]
        tangent = tangent + unit
        count = count + pair
    tangent = tangent / count.clamp(min=1)[..., None]
    if query.shape[1] == 1:
        # In a decoding step, writing out the matrices would cost more than everything else.
        features = F.linear(wedge(direction, tangent).flatten(2).to(weight.dtype), weight)
    else:
        outer = (direction[..., :, None] * tangent[..., None, :]).flatten(2)  # (B, T, H, r, r) -> (B, T, H * r * r)
        features = F.linear(outer.to(weight.dtype), antisymmetric_matrices(weight, num_heads, reduced_size))
    return features if bias is None else features + bias * (count > 0)


BACKENDS = {"naive": plucker_features_naive, "torch": plucker_features_collapsed}


def plucker_features(
    query: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: list[int],
    positions: torch.Tensor | None = None,
    offset_weights: torch.Tensor | None = None,
    eps: float = 1e-3,
    backend: str = "torch",
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
        backend (`str`, *optional*, defaults to `"torch"`):
            `"torch"` (exact collapse) or `"naive"` (reference).

    Returns:
        `torch.Tensor` of shape `(B, T, d)`.

    Raises:
        ValueError: for an unknown backend, or shapes that do not fit together.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {sorted(BACKENDS)}, got {backend!r}.")
    num_heads, reduced_size = query.shape[2:]
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
    accurate = torch.promote_types(query.dtype, torch.float32)
    # The geometry stays in float32 under autocast too; only the projection runs in the reduced precision.
    query, source = query.to(accurate), source.to(accurate)
    if offset_weights is not None:
        offset_weights = offset_weights.to(accurate)
    return BACKENDS[backend](query, source, weight, bias, offsets, positions, offset_weights, eps)


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
        backend: str = "torch",
    ) -> torch.Tensor:
        return plucker_features(
            query, source, self.weight, self.bias, offsets, positions, self.offset_weights, self.eps, backend
        )

    def extra_repr(self) -> str:
        return f"plucker_coordinates={self.weight.shape[1]}, hidden_size={self.weight.shape[0]}, eps={self.eps}"


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
        self.backend = "torch"

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
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): the tokens.
            positions (integer `torch.Tensor` of shape `(B, T)`, *optional*): position of each token in its sequence,
                [`NO_POSITION`] for padding.
            past_key_values (*optional*): a decoding state with an `update` method like that of a Transformers `Cache`;
                needs `positions`.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`.
        """
        query = self.reduce(hidden_states)  # (B, T, H * r)
        source = query if self.reduce_past is None else self.reduce_past(hidden_states)
        if past_key_values is not None:
            source, positions = past_key_values.update(source, positions, self.layer_idx, window=self.window)
        query = query.unflatten(-1, (self.num_heads, -1))  # (B, T, H, r)
        source = source.unflatten(-1, (self.num_heads, -1))  # (B, S, H, r)

        features = self.plucker_proj(query, source, self.offsets, positions, self.backend)  # (B, T, d)
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden_states, features], dim=-1)))
        # gate * hidden_states + (1 - gate) * features, in fewer passes over memory.
        mixed = features + gate * (hidden_states - features)
        if self.out_proj is not None:
            mixed = self.out_proj(mixed)
        return self.norm(mixed)
