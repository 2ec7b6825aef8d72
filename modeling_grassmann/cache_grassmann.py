# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding state of Causal Grassmann models: one layer of a Transformers `Cache`, of constant size."""

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .plucker import NO_POSITION


class PluckerCacheLayer(CacheLayerMixin):
    """
    What a Plücker mixer remembers: the reduced vectors of the last `window = max(offsets)` tokens and their positions.
    Where there is no such token the position is `NO_POSITION`, so that short prefixes and padding need no special
    case, and packed sequences keep their boundaries across calls.

    `keys` holds the vectors, `(B, window, H * r)`, `values` the positions, `(B, window)`. Both are updated in place,
    at a fixed address and size, so that `DynamicCache` and `StaticCache` share this one class and decoding compiles.
    After [`activate_past_recording`] (assisted decoding) they grow until the next [`crop`].
    """

    _layer_type = "plucker"
    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        # A tensor, because a Python integer would recompile the decoding step at every token.
        self.cumulative_length = torch.tensor(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor, window: int) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window = window
        self.keys = key_states.new_zeros(key_states.shape[0], window, key_states.shape[-1])
        self.values = value_states.new_full((value_states.shape[0], window), NO_POSITION)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            for state in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(state)
        self.is_initialized = True

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

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens seen, padding included."""
        return self.cumulative_length if self.is_initialized else 0

    def next_positions(self) -> int | torch.Tensor:
        """Position of each row's next token, `(B, 1)`: behind its last one, or behind all if that one is padding."""
        if not self.is_initialized:
            return 0
        last = self.values[:, -1:]
        return torch.where(last == NO_POSITION, self.cumulative_length, last + 1)

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
        """Keep all tokens from here on until the next [`crop`], so that they can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Take back the last `-tokens_to_remove` tokens and forget what the window no longer needs.

        Raises:
            ValueError: if `tokens_to_remove` is positive, or asks for more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be zero or negative, got {tokens_to_remove}.")
        if not self.is_initialized:
            return
        removed = -int(tokens_to_remove)
        recorded = self.keys.shape[1] - self.window
        if removed > recorded:
            raise ValueError(
                f"Cannot take back {removed} tokens, since {recorded} were recorded. Call `activate_past_recording` "
                "on the cache before the tokens that may have to be taken back."
            )
        end = self.keys.shape[1] - removed
        self.keys = self.keys[:, end - self.window : end]
        self.values = self.values[:, end - self.window : end]
        self.cumulative_length -= removed

    def offload(self) -> None:
        """
        Nothing: an offloaded cache leaves this state where it is. It takes a few kilobytes per row, and blocks of its
        one small size would be handed from stream to stream by the allocator while a kernel still reads them.
        """

    def prefetch(self) -> None:
        """Nothing: the state never leaves its device."""

    def reset(self) -> None:
        if self.is_initialized and self.keys.shape[1] > self.window:
            self.keys, self.values = self.keys[:, -self.window :], self.values[:, -self.window :]
        super().reset()
        if self.is_initialized:
            self.values.fill_(NO_POSITION)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        if self.is_initialized:
            self.keys = self.keys[indices]
            self.values = self.values[indices]


# The state has a fixed size anyway, so that a static cache needs no class of its own.
STATIC_LAYER_TYPE_MAPPING[PluckerCacheLayer._layer_type] = PluckerCacheLayer
