# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Classifiers that read Plücker features of a pretrained encoder's tokens (arXiv 2512.19428)."""

import dataclasses
import difflib
import inspect
import os

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .checkpoint_grassmann import CheckpointMixin
from .configuration_grassmann import GrassmannConfig
from .configuration_grassmann_plucker import GrassmannPluckerConfig
from .modeling_grassmann import GrassmannBlock, GrassmannModel, pool
from .plucker import PluckerProjection, PluckerWindowMixer, gated_mix, window_pair_weights


class TokenwiseMixer(nn.Module):
    """[`PluckerWindowMixer`] with zeros in the place of its features: what the head can do without them."""

    def __init__(self, config: GrassmannPluckerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return self.norm(gated_mix(hidden_states, torch.zeros_like(hidden_states), self.gate_proj))


class ConstantMixer(nn.Module):
    """
    A learned vector `g` in the place of features: `LN(h + α h + (1 - α) g)` with `α = σ(W [h; g] + b)`. That is all a
    mixer with a residual can do with planes `z ∧ z`: they are zero, and `g` is the bias of their projection.
    """

    def __init__(self, config: GrassmannPluckerConfig):
        super().__init__()
        self.feature = nn.Parameter(torch.zeros(config.hidden_size))
        self.gate_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        features = self.feature.expand_as(hidden_states)
        return self.norm(hidden_states + gated_mix(hidden_states, features, self.gate_proj))


def make_window_mixer(config: GrassmannPluckerConfig) -> nn.Module:
    if not config.use_plucker_features:
        return TokenwiseMixer(config)
    return PluckerWindowMixer(
        config.hidden_size,
        config.reduced_size,
        config.window_size,
        config.window_stride,
        num_heads=config.num_heads,
        pair_sharing=config.pair_sharing,
        plucker_eps=config.plucker_eps,
        layer_norm_eps=config.layer_norm_eps,
    )


class TransformerLayer(nn.TransformerEncoderLayer):
    """PyTorch's own layer, for comparison."""

    def __init__(self, config: GrassmannPluckerConfig):
        super().__init__(
            config.hidden_size,
            config.num_heads,
            config.intermediate_size,
            config.hidden_dropout,
            ACT2FN[config.hidden_act],
            config.layer_norm_eps,
            batch_first=True,
            norm_first=config.norm_placement == "pre",
        )
        # PyTorch's fused path would read the weights past adapters that were put on the layer, without a word.
        self.activation_relu_or_gelu = 0

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states, src_key_padding_mask=~real)


def make_layer(config: GrassmannPluckerConfig) -> nn.Module:
    if config.head_type in ("transformer", "pooled_transformer"):
        return TransformerLayer(config)
    if config.head_type == "pooled_gated":
        return GrassmannBlock(config, ConstantMixer(config))
    return GrassmannBlock(config, make_window_mixer(config))


class MixingHead(nn.Module):
    """Layers that mix the backbone's tokens, projected to the head's own size, and pooling."""

    def __init__(self, config: GrassmannPluckerConfig, input_size: int):
        super().__init__()
        self.output_size = config.hidden_size
        self.pooling = config.pooling
        self.projection = nn.Linear(input_size, config.hidden_size)
        self.layers = nn.ModuleList([make_layer(config) for _ in range(config.num_hidden_layers)])
        # The last residual of pre-norm layers has not been normalised yet.
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_placement == "pre" else None

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        hidden_states = self.projection(hidden_states)  # (B, T, d)
        # Real tokens to the front: windows are counted from the first of them, wherever the padding is.
        index = torch.arange(real.shape[1], device=real.device)
        order = torch.where(real, index, index + real.shape[1]).argsort(-1)  # (B, T)
        hidden_states = hidden_states.gather(1, order[..., None].expand_as(hidden_states))
        real = real.gather(1, order)
        for layer in self.layers:
            hidden_states = layer(hidden_states, real)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return pool(hidden_states, real, self.pooling)


class PooledHead(MixingHead):
    """[`MixingHead`] on one vector a row, the pooled tokens of the backbone, so that there is nothing to mix."""

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        pooled = pool(hidden_states, real, self.pooling)[:, None]  # (B, 1, input_size)
        return super().forward(pooled, real.new_ones(pooled.shape[:2]))


class LinearHead(nn.Module):
    """The backbone's tokens, pooled."""

    def __init__(self, config: GrassmannPluckerConfig, input_size: int):
        super().__init__()
        self.output_size = input_size
        self.pooling = config.pooling

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return pool(hidden_states, real, self.pooling)


# Each maps the backbone's tokens (B, T, input_size) and which of them are real (B, T) to (B, output_size).
HEADS = {
    "grassmann": MixingHead,
    "transformer": MixingHead,
    "linear": LinearHead,
    "pooled_gated": PooledHead,
    "pooled_transformer": PooledHead,
}


def check_backbone(config: PreTrainedConfig, backbone: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if the model does not map a text's tokens to one vector each.
    """
    name = type(backbone).__name__
    expected = MODEL_MAPPING.get(type(config), type(backbone))
    # Funnel has two base models, of which `AutoModel` makes the first.
    expected = expected[0] if isinstance(expected, tuple) else expected
    if type(backbone) is not expected:
        raise ValueError(
            f"`backbone` must be the {expected.__name__} that `AutoModel` makes of its configuration, got a {name}."
        )
    if config.is_encoder_decoder:
        raise ValueError(f"`backbone` must be a text encoder, but {name} is an encoder-decoder.")
    if backbone.main_input_name != "input_ids":
        raise ValueError(
            f"`backbone` must be a text encoder, but the main input of {name} is `{backbone.main_input_name}`."
        )
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(
            f"`backbone` must be a text encoder with one vector a token, but {type(config).__name__} has no "
            "`hidden_size`."
        )


@auto_docstring(
    custom_intro="""
    A text encoder of Transformers with a classification head on its tokens: Plücker features of token pairs, or one of
    the heads they are compared with. Heads and pooling see real tokens only, so that padding changes a row's logits no
    more than it changes the backbone's own outputs.
    """
)
class GrassmannPluckerForSequenceClassification(CheckpointMixin, PreTrainedModel):
    AUTO_MAP = {
        "AutoConfig": "configuration_grassmann_plucker.GrassmannPluckerConfig",
        "AutoModelForSequenceClassification": "modeling_grassmann_plucker.GrassmannPluckerForSequenceClassification",
    }
    config: GrassmannPluckerConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GrassmannBlock", "TransformerLayer"]
    # Attention is the backbone's own affair.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GrassmannPluckerConfig, backbone: PreTrainedModel | None = None):
        r"""
        backbone (`PreTrainedModel`, *optional*):
            The backbone itself, of the configuration `config.backbone_config`. By default a new one is made.
        """
        # Fields that were set after the configuration was made, as `from_pretrained` does, have not been checked yet.
        config.validate()
        super().__init__(config)
        self.num_labels = config.num_labels
        if backbone is None:
            # The type of the head's weights, not the one in which the backbone was once stored.
            # From a folder with its code, Transformers loads configurations and models as different modules.
            is_grassmann = config.backbone_config.model_type == GrassmannConfig.model_type
            from_config = GrassmannModel._from_config if is_grassmann else AutoModel.from_config
            backbone = from_config(config.backbone_config, dtype=torch.get_default_dtype())
        self.backbone = backbone
        check_backbone(config.backbone_config, self.backbone)
        # A pooler would be made of weights that nothing here uses, and that get no gradient. Some backbones call it.
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = nn.Identity()
        if getattr(self.backbone.config, "use_cache", False):
            self.backbone.config.use_cache = False
        self.backbone_inputs = list(inspect.signature(self.backbone.forward).parameters)

        self.head = HEADS[config.head_type](config, config.backbone_config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(self.head.output_size, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()
        # FSDP wraps the layers that are named, and refuses a name without a layer: there are those of one head only.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        self.train()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        backbone_kwargs: dict | None = None,
        **config_fields,
    ) -> "GrassmannPluckerForSequenceClassification":
        """
        A new head, with random weights, on a pretrained backbone.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`):
                Id on the Hub or folder of a model that `AutoModel` loads, or the model itself, which then becomes part
                of the new one: without its pooler, and without a decoding state.
            backbone_kwargs (`dict`, *optional*):
                Arguments of `AutoModel.from_pretrained`, such as `revision`. Weights are loaded in float32, whatever
                their type in the file, unless it names another `dtype`.
            config_fields (*optional*):
                Fields of [`GrassmannPluckerConfig`], `num_labels`, `id2label`, `label2id` or `problem_type`.

        Returns:
            the model, in evaluation mode. `save_pretrained` writes backbone and head into one file.

        Raises:
            ValueError: if a field is unknown, or the backbone is not a text encoder, or one that only its own code
                knows.

        Example:

        ```python
        >>> from modeling_grassmann import GrassmannPluckerForSequenceClassification

        >>> model = GrassmannPluckerForSequenceClassification.from_backbone(
        ...     "distilbert/distilbert-base-uncased", num_labels=3, head_type="grassmann"
        ... )
        ```"""
        allowed = {field.name for field in dataclasses.fields(GrassmannPluckerConfig)} - {"backbone_config"}
        allowed |= {"num_labels", "id2label", "label2id", "problem_type"}
        for name in config_fields:
            if name not in allowed:
                closest = difflib.get_close_matches(name, sorted(allowed), n=3, cutoff=0)
                raise ValueError(f"`{name}` is no field of GrassmannPluckerConfig. Close to it: {', '.join(closest)}.")
        if not isinstance(backbone, PreTrainedModel):
            backbone = AutoModel.from_pretrained(backbone, **{"dtype": torch.float32, **(backbone_kwargs or {})})
        model_type = backbone.config.model_type
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`backbone` is of the type {model_type!r}, which Transformers does not know: what is saved would not "
                "load. Register its configuration with `AutoConfig.register` and its class with "
                "`AutoModel.register`, here and wherever the model is loaded, or choose another backbone."
            )
        config = GrassmannPluckerConfig(backbone_config=backbone.config, **config_fields)
        return cls(config, backbone).to(backbone.dtype).eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PluckerProjection):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, ConstantMixer):
            init.zeros_(module.feature)
        elif isinstance(module, PluckerWindowMixer):
            weights = window_pair_weights(module.window_size, module.num_heads, module.pair_sharing)
            init.copy_(module.pair_weights, weights)

    def train(self, mode: bool = True) -> "GrassmannPluckerForSequenceClassification":
        super().train(mode)
        if self.config.freeze_backbone:
            # Here and not once and for all: `from_pretrained` replaces the parameters after the construction.
            self.backbone.requires_grad_(False)
            self.backbone.eval()
        return self

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.backbone_config.vocab_size = self.backbone.config.vocab_size
        return embeddings

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Which of the two texts a token belongs to. Ignored where the backbone knows no such input.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Classes, for the cross-entropy; other losses follow from `config.problem_type`.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "`attention_mask` must have shape (batch, length), with 0 for padding. Got shape "
                f"{tuple(attention_mask.shape)}."
            )
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        optional = {
            name: value for name, value in optional.items() if value is not None and name in self.backbone_inputs
        }
        for name in ("output_hidden_states", "output_attentions"):
            # A setting of the whole model, which the backbone's own configuration does not know.
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        outputs = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **optional, **kwargs)
        hidden_states = outputs.last_hidden_state
        if attention_mask is None:
            real = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        else:
            real = attention_mask.to(hidden_states.device) != 0
        logits = self.classifier(self.dropout(self.head(hidden_states, real)))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)

        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.get("attentions")
        )


__all__ = ["GrassmannPluckerForSequenceClassification"]
