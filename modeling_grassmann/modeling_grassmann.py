# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Causal Grassmann models: sequence models without attention (arXiv 2512.19428)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_grassmann import (  # and registers decoding states with Transformers' caches
    CACHE_NAME,
    CACHE_NAMES,
    first_positions,
)
from .checkpoint_grassmann import CheckpointMixin
from .configuration_grassmann import GrassmannConfig
from .loss_grassmann import fused_causal_lm_loss, register_with_liger
from .memory_mixer import INITIAL_FLOOR, MemoryMixer, MemoryNorm, initial_decay_bias
from .plucker import (
    NO_POSITION,
    PluckerMixer,
    PluckerProjection,
    check_cu_seqlens,
    positions_from_cu_seqlens,
    separate_sequences,
)


CACHE_ARGS = r"""
    past_key_values (`Cache`, *optional*):
        Decoding state, as earlier calls have left it. Transformers calls it `cache` from version 5.24 on.
    cache (`Cache`, *optional*):
        The same.
"""


class GrassmannMLP(nn.Module):
    def __init__(self, config: GrassmannConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.act_fn(self.up_proj(hidden_states)))
        return self.dropout(self.down_proj(hidden_states))


class GrassmannGatedMLP(GrassmannMLP):
    """With a gate beside: SwiGLU for `hidden_act="silu"`."""

    def __init__(self, config: GrassmannConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = self.dropout(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return self.dropout(self.down_proj(gated))


def make_mixer(config: GrassmannConfig, layer_idx: int) -> PluckerMixer | MemoryMixer:
    if config.layer_mixers[layer_idx] == "memory":
        return MemoryMixer(
            config.hidden_size,
            config.num_memory_heads,
            config.reduced_size if config.memory_reduced_size is None else config.memory_reduced_size,
            config.memory_value_size,
            kernel=config.memory_kernel,
            conv_size=config.memory_conv_size,
            plucker_eps=config.plucker_eps,
            norm_eps=config.layer_norm_eps,
            layer_idx=layer_idx,
            backend=config.mixer_backend,
        )
    return PluckerMixer(
        config.hidden_size,
        config.reduced_size,
        config.layer_offsets[layer_idx],
        is_causal=config.is_causal,
        num_heads=config.num_plucker_heads,
        learned_offset_weights=config.learned_offset_weights,
        separate_past_projection=config.separate_past_projection,
        out_proj=config.mixer_out_proj,
        plucker_eps=config.plucker_eps,
        layer_norm_eps=config.layer_norm_eps,
        layer_idx=layer_idx,
        backend=config.mixer_backend,
    )


class GrassmannBlock(GradientCheckpointingLayer):
    """
    A mixer and a feed-forward network, placed as `config.norm_placement` says.

    Args:
        config: the fields of a feed-forward network and its norms.
        mixer (`nn.Module`): maps `(B, T, d)`, and what else the block is called with, to `(B, T, d)`.
        mlp_class (`type[GrassmannMLP]`, *optional*): of the feed-forward network.
    """

    def __init__(self, config: PreTrainedConfig, mixer: nn.Module, mlp_class: type[GrassmannMLP] = GrassmannMLP):
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        self.mixer = mixer
        self.mlp = mlp_class(config)
        if self.pre_norm:
            self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *mixer_args: torch.Tensor | Cache | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if self.pre_norm:
            mixed = self.mixer(self.mixer_norm(hidden_states), *mixer_args)
            hidden_states = hidden_states + self.dropout(mixed)
            return hidden_states + self.mlp(self.mlp_norm(hidden_states))
        # The gate itself carries the hidden states over: the paper adds no residual around the mixer.
        hidden_states = self.dropout(self.mixer(hidden_states, *mixer_args))
        return self.mlp_norm(hidden_states + self.mlp(hidden_states))


@auto_docstring
class GrassmannPreTrainedModel(CheckpointMixin, PreTrainedModel):
    AUTO_MAP = {
        "AutoConfig": "configuration_grassmann.GrassmannConfig",
        "AutoModel": "modeling_grassmann.GrassmannModel",
        "AutoModelForCausalLM": "modeling_grassmann.GrassmannForCausalLM",
        "AutoModelForSequenceClassification": "modeling_grassmann.GrassmannForSequenceClassification",
    }
    config: GrassmannConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GrassmannBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GrassmannBlock}

    def __init__(self, config: GrassmannConfig, *args, **kwargs):
        # Fields that were set after the configuration was made, as `from_pretrained` does, have not been checked yet.
        config.validate()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PluckerProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
            if module.offset_weights is not None:
                init.ones_(module.offset_weights)
        if isinstance(module, MemoryNorm):
            init.ones_(module.weight)
            init.constant_(module.floor, INITIAL_FLOOR)
        if isinstance(module, MemoryMixer):
            init.copy_(module.decay_bias, initial_decay_bias(module.num_heads))
            if module.key_conv is not None:
                bound = module.key_conv.shape[0] ** -0.5
                init.uniform_(module.key_conv, -bound, bound)


def look_up(embedding: nn.Embedding, ids: torch.Tensor, name: str, advice: str) -> torch.Tensor:
    """
    Rows of an embedding.

    Raises:
        ValueError: if there is no row of an id; only on a CPU, which finds that without being asked to.
    """
    try:
        return embedding(ids)
    except IndexError as error:
        # Of the weight, which adapters on the layer have too.
        size = embedding.weight.shape[0]
        outside = ids[(ids < 0) | (ids >= size)].tolist()
        if not outside:
            raise
        raise ValueError(f"`{name}` holds {outside[0]}, but the model knows 0 to {size - 1}. {advice}") from error


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """
    The decoding state, by whichever of its names it was given.

    Raises:
        ValueError: if it was given by both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of the same argument: give one of them.")
    return past_key_values if cache is None else cache


def new_tokens_mask(attention_mask: torch.Tensor, past_key_values: Cache | None, length: int) -> torch.Tensor:
    """
    Columns of an attention mask `(B, M)` that belong to the `length` new tokens: `(B, T)`. They are the last ones,
    unless the mask has room for tokens to come, as in a loop with a static cache.
    """
    before = attention_mask.shape[1] - length
    if before == 0:
        return attention_mask
    seen = past_key_values.layers[0].cumulative_length.to(attention_mask.device)
    columns = seen.clamp(max=before) + torch.arange(length, device=attention_mask.device)
    return attention_mask.index_select(1, columns)


def is_plain_prompt(positions: torch.Tensor, past_key_values: Cache) -> bool:
    """
    Whether rows of positions `(B, T)` are one sequence each, from its first token on, in a new state. To ask waits for
    the device: a prompt is worth it, while nothing is traced and no gradient is to come.
    """
    if any(layer.is_initialized for layer in past_key_values.layers) or torch.is_grad_enabled():
        return False
    if positions.device.type == "meta" or is_tracing(positions):
        return False
    return bool((positions == first_positions(positions)).all())


@auto_docstring
class GrassmannModel(GrassmannPreTrainedModel):
    def __init__(self, config: GrassmannConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.max_position_embeddings is not None:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        mlp_class = GrassmannGatedMLP if config.gated_mlp else GrassmannMLP
        self.layers = nn.ModuleList(
            [GrassmannBlock(config, make_mixer(config, i), mlp_class) for i in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    def check_length(self, length: int, position_ids: torch.Tensor) -> None:
        """
        Args:
            length (`int`): number of tokens so far, padding included.
            position_ids (`torch.Tensor`): their positions; looked at only if there is more than the table holds.

        Raises:
            ValueError: if a sequence is longer than the position table.
        """
        if self.embed_positions is None or length <= self.config.max_position_embeddings:
            return
        if not torch.compiler.is_compiling():
            length = int(position_ids.max()) + 1
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"A sequence of {length} tokens is longer than the position table: `max_position_embeddings` is "
                f"{self.config.max_position_embeddings}. Shorten the sequence, or use a model with a larger table or "
                "with `max_position_embeddings=None`."
            )

    def check_cache(self, past_key_values: Cache, batch_size: int) -> None:
        """
        Raises:
            ValueError: if the model cannot decode a batch with this state.
        """
        if not self.config.is_causal:
            raise ValueError(f"`{CACHE_NAME}` needs `is_causal=True`: a token here also depends on those after it.")
        layer_types = [getattr(layer, "_layer_type", None) for layer in past_key_values.layers]
        if layer_types != self.config.layer_types:
            raise ValueError(
                f"`{CACHE_NAME}` must hold {len(self.layers)} layers of this model's kind, got {past_key_values}. "
                "Make it from the model's configuration, as in `DynamicCache(config=model.config)`."
            )
        state = past_key_values.layers[0]
        if state.is_initialized and state.batch_size != batch_size:
            raise ValueError(
                f"`{CACHE_NAME}` holds a state of {state.batch_size} rows, but the batch has {batch_size}. Decode "
                "each batch with a cache of its own, or call the cache's `reset` before the next."
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                f"`{CACHE_NAME}` cannot be used with gradient checkpointing in training: layers run again in the "
                "backward pass, on a state that has moved on. Leave one of them away."
            )

    def derive_position_ids(
        self,
        attention_mask: torch.Tensor | None,
        new_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        length: int,
        device: torch.device,
    ) -> torch.Tensor:
        """
        Position of each of the `length` new tokens among the real tokens of its row, `(B, T)` or `(1, T)`: counted
        over a mask that includes the tokens already seen, else counted on from the decoding state.

        Raises:
            ValueError: if a sequence is longer than the position table.
        """
        total = length if attention_mask is None else attention_mask.shape[1]
        if attention_mask is None:
            position_ids = torch.arange(length, device=device)[None]
        else:
            position_ids = (new_mask.long().cumsum(-1) - 1).clamp(min=0)
        if past_key_values is not None:
            seen = past_key_values.layers[0].cumulative_length
            position_ids = position_ids + past_key_values.layers[0].next_positions()
            if total > length:
                # Not so where an adapter has put columns for tokens of its own before a mask of the new ones alone.
                covers_all = seen.to(device) + length <= total
                counted = new_tokens_mask(attention_mask.long().cumsum(-1) - 1, past_key_values, length)
                position_ids = torch.where(covers_all, counted.clamp(min=0), position_ids)
            # Reading the count waits for the device: not without a table that it could run past.
            if self.embed_positions is not None and not torch.compiler.is_compiling():
                total = max(total, int(seen) + length)
        self.check_length(total, position_ids)
        return position_ids

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(custom_args=CACHE_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        past_key_values = given_cache(past_key_values, cache)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "`attention_mask` must have shape (batch, length), with 0 for padding: there is no attention matrix "
                f"to mask. Got shape {tuple(attention_mask.shape)}."
            )
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, "input_ids", "Is the tokenizer that of the model?")
        batch_size, length = inputs_embeds.shape[:2]
        if past_key_values is not None:
            self.check_cache(past_key_values, batch_size)
        if attention_mask is not None and (
            attention_mask.shape[1] < length or (attention_mask.shape[1] > length and past_key_values is None)
        ):
            raise ValueError(
                f"`attention_mask` must have one column for each of the {length} tokens, and may have more only for "
                f"those in `{CACHE_NAME}`. Got shape {tuple(attention_mask.shape)}."
            )

        new_mask = None
        if attention_mask is not None:
            new_mask = new_tokens_mask(attention_mask, past_key_values, length)

        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch_size, "cu_seq_lens_q")
            cu_seqlens = cu_seqlens.to(inputs_embeds.device)

        if use_cache and past_key_values is None and self.config.is_causal:
            past_key_values = DynamicCache(config=self.config)
        # Rows are one sequence each, from its first token on: memories are faster where they need not look.
        whole_rows = position_ids is None and attention_mask is None and cu_seqlens is None and past_key_values is None
        if position_ids is None and cu_seqlens is not None:
            position_ids = positions_from_cu_seqlens(cu_seqlens, length)
            self.check_length(kwargs.get("max_length_q") or 0, position_ids)
        elif position_ids is None:
            device = inputs_embeds.device
            position_ids = self.derive_position_ids(attention_mask, new_mask, past_key_values, length, device)

        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + look_up(
                self.embed_positions, position_ids, "position_ids", "Shorten the sequences."
            )
        hidden_states = self.dropout(hidden_states)

        positions = position_ids.expand(batch_size, length)
        if cu_seqlens is not None:
            positions = separate_sequences(positions, cu_seqlens)
        if new_mask is not None:
            positions = positions.masked_fill(new_mask == 0, NO_POSITION)
        if past_key_values is not None and "memory" in self.config.layer_mixers:
            whole_rows = is_plain_prompt(positions, past_key_values)
        for layer, mixer in zip(self.layers, self.config.layer_mixers):
            known = whole_rows and mixer == "memory"
            hidden_states = layer(hidden_states, None if known else positions, past_key_values, **kwargs)

        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values})


@auto_docstring
class GrassmannForCausalLM(GrassmannPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Whether training computes the loss without logits. Of a run and not of a checkpoint, so no configuration field.
    fused_loss = False

    def __init__(self, config: GrassmannConfig):
        super().__init__(config)
        # Now and not on import: Liger looks for GPUs then, which no process may have done that forks others for them.
        register_with_liger()
        if not config.is_causal:
            raise ValueError("`is_causal` must be True in a causal language model, got False.")
        self.model = GrassmannModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """None: states are made by what they hold first, not as keys and values of a number of heads."""

    def _assisted_decoding(self, *args, **kwargs):
        outputs = super()._assisted_decoding(*args, **kwargs)
        # Decoding may go on from the state, which is of constant size only where tokens are not taken back any more.
        for layer in kwargs[CACHE_NAME].layers:
            layer.stop_past_recording()
        return outputs

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, **kwargs):
        """The mask of the new tokens: the decoding state knows the old ones, and the shape stays the same per step."""
        if attention_mask is None:
            return None
        # A copy: the strides of a view follow the whole mask's length, and compiled decoding would recompile per step.
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, position_ids=None, **kwargs):
        if position_ids is not None:
            # Unlike `input_ids`, they count a prompt that was given as embeddings.
            self.model.check_length(position_ids.shape[1], position_ids)
        return super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
        )

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict, -100 where there is no loss. They are shifted inside the model.
        skip_logits (`bool`, *optional*):
            Whether to compute the loss without logits, which are `None` then: in less memory, by Liger's kernels on a
            GPU and by PyTorch elsewhere. By default so in training with labels, if the attribute `fused_loss` of the
            model is True.
        past_key_values (`Cache`, *optional*):
            Decoding state, as earlier calls have left it. Transformers calls it `cache` from version 5.24 on.
        cache (`Cache`, *optional*):
            The same.

        Example:

        ```python
        >>> import torch
        >>> from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM

        >>> model = GrassmannForCausalLM(GrassmannConfig())
        >>> model(torch.tensor([[7592, 2088]])).logits.shape
        torch.Size([1, 2, 30522])
        ```"""
        # All tokens have a loss, or none.
        can_skip = isinstance(logits_to_keep, int) and logits_to_keep == 0
        can_skip = can_skip and (labels is not None or kwargs.get("shift_labels") is not None)
        if skip_logits and not can_skip:
            raise ValueError("`skip_logits=True` leaves the loss alone: it needs `labels`, and no `logits_to_keep`.")
        if skip_logits is None:
            skip_logits = self.fused_loss and self.training and can_skip
        if skip_logits and self.loss_function is not ForCausalLMLoss:
            raise ValueError(
                "The fused loss is that of Transformers, but `loss_function` of this model is another one. Leave "
                "`fused_loss` and `skip_logits` at False."
            )

        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        logits, loss = None, None
        if skip_logits:
            loss = fused_causal_lm_loss(outputs.last_hidden_state, self.lm_head, labels, **kwargs)
        else:
            slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, slice_indices, :])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


def pool(hidden_states: torch.Tensor, real: torch.Tensor, pooling: str) -> torch.Tensor:
    """
    One vector a row, from its real tokens alone: `(B, T, d)` -> `(B, d)`.

    Args:
        real (boolean `torch.Tensor` of shape `(B, T)`): which tokens are no padding.
        pooling (`str`): `"mean"`, `"first"` or `"last"`: over, or of, the real tokens.
    """
    real = real.to(hidden_states.device)
    if pooling == "mean":
        # Not a product with the mask: what padding holds must not matter, not even if it is infinite.
        total = hidden_states.masked_fill(~real[..., None], 0).sum(1)
        return total / real.sum(1, keepdim=True).clamp(min=1)
    index = torch.arange(real.shape[1], device=real.device)
    index = (real * (index if pooling == "last" else index.flip(0) + 1)).argmax(-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=real.device), index]


@auto_docstring
class GrassmannForSequenceClassification(GenericForSequenceClassification, GrassmannPreTrainedModel):
    @can_return_tuple
    @auto_docstring(custom_args=CACHE_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        batch_size, length = hidden_states.shape[:2]
        if self.config.pad_token_id is None and batch_size > 1:
            raise ValueError(
                f"`pad_token_id` must be a token id to classify a batch of {batch_size} rows, got None: without it, "
                "the last token of each row cannot be told from padding. Set `model.config.pad_token_id`."
            )
        if attention_mask is not None:
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            real = hidden_states.new_ones(batch_size, length, dtype=torch.bool)
        pooling = self.config.classifier_pooling or ("last" if self.config.is_causal else "mean")
        logits = self.score(pool(hidden_states, real, pooling))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)

        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


# Trainer smooths the labels of the next tokens, instead of those of the tokens themselves, in models it finds here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GrassmannConfig.model_type] = GrassmannForCausalLM.__name__

__all__ = [
    "GrassmannForCausalLM",
    "GrassmannForSequenceClassification",
    "GrassmannModel",
    "GrassmannPreTrainedModel",
]
