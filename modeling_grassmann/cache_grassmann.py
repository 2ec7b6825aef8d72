# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding state of Causal Grassmann models: layers of a Transformers `Cache`, of constant size."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_torchdynamo_compiling

from .grassmann_memory import KERNELS, MemoryState, feature_entries, grassmann_memory, state_before
from .plucker import NO_POSITION


# Optional packages are imported inside of `try`: Transformers demands what it finds elsewhere in a file that travels
# with a checkpoint.
try:
    from .memory_step_triton import memory_step
except ImportError:
    memory_step = None


# What a decoding state is called among a model's arguments and outputs: the second name came with Transformers 5.24.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class StateCacheLayer(CacheLayerMixin):
    """
    A state of constant size, which every row has from its first token on. Its tensors, one row of the batch in each of
    their first entries, are named in `STATE`. They are updated in place, at a fixed address and size, so that
    `DynamicCache` and `StaticCache` share each class of such layers and decoding compiles.

    After [`activate_past_recording`] (assisted decoding) the tokens since then, or since the last [`crop`], can be
    taken back, until [`stop_past_recording`].
    """

    STATE = ("keys", "values")
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        # A tensor, because a Python integer would recompile the decoding step at every token.
        self.cumulative_length = torch.tensor(0)

    @property
    def is_compileable(self) -> bool:
        """Whether shapes and addresses stay the same from token to token, which recorded tokens do not allow."""
        return not self.record_past

    def state_tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self.STATE]

    def renew(self, name: str, tensor: torch.Tensor) -> None:
        """
        Begin a state's tensor, in the memory of the one before [`reset`] if it fits: compiled code knows its address.
        """
        old = getattr(self, name, None)
        fits = old is not None and (old.shape, old.dtype, old.device) == (tensor.shape, tensor.dtype, tensor.device)
        # One that gradients go back to must not change.
        setattr(self, name, old.copy_(tensor) if fits and not old.requires_grad else tensor)

    def mark_initialized(self, device: torch.device) -> None:
        """To be called when the state is there."""
        self.device = device
        self.cumulative_length = self.cumulative_length.to(device)
        if not is_torchdynamo_compiling():
            for name in (*self.STATE, "cumulative_length"):
                tensor = getattr(self, name)
                if tensor.is_inference():
                    # Decoding may go on outside of inference mode, where nothing that was made in it may change.
                    with torch.inference_mode(False):
                        setattr(self, name, tensor.clone())
                torch._dynamo.mark_static_address(getattr(self, name))
        self.is_initialized = True

    @abstractmethod
    def last_positions(self) -> torch.Tensor:
        """Position of each row's last token, `NO_POSITION` for padding: `(B, 1)`."""

    def next_positions(self) -> int | torch.Tensor:
        """Position of each row's next token, `(B, 1)`: behind its last one, or behind all if that one is padding."""
        if not self.is_initialized:
            return 0
        last = self.last_positions()
        return torch.where(last == NO_POSITION, self.cumulative_length, last + 1)

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens seen, padding included."""
        if not self.is_initialized:
            return 0
        # A copy: the counter itself goes on.
        return self.cumulative_length if is_torchdynamo_compiling() else self.cumulative_length.clone()

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            # Transformers asks with `hasattr` whether it is known already.
            raise AttributeError("`batch_size` is known after the first `update`.")
        return self.keys.shape[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit: the state does not grow with the sequence."""
        return -1

    def activate_past_recording(self) -> None:
        """Remember all tokens from here on, each until the next [`crop`], so that they can be taken back."""
        self.record_past = True

    def stop_past_recording(self) -> None:
        """Remember tokens no longer, and forget those that could be taken back."""
        self.crop(0)
        self.record_past = False

    @abstractmethod
    def num_recorded(self) -> int:
        """How many tokens can be taken back."""

    @abstractmethod
    def take_back(self, count: int) -> None:
        """Take back the last `count` tokens, and forget what was recorded."""

    def crop(self, tokens_to_remove: int) -> None:
        """
        Take back the last `-tokens_to_remove` tokens and forget what the state no longer needs.

        Raises:
            ValueError: if `tokens_to_remove` is positive, or asks for more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be zero or negative, got {tokens_to_remove}.")
        removed = -int(tokens_to_remove)
        if removed > self.num_recorded():
            raise ValueError(
                f"Cannot take back {removed} tokens, since {self.num_recorded()} were recorded. Call "
                "`activate_past_recording` on the cache before the tokens that may have to be taken back."
            )
        if self.is_initialized:
            self.take_back(removed)
            self.cumulative_length -= removed

    def offload(self) -> None:
        """
        Nothing: an offloaded cache leaves this state where it is. It does not grow, and blocks of its one size would
        be handed from stream to stream by the allocator while a kernel still reads them.
        """

    def prefetch(self) -> None:
        """Nothing: the state never leaves its device."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.map_state(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self.map_state(lambda tensor: tensor[indices])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        self.map_state(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def map_state(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            for name in self.STATE:
                setattr(self, name, function(getattr(self, name)))

    def reset(self) -> None:
        """Forget all tokens. The memory stays for the next sequences, see [`renew`]."""
        self.is_initialized = self.record_past = False
        super().reset()


class PluckerCacheLayer(StateCacheLayer):
    """
    What a Plücker mixer remembers: the reduced vectors of the last `window = max(offsets)` tokens and their positions.
    Where there is no such token the position is `NO_POSITION`, so that short prefixes and padding need no special
    case, and packed sequences keep their boundaries across calls.

    `keys` holds the vectors, `(B, window, H * r)`, `values` the positions, `(B, window)`. While tokens are recorded,
    both grow.
    """

    _layer_type = "plucker"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor, window: int) -> None:
        self.dtype, self.window = key_states.dtype, window
        self.renew("keys", key_states.new_zeros(key_states.shape[0], window, key_states.shape[-1]))
        self.renew("values", value_states.new_full((value_states.shape[0], window), NO_POSITION))
        self.mark_initialized(key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, window: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append `T` tokens, and return them behind the `window` tokens that precede them.

        Args:
            key_states (`torch.Tensor` of shape `(B, T, H * r)`): reduced vectors.
            value_states (integer `torch.Tensor` of shape `(B, T)`): positions.
            window (`int`): how many tokens to remember.

        Returns:
            Vectors of shape `(B, window + T, H * r)` and positions of shape `(B, window + T)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, window)
        length = key_states.shape[1]
        keys = torch.cat([self.keys, key_states], dim=1)
        values = torch.cat([self.values, value_states], dim=1)
        if self.record_past:
            self.keys, self.values = keys, values
        else:
            self.keys.copy_(keys[:, -window:])
            self.values.copy_(values[:, -window:])
        self.cumulative_length.add_(length)
        return keys[:, -window - length :], values[:, -window - length :]

    def last_positions(self) -> torch.Tensor:
        return self.values[:, -1:]

    def num_recorded(self) -> int:
        return self.keys.shape[1] - self.window if self.is_initialized else 0

    def take_back(self, count: int) -> None:
        end = self.keys.shape[1] - count
        self.keys = self.keys[:, end - self.window : end]
        self.values = self.values[:, end - self.window : end]


def first_positions(tokens: torch.Tensor) -> torch.Tensor:
    """Positions of a sequence from its first token on: `(B, T, ...)` -> `(1, T)`."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


class MemoryCacheLayer(StateCacheLayer):
    """
    What a Grassmann memory remembers: its state `(B, H, F, dv)` in `keys`, the position of each row's last real token
    `(B,)` in `values`, and that of its last token, padding or not, `(B, 1)` in `last`. For the convolution of keys,
    the vectors of the last tokens `(B, window, W)` in `tail`, and their positions `(B, window)` in `tail_positions`.

    Recorded tokens are kept beside the state they came after; when some are taken back, the others are written again.
    """

    _layer_type = "grassmann_memory"
    STATE = ("keys", "values", "last", "tail", "tail_positions")

    def __init__(self, **kwargs):
        super().__init__()
        self.recorded, self.recorded_tail = [], []

    def lazy_initialization(self, state: MemoryState, last: torch.Tensor, kernel: str, backend: str) -> None:
        self.dtype, self.kernel, self.backend = state.memory.dtype, kernel, backend
        # What gradients go back to must not change with the state.
        self.renew("keys", state.memory.clone() if state.memory.requires_grad else state.memory.contiguous())
        self.renew("values", state.position.clone())
        self.renew("last", last.clone())
        self.mark_initialized(state.memory.device)

    def with_past(
        self, key_states: torch.Tensor, positions: torch.Tensor | None, window: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `T` tokens behind the `window` tokens that precede them: to be called before [`update`].

        Args:
            key_states (`torch.Tensor` of shape `(B, T, W)`): what the convolution takes.
            positions (integer `torch.Tensor` of shape `(B, T)`, *optional*): positions, by default those of rows that
                are one sequence each, the first of this state.
            window (`int`): how many tokens the convolution looks back, 0 for none.

        Returns:
            Vectors of shape `(B, window + T, W)` and positions of shape `(B, window + T)`, `None` for none.

        Raises:
            ValueError: without positions, if the state has seen tokens.
        """
        batch_size, length, _ = key_states.shape
        given = positions is not None
        if not given and self.is_initialized:
            raise ValueError("`positions` are needed behind the tokens that `past_key_values` has seen.")
        positions = (positions if given else first_positions(key_states)).expand(batch_size, length)
        if self.is_initialized:
            both = torch.cat([self.tail, key_states], dim=1), torch.cat([self.tail_positions, positions], dim=1)
        else:
            both = F.pad(key_states, (0, 0, window, 0)), F.pad(positions, (window, 0), value=NO_POSITION)
        if self.record_past:
            # From the window before the first recorded token on.
            recorded = self.recorded_tail
            new = (key_states, positions)
            self.recorded_tail = [torch.cat(pair, dim=1) for pair in zip(recorded, new)] if recorded else list(both)
        tails = tuple(tensor[:, length:] for tensor in both)  # the last `window` tokens
        if self.is_initialized:
            self.tail.copy_(tails[0])
            self.tail_positions.copy_(tails[1])
        else:
            self.renew("tail", tails[0].clone())
            self.renew("tail_positions", tails[1].clone())
        return both if given else (both[0], None)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        query: torch.Tensor,
        log_decay: torch.Tensor,
        positions: torch.Tensor | None,
        kernel: str,
        backend: str = "auto",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write `T` tokens and read at each of them; arguments are those of [`grassmann_memory.grassmann_memory`], and
        `positions` those of [`with_past`].

        Returns:
            What was read, `(B, T, H, dv)`, and the new state.
        """
        given, state = positions, None
        positions = (first_positions(value_states) if given is None else given).expand(value_states.shape[:2])
        if self.is_initialized:
            state = MemoryState(self.keys, self.values)
            if torch.is_grad_enabled() or (self.record_past and not self.recorded):
                # What gradients and tokens that are taken back go back to must not change with the state.
                state = MemoryState(self.keys.clone(), self.values.clone())
        if self.record_past:
            if not self.recorded:
                self.before_recorded = state_before(state, query, value_states, kernel)
                self.last_before = self.before_recorded.position[:, None] if state is None else self.last.clone()
            self.recorded.append((key_states, value_states, log_decay, positions))
        output, state = grassmann_memory(
            query, key_states, value_states, log_decay, given, state, kernel, output_final_state=True, backend=backend
        )
        if not self.is_initialized:
            last = positions[:, -1:] if positions.shape[1] > 0 else state.position[:, None]
            self.lazy_initialization(state, last, kernel, backend)
        elif positions.shape[1] > 0:
            self.keys.copy_(state.memory)
            self.values.copy_(state.position)
            self.last.copy_(positions[:, -1:])
        self.cumulative_length.add_(value_states.shape[1])
        return output, self.keys

    def step(
        self,
        query: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        decay: torch.Tensor,
        positions: torch.Tensor,
        key_conv: torch.Tensor | None,
        decay_bias: torch.Tensor,
        eps: float,
        kernel: str,
    ) -> torch.Tensor:
        """
        [`with_past`] and [`update`] for one token in fused kernels, from its projections, with a float32 state and
        without recording; arguments are those of `memory_step_triton.memory_step`.

        Returns:
            What was read, `(B, 1, H, dv)`.

        Raises:
            ValueError: if the state is that of another layer or batch.
        """
        batch_size, _, num_heads, value_size = value_states.shape
        size, window = key_states.shape[-1], 0 if key_conv is None else key_conv.shape[0] - 1
        reduced_size = size // (num_heads * KERNELS[kernel].num_vectors)
        memory = (batch_size, num_heads, KERNELS[kernel].num_features(reduced_size), value_size)
        tail, device = (batch_size, window, size), key_states.device
        found = self.kernel, tuple(self.keys.shape), tuple(self.tail.shape), self.keys.device
        if found != (kernel, memory, tail, device):
            raise ValueError(
                f"A token needs a state of kernel {kernel!r}, shapes {memory} and {tail}, on {device}; this one has "
                f"{found[0]!r}, {found[1]} and {found[2]}, on {found[3]}. Decode each batch with a cache of its own."
            )
        if key_conv is None:
            key_conv = key_states.new_empty(0, size)
        features = feature_entries(kernel, reduced_size, device)
        output = memory_step(
            query,
            key_states,
            value_states,
            decay,
            positions.expand(batch_size, 1),
            key_conv,
            decay_bias,
            self.keys,
            self.values,
            self.tail,
            self.tail_positions,
            # By name: PyTorch 2.11 cannot compile the unpacking of a constant.
            features.entries,
            features.weight,
            features.overlap,
            eps,
            kernel,
        )
        # Not by the operator: `positions` may come from `last`, and PyTorch 2.13 compiles them anew for the layers
        # behind this one, from what the operator would have left.
        self.last.copy_(positions)
        self.cumulative_length.add_(1)
        return output

    def last_positions(self) -> torch.Tensor:
        return self.last

    def num_recorded(self) -> int:
        return sum(positions.shape[1] for *_, positions in self.recorded)

    def take_back(self, count: int) -> None:
        left = self.num_recorded() - count
        if count:
            self.keys, self.values, self.last = *self.before_recorded, self.last_before
        if count and left:
            keys, values, log_decay, positions = (torch.cat(parts, dim=1)[:, :left] for parts in zip(*self.recorded))
            options = {"kernel": self.kernel, "output_final_state": True, "backend": self.backend}
            _, state = grassmann_memory(keys, keys, values, log_decay, positions, self.before_recorded, **options)
            self.keys, self.values, self.last = state.memory, state.position, positions[:, -1:]
        if count and self.recorded_tail:
            window, end = self.tail.shape[1], self.recorded_tail[0].shape[1] - count
            tails = (tensor[:, end - window : end].contiguous() for tensor in self.recorded_tail)
            self.tail, self.tail_positions = tails
        self.forget_recorded()

    def forget_recorded(self) -> None:
        self.recorded, self.recorded_tail, self.before_recorded, self.last_before = [], [], None, None

    def reset(self) -> None:
        self.forget_recorded()
        super().reset()

    def map_state(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().map_state(function)
        if self.recorded:
            self.recorded = [tuple(function(tensor) for tensor in tensors) for tensors in self.recorded]
            self.before_recorded = MemoryState(*(function(tensor) for tensor in self.before_recorded))
            self.last_before = function(self.last_before)
            self.recorded_tail = [function(tensor) for tensor in self.recorded_tail]


# The states have a fixed size anyway, so that a static cache needs no classes of its own.
for layer_class in (PluckerCacheLayer, MemoryCacheLayer):
    STATIC_LAYER_TYPE_MAPPING[layer_class._layer_type] = layer_class
