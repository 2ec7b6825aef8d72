# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""A mixing layer around the Grassmann memory, without Transformers."""

import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from .grassmann_memory import KERNELS, choose_memory_backend, grassmann_memory, orthonormalise
from .plucker import NO_POSITION, are_plain, asked_backend, choose_backend, positions_with_boundaries


try:
    from .memory_step_triton import holds_all_heads
except ImportError:
    holds_all_heads = None


# Weights up to which compiled code joins a layer's projections for each token: reading them takes as long as a launch.
MAX_JOINED_NUMBERS = 2**21
# A floor of 0.05 under the length of what is read, before softplus.
INITIAL_FLOOR = math.log(math.expm1(0.05))
# Tokens after which heads have forgotten all but 1/e of something, from the first to the last head at initialisation.
TIME_CONSTANTS = (2, 512)


# Operators are named after the module, so that code that travels with a checkpoint never meets the installed one.
NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::joined", mutates_args=())
def joined_op(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    """
    Tensors `(B, T, ...)` side by side, filled up with zeros: `(B, T, width)`. An operator of its own, as compiled code
    computes each number of every part where it joins them, which takes it six times as long.
    """
    *parts, last = parts
    padding = width - sum(part.shape[-1] for part in (*parts, last))
    parts = [part.contiguous() for part in (*parts, F.pad(last, (0, padding)))]
    # PyTorch stores number by number: those of eight bytes are four of a half precision.
    places = ((part.shape[-1], part.storage_offset(), *part.stride()[:-1]) for part in parts)
    if math.gcd(*(place for each in places for place in each)) * last.element_size() % 8 == 0:
        return torch.cat([part.view(torch.int64) for part in parts], dim=-1).view(last.dtype)
    return torch.cat(parts, dim=-1)


@joined_op.register_fake
def _(parts, width):
    return parts[0].new_empty(*parts[0].shape[:-1], width)


class Split(torch.autograd.Function):
    """Parts of `(B, T, width)`, views of some sizes, without what is left over; their gradients are joined at once."""

    @staticmethod
    def forward(ctx, joined, *sizes):
        ctx.width = joined.shape[-1]
        return joined.split([*sizes, ctx.width - sum(sizes)], dim=-1)[:-1]

    @staticmethod
    def backward(ctx, *gradients):
        return joined_op(list(gradients), ctx.width), *(None for _ in gradients)


def initial_decay_bias(num_heads: int) -> torch.Tensor:
    """`(H,)` biases for which `softplus(bias) = 1 / τ`, with log τ evenly spread over [`TIME_CONSTANTS`]."""
    first, last = (math.log(constant) for constant in TIME_CONSTANTS)
    return torch.linspace(first, last, num_heads).exp().reciprocal().expm1().log()


def convolve(vectors: torch.Tensor, positions: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """
    Causal convolution of each channel, `Σ_j weight_j x_{t-j}`, over tokens of one sequence.

    Args:
        vectors (`torch.Tensor` of shape `(B, n - 1 + T, W)`): those of `n - 1` earlier tokens, then of `T` tokens.
        positions (integer `torch.Tensor` of shape `(B, n - 1 + T)`, *optional*): a token `j` places before another
            counts if its position is `j` less. [`NO_POSITION`] for padding. By default all count.
        weight (`torch.Tensor` of shape `(n, W)`): of each distance and channel.

    Returns:
        `torch.Tensor` of shape `(B, T, W)`.
    """
    reach, length = weight.shape[0] - 1, vectors.shape[1]
    if length == reach + 1:
        # One token: all distances at once.
        if positions is not None:
            distances = torch.arange(reach, -1, -1, device=positions.device)
            follows = positions[:, -1:] - positions == distances
            vectors = torch.where(follows[..., None], vectors, 0)
        return (vectors * weight.flip(0)).sum(1, keepdim=True)
    result = vectors[:, reach:] * weight[0]
    for distance in range(1, reach + 1):
        tokens = slice(reach - distance, length - distance)
        earlier = vectors[:, tokens]
        if positions is not None:
            # Padding is further away.
            follows = positions[:, reach:] - positions[:, tokens] == distance
            earlier = torch.where(follows[..., None], earlier, 0)
        result = torch.addcmul(result, earlier, weight[distance])
    return result


class MemoryNorm(nn.Module):
    r"""
    RMSNorm of what a head has read, with a floor `f` that each head learns:
    :math:`\mathrm{weight} \odot x / \sqrt{\mathrm{mean}(x^2) + f^2}`.

    A read is as long as the planes that wrote it are similar to the one that reads. RMSNorm alone would make a read of
    nothing as long as one of a match.

    Args:
        num_heads (`int`): `H`.
        value_size (`int`): `dv`.
        eps (`float`, *optional*, defaults to 1e-5): added to the squares, too.
    """

    def __init__(self, num_heads: int, value_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(value_size))
        # Through softplus, so that it is positive.
        self.floor = nn.Parameter(torch.full((num_heads,), INITIAL_FLOOR))

    def forward(self, reads: torch.Tensor) -> torch.Tensor:
        """`(..., H, dv)` -> `(..., H, dv)`."""
        x = reads.to(torch.promote_types(reads.dtype, torch.float32))
        square = x.square().mean(-1, keepdim=True) + F.softplus(self.floor).square()[:, None]
        return (x * torch.rsqrt(square + self.eps) * self.weight).to(reads.dtype)


class MemoryMixer(nn.Module):
    r"""
    A mixing layer that reads from the whole past: with planes `Q_t` and `K_t`, values `v_t` and decays
    :math:`a_t = \exp(-\mathrm{softplus}(w \cdot h_t + b))`, all linear in the token `h_t`,

    .. math:: o_t = \sum_{s \le t} a_{s+1} \cdots a_t\, \kappa(Q_t, K_s)\, v_s, \qquad
              W_o (\mathrm{SiLU}(W_g h_t) \odot \mathrm{norm}(o_t))

    for each head, see [`grassmann_memory`] and [`MemoryNorm`]. The vectors that span `K_t` are convolved over
    `conv_size` tokens: what a token writes can then be found by what came before it.

    Args:
        hidden_size (`int`): `d`.
        num_heads (`int`): heads, each with planes and values of its own.
        reduced_size (`int`): `r`, the dimension in which planes are spanned. The state grows with its fourth power.
        value_size (`int`): `dv`, the size of a head's values.
        kernel (`str`, *optional*, defaults to `"binet_cauchy"`): similarity of planes, a key of `KERNELS`.
        conv_size (`int`, *optional*, defaults to 4): tokens, the present one included, that make up a key; 1 for none
            but this one.
        plucker_eps (`float`, *optional*, defaults to 1e-3): sine of the angle up to which two vectors are parallel.
        norm_eps (`float`, *optional*, defaults to 1e-5): of the norm.
        layer_idx (`int`, *optional*): index of this layer's entry in a decoding state.
        backend (`str`, *optional*, defaults to `"auto"`): what computes the layer, see [`grassmann_memory`].

    Example:

    ```python
    >>> import torch
    >>> from modeling_grassmann import MemoryMixer

    >>> mixer = MemoryMixer(hidden_size=64, num_heads=2, reduced_size=6, value_size=32)
    >>> mixer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    ```
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        reduced_size: int,
        value_size: int,
        kernel: str = "binet_cauchy",
        conv_size: int = 4,
        plucker_eps: float = 1e-3,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"`kernel` must be one of {list(KERNELS)}, got {kernel!r}.")
        self.num_vectors = KERNELS[kernel].num_vectors
        if reduced_size < self.num_vectors:
            raise ValueError(
                f"`reduced_size` must be at least {self.num_vectors} for the kernel {kernel!r}, got {reduced_size}."
            )
        self.num_heads, self.reduced_size, self.value_size = num_heads, reduced_size, value_size
        self.kernel, self.plucker_eps, self.layer_idx, self.backend = kernel, plucker_eps, layer_idx, backend
        planes_size = num_heads * self.num_vectors * reduced_size
        self.query_proj = nn.Linear(hidden_size, planes_size, bias=False)
        self.key_proj = nn.Linear(hidden_size, planes_size, bias=False)
        self.key_conv = None
        if conv_size > 1:
            self.key_conv = nn.Parameter(torch.empty(conv_size, planes_size))
            nn.init.uniform_(self.key_conv, -(conv_size**-0.5), conv_size**-0.5)
        self.value_proj = nn.Linear(hidden_size, num_heads * value_size, bias=False)
        self.decay_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.decay_bias = nn.Parameter(initial_decay_bias(num_heads))
        self.gate_proj = nn.Linear(hidden_size, num_heads * value_size, bias=False)
        self.norm = MemoryNorm(num_heads, value_size, eps=norm_eps)
        self.out_proj = nn.Linear(num_heads * value_size, hidden_size, bias=False)

    def can_join(self, hidden_states: torch.Tensor, layers: tuple[nn.Linear, ...]) -> bool:
        """Whether one product of the layers' weights side by side takes less time than a product of each."""
        if not are_plain(*layers):
            return False
        if hidden_states.shape[1] == 1 and hidden_states.is_cuda and asked_backend(self.backend) == "auto":
            # Compiled code joins small weights in one kernel, where it would launch a product for each.
            numbers = sum(layer.weight.numel() for layer in layers)
            return torch.compiler.is_compiling() and numbers <= MAX_JOINED_NUMBERS
        return choose_backend(self.backend, hidden_states, self.reduced_size) == "triton"

    def project(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Vectors of queries and of keys, values, gates and decays: `(B, T, d)` -> `(B, T, ...)` each."""
        layers = self.query_proj, self.key_proj, self.value_proj, self.gate_proj, self.decay_proj
        if not self.can_join(hidden_states, layers):
            return [layer(hidden_states) for layer in layers]
        # One product reads the tokens once, and so does its gradient. Its rows begin at multiples of 32 bytes.
        size = sum(layer.out_features for layer in layers)
        padding = self.query_proj.weight.new_zeros(-size % 16, hidden_states.shape[-1])
        projected = F.linear(hidden_states, torch.cat([*(layer.weight for layer in layers), padding]))
        return Split.apply(projected, *(layer.out_features for layer in layers))

    def frames(self, vectors: torch.Tensor) -> torch.Tensor:
        """Frames of planes, or for kernels without them the vectors: `(B, T, H * m * r)` -> `(B, T, H, m, r)`."""
        vectors = vectors.unflatten(-1, (self.num_heads, self.num_vectors, self.reduced_size))
        return orthonormalise(vectors, self.plucker_eps, self.backend) if self.num_vectors == 2 else vectors

    def convolved(self, key: torch.Tensor, positions: torch.Tensor | None, past_key_values) -> torch.Tensor:
        """Vectors of keys after the convolution: `(B, T, W)` -> `(B, T, W)`."""
        reach = 0 if self.key_conv is None else self.key_conv.shape[0] - 1
        if past_key_values is not None:
            key, positions = past_key_values.layers[self.layer_idx].with_past(key, positions, reach)
        elif reach > 0:
            key = F.pad(key, (0, 0, reach, 0))  # (B, reach + T, W)
            if positions is not None:
                positions = F.pad(positions, (reach, 0), value=NO_POSITION)
        return key if self.key_conv is None else convolve(key, positions, self.key_conv)

    def can_step(self, values: torch.Tensor, state) -> bool:
        """Whether fused kernels, which have no gradients, take values `(B, T, H, dv)` to a decoding state."""
        if state is None or not state.is_initialized or state.record_past or state.keys.dtype != torch.float32:
            return False
        if values.shape[1] != 1 or torch.is_grad_enabled() or KERNELS[self.kernel].square is None:
            return False
        backend = choose_memory_backend(self.backend, values, self.kernel, self.reduced_size)
        return backend == "triton" and holds_all_heads(self.num_heads, self.num_vectors, self.reduced_size)

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
                [`NO_POSITION`] for padding. One that does not follow on the last starts a new sequence.
            past_key_values (`Cache`, *optional*): a decoding state, whose layer `layer_idx` is that of a memory; needs
                `positions` or `cu_seqlens`, except in a new state of rows that are one sequence each.
            cu_seqlens (integer `torch.Tensor` of shape `(num_sequences + 1,)`, *optional*): where the sequences of a
                packed row begin, and where the last one ends; needs `B = 1`. Nothing is read across a boundary.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`.
        """
        if cu_seqlens is not None:
            positions = positions_with_boundaries(positions, cu_seqlens, hidden_states)
        query, key, values, gate, decay = self.project(hidden_states)
        values = values.unflatten(-1, (self.num_heads, -1))  # (B, T, H, dv)
        state = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if self.can_step(values, state):
            weights = {"key_conv": self.key_conv, "decay_bias": self.decay_bias}
            options = {"eps": self.plucker_eps, "kernel": self.kernel}
            output = state.step(query, key, values, decay, positions, **weights, **options)
        else:
            key = self.convolved(key, positions, past_key_values)
            if values.shape[1] == 1:
                # One token waits for calls rather than for numbers.
                query, key = self.frames(torch.stack([query, key], dim=2)).unbind(2)  # of (B, 1, 2, H, m, r)
            else:
                query, key = self.frames(query), self.frames(key)
            log_decay = -F.softplus(decay.to(torch.promote_types(decay.dtype, torch.float32)) + self.decay_bias)
            options = {"query": query, "log_decay": log_decay, "positions": positions}
            options |= {"kernel": self.kernel, "backend": self.backend}
            if state is None:
                output, _ = grassmann_memory(key=key, values=values, **options)
            else:
                output, _ = past_key_values.update(key, values, self.layer_idx, **options)
        # (B, T, H, dv) -> (B, T, H * dv) -> (B, T, d)
        return self.out_proj(F.silu(gate) * self.norm(output).flatten(-2))
