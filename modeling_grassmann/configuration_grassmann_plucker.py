# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of classifiers that put a Grassmann-Plücker head on a pretrained encoder."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .configuration_grassmann import (
    FORMAT_VERSION,
    MAX_LAYERS,
    POOLINGS,
    GrassmannConfig,
    check_format_version,
    check_label_count,
)


HEAD_TYPES = ("grassmann", "transformer", "linear", "pooled_gated", "pooled_transformer")
PAIR_SHARINGS = ("distance", "enumeration")
# The head keeps a factor for each pair of a window.
MAX_WINDOW = 2048


def check_backbone_fields(fields: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if a damaged file asks for so many layers or labels that making them would not end.
    """
    check_label_count(fields)
    model_type = fields["model_type"]
    names = {"num_hidden_layers"}
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        names.add(CONFIG_MAPPING[model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    for name in names:
        if isinstance(fields.get(name), int) and fields[name] > MAX_LAYERS:
            raise ValueError(f"`{name}` of `backbone_config` must be at most {MAX_LAYERS}, got {fields[name]}.")


@strict
class GrassmannPluckerConfig(PreTrainedConfig):
    r"""
    Configuration of [`GrassmannPluckerForSequenceClassification`]: any text encoder of Transformers, and a head that
    reads its tokens. The defaults are the head of arXiv 2512.19428; fields marked "open" are what the paper leaves
    open.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone. Defaults to a DistilBERT of its default size.
        head_type (`str`, *optional*, defaults to `"grassmann"`):
            `"grassmann"` (Plücker features of token pairs), `"transformer"` (PyTorch's encoder layers, for
            comparison) or `"linear"` (pooling alone). `"pooled_gated"` and `"pooled_transformer"` pool first, so that
            their layers mix no tokens: the heads of a public reproduction, for its checkpoints.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether only the head is trained. A frozen backbone also runs without dropout. To train it after all, load
            the model with `freeze_backbone=False`.
        hidden_size (`int`, *optional*, defaults to 256):
            Dimension to which the head projects the backbone's tokens; not used by the linear head.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Number of the head's mixing or Transformer layers.
        num_heads (`int`, *optional*, defaults to 4):
            Mixing heads, which share out the pairs of a window, or attention heads.
        intermediate_size (`int`, *optional*, defaults to 512):
            Dimension of the head's feed-forward networks.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the head's feed-forward networks.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the head.
        reduced_size (`int`, *optional*, defaults to 64):
            Size of the reduced vectors. Open: the mixing heads divide it among themselves, as attention heads divide
            the hidden size, so that each has planes in R^(reduced_size / num_heads).
        window_size (`int`, *optional*, defaults to 8):
            Tokens in a window, at most 2048. Each token is paired with all others of its windows, on both sides.
            Windows are counted from a row's first real token.
        window_stride (`int`, *optional*, defaults to 8):
            Distance between the starts of windows, a divisor of `window_size`.
        pair_sharing (`str`, *optional*, defaults to `"distance"`):
            Open: how mixing heads share out the pairs of a window. `"distance"`: a head takes every pair at some
            distances, so that it can tell them apart; `"enumeration"`: every `num_heads`-th pair, in order.
        norm_placement (`str`, *optional*, defaults to `"post"`):
            Open: `"post"` or `"pre"`, as in [`GrassmannConfig`]; of the Transformer layers too.
        pooling (`str`, *optional*, defaults to `"mean"`):
            Open: how the head's tokens become one vector: the `"mean"` of the real ones, the `"first"` or the
            `"last"`.
        use_plucker_features (`bool`, *optional*, defaults to `True`):
            `False` puts zeros in the place of the Plücker features. What is left works token by token: an ablation.
        plucker_eps (`float`, *optional*, defaults to 1e-3):
            Sine of the angle up to which two vectors count as parallel and span no plane.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the head's LayerNorms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the head's initial weights, but for the projections of the Transformer's attention,
            which PyTorch initialises.
        format_version (`int`, *optional*, defaults to 1):
            Version of the file format; a newer one than this code knows is refused.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: for an impossible value; the message names the field.

    Example:

    ```python
    >>> from transformers import BertConfig
    >>> from modeling_grassmann import GrassmannPluckerConfig, GrassmannPluckerForSequenceClassification

    >>> configuration = GrassmannPluckerConfig(backbone_config=BertConfig(num_hidden_layers=2), num_labels=3)
    >>> model = GrassmannPluckerForSequenceClassification(configuration)
    ```
    """

    model_type = "grassmann_plucker"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    head_type: str = "grassmann"
    freeze_backbone: bool = False
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    reduced_size: int = 64
    window_size: int = 8
    window_stride: int = 8
    pair_sharing: str = "distance"
    norm_placement: str = "post"
    pooling: str = "mean"
    use_plucker_features: bool = True
    plucker_eps: float = 1e-3
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        check_label_count(kwargs)
        if self.backbone_config is None:
            self.backbone_config = AutoConfig.for_model("distilbert")
        elif isinstance(self.backbone_config, dict):
            if "model_type" not in self.backbone_config:
                raise ValueError("`backbone_config` must name the `model_type` of the backbone, such as 'distilbert'.")
            if self.backbone_config["model_type"] == self.model_type:
                raise ValueError(
                    f"`backbone_config` must be that of a text encoder, got `model_type` {self.model_type!r}."
                )
            check_backbone_fields(self.backbone_config)
            if self.backbone_config["model_type"] == GrassmannConfig.model_type:
                # Known here without the package too, where this file came with a checkpoint.
                self.backbone_config = GrassmannConfig.from_dict(self.backbone_config)
            else:
                self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        # Otherwise a loaded backbone would forget which attention it uses.
        kwargs.setdefault("attn_implementation", self.backbone_config._attn_implementation)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # May be a folder of this machine; of the whole model it is not saved either.
        output["backbone_config"].pop("_name_or_path", None)
        return output

    def validate_format(self):
        check_format_version(self)

    def validate_architecture(self):
        for name in ("hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "window_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {self.num_hidden_layers}.")
        if self.window_size < 2:
            raise ValueError(
                f"`window_size` must be at least 2, since a pair needs two tokens, got {self.window_size}."
            )
        if self.window_size > MAX_WINDOW:
            raise ValueError(f"`window_size` must be at most {MAX_WINDOW}, got {self.window_size}.")
        if self.window_size % self.window_stride != 0:
            raise ValueError(
                f"`window_stride` must divide `window_size` ({self.window_size}), so that every token lies in as many "
                f"windows as any other, got {self.window_stride}."
            )
        if self.head_type == "grassmann" and (
            self.reduced_size % self.num_heads != 0 or self.reduced_size < 2 * self.num_heads
        ):
            raise ValueError(
                f"`reduced_size` must be a multiple of `num_heads` ({self.num_heads}), with at least 2 dimensions a "
                f"head, got {self.reduced_size}."
            )
        if self.head_type in ("transformer", "pooled_transformer") and self.hidden_size % self.num_heads != 0:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_heads` ({self.num_heads}), got {self.hidden_size}."
            )

    def validate_choices(self):
        choices = {
            "head_type": HEAD_TYPES,
            "pair_sharing": PAIR_SHARINGS,
            "norm_placement": ("post", "pre"),
            "pooling": POOLINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")

    def validate_ranges(self):
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"`hidden_dropout` must be at least 0 and less than 1, got {self.hidden_dropout}.")
        if not 0 < self.plucker_eps < 1:
            raise ValueError(f"`plucker_eps` must be greater than 0 and less than 1, got {self.plucker_eps}.")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


__all__ = ["GrassmannPluckerConfig"]
